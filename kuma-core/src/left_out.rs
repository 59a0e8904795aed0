//! What serde says of data that does not fit, without the data: such words go into errors and logs, where no payload belongs.

/// Values as serde names them before it quotes them.
const QUOTED: [&str; 5] = ["string \"", "character `", "integer `", "floating point `", "boolean `"];
const BEFORE_VALUES: [&str; 2] = ["invalid type: ", "invalid value: "];
const BEFORE_VARIANTS: &str = "unknown variant `";

/// The words of an error about an event of this name. The name of the event itself stays: it is the code's.
pub(crate) fn without_values(error: &impl std::fmt::Display, event: &str) -> String {
    let words = error.to_string();
    // Behind the last one: the value may have these words in it, what the code expects has not.
    let Some((said, expected)) = words.rsplit_once(", expected ") else { return words };
    for before in BEFORE_VALUES {
        let Some(value) = said.strip_prefix(before) else { continue };
        if let Some(quoted) = QUOTED.into_iter().find(|quoted| value.starts_with(quoted)) {
            let what = quoted.trim_end_matches(['"', '`', ' ']);
            return format!("{before}{what} (left out), expected {expected}");
        }
    }
    match said.strip_prefix(BEFORE_VARIANTS) {
        Some(variant) if variant.trim_end_matches('`') != event => {
            format!("unknown variant (left out), expected {expected}")
        }
        _ => words,
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[allow(dead_code)]
    enum Event {
        Moved { floor: u8, mood: Mood, name: String, at: char },
    }

    #[derive(Debug, Deserialize)]
    enum Mood {
        Good,
    }

    fn words(json: serde_json::Value) -> String {
        without_values(&serde_json::from_value::<Event>(json).unwrap_err(), "Moved")
    }

    #[test]
    fn no_value_is_in_the_words_and_what_was_expected_is() {
        let secret = "Ann, expected u8";
        for (json, expected) in [
            (serde_json::json!({"Moved": secret}), "invalid type: string (left out), expected struct variant"),
            (serde_json::json!({"Moved": {"floor": secret}}), "invalid type: string (left out), expected u8"),
            (serde_json::json!({"Moved": {"floor": 4711}}), "invalid value: integer (left out), expected u8"),
            (serde_json::json!({"Moved": {"floor": 47.11}}), "invalid type: floating point (left out), expected u8"),
            (serde_json::json!({"Moved": {"name": true}}), "invalid type: boolean (left out), expected a string"),
            (serde_json::json!({"Moved": {"mood": "Ann"}}), "unknown variant (left out), expected `Good`"),
            (serde_json::json!({"Moved": {"floor": 1}}), "missing field `mood`"),
        ] {
            assert_eq!(words(json), expected);
        }
        let unknown =
            rmp_serde::from_slice::<Event>(&rmp_serde::to_vec_named(&serde_json::json!({"Left": 1})).unwrap());
        assert_eq!(without_values(&unknown.unwrap_err(), "Left"), "unknown variant `Left`, expected `Moved`");
    }
}
