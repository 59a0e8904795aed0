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
