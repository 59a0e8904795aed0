//! Projections: event streams turned into SQL read models.
//!
//! ```text
//!            ┌─ building ──caught up──► serving ──a newer one is served──► previous ──a still newer one──► deleted
//! events ──► │      each a file of its own: tables of the projection, and the checkpoint of what is in them
//!            └─ a projection whose code fails on an event stands still there, and says so; the others go on
//! ```
//!
//! Invariants:
//! - The effects of an event on a model, and that it was applied, are one transaction: each event is applied exactly once.
//! - What is served was built from the first event on. Nobody ever sees half of a model.
//! - What of an erased entity stands in a model is found by a rule that is kept in the model's file, so that no code is needed to erase.

use std::sync::Arc;

use kuma_shard::{
    EntityHash, Slot, quoted,
    rusqlite::{self, Transaction},
};
use serde::{Deserialize, Serialize};

use crate::{Filter, RecordedEvent};

/// A stored event and where it stands.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredEvent {
    /// The slot of its entity.
    pub slot: Slot,
    /// The place of its commit in that slot's log. Without gaps, and shared by the events of one commit.
    pub seq: u64,
    /// The kind of its entity.
    pub kind: Arc<str>,
    /// The id of its entity.
    pub id: Arc<str>,
    /// The keyed hash by which the entity is called once it is erased. Keep it beside whatever you keep of the entity.
    pub entity: EntityHash,
    /// Which life of the entity: 1, and one more after each erasure.
    pub life: u32,
    /// The event.
    pub event: RecordedEvent,
}

/// What goes wrong while an event is applied. The whole batch is taken back then, and the projection stands still at the event.
pub type ApplyError = Box<dyn std::error::Error + Send + Sync>;

/// How what a model holds of an entity is found when the entity is erased. Kept in the model's file when it is made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "rule", rename_all = "snake_case")]
pub enum ErasureRule {
    /// Rows of these tables whose column is the entity's id are deleted.
    Columns {
        /// Table and column.
        columns: Vec<(String, String)>,
    },
    /// These statements are executed, with the parameters `:entity` (the id), `:kind` and `:hash` (the keyed hash, in hex).
    Statements {
        /// SQL.
        sql: String,
    },
    /// The model holds nothing personal.
    None {
        /// Why that is so. Empty is refused.
        reason: String,
    },
}

impl ErasureRule {
    /// Rows of `table` whose `column` is the entity's id are deleted.
    pub fn column(table: impl Into<String>, column: impl Into<String>) -> Self {
        ErasureRule::Columns { columns: vec![(table.into(), column.into())] }
    }

    /// These statements are executed, with the parameters `:entity` (the id), `:kind` and `:hash`.
    pub fn statements(sql: impl Into<String>) -> Self {
        ErasureRule::Statements { sql: sql.into() }
    }

    /// The model holds nothing personal, because of `reason`.
    pub fn none(reason: impl Into<String>) -> Self {
        ErasureRule::None { reason: reason.into() }
    }

    /// The statements that purge an entity.
    pub(crate) fn sql(&self) -> String {
        match self {
            ErasureRule::Columns { columns } => {
                let delete = |(table, column): &(String, String)| {
                    format!("DELETE FROM {} WHERE {} = :entity;\n", quoted(table), quoted(column))
                };
                columns.iter().map(delete).collect()
            }
            ErasureRule::Statements { sql } => sql.clone(),
            ErasureRule::None { .. } => String::new(),
        }
    }
}

/// How events become a SQL read model.
///
/// Whatever [`Projection::apply`] does to the model must follow from the model and the event alone: no clock, no randomness, nothing outside.
/// Then a model can be built again at any time, and is the same.
pub trait Projection: Send + Sync + 'static {
    /// The name: lower-case letters, digits and `_`, at most 64, a letter first.
    fn name(&self) -> &str;

    /// Raise it when events are to be applied differently, or to other tables: a new model is built beside the old one and takes its place when
    /// it has caught up.
    fn version(&self) -> u32;

    /// Which events are applied.
    fn filter(&self) -> Filter;

    /// How what the model holds of an entity is found when that is erased.
    fn erasure(&self) -> ErasureRule;

    /// SQL scripts that make the model's tables, executed in this order, each once for each model. Scripts can be added at the end, to add
    /// an index say; to change one that was executed, raise the version.
    fn migrations(&self) -> Vec<String>;

    /// Applies an event in the transaction that also notes that it was applied. It may read and write the model's tables, nothing else.
    ///
    /// Called event by event for a batch (what came while the batch before was being applied, at most some 16,000 events), on a thread where it may block. While
    /// it does, the projection does not pause, purge or close: an erasure, and a shutdown, wait for it. A panic is a failure like any other.
    ///
    /// # Errors
    /// The projection stands still at this event until it is told to go on.
    fn apply(&self, model: &Transaction<'_>, event: &StoredEvent) -> Result<(), ApplyError>;

    /// The text that the projection was made from, if there is such a text: a model of an older version can be fed on with it alone.
    fn source(&self) -> Option<&str> {
        None
    }
}

/// Whether this can be the name of a projection or a subscription: it names a file.
pub(crate) fn is_name(name: &str) -> bool {
    let mut bytes = name.bytes();
    let others = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
    name.len() <= 64 && bytes.next().is_some_and(|first| first.is_ascii_lowercase()) && bytes.all(others)
}

/// Whether it is worth trying again by itself: nothing is wrong with the event.
pub(crate) fn is_passing(error: &rusqlite::Error) -> bool {
    use rusqlite::ErrorCode::{DatabaseBusy, DatabaseLocked, DiskFull, OutOfMemory, SystemIoFailure};
    matches!(error.sqlite_error_code(), Some(DatabaseBusy | DatabaseLocked | DiskFull | OutOfMemory | SystemIoFailure))
}
