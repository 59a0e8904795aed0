//! What goes over the wire as JSON: the bodies of requests and answers, for the server, its OpenAPI document, and the command line.
//!
//! Names are those of `docs/glossary.md`. Times are RFC 3339 in UTC; bare numbers carry their unit in their name. Fields that are
//! absent are left out, not `null`; unknown fields of a request are refused.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use crate::{
    api::document::{pairs, query_parameters},
    whole_number,
};

/// An event that is to be appended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewEventBody {
    /// What happened, "Deposited" say. 1 to 128 bytes.
    #[serde(rename = "type")]
    #[schema(min_length = 1, max_length = 128, example = "Deposited")]
    pub name: String,
    /// Any JSON value. By default it is merged into the entity's state (RFC 7396); without data an event changes nothing, as with `{}`. Integers
    /// have at most 64 bits.
    #[serde(default = "no_data")]
    #[schema(value_type = Value, required = false)]
    pub data: Value,
    /// The version of the data's shape.
    #[serde(default = "one", deserialize_with = "whole_number::required", skip_serializing_if = "is_one")]
    #[schema(value_type = Option<u32>, default = 1)]
    pub schema: u32,
}

fn no_data() -> Value {
    Value::Object(serde_json::Map::new())
}

fn one() -> u32 {
    1
}

fn is_one(schema: &u32) -> bool {
    *schema == 1
}

/// What is kept beside the events of an append, sealed with them; at most 64 KiB.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MetadataBody {
    /// Names the business transaction that the append is part of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub correlation: Option<String>,
    /// Names what caused the append.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub causation: Option<String>,
    /// Anything else: pairs of name and value.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(schema_with = pairs)]
    pub headers: Vec<(String, String)>,
}

/// Events that are appended as one: all of them or none. At most 4096 events and 4 MiB.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AppendBody {
    /// The events, in their order.
    #[schema(min_items = 1, max_items = 4096)]
    pub events: Vec<NewEventBody>,
    /// The append is refused unless the entity is at this version; 0 for one that has no events. The same as the header `If-Match`.
    #[serde(default, deserialize_with = "whole_number::optional", skip_serializing_if = "Option::is_none")]
    pub expected_version: Option<u64>,
    /// Kept beside the events.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<MetadataBody>,
}

/// A message of the stream `POST /v1/append`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StreamedAppend {
    /// The kind of the entity.
    #[schema(pattern = "^[A-Za-z][A-Za-z0-9_.-]{0,63}$", example = "account")]
    pub kind: String,
    /// Its id, 1 to 512 bytes.
    #[schema(min_length = 1, max_length = 512, example = "acc_001")]
    pub id: String,
    /// The idempotency key, unique within the entity: sent again, it happens once. 1 to 256 bytes.
    #[schema(min_length = 1, max_length = 256)]
    pub key: String,
    /// The events, all of them or none.
    #[schema(min_items = 1, max_items = 4096)]
    pub events: Vec<NewEventBody>,
    /// The append is refused unless the entity is at this version.
    #[serde(default, deserialize_with = "whole_number::optional", skip_serializing_if = "Option::is_none")]
    pub expected_version: Option<u64>,
    /// Kept beside the events.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<MetadataBody>,
}

/// What became of one message of the stream `POST /v1/append`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct StreamedOutcome {
    /// Which message of the stream, from 1. Outcomes come in the order of the messages.
    pub n: u64,
    /// The version that its last event made, if it was appended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<u64>,
    /// Whether an earlier append with the same key had appended it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub repeated: bool,
    /// Why it was not appended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<Problem>,
}

/// What an append did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Appended {
    /// The version that its last event made.
    pub version: u64,
    /// Whether it had been appended before, under the same idempotency key.
    pub repeated: bool,
}

/// An entity at some version.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct EntityState {
    /// Its kind.
    pub kind: String,
    /// Its id.
    pub id: String,
    /// How many events the state is folded from.
    pub version: u64,
    /// The state: any JSON value.
    #[schema(value_type = Value)]
    pub state: Value,
}

