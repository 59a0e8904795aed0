//! Durable subscriptions of a node of a cluster: the events of all nodes, each acknowledged once, wherever slots go.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{collections::BTreeMap, time::Duration};

use crate::{
    bank::{Writers, account_of, event, id, start},
    common::directory,
    nodes::{self, LONG, settled, soon},
};
use integration_tests::seed;
use kuma_cluster::{Migrate, Node, testing::Hub};
use kuma_core::{Delivery, DurableSubscription, Filter, Kuma, Options, Reason, slot_of};

async fn mailer(kuma: &Kuma) -> DurableSubscription {
    kuma.durable_subscription("mailer", Filter::event("account", "Deposited")).open().await.unwrap()
}

async fn next(mailer: &mut DurableSubscription) -> (String, u64) {
    match tokio::time::timeout(LONG, mailer.next()).await.unwrap().unwrap() {
        Delivery::Event(stored) => (stored.id.to_string(), stored.event.version.0),
        other => panic!("{other:?}"),
    }
}

/// Each event is acknowledged by one of the consumers, and what one has acknowledged no later one gets.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_event_of_every_node_is_acknowledged_once_while_nodes_join_leave_and_start_again() {
    const ACCOUNTS: u64 = 40;
    let directories: Vec<_> = (0..3).map(|_| directory()).collect();
    let hub = Hub::new();
    let first = start(&hub, directories[0].path(), "one", &[]).await;
    let mut second = start(&hub, directories[1].path(), "two", &[&first]).await;
    settled(&[&first, &second]).await;
    let writers = Writers::start(&first, 3, ACCOUNTS, seed("durable"));
    // By account, the last version that was acknowledged.
    let mut acknowledged: BTreeMap<String, u64> = BTreeMap::new();
    // Hands out so many, acknowledges some of them, and drops the consumer with the rest.
    let consume = async |node: &Node, count: u64, acknowledged: &mut BTreeMap<String, u64>| {
        let mut consumer = mailer(node.store()).await;
        let mut since = BTreeMap::new();
        for number in 1..=count {
            let (account, version) = next(&mut consumer).await;
            let before = since.get(&account).or(acknowledged.get(&account)).copied().unwrap_or_default();
            assert_eq!(version, before + 1, "{account}: left out, or handed out again after it was acknowledged");
            since.insert(account, version);
            if number % 7 == 0 {
                consumer.ack().await.unwrap();
                acknowledged.append(&mut since);
            }
        }
    };

    consume(&second, 100, &mut acknowledged).await;
    let third = start(&hub, directories[2].path(), "three", &[&first]).await;
    consume(&second, 100, &mut acknowledged).await;
    second.shutdown().await;
    second = start(&hub, directories[1].path(), "two", &[]).await;
    consume(&second, 100, &mut acknowledged).await;
    third.drain().await.unwrap();
    consume(&second, 100, &mut acknowledged).await;
    soon("the third node is empty", async || third.owned() == 0).await;
    let done = writers.stop().await;
    settled(&[&first, &second, &third]).await;
    let mut consumer = mailer(second.store()).await;
    while let Some(delivery) = tokio::time::timeout(LONG, consumer.next_of_now()).await.unwrap().unwrap() {
        let Delivery::Event(stored) = delivery else { panic!("{delivery:?}") };
        let last = acknowledged.insert(stored.id.to_string(), stored.event.version.0).unwrap_or_default();
        assert_eq!(stored.event.version.0, last + 1, "{}", stored.id);
    }
    consumer.ack().await.unwrap();
    assert_eq!(acknowledged.values().sum::<u64>(), done);
    for (account, last) in &acknowledged {
        assert_eq!(first.raw("account", account).read().await.unwrap().1.0, *last);
    }
    let status = second.store().durable_subscriptions().await.unwrap().remove(0);
    assert_eq!((status.commits_behind, status.lag), (Some(0), Some(Duration::ZERO)));

    // How far it is behind cannot be said without all nodes. It goes on with those that there are.
    let there = account_of(&second);
    first.shutdown().await;
    let status = second.store().durable_subscriptions().await.unwrap().remove(0);
    assert_eq!((status.commits_behind, status.lag), (None, None));
    second.raw("account", &there).append(event(2)).await.unwrap();
    assert_eq!(next(&mut consumer).await.0, there);
    for node in [second, third] {
        node.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_parked_is_handed_out_again_wherever_its_slot_is_and_goes_with_its_entity() {
    let directories = [directory(), directory()];
    let hub = Hub::new();
    let first = start(&hub, directories[0].path(), "one", &[]).await;
    let second = start(&hub, directories[1].path(), "two", &[&first]).await;
    settled(&[&first, &second]).await;
    let (here, there) = (account_of(&first), account_of(&second));
    let mut consumer = mailer(first.store()).await;
    for (node, account) in [(&second, &here), (&first, &there)] {
        node.raw("account", account).append(event(1)).await.unwrap();
        assert_eq!(next(&mut consumer).await, (account.clone(), 1));
        consumer.park("the mail server is down").await.unwrap();
        node.raw("account", account).append(event(2)).await.unwrap();
        assert_eq!(next(&mut consumer).await, (account.clone(), 2));
        consumer.ack().await.unwrap();
    }
    // Both go elsewhere, and the node is started again.
    for (account, to) in [(&here, "two"), (&there, "one")] {
        first.migrate(Migrate::Pin { slot: slot_of("account", account), to: to.to_owned() }).await.unwrap();
    }
    let is_at = |node: &Node, account: &str| {
        node.store().slots().owned().iter().any(|(slot, _)| *slot == slot_of("account", account))
    };
    soon("the slots are elsewhere", async || is_at(&second, &here) && is_at(&first, &there)).await;
    drop(consumer);
    first.shutdown().await;
    let first = start(&hub, directories[0].path(), "one", &[]).await;
    settled(&[&first, &second]).await;
    let mut consumer = mailer(first.store()).await;
    assert_eq!(first.store().parked("mailer").await.unwrap().len(), 2);
    assert_eq!(consumer.replay_parked().await.unwrap(), 2);
    assert_eq!(next(&mut consumer).await, (here.clone(), 1));
    assert_eq!(next(&mut consumer).await, (there.clone(), 1));
    consumer.park("it is still down").await.unwrap();
    let parked = first.store().parked("mailer").await.unwrap();
    assert_eq!(parked.iter().map(|parked| parked.attempts).collect::<Vec<_>>(), [2]);

    // It is erased at the other node: nothing of it is left here when that is done, and it is told.
    let why = Reason::new("request 4711").by("support");
    second.raw("account", &there).erase(why).await.unwrap();
    assert!(first.store().parked("mailer").await.unwrap().is_empty());
    let told = tokio::time::timeout(LONG, consumer.next()).await.unwrap().unwrap();
    assert!(matches!(told, Delivery::Erased(_)), "{told:?}");
    consumer.ack().await.unwrap();
    first.store().drop_durable_subscription("mailer").await.unwrap();
    assert!(first.store().durable_subscriptions().await.unwrap().is_empty());
    for node in [first, second] {
        node.shutdown().await;
    }
}

/// What it has acknowledged does not come again, and what it has parked is found.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_durable_subscription_of_a_store_that_was_alone_goes_on_in_its_cluster() {
    const ACCOUNTS: u64 = 20;
    let directories = [directory(), directory()];
    let mut acknowledged: BTreeMap<String, u64> = BTreeMap::new();
    let parked;
    {
        let alone = Kuma::start(Options::new(directories[0].path()).context("bank").shards(2)).await.unwrap();
        for number in 0..2 * ACCOUNTS {
            alone.raw("account", id(number % ACCOUNTS)).append(event(number)).await.unwrap();
        }
        let mut consumer = mailer(&alone).await;
        for _ in 0..ACCOUNTS {
            let (account, version) = next(&mut consumer).await;
            acknowledged.insert(account, version);
        }
        consumer.ack().await.unwrap();
        parked = next(&mut consumer).await;
        acknowledged.insert(parked.0.clone(), parked.1);
        consumer.park("not now").await.unwrap();
        alone.shutdown().await;
    }
    let hub = Hub::new();
    let options = hub.node(directories[0].path()).context("bank").name("one").shards(2);
    let first = nodes::start(options, true, &[]).await;
    let second = start(&hub, directories[1].path(), "two", &[&first]).await;
    // Its slots are elsewhere by then, half of them.
    settled(&[&first, &second]).await;
    let status = first.store().durable_subscriptions().await.unwrap().remove(0);
    assert_eq!((status.commits_behind, status.parked), (Some(ACCOUNTS - 1), 1));
    for round in 0..2 {
        let mut consumer = mailer(first.store()).await;
        let mut rest = acknowledged.clone();
        while let Some(delivery) = tokio::time::timeout(LONG, consumer.next_of_now()).await.unwrap().unwrap() {
            let Delivery::Event(stored) = delivery else { panic!("{delivery:?}") };
            let last = rest.insert(stored.id.to_string(), stored.event.version.0).unwrap_or_default();
            assert_eq!(stored.event.version.0, last + 1, "{}", stored.id);
        }
        assert!((0..ACCOUNTS).all(|number| rest[&id(number)] == 2), "{rest:?}");
        if round == 1 {
            consumer.replay_parked().await.unwrap();
            assert_eq!(next(&mut consumer).await, parked);
            consumer.ack().await.unwrap();
        }
    }
    assert!(first.store().parked("mailer").await.unwrap().is_empty());
    assert_eq!(first.store().durable_subscriptions().await.unwrap()[0].commits_behind, Some(0));
    for node in [first, second] {
        node.shutdown().await;
    }
}
