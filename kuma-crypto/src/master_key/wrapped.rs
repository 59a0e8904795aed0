//! The wrapped blob: how a secret of the store looks in `keys.db`.
//!
//! ```text
//! format 1 | kek id 8 | nonce 24 | ciphertext 32 | tag 16        81 bytes, as LocalMasterKey writes it
//! ```
//! Invariants: the first 9 bytes are the same for every provider; a blob is bound to its store and its place in it, and
//! a local one to its KEK's id as well.

use zeroize::Zeroizing;

use super::{KekId, MasterKeyError};
use crate::aad::{Aad, Purpose};
use crate::data_key::KeyId;
use crate::id_hash::IdHash;
use crate::random::NONCE_BYTES;
use crate::sealed::{self, FORMAT, OpenError, TAG_BYTES};
use crate::secret::Secret32;

/// The part of a blob that every provider writes: format and KEK id.
const HEADER_BYTES: usize = 1 + 8;

/// A blob as [`LocalMasterKey`](super::LocalMasterKey) writes it.
const LOCAL_BYTES: usize = HEADER_BYTES + NONCE_BYTES + 32 + TAG_BYTES;

/// The associated data that binds a wrapped data key to the store `context`, the entity and the key's name.
pub fn wrap_aad(context: &str, id_hash: IdHash, key_id: KeyId) -> Vec<u8> {
    Aad::with_text(Purpose::DataKeyPlace, context).field(&id_hash.0).field(&key_id.0).finish()
}

/// The associated data that binds a wrapped [`IdSecret`](crate::IdSecret) to the store `context`.
pub fn id_secret_aad(context: &str) -> Vec<u8> {
    Aad::with_text(Purpose::IdSecretPlace, context).finish()
}

/// The associated data that binds a node's wrapped [`SigningKey`](crate::SigningKey) to the store `context`.
pub fn node_key_aad(context: &str) -> Vec<u8> {
    Aad::with_text(Purpose::NodeKeyPlace, context).finish()
}

/// Which master key wrapped a blob, without unwrapping it. Not authenticated until it is unwrapped.
///
/// # Errors
/// [`MasterKeyError::NotWrapped`] if the blob is cut off or of a newer format.
pub fn wrapped_by(wrapped: &[u8]) -> Result<KekId, MasterKeyError> {
    sealed::check_format(wrapped)?;
    match wrapped[1..].first_chunk() {
        Some(id) => Ok(KekId(*id)),
        None => Err(OpenError::TooShort { actual: wrapped.len(), least: HEADER_BYTES }.into()),
    }
}

/// Wraps `secret` under the master key `kek`.
pub(super) fn wrap_with_nonce(
    (id, kek): (KekId, &Secret32),
    nonce: &[u8; NONCE_BYTES],
    secret: &Secret32,
    aad: &[u8],
) -> Vec<u8> {
    let mut header = [FORMAT; HEADER_BYTES];
    header[1..].copy_from_slice(&id.0);
    sealed::seal_with_nonce(kek, nonce, &header, &local_aad(id, aad), secret.expose())
}

/// Unwraps a blob of which [`wrapped_by`] said `id`.
pub(super) fn unwrap((id, kek): (KekId, &Secret32), wrapped: &[u8], aad: &[u8]) -> Result<Secret32, MasterKeyError> {
    if wrapped.len() < LOCAL_BYTES {
        return Err(OpenError::TooShort { actual: wrapped.len(), least: LOCAL_BYTES }.into());
    }
    let refused = MasterKeyError::DoesNotAuthenticate { kek: id };
    match sealed::open(kek, HEADER_BYTES, &local_aad(id, aad), wrapped).map(Zeroizing::new) {
        Ok(secret) => {
            secret.first_chunk().filter(|all| all.len() == secret.len()).map(Secret32::from_bytes).ok_or(refused)
        }
        Err(OpenError::DoesNotAuthenticate) => Err(refused),
        Err(unreadable) => Err(unreadable.into()),
    }
}

