//! The links that there are: one for a disk at most, from the end of the handshake until ractor_cluster has let go of it.
//!
//! ```text
//! opening ──ready──▶ up ──broken, closed──▶ down ──ractor_cluster let go──▶ gone
//! ```
//!
//! Invariants:
//! - ractor_cluster never sees two sessions of the same two nodes. It would choose one of them by rules of its own, which prefer a dead one by half
//!   of all names. So a new one is handed over when the former one is gone.
//! - Of two connections that the same two nodes made at the same time, both keep the one that the lower disk dialed ([`decide`]).
//! - `up` and `down` of a disk are told in turn, each once.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use kuma_core::DiskId;
use parking_lot::Mutex;
use ractor::{Actor, ActorId, ActorProcessingErr, ActorRef};
use ractor_cluster::{
    NodeEventSubscription, NodeSessionMessage, RactorClusterMessage, node::NodeServerSessionInformation,
};
use tokio::{
    sync::{OwnedSemaphorePermit, mpsc, watch},
    task::JoinSet,
};

use super::{
    Admitted, Peers, Served,
    flow::Flow,
    frame::{self, SessionId, Status},
    noise::Life,
};

/// How long it is remembered when something came from a disk last.
const REMEMBERED: Duration = Duration::from_secs(60);
/// How long ractor_cluster may take to let go of a session before it counts as gone all the same.
const LET_GO: Duration = Duration::from_secs(2);

/// One connection to a disk.
pub(super) struct Session {
    pub(super) id: SessionId,
    pub(super) disk: DiskId,
    pub(super) incarnation: u64,
    pub(super) address: String,
    pub(super) is_dialed: bool,
    /// The peer's router, as it is called on its own node.
    pub(super) router: u64,
    pub(super) since: SystemTime,
    pub(super) flow: Arc<Flow>,
    pub(super) life: Arc<Life>,
    pub(super) phase: Mutex<Phase>,
    pub(super) gone: watch::Sender<bool>,
    /// Its place among the connections.
    pub(super) _place: OwnedSemaphorePermit,
}

/// How far a session is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Opening,
    Up,
    Down,
}

/// What becomes of a new connection to a disk that has one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Decision {
    /// The new one is superfluous.
    Keep,
    /// The old one goes first.
    Replace,
    /// The new one is of an earlier start of that node.
    Outdated,
}

/// What two connections are compared by.
#[derive(Clone, Copy, Debug)]
pub(super) struct Claim {
    pub(super) incarnation: u64,
    pub(super) is_dialed: bool,
}

/// Decides between two connections to one peer. `both_have_it`: the peer has the old one as well, which only the dialer knows.
///
/// Whoever dials has the last word and sees first that it has a link already; a listener that is asked nevertheless has a link that the dialer lost.
pub(super) fn decide(is_lower: bool, old: Claim, new: Claim, both_have_it: bool) -> Decision {
    match new.incarnation.cmp(&old.incarnation) {
        std::cmp::Ordering::Less => Decision::Outdated,
        std::cmp::Ordering::Greater => Decision::Replace,
        std::cmp::Ordering::Equal => {
            let keeps = match (old.is_dialed, new.is_dialed) {
                (true, true) => true,
                (false, false) => false,
                (false, true) => both_have_it || !is_lower,
                (true, false) => is_lower,
            };
            if keeps { Decision::Keep } else { Decision::Replace }
        }
    }
}

/// What happens to sessions.
pub(super) enum Event {
    Opened(Option<SessionId>, ActorRef<NodeSessionMessage>),
    Ready(Option<SessionId>, ActorRef<NodeSessionMessage>),
    Ended(Option<SessionId>),
    Up(DiskId),
    Down(DiskId, String),
    Stop,
}

/// Passes the events of ractor_cluster on; it runs inside of its actor.
pub(super) struct Forward(pub(super) mpsc::UnboundedSender<Event>);

fn labelled(session: &NodeServerSessionInformation) -> Option<SessionId> {
    let mut id = [0; 16];
    hex::decode_to_slice(&session.peer_addr, &mut id).ok()?;
    Some(SessionId(id))
}

impl NodeEventSubscription for Forward {
    fn node_session_opened(&self, session: NodeServerSessionInformation) {
        let _ = self.0.send(Event::Opened(labelled(&session), session.actor));
    }

