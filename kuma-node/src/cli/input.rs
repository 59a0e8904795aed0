//! Values of the command line: as they stand, from a file, or from standard input.

use std::{io::Read, path::Path};

use anyhow::Context;
use serde_json::value::RawValue;

use super::UsageError;

/// The text of a value: itself, of a file (`@FILE`), or of standard input (`-`).
pub(super) fn text(value: &str) -> anyhow::Result<String> {
    match value.strip_prefix('@') {
        _ if value == "-" => from_stdin(),
        Some(path) => std::fs::read_to_string(path).with_context(|| format!("cannot read {path}")),
        None => Ok(value.to_owned()),
    }
}

/// The text of a file, or of standard input (`-`).
pub(super) fn file(path: &Path) -> anyhow::Result<String> {
    if path == Path::new("-") {
        return from_stdin();
    }
    std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

fn from_stdin() -> anyhow::Result<String> {
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text).context("cannot read standard input")?;
    Ok(text)
}

/// JSON as it stands: numbers keep all their digits.
pub(super) fn json(text: &str) -> anyhow::Result<Box<RawValue>> {
    let refuse = |error| UsageError(format!("this is no JSON ({error}); text has to be quoted: '\"text\"'"));
    Ok(serde_json::from_str::<Box<RawValue>>(text.trim()).map_err(refuse)?)
}

/// A time as RFC 3339.
pub(super) fn time(text: &str) -> Result<String, String> {
    let time: jiff::Timestamp = text.parse().map_err(|_| "a time looks like 2026-01-31T12:00:00Z".to_owned())?;
    Ok(time.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_keep_their_digits() {
        assert_eq!(json(" 123456789012345678901234567890 \n").unwrap().get(), "123456789012345678901234567890");
        for text in ["", "hello", "{", "1 2"] {
            assert!(json(text).unwrap_err().is::<UsageError>(), "{text}");
        }
    }

    #[test]
    fn times_are_brought_to_utc() {
        assert_eq!(time("2026-01-31T12:00:00+02:00").unwrap(), "2026-01-31T10:00:00Z");
        assert!(time("yesterday").is_err());
    }
}
