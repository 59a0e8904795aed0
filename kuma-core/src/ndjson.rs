//! The line format of exports and imports: one JSON object a line, one line an event.
//!
//! ```json
//! {"kind":"aircraft","id":"N14228","version":6,"commit":{"first":5,"count":3},"type":"Flown","schema":1,
//!  "at":"2013-01-01T06:00:00.000000Z","metadata":{"correlation":"c","causation":"a","headers":[["k","v"]]},
//!  "key":"k","data":{"flight":"UA1545","distance":1400},"bytes":"gqZmbGlnaHQ="}
//! {"manifest":{"format":1,"entities":1,"commits":3,"events":7,"sha256":"..."}}
//! ```
//! (An event is one line; it is broken here to be read.)
//!
//! | field | an export writes | an import |
//! |---|---|---|
//! | `kind`, `id` | always | needs them |
//! | `version` | always | appends only if the entity is at the version before |
//! | `commit` | always: the commit's first version, and how many events it has | appends these lines as one commit |
//! | `type` | always: the event's name, 1 to 128 bytes | needs it |
//! | `schema` | always: the version of the data's shape | takes it; 1 if it is not there |
//! | `at` | always: the time of the commit, RFC 3339, UTC, microseconds | keeps the text as the metadata header `at`, unless there is one |
//! | `metadata` | if there is some | takes it |
//! | `key` | never: only a keyed hash of it is stored | takes it as the commit's idempotency key |
//! | `data` | if it has a JSON form | needs it, or `bytes` |
//! | `bytes` | base64 of the MessagePack, where `data` alone would not give the same bytes again | takes it instead of `data` |
//!
//! A field that is not in this list is refused: it is mostly one that was misspelt. `null` stands for an optional field that is not
//! there. The order of the fields does not matter, but in `data` it is kept.
//!
//! The manifest is the last line of an export. Its digest is of all bytes before its own line, so that
//! `head -n -1 FILE | sha256sum` prints it.
//!
//! Invariants:
//! - What is exported and imported again is the same MessagePack, to the byte: integers up to 64 bits, the bits of floats, the order
//!   of fields. JSON that MessagePack cannot hold (an integer above 64 bits) is refused and not rounded.
//! - Data never passes through a `serde_json::Value`, which would sort its fields and know nothing of binary.
//! - No message says what stands in a line, only where: lines hold personal data, and messages go to logs.

pub(crate) mod transcode;

use std::{borrow::Cow, fmt};

use base64::{Engine, prelude::BASE64_STANDARD};
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{Error as _, MapAccess, Visitor},
};
use serde_json::value::RawValue;

pub use self::transcode::Unfit;
use self::transcode::{pack, unpack};
use crate::{Metadata, body::EVENT_NAME_BYTES_MAX};

/// The longest line that an import reads. An event of 1 MiB takes at most 6 MiB as JSON: what is longest for its bytes is
/// control characters, six for one.
pub(crate) const LINE_BYTES_MAX: usize = 8 << 20;
/// The version of the format that a manifest names.
pub(crate) const FORMAT: u32 = 1;
/// Beside `bytes`, `data` is only there to be looked at; beyond this nobody does.
const SHOWN_BYTES_MAX: usize = 64 << 10;

/// The last line of an export: what the lines before it hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The version of the line format; 1.
    pub format: u32,
    /// Entities with events.
    pub entities: u64,
    /// Commits.
    pub commits: u64,
    /// Events; one line each.
    pub events: u64,
    /// SHA-256 of all bytes before the manifest's line, in hexadecimal digits.
    pub sha256: String,
}

