//! Promise 5: erased is erased.

#![allow(clippy::unwrap_used, clippy::panic)]

use crate::common;
use crate::common::{Account, AccountEvent, assert_clean, deposited, directory, withdraw};
use futures_util::future::join_all;
use kuma_core::{AppendError, AuditEvent, EraseError, Kuma, Options, ReadError, Reason, Refused, Version};

fn reason() -> Reason {
    Reason::new("request 4711").by("support")
}

async fn start(path: &std::path::Path) -> Kuma {
    common::start(path, 2).await
}

#[tokio::test]
async fn an_erased_entity_is_gone_and_its_receipt_says_so() {
    let dir = directory();
    let kuma = start(dir.path()).await;
    let (ann, bob) = (kuma.entity::<Account>("ann"), kuma.entity::<Account>("bob"));
    for _ in 0..3 {
        ann.append(deposited(10)).idempotency_key("once").await.unwrap();
        ann.append(deposited(10)).await.unwrap();
        bob.append(deposited(7)).await.unwrap();
    }
    let receipt = ann.erase(reason()).await.unwrap();
    receipt.verify(&kuma.public_key()).unwrap();
    let statement = &receipt.receipt;
    assert_eq!((statement.kind.as_deref(), statement.life, statement.resumed), (Some("account"), Some(1), false));
    assert_eq!(statement.stores.iter().map(|store| store.commits).sum::<u64>(), 4);
    assert_eq!(kuma.receipt(statement.id).await.unwrap(), Some(receipt.clone()));

    let mut kuma = kuma;
    for _ in 0..2 {
        let (ann, bob) = (kuma.entity::<Account>("ann"), kuma.entity::<Account>("bob"));
        let erased = ann.read().await.map(|_| ()).unwrap_err();
        assert!(matches!(erased, ReadError::Refused(Refused::Erased { .. })), "{erased:?}");
        let erased = ann.append(deposited(1)).await.unwrap_err();
        assert!(matches!(erased, AppendError::Refused(Refused::Erased { .. })), "{erased:?}");
        assert!(ann.execute(withdraw(1)).await.is_err());
        let erased = ann.raw().events(.., 10).await.unwrap_err();
        assert!(matches!(erased, ReadError::Refused(Refused::Erased { .. })), "{erased:?}");
        assert!(ann.at_version(Version(1)).await.is_err());
        assert!(ann.outcome("once").await.is_err());
        assert_eq!(ann.erase(reason()).await.unwrap(), receipt, "the same receipt again");
        assert_eq!(bob.read().await.unwrap().balance, 21);
        assert_clean(&kuma).await;
        assert_eq!(kuma.erasures_unfinished(), 0);
        kuma.shutdown().await;
        kuma = start(dir.path()).await;
    }
    let log = kuma.audit_log();
    let state = log.read().await.unwrap();
    assert_eq!((state.requested, state.completed, state.recreated), (1, 1, 0));
    let events = log.raw().events(.., 10).await.unwrap();
    let asked = events[0].decode::<kuma_core::AuditLog>().unwrap();
    let AuditEvent::ErasureRequested { entity, why, by, receipt: id } = asked else { panic!("{asked:?}") };
    assert_eq!((entity, why, by), (statement.entity.clone(), "request 4711".to_owned(), Some("support".to_owned())));
    assert_eq!(id, statement.id);
    kuma.shutdown().await;
}

/// A request of an erasure may come late, or twice, through whatever stands between a client and a server.
#[tokio::test]
async fn an_erasure_of_a_former_life_leaves_the_next_one_alone() {
    let dir = directory();
    let kuma = start(dir.path()).await;
    let ann = kuma.entity::<Account>("ann");
    assert!(matches!(ann.erase_life(1, reason()).await, Err(EraseError::Refused(Refused::NeverWritten { .. }))));
    ann.append(deposited(10)).await.unwrap();
    let other = ann.erase_life(2, reason()).await;
    assert!(matches!(other, Err(EraseError::Refused(Refused::OtherLife { asked: 2, actual: 1, .. }))), "{other:?}");
    let first = ann.erase_life(1, reason()).await.unwrap();
    assert_eq!(ann.erase_life(1, reason()).await.unwrap(), first);
    assert_eq!(ann.recreate(reason()).await.unwrap(), 2);
    ann.append(deposited(7)).await.unwrap();
    // The late one is told of what it has done.
    assert_eq!(ann.erase_life(1, reason()).await.unwrap(), first);
    assert_eq!(ann.read().await.unwrap().balance, 7);
    let second = ann.erase_life(2, reason()).await.unwrap();
    assert_eq!((first.receipt.life, second.receipt.life), (Some(1), Some(2)));
    assert_eq!(ann.erase_life(1, reason()).await.unwrap(), first);
    assert_clean(&kuma).await;
    kuma.shutdown().await;
}

