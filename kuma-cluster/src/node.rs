//! A node of a cluster, in the process of a service.
//!
//! ```text
//!  new directory, `found` ──► store that owns all slots ──► cluster of one
//!  new directory, seeds ───► who are you? ──► store that owns none ──► every member lets it in ──► slots come by themselves
//!  directory of a node ────► its members ──► one that serves, or all, say that it may ──► serves what it owns
//! ```
//!
//! Invariants:
//! - A node with seeds never founds a cluster, nor does one whose directory was wiped: founding is asked for, once.
//! - The store of a new node is on the disk before any member hears of it.

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, atomic::Ordering::SeqCst},
    time::{Duration, Instant},
};

use futures_util::future::BoxFuture;
use kuma_core::{
    Command, DiskId, Entity, Epoch, Filter, Gate, Kuma, Options, Seat, Slot, SlotError, StartError, Token,
};
use ractor::Actor;
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    commands::Commands,
    disks::Disks,
    erasure::Tombstones,
    erasures::{self, Erasures},
    fail_points::fail_point,
    feed::ClusterEvent,
    handle::{Handle, RawHandle},
    handoff::Safeguards,
    link::Cookie,
    linked,
    members::{Member, Members, NodeId, Standing},
    observe,
    owner::{self, Answer},
    projections::Logs,
    registry::{MOVES_MAX, Registry, RegistryMessage},
    requests,
    shared::{ClusterState, MoveProgress, MoveTotals, STATE_FORMAT, Shared},
    slot_actor::SlotMessage,
    slot_checkpoint::SlotCheckpoint,
    subscribe::{self, StartAt, SubscribeError, Subscription},
    transport::{Serve, Transport},
    wire::{self, ChunkFrame, ChunkReply, Gossip, HandoffFrame, Hello, JoinReply, JoinRequest, Welcome, kind},
};

/// How long a new node waits between two rounds over its seeds.
const SEEDS_AGAIN: Duration = Duration::from_millis(500);
const WELCOME_WITHIN: Duration = Duration::from_secs(5);
/// What was given away is collected when no slot has moved for so long.
const QUIET: Duration = Duration::from_secs(1);
/// Tombstones that a disk which joins is told at once.
const LEDGER_PAGE: u32 = 1024;
/// How often what was given away is looked for, beside when it is.
const COLLECT_EVERY: Duration = Duration::from_secs(30);

/// Why a node could not be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NodeError {
    /// The store could not be opened.
    #[error(transparent)]
    Store(#[from] StartError),
    /// What the store knows of its cluster could not be read or written.
    #[error(transparent)]
    Slots(#[from] SlotError),
    /// Nothing says which cluster this node is of.
    #[error(
        "{} is of no cluster yet: name seed nodes to join one, or found a new one (`found`) if this is to be its first node",
        .data_dir.display()
    )]
    NoCluster {
        /// The directory.
        data_dir: PathBuf,
    },
    /// Seeds and founding exclude each other.
    #[error("a node with seed nodes joins their cluster and founds none; leave one of them out")]
    FoundWithSeeds,
    /// The store is in use by itself already, with entities of its own.
    #[error(
        "{} is a store of its own, with slots of its own; it can found a cluster (`found`), but not join one",
        .data_dir.display()
    )]
    Standalone {
        /// The directory.
        data_dir: PathBuf,
    },
    /// A newer Kuma wrote what the node knows of its cluster.
    #[error("{} was written by a newer version of Kuma; use that one, nothing was changed", .data_dir.display())]
    Newer {
        /// The directory.
        data_dir: PathBuf,
    },
    /// A name or an address cannot be used.
    #[error("{option}: {reason}")]
    Option {
        /// The option.
        option: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The links could not be started.
    #[error("{0}")]
    Transport(String),
    /// A node cannot be attested to be destroyed.
    #[error("node {node} cannot be attested to be destroyed: {reason}; nothing was changed")]
    Attest {
        /// The node.
        node: NodeId,
        /// What speaks against it.
        reason: &'static str,
    },
    /// Something that was asked of the cluster is not done, and nothing was changed.
    #[error("{reason}")]
    Refused {
        /// Why, and what to do.
        reason: String,
    },
    /// An actor did not start.
    #[error("an actor did not start: {0}")]
    Actors(String),
    /// The operating system gives no random bytes.
    #[error("the operating system gives no random bytes")]
    NoRandomness,
}

/// Makes the links of a node that answers by `serve`.
pub(crate) type MakeTransport =
    Arc<dyn Fn(Arc<dyn Serve>) -> BoxFuture<'static, Result<(Arc<dyn Transport>, SocketAddr), String>> + Send + Sync>;

