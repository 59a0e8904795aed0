//! Events outlive the code that wrote them: newer code reads older events in its own shape, wherever it reads them, and code that does
//! not know an event says so and loses nothing.
//!
//! A store is closed and opened again with other types for the same kinds, as a new release of a service does.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    convert::Infallible,
    sync::atomic::{AtomicBool, AtomicI64, Ordering::SeqCst},
    time::{Duration, UNIX_EPOCH},
};

use crate::common::{Ledger, assert_clean, directory, entered, start, until};
use futures_util::TryStreamExt;
use kuma_core::{
    AppendError, Command, Direction, Entity, ExecuteError, Handle, Kuma, NewEvent, Options, Outcome, ReadError,
    RecordedEvent, Refused, ReplayError, Unavailable, Upcasters, Version,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

fn unreadable(error: ReadError) -> ReplayError {
    match error {
        ReadError::Unavailable(Unavailable::Unreadable { cause, .. }) => cause,
        other => panic!("{other:?}"),
    }
}

/// The first release of a service.
mod v1 {
    use super::*;

    #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
    pub(super) struct Parcel {
        pub(super) to: String,
        pub(super) grams: u64,
        pub(super) moves: u64,
    }

    #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
    pub(super) enum ParcelEvent {
        Sent { to: String, grams: u64 },
        Moved { by: u64 },
        Lost,
    }

    impl Entity for Parcel {
        const KIND: &'static str = "parcel";
        type Event = ParcelEvent;

        fn apply(&mut self, event: &ParcelEvent) {
            match event {
                ParcelEvent::Sent { to, grams } => (self.to, self.grams) = (to.clone(), *grams),
                ParcelEvent::Moved { by } => self.moves += by,
                ParcelEvent::Lost => {}
            }
        }
    }

    #[derive(Serialize)]
    pub(super) struct Send {
        pub(super) to: String,
    }

    impl Command<Parcel> for Send {
        type Rejection = Infallible;

        fn decide(self, _: &Parcel) -> Result<Vec<ParcelEvent>, Infallible> {
            Ok(vec![ParcelEvent::Sent { to: self.to, grams: 5000 }, ParcelEvent::Moved { by: 1 }])
        }
    }
}

/// The second one: weights are in kilograms, and `Sent` is called otherwise.
mod v2 {
    use super::*;

    #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
    pub(super) struct Parcel {
        pub(super) to: String,
        pub(super) kilos: f64,
        pub(super) moves: u64,
    }

    #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
    pub(super) enum ParcelEvent {
        Dispatched { to: String, kilos: f64 },
        Moved { by: u64 },
        Lost,
    }

    impl Entity for Parcel {
        const KIND: &'static str = "parcel";
        const SCHEMA: u32 = 2;
        type Event = ParcelEvent;

        fn apply(&mut self, event: &ParcelEvent) {
            match event {
                ParcelEvent::Dispatched { to, kilos } => (self.to, self.kilos) = (to.clone(), *kilos),
                ParcelEvent::Moved { by } => self.moves += by,
                ParcelEvent::Lost => {}
            }
        }

        fn upcasters() -> Upcasters {
            super::from_1(Upcasters::new())
        }
    }
}

/// The third one: parcels may be express, and can be found again.
mod v3 {
    use super::*;

    #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
    pub(super) struct Parcel {
        pub(super) to: String,
        pub(super) kilos: f64,
        pub(super) express: bool,
        pub(super) moves: u64,
        pub(super) is_lost: bool,
    }

    #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
    pub(super) enum ParcelEvent {
        Dispatched { to: String, kilos: f64, express: bool },
        Moved { by: u64 },
        Lost,
        Found,
    }

    impl Entity for Parcel {
        const KIND: &'static str = "parcel";
        const SCHEMA: u32 = 3;
        type Event = ParcelEvent;

        fn apply(&mut self, event: &ParcelEvent) {
            match event {
                ParcelEvent::Dispatched { to, kilos, express } => {
                    (self.to, self.kilos, self.express) = (to.clone(), *kilos, *express);
                }
                ParcelEvent::Moved { by } => self.moves += by,
                ParcelEvent::Lost => self.is_lost = true,
                ParcelEvent::Found => self.is_lost = false,
            }
        }

        fn upcasters() -> Upcasters {
            super::from_1(Upcasters::new()).json(2, "Dispatched", |mut data| {
                data["express"] = json!(data["to"] == "Berlin");
                data
            })
        }
    }

    /// The command of the first release, under its old name.
    #[derive(Serialize)]
    pub(super) struct SendParcel {
        pub(super) to: String,
    }

    impl Command<Parcel> for SendParcel {
        type Rejection = Infallible;

        fn decide(self, _: &Parcel) -> Result<Vec<ParcelEvent>, Infallible> {
            panic!("it was decided years ago");
        }

        fn name() -> &'static str {
            "Send"
        }
    }
}

