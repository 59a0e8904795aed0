//! Slots move between two stores with all that they have, by the very steps of a handoff, without anything between them but this test.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::{path::Path, sync::Arc, time::Duration};

use crate::{common::directory, nodes::soon};
use futures_util::future::BoxFuture;
use integration_tests::options;
use kuma_core::{
    Elsewhere, Epoch, ErasedLife, Gate, Kuma, NewEvent, OtherDisks, ReadBack, ReadError, Reason, Seat, Slot,
    SlotRecord, Slots, Staged, Token, ToldReceipt, TransferId, Txn, Unavailable, Version, slot_of,
};
use serde_json::json;

const ENTITIES: u64 = 60;

fn event(number: u64) -> NewEvent {
    NewEvent::json("Noted", &json!({ "n": number })).unwrap()
}

/// The other disks, asked without anything between.
struct Others(Vec<Slots>);

impl OtherDisks for Others {
    fn are_up(&self) -> bool {
        true
    }

    fn shred(&self, lives: Vec<ErasedLife>) -> BoxFuture<'_, Vec<Elsewhere>> {
        Box::pin(async move {
            for other in &self.0 {
                other.shred(&lives).await.unwrap();
            }
            lives.iter().map(|_| Elsewhere::Ended { nodes: vec![], without: vec![], receipt: None }).collect()
        })
    }

    fn tell(&self, _: Vec<ToldReceipt>) {}
}

async fn founder(path: &Path) -> Kuma {
    Kuma::start(options(path).clustered(Seat::Founder, None)).await.unwrap()
}

async fn joiner(path: &Path, founder: &Kuma) -> Kuma {
    let kuma = Kuma::start(options(path).clustered(Seat::Joiner, Some(founder.slots().id_secret()))).await.unwrap();
    // As the registry does it: who owns nothing lets nobody in.
    for (slot, _) in kuma.slots().records() {
        kuma.slots().set_gate(slot, Gate::Closed);
    }
    kuma
}

fn id(number: u64) -> String {
    format!("person-{number}")
}

fn next(epoch: Epoch) -> Epoch {
    Epoch { counter: epoch.counter + 1, ..epoch }
}

/// Hands a slot over, and collects what is left of it; `meanwhile` runs when most of it is copied.
async fn hand_over(from: &Kuma, to: &Kuma, slot: Slot, meanwhile: impl AsyncFnOnce()) {
    give(from, to, slot, meanwhile).await;
    from.slots().collect_departed().await.unwrap();
}

async fn give(from: &Kuma, to: &Kuma, slot: Slot, meanwhile: impl AsyncFnOnce()) {
    let (giver, receiver, transfer) = (from.slots(), to.slots(), TransferId::generate().unwrap());
    let mut copy = giver.copy(slot).await.unwrap();
    while let Some(chunk) = copy.next().await.unwrap() {
        receiver.receive(slot, transfer, chunk).await.unwrap();
    }
    let read = receiver.read_back(slot, transfer, ReadBack::default()).await.unwrap();
    meanwhile().await;
    let content = giver.seal(slot).await.unwrap();
    assert!(!copy.is_stale());
    while let Some(chunk) = copy.next().await.unwrap() {
        receiver.receive(slot, transfer, chunk).await.unwrap();
    }
    if let Some(rest) = copy.rest().await.unwrap() {
        receiver.receive(slot, transfer, rest).await.unwrap();
    }
    let read = receiver.read_back(slot, transfer, read).await.unwrap();
    assert_eq!(read.content, content);
    let old = giver.record(slot).unwrap().owned().unwrap();
    let epoch = next(old);
    let staged = Staged { transfer, epoch, from: giver.disk_id(), content };
    receiver.change(slot, Txn::Stage(staged)).await.unwrap();
    let release = Txn::Release { from: old, epoch, to: receiver.disk_id(), transfer, sealed: Some(content) };
    giver.change(slot, release).await.unwrap();
    giver.set_gate(slot, Gate::Closed);
    receiver.change(slot, Txn::Take { transfer, epoch }).await.unwrap();
    receiver.set_gate(slot, Gate::Open);
    giver.change(slot, Txn::ConfirmTaken { transfer }).await.unwrap();
}

