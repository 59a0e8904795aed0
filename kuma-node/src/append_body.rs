//! Appends as they come over the wire, in JSON or MessagePack, on their way to [`NewEvent`]s.
//!
//! Invariants:
//! - Data reaches the store as it was sent: no number is rounded, no name that comes twice is decided on.
//! - What is wrong is named by its place, never quoted.

use std::borrow::Cow;

use kuma_core::{Metadata, NewEvent, Version};
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::{
    msgpack::{Malformed, Reader},
    named::Named,
    problem::Problem,
    whole_number,
    wire::MetadataBody,
};

/// In which of the two a body is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Encoding {
    Json,
    MessagePack,
}

/// An append that was read.
#[derive(Debug, Default)]
pub(crate) struct Append<'a> {
    /// Only in a stream.
    pub(crate) kind: Option<Cow<'a, str>>,
    pub(crate) id: Option<Cow<'a, str>>,
    pub(crate) key: Option<Cow<'a, str>>,
    pub(crate) events: Vec<NewEvent>,
    pub(crate) expected: Option<Version>,
    pub(crate) metadata: Option<Metadata>,
}

/// A text that is borrowed where it has no escapes.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct JsonEvent<'a> {
    #[serde(rename = "type", borrow)]
    name: Text<'a>,
    #[serde(borrow, default, deserialize_with = "present")]
    data: Option<&'a RawValue>,
    #[serde(default, deserialize_with = "whole_number::optional")]
    schema: Option<u32>,
}

/// `null` is a value, which is not to be taken for none.
fn present<'a, D: serde::Deserializer<'a>>(from: D) -> Result<Option<&'a RawValue>, D::Error> {
    <&RawValue>::deserialize(from).map(Some)
}

/// Events, or the fields of a single one.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct JsonAppend<'a> {
    #[serde(borrow)]
    kind: Option<Text<'a>>,
    #[serde(borrow)]
    id: Option<Text<'a>>,
    #[serde(borrow)]
    key: Option<Text<'a>>,
    #[serde(borrow)]
    events: Option<Vec<Named<JsonEvent<'a>>>>,
    #[serde(default, deserialize_with = "whole_number::optional")]
    expected_version: Option<u64>,
    metadata: Option<Named<MetadataBody>>,
    #[serde(rename = "type", borrow)]
    name: Option<Text<'a>>,
    #[serde(borrow, default, deserialize_with = "present")]
    data: Option<&'a RawValue>,
    #[serde(default, deserialize_with = "whole_number::optional")]
    schema: Option<u32>,
}

