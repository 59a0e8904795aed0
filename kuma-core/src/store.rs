//! The store: opening, shutting down, and finding an entity's place.

use std::{
    any::TypeId,
    collections::{HashMap, HashSet},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use kuma_shard::{
    DataDir, DiskId, Durability, EntityHash, FileOptions, KeyStore, NodeStore, Shard, ShardOptions, Slot, StatsView,
    missing_build_settings,
};
use parking_lot::RwLock;
use ractor::{Actor, ActorRef};
use tokio::sync::{OnceCell, oneshot};

use crate::{
    Entity, Handle, KindOptions, Options, RawHandle, Refused, Seat, StartError, Unavailable, VaultError,
    body::Limits,
    cluster_logs::ClusterLogs,
    durable::DurableSubscriptions,
    elsewhere::OtherDisks,
    erasure::{Eraser, EraserMessage, EraserState},
    gates::SlotGates,
    identity::Identity,
    kind::{DocumentKind, Kind, LogKind, TypedKind},
    kind_options::Tuning,
    live::Clock,
    observe::CoreMetrics,
    projections::Projections,
    root::{Root, RootMessage},
    scan::FileReader,
    scrub::{NextPage, Scrub, ScrubArguments, ScrubStats},
    shard_core::{Entry, Erasing, Fate, Settings, ShardCore, StoreParts},
    slot_snapshots::Arrivals,
    slots::KeyLocks,
    snapshotter::Snapshotter,
    supervisor::SupervisorMessage,
    vault::Vault,
};

/// An open store. Cheap to clone; when the last clone and the last handle are gone, the store shuts down by itself.
#[derive(Clone)]
pub struct Kuma {
    pub(crate) inner: Arc<Inner>,
}

/// What handles hold on to.
pub(crate) struct Inner {
    pub(crate) limits: Limits,
    parts: Arc<Parts>,
    pub(crate) kinds: RwLock<HashMap<String, Arc<dyn Kind>>>,
    kind_options: HashMap<String, KindOptions>,
}

/// Kinds that are remembered. A store has a few; beyond this somebody makes them up, and each is a document of its own.
const KINDS_MAX: usize = 4096;

/// A shard, or why it is out of use.
enum ShardSlot {
    Open(Arc<ShardCore>),
    OutOfUse(String),
}

/// What is shut down.
struct Parts {
    context: String,
    durability: Durability,
    shards: Vec<ShardSlot>,
    common: StoreParts,
    /// None if it is turned off.
    scrub: Option<ActorRef<NextPage>>,
    /// Absent for a moment, while the store is being opened.
    eraser: OnceLock<ActorRef<EraserMessage>>,
    root: ActorRef<RootMessage>,
    closing: AtomicBool,
    shut_down: OnceCell<()>,
    data_dir: DataDir,
    file_reader: FileReader,
    file_options: FileOptions,
    projections: Projections,
    durables: DurableSubscriptions,
    key_locks: KeyLocks,
    /// Snapshots that came ahead of their slots.
    arrivals: Arrivals,
    /// Whether the store is of a cluster.
    is_clustered: bool,
    /// Absent until it takes part.
    others: OnceLock<Arc<dyn OtherDisks>>,
    /// As those.
    cluster_logs: OnceLock<Arc<dyn ClusterLogs>>,
}

/// A shard in [`Stats`].
#[derive(Clone, Debug)]
pub struct ShardStats {
    /// Its number.
    pub shard: u16,
    /// Why it is out of use, if it is.
    pub out_of_use: Option<String>,
    /// Entities in memory.
    pub live_entities: usize,
    /// Entities that failed too often and are left alone for a while.
    pub quarantined: usize,
    /// Bytes that wait for the disk.
    pub waiting_bytes: usize,
    /// The writer.
    pub writer: Option<StatsView>,
}

/// Numbers about an open store.
#[derive(Clone, Debug)]
pub struct Stats {
    /// What an acknowledgement means.
    pub durability: Durability,
    /// Each shard.
    pub shards: Vec<ShardStats>,
    /// The writer of `keys.db`.
    pub keys: StatsView,
    /// Erasures that have begun and are not complete.
    pub erasures_unfinished: usize,
    /// Snapshots that did not fit and were ignored, since the store was opened: of older code, or damaged.
    pub snapshots_ignored: u64,
    /// Snapshots that were due and not made, since the store was opened: too many at once, or a state that cannot be saved.
    pub snapshots_skipped: u64,
    /// The scrub.
    pub scrub: ScrubStats,
}

impl Stats {
    /// Entities in memory.
    pub fn live_entities(&self) -> usize {
        self.shards.iter().map(|shard| shard.live_entities).sum()
    }
}

impl Kuma {
    /// Opens the store in the options' data directory, or creates it.
    ///
    /// A shard file that is damaged or missing is left out of use and said so in the log and in [`Kuma::stats`]; its entities
    /// answer [`Unavailable::ShardOutOfUse`]. If no shard is fit, the start fails.
    ///
    /// # Errors
    /// See [`StartError`]. No row of an existing store is changed.
    pub async fn start(options: Options) -> Result<Kuma, StartError> {
        options.check()?;
        let mut data_dir = match options.restoring {
            true => DataDir::open_restored(&options.data_dir)?,
            false => DataDir::open(&options.data_dir, &options.context, options.shards, Options::shards_default())?,
        };
        let is_new = data_dir.is_new();
        let master = options.load_master_key(is_new).map_err(StartError::MasterKey)?;
        let file = FileOptions {
            durability: options.durability,
            vfs: options.vfs.clone(),
            keep_deleted_bytes: options.keep_deleted_bytes,
        };
        let shard_options = |number| ShardOptions {
            number,
            shards: data_dir.shards(),
            directory: data_dir.path().to_owned(),
            disk_id: data_dir.disk_id(),
            file: file.clone(),
            queue_bytes_max: options.shard_bytes_max,
            owns_slots: options.seat != Some(Seat::Joiner),
        };
        let shards: Vec<ShardOptions> = (0..data_dir.shards()).map(shard_options).collect();
        if is_new {
            KeyStore::create(data_dir.path().to_owned(), data_dir.disk_id(), &file).await?;
            NodeStore::create(data_dir.path().to_owned(), data_dir.disk_id(), &file).await?;
            for shard in &shards {
                Shard::create(shard).await?;
            }
        }
        let (root, _) = Actor::spawn(None, Root, ()).await.map_err(|error| StartError::Actors(error.to_string()))?;
        let file_options = file.clone();
        let opened = open_parts(&options, &data_dir, &shards, file, master, is_new, &root).await;
        let (common, shards) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                root.stop(None);
                return Err(error);
            }
        };
        if is_new {
            data_dir.finish()?;
        }
        let scrub = match start_scrub(&options, &shards, &root).await {
            Ok(scrub) => scrub,
            Err(error) => {
                close(&shards, &common.vault.keys, Some(&common.node), &root).await;
                root.stop(None);
                return Err(error);
            }
        };
        report(&options, &data_dir, is_new).await;
        let parts = Parts {
            context: options.context,
            durability: options.durability,
            shards,
            common,
            scrub,
            eraser: OnceLock::new(),
            root,
            closing: AtomicBool::new(false),
            shut_down: OnceCell::new(),
            data_dir,
            file_reader: options.file_reader,
            file_options,
            projections: Projections::default(),
            durables: DurableSubscriptions::default(),
            key_locks: KeyLocks::new(),
            arrivals: Arrivals::default(),
            is_clustered: options.seat.is_some(),
            others: OnceLock::new(),
            cluster_logs: OnceLock::new(),
        };
        let inner = Arc::new(Inner {
            limits: options.limits,
            parts: Arc::new(parts),
            kinds: RwLock::default(),
            kind_options: options.kinds,
        });
        if let Err(error) = inner.start_eraser().await {
            inner.parts.clone().shut_down().await;
            return Err(error);
        }
        Ok(Kuma { inner })
    }

    /// The handle of an entity. No I/O: the entity is activated on its first use. An id or kind that cannot be is refused then.
    pub fn entity<E: Entity>(&self, id: impl AsRef<[u8]>) -> Handle<E> {
        Handle::new(RawHandle::new(self.inner.clone(), self.inner.typed_kind::<E>(), E::KIND, id.as_ref()))
    }

    /// The handle of an entity whose Rust type is not known here. A kind that no [`Kuma::entity`] was called for folds as a JSON
    /// document: each event's data is merged into it (RFC 7396).
    pub fn raw(&self, kind: &str, id: impl AsRef<[u8]>) -> RawHandle {
        RawHandle::new(self.inner.clone(), self.inner.kind(kind), kind, id.as_ref())
    }

    /// Makes a Rust type known for its kind, so that [`Kuma::raw`] folds with it.
    ///
    /// # Errors
    /// [`Refused::KindMismatch`] if the kind is in use with another type.
    pub fn register<E: Entity>(&self) -> Result<(), Refused> {
        self.inner.typed_kind::<E>().map(|_| ())
    }

    /// The name of the store.
    pub fn context(&self) -> &str {
        &self.inner.parts.context
    }

    /// Numbers about the store as it is now.
    pub fn stats(&self) -> Stats {
        let parts = &self.inner.parts;
        let shard = |(number, slot): (usize, &ShardSlot)| match slot {
            ShardSlot::Open(core) => ShardStats {
                shard: core.shard.number(),
                out_of_use: None,
                live_entities: core.directory.lock().values().filter(|entry| matches!(entry, Entry::Live(_))).count(),
                quarantined: core.quarantined(),
                waiting_bytes: core.shard.budget().used(),
                writer: Some(core.shard.stats()),
            },
            ShardSlot::OutOfUse(why) => ShardStats {
                // At most 256.
                shard: number as u16,
                out_of_use: Some(why.clone()),
                live_entities: 0,
                quarantined: 0,
                waiting_bytes: 0,
                writer: None,
            },
        };
        let shards = parts.shards.iter().enumerate().map(shard).collect();
        let metrics = &parts.common.metrics;
        Stats {
            durability: parts.durability,
            shards,
            keys: parts.common.vault.keys.stats(),
            erasures_unfinished: parts.common.erasing.len(),
            snapshots_ignored: metrics.snapshots_ignored.count(),
            snapshots_skipped: metrics.snapshots_skipped.count(),
            scrub: ScrubStats {
                commits: metrics.scrub.commits.count(),
                bytes: metrics.scrub.bytes.count(),
                bad_rows: metrics.scrub.bad_rows.count(),
                passes: metrics.scrub.passes.count(),
            },
        }
    }

    /// Wraps every key that an older master key wraps anew under the current one, and returns how many. Give the store a master
    /// key that knows both first ([`kuma_crypto::LocalMasterKey::with_older`], or a key file with two lines); take the older one
    /// away when this has returned. Appends and reads go on meanwhile; interrupted, it is simply called again.
    ///
    /// # Errors
    /// A key could not be read, unwrapped or written; those before it are done.
    pub async fn rotate_master_key(&self) -> Result<u64, VaultError> {
        self.inner.parts.common.vault.rewrap_all().await
    }

    /// Finishes what was submitted, takes every entity out of memory and closes the files. Requests that come meanwhile are
    /// refused with [`Unavailable::ShuttingDown`]. Returns when the data directory is free; calling it twice is fine.
    pub async fn shutdown(&self) {
        self.inner.parts.clone().shut_down().await;
    }

    pub(crate) fn open_shards(&self) -> impl Iterator<Item = (u16, Result<&Arc<ShardCore>, &str>)> {
        self.inner.parts.shards.iter().enumerate().map(|(number, slot)| {
            let open = match slot {
                ShardSlot::Open(core) => Ok(core),
                ShardSlot::OutOfUse(why) => Err(why.as_str()),
            };
            // At most 256.
            (number as u16, open)
        })
    }

    pub(crate) fn vault(&self) -> &Arc<Vault> {
        self.inner.vault()
    }
}