/// How a node is started.
#[derive(Clone)]
pub struct NodeOptions {
    store: Options,
    data_dir: PathBuf,
    context: String,
    name: Option<String>,
    seeds: Vec<String>,
    found: bool,
    advertise: Option<String>,
    moves_max: usize,
    commands: Commands,
    answer: Option<Arc<dyn Answer>>,
    links: MakeLinks,
}

/// What makes a node's links.
#[derive(Clone)]
enum MakeLinks {
    /// Real ones.
    Listening { listen: SocketAddr, cookie: Cookie },
    /// Those of a test.
    Given(MakeTransport),
}

impl MakeLinks {
    async fn make(&self, serve: Arc<dyn Serve>) -> Result<(Arc<dyn Transport>, SocketAddr), NodeError> {
        let made = match self {
            MakeLinks::Listening { listen, cookie } => linked::start(*listen, cookie.clone(), serve).await,
            MakeLinks::Given(make) => make(serve).await,
        };
        made.map_err(NodeError::Transport)
    }
}

impl NodeOptions {
    /// A node whose store is in `data_dir`, of the cluster that has this cookie. It listens at 127.0.0.1:4860, unless [`NodeOptions::listen`] says
    /// otherwise.
    pub fn new(data_dir: impl Into<PathBuf>, cookie: Cookie) -> Self {
        let listen = SocketAddr::from((std::net::Ipv4Addr::LOCALHOST, PORT));
        NodeOptions::with_links(data_dir, MakeLinks::Listening { listen, cookie })
    }

    /// Where the node listens for others: an address of this machine that the others can reach. Links are encrypted and nobody without the cookie
    /// gets in. Default: 127.0.0.1:4860, where only nodes on the same machine are.
    pub fn listen(mut self, address: SocketAddr) -> Self {
        if let MakeLinks::Listening { listen, .. } = &mut self.links {
            *listen = address;
        }
        self
    }

    /// A node whose store is in `data_dir`, with links made by `transport`.
    pub(crate) fn with_transport(data_dir: impl Into<PathBuf>, transport: MakeTransport) -> Self {
        NodeOptions::with_links(data_dir, MakeLinks::Given(transport))
    }

    fn with_links(data_dir: impl Into<PathBuf>, links: MakeLinks) -> Self {
        let data_dir = data_dir.into();
        NodeOptions {
            store: Options::new(&data_dir),
            data_dir,
            context: "kuma".to_owned(),
            name: None,
            seeds: Vec::new(),
            found: false,
            advertise: None,
            moves_max: MOVES_MAX,
            commands: Commands::default(),
            answer: None,
            links,
        }
    }

    /// The name of the store, the same on all nodes of a cluster. Default: "kuma".
    pub fn context(mut self, name: impl Into<String>) -> Self {
        self.context = name.into();
        self
    }

    /// How many shard files; every node may have another number. As [`Options::shards`].
    pub fn shards(mut self, shards: u16) -> Self {
        self.store = self.store.shards(shards);
        self
    }

    /// Nodes of the cluster to be joined, any of them: `10.0.0.1:4860`, a DNS name, or `kuma@10.0.0.1`. Of no use once it is joined.
    pub fn seed_nodes<S: Into<String>>(mut self, seeds: impl IntoIterator<Item = S>) -> Self {
        self.seeds = seeds.into_iter().map(Into::into).collect();
        self
    }

    /// This is the first node of a new cluster. Of no use once it is founded.
    pub fn found(mut self) -> Self {
        self.found = true;
        self
    }

    /// What people call the node. Default: its address.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Where the other nodes reach this one, `host:port`. Default: the address that it listens at.
    pub fn advertise(mut self, address: impl Into<String>) -> Self {
        self.advertise = Some(address.into());
        self
    }

    /// How many slots of this node are on their way at once. Default: 2: while one is handed over, another one is copied.
    pub fn moves_at_once(mut self, slots: usize) -> Self {
        self.moves_max = slots.max(1);
        self
    }

    /// Answers what other nodes ask by [`Node::ask_owner`] and [`Node::ask_node`]. Every node is to have one that understands the same.
    pub fn answer(mut self, answer: Arc<dyn Answer>) -> Self {
        self.answer = Some(answer);
        self
    }

    /// Other options of the store.
    pub fn store(mut self, change: impl FnOnce(Options) -> Options) -> Self {
        self.store = change(self.store);
        self
    }

