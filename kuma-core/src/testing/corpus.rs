//! The corpus: one sample of every event that was ever released, kept beside the code, so that its tests tell when one can no longer
//! be read.
//!
//! Invariant: lines are only ever added. A sample that was released stays, whatever the code has become since.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs,
    marker::PhantomData,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Deserializer, Serialize, de::Visitor, forward_to_deserialize_any};
use serde_bytes::Bytes;

use crate::{
    Entity, EventName,
    body::{join, split},
    kind::{Kind, TypedKind},
    kind_options::Tuning,
};

/// Set to `update`, new samples are added to their files instead of failing the test.
const UPDATE: &str = "KUMA_CORPUS";

/// A file with samples of a kind's events, one JSON object a line.
///
/// ```no_run
/// # use kuma_core::Entity;
/// # use serde::{Deserialize, Serialize};
/// # #[derive(Default, Clone, Serialize, Deserialize)]
/// # struct Account;
/// # #[derive(Serialize, Deserialize)]
/// # enum AccountEvent { Deposited { amount: i64 } }
/// # impl Entity for Account {
/// #     const KIND: &'static str = "account";
/// #     type Event = AccountEvent;
/// #     fn apply(&mut self, _: &AccountEvent) {}
/// # }
/// use kuma_core::testing::Corpus;
///
/// #[test]
/// # fn a() {}
/// fn every_event_ever_released_still_decodes() {
///     Corpus::<Account>::at("tests/corpus/account.ndjson")
///         .sample(AccountEvent::Deposited { amount: 5 })
///         .check();
/// }
/// ```
///
/// [`Corpus::check`] fails if
/// - a line of the file does not decode any more (with the upcasters of its schema version): the code would not read what is stored,
/// - a variant of the event type has no line, or a given sample is not in the file: run the test once with `KUMA_CORPUS=update`
///   and commit the file.
///
/// Samples are for everyone to read: make them up, do not copy them from a store.
pub struct Corpus<E: Entity> {
    path: PathBuf,
    samples: Vec<Line>,
    names: Vec<EventName>,
    entity: PhantomData<fn() -> E>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Line {
    #[serde(rename = "type")]
    name: String,
    schema: u32,
    /// MessagePack, in hex.
    bytes: String,
    /// For people; not read back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    data: Option<serde_json::Value>,
}

impl<E: Entity> Corpus<E> {
    /// The corpus in this file, which need not exist yet. Cargo runs tests in the package's directory.
    pub fn at(path: impl AsRef<Path>) -> Self {
        Corpus { path: path.as_ref().to_owned(), samples: Vec::new(), names: Vec::new(), entity: PhantomData }
    }

    /// An event as the present code writes it.
    ///
    /// # Panics
    /// The event cannot be stored.
    #[track_caller]
    pub fn sample(mut self, event: E::Event) -> Self {
        let mut encoder = crate::body::EventEncoder::new(crate::Options::new("").limits);
        let encoded = encoder.typed::<E>(&event).and_then(|_| encoder.finish());
        let encoded = encoded.unwrap_or_else(|refused| panic!("a sample cannot be stored: {refused}"));
        let body = encoded.body(None).unwrap_or_else(|error| panic!("a sample cannot be stored: {error}"));
        let body = crate::body::Body::parse(&body).unwrap_or_else(|error| panic!("a sample cannot be read: {error}"));
        for (schema, event) in body.events {
            let (name, data) = split(event).unwrap_or_else(|| panic!("a sample has no name"));
            self.samples.push(Line {
                name: name.to_owned(),
                schema,
                bytes: hex::encode(data),
                data: rmp_serde::from_slice(data).ok(),
            });
        }
        self
    }

    /// The file must have a line for each of these names of this kind, as [`Verification::event_names`](crate::Verification) lists
    /// them for a store.
    pub fn covering<'a>(mut self, names: impl IntoIterator<Item = &'a EventName>) -> Self {
        self.names.extend(names.into_iter().filter(|name| name.kind == E::KIND).cloned());
        self
    }

