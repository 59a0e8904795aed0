//! An open database file: its writer, its readers, and what is the same for a shard and for `keys.db`.

use std::{sync::Arc, time::Duration};

use ractor::{Actor, ActorCell, ActorRef};
use sqlx::{Row, SqlitePool};
use tokio::sync::oneshot;

use crate::{
    CommitError, NotWritten, OpenError, ReadError, StatsView, WriterStats,
    book::{Audit, Book},
    open::FileSpec,
    sqlite::{self, Trouble},
    writer::{Writer, WriterArguments, WriterMessage},
};

/// Connections that read a file. More only add threads: a page of rows is read in well under a millisecond.
const READERS: u32 = 2;
/// How often the log is tried to be cut while readers are in the way, and how much longer the wait is each time: some 10 s in all.
const TRUNCATE_ATTEMPTS: u32 = 45;
const TRUNCATE_WAIT: Duration = Duration::from_millis(10);

pub(crate) struct Database<B: Book> {
    /// The name of the file, for messages.
    pub(crate) file: Arc<str>,
    pub(crate) writer: ActorRef<WriterMessage<B>>,
    pub(crate) readers: SqlitePool,
    pub(crate) stats: Arc<WriterStats>,
}

impl<B: Book> Database<B> {
    /// Opens a file that was inspected, `book` being its content as of `commits`, and starts its writer under `supervisor`.
    pub(crate) async fn open(spec: &FileSpec, commits: u64, book: B, supervisor: ActorCell) -> Result<Self, OpenError> {
        let opened = spec.open().await?;
        let stats = Arc::new(WriterStats::new(&sqlite::file_name(&spec.path)));
        let arguments = WriterArguments {
            checkpointer: spec.connect_checkpointer().await?,
            path: spec.path.clone(),
            options: spec.options.clone(),
            disk_id: spec.disk_id,
            connection: opened.connection,
            watermark: opened.watermark,
            commits,
            book,
            stats: stats.clone(),
        };
        let (writer, _) = Actor::spawn_linked(None, Writer::new(), arguments, supervisor).await.map_err(|error| {
            OpenError::Io { path: spec.path.clone(), source: std::io::Error::other(error.to_string()) }
        })?;
        let readers = sqlite::reader_pool(&spec.path, &spec.options, READERS);
        Ok(Database { file: sqlite::file_name(&spec.path), writer, readers, stats })
    }

    /// What the file holds as of now; an error where its writer cannot tell.
    pub(crate) async fn audit(&self) -> Result<Audit, ReadError> {
        let (reply, answer) = oneshot::channel();
        // Should the writer be gone, the answer is what tells: its sender is gone too.
        let _ = self.writer.cast(WriterMessage::Audit { reply });
        answer.await.map_err(|_| ReadError::Closed { file: self.file.to_string() })
    }

    /// Copies the log into the database and cuts it to nothing: what was deleted before is in neither then. Commits go on meanwhile, but for
    /// the rest that is copied between two of them.
    pub(crate) async fn truncate_log(&self) -> Result<(), CommitError> {
        let busy = || NotWritten::Io {
            file: self.file.to_string(),
            detail: "a reader holds an old state of the log open, so that deleted bytes stay in it".to_owned(),
        };
        for attempt in 1..=TRUNCATE_ATTEMPTS {
            let (reply, answer) = oneshot::channel();
            let stopping = |_| CommitError::from(NotWritten::Stopping);
            self.writer.cast(WriterMessage::Truncate { reply }).map_err(|_| CommitError::from(NotWritten::Stopping))?;
            if answer.await.map_err(stopping)?? {
                return Ok(());
            }
            tokio::time::sleep(TRUNCATE_WAIT * attempt).await;
        }
        Err(busy().into())
    }

    /// The first pages of these tables.
    pub(crate) async fn roots(&self, tables: &[&'static str]) -> Result<Vec<u32>, ReadError> {
        let mut roots = Vec::new();
        for table in tables {
            let row = sqlx::query("SELECT rootpage FROM sqlite_schema WHERE name = ?").bind(*table);
            let row = row.fetch_one(&self.readers).await.map_err(|error| self.read_error(error))?;
            roots.push(row.try_get(0).map_err(|error| self.read_error(error))?);
        }
        Ok(roots)
    }

    /// Numbers about the writer.
    pub(crate) fn stats(&self) -> StatsView {
        self.stats.view()
    }

    /// Stops the writer: what was submitted is written first, then the file is closed.
    pub(crate) async fn stop(&self) {
        self.readers.close().await;
        let (done, stopped) = oneshot::channel();
        // A writer that is gone has nothing left to write.
        if self.writer.cast(WriterMessage::Stop { done }).is_ok() {
            let _ = stopped.await;
        }
    }

    /// An error of a reader, told by whether stored bytes are damaged.
    pub(crate) fn read_error(&self, source: sqlx::Error) -> ReadError {
        let file = self.file.to_string();
        match sqlite::trouble(&source) {
            Trouble::Corrupt => ReadError::Corrupt { file, source },
            _ => ReadError::Sqlite { file, source },
        }
    }
}