fn from_1(upcasters: Upcasters) -> Upcasters {
    #[derive(Deserialize)]
    struct Sent {
        to: String,
        grams: u64,
    }
    #[derive(Serialize)]
    struct Dispatched {
        to: String,
        kilos: f64,
    }
    upcasters.typed(1, "Sent", |old: Sent| Dispatched { to: old.to, kilos: old.grams as f64 / 1000.0 }).rename(
        1,
        "Sent",
        "Dispatched",
    )
}

static CLOCK: AtomicI64 = AtomicI64::new(0);

/// Each commit is an hour after the one before.
async fn open(path: &std::path::Path) -> Kuma {
    let hours = || CLOCK.fetch_add(1, SeqCst) as u64;
    let options = Options::new(path).shards(1).wall_clock(move || UNIX_EPOCH + Duration::from_secs(3600 * hours()));
    Kuma::start(options).await.unwrap()
}

async fn forward(handle: &kuma_core::RawHandle) -> Vec<RecordedEvent> {
    handle.history(.., Direction::Forward).try_collect().await.unwrap()
}

/// Three releases wrote to one parcel, and the third one reads it.
#[tokio::test]
async fn events_of_every_older_schema_are_read_in_the_new_shape_wherever_they_are_read() {
    let dir = directory();
    let kuma = open(dir.path()).await;
    let parcel = kuma.entity::<v1::Parcel>("p-1");
    let sent = parcel.execute(v1::Send { to: "Berlin".into() }).idempotency_key("send").await.unwrap();
    assert_eq!(sent.events()[0], v1::ParcelEvent::Sent { to: "Berlin".into(), grams: 5000 });
    parcel.append(v1::ParcelEvent::Moved { by: 2 }).idempotency_key("move").await.unwrap();
    parcel.append_all([v1::ParcelEvent::Sent { to: "Rome".into(), grams: 1500 }, v1::ParcelEvent::Lost]).await.unwrap();
    kuma.shutdown().await;

    let kuma = open(dir.path()).await;
    let parcel = kuma.entity::<v2::Parcel>("p-1");
    assert_eq!(*parcel.read().await.unwrap(), v2::Parcel { to: "Rome".into(), kilos: 1.5, moves: 3 });
    parcel.append(v2::ParcelEvent::Dispatched { to: "Berlin".into(), kilos: 2.0 }).await.unwrap();
    kuma.shutdown().await;

    let kuma = open(dir.path()).await;
    let parcel = kuma.entity::<v3::Parcel>("p-1");
    let at = |to: &str, kilos, express| v3::ParcelEvent::Dispatched { to: to.into(), kilos, express };
    let mut expected = vec![
        at("Berlin", 5.0, true),
        v3::ParcelEvent::Moved { by: 1 },
        v3::ParcelEvent::Moved { by: 2 },
        at("Rome", 1.5, false),
        v3::ParcelEvent::Lost,
        at("Berlin", 2.0, true),
    ];
    parcel.append(v3::ParcelEvent::Found).await.unwrap();
    expected.push(v3::ParcelEvent::Found);

    for round in 0..2 {
        // The answer to a retry.
        let retried = parcel.execute(v3::SendParcel { to: "Berlin".into() }).idempotency_key("send").await.unwrap();
        assert_eq!((retried.version(), retried.is_repeated(), retried.events()), (Version(2), true, &expected[..2]));
        let reused = parcel.execute(v3::SendParcel { to: "Rome".into() }).idempotency_key("send").await;
        assert!(matches!(
            reused,
            Err(ExecuteError::Failed(AppendError::Refused(Refused::KeyReused { version: Version(2), .. })))
        ));
        assert_eq!(parcel.outcome("move").await.unwrap(), Outcome::Committed(Version(3)));

        // History, both ways.
        let events = forward(parcel.raw()).await;
        let decoded: Vec<_> = events.iter().map(|event| event.decode::<v3::Parcel>().unwrap()).collect();
        assert_eq!(decoded, expected);
        assert!(events.iter().all(|event| event.schema == 3), "{events:?}");
        assert_eq!(
            (&*events[0].name, events[0].json().unwrap()),
            ("Dispatched", json!({"to": "Berlin", "kilos": 5.0, "express": true}))
        );
        let mut backward: Vec<_> = parcel.history(.., Direction::Backward).try_collect().await.unwrap();
        backward.reverse();
        assert_eq!(backward, events);

        // States, now and then.
        let mut state = v3::Parcel::default();
        for (version, event) in (0..).zip(&events) {
            let then = parcel.at_version(Version(version)).await.unwrap();
            assert_eq!(*then, state, "at version {version}");
            state.apply(&expected[version as usize]);
            let then = parcel.at(event.at).await.unwrap();
            assert!(then.version().0 > version, "{then:?}");
        }
        assert_eq!(*parcel.read().await.unwrap(), state);
        assert_eq!(
            *parcel.at(events[1].at).await.unwrap(),
            v3::Parcel { to: "Berlin".into(), kilos: 5.0, express: true, moves: 1, is_lost: false }
        );
        let diff = parcel.diff(Version(3), Version(5)).await.unwrap().to_string();
        let mut lines: Vec<&str> = diff.lines().collect();
        lines.sort_unstable();
        assert_eq!(
            lines,
            [
                "~ /express: true -> false",
                "~ /is_lost: false -> true",
                "~ /kilos: 5.0 -> 1.5",
                "~ /to: \"Berlin\" -> \"Rome\"",
            ]
        );

        // An export.
        let mut lines = Vec::new();
        parcel.export(&mut lines).await.unwrap();
        let lines: Vec<Value> =
            String::from_utf8(lines).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let (manifest, exported) = lines.split_last().unwrap();
        assert_eq!(exported.len(), expected.len(), "{manifest}");
        for (line, event) in exported.iter().zip(&events) {
            assert_eq!((&line["type"], &line["data"]), (&json!(event.name), &event.json().unwrap()), "{line}");
        }
        if round == 0 {
            parcel.raw().passivate().await.unwrap();
        }
    }
    assert_clean(&kuma).await;
    kuma.shutdown().await;
}