/// What is wrong with a line, without saying what stands in it. Columns count bytes, from 1.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LineProblem {
    /// It is longer than an import reads.
    #[error("it is longer than {bytes_max} bytes")]
    TooLong {
        /// The limit.
        bytes_max: usize,
    },
    /// Its bytes are not text.
    #[error("it is not UTF-8 (column {column})")]
    NotUtf8 {
        /// Where.
        column: usize,
    },
    /// It is not one JSON object.
    #[error("it is not a JSON object (column {column})")]
    NotJson {
        /// Where that is noticed.
        column: usize,
    },
    /// It ends within its JSON object, as the last line of a file does that was cut.
    #[error("it ends in the middle of its JSON object")]
    Cut,
    /// A field that has to be there is not.
    #[error("it has no field \"{field}\"")]
    Missing {
        /// The field.
        field: &'static str,
    },
    /// A field stands twice.
    #[error("it has the field \"{field}\" twice")]
    Duplicate {
        /// The field.
        field: &'static str,
    },
    /// A field that the format does not know.
    #[error("it has a field that the format does not know, with its value at column {column}")]
    Unknown {
        /// Where the field's value begins.
        column: usize,
    },
    /// A field's value is not what it has to be.
    #[error("its field \"{field}\" is not {expected}")]
    Invalid {
        /// The field.
        field: &'static str,
        /// What it has to be.
        expected: &'static str,
    },
    /// `data` is nested deeper than is read.
    #[error("its data is nested more than {depth_max} deep")]
    TooDeep {
        /// The limit.
        depth_max: usize,
    },
    /// `data` has a number that would not survive: an integer above 64 bits, or one that no float holds.
    #[error(
        "its data has a number that does not fit: integers have at most 64 bits; write a larger one as text, or with an exponent if it may be rounded"
    )]
    Number,
    /// `data` has text with an escape that is not a character.
    #[error("its data has text that is not Unicode")]
    Text,
    /// An object in `data` has the same name twice.
    #[error("an object in its data has the same name twice")]
    DuplicateName,
    /// A manifest of a format that this version of Kuma does not know.
    #[error("it is the manifest of format {format}; this version of Kuma reads format 1")]
    Format {
        /// The format.
        format: u64,
    },
}

/// A line, read.
#[derive(Debug)]
// There is one at a time, and it is nearly always an event.
#[allow(clippy::large_enum_variant)]
pub(crate) enum Line<'a> {
    Event(EventLine<'a>),
    Manifest(Manifest),
    /// A part of an archive that is no event, and is not imported.
    Archive,
}

/// An event as its line has it.
#[derive(Debug)]
pub(crate) struct EventLine<'a> {
    pub(crate) kind: Cow<'a, str>,
    pub(crate) id: Cow<'a, str>,
    pub(crate) version: Option<u64>,
    pub(crate) commit: Option<CommitSpan>,
    pub(crate) name: Cow<'a, str>,
    pub(crate) schema: u32,
    pub(crate) at: Option<Cow<'a, str>>,
    pub(crate) metadata: Option<Metadata>,
    pub(crate) key: Option<Cow<'a, str>>,
    /// MessagePack. Of `bytes` it is not known yet whether it is.
    pub(crate) data: Vec<u8>,
}

/// Which commit an event belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct CommitSpan {
    /// The version of its first event.
    pub(crate) first: u64,
    /// How many events it has.
    pub(crate) count: u32,
}

/// An event as an export writes it, all but its data.
#[derive(Serialize)]
pub(crate) struct EventHead<'a> {
    pub(crate) kind: &'a str,
    pub(crate) id: &'a str,
    pub(crate) version: u64,
    pub(crate) commit: CommitSpan,
    #[serde(rename = "type")]
    pub(crate) name: &'a str,
    pub(crate) schema: u32,
    pub(crate) at: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) metadata: Option<MetadataLine<'a>>,
}

/// [`Metadata`] with names that are meant to be read; what is stored has short ones.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct MetadataLine<'a> {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    correlation: Option<Cow<'a, str>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    causation: Option<Cow<'a, str>>,
    #[serde(default, skip_serializing_if = "<[_]>::is_empty")]
    headers: Cow<'a, [(String, String)]>,
}

impl<'a> From<&'a Metadata> for MetadataLine<'a> {
    fn from(metadata: &'a Metadata) -> Self {
        MetadataLine {
            correlation: metadata.correlation.as_deref().map(Cow::Borrowed),
            causation: metadata.causation.as_deref().map(Cow::Borrowed),
            headers: Cow::Borrowed(&metadata.headers),
        }
    }
}