/// A stored event.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct EventBody {
    /// The entity's version that it made.
    pub version: u64,
    /// What happened.
    #[serde(rename = "type")]
    pub name: String,
    /// The version of the data's shape.
    pub schema: u32,
    /// When it was committed.
    #[schema(format = DateTime)]
    pub at: String,
    /// What came with its append.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<MetadataBody>,
    /// Its data. Binary values are base64.
    #[serde(default)]
    #[schema(value_type = Value)]
    pub data: Value,
    /// The data as MessagePack in base64, where it has no JSON form; `data` is `null` then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<String>,
}

/// Events of an entity.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct EventsPage {
    /// The events, in the order that was asked for.
    pub events: Vec<EventBody>,
    /// Where the next page begins (`from` when ascending, `to` when descending); none if this is the last one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<u64>,
}

/// What differs between two versions of an entity.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DiffBody {
    /// The version before.
    pub from: u64,
    /// The version after.
    pub to: u64,
    /// What changed, by JSON pointer.
    pub changes: Vec<ChangeBody>,
}

/// One change.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ChangeBody {
    /// Where, as a JSON pointer.
    pub path: String,
    /// What was there; left out if nothing was.
    #[serde(default, deserialize_with = "there", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Value>)]
    pub before: Option<Value>,
    /// What is there; left out if nothing is.
    #[serde(default, deserialize_with = "there", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Value>)]
    pub after: Option<Value>,
}

/// A value that is there, also if it is `null`.
fn there<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(deserializer).map(Some)
}

/// What became of the request with an idempotency key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum OutcomeBody {
    /// It was appended.
    Committed {
        /// The version that its last event made.
        version: u64,
    },
    /// It is on its way to the disk.
    InFlight,
    /// It never came to the entity. It may still arrive: to know for certain, send the request again with the same key.
    NeverSeen,
}

/// Why something that cannot be undone is done. It goes into the audit log, which is never erased: name no person in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ReasonBody {
    /// Why, in 1 to 1024 bytes.
    #[schema(min_length = 1, max_length = 1024, example = "request 4711")]
    pub reason: String,
    /// On whose behalf. The name of the token is noted by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(min_length = 1, max_length = 512)]
    pub by: Option<String>,
}

/// Asks for an entity as it was at a version, as a new life; what came after is erased.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RestoreToBody {
    /// The version, which must be the last one of a commit.
    #[serde(deserialize_with = "whole_number::required")]
    pub version: u64,
    /// Why.
    #[schema(min_length = 1, max_length = 1024)]
    pub reason: String,
    /// On whose behalf.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(min_length = 1, max_length = 512)]
    pub by: Option<String>,
}

/// A new life of an entity.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LifeBody {
    /// Which life: 1, and one more after each erasure.
    pub life: u32,
    /// The version that it has now.
    pub version: u64,
}

/// What looking again at an erasure found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ReceiptVerificationBody {
    /// Whether everything is as the receipt says.
    pub is_clean: bool,
    /// What was looked at.
    pub checks: Vec<CheckBody>,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CheckBody {
    /// What.
    pub what: String,
    /// Whether it is as it should be.
    pub is_ok: bool,
    /// What was found.
    pub found: String,
}

/// The key that receipts are signed with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PublicKeyBody {
    /// Ed25519, in hex. Keep it elsewhere, and compare receipts with it.
    pub public_key: String,
}

/// A projection as it is now.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ProjectionBody {
    /// Its name.
    pub name: String,
    /// The version of its code.
    pub version: u32,
    /// What it does, in a word: `live`, `catching_up`, `building` (nothing is served yet), `paused`, `failed`, `waiting`, `standing` (an older
    /// version is served, whose code is not there).
    pub state: String,
    /// The model that is served.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serving: Option<ModelBody>,
    /// The model that is being built beside it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub building: Option<ModelBody>,
    /// The model that was served before, to which it can be rolled back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous: Option<String>,
    /// The age of the oldest event that the model that is served has not applied.
    pub lag_ms: u64,
    /// Commits behind the model that is served, wanted or not.
    pub commits_behind: u64,
    /// The file that it is defined in, relative to the directory of projections; none if it is not there any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// Why the file as it is now is not used; the projection goes on as it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file_problem: Option<String>,
}

