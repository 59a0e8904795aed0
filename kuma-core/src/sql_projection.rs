//! Projections in plain SQL files, for those who write no Rust.
//!
//! ```text
//! header      -- projection: carriers              the name
//!             -- version: 1                        raise it, and the model is built anew
//!             -- erasure: column aircraft.tail     or `block`, or `none (why)`
//! tables      CREATE TABLE ...;                    one script, executed once for each model
//! blocks      -- on flight.Landed                  the statements that an event executes, in their order
//!             UPDATE ...;
//!             -- on flight.*                       events of the kind that no block names
//!             -- on $erased                        what an erasure executes
//! ```
//!
//! Invariants:
//! - A file that is taken works: every statement was prepared, with the rights that it will have, on the tables that the file makes.
//! - An event executes one block at most: the one that names it, else that of its kind's star.
//! - No error tells data of events. Those of a file tell the file's own text; those of applying tell names, numbers and SQLite's words,
//!   which name tables and columns.
//!
//! Reference: docs/projections-sql.md.

mod check;
mod layout;
mod problem;
mod scan;

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
    str::FromStr,
};

use kuma_shard::rusqlite::{
    self, Transaction,
    types::{ToSqlOutput, ValueRef},
};

pub use self::problem::SqlProjectionError;
use self::{
    check::{Checker, Section},
    layout::{Layout, Topic},
    problem::{Part, Problem},
};
use crate::{
    ApplyError, ErasureRule, Filter, Projection, StoredEvent, micros,
    ndjson::{MetadataLine, time_text, transcode::unpack},
};

/// The largest file that is read.
const BYTES_MAX: usize = 1 << 20;

/// A projection that is a text of SQL.
///
/// ```
/// use kuma_core::{Projection, SqlProjection};
///
/// let balances = SqlProjection::parse(
///     "-- projection: balances
///      -- version: 1
///      -- erasure: column balance.account
///      CREATE TABLE balance (account TEXT PRIMARY KEY, cents INTEGER NOT NULL) STRICT;
///
///      -- on account.Deposited
///      INSERT INTO balance VALUES (:entity, :data ->> 'amount')
///      ON CONFLICT (account) DO UPDATE SET cents = cents + excluded.cents;
///
///      -- on account.Withdrawn
///      UPDATE balance SET cents = cents - (:data ->> 'amount') WHERE account = :entity;",
/// )?;
/// assert_eq!((balances.name(), balances.version()), ("balances", 1));
/// assert!(balances.filter().matches("account", "Withdrawn") && !balances.filter().matches("account", "Closed"));
///
/// let error = SqlProjection::parse("-- projektion: balances").unwrap_err();
/// assert!(error.to_string().starts_with("line 1, column 1: the header knows no `projektion`, did you mean `projection`?"));
/// # Ok::<(), kuma_core::SqlProjectionError>(())
/// ```
#[derive(Clone, Debug)]
pub struct SqlProjection {
    text: String,
    name: String,
    version: u32,
    erasure: ErasureRule,
    /// What makes the tables.
    script: String,
    blocks: Vec<Block>,
    /// Of each kind the blocks of its events, as places in `blocks`.
    kinds: BTreeMap<String, KindBlocks>,
}

#[derive(Clone, Debug, Default)]
struct KindBlocks {
    named: BTreeMap<String, usize>,
    others: Option<usize>,
}

/// The statements of an event.
#[derive(Clone, Debug)]
struct Block {
    statements: Vec<Statement>,
    /// Whether one of them has the parameter. Then it is made, once for all of them.
    needs_data: bool,
    needs_metadata: bool,
    needs_at: bool,
}

#[derive(Clone, Debug)]
struct Statement {
    sql: String,
    /// In the order of SQLite's numbers for them, which begin with 1.
    parameters: Vec<Parameter>,
}

/// What a statement can ask about its event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Parameter {
    Entity,
    Kind,
    Event,
    Hash,
    Version,
    Life,
    Slot,
    Seq,
    At,
    AtUs,
    Data,
    Metadata,
}

impl Parameter {
    const ALL: [Parameter; 12] = {
        use Parameter::*;
        [Entity, Kind, Event, Hash, Version, Life, Slot, Seq, At, AtUs, Data, Metadata]
    };
    /// Those that are known of an entity that is erased.
    const OF_ERASED: [Parameter; 3] = [Parameter::Entity, Parameter::Kind, Parameter::Hash];

    /// Without the colon.
    const fn name(self) -> &'static str {
        match self {
            Parameter::Entity => "entity",
            Parameter::Kind => "kind",
            Parameter::Event => "event",
            Parameter::Hash => "hash",
            Parameter::Version => "version",
            Parameter::Life => "life",
            Parameter::Slot => "slot",
            Parameter::Seq => "seq",
            Parameter::At => "at",
            Parameter::AtUs => "at_us",
            Parameter::Data => "data",
            Parameter::Metadata => "metadata",
        }
    }
}

impl SqlProjection {
    /// Reads a projection from its text, and tries its statements on an empty database in memory.
    ///
    /// # Errors
    /// What is wrong with the text, where, and what to do.
    pub fn parse(text: &str) -> Result<Self, SqlProjectionError> {
        if text.len() > BYTES_MAX {
            return Err(SqlProjectionError::too_large());
        }
        // Some editors begin a file with a byte order mark.
        let body = text.strip_prefix('\u{feff}').unwrap_or(text);
        Self::read(text, body).map_err(|problem| problem.in_text(body))
    }

    fn read(text: &str, body: &str) -> Result<Self, Problem> {
        // SQLite would take it for the end.
        if let Some(at) = body.find('\0') {
            return Err(Problem::new(
                Part::NotText,
                at,
                "the file has a character of value 0, which no text has; take it away",
            ));
        }
        let layout = Layout::of(body)?;
        let checker = Checker::new(body)?;
        checker.make_tables(&layout.tables)?;
        let (mut blocks, mut kinds) = (Vec::new(), BTreeMap::<String, KindBlocks>::new());
        for block in &layout.blocks {
            let Topic::Events(events) = &block.topic else {
                checker.block(&block.statements, Section::Erased)?;
                continue;
            };
            for (kind, event) in events {
                let of_kind = kinds.entry(kind.clone()).or_default();
                match event {
                    Some(event) => drop(of_kind.named.insert(event.clone(), blocks.len())),
                    None => of_kind.others = Some(blocks.len()),
                }
            }
            blocks.push(Block::of(checker.block(&block.statements, Section::Events)?));
        }
        let erasure = checker.erasure(&layout)?;
        let script = checker.script(&layout.tables);
        let Layout { name, version, .. } = layout;
        Ok(SqlProjection { text: text.to_owned(), name, version, erasure, script, blocks, kinds })
    }

