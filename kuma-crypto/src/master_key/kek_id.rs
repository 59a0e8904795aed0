//! The name of a master key, derived from the key itself.
//!
//! Derived, so that a key file needs no second field that could be mixed up: the same key has the same name wherever it
//! is kept. The derivation is one-way; the name is not secret.

use std::fmt;

use zeroize::Zeroizing;

use crate::secret::Secret32;
use crate::short_hex;

/// Domain of the derivation. On disk, in every wrapped blob: never change it.
const CONTEXT: &str = "kuma 2026 kek id";

/// Names a master key: the first 8 bytes of a BLAKE3 key derivation from it. Prints all 16 hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KekId(pub [u8; 8]);

impl KekId {
    /// The name of `kek`.
    pub(crate) fn of(kek: &Secret32) -> Self {
        let derived = Zeroizing::new(blake3::derive_key(CONTEXT, kek.expose()));
        Self(std::array::from_fn(|i| derived[i]))
    }
}

impl fmt::Display for KekId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        short_hex::write(f, &self.0, 16)
    }
}

impl fmt::Debug for KekId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_master_key_is_pinned() {
        assert_eq!(KekId::of(&Secret32::from_bytes(&[0x55; 32])).to_string(), "46fbe3b20aecb50c");
    }
}
