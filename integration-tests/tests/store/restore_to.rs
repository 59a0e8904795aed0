//! One entity is restored to an earlier version: a new life that begins with the first events of the one before.

#![allow(clippy::unwrap_used, clippy::panic)]

use crate::common;
use crate::common::{Account, AccountEvent, assert_clean, deposited, directory};
use kuma_core::{AppendError, EraseError, Kuma, Metadata, Options, ReadError, Reason, Refused, Unavailable, Version};

fn reason() -> Reason {
    Reason::new("ticket 12").by("support")
}

async fn start(path: &std::path::Path) -> Kuma {
    common::start(path, 2).await
}

#[tokio::test]
async fn an_entity_has_its_first_events_again_and_the_rest_is_erased() {
    let dir = directory();
    let kuma = start(dir.path()).await;
    let ann = kuma.entity::<Account>("ann");
    ann.append(deposited(10))
        .metadata(Metadata { correlation: Some("till 3".into()), ..Metadata::default() })
        .idempotency_key("one")
        .await
        .unwrap();
    ann.append_all([deposited(20), deposited(30)]).await.unwrap();
    ann.append(AccountEvent::Withdrawn { amount: 60 }).await.unwrap();
    let before = ann.raw().events(..=3, 10).await.unwrap();

    // Not what can be.
    let within = ann.restore_to(Version(2), reason()).await.unwrap_err();
    let EraseError::Refused(Refused::WithinCommit { first: Version(2), last: Version(3), .. }) = within else {
        panic!("{within:?}")
    };
    for version in [Version(0), Version(5)] {
        let refused = ann.restore_to(version, reason()).await;
        assert!(matches!(refused, Err(EraseError::Refused(Refused::NoSuchVersion { .. }))), "{refused:?}");
    }
    assert_eq!(ann.read().await.unwrap().version(), Version(4), "it is as it was");

    let restored = ann.restore_to(Version(3), reason()).await.unwrap();
    assert_eq!((restored.life, restored.version), (2, Version(3)));
    restored.receipt.verify(&kuma.public_key()).unwrap();
    assert_eq!(restored.receipt.receipt.life, Some(1));
    assert_eq!(restored.receipt.receipt.stores.iter().map(|store| store.events).sum::<u64>(), 4);
    let mut kuma = kuma;
    for round in 0..2 {
        let ann = kuma.entity::<Account>("ann");
        let now = ann.read().await.unwrap();
        assert_eq!((now.balance, now.version()), (60 + round, Version(3 + round as u64)));
        assert_eq!(ann.raw().events(..=3, 10).await.unwrap(), before, "events, metadata and times");
        assert_eq!(ann.at_version(Version(1)).await.unwrap().balance, 10);
        ann.append(deposited(1)).await.unwrap();
        assert!(ann.verify_receipt(&restored.receipt).await.is_clean());
        assert_clean(&kuma).await;
        kuma.shutdown().await;
        kuma = start(dir.path()).await;
    }
    // The former life's keys are forgotten; the new life's are not.
    let ann = kuma.entity::<Account>("ann");
    ann.append(deposited(5)).idempotency_key("one").await.unwrap();
    assert_eq!(ann.read().await.unwrap().balance, 67);
    let log = kuma.audit_log().read().await.unwrap();
    assert_eq!((log.restored, log.requested, log.completed), (1, 0, 1));

    ann.erase(reason()).await.unwrap();
    let refused = ann.restore_to(Version(1), reason()).await;
    assert!(matches!(refused, Err(EraseError::Refused(Refused::Erased { .. }))), "{refused:?}");
    kuma.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_comes_beside_a_restoration_is_answered_and_nothing_acknowledged_after_it_is_lost() {
    let dir = directory();
    let kuma = Kuma::start(Options::new(dir.path()).shards(1).snapshot_every(16, 1 << 20)).await.unwrap();
    let ann = kuma.entity::<Account>("ann");
    for _ in 0..50 {
        ann.append(deposited(1)).await.unwrap();
    }
    let writer = tokio::spawn({
        let ann = ann.clone();
        async move {
            let mut versions = Vec::new();
            while versions.len() < 400 {
                match ann.append(deposited(1)).await {
                    Ok(version) => versions.push(version.0),
                    Err(AppendError::Unavailable(Unavailable::BeingRestored { .. })) => {}
                    // Sent to the life before.
                    Err(AppendError::Refused(Refused::Erased { .. })) => {}
                    Err(other) => panic!("{other:?}"),
                }
                match ann.read().await {
                    Ok(state) => assert_eq!(state.balance as u64, state.version().0),
                    Err(ReadError::Unavailable(Unavailable::BeingRestored { .. })) => {}
                    Err(other) => panic!("{other:?}"),
                }
            }
            versions
        }
    });
    for round in 1..=5 {
        let restored = ann.restore_to(Version(20), reason()).await.unwrap();
        assert_eq!(restored.life, round + 1);
    }
    let versions = writer.await.unwrap();
    // Each time that it falls back, it falls back to 20, and is dense from there on.
    let falls = versions.windows(2).filter(|pair| pair[1] != pair[0] + 1).count();
    assert!(versions.windows(2).all(|pair| pair[1] == pair[0] + 1 || pair[1] == 21), "{versions:?}");
    assert!(falls <= 5);
    let now = ann.read().await.unwrap();
    assert_eq!((now.balance as u64, now.version().0), (*versions.last().unwrap(), *versions.last().unwrap()));
    assert_clean(&kuma).await;
    kuma.shutdown().await;
}

/// Killed at each step. There is always one life, whole: the former one as it was, or the next one, and then the former one is erased.
#[tokio::test]
async fn a_crash_leaves_the_life_before_or_the_one_after() {
    let places = [
        "restore.intended",
        "restore.replaced",
        "erase.entombed",
        "erase.keys_destroyed",
        "erase.keys_cut",
        "erase.rows_erased",
        "erase.logs_cut",
        "erase.attested",
        "erase.finished",
    ];
    for place in places {
        let dir = directory();
        let child = std::process::Command::new(env!("CARGO_BIN_EXE_restore_to_child"))
            .args([dir.path().as_os_str(), place.as_ref()])
            .stderr(std::process::Stdio::null())
            .status()
            .unwrap();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&child), Some(9), "{place}: {child}");
        for _ in 0..2 {
            let kuma = Kuma::start(integration_tests::options(dir.path())).await.unwrap();
            common::until("what was begun is done", async || kuma.erasures_unfinished() == 0).await;
            let ann = kuma.entity::<integration_tests::Probe>("ann");
            let version = ann.read().await.unwrap().version();
            assert_eq!(version, Version(if place == "restore.intended" { 8 } else { 4 }), "{place}");
            assert_eq!(ann.raw().events(.., 99).await.unwrap().len() as u64, version.0);
            let log = kuma.audit_log().read().await.unwrap();
            assert_eq!((log.restored, log.completed), (1, u64::from(place != "restore.intended")), "{place}");
            assert_clean(&kuma).await;
            kuma.shutdown().await;
        }
        let kuma = Kuma::start(integration_tests::options(dir.path())).await.unwrap();
        let ann = kuma.entity::<integration_tests::Probe>("ann");
        ann.restore_to(Version(2), reason()).await.unwrap();
        assert_eq!(ann.read().await.unwrap().version(), Version(2), "{place}: and once more");
        kuma.shutdown().await;
    }
}