async fn open_parts(
    options: &Options,
    data_dir: &DataDir,
    shards: &[ShardOptions],
    file: FileOptions,
    master: Arc<dyn kuma_crypto::MasterKey>,
    is_new: bool,
    root: &ActorRef<RootMessage>,
) -> Result<(StoreParts, Vec<ShardSlot>), StartError> {
    let keys = KeyStore::open(data_dir.path().to_owned(), data_dir.disk_id(), &file, root.get_cell()).await?;
    let vault =
        Vault::open(keys.clone(), master, options.context.clone(), is_new, options.id_secret.as_deref().cloned()).await;
    let vault = match vault {
        Ok(vault) => Arc::new(vault),
        Err(error) => {
            close(&[], &keys, None, root).await;
            return Err(match error {
                VaultError::MasterKey(error @ kuma_crypto::MasterKeyError::UnknownKek { .. }) => {
                    StartError::WrongMasterKey(error)
                }
                other => StartError::Vault(other),
            });
        }
    };
    let node = match open_node(data_dir, &file, &vault, root).await {
        Ok(node) => node,
        Err(error) => {
            close(&[], &keys, None, root).await;
            return Err(error);
        }
    };
    let is_clustered = match node.cluster().await {
        Ok(cluster) => cluster.is_some(),
        Err(error) => {
            close(&[], &keys, Some(&node), root).await;
            return Err(StartError::Erasures(error.to_string()));
        }
    };
    if is_clustered && options.seat.is_none() {
        close(&[], &keys, Some(&node), root).await;
        return Err(StartError::Clustered { path: data_dir.path().to_owned() });
    }
    let erasing = Erasing::default();
    match node.unfinished().await {
        Ok(unfinished) => unfinished.iter().for_each(|tombstone| erasing.entomb(tombstone)),
        Err(error) => {
            close(&[], &keys, Some(&node), root).await;
            return Err(StartError::Erasures(error.to_string()));
        }
    }
    match node.newest_tombstone().await {
        Ok(number) => erasing.tell(number),
        Err(error) => {
            close(&[], &keys, Some(&node), root).await;
            return Err(StartError::Erasures(error.to_string()));
        }
    }
    match node.intended().await {
        Ok(intended) => {
            intended.iter().for_each(|(tombstone, _)| erasing.add(tombstone.key_id, tombstone.id_hash, Fate::Replaced))
        }
        Err(error) => {
            close(&[], &keys, Some(&node), root).await;
            return Err(StartError::Erasures(error.to_string()));
        }
    }
    let idle_timeouts = options.kinds.values().filter_map(|kind| kind.idle_timeout);
    let settings = Settings {
        idle_ms: Clock::ms(options.idle_timeout),
        idle_ms_min: Clock::ms(idle_timeouts.fold(options.idle_timeout, Duration::min)),
        memory_bytes_max: options.memory_budget / shards.len().max(1),
        entity_appends_max: options.entity_appends_max,
        restart: options.restart,
        snapshots: options.snapshots,
        wall_clock: options.wall_clock.clone(),
    };
    let snapshotter = match Snapshotter::start(root.get_cell()).await {
        Ok(snapshotter) => snapshotter,
        Err(error) => {
            close(&[], &keys, Some(&node), root).await;
            return Err(StartError::Actors(error.to_string()));
        }
    };
    let metrics = Arc::new(CoreMetrics::new(&options.context));
    let parts = StoreParts {
        vault,
        settings,
        metrics,
        snapshotter,
        node: node.clone(),
        erasing,
        gates: Arc::new(SlotGates::new()),
    };
    let mut slots = Vec::new();
    let mut first_damage = None;
    for shard in shards {
        match open_shard(shard, &parts, root).await {
            Ok(core) => slots.push(ShardSlot::Open(core)),
            Err(StartError::Open(error)) if error.is_damage() => {
                tracing::error!(shard = shard.number, error = %error, "a shard is out of use");
                slots.push(ShardSlot::OutOfUse(error.to_string()));
                first_damage.get_or_insert(error);
            }
            Err(error) => {
                close(&slots, &keys, Some(&node), root).await;
                return Err(error);
            }
        }
    }
    match first_damage {
        Some(error) if slots.iter().all(|slot| matches!(slot, ShardSlot::OutOfUse(_))) => {
            close(&slots, &keys, Some(&node), root).await;
            Err(error.into())
        }
        _ => Ok((parts, slots)),
    }
}

