//! Signatures: how a node vouches for what it says, for instance that an entity was erased.
//!
//! ```text
//! signed = length of context 2 | context | message        Ed25519 (RFC 8032), verified strictly
//! ```
//! Invariants: nothing is signed without a context, and no context is the beginning of another one's message, so that what
//! was signed as one thing never verifies as another; the signing key is random, wiped on drop and never printed. Strict: a
//! weak public key, under which one signature fits many messages, verifies nothing.

use std::fmt;
use std::str::FromStr;

use crate::secret::Secret32;
use crate::{short_hex, text};

/// What signs. Wiped on drop, printed as `[redacted]`, kept at rest only in wrapped form
/// (see [`node_key_aad`](crate::node_key_aad)).
#[derive(Clone, Debug)]
pub struct SigningKey(Secret32);

impl SigningKey {
    /// A new random key.
    pub fn generate() -> Self {
        Self(Secret32::generate())
    }

    /// Signs `message` as what `context` says it is. The same input gives the same signature.
    ///
    /// A context is a sentence with a date and a version, like `kuma 2026-11-22 receipt v1`. It is written out in the code,
    /// never computed: a context that an outsider chooses separates nothing.
    pub fn sign(&self, context: &'static str, message: &[u8]) -> Signature {
        use ed25519_dalek::Signer;
        Signature(self.expand().sign(&signed(context, message)).to_bytes())
    }

    /// What verifies its signatures.
    pub fn public(&self) -> PublicKey {
        PublicKey(self.expand().verifying_key().to_bytes())
    }

    /// Made anew each time, so that there is one copy of the secret; dalek wipes its own on drop.
    fn expand(&self) -> ed25519_dalek::SigningKey {
        ed25519_dalek::SigningKey::from_bytes(self.0.expose())
    }
}

impl From<Secret32> for SigningKey {
    fn from(secret: Secret32) -> Self {
        Self(secret)
    }
}

impl From<SigningKey> for Secret32 {
    fn from(key: SigningKey) -> Self {
        key.0
    }
}

impl AsRef<Secret32> for SigningKey {
    fn as_ref(&self) -> &Secret32 {
        &self.0
    }
}

/// What verifies the signatures of a [`SigningKey`]. Prints all 64 hex digits, and in `{:?}` the first 12. Any 32 bytes make
/// one; bytes that are no key verify nothing.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey(pub [u8; 32]);

impl PublicKey {
    /// Whether the owner of this key signed `message` in `context`.
    ///
    /// # Errors
    /// [`SignatureError::NotAKey`] if these bytes are no public key, or a weak one; [`SignatureError::DoesNotVerify`] if the
    /// message, the context or the signature is another one. A retry gives the same answer.
    pub fn verify(&self, context: &'static str, message: &[u8], signature: &Signature) -> Result<(), SignatureError> {
        let not_a_key = || SignatureError::NotAKey { key: *self };
        let key = ed25519_dalek::VerifyingKey::from_bytes(&self.0).map_err(|_| not_a_key())?;
        if key.is_weak() {
            return Err(not_a_key());
        }
        let signature = ed25519_dalek::Signature::from_bytes(&signature.0);
        // The cause says only that it failed.
        key.verify_strict(&signed(context, message), &signature)
            .map_err(|_| SignatureError::DoesNotVerify { key: *self, context })
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        short_hex::write(f, &self.0, 64)
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        short_hex::write(f, &self.0, short_hex::SHORT_DIGITS)
    }
}

impl FromStr for PublicKey {
    type Err = SignatureError;

    fn from_str(digits: &str) -> Result<Self, SignatureError> {
        parse("public key", digits).map(Self)
    }
}

/// A signature. Not secret. Prints all 128 hex digits, and in `{:?}` the first 12.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Signature(pub [u8; 64]);

impl fmt::Display for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        short_hex::write(f, &self.0, 128)
    }
}

impl fmt::Debug for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        short_hex::write(f, &self.0, short_hex::SHORT_DIGITS)
    }
}

impl FromStr for Signature {
    type Err = SignatureError;

    fn from_str(digits: &str) -> Result<Self, SignatureError> {
        parse("signature", digits).map(Self)
    }
}

/// Why a signature says nothing. Asking again gives the same answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SignatureError {
    /// The message was altered, or this key did not sign it, or not as this.
    #[error(
        "the signature does not verify as \"{context}\" with public key {key}: the message was altered, or another key \
         signed it; believe nothing it says"
    )]
    DoesNotVerify {
        /// The key it was verified with.
        key: PublicKey,
        /// What it was to be.
        context: &'static str,
    },
    /// These 32 bytes are no Ed25519 public key, or one under which anybody can sign.
    #[error("{key} is not a usable public key; get it again from where it is published")]
    NotAKey {
        /// The bytes.
        key: PublicKey,
    },
    /// The text is not in hex, or not of the right length.
    #[error("this is not a {what}: it has {digits} hex digits and nothing else; check that all of it was copied")]
    Malformed {
        /// What it was to be.
        what: &'static str,
        /// How many digits it needs.
        digits: usize,
    },
}

/// The bytes that are signed.
fn signed(context: &str, message: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text::TEXT_PREFIX_BYTES_MAX + context.len() + message.len());
    text::push(&mut bytes, context);
    bytes.extend_from_slice(message);
    bytes
}

