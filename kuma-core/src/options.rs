//! How a store is opened.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use kuma_crypto::{IdSecret, LocalMasterKey, MasterKey, MasterKeyError};
use kuma_shard::Durability;

use crate::{
    KindOptions, StartError, body::Limits, restart::RestartPolicy, scan::FileReader, snapshot::SnapshotPolicy,
};

/// Where the master key comes from.
#[derive(Clone, Debug)]
pub enum MasterKeySource {
    /// A file with mode 0600. It is created with a new random key when a new store is; keep a copy elsewhere, without it nothing
    /// in the store can be read.
    File(PathBuf),
    /// An environment variable with the content of such a file.
    Env(String),
    /// Anything else, a key management service say.
    Provider(Arc<dyn MasterKey>),
}

/// How a store is opened. Every option has a default but the directory.
#[derive(Clone, Debug)]
pub struct Options {
    pub(crate) data_dir: PathBuf,
    pub(crate) context: String,
    pub(crate) shards: Option<u16>,
    pub(crate) master_key: Option<MasterKeySource>,
    pub(crate) durability: Durability,
    pub(crate) vfs: Option<String>,
    pub(crate) keep_deleted_bytes: bool,
    /// The directory is one that a restore has filled and not finished.
    pub(crate) restoring: bool,
    pub(crate) idle_timeout: Duration,
    pub(crate) memory_budget: usize,
    pub(crate) limits: Limits,
    pub(crate) entity_appends_max: usize,
    pub(crate) shard_bytes_max: usize,
    pub(crate) restart: RestartPolicy,
    pub(crate) snapshots: Option<SnapshotPolicy>,
    pub(crate) scrub_bytes_per_second: u64,
    pub(crate) wall_clock: WallClock,
    pub(crate) file_reader: FileReader,
    pub(crate) kinds: HashMap<String, KindOptions>,
    pub(crate) seat: Option<Seat>,
    pub(crate) id_secret: Option<Arc<IdSecret>>,
}

/// How a store came to its cluster.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seat {
    /// As its first node.
    Founder,
    /// Later.
    Joiner,
}

/// What tells the time of commits.
#[derive(Clone)]
pub(crate) struct WallClock(Arc<dyn Fn() -> SystemTime + Send + Sync>);

impl WallClock {
    /// Microseconds since 1970.
    pub(crate) fn now_us(&self) -> i64 {
        crate::micros((self.0)())
    }
}

impl std::fmt::Debug for WallClock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("WallClock")
    }
}

/// At most this many files: each is a writer with a group of its own, and more of them make groups smaller.
const SHARDS_MAX: u16 = 256;

impl Options {
    /// A store in `data_dir`, which is created if it does not exist.
    pub fn new(data_dir: impl AsRef<Path>) -> Self {
        Options {
            data_dir: data_dir.as_ref().to_owned(),
            context: "kuma".to_owned(),
            shards: None,
            master_key: None,
            durability: Durability::Full,
            vfs: None,
            keep_deleted_bytes: false,
            restoring: false,
            idle_timeout: Duration::from_secs(300),
            memory_budget: 1 << 30,
            limits: Limits::DEFAULT,
            entity_appends_max: 1024,
            shard_bytes_max: 64 << 20,
            restart: RestartPolicy {
                failures_max: 3,
                window: Duration::from_secs(60),
                quarantine: Duration::from_secs(300),
            },
            snapshots: Some(SnapshotPolicy { commits: 256, bytes: 1 << 20 }),
            scrub_bytes_per_second: 1 << 20,
            wall_clock: WallClock(Arc::new(SystemTime::now)),
            file_reader: FileReader::default(),
            kinds: HashMap::new(),
            seat: None,
            id_secret: None,
        }
    }

    /// The store's name, "payments" say. It is kept with the data, keys are bound to it, and a directory of another name is
    /// refused. Default: "kuma".
    pub fn context(mut self, name: impl Into<String>) -> Self {
        self.context = name.into();
        self
    }

    /// How many shard files. Fixed at creation; a number that differs from the stored one is refused. Default: 2 for each core,
    /// at least 4 and at most 16, or as the store was created.
    pub fn shards(mut self, shards: u16) -> Self {
        self.shards = Some(shards);
        self
    }

    /// Where the master key comes from. Default: `master.key` in the data directory.
    pub fn master_key(mut self, source: MasterKeySource) -> Self {
        self.master_key = Some(source);
        self
    }

    /// What an acknowledgement means. Default: [`Durability::Full`].
    pub fn durability(mut self, durability: Durability) -> Self {
        self.durability = durability;
        self
    }

    /// The SQLite VFS to use instead of the default one. For fault injection.
    pub fn vfs(mut self, name: impl Into<String>) -> Self {
        self.vfs = Some(name.into());
        self
    }

    /// Leaves what is erased in the files, for the control of a test that looks for it there.
    #[doc(hidden)]
    pub fn keep_deleted_bytes(mut self) -> Self {
        self.keep_deleted_bytes = true;
        self
    }

    /// An entity that was not used for this long leaves memory. Default: 5 minutes.
    pub fn idle_timeout(mut self, timeout: Duration) -> Self {
        self.idle_timeout = timeout;
        self
    }

    /// About how many bytes live entities may take, counting 12 KiB for each plus its state; beyond it the least recently used
    /// ones leave memory. Default: 1 GiB, some 87,000 small entities.
    pub fn memory_budget(mut self, bytes: usize) -> Self {
        self.memory_budget = bytes;
        self
    }

    /// The largest event, encoded. Default: 1 MiB. An append holds at most 4 MiB and 4096 events.
    pub fn event_bytes_max(mut self, bytes: usize) -> Self {
        self.limits.event_bytes_max = bytes;
        self
    }

