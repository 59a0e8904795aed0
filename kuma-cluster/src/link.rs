//! The links to other nodes: encrypted connections that carry requests, and that are known to be down soon after they are.
//!
//! ```text
//! call ─▶ Flow: queued, coalesced ─▶ RemoteActor ─▶ NodeSession ─▶ NoiseStream ═══ TCP ═══ NoiseStream ─▶ … ─▶ Router ─▶ Flow ─▶ Peers::serve
//!         flow.rs, frame.rs          └── ractor_cluster ──┘        noise.rs                                    session.rs
//! ```
//!
//! The layer beneath is ractor_cluster, which has sessions and addresses actors, and has no limits, no deadlines, no failure detection and no
//! encryption. So it gets a stream that is encrypted and notices silence (`noise.rs`), one remotable actor a node, which takes frames of our own
//! (`frame.rs`), and no more in a frame and under way than the other side has acknowledged (`flow.rs`).
//!
//! Invariants:
//! - Nothing but the Noise handshake is ever sent in the clear, and nobody without the cookie gets past its first message.
//! - A link says that a node can be reached, never what it owns.
//! - A request is sent once. When its link goes down its outcome is unknown, and it is for the caller to know whether to repeat it.
//! - Requests are not ordered among each other: each is served in a task of its own.
//!
//! ractor_cluster logs whole frames at the level `debug`: never let a subscriber of its target see that in production. The target of this module is
//! `kuma::link`; it logs neither payloads nor anything of the cookie.

mod cookie;
mod dial;
mod error;
mod flow;
mod frame;
mod hello;
mod noise;
mod session;
#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    net::{Ipv4Addr, SocketAddr},
    ops::RangeInclusive,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use futures_util::future::BoxFuture;
use kuma_core::DiskId;
use parking_lot::Mutex;
use ractor::{Actor, ActorRef};
use ractor_cluster::{NodeServer, NodeServerMessage, node::NodeConnectionMode};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, mpsc},
    task::JoinHandle,
};
use zeroize::Zeroizing;

pub use cookie::{Cookie, CookieError};
pub use error::{CallError, DialError, LinkError};

use flow::{FRAME_BYTES, MESSAGE_BYTES_MAX, PIECE_BYTES};
use hello::Hello;
use session::{Forward, Router, RouterMessage, Session, Sessions};

/// The protocols that this version speaks.
const PROTOCOLS: RangeInclusive<u16> = 1..=1;
/// How long an actor may take to stop.
const STOP_WITHIN: Duration = Duration::from_secs(2);

/// How a node is reached.
#[derive(Clone, Debug)]
pub struct LinkOptions {
    /// Where to listen for other nodes. Port 0: any that is free.
    pub listen: SocketAddr,
    /// The cluster's secret.
    pub cookie: Cookie,
    /// How much, and how long.
    pub limits: LinkLimits,
}

/// How much may be under way, and how long things may take. The default is made for a data centre.
#[derive(Clone, Copy, Debug)]
pub struct LinkLimits {
    /// For each step of a new connection: connecting, introducing itself, coming up.
    pub handshake: Duration,
    /// How often a sign of life is sent.
    pub keepalive: Duration,
    /// A link is down after this much silence. Several times `keepalive`.
    pub dead: Duration,
    /// Connections, whether in the handshake or open.
    pub connections_max: usize,
    /// Calls to one peer that wait for an answer.
    pub calls_max: usize,
    /// Requests of one peer that are being served.
    pub served_max: usize,
    /// Requests to one peer that wait to be sent, and as many answers again. The one that goes over it is still taken.
    pub queued_bytes_max: usize,
}

impl Default for LinkLimits {
    fn default() -> Self {
        LinkLimits {
            handshake: Duration::from_secs(2),
            keepalive: Duration::from_millis(300),
            dead: Duration::from_millis(1500),
            connections_max: 256,
            calls_max: 4096,
            served_max: 4096,
            queued_bytes_max: 8 << 20,
        }
    }
}