impl<'a> Append<'a> {
    /// Reads the body of an append to one entity: events, or a single one.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn parse(encoding: Encoding, body: &'a [u8]) -> Result<Self, Problem> {
        let append = Append::any(encoding, body)?;
        for (name, is_there) in [("kind", append.kind.is_some()), ("id", append.id.is_some())] {
            if is_there {
                return Err(invalid(format!("\"{name}\" stands in the path, and not in the body")));
            }
        }
        if append.key.is_some() {
            return Err(invalid("the key stands in the header Idempotency-Key, and not in the body"));
        }
        Ok(append)
    }

    /// Reads a message of a stream of appends.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn parse_streamed(encoding: Encoding, message: &'a [u8]) -> Result<Self, Problem> {
        let append = Append::any(encoding, message)?;
        let missing = [("kind", &append.kind), ("id", &append.id), ("key", &append.key)];
        match missing.iter().find(|(_, value)| value.is_none()) {
            Some((name, _)) => Err(invalid(format!("\"{name}\" is missing"))),
            None => Ok(append),
        }
    }

    fn any(encoding: Encoding, body: &'a [u8]) -> Result<Self, Problem> {
        match encoding {
            Encoding::Json => Append::json(body),
            Encoding::MessagePack => Append::message_pack(body),
        }
    }

    fn json(body: &'a [u8]) -> Result<Self, Problem> {
        let text = std::str::from_utf8(body).map_err(|error| {
            Problem::bad("invalid_body", format!("the body is not UTF-8 at byte {}", error.valid_up_to()))
        })?;
        let Named(append): Named<JsonAppend<'a>> = serde_json::from_str(text).map_err(|error| unread(&error))?;
        let is_single = append.name.is_some() || append.data.is_some() || append.schema.is_some();
        let events = match (append.events, append.name) {
            (Some(_), _) if is_single => return Err(both()),
            (Some(events), _) => events.into_iter().map(|Named(one)| event(one)).collect::<Result<_, _>>()?,
            (None, Some(name)) => {
                if append.expected_version.is_some() || append.metadata.is_some() {
                    return Err(beside_single());
                }
                vec![event(JsonEvent { name, data: append.data, schema: append.schema })?]
            }
            (None, None) => return Err(invalid("\"events\" is missing")),
        };
        let text = |text: Option<Text<'a>>| text.map(|Text(text)| text);
        Ok(Append {
            kind: text(append.kind),
            id: text(append.id),
            key: text(append.key),
            events,
            expected: append.expected_version.map(Version),
            metadata: append.metadata.map(|Named(body)| metadata(body)),
        })
    }

    fn message_pack(body: &'a [u8]) -> Result<Self, Problem> {
        let mut reader = Reader::new(body);
        let mut append = Append::default();
        let mut single = Single::default();
        let mut has_events = false;
        let mut seen = Seen::default();
        for _ in 0..reader.map()? {
            let field = reader.text()?;
            seen.once(field)?;
            match field {
                "kind" => append.kind = Some(reader.text()?.into()),
                "id" => append.id = Some(reader.text()?.into()),
                "key" => append.key = Some(reader.text()?.into()),
                "expected_version" => {
                    append.expected = if reader.nil() { None } else { Some(Version(reader.unsigned()?)) };
                }
                "metadata" => append.metadata = if reader.nil() { None } else { Some(packed_metadata(&mut reader)?) },
                "events" => {
                    has_events = true;
                    let events = reader.array()?;
                    // Its length is not believed.
                    append.events.reserve(events.min(4096));
                    for _ in 0..events {
                        append.events.push(packed_event(&mut reader)?);
                    }
                }
                _ => single.field(field, &mut reader)?,
            }
        }
        if !reader.is_empty() {
            return Err(invalid("something follows behind the MessagePack"));
        }
        match (has_events, single.is_there()) {
            (true, true) => Err(both()),
            (true, false) => Ok(append),
            (false, true) => {
                if append.expected.is_some() || append.metadata.is_some() {
                    return Err(beside_single());
                }
                append.events.push(single.finish()?);
                Ok(append)
            }
            (false, false) => Err(invalid("\"events\" is missing")),
        }
    }
}

/// The fields of an event, one after the other.
#[derive(Default)]
struct Single<'a> {
    name: Option<&'a str>,
    data: Option<&'a [u8]>,
    schema: Option<u32>,
}

impl<'a> Single<'a> {
    fn field(&mut self, field: &str, reader: &mut Reader<'a>) -> Result<(), Problem> {
        match field {
            "type" => self.name = Some(reader.text()?),
            "data" => self.data = Some(reader.data()?),
            "schema" if reader.nil() => {}
            "schema" => {
                self.schema =
                    Some(reader.unsigned()?.try_into().map_err(|_| invalid("\"schema\" has more than 32 bits"))?)
            }
            _ => return Err(invalid("a field is not known; see docs/http.md")),
        }
        Ok(())
    }

    fn is_there(&self) -> bool {
        self.name.is_some() || self.data.is_some() || self.schema.is_some()
    }

    fn finish(self) -> Result<NewEvent, Problem> {
        const EMPTY_MAP: &[u8] = &[0x80];
        let name = self.name.ok_or_else(|| invalid("an event has no \"type\""))?;
        let event = NewEvent::message_pack(name, self.data.unwrap_or(EMPTY_MAP).to_vec());
        Ok(event.schema(self.schema.unwrap_or(1)))
    }
}

/// Names of fields that have come; there are few.
#[derive(Default)]
struct Seen<'a>(Vec<&'a str>);

