//! The code of docs/guide.md as one program.
//!
//! ```sh
//! cargo run --example guide -p kuma-core --features testing
//! ```
// A guide says `unwrap` in tests.
#![allow(clippy::unwrap_used)]

use std::{collections::VecDeque, time::Duration};

use kuma_core::{
    ApplyError, Delivery, Direction, ErasureRule, ExecuteError, Filter, Handle, Kuma, NewEvent, Projection, ReadError,
    Reason, Refused, Sequence, SqlProjection, Start, StoredEvent, Version,
    rusqlite::Transaction,
    testing::{Corpus, TestStore, given},
};

use kuma_core::{Command, Entity};
use serde::{Deserialize, Serialize};

#[derive(Default, Clone, Serialize, Deserialize)]
struct Account {
    balance: i64,
}

#[derive(Serialize, Deserialize)]
enum AccountEvent {
    Deposited { amount: i64 },
    Withdrawn { amount: i64 },
}

impl Entity for Account {
    const KIND: &'static str = "account";
    type Event = AccountEvent;
    fn apply(&mut self, event: &AccountEvent) {
        match event {
            AccountEvent::Deposited { amount } => self.balance += amount,
            AccountEvent::Withdrawn { amount } => self.balance -= amount,
        }
    }
}

#[derive(Serialize)] // for idempotency keys
struct Withdraw {
    amount: i64,
}

#[derive(Debug, PartialEq, thiserror::Error)]
#[error("short of {missing}")]
struct Overdrawn {
    missing: i64,
}

impl Command<Account> for Withdraw {
    type Rejection = Overdrawn;
    fn decide(self, account: &Account) -> Result<Vec<AccountEvent>, Overdrawn> {
        match account.balance - self.amount {
            left if left < 0 => Err(Overdrawn { missing: -left }),
            _ => Ok(vec![AccountEvent::Withdrawn { amount: self.amount }]),
        }
    }
}

async fn pay(kuma: &Kuma, request_id: &str) -> Result<(), Box<dyn std::error::Error>> {
    let account = kuma.entity::<Account>("acc_001");
    match account.execute(Withdraw { amount: 200 }).idempotency_key(request_id).await {
        Ok(done) => println!("version {}, {} events", done.version(), done.events().len()),
        Err(ExecuteError::Rejected(Overdrawn { missing })) => println!("{missing} is missing"),
        Err(error) => return Err(error.into()),
    }
    Ok(())
}

async fn stream(kuma: &Kuma, readings: Vec<NewEvent>) -> Result<(), Box<dyn std::error::Error>> {
    let meter = kuma.raw("meter", "m-17");
    let (sequence, mut pending) = (Sequence::new(), VecDeque::new());
    for reading in readings {
        if pending.len() >= 500 {
            // An entity takes 1024 at a time; beyond that it is `Overloaded`, which breaks the sequence.
            pending.pop_front().ok_or("nothing is pending")?.await?;
        }
        pending.push_back(meter.append(reading).in_sequence(&sequence).submit().await?);
    }
    for append in pending {
        append.await?; // after the first error all others are `SequenceBroken`
    }
    Ok(())
}

async fn past(account: &Handle<Account>) -> Result<(), Box<dyn std::error::Error>> {
    let then = account.at_version(Version(7)).await?.balance;
    let yesterday = account.at(std::time::SystemTime::now() - std::time::Duration::from_secs(86_400)).await?.balance;
    print!("{then} {yesterday}\n{}", account.diff(Version(7), Version(9)).await?); // ~ /balance: 800 -> 650
    let mut newest_first = account.history(.., Direction::Backward);
    while let Some(event) = newest_first.next().await {
        let event = event?;
        println!("{} {} {}", event.version, event.name, event.json()?);
    }
    Ok(())
}

mod evolved {
    use kuma_core::{Entity, Upcasters};
    use serde::{Deserialize, Serialize};
    use serde_json::json;

    #[derive(Default, Clone, Serialize, Deserialize)]
    pub(crate) struct Account {
        pub(crate) cents: i64,
    }

    #[derive(Serialize, Deserialize)]
    pub(crate) enum AccountEvent {
        Deposited { cents: i64, currency: String },
    }