    /// Makes a kind known, so that this node can answer for it by its Rust type. Every node is to know the same kinds.
    pub fn entity<E: Entity>(mut self) -> Self {
        self.commands.kind::<E>();
        self
    }

    /// Makes a command known, so that this node can decide it for others. Every node is to know the same commands.
    pub fn command<E, C>(mut self) -> Self
    where
        E: Entity,
        C: Command<E> + Serialize + DeserializeOwned,
        C::Rejection: Serialize + DeserializeOwned,
    {
        self.commands.command::<E, C>();
        self
    }

    fn check(&self) -> Result<(), NodeError> {
        let refuse = |option, reason: &str| Err(NodeError::Option { option, reason: reason.to_owned() });
        if self.found && !self.seeds.is_empty() {
            return Err(NodeError::FoundWithSeeds);
        }
        if self.name.as_ref().is_some_and(|name| name.is_empty() || name.len() > 128) {
            return refuse("name", "a name has 1 to 128 bytes");
        }
        if self.seeds.len() > 64 || self.seeds.iter().any(|seed| seed.is_empty() || seed.len() > 300) {
            return refuse("seed_nodes", "up to 64 addresses of at most 300 bytes");
        }
        Ok(())
    }
}

/// The port of a seed that names none.
pub const PORT: u16 = 4860;

/// `kuma@host`, `host` and `host:port` as `host:port`.
fn seed_address(seed: &str) -> String {
    let host = seed.rsplit_once('@').map_or(seed, |(_, host)| host);
    let has_port = match host.rsplit_once(':') {
        Some((before, port)) => port.parse::<u16>().is_ok() && (!before.contains(':') || before.ends_with(']')),
        None => false,
    };
    match has_port {
        true => host.to_owned(),
        false => format!("{host}:{PORT}"),
    }
}

/// A running node. Cheap to clone.
#[derive(Clone)]
pub struct Node {
    pub(crate) shared: Arc<Shared>,
    address: SocketAddr,
}

/// A node of the cluster, as another one sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberStatus {
    /// The node.
    pub node: NodeId,
    /// What people call it.
    pub name: String,
    /// Where it is reached.
    pub address: String,
    /// What it is about to do.
    pub standing: Standing,
    /// Whether it is this node.
    pub is_own: bool,
    /// Its disk.
    pub disk: DiskId,
    /// Whether there is a link to it.
    pub is_up: bool,
    /// Slots that it owns, as far as this node has heard.
    pub owns: usize,
    /// Slots that it should own.
    pub wished: usize,
}

/// A slot of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotStatus {
    /// The slot.
    pub slot: Slot,
    /// Who owns it, and since which epoch, as far as this node has heard.
    pub owner: Option<(Epoch, DiskId)>,
    /// What this node's own token says.
    pub token: Token,
    /// Rows that this node has of it.
    pub rows: u64,
}

impl Node {
    /// Starts a node. A new one that has seeds waits for them, and says so in the log, until one of them answers.
    ///
    /// # Errors
    /// See [`NodeError`].
    pub async fn start(options: NodeOptions) -> Result<Node, NodeError> {
        options.check()?;
        let is_new = !options.data_dir.join("store.json").exists();
        match is_new {
            true if options.found => Node::found_new(options).await,
            true if !options.seeds.is_empty() => Node::join_new(options).await,
            true => Err(NodeError::NoCluster { data_dir: options.data_dir.clone() }),
            false => Node::start_again(options).await,
        }
    }

    async fn found_new(options: NodeOptions) -> Result<Node, NodeError> {
        let kuma = Kuma::start(options.store.clone().context(&options.context).clustered(Seat::Founder, None)).await?;
        Node::found(options, kuma).await
    }

    /// A store that owns all slots becomes a cluster of one.
    async fn found(options: NodeOptions, kuma: Kuma) -> Result<Node, NodeError> {
        let own = kuma.slots().disk_id();
        let state = ClusterState {
            format: STATE_FORMAT,
            cluster: random()?,
            node: NodeId(random()?),
            incarnation: 0,
            members: Members::default(),
            disks: Disks::founder(own),
        };
        Node::run(options, kuma, state, Standing::Member).await
    }