/// Opens `node.db`, and sees to it that no key of an erased entity is there again.
async fn open_node(
    data_dir: &DataDir,
    file: &FileOptions,
    vault: &Vault,
    root: &ActorRef<RootMessage>,
) -> Result<NodeStore, StartError> {
    let node = NodeStore::open(data_dir.path().to_owned(), data_dir.disk_id(), file, root.get_cell()).await?;
    match destroy_again(&node, &vault.keys).await {
        Ok(0) => Ok(node),
        Ok(keys) => {
            tracing::error!(
                keys,
                "keys of erased entities were there again (keys.db was put back from a copy?); they were destroyed"
            );
            Ok(node)
        }
        Err(error) => {
            note_stopping(root).await;
            node.stop().await;
            Err(StartError::Erasures(error))
        }
    }
}

/// Destroys every key that there is a tombstone of; returns how many were not. Not those of erasures that are not complete: they go on in a
/// moment, and need the key to find what read models hold.
async fn destroy_again(node: &NodeStore, keys: &KeyStore) -> Result<usize, String> {
    let (mut after, mut destroyed) = (0, 0);
    let unfinished = node.unfinished().await.map_err(|error| error.to_string())?;
    let unfinished: HashSet<[u8; 16]> = unfinished.iter().map(|tombstone| tombstone.key_id).collect();
    loop {
        let page = node.tombstones(after, 1024).await.map_err(|error| error.to_string())?;
        let Some((last, _)) = page.last() else { break };
        after = *last;
        let key_ids = page.iter().map(|(_, tombstone)| tombstone.key_id).filter(|key_id| !unfinished.contains(key_id));
        let key_ids: Vec<[u8; 16]> = key_ids.collect();
        let alive = keys.alive(&key_ids).await.map_err(|error| error.to_string())?;
        destroyed += alive.len();
        if !alive.is_empty() {
            keys.destroy(alive).await.map_err(|error| error.to_string())?;
        }
    }
    if destroyed > 0 {
        keys.truncate_log().await.map_err(|error| error.to_string())?;
    }
    Ok(destroyed)
}

