//! Projections: exactly once, built beside, purged.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::{path::Path, time::Duration};

use kuma_core::{
    ApplyError, ErasureRule, Filter, Kuma, NewEvent, Options, Projection, ProjectionHandle, Reason, StoredEvent,
    rusqlite::Transaction,
};
use serde_json::json;

const SOON: Duration = Duration::from_secs(30);

struct Balances {
    version: u32,
}

impl Projection for Balances {
    fn name(&self) -> &str {
        "balances"
    }

    fn version(&self) -> u32 {
        self.version
    }

    fn filter(&self) -> Filter {
        Filter::kind("account")
    }

    fn erasure(&self) -> ErasureRule {
        ErasureRule::column("balance", "account")
    }

    fn migrations(&self) -> Vec<String> {
        vec![
            "CREATE TABLE balance(account TEXT PRIMARY KEY, amount INTEGER NOT NULL, events INTEGER NOT NULL) STRICT"
                .to_owned(),
        ]
    }

    fn apply(&self, model: &Transaction<'_>, stored: &StoredEvent) -> Result<(), ApplyError> {
        let amount = stored.event.json()?["amount"].as_i64().ok_or("there is no amount")? * i64::from(self.version);
        let upsert = "INSERT INTO balance VALUES (?, ?, 1)
             ON CONFLICT(account) DO UPDATE SET amount = amount + excluded.amount, events = events + 1";
        model.prepare_cached(upsert)?.execute((&*stored.id, amount))?;
        Ok(())
    }
}

async fn start(directory: &Path) -> Kuma {
    Kuma::start(Options::new(directory).shards(2)).await.unwrap()
}

async fn deposit(kuma: &Kuma, account: &str, amount: i64) {
    let event = NewEvent::json("Deposited", &json!({ "amount": amount })).unwrap();
    kuma.raw("account", account).append(event).await.unwrap();
}

async fn rows(balances: &ProjectionHandle) -> serde_json::Value {
    balances.query("SELECT * FROM balance ORDER BY account").run().await.unwrap().json()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_has_each_event_once_also_after_the_store_was_opened_again() {
    let directory = tempfile::tempdir().unwrap();
    for round in 1..=3 {
        let kuma = start(directory.path()).await;
        deposit(&kuma, "ann", 5).await;
        let balances = kuma.projection(Balances { version: 1 }).await.unwrap();
        deposit(&kuma, "bob", 7).await;
        balances.caught_up(SOON).await.unwrap();
        let expected = json!([
            {"account": "ann", "amount": 5 * round, "events": round},
            {"account": "bob", "amount": 7 * round, "events": round},
        ]);
        assert_eq!(rows(&balances).await, expected);
        kuma.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newer_version_takes_the_place_of_the_older_one() {
    let directory = tempfile::tempdir().unwrap();
    let kuma = start(directory.path()).await;
    deposit(&kuma, "ann", 5).await;
    let balances = kuma.projection(Balances { version: 1 }).await.unwrap();
    balances.caught_up(SOON).await.unwrap();
    let again = kuma.projection(Balances { version: 2 }).await.unwrap();
    again.caught_up(SOON).await.unwrap();
    assert_eq!(rows(&balances).await, json!([{"account": "ann", "amount": 10, "events": 1}]));
    let status = balances.status().await.unwrap();
    assert_eq!(status.serving.unwrap().model.to_string(), "v2-1");
    assert_eq!(status.previous.unwrap().to_string(), "v1-1");
    balances.rebuild().await.unwrap();
    balances.caught_up(SOON).await.unwrap();
    assert_eq!(balances.status().await.unwrap().serving.unwrap().model.to_string(), "v2-2");
    kuma.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_erased_entity_is_gone_from_every_model_when_there_is_a_receipt() {
    let directory = tempfile::tempdir().unwrap();
    let kuma = start(directory.path()).await;
    deposit(&kuma, "ann-of-the-needle", 5).await;
    deposit(&kuma, "bob", 7).await;
    let balances = kuma.projection(Balances { version: 1 }).await.unwrap();
    balances.caught_up(SOON).await.unwrap();
    let balances = kuma.projection(Balances { version: 2 }).await.unwrap_or(balances);
    balances.caught_up(SOON).await.unwrap();
    let receipt = kuma.raw("account", "ann-of-the-needle").erase(Reason::new("a test")).await.unwrap();
    assert_eq!(rows(&balances).await, json!([{"account": "bob", "amount": 14, "events": 1}]));
    let stores: Vec<&str> = receipt.receipt.stores.iter().map(|store| store.store.as_str()).collect();
    assert_eq!(stores[3..], ["projections/balances/v1-1.db", "projections/balances/v2-1.db"]);
    let verified = kuma.raw("account", "ann-of-the-needle").verify_receipt(&receipt).await;
    assert!(verified.is_clean(), "{verified}");
    kuma.shutdown().await;
}