impl From<MetadataLine<'_>> for Metadata {
    fn from(line: MetadataLine<'_>) -> Self {
        Metadata {
            correlation: line.correlation.map(Cow::into_owned),
            causation: line.causation.map(Cow::into_owned),
            headers: line.headers.into_owned(),
        }
    }
}

/// A time as lines have it. What a line cannot say (years above 9999) becomes the latest that it can.
pub(crate) fn time_text(at: std::time::SystemTime) -> String {
    let at = jiff::Timestamp::from_microsecond(crate::micros(at)).unwrap_or(jiff::Timestamp::MAX);
    format!("{at:.6}")
}

/// Appends the line of an event, with its end, to `out`.
///
/// # Errors
/// None of the values that are written here can fail; the signature is serde's.
pub(crate) fn write_event(out: &mut Vec<u8>, head: &EventHead<'_>, data: &[u8]) -> serde_json::Result<()> {
    serde_json::to_writer(&mut *out, head)?;
    // The closing brace; it comes after the data.
    out.pop();
    let before = out.len();
    out.extend_from_slice(b",\"data\":");
    let begin = out.len();
    let has_json = unpack(data, out).is_ok();
    let is_exact = has_json && out.get(begin..).is_some_and(|text| gives(text, data));
    if !is_exact {
        if !has_json || out.len() - begin > SHOWN_BYTES_MAX {
            out.truncate(before);
        }
        out.extend_from_slice(b",\"bytes\":\"");
        out.extend_from_slice(BASE64_STANDARD.encode(data).as_bytes());
        out.push(b'"');
    }
    out.extend_from_slice(b"}\n");
    Ok(())
}

/// Appends the line of a manifest, with its end, to `out`.
///
/// # Errors
/// As [`write_event`].
pub(crate) fn write_manifest(out: &mut Vec<u8>, manifest: &Manifest) -> serde_json::Result<()> {
    out.extend_from_slice(b"{\"manifest\":");
    serde_json::to_writer(&mut *out, manifest)?;
    out.extend_from_slice(b"}\n");
    Ok(())
}

/// Appends the line of a part of an archive, with its end, to `out`.
///
/// # Errors
/// As [`write_event`].
pub(crate) fn write_archive(out: &mut Vec<u8>, part: &impl Serialize) -> serde_json::Result<()> {
    out.extend_from_slice(b"{\"archive\":");
    serde_json::to_writer(&mut *out, part)?;
    out.extend_from_slice(b"}\n");
    Ok(())
}

/// Whether JSON text, imported, gives this MessagePack again.
fn gives(json: &[u8], data: &[u8]) -> bool {
    let mut again = Vec::with_capacity(data.len());
    std::str::from_utf8(json).is_ok_and(|json| pack(json, &mut again).is_ok()) && again == data
}