#[tokio::test]
async fn a_raw_append_of_an_older_schema_is_taken_kept_as_it_is_and_folded_as_new() {
    let dir = directory();
    let kuma = open(dir.path()).await;
    let parcel = kuma.entity::<v3::Parcel>("p-1");
    let old = |schema| NewEvent::json("Sent", &json!({ "to": "Berlin", "grams": 700 })).unwrap().schema(schema);
    let middle = NewEvent::json("Dispatched", &json!({ "to": "Rome", "kilos": 1.0 })).unwrap().schema(2);
    assert_eq!(parcel.raw().append(old(1)).idempotency_key("key").await.unwrap(), Version(1));
    assert_eq!(parcel.read().await.unwrap().kilos, 0.7);
    parcel.raw().append_all([middle, NewEvent::json("Found", &Value::Null).unwrap().schema(3)]).await.unwrap();
    let now = parcel.read().await.unwrap();
    assert_eq!((&*now.to, now.kilos, now.express), ("Rome", 1.0, false));
    // It is the stored event that a retry is compared with.
    assert_eq!(parcel.raw().append(old(1)).idempotency_key("key").await.unwrap(), Version(1));
    let names: Vec<_> = forward(parcel.raw()).await.into_iter().map(|event| (event.name, event.schema)).collect();
    assert_eq!(names, [("Dispatched".to_owned(), 3), ("Dispatched".to_owned(), 3), ("Found".to_owned(), 3)]);
    // As an event of the newest schema it is unknown, and would never be read again.
    let refused = parcel.raw().append(old(3)).await.unwrap_err();
    assert!(
        matches!(&refused, AppendError::Refused(Refused::Undecodable { event, .. }) if event == "Sent"),
        "{refused:?}"
    );
    // Of the schema in between it is unknown as well.
    assert!(parcel.raw().append(old(2)).await.is_err());
    assert_eq!(parcel.read().await.unwrap().version(), Version(3));
    kuma.shutdown().await;
    // What is stored is what was appended.
    let kuma = open(dir.path()).await;
    let stored = forward(&kuma.raw("parcel", "p-1")).await;
    assert_eq!(
        (&*stored[0].name, stored[0].schema, stored[0].json().unwrap()),
        ("Sent", 1, json!({"to": "Berlin", "grams": 700}))
    );
    assert_eq!((&*stored[1].name, stored[1].schema), ("Dispatched", 2));
}