    /// Reads a projection from a file. See [`SqlProjection::parse`].
    ///
    /// # Errors
    /// As of [`SqlProjection::parse`], or the file cannot be read.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, SqlProjectionError> {
        let mut bytes = Vec::new();
        let read = File::open(path).and_then(|file| file.take(BYTES_MAX as u64 + 1).read_to_end(&mut bytes));
        read.map_err(SqlProjectionError::Read)?;
        if bytes.len() > BYTES_MAX {
            return Err(SqlProjectionError::too_large());
        }
        match str::from_utf8(&bytes) {
            Ok(text) => Self::parse(text),
            Err(error) => {
                let text = String::from_utf8_lossy(&bytes);
                let reason = "the file is not UTF-8; save it as such";
                let at = error.valid_up_to();
                // What is before it is the same in both.
                Err(Problem::new(Part::NotText, at, reason).in_text(&text))
            }
        }
    }

    /// Reads the projections of all files `*.sql` in a directory, in the order of their names. Files whose names begin with a dot are
    /// passed over. Of two projections with one name, the second is refused.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn load_directory(
        directory: impl AsRef<Path>,
    ) -> io::Result<Vec<(PathBuf, Result<SqlProjection, SqlProjectionError>)>> {
        let mut paths = Vec::new();
        for entry in std::fs::read_dir(directory)? {
            let path = entry?.path();
            let is_hidden = path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
            if path.extension().is_some_and(|extension| extension == "sql") && !is_hidden && !path.is_dir() {
                paths.push(path);
            }
        }
        paths.sort();
        let mut first_of = BTreeMap::<String, PathBuf>::new();
        let load = |path: PathBuf| {
            let loaded = Self::load(&path).and_then(|projection| match first_of.get(&projection.name) {
                Some(first) => Err(SqlProjectionError::SameName { name: projection.name, first: first.clone() }),
                None => {
                    first_of.insert(projection.name.clone(), path.clone());
                    Ok(projection)
                }
            });
            (path, loaded)
        };
        Ok(paths.into_iter().map(load).collect())
    }

    /// How many statements its blocks have. A connection whose cache of prepared statements holds fewer prepares them again and again, which
    /// takes longer than executing them.
    pub fn statements(&self) -> usize {
        self.blocks.iter().map(|block| block.statements.len()).sum()
    }

    fn block(&self, kind: &str, event: &str) -> Option<&Block> {
        let of_kind = self.kinds.get(kind)?;
        self.blocks.get(of_kind.named.get(event).copied().or(of_kind.others)?)
    }
}

impl FromStr for SqlProjection {
    type Err = SqlProjectionError;

    fn from_str(text: &str) -> Result<Self, SqlProjectionError> {
        Self::parse(text)
    }
}

impl Block {
    fn of(statements: Vec<Statement>) -> Self {
        let needs = |parameter| statements.iter().any(|statement| statement.parameters.contains(&parameter));
        let (needs_data, needs_metadata, needs_at) =
            (needs(Parameter::Data), needs(Parameter::Metadata), needs(Parameter::At));
        Block { statements, needs_data, needs_metadata, needs_at }
    }
}

/// The data of an event that a projection reads as JSON has no such form: keys that are not text, or an extension type.
#[derive(Debug, thiserror::Error)]
#[error("event {event} of {kind} at version {version} has data without a JSON form, so that there is no `:data`")]
struct NoJson {
    kind: String,
    event: String,
    version: u64,
}

/// What an event's statements are given, as far as it has to be made.
///
/// Made anew for each event: a buffer that is kept would keep data of an entity that is erased.
struct Values<'a> {
    event: &'a StoredEvent,
    data: Vec<u8>,
    metadata: Option<String>,
    at: String,
}

impl<'a> Values<'a> {
    fn of(event: &'a StoredEvent, block: &Block) -> Result<Self, ApplyError> {
        let recorded = &event.event;
        let mut data = Vec::new();
        if block.needs_data {
            data.reserve(2 * recorded.data.len());
            // Its words may quote a value.
            unpack(&recorded.data, &mut data).map_err(|_| NoJson {
                kind: event.kind.to_string(),
                event: recorded.name.clone(),
                version: recorded.version.0,
            })?;
        }
        let metadata = recorded.metadata.as_ref().filter(|_| block.needs_metadata);
        let metadata = metadata.map(|metadata| serde_json::to_string(&MetadataLine::from(metadata))).transpose()?;
        let at = if block.needs_at { time_text(recorded.at) } else { String::new() };
        Ok(Values { event, data, metadata, at })
    }

    fn bind(&self, parameter: Parameter, index: usize, to: &mut rusqlite::Statement<'_>) -> rusqlite::Result<()> {
        let (event, recorded) = (self.event, &self.event.event);
        let mut hash = [0; 32];
        let value = match parameter {
            Parameter::Entity => ValueRef::Text(event.id.as_bytes()),
            Parameter::Kind => ValueRef::Text(event.kind.as_bytes()),
            Parameter::Event => ValueRef::Text(recorded.name.as_bytes()),
            Parameter::Hash => {
                // It has as many digits as there is room for.
                let _ = hex::encode_to_slice(event.entity.0, &mut hash);
                ValueRef::Text(&hash)
            }
            Parameter::Version => integer(recorded.version.0),
            Parameter::Life => ValueRef::Integer(event.life.into()),
            Parameter::Slot => ValueRef::Integer(event.slot.number().into()),
            Parameter::Seq => integer(event.seq),
            Parameter::At => ValueRef::Text(self.at.as_bytes()),
            Parameter::AtUs => ValueRef::Integer(micros(recorded.at)),
            Parameter::Data => ValueRef::Text(&self.data),
            Parameter::Metadata => {
                self.metadata.as_ref().map_or(ValueRef::Null, |text| ValueRef::Text(text.as_bytes()))
            }
        };
        to.raw_bind_parameter(index, ToSqlOutput::Borrowed(value))
    }
}

fn integer(number: u64) -> ValueRef<'static> {
    ValueRef::Integer(i64::try_from(number).unwrap_or(i64::MAX))
}

impl Projection for SqlProjection {
    fn name(&self) -> &str {
        &self.name
    }

    fn version(&self) -> u32 {
        self.version
    }

    fn filter(&self) -> Filter {
        self.kinds.iter().fold(Filter::all(), |filter, (kind, blocks)| match blocks.others {
            Some(_) => filter.and_kind(kind),
            None => blocks.named.keys().fold(filter, |filter, event| filter.and_event(kind, event)),
        })
    }

    fn erasure(&self) -> ErasureRule {
        self.erasure.clone()
    }

    fn migrations(&self) -> Vec<String> {
        vec![self.script.clone()]
    }

    fn apply(&self, model: &Transaction<'_>, event: &StoredEvent) -> Result<(), ApplyError> {
        let Some(block) = self.block(&event.kind, &event.event.name) else { return Ok(()) };
        let values = Values::of(event, block)?;
        for statement in &block.statements {
            let mut prepared = model.prepare_cached(&statement.sql)?;
            for (index, parameter) in statement.parameters.iter().enumerate() {
                values.bind(*parameter, index + 1, &mut prepared)?;
            }
            prepared.raw_execute()?;
        }
        Ok(())
    }