/// From now on no child that ends is missed.
async fn note_stopping(root: &ActorRef<RootMessage>) {
    let (noted, stopping) = oneshot::channel();
    // It may be gone already, with its runtime.
    if root.cast(RootMessage::Stopping { noted }).is_ok() {
        let _ = stopping.await;
    }
}

/// Closes what was opened before the start failed.
async fn close(slots: &[ShardSlot], keys: &KeyStore, node: Option<&NodeStore>, root: &ActorRef<RootMessage>) {
    note_stopping(root).await;
    for slot in slots {
        if let ShardSlot::Open(core) = slot {
            core.shard.stop().await;
        }
    }
    keys.stop().await;
    if let Some(node) = node {
        node.stop().await;
    }
}

async fn open_shard(
    options: &ShardOptions,
    parts: &StoreParts,
    root: &ActorRef<RootMessage>,
) -> Result<Arc<ShardCore>, StartError> {
    let shard = Shard::open(options, root.get_cell()).await?;
    let core = Arc::new(ShardCore::new(shard, parts.clone()));
    let (reply, started) = oneshot::channel();
    let gone = || StartError::Actors("the root actor is gone".to_owned());
    root.cast(RootMessage::Supervise { core: core.clone(), reply }).map_err(|_| gone())?;
    started.await.map_err(|_| gone())?.map_err(|error| StartError::Actors(error.to_string()))?;
    Ok(core)
}