async fn append(kuma: &Kuma, number: u64, key: &str) -> Result<Version, kuma_core::AppendError> {
    kuma.raw("person", id(number)).append(event(number)).idempotency_key(key).await
}

fn slot(number: u64) -> Slot {
    slot_of("person", &id(number))
}

fn is_elsewhere<T>(result: &Result<T, ReadError>) -> bool {
    matches!(result, Err(ReadError::Unavailable(Unavailable::SlotElsewhere { .. })))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slots_move_with_events_keys_ids_and_retries_and_come_back() {
    let (one, two) = (directory(), directory());
    let from = founder(one.path()).await;
    let to = joiner(two.path(), &from).await;
    from.slots().index().await.unwrap();
    for number in 0..ENTITIES {
        for round in 0..5 {
            append(&from, number, &format!("first-{round}")).await.unwrap();
        }
    }
    from.slots().set_other_disks(Arc::new(Others(vec![])));
    let erased = from.raw("person", id(3));
    erased.erase(kuma_core::Reason::new("asked for it")).await.unwrap();
    erased.recreate(kuma_core::Reason::new("came back")).await.unwrap();

    for round in 0..2 {
        let (from, to) = if round == 0 { (&from, &to) } else { (&to, &from) };
        let mut slots: Vec<Slot> = (0..ENTITIES).map(slot).collect();
        slots.sort_unstable();
        slots.dedup();
        for slot in &slots {
            let of_slot: Vec<u64> =
                (0..ENTITIES).filter(|number| self::slot(*number) == *slot && *number != 3).collect();
            hand_over(from, to, *slot, async || {
                for number in &of_slot {
                    append(from, *number, &format!("meanwhile-{round}")).await.unwrap();
                }
            })
            .await;
            for number in of_slot {
                assert!(is_elsewhere(&from.raw("person", id(number)).read().await));
                let elsewhere = append(from, number, "late").await;
                assert!(matches!(
                    elsewhere,
                    Err(kuma_core::AppendError::Unavailable(Unavailable::SlotElsewhere { .. }))
                ));
                // What was asked before the move is not done again after it.
                let before = Version(6 + round);
                assert_eq!(append(to, number, &format!("meanwhile-{round}")).await.unwrap(), before);
                assert_eq!(append(to, number, "first-2").await.unwrap(), Version(3));
                let (state, version) = to.raw("person", id(number)).read().await.unwrap();
                assert_eq!((state, version), (json!({ "n": number }), before));
            }
        }
        // A new life that has no events yet comes along.
        let (_, version) = to.raw("person", id(3)).read().await.unwrap();
        assert_eq!(version, Version(0));
    }
    append(&from, 3, "anew").await.unwrap();
    for kuma in [&from, &to] {
        let verification = kuma.verify(|_| ()).await.unwrap();
        assert!(verification.is_clean(), "{verification:?}");
    }
    // What is left of them is nobody's: neither name nor key.
    let records = to.slots().records();
    assert!(
        records
            .iter()
            .all(|(_, SlotRecord { token, .. })| matches!(token, Token::None | Token::Released { is_taken: true, .. }))
    );
    from.shutdown().await;
    to.shutdown().await;
    let to = Kuma::start(options(two.path()).clustered(Seat::Joiner, None)).await.unwrap();
    assert!(to.verify(|_| ()).await.unwrap().is_clean());
    to.shutdown().await;
}

/// Its rows of before are still there, and look like those of erased entities.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_is_back_before_what_it_left_was_collected_is_not_taken_for_damaged_by_the_scrub() {
    let (one, two) = (directory(), directory());
    let from = founder(one.path()).await;
    let to = joiner(two.path(), &from).await;
    from.slots().index().await.unwrap();
    append(&from, 1, "before").await.unwrap();
    give(&from, &to, slot(1), async || ()).await;
    give(&to, &from, slot(1), async || ()).await;
    from.shutdown().await;
    let from = Kuma::start(options(one.path()).clustered(Seat::Joiner, None)).await.unwrap();
    let scrubbed = async {
        // The commit is there twice, as it was and as it came back.
        while from.stats().scrub.passes == 0 || from.stats().scrub.commits < 2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), scrubbed).await.unwrap();
    assert_eq!(from.stats().scrub.bad_rows, 0);
    assert_eq!(append(&from, 1, "after").await.unwrap(), Version(2));
    for kuma in [from, to] {
        assert!(kuma.verify(|_| ()).await.unwrap().is_clean());
        kuma.shutdown().await;
    }
}

