//! Erasure in a cluster: when a receipt is given no disk has the key, whatever moved meanwhile.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    path::Path,
    sync::atomic::{AtomicBool, Ordering::SeqCst},
    time::Duration,
};

use crate::common::directory;
use futures_util::future::join_all;
use integration_tests::seed;
use kuma_cluster::{Node, NodeId, testing::Hub};
use kuma_core::{
    EraseError, NewEvent, ReadError, Reason, Receipt, Refused, SLOTS, Slot, Unavailable, Version, rusqlite, slot_of,
};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::json;
use tempfile::TempDir;

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

/// Starts a node, new or again.
async fn start(hub: &Hub, path: &Path, name: &str, seeds: &[&Node]) -> Node {
    let is_new = !path.join("store.json").exists();
    let options = hub.node(path).context("erase").name(name).shards(2);
    let options = match seeds.is_empty() {
        true if is_new => options.found(),
        true => options,
        false => options.seed_nodes(seeds.iter().map(|node| node.address().to_string())),
    };
    let node = Node::start(options).await.unwrap();
    soon("the node is ready", async || node.is_ready()).await;
    node
}

/// So many nodes, each with its slots.
async fn cluster(hub: &Hub, directories: &[TempDir]) -> Vec<Node> {
    let names = ["one", "two", "three", "four"];
    let mut nodes: Vec<Node> = Vec::new();
    for (directory, name) in directories.iter().zip(names) {
        let node = start(hub, directory.path(), name, &nodes.iter().take(1).collect::<Vec<_>>()).await;
        nodes.push(node);
        settled(&nodes.iter().collect::<Vec<_>>()).await;
    }
    nodes
}

async fn settled(nodes: &[&Node]) {
    soon("all slots are where they should be", async || {
        let wished = |node: &Node| node.members().iter().find(|member| member.is_own).map(|own| own.wished);
        let members = nodes[0].members().len();
        let owned: usize = nodes.iter().map(|node| node.owned()).sum();
        owned == usize::from(SLOTS)
            && nodes.iter().all(|node| {
                node.members().len() == members
                    && node.members().iter().all(|member| member.is_up)
                    && wished(node) == Some(node.owned())
                    && node.is_settled()
            })
    })
    .await;
}

fn event(number: u64) -> NewEvent {
    NewEvent::json("Noted", &json!({ "n": number })).unwrap()
}

fn why() -> Reason {
    Reason::new("request 4711").by("support")
}

fn id(number: u64) -> String {
    format!("person-{number}")
}

/// A person whose slot this node owns.
fn person_of(node: &Node) -> String {
    let owned: Vec<Slot> = node.store().slots().owned().into_iter().map(|(slot, _)| slot).collect();
    (0..).map(id).find(|id| owned.contains(&slot_of("person", id))).unwrap()
}

fn node_id(node: &Node) -> NodeId {
    node.members().into_iter().find(|member| member.is_own).unwrap().node
}

/// Nodes that a receipt names.
fn names(receipt: &Receipt) -> Vec<String> {
    let stores = receipt.receipt.stores.iter();
    let mut names: Vec<String> = stores.filter_map(|store| store.store.strip_prefix("node ")).map(Into::into).collect();
    names.sort();
    names
}

/// Asks until there is a receipt.
async fn erased(node: &Node, id: &str) -> Receipt {
    let mut receipt = None;
    soon("there is a receipt", async || {
        match node.raw("person", id).erase(why()).await {
            Ok(done) => receipt = Some(done),
            Err(EraseError::Unfinished { .. } | EraseError::Unavailable(_)) => {}
            Err(other) => panic!("{other}"),
        }
        receipt.is_some()
    })
    .await;
    receipt.unwrap()
}

async fn is_erased(node: &Node, id: &str) -> bool {
    let read = node.raw("person", id).read().await;
    matches!(read, Err(ReadError::Refused(Refused::Erased { .. })))
}

