//! The writer actor: the only writer of one database file, and the place where "durable before acknowledged" is kept.
//!
//! Group commit without lingering: entries gather in the mailbox while a commit is in flight. The first one asks for a flush,
//! which comes to the front only behind all that had gathered; the flush writes them as one transaction.
//!
//! ```text
//!   Submit ─► pending ──Flush──► BEGIN, rows, progress, COMMIT ──ok──► settle all: Ok
//!                                        │ error
//!                                        ▼
//!                     close, reopen, read the commit counter back ──► settle all: written | not written
//!                                        │ cannot be reopened
//!                                        ▼
//!                     Closed: settle all: unknown (if COMMIT had been sent), refuse, try again every second
//! ```
//!
//! Invariants:
//! - An entry is settled with `Ok` only after `COMMIT` returned, or after the file was read back and holds it.
//! - After a failed sync nothing is acknowledged and nothing is read from a shard until a TRUNCATE checkpoint succeeded: a reopened connection
//!   may find frames in the page cache that never reached the disk.
//! - A transaction is never cancelled: it runs to its end inside `handle`, never under `select!` or a timeout.
//! - The commit counter is raised by one in each transaction, so that "did it happen?" has an exact answer.

use std::{
    marker::PhantomData,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use ractor::{Actor, ActorProcessingErr, ActorRef};
use sqlx::{Connection, SqliteConnection};
use tokio::{
    sync::{oneshot, watch},
    task::JoinHandle,
};
use tracing::Instrument;

use crate::{
    CommitError, DiskId, FileOptions, NotWritten, WriterStats,
    book::{Audit, Book, Size},
    checkpointer::{self, Underway, Wake},
    progress::{self, Stored},
    sqlite::{self, CheckpointMode, PAGE_BYTES, Trouble},
    statements,
    watermark::{Mark, WATERMARK_DELAY, WatermarkFile},
};

/// A group is written when it has this many bytes, even if more has gathered: larger ones only add latency.
const GROUP_BYTES_MAX: usize = 4 << 20;
pub(crate) const GROUP_EVENTS_MAX: usize = 4096;
/// How often a file that could not be opened again is tried.
const REOPEN_EVERY: Duration = Duration::from_secs(1);
/// Waits between the attempts to read a file back after a failure, while its waiters wait.
const REOPEN_WAITS: [Duration; 3] = [Duration::ZERO, Duration::from_millis(50), Duration::from_millis(250)];

/// Whether the log was cut.
pub(crate) type Truncated = oneshot::Sender<Result<bool, CommitError>>;

/// What a writer can be asked.
pub(crate) enum WriterMessage<B: Book> {
    /// Write this with the next group.
    Submit(B::Entry),
    /// Write what has gathered.
    Flush,
    /// Try to open the file again.
    Reopen,
    /// Persist the marks with the next group, or with one of their own.
    PersistMarks,
    /// Copy the rest of the log, so that it starts anew.
    FinishCheckpoint(Underway),
    /// Copy the log into the database and cut it to nothing, so that what was deleted is in neither. False if a reader was in the way.
    Truncate { reply: Truncated },
    /// Most of the log is copied for it.
    FinishTruncate,
    /// Tell what the file holds as of now. Not answered while that is in doubt.
    Audit { reply: oneshot::Sender<Audit> },
    /// Write what has gathered, persist the marks, close the file.
    Stop { done: oneshot::Sender<()> },
}

impl<B: Book> ractor::Message for WriterMessage<B> {} // local only

pub(crate) struct Writer<B>(PhantomData<B>);

impl<B> Writer<B> {
    pub(crate) fn new() -> Self {
        Writer(PhantomData)
    }
}

/// What a writer starts from: a file that was opened and checked.
pub(crate) struct WriterArguments<B> {
    pub(crate) path: PathBuf,
    pub(crate) options: FileOptions,
    pub(crate) disk_id: DiskId,
    pub(crate) connection: SqliteConnection,
    pub(crate) checkpointer: SqliteConnection,
    pub(crate) watermark: WatermarkFile,
    pub(crate) commits: u64,
    pub(crate) book: B,
    pub(crate) stats: Arc<WriterStats>,
}

pub(crate) struct WriterState<B: Book> {
    path: PathBuf,
    file: Arc<str>,
    options: FileOptions,
    disk_id: DiskId,
    connection: Option<SqliteConnection>,
    /// Why there is no connection.
    closed: Option<String>,
    reopen_queued: bool,
    /// A group is staged whose outcome is not known.
    in_doubt: bool,
    /// The log must be copied and cut before anything is acknowledged.
    truncate_first: bool,
    stopping: bool,
    commits: u64,
    book: B,
    pending: Vec<B::Entry>,
    pending_size: Size,
    flush_queued: bool,
    /// To the watermark's task; both are dropped to end it.
    marks: Option<(watch::Sender<Mark>, oneshot::Sender<()>)>,
    watermark: JoinHandle<()>,
    checkpointer: JoinHandle<()>,
    /// Dropped to end the checkpointer.
    stop_checkpointer: Option<oneshot::Sender<()>>,
    checkpoint: Arc<Wake>,
    /// Whoever waits for the log to be cut.
    truncations: Vec<Truncated>,
    written_bytes: u64,
    stats: Arc<WriterStats>,
}

impl<B: Book> Actor for Writer<B> {
    type Msg = WriterMessage<B>;
    type State = WriterState<B>;
    type Arguments = WriterArguments<B>;

    async fn pre_start(
        &self,
        myself: ActorRef<Self::Msg>,
        arguments: Self::Arguments,
    ) -> Result<Self::State, ActorProcessingErr> {
        let WriterArguments { path, options, disk_id, connection, checkpointer, watermark, commits, book, stats } =
            arguments;
        let mark = Mark { commits, disk_id, digest: book.progress().digest };
        let (marks, changes) = watch::channel(mark);
        let checkpoint = Arc::new(Wake::default());
        let file = sqlite::file_name(&path);
        let (closing, closed) = oneshot::channel();
        let keeper = keep_watermark(watermark, changes, closed, file.clone(), stats.clone());
        let (stop_checkpointer, stopped) = oneshot::channel();
        let checkpointer =
            checkpointer::run(checkpointer, checkpoint.clone(), stopped, myself, file.clone(), stats.clone());
        Ok(WriterState {
            file,
            path,
            options,
            disk_id,
            connection: Some(connection),
            closed: None,
            reopen_queued: false,
            in_doubt: false,
            truncate_first: false,
            stopping: false,
            commits,
            book,
            pending: Vec::new(),
            pending_size: Size::default(),
            flush_queued: false,
            marks: Some((marks, closing)),
            watermark: tokio::spawn(keeper),
            checkpointer: tokio::spawn(checkpointer),
            stop_checkpointer: Some(stop_checkpointer),
            checkpoint,
            truncations: Vec::new(),
            written_bytes: 0,
            stats,
        })
    }

    async fn handle(
        &self,
        myself: ActorRef<Self::Msg>,
        message: Self::Msg,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            WriterMessage::Submit(entry) => state.submit(entry, &myself).await,
            WriterMessage::Flush => {
                state.flush_queued = false;
                state.flush().await;
            }
            WriterMessage::Reopen => {
                state.reopen_queued = false;
                if let Err(detail) = state.reopen().await {
                    state.close(detail);
                }
            }
            WriterMessage::PersistMarks => {
                state.book.request_marks();
                state.queue_flush(&myself);
            }
            WriterMessage::FinishCheckpoint(Underway { since, span }) => {
                state.finish_checkpoint(since).instrument(span).await;
            }
            WriterMessage::Truncate { reply } => {
                state.truncations.push(reply);
                state.checkpoint.truncate();
            }
            WriterMessage::FinishTruncate => {
                let cut = state.truncate().await;
                for reply in state.truncations.drain(..) {
                    // A caller that is gone does not want to know.
                    let _ = reply.send(cut.clone());
                }
            }
            WriterMessage::Audit { reply } if !state.in_doubt => {
                let stored = Stored { commits: state.commits, progress: state.book.progress() };
                // A receiver that is gone no longer wants to know.
                let _ = reply.send(Audit { stored, slots: state.book.slots(), rewrites: state.book.rewrites() });
            }
            WriterMessage::Audit { .. } => {}
            WriterMessage::Stop { done } => {
                state.stop().await;
                let _ = done.send(());
                myself.stop(None);
            }
        }
        state.queue_reopen(&myself);
        Ok(())
    }

    async fn post_stop(&self, _myself: ActorRef<Self::Msg>, state: &mut Self::State) -> Result<(), ActorProcessingErr> {
        state.checkpointer.abort();
        Ok(())
    }
}

