//! The name of an entity at rest: a keyed hash of its kind and id.
//!
//! Ids are personal data as often as not (a mail address, a customer number), and a plain hash of one is undone by
//! hashing guesses. Keyed with a secret of the store, the hash tells nothing to who has the files and not the secret.
//!
//! Invariants: one store has one secret for ever, for its rows are found by these hashes; kind and id cannot run into
//! each other (the kind's length comes first).

use std::fmt;

use crate::secret::Secret32;
use crate::{short_hex, text};

/// The secret that keys a store's id hashes. Wiped on drop, printed as `[redacted]`.
#[derive(Clone, Debug)]
pub struct IdSecret(Secret32);

impl IdSecret {
    /// A new random secret, for a new store.
    pub fn generate() -> Self {
        Self(Secret32::generate())
    }

    /// The hash that stands for the entity `(kind, id)`: the first 16 bytes of keyed BLAKE3.
    ///
    /// 128 bits: among 10^12 entities two share a hash with probability 10^-15, and without the secret nobody can
    /// search for such a pair.
    pub fn hash(&self, kind: &str, id: &str) -> IdHash {
        let mut input = Vec::with_capacity(text::TEXT_PREFIX_BYTES_MAX + kind.len() + id.len());
        text::push(&mut input, kind);
        input.extend_from_slice(id.as_bytes());
        let full = blake3::keyed_hash(self.0.expose(), &input);
        let mut short = [0; 16];
        short.copy_from_slice(&full.as_bytes()[..16]);
        IdHash(short)
    }
}

impl From<Secret32> for IdSecret {
    fn from(secret: Secret32) -> Self {
        Self(secret)
    }
}

impl From<IdSecret> for Secret32 {
    fn from(secret: IdSecret) -> Self {
        secret.0
    }
}

impl AsRef<Secret32> for IdSecret {
    fn as_ref(&self) -> &Secret32 {
        &self.0
    }
}

/// The keyed hash of a kind and an id. Prints its first 12 hex digits: that is what logs and errors show of an entity.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IdHash(pub [u8; 16]);

impl IdHash {
    /// All 32 hex digits.
    pub fn to_hex(&self) -> String {
        hex::encode(self.0)
    }
}

impl fmt::Display for IdHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        short_hex::write(f, &self.0, short_hex::SHORT_DIGITS)
    }
}

impl fmt::Debug for IdHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret() -> IdSecret {
        Secret32::from_bytes(&[7; 32]).into()
    }

    /// Rows are found by this hash: a change here loses every entity of every store.
    #[test]
    fn the_id_hash_is_pinned() {
        assert_eq!(secret().hash("order", "order-7").to_hex(), "562a25f1a3a24147d0cccd9fc5a20a28");
    }

    #[test]
    fn kind_and_id_do_not_run_into_each_other() {
        assert_ne!(secret().hash("ab", "c"), secret().hash("a", "bc"));
        assert_ne!(secret().hash("", "abc"), secret().hash("abc", ""));
    }

    #[test]
    fn another_secret_gives_another_hash() {
        assert_ne!(secret().hash("order", "7"), IdSecret::generate().hash("order", "7"));
    }

    #[test]
    fn an_id_hash_prints_its_first_twelve_digits_and_can_give_all() {
        let hash = IdHash(std::array::from_fn(|i| i as u8));
        assert_eq!(format!("{hash} {hash:?}"), "000102030405 000102030405");
        assert_eq!(hash.to_hex(), "000102030405060708090a0b0c0d0e0f");
    }
}
