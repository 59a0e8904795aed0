//! The cluster's secret: who has it is a node of the cluster.
//!
//! Invariants:
//! - It has 256 bits at least. It is used for nothing itself: each use has a key of its own, derived from it.
//! - It is wiped on drop, and neither printed nor part of any error.

use std::{fmt, io, io::Read, path::Path, path::PathBuf};

use base64::Engine;
use zeroize::Zeroizing;

/// Of a cookie file; a longer one is not a cookie.
const FILE_BYTES_MAX: u64 = 4096;
const BYTES_MIN: usize = 32;

/// The cluster's secret. Every node has the same one.
#[derive(Clone)]
pub struct Cookie(Zeroizing<Vec<u8>>);

impl fmt::Debug for Cookie {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Cookie([redacted])")
    }
}

/// Why something is not a cookie. Says nothing of what was there instead.
#[derive(Debug, thiserror::Error)]
pub enum CookieError {
    /// Neither of the two forms.
    #[error("a cookie is 64 or more hexadecimal digits, or the Base64 of 32 bytes or more; this is neither")]
    Malformed,
    /// It could be guessed.
    #[error("a cookie has 32 bytes at least, this one has {bytes}; `openssl rand -hex 32` makes one")]
    TooShort {
        /// What it has.
        bytes: usize,
    },
    /// Others may read it.
    #[error("others may read {path} (its mode is {mode:04o}); chmod 600 it, and make a new cookie if they may have done so", path = path.display())]
    TooOpen {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A directory, a pipe or a device.
    #[error("{path} is not a regular file", path = path.display())]
    NotAFile {
        /// What it is called.
        path: PathBuf,
    },
    /// It could not be read.
    #[error("the cookie in {path} could not be read", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system says.
        #[source]
        source: io::Error,
    },
    /// The operating system has no random bytes to give.
    #[error("no random bytes for a new cookie: {0}")]
    Random(getrandom::Error),
}

impl Cookie {
    /// A new one, of 256 random bits.
    ///
    /// # Errors
    /// [`CookieError::Random`].
    pub fn generate() -> Result<Self, CookieError> {
        let mut bytes = Zeroizing::new(vec![0; BYTES_MIN]);
        getrandom::fill(&mut bytes).map_err(CookieError::Random)?;
        Ok(Cookie(bytes))
    }

    /// Reads 64 or more hexadecimal digits, or the Base64 of 32 bytes or more. White space around them does not count.
    ///
    /// # Errors
    /// [`CookieError::Malformed`] and [`CookieError::TooShort`].
    pub fn parse(text: &str) -> Result<Self, CookieError> {
        let text = text.trim();
        let bytes = match hex::decode(text) {
            Ok(bytes) => bytes,
            Err(_) => base64::engine::general_purpose::STANDARD
                .decode(text)
                .or_else(|_| base64::engine::general_purpose::STANDARD_NO_PAD.decode(text))
                .or_else(|_| base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(text.trim_end_matches('=')))
                .map_err(|_| CookieError::Malformed)?,
        };
        let bytes = Zeroizing::new(bytes);
        if bytes.len() < BYTES_MIN {
            return Err(CookieError::TooShort { bytes: bytes.len() });
        }
        Ok(Cookie(bytes))
    }

    /// Reads a cookie from a file that nobody else may read.
    ///
    /// # Errors
    /// [`CookieError::TooOpen`] if group or others have any right to it; the other variants say what is wrong with it.
    pub fn load_file(path: &Path) -> Result<Self, CookieError> {
        let fail = |source| CookieError::Read { path: path.into(), source };
        // Asked first: to open a pipe would wait for its writer.
        if !std::fs::metadata(path).map_err(fail)?.is_file() {
            return Err(CookieError::NotAFile { path: path.into() });
        }
        let file = std::fs::File::open(path).map_err(fail)?;
        let metadata = file.metadata().map_err(fail)?;
        if !metadata.is_file() {
            return Err(CookieError::NotAFile { path: path.into() });
        }
        #[cfg(unix)]
        {
            let mode = std::os::unix::fs::PermissionsExt::mode(&metadata.permissions()) & 0o7777;
            if mode & 0o077 != 0 {
                return Err(CookieError::TooOpen { path: path.into(), mode });
            }
        }
        // With its full capacity at once: a string that grows leaves copies behind.
        let mut text = Zeroizing::new(String::with_capacity(FILE_BYTES_MAX as usize + 1));
        file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text).map_err(fail)?;
        if text.len() as u64 > FILE_BYTES_MAX {
            return Err(CookieError::Malformed);
        }
        Cookie::parse(&text)
    }

    /// As hexadecimal digits, which [`Cookie::parse`] reads; wiped on drop as well.
    pub fn to_text(&self) -> Zeroizing<String> {
        Zeroizing::new(hex::encode(&*self.0))
    }

    /// What both ends of a connection have to have.
    pub(super) fn noise_key(&self) -> Zeroizing<[u8; 32]> {
        Zeroizing::new(blake3::derive_key("kuma 2026 link noise psk", &self.0))
    }

    /// What ractor_cluster asks for on top, inside the encrypted connection. It keeps it as a string.
    pub(super) fn session_key(&self) -> String {
        hex::encode(Zeroizing::new(blake3::derive_key("kuma 2026 link session cookie", &self.0)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cookie_is_read_in_either_form_and_never_printed() {
        let cookie = Cookie::generate().unwrap();
        let text = cookie.to_text();
        assert_eq!(text.len(), 64);
        assert_eq!(*Cookie::parse(&format!("  {}\n", *text)).unwrap().0, *cookie.0);
        for engine in [base64::engine::general_purpose::STANDARD, base64::engine::general_purpose::URL_SAFE] {
            assert_eq!(*Cookie::parse(&engine.encode(&*cookie.0)).unwrap().0, *cookie.0);
        }
        assert_eq!(format!("{cookie:?}"), "Cookie([redacted])");
        assert_ne!(cookie.session_key(), hex::encode(*cookie.noise_key()));
    }

    #[test]
    fn what_is_no_cookie_is_refused_without_repeating_it() {
        let short = Cookie::parse("00ff00ff").unwrap_err();
        assert!(matches!(short, CookieError::TooShort { bytes: 4 }), "{short}");
        let error = Cookie::parse("correct horse battery staple").unwrap_err();
        assert!(matches!(error, CookieError::Malformed) && !format!("{error} {error:?}").contains("horse"));
        assert!(Cookie::parse("").is_err());
    }

    #[cfg(unix)]
    #[test]
    fn a_cookie_file_that_others_may_read_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cookie");
        let cookie = Cookie::generate().unwrap();
        std::fs::write(&path, format!("{}\n", *cookie.to_text())).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        let error = Cookie::load_file(&path).unwrap_err();
        assert!(error.to_string().contains("chmod 600"), "{error}");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(*Cookie::load_file(&path).unwrap().0, *cookie.0);
        assert!(matches!(Cookie::load_file(dir.path()), Err(CookieError::NotAFile { .. })));
        assert!(matches!(Cookie::load_file(&dir.path().join("none")), Err(CookieError::Read { .. })));
    }
}
