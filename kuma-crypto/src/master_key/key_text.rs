//! The text of a key file: a key a line, the current one first.
//!
//! ```text
//! # a comment
//! <64 hex digits>     the current key
//! <64 hex digits>     older keys, if any
//! ```
//! Invariant: no error repeats a line. A key with one wrong digit is still a secret.

use zeroize::Zeroizing;

use super::{KekId, MasterKeyError};
use crate::secret::Secret32;

/// More than 900 keys. Anything larger is not a key file.
pub(super) const TEXT_BYTES_MAX: usize = 64 * 1024;

/// The text of a new key file.
pub(super) fn format(id: KekId, secret: &Secret32) -> Zeroizing<Vec<u8>> {
    let comment =
        format!("# kuma master key {id}. Without it nobody can read the store: keep a copy apart from its backups.\n");
    // Exactly as much room as needed: a vector that grows leaves its old content behind.
    let mut text = Zeroizing::new(vec![b'\n'; comment.len() + 64 + 1]);
    let (head, digits) = text.split_at_mut(comment.len());
    head.copy_from_slice(comment.as_bytes());
    for (pair, byte) in digits.chunks_exact_mut(2).zip(secret.expose()) {
        pair.copy_from_slice(&[digit(byte >> 4), digit(byte & 0xf)]);
    }
    text
}

/// The keys in `text`: the current one and the older ones. `line_ends` are the bytes that end a line.
pub(super) fn parse(text: &[u8], line_ends: &[u8], origin: &str) -> Result<(Secret32, Vec<Secret32>), MasterKeyError> {
    if text.len() > TEXT_BYTES_MAX {
        return Err(MasterKeyError::TooLarge { origin: origin.to_owned(), bytes_max: TEXT_BYTES_MAX });
    }
    let mut current = None;
    let mut older = Vec::new();
    for (index, line) in text.split(|byte| line_ends.contains(byte)).enumerate() {
        let line = line.trim_ascii();
        if line.is_empty() || line.starts_with(b"#") {
            continue;
        }
        let mut bytes = Zeroizing::new([0; 32]);
        // The cause is dropped on purpose: it repeats a character of the line.
        hex::decode_to_slice(line, bytes.as_mut_slice())
            .map_err(|_| MasterKeyError::Malformed { origin: origin.to_owned(), line: index + 1 })?;
        let secret = Secret32::from_bytes(&bytes);
        match current {
            None => current = Some(secret),
            Some(_) => older.push(secret),
        }
    }
    match current {
        Some(current) => Ok((current, older)),
        None => Err(MasterKeyError::NoKey { origin: origin.to_owned() }),
    }
}

/// The lower-case hex digit of a number below 16.
fn digit(nibble: u8) -> u8 {
    match nibble {
        0..=9 => b'0' + nibble,
        _ => b'a' + nibble - 10,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KEY: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";

    fn key() -> Secret32 {
        Secret32::from_bytes(&std::array::from_fn(|i| i as u8))
    }

    #[test]
    fn the_text_of_a_key_file_is_pinned() {
        let text = format(KekId([0xab; 8]), &key());
        assert_eq!(
            String::from_utf8(text.to_vec()).unwrap(),
            format!(
                "# kuma master key abababababababab. Without it nobody can read the store: keep a copy apart from its \
                 backups.\n{KEY}\n"
            )
        );
    }

    #[test]
    fn what_is_written_is_read_again() {
        let (current, older) = parse(&format(KekId([0xab; 8]), &key()), b"\n", "test").unwrap();
        assert_eq!(current.expose(), key().expose());
        assert!(older.is_empty());
    }

    #[test]
    fn comments_blank_lines_and_windows_line_ends_are_fine() {
        let text = format!("# one\r\n\r\n  {}  \r\n# two\r\n{}", KEY.to_uppercase(), "bb".repeat(32));
        let (current, older) = parse(text.as_bytes(), b"\n", "test").unwrap();
        assert_eq!(current.expose(), key().expose());
        assert_eq!(older[0].expose(), &[0xbb; 32]);
    }

    #[test]
    fn in_an_environment_variable_a_semicolon_ends_a_line() {
        let text = format!("{KEY};{}", "bb".repeat(32));
        assert_eq!(parse(text.as_bytes(), b"\n;", "test").unwrap().1.len(), 1);
        assert!(parse(text.as_bytes(), b"\n", "test").is_err());
    }

    #[test]
    fn a_malformed_key_is_refused_by_line_and_without_its_content() {
        let cases = [
            KEY[..63].to_owned(),
            format!("{KEY}0"),
            format!("{KEY}00"),
            format!("{}g", &KEY[..63]),
            format!("{KEY} {KEY}"),
            "key = topsecret".to_owned(),
        ];
        for case in cases {
            let text = format!("# comment\n{KEY}\n{case}\n");
            let error = parse(text.as_bytes(), b"\n", "the file").unwrap_err();
            assert!(matches!(&error, MasterKeyError::Malformed { line: 3, .. }), "{error:?}");
            let shown = format!("{error} {error:?}");
            assert!(!shown.contains(&case[..10]) && !shown.contains("topsecret"), "{shown}");
            assert!(std::error::Error::source(&error).is_none());
        }
        assert!(matches!(parse(b"\xff\xfe", b"\n", "x"), Err(MasterKeyError::Malformed { line: 1, .. })));
    }

    #[test]
    fn a_text_without_a_key_is_refused() {
        for text in ["", "\n\n", "# only a comment\n"] {
            assert!(matches!(parse(text.as_bytes(), b"\n", "x"), Err(MasterKeyError::NoKey { .. })));
        }
    }

    #[test]
    fn a_text_that_is_far_too_large_is_refused() {
        let text = vec![b'\n'; TEXT_BYTES_MAX + 1];
        assert!(matches!(parse(&text, b"\n", "x"), Err(MasterKeyError::TooLarge { .. })));
    }

    proptest! {
        #[test]
        fn hostile_text_never_panics(text in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&text, b"\n;", "test");
        }
    }
}
