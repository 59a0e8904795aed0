//! The process that `tests/store/erase_crash.rs` kills: appends to a store, erases some of its entities meanwhile, and dies at a named place in
//! that. Called as `erase_child DIRECTORY LIFE PLACE PASS VICTIMS`, with a LIFE that no other child of that directory had: it dies when it
//! comes to the PLACE for the PASS-th time. Without VICTIMS (ids with commas between) it goes on with what is not finished, and ends.
//!
//! ```text
//!   A entity id events bytes version   an append was acknowledged
//!   Q                                  the erasures are about to be asked for
//!   D entity receipt                   one was answered with its receipt
//! ```
// This is test code: a failed unwrap ends the child, which the parent takes for the failure that it is.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    io::Write,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

use integration_tests::{Probe, TestAppend, options};
use kuma_core::{AppendError, Kuma, Reason, Refused};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use rustix::process::{Signal, getpid, kill_process};

const NEIGHBOURS: u64 = 6;

fn say(line: &str) {
    std::io::stdout().lock().write_all(format!("{line}\n").as_bytes()).unwrap();
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    let mut arguments = std::env::args().skip(1);
    let directory = arguments.next().unwrap();
    let life: u64 = arguments.next().unwrap().parse().unwrap();
    let place = arguments.next().unwrap();
    let passes = AtomicU64::new(arguments.next().unwrap().parse().unwrap());
    let victims: Vec<String> = arguments.next().into_iter().flat_map(|ids| split(&ids)).collect();
    fail::cfg_callback(place, move || {
        if passes.fetch_sub(1, SeqCst) == 1 {
            kill_process(getpid(), Signal::KILL).unwrap();
            // It takes a moment; nothing is done any more.
            std::thread::park();
        }
    })
    .unwrap();
    let mut random = StdRng::seed_from_u64(life);
    let kuma = Kuma::start(options(Path::new(&directory)).snapshot_every(5, 1 << 20)).await.unwrap();
    let acks = Arc::new(AtomicU64::new(0));
    for writer in 0..3 {
        tokio::spawn(write(kuma.clone(), life, writer, victims.clone(), acks.clone()));
    }
    if victims.is_empty() {
        wait_until(|| kuma.erasures_unfinished() == 0).await;
        return;
    }
    for id in &victims {
        let handle = kuma.entity::<Probe>(id);
        match random.random_range(0..4) {
            0 => assert!(handle.read().await.is_ok()),
            1 => handle.raw().passivate().await.unwrap(),
            _ => {}
        }
    }
    let enough = random.random_range(0..60);
    wait_until(|| acks.load(SeqCst) >= enough).await;
    say("Q");
    let reason = || Reason::new("request 4711").by("support");
    if random.random() {
        let handles = victims.iter().map(|id| kuma.entity::<Probe>(id).raw().clone()).collect::<Vec<_>>();
        kuma.erase_many(handles, reason(), |_, outcome| {
            say(&format!("D {}", outcome.as_ref().unwrap().receipt.id));
        })
        .await
        .unwrap();
    } else {
        let erased = victims.into_iter().map(|id| {
            let handle = kuma.entity::<Probe>(&id);
            async move { say(&format!("D {}", handle.erase(reason()).await.unwrap().receipt.id)) }
        });
        futures_util::future::join_all(erased).await;
    }
    panic!("it was to die before");
}

fn split(ids: &str) -> Vec<String> {
    ids.split(',').filter(|id| !id.is_empty()).map(str::to_owned).collect()
}

async fn wait_until(done: impl Fn() -> bool) {
    while !done() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Appends for ever, to neighbours and to those who are erased, until they are.
async fn write(kuma: Kuma, life: u64, writer: u64, mut victims: Vec<String>, acks: Arc<AtomicU64>) {
    let mut random = StdRng::seed_from_u64(life << 16 | writer);
    for number in 0.. {
        let victim = random.random_range(0..victims.len() * 2 + 1);
        let id = match victims.get(victim) {
            Some(id) => id.clone(),
            None => format!("neighbour-{}", random.random_range(0..NEIGHBOURS)),
        };
        let append = TestAppend {
            id: life << 40 | writer << 32 | number,
            events: random.random_range(1..=5),
            bytes: random.random_range(0..600),
        };
        match kuma.entity::<Probe>(&id).append_all(append.events()).await {
            Ok(version) => {
                say(&format!("A {id} {} {} {} {version}", append.id, append.events, append.bytes));
                acks.fetch_add(1, SeqCst);
            }
            Err(AppendError::Refused(Refused::Erased { .. })) => drop(victims.remove(victim)),
            Err(error) => panic!("{error:?}"),
        }
    }
}