    fn source(&self) -> Option<&str> {
        Some(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::Arc,
        time::{Duration, SystemTime},
    };

    use kuma_shard::{EntityHash, Guard, Rights, Slot, rusqlite::Connection};
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;
    use crate::{Metadata, RecordedEvent, Version};

    const CARRIERS: &str = include_str!("../examples/projections/carriers.sql");
    const BUSIEST: &str = include_str!("../examples/projections/busiest_aircraft.sql");
    const HEAD: &str = "-- projection: p\n-- version: 1\n-- erasure: none (nothing)\n";
    const TABLE: &str = "CREATE TABLE t (a, b);\n";

    fn event(kind: &str, id: &str, name: &str, version: u64, data: &Value) -> StoredEvent {
        StoredEvent {
            slot: Slot::new(7),
            seq: 40,
            kind: kind.into(),
            id: id.into(),
            entity: EntityHash([0xab; 16]),
            life: 1,
            event: RecordedEvent {
                version: Version(version),
                name: name.to_owned(),
                schema: 1,
                at: SystemTime::UNIX_EPOCH + Duration::from_micros(1_357_034_400_000_001),
                metadata: None,
                data: rmp_serde::to_vec_named(data).unwrap(),
            },
        }
    }

    /// An empty model, in which statements have the rights that Kuma gives them.
    fn model(projection: &SqlProjection) -> (Connection, Guard) {
        let model = Connection::open_in_memory().unwrap();
        let guard = Guard::over(&model).unwrap();
        guard.set(Rights::Migrate);
        projection.migrations().iter().for_each(|script| model.execute_batch(script).unwrap());
        guard.set(Rights::Engine);
        (model, guard)
    }

    fn apply(
        projection: &SqlProjection,
        (model, guard): &mut (Connection, Guard),
        events: &[StoredEvent],
    ) -> Result<(), ApplyError> {
        let transaction = model.transaction().unwrap();
        guard.set(Rights::Apply);
        let applied = events.iter().try_for_each(|event| projection.apply(&transaction, event));
        guard.set(Rights::Engine);
        // A full disk has ended the transaction already.
        if applied.is_ok() {
            transaction.commit().unwrap();
        }
        applied
    }

    /// The rows of a query, columns separated by `|`.
    fn rows((model, _): &(Connection, Guard), sql: &str) -> Vec<String> {
        let mut statement = model.prepare(sql).unwrap();
        let columns = statement.column_count();
        let row = |row: &rusqlite::Row<'_>| {
            let value = |index| match row.get::<_, rusqlite::types::Value>(index)? {
                rusqlite::types::Value::Null => Ok("null".to_owned()),
                rusqlite::types::Value::Integer(number) => Ok(number.to_string()),
                rusqlite::types::Value::Real(number) => Ok(format!("{number:?}")),
                rusqlite::types::Value::Text(text) => Ok(text),
                rusqlite::types::Value::Blob(bytes) => Ok(hex::encode(bytes)),
            };
            Ok((0..columns).map(value).collect::<rusqlite::Result<Vec<_>>>()?.join("|"))
        };
        statement.query_map([], row).unwrap().map(Result::unwrap).collect()
    }

    fn refusal(text: &str) -> SqlProjectionError {
        SqlProjection::parse(text).map(|projection| projection.name).expect_err(text)
    }

    /// The place and the words of a refusal.
    #[track_caller]
    fn assert_refused(text: &str, place: (usize, usize), words: &str) {
        let error = refusal(text);
        assert_eq!(error.place(), Some(place), "{error}\n{text}");
        assert!(error.to_string().contains(words), "{error}\n{text}");
    }

    fn flown(tail: &str, version: u64, carrier: &str, miles: i64, delay: Option<i64>) -> StoredEvent {
        let data = json!({
            "carrier": carrier, "flight": 1, "origin": "EWR", "dest": "IAH", "distance_mi": miles, "dep_delay_min": 2,
            "arr_delay_min": delay, "air_time_min": delay.map(|_| 100),
        });
        event("aircraft", tail, "Flown", version, &data)
    }

    fn flights() -> Vec<StoredEvent> {
        let cancelled = json!({"carrier": "B6", "flight": 125, "origin": "JFK", "dest": "FLL", "distance_mi": 1069});
        vec![
            flown("N14228", 1, "UA", 1400, Some(11)),
            flown("N24211", 1, "UA", 1416, Some(20)),
            flown("N14228", 2, "UA", 719, None),
            event("aircraft", "N618JB", "Cancelled", 1, &cancelled),
            flown("N618JB", 2, "B6", 1576, Some(-18)),
            event("station", "EWR", "Observed", 1, &json!({"temp": 39.02})),
        ]
    }

    #[test]
    fn the_example_about_carriers_adds_up() {
        let projection = SqlProjection::parse(CARRIERS).unwrap();
        assert_eq!((projection.name(), projection.version(), projection.statements()), ("carriers", 1, 2));
        assert!(matches!(projection.erasure(), ErasureRule::None { reason } if reason.starts_with("sums over")));
        let filter = projection.filter();
        assert!(filter.matches("aircraft", "Flown") && filter.matches("aircraft", "Cancelled"));
        assert!(!filter.matches("aircraft", "Sold") && !filter.matches_kind("station"));
        let mut model = model(&projection);
        apply(&projection, &mut model, &flights()).unwrap();
        assert_eq!(rows(&model, "SELECT * FROM carriers"), ["UA|3|0|3535|15.5", "B6|1|1|1576|-18.0"]);
    }

    #[test]
    fn the_example_about_aircraft_adds_up_and_forgets_what_is_erased() {
        let projection = SqlProjection::parse(BUSIEST).unwrap();
        assert_eq!(projection.erasure(), ErasureRule::column("aircraft", "tail"));
        let mut model = model(&projection);
        apply(&projection, &mut model, &flights()).unwrap();
        let busiest = "SELECT tail, flights, miles, air_min, last_to FROM busiest_aircraft";
        assert_eq!(rows(&model, busiest), ["N14228|2|2119|100|IAH", "N24211|1|1416|100|IAH", "N618JB|1|1576|100|IAH"]);
        model.0.execute(&projection.erasure().sql(), [(":entity", "N14228")].as_slice()).unwrap();
        assert_eq!(rows(&model, busiest), ["N24211|1|1416|100|IAH", "N618JB|1|1576|100|IAH"]);
    }

