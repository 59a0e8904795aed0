//! Code of the user that panics fails its call and its entity, and nothing else.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    time::Duration,
};

use crate::common::{Ledger, assert_clean, directory, entered, until};
use kuma_core::{AppendError, Entity, Kuma, NewEvent, Options, ReadError, Refused, ReplayError, Unavailable, Version};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::json;

/// Makes a kind whose code panics while its switch is on. Each test has a kind of its own, for they run side by side.
macro_rules! faulty_kind {
    ($module:ident, $kind:literal) => {
        // No test turns every switch.
        #[allow(dead_code)]
        mod $module {
            use super::*;

            pub(super) static APPLY: AtomicBool = AtomicBool::new(false);
            pub(super) static CLONE: AtomicBool = AtomicBool::new(false);
            pub(super) static CLONES: AtomicUsize = AtomicUsize::new(0);
            pub(super) static DEFAULT: AtomicBool = AtomicBool::new(false);
            pub(super) static DECODE: AtomicBool = AtomicBool::new(false);
            pub(super) static MEMORY: AtomicBool = AtomicBool::new(false);

            #[derive(Debug, PartialEq, Serialize, Deserialize)]
            pub(super) struct Faulty {
                pub(super) entries: Vec<u64>,
            }

            impl Default for Faulty {
                fn default() -> Self {
                    assert!(!DEFAULT.load(Relaxed), "the default panics, as told");
                    Faulty { entries: Vec::new() }
                }
            }

            impl Clone for Faulty {
                fn clone(&self) -> Self {
                    CLONES.fetch_add(1, Relaxed);
                    assert!(!CLONE.load(Relaxed), "the clone panics, as told");
                    Faulty { entries: self.entries.clone() }
                }
            }

            #[derive(Serialize, Deserialize)]
            pub(super) enum FaultyEvent {
                Good(#[serde(deserialize_with = "decode")] u64),
                /// Panics half-way, with the state changed.
                Bad,
            }

            fn decode<'a, D: Deserializer<'a>>(from: D) -> Result<u64, D::Error> {
                assert!(!DECODE.load(Relaxed), "decoding panics, as told");
                u64::deserialize(from)
            }

            impl Entity for Faulty {
                const KIND: &'static str = $kind;
                type Event = FaultyEvent;

                fn apply(&mut self, event: &FaultyEvent) {
                    assert!(!APPLY.load(Relaxed), "apply panics, as told");
                    match event {
                        FaultyEvent::Good(number) => self.entries.push(*number),
                        FaultyEvent::Bad => {
                            self.entries.push(666);
                            panic!("apply panics, as told");
                        }
                    }
                }

                fn memory_bytes(&self) -> usize {
                    assert!(!MEMORY.load(Relaxed), "the size panics, as told");
                    64
                }
            }
        }
    };
}

/// One shard, so that everyone is a neighbour; a quarantine that a test can outlive.
async fn start(path: &std::path::Path) -> Kuma {
    let options = Options::new(path).shards(1).quarantine(3, Duration::from_secs(60), Duration::from_millis(700));
    Kuma::start(options).await.unwrap()
}

faulty_kind!(on_append, "faulty-append");

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_apply_that_panics_refuses_its_append_and_leaves_the_others_in_flight_alone() {
    use on_append::{Faulty, FaultyEvent};
    let dir = directory();
    let kuma = start(dir.path()).await;
    let faulty = kuma.entity::<Faulty>("f-1");
    let neighbour = kuma.entity::<Ledger>("l-1");
    for round in 0..20 {
        let before = faulty.append(FaultyEvent::Good(2 * round)).submit().await.unwrap();
        let beside = neighbour.append(entered(round)).submit().await.unwrap();
        // All or nothing: the good one in front goes with the bad one.
        let bad = faulty.append_all([FaultyEvent::Good(777), FaultyEvent::Bad]).submit().await.unwrap();
        let after = faulty.append(FaultyEvent::Good(2 * round + 1)).submit().await.unwrap();
        assert!(matches!(bad.await, Err(AppendError::Refused(Refused::ApplyPanicked { .. }))));
        assert_eq!(before.await.unwrap(), Version(2 * round + 1));
        assert_eq!(after.await.unwrap(), Version(2 * round + 2));
        assert_eq!(beside.await.unwrap(), Version(round + 1));
        let state = faulty.read().await.unwrap();
        assert_eq!(state.entries, (0..2 * round + 2).collect::<Vec<_>>());
    }
    assert_eq!(kuma.stats().shards[0].quarantined, 0, "a request's fault is not the entity's");
    assert_eq!(faulty.raw().events(.., usize::MAX).await.unwrap().len(), 40);
    assert_clean(&kuma).await;
    kuma.shutdown().await;
    let kuma = start(dir.path()).await;
    assert_eq!(kuma.entity::<Faulty>("f-1").read().await.unwrap().entries, (0..40).collect::<Vec<_>>());
}

faulty_kind!(on_replay, "faulty-replay");

fn unreadable(error: ReadError) -> ReplayError {
    match error {
        ReadError::Unavailable(Unavailable::Unreadable { cause, .. }) => cause,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_apply_that_panics_on_replay_quarantines_its_entity_for_a_while() {
    use on_replay::{APPLY, Faulty, FaultyEvent};
    let dir = directory();
    let kuma = start(dir.path()).await;
    let faulty = kuma.entity::<Faulty>("f-1");
    faulty.append_all([FaultyEvent::Good(1), FaultyEvent::Good(2)]).await.unwrap();
    faulty.raw().passivate().await.unwrap();
    APPLY.store(true, Relaxed);
    for _ in 0..3 {
        let cause = unreadable(faulty.read().await.unwrap_err());
        assert!(matches!(cause, ReplayError::Panicked { version: Version(1), .. }), "{cause:?}");
    }
    let quarantined = |error: &Unavailable| match error {
        Unavailable::Quarantined { retry_after, why, .. } => {
            assert!(*retry_after <= Duration::from_millis(700) && why.contains("panicked"), "{error}");
        }
        other => panic!("{other:?}"),
    };
    match faulty.read().await {
        Err(ReadError::Unavailable(error)) => quarantined(&error),
        other => panic!("{other:?}"),
    }
    match faulty.append(FaultyEvent::Good(3)).await {
        Err(AppendError::Unavailable(error)) => quarantined(&error),
        other => panic!("{other:?}"),
    }
    assert_eq!(kuma.stats().shards[0].quarantined, 1);
    kuma.entity::<Ledger>("l-1").append(entered(1)).await.unwrap();
    kuma.entity::<Ledger>("l-1").read().await.unwrap();

    APPLY.store(false, Relaxed);
    until("the quarantine is over", async || faulty.read().await.is_ok()).await;
    assert_eq!(faulty.append(FaultyEvent::Good(3)).await.unwrap(), Version(3));
    assert_eq!(faulty.read().await.unwrap().entries, [1, 2, 3]);
    assert_clean(&kuma).await;
}

faulty_kind!(elsewhere, "faulty-elsewhere");

/// Clone, default and decoding are the user's code as well.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn whatever_code_of_the_user_panics_its_caller_gets_a_typed_error_and_the_entity_recovers() {
    use elsewhere::{CLONE, DECODE, DEFAULT, Faulty, FaultyEvent};
    let dir = directory();
    let kuma = start(dir.path()).await;
    let neighbour = kuma.entity::<Ledger>("l-1");
    let switches = [("clone", &CLONE), ("default", &DEFAULT), ("decode", &DECODE)];
    for (version, (name, switch)) in (1..).zip(switches) {
        // An entity of its own: it ends up in quarantine.
        let faulty = kuma.entity::<Faulty>(name);
        for number in 1..=3 {
            faulty.append(FaultyEvent::Good(number)).await.unwrap();
        }
        faulty.raw().passivate().await.unwrap();
        let append = faulty.append(FaultyEvent::Good(4));
        switch.store(true, Relaxed);
        let refused = append.await.unwrap_err();
        assert!(!matches!(refused, AppendError::Unknown { .. }), "{name}: {refused:?}");
        if name != "clone" {
            // A read clones nothing.
            let cause = unreadable(faulty.read().await.unwrap_err());
            assert!(matches!(cause, ReplayError::Panicked { .. }), "{name}: {cause:?}");
        }
        assert_eq!(faulty.raw().events(.., usize::MAX).await.unwrap().len(), 3, "{name}: they are still listed");
        assert_eq!(neighbour.append(entered(version)).await.unwrap(), Version(version), "beside {name}");
        switch.store(false, Relaxed);
        until("the quarantine is over", async || faulty.read().await.is_ok()).await;
        assert_eq!(faulty.read().await.unwrap().entries, [1, 2, 3], "{name}");
        assert_eq!(faulty.append(FaultyEvent::Good(4)).await.unwrap(), Version(4), "{name}");
    }
    assert_clean(&kuma).await;
}

faulty_kind!(on_publish, "faulty-publish");

/// A reader still holds the state before, so that publishing the next one has to clone; but it is stored already.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_clone_that_panics_after_the_commit_does_not_deny_the_commit() {
    use on_publish::{CLONE, Faulty, FaultyEvent};
    let dir = directory();
    let kuma = start(dir.path()).await;
    let faulty = kuma.entity::<Faulty>("f-1");
    faulty.append(FaultyEvent::Good(1)).await.unwrap();
    let held = faulty.read().await.unwrap();
    let pending = faulty.append(FaultyEvent::Good(2)).submit().await.unwrap();
    assert_eq!(pending.await.unwrap(), Version(2));
    CLONE.store(true, Relaxed);
    // Replayed from the disk, which clones nothing.
    assert_eq!(faulty.read().await.unwrap().entries, [1, 2]);
    assert_eq!(held.entries, [1]);
    CLONE.store(false, Relaxed);
    assert_eq!(faulty.append(FaultyEvent::Good(3)).await.unwrap(), Version(3));
    assert_clean(&kuma).await;
}

faulty_kind!(on_late_publish, "faulty-late-publish");

/// The same where nobody uses the entity after the burst, so that it publishes by itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_clone_that_panics_when_an_entity_publishes_by_itself_leaves_it_readable() {
    use on_late_publish::{CLONE, CLONES, Faulty, FaultyEvent};
    let dir = directory();
    // It looks after its entities every 100 ms.
    let kuma = Kuma::start(Options::new(dir.path()).shards(1).idle_timeout(Duration::from_millis(400))).await.unwrap();
    for round in 0..5 {
        let faulty = kuma.entity::<Faulty>(format!("f-{round}"));
        faulty.append(FaultyEvent::Good(1)).await.unwrap();
        let held = faulty.read().await.unwrap();
        assert_eq!(faulty.append(FaultyEvent::Good(2)).await.unwrap(), Version(2));
        let clones = CLONES.load(Relaxed);
        CLONE.store(true, Relaxed);
        until("it publishes, or leaves", async || CLONES.load(Relaxed) > clones || kuma.stats().live_entities() == 0)
            .await;
        CLONE.store(false, Relaxed);
        for _ in 0..3 {
            assert_eq!(faulty.read().await.unwrap().entries, [1, 2], "round {round}");
        }
        assert_eq!(held.entries, [1]);
        assert_eq!(faulty.append(FaultyEvent::Good(3)).await.unwrap(), Version(3));
    }
    assert_clean(&kuma).await;
}

