//! A cluster of nodes in one process: joining, leaving, and requests to any of them, while slots move.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    collections::HashMap,
    net::Ipv4Addr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Duration,
};

use crate::{
    common::directory,
    nodes::{settled, soon, start},
};
use integration_tests::seed;
use kuma_cluster::{Cookie, Node, NodeError, NodeOptions, testing::Hub};
use kuma_core::{Command, Entity, SLOTS, Version};
use parking_lot::Mutex;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde::{Deserialize, Serialize};

#[derive(Default, Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Account {
    balance: i64,
    /// The numbers of all deposits, in their order.
    seen: Vec<u64>,
}

#[derive(Debug, Serialize, Deserialize)]
enum AccountEvent {
    Deposited { amount: i64, number: u64 },
    Withdrawn { amount: i64 },
}

impl Entity for Account {
    const KIND: &'static str = "account";
    type Event = AccountEvent;

    fn apply(&mut self, event: &AccountEvent) {
        match event {
            AccountEvent::Deposited { amount, number } => {
                self.balance += amount;
                self.seen.push(*number);
            }
            AccountEvent::Withdrawn { amount } => self.balance -= amount,
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Withdraw {
    amount: i64,
}

#[derive(Debug, PartialEq, thiserror::Error, Serialize, Deserialize)]
#[error("short of {missing}")]
struct Overdrawn {
    missing: i64,
}

impl Command<Account> for Withdraw {
    type Rejection = Overdrawn;

    fn decide(self, account: &Account) -> Result<Vec<AccountEvent>, Overdrawn> {
        match account.balance - self.amount {
            left if left < 0 => Err(Overdrawn { missing: -left }),
            _ => Ok(vec![AccountEvent::Withdrawn { amount: self.amount }]),
        }
    }
}

async fn node(options: NodeOptions, name: &str, seeds: &[&Node]) -> Node {
    let options = options.context("bank").name(name).shards(2).entity::<Account>().command::<Account, Withdraw>();
    start(options, true, seeds).await
}

/// A node with real links, at any port.
fn linked(path: &Path, cookie: &Cookie) -> NodeOptions {
    NodeOptions::new(path, cookie.clone()).listen((Ipv4Addr::LOCALHOST, 0).into())
}

fn id(number: u64) -> String {
    format!("acc-{number}")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_join_and_any_of_them_serves_everything() {
    let directories = [directory(), directory(), directory()];
    let cookie = Cookie::generate().unwrap();
    let options = |number: usize| linked(directories[number].path(), &cookie);
    let first = node(options(0), "one", &[]).await;
    for number in 0..50 {
        let version = first.entity::<Account>(id(number)).append(AccountEvent::Deposited { amount: 10, number }).await;
        assert_eq!(version.unwrap(), Version(1));
    }
    let second = node(options(1), "two", &[&first]).await;
    settled(&[&first, &second]).await;
    let third = node(options(2), "three", &[&second]).await;
    let nodes = [&first, &second, &third];
    settled(&nodes).await;
    for node in nodes {
        let share = node.owned() as f64 * 3.0 / f64::from(SLOTS);
        assert!((0.85..1.15).contains(&share), "{share}");
        for number in 0..50 {
            let account = node.entity::<Account>(id(number));
            let executed = account.execute(Withdraw { amount: 1 }).await.unwrap();
            let (state, version) = account.read().await.unwrap();
            assert_eq!(executed.version, version);
            assert_eq!(state.seen, [number]);
        }
    }
    let poor = second.entity::<Account>(id(7)).execute(Withdraw { amount: 100 }).await;
    assert!(matches!(poor, Err(kuma_core::ExecuteError::Rejected(Overdrawn { missing: 93 }))), "{poor:?}");
    for node in nodes {
        let wrong =
            node.entity::<Account>(id(7)).append(AccountEvent::Withdrawn { amount: 1 }).expecting(Version(1)).await;
        assert!(
            matches!(
                wrong,
                Err(kuma_core::AppendError::Refused(kuma_core::Refused::WrongVersion { actual: Version(4), .. }))
            ),
            "{wrong:?}"
        );
    }
    for node in nodes {
        node.shutdown().await;
    }
}

/// The keys of requests travel with the slot.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_retry_after_a_move_is_answered_as_repeated_at_whichever_node() {
    let (one, two) = (directory(), directory());
    let hub = Hub::new();
    let first = node(hub.node(one.path()), "one", &[]).await;
    let accounts = 0..40;
    for number in accounts.clone() {
        let account = first.entity::<Account>(id(number));
        account.append(AccountEvent::Deposited { amount: 10, number }).idempotency_key("deposit").await.unwrap();
        let withdrawn = account.execute(Withdraw { amount: 3 }).idempotency_key("withdraw").await.unwrap();
        assert_eq!((withdrawn.version, withdrawn.is_repeated), (Version(2), false));
    }
    let second = node(hub.node(two.path()), "two", &[&first]).await;
    settled(&[&first, &second]).await;
    assert!(second.owned() > 1000);
    for node in [&first, &second] {
        for number in accounts.clone() {
            let account = node.entity::<Account>(id(number));
            let deposit = AccountEvent::Deposited { amount: 10, number };
            assert_eq!(account.append(deposit).idempotency_key("deposit").await.unwrap(), Version(1));
            let withdrawn = account.execute(Withdraw { amount: 3 }).idempotency_key("withdraw").await.unwrap();
            assert_eq!((withdrawn.version, withdrawn.is_repeated), (Version(2), true));
            assert!(matches!(withdrawn.events[..], [AccountEvent::Withdrawn { amount: 3 }]));
            let other = account.execute(Withdraw { amount: 4 }).idempotency_key("withdraw").await;
            let error = other.unwrap_err().to_string();
            assert!(error.contains("key"), "{error}");
            let (state, version) = account.read().await.unwrap();
            assert_eq!((state.balance, state.seen, version), (7, vec![number], Version(2)));
        }
    }
    first.shutdown().await;
    second.shutdown().await;
}

/// A backup of a part would look like one of all; what every node exports is all, once, whoever owned it before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_with_a_part_of_the_slots_refuses_a_backup_and_the_exports_of_all_nodes_are_all_there_is() {
    let (one, two, three) = (directory(), directory(), directory());
    let hub = Hub::new();
    let first = node(hub.node(one.path()), "one", &[]).await;
    for number in 0..60 {
        let account = first.entity::<Account>(id(number));
        account.append(AccountEvent::Deposited { amount: 10, number }).await.unwrap();
    }
    let second = node(hub.node(two.path()), "two", &[&first]).await;
    settled(&[&first, &second]).await;
    for number in 0..60 {
        let account = second.entity::<Account>(id(number));
        account.append(AccountEvent::Deposited { amount: 1, number: number + 1000 }).await.unwrap();
    }
    let mut exports = Vec::new();
    for (name, node) in [("one", &first), ("two", &second)] {
        let refused = node.store().backup(three.path().join("backup")).run(|_| ()).await;
        assert!(refused.unwrap_err().to_string().contains("export every node"));
        let mut lines = Vec::new();
        node.store().export_all(&mut lines, |_| ()).await.unwrap();
        exports.push((name, lines));
        node.shutdown().await;
    }
    let found = node(hub.node(three.path().join("data")), "three", &[]).await;
    for (name, lines) in &exports {
        let report = found.store().import(*name).run(&lines[..], |_| ()).await.unwrap();
        assert!(report.new_events() > 0);
    }
    for number in 0..60 {
        let (state, version) = found.entity::<Account>(id(number)).read().await.unwrap();
        assert_eq!((state.balance, state.seen, version), (11, vec![number, number + 1000], Version(2)));
    }
    found.shutdown().await;
}

/// What clients did, and what was acknowledged to them.
#[derive(Default)]
struct Oracle {
    /// By account, the numbers of deposits that were acknowledged.
    acknowledged: Mutex<HashMap<u64, Vec<u64>>>,
    failures: Mutex<Vec<String>>,
    is_over: AtomicBool,
}

const ACCOUNTS: u64 = 200;

async fn client(number: u64, nodes: Arc<Mutex<Vec<Node>>>, oracle: Arc<Oracle>, seed: u64) -> u64 {
    let mut random = StdRng::seed_from_u64(seed ^ number << 20);
    let mut done = 0;
    while !oracle.is_over.load(SeqCst) {
        let node = {
            let nodes = nodes.lock();
            nodes[random.random_range(0..nodes.len())].clone()
        };
        let account = random.random_range(0..ACCOUNTS);
        let handle = node.entity::<Account>(id(account));
        let name = number << 32 | done;
        let outcome = match random.random_range(0..3) {
            0 => handle.read().await.map(|_| ()).map_err(|error| error.to_string()),
            1 => handle.execute(Withdraw { amount: 1 }).await.map(|_| ()).or_else(|error| match error {
                kuma_core::ExecuteError::Rejected(_) => Ok(()),
                kuma_core::ExecuteError::Failed(error) => Err(error.to_string()),
            }),
            _ => {
                let deposit = handle.append(AccountEvent::Deposited { amount: 5, number: name });
                let deposit = deposit.idempotency_key(name.to_le_bytes()).await;
                if deposit.is_ok() {
                    oracle.acknowledged.lock().entry(account).or_default().push(name);
                }
                deposit.map(|_| ()).map_err(|error| error.to_string())
            }
        };
        if let Err(why) = outcome {
            oracle.failures.lock().push(why);
        }
        done += 1;
    }
    done
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_join_at_once_and_leave_under_load_and_nothing_fails_or_is_lost() {
    let seed = seed("cluster");
    let directories: Vec<_> = (0..5).map(|_| directory()).collect();
    let hub = Hub::new();
    let mut nodes = vec![node(hub.node(directories[0].path()), "n0", &[]).await];
    for (number, directory) in directories.iter().enumerate().take(3).skip(1) {
        nodes.push(node(hub.node(directory.path()), &format!("n{number}"), &[&nodes[0]]).await);
    }
    settled(&nodes.iter().collect::<Vec<_>>()).await;
    let oracle = Arc::new(Oracle::default());
    let entries = Arc::new(Mutex::new(nodes.clone()));
    let clients: Vec<_> =
        (0..20).map(|number| tokio::spawn(client(number, entries.clone(), oracle.clone(), seed))).collect();

    // Two at once.
    let (path_4, path_5) = (directories[3].path(), directories[4].path());
    let (one_seed, other_seed) = ([&nodes[0]], [&nodes[1]]);
    let (fourth, fifth) =
        tokio::join!(node(hub.node(path_4), "n3", &one_seed), node(hub.node(path_5), "n4", &other_seed));
    nodes.extend([fourth, fifth]);
    *entries.lock() = nodes.clone();
    settled(&nodes.iter().collect::<Vec<_>>()).await;
    let given: u64 = nodes.iter().map(|node| node.move_totals().given).sum();
    assert!(given > 0);

    for leaving in [0, 3] {
        nodes[leaving].drain().await.unwrap();
    }
    soon("two nodes are empty", async || nodes[0].owned() == 0 && nodes[3].owned() == 0).await;
    settled(&nodes.iter().collect::<Vec<_>>()).await;
    oracle.is_over.store(true, SeqCst);
    let mut requests = 0;
    for client in clients {
        requests += client.await.unwrap();
    }
    let failures = oracle.failures.lock().clone();
    assert!(failures.is_empty(), "{} of {requests} failed: {:?}", failures.len(), &failures[..failures.len().min(5)]);

    let acknowledged = oracle.acknowledged.lock().clone();
    for (account, wanted) in acknowledged {
        let (state, _) = nodes[1].entity::<Account>(id(account)).read().await.unwrap();
        let mut seen = state.seen.clone();
        seen.sort_unstable();
        let mut once = seen.clone();
        once.dedup();
        assert_eq!(seen, once, "account {account} has a deposit twice");
        let mut wanted = wanted;
        wanted.sort_unstable();
        assert_eq!(seen, wanted, "account {account}");
    }
    for node in &nodes {
        let report = node.store().verify(|_| ()).await.unwrap();
        assert!(report.is_clean(), "{report:?}");
        node.shutdown().await;
    }
    println!("{requests} requests");
}

/// It waits for its seeds and founds nothing, until it is started with the right one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_with_another_cookie_is_not_let_in_and_leaves_nothing() {
    let (one, two) = (directory(), directory());
    let cookie = Cookie::generate().unwrap();
    let first = node(linked(one.path(), &cookie), "one", &[]).await;
    let seed = [first.address().to_string()];
    let stranger = linked(two.path(), &Cookie::generate().unwrap()).context("bank").seed_nodes(seed.clone());
    let waits = tokio::time::timeout(Duration::from_secs(3), Node::start(stranger)).await;
    assert!(waits.is_err() && !two.path().join("store.json").exists());
    assert_eq!(first.members().len(), 1);
    // The same directory twice.
    let twice = Node::start(linked(one.path(), &cookie).context("bank")).await;
    assert!(matches!(twice, Err(NodeError::Store(_))));
    let second = node(linked(two.path(), &cookie), "two", &[&first]).await;
    settled(&[&first, &second]).await;
    for node in [first, second] {
        node.shutdown().await;
    }
}
