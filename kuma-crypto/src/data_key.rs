//! The data key: one per entity, and the only thing that opens its commits, snapshots and id.
//!
//! Invariant: a data key is random, never derived from the master key or from the id. Destroying its last copy is
//! therefore final: nothing in the store can make it again.

use std::fmt;

use crate::secret::Secret32;
use crate::{random, short_hex};

/// The 256-bit key of one entity. Wiped on drop, printed as `[redacted]`, kept at rest only in wrapped form.
#[derive(Clone, Debug)]
pub struct DataKey(Secret32);

impl DataKey {
    /// A new random key.
    pub fn generate() -> Self {
        Self(Secret32::generate())
    }
}

impl From<Secret32> for DataKey {
    fn from(secret: Secret32) -> Self {
        Self(secret)
    }
}

impl From<DataKey> for Secret32 {
    fn from(key: DataKey) -> Self {
        key.0
    }
}

impl AsRef<Secret32> for DataKey {
    fn as_ref(&self) -> &Secret32 {
        &self.0
    }
}

/// The random name of one data key. Not secret. An id that is used again after an erasure gets a key with another name,
/// so that nothing sealed before can be taken for something sealed after.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(pub [u8; 16]);

impl KeyId {
    /// A new random name.
    pub fn generate() -> Self {
        Self(random::public())
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        short_hex::write(f, &self.0, short_hex::SHORT_DIGITS)
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_id_prints_its_first_twelve_digits() {
        let id = KeyId(std::array::from_fn(|i| i as u8 + 0xa0));
        assert_eq!(format!("{id} {id:?}"), "a0a1a2a3a4a5 a0a1a2a3a4a5");
    }

    #[test]
    fn two_key_ids_differ() {
        assert_ne!(KeyId::generate(), KeyId::generate());
    }
}
