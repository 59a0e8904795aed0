//! Paths and query strings: what stands in them is percent-encoded, whatever it is.
//!
//! Invariants:
//! - A segment stays one segment: of all bytes only letters, digits, `-`, `_`, `.` and `~` stand for themselves.
//! - A segment that every URL library resolves away (`.`, `..`, nothing) is refused, encoded or not.

use std::fmt::Write;

use super::ClientError;

/// One segment of a path.
///
/// # Errors
/// [`ClientError::Name`] if it cannot stand in a URL.
pub(super) fn segment(text: &str) -> Result<String, ClientError> {
    // `%2e%2e` is the same as `..`. Source: <https://url.spec.whatwg.org/#double-dot-path-segment>.
    if matches!(text, "" | "." | "..") {
        return Err(ClientError::Name(text.to_owned()));
    }
    Ok(encoded(text))
}

/// A query string with its question mark, or nothing if there are no pairs.
pub(super) fn query<'a>(pairs: impl IntoIterator<Item = (&'a str, String)>) -> String {
    let mut text = String::new();
    for (name, value) in pairs {
        text.push(if text.is_empty() { '?' } else { '&' });
        text.push_str(name);
        text.push('=');
        text.push_str(&encoded(&value));
    }
    text
}

fn encoded(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => out.push(char::from(byte)),
            // A String takes everything.
            _ => drop(write!(out, "%{byte:02X}")),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decoded(text: &str) -> Vec<u8> {
        let (mut bytes, mut out) = (text.bytes(), Vec::new());
        while let Some(byte) = bytes.next() {
            match byte {
                b'%' => {
                    let digits = [bytes.next().unwrap(), bytes.next().unwrap()];
                    out.push(u8::from_str_radix(std::str::from_utf8(&digits).unwrap(), 16).unwrap());
                }
                byte => out.push(byte),
            }
        }
        out
    }

    #[test]
    fn ids_of_all_sorts_are_one_segment() {
        assert_eq!(segment("acc_001").unwrap(), "acc_001");
        assert_eq!(segment("a/b %c").unwrap(), "a%2Fb%20%25c");
        assert_eq!(segment("Zürich").unwrap(), "Z%C3%BCrich");
        assert_eq!(segment("?#&=+:@").unwrap(), "%3F%23%26%3D%2B%3A%40");
        assert_eq!(segment("...").unwrap(), "...");
    }

    /// A URL library would turn `DELETE /v1/entities/account/..` into a request about something else.
    #[test]
    fn what_a_url_resolves_away_is_refused() {
        for text in ["", ".", ".."] {
            assert!(matches!(segment(text), Err(ClientError::Name(_))), "{text:?}");
        }
    }

    #[test]
    fn a_query_string_has_its_pairs_in_order() {
        assert_eq!(query([]), "");
        assert_eq!(query([("kind", "a b".to_owned()), ("from", "1".to_owned())]), "?kind=a%20b&from=1");
    }

    proptest! {
        #[test]
        fn a_segment_decodes_to_what_it_was(text in "\\PC{1,40}") {
            prop_assume!(text != "." && text != "..");
            let segment = segment(&text).unwrap();
            prop_assert!(!segment.contains(['/', '?', '#', ' ']));
            prop_assert_eq!(decoded(&segment), text.as_bytes());
            let url = reqwest::Url::parse(&format!("http://node/v1/{segment}/events")).unwrap();
            prop_assert_eq!(url.path_segments().unwrap().count(), 3);
        }
    }
}