    fn node_session_authenticated(&self, _: NodeServerSessionInformation) {}

    fn node_session_ready(&self, session: NodeServerSessionInformation) {
        let _ = self.0.send(Event::Ready(labelled(&session), session.actor));
    }

    fn node_session_disconnected(&self, session: NodeServerSessionInformation) {
        let _ = self.0.send(Event::Ended(labelled(&session)));
    }
}

/// All sessions of a node.
pub(super) struct Sessions {
    pub(super) own: DiskId,
    table: Mutex<Table>,
    /// When something came last over a session that is down.
    heard: Mutex<HashMap<DiskId, Instant>>,
    events: mpsc::UnboundedSender<Event>,
    /// Marked whenever a disk goes up, down or away.
    pub(super) changed: watch::Sender<()>,
}

#[derive(Default)]
struct Table {
    by_id: HashMap<SessionId, Arc<Session>>,
    by_disk: HashMap<DiskId, Arc<Session>>,
    is_stopped: bool,
}

/// How the installation of a session went.
pub(super) enum Installed {
    Yes,
    /// Another one is there already.
    Superfluous,
    /// A sentence for both sides.
    Refused(String),
}

impl Sessions {
    pub(super) fn new(own: DiskId, events: mpsc::UnboundedSender<Event>) -> Arc<Self> {
        Arc::new(Sessions {
            own,
            table: Mutex::default(),
            heard: Mutex::default(),
            events,
            changed: watch::Sender::new(()),
        })
    }

    pub(super) fn up(&self, disk: DiskId) -> Option<Arc<Session>> {
        self.table.lock().by_disk.get(&disk).filter(|session| *session.phase.lock() == Phase::Up).cloned()
    }

    /// The one with a disk that is up, or about to be.
    pub(super) fn present(&self, disk: DiskId) -> Option<Arc<Session>> {
        self.table.lock().by_disk.get(&disk).filter(|session| *session.phase.lock() != Phase::Down).cloned()
    }

    /// For how long nothing has come from a disk, over a session that is there or the one before; none if that is longer ago than anybody asks.
    pub(super) fn silence(&self, disk: DiskId) -> Option<Duration> {
        let now = self.table.lock().by_disk.get(&disk).and_then(|session| session.life.heard()).map(Instant::from);
        let heard = now.max(self.heard.lock().get(&disk).copied())?;
        Some(heard.elapsed())
    }

    pub(super) fn all(&self) -> Vec<Arc<Session>> {
        self.table.lock().by_disk.values().cloned().collect()
    }

    fn find(&self, id: SessionId) -> Option<Arc<Session>> {
        self.table.lock().by_id.get(&id).cloned()
    }

    /// A connection of an earlier start of a node is refused with a sentence.
    pub(super) fn check(&self, peer: &Admitted) -> Result<(), String> {
        match self.present(peer.disk).filter(|present| present.incarnation > peer.incarnation) {
            Some(present) => Err(outdated(&present, peer.incarnation)),
            None => Ok(()),
        }
    }

    /// Makes a session the one with its disk, after the former one is gone. `peer_has`: the session that the peer says to have.
    pub(super) async fn install(&self, session: &Arc<Session>, peer_has: Option<SessionId>) -> Installed {
        loop {
            let old = {
                let mut table = self.table.lock();
                if table.is_stopped {
                    return Installed::Refused("this node is stopping".into());
                }
                let Some(old) = table.by_disk.get(&session.disk).cloned() else {
                    table.by_id.insert(session.id, session.clone());
                    table.by_disk.insert(session.disk, session.clone());
                    return Installed::Yes;
                };
                old
            };
            if *old.phase.lock() != Phase::Down {
                let claim = |of: &Session| Claim { incarnation: of.incarnation, is_dialed: of.is_dialed };
                match decide(self.own < session.disk, claim(&old), claim(session), peer_has == Some(old.id)) {
                    Decision::Keep => return Installed::Superfluous,
                    Decision::Replace => self.close(&old, "a newer connection takes its place"),
                    Decision::Outdated => return Installed::Refused(outdated(&old, session.incarnation)),
                }
            }
            if tokio::time::timeout(LET_GO, old.gone.subscribe().wait_for(|gone| *gone)).await.is_err() {
                self.remove(&old);
            }
        }
    }