    /// Compares the file, the samples and the code.
    ///
    /// # Panics
    /// They do not fit, see [`Corpus`]; the message says what to do.
    #[track_caller]
    pub fn check(self) {
        let update = std::env::var(UPDATE).is_ok_and(|value| value == "update");
        if let Err(problems) = self.compare(update) {
            panic!("the corpus {} of kind {}:\n{}", self.path.display(), E::KIND, problems.join("\n"));
        }
    }

    fn compare(&self, update: bool) -> Result<(), Vec<String>> {
        let mut lines = self.read().map_err(|problem| vec![problem])?;
        let new: Vec<&Line> =
            self.samples.iter().filter(|sample| !lines.iter().any(|line| line.is_same(sample))).collect();
        let mut problems = Vec::new();
        if update && !new.is_empty() {
            self.add(&new).map_err(|problem| vec![problem])?;
        } else {
            let missing = |line: &&Line| {
                format!(
                    "- a sample of {} (schema {}) is not in the file; run once with {UPDATE}=update and commit it",
                    line.name, line.schema
                )
            };
            problems.extend(new.iter().map(missing));
        }
        lines.extend(new.into_iter().cloned());
        problems.extend(undecodable::<E>(&lines));
        let names: BTreeSet<&str> = lines.iter().map(|line| line.name.as_str()).collect();
        for variant in variants::<E::Event>().iter().filter(|variant| !names.contains(**variant)) {
            problems.push(format!("- there is no sample of {variant}; give one with `.sample(..)`"));
        }
        let known: BTreeMap<(&str, u32), ()> =
            lines.iter().map(|line| ((line.name.as_str(), line.schema), ())).collect();
        for EventName { name, schema, .. } in &self.names {
            if !known.contains_key(&(name.as_str(), *schema)) {
                problems.push(format!("- {name} (schema {schema}) is stored and has no sample"));
            }
        }
        if problems.is_empty() { Ok(()) } else { Err(problems) }
    }

    fn read(&self) -> Result<Vec<Line>, String> {
        let text = match fs::read_to_string(&self.path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(|error| format!("- it cannot be read: {error}"))?,
        };
        let line = |(number, line): (usize, &str)| {
            serde_json::from_str(line).map_err(|error| format!("- line {} is broken: {error}", number + 1))
        };
        text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).map(line).collect()
    }

    fn add(&self, new: &[&Line]) -> Result<(), String> {
        let failed = |error: &dyn fmt::Display| format!("- it cannot be written: {error}");
        let mut text = fs::read_to_string(&self.path).unwrap_or_default();
        for line in new {
            text.push_str(&serde_json::to_string(line).map_err(|error| failed(&error))?);
            text.push('\n');
        }
        if let Some(directory) = self.path.parent() {
            fs::create_dir_all(directory).map_err(|error| failed(&error))?;
        }
        fs::write(&self.path, text).map_err(|error| failed(&error))
    }
}

impl Line {
    fn is_same(&self, other: &Line) -> bool {
        (&self.name, self.schema, &self.bytes) == (&other.name, other.schema, &other.bytes)
    }
}

/// What the present code cannot read.
fn undecodable<E: Entity>(lines: &[Line]) -> Vec<String> {
    let kind = match TypedKind::<E>::new(Tuning::default()) {
        Ok(kind) => kind,
        Err(refused) => return vec![format!("- {refused}")],
    };
    let problem = |line: &Line| {
        let data = match hex::decode(&line.bytes) {
            Ok(data) => data,
            Err(error) => return Some(format!("- the bytes of a sample of {} are broken: {error}", line.name)),
        };
        let event = join(&line.name, &data);
        let error = kind.decode(&[(line.schema, Bytes::new(&event))]).err()?;
        let Line { name, schema, .. } = line;
        Some(format!(
            "- {name} (schema {schema}) can no longer be read: {}; what is stored like this would make its entities unreadable, add an upcaster",
            error.detail
        ))
    };
    lines.iter().filter_map(problem).collect()
}

