//! Promises 7 and 8: a node that is away makes its own slots unavailable, says so soon, and nobody else's; cut apart, each serves what it owns.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    net::Ipv4Addr,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    common::directory,
    gate::Gate,
    processes::{Cluster, name, slot, soon},
};
use integration_tests::cluster_child::{Answer, Log, LogEvent};
use kuma_cluster::{Cookie, Node, NodeOptions};
use kuma_core::{AppendError, Unavailable, Version};
use rustix::process::Signal;

/// What is promised.
const WITHIN: Duration = Duration::from_secs(2);

/// A log whose slot a node owns.
async fn log_of(cluster: &Cluster, node: usize) -> String {
    let owned = cluster.node(node).status().await.unwrap().owned;
    (0..).map(|number| format!("of-{number}")).find(|id| owned.contains(&slot(id))).unwrap()
}

/// How long after `gone` a request to another node is told that its owner is out of reach. None: it was sent before that was noticed.
async fn told(cluster: Arc<Cluster>, id: String, number: Option<u64>, gone: Instant) -> Option<Duration> {
    let answer = match number {
        Some(number) => cluster.append(0, &id, number).await,
        None => cluster.read(0, &id).await,
    };
    match answer {
        Some(Answer::Unreachable { node }) => {
            assert_eq!(node, name(1));
            Some(gone.elapsed())
        }
        Some(Answer::Failed(why)) if number.is_some() => {
            println!("a write that may have been sent: {why}");
            None
        }
        other => panic!("{other:?}"),
    }
}

/// A machine that is busy may notice late, and not every time: the best of three counts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slots_of_a_node_that_dies_or_stands_still_are_out_of_reach_within_two_seconds_and_others_are_untouched() {
    let cluster = Cluster::start(3).await;
    let ids = [log_of(&cluster, 0).await, log_of(&cluster, 1).await, log_of(&cluster, 2).await];
    for (number, id) in (1..).zip(&ids) {
        assert_eq!(cluster.append(0, id, number).await, Some(Answer::Appended { version: 1 }));
    }
    let mut number = 100;
    for is_killed in [true, false] {
        let mut best = Duration::MAX;
        for _ in 0..3 {
            let gone = Instant::now();
            match is_killed {
                true => cluster.kill(1).await,
                false => cluster.node(1).signal(Signal::STOP),
            }
            let asked = |number| tokio::spawn(told(cluster.clone(), ids[1].clone(), number, gone));
            let reads = asked(None);
            // From here on nothing is sent to it any more, so that nobody has to be told that the outcome is unknown.
            tokio::time::sleep(Duration::from_secs(1).saturating_sub(gone.elapsed())).await;
            number += 1;
            let writes = asked(Some(number));
            let others = Instant::now();
            for id in [&ids[0], &ids[2]] {
                number += 1;
                let answer = cluster.append(0, id, number).await;
                assert!(matches!(answer, Some(Answer::Appended { .. })), "{answer:?}");
            }
            let untouched = others.elapsed();
            let (reads, writes) = (reads.await.unwrap().unwrap(), writes.await.unwrap());
            println!(
                "killed: {is_killed}; a read was told after {reads:?}, a write after {writes:?}; others took {untouched:?}"
            );
            best = best.min(reads.max(writes.unwrap_or(Duration::MAX)));
            match is_killed {
                true => cluster.again(1, &[]),
                false => cluster.node(1).signal(Signal::CONT),
            }
            cluster.ready(1).await;
            soon("it serves again, by itself", async || {
                matches!(cluster.read(0, &ids[1]).await, Some(Answer::State { .. }))
            })
            .await;
            cluster.settled().await;
        }
        assert!(best <= WITHIN, "{best:?}");
    }
    cluster.end().await;
}

/// Real links, through proxies that stop passing bytes on: nobody is told that a connection is closed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_that_do_not_hear_of_each_other_any_more_serve_their_own_slots_and_nothing_conflicts_afterwards() {
    let (cookie, directories, gates) =
        (Cookie::generate().unwrap(), [directory(), directory()], [Gate::new().await, Gate::new().await]);
    let options = |number: usize| {
        NodeOptions::new(directories[number].path(), cookie.clone())
            .listen((Ipv4Addr::LOCALHOST, 0).into())
            .advertise(gates[number].address.to_string())
            .name(name(number))
            .shards(2)
            .entity::<Log>()
    };
    let first = Node::start(options(0).found()).await.unwrap();
    gates[0].open(first.address());
    let second = Node::start(options(1).seed_nodes([gates[0].address.to_string()])).await.unwrap();
    gates[1].open(second.address());
    let nodes = [&first, &second];
    soon("all slots are where they should be", async || {
        nodes.iter().all(|node| {
            let members = node.members();
            let own = members.iter().find(|member| member.is_own).unwrap();
            members.len() == 2
                && members.iter().all(|member| member.is_up)
                && own.wished == node.owned()
                && node.is_settled()
        })
    })
    .await;
    let own = nodes.map(|node| {
        let owned: Vec<u64> = node.store().slots().owned().into_iter().map(|(slot, _)| slot.number().into()).collect();
        (0..).map(|number| format!("of-{number}")).find(|id| owned.contains(&slot(id))).unwrap()
    });
    let note = async |node: &Node, id: &str, number| node.entity::<Log>(id).append(LogEvent::Noted { number }).await;
    gates.iter().for_each(Gate::shut);
    for at in [0, 1] {
        for number in 1..=20 {
            assert_eq!(note(nodes[at], &own[at], number).await.unwrap(), Version(number));
        }
        soon("the other one is out of reach", async || {
            let answer = note(nodes[at], &own[1 - at], 99).await;
            matches!(answer, Err(AppendError::Unavailable(Unavailable::OwnerUnreachable { .. })))
        })
        .await;
    }
    gates[0].open(first.address());
    gates[1].open(second.address());
    for at in [0, 1] {
        soon("they reach each other again", async || nodes[at].entity::<Log>(&own[1 - at]).read().await.is_ok()).await;
    }
    for at in [0, 1] {
        let (state, version) = nodes[at].entity::<Log>(&own[1 - at]).read().await.unwrap();
        // What was tried before the cut was noticed may be there, once.
        let seen: Vec<u64> = state.seen.iter().copied().filter(|number| *number != 99).collect();
        assert_eq!(seen, (1..=20).collect::<Vec<_>>());
        assert_eq!(version.0, state.seen.len() as u64);
        let next = note(nodes[at], &own[1 - at], 21).await.unwrap();
        assert_eq!(next.0, version.0 + 1);
    }
    for node in nodes {
        assert!(node.store().verify(|_| ()).await.unwrap().is_clean());
        node.shutdown().await;
    }
}
