//! The small values that rows are made of.

use std::fmt;

use serde::{Deserialize, Serialize};

/// How many slots there are: the unit of ownership and movement. Part of the format; it never changes.
pub const SLOTS: u16 = 4096;

/// One of [`SLOTS`] slots, or the store's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u16", into = "u16")]
pub struct Slot(u16);

impl Slot {
    /// The slot of what belongs to this very store and never moves: its audit log. Every store has one, and owns it.
    pub const OWN: Slot = Slot(SLOTS);

    /// The slot with this number, taken modulo [`SLOTS`].
    pub fn new(number: u64) -> Self {
        // The remainder is below 4096, so that it always fits.
        Slot((number % u64::from(SLOTS)) as u16)
    }

    /// The number: below [`SLOTS`], or equal to it for [`Slot::OWN`].
    pub fn number(self) -> u16 {
        self.0
    }

    /// The slot with this number, as it is stored.
    pub(crate) fn from_stored(number: i64) -> Self {
        match u16::try_from(number) {
            Ok(SLOTS) => Slot::OWN,
            _ => Slot::new(number.cast_unsigned()),
        }
    }

    /// The shard that holds this slot on a node with `shards` shards.
    pub fn shard(self, shards: u16) -> u16 {
        self.0 % shards.max(1)
    }
}

impl From<Slot> for u16 {
    fn from(slot: Slot) -> Self {
        slot.0
    }
}

impl TryFrom<u16> for Slot {
    type Error = String;

    fn try_from(number: u16) -> Result<Self, String> {
        match number {
            0..=SLOTS => Ok(Slot(number)),
            _ => Err(format!("slot {number} is beyond the last one, which is {}", SLOTS - 1)),
        }
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// The keyed hash that stands for an entity's kind and id wherever the id must not be seen.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct EntityHash(pub [u8; 16]);

impl EntityHash {
    /// All 32 hex digits.
    pub fn to_hex(self) -> String {
        hex::encode(self.0)
    }
}

/// The short form for logs and messages: 12 hex digits.
impl fmt::Display for EntityHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().take(6).try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for EntityHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "EntityHash({self})")
    }
}

/// The fencing number of a slot's ownership: `(term, counter)`, compared in that order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Epoch {
    /// Raised by a recovery vote.
    pub term: u32,
    /// Raised by each handoff.
    pub counter: u32,
}

impl Epoch {
    /// The epoch that every slot of a new store starts with.
    pub const FIRST: Epoch = Epoch { term: 1, counter: 1 };
    /// Lower than every epoch that anybody owns.
    pub const NEVER: Epoch = Epoch { term: 0, counter: 0 };

    /// One integer in the same order, as stored. A term stays below 2^31, so that the sign bit is never set.
    pub fn to_i64(self) -> i64 {
        (i64::from(self.term) << 32) | i64::from(self.counter)
    }

    /// The inverse of [`Epoch::to_i64`].
    pub fn from_i64(stored: i64) -> Self {
        Epoch { term: (stored >> 32) as u32, counter: stored as u32 }
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "({},{})", self.term, self.counter)
    }
}

/// The random name of a data directory: new at creation and at every restore.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct DiskId(pub [u8; 16]);

impl DiskId {
    /// A new random name.
    ///
    /// # Errors
    /// The operating system has no random bytes to give.
    pub fn generate() -> Result<Self, getrandom::Error> {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes)?;
        Ok(DiskId(bytes))
    }
}

impl std::str::FromStr for DiskId {
    type Err = hex::FromHexError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut bytes = [0; 16];
        hex::decode_to_slice(text, &mut bytes)?;
        Ok(DiskId(bytes))
    }
}

impl fmt::Display for DiskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for DiskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DiskId({self})")
    }
}

/// Whether an entity's rows are those of its slot, or were given away: all zero, or the transfer by which they left.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct CopyId(pub [u8; 16]);

impl CopyId {
    /// Rows that are the slot's.
    pub const LIVE: CopyId = CopyId([0; 16]);
}

impl From<TransferId> for CopyId {
    fn from(transfer: TransferId) -> Self {
        CopyId(transfer.0)
    }
}

/// Names one attempt to hand a slot over: 128 random bits, never derived from anything and never used again.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct TransferId(pub [u8; 16]);

impl TransferId {
    /// A new random name.
    ///
    /// # Errors
    /// The operating system has no random bytes to give.
    pub fn generate() -> Result<Self, getrandom::Error> {
        DiskId::generate().map(|DiskId(bytes)| TransferId(bytes))
    }
}

impl fmt::Display for TransferId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for TransferId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TransferId({self})")
    }
}

impl fmt::Debug for CopyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CopyId({})", hex::encode(self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_is_stored_in_its_own_order() {
        let epochs = [Epoch::FIRST, Epoch { term: 1, counter: u32::MAX }, Epoch { term: 2, counter: 0 }];
        assert!(epochs.windows(2).all(|pair| pair[0].to_i64() < pair[1].to_i64()));
        assert!(epochs.iter().all(|epoch| Epoch::from_i64(epoch.to_i64()) == *epoch));
    }
}