/// A model of a projection.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ModelBody {
    /// Which one: version and build.
    pub model: String,
    /// What it is doing, in words.
    pub state: String,
    /// Events that were applied since it was made.
    pub events: u64,
    /// How much of the log it has read, from 0 to 1; only while it catches up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<f64>,
    /// About how long until it has caught up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eta_ms: Option<u64>,
    /// Why it stands still, if it does. It may quote the event at which it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
}

/// All projections, and files that define none.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ProjectionsBody {
    /// The projections.
    pub projections: Vec<ProjectionBody>,
    /// Files that cannot be used, and why.
    pub refused_files: Vec<RefusedFile>,
}

/// A file that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RefusedFile {
    /// Its name.
    pub file: String,
    /// Why.
    pub problem: String,
}

/// A query of a read model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct QueryBody {
    /// One `SELECT`.
    #[schema(min_length = 1, example = "SELECT * FROM balance WHERE amount > :least")]
    pub sql: String,
    /// Values of `?`: a list; or of `:name`: an object. Null, booleans, numbers and text.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    #[schema(schema_with = query_parameters)]
    pub parameters: Value,
    /// The most rows that are wanted. Default and limit: 10,000.
    #[serde(default, deserialize_with = "whole_number::optional", skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 10000)]
    pub rows_max: Option<u32>,
}

/// What a query answered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct AnswerBody {
    /// The names of the columns, in their order.
    pub columns: Vec<String>,
    /// The rows, an object each. Binary values are base64.
    pub rows: Vec<Value>,
    /// Whether there would have been more.
    pub truncated: bool,
    /// The model that answered.
    pub model: String,
    /// The age of the oldest event that is not in the answer; 0 if there is none.
    pub lag_ms: u64,
    /// Commits that are not in the answer, of whatever kind.
    pub commits_behind: u64,
}

/// An event that a projection was told to skip.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SkippedBody {
    /// When it was skipped.
    pub at: String,
    /// The shard.
    pub shard: u16,
    /// The place of its commit in the shard's log.
    pub position: u64,
    /// The entity, by its keyed hash, if that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entity: Option<String>,
    /// The version of the event, if that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<u64>,
    /// Why it could not be applied.
    pub why: String,
}

/// The node as it is now.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct StatusBody {
    /// The store's name.
    pub context: String,
    /// The version of the server.
    pub version: String,
    /// What it was built from.
    pub build: String,
    /// How long it has been up.
    pub uptime_ms: u64,
    /// Whether it takes requests. If not, why: `/health/ready`.
    pub is_ready: bool,
    /// `full`: acknowledged events survive power loss. `normal`: they survive the process alone.
    pub durability: String,
    /// Entities in memory.
    pub live_entities: u64,
    /// Erasures that have begun and are not complete.
    pub erasures_unfinished: u64,
    /// Commits that the background scrub has verified since the start, and damaged rows that it found.
    pub scrubbed_commits: u64,
    /// Damaged rows that the scrub has found.
    pub bad_rows: u64,
    /// Open connections.
    pub connections: u64,
    /// Memory of the process.
    pub rss_bytes: u64,
    /// Each shard.
    pub shards: Vec<ShardBody>,
    /// The node in its cluster; left out if it is in none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster: Option<StatusClusterBody>,
}

/// A node in its cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StatusClusterBody {
    /// What people call it.
    pub node: String,
    /// Where it listens for other nodes.
    pub address: String,
    /// Nodes of the cluster.
    pub members: u64,
    /// Those with a link, this one included.
    pub members_up: u64,
    /// Slots that it owns, of 4096.
    pub owns: u64,
    /// Slots that it should own.
    pub wished: u64,
    /// Slots of it on their way.
    pub moving: u64,
    /// Whether the cluster serves every entity, as this node sees it: `ok`, `degraded` or `unavailable`.
    pub health: String,
}