#[tokio::test]
async fn a_new_life_starts_at_version_0_with_nothing_of_the_old_one() {
    let dir = directory();
    let kuma = start(dir.path()).await;
    let ann = kuma.entity::<Account>("ann");
    assert!(matches!(ann.erase(reason()).await, Err(EraseError::Refused(Refused::NeverWritten { .. }))));
    assert!(matches!(ann.recreate(reason()).await, Err(EraseError::Refused(Refused::NotErased { .. }))));
    ann.append(deposited(10)).idempotency_key("key").await.unwrap();
    assert!(matches!(ann.recreate(reason()).await, Err(EraseError::Refused(Refused::NotErased { .. }))));
    let first = ann.erase(reason()).await.unwrap();
    let lives = join_all((0..4).map(|_| ann.recreate(reason()))).await;
    assert!(lives.iter().any(|life| matches!(life, Ok(2))), "{lives:?}");
    assert!(
        lives.iter().all(|life| matches!(life, Ok(2) | Err(EraseError::Refused(Refused::NotErased { .. })))),
        "{lives:?}"
    );
    assert_eq!((ann.read().await.unwrap().balance, ann.read().await.unwrap().version()), (0, Version(0)));
    kuma.shutdown().await;

    let kuma = start(dir.path()).await;
    let ann = kuma.entity::<Account>("ann");
    let version = ann.append(deposited(5)).idempotency_key("key").expecting(Version(0)).await.unwrap();
    assert_eq!((version, ann.read().await.unwrap().balance), (Version(1), 5));
    let second = ann.erase(reason()).await.unwrap();
    assert_eq!(second.receipt.life, Some(2));
    assert_ne!((second.receipt.key.as_str(), second.receipt.id), (first.receipt.key.as_str(), first.receipt.id));
    assert_clean(&kuma).await;
    kuma.shutdown().await;
}

#[tokio::test]
async fn the_audit_log_is_the_stores_own() {
    let dir = directory();
    let kuma = start(dir.path()).await;
    let log = kuma.audit_log();
    let refused = log.append(AuditEvent::ErasureCompleted { receipt: kuma_core::ReceiptId([0; 16]) }).await;
    assert!(matches!(refused, Err(AppendError::Refused(Refused::ReservedKind { .. }))));
    assert!(matches!(log.erase(reason()).await, Err(EraseError::Refused(Refused::ReservedKind { .. }))));
    for bad in [Reason::new(""), Reason::new("x".repeat(1025)), Reason::new("why").by("")] {
        let refused = kuma.entity::<Account>("ann").erase(bad).await;
        assert!(matches!(refused, Err(EraseError::Refused(Refused::InvalidReason { .. }))));
    }
    kuma.shutdown().await;
}

