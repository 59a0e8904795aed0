//! Snapshots: saved state, so that a long history need not be replayed.
//!
//! ```text
//! sealed: [first version of the newest commit in it, u64 little-endian][state, MessagePack]
//! ```
//!
//! Invariants:
//! - A snapshot is never needed. One that does not fit (another kind, state schema, key, a damaged byte, a log that does not hold the
//!   commit it ends with) is ignored, counted and made anew; it cannot make an entity unloadable.
//! - It is only ever made of durable state.

use std::panic::{AssertUnwindSafe, catch_unwind};

use kuma_crypto::{IdHash, KeyId, SnapshotPlace, open_snapshot, seal_snapshot};
use kuma_shard::SnapshotRow;
use xxhash_rust::xxh3::xxh3_64;

use crate::{
    Entity,
    kind::{Kind, State},
    live::Durable,
    replay::Opener,
    state_shape,
};

/// A larger state is not saved: it would cost the writer more than its replay costs a reader.
pub(crate) const SNAPSHOT_BYTES_MAX: usize = 64 << 20;
/// What replaying one commit costs, in bytes of body: rows are read, verified and opened one by one.
const COMMIT_COST_BYTES: u64 = 512;
/// The schema of documents: RFC 7396 does not change.
pub(crate) const DOCUMENT_SCHEMA: u64 = 1;
/// The schema of kinds of which nothing is folded.
pub(crate) const LOG_SCHEMA: u64 = 2;

/// How much has to be replayed before a snapshot is worth its while.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SnapshotPolicy {
    pub(crate) commits: u64,
    pub(crate) bytes: u64,
}

/// What would have to be replayed on top of the newest snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ReplayCost {
    pub(crate) commits: u32,
    pub(crate) bytes: u64,
}

impl ReplayCost {
    pub(crate) fn add(&mut self, body_bytes: usize) {
        self.commits = self.commits.saturating_add(1);
        self.bytes += body_bytes as u64;
    }

    /// Whether to make a snapshot now. A large state is saved less often: what is written stays within the size of what was
    /// appended.
    pub(crate) fn is_due(&self, policy: &SnapshotPolicy, snapshot_bytes: usize) -> bool {
        let commits = u64::from(self.commits);
        let long = commits >= policy.commits || self.bytes >= policy.bytes;
        long && self.bytes + commits * COMMIT_COST_BYTES >= snapshot_bytes as u64
    }
}

/// Names the shape of a kind's state: its kind, both schema versions, what its default value has, and what its `Deserialize` asks for.
/// None if that cannot be told.
pub(crate) fn state_schema<E: Entity>() -> Option<u64> {
    // The user's `Default` and `Serialize`.
    let value = catch_unwind(AssertUnwindSafe(|| serde_json::to_value(E::default()))).ok()?.ok()?;
    let mut shape = format!("kuma state 1\n{}\n{}\n{}\n", E::KIND, E::SCHEMA, E::STATE_SCHEMA);
    describe(&value, &mut shape);
    shape.push('\n');
    shape.push_str(&state_shape::describe::<E>());
    Some(xxh3_64(shape.as_bytes()))
}

fn describe(value: &serde_json::Value, shape: &mut String) {
    use serde_json::Value;
    match value {
        Value::Null => shape.push('0'),
        Value::Bool(_) => shape.push('b'),
        Value::Number(number) => shape.push(if number.is_f64() { 'f' } else { 'i' }),
        Value::String(_) => shape.push('s'),
        Value::Array(items) => {
            shape.push('[');
            items.iter().for_each(|item| describe(item, shape));
            shape.push(']');
        }
        Value::Object(fields) => {
            // In the order of names, whatever order the map keeps.
            let mut fields: Vec<_> = fields.iter().collect();
            fields.sort_unstable_by_key(|(name, _)| *name);
            shape.push('{');
            for (name, value) in fields {
                shape.push_str(&format!("{name:?}:"));
                describe(value, shape);
            }
            shape.push('}');
        }
    }
}

/// A state that a snapshot held.
pub(crate) struct Restored {
    pub(crate) state: State,
    pub(crate) version: u64,
    /// The first version of the commit that it ends with.
    pub(crate) last_first: u64,
    pub(crate) bytes: usize,
}

/// Saves and seals durable state. None, with the reason, if it cannot be saved.
pub(crate) fn seal(
    kind: &dyn Kind,
    opener: &Opener,
    durable: &Durable,
    last_first: u64,
) -> Result<SnapshotRow, &'static str> {
    let schema = kind.state_schema().ok_or("its default state cannot be serialized")?;
    let saved = catch_unwind(AssertUnwindSafe(|| kind.save(&durable.state))).map_err(|_| "its `Serialize` panicked")?;
    let saved = saved.map_err(|_| "its state cannot be serialized")?;
    if saved.len() > SNAPSHOT_BYTES_MAX {
        return Err("its state is larger than 64 MiB");
    }
    // What cannot be read back would be ignored at every activation, and made again.
    let restored = catch_unwind(AssertUnwindSafe(|| kind.restore(&saved).is_ok()));
    if !restored.unwrap_or(false) {
        return Err("its saved state cannot be read back");
    }
    let version = durable.version.0;
    let plaintext = [last_first.to_le_bytes().as_slice(), &saved].concat();
    let body = seal_snapshot(&opener.key, &place(opener, version, schema), &plaintext);
    Ok(SnapshotRow { eid: opener.row.eid, version, schema, body })
}

