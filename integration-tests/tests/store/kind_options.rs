//! Settings of one kind hold for that kind alone, and can be changed from one start to the next.
#![allow(clippy::unwrap_used)]

use std::{path::Path, time::Duration};

use crate::common::{assert_clean, directory, until};
use kuma_core::{AuditEvent, AuditLog, Denial, Direction, KindOptions, Kuma, NewEvent, Options, StartError, Version};
use serde_json::{Value, json};

fn event(number: u64) -> NewEvent {
    NewEvent::json("Said", &json!({ "last": number })).unwrap()
}

async fn start(path: &Path, chat: KindOptions) -> Kuma {
    Kuma::start(Options::new(path).shards(1).kind("chat", chat)).await.unwrap()
}

#[tokio::test]
async fn an_append_only_kind_has_events_and_no_state() {
    let dir = directory();
    let kuma = start(dir.path(), KindOptions::new().append_only().snapshot_every(2, 1 << 20)).await;
    for (kind, state) in [("chat", Value::Null), ("room", json!({ "last": 5 }))] {
        let entity = kuma.raw(kind, "1");
        for number in 1..=5 {
            assert_eq!(
                entity.append(event(number)).idempotency_key(number.to_string()).await.unwrap(),
                Version(number)
            );
        }
        assert_eq!(
            entity.append(event(5)).idempotency_key("5").await.unwrap(),
            Version(5),
            "a retry is one all the same"
        );
        assert!(entity.append(event(6)).expecting(Version(4)).await.is_err(), "so is the expected version");
        assert_eq!(entity.read().await.unwrap(), (state, Version(5)));
        let last = entity.history(.., Direction::Backward).next().await.unwrap().unwrap();
        assert_eq!(last.json().unwrap(), json!({ "last": 5 }));
    }
    assert_clean(&kuma).await;
    kuma.shutdown().await;
}

/// A snapshot of one kind of state is not taken for one of the other.
#[tokio::test]
async fn a_kind_can_become_append_only_and_merging_again() {
    let dir = directory();
    let snapshots = || KindOptions::new().snapshot_every(1, 1);
    for (round, options, state) in [
        (1, snapshots(), json!({ "last": 1 })),
        (2, snapshots().append_only(), Value::Null),
        (3, snapshots(), json!({ "last": 3 })),
    ] {
        let kuma = start(dir.path(), options).await;
        let chat = kuma.raw("chat", "1");
        chat.append(event(round)).await.unwrap();
        assert_eq!(chat.read().await.unwrap(), (state.clone(), Version(round)));
        chat.passivate().await.unwrap();
        assert_eq!(chat.read().await.unwrap(), (state, Version(round)));
        kuma.shutdown().await;
    }
}

#[tokio::test]
async fn an_idle_time_of_a_kind_is_that_kinds_alone() {
    let dir = directory();
    let kuma = start(dir.path(), KindOptions::new().idle_timeout(Duration::from_millis(50))).await;
    kuma.raw("chat", "1").append(event(1)).await.unwrap();
    kuma.raw("room", "1").append(event(1)).await.unwrap();
    until("the chat leaves memory", async || kuma.stats().live_entities() == 1).await;
    kuma.raw("chat", "1").read().await.unwrap();
    assert_eq!(kuma.stats().live_entities(), 2, "the room had stayed");
    kuma.shutdown().await;
}

#[tokio::test]
async fn settings_of_a_kind_that_cannot_be_are_refused() {
    let dir = directory();
    for kind in ["", "1", "a b", "kuma.audit"] {
        let refused = Kuma::start(Options::new(dir.path()).kind(kind, KindOptions::new())).await;
        assert!(matches!(refused, Err(StartError::Option { option: "kind", .. })), "{kind:?}");
    }
}

#[tokio::test]
async fn denials_are_in_the_audit_log_which_nobody_else_can_write() {
    let dir = directory();
    let kuma = start(dir.path(), KindOptions::new()).await;
    let denial = Denial {
        token: Some("app".to_owned()),
        scope: "erase".to_owned(),
        request: "DELETE /v1/entities/{kind}/{id}".to_owned(),
        why: "the token does not have the scope".to_owned(),
        times: 3,
    };
    kuma.audit_denials(vec![denial.clone(), Denial { token: None, times: 1, ..denial.clone() }]).await.unwrap();
    assert_eq!(*kuma.audit_log().read().await.unwrap(), AuditLog { denied: 4, ..AuditLog::default() });
    let noted = kuma.audit_log().history(.., Direction::Forward).next().await.unwrap().unwrap();
    assert_eq!(noted.decode::<AuditLog>().unwrap(), AuditEvent::Denied(denial.clone()));
    assert!(kuma.audit_log().append(AuditEvent::Denied(denial)).await.is_err());
    kuma.shutdown().await;
}
