//! Drives the erasures of slots that this node owns over the other disks, and takes its part in those of others.
//!
//! The rules are [`Erasure::step`] and [`Tombstones::shred`]; the store's eraser has made this disk's own writes durable before it asks here, and
//! makes the receipt after it was told that nobody is waited for.
//!
//! Invariants:
//! - An answer leaves after the key has ended on this disk, durably.
//! - What was answered is forgotten with the node, and with the slot: whoever owns it then asks anew.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Weak},
    time::Duration,
};

use futures_util::future::{BoxFuture, join_all};
use kuma_core::{DiskId, Elsewhere, ErasedLife, OtherDisks, Slot, SlotRecord, ToldReceipt};
use parking_lot::Mutex;

use crate::{
    erasure::{Effect, Envelope, Erasure, Input, KeyId, Message, Plan, Tombstone, Tombstones, Write},
    fail_points::fail_point,
    handoff::{Handoff, Safeguards},
    shared::Shared,
    wire::{self, ShredFrame, ShredReply, kind},
};

/// A disk that has not answered by then is asked again later.
const SHRED_WITHIN: Duration = Duration::from_secs(5);
/// Receipts in a frame.
const TOLD_TOGETHER: usize = 64;

/// The erasures that this node works at.
pub(crate) struct Erasures {
    shared: Weak<Shared>,
    jobs: Mutex<HashMap<KeyId, Job>>,
}

struct Job {
    erasure: Erasure,
    slot: Slot,
    /// Kind and id, which nobody knows any more once the node has stopped.
    name: Option<(String, String)>,
    /// A receipt that another node has.
    receipt: Option<String>,
    answered: Vec<DiskId>,
}

impl Erasures {
    pub(crate) fn new(shared: &Arc<Shared>) -> Arc<Self> {
        Arc::new(Erasures { shared: Arc::downgrade(shared), jobs: Mutex::default() })
    }

    async fn shred_all(&self, lives: &[ErasedLife]) -> Vec<Elsewhere> {
        let Some(shared) = self.shared.upgrade() else {
            return lives.iter().map(|_| Elsewhere::Waiting("the node is stopping".to_owned())).collect();
        };
        let mut ended: HashMap<KeyId, Vec<DiskId>> = HashMap::new();
        let mut to_ask: BTreeMap<DiskId, Vec<ErasedLife>> = BTreeMap::new();
        for life in lives {
            self.begin(&shared, life, &mut to_ask, &mut ended);
        }
        let asked = to_ask.into_iter().map(|(disk, lives)| ask(&shared, disk, lives));
        for (disk, reply) in join_all(asked).await {
            let Some(reply) = reply else { continue };
            for (key_id, receipt) in reply.done {
                self.answered(&shared, disk, key_id, receipt, &mut ended);
            }
        }
        lives.iter().map(|life| self.outcome(&shared, life, &ended)).collect()
    }

    /// Puts in that this disk has done its part, or that it is time to ask again.
    fn begin(
        &self,
        shared: &Shared,
        life: &ErasedLife,
        to_ask: &mut BTreeMap<DiskId, Vec<ErasedLife>>,
        ended: &mut HashMap<KeyId, Vec<DiskId>>,
    ) {
        let (slot, disks) = (handoff(shared, life.slot), shared.state().disks.clone());
        let tombstone = Tombstone { key_id: life.key_id, id_hash: life.entity };
        let mut jobs = self.jobs.lock();
        let is_new = !jobs.contains_key(&life.key_id);
        let job = jobs.entry(life.key_id).or_insert_with(|| Job {
            erasure: Erasure::new(tombstone),
            slot: life.slot,
            name: None,
            receipt: None,
            answered: Vec::new(),
        });
        if job.name.is_none() {
            job.name.clone_from(&life.name);
        }
        let plan = match is_new {
            true => {
                // The store's eraser has carried out what this plans.
                let _ = job.erasure.step(&slot, &disks, Input::Begin, Safeguards::ALL);
                job.erasure.step(&slot, &disks, Input::Begun, Safeguards::ALL)
            }
            false => job.erasure.step(&slot, &disks, Input::Remind, Safeguards::ALL),
        };
        for effect in &plan.now {
            if let Effect::Send(Envelope { to, .. }) = effect {
                to_ask.entry(*to).or_default().push(ErasedLife { name: job.name.clone(), ..life.clone() });
            }
        }
        note_end(&plan, life.key_id, ended);
    }

    fn answered(
        &self,
        shared: &Shared,
        from: DiskId,
        key_id: KeyId,
        receipt: Option<String>,
        ended: &mut HashMap<KeyId, Vec<DiskId>>,
    ) {
        let disks = shared.state().disks.clone();
        let mut jobs = self.jobs.lock();
        let Some(job) = jobs.get_mut(&key_id) else { return };
        job.receipt = job.receipt.take().or(receipt);
        job.answered.push(from);
        let message = Message::Shredded(job.erasure.tombstone());
        let slot = handoff(shared, job.slot);
        let input = Input::Message(Envelope { from, to: shared.own, message });
        let plan = job.erasure.step(&slot, &disks, input, Safeguards::ALL);
        note_end(&plan, key_id, ended);
    }

