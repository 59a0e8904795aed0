//! Durable subscriptions: acknowledged, parked, confirmed.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::path::Path;

use kuma_core::{
    Delivery, DurableError, DurableSubscription, Filter, Kuma, NewEvent, Options, Reason, Receipt, Start,
    SubscribeError,
};
use serde_json::json;

async fn start(directory: &Path) -> Kuma {
    Kuma::start(Options::new(directory).shards(2)).await.unwrap()
}

async fn pay(kuma: &Kuma, order: &str, times: usize) {
    for number in 0..times {
        kuma.raw("order", order).append(NewEvent::json("Paid", &json!({ "n": number })).unwrap()).await.unwrap();
    }
}

async fn mailer(kuma: &Kuma) -> DurableSubscription {
    kuma.durable_subscription("mailer", Filter::event("order", "Paid")).open().await.unwrap()
}

async fn event(mailer: &mut DurableSubscription) -> (String, u64) {
    match mailer.next().await.unwrap() {
        Delivery::Event(stored) => (stored.id.to_string(), stored.event.version.0),
        other => panic!("{other:?}"),
    }
}

async fn events(mailer: &mut DurableSubscription, count: usize) -> Vec<(String, u64)> {
    let mut events = Vec::new();
    for _ in 0..count {
        events.push(event(mailer).await);
    }
    events
}