/// What a node knows that its links do not. Called by the links: nothing here may block.
pub trait Peers: Send + Sync + 'static {
    /// The disk of this node.
    fn own(&self) -> DiskId;

    /// What is sent to a peer for its [`Peers::admit`]; 64 KiB at most, the rest is cut off.
    fn hello(&self) -> Vec<u8>;

    /// Decides about a peer by its hello. A node that dialed itself comes here too, and is to be refused.
    ///
    /// # Errors
    /// A refusal: a sentence, which both sides log.
    fn admit(&self, hello: &[u8], direction: Direction<'_>) -> Result<Admitted, String>;

    /// There is a link to a disk. Told in turn with [`Peers::down`].
    fn up(&self, disk: DiskId);

    /// There is none any more, and why.
    fn down(&self, disk: DiskId, why: &str);

    /// Serves a request of a peer, in a task of its own. It is not ended at its deadline; but the caller does not wait longer.
    ///
    /// # Cancel safety
    /// It is dropped at any of its `await`s when the links stop.
    fn serve(self: Arc<Self>, from: DiskId, kind: u8, body: Vec<u8>, deadline: Instant) -> BoxFuture<'static, Served>;
}

/// Who made a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction<'a> {
    /// This node, to this address.
    Dialed(&'a str),
    /// The other one, from this address.
    Accepted(SocketAddr),
}

/// A peer that is welcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Admitted {
    /// Its disk.
    pub disk: DiskId,
    /// Counts the starts of its process. A connection of an earlier one gives way.
    pub incarnation: u64,
}

/// What became of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Served {
    /// The answer; 16 MiB at most.
    Reply(Vec<u8>),
    /// There is no such kind. Nothing was done.
    Unknown,
}

/// An address to which there is to be a link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// `host:port`; the name is resolved at each attempt.
    pub address: String,
    /// The disk that is there, if it is known. Another one is refused; a link to it that it made itself is as good.
    pub expect: Option<DiskId>,
}

/// How it stands with a target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DialState {
    /// It was not tried yet.
    Pending,
    /// There is or was a link to this disk.
    Up(DiskId),
    /// The last attempt came to nothing, and why.
    Failed(String),
}

/// A peer to which there is a link.
#[derive(Clone, Debug)]
pub struct PeerState {
    /// Its disk.
    pub disk: DiskId,
    /// Which of its starts.
    pub incarnation: u64,
    /// What was dialed, or where it dialed from.
    pub address: String,
    /// Whether this node dialed.
    pub is_dialed: bool,
    /// When the connection was made.
    pub since: SystemTime,
    /// Through the queues of both nodes and back, measured once a second.
    pub round_trip: Option<Duration>,
    /// Bytes of items that were sent to it.
    pub bytes_sent: u64,
    /// Bytes of items that came from it.
    pub bytes_received: u64,
}

/// The links of a node. A clone is the same. They end with [`Links::stop`], or abruptly when the last clone is dropped.
#[derive(Clone)]
pub struct Links(Arc<Handle>);

/// What the tasks of the links share.
struct Shared {
    peers: Arc<dyn Peers>,
    key: Zeroizing<[u8; 32]>,
    limits: LinkLimits,
    protocols: RangeInclusive<u16>,
    places: Arc<Semaphore>,
    sessions: Arc<Sessions>,
    node_server: ActorRef<NodeServerMessage>,
    router: ActorRef<RouterMessage>,
}

impl Shared {
    fn hello(&self) -> Hello {
        let router = self.router.get_id().pid();
        Hello { protocols: self.protocols.clone(), router, body: dial::cut(self.peers.hello()) }
    }
}

struct Keeper {
    target: Target,
    state: Arc<Mutex<DialState>>,
    task: JoinHandle<()>,
}

/// What has to be ended.
struct Handle {
    shared: Arc<Shared>,
    address: SocketAddr,
    keepers: Mutex<HashMap<String, Keeper>>,
    listening: Mutex<Option<JoinHandle<()>>>,
    events: Mutex<Option<JoinHandle<()>>>,
    stopping: tokio::sync::Mutex<()>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.halt();
        self.shared.node_server.stop(None);
        self.shared.router.stop(None);
        self.shared.sessions.end();
    }
}

impl Handle {
    /// Lets nobody in any more and closes what is open. Returns the tasks that were told to end.
    fn halt(&self) -> Vec<JoinHandle<()>> {
        self.shared.sessions.stop();
        let keepers = std::mem::take(&mut *self.keepers.lock()).into_values().map(|keeper| keeper.task);
        let tasks: Vec<_> = keepers.chain(self.listening.lock().take()).collect();
        tasks.iter().for_each(JoinHandle::abort);
        tasks
    }
}

