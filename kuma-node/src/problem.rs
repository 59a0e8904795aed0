//! Problems: how each failure is told over HTTP (RFC 9457). The one file that chooses HTTP statuses.
//!
//! Invariants:
//! - A problem says whether the same request can be sent again.
//! - It never quotes an id, a payload, a token or a path of the machine.

use std::time::Duration;

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use kuma_cluster::{AskError, NodeError};
use kuma_core::{
    AppendError, BackupError, EraseError, ExportError, ImportError, ImportProblem, LedgerError, NotWritten,
    ProjectionError, QueryError, ReadError, Refused, StorageError, SubscribeError, Unavailable, Unfit, Version,
};

use crate::wire;

/// A failure on its way to whoever asked. In a box, because what succeeds should not have to carry its size.
#[derive(Clone, Debug)]
pub(crate) struct Problem(Box<Told>);

#[derive(Clone, Debug)]
struct Told {
    status: StatusCode,
    code: &'static str,
    detail: String,
    retry_safe: bool,
    retry_after: Option<Duration>,
    actual_version: Option<Version>,
    /// Nothing was done, because the slot is another node's.
    is_elsewhere: bool,
    /// More for the head of the answer.
    header: Option<(header::HeaderName, HeaderValue)>,
}

/// Where nothing else is known.
const RETRY_AFTER: Duration = Duration::from_secs(1);

impl Problem {
    /// A failure that a retry does not mend.
    pub(crate) fn new(status: StatusCode, code: &'static str, detail: impl Into<String>) -> Self {
        let (retry_safe, retry_after, actual_version, header) = (false, None, None, None);
        let (detail, is_elsewhere) = (detail.into(), false);
        Problem(Box::new(Told { status, code, detail, retry_safe, retry_after, actual_version, is_elsewhere, header }))
    }

    /// The request is not one that is understood.
    pub(crate) fn bad(code: &'static str, detail: impl Into<String>) -> Self {
        Problem::new(StatusCode::BAD_REQUEST, code, detail)
    }

    /// It cannot be done now, and the same request may be sent again.
    pub(crate) fn unavailable(code: &'static str, detail: impl Into<String>) -> Self {
        Problem::new(StatusCode::SERVICE_UNAVAILABLE, code, detail).retry_after(RETRY_AFTER)
    }

    pub(crate) fn overloaded(detail: impl Into<String>) -> Self {
        Problem::unavailable("overloaded", detail)
    }

    pub(crate) fn stopping() -> Self {
        Problem::unavailable("stopping", "the node is shutting down; nothing was done, send it again when it is back")
    }

    pub(crate) fn internal(detail: impl Into<String>) -> Self {
        Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", detail)
    }

    pub(crate) fn retry_after(mut self, after: Duration) -> Self {
        (self.0.retry_safe, self.0.retry_after) = (true, Some(after));
        self
    }

    pub(crate) fn retry_safe(mut self, retry_safe: bool) -> Self {
        self.0.retry_safe = retry_safe;
        self
    }

    pub(crate) fn header(mut self, name: header::HeaderName, value: HeaderValue) -> Self {
        self.0.header = Some((name, value));
        self
    }

    /// Whether nothing was done because the slot is another node's, or was about to be: that one can be asked.
    pub(crate) fn is_elsewhere(&self) -> bool {
        self.0.is_elsewhere
    }

    fn elsewhere(mut self) -> Self {
        self.0.is_elsewhere = true;
        self
    }

    pub(crate) fn code(&self) -> &'static str {
        self.0.code
    }

    pub(crate) fn detail(&self) -> &str {
        &self.0.detail
    }

    /// As it goes over the wire.
    pub(crate) fn body(&self, request_id: Option<String>) -> wire::Problem {
        wire::Problem {
            kind: format!("urn:kuma:{}", self.0.code),
            title: self.0.code.replace('_', " "),
            status: self.0.status.as_u16(),
            code: self.0.code.to_owned(),
            detail: self.0.detail.clone(),
            retry_safe: self.0.retry_safe,
            retry_after_ms: self.0.retry_after.map(|after| u64::try_from(after.as_millis()).unwrap_or(u64::MAX)),
            actual_version: self.0.actual_version.map(|version| version.0),
            request_id,
        }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let mut response = (self.0.status, Json(self.body(None))).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if let Some(after) = self.0.retry_after {
            // Whole seconds, and at least one: 0 would mean at once.
            headers.insert(header::RETRY_AFTER, after.as_secs().max(1).into());
        }
        if let Some((name, value)) = self.0.header.clone() {
            headers.insert(name, value);
        }
        // The middleware adds the id of the request.
        response.extensions_mut().insert(self);
        response
    }
}

