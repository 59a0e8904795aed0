//! Promise 8: who does not belong here is turned away with a sentence on both sides, and changes nothing.
//!
//! Nodes are processes, each with a log of its own: what either side says is looked for there.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use crate::{
    common::directory,
    gate::Gate,
    processes::{Cluster, Process, id, name, soon},
};
use integration_tests::{
    cluster_child::{Answer, Ask},
    seed,
};
use kuma_cluster::Cookie;
use rand::{Rng, RngExt, SeedableRng, rngs::StdRng};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
};

/// Waits until a log has a line with all of these.
async fn says(log: &Path, what: &[&str]) {
    soon(&format!("the log says {what:?}"), async || {
        let text = std::fs::read_to_string(log).unwrap_or_default();
        text.lines().any(|line| what.iter().all(|what| line.contains(what)))
    })
    .await;
}

/// A node that does not belong to a [`Cluster`].
struct Stranger {
    dir: TempDir,
    process: Arc<Process>,
}

impl Stranger {
    fn start(environment: &[(&str, &str)], name: &str, cookie: &str, how: &str) -> Stranger {
        Stranger::in_directory(directory(), environment, name, cookie, how)
    }

    fn in_directory(dir: TempDir, environment: &[(&str, &str)], name: &str, cookie: &str, how: &str) -> Stranger {
        let (data, log) = (dir.path().join("data"), dir.path().join("log"));
        Stranger { process: Process::spawn_with(environment, &data, &log, &[name, cookie, how]), dir }
    }

    fn log(&self) -> PathBuf {
        self.dir.path().join("log")
    }

    fn has_store(&self) -> bool {
        self.dir.path().join("data").join("store.json").exists()
    }
}

async fn one_member(cluster: &Cluster) {
    assert_eq!(cluster.node(0).status().await.unwrap().up, [name(0)]);
    let answer = cluster.append(0, &id(1), 1).await;
    assert!(matches!(answer, Some(Answer::Appended { version: 1 })), "{answer:?}");
}

/// Nobody listens there, now.
fn free() -> SocketAddr {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_with_another_cookie_or_of_another_store_waits_and_both_sides_say_why() {
    let cluster = Cluster::start(1).await;
    let address = cluster.node(0).address().await;
    let other = Cookie::generate().unwrap().to_text().to_string();
    let stranger = Stranger::start(&[], "stranger", &other, &address);
    says(&stranger.log(), &["no seed node has answered yet", "founds no cluster", "another cookie"]).await;
    says(&cluster.log(0), &["a connection was refused", "another cookie"]).await;
    assert!(!stranger.has_store());
    stranger.process.kill().await;

    let stranger = Stranger::start(&[("CHILD_CONTEXT", "other")], "stranger", &cluster.cookie, &address);
    says(&stranger.log(), &["no seed node has answered yet", "it is of the store", "and this node of"]).await;
    says(&cluster.log(0), &["a connection was refused", "it is of the store"]).await;
    assert!(!stranger.has_store());
    stranger.process.kill().await;

    // Neither of the two logs has the secret.
    for log in [stranger.log(), cluster.log(0)] {
        let text = std::fs::read_to_string(log).unwrap();
        assert!(!text.contains(&other) && !text.contains(&cluster.cookie));
    }
    one_member(&cluster).await;
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_whose_seeds_are_not_there_says_so_and_joins_when_they_are() {
    let seed = free().to_string();
    let cluster = Cluster::empty();
    let waiting = Stranger::start(&[], "waiting", &cluster.cookie, &seed);
    says(&waiting.log(), &["no seed node has answered yet", "founds no cluster", &seed]).await;
    assert!(!waiting.has_store());
    // A node that was told to ask itself is not answered either.
    let own = free().to_string();
    let alone = Stranger::start(&[("CHILD_LISTEN", &own)], "alone", &cluster.cookie, &own);
    says(&alone.log(), &["no seed node has answered yet", "asked to join itself"]).await;
    assert!(!alone.has_store());
    alone.process.kill().await;

    let founder = Stranger::start(&[("CHILD_LISTEN", &seed)], "founder", &cluster.cookie, "found");
    founder.process.address().await;
    waiting.process.address().await;
    soon("it takes part", async || waiting.process.status().await.unwrap().is_ready).await;
    assert_eq!(founder.process.status().await.unwrap().up.len(), 2);
}

/// A directory is one node's, and so is a name.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_that_is_in_use_and_a_name_that_is_taken_are_refused() {
    let cluster = Cluster::start(1).await;
    let address = cluster.node(0).address().await;
    let log = cluster.root.path().join("twice.log");
    let twice = Process::spawn(&cluster.path(0), &log, "n0", &cluster.cookie, "again", &[]);
    twice.over().await;
    says(&log, &["not started", "another process"]).await;

    let stranger = Stranger::start(&[], "n0", &cluster.cookie, &address);
    stranger.process.over().await;
    says(&stranger.log(), &["not started", "the name \"n0\" is taken"]).await;
    one_member(&cluster).await;
    // With a name of its own it is let in, in the directory that it has.
    let Stranger { dir, .. } = stranger;
    let again = Stranger::in_directory(dir, &[], "n9", &cluster.cookie, &address);
    again.process.address().await;
    soon("it takes part", async || again.process.status().await.unwrap().is_ready).await;
    cluster.end().await;
}

/// Its address leads to other nodes, one after the other; and the founder comes back with nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_of_another_cluster_the_node_itself_and_a_wiped_founder_are_told_apart() {
    let parse = |address: String| address.parse::<SocketAddr>().unwrap();
    let cluster = Cluster::empty();
    let cookie = &cluster.cookie;
    let gate = Gate::new().await;
    let advertised = gate.address.to_string();
    let environment = [("CHILD_ADVERTISE", advertised.as_str())];
    let founder = Stranger::start(&environment, "founder", cookie, "found");
    let founder_address = parse(founder.process.address().await);
    gate.open(founder_address);
    let second = Stranger::start(&[], "second", cookie, &advertised);
    let second_address = parse(second.process.address().await);
    soon("both have their slots", async || {
        let (one, other) = (founder.process.status().await.unwrap(), second.process.status().await.unwrap());
        one.is_settled && other.is_settled && one.owned.len() == one.wished && other.owned.len() == other.wished
    })
    .await;

    // Another cluster, with the same secret.
    let foreign = Stranger::start(&[], "foreign", cookie, "found");
    gate.open(parse(foreign.process.address().await));
    // Whoever has the lower disk keeps its own dial; so the link is cut by its end.
    founder.process.kill().await;
    let sentence = "of another cluster that has the same name and cookie";
    says(&second.log(), &["a node cannot be reached", sentence]).await;
    says(&foreign.log(), &["a connection was refused", sentence]).await;
    // The node itself.
    gate.open(second_address);
    says(&second.log(), &["a node cannot be reached", "leads to the node itself"]).await;
    says(&second.log(), &["a connection was refused", "leads to the node itself"]).await;
    assert_eq!(foreign.process.status().await.unwrap().up, ["foreign"]);
    foreign.process.kill().await;

    // The founder's disk is empty. Told to found, it founds: a cluster of its own, which nobody takes for the former one.
    let wiped = Stranger::start(&environment, "founder", cookie, "found");
    gate.open(parse(wiped.process.address().await));
    says(&wiped.log(), &["a connection was refused", sentence]).await;
    assert_eq!(second.process.status().await.unwrap().up, ["second"]);
    wiped.process.kill().await;
    // With seeds it is a new node: not the one whose name it has, and not let in while that one may come back.
    let wiped = Stranger::start(&environment, "founder", cookie, &second_address.to_string());
    wiped.process.over().await;
    says(&wiped.log(), &["not started", "the name \"founder\" is taken"]).await;
    let wiped = Stranger::start(&[], "anew", cookie, &second_address.to_string());
    gate.open(parse(wiped.process.address().await));
    says(&wiped.log(), &["does not take part yet", "founder"]).await;
    assert!(!wiped.process.status().await.unwrap().is_ready);
    second.process.done(Ask::Attest { node: "founder".to_owned() }).await;
    soon("it takes part", async || wiped.process.status().await.unwrap().is_ready).await;
}