fn one(versions: impl IntoIterator<Item = u64>) -> Vec<(String, u64)> {
    versions.into_iter().map(|version| ("one".to_owned(), version)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_acknowledged_comes_again_and_what_is_does_not() {
    let directory = tempfile::tempdir().unwrap();
    let kuma = start(directory.path()).await;
    pay(&kuma, "one", 6).await;
    let mut consumer = mailer(&kuma).await;
    assert_eq!(events(&mut consumer, 3).await, one(1..=3));
    consumer.ack().await.unwrap();
    assert_eq!(events(&mut consumer, 2).await, one(4..=5));
    consumer.redeliver().await.unwrap();
    assert_eq!(events(&mut consumer, 2).await, one(4..=5));
    drop(consumer);
    let mut consumer = mailer(&kuma).await;
    assert_eq!(events(&mut consumer, 1).await, one(4..=4));
    consumer.ack().await.unwrap();
    drop(consumer);
    kuma.shutdown().await;
    drop(kuma);

    let kuma = start(directory.path()).await;
    let mut consumer = mailer(&kuma).await;
    assert_eq!(events(&mut consumer, 2).await, one(5..=6));
    let status = kuma.durable_subscriptions().await.unwrap().remove(0);
    assert_eq!(
        (status.name.as_str(), status.is_consumed, status.commits_behind, status.parked),
        ("mailer", true, Some(2), 0)
    );
    consumer.ack().await.unwrap();
    assert_eq!(kuma.durable_subscriptions().await.unwrap()[0].commits_behind, Some(0));
    kuma.shutdown().await;
    assert!(matches!(consumer.next().await, Err(DurableError::Subscribe(SubscribeError::ShuttingDown))));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newer_consumer_supersedes_the_one_before_also_while_that_waits() {
    let directory = tempfile::tempdir().unwrap();
    let kuma = start(directory.path()).await;
    pay(&kuma, "one", 2).await;
    let mut first = mailer(&kuma).await;
    assert_eq!(events(&mut first, 2).await, one(1..=2));
    let waiting = tokio::spawn(async move {
        let next = first.next().await;
        (first, next)
    });
    let mut second = mailer(&kuma).await;
    let (mut first, next) = waiting.await.unwrap();
    assert!(matches!(next, Err(DurableError::Superseded { .. })));
    assert!(matches!(first.ack().await, Err(DurableError::Superseded { .. })));
    assert_eq!(events(&mut second, 2).await, one(1..=2));
    second.ack().await.unwrap();
    kuma.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parked_event_lets_the_next_ones_pass_and_comes_again_when_it_is_asked_for() {
    let directory = tempfile::tempdir().unwrap();
    let kuma = start(directory.path()).await;
    pay(&kuma, "one", 4).await;
    let mut consumer = mailer(&kuma).await;
    assert!(matches!(consumer.park("nothing yet").await, Err(DurableError::NothingToPark)));
    event(&mut consumer).await;
    consumer.park("no such address").await.unwrap();
    assert_eq!(events(&mut consumer, 1).await, one(2..=2));
    consumer.ack().await.unwrap();
    let parked = kuma.parked("mailer").await.unwrap();
    assert_eq!((parked.len(), parked[0].version, parked[0].attempts), (1, 1, 1));
    assert_eq!(parked[0].why, "no such address");

    // Again, in vain, and again.
    assert_eq!(consumer.replay_parked().await.unwrap(), 1);
    assert_eq!(events(&mut consumer, 1).await, one(1..=1));
    consumer.park("still not").await.unwrap();
    let parked = kuma.parked("mailer").await.unwrap();
    assert_eq!((parked.len(), parked[0].attempts, parked[0].why.as_str()), (1, 2, "still not"));
    assert_eq!(consumer.replay_parked().await.unwrap(), 1);
    assert_eq!(consumer.replay_parked().await.unwrap(), 0, "it is on its way");
    assert_eq!(events(&mut consumer, 2).await, [("one".to_owned(), 1), ("one".to_owned(), 3)]);
    consumer.ack().await.unwrap();
    assert!(kuma.parked("mailer").await.unwrap().is_empty());
    assert_eq!(events(&mut consumer, 1).await, one(4..=4));
    kuma.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receipt_says_who_has_not_confirmed_until_they_have() {
    let directory = tempfile::tempdir().unwrap();
    let kuma = start(directory.path()).await;
    pay(&kuma, "one", 2).await;
    let mut consumer = mailer(&kuma).await;
    event(&mut consumer).await;
    consumer.park("of the needle").await.unwrap();
    // Nobody consumes it, so that nobody is waited for.
    drop(consumer);
    let receipt = kuma.raw("order", "one").erase(Reason::new("a test")).await.unwrap();
    assert_eq!(receipt.receipt.pending, ["subscription mailer"]);
    assert!(!receipt.is_complete() && kuma.parked("mailer").await.unwrap().is_empty());
    let file = std::fs::read(directory.path().join("subscriptions/mailer.db")).unwrap();
    assert!(!file.windows(13).any(|window| window == b"of the needle"));

    let mut consumer = mailer(&kuma).await;
    let Delivery::Erased(erased) = consumer.next().await.unwrap() else { panic!("it was erased") };
    assert_eq!((erased.receipt, erased.entity.to_hex()), (receipt.receipt.id, receipt.receipt.entity.clone()));
    assert!(matches!(consumer.park("an erasure").await, Err(DurableError::NothingToPark)));
    consumer.ack().await.unwrap();
    let complete = complete(&kuma, &receipt).await;
    complete.verify(&kuma.public_key()).unwrap();
    for receipt in [receipt, complete] {
        let verified = kuma.raw("order", "one").verify_receipt(&receipt).await;
        assert!(verified.is_clean(), "{verified}");
    }
    drop(consumer);
    kuma.shutdown().await;
}

/// The receipt when nobody is pending any more.
async fn complete(kuma: &Kuma, receipt: &Receipt) -> Receipt {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
    loop {
        let now = kuma.receipt(receipt.receipt.id).await.unwrap().unwrap();
        if now.is_complete() {
            return now;
        }
        assert!(std::time::Instant::now() < deadline, "{now}");
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_that_confirms_in_time_is_not_pending() {
    let directory = tempfile::tempdir().unwrap();
    let kuma = start(directory.path()).await;
    pay(&kuma, "one", 1).await;
    let mut consumer = mailer(&kuma).await;
    event(&mut consumer).await;
    let consumed = tokio::spawn(async move {
        let next = consumer.next().await.unwrap();
        assert!(matches!(next, Delivery::Erased(_)));
        consumer.ack().await.unwrap();
        consumer
    });
    let receipt = kuma.raw("order", "one").erase(Reason::new("a test")).await.unwrap();
    assert!(receipt.is_complete(), "{receipt}");
    drop(consumed.await.unwrap());
    // One that nobody consumes is not waited for when it is dropped.
    pay(&kuma, "two", 1).await;
    let receipt = kuma.raw("order", "two").erase(Reason::new("a test")).await.unwrap();
    assert!(!receipt.is_complete());
    kuma.drop_durable_subscription("mailer").await.unwrap();
    assert!(kuma.receipt(receipt.receipt.id).await.unwrap().unwrap().is_complete());
    assert!(matches!(kuma.drop_durable_subscription("mailer").await, Err(DurableError::Unknown { .. })));
    kuma.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subscription_begins_where_it_is_told_once_and_keeps_to_its_events() {
    let directory = tempfile::tempdir().unwrap();
    let kuma = start(directory.path()).await;
    pay(&kuma, "one", 2).await;
    let filter = Filter::event("order", "Paid");
    let open = |start: Start| kuma.durable_subscription("mailer", filter.clone()).from(start).open();
    drop(open(Start::Now).await.unwrap());
    pay(&kuma, "one", 1).await;
    let mut consumer = open(Start::Beginning).await.unwrap();
    assert_eq!(events(&mut consumer, 1).await, one(3..=3));
    let other = kuma.durable_subscription("mailer", Filter::all()).open().await;
    assert!(matches!(other, Err(DurableError::OtherFilter { .. })));
    for name in ["", "Mailer", "../mailer", "mailer/x", &"m".repeat(65)] {
        let refused = kuma.durable_subscription(name, Filter::all()).open().await;
        assert!(matches!(refused, Err(DurableError::Name { .. })), "{name}");
    }
    assert!(matches!(kuma.parked("nobody").await, Err(DurableError::Unknown { .. })));
    kuma.shutdown().await;
}