impl From<Refused> for Problem {
    fn from(refused: Refused) -> Self {
        use StatusCode as S;
        let (status, code) = match &refused {
            Refused::WrongVersion { .. } => (S::PRECONDITION_FAILED, "wrong_version"),
            Refused::Empty => (S::UNPROCESSABLE_ENTITY, "empty_append"),
            Refused::EventTooLarge { .. } => (S::PAYLOAD_TOO_LARGE, "event_too_large"),
            Refused::AppendTooLarge { .. } | Refused::TooManyEvents { .. } => {
                (S::PAYLOAD_TOO_LARGE, "append_too_large")
            }
            Refused::MetadataTooLarge { .. } => (S::PAYLOAD_TOO_LARGE, "metadata_too_large"),
            Refused::InvalidId { .. } => (S::BAD_REQUEST, "invalid_id"),
            Refused::InvalidKind { .. } => (S::BAD_REQUEST, "invalid_kind"),
            Refused::Undecodable { .. } => (S::UNPROCESSABLE_ENTITY, "invalid_event"),
            Refused::KeyReused { .. } => (S::UNPROCESSABLE_ENTITY, "key_reused"),
            Refused::InvalidKey { .. } => (S::BAD_REQUEST, "invalid_key"),
            Refused::NoSuchVersion { .. } => (S::NOT_FOUND, "no_such_version"),
            Refused::Erased { .. } => (S::GONE, "erased"),
            Refused::NeverWritten { .. } => (S::NOT_FOUND, "never_written"),
            Refused::NotErased { .. } => (S::CONFLICT, "not_erased"),
            Refused::OtherLife { .. } => (S::CONFLICT, "other_life"),
            Refused::ReservedKind { .. } => (S::FORBIDDEN, "reserved_kind"),
            Refused::WithinCommit { .. } => (S::CONFLICT, "within_commit"),
            Refused::HistoryTooLarge { .. } => (S::PAYLOAD_TOO_LARGE, "history_too_large"),
            Refused::InvalidReason { .. } => (S::UNPROCESSABLE_ENTITY, "invalid_reason"),
            // What typed kinds answer: a process that embeds the server has them.
            Refused::NoJson { .. } => (S::CONFLICT, "no_json"),
            Refused::ApplyPanicked { .. } | Refused::CommandPanicked { .. } => {
                (S::UNPROCESSABLE_ENTITY, "apply_panicked")
            }
            Refused::Upcasters { .. } | Refused::KindMismatch { .. } => (S::CONFLICT, "kind_mismatch"),
            _ => (S::UNPROCESSABLE_ENTITY, "refused"),
        };
        let actual_version = match &refused {
            Refused::WrongVersion { actual, .. } => Some(*actual),
            Refused::NoSuchVersion { newest, .. } => Some(*newest),
            Refused::KeyReused { version, .. } => Some(*version),
            _ => None,
        };
        let detail = match &refused {
            // The cause may quote the event.
            Refused::Undecodable { .. } => "an event cannot be stored: its name must have 1 to 128 bytes, and its data must be one value that JSON can hold, nested at most 127 deep".to_owned(),
            Refused::InvalidKind { bytes } => format!(
                "the kind ({bytes} bytes) is refused; a kind is 1 to 64 ASCII letters, digits, '_', '-' or '.', starting with a letter"
            ),
            other => other.to_string(),
        };
        let mut problem = Problem::new(status, code, detail);
        problem.0.actual_version = actual_version;
        problem
    }
}