    async fn start_again(options: NodeOptions) -> Result<Node, NodeError> {
        let data_dir = options.data_dir.clone();
        let kuma = Kuma::start(options.store.clone().context(&options.context).clustered(Seat::Founder, None)).await?;
        let known = kuma.slots().cluster().await;
        let failed = async |error: NodeError| {
            kuma.shutdown().await;
            Err(error)
        };
        match known {
            Err(error) => failed(error.into()).await,
            Ok(None) if options.found => Node::found(options, kuma).await,
            Ok(None) if options.seeds.is_empty() => failed(NodeError::NoCluster { data_dir }).await,
            Ok(None) => failed(NodeError::Standalone { data_dir }).await,
            Ok(Some(bytes)) => match wire::decode::<ClusterState>(&bytes) {
                Some(state) if state.format <= STATE_FORMAT => {
                    let standing = state.members.get(state.node).map_or(Standing::Joining, |member| member.standing);
                    Node::run(options, kuma, state, standing).await
                }
                _ => failed(NodeError::Newer { data_dir }).await,
            },
        }
    }

    /// Asks the seeds which cluster this is, makes a store for it, and lets it be let in.
    async fn join_new(options: NodeOptions) -> Result<Node, NodeError> {
        let guest = Arc::new(Guest { context: options.context.clone(), disk: DiskId(random()?) });
        let (transport, _) = options.links.make(guest).await?;
        let welcome = ask_seeds(&options, &transport).await;
        transport.stop().await;
        let welcome: Welcome = welcome?;
        let store = options.store.clone().context(&options.context);
        let kuma = Kuma::start(store.clustered(Seat::Joiner, Some(welcome.id_secret))).await?;
        let own = kuma.slots().disk_id();
        let mut disks = Disks::joiner(own, []);
        disks.learn(&welcome.disks);
        let state = ClusterState {
            format: STATE_FORMAT,
            cluster: welcome.cluster,
            node: NodeId(random()?),
            incarnation: 0,
            members: welcome.members.clone(),
            disks,
        };
        Node::run(options, kuma, state, Standing::Joining).await
    }

    async fn run(
        options: NodeOptions,
        kuma: Kuma,
        mut state: ClusterState,
        standing: Standing,
    ) -> Result<Node, NodeError> {
        let started = Node::run_with(&options, &kuma, &mut state, standing).await;
        if started.is_err() {
            kuma.shutdown().await;
        }
        started
    }

    async fn run_with(
        options: &NodeOptions,
        kuma: &Kuma,
        state: &mut ClusterState,
        standing: Standing,
    ) -> Result<Node, NodeError> {
        let slots = kuma.slots();
        // Nothing is served before it is known that it may be. All gates stand before anybody can send anything: a grant or an abort that came before its
        // gate was sealed would leave the slot shut for ever.
        for (slot, record) in slots.records() {
            let is_coming = record.staged.is_some();
            slots.set_gate(slot, if is_coming { Gate::Sealed } else { Gate::Closed });
        }
        options
            .commands
            .register(kuma)
            .map_err(|refused| NodeError::Option { option: "entity", reason: refused.to_string() })?;
        slots.index().await?;
        fail_point("boot.token_loaded");
        for (slot, transfer) in slots.leftovers().await? {
            slots.drop_transfer(slot, transfer).await?;
        }
        state.incarnation += 1;
        slots.keep_cluster(wire::encode(&*state)).await?;
        let known = state.members.get(state.node).map(|member| member.name.clone());
        let name = options.name.clone().or(known);
        let shared = Arc::new(Shared::new(
            kuma.clone(),
            name.clone().unwrap_or_default(),
            options.context.clone(),
            state.clone(),
            options.commands.clone(),
            options.answer.clone(),
        ));
        let server = Arc::new(Server(shared.clone()));
        let (transport, address) = options.links.make(server).await?;
        let advertised = options.advertise.clone().unwrap_or_else(|| address.to_string());
        let member = Member {
            version: 1,
            standing,
            incarnation: state.incarnation,
            disk: slots.disk_id(),
            name: name.unwrap_or_else(|| advertised.clone()),
            address: advertised,
        };
        let node = state.node;
        let announced = shared.change(|state| state.members.announce(node, member)).await?;
        if let Err(refused) = announced {
            transport.stop().await;
            return Err(NodeError::Option { option: "name", reason: refused.to_string() });
        }
        // There is only this one.
        let _ = shared.transport.set(transport);
        slots.set_other_disks(Erasures::new(&shared));
        slots.set_cluster_logs(Logs::new(&shared));
        for (slot, record) in slots.records() {
            if let Token::Released { epoch, to, is_taken, .. } = record.token {
                shared.routes.note(slot, epoch, to);
                if !is_taken {
                    // It reminds the other one.
                    shared.slot_actor(slot).await;
                }
            }
            if record.staged.is_some() {
                shared.slot_actor(slot).await;
            }
        }
        let spawned = Actor::spawn(None, Registry, (shared.clone(), options.moves_max)).await;
        let (registry, _) = spawned.map_err(|error| NodeError::Actors(error.to_string()))?;
        let _ = shared.registry.set(registry);
        shared.wake(RegistryMessage::Look);
        tokio::spawn(collect(Arc::downgrade(&shared)));
        tokio::spawn(observe::watch(Arc::downgrade(&shared)));
        tracing::info!(target: "kuma::cluster", %address, node = %node, "the node is up");
        Ok(Node { shared, address })
    }