/// Opens and restores a snapshot, if it fits.
pub(crate) fn open(kind: &dyn Kind, opener: &Opener, row: &SnapshotRow) -> Result<Restored, Misfit> {
    let schema = kind.state_schema().filter(|schema| *schema == row.schema).ok_or(Misfit::Schema)?;
    let place = place(opener, row.version, schema);
    let plaintext = open_snapshot(&opener.key, &place, &row.body).map_err(|_| Misfit::Damaged)?;
    let (last_first, state) = plaintext.split_first_chunk().ok_or(Misfit::Damaged)?;
    let restored = catch_unwind(AssertUnwindSafe(|| kind.restore(state)));
    let state = restored.ok().and_then(Result::ok).ok_or(Misfit::Undecodable)?;
    Ok(Restored { state, version: row.version, last_first: u64::from_le_bytes(*last_first), bytes: row.body.len() })
}

/// Why a snapshot was ignored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Misfit {
    /// Other code made it.
    Schema,
    /// It does not open.
    Damaged,
    /// The state's `Deserialize` refuses it.
    Undecodable,
    /// The log does not hold the commit that it ends with.
    NotInLog,
    /// It could not be read.
    Unreadable,
}

impl Misfit {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Misfit::Schema => "schema",
            Misfit::Damaged => "damaged",
            Misfit::Undecodable => "undecodable",
            Misfit::NotInLog => "not_in_log",
            Misfit::Unreadable => "unreadable",
        }
    }
}

fn place(opener: &Opener, version: u64, schema: u64) -> SnapshotPlace<'_> {
    let row = &opener.row;
    SnapshotPlace { kind: &row.kind, id_hash: IdHash(row.id_hash.0), version, schema, key_id: KeyId(row.key_id) }
}

#[cfg(test)]
mod tests {
    use serde::{Deserialize, Serialize};

    use super::*;

    const POLICY: SnapshotPolicy = SnapshotPolicy { commits: 4, bytes: 1000 };

    #[test]
    fn a_snapshot_is_due_by_commits_or_bytes_and_not_more_often_than_its_size_is_worth() {
        let is_due = |commits, bytes, snapshot_bytes| ReplayCost { commits, bytes }.is_due(&POLICY, snapshot_bytes);
        assert!(!is_due(3, 999, 0));
        assert!(is_due(4, 0, 0));
        assert!(is_due(1, 1000, 0));
        assert!(!is_due(4, 100, 10_000));
        assert!(is_due(4, 10_000, 10_000));
    }

    macro_rules! state {
        ($name:ident, $schema:expr, { $($field:ident: $type:ty),* }) => {
            #[derive(Default, Clone, Serialize, Deserialize)]
            struct $name { $($field: $type),* }
            impl Entity for $name {
                const KIND: &'static str = "state";
                const STATE_SCHEMA: u32 = $schema;
                type Event = ();
                fn apply(&mut self, (): &()) {}
            }
        };
    }

    state!(Base, 1, { balance: i64, name: String });
    state!(Reordered, 1, { name: String, balance: i64 });
    state!(Smaller, 1, { balance: u8, name: String });
    state!(Renamed, 1, { amount: i64, name: String });
    state!(Retyped, 1, { balance: f64, name: String });
    state!(More, 1, { balance: i64, name: String, open: bool });
    state!(Raised, 2, { balance: i64, name: String });

    #[test]
    fn a_change_of_the_states_fields_changes_its_schema() {
        let base = state_schema::<Base>();
        assert!(base.is_some());
        let others = [
            state_schema::<Reordered>(),
            state_schema::<Smaller>(),
            state_schema::<Renamed>(),
            state_schema::<Retyped>(),
            state_schema::<More>(),
            state_schema::<Raised>(),
        ];
        assert!(others.iter().all(|other| other.is_some() && *other != base));
    }

    #[derive(Default, Clone, Serialize, Deserialize)]
    struct Line {
        count: u32,
    }

    #[derive(Default, Clone, Serialize, Deserialize)]
    struct PricedLine {
        count: u32,
        #[serde(default)]
        price: i64,
    }

    state!(Lines, 1, { lines: Vec<Line> });
    state!(PricedLines, 1, { lines: Vec<PricedLine> });

    /// A replay would compute the price, a snapshot would have its default.
    #[test]
    fn a_new_field_within_an_empty_list_changes_the_states_schema() {
        assert_ne!(state_schema::<Lines>(), state_schema::<PricedLines>());
    }

    /// Snapshots that are stored are found to fit by this number.
    #[test]
    fn the_state_schema_is_pinned() {
        assert_eq!(state_schema::<Base>(), Some(16_067_100_701_137_678_271));
    }
}
