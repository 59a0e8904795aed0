//! Projections of a node of a cluster: a whole model at each node that registers one, every event in it once, wherever slots go.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{collections::BTreeMap, time::Duration};

use crate::{
    bank::{Writers, account_of, event, id, start},
    common::directory,
    nodes::{self, LONG, settled, soon},
    processes::{self, Clients, LOGS},
};
use integration_tests::{
    cluster_child::{Answer, Ask},
    seed,
};
use kuma_cluster::{Node, testing::Hub};
use kuma_core::{
    Kuma, NewEvent, Options, ProjectionError, ProjectionHandle, ProjectionState, Reason, SqlProjection, slot_of,
};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::json;
use tempfile::TempDir;

/// A row for each event: one that comes twice is there twice.
const DEPOSITS: &str = "
    -- projection: deposits
    -- version: 1
    -- erasure: column deposit.account
    CREATE TABLE deposit(account TEXT NOT NULL, version INTEGER NOT NULL, amount INTEGER NOT NULL) STRICT;
    CREATE INDEX deposit_account ON deposit(account, version);

    -- on account.Deposited
    INSERT INTO deposit(account, version, amount) VALUES (:entity, :version, :data ->> 'amount');
";

/// Two nodes, each with its slots.
async fn two_nodes(hub: &Hub, directories: &[TempDir; 2]) -> (Node, Node) {
    let first = start(hub, directories[0].path(), "one", &[]).await;
    let second = start(hub, directories[1].path(), "two", &[&first]).await;
    settled(&[&first, &second]).await;
    (first, second)
}

async fn deposits(node: &Node) -> ProjectionHandle {
    node.store().projection(SqlProjection::parse(DEPOSITS).unwrap()).await.unwrap()
}

fn why() -> Reason {
    Reason::new("request 4711").by("support")
}

/// Of each account: rows, the lowest and the highest version, the sum.
async fn rows(projection: &ProjectionHandle) -> BTreeMap<String, (i64, i64, i64, i64)> {
    let sql = "SELECT account, count(*), min(version), max(version), sum(amount) FROM deposit GROUP BY account";
    let answer = projection.query(sql).rows_max(100_000).run().await.unwrap();
    let rows = answer.json();
    let rows: Vec<BTreeMap<String, serde_json::Value>> = serde_json::from_value(rows).unwrap();
    let number = |row: &BTreeMap<String, serde_json::Value>, name: &str| row[name].as_i64().unwrap();
    let row = |row: BTreeMap<String, serde_json::Value>| {
        let account = row["account"].as_str().unwrap().to_owned();
        let numbers = ["count(*)", "min(version)", "max(version)", "sum(amount)"].map(|name| number(&row, name));
        (account, (numbers[0], numbers[1], numbers[2], numbers[3]))
    };
    rows.into_iter().map(row).collect()
}

