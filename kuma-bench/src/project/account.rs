//! The accounts whose events are projected: events with a JSON form, and what all of them add up to.
//!
//! Each event of an account has a **stamp**, counted from 1, and follows from the account and the stamp alone. An account has one writer at
//! a time, so that the stamp is the version.

use anyhow::{Result, ensure};
use kuma_core::{
    ApplyError, Entity, ErasureRule, Filter, Handle, Kuma, Projection, ProjectionHandle, SqlProjection, StoredEvent,
    rusqlite::{Transaction, types::Value},
};
use serde::{Deserialize, Serialize};

use crate::load::mix;

/// What an event without its note takes as JSON, and the least that can be asked for.
const BYTES_WITHOUT_NOTE: u32 = 113;
pub(crate) const PAYLOAD_BYTES_MIN: u32 = 120;
/// Notes are windows into so many letters.
const LETTERS: usize = 1 << 12;

/// The table of both projections, and of the reference.
pub(crate) const TABLE: &str =
    "CREATE TABLE total(account TEXT PRIMARY KEY, events INTEGER NOT NULL, cents INTEGER NOT NULL) STRICT";
/// What an event does to it.
pub(crate) const UPSERT: &str = "INSERT INTO total VALUES (?, 1, ?)
    ON CONFLICT (account) DO UPDATE SET events = events + 1, cents = cents + excluded.cents";

/// The state.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Account {
    cents: i64,
}

#[derive(Serialize, Deserialize)]
pub(crate) enum AccountEvent {
    Deposited(Deposit),
}

#[derive(Serialize, Deserialize)]
pub(crate) struct Deposit {
    cents: i64,
    currency: String,
    counterparty: String,
    reference: String,
    note: String,
}

impl Entity for Account {
    const KIND: &'static str = "account";
    type Event = AccountEvent;

    fn apply(&mut self, AccountEvent::Deposited(deposit): &AccountEvent) {
        self.cents += deposit.cents;
    }
}

/// The id of account `number`. All have the same length.
pub(crate) fn id(number: u64) -> String {
    format!("account-{number:09}")
}

pub(crate) fn handle(kuma: &Kuma, number: u64) -> Handle<Account> {
    kuma.entity(id(number))
}

/// What an event deposits.
pub(crate) fn cents(account: u64, stamp: u64) -> i64 {
    (mix(mix(account) ^ stamp) % 10_000) as i64 + 1
}

/// Makes events.
pub(crate) struct Events {
    letters: String,
    note_bytes: usize,
}

impl Events {
    /// Of about this many bytes as JSON.
    pub(crate) fn new(payload: u32) -> Self {
        let note_bytes = payload.saturating_sub(BYTES_WITHOUT_NOTE) as usize;
        let letter = |number| char::from(b'a' + (mix(number) % 26) as u8);
        Events { letters: (0..(LETTERS + note_bytes) as u64).map(letter).collect(), note_bytes }
    }

    /// The events of an account with these stamps.
    pub(crate) fn of(&self, account: u64, stamps: std::ops::Range<u64>) -> impl Iterator<Item = AccountEvent> {
        stamps.map(move |stamp| {
            let random = mix(mix(account) ^ mix(stamp));
            let start = random as usize % LETTERS;
            AccountEvent::Deposited(Deposit {
                cents: cents(account, stamp),
                currency: "EUR".to_owned(),
                counterparty: id(random % 1_000_000),
                reference: format!("{random:016x}"),
                note: self.letters.get(start..start + self.note_bytes).unwrap_or_default().to_owned(),
            })
        })
    }
}

/// The projection as a text of SQL.
pub(crate) fn in_sql() -> Result<SqlProjection> {
    let text = format!(
        "-- projection: total_sql
         -- version: 1
         -- erasure: column total.account
         {TABLE};

         -- on account.Deposited
         INSERT INTO total VALUES (:entity, 1, :data ->> 'cents')
         ON CONFLICT (account) DO UPDATE SET events = events + 1, cents = cents + excluded.cents;"
    );
    Ok(SqlProjection::parse(&text)?)
}

