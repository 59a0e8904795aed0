//! Promises 1, 2 and 7 under kill -9 and SIGSTOP: a node that dies, or stands still, at any step of a handoff loses nothing and blocks no more than
//! what the table of failures says, and everything heals by itself.
//!
//! Three processes: the giver, the receiver, and a third node that looks on. Clients append all the time. A slot is pinned to the receiver; at a
//! named place of the handoff one of the two waits, until the other one has come as far as it can, and is killed or stopped there.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use crate::processes::{Clients, Cluster, LOGS, id, name, slot, soon};
use integration_tests::{
    cluster_child::{Answer, Ask, SlotNow},
    seed,
};
use rustix::process::Signal;

/// Who dies.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Side {
    Giver,
    Receiver,
}

/// Who serves the slot while one of the two is away.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Serves {
    Giver,
    Receiver,
    /// Requests are told that this one is out of reach.
    Nobody(Side),
}

/// A way to die.
struct Row {
    place: &'static str,
    /// What the other one has come to before.
    when: Option<SlotNow>,
    serves: Serves,
}

const fn row(place: &'static str, when: Option<SlotNow>, serves: Serves) -> Row {
    Row { place, when, serves }
}

/// A number of these tests, which no client has.
fn own_number() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1 << 60);
    NEXT.fetch_add(1, SeqCst)
}

/// One slot, on its way from one node to another.
struct Round {
    cluster: Arc<Cluster>,
    log: u64,
    slot: u64,
    giver: usize,
    receiver: usize,
    third: usize,
}

impl Round {
    async fn new(cluster: &Arc<Cluster>, clients: &Clients, log: u64) -> Round {
        clients.prefer(log);
        let slot = slot(&id(log));
        let giver = cluster.owner(slot).await;
        let cluster = cluster.clone();
        let round = Round { cluster, log, slot, giver, receiver: (giver + 1) % 3, third: (giver + 2) % 3 };
        // So that there is something to copy.
        round.is_served_by(clients, &[giver]).await;
        round
    }

    fn node(&self, side: Side) -> usize {
        match side {
            Side::Giver => self.giver,
            Side::Receiver => self.receiver,
        }
    }

    async fn arm(&self, side: Side, place: &str) {
        self.cluster.node(self.node(side)).done(Ask::Arm { place: place.to_owned() }).await;
    }

    async fn pin(&self) {
        let node = name(self.receiver);
        self.cluster.node(self.third).done(Ask::Pin { slot: self.slot, node }).await;
    }

    async fn until(&self, side: Side, now: SlotNow) {
        let node = self.cluster.node(self.node(side));
        soon("the other one has come as far as it can", async || node.slot(self.slot).await == Some(now)).await;
    }

    /// Starts the handoff, and waits until one of the two is at a place, and the other one as far as it comes.
    async fn reach(&self, side: Side, row: &Row) {
        self.arm(side, row.place).await;
        self.pin().await;
        self.cluster.node(self.node(side)).at(row.place).await;
        if let Some(now) = row.when {
            self.until(other(side), now).await;
        }
    }

    /// Asks these nodes, until each has answered.
    async fn is_served_by(&self, clients: &Clients, nodes: &[usize]) {
        for node in nodes {
            soon("the slot is served", async || {
                let number = own_number();
                match self.cluster.append(*node, &id(self.log), number).await {
                    Some(Answer::Appended { version }) => {
                        clients.acked(self.log, number, version);
                        true
                    }
                    Some(Answer::Unreachable { .. }) => {
                        clients.refused(number);
                        false
                    }
                    _ => false,
                }
            })
            .await;
        }
    }

    /// What requests to the nodes that are left are told.
    async fn is_as(&self, clients: &Clients, serves: Serves, away: usize) {
        let left: Vec<usize> = (0..3).filter(|node| *node != away).collect();
        match serves {
            Serves::Giver | Serves::Receiver => self.is_served_by(clients, &left).await,
            Serves::Nobody(side) => {
                let waits_for = name(self.node(side));
                for node in &left {
                    soon("requests are told that the slot waits", async || {
                        let number = own_number();
                        let answer = self.cluster.append(*node, &id(self.log), number).await;
                        match answer {
                            Some(Answer::Unreachable { node }) => {
                                clients.refused(number);
                                node == waits_for
                            }
                            Some(Answer::Failed(_)) => false,
                            other => panic!("{other:?}"),
                        }
                    })
                    .await;
                }
            }
        }
        // What the third node has is none of its business.
        let owned = self.cluster.node(self.third).status().await.unwrap().owned;
        let own = (0..).map(|number| format!("other-{number}")).find(|id| owned.contains(&slot(id))).unwrap();
        let answer = self.cluster.append(self.third, &own, own_number()).await;
        assert!(matches!(answer, Some(Answer::Appended { .. })), "{answer:?}");
    }

