//! Queries of a read model.
//!
//! Invariants:
//! - They only read: the file is opened for reading, and SQLite is asked about each statement ([`Rights::Read`]).
//! - A query ends: by its time, by its rows or by its bytes.
//! - What it answers and how far the model had read are of the same moment.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use rusqlite::{Connection, OpenFlags, ToSql, limits::Limit, types::Value};

use crate::{
    FileOptions, Guard, ModelError, Rights,
    model::{connect, positions},
};

/// SQLite asks whether to go on after so many of its instructions.
const INSTRUCTIONS_BETWEEN_LOOKS: i32 = 1000;
const CACHE_KIB: u32 = 8_000;
const SQL_BYTES_MAX: i32 = 100_000;

/// What a query may take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueryLimits {
    /// Time.
    pub time: Duration,
    /// Rows; more are not read.
    pub rows: usize,
    /// Bytes of all values; more are not read.
    pub bytes: usize,
}

/// The parameters of a query.
#[derive(Clone, Debug, PartialEq)]
pub enum QueryParameters {
    /// `?` and `?1`, in order.
    Positional(Vec<Value>),
    /// `:name`, `@name` and `$name`; with or without the sign.
    Named(Vec<(String, Value)>),
}

/// What a query answered.
#[derive(Clone, Debug, PartialEq)]
pub struct QueryAnswer {
    /// The names of the columns.
    pub columns: Vec<String>,
    /// The rows.
    pub rows: Vec<Vec<Value>>,
    /// Whether there would have been more.
    pub truncated: bool,
    /// Of each shard up to which position everything was applied, as of the answer.
    pub positions: Vec<(u16, u64)>,
}

/// Why a query has no answer. Nothing was changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QueryError {
    /// It took too long.
    #[error("the query took longer than {0:?} and was stopped; ask for less, or add an index")]
    TooLong(Duration),
    /// It was given up.
    #[error("the query was given up")]
    Cancelled,
    /// It is more than one statement, or none.
    #[error("a query is one SELECT statement, no more and no less")]
    NotOne,
    /// It would write, or do something else that a query may not.
    #[error("a query only reads the tables of its model: {0}")]
    NotAllowed(String),
    /// Its parameters do not fit.
    #[error("the parameters do not fit the query: {0}")]
    Parameters(String),
    /// It is no SQL, or names what is not there.
    #[error("the query is not understood{}: {message}", at(*.offset))]
    Sql {
        /// What SQLite says.
        message: String,
        /// At which byte of the query, if SQLite says so.
        offset: Option<usize>,
    },
    /// The file cannot be read.
    #[error(transparent)]
    Model(#[from] ModelError),
}

fn at(offset: Option<usize>) -> String {
    offset.map_or_else(String::new, |offset| format!(" at byte {offset}"))
}

/// A connection that answers queries.
pub struct ModelReader {
    path: PathBuf,
    connection: Connection,
    guard: Guard,
    watch: Arc<Mutex<Option<Watch>>>,
}

/// When a query is to end.
struct Watch {
    until: Instant,
    cancelled: Arc<AtomicBool>,
}

impl ModelReader {
    /// Opens the file for reading.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn open(path: &Path, options: &FileOptions) -> Result<Self, ModelError> {
        let open = || -> rusqlite::Result<ModelReader> {
            let connection = connect(path, options, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
            connection.execute_batch(&format!("PRAGMA query_only = ON; PRAGMA cache_size = -{CACHE_KIB};"))?;
            connection.set_limit(Limit::SQLITE_LIMIT_SQL_LENGTH, SQL_BYTES_MAX)?;
            connection.set_limit(Limit::SQLITE_LIMIT_ATTACHED, 0)?;
            let watch: Arc<Mutex<Option<Watch>>> = Arc::default();
            let looked_at = watch.clone();
            let is_over = move || {
                let watch = looked_at.lock();
                watch.as_ref().is_some_and(|watch| watch.cancelled.load(Relaxed) || Instant::now() >= watch.until)
            };
            connection.progress_handler(INSTRUCTIONS_BETWEEN_LOOKS, Some(is_over))?;
            let guard = Guard::over(&connection)?;
            Ok(ModelReader { path: path.to_owned(), connection, guard, watch })
        };
        open().map_err(|source| ModelError::Sqlite { path: path.to_owned(), source })
    }