    impl Entity for Account {
        const KIND: &'static str = "account";
        const SCHEMA: u32 = 3;
        type Event = AccountEvent;
        fn apply(&mut self, event: &AccountEvent) {
            let AccountEvent::Deposited { cents, .. } = event;
            self.cents += cents;
        }
        fn upcasters() -> Upcasters {
            #[derive(Deserialize)]
            struct Put {
                euros: i64,
            }
            #[derive(Serialize)]
            struct Deposited {
                cents: i64,
            }
            Upcasters::new()
                .typed(1, "Put", |old: Put| Deposited { cents: old.euros * 100 }) // version 1 had `Put { euros }`
                .rename(1, "Put", "Deposited")
                .json(2, "Deposited", |mut data| {
                    // version 2 had no currency
                    data["currency"] = json!("EUR");
                    data
                })
        }
    }
}

async fn forget(kuma: &Kuma) -> Result<(), Box<dyn std::error::Error>> {
    let account = kuma.entity::<Account>("acc_001");
    let mut file = tokio::fs::File::create("acc_001.ndjson").await?;
    account.archive(&mut file).await?; // all that is held, in clear: for the person who asks

    let receipt = account.erase(Reason::new("request 4711").by("support")).await?;
    tokio::fs::write("receipt.json", receipt.to_string()).await?;
    println!("{}", account.verify_receipt(&receipt).await); // looks again, at every file

    assert!(matches!(account.read().await, Err(ReadError::Refused(Refused::Erased { .. }))));
    let life = account.recreate(Reason::new("came back")).await?;
    println!("life {life} at version {}", account.read().await?.version());
    Ok(())
}

async fn undo(kuma: &Kuma) -> Result<(), Box<dyn std::error::Error>> {
    let account = kuma.entity::<Account>("acc_002");
    let restored = account.restore_to(Version(2), Reason::new("ticket 12: wrong import")).await?;
    println!("life {} at version {}", restored.life, restored.version);
    Ok(())
}

async fn follow(kuma: &Kuma) -> Result<(), Box<dyn std::error::Error>> {
    let mut events = kuma.subscribe(Filter::kind("account")).from(Start::Beginning).open().await?;
    while let Some(delivery) = events.next_of_now().await? {
        match delivery {
            Delivery::Event(stored) => println!("{} {} {}", stored.id, stored.event.version, stored.event.name),
            Delivery::Erased(erased) => println!("forget {}", erased.entity.to_hex()),
            Delivery::Unreadable(commit) => println!("position {}: {}", commit.position, commit.why),
        }
    }
    let checkpoint = events.checkpoint().to_string(); // go on from here another time
    assert!(checkpoint.len() < 200);
    Ok(())
}

fn send_mail(_stored: &StoredEvent) -> Result<(), &'static str> {
    Err("there is no mail server")
}

async fn consume(kuma: &Kuma) -> Result<(), Box<dyn std::error::Error>> {
    let mut mailer = kuma.durable_subscription("mailer", Filter::event("account", "Withdrawn")).open().await?;
    match mailer.next().await? {
        Delivery::Event(stored) => match send_mail(&stored) {
            Ok(()) => mailer.ack().await?,       // everything that was handed out
            Err(why) => mailer.park(why).await?, // put aside; the next ones go on
        },
        Delivery::Erased(_) => mailer.ack().await?, // what you keep of it is gone: that is what you confirm
        Delivery::Unreadable(commit) => mailer.park(commit.why).await?,
    }
    Ok(())
}

async fn project(kuma: &Kuma) -> Result<(), Box<dyn std::error::Error>> {
    let balances = SqlProjection::parse(
        "-- projection: balances
         -- version: 1
         -- erasure: column balance.account
         CREATE TABLE balance(account TEXT PRIMARY KEY, amount INTEGER NOT NULL) STRICT;

         -- on account.Deposited
         INSERT INTO balance VALUES (:entity, :data ->> 'amount')
         ON CONFLICT(account) DO UPDATE SET amount = amount + excluded.amount;

         -- on account.Withdrawn
         UPDATE balance SET amount = amount - (:data ->> 'amount') WHERE account = :entity;",
    )?;
    let balances = kuma.projection(balances).await?;
    balances.caught_up(Duration::from_secs(10)).await?;
    let answer = balances.query("SELECT * FROM balance WHERE amount > :least").bind_named("least", 10).run().await?;
    println!("{} ({} commits behind)", answer.json(), answer.as_of.commits_behind);
    kuma.projection(Turnover).await?.caught_up(Duration::from_secs(10)).await?;
    Ok(())
}

