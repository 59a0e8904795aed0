//! Receipts: the signed account of an erasure.
//!
//! Invariants:
//! - No personal data: an entity is named by its hash, a key by its random name.
//! - What is signed is the statement as JSON without spaces, its fields in the order of [`Statement`]: a receipt can be formatted anew, or
//!   have its fields sorted, and still be verified. A field that is not known is refused, so that nothing stands in it unsigned.

use std::{fmt, str::FromStr};

use kuma_crypto::{PublicKey, Signature, SigningKey};
use serde::{Deserialize, Serialize};

use crate::EraseError;

/// The format of [`Statement`].
const FORMAT: u32 = 1;
/// What a signature is for.
const SIGNED_AS: &str = "kuma receipt v1";

/// The random name of an erasure and its receipt.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ReceiptId(pub [u8; 16]);

impl fmt::Display for ReceiptId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for ReceiptId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ReceiptId({self})")
    }
}

impl FromStr for ReceiptId {
    type Err = ReceiptError;

    fn from_str(text: &str) -> Result<Self, ReceiptError> {
        let bytes = hex::decode(text).ok().and_then(|bytes| bytes.try_into().ok());
        bytes.map(ReceiptId).ok_or(ReceiptError::Unreadable("a receipt is named by 32 hex digits".to_owned()))
    }
}

impl Serialize for ReceiptId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ReceiptId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// The receipt of an erasure: what was done, and who says so. As text it is JSON ([`fmt::Display`], [`FromStr`]).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Receipt {
    /// What was done.
    pub receipt: Statement,
    /// The Ed25519 signature of the statement, in hex.
    signature: String,
}

/// What a receipt states. Times are RFC 3339 in UTC.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Statement {
    /// 1.
    pub format: u32,
    /// The name of the erasure.
    pub id: ReceiptId,
    /// The store's name.
    pub context: String,
    /// The data directory's identity, in hex.
    pub disk_id: String,
    /// The keyed hash of the entity's kind and id, in hex.
    pub entity: String,
    /// The kind; none where nothing of the entity was found on this disk.
    pub kind: Option<String>,
    /// Which life of the entity; none where nothing of it was found on this disk.
    pub life: Option<u32>,
    /// The slot.
    pub slot: u16,
    /// The name of the key that was destroyed, in hex.
    pub key: String,
    /// When the erasure was asked for.
    pub requested_at: String,
    /// When the last store was done.
    pub completed_at: String,
    /// Whether it was interrupted (by a crash or a failing disk) and gone on with. What was counted in bytes is that of the last run then.
    pub resumed: bool,
    /// What became of it in each store.
    pub stores: Vec<StoreOutcome>,
    /// Durable subscriptions whose consumers have not confirmed: what they keep elsewhere may still be there. When the last one has, the receipt of
    /// this name is complete; ask for it again.
    pub pending: Vec<String>,
    /// The newest backups that were made before: they hold sealed bytes, or the wrapped key.
    pub backups: LastBackups,
    /// The key that the signature is checked with, in hex. Compare it with the store's own, which is known from elsewhere.
    pub public_key: String,
}

/// What became of an entity in one store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoreOutcome {
    /// The name of the file, or "memory".
    pub store: String,
    /// What was done, in words.
    pub outcome: String,
    /// Commits that became stubs.
    pub commits: u64,
    /// Their events.
    pub events: u64,
    /// Snapshots that were deleted.
    pub snapshots: u64,
    /// Sealed bytes that were deleted, of commits, snapshot and id; or of the wrapped key.
    pub bytes: u64,
}

/// When the newest backups before an erasure were made, as far as this store knows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LastBackups {
    /// Of events: it holds the entity's sealed bytes.
    pub events: Option<String>,
    /// Of keys: it holds the wrapped key until it is deleted. A restore with the ledger destroys it again.
    pub keys: Option<String>,
}

/// Why a receipt cannot be trusted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReceiptError {
    /// It is not the text of a receipt.
    #[error("it is not a receipt of an erasure: {0}")]
    Unreadable(String),
    /// A newer Kuma wrote it.
    #[error("the receipt has format {found}, this version of Kuma reads up to {FORMAT}; use the newer version")]
    Newer {
        /// The receipt's format.
        found: u32,
    },
    /// It was altered, or signed by another key.
    #[error("the receipt was altered, or its signature is not that of key {public_key}")]
    Signature {
        /// The key that it was checked with.
        public_key: PublicKey,
    },
}

impl Receipt {
    pub(crate) fn sign(mut receipt: Statement, key: &SigningKey) -> Result<Self, serde_json::Error> {
        receipt.format = FORMAT;
        receipt.public_key = key.public().to_string();
        let signature = key.sign(SIGNED_AS, &serde_json::to_vec(&receipt)?).to_string();
        Ok(Receipt { receipt, signature })
    }

    /// Whether everybody who was told has confirmed. Whatever the store itself held is gone in any case.
    pub fn is_complete(&self) -> bool {
        self.receipt.pending.is_empty()
    }

    /// The receipt after a subscriber has confirmed; none if it does not wait for that one.
    pub(crate) fn confirmed_by(&self, who: &str, key: &SigningKey) -> Result<Option<Self>, serde_json::Error> {
        let mut statement = self.receipt.clone();
        statement.pending.retain(|pending| pending != who);
        match statement.pending.len() == self.receipt.pending.len() {
            true => Ok(None),
            false => Receipt::sign(statement, key).map(Some),
        }
    }

    /// Whether it is the receipt of the same erasure, and only says of more or fewer subscribers that they have not confirmed.
    pub(crate) fn agrees_with(&self, other: &Receipt) -> bool {
        let but_pending = |receipt: &Receipt| Statement { pending: Vec::new(), ..receipt.receipt.clone() };
        but_pending(self) == but_pending(other)
    }