impl From<Unavailable> for Problem {
    fn from(unavailable: Unavailable) -> Self {
        let detail = unavailable.to_string();
        match unavailable {
            Unavailable::Overloaded { retry_after, .. } => Problem::overloaded(detail).retry_after(retry_after),
            Unavailable::Quarantined { entity, retry_after, .. } => {
                let detail = format!(
                    "entity {entity} failed too often and is left alone for a while, the node's log says why; nothing was written"
                );
                Problem::unavailable("quarantined", detail).retry_after(retry_after)
            }
            Unavailable::Unreadable { entity, .. } => {
                let detail = format!("entity {entity} cannot be read, the node's log says why; nothing was written");
                Problem::unavailable("unreadable", detail)
            }
            Unavailable::ShardOutOfUse { shard, .. } => {
                let detail = format!("shard {shard} is out of use, the node's log says why; nothing was written");
                Problem::unavailable("shard_out_of_use", detail)
            }
            Unavailable::SlotMoves { .. } | Unavailable::SlotElsewhere { .. } => {
                Problem::unavailable("slot_elsewhere", detail).elsewhere()
            }
            Unavailable::NotWritten { cause: NotWritten::NotOwner { .. }, .. } => {
                Problem::unavailable("slot_elsewhere", "the slot of the entity has just moved to another node; retry")
                    .elsewhere()
            }
            Unavailable::OwnerUnreachable { .. } => Problem::unavailable("owner_unreachable", detail),
            Unavailable::NoOwnerFound { .. } => Problem::unavailable("no_owner_found", detail),
            Unavailable::NotWritten { entity, .. } => {
                let detail = format!("the disk refused a write of entity {entity}, and that is certain; retry");
                Problem::unavailable("not_written", detail)
            }
            Unavailable::NoKey { .. } => Problem::unavailable("no_key", detail),
            Unavailable::Interrupted { .. } => Problem::unavailable("interrupted", detail),
            Unavailable::BeingRestored { .. } => Problem::unavailable("being_restored", detail),
            Unavailable::NotErased { .. } => Problem::unavailable("not_begun", detail),
            Unavailable::ShuttingDown => Problem::stopping(),
            Unavailable::SequenceBroken { .. } => Problem::unavailable("sequence_broken", detail),
            _ => Problem::unavailable("unavailable", detail),
        }
    }
}

impl From<AskError> for Problem {
    fn from(error: AskError) -> Self {
        let detail = error.to_string();
        match error {
            AskError::Unavailable(unavailable) => unavailable.into(),
            AskError::Unknown { .. } => Problem::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "outcome_unknown",
                "the link to the node that owns the entity broke, or its answer took too long: read before you send it again, or use an Idempotency-Key",
            ),
            AskError::TooLarge { .. } => Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large_to_forward", detail),
            _ => Problem::unavailable("unavailable", detail),
        }
    }
}

impl From<NodeError> for Problem {
    fn from(error: NodeError) -> Self {
        let detail = error.to_string();
        match error {
            NodeError::Refused { .. } | NodeError::Attest { .. } => {
                Problem::new(StatusCode::CONFLICT, "refused_by_cluster", detail)
            }
            _ => Problem::unavailable(
                "unavailable",
                "what the node knows of its cluster cannot be written, its log says why; retry",
            ),
        }
    }
}

impl From<AppendError> for Problem {
    fn from(error: AppendError) -> Self {
        let (retry_safe, detail) = (error.is_retry_safe(), error.to_string());
        match error {
            AppendError::Refused(refused) => refused.into(),
            AppendError::Unavailable(unavailable) => unavailable.into(),
            AppendError::Unknown { .. } => {
                Problem::new(StatusCode::SERVICE_UNAVAILABLE, "outcome_unknown", detail).retry_safe(retry_safe)
            }
        }
    }
}

impl From<ReadError> for Problem {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Refused(refused) => refused.into(),
            ReadError::Unavailable(unavailable) => unavailable.into(),
        }
    }
}

impl From<EraseError> for Problem {
    fn from(error: EraseError) -> Self {
        let detail = error.to_string();
        match error {
            EraseError::Refused(refused) => refused.into(),
            EraseError::Unavailable(unavailable) => unavailable.into(),
            // It goes on by itself; asking again is right.
            _ => Problem::unavailable("erasure_unfinished", detail),
        }
    }
}

impl From<StorageError> for Problem {
    fn from(_: StorageError) -> Self {
        Problem::unavailable("unreadable", "a file of the store cannot be read, the node's log says why; retry")
    }
}

impl From<Unfit> for Problem {
    fn from(unfit: Unfit) -> Self {
        Problem::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid_data", format!("the data of an event: {unfit}"))
    }
}

impl From<SubscribeError> for Problem {
    fn from(error: SubscribeError) -> Self {
        let detail = error.to_string();
        match error {
            SubscribeError::Checkpoint(_) => Problem::new(StatusCode::CONFLICT, "invalid_checkpoint", detail),
            SubscribeError::ShardOutOfUse { shard, .. } => {
                let detail = format!("shard {shard} is out of use, so that its events would be missing");
                Problem::unavailable("shard_out_of_use", detail)
            }
            SubscribeError::ShuttingDown => Problem::stopping(),
            _ => Problem::unavailable("unreadable", "events cannot be read for now, the node's log says why; retry"),
        }
    }
}

