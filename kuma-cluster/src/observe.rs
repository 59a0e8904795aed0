//! What a node counts and times of its cluster, through the `metrics` facade; and since when things are as they are. The names are documented in
//! docs/observability.md; no label names an entity. Peers are labelled by the names of their nodes.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Weak, atomic::Ordering::SeqCst},
    time::{Duration, Instant},
};

use kuma_core::{DiskId, Slot, Token};
use metrics::{
    Counter, Gauge, Histogram, Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram,
};
use parking_lot::Mutex;

use crate::{feed::ClusterEvent, shared::Shared};

/// How often gauges are set, and progress is told.
const EVERY: Duration = Duration::from_secs(1);

/// Why a move came to nothing, in a word.
pub(crate) const REASONS: [&str; 5] = ["copy", "erasing", "seal", "timeout", "other"];

/// Handles made once.
pub(crate) struct ClusterMetrics {
    store: String,
    given: Counter,
    taken: Counter,
    rows: Counter,
    aborted: [Counter; REASONS.len()],
    pause: Histogram,
    owned: Gauge,
    moving: Gauge,
    untaken: Gauge,
    staged: Gauge,
    unknown: Gauge,
    ready: Gauge,
    asked: [Counter; 3],
    pub(crate) asked_seconds: Histogram,
    peers: Mutex<HashMap<String, PeerMetrics>>,
}

struct PeerMetrics {
    up: Gauge,
    sent: Counter,
    received: Counter,
    round_trip: Gauge,
}

/// What became of a request that was handed to the owner of its slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AskedResult {
    Answered,
    Unavailable,
    Unknown,
}

impl ClusterMetrics {
    pub(crate) fn new(store: &str) -> Self {
        describe();
        let name = store.to_owned();
        let store = || name.clone();
        let handoffs = |result: &'static str| counter!("kuma_handoffs_total", "store" => store(), "result" => result);
        let asked = |result: &'static str| counter!("kuma_cluster_asked_total", "store" => store(), "result" => result);
        ClusterMetrics {
            given: handoffs("given"),
            taken: handoffs("taken"),
            rows: counter!("kuma_handoff_rows_total", "store" => store()),
            aborted: REASONS
                .map(|reason| counter!("kuma_handoffs_aborted_total", "store" => store(), "reason" => reason)),
            pause: histogram!("kuma_handoff_pause_seconds", "store" => store()),
            owned: gauge!("kuma_cluster_slots_owned", "store" => store()),
            moving: gauge!("kuma_cluster_slots_moving", "store" => store()),
            untaken: gauge!("kuma_cluster_slots_released_untaken", "store" => store()),
            staged: gauge!("kuma_cluster_slots_staged", "store" => store()),
            unknown: gauge!("kuma_cluster_slots_without_owner", "store" => store()),
            ready: gauge!("kuma_cluster_ready", "store" => store()),
            asked: ["answered", "unavailable", "unknown"].map(asked),
            asked_seconds: histogram!("kuma_cluster_asked_seconds", "store" => store()),
            peers: Mutex::default(),
            store: name,
        }
    }

    pub(crate) fn given(&self, pause: Duration, rows: u64) {
        self.given.increment(1);
        self.rows.increment(rows);
        self.pause.record(pause);
    }

    pub(crate) fn taken(&self) {
        self.taken.increment(1);
    }

    pub(crate) fn aborted(&self, reason: &str) {
        let at = REASONS.iter().position(|known| *known == reason).unwrap_or(REASONS.len() - 1);
        if let Some(counter) = self.aborted.get(at) {
            counter.increment(1);
        }
    }

    pub(crate) fn asked(&self, result: AskedResult) {
        if let Some(counter) = self.asked.get(result as usize) {
            counter.increment(1);
        }
    }

    fn peer(&self, name: &str, set: impl FnOnce(&PeerMetrics)) {
        let mut peers = self.peers.lock();
        let of = || (self.store.clone(), name.to_owned());
        let peer = peers.entry(name.to_owned()).or_insert_with(|| {
            let [(a, b), (c, d), (e, f), (g, h)] = [of(), of(), of(), of()];
            PeerMetrics {
                up: gauge!("kuma_peer_up", "store" => a, "peer" => b),
                sent: counter!("kuma_peer_sent_bytes_total", "store" => c, "peer" => d),
                received: counter!("kuma_peer_received_bytes_total", "store" => e, "peer" => f),
                round_trip: gauge!("kuma_peer_round_trip_seconds", "store" => g, "peer" => h),
            }
        });
        set(peer);
    }
}

fn describe() {
    describe_counter!("kuma_handoffs_total", "Slots that came and went, by which");
    describe_counter!("kuma_handoffs_aborted_total", "Moves that came to nothing and are tried again, by why");
    describe_counter!("kuma_handoff_rows_total", "Rows of slots that were given away");
    describe_histogram!("kuma_handoff_pause_seconds", Unit::Seconds, "How long writes to a slot waited while it moved");
    describe_gauge!("kuma_cluster_slots_owned", "Slots that this node owns");
    describe_gauge!("kuma_cluster_slots_moving", "Slots of this node that are on their way");
    describe_gauge!(
        "kuma_cluster_slots_released_untaken",
        "Slots given away of which the receiver has not said yet that it has them"
    );
    describe_gauge!("kuma_cluster_slots_staged", "Slots that are complete here and not granted yet");
    describe_gauge!("kuma_cluster_slots_without_owner", "Slots whose owner is not known here");
    describe_gauge!("kuma_cluster_ready", "Whether the node serves what it owns");
    describe_counter!(
        "kuma_cluster_asked_total",
        "Requests that were handed to the owner of their slot, by how they ended"
    );
    describe_histogram!("kuma_cluster_asked_seconds", Unit::Seconds, "How long such a request took");
    describe_gauge!("kuma_peer_up", "Whether there is a link to the peer");
    describe_counter!("kuma_peer_sent_bytes_total", Unit::Bytes, "Bytes that were sent to the peer");
    describe_counter!("kuma_peer_received_bytes_total", Unit::Bytes, "Bytes that came from the peer");
    describe_gauge!(
        "kuma_peer_round_trip_seconds",
        Unit::Seconds,
        "To the peer and back, through the queues of both nodes"
    );
}