/// Reads a line.
///
/// # Errors
/// What is wrong with it. The values of its fields are looked at only once its JSON is known to be whole.
pub(crate) fn parse(line: &[u8]) -> Result<Line<'_>, LineProblem> {
    let line = std::str::from_utf8(line).map_err(|error| match error.error_len() {
        Some(_) => LineProblem::NotUtf8 { column: error.valid_up_to() + 1 },
        // Half a character at the end.
        None => LineProblem::Cut,
    })?;
    let mut fields = Fields::default();
    let mut json = serde_json::Deserializer::from_str(line);
    let read = json.deserialize_map(&mut fields).and_then(|()| json.end());
    if let Some(problem) = fields.problem.take() {
        return Err(match problem {
            FieldProblem::Duplicate(field) => LineProblem::Duplicate { field: Field::NAMES[field] },
            FieldProblem::Unknown(value) => LineProblem::Unknown { column: column(line, value) },
        });
    }
    read.map_err(|error| match error.classify() {
        serde_json::error::Category::Eof => LineProblem::Cut,
        _ => LineProblem::NotJson { column: error.column().max(1) },
    })?;
    if let Some(manifest) = fields.get(Field::Manifest) {
        return manifest_of(&fields, manifest).map(Line::Manifest);
    }
    if fields.get(Field::Archive).is_some() {
        const EXPECTED: &str = "a part of an archive, alone in its line";
        let is_alone = fields.values.iter().flatten().count() == 1;
        return if is_alone { Ok(Line::Archive) } else { Err(fields.invalid(Field::Archive, EXPECTED)) };
    }
    let commit: Option<CommitSpan> = fields.optional(Field::Commit, "{\"first\": N, \"count\": N}, both at least 1")?;
    if commit.is_some_and(|commit| commit.first == 0 || commit.count == 0) {
        return Err(fields.invalid(Field::Commit, "{\"first\": N, \"count\": N}, both at least 1"));
    }
    let version = fields.optional(Field::Version, "a number from 1")?;
    if version == Some(0) {
        return Err(fields.invalid(Field::Version, "a number from 1"));
    }
    let Text(name) = fields.required(Field::Type, "a text of 1 to 128 bytes")?;
    if !(1..=EVENT_NAME_BYTES_MAX).contains(&name.len()) {
        return Err(fields.invalid(Field::Type, "a text of 1 to 128 bytes"));
    }
    let at = fields.optional(Field::At, "a time as RFC 3339 has it")?.map(|Text(at)| at);
    if at.as_ref().is_some_and(|at: &Cow<'_, str>| at.parse::<jiff::Timestamp>().is_err()) {
        return Err(fields.invalid(Field::At, "a time as RFC 3339 has it"));
    }
    let metadata: Option<MetadataLine<'_>> = fields
        .optional(Field::Metadata, "{\"correlation\": TEXT, \"causation\": TEXT, \"headers\": [[TEXT, TEXT], ...]}")?;
    let Text(kind) = fields.required(Field::Kind, "a text")?;
    let Text(id) = fields.required(Field::Id, "a text")?;
    Ok(Line::Event(EventLine {
        kind,
        id,
        version,
        commit,
        name,
        schema: fields.optional(Field::Schema, "a number below 2^32")?.unwrap_or(1),
        at,
        metadata: metadata.map(Metadata::from),
        key: fields.optional(Field::Key, "a text")?.map(|Text(key)| key),
        data: data_of(&fields)?,
    }))
}

fn data_of(fields: &Fields<'_>) -> Result<Vec<u8>, LineProblem> {
    if let Some(Text(bytes)) = fields.optional(Field::Bytes, "base64")? {
        return BASE64_STANDARD.decode(&*bytes).map_err(|_| fields.invalid(Field::Bytes, "base64"));
    }
    // `null` is a value here: the data of an event that has none.
    let json = fields.get(Field::Data).ok_or(LineProblem::Missing { field: Field::NAMES[Field::Data as usize] })?.get();
    let mut data = Vec::with_capacity(json.len());
    match pack(json, &mut data) {
        Ok(()) => Ok(data),
        Err(Unfit::TooDeep) => Err(LineProblem::TooDeep { depth_max: transcode::DEPTH_MAX }),
        Err(Unfit::Number) => Err(LineProblem::Number),
        Err(Unfit::Text) => Err(LineProblem::Text),
        Err(Unfit::DuplicateName) => Err(LineProblem::DuplicateName),
        // A line that was read is JSON.
        Err(Unfit::NotJson) => Err(LineProblem::NotJson { column: 1 }),
    }
}

fn manifest_of(fields: &Fields<'_>, manifest: &RawValue) -> Result<Manifest, LineProblem> {
    #[derive(Deserialize)]
    struct AnyFormat {
        format: u64,
    }
    const EXPECTED: &str = "the manifest of an export, alone in its line";
    let invalid = || fields.invalid(Field::Manifest, EXPECTED);
    if fields.values.iter().flatten().count() > 1 {
        return Err(invalid());
    }
    // Of a later format nothing is known but its number.
    let AnyFormat { format } = serde_json::from_str(manifest.get()).map_err(|_| invalid())?;
    if format != u64::from(FORMAT) {
        return Err(LineProblem::Format { format });
    }
    serde_json::from_str(manifest.get()).map_err(|_| invalid())
}