/// How a failed group ended. What was staged is kept or dropped accordingly; while that is unknown it stays staged, and the file
/// tells when it can be opened again.
enum Outcome {
    Written,
    NotWritten(NotWritten),
    Unknown { detail: String },
}

impl<B: Book> WriterState<B> {
    async fn submit(&mut self, entry: B::Entry, myself: &ActorRef<WriterMessage<B>>) {
        if self.stopping {
            return self.book.settle(entry, Err(NotWritten::Stopping.into()));
        }
        let size = B::size(&entry);
        self.pending_size.bytes += size.bytes;
        self.pending_size.events += size.events;
        self.pending.push(entry);
        if self.pending_size.bytes >= GROUP_BYTES_MAX || self.pending_size.events >= GROUP_EVENTS_MAX {
            self.flush().await;
        } else {
            self.queue_flush(myself);
        }
    }

    fn queue_flush(&mut self, myself: &ActorRef<WriterMessage<B>>) {
        if !self.flush_queued {
            // It fails only when this actor is on its way out; what is pending is then settled by `stop`.
            self.flush_queued = myself.cast(WriterMessage::Flush).is_ok();
        }
    }

    fn queue_reopen(&mut self, myself: &ActorRef<WriterMessage<B>>) {
        if self.closed.is_some() && !self.reopen_queued && !self.stopping {
            self.reopen_queued = true;
            myself.send_after(REOPEN_EVERY, || WriterMessage::Reopen);
        }
    }