async fn start_scrub(
    options: &Options,
    shards: &[ShardSlot],
    root: &ActorRef<RootMessage>,
) -> Result<Option<ActorRef<NextPage>>, StartError> {
    if options.scrub_bytes_per_second == 0 {
        return Ok(None);
    }
    let open = shards.iter().filter_map(|slot| match slot {
        ShardSlot::Open(core) => Some(core.clone()),
        ShardSlot::OutOfUse(_) => None,
    });
    let arguments = ScrubArguments { shards: open.collect(), bytes_per_second: options.scrub_bytes_per_second };
    let spawned = Actor::spawn_linked(None, Scrub, arguments, root.get_cell()).await;
    spawned.map(|(scrub, _)| Some(scrub)).map_err(|error| StartError::Actors(error.to_string()))
}

/// Says what was opened, and what is not as it should be.
async fn report(options: &Options, data_dir: &DataDir, is_new: bool) {
    let durability = options.durability.as_str();
    let path = data_dir.path().display();
    tracing::info!(%path, context = %options.context, shards = data_dir.shards(), durability, is_new, "the store is open");
    match missing_build_settings().await {
        Ok(missing) if !missing.is_empty() => tracing::warn!(
            ?missing,
            "SQLite was built without settings that Kuma wants; copy .cargo/config.toml of Kuma into your workspace (up to 45 % of speed)"
        ),
        Ok(_) => {}
        Err(error) => tracing::warn!(%error, "SQLite could not be asked how it was built"),
    }
}