    fn outcome(&self, shared: &Shared, life: &ErasedLife, ended: &HashMap<KeyId, Vec<DiskId>>) -> Elsewhere {
        let mut jobs = self.jobs.lock();
        if !shared.is_owner(life.slot) {
            jobs.remove(&life.key_id);
            return Elsewhere::Waiting("its slot has moved; the node that owns it now goes on".to_owned());
        }
        if let Some(without) = ended.get(&life.key_id) {
            let job = jobs.remove(&life.key_id);
            let (receipt, answered) = job.map(|job| (job.receipt, job.answered)).unwrap_or_default();
            return Elsewhere::Ended {
                nodes: answered.iter().map(|disk| shared.name_of(*disk)).collect(),
                without: without.iter().map(ToString::to_string).collect(),
                receipt,
            };
        }
        let disks = shared.state().disks.clone();
        let missing = jobs.get(&life.key_id).map(|job| job.erasure.missing(&disks).collect::<Vec<_>>());
        let names: Vec<String> = missing.unwrap_or_default().into_iter().map(|disk| shared.name_of(disk)).collect();
        Elsewhere::Waiting(format!("not every node has destroyed its key yet; waiting for {}", names.join(", ")))
    }
}

/// The slot as the rules see it: an attempt to move it does not matter, for the seal has waited for what is done here.
fn handoff(shared: &Shared, slot: Slot) -> Handoff {
    Handoff::boot(shared.slots.record(slot).unwrap_or(SlotRecord::NONE))
}

fn note_end(plan: &Plan, key_id: KeyId, ended: &mut HashMap<KeyId, Vec<DiskId>>) {
    for write in &plan.writes {
        if let Write::Finish { without, .. } = write {
            ended.insert(key_id, without.iter().copied().collect());
        }
    }
}

async fn ask(shared: &Shared, disk: DiskId, lives: Vec<ErasedLife>) -> (DiskId, Option<ShredReply>) {
    let Some(transport) = shared.transport().filter(|transport| transport.is_up(disk)) else { return (disk, None) };
    let reply = transport.call(disk, kind::SHRED, wire::encode(&ShredFrame { lives }), SHRED_WITHIN).await;
    (disk, reply.ok().and_then(|reply| wire::decode(&reply)))
}

impl OtherDisks for Erasures {
    fn are_up(&self) -> bool {
        let Some(shared) = self.shared.upgrade() else { return false };
        shared.transport().is_some_and(|transport| shared.peers().into_iter().all(|disk| transport.is_up(disk)))
    }

    fn shred(&self, lives: Vec<ErasedLife>) -> BoxFuture<'_, Vec<Elsewhere>> {
        Box::pin(async move { self.shred_all(&lives).await })
    }

    fn tell(&self, receipts: Vec<ToldReceipt>) {
        let Some(shared) = self.shared.upgrade() else { return };
        receipts.chunks(TOLD_TOGETHER).for_each(|receipts| shared.cast_all(kind::RECEIPTS, &receipts));
    }
}

/// This disk's part in erasures of another one.
pub(crate) async fn serve(shared: &Arc<Shared>, from: DiskId, frame: ShredFrame) -> ShredReply {
    let disks = shared.state().disks.clone();
    let is_asked = |life: &ErasedLife| {
        let message = Message::Shred(Tombstone { key_id: life.key_id, id_hash: life.entity });
        let envelope = Envelope { from, to: shared.own, message };
        // Each one is carried out, whatever is here already.
        !Tombstones::default().shred(&disks, envelope, Safeguards::ALL).writes.is_empty()
    };
    let lives: Vec<ErasedLife> = frame.lives.into_iter().filter(is_asked).collect();
    let shredded = shared.slots.shred(&lives).await;
    fail_point("shred.committed");
    match shredded {
        Ok(receipts) => ShredReply { done: lives.iter().map(|life| life.key_id).zip(receipts).collect() },
        Err(error) => {
            tracing::warn!(target: "kuma::cluster", %error, erasures = lives.len(), "keys that another node erases could not be destroyed; it asks again");
            ShredReply { done: Vec::new() }
        }
    }
}

/// Takes over the ledger of a disk that has let this one in: what is erased there is erased here, before this disk takes part.
pub(crate) async fn take_over_ledger(shared: &Shared, from: DiskId) -> Result<(), String> {
    let transport = shared.transport().ok_or("the node is starting")?;
    let mut after = 0;
    loop {
        let reply = transport.call(from, kind::LEDGER, wire::encode(&after), SHRED_WITHIN).await;
        let reply = reply.map_err(|error| error.to_string())?;
        let page: Option<(Vec<ErasedLife>, i64)> =
            wire::decode(&reply).ok_or("its answer cannot be read; it runs another version")?;
        let Some((lives, last)) = page else { return Ok(()) };
        shared.slots.shred(&lives).await.map_err(|error| error.to_string())?;
        after = last;
    }
}