    /// Writes what has gathered as one transaction and tells everyone how it ended.
    async fn flush(&mut self) {
        let mut group = std::mem::take(&mut self.pending);
        let size = std::mem::take(&mut self.pending_size);
        if !self.book.has_work(&group) {
            return self.settle(group, Ok(()));
        }
        let Some(connection) = self.connection.as_mut() else {
            let detail = self.closed.clone().unwrap_or_default();
            return self.settle(group, Err(NotWritten::Closed { file: self.file.to_string(), detail }.into()));
        };
        let (entries, commits, Size { events, bytes }) = (group.len() as u64, self.commits + 1, size);
        let span =
            tracing::debug_span!(target: "kuma::commit", "commit", file = %self.file, entries, events, bytes, commits);
        tracing::trace!(target: "kuma::commit", file = %self.file, entries, "begin");
        let begun = Instant::now();
        let mut committing = false;
        let transaction = self.book.transact(connection, &mut group, commits, &mut committing);
        let settlement = match transaction.instrument(span.clone()).await {
            Ok(()) => {
                self.stats.group_committed(begun.elapsed());
                self.written();
                Ok(())
            }
            Err(error) => match self.recover(error, committing).instrument(span).await {
                Outcome::Written => Ok(()),
                Outcome::NotWritten(why) => Err(CommitError::NotWritten(why)),
                Outcome::Unknown { detail } => Err(CommitError::Unknown { file: self.file.to_string(), detail }),
            },
        };
        tracing::trace!(target: "kuma::commit", file = %self.file, entries, ok = settlement.is_ok(), "end");
        self.stats.group_ended(entries);
        self.settle(group, settlement);
        self.note_written(size);
    }

    fn settle(&mut self, group: Vec<B::Entry>, outcome: Result<(), CommitError>) {
        for entry in group {
            self.book.settle(entry, outcome.clone());
        }
    }

