//! What only the OpenAPI document needs: the shapes of what the store writes and reads itself, and bounds that the types do not say.
#![allow(dead_code, clippy::large_enum_variant, reason = "describes what others write and read, and is never made")]

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;
use utoipa::{
    PartialSchema, ToSchema,
    openapi::{
        KnownFormat, Object, OpenApi, RefOr, SchemaFormat, Type,
        schema::{Array, OneOf, Schema, SchemaType},
    },
};

use crate::wire;

/// The receipt of an erasure. Its fields are signed: keep it as it came.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Receipt {
    receipt: Statement,
    /// The Ed25519 signature of the statement, in hex.
    #[schema(example = "00")]
    signature: String,
}

/// What a receipt states.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Statement {
    /// The format of the statement.
    #[schema(maximum = 1)]
    format: u32,
    /// The name of the erasure, in hex.
    #[schema(pattern = "^[0-9A-Fa-f]{32}$")]
    id: String,
    /// The store's name.
    context: String,
    /// The data directory's identity, in hex.
    disk_id: String,
    /// The keyed hash of the entity, in hex.
    entity: String,
    /// Its kind.
    kind: Option<String>,
    /// Which life of it.
    life: Option<u32>,
    /// Its slot.
    slot: u16,
    /// The name of the key that was destroyed, in hex.
    key: String,
    /// When the erasure was asked for.
    requested_at: String,
    /// When the last store was done.
    completed_at: String,
    /// Whether it was interrupted and gone on with.
    resumed: bool,
    /// What became of it in each store.
    stores: Vec<StoreOutcome>,
    /// Subscribers that have not confirmed.
    pending: Vec<String>,
    /// The newest backups that were made before.
    backups: LastBackups,
    /// The key that the signature is checked with, in hex.
    public_key: String,
}

/// What became of an entity in one store.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct StoreOutcome {
    /// The name of the file, or "memory".
    store: String,
    /// What was done.
    outcome: String,
    /// Commits that became stubs.
    commits: u64,
    /// Their events.
    events: u64,
    /// Snapshots that were deleted.
    snapshots: u64,
    /// Sealed bytes that were deleted.
    bytes: u64,
}

/// When the newest backups before an erasure were made.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct LastBackups {
    /// Of events.
    events: Option<String>,
    /// Of keys.
    keys: Option<String>,
}

/// A line of an export: an event, or the manifest at the end. See docs/formats.md.
#[derive(ToSchema)]
#[serde(untagged)]
pub(crate) enum ExportedLine {
    /// An event.
    Event(Box<ExportedEvent>),
    /// The last line, or a part of an archive.
    Other(BTreeMap<String, BTreeMap<String, Value>>),
}

/// An event as an export writes it.
#[derive(Deserialize, ToSchema)]
pub(crate) struct ExportedEvent {
    /// The kind of its entity.
    kind: String,
    /// The id of its entity.
    id: String,
    /// The entity's version that it made.
    version: u64,
    /// The commit that it is of.
    commit: ExportedCommit,
    /// What happened.
    #[serde(rename = "type")]
    name: String,
    /// The version of the data's shape.
    schema: u32,
    /// When it was committed.
    #[schema(format = DateTime)]
    at: String,
    /// What came with its append.
    metadata: Option<wire::MetadataBody>,
    /// Its data, if that has a JSON form.
    #[schema(value_type = Value, required = false)]
    data: Value,
    /// Its data as MessagePack in base64, where `data` alone would not give the same bytes again.
    bytes: Option<String>,
}

/// Which lines are one commit.
#[derive(Deserialize, ToSchema)]
pub(crate) struct ExportedCommit {
    /// The version of its first event.
    first: u64,
    /// How many events it has.
    count: u64,
}

/// A line of an import of your own. Those of an export are taken too: docs/formats.md.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ImportedLine {
    /// The kind of the entity.
    #[schema(pattern = "^[A-Za-z][A-Za-z0-9_.-]{0,63}$", example = "account")]
    kind: String,
    /// Its id, 1 to 512 bytes.
    #[schema(min_length = 1, max_length = 512, example = "acc_001")]
    id: String,
    /// What happened, in 1 to 128 bytes.
    #[serde(rename = "type")]
    #[schema(min_length = 1, max_length = 128, example = "Deposited")]
    name: String,
    /// Any JSON value.
    #[schema(value_type = Value)]
    data: Value,
}

/// The lines of the answer to an import.
#[derive(ToSchema)]
pub(crate) struct ImportLines(Vec<wire::WorkLine<wire::ImportProgressBody, wire::ImportReportBody>>);

/// The lines of the answer to a verification.
#[derive(ToSchema)]
pub(crate) struct VerifyLines(Vec<wire::WorkLine<wire::VerifyProgressBody, wire::VerificationBody>>);

/// The lines of the answer to a backup.
#[derive(ToSchema)]
pub(crate) struct BackupLines(Vec<wire::WorkLine<wire::BackupProgressBody, wire::BackupReportBody>>);

/// Where a subscription begins.
pub(crate) struct SubscribeFrom;

impl PartialSchema for SubscribeFrom {
    fn schema() -> RefOr<Schema> {
        let text = || Object::builder().schema_type(Type::String);
        let time = text().format(Some(SchemaFormat::KnownFormat(KnownFormat::DateTime)));
        let checkpoint =
            text().pattern(Some("^[0-9a-f]{32}\\.[0-9]{1,19}(\\.[0-9]{1,19})*(@(0|-?[1-9][0-9]{0,17}))?$"));
        let word = text().enum_values(Some(["now", "beginning"]));
        OneOf::builder().item(word).item(time).item(checkpoint).into()
    }
}

