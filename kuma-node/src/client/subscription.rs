//! A subscription that outlives its connections.
//!
//! ```text
//!              no answer the first time, or a refusal ─► error, for good
//! connect ─────────────────────────────────────────────────────────────┐
//!    ▲    └─► Connected ─► Message, Message, ...                        │
//!    │                         │ cut off, silent, node stopped           │
//!    └── wait (jitter) ◄── Lost ◄───────── no answer later, overloaded ◄─┘
//! ```
//! Invariants:
//! - Each connection goes on behind the last checkpoint that came whole, so that nothing is skipped; what was under way may come again.
//! - A connection on which not even a sign of life comes is given up.

use std::time::Duration;

use reqwest::{Method, Response, header::ACCEPT};
use tokio::time::{Instant, sleep_until, timeout};

use super::{Backoff, Client, ClientError, SseMessage, chance, header, path::query, sse::SseParser};

/// A node gives a sign of life every 15 seconds.
const SILENCE_MAX: Duration = Duration::from_secs(45);
/// Until a subscription stands.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Where a subscription begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Begin {
    /// What comes from now on.
    Now,
    /// All that there is.
    Beginning,
    /// Behind a checkpoint, or from a time (RFC 3339).
    Place(String),
}

/// What happened to a subscription.
#[derive(Debug)]
pub enum SubscriptionStep {
    /// It stands, for the first time or again.
    Connected,
    /// A message came.
    Message(SseMessage),
    /// The connection is gone; it is tried again after a while.
    Lost {
        /// Why.
        error: ClientError,
        /// After how long.
        retry_in: Duration,
    },
}

/// A subscription. It reconnects by itself, as often as it takes.
#[derive(Debug)]
#[must_use = "nothing is asked for until the first step"]
pub struct Subscription {
    client: Client,
    filter: Vec<(&'static str, String)>,
    from: Begin,
    parser: SseParser,
    connection: Option<Response>,
    retry_at: Option<Instant>,
    backoff: Backoff,
    has_stood: bool,
}

impl Subscription {
    pub(super) fn new(client: Client, filter: Vec<(&'static str, String)>, from: Begin) -> Self {
        let backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(20));
        let parser = SseParser::default();
        Subscription { client, filter, from, parser, connection: None, retry_at: None, backoff, has_stood: false }
    }

    /// The checkpoint behind what has come so far; none if nothing has, not even where it begins.
    pub fn checkpoint(&self) -> Option<&str> {
        Some(self.parser.last_id()).filter(|id| !id.is_empty())
    }

    /// What happens next.
    ///
    /// # Errors
    /// The node refuses it, or did not answer the first time. Later failures are steps.
    /// # Cancel safety
    /// Cancel safe: nothing that came is lost.
    pub async fn next(&mut self) -> Result<SubscriptionStep, ClientError> {
        if let Some(message) = self.parser.next() {
            return Ok(SubscriptionStep::Message(message));
        }
        if let Some(at) = self.retry_at {
            sleep_until(at).await;
            self.retry_at = None;
        }
        let Some(connection) = &mut self.connection else {
            return match self.connect().await {
                Ok(connection) => {
                    self.connection = Some(connection);
                    self.has_stood = true;
                    Ok(SubscriptionStep::Connected)
                }
                Err(error) if self.has_stood && error.is_unavailable() => Ok(self.lost(error)),
                Err(error) => Err(error),
            };
        };
        loop {
            let piece = match timeout(SILENCE_MAX, connection.chunk()).await {
                Ok(Ok(Some(piece))) => piece,
                Ok(Ok(None)) | Err(_) => return Ok(self.lost(ClientError::Interrupted(None))),
                Ok(Err(error)) => {
                    let error = self.client.error(error);
                    return Ok(self.lost(error));
                }
            };
            self.parser.push(&piece)?;
            // Only a connection on which something comes is a good one.
            self.backoff.reset();
            if let Some(message) = self.parser.next() {
                return Ok(SubscriptionStep::Message(message));
            }
        }
    }

    fn lost(&mut self, error: ClientError) -> SubscriptionStep {
        self.connection = None;
        // What was cut off comes again, whole.
        let id = self.parser.last_id().to_owned();
        self.parser = SseParser::behind(&id);
        let retry_in = self.backoff.wait(error.retry_after(), chance());
        self.retry_at = Some(Instant::now() + retry_in);
        SubscriptionStep::Lost { error, retry_in }
    }

    async fn connect(&self) -> Result<Response, ClientError> {
        let checkpoint = self.checkpoint();
        let from = match &self.from {
            _ if checkpoint.is_some() => None,
            Begin::Now => Some("now".to_owned()),
            Begin::Beginning => Some("beginning".to_owned()),
            Begin::Place(place) => Some(place.clone()),
        };
        let from = from.map(|from| ("from", from));
        let path = format!("/v1/events{}", query(self.filter.iter().cloned().chain(from)));
        let mut request = self.client.request(Method::GET, &path).header(ACCEPT, "text/event-stream");
        if let Some(checkpoint) = checkpoint {
            request = request.header("last-event-id", header("a checkpoint", checkpoint)?);
        }
        // The stream itself has no end.
        let answer = timeout(ANSWER_TIMEOUT, self.client.answer(request)).await;
        answer.unwrap_or(Err(ClientError::Interrupted(None)))
    }
}