    /// How many appends of one entity may wait at once; beyond it they are refused as overloaded. Default: 1024.
    pub fn entity_appends_max(mut self, appends: usize) -> Self {
        self.entity_appends_max = appends;
        self
    }

    /// How many bytes of one shard may wait for the disk; beyond it appends are refused as overloaded. Default: 64 MiB.
    pub fn shard_bytes_max(mut self, bytes: usize) -> Self {
        self.shard_bytes_max = bytes;
        self
    }

    /// An entity that fails `failures_max` times within `window` is quarantined for `quarantine`. Default: 3, 1 minute, 5 minutes.
    pub fn quarantine(mut self, failures_max: u32, window: Duration, quarantine: Duration) -> Self {
        self.restart = RestartPolicy { failures_max, window, quarantine };
        self
    }

    /// A snapshot of an entity is made when so many commits, or so many bytes of them, would have to be replayed on top of the one
    /// before; of a large state less often, so that no more is written than was appended. Default: 256 commits, 1 MiB.
    pub fn snapshot_every(mut self, commits: u64, bytes: u64) -> Self {
        self.snapshots = Some(SnapshotPolicy { commits: commits.max(1), bytes: bytes.max(1) });
        self
    }

    /// Makes no snapshots and uses none that are there: entities are replayed from their first event.
    pub fn no_snapshots(mut self) -> Self {
        self.snapshots = None;
        self
    }

    /// How fast stored commits are read and verified in the background, in bytes of them a second, each counting at least 2 KiB; 0
    /// turns it off. Default: 1 MiB/s, which is at most 512 commits a second and 86 GiB a day.
    pub fn scrub_bytes_per_second(mut self, bytes: u64) -> Self {
        self.scrub_bytes_per_second = bytes;
        self
    }

    /// The program that writes a file, which is given as its last argument, to its standard output. [`Kuma::verify_receipt`](crate::Kuma::verify_receipt)
    /// reads the store's own files by it, because this process must not open them. Default: `cat --`.
    pub fn file_reader(mut self, program: impl Into<PathBuf>, arguments: impl IntoIterator<Item = String>) -> Self {
        self.file_reader = FileReader { program: program.into(), arguments: arguments.into_iter().collect() };
        self
    }

    /// What tells the time of commits, instead of the system's clock. For tests.
    pub fn wall_clock(mut self, now: impl Fn() -> SystemTime + Send + Sync + 'static) -> Self {
        self.wall_clock = WallClock(Arc::new(now));
        self
    }

    /// The store is that of a node in a cluster: a new one owns all slots if it founds the cluster, and none if it joins it, with the secret that
    /// the cluster's ids are hashed with. For `kuma-cluster`.
    #[doc(hidden)]
    pub fn clustered(mut self, seat: Seat, id_secret: Option<[u8; 32]>) -> Self {
        self.seat = Some(seat);
        self.id_secret = id_secret.map(|bytes| Arc::new(crate::slots::id_secret(bytes)));
        self
    }

    /// Settings for the entities of one kind.
    pub fn kind(mut self, kind: impl Into<String>, options: KindOptions) -> Self {
        self.kinds.insert(kind.into(), options);
        self
    }

    pub(crate) fn check(&self) -> Result<(), StartError> {
        let refuse = |option, reason: &str| Err(StartError::Option { option, reason: reason.to_owned() });
        if self.context.is_empty() || self.context.len() > 128 {
            return refuse("context", "a name has 1 to 128 bytes");
        }
        if self.shards.is_some_and(|shards| shards == 0 || shards > SHARDS_MAX) {
            return refuse("shards", "a store has 1 to 256 shards");
        }
        if self.limits.event_bytes_max == 0 || self.limits.event_bytes_max > 1 << 20 {
            return refuse("event_bytes_max", "an event has at most 1 MiB");
        }
        if self.entity_appends_max == 0 || self.shard_bytes_max == 0 {
            return refuse("entity_appends_max, shard_bytes_max", "nothing could ever be appended");
        }
        if self.kinds.keys().any(|kind| crate::identity::check_kind(kind).is_err() || crate::audit::is_reserved(kind)) {
            return refuse(
                "kind",
                "a kind is 1 to 64 ASCII letters, digits, '_', '-' or '.', starting with a letter, and not with 'kuma.'",
            );
        }
        Ok(())
    }

    /// The number of shards of a new store.
    pub(crate) fn shards_default() -> u16 {
        let cores = std::thread::available_parallelism().map_or(2, usize::from);
        // At most 16.
        (2 * cores).clamp(4, 16) as u16
    }

    /// The master key; a new one where the store is new and its file does not exist yet.
    pub(crate) fn load_master_key(&self, is_new: bool) -> Result<Arc<dyn MasterKey>, MasterKeyError> {
        let default = || MasterKeySource::File(self.data_dir.join("master.key"));
        match self.master_key.clone().unwrap_or_else(default) {
            MasterKeySource::Provider(provider) => Ok(provider),
            MasterKeySource::Env(variable) => Ok(Arc::new(LocalMasterKey::from_env(&variable)?)),
            MasterKeySource::File(path) => match LocalMasterKey::from_file(&path) {
                Err(MasterKeyError::FileMissing { .. }) if is_new => {
                    let key = LocalMasterKey::create_file(&path)?;
                    tracing::warn!(
                        path = %path.display(),
                        "created a new master key; back this file up apart from the data: without it nothing in the store can be read"
                    );
                    Ok(Arc::new(key))
                }
                other => Ok(Arc::new(other?)),
            },
        }
    }
}