/// A release is taken back: the one before does not know what the newer one has written.
#[tokio::test]
async fn older_code_names_what_it_does_not_know_and_nothing_is_lost() {
    let dir = directory();
    let kuma = open(dir.path()).await;
    let parcel = kuma.entity::<v3::Parcel>("p-1");
    parcel.append(v3::ParcelEvent::Moved { by: 1 }).await.unwrap();
    parcel.append_all([v3::ParcelEvent::Moved { by: 2 }, v3::ParcelEvent::Found]).idempotency_key("key").await.unwrap();
    parcel.append(v3::ParcelEvent::Moved { by: 4 }).await.unwrap();
    let neighbour = kuma.entity::<v3::Parcel>("p-2");
    neighbour.append(v3::ParcelEvent::Moved { by: 1 }).await.unwrap();
    let (state, events) = (parcel.read().await.unwrap(), forward(parcel.raw()).await);
    kuma.shutdown().await;

    let kuma = open(dir.path()).await;
    let old = kuma.entity::<v1::Parcel>("p-1");
    let is_named = |cause: &ReplayError| {
        assert!(
            matches!(cause, ReplayError::Undecodable { kind, event, version: Version(2), .. } if kind == "parcel" && event == "Found"),
            "{cause:?}"
        );
    };
    is_named(&unreadable(old.read().await.unwrap_err()));
    let refused = old.append(v1::ParcelEvent::Moved { by: 9 }).await.unwrap_err();
    assert!(refused.is_retry_safe(), "newer code may take it: {refused:?}");
    // It is listed, with the data as it is, and what lies before it can be folded.
    let listed = forward(old.raw()).await;
    assert_eq!(listed, events);
    assert!(listed[2].decode::<v1::Parcel>().is_err());
    assert_eq!(old.at_version(Version(2)).await.unwrap().moves, 3);
    is_named(&unreadable(old.at_version(Version(3)).await.unwrap_err()));
    is_named(&unreadable(old.at(listed[3].at).await.unwrap_err()));
    assert_eq!(old.at(listed[0].at).await.unwrap().moves, 1);
    // A neighbour without such events goes on.
    let neighbour = kuma.entity::<v1::Parcel>("p-2");
    assert_eq!(neighbour.append(v1::ParcelEvent::Moved { by: 1 }).await.unwrap(), Version(2));
    assert_clean(&kuma).await;
    kuma.shutdown().await;

    let kuma = open(dir.path()).await;
    let parcel = kuma.entity::<v3::Parcel>("p-1");
    assert_eq!(*parcel.read().await.unwrap(), *state);
    assert_eq!(
        parcel
            .append_all([v3::ParcelEvent::Moved { by: 2 }, v3::ParcelEvent::Found])
            .idempotency_key("key")
            .await
            .unwrap(),
        Version(3)
    );
    assert_eq!(forward(parcel.raw()).await, events);
    assert_eq!(kuma.entity::<v3::Parcel>("p-2").read().await.unwrap().moves, 2);
}