impl Links {
    /// Listens for other nodes.
    ///
    /// # Errors
    /// [`LinkError::Bind`] if the address is taken or not this machine's.
    pub async fn start(options: LinkOptions, peers: Arc<dyn Peers>) -> Result<Links, LinkError> {
        Links::start_speaking(PROTOCOLS, options, peers).await
    }

    async fn start_speaking(
        protocols: RangeInclusive<u16>,
        options: LinkOptions,
        peers: Arc<dyn Peers>,
    ) -> Result<Links, LinkError> {
        let LinkOptions { listen, cookie, limits } = options;
        let bind = |source| LinkError::Bind { address: listen, source };
        let listener = TcpListener::bind(listen).await.map_err(bind)?;
        let address = listener.local_addr().map_err(bind)?;
        let (sender, events) = mpsc::unbounded_channel();
        let sessions = Sessions::new(peers.own(), sender.clone());
        let failed = |what| move |error: ractor::SpawnErr| LinkError::Actor { what, reason: error.to_string() };
        let router = Router { sessions: sessions.clone(), peers: peers.clone() };
        let (router, _) = Actor::spawn(None, router, ()).await.map_err(failed("router"))?;
        // It opens a listener in the clear, whether it is wanted or not. So: of this machine alone, and who comes there is put off at once. Its
        // name is of this start, and its host's name is nobody's, since two nodes of the same name and port take each other for themselves.
        let name = format!("{}.{:016x}", peers.own(), rand::random::<u64>());
        let mode = Some(NodeConnectionMode::Isolated);
        let server = NodeServer::new(0, cookie.session_key(), name.clone(), name, None, mode)
            .with_listen_addr(Ipv4Addr::LOCALHOST.into())
            .with_max_inbound_frame_size(4 * FRAME_BYTES as u64);
        let (node_server, _) = match Actor::spawn(None, server, ()).await {
            Ok(server) => server,
            Err(error) => {
                router.stop(None);
                return Err(failed("node server")(error));
            }
        };
        let subscription = Box::new(Forward(sender));
        let _ = node_server.cast(NodeServerMessage::SubscribeToEvents { id: "kuma".into(), subscription });
        let events = tokio::spawn(sessions.clone().run(events, peers.clone()));
        let key = cookie.noise_key();
        let places = Arc::new(Semaphore::new(limits.connections_max));
        let shared = Shared { peers, key, limits, protocols, places, sessions, node_server, router };
        let shared = Arc::new(shared);
        let listening = tokio::spawn(dial::listen(shared.clone(), listener));
        Ok(Links(Arc::new(Handle {
            shared,
            address,
            keepers: Mutex::default(),
            listening: Mutex::new(Some(listening)),
            events: Mutex::new(Some(events)),
            stopping: tokio::sync::Mutex::default(),
        })))
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.0.address
    }

    /// Dials `host:port` once and returns the disk that is there, with a link that is up. A node to which there is a link already is left alone.
    ///
    /// # Errors
    /// [`DialError`] says how far it got. It takes three times [`LinkLimits::handshake`] at most.
    /// # Cancel safety
    /// If it is dropped, a link may come up nevertheless.
    pub async fn dial(&self, address: &str) -> Result<DiskId, DialError> {
        dial::dial(&self.0.shared, address, None).await
    }

    /// Sees to it that there are links to these addresses, for ever: each is dialed again after 50 ms to 5 s, longer each time. The set replaces the
    /// former one; links that there are stay.
    pub fn keep_connected(&self, targets: Vec<Target>) {
        let mut keepers = self.0.keepers.lock();
        let mut former = std::mem::take(&mut *keepers);
        for target in targets {
            if self.0.shared.sessions.is_stopped() {
                break;
            }
            let keeper = match former.remove(&target.address) {
                Some(keeper) if keeper.target == target => keeper,
                other => {
                    former.extend(other.map(|keeper| (target.address.clone(), keeper)));
                    let state = Arc::new(Mutex::new(DialState::Pending));
                    let task = tokio::spawn(dial::keep(self.0.shared.clone(), target.clone(), state.clone()));
                    Keeper { target: target.clone(), state, task }
                }
            };
            if let Some(twice) = keepers.insert(target.address, keeper) {
                twice.task.abort();
            }
        }
        former.into_values().for_each(|keeper| keeper.task.abort());
    }

    /// How it stands with each address that is to be connected.
    pub fn dial_states(&self) -> Vec<(String, DialState)> {
        let keepers = self.0.keepers.lock();
        keepers.iter().map(|(address, keeper)| (address.clone(), keeper.state.lock().clone())).collect()
    }

