//! The name of an idempotency key at rest: a keyed hash of it.
//!
//! Callers put request ids, order numbers and mail addresses into their keys. The hash is keyed with the entity's data key: it moves
//! with the entity, and once that key is destroyed nobody can tell which keys it had.
//!
//! Invariant: the same key of the same entity has the same hash for ever; a retry is recognised by it.

use zeroize::Zeroize;

use crate::data_key::DataKey;

/// Names the use of the hash. Part of the format.
const CONTEXT: &str = "kuma 2026-11-22 append key v1";

/// The keyed hash of a caller's idempotency key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AppendKeyHash(pub [u8; 16]);

/// The hash that stands for `key` among the commits of the entity with this data key: the first 16 bytes of BLAKE3 in its key
/// derivation mode over the data key and `key`.
///
/// 128 bits: an entity with 10^12 keys has two alike with probability 10^-15.
pub fn hash_append_key(data_key: &DataKey, key: &[u8]) -> AppendKeyHash {
    let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
    // The data key has a fixed length, so that nothing runs into the caller's.
    hasher.update(data_key.as_ref().expose()).update(key);
    let mut full = *hasher.finalize().as_bytes();
    let mut short = [0; 16];
    short.copy_from_slice(&full[..16]);
    full.zeroize();
    hasher.zeroize();
    AppendKeyHash(short)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Secret32;

    fn data_key(byte: u8) -> DataKey {
        Secret32::from_bytes(&[byte; 32]).into()
    }

    /// Retries of stored commits are recognised by this hash.
    #[test]
    fn the_hash_of_an_append_key_is_pinned() {
        let hash = hash_append_key(&data_key(7), b"order-7/placed");
        assert_eq!(hex::encode(hash.0), "e0979bba74c8042970ec6ddbfbaafb36");
    }

    #[test]
    fn the_same_key_has_another_hash_in_another_entity() {
        assert_ne!(hash_append_key(&data_key(1), b"k"), hash_append_key(&data_key(2), b"k"));
        assert_ne!(hash_append_key(&data_key(1), b"k"), hash_append_key(&data_key(1), b"l"));
    }
}