/// The events of a retried command can no longer be told; that is no reason to decide it again.
#[tokio::test]
async fn a_retried_command_whose_events_are_unknown_now_is_a_typed_error_and_not_decided_again() {
    #[derive(Serialize)]
    struct Find;
    impl Command<v3::Parcel> for Find {
        type Rejection = Infallible;
        fn decide(self, _: &v3::Parcel) -> Result<Vec<v3::ParcelEvent>, Infallible> {
            Ok(vec![v3::ParcelEvent::Found])
        }
    }
    #[derive(Serialize)]
    struct FindAgain;
    impl Command<v1::Parcel> for FindAgain {
        type Rejection = Infallible;
        fn decide(self, _: &v1::Parcel) -> Result<Vec<v1::ParcelEvent>, Infallible> {
            panic!("it was decided");
        }
        fn name() -> &'static str {
            "Find"
        }
    }
    let dir = directory();
    let kuma = open(dir.path()).await;
    kuma.entity::<v3::Parcel>("p-1").execute(Find).idempotency_key("key").await.unwrap();
    kuma.shutdown().await;
    let kuma = open(dir.path()).await;
    let old = kuma.entity::<v1::Parcel>("p-1");
    for _ in 0..2 {
        match old.execute(FindAgain).idempotency_key("key").await {
            Err(ExecuteError::Failed(AppendError::Unavailable(Unavailable::Unreadable { cause, .. }))) => {
                assert!(matches!(&cause, ReplayError::Undecodable { event, .. } if event == "Found"), "{cause:?}");
            }
            other => panic!("{other:?}"),
        }
    }
}

// ---- upcasters that go wrong

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    /// It returns what the type cannot read.
    Nonsense = 1,
    /// It cannot read what is stored.
    Refuses = 2,
    Panics = 3,
}

