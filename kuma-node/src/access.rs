//! Access: who asks, and whether they may.
//!
//! Invariants:
//! - Each handler names the right that it asks for in its signature ([`May`]); it is looked at before any part of the body is read.
//! - Every denial is in the audit log before it is answered.
//! - Without tokens only this machine is listened to, and pages of other origins are refused: a browser on it would send their requests.

use std::{marker::PhantomData, sync::Arc};

use axum::{
    extract::{FromRequestParts, MatchedPath},
    http::{HeaderMap, HeaderValue, StatusCode, Uri, header, request::Parts},
};
use kuma_core::{Denial, Reason};

use crate::{
    node::Node,
    problem::Problem,
    tokens::{Found, Scope},
};

/// Whoever asks.
#[derive(Clone, Debug, Default)]
pub(crate) struct Caller {
    /// The name of the token; none where nobody needs one.
    pub(crate) token: Option<Arc<str>>,
}

impl Caller {
    /// Why something is done, for the audit log.
    pub(crate) fn reason(&self, why: String, by: Option<String>) -> Reason {
        let by = match (by, &self.token) {
            (Some(by), Some(token)) => Some(format!("{by} (token {token})")),
            (None, Some(token)) => Some(format!("token {token}")),
            (by, None) => by,
        };
        by.into_iter().fold(Reason::new(why), Reason::by)
    }
}

/// A right, as a type.
pub(crate) trait Right: Send + Sync {
    /// None: any token will do.
    const SCOPE: Option<Scope>;
}

macro_rules! rights {
    ($($name:ident => $scope:expr),* $(,)?) => {$(
        /// See [`Scope`].
        pub(crate) struct $name;
        impl Right for $name {
            const SCOPE: Option<Scope> = $scope;
        }
    )*};
}

rights! {
    Append => Some(Scope::Append),
    Read => Some(Scope::Read),
    Erase => Some(Scope::Erase),
    Admin => Some(Scope::Admin),
    AnyToken => None,
}

/// Whoever asks was looked at where the request came in: by this node, or by another one of the cluster. Made by this program and by nothing that a
/// request has in it.
#[derive(Clone, Debug)]
pub(crate) struct Vouched {
    pub(crate) scope: Scope,
    pub(crate) caller: Caller,
}

/// Whoever asks has this right.
pub(crate) struct May<R> {
    pub(crate) caller: Caller,
    right: PhantomData<R>,
}

impl<R: Right> FromRequestParts<Arc<Node>> for May<R> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, node: &Arc<Node>) -> Result<Self, Problem> {
        if let Some(Vouched { scope, caller }) = parts.extensions.get() {
            // For this right and no other, whatever the node would let in by itself.
            return match R::SCOPE == Some(*scope) {
                true => Ok(May { caller: caller.clone(), right: PhantomData }),
                false => Err(Problem::new(
                    StatusCode::FORBIDDEN,
                    "forbidden",
                    "the request was handed on with another scope than it needs",
                )),
            };
        }
        check(parts, node, R::SCOPE).await.map(|caller| May { caller, right: PhantomData })
    }
}

/// Whoever asks, if they may.
///
/// # Errors
/// They may not, which is in the audit log then.
pub(crate) async fn check(parts: &mut Parts, node: &Node, right: Option<Scope>) -> Result<Caller, Problem> {
    if node.is_open() {
        return Ok(Caller::default());
    }
    let (token, why) = match bearer(&parts.headers) {
        None => (None, "no token"),
        Some(text) => match node.tokens.find(text) {
            Found::Token(token) if right.is_none_or(|scope| token.allows(scope)) => {
                let caller = Caller { token: Some(token.name.as_str().into()) };
                parts.extensions.insert(caller.clone());
                return Ok(caller);
            }
            Found::Token(token) => (Some(token.name.clone()), "the token does not have the scope"),
            Found::Expired { name } => (Some(name), "the token has expired"),
            Found::Unknown => (None, "the token is not known"),
        },
    };
    let scope = right.map_or_else(|| "any".to_owned(), |scope| scope.to_string());
    let route = parts.extensions.get::<MatchedPath>().map_or("", MatchedPath::as_str);
    let request = format!("{} {route}", parts.method);
    let has_scope_alone = why.ends_with("scope");
    node.denials.note(Denial { token, scope: scope.clone(), request, why: why.to_owned(), times: 1 }).await;
    metrics::counter!("kuma_http_denied_total", "scope" => scope.clone()).increment(1);
    Err(match has_scope_alone {
        true => Problem::new(
            StatusCode::FORBIDDEN,
            "forbidden",
            format!("the token does not have the scope `{scope}`; use one that has"),
        ),
        false => Problem::new(
            StatusCode::UNAUTHORIZED,
            "unauthorized",
            format!("{why}: send `Authorization: Bearer TOKEN` (scope `{scope}`); `kuma-node token create` makes one"),
        )
        .header(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"kuma\"")),
    })
}

/// The token that a request came with.
fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

/// Whether a request to a node without tokens may come from a page of somebody else: its names are not those of this machine, or its origin is
/// another. A browser cannot leave these headers out, and anything else does not need to.
///
/// # Errors
/// It may.
pub(crate) fn check_origin(uri: &Uri, headers: &HeaderMap) -> Result<(), Problem> {
    let host =
        headers.get(header::HOST).and_then(|host| host.to_str().ok()).or(uri.authority().map(|host| host.as_str()));
    if let Some(host) = host
        && !is_loopback(host)
    {
        return Err(Problem::new(
            StatusCode::FORBIDDEN,
            "foreign_host",
            "without tokens the node answers to names of this machine alone (localhost, 127.0.0.1, [::1]); make a token to use others",
        ));
    }
    let origin = headers.get(header::ORIGIN).map(|origin| origin.to_str().unwrap_or_default());
    let is_own = |origin: &str| origin.split_once("://").is_some_and(|(_, host)| is_loopback(host));
    if origin.is_some_and(|origin| !is_own(origin)) {
        return Err(Problem::new(
            StatusCode::FORBIDDEN,
            "foreign_origin",
            "without tokens the node refuses requests of web pages of other origins; make a token to allow them",
        ));
    }
    Ok(())
}

/// Whether a host, with or without a port, is this machine.
fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    name.eq_ignore_ascii_case("localhost") || name.parse().is_ok_and(|ip: std::net::IpAddr| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_this_machine_are_loopback() {
        for host in ["localhost", "localhost:4870", "LOCALHOST", "127.0.0.1:1", "127.9.9.9", "[::1]", "[::1]:4870"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in ["", "example.com", "localhost.example.com", "127.0.0.1.example.com", "10.0.0.1", "[::2]:1", ":80"]
        {
            assert!(!is_loopback(host), "{host}");
        }
    }

    #[test]
    fn a_page_of_another_origin_is_refused() {
        let check = |origin: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::HOST, HeaderValue::from_static("localhost:4870"));
            headers.insert(header::ORIGIN, HeaderValue::from_static(origin));
            check_origin(&Uri::from_static("/v1/status"), &headers)
        };
        assert!(check("http://localhost:3000").is_ok());
        assert!(check("https://example.com").is_err());
        assert!(check("null").is_err());
    }
}
