//! Queries of a read model, and how current their answers are.

use std::{
    path::PathBuf,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use base64::{Engine, prelude::BASE64_STANDARD};
use kuma_shard::{
    FileOptions, ModelReader, QueryAnswer, QueryError, QueryLimits, QueryParameters,
    rusqlite::{
        ToSql,
        types::{ToSqlOutput, Value},
    },
};
use parking_lot::Mutex;
use tokio::sync::Semaphore;

use crate::{
    Kuma, ModelBuild, ProjectionError,
    projections::ProjectionHandle,
    projector::{ProjectorView, by_log},
    store::Inner,
};

/// Queries of one model that are answered at a time; the others wait.
const QUERIES_AT_ONCE: usize = 4;

/// How current an answer is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AsOf {
    /// The model that answered.
    pub model: ModelBuild,
    /// The age of the oldest event that was durable when it was answered and is not in the answer; zero if there is none. In a cluster: for how long
    /// the model has not had all that is known, or a node has been out of reach.
    pub lag: Duration,
    /// Commits that were durable when it was answered and are not in the answer, of whatever kind; in a cluster as of a moment before.
    pub commits_behind: u64,
}

/// What a query of a read model answered.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// The names of the columns.
    pub columns: Vec<String>,
    /// The rows.
    pub rows: Vec<Vec<Value>>,
    /// Whether there would have been more: the rows end where their number or their bytes reached what the query may have. At least one row is given.
    pub truncated: bool,
    /// How current it is.
    pub as_of: AsOf,
}

impl Answer {
    /// The rows as a JSON array of objects. Binary values become base64, of columns of the same name the last one counts.
    pub fn json(&self) -> serde_json::Value {
        let row = |row: &Vec<Value>| self.columns.iter().cloned().zip(row.iter().cloned().map(json)).collect();
        serde_json::Value::Array(self.rows.iter().map(row).map(serde_json::Value::Object).collect())
    }
}

/// A value as JSON has it; binary ones in base64.
pub(crate) fn json(value: Value) -> serde_json::Value {
    match value {
        Value::Null => serde_json::Value::Null,
        Value::Integer(integer) => integer.into(),
        Value::Real(real) => real.into(),
        Value::Text(text) => text.into(),
        Value::Blob(blob) => BASE64_STANDARD.encode(blob).into(),
    }
}

/// A model that is served.
pub(crate) struct ServedModel {
    pub(crate) build: ModelBuild,
    path: PathBuf,
    options: FileOptions,
    idle: Mutex<Vec<ModelReader>>,
    turns: Semaphore,
}

impl ServedModel {
    pub(crate) fn new(build: ModelBuild, path: PathBuf, options: FileOptions) -> Self {
        ServedModel { build, path, options, idle: Mutex::default(), turns: Semaphore::new(QUERIES_AT_ONCE) }
    }

    fn answer(
        &self,
        sql: &str,
        parameters: &QueryParameters,
        limits: &QueryLimits,
        given_up: Arc<AtomicBool>,
    ) -> Result<QueryAnswer, QueryError> {
        let idle = self.idle.lock().pop();
        let reader = match idle {
            Some(reader) => reader,
            None => ModelReader::open(&self.path, &self.options)?,
        };
        let answer = reader.query(sql, parameters, limits, given_up);
        let mut idle = self.idle.lock();
        if idle.len() < QUERIES_AT_ONCE {
            idle.push(reader);
        }
        answer
    }

    /// Closes connections that nobody uses: they would be in the way of a log that is to be cut, or of a file that is to go.
    pub(crate) fn close_idle(&self) {
        self.idle.lock().clear();
    }
}

/// A query that is being put together, see [`ProjectionHandle::query`].
#[must_use = "nothing is asked until it is run"]
pub struct Query<'a> {
    projection: &'a ProjectionHandle,
    sql: String,
    positional: Vec<Value>,
    named: Vec<(String, Value)>,
    /// Why a value cannot be one.
    unfit: Option<String>,
    limits: QueryLimits,
}

impl<'a> Query<'a> {
    pub(crate) fn new(projection: &'a ProjectionHandle, sql: String) -> Self {
        let limits = QueryLimits { time: Duration::from_secs(5), rows: 10_000, bytes: 16 << 20 };
        Query { projection, sql, positional: Vec::new(), named: Vec::new(), unfit: None, limits }
    }

    /// The value of the next `?`.
    pub fn bind(mut self, value: impl ToSql) -> Self {
        let value = self.owned(&value);
        self.positional.push(value);
        self
    }

    /// The value of `:name`.
    pub fn bind_named(mut self, name: impl Into<String>, value: impl ToSql) -> Self {
        let value = self.owned(&value);
        self.named.push((name.into(), value));
        self
    }

