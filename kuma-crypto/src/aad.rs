//! Associated data: the bytes that say what a sealed thing is and where it belongs.
//!
//! They are never stored. Who opens builds them again from the row in hand; if anything differs, opening fails.
//!
//! ```text
//! purpose 1 | format 1 | length of text 2 | text | fixed fields of that purpose, integers little-endian
//! ```
//! Invariants: the encoding is injective (text carries its length, all else is fixed by the purpose), and no two
//! purposes share a byte, so that a sealed id never opens as a commit. A purpose's number is never used again.

use crate::sealed::FORMAT;
use crate::text;

/// Room for the largest set of fixed fields (a commit's), so that building associated data allocates once.
const FIXED_BYTES_MAX: usize = 16 + 8 + 4 + 8 + 16;

/// What associated data belongs to. On disk, in that every sealed thing is bound to its number.
#[derive(Clone, Copy)]
#[repr(u8)]
pub(crate) enum Purpose {
    /// The events of one append, under a data key.
    Commit = 1,
    /// An entity's id, under its data key.
    Id = 2,
    /// Saved state, under a data key.
    Snapshot = 3,
    /// What a local master key encrypts; the associated data of its caller (one of the next three) is nested in it.
    WrappedKey = 4,
    /// The place of a wrapped data key.
    DataKeyPlace = 5,
    /// The place of a wrapped id secret.
    IdSecretPlace = 6,
    /// The place of a wrapped signing key.
    NodeKeyPlace = 7,
}

/// Associated data under construction.
pub(crate) struct Aad(Vec<u8>);

impl Aad {
    /// Starts with the purpose, the format and a text (a kind, or the name of a store).
    pub(crate) fn with_text(purpose: Purpose, text: &str) -> Self {
        let mut bytes = Vec::with_capacity(2 + text::TEXT_PREFIX_BYTES_MAX + text.len() + FIXED_BYTES_MAX);
        bytes.extend_from_slice(&[purpose as u8, FORMAT]);
        text::push(&mut bytes, text);
        Self(bytes)
    }

    /// Starts with the purpose and the format only.
    pub(crate) fn new(purpose: Purpose) -> Self {
        Self(vec![purpose as u8, FORMAT])
    }

    /// Appends a field of fixed length, or the last one.
    pub(crate) fn field(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// The finished bytes.
    pub(crate) fn finish(self) -> Vec<u8> {
        self.0
    }
}
