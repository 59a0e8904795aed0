//! Exact retries: a request with an idempotency key happens once, however often it is sent.
//!
//! ```text
//! key ──► on its way? ──yes──► wait until it is settled, and look again
//!           │ no
//!           ▼
//!         stored? ──yes──► same content? ──yes──► the original outcome
//!           │ no                 └─no──► refused: the key was used for something else
//!           ▼
//!         expected version, decision, commit (the key is stored in the same row)
//! ```
//!
//! Invariants:
//! - A key is looked up before the expected version is compared and before a command decides.
//! - Only what was committed is remembered: a refusal, a rejection and a command that had nothing to do leave no trace.
//! - A key is unique within its entity, for ever. It is stored as a keyed hash.

use std::collections::HashSet;

use kuma_crypto::AppendKeyHash;

use crate::{Refused, Version, body::Fingerprint};

/// A key names a request; it is not a place for content.
const KEY_BYTES_MAX: usize = 256;
/// Keys of one entity that are kept in memory once it is written to with keys, 8 bytes each. An entity that has more is looked up on
/// the disk for each append with a key.
pub(crate) const KNOWN_KEYS_MAX: usize = 16_384;

/// What became of a request with an idempotency key, see [`Handle::outcome`](crate::Handle::outcome).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was committed; its last event made this version.
    Committed(Version),
    /// It is on its way to the disk.
    InFlight,
    /// No request with this key has reached the entity **so far**. That is not final: one that was sent may still arrive.
    NeverSeen,
}

/// A caller's idempotency key with what it was used for.
#[derive(Clone)]
pub(crate) struct RetryKey {
    pub(crate) key: Box<[u8]>,
    pub(crate) fingerprint: Fingerprint,
}

impl RetryKey {
    pub(crate) fn new(key: &[u8], fingerprint: Fingerprint) -> Result<Self, Refused> {
        Ok(RetryKey { key: check(key)?.into(), fingerprint })
    }
}

pub(crate) fn check(key: &[u8]) -> Result<&[u8], Refused> {
    if key.is_empty() || key.len() > KEY_BYTES_MAX {
        return Err(Refused::InvalidKey { bytes: key.len(), bytes_max: KEY_BYTES_MAX });
    }
    Ok(key)
}

/// What an append asked for: its events. Metadata and the expected version are not part of it: they tell of the attempt.
pub(crate) fn fingerprint_of_events(items: &[u8]) -> Fingerprint {
    short(blake3::Hasher::new_derive_key("kuma 2026-11-22 append fingerprint v1").update(items))
}

/// What a command asked for: its name and fields.
pub(crate) fn fingerprint_of_command(name: &str, fields: &[u8]) -> Fingerprint {
    let mut hasher = blake3::Hasher::new_derive_key("kuma 2026-11-22 command fingerprint v1");
    short(hasher.update(&(name.len() as u64).to_le_bytes()).update(name.as_bytes()).update(fields))
}

fn short(hasher: &blake3::Hasher) -> Fingerprint {
    let mut short = [0; 16];
    hasher.finalize_xof().fill(&mut short);
    short
}

/// The keys that a live entity was written with, so that a new one need not be looked up on the disk.
pub(crate) struct KnownKeys {
    /// Eight bytes of each hash; none if there are too many. One that is not in here was never committed.
    seen: Option<HashSet<u64>>,
}

impl KnownKeys {
    /// From all stored keys, or from more than are kept.
    pub(crate) fn new(stored: &[Vec<u8>]) -> Self {
        let hash = |key: &Vec<u8>| key.first_chunk().map(|first| u64::from_le_bytes(*first));
        let complete = stored.len() <= KNOWN_KEYS_MAX;
        KnownKeys { seen: if complete { stored.iter().map(hash).collect() } else { None } }
    }

    /// Whether the key may have been used: false only if it surely was not.
    pub(crate) fn may_contain(&self, key: &AppendKeyHash) -> bool {
        self.seen.as_ref().is_none_or(|seen| seen.contains(&first_eight(key)))
    }

    /// Notes a key that is on its way. Should that fail, all is forgotten with the activation.
    pub(crate) fn insert(&mut self, key: &AppendKeyHash) {
        if let Some(seen) = &mut self.seen {
            seen.insert(first_eight(key));
            if seen.len() > KNOWN_KEYS_MAX {
                self.seen = None;
            }
        }
    }

    /// What they take in memory.
    pub(crate) fn memory_bytes(&self) -> usize {
        self.seen.as_ref().map_or(0, |seen| seen.capacity() * 9)
    }
}

fn first_eight(key: &AppendKeyHash) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = key.0;
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(number: u64) -> AppendKeyHash {
        let mut hash = [7; 16];
        hash[..8].copy_from_slice(&number.to_le_bytes());
        AppendKeyHash(hash)
    }

    #[test]
    fn a_key_that_was_never_used_is_known_to_be_new_until_there_are_too_many() {
        let stored: Vec<Vec<u8>> = (0..KNOWN_KEYS_MAX as u64 - 1).map(|number| key(number).0.to_vec()).collect();
        let mut known = KnownKeys::new(&stored);
        assert!(known.may_contain(&key(5)) && !known.may_contain(&key(1 << 40)));
        known.insert(&key(1 << 40));
        assert!(known.may_contain(&key(1 << 40)) && !known.may_contain(&key(1 << 41)));
        known.insert(&key(1 << 41));
        assert!(known.may_contain(&key(1 << 42)), "too many: everything has to be looked up");
    }

    #[test]
    fn requests_that_differ_have_different_fingerprints() {
        let all = [
            fingerprint_of_events(b"ab"),
            fingerprint_of_events(b"abc"),
            fingerprint_of_command("", b"ab"),
            fingerprint_of_command("a", b"b"),
            fingerprint_of_command("ab", b""),
        ];
        let distinct: HashSet<_> = all.iter().collect();
        assert_eq!(distinct.len(), all.len());
    }

    /// Stored with each commit that has a key.
    #[test]
    fn fingerprints_are_pinned() {
        assert_eq!(hex::encode(fingerprint_of_events(b"events")), "376995c6397a0c192f4ac759b1021de6");
        assert_eq!(hex::encode(fingerprint_of_command("Withdraw", b"fields")), "2c73935a85903fd28d34eb9d9678c2e6");
    }

    #[test]
    fn a_key_has_1_to_256_bytes() {
        assert!(check(b"").is_err() && check(&[0; 257]).is_err());
        assert!(check(b"k").is_ok() && check(&[0; 256]).is_ok());
    }
}