    #[test]
    fn the_documentation_shows_the_example_and_what_it_says_of_the_sample() {
        let page = include_str!("../../docs/projections-sql.md");
        assert!(page.contains(CARRIERS));
        let line = |line: &str| {
            let line: Value = serde_json::from_str(line).unwrap();
            let text = |field: &str| line[field].as_str().unwrap().to_owned();
            event(&text("kind"), &text("id"), &text("type"), 1, &line["data"])
        };
        let events: Vec<_> = include_str!("../examples/flights-sample.ndjson").lines().map(line).collect();
        let projection = SqlProjection::parse(CARRIERS).unwrap();
        let mut model = model(&projection);
        apply(&projection, &mut model, &events).unwrap();
        for row in rows(&model, "SELECT * FROM carriers LIMIT 3") {
            assert!(page.contains(&format!("| {} |", row.replace('|', " | "))), "{row}");
        }
        let projection = SqlProjection::parse(BUSIEST).unwrap();
        let mut model = super::tests::model(&projection);
        apply(&projection, &mut model, &events).unwrap();
        assert_eq!(rows(&model, "SELECT tail, flights, miles FROM busiest_aircraft LIMIT 1"), ["N730MQ|8|3626"]);
    }

    #[test]
    fn an_event_gives_each_parameter_its_value() {
        let projection = SqlProjection::parse(&format!(
            "{HEAD}CREATE TABLE seen (entity, kind, event, hash, version, life, slot, seq, at, at_us, data, metadata);
             -- on order.Placed
             INSERT INTO seen VALUES (:entity, :kind, :event, :hash, :version, :life, :slot, :seq, :at, :at_us, :data, :metadata);
             UPDATE seen SET metadata = coalesce(:metadata, 'none'), kind = kind || :kind || :version WHERE version = :version;"
        ))
        .unwrap();
        let mut model = model(&projection);
        let mut order = event("order", "o-1", "Placed", 3, &json!({"a": "ü", "b": [1, 2.5]}));
        let metadata = Metadata {
            correlation: Some("c1".to_owned()),
            causation: None,
            headers: vec![("x".to_owned(), "y".to_owned())],
        };
        order.event.metadata = Some(metadata);
        let mut second = order.clone();
        (second.event.version, second.event.metadata) = (Version(4), None);
        apply(&projection, &mut model, &[order, second]).unwrap();
        let hash = "ab".repeat(16);
        let at = "2013-01-01T10:00:00.000001Z|1357034400000001";
        assert_eq!(
            rows(&model, "SELECT * FROM seen ORDER BY version"),
            [
                format!(
                    "o-1|orderorder3|Placed|{hash}|3|1|7|40|{at}|{{\"a\":\"ü\",\"b\":[1,2.5]}}|{{\"correlation\":\"c1\",\"headers\":[[\"x\",\"y\"]]}}"
                ),
                format!("o-1|orderorder4|Placed|{hash}|4|1|7|40|{at}|{{\"a\":\"ü\",\"b\":[1,2.5]}}|none"),
            ]
        );
        let types = "SELECT DISTINCT typeof(version) || typeof(slot) || typeof(at_us) || typeof(data) FROM seen";
        assert_eq!(rows(&model, types), ["integerintegerintegertext"]);
    }

    #[test]
    fn a_star_takes_the_events_that_no_block_names() {
        let projection = SqlProjection::parse(&format!(
            "{HEAD}{TABLE}
             -- on order.Placed, order.Paid
             INSERT INTO t VALUES ('named', :event);
             -- on order.*, shop.eu.*
             INSERT INTO t VALUES ('star', :event);
             -- on shop.eu.\"Was opened, \"\"new\"\"\", shop.eu.\"*\"
             INSERT INTO t VALUES ('quoted', :event);"
        ))
        .unwrap();
        assert_eq!(projection.filter(), Filter::kind("order").and_kind("shop.eu"));
        let mut model = model(&projection);
        let of = |kind, name| event(kind, "x", name, 1, &Value::Null);
        let events = [
            of("order", "Paid"),
            of("order", "Shipped"),
            of("shop.eu", "Was opened, \"new\""),
            of("shop.eu", "*"),
            of("shop.eu", "Closed"),
            of("shop", "Closed"),
        ];
        apply(&projection, &mut model, &events).unwrap();
        let expected =
            ["named|Paid", "star|Shipped", "quoted|Was opened, \"new\"", "quoted|*", "star|Closed"].map(str::to_owned);
        assert_eq!(rows(&model, "SELECT * FROM t ORDER BY rowid"), expected);
    }

    #[test]
    fn the_script_is_the_text_of_the_tables_and_nothing_else() {
        let tables = "CREATE TABLE t (a); -- a comment\n\nCREATE TRIGGER g AFTER INSERT ON t BEGIN\n  UPDATE t SET a = ';END;';\n  DELETE FROM t;\nEND;\nINSERT INTO t VALUES (1);";
        let block = "-- on k.E\nDELETE FROM t;";
        let one = SqlProjection::parse(&format!("{HEAD}\n{tables}\n\n{block}")).unwrap();
        let other = SqlProjection::parse(
            &format!("-- version: 9\n-- projection: q\n-- erasure: none (why)\n-- more\n{tables}{block}\n-- end")
                .replace(";-- on", ";\n-- on"),
        )
        .unwrap();
        assert_eq!(one.migrations(), [tables]);
        assert_eq!(other.migrations(), [tables]);
        assert_eq!(other.source(), Some(other.text.as_str()));
    }

    #[test]
    fn line_ends_of_windows_and_a_byte_order_mark_are_read() {
        let text = format!("\u{feff}{}", CARRIERS.replace('\n', "\r\n"));
        let projection = SqlProjection::parse(&text).unwrap();
        assert_eq!((projection.name(), projection.source()), ("carriers", Some(text.as_str())));
        assert_refused(
            &format!("\u{feff}{HEAD}{TABLE}-- on k.E\r\n  SELEC;").replace('\n', "\r\n"),
            (6, 3),
            "near \"SELEC\"",
        );
    }

    #[test]
    fn a_header_that_is_missing_or_wrong_is_refused_with_what_to_write() {
        let rest = "-- erasure: none (why)\nCREATE TABLE t (a);\n-- on k.E\nDELETE FROM t;";
        for (header, place, words) in [
            ("-- version: 1\n", (1, 1), "begin it with a line like `-- projection: carriers`"),
            ("-- projection: p\n", (1, 1), "`-- version: 1`"),
            ("-- projection: P\n-- version: 1\n", (1, 1), "lower-case letters"),
            ("-- projection:\n-- version: 1\n", (1, 1), "lower-case letters"),
            ("-- projection: p\n-- version: 0\n", (2, 1), "from 1 to 4294967295"),
            ("-- projection: p\n-- version: 4294967296\n", (2, 1), "from 1 to 4294967295"),
            ("-- projection: p\n-- version: -1\n", (2, 1), "from 1 to 4294967295"),
            ("-- projection: p\n-- version: +1\n", (2, 1), "from 1 to 4294967295"),
            ("-- projection: p\n-- version: 1\n-- version: 2\n", (3, 1), "second version"),
            ("-- projection: p\n  -- projection: q\n-- version: 1\n", (2, 3), "second name"),
            ("-- projection: p\n-- vresion: 1\n", (2, 1), "did you mean `version`?"),
            ("-- projection: p\n-- Version: 1\n", (2, 1), "did you mean `version`?"),
            ("-- projection: p\n-- author: me\n", (2, 1), "knows no `author`; it knows"),
            ("-- projection: p\n-- version 1\n", (2, 1), "a colon is missing"),
            ("-- projection:p\n-- version : 1\n-- erasure column t.a\n", (3, 1), "a colon is missing"),
        ] {
            assert_refused(&format!("{header}{rest}"), place, words);
        }
        assert_refused("", (1, 1), "name of its projection");
        assert_refused("CREATE TABLE t (a);\n-- version: 1", (2, 1), "belongs to the header");
        assert!(
            SqlProjection::parse(&format!(
                "/* p */\n-- A word: two\n-- see http://x\n-- projection:p\n-- version : 2\n{rest}"
            ))
            .is_ok()
        );
    }