/// The caller's associated data inside that of the blob, which binds the header.
fn local_aad(id: KekId, aad: &[u8]) -> Vec<u8> {
    Aad::new(Purpose::WrappedKey).field(&id.0).field(aad).finish()
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    const HASH: IdHash = IdHash([0x11; 16]);
    const KEY_ID: KeyId = KeyId([0x22; 16]);

    fn kek() -> (KekId, Secret32) {
        let secret = Secret32::from_bytes(&[0x55; 32]);
        (KekId::of(&secret), secret)
    }

    fn wrapped(aad: &[u8]) -> Vec<u8> {
        let (id, kek) = kek();
        wrap_with_nonce((id, &kek), &[0x44; 24], &Secret32::from_bytes(&[0x66; 32]), aad)
    }

    #[test]
    fn the_layout_of_a_wrapped_key_is_pinned() {
        let aad = wrap_aad("store", HASH, KEY_ID);
        assert_eq!(
            hex::encode(&aad),
            "0501050073746f72651111111111111111111111111111111122222222222222222222222222222222"
        );
        assert_eq!(
            hex::encode(local_aad(kek().0, &aad)),
            "040146fbe3b20aecb50c0501050073746f726511111111111111111111111111111111222222222222222222222222222222\
             22"
        );
        let wrapped = wrapped(&aad);
        assert_eq!(wrapped.len(), 81);
        assert_eq!(
            hex::encode(wrapped),
            "0146fbe3b20aecb50c444444444444444444444444444444444444444444444444ab620180879696c8551cab05993cd43da1\
             13b481621d4fd69ec8da54f49088955f6ac56158a31453a722f680b9c55db3"
        );
    }

    #[test]
    fn the_place_of_an_id_secret_is_pinned() {
        assert_eq!(hex::encode(id_secret_aad("store")), "0601050073746f7265");
    }

    #[test]
    fn the_place_of_a_node_key_is_pinned() {
        assert_eq!(hex::encode(node_key_aad("store")), "0701050073746f7265");
    }

    #[test]
    fn a_wrapped_key_opens_at_its_place_only() {
        let (id, kek) = kek();
        let aad = wrap_aad("store", HASH, KEY_ID);
        let wrapped = wrapped(&aad);
        assert_eq!(unwrap((id, &kek), &wrapped, &aad).unwrap().expose(), &[0x66; 32]);
        let elsewhere = [
            wrap_aad("stores", HASH, KEY_ID),
            wrap_aad("store", IdHash([0x12; 16]), KEY_ID),
            wrap_aad("store", HASH, KeyId([0x23; 16])),
            id_secret_aad("store"),
            node_key_aad("store"),
            Vec::new(),
        ];
        for aad in elsewhere {
            let refused = unwrap((id, &kek), &wrapped, &aad).unwrap_err();
            assert!(matches!(refused, MasterKeyError::DoesNotAuthenticate { kek } if kek == id), "{refused:?}");
        }
    }

    /// Also in its header: the KEK's id is associated data.
    #[test]
    fn a_tampered_wrapped_key_does_not_unwrap() {
        let (id, kek) = kek();
        let aad = wrap_aad("store", HASH, KEY_ID);
        let wrapped = wrapped(&aad);
        for at in 0..wrapped.len() {
            let mut tampered = wrapped.clone();
            tampered[at] ^= 1;
            let named = wrapped_by(&tampered).unwrap_or(id);
            assert!(unwrap((named, &kek), &tampered, &aad).is_err(), "byte {at}");
        }
    }

    #[test]
    fn a_wrapped_key_with_a_tail_does_not_unwrap() {
        let (id, kek) = kek();
        let mut wrapped = wrapped(b"");
        wrapped.push(0);
        assert!(matches!(unwrap((id, &kek), &wrapped, b""), Err(MasterKeyError::DoesNotAuthenticate { .. })));
    }

    #[test]
    fn a_blob_names_its_master_key() {
        assert_eq!(wrapped_by(&wrapped(b"")).unwrap(), kek().0);
        assert!(matches!(wrapped_by(&[]), Err(MasterKeyError::NotWrapped(OpenError::TooShort { .. }))));
        assert!(matches!(wrapped_by(&[1; 8]), Err(MasterKeyError::NotWrapped(OpenError::TooShort { .. }))));
        assert!(matches!(wrapped_by(&[2; 81]), Err(MasterKeyError::NotWrapped(OpenError::UnknownFormat { found: 2 }))));
    }

    proptest! {
        #[test]
        fn hostile_blobs_never_unwrap_and_never_panic(mut bytes in vec(any::<u8>(), 0..200), ours: bool) {
            if let (true, Some(first)) = (ours, bytes.first_mut()) {
                *first = FORMAT;
            }
            let (id, kek) = kek();
            let _ = wrapped_by(&bytes);
            prop_assert!(unwrap((id, &kek), &bytes, b"").is_err());
        }
    }
}