/// Where in the line a part of it begins.
fn column(line: &str, part: &RawValue) -> usize {
    (part.get().as_ptr() as usize).saturating_sub(line.as_ptr() as usize) + 1
}

/// A text that is borrowed where it has no escapes.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

/// The fields of a line.
#[derive(Clone, Copy)]
enum Field {
    Kind,
    Id,
    Version,
    Commit,
    Type,
    Schema,
    At,
    Metadata,
    Key,
    Data,
    Bytes,
    Manifest,
    Archive,
}

impl Field {
    /// In the order of the variants.
    const NAMES: [&'static str; 13] = [
        "kind", "id", "version", "commit", "type", "schema", "at", "metadata", "key", "data", "bytes", "manifest",
        "archive",
    ];
}

/// The fields of a line, each as it stands there. Reading them one by one is what allows to name the one that is wrong without
/// serde's messages, which quote.
#[derive(Default)]
struct Fields<'a> {
    values: [Option<&'a RawValue>; Field::NAMES.len()],
    problem: Option<FieldProblem<'a>>,
}

enum FieldProblem<'a> {
    Duplicate(usize),
    Unknown(&'a RawValue),
}

impl<'a> Fields<'a> {
    fn get(&self, field: Field) -> Option<&'a RawValue> {
        self.values[field as usize]
    }

    fn optional<T: Deserialize<'a>>(&self, field: Field, expected: &'static str) -> Result<Option<T>, LineProblem> {
        let Some(value) = self.get(field) else { return Ok(None) };
        serde_json::from_str(value.get()).map_err(|_| self.invalid(field, expected))
    }

    fn required<T: Deserialize<'a>>(&self, field: Field, expected: &'static str) -> Result<T, LineProblem> {
        self.optional(field, expected)?.ok_or(LineProblem::Missing { field: Field::NAMES[field as usize] })
    }

    fn invalid(&self, field: Field, expected: &'static str) -> LineProblem {
        LineProblem::Invalid { field: Field::NAMES[field as usize], expected }
    }
}

impl<'de> Visitor<'de> for &mut Fields<'de> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(name) = map.next_key::<Text<'de>>()? {
            let value: &'de RawValue = map.next_value()?;
            let problem = match Field::NAMES.iter().position(|field| *field == name.0) {
                Some(field) => self.values[field].replace(value).map(|_| FieldProblem::Duplicate(field)),
                None => Some(FieldProblem::Unknown(value)),
            };
            if problem.is_some() {
                self.problem = problem;
                // Never shown.
                return Err(A::Error::custom("a field"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head<'a>(metadata: Option<&'a Metadata>) -> EventHead<'a> {
        EventHead {
            kind: "aircraft",
            id: "N1\n\"ä",
            version: 6,
            commit: CommitSpan { first: 5, count: 3 },
            name: "Flown",
            schema: 2,
            at: "2013-01-01T06:00:00.000000Z",
            metadata: metadata.map(MetadataLine::from),
        }
    }

    fn written(head: &EventHead<'_>, data: &[u8]) -> String {
        let mut line = b"before".to_vec();
        write_event(&mut line, head, data).unwrap();
        String::from_utf8(line).unwrap().strip_prefix("before").unwrap().to_owned()
    }

    fn event(line: &str) -> EventLine<'_> {
        match parse(line.as_bytes()).unwrap() {
            Line::Event(event) => event,
            Line::Manifest(_) | Line::Archive => panic!("no event"),
        }
    }

