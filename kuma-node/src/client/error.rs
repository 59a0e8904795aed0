//! Why something that was asked of a node did not happen.
//!
//! Invariant: no message holds a token, an id or a URL with one in it, but for what the node itself wrote.

use std::{io, path::PathBuf, time::Duration};

use crate::wire::Problem;

/// Why something that was asked of a node did not happen. One variant for each thing that can be done about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// The client cannot be set up as it was asked to.
    #[error("{0}")]
    Settings(String),
    /// A file that the client needs cannot be read.
    #[error("cannot read {path}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It cannot stand in a URL.
    #[error("{0:?} cannot stand in a URL; the stream POST /v1/append takes every id in its body")]
    Name(String),
    /// Nobody answers. Nothing was done.
    #[error(
        "cannot connect to {url}; is a node running there? Start one (kuma-node start), or name another address (--url or KUMA_URL)"
    )]
    Connect {
        /// Where.
        url: String,
        /// Why.
        #[source]
        source: reqwest::Error,
    },
    /// The connection ended, or took too long, before the answer was whole. What was asked may have been done, or not.
    #[error("the connection was cut, or nothing came for too long; what was asked may have been done, or not")]
    Interrupted(#[source] Option<reqwest::Error>),
    /// The node says why.
    #[error("{}", told(.0))]
    Problem(Box<Problem>),
    /// What answered is no node, or one of another version.
    #[error("{0}")]
    Unexpected(String),
}

impl ClientError {
    pub(super) fn of(error: reqwest::Error, url: &str) -> Self {
        // The URL has ids in it.
        let error = error.without_url();
        if error.is_builder() {
            return ClientError::Settings(format!("the request cannot be made: {}", full(&error)));
        }
        if error.is_connect() {
            return ClientError::Connect { url: url.to_owned(), source: error };
        }
        ClientError::Interrupted(Some(error))
    }

    /// What the node said, if it did.
    pub fn problem(&self) -> Option<&Problem> {
        match self {
            ClientError::Problem(problem) => Some(problem),
            _ => None,
        }
    }

    /// Whether it is about now and not about what was asked: it may work later.
    pub fn is_unavailable(&self) -> bool {
        match self {
            ClientError::Connect { .. } | ClientError::Interrupted(_) => true,
            ClientError::Problem(problem) => matches!(problem.status, 429 | 502 | 503 | 504),
            _ => false,
        }
    }

    /// Whether the same can be asked again with a chance, and without the risk of doubling anything if it has an idempotency key or changes
    /// nothing.
    pub fn is_retry_safe(&self) -> bool {
        match self {
            ClientError::Problem(problem) => problem.retry_safe,
            _ => self.is_unavailable(),
        }
    }

    /// How long the node asks to wait.
    pub fn retry_after(&self) -> Option<Duration> {
        self.problem().and_then(|problem| problem.retry_after_ms).map(Duration::from_millis)
    }
}

/// What a problem says to somebody at a terminal.
fn told(problem: &Problem) -> String {
    let mut text = if problem.detail.is_empty() { problem.title.clone() } else { problem.detail.clone() };
    let hint = match problem.status {
        401 => Some("give a token by --token, --token-file or KUMA_TOKEN"),
        403 if problem.code != "reserved_kind" => {
            Some("the token may not do this: use one with the scope that it needs")
        }
        _ => None,
    };
    if let Some(hint) = hint.filter(|hint| !text.contains(hint)) {
        text.push_str("; ");
        text.push_str(hint);
    }
    if let Some(version) = problem.actual_version.filter(|version| !text.contains(&version.to_string())) {
        text.push_str(&format!("; it is at version {version}"));
    }
    text.push_str(&format!(" ({}", problem.code));
    if let Some(id) = &problem.request_id {
        text.push_str(&format!(", request {id}"));
    }
    text.push(')');
    text
}

/// An error with its causes.
pub(super) fn full(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(status: u16, code: &str, detail: &str) -> Problem {
        Problem {
            kind: format!("urn:kuma:{code}"),
            title: code.replace('_', " "),
            status,
            code: code.to_owned(),
            detail: detail.to_owned(),
            retry_safe: false,
            retry_after_ms: None,
            actual_version: None,
            request_id: None,
        }
    }

    #[test]
    fn a_problem_is_told_with_what_to_do() {
        let error = |problem| ClientError::Problem(Box::new(problem)).to_string();
        let refused = problem(401, "no_token", "the request has no token");
        assert_eq!(
            error(refused),
            "the request has no token; give a token by --token, --token-file or KUMA_TOKEN (no_token)"
        );
        let stale = Problem {
            actual_version: Some(7),
            request_id: Some("r1".to_owned()),
            ..problem(412, "wrong_version", "the entity has moved on")
        };
        assert_eq!(error(stale), "the entity has moved on; it is at version 7 (wrong_version, request r1)");
        assert_eq!(error(problem(500, "internal", "")), "internal (internal)");
    }

    #[test]
    fn what_may_work_later_is_told_apart() {
        let error = |problem| ClientError::Problem(Box::new(problem));
        let overloaded =
            Problem { retry_safe: true, retry_after_ms: Some(250), ..problem(503, "overloaded", "too much") };
        let overloaded = error(overloaded);
        assert!(overloaded.is_unavailable() && overloaded.is_retry_safe());
        assert_eq!(overloaded.retry_after(), Some(Duration::from_millis(250)));
        // The outcome is unknown and there was no key: not to be sent again.
        assert!(!error(problem(503, "outcome_unknown", "")).is_retry_safe());
        assert!(!error(problem(412, "wrong_version", "")).is_unavailable());
        assert!(ClientError::Interrupted(None).is_unavailable());
        assert!(!ClientError::Unexpected("no node".to_owned()).is_unavailable());
    }
}
