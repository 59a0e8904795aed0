//! 32 secret bytes: what every key in Kuma is made of.
//!
//! Invariants: wiped when dropped, never printed, never compared (there is no `Eq`: a comparison that stops at the
//! first difference tells the time of it). A move may leave a copy on the stack that nobody wipes; Rust offers no
//! remedy, so the promise is about values that are dropped.

use std::fmt;

use zeroize::{Zeroize, ZeroizeOnDrop};

use crate::random;

/// 256 secret bits, wiped on drop. What a [`MasterKey`](crate::MasterKey) wraps and unwraps.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct Secret32([u8; 32]);

impl Secret32 {
    /// A new secret from the operating system's generator.
    pub fn generate() -> Self {
        let mut secret = Self([0; 32]);
        random::fill_secret(&mut secret.0);
        secret
    }

    /// Copies the secret out of `bytes`. Wiping the original stays with the caller.
    pub fn from_bytes(bytes: &[u8; 32]) -> Self {
        Self(*bytes)
    }

    /// The secret itself, for a key provider or an encrypted link. Never log it, never store it unwrapped.
    pub fn expose(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for Secret32 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[redacted]")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DataKey, IdSecret, LocalMasterKey};

    /// Neither as hex nor as a list of numbers, in either form of `{:?}`.
    #[test]
    fn the_debug_form_of_a_secret_holds_no_byte_of_it() {
        let bytes: [u8; 32] = std::array::from_fn(|i| 0xc8 + i as u8);
        let secret = Secret32::from_bytes(&bytes);
        // Fixed as well: the ids of random keys would now and then hold the digits searched for.
        let older = LocalMasterKey::from_secret(Secret32::from_bytes(&[0xff; 32]));
        let master = LocalMasterKey::from_secret(secret.clone()).with_older(older);
        let printed = [
            format!("{secret:?} {secret:#?}"),
            format!("{0:?} {0:#?}", DataKey::from(secret.clone())),
            format!("{0:?} {0:#?}", IdSecret::from(secret)),
            format!("{master:?} {master:#?}"),
        ];
        for text in printed {
            assert!(text.contains("[redacted]"), "{text}");
            for pair in bytes.windows(2) {
                assert!(!text.to_lowercase().contains(&hex::encode(pair)), "{text}");
                assert!(!text.contains(&pair[0].to_string()), "{text}");
            }
        }
    }

    #[test]
    fn two_secrets_differ() {
        assert_ne!(Secret32::generate().expose(), Secret32::generate().expose());
    }

    #[test]
    fn a_wiped_secret_is_zero() {
        let mut secret = Secret32::generate();
        secret.zeroize();
        assert_eq!(secret.expose(), &[0; 32]);
    }
}