struct Turnover;

impl Projection for Turnover {
    fn name(&self) -> &str {
        "turnover"
    }
    fn version(&self) -> u32 {
        1
    }
    fn filter(&self) -> Filter {
        Filter::kind("account")
    }
    fn erasure(&self) -> ErasureRule {
        ErasureRule::none("sums over all accounts")
    }
    fn migrations(&self) -> Vec<String> {
        vec!["CREATE TABLE turnover(name TEXT PRIMARY KEY, events INTEGER NOT NULL) STRICT".to_owned()]
    }
    fn apply(&self, model: &Transaction<'_>, stored: &StoredEvent) -> Result<(), ApplyError> {
        let count = "INSERT INTO turnover VALUES (?, 1) ON CONFLICT(name) DO UPDATE SET events = events + 1";
        model.prepare_cached(count)?.execute([&stored.event.name])?;
        Ok(())
    }
}

const CORPUS: &str = r#"
{"type":"Deposited","schema":1,"bytes":"81a6616d6f756e7405","data":{"amount":5}}
{"type":"Withdrawn","schema":1,"bytes":"81a6616d6f756e7405","data":{"amount":5}}
"#;

async fn tests() {
    // A command against a history, without a store.
    given::<Account>([AccountEvent::Deposited { amount: 5 }])
        .when(Withdraw { amount: 3 })
        .then([AccountEvent::Withdrawn { amount: 3 }]);
    given::<Account>([]).when(Withdraw { amount: 1 }).then_rejected(&Overdrawn { missing: 1 });

    // A store of its own, gone after the test.
    let store = TestStore::start().await;
    let account = store.entity::<Account>("acc_001");
    account.append(AccountEvent::Deposited { amount: 5 }).await.unwrap();
    let store = store.reopen().await; // as after a restart

    // Every event that was ever released still decodes. The file is kept beside the code;
    // KUMA_CORPUS=update adds what is new to it.
    Corpus::<Account>::at("tests/corpus/account.ndjson")
        .sample(AccountEvent::Deposited { amount: 5 })
        .sample(AccountEvent::Withdrawn { amount: 5 })
        .check();
    assert_eq!(store.entity::<Account>("acc_001").read().await.unwrap().balance, 5);
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let store = TestStore::start().await;
    let account = store.entity::<Account>("acc_001");
    for _ in 0..9 {
        account.append(AccountEvent::Deposited { amount: 50 }).await?;
    }
    pay(&store, "request 1").await?;
    pay(&store, "request 1").await?;
    pay(&store, "request 2").await?;
    pay(&store, "request 3").await?;
    past(&account).await?;
    let reading = |number| NewEvent::json("Read", &serde_json::json!({"kwh": number}));
    stream(&store, (0..5000).map(reading).collect::<Result<_, _>>()?).await?;
    // `Put { euros: 3 }`, as version 1 of the code stored it.
    let old = NewEvent::json("Put", &serde_json::json!({"euros": 3}))?.schema(1);
    assert_eq!(given::<evolved::Account>([]).and_stored([old]).state().cents, 300);
    let directory = tempfile::tempdir()?;
    std::env::set_current_dir(directory.path())?;
    std::fs::create_dir_all("tests/corpus")?;
    // As `KUMA_CORPUS=update` leaves it.
    std::fs::write("tests/corpus/account.ndjson", CORPUS)?;
    tests().await;
    follow(&store).await?;
    consume(&store).await?;
    project(&store).await?;
    forget(&store).await?;
    let other = store.entity::<Account>("acc_002");
    for _ in 0..3 {
        other.append(AccountEvent::Deposited { amount: 50 }).await?;
    }
    undo(&store).await?;
    Ok(())
}