/// A shard as it is now.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ShardBody {
    /// Its number.
    pub shard: u16,
    /// Why it is out of use, if it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub out_of_use: Option<String>,
    /// Entities in memory.
    pub live_entities: u64,
    /// Entities that failed too often and are left alone for a while.
    pub quarantined: u64,
    /// Bytes that wait for the disk.
    pub waiting_bytes: u64,
    /// Writes to its file since the start: commits, and what else is noted there.
    pub writes: u64,
    /// The disk syncs that they shared.
    pub groups: u64,
    /// Groups that the disk refused since the start.
    pub failures: u64,
    /// Whether the file is closed after a failure; it is tried again by itself.
    pub is_closed: bool,
}

/// A line of the answer to a long work: progress now and then, and at the end what was done or why it failed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum WorkLine<P, D> {
    /// How far it is.
    Progress(P),
    /// It is done. The last line.
    Done(D),
    /// It has failed. The last line.
    Problem(Problem),
}

/// How far an import has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ImportProgressBody {
    /// Lines read.
    pub lines: u64,
    /// Bytes read.
    pub bytes: u64,
    /// Commits that are durable.
    pub commits: u64,
    /// Their events.
    pub events: u64,
    /// How many of the commits an earlier run had appended.
    pub repeated: u64,
}

/// What an import did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ImportReportBody {
    /// Lines read.
    pub lines: u64,
    /// Entities that they were about; left out if there were more than a million.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entities: Option<u64>,
    /// Commits of the file that are durable.
    pub commits: u64,
    /// Their events.
    pub events: u64,
    /// Events that were not in the store before.
    pub new_events: u64,
}

/// How far a verification has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VerifyProgressBody {
    /// Commits checked.
    pub commits: u64,
}

/// What a verification found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VerificationBody {
    /// Whether everything is as it was committed.
    pub is_clean: bool,
    /// Entities seen.
    pub entities: u64,
    /// Their commits.
    pub commits: u64,
    /// Their events.
    pub events: u64,
    /// Keys.
    pub keys: u64,
    /// Keys of erased entities.
    pub keys_destroyed: u64,
    /// What is damaged, in words. Entities stand there by their hash.
    pub damage: Vec<String>,
}

/// How far a backup has come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BackupProgressBody {
    /// `copy` or `verify`.
    pub step: String,
    /// The shard that it is at, from 1.
    pub shard: u16,
    /// How many there are.
    pub shards: u16,
    /// Commits of this shard that were copied, or read back.
    pub commits: u64,
    /// How many there are of them.
    pub commits_total: u64,
    /// Sealed bytes copied in all.
    pub bytes: u64,
}

/// What a backup did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BackupReportBody {
    /// Where it is, on the node's machine.
    pub directory: String,
    /// `events`, `keys` or `ledger`.
    pub part: String,
    /// All that was acknowledged then is in the backup.
    pub taken_at: String,
    /// Commits that were new, or keys, or erasures, by the part.
    pub rows: u64,
    /// Bytes that were new.
    pub bytes: u64,
    /// Whether it was read back and found as it was committed.
    pub is_verified: bool,
    /// What is wrong with the store, as the backup found it.
    pub warnings: Vec<String>,
}

/// Whether the node takes requests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HealthBody {
    /// `ok`, `degraded` (requests are taken, but something is out of use), `starting` or `stopping`.
    pub status: String,
    /// Why it is not `ok`.
    pub reasons: Vec<String>,
    /// Whether other requests need a token: one without would be denied, and every denial is kept in the audit log.
    #[serde(default)]
    pub needs_token: bool,
}

/// Whether the cluster serves every entity, and what is in the way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ClusterHealthBody {
    /// `ok`, `degraded` or `unavailable`.
    pub status: String,
    /// Whether the node is in a cluster.
    pub is_clustered: bool,
    /// What is in the way, worst first.
    pub reasons: Vec<ClusterReasonBody>,
    /// Whether other requests need a token.
    #[serde(default)]
    pub needs_token: bool,
}

