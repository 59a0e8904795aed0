//! Objects in JSON whose fields have names.
//!
//! What is derived for a struct also takes a list, the fields in their order: `["Deposited", {}]` for an event. Nobody who wrote that meant it, the
//! document does not allow it, and a field that comes to be between two others would change what it means.

use std::{fmt, marker::PhantomData};

use serde::{
    Deserialize, Deserializer,
    de::{self, value::MapAccessDeserializer},
};

/// An object, and no list.
pub(crate) struct Named<T>(pub(crate) T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Named<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Fields(PhantomData))
    }
}

struct Fields<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> de::Visitor<'de> for Fields<T> {
    type Value = Named<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: de::MapAccess<'de>>(self, fields: A) -> Result<Named<T>, A::Error> {
        T::deserialize(MapAccessDeserializer::new(fields)).map(Named)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::append_body::{Append, Encoding};

    #[derive(Deserialize)]
    struct Pair {
        first: u8,
        second: u8,
    }

    #[test]
    fn a_list_is_no_object() {
        let Named(pair): Named<Pair> = serde_json::from_str(r#"{"second": 2, "first": 1}"#).unwrap();
        assert_eq!((pair.first, pair.second), (1, 2));
        assert!(serde_json::from_str::<Pair>("[1, 2]").is_ok(), "it is not needed any more");
        let error = serde_json::from_str::<Named<Pair>>("[1, 2]").err().unwrap();
        assert!(error.to_string().contains("expected an object"), "{error}");
    }

    /// A list of the right length was an event, and was appended.
    #[test]
    fn a_list_is_neither_an_append_nor_an_event_nor_its_metadata() {
        let parse = |body: &str| Append::parse(Encoding::Json, body.as_bytes()).map(|append| append.events.len());
        assert_eq!(parse(r#"{"events": [{"type": "Deposited"}], "metadata": {}}"#).unwrap(), 1);
        for refused in [
            r#"[null, null, null, [["Deposited", {}, 1]], null, null, null, null, null]"#,
            r#"{"events": [["Deposited", {}, 1]]}"#,
            r#"{"events": [{"type": "Deposited"}], "metadata": [null, null, []]}"#,
        ] {
            assert_eq!(parse(refused).unwrap_err().code(), "invalid_body", "{refused}");
        }
    }
}