    /// Answers a query, until `cancelled` is set.
    ///
    /// # Errors
    /// See [`QueryError`].
    pub fn query(
        &self,
        sql: &str,
        parameters: &QueryParameters,
        limits: &QueryLimits,
        cancelled: Arc<AtomicBool>,
    ) -> Result<QueryAnswer, QueryError> {
        let failed = |source| ModelError::Sqlite { path: self.path.clone(), source };
        if sql.len() > SQL_BYTES_MAX as usize {
            return Err(QueryError::Sql { message: format!("it has more than {SQL_BYTES_MAX} bytes"), offset: None });
        }
        *self.watch.lock() = Some(Watch { until: Instant::now() + limits.time, cancelled: cancelled.clone() });
        let read = self.connection.unchecked_transaction().map_err(failed)?;
        // The first read is what decides which moment the answer is of.
        let positions = positions(&read).map_err(failed)?;
        self.guard.set(Rights::Read);
        let answered = answer(&read, sql, parameters, limits);
        self.guard.set(Rights::Engine);
        *self.watch.lock() = None;
        drop(read);
        let (columns, rows, truncated) = answered.map_err(|error| match error {
            Unanswered::Sqlite(error) => match error.sqlite_error_code() {
                Some(rusqlite::ErrorCode::OperationInterrupted) if cancelled.load(Relaxed) => QueryError::Cancelled,
                Some(rusqlite::ErrorCode::OperationInterrupted) => QueryError::TooLong(limits.time),
                _ => self.explain(error),
            },
            Unanswered::Parameters(why) => QueryError::Parameters(why),
            Unanswered::NotOne => QueryError::NotOne,
        })?;
        let positions = positions.into_iter().map(|(shard, (position, _))| (shard, position)).collect();
        Ok(QueryAnswer { columns, rows, truncated, positions })
    }

    fn explain(&self, error: rusqlite::Error) -> QueryError {
        use rusqlite::ErrorCode::{AuthorizationForStatementDenied, DatabaseCorrupt, ReadOnly, SystemIoFailure};
        match error {
            rusqlite::Error::SqlInputError { error, msg, offset, .. } => match error.code {
                AuthorizationForStatementDenied => QueryError::NotAllowed(msg),
                _ => QueryError::Sql { message: msg, offset: usize::try_from(offset).ok() },
            },
            rusqlite::Error::MultipleStatement => QueryError::NotOne,
            error => match error.sqlite_error_code() {
                Some(AuthorizationForStatementDenied | ReadOnly) => QueryError::NotAllowed(error.to_string()),
                Some(DatabaseCorrupt | SystemIoFailure) => {
                    ModelError::Sqlite { path: self.path.clone(), source: error }.into()
                }
                _ => QueryError::Sql { message: error.to_string(), offset: None },
            },
        }
    }
}

enum Unanswered {
    Sqlite(rusqlite::Error),
    Parameters(String),
    NotOne,
}

impl From<rusqlite::Error> for Unanswered {
    fn from(error: rusqlite::Error) -> Self {
        Unanswered::Sqlite(error)
    }
}

type Table = (Vec<String>, Vec<Vec<Value>>, bool);

fn answer(
    connection: &Connection,
    sql: &str,
    parameters: &QueryParameters,
    limits: &QueryLimits,
) -> Result<Table, Unanswered> {
    let mut statement = connection.prepare(sql)?;
    if statement.column_count() == 0 {
        // A comment, or nothing at all; what writes was refused before.
        return Err(Unanswered::NotOne);
    }
    bind(&mut statement, parameters)?;
    let columns: Vec<String> = statement.column_names().into_iter().map(str::to_owned).collect();
    let mut found = statement.raw_query();
    let (mut rows, mut bytes) = (Vec::new(), 0);
    while let Some(row) = found.next()? {
        if rows.len() >= limits.rows || bytes >= limits.bytes {
            return Ok((columns, rows, true));
        }
        let values: Result<Vec<Value>, _> = (0..columns.len()).map(|column| row.get(column)).collect();
        let values = values?;
        bytes += values.iter().map(bytes_of).sum::<usize>();
        rows.push(values);
    }
    Ok((columns, rows, false))
}

fn bytes_of(value: &Value) -> usize {
    match value {
        Value::Text(text) => text.len() + 16,
        Value::Blob(blob) => blob.len() + 16,
        Value::Null | Value::Integer(_) | Value::Real(_) => 16,
    }
}