/// Appends, reads and activations go on while their entities are erased. Each is answered, and after the receipt only with `Erased`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_comes_beside_an_erasure_is_answered_and_leaves_nothing() {
    let dir = directory();
    let kuma = start(dir.path()).await;
    let ids: Vec<String> = (0..40).map(|number| format!("entity-{number}")).collect();
    for id in &ids {
        kuma.entity::<Account>(id).append(deposited(1)).await.unwrap();
    }
    let writers = ids.iter().map(|id| {
        let account = kuma.entity::<Account>(id);
        tokio::spawn(async move {
            let mut written = 0;
            loop {
                match account.append_all([deposited(1), AccountEvent::Withdrawn { amount: 1 }]).await {
                    Ok(_) => written += 1,
                    Err(AppendError::Refused(Refused::Erased { .. })) => return written,
                    Err(other) => panic!("{other:?}"),
                }
                match account.read().await {
                    Ok(state) => assert_eq!(state.balance, 1),
                    Err(ReadError::Refused(Refused::Erased { .. })) => {}
                    Err(other) => panic!("{other:?}"),
                }
            }
        })
    });
    let writers: Vec<_> = writers.collect();
    let handles = ids.iter().map(|id| kuma.raw("account", id));
    let mut receipts = 0;
    let done = kuma.erase_many(handles, reason(), |_, outcome| receipts += u64::from(outcome.is_ok())).await.unwrap();
    assert_eq!((done.erased, done.never_written, done.failed, receipts), (40, 0, 0, 40));
    for writer in writers {
        writer.await.unwrap();
    }
    for id in &ids {
        assert!(kuma.entity::<Account>(id).read().await.is_err());
    }
    assert_clean(&kuma).await;
    kuma.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_receipt_is_verified_against_the_live_files() {
    let dir = directory();
    let kuma = start(dir.path()).await;
    let (ann, bob) = (kuma.entity::<Account>("ann@example.org"), kuma.entity::<Account>("bob@example.org"));
    for _ in 0..30 {
        ann.append(deposited(10)).await.unwrap();
        bob.append(deposited(7)).await.unwrap();
    }
    let receipt = ann.erase(reason()).await.unwrap();
    let found = ann.verify_receipt(&receipt).await;
    assert!(found.is_clean(), "{found}");
    let text = found.to_string();
    for part in [
        "by this store's key",
        "holds the tombstone",
        "key is destroyed",
        "30 stubs",
        "the id is in none",
        "unused space",
        "of this entity",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    // SQLite's locks are still there.
    bob.append(deposited(7)).await.unwrap();

    // It is not Bob's, and it notices an id that lies about.
    let found = bob.verify_receipt(&receipt).await;
    assert!(!found.is_clean());
    std::fs::write(dir.path().join("notes.txt"), "call ann@example.org").unwrap();
    let found = ann.verify_receipt(&receipt).await;
    assert!(found.to_string().contains("FAILED  files: the id is in notes.txt"), "{found}");

    // A forged one.
    let forged = receipt.to_string().replace(&receipt.receipt.key, &"0".repeat(32));
    let found = kuma.verify_receipt(&forged.parse().unwrap()).await;
    assert!(
        found.to_string().contains("FAILED  signature") && found.to_string().contains("FAILED  node.db"),
        "{found}"
    );
    kuma.shutdown().await;

    let no_reader = Options::new(dir.path()).file_reader(dir.path().join("no such program"), []);
    let kuma = Kuma::start(no_reader).await.unwrap();
    let found = kuma.verify_receipt(&receipt).await;
    assert!(!found.is_clean() && found.to_string().contains("FAILED  files"), "{found}");
    kuma.shutdown().await;
}

/// The order of things for whoever is asked to erase: archive, erase, and, should that have been wrong, a new life from the archive.
#[tokio::test]
async fn an_archive_holds_all_that_is_held_and_a_new_life_can_be_made_of_it() {
    let dir = directory();
    let kuma = Kuma::start(Options::new(dir.path()).shards(2).snapshot_every(4, 1 << 20)).await.unwrap();
    let ann = kuma.entity::<Account>("ann@example.org");
    for number in 0..40 {
        ann.append(deposited(10)).idempotency_key(format!("key {number}")).await.unwrap();
        ann.read().await.unwrap();
    }
    let before = ann.raw().events(.., 100).await.unwrap();
    common::until("a snapshot was made", async || {
        let mut archive = Vec::new();
        ann.archive(&mut archive).await.unwrap();
        String::from_utf8(archive).unwrap().contains("\"part\":\"snapshot\"")
    })
    .await;
    let mut archive = Vec::new();
    let manifest = ann.archive(&mut archive).await.unwrap();
    assert_eq!((manifest.entities, manifest.events), (1, 40));
    let lines: Vec<serde_json::Value> = archive
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| serde_json::from_slice(line).unwrap())
        .collect();
    let entity = &lines[0]["archive"];
    assert_eq!((entity["part"].as_str(), entity["id"].as_str()), (Some("entity"), Some("ann@example.org")));
    assert_eq!((entity["life"].as_u64(), entity["idempotency_keys"].as_u64()), (Some(1), Some(40)));
    let state = lines.iter().find(|line| line["archive"]["part"] == "state").unwrap();
    assert_eq!(state["archive"]["data"]["balance"], 400);

    ann.erase(reason()).await.unwrap();
    let mut nothing = Vec::new();
    assert!(ann.archive(&mut nothing).await.is_err());
    let report = kuma.import("archive").run(&archive[..], |_| {}).await;
    assert!(report.is_err(), "not into what is erased: {report:?}");
    ann.recreate(reason()).await.unwrap();
    let report = kuma.import("archive").run(&archive[..], |_| {}).await.unwrap();
    assert_eq!((report.events, report.entities), (40, Some(1)));
    let after = ann.raw().events(.., 100).await.unwrap();
    assert!(
        before.iter().zip(&after).all(|(before, after)| before.data == after.data && before.version == after.version)
    );
    assert_eq!(ann.read().await.unwrap().balance, 400);
    assert_clean(&kuma).await;
    kuma.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_asks_twice_gets_one_receipt() {
    let dir = directory();
    let kuma = start(dir.path()).await;
    for number in 0..20 {
        let ann = kuma.entity::<Account>(format!("ann-{number}"));
        ann.append(deposited(1)).await.unwrap();
        let asked = (0..8).map(|_| {
            let ann = ann.clone();
            tokio::spawn(async move { ann.erase(reason()).await.unwrap() })
        });
        let receipts = join_all(asked).await;
        let first = receipts[0].as_ref().unwrap();
        assert!(receipts.iter().all(|receipt| receipt.as_ref().unwrap() == first));
    }
    let log = kuma.audit_log().read().await.unwrap();
    assert_eq!((log.requested, log.completed), (20, 20));
    kuma.shutdown().await;
}

fn groups(kuma: &Kuma) -> u64 {
    kuma.stats().shards.iter().map(|shard| shard.writer.unwrap().groups).sum()
}

/// The first append of an entity, and its erasure: one comes before the other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_first_append_beside_an_erasure_is_there_or_erased() {
    let dir = directory();
    let kuma = start(dir.path()).await;
    let (mut there, mut erased) = (0, 0);
    for number in 0..200 {
        let ann = kuma.entity::<Account>(format!("ann-{number}"));
        let (one, other, before) = (ann.clone(), ann.clone(), groups(&kuma));
        let append = tokio::spawn(async move { one.append(deposited(1)).await });
        // Every other time it is on the disk already, and perhaps not answered yet.
        while number % 2 == 1 && groups(&kuma) == before && !append.is_finished() {
            tokio::task::yield_now().await;
        }
        let erase = tokio::spawn(async move { other.erase(reason()).await });
        let (append, erase) = (append.await.unwrap(), erase.await.unwrap());
        match (&append, &erase) {
            (Ok(_), Err(EraseError::Refused(Refused::NeverWritten { .. }))) => {
                there += 1;
                assert_eq!(ann.read().await.unwrap().balance, 1);
            }
            (Ok(_), Ok(_)) => {
                erased += 1;
                assert!(matches!(ann.read().await.map(|_| ()), Err(ReadError::Refused(Refused::Erased { .. }))));
            }
            other => panic!("{other:?}"),
        }
    }
    println!("{there} there, {erased} erased");
    assert!(there > 0 && erased > 0);
    assert_clean(&kuma).await;
    kuma.shutdown().await;
}