    /// Where the node listens for others.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The handle of an entity, wherever it is. No I/O.
    pub fn entity<E: Entity>(&self, id: impl AsRef<str>) -> Handle<E> {
        let here = self.shared.kuma.entity::<E>(id.as_ref()).raw().clone();
        Handle::new(RawHandle::new(self.shared.clone(), E::KIND, id.as_ref(), here))
    }

    /// The handle of an entity whose Rust type is not known here, wherever it is. No I/O.
    pub fn raw(&self, kind: &str, id: impl AsRef<str>) -> RawHandle {
        let here = self.shared.kuma.raw(kind, id.as_ref());
        RawHandle::new(self.shared.clone(), kind, id.as_ref(), here)
    }

    /// Subscribes to the events of all slots of all nodes that match `filter`, wherever the slots go.
    ///
    /// Each slot's commits come in the order of their seqs, without a gap. A slot whose owner is out of reach waits for it, see
    /// [`Subscription::held_back`]; the others go on.
    ///
    /// # Errors
    /// The checkpoint is of another cluster; or, from [`StartAt::Now`] on, the owner of a slot is out of reach, so that where its log ends is not known.
    pub async fn subscribe(&self, filter: Filter, start: StartAt) -> Result<Subscription, SubscribeError> {
        Subscription::open(&self.shared, filter, start).await
    }

    /// Goes on behind what was handed out when this checkpoint was taken, at whichever node of the cluster.
    ///
    /// # Errors
    /// The checkpoint is of another cluster.
    pub async fn subscribe_from(
        &self,
        filter: Filter,
        checkpoint: SlotCheckpoint,
    ) -> Result<Subscription, SubscribeError> {
        self.subscribe(filter, StartAt::Checkpoint(checkpoint)).await
    }

    /// The node's own store: what it owns, and nothing else.
    pub fn store(&self) -> &Kuma {
        &self.shared.kuma
    }

    /// Whether the node takes part in its cluster, and serves what it owns.
    pub fn is_ready(&self) -> bool {
        self.shared.has_passed.load(SeqCst)
    }

    /// The nodes of the cluster, as this one knows them.
    pub fn members(&self) -> Vec<MemberStatus> {
        let (state, wished) = (self.shared.state(), self.shared.ring().counts());
        let routes = self.shared.routes.all();
        let status = |(node, member): (NodeId, &Member)| MemberStatus {
            node,
            name: member.name.clone(),
            address: member.address.clone(),
            standing: member.standing,
            is_own: node == state.node,
            disk: member.disk,
            is_up: node == state.node || self.shared.transport().is_some_and(|transport| transport.is_up(member.disk)),
            owns: routes.iter().flatten().filter(|(_, disk)| *disk == member.disk).count(),
            wished: wished.get(&node).copied().unwrap_or(0).into(),
        };
        state.members.iter().map(status).collect()
    }

    /// All slots, as this node knows them.
    pub fn slots(&self) -> Vec<SlotStatus> {
        let status = |(slot, record): (Slot, kuma_core::SlotRecord)| SlotStatus {
            slot,
            owner: self.shared.routes.get(slot),
            token: record.token,
            rows: record.content.len,
        };
        let mut slots: Vec<SlotStatus> = self.shared.slots.records().into_iter().map(status).collect();
        slots.sort_by_key(|status| status.slot);
        slots
    }

    /// How many slots this node owns.
    pub fn owned(&self) -> usize {
        self.shared.owns().len()
    }

    /// Slots of this node that are on their way.
    pub fn moves(&self) -> Vec<MoveProgress> {
        self.shared.moves.lock().values().cloned().collect()
    }

    /// What handoffs have come to since the node was started.
    pub fn move_totals(&self) -> MoveTotals {
        self.shared.totals.lock().clone()
    }

    /// Whether every slot of this node is where it should be, and nothing of it is on its way.
    pub fn is_settled(&self) -> bool {
        let state = self.shared.state();
        let ring = self.shared.ring();
        let at_home = |(slot, _): &(Slot, Epoch)| ring.owner(*slot).is_none_or(|owner| owner == state.node);
        self.is_ready() && self.shared.moves.lock().is_empty() && self.shared.owns().iter().all(at_home)
    }

