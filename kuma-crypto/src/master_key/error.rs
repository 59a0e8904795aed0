//! What can go wrong with a master key. No message ever holds a byte of one.

use std::error::Error;
use std::fmt;
use std::io;
use std::path::PathBuf;

use super::KekId;
use crate::sealed::OpenError;

/// Why a master key could not be loaded, or did not wrap or unwrap. One variant per thing a caller can do about it.
#[derive(Debug, thiserror::Error)]
pub enum MasterKeyError {
    /// There is no key file. Never answer this by making a new key for a store that exists.
    #[error("master key file {} is missing; put the key back, a new one cannot open this store", path.display())]
    FileMissing {
        /// Where the file should be.
        path: PathBuf,
    },
    /// A key file is there already and was left untouched.
    #[error("master key file {} exists already and was not touched; use it, or choose another path", path.display())]
    FileExists {
        /// The file in the way.
        path: PathBuf,
    },
    /// Users other than the owner may read or write the key file.
    #[error("master key file {0} is open to group or others (mode {mode:04o}); run: chmod 600 {0}", path.display())]
    PermissionsTooOpen {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A line is not a key. Its content is not repeated, for it may be nearly one.
    #[error("line {line} of {origin} is not a master key; a key is 64 hex digits, a comment starts with #")]
    Malformed {
        /// The file, or the environment variable.
        origin: String,
        /// Which line, counted from 1. For an environment variable `;` ends a line too.
        line: usize,
    },
    /// There are only comments and empty lines, or nothing at all.
    #[error("{origin} holds no master key; it needs a line of 64 hex digits")]
    NoKey {
        /// The file, or the environment variable.
        origin: String,
    },
    /// More text than any number of keys needs: most likely the wrong file.
    #[error("{origin} is larger than a key file can be ({bytes_max} bytes); check that it is the key file")]
    TooLarge {
        /// The file, or the environment variable.
        origin: String,
        /// The largest text that is read.
        bytes_max: usize,
    },
    /// The environment variable is not set.
    #[error("environment variable {var} is not set; put the master key in it")]
    EnvMissing {
        /// The variable's name.
        var: String,
    },
    /// The secret was wrapped by a key that is not at hand: the wrong master key, or an older one was dropped too
    /// early.
    #[error(
        "wrapped by master key {wanted}, at hand: {}; this is the wrong master key, or an older one is missing",
        list(at_hand)
    )]
    UnknownKek {
        /// The key that wrapped it.
        wanted: KekId,
        /// The keys this master key has, the current one first.
        at_hand: Vec<KekId>,
    },
    /// The right master key refuses the blob: it is damaged, or belongs to another store, entity or key id.
    #[error("what master key {kek} wrapped does not authenticate: damaged or moved; restore it from a key backup")]
    DoesNotAuthenticate {
        /// The key that the blob names.
        kek: KekId,
    },
    /// The blob is not one that this Kuma can read.
    #[error("a wrapped key cannot be read; restore it from a key backup, or use the kuma that wrote it")]
    NotWrapped(#[from] OpenError),
    /// A provider outside the process (a KMS) failed.
    #[error("the master key's provider failed and nothing was changed; {}", advice(*retry_safe))]
    Provider {
        /// What the provider said.
        source: Box<dyn Error + Send + Sync>,
        /// Whether the same call may succeed later (a timeout) or not (access denied).
        retry_safe: bool,
    },
    /// The operating system refused to read or write the key file.
    #[error("cannot use master key file {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

fn advice(retry_safe: bool) -> &'static str {
    if retry_safe {
        "a retry is safe, see that the provider runs and can be reached"
    } else {
        "a retry will not help before the cause is mended"
    }
}

/// The ids in a row, for a message.
fn list(ids: &[KekId]) -> impl fmt::Display + '_ {
    fmt::from_fn(move |f| {
        ids.iter().enumerate().try_for_each(|(i, id)| write!(f, "{}{id}", if i == 0 { "" } else { ", " }))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_master_key_is_named_beside_those_at_hand() {
        let error = MasterKeyError::UnknownKek { wanted: KekId([1; 8]), at_hand: vec![KekId([2; 8]), KekId([3; 8])] };
        let text = error.to_string();
        assert!(text.contains("0101010101010101"), "{text}");
        assert!(text.contains("0202020202020202, 0303030303030303"), "{text}");
    }

    #[test]
    fn a_providers_failure_says_whether_to_retry_and_keeps_its_cause() {
        let timeout = MasterKeyError::Provider { source: "kms timed out".into(), retry_safe: true };
        assert_eq!(
            timeout.to_string(),
            "the master key's provider failed and nothing was changed; a retry is safe, see that the provider runs and can be \
             reached"
        );
        assert_eq!(timeout.source().unwrap().to_string(), "kms timed out");
    }
}