fn parse<const N: usize>(what: &'static str, digits: &str) -> Result<[u8; N], SignatureError> {
    let mut bytes = [0; N];
    hex::decode_to_slice(digits, &mut bytes).map_err(|_| SignatureError::Malformed { what, digits: 2 * N })?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::{LocalMasterKey, MasterKey, id_secret_aad, node_key_aad};

    const CONTEXT: &str = "kuma 2026-11-22 receipt v1";

    /// RFC 8032, 7.1, TEST 3.
    fn key() -> SigningKey {
        let mut secret = [0; 32];
        hex::decode_to_slice("c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7", &mut secret).unwrap();
        Secret32::from_bytes(&secret).into()
    }

    #[test]
    fn the_signature_is_that_of_rfc_8032() {
        use ed25519_dalek::Signer;
        assert_eq!(key().public().to_string(), "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025");
        assert_eq!(
            hex::encode(key().expand().sign(&[0xaf, 0x82]).to_bytes()),
            "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc6594a7c15e9716ed\
             28dc027beceea1ec40a"
        );
    }

    /// A receipt is verified for as long as somebody keeps it, and by other programs.
    #[test]
    fn what_is_signed_is_pinned() {
        let bytes = signed(CONTEXT, b"erased");
        assert_eq!(hex::encode(&bytes), "1a006b756d6120323032362d31312d32322072656365697074207631657261736564");
        assert_eq!(
            key().sign(CONTEXT, b"erased").to_string(),
            "f895e239a00dc07c2936caddfd8ff0c5f86b11471b9a8c945b6507a372d4afd1fa564cb86ccd25aec1ae141cdc4ac0a7ba269c581821a\
             cd256e8aef722259400"
        );
    }

    #[test]
    fn a_signature_verifies_for_its_message_context_and_key_only() {
        let (key, signature) = (key(), key().sign(CONTEXT, b"erased"));
        assert_eq!(key.public().verify(CONTEXT, b"erased", &signature), Ok(()));
        let refused = Err(SignatureError::DoesNotVerify { key: key.public(), context: CONTEXT });
        assert_eq!(key.public().verify(CONTEXT, b"erase", &signature), refused);
        assert!(key.public().verify("kuma 2026-11-22 backup v1", b"erased", &signature).is_err());
        assert!(SigningKey::generate().public().verify(CONTEXT, b"erased", &signature).is_err());
        for at in 0..64 {
            let mut altered = signature;
            altered.0[at] ^= 1;
            assert_eq!(key.public().verify(CONTEXT, b"erased", &altered), refused, "byte {at}");
        }
    }

    #[test]
    fn context_and_message_do_not_run_into_each_other() {
        let signature = key().sign("kuma a", b"bc");
        assert!(key().public().verify("kuma ab", b"c", &signature).is_err());
        assert!(key().public().verify("", b"kuma abc", &signature).is_err());
    }

    /// The neutral element: under it one signature fits every message unless verification is strict.
    #[test]
    fn a_weak_public_key_verifies_nothing() {
        let mut neutral = [0; 32];
        neutral[0] = 1;
        let mut signature = [0; 64];
        signature[0] = 1;
        let weak = PublicKey(neutral);
        let refused = weak.verify(CONTEXT, b"erased", &Signature(signature));
        assert_eq!(refused, Err(SignatureError::NotAKey { key: weak }));
    }

    #[test]
    fn keys_and_signatures_are_read_as_they_are_printed() {
        let (key, signature) = (key().public(), key().sign(CONTEXT, b"erased"));
        assert_eq!(key.to_string().parse(), Ok(key));
        assert_eq!(signature.to_string().parse(), Ok(signature));
        assert_eq!(format!("{key:?} {signature:?}"), format!("{:.12} {:.12}", key.to_string(), signature.to_string()));
        let cut = key.to_string()[1..].parse::<PublicKey>().unwrap_err();
        assert_eq!(cut, SignatureError::Malformed { what: "public key", digits: 64 });
        assert!(cut.to_string().contains("64 hex digits"), "{cut}");
        assert!("é".repeat(64).parse::<Signature>().is_err());
    }

    /// It cannot be put in the place of the id secret, nor that in its place.
    #[tokio::test]
    async fn a_signing_key_is_wrapped_at_its_own_place() {
        let (master, key) = (LocalMasterKey::generate(), SigningKey::generate());
        let wrapped = master.wrap(key.as_ref(), &node_key_aad("store")).await.unwrap();
        let again = SigningKey::from(master.unwrap(&wrapped, &node_key_aad("store")).await.unwrap());
        assert_eq!(again.public(), key.public());
        assert!(master.unwrap(&wrapped, &id_secret_aad("store")).await.is_err());
    }

    #[test]
    fn two_signing_keys_differ_and_print_nothing() {
        let (one, other) = (SigningKey::generate(), SigningKey::generate());
        assert_ne!(one.public(), other.public());
        assert_eq!(format!("{one:?}"), "SigningKey([redacted])");
    }

    proptest! {
        #[test]
        fn hostile_keys_and_signatures_verify_nothing(key: [u8; 32], signature in vec(any::<u8>(), 64), text: String) {
            let signature = Signature(signature.try_into().unwrap());
            prop_assert!(PublicKey(key).verify(CONTEXT, b"erased", &signature).is_err());
            let _ = (text.parse::<PublicKey>(), text.parse::<Signature>());
        }
    }
}