faulty_kind!(on_sizing, "faulty-size");

#[tokio::test]
async fn a_size_that_panics_costs_nobody_a_call() {
    use on_sizing::{Faulty, FaultyEvent, MEMORY};
    let dir = directory();
    let kuma = start(dir.path()).await;
    MEMORY.store(true, Relaxed);
    let faulty = kuma.entity::<Faulty>("f-1");
    for number in 1..=130 {
        assert_eq!(faulty.append(FaultyEvent::Good(number)).await.unwrap(), Version(number));
    }
    faulty.raw().passivate().await.unwrap();
    assert_eq!(faulty.read().await.unwrap().entries.len(), 130);
}

/// The kind as the next release of a service has it: one variant is gone.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Shrunk;

#[derive(Serialize, Deserialize)]
enum ShrunkEvent {
    Renamed { to: String },
}

impl Entity for Shrunk {
    const KIND: &'static str = "shrunk";
    type Event = ShrunkEvent;
    fn apply(&mut self, event: &ShrunkEvent) {
        let ShrunkEvent::Renamed { .. } = event;
    }
}

#[tokio::test]
async fn an_event_that_its_kind_no_longer_knows_is_named_and_kept() {
    let dir = directory();
    let kuma = start(dir.path()).await;
    // The release before, which knew two.
    let before = kuma.raw("shrunk", "s-1");
    before.append(NewEvent::json("Renamed", &json!({ "to": "a" })).unwrap()).await.unwrap();
    before.append(NewEvent::json("Moved", &json!({ "to": "b" })).unwrap()).await.unwrap();
    drop(before);
    kuma.shutdown().await;
    drop(kuma);

    let kuma = start(dir.path()).await;
    let shrunk = kuma.entity::<Shrunk>("s-1");
    let cause = unreadable(shrunk.read().await.unwrap_err());
    insta::assert_snapshot!(cause, @"event Moved of kind shrunk at version 2 cannot be read (unknown variant `Moved`, expected `Renamed`); nothing is lost, use a version of the kind that knows it");
    assert!(
        matches!(&cause, ReplayError::Undecodable { kind, event, version: Version(2), .. } if kind == "shrunk" && event == "Moved")
    );
    let refused = shrunk.append(ShrunkEvent::Renamed { to: "c".into() }).await.unwrap_err();
    assert!(refused.is_retry_safe(), "{refused:?}");
    // Nothing is lost, and what cannot be folded can be listed.
    assert_clean(&kuma).await;
    let events = shrunk.raw().events(.., usize::MAX).await.unwrap();
    let names: Vec<&str> = events.iter().map(|event| event.name.as_str()).collect();
    assert_eq!(names, ["Renamed", "Moved"]);
    kuma.shutdown().await;
}