/// Appends that are on their way when the slot is sealed are part of it, or refused and not done.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_acknowledged_while_a_slot_is_sealed_moves_with_it() {
    let (one, two) = (directory(), directory());
    let from = founder(one.path()).await;
    let to = joiner(two.path(), &from).await;
    for round in 0..8 {
        let (from, to) = if round % 2 == 0 { (&from, &to) } else { (&to, &from) };
        let handle = from.raw("person", id(1));
        let writer = tokio::spawn(async move {
            let mut last = Version(0);
            loop {
                // Some hundred in all: each round replays them.
                tokio::time::sleep(Duration::from_micros(500)).await;
                match handle.append(event(1)).await {
                    Ok(version) => last = version,
                    Err(kuma_core::AppendError::Unavailable(
                        Unavailable::SlotMoves { .. }
                        | Unavailable::SlotElsewhere { .. }
                        | Unavailable::Interrupted { .. },
                    )) => return last,
                    Err(other) => panic!("{other}"),
                }
            }
        });
        let before = from.raw("person", id(1)).read().await.unwrap().1;
        hand_over(from, to, slot(1), async || {
            while from.raw("person", id(1)).read().await.unwrap().1 < Version(before.0 + 20) {
                tokio::task::yield_now().await;
            }
        })
        .await;
        let last = writer.await.unwrap();
        assert_eq!(to.raw("person", id(1)).read().await.unwrap().1, last);
    }
    for kuma in [&from, &to] {
        assert!(kuma.verify(|_| ()).await.unwrap().is_clean());
        kuma.shutdown().await;
    }
}

/// A transfer that comes to nothing leaves nothing, and takes nothing along that another one needs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transfer_that_is_given_up_leaves_no_key() {
    let (one, two) = (directory(), directory());
    let from = founder(one.path()).await;
    let to = joiner(two.path(), &from).await;
    append(&from, 1, "key").await.unwrap();
    let (slot, giver, receiver) = (slot(1), from.slots(), to.slots());
    let transfers = [TransferId([1; 16]), TransferId([2; 16])];
    for transfer in transfers {
        let mut copy = giver.copy(slot).await.unwrap();
        while let Some(chunk) = copy.next().await.unwrap() {
            receiver.receive(slot, transfer, chunk).await.unwrap();
        }
    }
    assert_eq!(receiver.leftovers().await.unwrap().len(), 2);
    assert_eq!(keys(&to).await, 1);
    receiver.drop_transfer(slot, transfers[0]).await.unwrap();
    assert_eq!(keys(&to).await, 1, "the other transfer needs it");
    receiver.drop_transfer(slot, transfers[1]).await.unwrap();
    assert_eq!(keys(&to).await, 0);
    assert!(receiver.leftovers().await.unwrap().is_empty());
    hand_over(&from, &to, slot, async || {}).await;
    assert_eq!(append(&to, 1, "key").await.unwrap(), Version(1));
    tokio::time::timeout(Duration::from_secs(60), from.shutdown()).await.unwrap();
    to.shutdown().await;
}