static FAULT: AtomicI64 = AtomicI64::new(0);

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Fragile {
    sum: i64,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
enum FragileEvent {
    Added { number: i64 },
}

impl Entity for Fragile {
    const KIND: &'static str = "fragile";
    const SCHEMA: u32 = 2;
    type Event = FragileEvent;

    fn apply(&mut self, FragileEvent::Added { number }: &FragileEvent) {
        self.sum += number;
    }

    fn upcasters() -> Upcasters {
        Upcasters::new().json(1, "Added", |data| {
            assert!(FAULT.load(SeqCst) != Fault::Panics as i64, "the upcaster panics, as told");
            let number = data.as_i64().unwrap_or_default();
            if FAULT.load(SeqCst) == Fault::Nonsense as i64 { json!("nonsense") } else { json!({ "number": number }) }
        })
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upcaster_that_fails_or_panics_is_a_typed_error_and_its_neighbours_never_notice() {
    let dir = directory();
    let options = Options::new(dir.path()).shards(1).quarantine(3, Duration::from_secs(60), Duration::from_millis(300));
    let kuma = Kuma::start(options).await.unwrap();
    let old = |number: i64| NewEvent::json("Added", &json!(number)).unwrap();
    let ledger = kuma.entity::<Ledger>("l-1");
    let current = kuma.entity::<Fragile>("current");
    for (round, fault) in (1..).zip([Fault::Nonsense, Fault::Refuses, Fault::Panics]) {
        FAULT.store(0, SeqCst);
        let fragile = kuma.entity::<Fragile>(format!("old-{round}"));
        fragile.append(FragileEvent::Added { number: 1 }).await.unwrap();
        if fault == Fault::Refuses {
            // Binary data has no JSON form. No code of the kind would write it, a raw append is refused as well.
            let refused = fragile.raw().append(NewEvent::message_pack("Added", vec![0xc4, 1, 7])).await.unwrap_err();
            let AppendError::Refused(Refused::Undecodable { event, detail }) = &refused else { panic!("{refused:?}") };
            assert!(event == "Added" && detail.contains("upcaster from schema 1 failed"), "{refused:?}");
            continue;
        }
        fragile.raw().append(old(5)).idempotency_key("key").await.unwrap();
        fragile.raw().passivate().await.unwrap();
        FAULT.store(fault as i64, SeqCst);
        let is_right = |cause: ReplayError| match (&cause, fault) {
            (ReplayError::Undecodable { kind, event, version: Version(2), .. }, Fault::Nonsense) => {
                assert!(kind == "fragile" && event == "Added", "{cause:?}");
            }
            (ReplayError::Panicked { kind, version: Version(2) }, Fault::Panics) => assert_eq!(kind, "fragile"),
            _ => panic!("{fault:?}: {cause:?}"),
        };
        is_right(unreadable(fragile.read().await.unwrap_err()));
        is_right(unreadable(fragile.at_version(Version(2)).await.unwrap_err()));
        assert_eq!(fragile.at_version(Version(1)).await.unwrap().sum, 1, "what lies before it");
        // A history shows what it has up to there. Nonsense is listed: it only is no event of the type.
        let listed: Result<Vec<_>, ReadError> = fragile.history(.., Direction::Forward).try_collect().await;
        match fault {
            Fault::Nonsense => assert!(listed.unwrap()[1].decode::<Fragile>().is_err()),
            _ => is_right(unreadable(listed.unwrap_err())),
        }
        // Nothing that could not be read is written either, and nobody's task is torn down for it.
        let raw = kuma.raw("fragile", format!("old-{round}"));
        let refused = tokio::spawn(async move { raw.append(old(7)).await }).await.unwrap().unwrap_err();
        assert!(
            matches!(&refused, AppendError::Refused(Refused::Undecodable { event, .. }) if event == "Added" || event == "fragile"),
            "{refused:?}"
        );
        // Its neighbours, of the same kind and of another.
        current.append(FragileEvent::Added { number: 1 }).await.unwrap();
        current.raw().passivate().await.unwrap();
        assert_eq!(current.read().await.unwrap().sum as u64, current.read().await.unwrap().version().0);
        ledger.append(entered(round)).await.unwrap();

        FAULT.store(0, SeqCst);
        until("the quarantine is over", async || fragile.read().await.is_ok()).await;
        assert_eq!(*fragile.read().await.unwrap(), Fragile { sum: 6 });
        assert_eq!(fragile.raw().append(old(5)).idempotency_key("key").await.unwrap(), Version(2));
        assert_eq!(fragile.append(FragileEvent::Added { number: 1 }).await.unwrap(), Version(3));
    }
    assert_clean(&kuma).await;
}

#[derive(Clone, Default, Serialize, Deserialize)]
struct Misplaced;

impl Entity for Misplaced {
    const KIND: &'static str = "misplaced";
    type Event = FragileEvent;

    fn apply(&mut self, _: &FragileEvent) {}

    fn upcasters() -> Upcasters {
        // SCHEMA is 1: it would never run.
        Upcasters::new().rename(1, "Added", "Summed")
    }
}

#[tokio::test]
async fn an_upcaster_that_would_never_run_is_refused_at_the_first_use() {
    let dir = directory();
    let kuma = start(dir.path(), 1).await;
    let is_refused = |refused: &Refused| {
        assert!(
            matches!(refused, Refused::Upcasters { kind, reason } if kind == "misplaced" && reason.contains("raise it")),
            "{refused:?}"
        );
    };
    let handle: Handle<Misplaced> = kuma.entity("m-1");
    match handle.read().await {
        Err(ReadError::Refused(refused)) => is_refused(&refused),
        Ok(_) | Err(_) => panic!("it was read"),
    }
    match handle.append(FragileEvent::Added { number: 1 }).await {
        Err(AppendError::Refused(refused)) => is_refused(&refused),
        other => panic!("{other:?}"),
    }
    is_refused(&kuma.register::<Misplaced>().unwrap_err());
    assert!(handle.history(.., Direction::Forward).next().await.unwrap().is_err());
    kuma.entity::<Ledger>("l-1").append(entered(1)).await.unwrap();
}

/// An event of a schema that this code has not reached yet, in a shape that it happens to know.
#[tokio::test]
async fn an_event_of_a_later_schema_is_read_as_it_is() {
    static RAN: AtomicBool = AtomicBool::new(false);
    #[derive(Clone, Default, Serialize, Deserialize)]
    struct Behind {
        sum: i64,
    }
    impl Entity for Behind {
        const KIND: &'static str = "behind";
        const SCHEMA: u32 = 2;
        type Event = FragileEvent;
        fn apply(&mut self, FragileEvent::Added { number }: &FragileEvent) {
            self.sum += number;
        }
        fn upcasters() -> Upcasters {
            Upcasters::new().json(1, "Added", |data| {
                RAN.store(true, SeqCst);
                data
            })
        }
    }
    let dir = directory();
    let kuma = start(dir.path(), 1).await;
    let behind = kuma.entity::<Behind>("b-1");
    behind.raw().append(NewEvent::json("Added", &json!({ "number": 3 })).unwrap().schema(9)).await.unwrap();
    assert_eq!(behind.read().await.unwrap().sum, 3);
    let events = forward(behind.raw()).await;
    assert_eq!((events[0].schema, RAN.load(SeqCst)), (9, false));
}