impl<'a> Seen<'a> {
    fn once(&mut self, field: &'a str) -> Result<(), Problem> {
        if self.0.contains(&field) || self.0.len() > 16 {
            return Err(invalid("a field is there twice, or is not known"));
        }
        self.0.push(field);
        Ok(())
    }
}

fn packed_event(reader: &mut Reader<'_>) -> Result<NewEvent, Problem> {
    let (mut event, mut seen) = (Single::default(), Seen::default());
    for _ in 0..reader.map()? {
        let field = reader.text()?;
        seen.once(field)?;
        event.field(field, reader)?;
    }
    event.finish()
}

fn packed_metadata(reader: &mut Reader<'_>) -> Result<Metadata, Problem> {
    let (mut metadata, mut seen) = (Metadata::default(), Seen::default());
    for _ in 0..reader.map()? {
        let field = reader.text()?;
        seen.once(field)?;
        match field {
            "correlation" => metadata.correlation = if reader.nil() { None } else { Some(reader.text()?.to_owned()) },
            "causation" => metadata.causation = if reader.nil() { None } else { Some(reader.text()?.to_owned()) },
            "headers" => {
                for _ in 0..reader.array()? {
                    if reader.array()? != 2 {
                        return Err(invalid("a header of the metadata is a pair of name and value"));
                    }
                    metadata.headers.push((reader.text()?.to_owned(), reader.text()?.to_owned()));
                }
            }
            _ => return Err(invalid("a field of the metadata is not known")),
        }
    }
    Ok(metadata)
}

fn event(event: JsonEvent<'_>) -> Result<NewEvent, Problem> {
    let Text(name) = event.name;
    // An event without data changes nothing. `null` would replace the whole state.
    let new = NewEvent::json_text(name, event.data.map_or("{}", RawValue::get))?;
    Ok(new.schema(event.schema.unwrap_or(1)))
}

/// As the store has it.
pub(crate) fn metadata(body: MetadataBody) -> Metadata {
    let MetadataBody { correlation, causation, headers } = body;
    Metadata { correlation, causation, headers }
}

fn both() -> Problem {
    invalid("it has \"events\", and fields of a single event beside them")
}

fn beside_single() -> Problem {
    invalid(
        "a single event stands alone: put it into \"events\" to give an expected version or metadata, or use If-Match",
    )
}

pub(crate) fn invalid(detail: impl Into<String>) -> Problem {
    Problem::bad("invalid_body", detail)
}

impl From<Malformed> for Problem {
    fn from(malformed: Malformed) -> Self {
        match malformed {
            Malformed::Unfit(unfit) => unfit.into(),
            Malformed::NotJson(_) => {
                Problem::new(axum::http::StatusCode::UNPROCESSABLE_ENTITY, "invalid_data", malformed.to_string())
            }
            other => invalid(other.to_string()),
        }
    }
}

/// Why JSON was not read: where, and what was expected, without what stands there.
pub(crate) fn unread(error: &serde_json::Error) -> Problem {
    let (line, column) = (error.line(), error.column());
    let place = format!("line {line}, column {column}");
    match error.classify() {
        serde_json::error::Category::Eof => invalid(format!("the JSON ends too early ({place})")),
        serde_json::error::Category::Syntax => invalid(format!("it is not JSON ({place})")),
        _ => invalid(format!("{} ({place})", without_values(&error.to_string()))),
    }
}