impl ToSchema for SubscribeFrom {}

/// A server-sent event of a subscription.
#[derive(ToSchema)]
pub(crate) struct SubscribedMessage {
    /// The checkpoint behind it.
    id: String,
    /// What it is.
    event: SubscribedWhat,
    /// JSON: a `SubscribedEvent`, `SubscribedErasure` or `SubscribedDamage`.
    data: String,
    /// After how many milliseconds a client that was cut off comes back; only at the beginning.
    retry: Option<u64>,
}

/// What a subscription tells.
#[derive(ToSchema)]
#[schema(rename_all = "lowercase")]
pub(crate) enum SubscribedWhat {
    /// An event.
    Event,
    /// That an entity was erased.
    Erased,
    /// That a commit cannot be read.
    Unreadable,
}

/// A server-sent event of the cluster.
#[derive(ToSchema)]
pub(crate) struct ClusterMessage {
    /// What has happened: `member_up`, `move_done`, ...
    event: String,
    /// JSON: a `ClusterEventBody`.
    data: String,
    /// After how many milliseconds a client that was cut off comes back; only at the beginning.
    retry: Option<u64>,
}

/// A kind and the name of an event.
pub(crate) struct EventName;

impl PartialSchema for EventName {
    fn schema() -> RefOr<Schema> {
        Object::builder().schema_type(Type::String).pattern(Some("\\.")).into()
    }
}

impl ToSchema for EventName {}

/// The parameters of a query: a list for `?`, an object for `:name`.
pub(crate) fn query_parameters() -> Schema {
    let value = || {
        let types = [Type::Null, Type::Boolean, Type::Integer, Type::Number, Type::String];
        Object::builder().schema_type(SchemaType::from_iter(types)).build()
    };
    let named = Object::builder().schema_type(Type::Object).additional_properties(Some(Schema::from(value())));
    let none = Object::builder().schema_type(Type::Null);
    OneOf::builder().item(none).item(Array::new(value())).item(named).into()
}

/// A list of two texts each.
pub(crate) fn pairs() -> Schema {
    let text = Object::builder().schema_type(Type::String);
    let pair = Array::builder().items(text).min_items(Some(2)).max_items(Some(2));
    let description = "Anything else: pairs of name and value.";
    Array::builder().items(pair).description(Some(description)).into()
}

/// The document as it is served.
pub(crate) fn text(document: &OpenApi) -> String {
    // Nothing in it can fail to be JSON.
    let mut document = serde_json::to_value(document).unwrap_or_default();
    mend(&mut document);
    format!("{document:#}")
}

/// What types do not say of themselves: numbers how large they may be, because formats alone are a remark; and parameters that they are there or
/// not, but never `null`.
fn mend(document: &mut Value) {
    bound_integers(document);
    let paths = document.get_mut("paths").and_then(Value::as_object_mut);
    let operations = paths.into_iter().flat_map(serde_json::Map::values_mut).filter_map(Value::as_object_mut);
    for operation in operations.flat_map(serde_json::Map::values_mut) {
        let parameters = operation.get_mut("parameters").and_then(Value::as_array_mut);
        for schema in parameters.into_iter().flatten().filter_map(|parameter| parameter.get_mut("schema")) {
            if let Some(Value::Array(types)) = schema.get_mut("type") {
                types.retain(|name| name != "null");
            }
        }
    }
}

fn bound_integers(document: &mut Value) {
    // The names are those of utoipa; the registry of formats has them without the hyphen.
    let bound = match document.get("format").and_then(Value::as_str) {
        Some("u-int16") => Some(("uint16", u64::from(u16::MAX))),
        Some("u-int32") => Some(("uint32", u64::from(u32::MAX))),
        Some("u-int64") => Some(("uint64", u64::MAX)),
        _ => None,
    };
    match document {
        Value::Object(fields) => {
            if let Some((format, maximum)) = bound {
                fields.insert("format".to_owned(), format.into());
                fields.entry("maximum").or_insert(maximum.into());
            }
            fields.values_mut().for_each(bound_integers);
        }
        Value::Array(values) => values.iter_mut().for_each(bound_integers),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use serde_json::json;

    use super::*;

    /// `format: int64` stood at numbers of 64 bits without a sign: half of them were against the document, and were taken.
    #[test]
    fn numbers_have_the_bounds_of_their_types() {
        let mut document =
            json!({"a": [{"format": "u-int64"}, {"format": "u-int32", "maximum": 7}, {"format": "int64"}]});
        mend(&mut document);
        let expected = json!({"a": [
            {"format": "uint64", "maximum": u64::MAX},
            {"format": "uint32", "maximum": 7},
            {"format": "int64"},
        ]});
        assert_eq!(document, expected);
    }

    /// A header that may be left out could be `null`, says the document: the text `null` was sent, and refused.
    #[test]
    fn a_parameter_is_never_null() {
        let operation = |types: Value| json!({"paths": {"/a": {"get": {"parameters": [{"schema": {"type": types}}]}}}});
        let mut document = operation(json!(["string", "null"]));
        mend(&mut document);
        assert_eq!(document, operation(json!(["string"])));
    }
}