    /// Sees to it that a session that was installed comes up in time, or goes.
    pub(super) fn watch(self: &Arc<Self>, session: Arc<Session>, within: Duration) {
        let sessions = self.clone();
        tokio::spawn(async move {
            let mut gone = session.gone.subscribe();
            if tokio::time::timeout(within, gone.wait_for(|gone| *gone)).await.is_ok() {
                return;
            }
            let phase = *session.phase.lock();
            if phase == Phase::Up {
                return;
            }
            sessions.close(&session, "it did not come up in time");
            if tokio::time::timeout(LET_GO, gone.wait_for(|gone| *gone)).await.is_err() {
                sessions.remove(&session);
            }
        });
    }

    /// Closes a session. Its callers are told at once.
    pub(super) fn close(&self, session: &Session, why: &str) {
        session.life.close(why);
        self.down(session);
    }

    fn down(&self, session: &Session) {
        let mut phase = session.phase.lock();
        let was = std::mem::replace(&mut *phase, Phase::Down);
        if was == Phase::Down {
            return;
        }
        session.flow.down();
        let why = session.life.why().unwrap_or_else(|| "the session ended".into());
        tracing::debug!(target: "kuma::link", disk = %session.disk, address = session.address, why, "a link is down");
        if was == Phase::Up {
            let mut all = self.heard.lock();
            all.retain(|_, heard| heard.elapsed() < REMEMBERED);
            all.extend(session.life.heard().map(|heard| (session.disk, heard.into())));
            let _ = self.events.send(Event::Down(session.disk, why));
        }
        drop(phase);
        self.changed.send_replace(());
    }

    /// It is gone: the next one with its disk may come.
    pub(super) fn remove(&self, session: &Arc<Session>) {
        session.life.close("the session ended");
        self.down(session);
        let mut table = self.table.lock();
        table.by_id.remove(&session.id);
        if table.by_disk.get(&session.disk).is_some_and(|there| Arc::ptr_eq(there, session)) {
            table.by_disk.remove(&session.disk);
        }
        drop(table);
        session.gone.send_replace(true);
        self.changed.send_replace(());
    }

    /// Closes all of them, and lets no other one in.
    pub(super) fn stop(&self) {
        self.table.lock().is_stopped = true;
        for session in self.all() {
            self.close(&session, "this node is stopping");
        }
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.table.lock().is_stopped
    }

    /// Ends [`Sessions::run`].
    pub(super) fn end(&self) {
        let _ = self.events.send(Event::Stop);
    }

    /// Carries events out, one after the other.
    pub(super) async fn run(self: Arc<Self>, mut events: mpsc::UnboundedReceiver<Event>, peers: Arc<dyn Peers>) {
        while let Some(event) = events.recv().await {
            match event {
                // Somebody at the listener that ractor_cluster opens whether it is wanted or not: nobody has business there.
                Event::Opened(id, actor) if id.and_then(|id| self.find(id)).is_none() => actor.stop(None),
                Event::Opened(..) => {}
                Event::Ready(id, actor) => {
                    if let Some(session) = id.and_then(|id| self.find(id)) {
                        self.ready(session, &actor);
                    }
                }
                Event::Ended(id) => {
                    if let Some(session) = id.and_then(|id| self.find(id)) {
                        self.remove(&session);
                    }
                }
                Event::Up(disk) => peers.up(disk),
                Event::Down(disk, why) => peers.down(disk, &why),
                Event::Stop => return,
            }
        }
    }