    #[test]
    fn a_file_says_how_what_is_erased_is_found() {
        let tables = "CREATE TABLE Person (Id TEXT, twice AS (Id || Id));\nCREATE VIEW v AS SELECT * FROM Person;\n-- on k.E\nDELETE FROM person;\n";
        let parse = |rules: &str, more: &str| {
            SqlProjection::parse(&format!("-- projection: p\n-- version: 1\n{rules}{tables}{more}"))
        };
        let erased = "-- on $erased\nDELETE FROM person WHERE id = :entity OR id = :hash OR id = :kind;\nUPDATE person SET id = 'x;' WHERE id = :entity;\n";
        let statements = erased.trim_start_matches("-- on $erased\n").trim_end();
        assert_eq!(parse("-- erasure: column person.id\n", "").unwrap().erasure(), ErasureRule::column("Person", "Id"));
        assert_eq!(
            parse("-- erasure: column \"person\".\"id\"\n", "").unwrap().erasure(),
            ErasureRule::column("Person", "Id")
        );
        assert_eq!(parse("", erased).unwrap().erasure(), ErasureRule::statements(statements));
        assert_eq!(parse("-- erasure: block\n", erased).unwrap().erasure(), ErasureRule::statements(statements));
        for (rules, more, place, words) in [
            ("", "", (1, 1), "`-- erasure: none (WHY)`"),
            ("-- erasure: block\n", "", (3, 1), "the block is missing"),
            ("-- erasure: none\n", "", (3, 1), "the reason is missing"),
            ("-- erasure: none ( )\n", "", (3, 1), "the reason is missing"),
            ("-- erasure: none because\n", "", (3, 1), "the reason is missing"),
            ("-- erasure: colum person.id\n", "", (3, 1), "did you mean `column`?"),
            ("-- erasure: column person\n", "", (3, 1), "TABLE.COLUMN"),
            ("-- erasure: column person.id, person.x\n", "", (3, 1), "TABLE.COLUMN"),
            ("-- erasure: column persons.id\n", "", (3, 1), "did you mean `Person`?"),
            ("-- erasure: column v.id\n", "", (3, 1), "is a view"),
            ("-- erasure: column person.ids\n", "", (3, 1), "did you mean `Id`?"),
            ("-- erasure: column person.twice\n", "", (3, 1), "is computed"),
            ("-- erasure: column person.id\n-- erasure: column person.id\n", "", (4, 1), "twice"),
            ("-- erasure: column person.id\n-- erasure: none (why)\n", "", (4, 1), "another rule"),
            ("-- erasure: column person.id\n", erased, (3, 1), "a block `-- on $erased` as well"),
            ("-- erasure: none (why)\n", erased, (3, 1), "a block `-- on $erased` as well"),
            ("", "-- on $erased\nDELETE FROM person WHERE id = :version;", (8, 31), "has no `:version`"),
            ("", "-- on $erased\nSELECT 1;", (8, 1), "no effect"),
            ("", "-- erasure: column person.id\n", (7, 1), "belongs to the header"),
        ] {
            let error = parse(rules, more).map(|projection| projection.name).expect_err(rules);
            assert_eq!(error.place(), Some(place), "{error}\n{rules}{more}");
            assert!(error.to_string().contains(words), "{error}\n{rules}{more}");
        }
        let two = "-- erasure: column t.a\n-- erasure: column t.b\n";
        let two =
            SqlProjection::parse(&format!("-- projection: p\n-- version: 1\n{two}{TABLE}-- on k.E\nDELETE FROM t;"));
        let columns = vec![("t".to_owned(), "a".to_owned()), ("t".to_owned(), "b".to_owned())];
        assert_eq!(two.unwrap().erasure(), ErasureRule::Columns { columns });
    }

    #[test]
    fn parts_that_are_not_in_order_or_not_whole_are_refused_where_they_are() {
        for (body, place, words) in [
            ("CREATE TABLE t (a)", (4, 1), "is not ended by `;`"),
            ("CREATE TABLE t (a);\n-- on k.E\nDELETE FROM t", (6, 1), "is not ended by `;`"),
            ("CREATE TABLE t (a)\n-- on k.E\nDELETE FROM t;", (5, 1), "the statement of line 4 is not ended by `;`"),
            ("CREATE TRIGGER g AFTER INSERT ON t BEGIN SELECT 1;\n-- on k.E\nDELETE FROM t;", (5, 1), "`END;`"),
            ("CREATE TRIGGER g AFTER INSERT ON t BEGIN SELECT 1;", (4, 1), "`END;`"),
            ("-- on k.E\nDELETE FROM t;\nCREATE TABLE t (a);", (4, 1), "a block stands before the tables"),
            ("CREATE TABLE t (a);\n-- on k.E\n-- on k.F\nDELETE FROM t;", (5, 1), "this block has no statement"),
            ("CREATE TABLE t (a);\n-- on k.E\n;;\n", (5, 1), "this block has no statement"),
            ("CREATE TABLE t (a);\n", (5, 1), "has no block for an event"),
            ("CREATE TABLE t (a);\n-- on $erased\nDELETE FROM t;", (6, 15), "has no block for an event"),
            ("-- nothing\n", (5, 1), "makes no table"),
            ("DELETE FROM t;\n-- on k.E\nDELETE FROM t;", (4, 1), "only CREATE statements"),
            ("SELECT 1;\n-- on k.E\nDELETE FROM t;", (4, 1), "only CREATE statements"),
            ("hello\n;\n-- on k.E\nDELETE FROM t;", (4, 1), "only CREATE statements"),
            ("CREATE TABLE t (a);\n-- on k.E, k.E\nDELETE FROM t;", (5, 1), "`k.E` has a block in line 5 already"),
            (
                "CREATE TABLE t (a);\n-- on k.*\nDELETE FROM t;\n-- on k.*\nDELETE FROM t;",
                (7, 1),
                "`k.*` has a block in line 5",
            ),
            (
                "CREATE TABLE t (a);\n-- on $erased\nDELETE FROM t;\n-- on $erased\nDELETE FROM t;",
                (7, 1),
                "`$erased` has a block in line 5",
            ),
            ("CREATE TABLE t (a);\n-- on $erase\nDELETE FROM t;", (5, 1), "the only block with a `$`"),
            ("CREATE TABLE t (a);\n-- on k.E, $erased\nDELETE FROM t;", (5, 1), "the only block with a `$`"),
            ("CREATE TABLE t (a);\n --On conflict we\nDELETE FROM t;", (5, 2), "not an event's kind"),
            ("CREATE TABLE t (a);\n-- on\nDELETE FROM t;", (5, 1), "not an event's kind"),
            ("CREATE TABLE t (a);\n-- on 1k.E\nDELETE FROM t;", (5, 1), "not an event's kind"),
            ("CREATE TABLE t (a);\n-- on k.E k.F\nDELETE FROM t;", (5, 1), "separated by commas"),
            ("CREATE TABLE t (a DEFAULT 'x\n-- on k.E\nDELETE FROM t;", (4, 27), "a string that is not ended"),
            ("CREATE TABLE t (a); /* é\n-- on k.E\nDELETE FROM t;", (4, 21), "a comment that is not ended"),
            ("CREATE TABLE é (a); CREATE TABLE \"t (a);", (4, 34), "a name that is not ended"),
        ] {
            assert_refused(&format!("{HEAD}{body}"), place, words);
        }
        // What is in a string or a comment begins no block and ends no statement.
        let text = format!(
            "{HEAD}CREATE TABLE t (a DEFAULT '\n-- on k.E\n;', b);/*\n-- on k.F\n*/;\n-- on k.G\n;DELETE FROM t -- on k.H\n;"
        );
        assert_eq!(SqlProjection::parse(&text).unwrap().filter(), Filter::event("k", "G"));
    }

