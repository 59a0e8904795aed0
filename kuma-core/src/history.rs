//! History: an entity's stored events as a stream.
//!
//! Invariants:
//! - Memory is bounded by one page of commits, whatever the length of the history and however slow the reader.
//! - Every commit is verified and opened, and follows the one before without a gap, in either direction.
//! - Events come in the shape of the kind's current schema version; those that its type does not know are listed all the same.

use std::{
    ops::{Bound, RangeBounds},
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, UNIX_EPOCH},
};

use futures_util::{Stream, StreamExt, TryStreamExt, stream};
use kuma_shard::LogRow;
use serde_bytes::Bytes;

use crate::{
    RawHandle, ReadError, RecordedEvent, ReplayError, Version,
    body::{Body, split},
    kind::Kind,
    replay::{Opener, next_page_rows},
    shard_core::ShardCore,
};

/// Commits in the first page; the next ones follow the size of what was read.
const FIRST_PAGE_ROWS: u32 = 16;

/// In which order a history is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Oldest first.
    Forward,
    /// Newest first.
    Backward,
}

/// An entity's stored events, see [`RawHandle::history`]. A [`Stream`] that ends at the first error.
#[must_use = "nothing is read until it is polled"]
pub struct History {
    events: Pin<Box<dyn Stream<Item = Result<RecordedEvent, ReadError>> + Send>>,
}

impl History {
    /// The next event; none at the end.
    ///
    /// # Cancel safety
    /// Cancel safe: nothing is lost.
    pub async fn next(&mut self) -> Option<Result<RecordedEvent, ReadError>> {
        self.events.next().await
    }

    pub(crate) fn of(handle: RawHandle, versions: impl RangeBounds<u64>, direction: Direction) -> Self {
        let commits = commits(handle, Span::of(versions), direction);
        let events = commits.map_ok(move |mut commit| {
            if direction == Direction::Backward {
                commit.events.reverse();
            }
            stream::iter(commit.events.into_iter().map(Ok))
        });
        History { events: events.try_flatten().boxed() }
    }
}

impl Stream for History {
    type Item = Result<RecordedEvent, ReadError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.events.as_mut().poll_next(context)
    }
}

/// Versions, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    first: u64,
    last: u64,
}

impl Span {
    pub(crate) fn of(versions: impl RangeBounds<u64>) -> Self {
        let first = match versions.start_bound() {
            Bound::Included(first) => *first,
            Bound::Excluded(before) => before.saturating_add(1),
            Bound::Unbounded => 1,
        };
        let last = match versions.end_bound() {
            Bound::Included(last) => *last,
            Bound::Excluded(end) => end.saturating_sub(1),
            Bound::Unbounded => u64::MAX,
        };
        Span { first: first.max(1), last }
    }

    fn is_empty(&self) -> bool {
        self.first > self.last
    }
}

/// The events of one commit that were asked for, oldest first.
pub(crate) struct CommitEvents {
    /// The version of its first event, whether that was asked for or not.
    pub(crate) first: u64,
    /// How many events the commit has.
    pub(crate) count: u32,
    pub(crate) events: Vec<RecordedEvent>,
}

/// Reads whole commits, a page at a time.
pub(crate) fn commits(
    handle: RawHandle,
    span: Span,
    direction: Direction,
) -> impl Stream<Item = Result<CommitEvents, ReadError>> + Send {
    let pages = stream::try_unfold(Cursor::NotOpen(handle, span, direction), |cursor| async {
        let mut open = match cursor {
            Cursor::NotOpen(handle, span, direction) => match OpenCursor::open(&handle, span, direction).await? {
                Some(open) => open,
                None => return Ok(None),
            },
            Cursor::Open(open) => open,
            Cursor::Done => return Ok(None),
        };
        let entity = open.opener.row.id_hash;
        let page = open.page().await.map_err(|cause| ReadError::unreadable(entity, cause))?;
        let next = if open.is_done { Cursor::Done } else { Cursor::Open(open) };
        Ok::<_, ReadError>(Some((stream::iter(page.into_iter().map(Ok)), next)))
    });
    pages.try_flatten()
}

enum Cursor {
    NotOpen(RawHandle, Span, Direction),
    Open(Box<OpenCursor>),
    Done,
}