    /// The key that the receipt says it was signed with.
    ///
    /// # Errors
    /// It is not a key.
    pub fn public_key(&self) -> Result<PublicKey, ReceiptError> {
        let unreadable = |error: &dyn fmt::Display| ReceiptError::Unreadable(format!("its public key: {error}"));
        self.receipt.public_key.parse().map_err(|error| unreadable(&error))
    }

    /// Checks that the statement is as it was signed, by the key `public_key`. A store's own is [`Kuma::public_key`](crate::Kuma::public_key).
    ///
    /// # Errors
    /// See [`ReceiptError`].
    pub fn verify(&self, public_key: &PublicKey) -> Result<(), ReceiptError> {
        let refused = ReceiptError::Signature { public_key: *public_key };
        let signed = serde_json::to_vec(&self.receipt).map_err(|error| ReceiptError::Unreadable(error.to_string()))?;
        let Ok(signature) = self.signature.parse::<Signature>() else { return Err(refused) };
        public_key.verify(SIGNED_AS, &signed, &signature).map_err(|_| refused)
    }
}

/// Formatted to be read.
impl fmt::Display for Receipt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&serde_json::to_string_pretty(self).map_err(|_| fmt::Error)?)
    }
}

impl FromStr for Receipt {
    type Err = ReceiptError;

    fn from_str(text: &str) -> Result<Self, ReceiptError> {
        /// The format alone: the rest of a newer receipt may look different.
        #[derive(Deserialize)]
        struct FormatOnly {
            receipt: Format,
        }
        #[derive(Deserialize)]
        struct Format {
            format: u32,
        }
        let unreadable = |error: serde_json::Error| ReceiptError::Unreadable(error.to_string());
        let FormatOnly { receipt: Format { format: found } } = serde_json::from_str(text).map_err(unreadable)?;
        if found > FORMAT {
            return Err(ReceiptError::Newer { found });
        }
        serde_json::from_str(text).map_err(unreadable)
    }
}

/// Who asks for an erasure, and why: for the audit log, which is never erased. **Name neither the person nor the entity in it.**
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reason {
    pub(crate) why: String,
    pub(crate) by: Option<String>,
}

const REASON_BYTES_MAX: usize = 1024;

impl Reason {
    /// Why: "request 4711", say.
    pub fn new(why: impl Into<String>) -> Self {
        Reason { why: why.into(), by: None }
    }

    /// On whose behalf: the name of an operator or a service.
    pub fn by(mut self, who: impl Into<String>) -> Self {
        self.by = Some(who.into());
        self
    }

    pub(crate) fn check(&self) -> Result<(), EraseError> {
        let refuse = |detail| Err(crate::Refused::InvalidReason { detail }.into());
        let by = self.by.as_deref();
        match self.why.len() {
            0 => refuse("it is empty"),
            _ if self.why.len() > REASON_BYTES_MAX => refuse("it is too long"),
            _ if by.is_some_and(|by| by.is_empty() || by.len() > REASON_BYTES_MAX) => {
                refuse("whoever asks has no name, or too long a one")
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn statement() -> Statement {
        Statement {
            format: 0,
            id: ReceiptId([1; 16]),
            context: "payments".to_owned(),
            disk_id: "02".repeat(16),
            entity: "03".repeat(16),
            kind: Some("account".to_owned()),
            life: Some(1),
            slot: 17,
            key: "04".repeat(16),
            requested_at: "2026-11-22T00:00:00.000000Z".to_owned(),
            completed_at: "2026-11-22T00:00:01.000000Z".to_owned(),
            resumed: false,
            stores: Vec::new(),
            pending: Vec::new(),
            backups: LastBackups::default(),
            public_key: String::new(),
        }
    }

    #[test]
    fn a_receipt_is_verified_however_it_is_formatted() {
        let key = SigningKey::generate();
        let receipt = Receipt::sign(statement(), &key).unwrap();
        let pretty: Receipt = receipt.to_string().parse().unwrap();
        pretty.verify(&key.public()).unwrap();
        // A map sorts its fields.
        let sorted = serde_json::from_str::<serde_json::Value>(&receipt.to_string()).unwrap();
        sorted.to_string().parse::<Receipt>().unwrap().verify(&key.public()).unwrap();
        assert_eq!(pretty.public_key().unwrap(), key.public());
    }

    #[test]
    fn an_altered_or_foreign_receipt_is_refused() {
        let key = SigningKey::generate();
        let receipt = Receipt::sign(statement(), &key).unwrap();
        let refused = receipt.verify(&SigningKey::generate().public());
        assert!(matches!(refused, Err(ReceiptError::Signature { .. })));
        let text = receipt.to_string();
        for (from, to) in
            [("\"slot\": 17", "\"slot\": 18"), ("payments", "payment5"), ("\"resumed\": false", "\"resumed\": true")]
        {
            let altered = text.replace(from, to);
            assert_ne!(altered, text);
            let refused = altered.parse::<Receipt>().unwrap().verify(&key.public());
            assert!(matches!(refused, Err(ReceiptError::Signature { .. })), "{to}");
        }
        let added = text.replace("\"slot\": 17", "\"slot\": 17, \"more\": 1");
        assert!(matches!(added.parse::<Receipt>(), Err(ReceiptError::Unreadable(_))));
        let newer = text.replace("\"format\": 1", "\"format\": 2");
        assert!(matches!(newer.parse::<Receipt>(), Err(ReceiptError::Newer { found: 2 })));
        for odd in ["", "{}", "[1]", "{\"receipt\": 7}", &"[".repeat(100_000)] {
            assert!(matches!(odd.parse::<Receipt>(), Err(ReceiptError::Unreadable(_))));
        }
    }
}