async fn keys(kuma: &Kuma) -> u64 {
    kuma.verify(|_| ()).await.unwrap().keys
}

/// What came ahead, what is prepared, and what was given away and is not taken away yet: none of them keeps a key that is destroyed, nor brings it back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_erasure_reaches_the_key_in_every_copy_and_a_late_piece_does_not_bring_it_back() {
    let (one, two) = (directory(), directory());
    let from = founder(one.path()).await;
    let to = joiner(two.path(), &from).await;
    from.slots().set_other_disks(Arc::new(Others(vec![to.slots()])));
    to.slots().set_other_disks(Arc::new(Others(vec![from.slots()])));
    append(&from, 1, "key").await.unwrap();
    let (slot, giver, receiver) = (slot(1), from.slots(), to.slots());
    let transfer = TransferId([1; 16]);
    let mut pieces = Vec::new();
    let mut copy = giver.copy(slot).await.unwrap();
    while let Some(piece) = copy.next().await.unwrap() {
        receiver.receive(slot, transfer, piece.clone()).await.unwrap();
        pieces.push(piece);
    }
    assert_eq!((keys(&from).await, keys(&to).await), (1, 1));
    let receipt = from.raw("person", id(1)).erase(Reason::new("asked for it")).await.unwrap();
    assert!(copy.is_stale());
    assert_eq!((keys(&from).await, keys(&to).await), (0, 0), "what came ahead");
    for piece in pieces {
        receiver.receive(slot, transfer, piece).await.unwrap();
    }
    assert_eq!(keys(&to).await, 0, "a piece from before is late");
    receiver.drop_transfer(slot, transfer).await.unwrap();

    // A new life, which is given away: its former owner has the key until what it gave away is taken away.
    assert_eq!(from.raw("person", id(1)).recreate(Reason::new("came back")).await.unwrap(), 2);
    append(&from, 1, "key").await.unwrap();
    let transfer = TransferId([2; 16]);
    let mut copy = giver.copy(slot).await.unwrap();
    while let Some(piece) = copy.next().await.unwrap() {
        receiver.receive(slot, transfer, piece).await.unwrap();
    }
    let content = giver.seal(slot).await.unwrap();
    let elsewhere = from.raw("person", id(1)).erase(Reason::new("in between")).await;
    assert!(elsewhere.unwrap_err().to_string().contains("is moving to another node"));
    let old = giver.record(slot).unwrap().owned().unwrap();
    let epoch = next(old);
    let staged = Staged { transfer, epoch, from: giver.disk_id(), content };
    receiver.change(slot, Txn::Stage(staged)).await.unwrap();
    let release = Txn::Release { from: old, epoch, to: receiver.disk_id(), transfer, sealed: Some(content) };
    giver.change(slot, release).await.unwrap();
    giver.set_gate(slot, Gate::Closed);
    receiver.change(slot, Txn::Take { transfer, epoch }).await.unwrap();
    receiver.take_over(slot);
    receiver.set_gate(slot, Gate::Open);
    assert_eq!((keys(&from).await, keys(&to).await), (1, 1));
    assert_eq!(to.receipt(receipt.receipt.id).await.unwrap(), Some(receipt), "it has come along");
    soon("the erasure that ended elsewhere is owed by nobody", async || to.erasures_unfinished() == 0).await;
    to.raw("person", id(1)).erase(Reason::new("asked for it again")).await.unwrap();
    assert_eq!((keys(&from).await, keys(&to).await), (0, 0), "what was given away");
    giver.change(slot, Txn::ConfirmTaken { transfer }).await.unwrap();
    giver.collect_departed().await.unwrap();
    for kuma in [&from, &to] {
        let verification = kuma.verify(|_| ()).await.unwrap();
        assert!(verification.is_clean(), "{verification:?}");
        kuma.shutdown().await;
    }
}
