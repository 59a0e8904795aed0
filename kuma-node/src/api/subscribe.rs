//! Subscriptions: the events of the store, or of all nodes of its cluster, as server-sent events, first those that are there and then those that
//! come.
//!
//! Invariants:
//! - Each has as its id the checkpoint behind it: who reconnects with `Last-Event-ID` goes on there. The events of a commit that was cut apart
//!   come again; (`entity`, `life`, `version`) tells that they were there. In a cluster, whose checkpoints tell of 4096 slots, only the last of
//!   those that go out together has an id: who is cut off before it gets them again.
//! - Whoever is slow falls behind in the log and not in memory: no more is read than is sent.

use std::{
    io,
    str::FromStr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use axum::{
    body::{Body, Bytes},
    extract::{RawQuery, State},
    http::{HeaderMap, HeaderName, header},
    response::{IntoResponse, Response},
};
use futures_util::{FutureExt, stream};
use kuma_cluster::{SlotCheckpoint, StartAt};
use kuma_core::{Checkpoint, Delivery, Filter, Start, SubscribeError, Subscription};
use serde::Serialize;
use tokio::{sync::OwnedSemaphorePermit, time::timeout};

use super::{
    Problems, check_kind,
    document::{EventName, SubscribeFrom, SubscribedMessage},
    history::{CHUNK_BYTES, EventHead, write_event},
    parse_time,
};
use crate::{
    access::{self, May},
    body::is_percent_encoded_utf8,
    node::Node,
    problem::Problem,
    wire,
};

const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
/// Between two signs of life.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// Before it is tried again what cannot be read for now.
const RETRY: Duration = Duration::from_secs(1);
/// Kinds and names of events in a query.
const NAMES_MAX: usize = 256;

/// Subscribes to the events of the store.
///
/// As server-sent events: `event` (`SubscribedEvent`), `erased` (`SubscribedErasure`: forget what you keep of it) and `unreadable`
/// (`SubscribedDamage`). Browsers reconnect by themselves; others send the last `id` as `Last-Event-ID`.
#[utoipa::path(
    get,
    path = "/v1/events",
    operation_id = "subscribe",
    tag = "streams",
    params(
        ("kind" = Option<Vec<String>>, Query, description = "All events of this kind; may be given more than once. Default: every kind"),
        ("event" = Option<Vec<EventName>>, Query, description = "Events of this kind and name: `account.Deposited`; may be given more than once"),
        ("from" = Option<SubscribeFrom>, Query, description = "`now` (default), `beginning`, a time (RFC 3339), or a checkpoint"),
        ("Last-Event-ID" = Option<String>, Header, description = "A checkpoint; it counts more than `from`", pattern = "^([0-9a-f]{32}\\.[0-9]{1,19}(\\.[0-9]{1,19})*(@(0|-?[1-9][0-9]{0,17}))?)?$"),
    ),
    responses((status = 200, description = "Each event of the stream", body = SubscribedMessage, content_type = "text/event-stream"), Problems),
)]
pub(crate) async fn events(
    State(node): State<Arc<Node>>,
    _may: May<access::Read>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let (filter, from) = parse(query.as_deref().unwrap_or_default())?;
    let from = match headers.get(LAST_EVENT_ID).filter(|id| !id.is_empty()) {
        Some(id) => BeginAt::Checkpoint(id.to_str().unwrap_or("?").to_owned()),
        None => from,
    };
    let permit = node.subscription()?;
    let source = Source::open(&node, filter, from).await?;
    let feed = Feed { source, node, has_begun: false, _permit: permit };
    let chunks = stream::unfold(feed, |mut feed| async move {
        let chunk = feed.chunk().await?;
        Some((Ok::<_, io::Error>(Bytes::from(chunk)), feed))
    });
    let heads = [(header::CONTENT_TYPE, "text/event-stream"), (header::CACHE_CONTROL, "no-store")];
    Ok((heads, Body::from_stream(chunks)).into_response())
}

/// Where a subscription begins, as it is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
enum BeginAt {
    Now,
    Beginning,
    Time(SystemTime),
    /// One of the store, or of a cluster.
    Checkpoint(String),
}

/// Whose events they are.
enum Source {
    /// Those of the store, which is in no cluster.
    Store(Box<Subscription>),
    /// Those of all nodes.
    Cluster(Box<kuma_cluster::Subscription>),
}