/// The store closes, or is dropped, while erasures are on their way: each is complete after the next start, or has not begun.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_closes_meanwhile_goes_on_at_its_next_start() {
    let dir = directory();
    let mut kuma = start(dir.path()).await;
    for round in 0..12_u64 {
        let ids: Vec<String> = (0..20).map(|number| format!("{round}-{number}")).collect();
        for id in &ids {
            kuma.entity::<Account>(id).append(deposited(1)).await.unwrap();
        }
        let asked: Vec<_> = ids
            .iter()
            .map(|id| {
                let account = kuma.entity::<Account>(id);
                tokio::spawn(async move { account.erase(reason()).await })
            })
            .collect();
        for _ in 0..round * 40 {
            tokio::task::yield_now().await;
        }
        if round % 2 == 0 {
            kuma.shutdown().await;
        }
        drop(kuma);
        let outcomes: Vec<_> = join_all(asked).await.into_iter().map(|outcome| outcome.unwrap()).collect();
        let mut opened = None;
        common::until("the directory is free", async || {
            opened = Kuma::start(kuma_core::Options::new(dir.path()).shards(2)).await.ok();
            opened.is_some()
        })
        .await;
        kuma = opened.unwrap();
        let mut begun = Vec::new();
        for (id, outcome) in ids.iter().zip(&outcomes) {
            match (outcome, kuma.entity::<Account>(id).read().await) {
                (Ok(_) | Err(EraseError::Unfinished { .. } | EraseError::Unavailable(_)), Err(error)) => {
                    assert!(matches!(error, ReadError::Refused(Refused::Erased { .. })), "{error:?}");
                    begun.push(id);
                }
                (Err(EraseError::Unavailable(_)), Ok(account)) => assert_eq!(account.balance, 1),
                (outcome, found) => panic!("{outcome:?}, {:?}", found.map(|account| account.balance)),
            }
        }
        common::until("what has begun", async || kuma.erasures_unfinished() == 0).await;
        for id in begun {
            kuma.entity::<Account>(id).erase(reason()).await.unwrap().verify(&kuma.public_key()).unwrap();
        }
    }
    assert_clean(&kuma).await;
    kuma.shutdown().await;
}

/// An import is an append like any other.
#[tokio::test]
async fn an_import_into_an_erased_entity_is_refused() {
    let dir = directory();
    let kuma = start(dir.path()).await;
    let ann = kuma.entity::<Account>("ann");
    ann.append(deposited(1)).await.unwrap();
    let mut file = Vec::new();
    ann.raw().export(&mut file).await.unwrap();
    ann.erase(reason()).await.unwrap();
    let imported = kuma.import("a file").run(&file[..], |_| {}).await;
    let refused = imported.unwrap_err();
    assert!(format!("{refused:?}").contains("Erased"), "{refused:?}");
    assert!(matches!(ann.read().await.map(|_| ()), Err(ReadError::Refused(Refused::Erased { .. }))));
    kuma.shutdown().await;
}
