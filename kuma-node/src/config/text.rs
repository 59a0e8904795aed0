//! Values as people write them: sizes, durations, numbers within bounds.
//!
//! Each function fails with what is allowed, as the rest of a sentence that begins with "allowed is".

use std::{ops::RangeInclusive, time::Duration};

const UNITS: [(&str, u64); 7] = [
    ("B", 1),
    ("KB", 1000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
];

/// Bytes: a number, and behind it a unit if it is not bytes.
pub(super) fn bytes(text: &str, allowed: RangeInclusive<u64>) -> Result<u64, String> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let unit = unit.trim_start();
    let factor = match UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit)) {
        Some((_, factor)) => Some(*factor),
        None => unit.is_empty().then_some(1),
    };
    let bytes = number.parse::<u64>().ok().zip(factor).and_then(|(number, factor)| number.checked_mul(factor));
    bytes.filter(|bytes| allowed.contains(bytes)).ok_or_else(|| {
        format!(
            "a size from {} to {}, such as 512KiB, 16MiB, 1GiB or a number of bytes",
            size(*allowed.start()),
            size(*allowed.end())
        )
    })
}

/// The same as it is written: the largest unit that divides it.
pub(super) fn size(bytes: u64) -> String {
    let whole = [("GiB", 30), ("MiB", 20), ("KiB", 10)]
        .into_iter()
        .find(|(_, shift)| bytes != 0 && bytes.trailing_zeros() >= *shift);
    match whole {
        Some((unit, shift)) => format!("{}{unit}", bytes >> shift),
        None => bytes.to_string(),
    }
}

/// A duration with its unit.
pub(super) fn duration(text: &str, allowed: RangeInclusive<Duration>) -> Result<Duration, String> {
    humantime::parse_duration(text).ok().filter(|duration| allowed.contains(duration)).ok_or_else(|| {
        let (least, most) = (humantime::format_duration(*allowed.start()), humantime::format_duration(*allowed.end()));
        format!("a duration with its unit from {least} to {most}, such as 500ms, 10s, 5m or 1h")
    })
}

/// A whole number.
pub(super) fn number(text: &str, allowed: RangeInclusive<u64>) -> Result<u64, String> {
    let number = text.parse().ok().filter(|number| allowed.contains(number));
    number.ok_or_else(|| format!("a number from {} to {}", allowed.start(), allowed.end()))
}

/// One of a few words.
pub(super) fn word<T: Copy>(text: &str, words: &[(&str, T)]) -> Result<T, String> {
    match words.iter().find(|(word, _)| *word == text) {
        Some((_, value)) => Ok(*value),
        None => Err(words.iter().map(|(word, _)| format!("\"{word}\"")).collect::<Vec<_>>().join(" or ")),
    }
}

/// `true` or `false`.
pub(super) fn switch(text: &str) -> Result<bool, String> {
    word(text, &[("true", true), ("false", false)])
}

/// The one of `names` that was probably meant.
pub(super) fn closest<'a>(name: &str, names: impl IntoIterator<Item = &'a str> + Clone) -> Option<&'a str> {
    let (distance, near) = names.clone().into_iter().map(|other| (distance(name, other), other)).min()?;
    // A third of it may differ; more is another word, unless it is the beginning of one.
    if distance * 3 <= name.len().max(3) {
        return Some(near);
    }
    names.into_iter().find(|other| name.len() >= 3 && other.starts_with(name))
}

/// How many letters must be put in, taken out or changed (Levenshtein).
fn distance(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().collect();
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (i, a) in from.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, b) in to.iter().enumerate() {
            let changed = diagonal + usize::from(a != *b);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[to.len()]
}

/// `text` as it may be printed. There are no secrets among the settings, but somebody may put one where its file should be named.
pub(super) fn printable(text: &str) -> String {
    let is_hex = text.len() >= 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let has = |wanted: fn(&u8) -> bool| text.as_bytes().iter().any(wanted);
    let is_base64 = text.len() >= 40
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+/=_-".contains(&byte))
        && has(u8::is_ascii_digit)
        && has(u8::is_ascii_uppercase)
        && has(u8::is_ascii_lowercase)
        && text.matches('/').count() <= text.len() / 16;
    if is_hex || is_base64 || crate::tokens::looks_like_token(text) {
        "(withheld: it looks like a secret)".to_owned()
    } else {
        text.chars().flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] }).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        let read = |text| bytes(text, 0..=u64::MAX);
        assert_eq!(read("1GiB"), Ok(1 << 30));
        assert_eq!(read("1 gib"), Ok(1 << 30));
        assert_eq!(read("64KiB"), Ok(64 << 10));
        assert_eq!(read("3MB"), Ok(3_000_000));
        assert_eq!(read("2KB"), Ok(2000));
        assert_eq!(read("17B"), Ok(17));
        assert_eq!(read("17"), Ok(17));
        for bad in ["", "GiB", "-1", "1.5GiB", "1TiBB", "1 Gi B", "99999999999999999999", "99999999999GiB", "0x10"] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_duration_needs_its_unit() {
        let read = |text| duration(text, Duration::from_secs(1)..=Duration::from_secs(300));
        assert_eq!(read("5m"), Ok(Duration::from_secs(300)));
        assert_eq!(read("1500ms"), Ok(Duration::from_millis(1500)));
        for bad in ["", "10", "0s", "301s", "-1s", "s"] {
            assert!(read(bad).unwrap_err().contains("from 1s to 5m"), "{bad}");
        }
    }

    #[test]
    fn what_was_meant_is_found_unless_it_is_far_off() {
        let names = ["listen", "header_timeout", "headers_max"];
        assert_eq!(closest("lissten", names), Some("listen"));
        assert_eq!(closest("header_timout", names), Some("header_timeout"));
        assert_eq!(closest("colour", names), None);
        assert_eq!(closest("header", names), Some("header_timeout"));
        assert_eq!(closest("x", names), None);
    }

    #[test]
    fn what_looks_like_a_secret_is_not_printed() {
        for path in [
            "./data",
            "/var/lib/kuma/data/projections-2024/tokens.json",
            "127.0.0.1:4870",
            "/etc/Kuma2/production/tls/Certificate",
        ] {
            assert_eq!(printable(path), path);
        }
        let token = format!("kuma_abcd1234_{}", "x".repeat(43));
        for secret in [&"0f".repeat(32), "q83vEjRWeJCrze8SNFZ4kKvN7xI0VniQq83vEjRWeJA=", &token] {
            assert!(!printable(secret).contains(&secret[8..16]), "{secret}");
        }
        assert_eq!(printable("a\nb"), "a\\nb");
    }

    proptest! {
        #[test]
        fn a_size_is_read_back_as_it_was_written(n in any::<u64>()) {
            prop_assert_eq!(bytes(&size(n), 0..=u64::MAX), Ok(n));
        }

        #[test]
        fn no_text_makes_a_parser_panic(text in ".{0,40}") {
            let _ = (bytes(&text, 0..=10), duration(&text, Duration::ZERO..=Duration::MAX), closest(&text, ["data"]), printable(&text));
        }
    }
}
