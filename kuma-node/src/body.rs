//! Bodies of requests, read whole within limits.
//!
//! Invariants:
//! - What is read is counted while it comes, against the limit of one body and against that of all together. A length that is announced
//!   takes no room.
//! - A body that stops coming is given up.

use std::sync::Arc;

use axum::{
    body::{Body, Bytes},
    extract::{FromRequest, FromRequestParts, Request},
    http::{HeaderMap, StatusCode, header, request::Parts},
};
use http_body_util::BodyExt;
use serde::de::DeserializeOwned;
use tokio::{sync::OwnedSemaphorePermit, time::timeout};

use crate::{
    append_body::{Encoding, unread, without_values},
    named::Named,
    node::{BODY_UNIT, Node},
    problem::Problem,
};

/// A body that was read whole. Its room is given back when it is dropped.
pub(crate) struct Whole {
    pub(crate) bytes: Bytes,
    _room: Option<OwnedSemaphorePermit>,
}

impl Whole {
    pub(crate) async fn read(node: &Node, headers: &HeaderMap, body: Body) -> Result<Self, Problem> {
        let bytes_max = node.config.body_bytes_max;
        let too_large = || {
            Problem::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                "body_too_large",
                format!("the body has more than {bytes_max} bytes; split the append, or use the stream /v1/append"),
            )
        };
        let announced =
            headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
        if announced.is_some_and(|bytes| bytes > bytes_max as u64) {
            return Err(too_large());
        }
        let mut body = body;
        let (mut first, mut more, mut room) = (Bytes::new(), Vec::new(), None::<OwnedSemaphorePermit>);
        let mut length = 0;
        while let Some(frame) = next_frame(node, &mut body).await? {
            length += frame.len();
            if length > bytes_max {
                return Err(too_large());
            }
            let units = length.div_ceil(BODY_UNIT).saturating_sub(room.as_ref().map_or(0, |room| room.num_permits()));
            if units > 0 {
                let full = |_| {
                    Problem::overloaded("too many bodies are being read at once (`body_memory_max`); send it again")
                };
                // At most `body_bytes_max`.
                let taken = node.body_memory.clone().try_acquire_many_owned(units as u32).map_err(full)?;
                match &mut room {
                    Some(room) => room.merge(taken),
                    None => room = Some(taken),
                }
            }
            // Nearly every body comes in one piece.
            match first.is_empty() && more.is_empty() {
                true => first = frame,
                false => {
                    if more.is_empty() {
                        more.extend_from_slice(&std::mem::take(&mut first));
                    }
                    more.extend_from_slice(&frame);
                }
            }
        }
        let bytes = if more.is_empty() { first } else { more.into() };
        Ok(Whole { bytes, _room: room })
    }
}

/// The next piece of a body; none at its end.
///
/// # Errors
/// It was cut off, or nothing came for too long.
pub(crate) async fn next_frame(node: &Node, body: &mut Body) -> Result<Option<Bytes>, Problem> {
    loop {
        match timeout(node.config.body_idle_timeout, body.frame()).await {
            Err(_) => {
                return Err(Problem::new(
                    StatusCode::REQUEST_TIMEOUT,
                    "body_too_slow",
                    format!(
                        "nothing of the body came for {:?}; nothing was done, send it again",
                        node.config.body_idle_timeout
                    ),
                )
                .retry_safe(true));
            }
            Ok(None) => return Ok(None),
            Ok(Some(Ok(frame))) => match frame.into_data() {
                Ok(data) if data.is_empty() => {}
                Ok(data) => return Ok(Some(data)),
                // Trailers.
                Err(_) => {}
            },
            Ok(Some(Err(_))) => {
                return Err(Problem::bad("cut_off", "the body was cut off; nothing of it was done, send it again")
                    .retry_safe(true));
            }
        }
    }
}

/// What a body is in.
///
/// # Errors
/// It is in something else.
pub(crate) fn encoding(headers: &HeaderMap, allowed: &[(&str, Encoding)]) -> Result<Encoding, Problem> {
    let given = headers.get(header::CONTENT_TYPE).map(|value| value.to_str().unwrap_or_default());
    let name = given.unwrap_or_default().split(';').next().unwrap_or_default().trim();
    let found = allowed.iter().find(|(content_type, _)| name.eq_ignore_ascii_case(content_type));
    found.map(|(_, encoding)| *encoding).ok_or_else(|| {
        let names: Vec<&str> = allowed.iter().map(|(name, _)| *name).collect();
        Problem::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "unsupported_media_type",
            format!("the body's `Content-Type` has to be {} (curl: `--json` instead of `-d`)", names.join(" or ")),
        )
    })
}

