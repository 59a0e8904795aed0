//! The book of a file that is a few plain tables: keys, or what a node knows. There is no log in it; what is kept in memory is the sum of
//! its rows.
//!
//! Invariant: the sum changes with the rows, in the same transaction.

use sqlx::SqliteConnection;
use tokio::sync::oneshot;

use crate::{
    CommitError, Digest, NotWritten,
    book::{Book, Progress, Size},
    database::Database,
    progress::Stored,
    statements,
    writer::WriterMessage,
};

/// What a file's tables are changed by.
pub(crate) trait Change: Send + 'static {
    /// About how many bytes it adds to its group.
    fn bytes(&self) -> usize;

    /// Writes it into the open transaction, and keeps the sum of the rows.
    fn write(
        &self,
        connection: &mut SqliteConnection,
        digest: &mut Digest,
    ) -> impl Future<Output = sqlx::Result<()>> + Send;
}

/// A change, with whoever waits for it.
pub(crate) struct Entry<C> {
    change: C,
    reply: oneshot::Sender<Result<(), CommitError>>,
}

pub(crate) struct TableBook<C> {
    digest: Digest,
    staged: Option<Digest>,
    change: std::marker::PhantomData<fn(C)>,
}

impl<C> TableBook<C> {
    /// Of a file whose rows have this sum.
    pub(crate) fn new(digest: Digest) -> Self {
        TableBook { digest, staged: None, change: std::marker::PhantomData }
    }
}

impl<C: Change + Sync> Book for TableBook<C> {
    type Entry = Entry<C>;

    fn size(entry: &Entry<C>) -> Size {
        Size { bytes: entry.change.bytes(), events: 1 }
    }

    fn has_work(&self, group: &[Entry<C>]) -> bool {
        !group.is_empty()
    }

    async fn transact(
        &mut self,
        connection: &mut SqliteConnection,
        group: &mut [Entry<C>],
        commits: u64,
        committing: &mut bool,
    ) -> sqlx::Result<()> {
        let mut digest = self.digest;
        statements::execute(connection, "BEGIN IMMEDIATE").await?;
        for entry in group.iter() {
            entry.change.write(connection, &mut digest).await?;
        }
        self.staged = Some(digest);
        let stored = Stored { commits, progress: self.progress() };
        *committing = true;
        statements::commit(connection, &stored).await
    }

    fn request_marks(&mut self) {}

    fn progress(&self) -> Progress {
        Progress { next_position: 1, mark_position: 0, indexed_position: 0, digest: self.staged.unwrap_or(self.digest) }
    }

    fn keep(&mut self) {
        self.digest = self.staged.take().unwrap_or(self.digest);
    }

    fn drop_staged(&mut self) {
        self.staged = None;
    }

    fn settle(&mut self, entry: Entry<C>, outcome: Result<(), CommitError>) {
        // A caller that is gone does not want to know.
        let _ = entry.reply.send(outcome);
    }
}

impl<C: Change + Sync> Database<TableBook<C>> {
    /// Hands a change to the writer; it is durable when this returns.
    pub(crate) async fn change(&self, change: C) -> Result<(), CommitError> {
        let (reply, settled) = oneshot::channel();
        if self.writer.cast(WriterMessage::Submit(Entry { change, reply })).is_err() {
            return Err(NotWritten::Stopping.into());
        }
        let unknown = |_| CommitError::Unknown { file: self.file.to_string(), detail: "its writer stopped".to_owned() };
        settled.await.map_err(unknown)?
    }
}
