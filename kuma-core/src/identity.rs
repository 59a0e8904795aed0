//! Who an entity is: its kind and id, and what follows from them.
//!
//! Invariants:
//! - The slot is a pure function of kind and id, the same on every node, in every version, for ever (pinned by a test).
//! - The id leaves memory only sealed: everything else knows the entity by its hash.

use kuma_crypto::IdSecret;
use kuma_shard::{EntityHash, Slot};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::{Refused, audit};

/// An id is personal data as often as not; this bound keeps it short enough to be sealed in a row.
pub(crate) const ID_BYTES_MAX: usize = 512;
const KIND_BYTES_MAX: usize = 64;
/// "kumaslot" in ASCII. Part of the format.
const SLOT_SEED: u64 = u64::from_be_bytes(*b"kumaslot");

/// A checked kind and id.
pub(crate) struct Identity {
    pub(crate) id: Box<str>,
    pub(crate) hash: EntityHash,
    pub(crate) slot: Slot,
}

impl Identity {
    pub(crate) fn new(kind: &str, id: &[u8], secret: &IdSecret) -> Result<Self, Refused> {
        check_kind(kind)?;
        let id: Box<str> = check_id(id)?.into();
        let hash = EntityHash(secret.hash(kind, &id).0);
        // What is the store's own stays where the store is.
        let slot = if audit::is_reserved(kind) { Slot::OWN } else { slot_of(kind, &id) };
        Ok(Identity { slot, id, hash })
    }
}

/// The slot of an entity. Two ids with the same `{tag}` (the first non-empty one) are in the same slot, whatever their kinds.
///
/// The hash is XXH3-64 with a fixed seed over: the length of the kind (u16, little-endian), the kind, the id; or over `ff ff` and
/// the tag, where there is one.
pub fn slot_of(kind: &str, id: &str) -> Slot {
    let mut bytes = Vec::with_capacity(2 + kind.len() + id.len());
    match tag(id) {
        Some(tag) => {
            bytes.extend_from_slice(&[0xff, 0xff]);
            bytes.extend_from_slice(tag.as_bytes());
        }
        None => {
            // Below 65: `check_kind` bounds it.
            bytes.extend_from_slice(&(kind.len() as u16).to_le_bytes());
            bytes.extend_from_slice(kind.as_bytes());
            bytes.extend_from_slice(id.as_bytes());
        }
    }
    Slot::new(xxh3_64_with_seed(&bytes, SLOT_SEED))
}

fn tag(id: &str) -> Option<&str> {
    let mut rest = id;
    loop {
        let (_, after) = rest.split_once('{')?;
        let (tag, after_tag) = after.split_once('}')?;
        if !tag.is_empty() {
            return Some(tag);
        }
        rest = after_tag;
    }
}

pub(crate) fn check_kind(kind: &str) -> Result<(), Refused> {
    let starts = kind.bytes().next().is_some_and(|byte| byte.is_ascii_alphabetic());
    let goes_on = kind.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.'));
    if starts && goes_on && kind.len() <= KIND_BYTES_MAX {
        Ok(())
    } else {
        Err(Refused::InvalidKind { bytes: kind.len() })
    }
}

fn check_id(id: &[u8]) -> Result<&str, Refused> {
    if id.is_empty() {
        return Err(Refused::InvalidId { reason: "it is empty" });
    }
    if id.len() > ID_BYTES_MAX {
        return Err(Refused::InvalidId { reason: "it is over 512 bytes" });
    }
    std::str::from_utf8(id).map_err(|_| Refused::InvalidId { reason: "it is not UTF-8" })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Entities are found by this function for ever.
    #[test]
    fn slots_are_pinned() {
        let slots =
            [("account", "acc_001"), ("account", "acc_002"), ("aircraft", "N14228"), ("a", "ccount"), ("ac", "count")]
                .map(|(kind, id)| slot_of(kind, id).number());
        assert_eq!(slots, [2440, 1313, 1082, 2561, 684]);
    }

    #[test]
    fn a_tag_puts_entities_into_one_slot() {
        assert_eq!(slot_of("order", "{user-7}/1"), slot_of("basket", "x{user-7}"));
        assert_eq!(slot_of("order", "{}{user-7}"), slot_of("order", "{user-7}"));
        assert_ne!(slot_of("order", "{}"), slot_of("order", "{"));
        assert_ne!(slot_of("order", "user-7"), slot_of("basket", "user-7"));
    }

    #[test]
    fn odd_kinds_and_ids_are_refused() {
        for kind in ["", "1a", "a b", "ä", "a/b", &"k".repeat(65)] {
            assert!(check_kind(kind).is_err(), "{kind}");
        }
        for kind in ["a", "Account", "a.b-c_9", &"k".repeat(64)] {
            assert!(check_kind(kind).is_ok(), "{kind}");
        }
        for id in [&b""[..], &[0xff][..], &[b'x'; 513][..]] {
            assert!(check_id(id).is_err());
        }
        assert!(check_id(&[b'x'; 512]).is_ok());
    }
}