    /// Both sides have told each other their actors: frames may travel.
    ///
    /// The peer's router is looked for among the children of the session. The usual way, a process group, is one for the whole process, and an actor
    /// in it is named by a number of the session which each node counts for itself: with several nodes in a process it finds the wrong one.
    fn ready(self: &Arc<Self>, session: Arc<Session>, actor: &ActorRef<NodeSessionMessage>) {
        let is_router = |id| matches!(id, ActorId::Remote { pid, .. } if pid == session.router);
        let Some(router) = actor.get_children().into_iter().find(|child| is_router(child.get_id())) else {
            return self.close(&session, "the peer has no router");
        };
        {
            let mut phase = session.phase.lock();
            if *phase != Phase::Opening {
                return;
            }
            *phase = Phase::Up;
            let _ = self.events.send(Event::Up(session.disk));
        }
        tracing::debug!(target: "kuma::link", disk = %session.disk, address = session.address, "a link is up");
        self.changed.send_replace(());
        let (sessions, router) = (self.clone(), ActorRef::<RouterMessage>::from(router));
        tokio::spawn(async move {
            while let Some(frame) = session.flow.next_frame().await {
                if router.cast(RouterMessage::Frame(frame)).is_err() {
                    return sessions.close(&session, "the session ended");
                }
            }
        });
    }
}

fn outdated(present: &Session, incarnation: u64) -> String {
    let Session { disk, incarnation: newer, .. } = present;
    format!("start {newer} of the node with disk {disk} is connected already; this is its earlier start {incarnation}")
}

/// The only message that crosses a node.
#[derive(RactorClusterMessage)]
pub(super) enum RouterMessage {
    /// A frame of this crate.
    Frame(Vec<u8>),
}

/// The only actor of a node that others can send to: it takes their frames.
pub(super) struct Router {
    pub(super) sessions: Arc<Sessions>,
    pub(super) peers: Arc<dyn Peers>,
}

impl Actor for Router {
    type Msg = RouterMessage;
    /// Requests that are being served; they end with the router.
    type State = JoinSet<()>;
    type Arguments = ();

    async fn pre_start(&self, _: ActorRef<RouterMessage>, _: ()) -> Result<JoinSet<()>, ActorProcessingErr> {
        Ok(JoinSet::new())
    }

    async fn handle(
        &self,
        _: ActorRef<RouterMessage>,
        RouterMessage::Frame(bytes): RouterMessage,
        serving: &mut JoinSet<()>,
    ) -> Result<(), ActorProcessingErr> {
        while serving.try_join_next().is_some() {}
        self.take(&bytes, serving);
        Ok(())
    }
}

impl Router {
    pub(super) fn take(&self, bytes: &[u8], serving: &mut JoinSet<()>) {
        let (header, rest) = match frame::header(bytes) {
            Ok(read) => read,
            Err(error) => return tracing::warn!(target: "kuma::link", %error, "what came is not a frame"),
        };
        // Of a former session, or for another node of this process.
        let Some(session) = self.sessions.find(header.session) else { return };
        let asked = match session.flow.take_frame(&header, rest) {
            Ok(asked) => asked,
            Err(error) => {
                tracing::warn!(target: "kuma::link", disk = %session.disk, %error, "a frame is malformed; the link is closed");
                return self.sessions.close(&session, &format!("a frame of the peer is malformed: {error}"));
            }
        };
        for asked in asked {
            let Some(request) = session.flow.serve(asked.id, asked.body.len()) else { continue };
            let (peers, from) = (self.peers.clone(), session.disk);
            serving.spawn(async move {
                if Instant::now() >= asked.deadline {
                    return request.end(Status::Expired, Vec::new());
                }
                match peers.serve(from, asked.kind, asked.body, asked.deadline).await {
                    Served::Reply(body) => request.end(Status::Done, body),
                    Served::Unknown => request.end(Status::UnknownKind, Vec::new()),
                }
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two nodes that dialed each other at the same time have to keep the same connection, whichever of the two each of them completes first.
    #[test]
    fn both_sides_keep_the_connection_that_the_lower_disk_dialed() {
        let claim = |is_dialed| Claim { incarnation: 1, is_dialed };
        for (is_lower, keeps_dialed) in [(true, true), (false, false)] {
            let kept = |old: bool, decision| if decision == Decision::Keep { old } else { !old };
            for old in [true, false] {
                assert_eq!(kept(old, decide(is_lower, claim(old), claim(!old), false)), keeps_dialed);
            }
        }
    }

    #[test]
    fn a_new_start_replaces_and_an_earlier_one_is_refused() {
        let claim = |incarnation| Claim { incarnation, is_dialed: true };
        assert_eq!(decide(true, claim(1), claim(2), true), Decision::Replace);
        assert_eq!(decide(true, claim(2), claim(1), false), Decision::Outdated);
    }
}