impl Inner {
    /// Starts the eraser, which goes on with what is not finished.
    async fn start_eraser(self: &Arc<Self>) -> Result<(), StartError> {
        let StoreParts { node, erasing, .. } = &self.parts.common;
        let unfinished = node.unfinished().await.map_err(|error| StartError::Erasures(error.to_string()))?;
        for tombstone in unfinished {
            match self.owns(tombstone.slot) {
                true => erasing.hold(tombstone.key_id, erasing.work_in(tombstone.slot)),
                // The node that owns the slot goes on with it.
                false => {
                    erasing.remove(tombstone.key_id);
                    erasing.owe(tombstone);
                }
            }
        }
        let state = EraserState::new(Arc::downgrade(self), node.clone(), erasing.clone(), erasing.len() > 0);
        let spawned = Actor::spawn_linked(None, Eraser, state, self.parts.root.get_cell()).await;
        let (eraser, _) = spawned.map_err(|error| StartError::Actors(error.to_string()))?;
        // There is only this one.
        let _ = self.parts.eraser.set(eraser);
        Ok(())
    }

    pub(crate) fn eraser(&self) -> Option<&ActorRef<EraserMessage>> {
        self.parts.eraser.get()
    }

    pub(crate) fn vault(&self) -> &Arc<Vault> {
        &self.parts.common.vault
    }

    pub(crate) fn node(&self) -> &NodeStore {
        &self.parts.common.node
    }

    /// Whether this disk owns the slot, or may: its shard is out of use.
    pub(crate) fn owns(&self, slot: Slot) -> bool {
        let record = self.core_of_slot(slot).and_then(|core| core.shard.slot(slot));
        record.is_none_or(|record| record.owned().is_some())
    }

    /// The other disks; none of a store that is alone, or does not take part in its cluster yet.
    pub(crate) fn other_disks(&self) -> Option<&Arc<dyn OtherDisks>> {
        self.parts.others.get()
    }

    pub(crate) fn set_other_disks(&self, others: Arc<dyn OtherDisks>) {
        // There are only these.
        let _ = self.parts.others.set(others);
    }

    /// The logs of all slots of its cluster; none of a store that is alone, or does not take part yet.
    pub(crate) fn cluster_logs(&self) -> Option<&Arc<dyn ClusterLogs>> {
        self.parts.cluster_logs.get()
    }

    pub(crate) fn set_cluster_logs(&self, logs: Arc<dyn ClusterLogs>) {
        // There are only these.
        let _ = self.parts.cluster_logs.set(logs);
    }