    /// Wants a slot to be at a node, whatever the ring says; or no longer.
    ///
    /// # Errors
    /// It could not be kept.
    pub async fn pin(&self, slot: Slot, node: Option<NodeId>) -> Result<(), NodeError> {
        Ok(self.shared.change(|state| state.members.pin(slot, node)).await?)
    }

    /// Gives all slots away to the other nodes, and takes no new ones. Returns at once; [`Node::owned`] is 0 when it is done.
    ///
    /// # Errors
    /// It could not be kept.
    pub async fn drain(&self) -> Result<(), NodeError> {
        let change = |state: &mut ClusterState| {
            let node = state.node;
            state.members.set_standing(node, Standing::Leaving);
        };
        Ok(self.shared.change(change).await?)
    }

    /// **An oath**: the disk of this node is destroyed, and will never run again. From now on nobody waits for it: joins and erasures go on without it,
    /// receipts say so, and whatever calls itself this disk is turned away. What it owned stays out of reach.
    ///
    /// # Errors
    /// [`NodeError::Attest`]: it is not known, or there is a link to it. Or it could not be kept.
    pub async fn attest_destroyed(&self, node: NodeId) -> Result<(), NodeError> {
        let refuse = |reason| Err(NodeError::Attest { node, reason });
        let state = self.shared.state();
        let Some(disk) = state.members.get(node).map(|member| member.disk) else {
            return refuse("no such node is known");
        };
        if node == state.node {
            return refuse("it is the one that was asked");
        }
        if self.shared.transport().is_some_and(|transport| transport.is_up(disk)) {
            return refuse("there is a link to it, so that it runs");
        }
        let change = |state: &mut ClusterState| {
            state.members.set_standing(node, Standing::Forgotten);
            state.disks.remove(disk);
        };
        self.shared.change(change).await?;
        // They may have waited for it.
        self.shared.slots.resume_erasures();
        tracing::warn!(target: "kuma::cluster", %node, %disk, "a disk was attested to be destroyed; nobody waits for it any more");
        Ok(())
    }

    /// Ends the node: what was asked is finished, files are closed. Its slots wait for it to come back.
    pub async fn shutdown(&self) {
        self.shared.is_closing.store(true, SeqCst);
        if let Some(registry) = self.shared.registry.get() {
            let _ = registry.stop_and_wait(None, None).await;
        }
        if let Some(transport) = self.shared.transport() {
            transport.stop().await;
        }
        self.shared.stop_actors().await;
        self.shared.collect.notify_one();
        self.shared.feed.end();
        self.shared.kuma.shutdown().await;
    }
}

fn random() -> Result<[u8; 16], NodeError> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|_| NodeError::NoRandomness)?;
    Ok(bytes)
}

/// Goes round over the seeds until one of them says which cluster this is.
async fn ask_seeds(options: &NodeOptions, transport: &Arc<dyn Transport>) -> Result<Welcome, NodeError> {
    let mut said = None;
    loop {
        let mut reasons = Vec::new();
        for seed in &options.seeds {
            let address = seed_address(seed);
            match transport.dial(address.clone()).await {
                Ok(disk) => {
                    let reply = transport.call(disk, kind::WELCOME, Vec::new(), WELCOME_WITHIN).await;
                    match reply.map(|reply| wire::decode(&reply)) {
                        Ok(Some(Some(welcome))) => return Ok(welcome),
                        Ok(_) => reasons.push(format!("{address} is of no cluster itself")),
                        Err(error) => reasons.push(format!("{address}: {error}")),
                    }
                }
                Err(why) => reasons.push(format!("{address}: {why}")),
            }
        }
        if said.as_ref() != Some(&reasons) {
            let why = reasons.join("; ");
            tracing::warn!(target: "kuma::cluster", %why, "no seed node has answered yet; this node waits for one of them, and founds no cluster");
            said = Some(reasons);
        }
        tokio::time::sleep(SEEDS_AGAIN).await;
    }
}

/// Collects what was given away, until the node is gone.
async fn collect(shared: std::sync::Weak<Shared>) {
    loop {
        let Some(now) = shared.upgrade() else { return };
        if now.is_closing.load(SeqCst) {
            return;
        }
        // Nobody waits for it; whoever moves does.
        if now.moved_at.lock().is_some_and(|at| at.elapsed() < QUIET) {
            drop(now);
            tokio::time::sleep(QUIET).await;
            continue;
        }
        if let Err(error) = now.slots.collect_departed().await {
            tracing::warn!(target: "kuma::cluster", %error, "what was given away could not be collected; it is tried again");
        }
        let _ = tokio::time::timeout(COLLECT_EVERY, now.collect.notified()).await;
    }
}

