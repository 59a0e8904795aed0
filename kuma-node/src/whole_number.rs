//! Whole numbers in JSON: `7`, and `7.0` as well, which is the same number to JSON Schema and to many who write JSON.

use std::{fmt, marker::PhantomData};

use serde::{Deserializer, de};
use serde_json::Value;

/// Reads a whole number.
///
/// # Errors
/// It is none, or not one that `T` holds.
pub(crate) fn required<'de, T: TryFrom<u64>, D: Deserializer<'de>>(deserializer: D) -> Result<T, D::Error> {
    deserializer.deserialize_any(Whole(PhantomData))
}

/// Reads a whole number, or `null`.
///
/// # Errors
/// As [`required`].
pub(crate) fn optional<'de, T: TryFrom<u64>, D: Deserializer<'de>>(deserializer: D) -> Result<Option<T>, D::Error> {
    deserializer.deserialize_option(OrNull(PhantomData))
}

/// Writes all whole numbers of a value as such.
pub(crate) fn in_place(value: &mut Value) {
    match value {
        Value::Number(number) => {
            if let Ok(whole) = required::<u64, _>(&*number) {
                *number = whole.into();
            }
        }
        Value::Array(values) => values.iter_mut().for_each(in_place),
        Value::Object(fields) => fields.values_mut().for_each(in_place),
        _ => {}
    }
}

struct Whole<T>(PhantomData<T>);

impl<T: TryFrom<u64>> de::Visitor<'_> for Whole<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(std::any::type_name::<T>())
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<T, E> {
        T::try_from(number).map_err(|_| E::invalid_value(de::Unexpected::Unsigned(number), &self))
    }

    fn visit_f64<E: de::Error>(self, number: f64) -> Result<T, E> {
        // Beyond it a number stands for its neighbours too.
        const EXACT_MAX: f64 = 9_007_199_254_740_991.0;
        match number.fract() == 0.0 && (0.0..=EXACT_MAX).contains(&number) {
            true => self.visit_u64(number as u64),
            false => Err(E::invalid_value(de::Unexpected::Float(number), &self)),
        }
    }
}

struct OrNull<T>(PhantomData<T>);

impl<'de, T: TryFrom<u64>> de::Visitor<'de> for OrNull<T> {
    type Value = Option<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(std::any::type_name::<T>())
    }

    fn visit_none<E: de::Error>(self) -> Result<Option<T>, E> {
        Ok(None)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Option<T>, D::Error> {
        required(deserializer).map(Some)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use serde::Deserialize;

    #[derive(Debug, PartialEq, Deserialize)]
    struct Numbers {
        #[serde(deserialize_with = "super::required")]
        version: u64,
        #[serde(default, deserialize_with = "super::optional")]
        schema: Option<u32>,
    }

    /// The document calls it an integer, which `7.0` is; it was refused.
    #[test]
    fn a_whole_number_is_one_however_it_is_written() {
        let read = |text: &str| serde_json::from_str::<Numbers>(text);
        assert_eq!(read(r#"{"version": 7.0}"#).unwrap(), Numbers { version: 7, schema: None });
        assert_eq!(read(r#"{"version": 18446744073709551615, "schema": 1e1}"#).unwrap().schema, Some(10));
        assert_eq!(read(r#"{"version": 0, "schema": null}"#).unwrap().schema, None);
        for refused in ["7.5", "-1", "-1.0", "1e300", "9007199254740993.0", "18446744073709551616", "\"7\"", "null"] {
            assert!(read(&format!("{{\"version\": {refused}}}")).is_err(), "{refused}");
        }
        let error = read(r#"{"version": 1, "schema": 4294967296}"#).unwrap_err();
        assert!(error.to_string().contains("expected u32"), "{error}");
    }
}