    #[test]
    fn an_error_of_sqlite_has_its_place_in_the_file() {
        for (statement, column, words) in [
            ("INSERT INTO nosuch VALUES (1)", 13, "no such table: nosuch"),
            ("INSERT INTO t (a, c) VALUES (1, 2)", 19, "no column named c"),
            ("UPDATE t SET a = é.b", 18, "no such column: é.b"),
            ("UPDATE t SET a = \"x\"", 18, "no such column"),
            ("UPDATE t SET a = b, b = nosuch(a)", 25, "no such function: nosuch"),
            ("UPDATE t SET a = abs(b, b)", 18, "wrong number of arguments"),
            ("UPDATE t SETT a = 1", 10, "near \"SETT\": syntax error"),
            ("UPDATE t SET a = (b , b , , b)", 27, "near \",\": syntax error"),
            ("UPDATE t SET a = 1 WHERE", 25, "near \";\": syntax error"),
            ("UPDATE t SET a = 12x", 18, "unrecognized token: \"12x\""),
            ("INSERT INTO t VALUES (1)", 1, "has 2 columns but 1 values"),
        ] {
            let error = refusal(&format!("{HEAD}{TABLE}-- on k.E\n{statement};"));
            assert!(matches!(error, SqlProjectionError::Sql { .. }), "{error:?}");
            assert_eq!(error.place(), Some((6, column)), "{error} {statement}");
            assert!(error.to_string().contains(words), "{error} {statement}");
        }
        let text =
            format!("{HEAD}{TABLE}CREATE TABLE u (a);\nCREATE VIEW v AS\nSELECT c FROM t;\n-- on k.E\nDELETE FROM t;");
        assert_refused(&text, (6, 1), "the view cannot be read: no such column: c");
        assert_refused(
            &format!("{HEAD}{TABLE}CREATE TABLE T (a);\n-- on k.E\nDELETE FROM t;"),
            (5, 14),
            "already exists",
        );
    }

    #[test]
    fn an_error_in_a_trigger_is_found_where_it_is_set_off() {
        for step in ["INSERT INTO u VALUES (nosuch(1))", "UPDATE u SET a = nosuch", "INSERT INTO nosuch VALUES (1)"] {
            let trigger = format!("CREATE TRIGGER g AFTER INSERT ON t BEGIN {step}; END;");
            let text = format!(
                "{HEAD}{TABLE}CREATE TABLE u (a);\n{trigger}\n-- on k.E\nDELETE FROM t;\n INSERT INTO t VALUES (1, 2);"
            );
            assert_refused(&text, (9, 2), "nosuch, in a trigger that it sets off");
        }
    }

    #[test]
    fn what_a_projection_may_not_do_is_refused_with_the_rule() {
        for (statement, column, words) in [
            ("INSERT INTO t VALUES (1, random())", 26, "clock or on chance"),
            ("INSERT INTO t VALUES (1, current_timestamp)", 26, "clock or on chance"),
            ("INSERT INTO t VALUES (1, datetime('now'))", 35, "clock or on chance"),
            ("INSERT INTO t VALUES (1, unixepoch ( ))", 26, "clock or on chance"),
            ("INSERT INTO t VALUES (1, strftime('%s'))", 26, "clock or on chance"),
            ("DELETE FROM view WHERE a < unixepoch('now')", 38, "clock or on chance"),
            ("COMMIT", 1, "Kuma commits"),
            ("begin immediate", 1, "Kuma commits"),
            ("SAVEPOINT s", 1, "Kuma commits"),
            ("INSERT OR ROLLBACK INTO t VALUES (1, 2)", 11, "Kuma commits"),
            ("PRAGMA user_version = 3", 1, "Kuma's matter"),
            ("ATTACH ':memory:' AS m", 1, "Kuma's matter"),
            ("VACUUM", 1, "Kuma's matter"),
            ("CREATE TABLE u (a)", 1, "before the first block"),
            ("DROP TABLE t", 1, "before the first block"),
            ("SELECT * FROM t", 1, "no effect"),
            ("WITH n AS (SELECT 1) SELECT * FROM n", 1, "no effect"),
            ("EXPLAIN DELETE FROM t", 1, "no effect"),
            ("DELETE FROM t RETURNING a", 15, "nobody is there"),
            ("INSERT INTO kuma_meta VALUES (1)", 13, "are Kuma's"),
            ("INSERT INTO t SELECT 1, a FROM \"Kuma_meta\"", 32, "are Kuma's"),
            ("DELETE FROM sqlite_schema", 13, "are Kuma's"),
        ] {
            let error = refusal(&format!("{HEAD}{TABLE}-- on k.E\n{statement};"));
            assert!(matches!(error, SqlProjectionError::Forbidden { .. }), "{error:?} {statement}");
            assert_eq!(error.place(), Some((6, column)), "{error} {statement}");
            assert!(error.to_string().contains(words), "{error} {statement}");
        }
        for (statement, column, words) in [
            ("CREATE TABLE kuma_more (a)", 14, "are Kuma's"),
            ("CREATE TABLE sqlite_more (a)", 14, "are Kuma's"),
            ("CREATE TEMP TABLE u (a)", 8, "temporary"),
            ("CREATE VIRTUAL TABLE u USING fts5 (a)", 8, "virtual"),
            ("CREATE TABLE u (a DEFAULT CURRENT_TIMESTAMP)", 27, "clock or on chance"),
            ("CREATE TABLE u (a DEFAULT (datetime()))", 28, "clock or on chance"),
            ("CREATE TABLE u (a UNIQUE ON CONFLICT ROLLBACK)", 38, "Kuma commits"),
            ("CREATE TRIGGER g AFTER INSERT ON t BEGIN SELECT RAISE(ROLLBACK, 'x'); END", 55, "Kuma commits"),
            ("CREATE TRIGGER g AFTER INSERT ON t BEGIN SELECT RAISE(ABORT, 'x' || new.a); END", 49, "goes into logs"),
            (
                "CREATE TABLE u AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT 1 FROM n) SELECT i FROM n LIMIT 1 OFFSET 99999999999",
                1,
                "longer than 5 s",
            ),
        ] {
            let error = refusal(&format!("{HEAD}{TABLE}{statement};\n-- on k.E\nDELETE FROM t;"));
            assert!(matches!(error, SqlProjectionError::Forbidden { .. }), "{error:?} {statement}");
            assert_eq!(error.place(), Some((5, column)), "{error} {statement}");
            assert!(error.to_string().contains(words), "{error} {statement}");
        }
        // A view is read at a time; a date that is given is no clock; the rest only looks forbidden.
        let text = format!(
            "{HEAD}{TABLE}CREATE VIEW fresh AS SELECT * FROM t WHERE a > unixepoch('now', '-1 day');
             CREATE TRIGGER g AFTER INSERT ON t BEGIN SELECT RAISE(IGNORE); SELECT RAISE(ABORT, 'no'); END;
             -- on k.E
             INSERT INTO t VALUES (date(:at, 'start of month'), 'now is random'), (unixepoch(:at), 'now, rollback');"
        );
        SqlProjection::parse(&text).unwrap();
    }