    /// Whether there is a link to a disk.
    pub fn is_up(&self, disk: DiskId) -> bool {
        self.0.shared.sessions.up(disk).is_some()
    }

    /// For how long nothing has come from a disk, whether there is a link to it or there was one in the last minute. A peer that has nothing to say
    /// says so every [`LinkLimits::keepalive`].
    pub fn silence(&self, disk: DiskId) -> Option<Duration> {
        self.0.shared.sessions.silence(disk)
    }

    /// All that there is a link to.
    pub fn peers(&self) -> Vec<PeerState> {
        let sessions = &self.0.shared.sessions;
        let all = sessions.all().into_iter().filter(|session| sessions.up(session.disk).is_some());
        all.map(|session| {
            let counters = session.flow.counters();
            PeerState {
                disk: session.disk,
                incarnation: session.incarnation,
                address: session.address.clone(),
                is_dialed: session.is_dialed,
                since: session.since,
                round_trip: counters.round_trip,
                bytes_sent: counters.sent,
                bytes_received: counters.received,
            }
        })
        .collect()
    }

    /// Sends a request and waits for its answer. Never waits for room.
    ///
    /// # Errors
    /// [`CallError::is_outcome_unknown`] says whether it may have run.
    /// # Cancel safety
    /// If it is dropped, the request may run nevertheless.
    pub async fn call(&self, to: DiskId, kind: u8, body: Vec<u8>, within: Duration) -> Result<Vec<u8>, CallError> {
        check(&body, MESSAGE_BYTES_MAX)?;
        self.session(to)?.flow.call(kind, &body, within).await
    }

    /// Sends something that nobody answers. It may be lost.
    ///
    /// # Errors
    /// There is no link, or no room. None of them means that it arrived.
    pub fn cast(&self, to: DiskId, kind: u8, body: Vec<u8>) -> Result<(), CallError> {
        check(&body, MESSAGE_BYTES_MAX)?;
        self.session(to)?.flow.cast(kind, &body)
    }

    /// Sends 64 KiB at most behind all requests, and waits for the answer. With 256 KiB without an answer it waits for its turn.
    ///
    /// # Errors
    /// As [`Links::call`]; [`CallError::Overloaded`] also if its turn did not come in time.
    /// # Cancel safety
    /// If it is dropped, the request may run nevertheless.
    pub async fn call_bulk(&self, to: DiskId, kind: u8, body: Vec<u8>, within: Duration) -> Result<Vec<u8>, CallError> {
        check(&body, PIECE_BYTES)?;
        self.session(to)?.flow.call_bulk(kind, &body, within).await
    }

    /// Closes the link to a disk, if there is one. A target of [`Links::keep_connected`] is dialed again.
    pub fn disconnect(&self, disk: DiskId) {
        let sessions = &self.0.shared.sessions;
        if let Some(session) = sessions.present(disk) {
            sessions.close(&session, "this node closed the link");
        }
    }

    /// Closes everything. When it returns the port is free, and nothing of the links runs any more. Once is enough, twice does no harm.
    ///
    /// # Cancel safety
    /// If it is dropped, call it again.
    pub async fn stop(&self) {
        let _one_at_a_time = self.0.stopping.lock().await;
        for task in self.0.halt() {
            let _ = task.await;
        }
        let shared = &self.0.shared;
        for session in shared.sessions.all() {
            let mut gone = session.gone.subscribe();
            let _ = tokio::time::timeout(STOP_WITHIN, gone.wait_for(|gone| *gone)).await;
        }
        let _ = shared.node_server.stop_and_wait(None, Some(STOP_WITHIN)).await;
        let _ = shared.router.stop_and_wait(None, Some(STOP_WITHIN)).await;
        shared.sessions.end();
        let events = self.0.events.lock().take();
        if let Some(events) = events {
            let _ = events.await;
        }
    }

    fn session(&self, disk: DiskId) -> Result<Arc<Session>, CallError> {
        self.0.shared.sessions.up(disk).ok_or(CallError::NotConnected)
    }
}

fn check(body: &[u8], bytes_max: usize) -> Result<(), CallError> {
    let bytes = body.len();
    if bytes > bytes_max { Err(CallError::TooLarge { bytes, bytes_max }) } else { Ok(()) }
}
