//! Sealed snapshots: saved state, bound to the version it was taken at and to the shape it was written in.
//!
//! Invariant: a snapshot opens only for its entity, its version and its schema. A snapshot of an older schema fails to
//! open as the new one instead of being read wrongly; the entity is then replayed.

use crate::aad::{Aad, Purpose};
use crate::data_key::{DataKey, KeyId};
use crate::id_hash::IdHash;
use crate::random::{self, NONCE_BYTES};
use crate::sealed::{self, FORMAT, OpenError};

/// What a sealed snapshot is bound to.
#[derive(Clone, Copy, Debug)]
pub struct SnapshotPlace<'a> {
    /// The entity's kind.
    pub kind: &'a str,
    /// The keyed hash of the entity's kind and id.
    pub id_hash: IdHash,
    /// The version of the last event in it.
    pub version: u64,
    /// The number of the state's shape, as the caller counts it.
    pub schema: u64,
    /// The name of the data key it is sealed with.
    pub key_id: KeyId,
}

impl SnapshotPlace<'_> {
    fn aad(&self) -> Vec<u8> {
        Aad::with_text(Purpose::Snapshot, self.kind)
            .field(&self.id_hash.0)
            .field(&self.version.to_le_bytes())
            .field(&self.schema.to_le_bytes())
            .field(&self.key_id.0)
            .finish()
    }
}

/// Seals saved state for `place`, under a fresh random nonce.
///
/// The result is [`SEALED_OVERHEAD_BYTES`](crate::SEALED_OVERHEAD_BYTES) longer than `plaintext`. A plaintext of 256
/// GiB or more would panic.
pub fn seal_snapshot(key: &DataKey, place: &SnapshotPlace<'_>, plaintext: &[u8]) -> Vec<u8> {
    seal_with_nonce(key, &random::nonce(), place, plaintext)
}

/// Opens what [`seal_snapshot`] sealed for the same place under the same key.
///
/// # Errors
/// [`OpenError`] says whether the bytes are cut off, of a newer format, or do not authenticate. A snapshot is never
/// needed: replay the events instead.
pub fn open_snapshot(key: &DataKey, place: &SnapshotPlace<'_>, sealed: &[u8]) -> Result<Vec<u8>, OpenError> {
    sealed::open(key.as_ref(), 1, &place.aad(), sealed)
}

pub(crate) fn seal_with_nonce(
    key: &DataKey,
    nonce: &[u8; NONCE_BYTES],
    place: &SnapshotPlace<'_>,
    plaintext: &[u8],
) -> Vec<u8> {
    sealed::seal_with_nonce(key.as_ref(), nonce, &[FORMAT], &place.aad(), plaintext)
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::secret::Secret32;

    const PLACE: SnapshotPlace<'static> =
        SnapshotPlace { kind: "order", id_hash: IdHash([0x11; 16]), version: 5, schema: 3, key_id: KeyId([0x22; 16]) };

    fn key() -> DataKey {
        Secret32::from_bytes(&[0x33; 32]).into()
    }

    #[test]
    fn a_sealed_snapshot_opens_at_its_place() {
        assert_eq!(open_snapshot(&key(), &PLACE, &seal_snapshot(&key(), &PLACE, b"state")).unwrap(), b"state");
    }

    #[test]
    fn the_layout_of_a_sealed_snapshot_is_pinned() {
        let sealed = seal_with_nonce(&key(), &[0x44; 24], &PLACE, b"state");
        assert_eq!(
            hex::encode(PLACE.aad()),
            "030105006f726465721111111111111111111111111111111105000000000000000300000000000000222222222222222222\
             22222222222222"
        );
        assert_eq!(
            hex::encode(&sealed),
            "014444444444444444444444444444444444444444444444446bd211a055634604c98be6d41b60d9db64176a64d6"
        );
    }

    #[test]
    fn a_snapshot_does_not_open_at_any_other_place() {
        let sealed = seal_snapshot(&key(), &PLACE, b"state");
        let elsewhere = [
            SnapshotPlace { kind: "orders", ..PLACE },
            SnapshotPlace { id_hash: IdHash([0x12; 16]), ..PLACE },
            SnapshotPlace { version: 6, ..PLACE },
            SnapshotPlace { schema: 4, ..PLACE },
            SnapshotPlace { version: 3, schema: 5, ..PLACE },
            SnapshotPlace { key_id: KeyId([0x23; 16]), ..PLACE },
        ];
        for place in elsewhere {
            assert_eq!(open_snapshot(&key(), &place, &sealed), Err(OpenError::DoesNotAuthenticate), "{place:?}");
        }
        assert_eq!(open_snapshot(&DataKey::generate(), &PLACE, &sealed), Err(OpenError::DoesNotAuthenticate));
    }

    #[test]
    fn a_tampered_snapshot_does_not_open() {
        let sealed = seal_snapshot(&key(), &PLACE, b"state");
        for at in 0..sealed.len() {
            let mut tampered = sealed.clone();
            tampered[at] ^= 1;
            assert!(open_snapshot(&key(), &PLACE, &tampered).is_err(), "byte {at}");
        }
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_open_and_never_panic(mut bytes in vec(any::<u8>(), 0..200), ours: bool) {
            if let (true, Some(first)) = (ours, bytes.first_mut()) {
                *first = FORMAT;
            }
            prop_assert!(open_snapshot(&key(), &PLACE, &bytes).is_err());
        }
    }
}