    #[test]
    fn parameters_that_there_are_not_are_refused_where_they_are() {
        for (value, words) in [
            (":entiy", "no parameter `:entiy`, did you mean `:entity`?".replace("`:entity`", "`entity`")),
            (":Data", "did you mean `data`?".to_owned()),
            (":", "unrecognized token".to_owned()),
            ("?", "parameters are named, with a colon".to_owned()),
            ("?1", "parameters are named, with a colon".to_owned()),
            ("@entity", "parameters are named, with a colon".to_owned()),
            ("$entity", "parameters are named, with a colon".to_owned()),
            ("$entity::x(y)", "parameters are named, with a colon".to_owned()),
            ("#entity", "parameters are named, with a colon".to_owned()),
        ] {
            let text = format!("{HEAD}{TABLE}-- on k.E\nINSERT INTO t VALUES (\n  :data, {value});");
            assert_refused(&text, (7, 10), &words);
        }
        assert_refused(
            &format!("{HEAD}{TABLE}INSERT INTO t VALUES (1, :data);\n-- on k.E\nDELETE FROM t;"),
            (5, 26),
            "no parameters before",
        );
        assert_refused(
            &format!("{HEAD}{TABLE}INSERT INTO t VALUES (?, 1);\n-- on k.E\nDELETE FROM t;"),
            (5, 23),
            "no parameters before",
        );
    }

