//! Keys, sealing and wrapping for Kuma. Knows no storage and no actor: bytes in, bytes out.
//!
//! A **master key** wraps one random 256-bit **data key** per entity; the data key **seals** that entity's commits,
//! snapshots and id. Destroy the data key and they are gone from every file and every backup at once: that is how Kuma
//! erases. What is sealed is bound to its place (kind, id hash, version, ...), so that a row cannot be moved.
//!
//! Byte layouts and the reason for each field: `docs/formats.md`, "Keys and sealed bytes".
//!
//! # Example
//! ```
//! use kuma_crypto::{CommitPlace, DataKey, IdSecret, KeyId, LocalMasterKey, MasterKey, OpenError};
//! use kuma_crypto::{open_commit, seal_commit, wrap_aad};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let master = LocalMasterKey::generate();
//! let id_hash = IdSecret::generate().hash("order", "order-7");
//!
//! // A new entity: its own key, stored only in wrapped form.
//! let (key, key_id) = (DataKey::generate(), KeyId::generate());
//! let aad = wrap_aad("my store", id_hash, key_id);
//! let wrapped = master.wrap(key.as_ref(), &aad).await?;
//!
//! // Seal a commit, and open it with the unwrapped key.
//! let place = CommitPlace { kind: "order", id_hash, first_version: 1, count: 1, at_us: 0, key_id };
//! let sealed = seal_commit(&key, &place, b"placed");
//! let key = DataKey::from(master.unwrap(&wrapped, &aad).await?);
//! assert_eq!(open_commit(&key, &place, &sealed)?, b"placed");
//!
//! // At another version the same bytes are refused.
//! let elsewhere = CommitPlace { first_version: 2, ..place };
//! assert_eq!(open_commit(&key, &elsewhere, &sealed), Err(OpenError::DoesNotAuthenticate));
//! # Ok(())
//! # }
//! ```

mod aad;
mod append_key;
mod commit;
mod data_key;
mod id_hash;
mod master_key;
mod random;
mod sealed;
mod sealed_id;
mod secret;
mod short_hex;
mod signing;
mod snapshot;
mod text;

pub use append_key::{AppendKeyHash, hash_append_key};
pub use commit::{CommitPlace, open_commit, seal_commit, seal_commit_parts};
pub use data_key::{DataKey, KeyId};
pub use id_hash::{IdHash, IdSecret};
pub use master_key::{
    BoxFuture, KekId, LocalMasterKey, MasterKey, MasterKeyError, id_secret_aad, node_key_aad, rewrap, wrap_aad,
    wrapped_by,
};
pub use sealed::{OpenError, SEALED_OVERHEAD_BYTES};
pub use sealed_id::{open_id, seal_id};
pub use secret::Secret32;
pub use signing::{PublicKey, Signature, SignatureError, SigningKey};
pub use snapshot::{SnapshotPlace, open_snapshot, seal_snapshot};