/// Since when things are as they are. First seen by this run of the node: a restart begins anew.
#[derive(Default)]
pub(crate) struct Ages {
    /// Slots that were given away, whose receiver has not said that it has them.
    pub(crate) untaken: BTreeMap<Slot, (DiskId, Instant)>,
    /// Slots that are complete here, whose giver has not granted them.
    pub(crate) staged: BTreeMap<Slot, (DiskId, Instant)>,
    /// Moves of this node: what was seen of them last, and since when.
    pub(crate) moves: BTreeMap<Slot, (DiskId, (&'static str, u64), Instant)>,
}

impl Ages {
    /// Looks again.
    pub(crate) fn look(&mut self, shared: &Shared, now: Instant) {
        let records = shared.slots.records();
        let untaken = records.iter().filter_map(|(slot, record)| match record.token {
            Token::Released { to, is_taken: false, .. } => Some((*slot, to)),
            _ => None,
        });
        keep(&mut self.untaken, untaken, now);
        let staged = records.iter().filter_map(|(slot, record)| Some((*slot, record.staged?.from)));
        keep(&mut self.staged, staged, now);
        let moves = shared.moves.lock().clone();
        self.moves.retain(|slot, _| moves.contains_key(slot));
        for (slot, progress) in moves {
            let seen = (progress.phase, progress.rows_sent);
            let known = self.moves.entry(slot).or_insert((progress.to, seen, now));
            if (known.0, known.1) != (progress.to, seen) {
                *known = (progress.to, seen, now);
            }
        }
    }
}

fn keep(ages: &mut BTreeMap<Slot, (DiskId, Instant)>, now_there: impl Iterator<Item = (Slot, DiskId)>, now: Instant) {
    let there: BTreeMap<Slot, DiskId> = now_there.collect();
    ages.retain(|slot, (disk, _)| there.get(slot) == Some(disk));
    for (slot, disk) in there {
        ages.entry(slot).or_insert((disk, now));
    }
}

/// Sets gauges and tells progress, until the node is gone.
pub(crate) async fn watch(shared: Weak<Shared>) {
    let mut told: HashMap<DiskId, (u64, u64, u64)> = HashMap::new();
    loop {
        let Some(now) = shared.upgrade() else { return };
        if now.is_closing.load(SeqCst) {
            now.feed.end();
            return;
        }
        look(&now, &mut told);
        drop(now);
        tokio::time::sleep(EVERY).await;
    }
}

fn look(shared: &Arc<Shared>, told: &mut HashMap<DiskId, (u64, u64, u64)>) {
    let metrics = &shared.metrics;
    {
        let mut ages = shared.ages.lock();
        ages.look(shared, Instant::now());
        metrics.untaken.set(ages.untaken.len() as f64);
        metrics.staged.set(ages.staged.len() as f64);
    }
    metrics.owned.set(shared.owns().len() as f64);
    metrics.unknown.set(shared.routes.all().iter().filter(|owner| owner.is_none()).count() as f64);
    metrics.ready.set(if shared.has_passed.load(SeqCst) { 1.0 } else { 0.0 });
    let moves = shared.moves.lock().clone();
    metrics.moving.set(moves.len() as f64);
    for (slot, progress) in moves.into_iter().filter(|(_, progress)| progress.since.elapsed() >= EVERY) {
        let crate::MoveProgress { to, phase, rows_sent, rows_left, .. } = progress;
        shared.feed.tell(ClusterEvent::MoveProgress { slot, to: shared.name_of(to), phase, rows_sent, rows_left });
    }
    let Some(transport) = shared.transport() else { return };
    let links = transport.peers();
    let state = shared.state();
    for (_, member) in state.members.iter().filter(|(node, _)| *node != state.node) {
        let link = links.iter().find(|link| link.disk == member.disk);
        metrics.peer(&member.name, |peer| {
            peer.up.set(if transport.is_up(member.disk) { 1.0 } else { 0.0 });
            let Some(link) = link else { return };
            // A link that was made anew counts from zero.
            let (incarnation, sent, received) = told.get(&member.disk).copied().unwrap_or_default();
            let is_new = link.incarnation != incarnation || link.bytes_sent < sent || link.bytes_received < received;
            let (sent, received) = if is_new { (0, 0) } else { (sent, received) };
            peer.sent.increment(link.bytes_sent.saturating_sub(sent));
            peer.received.increment(link.bytes_received.saturating_sub(received));
            told.insert(member.disk, (link.incarnation, link.bytes_sent, link.bytes_received));
            if let Some(round_trip) = link.round_trip {
                peer.round_trip.set(round_trip.as_secs_f64());
            }
        });
    }
}