/// After all nodes have stopped: whether a disk has the key, wrapped or not.
fn has_key(directory: &TempDir, receipt: &Receipt) -> bool {
    let flags = rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY;
    let file = rusqlite::Connection::open_with_flags(directory.path().join("keys.db"), flags).unwrap();
    let there = file.query_row(
        "SELECT count(*) FROM data_key WHERE hex(key_id) = upper(?) AND length(wrapped) > 0",
        [&receipt.receipt.key],
        |row| row.get::<_, i64>(0),
    );
    there.unwrap() > 0
}

async fn stop(nodes: Vec<Node>) {
    join_all(nodes.iter().map(Node::shutdown)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_erasure_that_is_asked_for_at_any_node_ends_the_key_on_every_disk() {
    let directories = [directory(), directory(), directory()];
    let hub = Hub::new();
    let nodes = cluster(&hub, &directories).await;
    let id = person_of(&nodes[0]);
    let slot = slot_of("person", &id);
    nodes[1].raw("person", &id).append(event(1)).await.unwrap();
    // Its slot goes round, so that each disk has had it.
    for node in [&nodes[1], &nodes[2]] {
        nodes[0].pin(slot, Some(node_id(node))).await.unwrap();
        let record = || node.store().slots().record(slot);
        soon("the slot is there", async || record().is_some_and(|record| record.owned().is_some())).await;
    }
    let receipt = erased(&nodes[0], &id).await;
    assert_eq!(names(&receipt), ["one", "two"], "the owner itself has signed: {receipt}");
    receipt.verify(&nodes[2].store().public_key()).unwrap();
    for node in &nodes {
        assert!(is_erased(node, &id).await);
        soon("each node has the receipt", async || {
            node.store().receipt(receipt.receipt.id).await.unwrap().as_ref() == Some(&receipt)
        })
        .await;
    }
    // Asked again, elsewhere: the same one.
    assert_eq!(erased(&nodes[1], &id).await, receipt);
    let missing = nodes[0].raw("person", "nobody").erase(why()).await;
    assert!(matches!(missing, Err(EraseError::Refused(Refused::NeverWritten { .. }))), "{missing:?}");
    // And a new life, with a new key.
    assert_eq!(nodes[0].raw("person", &id).recreate(why()).await.unwrap(), 2);
    assert_eq!(nodes[1].raw("person", &id).append(event(2)).await.unwrap(), Version(1));
    let other_life = nodes[1].raw("person", &id).erase_life(1, why()).await.unwrap();
    assert_eq!(other_life, receipt, "the first life is erased, and the second one is left alone");
    nodes[0].pin(slot, Some(node_id(&nodes[0]))).await.unwrap();
    let record = || nodes[0].store().slots().record(slot);
    soon("the slot is back", async || record().is_some_and(|record| record.owned().is_some())).await;
    let (state, version) = nodes[2].raw("person", &id).read().await.unwrap();
    assert_eq!((state["n"].as_u64(), version), (Some(2), Version(1)));
    stop(nodes).await;
    assert!(directories.iter().all(|directory| !has_key(directory, &receipt)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_down_is_waited_for_and_does_its_part_when_it_is_back() {
    let directories = [directory(), directory(), directory()];
    let hub = Hub::new();
    let mut nodes = cluster(&hub, &directories).await;
    let id = person_of(&nodes[0]);
    let slot = slot_of("person", &id);
    nodes[0].raw("person", &id).append(event(1)).await.unwrap();
    nodes[0].pin(slot, Some(node_id(&nodes[2]))).await.unwrap();
    soon("the third one has the slot", async || {
        nodes[2].store().slots().record(slot).is_some_and(|record| record.owned().is_some())
    })
    .await;
    nodes[0].pin(slot, Some(node_id(&nodes[0]))).await.unwrap();
    soon("the slot is back", async || {
        nodes[0].store().slots().record(slot).is_some_and(|record| record.owned().is_some())
    })
    .await;
    // It may have the key still.
    nodes.pop().unwrap().shutdown().await;
    let mut why_not = String::new();
    soon("it has begun", async || {
        why_not = nodes[1].raw("person", &id).erase(why()).await.unwrap_err().to_string();
        why_not.contains("has begun and goes on by itself")
    })
    .await;
    assert!(why_not.contains("waiting for three"), "{why_not}");
    assert!(is_erased(&nodes[0], &id).await && is_erased(&nodes[1], &id).await, "from the beginning");
    assert_eq!(nodes[0].store().erasures_unfinished(), 1);
    // Meanwhile the slot moves, and its new owner goes on.
    nodes[0].pin(slot, Some(node_id(&nodes[1]))).await.unwrap();
    soon("the second one has the slot", async || {
        nodes[1].store().slots().record(slot).is_some_and(|record| record.owned().is_some())
    })
    .await;
    assert!(is_erased(&nodes[0], &id).await && is_erased(&nodes[1], &id).await);
    let three = start(&hub, directories[2].path(), "three", &[]).await;
    let receipt = erased(&three, &id).await;
    assert_eq!(names(&receipt), ["one", "three"]);
    receipt.verify(&nodes[1].store().public_key()).unwrap();
    soon("nobody owes anything", async || nodes.iter().all(|node| node.store().erasures_unfinished() == 0)).await;
    nodes.push(three);
    stop(nodes).await;
    assert!(directories.iter().all(|directory| !has_key(directory, &receipt)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_joins_knows_what_was_erased_before() {
    let directories = [directory(), directory()];
    let hub = Hub::new();
    let first = start(&hub, directories[0].path(), "one", &[]).await;
    let mut receipts = Vec::new();
    for number in 0..40 {
        first.raw("person", id(number)).append(event(number)).await.unwrap();
    }
    for number in 0..20 {
        receipts.push(erased(&first, &id(number)).await);
    }
    assert!(receipts.iter().all(|receipt| names(receipt).is_empty()), "there was nobody else");
    let second = start(&hub, directories[1].path(), "two", &[&first]).await;
    settled(&[&first, &second]).await;
    for number in 0..40 {
        for node in [&first, &second] {
            assert_eq!(is_erased(node, &id(number)).await, number < 20);
        }
    }
    for receipt in &receipts {
        let slot = Slot::new(receipt.receipt.slot.into());
        let is_there = second.store().slots().record(slot).unwrap().owned().is_some();
        let told = second.store().receipt(receipt.receipt.id).await.unwrap();
        assert_eq!(told.as_ref(), Some(receipt).filter(|_| is_there), "it comes with the slot");
    }
    for (number, receipt) in (0..).zip(&receipts) {
        assert_eq!(erased(&second, &id(number)).await, *receipt);
    }
    stop(vec![first, second]).await;
    assert!(receipts.iter().all(|receipt| !has_key(&directories[1], receipt)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn erasures_at_any_node_while_slots_move_reach_every_disk_and_nobody_else() {
    const PEOPLE: u64 = 300;
    let mut random = StdRng::seed_from_u64(seed("cluster_erase"));
    let directories = [directory(), directory(), directory(), directory()];
    let hub = Hub::new();
    let mut nodes = cluster(&hub, &directories[..2]).await;
    for number in 0..PEOPLE {
        for _ in 0..2 {
            nodes[0].raw("person", id(number)).append(event(number)).await.unwrap();
        }
    }
    let is_joined = AtomicBool::new(false);
    let erase = async {
        let mut receipts = Vec::new();
        let mut next = 0;
        // As long as slots move, and all that are to go.
        while next < PEOPLE / 2 {
            let batch: Vec<u64> = (next..(next + 8).min(PEOPLE / 2)).collect();
            next += 8;
            let at: Vec<usize> = batch.iter().map(|_| random.random_range(0..2)).collect();
            let asked = batch.iter().zip(at).map(async |(number, at)| erased(&nodes[at], &id(*number)).await);
            receipts.extend(join_all(asked).await);
        }
        while !is_joined.load(SeqCst) {
            // Again, whatever moves.
            let number = random.random_range(0..PEOPLE / 2);
            assert_eq!(erased(&nodes[1], &id(number)).await.receipt.id, receipts[number as usize].receipt.id);
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        receipts
    };
    let join = async {
        let three = start(&hub, directories[2].path(), "three", &[&nodes[0]]).await;
        let four = start(&hub, directories[3].path(), "four", &[&nodes[1]]).await;
        settled(&[&nodes[0], &nodes[1], &three, &four]).await;
        is_joined.store(true, SeqCst);
        [three, four]
    };
    let (receipts, joined) = tokio::join!(erase, join);
    nodes.extend(joined);
    for number in 0..PEOPLE {
        let node = &nodes[(number % 4) as usize];
        match number < PEOPLE / 2 {
            true => assert!(is_erased(node, &id(number)).await),
            false => assert_eq!(node.raw("person", id(number)).read().await.unwrap().1, Version(2)),
        }
    }
    soon("nobody owes anything", async || nodes.iter().all(|node| node.store().erasures_unfinished() == 0)).await;
    for node in &nodes {
        let verification = node.store().verify(|_| {}).await.unwrap();
        assert!(verification.is_clean(), "{verification:#?}");
    }
    stop(nodes).await;
    for directory in &directories {
        assert_eq!(receipts.iter().filter(|receipt| has_key(directory, receipt)).count(), 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_owner_that_dies_in_an_erasure_goes_on_with_it() {
    let directories = [directory(), directory()];
    let hub = Hub::new();
    let nodes = cluster(&hub, &directories).await;
    let id = person_of(&nodes[0]);
    nodes[0].raw("person", &id).append(event(1)).await.unwrap();
    hub.cut(nodes[0].address(), nodes[1].address(), true);
    soon("it has begun", async || {
        let erase = nodes[0].raw("person", &id).erase(why()).await;
        matches!(erase, Err(EraseError::Unfinished { .. }))
    })
    .await;
    let asked = nodes[1].raw("person", &id).within(Duration::from_millis(100)).erase(why()).await;
    assert!(matches!(asked, Err(EraseError::Unavailable(Unavailable::OwnerUnreachable { .. }))), "{asked:?}");
    nodes[0].shutdown().await;
    hub.cut(nodes[0].address(), nodes[1].address(), false);
    let first = start(&hub, directories[0].path(), "one", &[]).await;
    soon("it has gone on by itself", async || first.store().erasures_unfinished() == 0).await;
    let receipt = erased(&first, &id).await;
    assert_eq!(names(&receipt), ["two"]);
    assert!(receipt.receipt.resumed);
    stop(vec![first, nodes[1].clone()]).await;
    assert!(directories.iter().all(|directory| !has_key(directory, &receipt)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_is_attested_to_be_destroyed_is_waited_for_no_more_and_the_receipt_names_it() {
    let directories = [directory(), directory(), directory()];
    let hub = Hub::new();
    let mut nodes = cluster(&hub, &directories[..2]).await;
    let id = person_of(&nodes[0]);
    nodes[0].raw("person", &id).append(event(1)).await.unwrap();
    let two = node_id(&nodes[1]);
    let refused = nodes[0].attest_destroyed(two).await.unwrap_err().to_string();
    assert!(refused.contains("there is a link to it, so that it runs; nothing was changed"), "{refused}");
    let refused = nodes[0].attest_destroyed(node_id(&nodes[0])).await.unwrap_err().to_string();
    assert!(refused.contains("it is the one that was asked"), "{refused}");
    let gone = nodes.pop().unwrap();
    let disk = gone.store().slots().disk_id().to_string();
    gone.shutdown().await;
    soon("it has begun", async || {
        matches!(nodes[0].raw("person", &id).erase(why()).await, Err(EraseError::Unfinished { .. }))
    })
    .await;
    nodes[0].attest_destroyed(two).await.unwrap();
    let receipt = erased(&nodes[0], &id).await;
    let says = receipt.receipt.stores.iter().find(|store| store.store == format!("disk {disk}")).unwrap();
    assert_eq!(says.outcome, "attested to be destroyed; it was not asked");
    assert_eq!(names(&receipt), Vec::<String>::new());
    // Nor is it waited for by a node that joins, although its slots are nobody's.
    let three = start(&hub, directories[2].path(), "three", &[&nodes[0]]).await;
    assert!(is_erased(&three, &id).await);
    assert_eq!(three.members().len(), 2);
    nodes.push(three);
    stop(nodes).await;
}