/// The names of an enum's variants, as serde knows them; none of what is not an enum.
fn variants<T: for<'de> Deserialize<'de>>() -> &'static [&'static str] {
    match T::deserialize(AskVariants) {
        Err(Asked(variants)) => variants,
        Ok(_) => &[],
    }
}

/// Is asked for an enum, and answers with what it was asked.
struct AskVariants;

#[derive(Debug)]
struct Asked(&'static [&'static str]);

impl fmt::Display for Asked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

impl std::error::Error for Asked {}

impl serde::de::Error for Asked {
    fn custom<T: fmt::Display>(_: T) -> Self {
        Asked(&[])
    }
}

impl<'de> Deserializer<'de> for AskVariants {
    type Error = Asked;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Asked> {
        Err(Asked(&[]))
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, Asked> {
        Err(Asked(variants))
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct newtype_struct
        seq tuple tuple_struct map struct identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Upcasters;

    macro_rules! account {
        ($name:ident, $schema:expr, $upcasters:expr, $($event:tt)*) => {
            mod $name {
                use super::*;
                #[derive(Default, Clone, Serialize, Deserialize)]
                pub(super) struct Account;
                #[derive(Serialize, Deserialize)]
                pub(super) enum AccountEvent { $($event)* }
                impl Entity for Account {
                    const KIND: &'static str = "account";
                    const SCHEMA: u32 = $schema;
                    type Event = AccountEvent;
                    fn apply(&mut self, _: &AccountEvent) {}
                    fn upcasters() -> Upcasters { $upcasters }
                }
            }
        };
    }

    account!(first, 1, Upcasters::new(), Put { euros: i64 }, Closed);
    account!(forgot, 2, Upcasters::new(), Deposited { cents: i64 }, Closed);
    account!(
        mended,
        2,
        Upcasters::new()
            .json(1, "Put", |data| serde_json::json!({"cents": data["euros"].as_i64().unwrap_or(0) * 100}))
            .rename(1, "Put", "Deposited"),
        Deposited { cents: i64 },
        Closed
    );

    #[test]
    fn a_released_event_that_no_longer_decodes_is_found_until_an_upcaster_reads_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("corpus/account.ndjson");
        let first = || {
            Corpus::<first::Account>::at(&path)
                .sample(first::AccountEvent::Put { euros: 3 })
                .sample(first::AccountEvent::Closed)
        };
        assert!(first().compare(false).unwrap_err()[0].contains("KUMA_CORPUS=update"));
        first().compare(true).unwrap();
        first().compare(false).unwrap();

        let forgot = Corpus::<forgot::Account>::at(&path).sample(forgot::AccountEvent::Deposited { cents: 300 });
        let problems = forgot.compare(true).unwrap_err();
        assert!(
            problems.iter().any(|problem| problem.contains("Put (schema 1) can no longer be read")),
            "{problems:?}"
        );
        let mended = || Corpus::<mended::Account>::at(&path).sample(mended::AccountEvent::Deposited { cents: 300 });
        mended().compare(false).unwrap();

        let stored = |name: &str, schema| EventName { kind: "account".into(), name: name.into(), schema };
        mended().covering([&stored("Put", 1)]).compare(false).unwrap();
        assert!(mended().covering([&stored("Lost", 1)]).compare(false).is_err());
    }

    #[test]
    fn every_variant_needs_a_sample() {
        let directory = tempfile::tempdir().unwrap();
        let corpus = Corpus::<first::Account>::at(directory.path().join("a")).sample(first::AccountEvent::Closed);
        let problems = corpus.compare(true).unwrap_err();
        assert_eq!(problems, ["- there is no sample of Put; give one with `.sample(..)`"]);
    }
}
