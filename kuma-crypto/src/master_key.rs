//! The master key (KEK): wraps the secrets of a store, and may live outside the process.
//!
//! ```text
//! master key --wraps--> data key of each entity --seals--> its commits, snapshots and id
//!            |--wraps--> the store's id secret  --keys---> the id hashes
//!            \--wraps--> a node's signing key   --signs--> receipts
//! ```
//! Invariants: every wrapped blob starts with the format byte and the id of the key that wrapped it, whoever the
//! provider is, so that a rotation finds its work without unwrapping; a wrapped secret opens only with the associated
//! data it was wrapped with, so that one entity's key cannot be put in another's place.

mod error;
mod kek_id;
mod key_file;
mod key_text;
mod local;
mod wrapped;

use std::fmt;
use std::pin::Pin;

pub use error::MasterKeyError;
pub use kek_id::KekId;
pub use local::LocalMasterKey;
pub use wrapped::{id_secret_aad, node_key_aad, wrap_aad, wrapped_by};

use crate::secret::Secret32;

/// A boxed future, so that [`MasterKey`] can be a trait object.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Wraps and unwraps secrets. [`LocalMasterKey`] keeps its keys in the process; a KMS can stand behind it as well.
///
/// A blob made by [`wrap`](Self::wrap) starts with the byte 1 and the 8 bytes of [`current`](Self::current); what
/// follows belongs to the provider. It must authenticate the secret and `aad`, and unwrap under every key that still
/// has blobs.
pub trait MasterKey: Send + Sync + fmt::Debug + 'static {
    /// The key that new wraps use.
    fn current(&self) -> KekId;

    /// Wraps `secret` under the current key, bound to `aad` (see [`wrap_aad`], [`id_secret_aad`] and
    /// [`node_key_aad`]).
    fn wrap<'a>(&'a self, secret: &'a Secret32, aad: &'a [u8]) -> BoxFuture<'a, Result<Vec<u8>, MasterKeyError>>;

    /// Unwraps what this or an older key of the provider wrapped with the same `aad`.
    fn unwrap<'a>(&'a self, wrapped: &'a [u8], aad: &'a [u8]) -> BoxFuture<'a, Result<Secret32, MasterKeyError>>;

    /// Whether unwrapping is a computation in this process, so that work in the background may do it without end. False, unless said
    /// otherwise: a key management service is asked, and paid, for each key.
    fn is_local(&self) -> bool {
        false
    }
}

/// Moves a wrapped secret under the current master key: one step of a rotation.
///
/// `None` if it is there already; the blob is then not unwrapped, so this says nothing about whether it opens. Running
/// it again after a crash is safe: nothing is changed until the caller stores the result.
///
/// # Errors
/// Those of [`wrapped_by`], [`MasterKey::unwrap`] and [`MasterKey::wrap`]; the old blob stays valid.
/// # Cancel safety
/// Cancel safe: a dropped future has stored nothing.
pub async fn rewrap(master: &dyn MasterKey, wrapped: &[u8], aad: &[u8]) -> Result<Option<Vec<u8>>, MasterKeyError> {
    if wrapped_by(wrapped)? == master.current() {
        return Ok(None);
    }
    let secret = master.unwrap(wrapped, aad).await?;
    Ok(Some(master.wrap(&secret, aad).await?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{IdHash, KeyId};

    fn aad() -> Vec<u8> {
        wrap_aad("store", IdHash([0x11; 16]), KeyId([0x22; 16]))
    }

    #[tokio::test]
    async fn rewrap_moves_a_secret_to_the_current_key_and_keeps_it() {
        let (old, secret) = (LocalMasterKey::generate(), Secret32::generate());
        let wrapped = old.wrap(&secret, &aad()).await.unwrap();
        let master = LocalMasterKey::generate().with_older(old);

        let moved = rewrap(&master, &wrapped, &aad()).await.unwrap().unwrap();
        assert_eq!(wrapped_by(&moved).unwrap(), master.current());
        assert_eq!(master.unwrap(&moved, &aad()).await.unwrap().expose(), secret.expose());
        assert_eq!(
            master.unwrap(&wrapped, &aad()).await.unwrap().expose(),
            secret.expose(),
            "the old blob still opens"
        );
    }

    #[tokio::test]
    async fn rewrap_of_a_current_blob_does_nothing() {
        let old = LocalMasterKey::generate();
        let wrapped = old.wrap(&Secret32::generate(), &aad()).await.unwrap();
        let master = LocalMasterKey::generate().with_older(old);
        let moved = rewrap(&master, &wrapped, &aad()).await.unwrap().unwrap();
        assert_eq!(rewrap(&master, &moved, &aad()).await.unwrap(), None);
    }

    #[tokio::test]
    async fn rewrap_refuses_a_blob_that_belongs_elsewhere() {
        let old = LocalMasterKey::generate();
        let wrapped = old.wrap(&Secret32::generate(), &aad()).await.unwrap();
        let master = LocalMasterKey::generate().with_older(old);
        let refused = rewrap(&master, &wrapped, b"another place").await.unwrap_err();
        assert!(matches!(refused, MasterKeyError::DoesNotAuthenticate { .. }), "{refused:?}");
    }

    /// A task of the runtime carries it out: the future has to cross threads.
    #[test]
    fn the_future_of_rewrap_is_send() {
        fn is_send<T: Send>(_: &T) {}
        let master = LocalMasterKey::generate();
        is_send(&rewrap(&master, &[], &[]));
    }
}
