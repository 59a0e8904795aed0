//! Checkpoints of subscriptions to a whole cluster: how far each slot was read.
//!
//! ```text
//!  1 │ cluster (16) │ since │ disk (16), erasures │ seqs of 4096 slots │ disks, each with its positions
//! ```
//! Numbers are LEB128; a run of slots that were not read is 0 and its length.
//!
//! Invariants:
//! - What was handed out is told by the seqs, which are the same at every node. Positions only save a node from reading its logs once more: a disk
//!   that is not named, or is no more, is read from its beginning, and what is known is passed over.
//! - Erasures are numbered by each disk for itself: at another node all of them are told again.

use std::{collections::BTreeMap, fmt, str::FromStr};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use kuma_core::{DiskId, FeedAsk, SLOTS, Slot};
use serde::{Deserialize, Serialize};

const FORMAT: u8 = 1;
/// Nobody has more.
const DISKS_MAX: u64 = 4096;
const SHARDS_MAX: u64 = 256;

/// How far a subscriber to a whole cluster has come. Good at every node of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotCheckpoint {
    pub(crate) cluster: [u8; 16],
    /// Commits that are older are not wanted. Microseconds since 1970.
    pub(crate) since_us: i64,
    /// The node's disk that told of erasures, and the number of the last one.
    pub(crate) told: (DiskId, i64),
    /// By slot, the last commit that was handed out.
    pub(crate) seqs: Vec<u64>,
    /// By disk and shard, up to where everything was handed out or was of no slot that the disk had a right to.
    pub(crate) positions: BTreeMap<DiskId, Vec<u64>>,
}

/// Why a checkpoint cannot be gone on from.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SlotCheckpointError {
    /// It is not one.
    #[error("it is not a checkpoint of a subscription to a cluster")]
    NotACheckpoint,
    /// It is of another cluster.
    #[error("the checkpoint is of another cluster, whose events are others; start from the beginning or from a time")]
    OtherCluster,
    /// The cluster holds less than that.
    #[error(
        "the checkpoint is at commit {seq} of slot {slot}, whose log ends at {end}: what was committed behind that was lost; start from the beginning or from a time"
    )]
    Ahead {
        /// The slot.
        slot: Slot,
        /// What it says.
        seq: u64,
        /// What there is.
        end: u64,
    },
}

impl SlotCheckpoint {
    pub(crate) fn new(cluster: [u8; 16], told: (DiskId, i64), since_us: i64) -> Self {
        SlotCheckpoint { cluster, since_us, told, seqs: vec![0; usize::from(SLOTS)], positions: BTreeMap::new() }
    }

    /// Of one who keeps the seqs.
    pub(crate) fn without_seqs(self) -> Self {
        SlotCheckpoint { seqs: vec![0; usize::from(SLOTS)], ..self }
    }

    /// Up to which commit a slot was handed out.
    pub fn seq(&self, slot: Slot) -> u64 {
        self.seqs.get(usize::from(slot.number())).copied().unwrap_or_default()
    }

    /// As bytes: some 4 to 12 KiB where every slot was written to.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![FORMAT];
        bytes.extend(self.cluster);
        bytes.extend(self.since_us.to_be_bytes());
        bytes.extend(self.told.0.0);
        put(&mut bytes, self.told.1.max(0).cast_unsigned());
        let mut run = 0;
        for seq in &self.seqs {
            match seq {
                0 => run += 1,
                seq => {
                    end_run(&mut bytes, &mut run);
                    put(&mut bytes, *seq);
                }
            }
        }
        end_run(&mut bytes, &mut run);
        put(&mut bytes, self.positions.len() as u64);
        for (disk, positions) in &self.positions {
            bytes.extend(disk.0);
            put(&mut bytes, positions.len() as u64);
            positions.iter().for_each(|position| put(&mut bytes, *position));
        }
        bytes
    }

    /// Reads what [`SlotCheckpoint::to_bytes`] wrote.
    ///
    /// # Errors
    /// It is something else.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, SlotCheckpointError> {
        read(bytes).ok_or(SlotCheckpointError::NotACheckpoint)
    }
}