/// One thing that is in the way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ClusterReasonBody {
    /// `joining`, `not_ready`, `unreachable`, `without_owner`, `released_untaken`, `staged`, `move_stuck` or `leaving`: docs/operations.md says what each means.
    pub code: String,
    /// `degraded` or `unavailable`.
    pub status: String,
    /// The node that it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// How many slots it concerns.
    pub slots: u64,
    /// For how long it is so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since_ms: Option<u64>,
    /// What it is and what to do.
    pub detail: String,
}

/// The nodes of the cluster, as the one that was asked knows them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MembersBody {
    /// Each node, by name.
    pub members: Vec<MemberBody>,
}

/// A node of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MemberBody {
    /// What people call it.
    pub name: String,
    /// Names it for ever: 32 hex digits.
    pub id: String,
    /// Its disk: 32 hex digits.
    pub disk: String,
    /// Where other nodes reach it.
    pub address: String,
    /// `joining`, `member`, `leaving` (drained) or `forgotten`.
    pub standing: String,
    /// Whether it is the one that was asked.
    pub is_own: bool,
    /// Whether there is a link to it.
    pub is_up: bool,
    /// Slots that it owns.
    pub owns: u64,
    /// Slots that it should own.
    pub wished: u64,
}

/// The slots, as the node that was asked knows them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SlotsBody {
    /// Each slot that was asked for, by number.
    pub slots: Vec<SlotBody>,
}

/// A slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SlotBody {
    /// Its number, 0 to 4095.
    pub slot: u16,
    /// The node that owns it, as far as is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// Since which epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epoch: Option<String>,
    /// The node that should own it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wished: Option<String>,
    /// Whether that was asked for, whatever the ring says.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_pinned: bool,
    /// What the token of the node that was asked says: `none`, `owned`, `released` or `released_untaken`.
    pub token: String,
    /// Commits that the node that was asked has of it.
    pub rows: u64,
}

/// Slots on their way.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MovesBody {
    /// Each of them.
    pub moves: Vec<MoveBody>,
    /// What moves have come to, of each node since it was started.
    pub nodes: Vec<MoveTotalsBody>,
}

/// A slot on its way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MoveBody {
    /// The slot.
    pub slot: u16,
    /// Its owner.
    pub from: String,
    /// To whom.
    pub to: String,
    /// `copying`, `sealed` (writes to it wait) or `granted`.
    pub phase: String,
    /// Commits that were sent.
    pub rows_sent: u64,
    /// Commits that are still to be copied, as far as is known.
    pub rows_left: u64,
    /// For how long it has been on its way.
    pub since_ms: u64,
}

/// What the moves of a node have come to since it was started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MoveTotalsBody {
    /// The node.
    pub node: String,
    /// Slots that it gave away.
    pub given: u64,
    /// Slots that it took.
    pub taken: u64,
    /// Moves that came to nothing, and were tried again.
    pub aborted: u64,
    /// How long writes to a slot waited while it was given away: the middle one of the newest, in microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause_p50_us: Option<u64>,
    /// The longest of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause_max_us: Option<u64>,
}

/// What would move.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PlanBody {
    /// Slots that would move.
    pub moves: u64,
    /// Slots whose owner is not known: they move when it is back.
    pub without_owner: u64,
    /// Each node, by name.
    pub nodes: Vec<PlanNodeBody>,
    /// From which node to which, how many.
    pub flows: Vec<PlanFlowBody>,
}

/// What a node would give and get.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PlanNodeBody {
    /// The node.
    pub node: String,
    /// Slots that it owns.
    pub owns: u64,
    /// Slots that it would own.
    pub wished: u64,
    /// Slots that it would give away.
    pub gives: u64,
    /// Slots that it would get.
    pub takes: u64,
}

/// Slots that would go from one node to another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PlanFlowBody {
    /// From whom.
    pub from: String,
    /// To whom.
    pub to: String,
    /// How many.
    pub count: u64,
    /// Which.
    pub slots: Vec<u16>,
}