/// A JSON body, which is an object.
pub(crate) struct JsonBody<T>(pub(crate) T);

impl<T: DeserializeOwned> FromRequest<Arc<Node>> for JsonBody<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, node: &Arc<Node>) -> Result<Self, Problem> {
        let (parts, body) = request.into_parts();
        encoding(&parts.headers, &[("application/json", Encoding::Json)])?;
        let whole = Whole::read(node, &parts.headers, body).await?;
        if let Err(error) = std::str::from_utf8(&whole.bytes) {
            return Err(Problem::bad("invalid_body", format!("the body is not UTF-8 at byte {}", error.valid_up_to())));
        }
        serde_json::from_slice(&whole.bytes).map(|Named(body)| JsonBody(body)).map_err(|error| unread(&error))
    }
}

/// The parts of a path.
pub(crate) struct Path<T>(pub(crate) T);

impl<T: DeserializeOwned + Send> FromRequestParts<Arc<Node>> for Path<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, node: &Arc<Node>) -> Result<Self, Problem> {
        let path = axum::extract::Path::<T>::from_request_parts(parts, node).await;
        path.map(|axum::extract::Path(path)| Path(path)).map_err(|_| {
            Problem::bad("invalid_path", "a part of the path is not percent-encoded UTF-8, or not of the right type")
        })
    }
}

/// The query of a request. Fields that are not known are refused.
pub(crate) struct Query<T>(pub(crate) T);

impl<T: DeserializeOwned + Send> FromRequestParts<Arc<Node>> for Query<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, node: &Arc<Node>) -> Result<Self, Problem> {
        if !is_percent_encoded_utf8(parts.uri.query().unwrap_or_default()) {
            return Err(Problem::bad("invalid_query_string", "the query string is not percent-encoded UTF-8"));
        }
        let query = axum::extract::Query::<T>::from_request_parts(parts, node).await;
        query.map(|axum::extract::Query(query)| Query(query)).map_err(|rejection| {
            let cause = std::error::Error::source(&rejection).map(ToString::to_string).unwrap_or_default();
            Problem::bad("invalid_query_string", format!("the query string: {}", without_values(behind_path(&cause))))
        })
    }
}

/// What is said of a field that is not known, without the name of the field in front of it, which is the caller's.
fn behind_path(cause: &str) -> &str {
    cause.find("unknown field `").and_then(|at| cause.get(at..)).unwrap_or(cause)
}

/// Whether a query string is UTF-8 once it is decoded. Whoever reads it would put another character in place of what is not.
pub(crate) fn is_percent_encoded_utf8(query: &str) -> bool {
    percent_encoding::percent_decode_str(query).decode_utf8().is_ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use axum::http::Uri;

    use super::*;

    #[derive(Debug, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code, reason = "only read")]
    struct Wanted {
        version: Option<u64>,
        at: Option<String>,
    }

    /// It was told that a value is not of the right type, with the names of fields as what was expected instead.
    #[test]
    fn an_unknown_field_of_a_query_is_called_that_and_not_quoted() {
        let told = |uri: &'static str| {
            let rejection = axum::extract::Query::<Wanted>::try_from_uri(&Uri::from_static(uri)).unwrap_err();
            let cause = std::error::Error::source(&rejection).unwrap().to_string();
            without_values(behind_path(&cause))
        };
        assert_eq!(told("/?secret=1"), "a field is not known; expected `version` or `at`");
        assert_eq!(told("/?version=secret"), "a value is not of the right type");
    }

    #[test]
    fn a_query_string_that_is_not_utf8_once_decoded_is_told_from_one_that_is() {
        for query in ["", "a=b", "a=%c3%A9", "a=%", "a=%4", "%zz=%25ff", "a=\u{e9}"] {
            assert!(is_percent_encoded_utf8(query), "{query}");
        }
        for query in ["a=%ff", "%c3%28", "a=%ed%a0%80", "a=%c3"] {
            assert!(!is_percent_encoded_utf8(query), "{query}");
        }
    }
}