fn put(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

fn end_run(bytes: &mut Vec<u8>, run: &mut u64) {
    if *run > 0 {
        put(bytes, 0);
        put(bytes, *run);
        *run = 0;
    }
}

fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (first, rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(*first)
}

fn number(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0u64;
    for shift in (0..64).step_by(7) {
        let [byte] = take(bytes)?;
        let part = u64::from(byte & 0x7f);
        // The tenth byte has one bit, and a last byte of 0 says what its predecessor could have said.
        if part << shift >> shift != part || byte == 0 && shift > 0 {
            return None;
        }
        number |= part << shift;
        if byte < 0x80 {
            return Some(number);
        }
    }
    None
}

fn read(mut bytes: &[u8]) -> Option<SlotCheckpoint> {
    let bytes = &mut bytes;
    let [format] = take(bytes)?;
    if format != FORMAT {
        return None;
    }
    let cluster = take(bytes)?;
    let since_us = i64::from_be_bytes(take(bytes)?);
    let told = (DiskId(take(bytes)?), i64::try_from(number(bytes)?).ok()?);
    let mut seqs = Vec::with_capacity(usize::from(SLOTS));
    let mut is_run = false;
    while seqs.len() < usize::from(SLOTS) {
        match number(bytes)? {
            0 => {
                let run = usize::try_from(number(bytes)?).ok()?;
                // Two runs would have been one.
                if is_run || run == 0 || run > usize::from(SLOTS) - seqs.len() {
                    return None;
                }
                is_run = true;
                seqs.resize(seqs.len() + run, 0);
            }
            seq => {
                is_run = false;
                seqs.push(seq);
            }
        }
    }
    let mut positions = BTreeMap::new();
    let disks = number(bytes).filter(|disks| *disks <= DISKS_MAX)?;
    for _ in 0..disks {
        let disk = DiskId(take(bytes)?);
        let shards = number(bytes).filter(|shards| *shards <= SHARDS_MAX)?;
        let of_disk = (0..shards).map(|_| number(bytes)).collect::<Option<Vec<u64>>>()?;
        positions.insert(disk, of_disk);
    }
    bytes.is_empty().then_some(SlotCheckpoint { cluster, since_us, told, seqs, positions })
}

impl fmt::Display for SlotCheckpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&URL_SAFE_NO_PAD.encode(self.to_bytes()))
    }
}

impl FromStr for SlotCheckpoint {
    type Err = SlotCheckpointError;

    fn from_str(text: &str) -> Result<Self, SlotCheckpointError> {
        let bytes = URL_SAFE_NO_PAD.decode(text).map_err(|_| SlotCheckpointError::NotACheckpoint)?;
        SlotCheckpoint::from_bytes(&bytes)
    }
}

impl Serialize for SlotCheckpoint {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for SlotCheckpoint {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Of a subscription from the beginning.
pub(crate) const EVER: i64 = FeedAsk::EVER;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn checkpoint() -> impl Strategy<Value = SlotCheckpoint> {
        let seq = prop_oneof![4 => Just(0u64), 3 => 1..200u64, 1 => any::<u64>()];
        let positions = prop::collection::btree_map(any::<[u8; 16]>(), prop::collection::vec(any::<u64>(), 0..5), 0..4);
        (any::<[u8; 16]>(), any::<i64>(), any::<[u8; 16]>(), 0..i64::MAX, prop::collection::vec(seq, 4096), positions)
            .prop_map(|(cluster, since_us, disk, erasures, seqs, positions)| SlotCheckpoint {
                cluster,
                since_us,
                told: (DiskId(disk), erasures),
                seqs,
                positions: positions.into_iter().map(|(disk, positions)| (DiskId(disk), positions)).collect(),
            })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn a_checkpoint_comes_back_from_its_bytes_and_from_its_text(checkpoint in checkpoint()) {
            prop_assert_eq!(SlotCheckpoint::from_bytes(&checkpoint.to_bytes()), Ok(checkpoint.clone()));
            prop_assert_eq!(checkpoint.to_string().parse(), Ok(checkpoint));
        }

        #[test]
        fn other_bytes_are_refused_or_are_written_the_same_way(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(read) = SlotCheckpoint::from_bytes(&bytes) {
                prop_assert_eq!(read.to_bytes(), bytes);
            }
        }

        #[test]
        fn what_is_cut_off_is_refused(checkpoint in checkpoint(), at in any::<prop::sample::Index>()) {
            let bytes = checkpoint.to_bytes();
            let at = at.index(bytes.len());
            prop_assert_eq!(SlotCheckpoint::from_bytes(&bytes[..at]), Err(SlotCheckpointError::NotACheckpoint));
        }
    }

    #[test]
    fn the_bytes_are_pinned() {
        let mut checkpoint = SlotCheckpoint::new([1; 16], (DiskId([2; 16]), 300), 5);
        checkpoint.seqs[1] = 7;
        checkpoint.positions.insert(DiskId([3; 16]), vec![0, 128]);
        let hex = [
            "01",
            &"01".repeat(16),
            "0000000000000005",
            &"02".repeat(16),
            "ac02",
            "0001",
            "07",
            "00fe1f",
            "01",
            &"03".repeat(16),
            "02",
            "00",
            "8001",
        ];
        assert_eq!(hex::encode(checkpoint.to_bytes()), hex.concat());
        assert_eq!(checkpoint.seq(Slot::new(1)), 7);
        assert_eq!("ä".parse::<SlotCheckpoint>(), Err(SlotCheckpointError::NotACheckpoint));
    }
}