fn bind(statement: &mut rusqlite::Statement<'_>, parameters: &QueryParameters) -> Result<(), Unanswered> {
    let expected = statement.parameter_count();
    match parameters {
        QueryParameters::Positional(values) => {
            if values.len() != expected {
                let why = format!("it has {expected}, {} were given", values.len());
                return Err(Unanswered::Parameters(why));
            }
            for (value, index) in values.iter().zip(1..) {
                statement.raw_bind_parameter(index, value)?;
            }
        }
        QueryParameters::Named(values) => {
            let named = |name: &str, given: &str| name == given || name.get(1..) == Some(given);
            for index in 1..=expected {
                let name = statement.parameter_name(index).map(str::to_owned);
                let Some(name) = name else {
                    return Err(Unanswered::Parameters("one has no name, and names were given".to_owned()));
                };
                let Some((_, value)) = values.iter().find(|(given, _)| named(&name, given)) else {
                    return Err(Unanswered::Parameters(format!("{name} is missing")));
                };
                statement.raw_bind_parameter(index, value as &dyn ToSql)?;
            }
            let known: Vec<String> =
                (1..=expected).filter_map(|index| statement.parameter_name(index).map(str::to_owned)).collect();
            if let Some((name, _)) = values.iter().find(|(given, _)| !known.iter().any(|name| named(name, given))) {
                return Err(Unanswered::Parameters(format!("it has none that is called {name}")));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ModelFile, ModelProgress};

    const LIMITS: QueryLimits = QueryLimits { time: Duration::from_secs(5), rows: 100, bytes: 10_000 };

    fn model() -> (tempfile::TempDir, ModelReader) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("m.db");
        let mut file = ModelFile::create(&path, &FileOptions::default(), &[]).unwrap();
        file.migrate(&["CREATE TABLE t(a INTEGER, b TEXT) STRICT".to_owned()]).unwrap();
        let progress = ModelProgress { positions: [(1, (7, 3))].into(), ..ModelProgress::default() };
        file.apply(&progress, |model| model.execute_batch("INSERT INTO t VALUES (1, 'x'), (2, 'y'), (3, NULL)"))
            .unwrap()
            .unwrap();
        file.close().unwrap();
        let reader = ModelReader::open(&path, &FileOptions::default()).unwrap();
        (directory, reader)
    }

    fn ask(reader: &ModelReader, sql: &str, parameters: &QueryParameters) -> Result<QueryAnswer, QueryError> {
        reader.query(sql, parameters, &LIMITS, Arc::default())
    }

    fn none() -> QueryParameters {
        QueryParameters::Positional(Vec::new())
    }

    #[test]
    fn a_query_answers_with_rows_and_how_far_the_model_has_read() {
        let (_directory, reader) = model();
        let answer =
            ask(&reader, "SELECT a, b FROM t WHERE a > ? ORDER BY a", &QueryParameters::Positional(vec![1.into()]));
        let answer = answer.unwrap();
        assert_eq!(answer.columns, ["a", "b"]);
        assert_eq!(answer.rows, [vec![2.into(), "y".to_owned().into()], vec![3.into(), Value::Null]]);
        assert_eq!((answer.truncated, answer.positions), (false, vec![(1, 7)]));
        let named = QueryParameters::Named(vec![("a".to_owned(), 1.into())]);
        assert_eq!(ask(&reader, "SELECT count(*) FROM t WHERE a = :a", &named).unwrap().rows, [[1.into()]]);
    }

    #[test]
    fn a_query_that_does_not_end_is_ended() {
        let (_directory, reader) = model();
        let endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n";
        let limits = QueryLimits { time: Duration::from_millis(50), ..LIMITS };
        let stopped = reader.query(endless, &none(), &limits, Arc::default());
        assert!(matches!(stopped, Err(QueryError::TooLong(_))), "{stopped:?}");
        let stopped = reader.query(endless, &none(), &LIMITS, Arc::new(true.into()));
        assert!(matches!(stopped, Err(QueryError::Cancelled)), "{stopped:?}");
        // And the next one is answered.
        let rows = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n";
        let answer = ask(&reader, rows, &none()).unwrap();
        assert_eq!((answer.rows.len(), answer.truncated), (100, true));
        let answer = ask(&reader, "SELECT hex(zeroblob(9000)) FROM t", &none()).unwrap();
        assert_eq!((answer.rows.len(), answer.truncated), (1, true));
    }

    #[test]
    fn what_is_no_query_is_refused_and_said_why() {
        let (_directory, reader) = model();
        for write in ["DELETE FROM t", "DROP TABLE t", "PRAGMA query_only = OFF", "ATTACH 'x' AS y", "BEGIN"] {
            let refused = ask(&reader, write, &none());
            assert!(matches!(refused, Err(QueryError::NotAllowed(_))), "{write}: {refused:?}");
        }
        for odd in ["", "-- nothing", "SELECT 1; SELECT 2", "VACUUM"] {
            let refused = ask(&reader, odd, &none());
            assert!(matches!(refused, Err(QueryError::NotOne)), "{odd}: {refused:?}");
        }
        let refused = ask(&reader, "SELECT nothing FROM t", &none());
        assert!(matches!(refused, Err(QueryError::Sql { offset: Some(7), .. })), "{refused:?}");
        let one = QueryParameters::Named(vec![("c".to_owned(), 1.into())]);
        for (sql, parameters) in [("SELECT ?", &none()), ("SELECT :a", &one), ("SELECT 1", &one), ("SELECT ?", &one)] {
            let refused = ask(&reader, sql, parameters);
            assert!(matches!(refused, Err(QueryError::Parameters(_))), "{sql}: {refused:?}");
        }
    }
}