/// A message of serde without the values that it quotes.
pub(crate) fn without_values(message: &str) -> String {
    let message = message.split(" at line ").next().unwrap_or_default();
    if message.starts_with("missing field") || message.starts_with("duplicate field") {
        return message.to_owned();
    }
    let expected = message.rsplit_once(", expected ").map(|(_, expected)| format!("; expected {expected}"));
    let what =
        if message.starts_with("unknown field") { "a field is not known" } else { "a value is not of the right type" };
    format!("{what}{}", expected.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use serde_json::{Value, json};

    use super::*;

    fn parse(body: &str) -> Result<Append<'_>, String> {
        Append::parse(Encoding::Json, body.as_bytes()).map_err(|problem| problem.detail().to_owned())
    }

    fn packed(value: &Value) -> Vec<u8> {
        rmp_serde::to_vec_named(value).unwrap()
    }

    #[test]
    fn json_and_message_pack_say_the_same() {
        for body in [
            json!({"events": [{"type": "A", "data": {"n": 9_007_199_254_740_993_u64, "f": 0.1}}, {"type": "B"}]}),
            json!({"events": [{"type": "A", "schema": 2}], "expected_version": 4, "metadata": {"correlation": "c", "headers": [["a", "b"]]}}),
            json!({"type": "A", "data": [1, null]}),
        ] {
            let (text, bytes) = (body.to_string(), packed(&body));
            let of_json = Append::parse(Encoding::Json, text.as_bytes()).unwrap();
            let of_pack = Append::parse(Encoding::MessagePack, &bytes).unwrap();
            assert_eq!(of_json.events, of_pack.events);
            assert_eq!((of_json.expected, of_json.metadata), (of_pack.expected, of_pack.metadata));
        }
    }

    #[test]
    fn an_event_without_data_has_an_empty_object_and_null_stays_null() {
        for (body, data) in [
            (json!({"type": "A"}), json!({})),
            (json!({"type": "A", "data": null}), Value::Null),
            (json!({"events": [{"type": "A"}]}), json!({})),
            (json!({"events": [{"type": "A", "data": null}]}), Value::Null),
        ] {
            let (text, bytes) = (body.to_string(), packed(&body));
            let expected = vec![NewEvent::json("A", &data).unwrap()];
            assert_eq!(Append::parse(Encoding::Json, text.as_bytes()).unwrap().events, expected, "{text}");
            assert_eq!(Append::parse(Encoding::MessagePack, &bytes).unwrap().events, expected, "{text}");
        }
    }

    #[test]
    fn what_is_wrong_is_named_and_not_quoted() {
        for (body, part) in [
            ("{", "ends too early"),
            ("[]", "not of the right type"),
            ("{\"events\": [{\"data\": \"secret\"}]}", "missing field `type`"),
            ("{\"events\": [{\"type\": \"A\", \"secret\": 1}]}", "a field is not known; expected"),
            ("{\"events\": [{\"type\": \"A\", \"schema\": \"secret\"}]}", "expected u32"),
            ("{\"events\": [{\"type\": \"A\", \"type\": \"B\"}]}", "duplicate field `type`"),
            ("{\"events\": [{\"type\": \"A\", \"data\": {\"secret\": 1, \"secret\": 2}}]}", "the same name twice"),
            ("{\"events\": [{\"type\": \"A\", \"data\": 18446744073709551616}]}", "64 bits"),
            ("{\"events\": [{\"type\": \"A\", \"data\": NaN}]}", "not JSON"),
            ("{\"events\": [], \"type\": \"A\"}", "single event"),
            ("{\"type\": \"A\", \"expected_version\": 1}", "stands alone"),
            ("{\"kind\": \"a\", \"type\": \"A\"}", "path"),
            ("{}", "\"events\" is missing"),
        ] {
            let detail = parse(body).unwrap_err();
            assert!(detail.contains(part), "{body}: {detail}");
            assert!(!detail.contains("secret"), "{detail}");
        }
    }

    #[test]
    fn deep_json_is_refused_and_the_stack_survives() {
        let deep = format!("{{\"type\": \"A\", \"data\": {}{}}}", "[".repeat(1_000_000), "]".repeat(1_000_000));
        assert!(parse(&deep).unwrap_err().contains("127 deep"));
    }

    #[test]
    fn a_message_of_a_stream_has_a_key() {
        let message = json!({"kind": "a", "id": "1", "events": [{"type": "A"}]});
        for (encoding, bytes) in
            [(Encoding::Json, message.to_string().into_bytes()), (Encoding::MessagePack, packed(&message))]
        {
            let problem = Append::parse_streamed(encoding, &bytes).unwrap_err();
            assert!(problem.detail().contains("\"key\" is missing"), "{}", problem.detail());
        }
    }
}