/// A node that has no store yet: it asks, and answers nothing.
struct Guest {
    context: String,
    disk: DiskId,
}

impl Serve for Guest {
    fn own(&self) -> DiskId {
        self.disk
    }

    fn hello(&self) -> Vec<u8> {
        let Guest { context, disk } = self;
        wire::encode(&Hello {
            context: context.clone(),
            cluster: None,
            disk: *disk,
            incarnation: 1,
            name: String::new(),
        })
    }

    fn admit(&self, hello: &[u8]) -> Result<(DiskId, u64), String> {
        let hello = read_hello(hello)?;
        check_context(&self.context, &hello)?;
        match hello.disk == self.disk {
            true => Err("this node was asked to join itself".to_owned()),
            false => Ok((hello.disk, hello.incarnation)),
        }
    }

    fn up(&self, _: DiskId) {}

    fn down(&self, _: DiskId, _: &str) {}

    fn serve(self: Arc<Self>, _: DiskId, _: u8, _: Vec<u8>) -> BoxFuture<'static, Option<Vec<u8>>> {
        Box::pin(async { None })
    }
}

fn read_hello(bytes: &[u8]) -> Result<Hello, String> {
    wire::decode(bytes).ok_or_else(|| "what it says of itself cannot be read; it runs another version".to_owned())
}

fn check_context(own: &str, hello: &Hello) -> Result<(), String> {
    match hello.context == own {
        true => Ok(()),
        false => Err(format!("it is of the store {:?}, and this node of {own:?}", hello.context)),
    }
}

/// Answers other nodes.
struct Server(Arc<Shared>);

impl Serve for Server {
    fn own(&self) -> DiskId {
        self.0.own
    }

    fn hello(&self) -> Vec<u8> {
        let state = self.0.state();
        wire::encode(&Hello {
            context: self.0.context.clone(),
            cluster: Some(state.cluster),
            disk: self.0.own,
            incarnation: state.incarnation,
            name: self.0.name.clone(),
        })
    }

    fn admit(&self, hello: &[u8]) -> Result<(DiskId, u64), String> {
        let hello = read_hello(hello)?;
        check_context(&self.0.context, &hello)?;
        let state = self.0.state();
        if hello.cluster.is_some_and(|cluster| cluster != state.cluster) {
            return Err("it is of another cluster that has the same name and cookie".to_owned());
        }
        if hello.disk == self.0.own {
            return Err("this address leads to the node itself".to_owned());
        }
        if state.disks.is_gone(hello.disk) {
            return Err("its disk was replaced or attested to be destroyed; start it with a new data directory, or keep the one that it has for an export".to_owned());
        }
        Ok((hello.disk, hello.incarnation))
    }

    fn up(&self, disk: DiskId) {
        self.0.down.lock().remove(&disk);
        if self.0.member_of(disk).is_some() {
            self.0.feed.tell(ClusterEvent::MemberUp { name: self.0.name_of(disk) });
        }
        // It may have been waited for.
        self.0.slots.resume_erasures();
        self.0.wake(RegistryMessage::Up(disk));
    }

    fn down(&self, disk: DiskId, why: &str) {
        self.0.passed_peers.lock().remove(&disk);
        if self.0.member_of(disk).is_some() && !self.0.is_closing.load(SeqCst) {
            self.0.down.lock().entry(disk).or_insert_with(Instant::now);
            let node = self.0.name_of(disk);
            self.0.feed.tell(ClusterEvent::MemberDown { name: node.clone(), why: why.to_owned() });
            tracing::warn!(target: "kuma::cluster", %node, why, "the link to a node is down; it is dialed again, and what it owns waits for it");
        }
    }

    fn serve(self: Arc<Self>, from: DiskId, kind: u8, body: Vec<u8>) -> BoxFuture<'static, Option<Vec<u8>>> {
        Box::pin(async move { serve(&self.0, from, kind, &body).await })
    }
}