/// The same projection in Rust.
pub(crate) struct InRust;

impl Projection for InRust {
    fn name(&self) -> &str {
        "total_rust"
    }

    fn version(&self) -> u32 {
        1
    }

    fn filter(&self) -> Filter {
        Filter::event(Account::KIND, "Deposited")
    }

    fn erasure(&self) -> ErasureRule {
        ErasureRule::column("total", "account")
    }

    fn migrations(&self) -> Vec<String> {
        vec![TABLE.to_owned()]
    }

    fn apply(&self, model: &Transaction<'_>, stored: &StoredEvent) -> Result<(), ApplyError> {
        let AccountEvent::Deposited(deposit) = stored.event.decode::<Account>()?;
        model.prepare_cached(UPSERT)?.execute((&*stored.id, deposit.cents))?;
        Ok(())
    }
}

/// Accounts, events and cents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Totals {
    pub(crate) accounts: i64,
    pub(crate) events: i64,
    pub(crate) cents: i64,
}

impl Totals {
    /// Of the accounts from 0 on that have these versions.
    pub(crate) fn of_versions(versions: &[u64]) -> Self {
        let of_account =
            |(account, version): (u64, &u64)| (1..=*version).map(|stamp| cents(account, stamp)).sum::<i64>();
        Totals {
            accounts: versions.iter().filter(|version| **version > 0).count() as i64,
            events: versions.iter().sum::<u64>().cast_signed(),
            cents: (0..).zip(versions).map(of_account).sum(),
        }
    }

    /// What a model that has caught up says of itself. An error if that is anything else.
    pub(crate) async fn check(self, projection: &ProjectionHandle) -> Result<()> {
        let answer = projection.query("SELECT count(*), sum(events), sum(cents) FROM total").run().await?;
        let found: Vec<i64> = answer.rows.iter().flatten().map(integer).collect();
        let expected = vec![self.accounts, self.events, self.cents];
        ensure!(found == expected, "{} has {found:?}, expected {expected:?}", projection.name());
        Ok(())
    }
}

/// An integer of an answer; 0 where there is none.
pub(crate) fn integer(value: &Value) -> i64 {
    match value {
        Value::Integer(integer) => *integer,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_as_long_as_was_asked_for_and_follows_from_its_stamp() {
        for payload in [PAYLOAD_BYTES_MIN, 200, 1000] {
            let events = Events::new(payload);
            for AccountEvent::Deposited(deposit) in events.of(7, 1..100) {
                let json = serde_json::to_string(&deposit).unwrap();
                assert!(json.len().abs_diff(payload as usize) <= 8, "{json}");
            }
        }
        let of = |payload| {
            let text = |event| serde_json::to_string(&event).unwrap();
            Events::new(payload).of(7, 1..4).map(text).collect::<Vec<_>>()
        };
        assert_eq!(of(200), of(200));
        let events = Events::new(200);
        let sum: i64 = events.of(0, 1..4).map(|AccountEvent::Deposited(deposit)| deposit.cents).sum();
        assert_eq!(Totals::of_versions(&[3, 0]), Totals { accounts: 1, events: 3, cents: sum });
    }

    /// Both projections make the same model, and a model that differs does not pass the check.
    #[tokio::test]
    async fn both_projections_add_up_to_what_was_written() {
        let directory = tempfile::tempdir().unwrap();
        let kuma = Kuma::start(kuma_core::Options::new(directory.path()).shards(1)).await.unwrap();
        let events = Events::new(200);
        handle(&kuma, 0).append_all(events.of(0, 1..4)).await.unwrap();
        handle(&kuma, 1).append_all(events.of(1, 1..2)).await.unwrap();
        let models = [kuma.projection(in_sql().unwrap()).await.unwrap(), kuma.projection(InRust).await.unwrap()];
        for model in models {
            model.caught_up(std::time::Duration::from_secs(30)).await.unwrap();
            Totals::of_versions(&[3, 1]).check(&model).await.unwrap();
            assert!(Totals::of_versions(&[3, 2]).check(&model).await.is_err());
        }
        kuma.shutdown().await;
    }
}
