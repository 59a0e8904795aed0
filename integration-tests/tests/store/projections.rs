//! Projections: exactly once, built beside, purged.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::{path::Path, time::Duration};

use kuma_core::{
    ApplyError, ErasureRule, Filter, Kuma, NewEvent, Options, Projection, ProjectionError, ProjectionHandle,
    QueryError, Reason, SqlProjection, StoredEvent, rusqlite::Transaction,
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

fn in_sql(version: u32) -> SqlProjection {
    SqlProjection::parse(&format!(
        "-- projection: balances
         -- version: {version}
         -- erasure: column balance.account
         CREATE TABLE balance(account TEXT PRIMARY KEY, amount INTEGER NOT NULL) STRICT;

         -- on account.Deposited
         INSERT INTO balance VALUES (:entity, {version} * (:data ->> 'amount'))
         ON CONFLICT(account) DO UPDATE SET amount = amount + excluded.amount;"
    ))
    .unwrap()
}

fn balance(account: &str, amount: i64) -> serde_json::Value {
    json!([{ "account": account, "amount": amount }])
}

/// Its text is kept with the model, so that the model of an older version goes on while the new one is built, and after it.
#[tokio::test(flavor = "multi_thread")]
async fn a_projection_in_sql_is_rolled_back_to_a_model_that_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let kuma = start(directory.path()).await;
    deposit(&kuma, "ann", 5).await;
    kuma.projection(in_sql(1)).await.unwrap().caught_up(SOON).await.unwrap();
    let balances = kuma.projection(in_sql(2)).await.unwrap();
    balances.caught_up(SOON).await.unwrap();
    assert_eq!(rows(&balances).await, balance("ann", 10));
    balances.rollback().await.unwrap();
    deposit(&kuma, "ann", 1).await;
    balances.caught_up(SOON).await.unwrap();
    assert_eq!(rows(&balances).await, balance("ann", 6));
    kuma.shutdown().await;

    // It stays rolled back, also when the code of the newer version is registered again.
    let kuma = start(directory.path()).await;
    let balances = kuma.projection(in_sql(2)).await.unwrap();
    deposit(&kuma, "ann", 1).await;
    balances.caught_up(SOON).await.unwrap();
    assert_eq!(rows(&balances).await, balance("ann", 7));
    // Until it is built again, or there is another version.
    balances.rebuild().await.unwrap();
    balances.caught_up(SOON).await.unwrap();
    assert_eq!(rows(&balances).await, balance("ann", 14));
    assert_eq!(balances.status().await.unwrap().serving.unwrap().model.to_string(), "v2-2");
    kuma.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_definition_that_was_changed_under_the_same_version_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let kuma = start(directory.path()).await;
    deposit(&kuma, "ann", 5).await;
    let balances = kuma.projection(in_sql(1)).await.unwrap();
    balances.caught_up(SOON).await.unwrap();
    let changed = |reason: &str| {
        SqlProjection::parse(&format!(
            "-- projection: balances
         -- version: 1
         -- erasure: none ({reason})
         CREATE TABLE balance(account TEXT PRIMARY KEY, amount INTEGER NOT NULL) STRICT;
         -- on account.Deposited
         INSERT INTO balance VALUES (:entity, 1) ON CONFLICT DO NOTHING;"
        ))
    };
    let refused = kuma.projection(changed("a test").unwrap()).await;
    assert!(matches!(refused, Err(ProjectionError::Definition { .. })));
    kuma.shutdown().await;
    // Also by the next process; what there is stays as it is.
    let kuma = start(directory.path()).await;
    let refused = kuma.projection(changed("a test").unwrap()).await;
    assert!(matches!(refused, Err(ProjectionError::Definition { .. })));
    let balances = kuma.projection(in_sql(1)).await.unwrap();
    balances.caught_up(SOON).await.unwrap();
    assert_eq!(rows(&balances).await, balance("ann", 5));
    kuma.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_query_says_how_late_its_answer_is() {
    let directory = tempfile::tempdir().unwrap();
    let kuma = start(directory.path()).await;
    deposit(&kuma, "ann", 5).await;
    let balances = kuma.projection(in_sql(1)).await.unwrap();
    balances.caught_up(SOON).await.unwrap();
    balances.pause().await.unwrap();
    deposit(&kuma, "bob", 1).await;
    deposit(&kuma, "bob", 1).await;
    let answer = balances.query("SELECT count(*) AS accounts FROM balance").run().await.unwrap();
    assert_eq!((answer.json(), answer.as_of.commits_behind), (json!([{"accounts": 1}]), 2));
    assert!(answer.as_of.lag > Duration::ZERO);
    let behind = balances.caught_up(Duration::from_millis(10)).await;
    assert!(matches!(behind, Err(ProjectionError::Behind { .. })), "{behind:?}");
    balances.resume().await.unwrap();
    balances.caught_up(SOON).await.unwrap();
    let answer = balances.query("SELECT amount FROM balance WHERE account = :who").bind_named("who", "bob");
    let answer = answer.run().await.unwrap();
    assert_eq!(
        (answer.json(), answer.as_of.commits_behind, answer.as_of.lag),
        (json!([{"amount": 2}]), 0, Duration::ZERO)
    );
    let refused = balances.query("DELETE FROM balance").run().await;
    assert!(matches!(refused, Err(ProjectionError::Query(QueryError::NotAllowed(_)))), "{refused:?}");
    kuma.shutdown().await;
    assert!(matches!(balances.query("SELECT 1").run().await, Err(ProjectionError::ShuttingDown)));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_archive_holds_what_read_models_hold_of_the_entity() {
    let directory = tempfile::tempdir().unwrap();
    let kuma = start(directory.path()).await;
    deposit(&kuma, "ann", 5).await;
    deposit(&kuma, "bob", 7).await;
    kuma.projection(in_sql(1)).await.unwrap().caught_up(SOON).await.unwrap();
    let mut archive = Vec::new();
    kuma.raw("account", "ann").archive(&mut archive).await.unwrap();
    let archive = String::from_utf8(archive).unwrap();
    let part = archive.lines().find(|line| line.contains("\"projections\"")).unwrap();
    let part: serde_json::Value = serde_json::from_str(part).unwrap();
    let held = &part["archive"]["projections"];
    let expected = json!([
        {"projection": "balances", "model": "v1-1", "table": "balance", "rows": [{"account": "ann", "amount": 5}]}
    ]);
    assert_eq!(held, &expected);
    // And is imported like any other.
    let other = tempfile::tempdir().unwrap();
    let imported = start(other.path()).await;
    imported.import("archive").run(archive.as_bytes(), |_| {}).await.unwrap();
    assert_eq!(imported.raw("account", "ann").read().await.unwrap().1.0, 1);
    imported.shutdown().await;
    kuma.shutdown().await;
}