    pub(crate) fn is_clustered(&self) -> bool {
        self.parts.is_clustered
    }

    pub(crate) fn erasing(&self) -> &Erasing {
        &self.parts.common.erasing
    }

    pub(crate) fn metrics(&self) -> &CoreMetrics {
        &self.parts.common.metrics
    }

    pub(crate) fn context(&self) -> &str {
        &self.parts.context
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.parts.closing.load(Relaxed)
    }

    pub(crate) fn data_dir(&self) -> &std::path::Path {
        self.parts.data_dir.path()
    }

    pub(crate) fn file_reader(&self) -> &FileReader {
        &self.parts.file_reader
    }

    pub(crate) fn file_options(&self) -> &FileOptions {
        &self.parts.file_options
    }

    pub(crate) fn projections(&self) -> &Projections {
        &self.parts.projections
    }

    pub(crate) fn durables(&self) -> &DurableSubscriptions {
        &self.parts.durables
    }

    /// What supervises.
    pub(crate) fn root_cell(&self) -> ractor::ActorCell {
        self.parts.root.get_cell()
    }

    pub(crate) fn disk_id(&self) -> DiskId {
        self.parts.data_dir.disk_id()
    }

    /// Microseconds since 1970, by the store's clock.
    pub(crate) fn now_us(&self) -> i64 {
        self.parts.common.settings.wall_clock.now_us()
    }

    /// The shard of a slot, unless it is out of use.
    pub(crate) fn core_of_slot(&self, slot: Slot) -> Option<Arc<ShardCore>> {
        self.core_of_shard(slot.shard(self.parts.data_dir.shards()))
    }

    /// The shard with this number, unless it is out of use.
    pub(crate) fn core_of_shard(&self, shard: u16) -> Option<Arc<ShardCore>> {
        match self.parts.shards.get(usize::from(shard))? {
            ShardSlot::Open(core) => Some(core.clone()),
            ShardSlot::OutOfUse(_) => None,
        }
    }

    /// How many shards the store has, those out of use too.
    pub(crate) fn shards(&self) -> u16 {
        self.parts.data_dir.shards()
    }

    pub(crate) fn gates(&self) -> &SlotGates {
        &self.parts.common.gates
    }

    pub(crate) fn arrivals(&self) -> &Arrivals {
        &self.parts.arrivals
    }

    pub(crate) fn key_locks(&self) -> &KeyLocks {
        &self.parts.key_locks
    }

    pub(crate) fn ids(&self) -> &kuma_crypto::IdSecret {
        &self.parts.common.vault.ids
    }

    /// The shard of an entity.
    pub(crate) fn core(&self, identity: &Identity) -> Result<&Arc<ShardCore>, Unavailable> {
        if self.parts.closing.load(Relaxed) {
            return Err(Unavailable::ShuttingDown);
        }
        self.parts.common.gates.check(identity.slot)?;
        let shard = identity.slot.shard(self.parts.data_dir.shards());
        match self.parts.shards.get(usize::from(shard)) {
            Some(ShardSlot::Open(core)) => Ok(core),
            Some(ShardSlot::OutOfUse(why)) => Err(Unavailable::ShardOutOfUse { shard, why: why.clone() }),
            None => Err(Unavailable::ShardOutOfUse { shard, why: "there is no such shard".to_owned() }),
        }
    }

    fn typed_kind<E: Entity>(&self) -> Result<Arc<dyn Kind>, Refused> {
        let check = |kind: &Arc<dyn Kind>| match kind.rust_type() == Some(TypeId::of::<E>()) {
            true => Ok(kind.clone()),
            false => Err(Refused::KindMismatch { kind: E::KIND.to_owned() }),
        };
        if let Some(kind) = self.kinds.read().get(E::KIND) {
            return check(kind);
        }
        // Outside of the lock: the upcasters are the user's code.
        let kind = TypedKind::<E>::new(self.tuning(E::KIND))?;
        check(self.kinds.write().entry(E::KIND.to_owned()).or_insert_with(|| Arc::new(kind)))
    }