struct OpenCursor {
    core: Arc<ShardCore>,
    kind: Arc<dyn Kind>,
    opener: Opener,
    span: Span,
    direction: Direction,
    /// Forward: the last version that was read. Backward: the first one.
    at: u64,
    rows_max: u32,
    /// Whether a page was read.
    is_begun: bool,
    is_done: bool,
}

impl OpenCursor {
    async fn open(handle: &RawHandle, span: Span, direction: Direction) -> Result<Option<Box<Self>>, ReadError> {
        let core = handle.core()?.clone();
        let kind = handle.who()?.kind.clone();
        let Some(opener) = handle.opener().await?.filter(|_| !span.is_empty()) else { return Ok(None) };
        let entity = opener.row.id_hash;
        let at = match direction {
            // Commits have no fixed length: start at the newest one that begins at or before the first version wanted.
            Direction::Forward => match core.shard.commit_before(&opener.row, span.first).await {
                Ok(first) => first.saturating_sub(1),
                Err(error) => return Err(ReadError::unreadable(entity, error)),
            },
            Direction::Backward => span.last.saturating_add(1).min(i64::MAX.unsigned_abs()),
        };
        let (rows_max, is_begun, is_done) = (FIRST_PAGE_ROWS, false, false);
        Ok(Some(Box::new(OpenCursor { core, kind, opener, span, direction, at, rows_max, is_begun, is_done })))
    }

    async fn page(&mut self) -> Result<Vec<CommitEvents>, ReplayError> {
        let (rows, is_last) = match self.direction {
            Direction::Forward => self.opener.page(&self.core.shard, self.at, self.rows_max).await?,
            Direction::Backward => {
                self.opener.page_before(&self.core.shard, self.at, self.is_begun, self.rows_max).await?
            }
        };
        self.is_begun = true;
        self.is_done = is_last;
        let bytes: usize = rows.iter().map(|row| row.body.len()).sum();
        self.rows_max = next_page_rows(rows.len(), bytes);
        let mut commits = Vec::with_capacity(rows.len());
        for row in rows {
            let last = row.version + u64::from(row.count) - 1;
            let is_beyond = match self.direction {
                Direction::Forward => row.version > self.span.last,
                Direction::Backward => last < self.span.first,
            };
            if is_beyond {
                self.is_done = true;
                break;
            }
            self.at = match self.direction {
                Direction::Forward => last,
                Direction::Backward => row.version,
            };
            let plaintext = self.opener.open(&row)?;
            let mut events = decode(&*self.kind, &row, &plaintext)?;
            events.retain(|event| (self.span.first..=self.span.last).contains(&event.version.0));
            commits.push(CommitEvents { first: row.version, count: row.count, events });
        }
        Ok(commits)
    }
}

/// The events of one commit, upcast.
pub(crate) fn decode(kind: &dyn Kind, row: &LogRow, plaintext: &[u8]) -> Result<Vec<RecordedEvent>, ReplayError> {
    let undecodable = |version, event, detail| ReplayError::undecodable(kind.name(), version, event, detail);
    let at = UNIX_EPOCH + Duration::from_micros(row.at_us.max(0).unsigned_abs());
    let body = Body::parse(plaintext).map_err(|error| undecodable(row.version, String::new(), error.to_string()))?;
    let metadata = &body.metadata;
    let event = |(version, (schema, event)): (u64, &(u32, &Bytes))| {
        // Upcasters are the user's code.
        let upcast = catch_unwind(AssertUnwindSafe(|| kind.upcast(*schema, event)))
            .map_err(|_| ReplayError::Panicked { kind: kind.name().to_string(), version: Version(version) })?;
        let (schema, event) = upcast.map_err(|error| undecodable(version, error.event, error.detail))?;
        let nameless = || undecodable(version, String::new(), "it has no name".to_owned());
        let (name, data) = split(&event).ok_or_else(nameless)?;
        Ok(RecordedEvent {
            version: Version(version),
            name: name.to_owned(),
            schema,
            at,
            metadata: metadata.clone(),
            data: data.to_owned(),
        })
    };
    (row.version..).zip(&body.events).map(event).collect()
}
