//! A shard of its own for the tests in this crate, without anything above it.

use std::{ops::Deref, sync::Arc};

use ractor::{Actor, ActorProcessingErr, ActorRef, SupervisionEvent};
use sqlx::Connection;
use tokio::sync::oneshot;

use crate::{
    Activation, Commit, CommitError, CopyId, DiskId, EntityHash, EntityRow, FileOptions, Shard, ShardOptions, Slot,
    SnapshotRow, Submission, sqlite, writer::WriterMessage,
};

pub(crate) const SHARDS: u16 = 2;

/// What a test waits for until something is settled.
pub(crate) type Settled = oneshot::Receiver<Result<(), CommitError>>;

/// Its children may end as they like.
struct Root;

impl Actor for Root {
    type Msg = ();
    type State = ();
    type Arguments = ();

    async fn pre_start(&self, _: ActorRef<()>, (): ()) -> Result<(), ActorProcessingErr> {
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        _: ActorRef<()>,
        _: SupervisionEvent,
        (): &mut (),
    ) -> Result<(), ActorProcessingErr> {
        Ok(())
    }
}

pub(crate) struct TestShard {
    shard: Shard,
    pub(crate) options: ShardOptions,
    root: ActorRef<()>,
    _directory: tempfile::TempDir,
}

impl Deref for TestShard {
    type Target = Shard;

    fn deref(&self) -> &Shard {
        &self.shard
    }
}

impl TestShard {
    /// Shard 0 of [`SHARDS`], so that it has the even slots.
    pub(crate) async fn new() -> Self {
        Self::of(true).await
    }

    /// The same, of a disk that owns no slot.
    pub(crate) async fn without_slots() -> Self {
        Self::of(false).await
    }

    async fn of(owns_slots: bool) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let options = ShardOptions {
            number: 0,
            shards: SHARDS,
            directory: directory.path().to_owned(),
            disk_id: DiskId([7; 16]),
            file: FileOptions::default(),
            queue_bytes_max: 1 << 20,
            owns_slots,
        };
        Shard::create(&options).await.unwrap();
        let (root, _) = Actor::spawn(None, Root, ()).await.unwrap();
        let shard = Shard::open(&options, root.get_cell()).await.unwrap();
        TestShard { shard, options, root, _directory: directory }
    }

    /// What may supervise another file's writer.
    pub(crate) fn root(&self) -> ractor::ActorCell {
        self.root.get_cell()
    }

    /// Closes the file, so that all commits are in the index, and opens it again.
    pub(crate) async fn reopen(&mut self) {
        self.shard.stop().await;
        self.start().await;
    }

    /// Opens the file after it was stopped.
    pub(crate) async fn start(&mut self) {
        self.shard = Shard::open(&self.options, self.root.get_cell()).await.unwrap();
    }

    /// As after the death of the process: nothing was moved to the indexes, and no file was closed.
    pub(crate) async fn crash(&mut self) {
        let files = || std::fs::read_dir(&self.options.directory).unwrap().map(|file| file.unwrap().path());
        // Nothing is on its way, so that they are as of one moment. The -shm file is made anew.
        let kept: Vec<_> = files().filter(|path| !path.to_string_lossy().ends_with("-shm")).collect();
        let kept: Vec<_> = kept.into_iter().map(|path| (std::fs::read(&path).unwrap(), path)).collect();
        self.shard.stop().await;
        files().for_each(|path| std::fs::remove_file(path).unwrap());
        kept.into_iter().for_each(|(bytes, path)| std::fs::write(path, bytes).unwrap());
        self.start().await;
    }

    /// Changes the file behind the store's back.
    pub(crate) async fn tamper(&mut self, statement: &'static str) {
        self.shard.stop().await;
        let path = self.options.directory.join(self.shard.file());
        let mut connection = sqlite::connect_writer(&path, &self.options.file, false).await.unwrap();
        sqlx::query(statement).execute(&mut connection).await.unwrap();
        connection.close().await.unwrap();
        self.start().await;
    }

    /// Damages the head of the first page of the file that holds `needle`.
    pub(crate) async fn damage_page_of(&mut self, needle: &[u8]) {
        self.shard.stop().await;
        let path = self.options.directory.join(self.shard.file());
        let mut bytes = std::fs::read(&path).unwrap();
        let place = bytes.windows(needle.len()).position(|window| window == needle).unwrap();
        let head = place - place % sqlite::PAGE_BYTES as usize;
        bytes[head..head + 8].fill(0xff);
        std::fs::write(&path, bytes).unwrap();
        self.start().await;
    }

    /// An entity that has no row yet. Each `name` is one.
    pub(crate) fn entity(&self, name: u8, slot: u64) -> Arc<EntityRow> {
        Arc::new(EntityRow {
            eid: self.shard.allocate_eid(),
            copy: CopyId::LIVE,
            slot: Slot::new(slot),
            kind: "thing".into(),
            id_hash: EntityHash([name; 16]),
            life: 1,
            sealed_id: vec![name],
            key_id: [name; 16],
            created_at_us: 1,
            erased_at_us: None,
        })
    }

    /// Hands in a commit. On a current-thread runtime all that is handed in without an await in between is one group.
    pub(crate) fn submit(&self, activation: &Arc<Activation>, commit: Commit) -> Settled {
        let (told, settled) = oneshot::channel();
        let on_settled = Box::new(move |result| told.send(result).unwrap());
        self.shard.submit(Submission { activation: activation.clone(), commit: Some(commit), on_settled });
        settled
    }

    /// Appends one commit for each of `versions`, as a new activation, and waits for all.
    pub(crate) async fn append(&self, entity: &Arc<EntityRow>, versions: std::ops::RangeInclusive<u64>) {
        let activation = Arc::new(Activation::at(versions.start() - 1));
        let settled: Vec<Settled> = versions.map(|version| self.submit(&activation, commit(entity, version))).collect();
        for settled in settled {
            settled.await.unwrap().unwrap();
        }
    }

    /// Hands in a snapshot.
    pub(crate) fn save(&self, snapshot: SnapshotRow) -> Settled {
        let (told, settled) = oneshot::channel();
        self.shard.save_snapshot(snapshot, Box::new(move |result| told.send(result).unwrap()));
        settled
    }

    /// Has the writer move the tail to the index, with its next group.
    pub(crate) fn persist_marks(&self) {
        self.shard.database().writer.cast(WriterMessage::PersistMarks).unwrap();
    }
}

/// A commit of one event, with an append key that names its version.
pub(crate) fn commit(entity: &Arc<EntityRow>, version: u64) -> Commit {
    Commit {
        entity: entity.clone(),
        create: version == 1,
        first_version: version,
        count: 1,
        at_us: 1,
        append_key: Some(version.to_le_bytes().to_vec()),
        body: format!("{} {version}", entity.eid).into_bytes(),
    }
}