    /// The slot comes to where it is wished, and everybody is served there.
    async fn heals(&self, clients: &Clients) {
        self.until(Side::Receiver, SlotNow::Owned).await;
        self.until(Side::Giver, SlotNow::Taken).await;
        self.cluster.settled().await;
        self.is_served_by(clients, &[0, 1, 2]).await;
    }
}

fn other(side: Side) -> Side {
    match side {
        Side::Giver => Side::Receiver,
        Side::Receiver => Side::Giver,
    }
}

/// Kills this side at each of these places.
async fn kill_at(side: Side, rows: &[Row], seed: u64) {
    let begun = Instant::now();
    let cluster = Cluster::start(3).await;
    println!("three nodes are there after {:?}", begun.elapsed());
    let clients = Clients::start(&cluster, seed);
    // One place alone, if it is named.
    let only = std::env::var("KUMA_PLACE").ok();
    let rows = rows.iter().filter(|row| only.as_ref().is_none_or(|only| row.place == only));
    for (row, log) in rows.zip((0..LOGS).cycle()) {
        let begun = Instant::now();
        let mut log = log;
        // The first nodes have thousands of slots to collect that they gave away when the others joined.
        while row.place == "handoff.rows.gc_batch" && cluster.owner(slot(&id(log))).await != 2 {
            log += 1;
        }
        let round = Round::new(&cluster, &clients, log).await;
        round.reach(side, row).await;
        let dies = round.node(side);
        cluster.kill(dies).await;
        round.is_as(&clients, row.serves, dies).await;
        let meanwhile = begun.elapsed();
        cluster.again(dies, &[]);
        cluster.ready(dies).await;
        round.heals(&clients).await;
        println!("{side:?} at {}: dead after {meanwhile:?}, healed after {:?}", row.place, begun.elapsed());
    }
    clients.judge(&cluster).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_giver_that_is_killed_at_any_step_of_a_handoff_loses_nothing_and_the_slot_heals_by_itself() {
    const GIVER_AWAY: Serves = Serves::Nobody(Side::Giver);
    let rows = [
        row("handoff.start.chunk_sent", None, GIVER_AWAY),
        row("handoff.seal.parked", None, GIVER_AWAY),
        row("handoff.seal.actors_stopped", None, GIVER_AWAY),
        row("handoff.seal.drained", None, GIVER_AWAY),
        row("handoff.prepare.sent", Some(SlotNow::Staged), GIVER_AWAY),
        row("handoff.release.before_submit", None, GIVER_AWAY),
        // The receiver is complete, and cannot know.
        row("handoff.release.committed", None, GIVER_AWAY),
        row("handoff.grant.sent", Some(SlotNow::Owned), Serves::Receiver),
        row("handoff.taken.before_commit", None, Serves::Receiver),
        row("handoff.taken.committed", None, Serves::Receiver),
        row("handoff.rows.gc_batch", None, Serves::Receiver),
    ];
    kill_at(Side::Giver, &rows, seed("giver_killed")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_receiver_that_is_killed_at_any_step_of_a_handoff_loses_nothing_and_the_slot_heals_by_itself() {
    let receiver_away = Serves::Nobody(Side::Receiver);
    let rows = [
        // The giver serves again after the seal timeout, alone.
        row("handoff.stage.before_commit", None, Serves::Giver),
        row("handoff.stage.committed", None, Serves::Giver),
        row("handoff.ready.sent", Some(SlotNow::Released), receiver_away),
        row("handoff.take.before_commit", None, receiver_away),
        row("handoff.take.committed", None, receiver_away),
        row("handoff.taken.sent", Some(SlotNow::Taken), receiver_away),
    ];
    kill_at(Side::Receiver, &rows, seed("receiver_killed")).await;
}

/// What a handoff that is given up leaves behind: the giver is killed as it gives up, and as it answers that it has.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_giver_that_is_killed_as_it_gives_a_handoff_up_leaves_nothing_half_done() {
    let cluster = Cluster::start(3).await;
    let clients = Clients::start(&cluster, seed("given_up"));
    // The receiver stands still, so that the giver gives up.
    let round = Round::new(&cluster, &clients, 0).await;
    round.arm(Side::Giver, "handoff.abort.before_send").await;
    round.arm(Side::Receiver, "handoff.stage.before_commit").await;
    round.pin().await;
    cluster.node(round.receiver).at("handoff.stage.before_commit").await;
    cluster.node(round.giver).at("handoff.abort.before_send").await;
    cluster.kill(round.giver).await;
    // It prepares itself for what will never come.
    cluster.node(round.receiver).done(Ask::GoOn).await;
    round.until(Side::Receiver, SlotNow::Staged).await;
    round.is_as(&clients, Serves::Nobody(Side::Giver), round.giver).await;
    cluster.again(round.giver, &[]);
    cluster.ready(round.giver).await;
    round.heals(&clients).await;

    // The receiver died prepared; the giver, which serves again, is killed as it tells it so.
    let round = Round::new(&cluster, &clients, 1).await;
    round.arm(Side::Giver, "handoff.status.answered").await;
    round.reach(Side::Receiver, &row("handoff.stage.committed", None, Serves::Giver)).await;
    cluster.kill(round.receiver).await;
    round.is_as(&clients, Serves::Giver, round.receiver).await;
    cluster.again(round.receiver, &[]);
    cluster.node(round.giver).at("handoff.status.answered").await;
    cluster.kill(round.giver).await;
    cluster.ready(round.receiver).await;
    round.is_as(&clients, Serves::Nobody(Side::Giver), round.giver).await;
    cluster.again(round.giver, &[]);
    cluster.ready(round.giver).await;
    round.heals(&clients).await;
    clients.judge(&cluster).await;
}

/// A process that is stopped does not know it: when it goes on, it goes on with what it knew.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_stands_still_in_a_handoff_does_not_serve_what_it_gave_away_when_it_wakes() {
    let rows = [
        (Side::Giver, row("handoff.seal.drained", None, Serves::Nobody(Side::Giver))),
        (Side::Giver, row("handoff.release.before_submit", None, Serves::Nobody(Side::Giver))),
        (Side::Giver, row("handoff.release.committed", None, Serves::Nobody(Side::Giver))),
        (Side::Giver, row("handoff.grant.sent", Some(SlotNow::Owned), Serves::Receiver)),
        (Side::Receiver, row("handoff.stage.committed", None, Serves::Giver)),
        (Side::Receiver, row("handoff.take.before_commit", None, Serves::Nobody(Side::Receiver))),
        (Side::Receiver, row("handoff.take.committed", None, Serves::Nobody(Side::Receiver))),
    ];
    let cluster = Cluster::start(3).await;
    let clients = Clients::start(&cluster, seed("stopped"));
    for ((side, row), log) in rows.iter().zip((0..LOGS).cycle()) {
        let begun = Instant::now();
        let round = Round::new(&cluster, &clients, log).await;
        round.reach(*side, row).await;
        let stops = round.node(*side);
        cluster.is_away.lock().insert(stops);
        cluster.node(stops).signal(Signal::STOP);
        let stopped = Instant::now();
        round.is_as(&clients, row.serves, stops).await;
        // It is not about how long: others have given it up.
        tokio::time::sleep(Duration::from_secs(2).saturating_sub(stopped.elapsed())).await;
        cluster.is_away.lock().remove(&stops);
        cluster.node(stops).signal(Signal::CONT);
        // While it is where it was, it is asked: whatever it answers, it is not what was true before.
        if row.serves == Serves::Receiver {
            round.is_served_by(&clients, &[stops]).await;
        }
        cluster.node(stops).done(Ask::GoOn).await;
        round.heals(&clients).await;
        println!("{side:?} stopped at {}: healed after {:?}", row.place, begun.elapsed());
    }
    clients.judge(&cluster).await;
}

/// It waits at each place for the kill: when it has asked to be let in, when it takes part, when it has read its tokens, and before it serves.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_join_goes_on_after_either_node_was_killed_at_any_step_of_it() {
    let cluster = Cluster::empty();
    cluster.add("found", &[]);
    cluster.ready(0).await;
    let clients = Clients::start(&cluster, seed("join_killed"));
    soon("something is there", async || clients.acks() > 20).await;
    cluster.add(&cluster.node(0).address().await, &["join.req_sent"]);
    let places = ["join.req_sent", "join.activated", "boot.token_loaded", "boot.hello_passed"];
    for (number, place) in places.iter().enumerate() {
        cluster.node(1).at(place).await;
        cluster.kill(1).await;
        let acks = clients.acks();
        soon("the founder serves", async || clients.acks() > acks + 5).await;
        cluster.again(1, places.get(number + 1).map_or(&[][..], std::slice::from_ref));
    }
    cluster.ready(1).await;
    cluster.settled().await;
    // And the one that lets it in, when that is on its disk and nobody has heard of it.
    cluster.node(0).done(Ask::Arm { place: "join.ack_committed".to_owned() }).await;
    cluster.add(&cluster.node(1).address().await, &[]);
    cluster.node(0).at("join.ack_committed").await;
    cluster.kill(0).await;
    cluster.again(0, &[]);
    for node in 0..3 {
        cluster.ready(node).await;
    }
    cluster.settled().await;
    clients.judge(&cluster).await;
}