/// What is to move: with nothing in it, all that is not where the ring wants it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MigrateBody {
    /// A slot, 0 to 4095.
    #[serde(default, deserialize_with = "whole_number::optional", skip_serializing_if = "Option::is_none")]
    #[schema(maximum = 4095)]
    pub slot: Option<u16>,
    /// Or the slot of all entities whose ids have this tag in braces.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(min_length = 1, max_length = 510, pattern = "^[^{}]+$")]
    pub tag: Option<String>,
    /// The node, by name or id, that is to own it; it stays there until it is unpinned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
    /// It goes to where the ring wants it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unpin: bool,
}

/// What was asked to move.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MigratedBody {
    /// The slot; none: all that is not where it should be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slot: Option<u16>,
    /// Slots that are to move now, in the whole cluster, as far as is known.
    pub to_move: u64,
}

/// Which node gives all its slots away.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DrainBody {
    /// Its name or id; none for the one that is asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// It takes slots again instead.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub cancel: bool,
}

/// A node that was drained, or is no more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DrainedBody {
    /// Its name.
    pub node: String,
    /// Slots that it owns still.
    pub owns: u64,
}

/// Which node is taken out of the cluster for ever.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ForgetBody {
    /// Its name or id.
    pub node: String,
    /// **An oath**: its disk is destroyed and never runs again. Erasures and joins go on without it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub destroyed: bool,
}

/// Something that happened in the cluster, as the node that is followed sees it. Fields that say nothing are left out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ClusterEventBody {
    /// When.
    pub at: String,
    /// The node that it is about; of a move, the one that gives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// The slot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slot: Option<u16>,
    /// The node that takes, or the new standing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
    /// The standing before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// `copying`, `sealed` or `granted`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<String>,
    /// Commits that were sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows_sent: Option<u64>,
    /// Commits that are still to be copied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows_left: Option<u64>,
    /// How long writes waited, in microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause_us: Option<u64>,
    /// Why, in a word or a sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Events that were missed, because they were not taken in time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub missed: Option<u64>,
}

/// An event as a subscription hands it out (`event: event`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SubscribedEvent {
    /// The kind of its entity.
    pub kind: String,
    /// The id of its entity.
    pub id: String,
    /// The keyed hash by which the entity is called once it is erased: keep it beside whatever you keep of the entity.
    pub entity: String,
    /// Which life of the entity.
    pub life: u32,
    /// The slot of its entity.
    pub slot: u16,
    /// The place of its commit in that slot's log.
    pub seq: u64,
    /// The event.
    #[serde(flatten)]
    pub event: EventBody,
}

/// That an entity was erased (`event: erased`): forget what you keep of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SubscribedErasure {
    /// The keyed hash of the entity.
    pub entity: String,
    /// Its kind; left out where nothing of it was found.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// Which life.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub life: Option<u32>,
    /// The name of the receipt.
    pub receipt: String,
}

/// A commit that cannot be read (`event: unreadable`). The subscription goes on behind it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SubscribedDamage {
    /// The shard.
    pub shard: u16,
    /// The place in its log.
    pub position: u64,
    /// Why.
    pub why: String,
}

/// An entry of the audit log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct AuditPage {
    /// The entries, oldest first: events of the store's own entity.
    pub events: Vec<EventBody>,
    /// Where the next page begins; none if this is the last one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<u64>,
}

/// Why a request failed (RFC 9457, `application/problem+json`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// `urn:kuma:` and the code.
    #[serde(rename = "type")]
    pub kind: String,
    /// The code in words.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// Names the kind of failure for programs: `wrong_version`, `overloaded`, ... See docs/http.md.
    pub code: String,
    /// What happened, and what to do. Never an id or a payload.
    pub detail: String,
    /// Whether the same request can be sent again without the risk of doubling anything, and with a chance.
    pub retry_safe: bool,
    /// When to try again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
    /// The version that the entity has, where that is the reason.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub actual_version: Option<u64>,
    /// The id of the request, which the server's log has as well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
}
