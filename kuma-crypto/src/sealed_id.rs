//! Sealed ids: what an entity is called, readable only with its own key.
//!
//! Rows are found by the id's hash, which cannot be undone; an export or an operator with the keys still needs the id
//! itself. Sealed under the entity's own data key, the id is erased together with it.

use crate::aad::{Aad, Purpose};
use crate::data_key::{DataKey, KeyId};
use crate::id_hash::IdHash;
use crate::random::{self, NONCE_BYTES};
use crate::sealed::{self, FORMAT, OpenError};

/// Seals the id of an entity under its data key, bound to its kind, its hash and the key's name.
pub fn seal_id(key: &DataKey, kind: &str, id_hash: IdHash, key_id: KeyId, id: &str) -> Vec<u8> {
    seal_with_nonce(key, &random::nonce(), kind, id_hash, key_id, id)
}

/// Opens what [`seal_id`] sealed.
///
/// # Errors
/// [`OpenError`] says whether the bytes are cut off, of a newer format, or do not authenticate.
pub fn open_id(key: &DataKey, kind: &str, id_hash: IdHash, key_id: KeyId, sealed: &[u8]) -> Result<String, OpenError> {
    let id = sealed::open(key.as_ref(), 1, &aad(kind, id_hash, key_id), sealed)?;
    // Only a `str` is ever sealed for this purpose: other bytes were not sealed by Kuma, even if they authenticate.
    String::from_utf8(id).map_err(|_| OpenError::DoesNotAuthenticate)
}

pub(crate) fn seal_with_nonce(
    key: &DataKey,
    nonce: &[u8; NONCE_BYTES],
    kind: &str,
    id_hash: IdHash,
    key_id: KeyId,
    id: &str,
) -> Vec<u8> {
    sealed::seal_with_nonce(key.as_ref(), nonce, &[FORMAT], &aad(kind, id_hash, key_id), id.as_bytes())
}

fn aad(kind: &str, id_hash: IdHash, key_id: KeyId) -> Vec<u8> {
    Aad::with_text(Purpose::Id, kind).field(&id_hash.0).field(&key_id.0).finish()
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::secret::Secret32;
    use crate::{CommitPlace, open_commit};

    const HASH: IdHash = IdHash([0x11; 16]);
    const KEY_ID: KeyId = KeyId([0x22; 16]);

    fn key() -> DataKey {
        Secret32::from_bytes(&[0x33; 32]).into()
    }

    #[test]
    fn a_sealed_id_opens() {
        let sealed = seal_id(&key(), "order", HASH, KEY_ID, "bestellung-ä-7");
        assert_eq!(open_id(&key(), "order", HASH, KEY_ID, &sealed).unwrap(), "bestellung-ä-7");
    }

    #[test]
    fn the_layout_of_a_sealed_id_is_pinned() {
        let sealed = seal_with_nonce(&key(), &[0x44; 24], "order", HASH, KEY_ID, "order-7");
        assert_eq!(
            hex::encode(aad("order", HASH, KEY_ID)),
            "020105006f726465721111111111111111111111111111111122222222222222222222222222222222"
        );
        assert_eq!(
            hex::encode(&sealed),
            "0144444444444444444444444444444444444444444444444477d414b142cf00933f93e929a6f4b7cce0db3b96b2df22"
        );
    }

    #[test]
    fn a_sealed_id_does_not_open_for_another_entity_or_key() {
        let sealed = seal_id(&key(), "order", HASH, KEY_ID, "order-7");
        let refused = [
            open_id(&key(), "orders", HASH, KEY_ID, &sealed),
            open_id(&key(), "order", IdHash([0x12; 16]), KEY_ID, &sealed),
            open_id(&key(), "order", HASH, KeyId([0x23; 16]), &sealed),
            open_id(&DataKey::generate(), "order", HASH, KEY_ID, &sealed),
        ];
        assert!(refused.iter().all(|result| *result == Err(OpenError::DoesNotAuthenticate)), "{refused:?}");
    }

    #[test]
    fn a_tampered_id_does_not_open() {
        let sealed = seal_id(&key(), "order", HASH, KEY_ID, "order-7");
        for at in 0..sealed.len() {
            let mut tampered = sealed.clone();
            tampered[at] ^= 1;
            assert!(open_id(&key(), "order", HASH, KEY_ID, &tampered).is_err(), "byte {at}");
        }
    }

    /// Same key, same kind, same hash: only the purpose keeps them apart.
    #[test]
    fn a_sealed_id_does_not_open_as_a_commit() {
        let sealed = seal_id(&key(), "order", HASH, KEY_ID, "order-7");
        let place = CommitPlace { kind: "order", id_hash: HASH, first_version: 0, count: 0, at_us: 0, key_id: KEY_ID };
        assert_eq!(open_commit(&key(), &place, &sealed), Err(OpenError::DoesNotAuthenticate));
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_open_and_never_panic(mut bytes in vec(any::<u8>(), 0..200), ours: bool) {
            if let (true, Some(first)) = (ours, bytes.first_mut()) {
                *first = FORMAT;
            }
            prop_assert!(open_id(&key(), "order", HASH, KEY_ID, &bytes).is_err());
        }
    }
}
