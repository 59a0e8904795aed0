//! What a cluster does when nodes are gone, cut apart, started again, or are not what they say.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    path::Path,
    time::{Duration, Instant},
};

use crate::common::directory;
use integration_tests::{options, seed};
use kuma_cluster::{Node, NodeError, RawHandle, testing::Hub};
use kuma_core::{
    AppendError, Content, DiskId, Kuma, NewEvent, ReadError, SLOTS, Slot, Staged, TransferId, Txn, Unavailable,
    Version, slot_of,
};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::json;

/// Longer than anything takes.
const LONG: Duration = Duration::from_secs(120);

async fn soon(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let wait = async {
        while !is_so().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(LONG, wait).await.unwrap_or_else(|_| panic!("waited in vain: {what}"));
}

async fn start(hub: &Hub, path: &Path, name: &str, seeds: &[&Node]) -> Result<Node, NodeError> {
    let options = hub.node(path).context("faults").name(name).shards(2);
    let is_new = !path.join("store.json").exists();
    let options = match seeds.is_empty() {
        true if is_new => options.found(),
        true => options,
        false => options.seed_nodes(seeds.iter().map(|node| node.address().to_string())),
    };
    Node::start(options).await
}

async fn ready(node: &Node) {
    soon("the node is ready", async || node.is_ready()).await;
}

/// What is not as it should be.
fn describe(nodes: &[&Node]) {
    for node in nodes {
        println!("ready {}, settled {}, owned {}", node.is_ready(), node.is_settled(), node.owned());
        println!("  members {:?}", node.members());
        println!("  moves {:?}, totals {:?}", node.moves(), node.move_totals().aborted);
        for status in node.slots() {
            let Some(record) = node.store().slots().record(status.slot) else { continue };
            if record.staged.is_some() || matches!(record.token, kuma_core::Token::Released { is_taken: false, .. }) {
                println!("  {} {record:?} gate {:?}", status.slot, node.store().slots().gate(status.slot));
            }
        }
    }
}

async fn settled(nodes: &[&Node]) {
    let begun = Instant::now();
    let mut is_described = false;
    soon("all slots are where they should be", async || {
        if begun.elapsed() > LONG / 2 && !is_described {
            is_described = true;
            describe(nodes);
        }
        let view = |node: &Node| {
            let of = |member: kuma_cluster::MemberStatus| (member.name, member.standing, member.wished);
            node.members().into_iter().map(of).collect::<Vec<_>>()
        };
        let wished = |node: &Node| node.members().iter().find(|member| member.is_own).map(|own| own.wished);
        let is_linked = |node: &Node| node.members().iter().all(|member| member.is_up);
        let at_home = |node: &Node| is_linked(node) && wished(node) == Some(node.owned()) && node.is_settled();
        nodes.iter().all(|node| view(node) == view(nodes[0]) && at_home(node))
    })
    .await;
    soon("all nodes have heard who owns what", async || {
        let knows = |node: &Node, slot: usize| node.slots()[slot].owner == nodes[0].slots()[slot].owner;
        (0..usize::from(SLOTS)).step_by(97).all(|slot| nodes.iter().all(|node| knows(node, slot)))
    })
    .await;
}

fn event(number: u64) -> NewEvent {
    NewEvent::json("Noted", &json!({ "n": number })).unwrap()
}

fn id(number: u64) -> String {
    format!("thing-{number}")
}

/// A thing whose slot this node owns.
fn thing_of(node: &Node) -> String {
    let owned: Vec<Slot> = {
        let records = node.store().slots().owned();
        records.into_iter().map(|(slot, _)| slot).collect()
    };
    (0..).map(id).find(|id| owned.contains(&slot_of("thing", id))).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slots_of_a_node_that_is_gone_are_said_to_be_out_of_reach_and_others_are_untouched() {
    let (one, two) = (directory(), directory());
    let hub = Hub::new();
    let first = start(&hub, one.path(), "one", &[]).await.unwrap();
    let second = start(&hub, two.path(), "two", &[&first]).await.unwrap();
    ready(&second).await;
    settled(&[&first, &second]).await;
    let (here, there) = (thing_of(&first), thing_of(&second));
    for id in [&here, &there] {
        first.raw("thing", id).append(event(1)).await.unwrap();
    }
    second.shutdown().await;
    let gone = Instant::now();
    let answer = first.raw("thing", &there).append(event(2)).await;
    assert!(
        matches!(&answer, Err(AppendError::Unavailable(Unavailable::OwnerUnreachable { node, .. })) if node == "two"),
        "{answer:?}"
    );
    assert!(gone.elapsed() < Duration::from_secs(10), "far sooner than a request is given up");
    let read = first.raw("thing", &there).read().await;
    assert!(matches!(read, Err(ReadError::Unavailable(Unavailable::OwnerUnreachable { .. }))), "{read:?}");
    assert_eq!(first.raw("thing", &here).append(event(2)).await.unwrap(), Version(2));
    // Nothing is taken from it.
    assert!(first.owned() < usize::from(SLOTS));

    // More of those who ask again at once than there are threads.
    let insist = |handle: RawHandle| tokio::spawn(async move { while handle.read().await.is_err() {} });
    let insistent: Vec<_> = (0..4).map(|_| insist(first.raw("thing", &there))).collect();
    let second = start(&hub, two.path(), "two", &[]).await.unwrap();
    for task in insistent {
        tokio::time::timeout(LONG, task).await.expect("it is not served again").unwrap();
    }
    soon("it serves again, by itself", async || first.raw("thing", &there).append(event(3)).await.is_ok()).await;
    let (_, version) = second.raw("thing", &there).read().await.unwrap();
    assert_eq!(version, Version(2), "what was refused was not done");
    for node in [first, second] {
        node.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_that_are_cut_apart_serve_their_own_slots_and_nothing_conflicts_when_they_meet_again() {
    let (one, two) = (directory(), directory());
    let hub = Hub::new();
    let first = start(&hub, one.path(), "one", &[]).await.unwrap();
    let second = start(&hub, two.path(), "two", &[&first]).await.unwrap();
    ready(&second).await;
    settled(&[&first, &second]).await;
    let (mine, yours) = (thing_of(&first), thing_of(&second));
    hub.cut(first.address(), second.address(), true);
    for (node, own, other) in [(&first, &mine, &yours), (&second, &yours, &mine)] {
        assert_eq!(node.raw("thing", own).append(event(1)).await.unwrap(), Version(1));
        let answer = node.raw("thing", other).append(event(9)).await;
        assert!(matches!(answer, Err(AppendError::Unavailable(Unavailable::OwnerUnreachable { .. }))), "{answer:?}");
    }
    hub.cut(first.address(), second.address(), false);
    for (node, id) in [(&first, &yours), (&second, &mine)] {
        soon("they reach each other again", async || node.raw("thing", id).read().await.is_ok()).await;
        assert_eq!(node.raw("thing", id).append(event(2)).await.unwrap(), Version(2));
    }
    settled(&[&first, &second]).await;
    for node in [first, second] {
        assert!(node.store().verify(|_| ()).await.unwrap().is_clean());
        node.shutdown().await;
    }
}

/// Either of them, again and again, while slots go to and fro between three.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn handoffs_are_finished_or_given_up_by_themselves_when_nodes_are_stopped_and_cut_apart() {
    let mut random = StdRng::seed_from_u64(seed("cluster_faults"));
    let directories = [directory(), directory(), directory()];
    let hub = Hub::new();
    let mut nodes = vec![start(&hub, directories[0].path(), "n0", &[]).await.unwrap()];
    for number in 0..100 {
        nodes[0].raw("thing", id(number)).append(event(number)).idempotency_key("first").await.unwrap();
    }
    for (number, directory) in directories.iter().enumerate().take(3).skip(1) {
        let next = start(&hub, directory.path(), &format!("n{number}"), &[&nodes[0]]).await.unwrap();
        nodes.push(next);
    }
    for _ in 0..6 {
        tokio::time::sleep(Duration::from_millis(random.random_range(0..400))).await;
        let (victim, other) = (random.random_range(0..3), random.random_range(1..3));
        let other = (victim + other) % 3;
        match random.random_range(0..2) {
            0 => {
                nodes[victim].shutdown().await;
                let again = start(&hub, directories[victim].path(), &format!("n{victim}"), &[]).await.unwrap();
                nodes[victim] = again;
            }
            _ => {
                hub.cut(nodes[victim].address(), nodes[other].address(), true);
                tokio::time::sleep(Duration::from_millis(random.random_range(0..300))).await;
                hub.cut(nodes[victim].address(), nodes[other].address(), false);
            }
        }
    }
    let all: Vec<&Node> = nodes.iter().collect();
    settled(&all).await;
    for number in 0..100 {
        for node in &all {
            // Each answer is that of the first time.
            let again = node.raw("thing", id(number)).append(event(number)).idempotency_key("first").await;
            assert_eq!(again.unwrap(), Version(1));
            assert_eq!(node.raw("thing", id(number)).read().await.unwrap().1, Version(1));
        }
    }
    for node in all {
        assert!(node.store().verify(|_| ()).await.unwrap().is_clean());
        node.shutdown().await;
    }
}

/// A giver gave up, was destroyed before it could say so, and the slot had gone elsewhere: what is prepared here kept the slot shut at this node for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_that_a_destroyed_node_had_prepared_here_does_not_keep_its_slot_out_of_reach() {
    let (one, two) = (directory(), directory());
    let hub = Hub::new();
    let first = start(&hub, one.path(), "one", &[]).await.unwrap();
    let second = start(&hub, two.path(), "two", &[&first]).await.unwrap();
    ready(&second).await;
    settled(&[&first, &second]).await;
    let id = thing_of(&first);
    let slot = slot_of("thing", &id);
    let slots = second.store().slots();
    let epoch = first.store().slots().record(slot).unwrap().owned().unwrap();
    let (transfer, from, content) = (TransferId([7; 16]), DiskId([7; 16]), Content::default());
    slots.change(slot, Txn::Stage(Staged { transfer, epoch, from, content })).await.unwrap();
    second.shutdown().await;
    let second = start(&hub, two.path(), "two", &[]).await.unwrap();
    soon("its owner is reached", async || second.raw("thing", &id).append(event(1)).await.is_ok()).await;
    assert_eq!(second.store().slots().record(slot).unwrap().staged, None);
    for node in [first, second] {
        node.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_whole_cluster_that_was_stopped_serves_again_when_all_are_back() {
    let directories = [directory(), directory()];
    let hub = Hub::new();
    let first = start(&hub, directories[0].path(), "one", &[]).await.unwrap();
    let second = start(&hub, directories[1].path(), "two", &[&first]).await.unwrap();
    ready(&second).await;
    settled(&[&first, &second]).await;
    first.raw("thing", "a").append(event(1)).await.unwrap();
    first.shutdown().await;
    second.shutdown().await;
    let first = start(&hub, directories[0].path(), "one", &[]).await.unwrap();
    // Alone it cannot know that its disk is still the newest one of its node.
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert!(!first.is_ready());
    let second = start(&hub, directories[1].path(), "two", &[]).await.unwrap();
    for node in [&first, &second] {
        ready(node).await;
    }
    settled(&[&first, &second]).await;
    for node in [&first, &second] {
        soon("it can be read", async || matches!(node.raw("thing", "a").read().await, Ok((_, Version(1))))).await;
    }
    for node in [first, second] {
        node.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_cannot_be_let_in_is_told_why_and_nothing_is_changed() {
    let directories = [directory(), directory(), directory()];
    let hub = Hub::new();
    let first = start(&hub, directories[0].path(), "one", &[]).await.unwrap();

    // Neither seeds nor the wish to found: a wiped founder is not to found a second cluster.
    let wiped = directory();
    let refused = Node::start(hub.node(wiped.path()).context("faults")).await;
    assert!(matches!(refused, Err(NodeError::NoCluster { .. })));
    let both = hub.node(wiped.path()).found().seed_nodes(["10.0.0.1"]);
    assert!(matches!(Node::start(both).await, Err(NodeError::FoundWithSeeds)));

    // A store of its own keeps what it has.
    let kuma = Kuma::start(options(directories[1].path()).context("faults")).await.unwrap();
    kuma.raw("thing", "mine").append(event(1)).await.unwrap();
    kuma.shutdown().await;
    let refused = start(&hub, directories[1].path(), "two", &[&first]).await;
    assert!(matches!(refused, Err(NodeError::Standalone { .. })));
    let kuma = Kuma::start(options(directories[1].path()).context("faults")).await.unwrap();
    assert_eq!(kuma.raw("thing", "mine").read().await.unwrap().1, Version(1));
    kuma.shutdown().await;

    // Another name of the store: it waits for its seeds, and founds nothing.
    let stranger = hub.node(directories[2].path()).context("other").seed_nodes([first.address().to_string()]);
    let waits = tokio::time::timeout(Duration::from_secs(2), Node::start(stranger)).await;
    assert!(waits.is_err() && !directories[2].path().join("store.json").exists());

    // The same name twice.
    let twice = start(&hub, directories[2].path(), "one", &[&first]).await;
    let refused = twice.err().map(|error| error.to_string()).unwrap_or_default();
    assert!(refused.contains("is taken"), "{refused:?}");
    assert_eq!(first.members().len(), 1);
    first.shutdown().await;
}