    fn kind(&self, name: &str) -> Result<Arc<dyn Kind>, Refused> {
        if let Some(kind) = self.kinds.read().get(name) {
            return Ok(kind.clone());
        }
        crate::identity::check_kind(name)?;
        let make = || -> Arc<dyn Kind> {
            match self.kind_options.get(name).is_some_and(|options| options.append_only) {
                true => Arc::new(LogKind::new(name, self.tuning(name))),
                false => Arc::new(DocumentKind::new(name, self.tuning(name))),
            }
        };
        let mut kinds = self.kinds.write();
        if kinds.len() >= KINDS_MAX && !kinds.contains_key(name) {
            return Ok(make());
        }
        Ok(kinds.entry(name.to_owned()).or_insert_with(make).clone())
    }

    fn tuning(&self, kind: &str) -> Tuning {
        self.kind_options.get(kind).map(Tuning::from).unwrap_or_default()
    }
}

impl Parts {
    async fn shut_down(self: Arc<Self>) {
        self.closing.store(true, Relaxed);
        self.shut_down.get_or_init(|| self.close_all()).await;
    }

    async fn close_all(&self) {
        note_stopping(&self.root).await;
        if let Some(eraser) = self.eraser.get() {
            // What it is at comes to its end, or is gone on with when the store is opened again.
            let _ = eraser.stop_and_wait(None, None).await;
        }
        self.projections.close().await;
        self.durables.close().await;
        if let Some(scrub) = &self.scrub {
            // It holds on to the shards.
            let _ = scrub.stop_and_wait(None, None).await;
        }
        for core in self.open() {
            let supervisor = core.supervisor.lock().clone();
            let (done, stopped) = oneshot::channel();
            if supervisor.is_some_and(|supervisor| supervisor.cast(SupervisorMessage::Stop { done }).is_ok()) {
                let _ = stopped.await;
            }
        }
        self.common.snapshotter.stop();
        for core in self.open() {
            core.shard.stop().await;
        }
        self.common.vault.keys.stop().await;
        self.common.node.stop().await;
        self.root.stop(None);
        self.data_dir.release();
        tracing::info!(path = %self.data_dir.path().display(), "the store is closed");
    }

    fn open(&self) -> impl Iterator<Item = &Arc<ShardCore>> {
        self.shards.iter().filter_map(|slot| match slot {
            ShardSlot::Open(core) => Some(core),
            ShardSlot::OutOfUse(_) => None,
        })
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.parts.shut_down.initialized() {
            return;
        }
        // Without a runtime its actors are gone as well; what was acknowledged is on the disk.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(self.parts.clone().shut_down());
        }
    }
}

/// Finds the live entity, making it if need be.
pub(crate) async fn activate(
    core: &ShardCore,
    kind: &Arc<dyn Kind>,
    identity: &Arc<Identity>,
) -> Result<Arc<crate::live::Live>, Unavailable> {
    if let Some(live) = core.live(identity.hash) {
        return Ok(live);
    }
    let (reply, made) = oneshot::channel();
    let request = crate::supervisor::Activate { kind: kind.clone(), identity: identity.clone(), reply };
    let supervisor = core.supervisor.lock().clone();
    let interrupted = || Unavailable::Interrupted { entity: identity.hash };
    supervisor.ok_or_else(interrupted)?.cast(SupervisorMessage::Activate(request)).map_err(|_| interrupted())?;
    made.await.map_err(|_| interrupted())?
}

/// Takes an entity out of memory; returns when it is.
pub(crate) async fn passivate(core: &ShardCore, entity: EntityHash) {
    let (done, gone) = oneshot::channel();
    let supervisor = core.supervisor.lock().clone();
    if supervisor.is_some_and(|supervisor| supervisor.cast(SupervisorMessage::Passivate { entity, done }).is_ok()) {
        // Dropped only with the supervisor, and then the entity is gone too.
        let _ = gone.await;
    }
}