async fn serve(shared: &Arc<Shared>, from: DiskId, kind: u8, body: &[u8]) -> Option<Vec<u8>> {
    let nothing = Some(Vec::new());
    match kind {
        kind::GOSSIP => {
            shared.learn(from, wire::decode::<Gossip>(body)?).await;
            nothing
        }
        kind::OWNS => {
            for (slot, epoch) in wire::decode::<Vec<(Slot, Epoch)>>(body)? {
                shared.hear_owner(slot, epoch, from).await;
            }
            nothing
        }
        kind::HANDOFF => {
            let HandoffFrame { slot, envelope } = wire::decode(body)?;
            // Nobody speaks for another one.
            if envelope.from == from
                && let Some(actor) = shared.slot_actor(slot).await
            {
                let _ = actor.cast(SlotMessage::Peer(envelope));
            }
            nothing
        }
        kind::CHUNK => {
            let frame: ChunkFrame = wire::decode(body)?;
            let (reply, kept) = tokio::sync::oneshot::channel();
            let refused = |why: &str| Some(wire::encode(&ChunkReply::Refused(why.to_owned())));
            if frame.from != from {
                return refused("it speaks for another node");
            }
            let Some(actor) = shared.slot_actor(frame.slot).await else { return refused("the node is stopping") };
            let message = SlotMessage::Chunk { frame: Box::new(frame), reply };
            match actor.cast(message) {
                Ok(()) => match kept.await {
                    Ok(kept) => Some(wire::encode(&kept)),
                    Err(_) => refused("the node is stopping"),
                },
                Err(_) => refused("the node is stopping"),
            }
        }
        kind::REQUEST => Some(wire::encode(&requests::serve(shared, wire::decode(body)?, body.len()).await)),
        kind::WELCOME => {
            let state = shared.state();
            let welcome = state.disks.is_active().then(|| Welcome {
                cluster: state.cluster,
                id_secret: shared.slots.id_secret(),
                members: state.members.clone(),
                disks: state.disks.clone(),
            });
            Some(wire::encode(&welcome))
        }
        kind::SHRED => Some(wire::encode(&erasures::serve(shared, from, wire::decode(body)?).await)),
        kind::LEDGER => match shared.slots.ledger(wire::decode(body)?, LEDGER_PAGE).await {
            Ok(page) => Some(wire::encode(&page)),
            Err(error) => {
                tracing::warn!(target: "kuma::cluster", %error, "what is erased cannot be read for a disk that joins");
                // Which it cannot read either, and asks again.
                nothing
            }
        },
        kind::RECEIPTS => {
            if let Err(error) = shared.slots.keep_receipts(wire::decode(body)?).await {
                // They come with the slot, or are made anew.
                tracing::warn!(target: "kuma::cluster", %error, "receipts of another node could not be kept");
            }
            nothing
        }
        kind::ASK => Some(wire::encode(&owner::serve(shared, from, wire::decode(body)?, body.len()).await?)),
        kind::HURRY => {
            if shared.state().disks.is_there(from) {
                shared.wake(RegistryMessage::Hurry);
            }
            nothing
        }
        kind::COMMIT => Some(wire::encode(&subscribe::commit(shared, &wire::decode(body)?).await)),
        kind::FEED => Some(wire::encode(&subscribe::serve(shared, wire::decode(body)?).await)),
        kind::ENDS => Some(wire::encode(&subscribe::ends(shared))),
        kind::JOIN => Some(wire::encode(&admit(shared, from, wire::decode(body)?).await)),
        _ => None,
    }
}

/// Lets a new disk in.
async fn admit(shared: &Arc<Shared>, from: DiskId, request: JoinRequest) -> JoinReply {
    let JoinRequest { node, member, replaces } = request;
    if member.disk != from {
        return JoinReply::Refused("it speaks for another disk".to_owned());
    }
    let admitted = shared
        .change(|state| {
            let known = state.members.get(node).is_some_and(|known| known.disk == from);
            if !known {
                state.members.announce(node, Member { standing: Standing::Joining, ..member })?;
            }
            state.disks.admit(from, replaces, Safeguards::ALL);
            Ok::<_, crate::JoinRefused>((
                state.disks.answer(Epoch::NEVER, &Tombstones::default()),
                state.members.clone(),
            ))
        })
        .await;
    fail_point("join.ack_committed");
    match admitted {
        Ok(Ok((answer, members))) => JoinReply::Admitted { answer, members },
        Ok(Err(refused)) => JoinReply::Refused(refused.to_string()),
        Err(error) => JoinReply::Refused(format!("it could not be written down: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_is_an_address_however_it_is_written() {
        for (seed, address) in [
            ("10.0.0.1:4861", "10.0.0.1:4861"),
            ("kuma@10.0.0.1", "10.0.0.1:4860"),
            ("kuma@db.example:77", "db.example:77"),
            ("db.example", "db.example:4860"),
            ("[::1]:4861", "[::1]:4861"),
            ("[::1]", "[::1]:4860"),
        ] {
            assert_eq!(seed_address(seed), address);
        }
    }
}