    #[test]
    fn bytes_that_are_no_text_are_refused_where_they_are() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("p.sql");
        std::fs::write(&path, b"-- projection: p\n-- \xc3\xbc\xff").unwrap();
        assert_eq!(SqlProjection::load(&path).unwrap_err().place(), Some((2, 5)));
        assert_refused("-- projection: p\n-- é\0", (2, 5), "character of value 0");
        std::fs::write(&path, vec![b' '; BYTES_MAX + 1]).unwrap();
        let too_large = |error| matches!(error, SqlProjectionError::TooLarge { bytes_max: BYTES_MAX });
        assert!(too_large(SqlProjection::load(&path).unwrap_err()));
        assert!(too_large(refusal(&" ".repeat(BYTES_MAX + 1))));
        assert!(matches!(SqlProjection::load(directory.path().join("none.sql")), Err(SqlProjectionError::Read(_))));
    }

    /// Each of them is as large as a file can be, and made to take long or to go deep.
    #[test]
    fn a_large_and_hostile_file_is_refused_in_time() {
        let until = std::time::Instant::now() + Duration::from_secs(30);
        let fill = |before: &str, part: &str, after: &str| {
            let head = format!("{HEAD}{TABLE}-- on k.E\n{before}");
            let times = (BYTES_MAX - head.len() - after.len()) / part.len();
            format!("{head}{}{after}", part.repeat(times))
        };
        for text in [
            fill("UPDATE t SET a = ", "(", ";"),
            fill("UPDATE t SET a = (", "b,", ",);"),
            fill("UPDATE t SET a = 1", "+1", ";"),
            fill("UPDATE t SET a = ", "-", "1;"),
            fill("INSERT INTO t VALUES (1, 2)", ",(1,2)", ",;"),
            fill("DELETE FROM t;", ";", "x;"),
            fill("", "DELETE FROM t;\n", "x;"),
            fill("DELETE FROM t WHERE a = ", ":data||", ":date;"),
            fill("DELETE FROM t;", "\n--x: y", "\nx;"),
            fill("DELETE FROM t;\n-- on ", "k.E,", "x"),
            fill("DELETE FROM t;\n-- on ", "k.\"", "x"),
            fill("DELETE FROM t;", "/*", ""),
            fill("DELETE FROM t WHERE ", "a", ";"),
            "CREATE TRIGGER g;".repeat(50_000),
        ] {
            let error = refusal(&text);
            assert!(
                error.to_string().len() < BYTES_MAX + 1000 && std::time::Instant::now() < until,
                "{:?}",
                error.place()
            );
        }
    }

    #[test]
    fn data_without_a_json_form_is_an_error_without_the_data() {
        let projection = SqlProjection::parse(&format!(
            "{HEAD}{TABLE}-- on k.E\nINSERT INTO t VALUES (1, :data);\n-- on k.F\nDELETE FROM t;"
        ))
        .unwrap();
        let mut model = model(&projection);
        let mut bad = event("k", "secret-id", "E", 12, &Value::Null);
        // A map whose key is a number; an extension type.
        for data in [vec![0x81, 0xcd, 0x12, 0x67, 0xc3], vec![0xd4, 0x01, 0x02]] {
            bad.event.data = data;
            let error = apply(&projection, &mut model, std::slice::from_ref(&bad)).unwrap_err();
            assert_eq!(
                error.to_string(),
                "event E of k at version 12 has data without a JSON form, so that there is no `:data`"
            );
        }
        // Where nobody asks for it, it does not matter.
        bad.event.name = "F".to_owned();
        apply(&projection, &mut model, &[bad]).unwrap();
    }

    /// Whoever runs projections has to tell a full disk from an event that cannot be applied, and logs what SQLite says.
    #[test]
    fn an_error_of_sqlite_while_applying_is_passed_on_and_names_no_value() {
        let projection = SqlProjection::parse(&format!(
            "{HEAD}CREATE TABLE t (a TEXT UNIQUE, b INTEGER CHECK (b < 10), c INTEGER NOT NULL, d TEXT PRIMARY KEY) STRICT;
             CREATE UNIQUE INDEX ta ON t (a || 'x');
             -- on k.E
             INSERT INTO t VALUES (:data ->> 'a', :data ->> 'b', :data ->> 'c', :data ->> 'a');
             -- on k.F
             INSERT INTO t VALUES (:event, json_extract(:entity, '$.x'), 1, 1);"
        ))
        .unwrap();
        let mut model = model(&projection);
        let of = |data: Value| event("k", "secret", "E", 1, &data);
        apply(&projection, &mut model, &[of(json!({"a": "secret", "b": 1, "c": 1}))]).unwrap();
        for (event, words) in [
            (of(json!({"a": "secret", "b": 1, "c": 1})), "UNIQUE constraint failed: "),
            (of(json!({"a": "other", "b": 4711, "c": 1})), "CHECK constraint failed: b < 10"),
            (of(json!({"a": "other", "b": 1})), "NOT NULL constraint failed: t.c"),
            (of(json!({"a": "other", "b": "secret", "c": 1})), "cannot store TEXT value in INTEGER column t.b"),
            (event("k", "secret", "F", 1, &Value::Null), "malformed JSON"),
        ] {
            let error = apply(&projection, &mut model, &[event]).unwrap_err();
            let said = error.to_string();
            assert!(said.contains(words) && !said.contains("secret") && !said.contains("4711"), "{said}");
            let error = error.downcast_ref::<rusqlite::Error>().unwrap();
            assert!(error.sqlite_error_code().is_some() && !crate::projection::is_passing(error), "{error:?}");
        }
        model.0.pragma_update(None, "max_page_count", 5).unwrap();
        let large = of(json!({"a": "x".repeat(100_000), "b": 1, "c": 1}));
        let error = apply(&projection, &mut model, &[large]).unwrap_err();
        assert!(crate::projection::is_passing(error.downcast_ref().unwrap()), "{error}");
    }

    #[test]
    fn a_directory_is_read_in_order_and_each_file_is_judged_alone() {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(directory.path().join(name), text).unwrap();
        let second = format!("{HEAD}{TABLE}-- on k.E\nDELETE FROM t;");
        write("c.sql", CARRIERS);
        write("b.sql", &second);
        write("d.sql", &second);
        write("a.sql", "nonsense");
        write(".e.sql", "nonsense");
        write("notes.txt", "nonsense");
        std::fs::create_dir(directory.path().join("f.sql")).unwrap();
        let loaded = SqlProjection::load_directory(directory.path()).unwrap();
        let names: Vec<_> = loaded.iter().map(|(path, _)| path.file_name().unwrap().to_str().unwrap()).collect();
        assert_eq!(names, ["a.sql", "b.sql", "c.sql", "d.sql"]);
        let results: Vec<_> = loaded.iter().map(|(_, result)| result.as_ref()).collect();
        assert!(matches!(results[0], Err(SqlProjectionError::Layout { .. })));
        assert!(results[1].is_ok_and(|p| p.name == "p") && results[2].is_ok_and(|p| p.name == "carriers"));
        let Err(SqlProjectionError::SameName { name, first }) = results[3] else { panic!("{:?}", results[3]) };
        assert_eq!((name.as_str(), first), ("p", &loaded[1].0));
        assert!(SqlProjection::load_directory(directory.path().join("none")).is_err());
    }

    /// Pieces of which files are made, so that arbitrary ones get far.
    fn pieces() -> impl Strategy<Value = String> {
        let piece = prop_oneof![
            prop::sample::select(vec![
                "-- projection: p\n",
                "-- version: 1\n",
                "-- erasure: none (x)\n",
                "-- erasure: column t.a\n",
                "-- erasure: block\n",
                "CREATE TABLE t (a, b);\n",
                "CREATE VIEW v AS SELECT * FROM t;\n",
                "-- on k.E\n",
                "-- on k.*, k.\"x y\"\n",
                "-- on $erased\n",
                "DELETE FROM t WHERE a = :entity;\n",
                "INSERT INTO t VALUES (:data ->> 'x', :version);\n",
                "CREATE TRIGGER g AFTER INSERT ON t BEGIN DELETE FROM t; END;",
                "/*",
                "*/",
                "--",
                "\n",
                ";",
                "'",
                "\"",
                "`",
                "[",
                "]",
                "(",
                ")",
                ":",
                "?",
                "$",
                "é",
                "\u{feff}",
                "\r\n",
                "\0",
                "RAISE(",
                "strftime(",
                "BEGIN",
                "END",
                ",",
                ".",
                "RETURNING *",
            ])
            .prop_map(str::to_owned),
            "[ -~\n]{0,12}",
            any::<String>(),
        ];
        prop::collection::vec(piece, 0..24).prop_map(|pieces| pieces.concat())
    }

    fn assert_place_is_in(text: &str, parsed: Result<SqlProjection, SqlProjectionError>) -> Result<(), TestCaseError> {
        let Err(error) = parsed else { return Ok(()) };
        let Some((line, column)) = error.place() else { return Ok(()) };
        let length = text.split('\n').nth(line - 1).map(|line| line.chars().count());
        prop_assert!(column >= 1 && length.is_some_and(|length| column <= length + 1), "{}\n{:?}", error, text);
        Ok(())
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics_and_errors_are_within_it(text in pieces()) {
            assert_place_is_in(&text, SqlProjection::parse(&text))?;
        }

        /// Bytes, not text: they are put into a file.
        #[test]
        fn arbitrary_bytes_in_a_valid_file_give_errors_within_it(
            at in 0..BUSIEST.len(), length in 0_usize..40, bytes in prop::collection::vec(any::<u8>(), 0..8), ascii in "[ -~\n]{0,4}"
        ) {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("p.sql");
            let end = (at + length).min(BUSIEST.len());
            for put in [bytes.as_slice(), ascii.as_bytes()] {
                let file = [&BUSIEST.as_bytes()[..at], put, &BUSIEST.as_bytes()[end..]].concat();
                std::fs::write(&path, &file).unwrap();
                assert_place_is_in(&String::from_utf8_lossy(&file), SqlProjection::load(&path))?;
            }
        }

        /// What is taken is applied, whatever the event.
        #[test]
        fn what_is_taken_once_is_taken_again(text in pieces()) {
            if let Ok(projection) = SqlProjection::parse(&text) {
                let again = SqlProjection::parse(projection.source().unwrap()).unwrap();
                prop_assert_eq!(again.migrations(), projection.migrations());
                prop_assert_eq!(again.filter(), projection.filter());
            }
        }
    }

    #[test]
    fn it_can_be_shared_between_threads() {
        fn shared<T: Projection + Clone>() {}
        shared::<SqlProjection>();
        let _: Arc<dyn Projection> = Arc::new(CARRIERS.parse::<SqlProjection>().unwrap());
    }
}
