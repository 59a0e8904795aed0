//! One of everything that is traced and counted.
#![allow(dead_code, clippy::unwrap_used)]

use kuma_core::{AppendError, Command, Entity, ExecuteError, Kuma, Options, SqlProjection};
use serde::{Deserialize, Serialize};

use super::until;

/// Stands in an id, a payload, an idempotency key, a header and a rejection.
pub(crate) const CANARY: &str = "canary-7f3a";

#[derive(Default, Clone, Serialize, Deserialize)]
struct Secret {
    text: String,
}

#[derive(Serialize, Deserialize)]
enum SecretEvent {
    Told { text: String },
}

impl Entity for Secret {
    const KIND: &'static str = "secret";
    type Event = SecretEvent;
    fn apply(&mut self, SecretEvent::Told { text }: &SecretEvent) {
        self.text.clone_from(text);
    }
}

#[derive(Serialize)]
struct Tell {
    text: String,
    refuse: bool,
}

#[derive(Debug, thiserror::Error)]
#[error("not {text}")]
struct Unwilling {
    text: String,
}

impl Command<Secret> for Tell {
    type Rejection = Unwilling;
    fn decide(self, _: &Secret) -> Result<Vec<SecretEvent>, Unwilling> {
        match self.refuse {
            true => Err(Unwilling { text: self.text }),
            false => Ok(vec![SecretEvent::Told { text: self.text }]),
        }
    }
}

fn told(bytes: usize) -> SecretEvent {
    SecretEvent::Told { text: CANARY.repeat(bytes / CANARY.len() + 1) }
}

/// Every kind of write once, and enough of them for a snapshot and a checkpoint.
pub(crate) async fn work(path: &std::path::Path, checkpoint: bool) {
    let options = || Options::new(path).shards(1).snapshot_every(2, u64::MAX).scrub_bytes_per_second(1 << 40);
    let kuma = Kuma::start(options()).await.unwrap();
    let secret = kuma.entity::<Secret>(CANARY);
    let first = secret.append(told(1)).idempotency_key(CANARY).await.unwrap();
    secret.append(told(1)).idempotency_key(CANARY).await.unwrap();
    let refused = secret.append(told(1)).expecting(kuma_core::Version(9)).await;
    assert!(matches!(refused, Err(AppendError::Refused(_))));
    secret.execute(Tell { text: CANARY.into(), refuse: false }).expecting(first).await.unwrap();
    let rejected = secret.execute(Tell { text: CANARY.into(), refuse: true }).await;
    assert!(matches!(rejected, Err(ExecuteError::Rejected(_))));
    secret.append(told(1)).await.unwrap();
    if checkpoint {
        for _ in 0..24 {
            secret.append(told(1 << 20)).await.err().into_iter().for_each(drop);
            secret.append(told(900_000)).await.unwrap();
        }
        until("a checkpoint", async || kuma.stats().shards[0].writer.unwrap().checkpoints > 0).await;
    }
    let read_model = SqlProjection::parse(
        "-- projection: told
         -- version: 1
         -- erasure: column told.who
         CREATE TABLE told(who TEXT, what TEXT) STRICT;
         -- on secret.*
         INSERT INTO told VALUES (:entity, :data);",
    );
    let read_model = kuma.projection(read_model.unwrap()).await.unwrap();
    read_model.caught_up(std::time::Duration::from_secs(60)).await.unwrap();
    until("the scrub has been through", async || kuma.stats().scrub.passes == 1).await;
    secret.raw().passivate().await.unwrap();
    secret.read().await.unwrap();
    kuma.shutdown().await;
}
