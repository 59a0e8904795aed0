//! The checkpointer: copies the write-ahead log into the database beside the writer.
//!
//! Invariants:
//! - It never stands in the path of an acknowledgement for longer than the rest that the writer copies between two transactions.
//! - A failed checkpoint changes nothing: the log keeps all, and the next attempt writes every page anew.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Instant,
};

use ractor::ActorRef;
use sqlx::{Connection, SqliteConnection};
use tokio::sync::{Notify, oneshot};
use tracing::{Instrument, Span};

use crate::{
    WriterStats,
    book::Book,
    sqlite::{self, CheckpointMode},
    writer::WriterMessage,
};

/// The log is looked at after about this much was written.
pub(crate) const LOOK_EVERY_BYTES: u64 = 2 << 20;
/// The log is copied when it has this many pages (16 MiB).
const CHECKPOINT_PAGES: u64 = 4000;
/// What may be left for the writer to copy while it commits nothing (4 MiB).
const REST_PAGES_MAX: u64 = 1000;
/// Attempts to get below [`REST_PAGES_MAX`] while the writer goes on.
const ROUNDS_MAX: usize = 3;
/// A log this long (256 MiB) means that a reader is in the way.
const WARN_PAGES: u64 = 65_536;

/// How the checkpointer is woken.
#[derive(Default)]
pub(crate) struct Wake {
    called: Notify,
    truncate: AtomicBool,
}

impl Wake {
    /// Something was written.
    pub(crate) fn look(&self) {
        self.called.notify_one();
    }

    /// The log is to be cut to nothing.
    pub(crate) fn truncate(&self) {
        self.truncate.store(true, Relaxed);
        self.called.notify_one();
    }
}

/// A checkpoint on its way: begun beside the writer, finished by it.
pub(crate) struct Underway {
    pub(crate) since: Instant,
    pub(crate) span: Span,
}

/// Runs until `stop` is dropped, then closes its connection.
pub(crate) async fn run<B: Book>(
    mut connection: SqliteConnection,
    wake: Arc<Wake>,
    mut stop: oneshot::Receiver<()>,
    writer: ActorRef<WriterMessage<B>>,
    file: Arc<str>,
    stats: Arc<WriterStats>,
) {
    loop {
        // Only waiting is given up here, never a checkpoint.
        tokio::select! {
            () = wake.called.notified() => {}
            _ = &mut stop => break,
        }
        if wake.truncate.swap(false, Relaxed) {
            // What this leaves, or cannot do, the writer does.
            if let Err(error) = copy(&mut connection).await {
                tracing::warn!(%file, error = %sqlite::detail(&error), "a checkpoint failed; it is tried again");
            }
            let _ = writer.cast(WriterMessage::FinishTruncate);
        }
        match look_and_copy(&mut connection, &writer, &file, &stats).await {
            Ok(pages) if pages > WARN_PAGES => {
                tracing::warn!(%file, pages, "the log grows: a reader holds an old state open");
            }
            Ok(_) => {}
            Err(error) => {
                tracing::warn!(%file, error = %sqlite::detail(&error), "a checkpoint failed; it is tried again");
            }
        }
    }
    // Nothing is lost with it: the writer's connection is still there.
    let _ = connection.close().await;
}

async fn look_and_copy<B: Book>(
    connection: &mut SqliteConnection,
    writer: &ActorRef<WriterMessage<B>>,
    file: &str,
    stats: &WriterStats,
) -> sqlx::Result<u64> {
    let log = sqlite::checkpoint(connection, CheckpointMode::Noop).await?;
    stats.set_wal_pages(log.log_pages);
    if log.log_pages < CHECKPOINT_PAGES {
        return Ok(log.log_pages);
    }
    // A writer that is gone needs no checkpoint: whoever opens the file next does it.
    let _ = writer.cast(WriterMessage::PersistMarks);
    let span = tracing::debug_span!(target: "kuma::checkpoint", "checkpoint", file, pages = log.log_pages);
    let underway = Underway { since: Instant::now(), span: span.clone() };
    copy(connection).instrument(span).await?;
    let _ = writer.cast(WriterMessage::FinishCheckpoint(underway));
    Ok(log.log_pages)
}

/// Copies all but a rest that the writer can copy between two transactions, or as much as a few rounds do.
async fn copy(connection: &mut SqliteConnection) -> sqlx::Result<()> {
    for _ in 0..ROUNDS_MAX {
        sqlite::checkpoint(connection, CheckpointMode::Passive).await?;
        let log = sqlite::checkpoint(connection, CheckpointMode::Noop).await?;
        if log.log_pages - log.copied_pages.min(log.log_pages) <= REST_PAGES_MAX {
            break;
        }
    }
    Ok(())
}