    /// Files are kept for years, and read by others.
    #[test]
    fn the_lines_are_pinned() {
        let metadata = Metadata {
            correlation: Some("c".into()),
            causation: None,
            headers: vec![("k".into(), "v".into()), ("k".into(), "w".into())],
        };
        let head = EventHead { metadata: Some(MetadataLine::from(&metadata)), ..head(None) };
        // {"b": 1, "a": [-0.0]}
        let data = [0x82, 0xa1, b'b', 1, 0xa1, b'a', 0x91, 0xcb, 0x80, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(
            written(&head, &data),
            concat!(
                r#"{"kind":"aircraft","id":"N1\n\"ä","version":6,"commit":{"first":5,"count":3},"type":"Flown","schema":2,"#,
                r#""at":"2013-01-01T06:00:00.000000Z","metadata":{"correlation":"c","headers":[["k","v"],["k","w"]]},"#,
                r#""data":{"b":1,"a":[-0.0]}}"#,
                "\n"
            )
        );
        let manifest = Manifest { format: 1, entities: 2, commits: 3, events: 4, sha256: "ab".into() };
        let mut line = Vec::new();
        write_manifest(&mut line, &manifest).unwrap();
        assert_eq!(
            String::from_utf8(line).unwrap(),
            "{\"manifest\":{\"format\":1,\"entities\":2,\"commits\":3,\"events\":4,\"sha256\":\"ab\"}}\n"
        );
    }

    #[test]
    fn what_is_written_is_read_as_it_was() {
        let metadata = Metadata { causation: Some("x\u{0}".into()), ..Metadata::default() };
        let line = written(&head(Some(&metadata)), &[0x81, 0xa1, b'a', 7]);
        let event = event(&line);
        assert_eq!((&*event.kind, &*event.id, &*event.name, event.schema), ("aircraft", "N1\n\"ä", "Flown", 2));
        assert_eq!((event.version, event.commit), (Some(6), Some(CommitSpan { first: 5, count: 3 })));
        assert_eq!(event.at.as_deref(), Some("2013-01-01T06:00:00.000000Z"));
        assert_eq!((event.metadata, event.key), (Some(metadata), None));
        assert_eq!(event.data, [0x81, 0xa1, b'a', 7]);
    }

    /// Data that JSON would change stands beside its JSON as bytes, and those count.
    #[test]
    fn data_that_json_would_change_is_kept_as_bytes() {
        let long = [&[0xc5, 0xff, 0xff][..], &[7; 0xffff]].concat();
        let shown = "\"data\":";
        for (what, data, is_shown) in [
            ("binary", &[0xc4, 2, 1, 2][..], true),
            ("no number", &[0xcb, 0x7f, 0xf8, 0, 0, 0, 0, 0, 1], true),
            ("a float of 4 bytes", &[0xca, 0x3d, 0xcc, 0xcc, 0xcd], true),
            ("an integer longer than needed", &[0xcd, 0, 1], true),
            ("a key that is no text", &[0x81, 1, 2], false),
            ("an extension", &[0xd4, 1, 2], false),
            ("text that is not UTF-8", &[0xa1, 0xff], true),
            ("longer than anybody looks at", &long, false),
        ] {
            let line = written(&head(None), data);
            assert_eq!((line.contains(shown), line.contains("\"bytes\":")), (is_shown, true), "{what}: {line}");
            assert_eq!(event(&line).data, data, "{what}");
        }
    }

    #[test]
    fn optional_fields_may_be_absent_or_null_and_stand_in_any_order() {
        let short = event(r#"{"data":null,"type":"T","id":"i","kind":"k"}"#);
        assert_eq!((short.data.as_slice(), short.schema), (&[0xc0][..], 1));
        let nulls = event(
            r#" {"kind":"k","id":"i","version":null,"commit":null,"type":"T","schema":null,"at":null,"metadata":null,
                "key":null,"bytes":null,"data":5} "#,
        );
        assert!(nulls.version.is_none() && nulls.commit.is_none() && nulls.at.is_none() && nulls.metadata.is_none());
        assert_eq!(nulls.data, [5]);
    }

    /// Each with its reason, and none with what stands in the line.
    #[test]
    fn a_wrong_line_is_refused_without_being_quoted() {
        let with =
            |more: &str| format!(r#"{{"kind":"k","id":"secret","type":"T","data":{{"secret":"secret"}}{more}}}"#);
        let deep = format!(r#"{{"kind":"k","id":"i","type":"T","data":{}1{}}}"#, "[".repeat(200), "]".repeat(200));
        let long_name = format!(r#"{{"kind":"k","id":"secret","type":"{}","data":1}}"#, "x".repeat(129));
        for (line, reason) in [
            ("secret".to_owned(), "it is not a JSON object (column 1)"),
            ("\"secret\"".to_owned(), "it is not a JSON object (column 8)"),
            ("[\"secret\"]".to_owned(), "it is not a JSON object (column 1)"),
            ("{}".to_owned(), "it has no field \"type\""),
            (with("}"), "it is not a JSON object (column 65)"),
            (with(",\"key\":\"sec"), "it ends in the middle of its JSON object"),
            (with("\0"), "it is not a JSON object (column 64)"),
            (with(",\"secret\":1"), "it has a field that the format does not know, with its value at column 74"),
            (with(",\"id\":\"secret\""), "it has the field \"id\" twice"),
            (with(",\"version\":\"secret\""), "its field \"version\" is not a number from 1"),
            (with(",\"version\":0"), "its field \"version\" is not a number from 1"),
            (with(",\"version\":-1"), "its field \"version\" is not a number from 1"),
            (with(",\"schema\":4294967296"), "its field \"schema\" is not a number below 2^32"),
            (with(",\"at\":\"secret\""), "its field \"at\" is not a time as RFC 3339 has it"),
            (with(",\"at\":\"2013-01-01\""), "its field \"at\" is not a time as RFC 3339 has it"),
            (
                with(",\"commit\":{\"first\":1,\"count\":0}"),
                "its field \"commit\" is not {\"first\": N, \"count\": N}, both at least 1",
            ),
            (
                with(",\"commit\":{\"first\":1,\"count\":1,\"secret\":1}"),
                "its field \"commit\" is not {\"first\": N, \"count\": N}, both at least 1",
            ),
            (
                with(",\"metadata\":{\"headers\":[[\"secret\"]]}"),
                "its field \"metadata\" is not {\"correlation\": TEXT, \"causation\": TEXT, \"headers\": [[TEXT, TEXT], ...]}",
            ),
            (with(",\"bytes\":\"secret?\""), "its field \"bytes\" is not base64"),
            (with(",\"key\":\"\\ud800\""), "its field \"key\" is not a text"),
            (
                with(",\"manifest\":{\"format\":1}"),
                "its field \"manifest\" is not the manifest of an export, alone in its line",
            ),
            (
                "{\"manifest\":{\"format\":2,\"secret\":1}}".to_owned(),
                "it is the manifest of format 2; this version of Kuma reads format 1",
            ),
            (r#"{"kind":"k","id":"secret","type":"T"}"#.to_owned(), "it has no field \"data\""),
            (long_name, "its field \"type\" is not a text of 1 to 128 bytes"),
            (deep, "its data is nested more than 127 deep"),
            (
                r#"{"kind":"k","id":"secret","type":"T","data":18446744073709551616}"#.to_owned(),
                "its data has a number that does not fit: integers have at most 64 bits; write a larger one as text, or with an exponent if it may be rounded",
            ),
            (
                r#"{"kind":"k","id":"secret","type":"T","data":"\ud800"}"#.to_owned(),
                "its data has text that is not Unicode",
            ),
        ] {
            let error = parse(line.as_bytes()).unwrap_err().to_string();
            assert_eq!(error, reason, "{line}");
            assert!(!error.contains("secret"));
        }
        assert_eq!(parse(b"{\"kind\":\"\xff\"").unwrap_err(), LineProblem::NotUtf8 { column: 10 });
        assert_eq!(parse(&"{\"kind\":\"ä".as_bytes()[..10]).unwrap_err(), LineProblem::Cut);
    }

    #[test]
    fn times_are_written_to_the_microsecond() {
        let at = |micros| std::time::UNIX_EPOCH + std::time::Duration::from_micros(micros);
        assert_eq!(time_text(at(1_357_020_000_000_000)), "2013-01-01T06:00:00.000000Z");
        assert_eq!(time_text(at(1)), "1970-01-01T00:00:00.000001Z");
        assert!(time_text(at(u64::MAX / 2)).starts_with("9999-"));
    }
}
