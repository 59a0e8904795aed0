//! The sealed envelope: the one way in which Kuma turns plaintext into bytes at rest.
//!
//! ```text
//! header (format byte 1, for a wrapped key also the KEK's id) | nonce 24 | ciphertext | tag 16
//! ```
//! XChaCha20-Poly1305. Invariants: every seal draws a fresh random nonce; the tag is verified, in constant time, before
//! a byte is decrypted; no input, however hostile, makes opening panic.

use chacha20poly1305::{AeadInOut, Key, KeyInit, Tag, XChaCha20Poly1305, XNonce};

use crate::random::NONCE_BYTES;
use crate::secret::Secret32;

/// The format this Kuma writes. A change of layout, cipher or associated data gets the next number.
pub(crate) const FORMAT: u8 = 1;

/// Length of a Poly1305 tag.
pub(crate) const TAG_BYTES: usize = 16;

/// How much longer than its plaintext a sealed commit, snapshot or id is: format, nonce and tag.
pub const SEALED_OVERHEAD_BYTES: usize = 1 + NONCE_BYTES + TAG_BYTES;

/// Why sealed bytes were not opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// There are too few bytes for an envelope: the row is cut off.
    #[error("sealed bytes are cut off: {actual} of at least {least} bytes; restore the row from a backup")]
    TooShort {
        /// How many bytes there are.
        actual: usize,
        /// How many there must be at the very least.
        least: usize,
    },
    /// The format byte is none of ours, most likely that of a newer Kuma.
    #[error("sealed in format {found}, this kuma knows format {FORMAT}; open the store with the kuma that wrote it")]
    UnknownFormat {
        /// The format byte found.
        found: u8,
    },
    /// Another key, another place, or changed bytes. Which of them cannot be told, and nothing was decrypted.
    #[error("sealed bytes do not authenticate: wrong key, moved or damaged; restore the row from a backup")]
    DoesNotAuthenticate,
}

/// Seals `plaintext` behind `header`, which is not encrypted. One allocation.
///
/// The nonce is a parameter so that tests can pin bytes; all else passes [`random::nonce`](crate::random::nonce).
pub(crate) fn seal_with_nonce(
    key: &Secret32,
    nonce: &[u8; NONCE_BYTES],
    header: &[u8],
    aad: &[u8],
    plaintext: &[u8],
) -> Vec<u8> {
    seal_parts_with_nonce(key, nonce, header, aad, &[plaintext])
}

/// [`seal_with_nonce`] for a plaintext in parts, which need not be put together first.
pub(crate) fn seal_parts_with_nonce(
    key: &Secret32,
    nonce: &[u8; NONCE_BYTES],
    header: &[u8],
    aad: &[u8],
    parts: &[&[u8]],
) -> Vec<u8> {
    let plaintext_bytes: usize = parts.iter().map(|part| part.len()).sum();
    let mut sealed = Vec::with_capacity(header.len() + NONCE_BYTES + plaintext_bytes + TAG_BYTES);
    sealed.extend_from_slice(header);
    sealed.extend_from_slice(nonce);
    let body = sealed.len();
    parts.iter().for_each(|part| sealed.extend_from_slice(part));
    let Ok(tag) = cipher(key).encrypt_inout_detached(&XNonce::from(*nonce), aad, (&mut sealed[body..]).into()) else {
        // The cipher's only refusal is a message of 256 GiB; an append has at most 4 MiB. Returning anything would be
        // worse.
        unreachable!("a plaintext of 256 GiB cannot be sealed")
    };
    sealed.extend_from_slice(&tag);
    sealed
}

/// Opens what [`seal_with_nonce`] made, given the length of its header. The caller has looked into the header or does
/// so next.
pub(crate) fn open(key: &Secret32, header_bytes: usize, aad: &[u8], sealed: &[u8]) -> Result<Vec<u8>, OpenError> {
    check_format(sealed)?;
    let too_short = OpenError::TooShort { actual: sealed.len(), least: header_bytes + NONCE_BYTES + TAG_BYTES };
    let (_, rest) = sealed.split_at_checked(header_bytes).ok_or(too_short)?;
    let (nonce, rest) = rest.split_first_chunk::<NONCE_BYTES>().ok_or(too_short)?;
    let (ciphertext, tag) = rest.split_last_chunk::<TAG_BYTES>().ok_or(too_short)?;
    let mut plaintext = ciphertext.to_vec();
    cipher(key)
        .decrypt_inout_detached(&XNonce::from(*nonce), aad, plaintext.as_mut_slice().into(), &Tag::from(*tag))
        .map_err(|_| OpenError::DoesNotAuthenticate)?;
    Ok(plaintext)
}

/// Refuses what this Kuma did not write, before anything is made of its length.
pub(crate) fn check_format(sealed: &[u8]) -> Result<(), OpenError> {
    match sealed.first() {
        Some(&FORMAT) => Ok(()),
        Some(&found) => Err(OpenError::UnknownFormat { found }),
        None => Err(OpenError::TooShort { actual: 0, least: SEALED_OVERHEAD_BYTES }),
    }
}

/// The cipher keeps a copy of the key and wipes it on drop; setting it up is that copy, so there is nothing to cache.
fn cipher(key: &Secret32) -> XChaCha20Poly1305 {
    let key: &Key = key.expose().into();
    XChaCha20Poly1305::new(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The primitive is the one of the draft: appendix A.3.1 of draft-irtf-cfrg-xchacha-03.
    #[test]
    fn the_cipher_is_the_drafts() {
        let key = Secret32::from_bytes(&std::array::from_fn(|i| 0x80 + i as u8));
        let nonce = std::array::from_fn(|i| 0x40 + i as u8);
        let aad = hex::decode("50515253c0c1c2c3c4c5c6c7").unwrap();
        let plaintext = b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, \
                          sunscreen would be it.";
        let sealed = seal_with_nonce(&key, &nonce, &[FORMAT], &aad, plaintext);
        assert_eq!(
            hex::encode(&sealed[1 + NONCE_BYTES..]),
            "bd6d179d3e83d43b9576579493c0e939572a1700252bfaccbed2902c21396cbb731c7f1b0b4aa6440bf3a82f4eda7e39ae64\
             c6708c54c216cb96b72e1213b4522f8c9ba40db5d945b11b69b982c1bb9e3f3fac2bc369488f76b2383565d3fff921f9664c\
             97637da9768812f615c68b13b52ec0875924c1c7987947deafd8780acf49"
        );
        assert_eq!(open(&key, 1, &aad, &sealed).unwrap(), plaintext);
    }

    #[test]
    fn sealing_allocates_exactly_what_it_returns() {
        let sealed = seal_with_nonce(&Secret32::generate(), &[0; 24], &[FORMAT], b"", b"plaintext");
        assert_eq!(sealed.len(), sealed.capacity());
        assert_eq!(sealed.len(), SEALED_OVERHEAD_BYTES + 9);
    }

    #[test]
    fn a_newer_format_is_named_even_when_the_rest_is_short() {
        assert_eq!(open(&Secret32::generate(), 1, b"", &[2]), Err(OpenError::UnknownFormat { found: 2 }));
    }

    #[test]
    fn bytes_that_are_cut_off_are_called_cut_off() {
        let key = Secret32::generate();
        for actual in 0..SEALED_OVERHEAD_BYTES {
            let refused = open(&key, 1, b"", &vec![FORMAT; actual]);
            assert_eq!(refused, Err(OpenError::TooShort { actual, least: SEALED_OVERHEAD_BYTES }));
        }
    }
}