    fn owned(&mut self, value: &impl ToSql) -> Value {
        match value.to_sql() {
            Ok(ToSqlOutput::Owned(value)) => value,
            Ok(ToSqlOutput::Borrowed(value)) => value.try_into().unwrap_or(Value::Null),
            // Without extensions there is no other; an error is told when the query is run.
            Ok(_) => Value::Null,
            Err(error) => {
                self.unfit.get_or_insert_with(|| error.to_string());
                Value::Null
            }
        }
    }

    /// How long it may take. Default: 5 s.
    pub fn time_max(mut self, time: Duration) -> Self {
        self.limits.time = time;
        self
    }

    /// How many rows it may answer with; the answer says if there would have been more. Default: 10,000.
    pub fn rows_max(mut self, rows: usize) -> Self {
        self.limits.rows = rows;
        self
    }

    /// How many bytes of values it may answer with; the answer says if there would have been more. Default: 16 MiB.
    pub fn bytes_max(mut self, bytes: usize) -> Self {
        self.limits.bytes = bytes;
        self
    }

    /// Asks.
    ///
    /// # Errors
    /// [`ProjectionError::NotReady`] while the first model is being built, [`ProjectionError::Query`] if the query cannot be answered.
    /// # Cancel safety
    /// Cancel safe: a query whose future is dropped is stopped.
    pub async fn run(self) -> Result<Answer, ProjectionError> {
        let Query { projection, sql, positional, named, unfit, limits } = self;
        if let Some(why) = unfit {
            return Err(QueryError::Parameters(why).into());
        }
        let store = projection.store()?;
        let Some(model) = projection.served() else { return Err(projection.not_ready()) };
        let parameters = match named.is_empty() {
            true => QueryParameters::Positional(positional),
            false if positional.is_empty() => QueryParameters::Named(named),
            false => {
                let mixed = "some are named and some are not".to_owned();
                return Err(QueryError::Parameters(mixed).into());
            }
        };
        let turn = tokio::time::timeout(limits.time, model.turns.acquire());
        let Ok(Ok(_turn)) = turn.await else { return Err(QueryError::TooLong(limits.time).into()) };
        let given_up = GivenUp::default();
        let (asked, watched) = (model.clone(), given_up.0.clone());
        let answer = tokio::task::spawn_blocking(move || asked.answer(&sql, &parameters, &limits, watched));
        let answer = answer.await.map_err(|_| ProjectionError::ShuttingDown)??;
        let QueryAnswer { columns, rows, truncated, positions } = answer;
        let (commits_behind, lag) = match projection.serving_view() {
            // Where other nodes' logs end now it would have to ask them.
            Some(view) if store.is_clustered() => view.wide_lag(),
            _ => lag_behind(&store, &by_log(positions, projection.shards())).await,
        };
        Ok(Answer { columns, rows, truncated, as_of: AsOf { model: model.build, lag, commits_behind } })
    }
}

/// Stops the query when it is dropped.
#[derive(Default)]
struct GivenUp(Arc<AtomicBool>);

impl Drop for GivenUp {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

/// How many commits a model is behind, and for how long.
pub(crate) async fn lag(store: &Arc<Inner>, view: &ProjectorView) -> (u64, Duration) {
    if store.is_clustered() {
        return view.wide_lag();
    }
    let positions = view.positions.borrow().clone();
    lag_behind(store, &positions).await
}

/// How many commits are behind these positions of this store's shards, and how old the oldest of them is.
pub(crate) async fn lag_behind(store: &Arc<Inner>, positions: &[u64]) -> (u64, Duration) {
    let kuma = Kuma { inner: store.clone() };
    let (mut behind, mut oldest_us) = (0, i64::MAX);
    for ((_, core), position) in kuma.open_shards().zip(positions) {
        let Ok(core) = core else { continue };
        let left = core.shard.end().borrow().saturating_sub(*position);
        behind += left;
        // What cannot be read is not known to be older.
        if left > 0
            && let Ok(Some(at_us)) = core.shard.time_behind(*position).await
        {
            oldest_us = oldest_us.min(at_us);
        }
    }
    let age_us = store.now_us().saturating_sub(oldest_us).max(0);
    (behind, if behind == 0 { Duration::ZERO } else { Duration::from_micros(age_us.unsigned_abs()) })
}

/// The store, unless it is gone.
pub(crate) fn open(store: &Weak<Inner>) -> Result<Arc<Inner>, ProjectionError> {
    store.upgrade().filter(|inner| !inner.is_closing()).ok_or(ProjectionError::ShuttingDown)
}
