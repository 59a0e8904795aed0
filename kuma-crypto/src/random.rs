//! Where random bytes come from.
//!
//! Invariants: keys come from the operating system; nonces come from the thread's own CSPRNG, which the operating
//! system seeded, because a system call for each commit would cost 0.3 us. Neither is ever derived from a version or a
//! counter: a version that failed and is retried would repeat its nonce over another plaintext.
//!
//! The thread's CSPRNG notices neither `fork` nor the snapshot of a running virtual machine. Kuma does not fork, and a
//! store is copied by a backup, not by resuming one memory image twice.

use rand::Rng;

/// Length of an XChaCha20 nonce. At 192 bits random nonces do not collide in practice, however often a key is used.
pub(crate) const NONCE_BYTES: usize = 24;

/// A fresh nonce.
pub(crate) fn nonce() -> [u8; NONCE_BYTES] {
    public()
}

/// Random bytes that need not be secret, only unique: a nonce, the name of a key.
pub(crate) fn public<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    rand::rng().fill_bytes(&mut bytes);
    bytes
}

/// Fills `bytes` with key material.
///
/// Should the system's source refuse, the thread's CSPRNG answers: it was seeded by that source, and panics rather than
/// produce anything if it never was.
pub(crate) fn fill_secret(bytes: &mut [u8]) {
    if getrandom::fill(bytes).is_err() {
        rand::rng().fill_bytes(bytes);
    }
}