impl Source {
    async fn open(node: &Node, filter: Filter, from: BeginAt) -> Result<Self, Problem> {
        let Some(cluster) = &node.cluster else {
            let start = match from {
                BeginAt::Now => Start::Now,
                BeginAt::Beginning => Start::Beginning,
                BeginAt::Time(at) => Start::Time(at),
                BeginAt::Checkpoint(text) => Start::Checkpoint(checkpoint::<Checkpoint>(&text)?),
            };
            return Ok(Source::Store(Box::new(node.kuma.subscribe(filter).from(start).open().await?)));
        };
        let start = match from {
            BeginAt::Now => StartAt::Now,
            BeginAt::Beginning => StartAt::Beginning,
            BeginAt::Time(at) => StartAt::Time(at),
            BeginAt::Checkpoint(text) => StartAt::Checkpoint(checkpoint::<SlotCheckpoint>(&text)?),
        };
        Ok(Source::Cluster(Box::new(cluster.subscribe(filter, start).await?)))
    }

    fn checkpoint(&self) -> String {
        match self {
            Source::Store(subscription) => subscription.checkpoint().to_string(),
            Source::Cluster(subscription) => subscription.checkpoint().to_string(),
        }
    }

    /// What comes next; none when the node shuts down.
    async fn next(&mut self) -> Result<Option<Delivery>, Problem> {
        match self {
            Source::Store(subscription) => match subscription.next().await {
                Err(SubscribeError::ShuttingDown) => Ok(None),
                next => Ok(Some(next?)),
            },
            Source::Cluster(subscription) => match subscription.next().await {
                Err(kuma_cluster::SubscribeError::ShuttingDown) => Ok(None),
                next => Ok(Some(next?)),
            },
        }
    }

    /// What is there without waiting. What fails comes again with the next one that is waited for.
    async fn next_of_now(&mut self) -> Option<Delivery> {
        match self {
            Source::Store(subscription) => subscription.next_of_now().await.ok().flatten(),
            Source::Cluster(subscription) => subscription.next().now_or_never()?.ok(),
        }
    }

    /// Whether an id is short enough to go with each event.
    fn names_each(&self) -> bool {
        matches!(self, Source::Store(_))
    }
}

struct Feed {
    source: Source,
    node: Arc<Node>,
    has_begun: bool,
    _permit: OwnedSemaphorePermit,
}

impl Feed {
    /// What is there, or what comes next, or a sign of life. None when the server stops.
    async fn chunk(&mut self) -> Option<Vec<u8>> {
        let mut chunk = Vec::new();
        if !self.has_begun {
            self.has_begun = true;
            // So that the head of the answer goes out, and whoever is cut off before the first event knows where to go on.
            let checkpoint = self.source.checkpoint();
            chunk.extend_from_slice(format!("retry: 1000\n: kuma\nid: {checkpoint}\n\n").as_bytes());
            return Some(chunk);
        }
        let stopping = self.node.stopping.clone();
        let first = tokio::select! {
            biased;
            () = stopping.cancelled() => return None,
            first = timeout(HEARTBEAT, self.source.next()) => first,
        };
        let mut next = match first {
            Err(_) => return Some(b": still here\n\n".to_vec()),
            Ok(Ok(None)) => return None,
            Ok(Ok(delivery)) => delivery,
            Ok(Err(problem)) => {
                tracing::warn!(code = problem.code(), "a subscription cannot go on for now");
                tokio::time::sleep(RETRY).await;
                return Some(b": cannot be read for now\n\n".to_vec());
            }
        };
        while let Some(delivery) = next.take() {
            // As of behind this one, before the next one is looked at.
            let mut id = self.source.names_each().then(|| self.source.checkpoint());
            if chunk.len() < CHUNK_BYTES {
                next = self.source.next_of_now().await;
            }
            if next.is_none() {
                // Nothing was handed out since.
                id = id.or_else(|| Some(self.source.checkpoint()));
            }
            write(&mut chunk, &delivery, id.as_deref());
        }
        Some(chunk)
    }
}