impl From<kuma_cluster::SubscribeError> for Problem {
    fn from(error: kuma_cluster::SubscribeError) -> Self {
        use kuma_cluster::SubscribeError as E;
        let detail = error.to_string();
        match error {
            E::Checkpoint(_) => Problem::new(StatusCode::CONFLICT, "invalid_checkpoint", detail),
            E::OwnerUnreachable { .. } => Problem::unavailable("owner_unreachable", detail),
            E::ShuttingDown => Problem::stopping(),
            E::Store(error) => error.into(),
            _ => Problem::unavailable("unreadable", detail),
        }
    }
}

impl From<ProjectionError> for Problem {
    fn from(error: ProjectionError) -> Self {
        use StatusCode as S;
        let detail = error.to_string();
        match error {
            ProjectionError::Unknown { .. } => Problem::new(S::NOT_FOUND, "no_such_projection", detail),
            ProjectionError::NotReady { .. } => Problem::unavailable("not_ready", detail),
            ProjectionError::Behind { .. } => Problem::unavailable("behind", detail),
            ProjectionError::NoRollback { .. } => Problem::new(S::CONFLICT, "no_rollback", detail),
            ProjectionError::NotFailed { .. } => Problem::new(S::CONFLICT, "not_failed", detail),
            ProjectionError::Definition { .. } => Problem::new(S::CONFLICT, "invalid_definition", detail),
            ProjectionError::ShuttingDown => Problem::stopping(),
            ProjectionError::Query(query) => query.into(),
            ProjectionError::Model(_) | ProjectionError::Files { .. } => {
                Problem::unavailable("model_unreadable", "the model's file cannot be used, the node's log says why")
            }
            _ => Problem::unavailable("unavailable", detail),
        }
    }
}

impl From<ExportError> for Problem {
    fn from(error: ExportError) -> Self {
        let detail = error.to_string();
        match error {
            ExportError::Read(error) => error.into(),
            _ => Problem::unavailable("export_failed", detail),
        }
    }
}

impl From<ImportError> for Problem {
    fn from(error: ImportError) -> Self {
        // By its own promise it never quotes a line.
        let detail = error.to_string();
        let problem = |status, code| Problem::new(status, code, detail.clone());
        match &error.reason {
            ImportProblem::Store(store) => match store {
                AppendError::Unavailable(Unavailable::ShuttingDown) => Problem::stopping(),
                _ => Problem::unavailable("import_stopped", detail),
            },
            ImportProblem::Read(_) => problem(StatusCode::BAD_REQUEST, "cut_off").retry_safe(true),
            ImportProblem::Unreadable { .. } => Problem::unavailable("unreadable", detail),
            ImportProblem::WrongVersion { .. } => problem(StatusCode::PRECONDITION_FAILED, "wrong_version"),
            ImportProblem::Refused(Refused::Erased { .. }) => problem(StatusCode::GONE, "erased"),
            ImportProblem::Refused(Refused::ReservedKind { .. }) => problem(StatusCode::FORBIDDEN, "reserved_kind"),
            ImportProblem::KeyReused { .. } => problem(StatusCode::UNPROCESSABLE_ENTITY, "key_reused"),
            _ => problem(StatusCode::UNPROCESSABLE_ENTITY, "invalid_line"),
        }
    }
}

impl From<BackupError> for Problem {
    fn from(error: BackupError) -> Self {
        // Whoever may make backups may know where they are.
        Problem::new(StatusCode::CONFLICT, "backup_failed", full(&error)).retry_safe(true)
    }
}

impl From<LedgerError> for Problem {
    fn from(error: LedgerError) -> Self {
        Problem::new(StatusCode::CONFLICT, "backup_failed", full(&error)).retry_safe(true)
    }
}

impl From<QueryError> for Problem {
    fn from(error: QueryError) -> Self {
        match error {
            QueryError::TooLong(_) => {
                Problem::new(StatusCode::UNPROCESSABLE_ENTITY, "query_too_long", error.to_string())
            }
            QueryError::Cancelled => Problem::unavailable("model_unreadable", "the query was given up; retry"),
            QueryError::Model(_) => {
                Problem::unavailable("model_unreadable", "the model's file cannot be used, the node's log says why")
            }
            _ => Problem::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid_query", error.to_string()),
        }
    }
}

/// An error with its causes.
pub(crate) fn full(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
