//! The hash of a log row, and the digest of a slot.
//!
//! Invariants:
//! - A row's hash covers every column that has a meaning of its own, those outside the AEAD included, and it names the entity by
//!   hash and key, not by `eid`, so that it is the same on every node that holds the row.
//! - A digest is the sum of row hashes modulo 2^256: it follows an append or an erasure without reading the rest, and does not
//!   depend on the order in which rows are read back.
//!
//! It guards against corruption and bugs, not against someone who can rewrite the disk: that is what the seal is for. So the body, which
//! is nearly all of a row, is hashed by the fastest hash that finds corruption (docs/adr/0011-the-body-in-the-row-hash.md).

use std::fmt;

use xxhash_rust::xxh3::xxh3_128;

use crate::{Epoch, Slot};

/// All that a log row says, borrowed.
#[derive(Clone, Copy)]
pub(crate) struct RowFields<'a> {
    pub(crate) slot: Slot,
    pub(crate) seq: u64,
    pub(crate) id_hash: &'a [u8; 16],
    pub(crate) key_id: &'a [u8; 16],
    pub(crate) version: u64,
    pub(crate) count: u32,
    pub(crate) at_us: i64,
    pub(crate) epoch: Epoch,
    pub(crate) append_key: Option<&'a [u8]>,
    pub(crate) body: &'a [u8],
}

/// BLAKE3 over a row's fields, with XXH3-128 of the body standing for the body, in a fixed little-endian encoding (docs/formats.md, "Row hash").
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct RowHash([u8; 32]);

impl RowHash {
    pub(crate) fn of(row: &RowFields<'_>) -> Self {
        let append_key = row.append_key.unwrap_or_default();
        let mut head = [0u8; 112];
        head[..8].copy_from_slice(b"kumarow1");
        head[8..10].copy_from_slice(&row.slot.number().to_le_bytes());
        head[10] = u8::from(row.append_key.is_some());
        head[11..15].copy_from_slice(&row.count.to_le_bytes());
        head[16..24].copy_from_slice(&row.seq.to_le_bytes());
        head[24..32].copy_from_slice(&row.version.to_le_bytes());
        head[32..40].copy_from_slice(&row.at_us.to_le_bytes());
        head[40..48].copy_from_slice(&row.epoch.to_i64().to_le_bytes());
        head[48..64].copy_from_slice(row.id_hash);
        head[64..80].copy_from_slice(row.key_id);
        head[80..88].copy_from_slice(&(append_key.len() as u64).to_le_bytes());
        head[88..96].copy_from_slice(&(row.body.len() as u64).to_le_bytes());
        head[96..112].copy_from_slice(&xxh3_128(row.body).to_le_bytes());
        let mut hasher = blake3::Hasher::new();
        hasher.update(&head).update(append_key);
        RowHash(*hasher.finalize().as_bytes())
    }

    /// What the row's `checksum` column holds: the first eight bytes, little-endian.
    pub(crate) fn checksum(&self) -> i64 {
        crate::first_eight(&self.0)
    }
}

impl From<blake3::Hash> for RowHash {
    fn from(hash: blake3::Hash) -> Self {
        RowHash(*hash.as_bytes())
    }
}

/// The sum of the hashes of a slot's rows (or of any set of rows) modulo 2^256.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Digest([u64; 4]);

impl Digest {
    /// Adds one row's hash.
    pub(crate) fn add(&mut self, row: &RowHash) {
        self.add_words(Digest::from_bytes(row.0).0);
    }

    /// Takes one row's hash away.
    pub(crate) fn subtract(&mut self, row: &RowHash) {
        self.subtract_digest(&Digest::from_bytes(row.0));
    }

    /// Adds all that another digest sums.
    pub(crate) fn add_digest(&mut self, other: &Digest) {
        self.add_words(other.0);
    }

    /// Takes all that another digest sums away.
    pub(crate) fn subtract_digest(&mut self, other: &Digest) {
        // The two's complement.
        self.add_words(other.0.map(|word| !word));
        self.add_words([1, 0, 0, 0]);
    }