/// Which events, and from where.
fn parse(query: &str) -> Result<(Filter, BeginAt), Problem> {
    let refuse = |detail: &str| Problem::bad("invalid_query_string", detail);
    let fields: Vec<(String, String)> =
        serde_urlencoded(query).ok_or_else(|| refuse("it is not percent-encoded UTF-8"))?;
    if fields.len() > NAMES_MAX {
        return Err(refuse("it names too many kinds and events; subscribe to all and pass over what is not wanted"));
    }
    let (mut filter, mut start) = (Filter::all(), None);
    for (name, value) in fields {
        match name.as_str() {
            "kind" => {
                check_kind(&value)?;
                filter = filter.and_kind(value);
            }
            "event" => {
                // A kind may have dots, and the name of an event as well; the last one separates them.
                let (kind, event) =
                    value.rsplit_once('.').ok_or_else(|| refuse("`event` is KIND.NAME, `account.Deposited` say"))?;
                check_kind(kind)?;
                filter = filter.and_event(kind, event);
            }
            "from" if start.is_some() => return Err(refuse("`from` is there twice")),
            "from" => {
                start = Some(match value.as_str() {
                    "now" => BeginAt::Now,
                    "beginning" => BeginAt::Beginning,
                    text if text.contains(':') => BeginAt::Time(parse_time(text)?),
                    text => BeginAt::Checkpoint(text.to_owned()),
                });
            }
            _ => return Err(refuse("`kind`, `event` and `from` are what can be given")),
        }
    }
    Ok((filter, start.unwrap_or(BeginAt::Now)))
}

fn serde_urlencoded(query: &str) -> Option<Vec<(String, String)>> {
    if !is_percent_encoded_utf8(query) {
        return None;
    }
    let uri = axum::http::Uri::builder().path_and_query(format!("/?{query}")).build().ok()?;
    axum::extract::Query::try_from_uri(&uri).ok().map(|axum::extract::Query(fields)| fields)
}

fn checkpoint<C: FromStr>(text: &str) -> Result<C, Problem> {
    text.parse()
        .map_err(|_| Problem::bad("invalid_checkpoint", "it is not a checkpoint: send the `id` of an event, as it is"))
}

/// An event but for its data, as [`wire::SubscribedEvent`] has it.
#[derive(Serialize)]
struct Head<'a> {
    kind: &'a str,
    id: &'a str,
    entity: String,
    life: u32,
    slot: u16,
    seq: u64,
    #[serde(flatten)]
    event: EventHead<'a>,
}

fn write(out: &mut Vec<u8>, delivery: &Delivery, id: Option<&str>) {
    let mut begin = |name: &str| {
        if let Some(id) = id {
            out.extend_from_slice(format!("id: {id}\n").as_bytes());
        }
        out.extend_from_slice(format!("event: {name}\ndata: ").as_bytes());
    };
    // JSON has no line breaks, so that one line of data is enough.
    match delivery {
        Delivery::Event(stored) => {
            begin("event");
            let head = Head {
                kind: &stored.kind,
                id: &stored.id,
                entity: stored.entity.to_hex(),
                life: stored.life,
                slot: stored.slot.number(),
                seq: stored.seq,
                event: EventHead::of(&stored.event),
            };
            write_event(out, &head, &stored.event);
        }
        Delivery::Erased(erased) => {
            begin("erased");
            let body = wire::SubscribedErasure {
                entity: erased.entity.to_hex(),
                kind: erased.kind.as_deref().map(str::to_owned),
                life: erased.life,
                receipt: erased.receipt.to_string(),
            };
            // A Vec never refuses a byte.
            let _ = serde_json::to_writer(&mut *out, &body);
        }
        Delivery::Unreadable(commit) => {
            begin("unreadable");
            let body = wire::SubscribedDamage {
                shard: commit.shard,
                position: commit.position,
                why: "it cannot be read, the node's log says why".to_owned(),
            };
            let _ = serde_json::to_writer(&mut *out, &body);
            tracing::error!(shard = commit.shard, position = commit.position, why = %commit.why, "a subscription met a commit that cannot be read");
        }
    }
    out.extend_from_slice(b"\n\n");
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn the_query_says_what_and_from_where() {
        let (filter, start) = parse("kind=order&event=account.Deposited&event=a.b.Moved&from=beginning").unwrap();
        assert!(
            filter.matches("order", "Placed")
                && filter.matches("account", "Deposited")
                && filter.matches("a.b", "Moved")
        );
        assert!(!filter.matches("account", "Withdrawn") && !filter.matches("other", "Placed"));
        assert_eq!(start, BeginAt::Beginning);
        assert_eq!(parse("").unwrap().1, BeginAt::Now);
        assert!(matches!(parse("from=2026-01-31T12:00:00Z").unwrap().1, BeginAt::Time(_)));
        assert_eq!(parse("from=x").unwrap().1, BeginAt::Checkpoint("x".to_owned()));
        for query in ["from=now&from=now", "event=account", "what=1", "from=25:00", "kind=%ff"] {
            assert!(parse(query).is_err(), "{query}");
        }
    }
}
