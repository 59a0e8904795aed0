//! What must hold: after each event, whatever is read, and when all is calm.

use std::collections::BTreeMap;

use kuma_cluster::Token;
use kuma_core::{DiskId, Epoch};

use crate::disk::Disk;

/// What clients were told of one entity. Versions and keys belong together for ever, once anybody was told.
#[derive(Debug, Default)]
struct Told {
    by_version: BTreeMap<u64, u64>,
    by_key: BTreeMap<u64, u64>,
}

#[derive(Debug, Default)]
pub(crate) struct Oracle {
    entities: BTreeMap<usize, Told>,
    /// Which disk has owned a slot under an epoch.
    owners: BTreeMap<(usize, Epoch), DiskId>,
    floors: BTreeMap<(DiskId, usize), Epoch>,
    newest: BTreeMap<usize, Epoch>,
}

impl Oracle {
    /// An event has this version. Also when an append is repeated.
    pub(crate) fn told(&mut self, entity: usize, key: u64, version: u64) -> Result<(), String> {
        let told = self.entities.entry(entity).or_default();
        let by_version = *told.by_version.entry(version).or_insert(key);
        let by_key = *told.by_key.entry(key).or_insert(version);
        match (by_version == key, by_key == version) {
            (true, true) => Ok(()),
            (_, false) => Err(format!("entity {entity}: append {key} is there twice, as {by_key} and {version} (I4)")),
            (false, _) => {
                Err(format!("entity {entity}: version {version} was append {by_version}, and is {key} (I3, order)"))
            }
        }
    }

    /// The version that a client was told.
    pub(crate) fn version_of(&self, entity: usize, key: u64) -> Option<u64> {
        self.entities.get(&entity)?.by_key.get(&key).copied()
    }

    /// All events of an entity, as a disk that serves it says.
    pub(crate) fn read(&mut self, entity: usize, events: &[(u64, u64)]) -> Result<(), String> {
        for (place, (version, key)) in (1..).zip(events) {
            if *version != place {
                return Err(format!("entity {entity}: version {version} stands where {place} should"));
            }
            self.told(entity, *key, *version)?;
        }
        let newest = self.entities.get(&entity).and_then(|told| told.by_version.last_key_value());
        match newest {
            Some((version, _)) if *version > events.len() as u64 => Err(format!(
                "entity {entity}: {version} events were acknowledged or seen, and {} are there (I3, I5)",
                events.len()
            )),
            _ => Ok(()),
        }
    }

    /// The records of all disks, those that are down too.
    pub(crate) fn check(&mut self, disks: &[Disk], lost: &[bool]) -> Result<(), String> {
        for (s, is_lost) in lost.iter().enumerate() {
            self.check_slot(disks, s, *is_lost)?;
        }
        Ok(())
    }

    fn check_slot(&mut self, disks: &[Disk], s: usize, is_lost: bool) -> Result<(), String> {
        let (mut owners, mut authorities) = (0, 0);
        for disk in disks {
            let place = &disk.places[s];
            let record = place.handoff.record;
            if disk.is_up() {
                let durable = disk.slots().record(place.slot);
                let parts = durable.map(|durable| (durable.token, durable.staged, durable.floor));
                if parts != Some((record.token, record.staged, record.floor)) {
                    return Err(format!("node {}: slot {s} is not on the disk as the rules have it", disk.node));
                }
            }
            let floor = self.floors.entry((disk.id, s)).or_insert(Epoch::NEVER);
            if record.floor < *floor {
                return Err(format!("node {}: the floor of slot {s} has fallen", disk.node));
            }
            *floor = record.floor;
            match record.token {
                Token::Owned(epoch) => {
                    (owners, authorities) = (owners + 1, authorities + 1);
                    if *self.owners.entry((s, epoch)).or_insert(disk.id) != disk.id {
                        return Err(format!("slot {s}: two disks have owned epoch {epoch:?} (I1)"));
                    }
                    let newest = self.newest.entry(s).or_insert(Epoch::NEVER);
                    if epoch < *newest {
                        return Err(format!("slot {s}: the epoch has fallen from {newest:?} to {epoch:?}"));
                    }
                    *newest = epoch;
                }
                Token::Released { epoch, to, transfer, is_taken } => {
                    let target = disks.iter().find(|disk| disk.id == to);
                    let target = target.map(|target| target.places[s].handoff.record);
                    let is_there = target.is_some_and(|target| target.floor >= epoch);
                    if target.is_some() && !is_there {
                        authorities += 1;
                        let staged = target.and_then(|target| target.staged);
                        if is_taken || staged.is_none_or(|staged| staged.transfer != transfer) {
                            return Err(format!("slot {s} is released to a disk that has nothing of it (I6)"));
                        }
                    }
                }
                Token::None => {}
            }
        }
        if owners > 1 {
            return Err(format!("slot {s}: {owners} disks own it (I1)"));
        }
        match authorities {
            1 => Ok(()),
            0 if is_lost => Ok(()),
            _ => Err(format!("slot {s}: {authorities} disks have the say (I2)")),
        }
    }
}