    fn add_words(&mut self, words: [u64; 4]) {
        let mut carry = false;
        for (sum, word) in self.0.iter_mut().zip(words) {
            let (partial, first) = sum.overflowing_add(word);
            let (total, second) = partial.overflowing_add(u64::from(carry));
            *sum = total;
            carry = first || second;
        }
    }

    /// Little-endian, 32 bytes, as stored.
    pub fn to_bytes(self) -> [u8; 32] {
        let mut bytes = [0; 32];
        for (chunk, word) in bytes.chunks_exact_mut(8).zip(self.0) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// The inverse of [`Digest::to_bytes`].
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        let mut words = [0; 4];
        for (word, chunk) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = chunk.iter().rev().fold(0, |value, byte| (value << 8) | u64::from(*byte));
        }
        Digest(words)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({})", hex::encode(self.to_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(seq: u64) -> RowFields<'static> {
        RowFields {
            slot: Slot::new(7),
            seq,
            id_hash: &[1; 16],
            key_id: &[2; 16],
            version: 3,
            count: 4,
            at_us: 5,
            epoch: Epoch::FIRST,
            append_key: None,
            body: b"sealed",
        }
    }

    #[test]
    fn a_digest_does_not_depend_on_the_order_of_rows() {
        let hashes: Vec<RowHash> = (0..50).map(|seq| RowHash::of(&row(seq))).collect();
        let (mut forward, mut backward) = (Digest::default(), Digest::default());
        hashes.iter().for_each(|hash| forward.add(hash));
        hashes.iter().rev().for_each(|hash| backward.add(hash));
        assert_eq!(forward, backward);
        assert_eq!(Digest::from_bytes(forward.to_bytes()), forward);
    }

    #[test]
    fn a_digest_carries_over_word_boundaries() {
        let mut digest = Digest([u64::MAX, u64::MAX, 0, 0]);
        digest.add_words([1, 0, 0, 0]);
        assert_eq!(digest, Digest([0, 0, 1, 0]));
    }

    #[test]
    fn what_is_taken_away_from_a_digest_was_never_in_it() {
        let hashes: Vec<RowHash> = (0..50).map(|seq| RowHash::of(&row(seq))).collect();
        let (mut all, mut odd) = (Digest::default(), Digest::default());
        hashes.iter().for_each(|hash| all.add(hash));
        hashes.iter().step_by(2).for_each(|hash| all.subtract(hash));
        hashes.iter().skip(1).step_by(2).for_each(|hash| odd.add(hash));
        assert_eq!(all, odd);
        hashes.iter().skip(1).step_by(2).for_each(|hash| all.subtract(hash));
        assert_eq!(all, Digest::default());
    }

    #[test]
    fn every_field_of_a_row_is_under_its_hash() {
        let base = row(1);
        let key = [9u8; 4];
        let others = [
            RowFields { slot: Slot::new(8), ..base },
            RowFields { seq: 2, ..base },
            RowFields { id_hash: &[9; 16], ..base },
            RowFields { key_id: &[9; 16], ..base },
            RowFields { version: 9, ..base },
            RowFields { count: 9, ..base },
            RowFields { at_us: 9, ..base },
            RowFields { epoch: Epoch { term: 1, counter: 2 }, ..base },
            RowFields { append_key: Some(&[]), ..base },
            RowFields { append_key: Some(&key), ..base },
            RowFields { body: b"sealee", ..base },
        ];
        assert!(others.iter().all(|other| RowHash::of(other) != RowHash::of(&base)));
    }

    /// The stored bytes of every existing row depend on this encoding.
    #[test]
    fn the_row_hash_is_pinned() {
        assert_eq!(
            hex::encode(RowHash::of(&row(1)).0),
            "26ac82b398cc95fae19bb940130c8737c674e16a41f1d1daa51f11a6812d6f8c"
        );
    }
}