fn memory(process: &Process) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

/// Bytes at random, the first half of a handshake, and hardly anything at all: they are put off, and nobody else notices.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_connections_of_strangers_cost_little_and_keep_nobody_out() {
    const CONNECTIONS: usize = 1000;
    let seed = seed("strangers");
    let cluster = Cluster::start(2).await;
    let address = cluster.node(0).address().await;
    let before = memory(&cluster.node(0));
    let is_served = async |number: u64| {
        // Wherever its slot is: one of the two is on the other node.
        for log in 0..8 {
            let answer = cluster.append((number % 2) as usize, &id(log), number << 8 | log).await;
            assert!(matches!(answer, Some(Answer::Appended { .. })), "{answer:?}");
        }
    };
    is_served(1).await;
    let mut strangers = JoinSet::new();
    for number in 0..CONNECTIONS {
        let (address, mut random) = (address.clone(), StdRng::seed_from_u64(seed ^ (number as u64) << 20));
        strangers.spawn(async move {
            let mut stream = TcpStream::connect(address).await.unwrap();
            let mut bytes = vec![0; random.random_range(1..100_000)];
            random.fill_bytes(&mut bytes);
            match number % 4 {
                // What looks like the first message of a handshake, whole or in part.
                0 => {
                    let length = random.random_range(1..=48);
                    bytes = [&48_u16.to_be_bytes()[..], &bytes[..1].repeat(length)].concat();
                }
                // Behind it nothing comes.
                1 => bytes.truncate(1),
                _ => {}
            }
            // It may be closed before all is written.
            let _ = stream.write_all(&bytes).await;
            let ended = tokio::time::timeout(Duration::from_secs(100), stream.read(&mut [0; 64])).await;
            assert!(matches!(ended, Ok(Ok(0) | Err(_))), "it is closed, and nothing is said: {ended:?}");
        });
    }
    // Those who are there already.
    for number in 2..12 {
        is_served(number).await;
    }
    let third = Stranger::start(&[], "third", &cluster.cookie, &address);
    while let Some(ended) = strangers.join_next().await {
        ended.unwrap();
    }
    let after = memory(&cluster.node(0));
    println!("{before} MiB before, {after} MiB at most");
    assert!(after < before + 100, "{before} MiB before, {after} MiB at most");
    third.process.address().await;
    soon("a node that belongs here is let in", async || third.process.status().await.unwrap().is_ready).await;
    is_served(20).await;
    cluster.end().await;
}