/// Every version of every account once, as the nodes themselves have them.
async fn assert_whole(node: &Node, projection: &ProjectionHandle, accounts: u64) {
    projection.caught_up(LONG).await.unwrap();
    let rows = rows(projection).await;
    for number in 0..accounts {
        let versions = node.raw("account", id(number)).read().await.map_or(0, |(_, version)| version.0) as i64;
        let (count, first, last, _) = rows.get(&id(number)).copied().unwrap_or_default();
        assert_eq!((count, last), (versions, versions), "account {number}");
        assert!(count == 0 || first == 1, "account {number}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn models_of_two_nodes_have_every_event_once_while_nodes_join_leave_and_start_again() {
    const ACCOUNTS: u64 = 60;
    let directories: Vec<_> = (0..4).map(|_| directory()).collect();
    let hub = Hub::new();
    let first = start(&hub, directories[0].path(), "one", &[]).await;
    // There is history before there are models.
    for number in 0..ACCOUNTS {
        first.raw("account", id(number)).append(event(number)).await.unwrap();
    }
    let second = start(&hub, directories[1].path(), "two", &[&first]).await;
    let (at_first, at_second) = (deposits(&first).await, deposits(&second).await);
    settled(&[&first, &second]).await;
    let writers = Writers::start(&first, 4, ACCOUNTS, seed("projections"));

    writers.more(100).await;
    let third = start(&hub, directories[2].path(), "three", &[&first]).await;
    writers.more(100).await;
    // The one with a model is started again in the middle of it.
    second.shutdown().await;
    let second = {
        drop(at_second);
        start(&hub, directories[1].path(), "two", &[]).await
    };
    let at_second = deposits(&second).await;
    writers.more(100).await;
    third.drain().await.unwrap();
    soon("the third node is empty", async || third.owned() == 0).await;
    writers.more(100).await;
    writers.stop().await;
    settled(&[&first, &second, &third]).await;
    assert_whole(&first, &at_first, ACCOUNTS).await;
    assert_whole(&first, &at_second, ACCOUNTS).await;
    let status = at_second.status().await.unwrap();
    assert_eq!(status.commits_behind, 0);
    assert_eq!(rows(&at_first).await, rows(&at_second).await);

    // Built anew from all nodes, it is the same.
    let before = rows(&at_first).await;
    at_first.rebuild().await.unwrap();
    at_first.caught_up(LONG).await.unwrap();
    assert_eq!(rows(&at_first).await, before);
    for node in [first, second, third] {
        node.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_whose_node_is_killed_again_and_again_while_slots_move_has_every_event_once() {
    let seed = seed("killed_models");
    let mut random = StdRng::seed_from_u64(seed);
    let cluster = processes::Cluster::start(2).await;
    let mut clients = Clients::start(&cluster, seed);
    cluster.node(0).done(Ask::Project).await;
    for round in 0..4 {
        cluster.node(1).done(Ask::Project).await;
        let log = random.random_range(0..LOGS);
        let (slot, to) = (processes::slot(&processes::id(log)), processes::name(round % 2));
        clients.prefer(log);
        cluster.node(0).done(Ask::Pin { slot, node: to }).await;
        let wanted = clients.acks() + random.random_range(10..60);
        soon("more is acknowledged", async || clients.acks() >= wanted).await;
        cluster.kill(1).await;
        cluster.again(1, &[]);
        cluster.ready(1).await;
    }
    cluster.node(1).done(Ask::Project).await;
    clients.stop().await;
    for node in 0..2 {
        let answer = cluster.node(node).ask(Ask::Model).await;
        let Some(Answer::Model(model)) = answer else { panic!("{answer:?}") };
        for log in (0..LOGS).map(processes::id) {
            let answer = cluster.read(node, &log).await;
            let Some(Answer::State { seen, .. }) = answer else { panic!("{answer:?}") };
            assert_eq!(model.get(&log).cloned().unwrap_or_default(), seen, "{log} in the model of node {node}");
        }
    }
    clients.judge(&cluster).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_erasure_at_any_node_reaches_the_models_of_all_and_a_later_life_is_in_them() {
    let directories = [directory(), directory()];
    let hub = Hub::new();
    let (first, second) = two_nodes(&hub, &directories).await;
    let models = [deposits(&first).await, deposits(&second).await];
    let (here, there) = (account_of(&first), account_of(&second));
    for account in [&here, &there] {
        for amount in 1..=3 {
            first.raw("account", account).append(event(amount)).await.unwrap();
        }
    }
    for model in &models {
        model.caught_up(LONG).await.unwrap();
        assert_eq!(rows(model).await.len(), 2);
    }
    for (account, node) in [(&here, &second), (&there, &first)] {
        node.raw("account", account).erase(why()).await.unwrap();
        // Not later: the receipt says so.
        for model in &models {
            assert!(!rows(model).await.contains_key(account));
        }
        assert_eq!(node.raw("account", account).recreate(why()).await.unwrap(), 2);
        node.raw("account", account).append(event(7)).await.unwrap();
    }
    for model in &models {
        model.caught_up(LONG).await.unwrap();
        let rows = rows(model).await;
        assert_eq!([rows[&here], rows[&there]], [(1, 1, 1, 7); 2]);
    }
    for node in [first, second] {
        node.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_says_that_a_node_is_out_of_reach_and_goes_on_when_it_is_back() {
    let directories = [directory(), directory()];
    let hub = Hub::new();
    let (first, second) = two_nodes(&hub, &directories).await;
    let model = deposits(&first).await;
    let (here, there) = (account_of(&first), account_of(&second));
    first.raw("account", &there).append(event(1)).await.unwrap();
    model.caught_up(LONG).await.unwrap();

    hub.cut(first.address(), second.address(), true);
    second.raw("account", &there).append(event(2)).await.unwrap();
    first.raw("account", &here).append(event(3)).await.unwrap();
    soon("what is in reach is there", async || rows(&model).await.contains_key(&here)).await;
    let refused = model.caught_up(Duration::from_millis(300)).await;
    assert!(matches!(&refused, Err(ProjectionError::OutOfReach { why, .. }) if why.contains("two")), "{refused:?}");
    soon("it is late", async || model.status().await.unwrap().lag > Duration::from_millis(500)).await;
    // A model that is built anew meanwhile does not take its place without what is there.
    model.rebuild().await.unwrap();
    soon("it waits", async || {
        let building = model.status().await.unwrap().building;
        matches!(building.and_then(|building| building.state), Some(ProjectionState::Waiting { why }) if why.contains("two"))
    })
    .await;
    assert_eq!(rows(&model).await[&there].0, 1);

    hub.cut(first.address(), second.address(), false);
    model.caught_up(LONG).await.unwrap();
    assert_eq!(rows(&model).await, BTreeMap::from([(here, (1, 1, 1, 3)), (there, (2, 1, 2, 3))]));
    for node in [first, second] {
        node.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_of_another_node_that_cannot_be_applied_stops_the_model_where_slot_and_seq_say_and_can_be_passed_over()
{
    let directories = [directory(), directory()];
    let hub = Hub::new();
    let (first, second) = two_nodes(&hub, &directories).await;
    let model = deposits(&first).await;
    model.caught_up(LONG).await.unwrap();
    let there = account_of(&second);
    let bad = NewEvent::json("Deposited", &json!({ "amount": "much" })).unwrap();
    for event in [event(1), bad, event(3)] {
        second.raw("account", &there).append(event).await.unwrap();
    }
    let failed_at = async || match model.status().await.unwrap().serving?.state? {
        ProjectionState::Failed(failure) => Some((failure.slot, failure.seq, failure.version.map(|version| version.0))),
        _ => None,
    };
    soon("it stands still", async || failed_at().await.is_some()).await;
    assert_eq!(failed_at().await, Some((Some(slot_of("account", &there)), Some(2), Some(2))));
    assert_eq!(rows(&model).await[&there], (1, 1, 1, 1));
    // After another start it comes to the same event.
    first.shutdown().await;
    let first = start(&hub, directories[0].path(), "one", &[]).await;
    let model = deposits(&first).await;
    let is_failed = async || {
        let state = model.status().await.unwrap().serving.and_then(|serving| serving.state);
        matches!(state, Some(ProjectionState::Failed(_)))
    };
    soon("it stands still again", is_failed).await;
    model.skip().await.unwrap();
    model.caught_up(LONG).await.unwrap();
    assert_eq!(rows(&model).await[&there], (2, 1, 3, 4));
    assert_eq!(model.skipped().await.unwrap().len(), 1);
    for node in [first, second] {
        node.shutdown().await;
    }
}

/// What it has applied it does not apply again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_of_a_store_that_was_alone_goes_on_in_its_cluster() {
    let directories = [directory(), directory()];
    {
        let alone = Kuma::start(Options::new(directories[0].path()).context("bank").shards(2)).await.unwrap();
        let model = alone.projection(SqlProjection::parse(DEPOSITS).unwrap()).await.unwrap();
        for number in 0..20 {
            alone.raw("account", id(number)).append(event(number)).await.unwrap();
        }
        model.caught_up(LONG).await.unwrap();
        alone.shutdown().await;
    }
    let hub = Hub::new();
    let options = hub.node(directories[0].path()).context("bank").name("one").shards(2);
    let first = nodes::start(options, true, &[]).await;
    let model = deposits(&first).await;
    let served = model.status().await.unwrap().serving.unwrap();
    assert_eq!((served.model.version, served.events), (1, 20));
    let second = start(&hub, directories[1].path(), "two", &[&first]).await;
    settled(&[&first, &second]).await;
    for number in 0..30 {
        second.raw("account", id(number)).append(event(1)).await.unwrap();
    }
    assert_whole(&first, &model, 30).await;
    assert_eq!(model.status().await.unwrap().serving.unwrap().events, 50);
    for node in [first, second] {
        node.shutdown().await;
    }
}