    /// The staged group is in the file.
    fn written(&mut self) {
        self.commits += 1;
        self.book.keep();
        let digest = self.book.progress().digest;
        if let Some((marks, _)) = &self.marks {
            marks.send_replace(Mark { commits: self.commits, disk_id: self.disk_id, digest });
        }
    }

    /// Wakes the checkpointer now and then; it looks at the true length of the log by itself.
    fn note_written(&mut self, size: Size) {
        self.written_bytes += size.bytes as u64 + 8 * PAGE_BYTES;
        if self.written_bytes >= checkpointer::LOOK_EVERY_BYTES {
            self.written_bytes = 0;
            self.checkpoint.look();
        }
    }

    /// After an error inside a transaction: closes the connection, opens a new one and asks the file what happened.
    async fn recover(&mut self, error: sqlx::Error, committing: bool) -> Outcome {
        let detail = sqlite::detail(&error);
        let trouble = sqlite::trouble(&error);
        self.stats.group_failed();
        tracing::warn!(file = %self.file, error = %detail, committing, "a group commit failed; reading the file back");
        // A full disk refuses a write and has synced nothing. Anything else may have been a sync.
        self.truncate_first |= trouble != Trouble::DiskFull;
        self.stats.set_suspect(self.truncate_first);
        self.in_doubt = true;
        if let Some(connection) = self.connection.take() {
            // Its thread may still be busy with the failed statement: wait for it. The error is known already.
            let _ = connection.close().await;
        }
        let before = self.commits;
        for wait in REOPEN_WAITS {
            tokio::time::sleep(wait).await;
            match self.reopen().await {
                Ok(()) if self.commits > before => return Outcome::Written,
                Ok(()) => {
                    let file = self.file.to_string();
                    return Outcome::NotWritten(match trouble {
                        Trouble::DiskFull | Trouble::IndexFull => NotWritten::DiskFull { file },
                        _ => NotWritten::Io { file, detail },
                    });
                }
                Err(why) => self.close(why),
            }
        }
        if committing {
            return Outcome::Unknown { detail };
        }
        // COMMIT was never sent, so that there is no doubt.
        self.in_doubt = false;
        self.book.drop_staged();
        Outcome::NotWritten(NotWritten::Closed { file: self.file.to_string(), detail })
    }

    fn close(&mut self, why: String) {
        if self.closed.is_none() {
            tracing::error!(file = %self.file, error = %why, "the file is closed; it is tried again by itself");
        }
        self.stats.set_closed(true);
        self.closed = Some(why);
    }

    /// Opens the file again and settles what was in doubt. Changes nothing if it fails.
    async fn reopen(&mut self) -> Result<(), String> {
        if self.connection.is_some() {
            return Ok(());
        }
        let mut connection =
            sqlite::connect_writer(&self.path, &self.options, false).await.map_err(|error| sqlite::detail(&error))?;
        match self.read_back(&mut connection).await {
            Ok(stored) => {
                let happened = self.in_doubt && stored.commits == self.commits + 1;
                if !happened && stored.commits != self.commits {
                    let _ = connection.close().await;
                    let commits = self.commits;
                    return Err(format!(
                        "its commit counter is {}, expected {commits}; restart the store",
                        stored.commits
                    ));
                }
                if happened {
                    self.written();
                } else if self.in_doubt {
                    self.book.drop_staged();
                }
                self.in_doubt = false;
                self.truncate_first = false;
                self.connection = Some(connection);
                if self.closed.take().is_some() {
                    tracing::info!(file = %self.file, "the file is open again");
                }
                self.stats.set_closed(false);
                self.stats.set_suspect(false);
                Ok(())
            }
            Err(detail) => {
                let _ = connection.close().await;
                Err(detail)
            }
        }
    }

