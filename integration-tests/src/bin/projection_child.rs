//! The process that `tests/store/projection_crash.rs` kills: appends to a store while a projection is fed from it, and has its model built anew.
//! Called as `projection_child DIRECTORY LIFE VERSION REBUILDS WRITERS`, with a LIFE that no other child of that directory had.
//!
//! ```text
//!   R              the projection is registered
//!   S count        a query was answered: so many events
//!   N              a query was refused: there is no model yet
//! ```
// This is test code: a failed unwrap ends the child, which the parent takes for the failure that it is.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::{io::Write, path::Path, time::Duration};

use integration_tests::{
    Probe, TestAppend, options,
    tally::{Tally, count},
};
use kuma_core::{Kuma, ProjectionError, ProjectionHandle};
use rand::{RngExt, SeedableRng, rngs::StdRng};

const ENTITIES: u64 = 40;

fn say(line: &str) {
    std::io::stdout().lock().write_all(format!("{line}\n").as_bytes()).unwrap();
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    // Wherever it happens.
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        default(info);
        std::process::exit(101);
    }));
    let mut arguments = std::env::args().skip(1);
    let directory = arguments.next().unwrap();
    let mut number = || arguments.next().unwrap().parse::<u64>().unwrap();
    let (life, version, rebuilds, writers) = (number(), number() as u32, number() == 1, number());
    let kuma = Kuma::start(options(Path::new(&directory))).await.unwrap();
    for writer in 0..writers {
        tokio::spawn(write(kuma.clone(), life, writer));
    }
    let tally = kuma.projection(Tally { version }).await.unwrap();
    say("R");
    tokio::spawn(read(tally.clone()));
    loop {
        match tally.caught_up(Duration::from_millis(500)).await {
            Ok(()) if rebuilds => tally.rebuild().await.unwrap(),
            Ok(()) | Err(ProjectionError::Behind { .. }) => tokio::time::sleep(Duration::from_millis(1)).await,
            Err(error) => panic!("{error:?}"),
        }
    }
}

/// Asks for ever. What it is answered never goes back.
async fn read(tally: ProjectionHandle) {
    let mut newest = 0;
    loop {
        match count(&tally).await {
            Ok(count) => {
                assert!(count >= newest, "{count} events, and {newest} before");
                newest = count;
                say(&format!("S {count}"));
            }
            Err(ProjectionError::NotReady { .. }) => {
                assert_eq!(newest, 0, "there was a model");
                say("N");
            }
            Err(error) => panic!("{error:?}"),
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Appends for ever.
async fn write(kuma: Kuma, life: u64, writer: u64) {
    let mut random = StdRng::seed_from_u64(life << 16 | writer);
    for number in 0.. {
        let id = format!("entity-{}", random.random_range(0..ENTITIES));
        let append = TestAppend {
            id: life << 40 | writer << 32 | number,
            events: random.random_range(1..=8),
            bytes: random.random_range(0..100),
        };
        kuma.entity::<Probe>(&id).append_all(append.events()).await.unwrap();
        if random.random_range(0..4) == 0 {
            tokio::time::sleep(Duration::from_millis(random.random_range(0..8))).await;
        }
    }
}