    async fn read_back(&mut self, connection: &mut SqliteConnection) -> Result<Stored, String> {
        if self.truncate_first {
            let done = sqlite::checkpoint(connection, CheckpointMode::Truncate)
                .await
                .map_err(|error| sqlite::detail(&error))?;
            if done.busy {
                return Err("a reader was in the way of the checkpoint that a failed sync calls for".to_owned());
            }
        }
        progress::read(connection)
            .await
            .map_err(|error| sqlite::detail(&error))?
            .ok_or_else(|| "its progress row is damaged".to_owned())
    }

    /// The checkpointer has copied all but the newest pages. Copying the rest between two transactions lets the log start anew:
    /// under steady load a concurrent checkpoint never catches up, and the log would grow without bound.
    async fn finish_checkpoint(&mut self, since: Instant) {
        let Some(connection) = self.connection.as_mut() else { return };
        match sqlite::checkpoint(connection, CheckpointMode::Passive).await {
            Ok(done) => {
                self.stats.checkpoint_finished(since.elapsed());
                tracing::debug!(target: "kuma::checkpoint", file = %self.file, pages = done.log_pages, copied = done.copied_pages, "done");
            }
            // Safe to try again: the log was synced, and every page is written anew.
            Err(error) => {
                tracing::warn!(file = %self.file, error = %sqlite::detail(&error), "a checkpoint failed; it is tried again")
            }
        }
    }

    /// Waits for no reader: commits wait meanwhile.
    async fn truncate(&mut self) -> Result<bool, CommitError> {
        let Some(connection) = self.connection.as_mut() else {
            let detail = self.closed.clone().unwrap_or_default();
            return Err(NotWritten::Closed { file: self.file.to_string(), detail }.into());
        };
        let not_cut = |file: &str, error| NotWritten::Io { file: file.to_owned(), detail: sqlite::detail(error) };
        match sqlite::truncate_at_once(connection).await {
            Ok(done) => {
                self.stats.set_wal_pages(done.log_pages);
                if done.busy {
                    return Ok(false);
                }
            }
            // Safe to try again: the log keeps all until it is cut.
            Err(error) => return Err(not_cut(&self.file, &error).into()),
        }
        match statements::sync_log(connection).await {
            Ok(()) => Ok(true),
            Err(error) => {
                let why = not_cut(&self.file, &error);
                self.recover(error, false).await;
                Err(why.into())
            }
        }
    }

    async fn stop(&mut self) {
        self.book.request_marks();
        self.flush().await;
        self.stopping = true;
        // It finishes what it is at, and closes its connection.
        self.stop_checkpointer = None;
        if let Err(error) = (&mut self.checkpointer).await {
            tracing::warn!(file = %self.file, %error, "the checkpointer's task failed");
        }
        // The task writes the newest mark and ends.
        self.marks = None;
        if let Err(error) = (&mut self.watermark).await {
            tracing::warn!(file = %self.file, %error, "the watermark's task failed");
        }
        if let Some(connection) = self.connection.take() {
            // The last connection to leave copies the log into the database and deletes it.
            if let Err(error) = connection.close().await {
                tracing::warn!(file = %self.file, error = %sqlite::detail(&error), "the file did not close cleanly; nothing is lost");
            }
        }
    }
}

/// Writes each newest mark, and waits a little between two, until the writer lets go of `marks`.
async fn keep_watermark(
    mut watermark: WatermarkFile,
    mut marks: watch::Receiver<Mark>,
    mut closing: oneshot::Receiver<()>,
    file: Arc<str>,
    stats: Arc<WriterStats>,
) {
    while marks.changed().await.is_ok() {
        let mark = *marks.borrow_and_update();
        let written = tokio::task::spawn_blocking(move || {
            let result = watermark.write(&mark);
            (watermark, result)
        })
        .await;
        let Ok((back, result)) = written else { return };
        watermark = back;
        if let Err(error) = result {
            stats.watermark_failed();
            tracing::warn!(%file, %error, "the watermark could not be written; a lost log would not be noticed until it can");
        }
        if !closing.is_terminated() {
            // Either end of the wait is fine: the store closes, or it is time.
            let _ = tokio::time::timeout(WATERMARK_DELAY * 4 / 5, &mut closing).await;
        }
    }
}
