//! The process that `tests/store/crash.rs` kills: appends to a store as fast as it can and says on its standard output what was
//! acknowledged. Called as `crash_child DIRECTORY LIFE`, with a LIFE that no other child of that directory had.
//!
//! ```text
//!   R                          the store is open
//!   B file, E file             a group commit begins, has ended (before anyone is told)
//!   A entity id events bytes version   an append was acknowledged
//! ```
//! Every line is one `write` of less than PIPE_BUF bytes, made in the thread that the event happens in: what the parent reads is in
//! the order of what happened, up to the instant of the kill.
// This is test code: a failed unwrap ends the child, which the parent takes for the failure that it is.
#![allow(clippy::unwrap_used)]

use std::{collections::VecDeque, fmt, io::Write, time::Duration};

use integration_tests::{Probe, TestAppend, options};
use kuma_core::{AppendError, Kuma, Pending, Unavailable};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tracing::{Event, Level, Subscriber, field::Visit};
use tracing_subscriber::{
    Layer, Registry,
    filter::Targets,
    layer::{Context, SubscriberExt},
};

const WRITERS: u64 = 24;
const ENTITIES: u64 = 40;

fn say(line: &str) {
    // Standard output is line-buffered: a line with its end is one write.
    std::io::stdout().lock().write_all(format!("{line}\n").as_bytes()).unwrap();
}

/// Says when a commit begins and ends.
struct CommitMarks;

#[derive(Default)]
struct Mark {
    file: String,
    message: String,
}

impl Visit for Mark {
    fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn fmt::Debug) {
        match field.name() {
            "file" => self.file = format!("{value:?}"),
            "message" => self.message = format!("{value:?}"),
            _ => {}
        }
    }
}

impl<S: Subscriber> Layer<S> for CommitMarks {
    fn on_event(&self, event: &Event<'_>, _context: Context<'_, S>) {
        let mut mark = Mark::default();
        event.record(&mut mark);
        match mark.message.as_str() {
            "begin" => say(&format!("B {}", mark.file)),
            "end" => say(&format!("E {}", mark.file)),
            _ => {}
        }
    }
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    let mut arguments = std::env::args().skip(1);
    let directory = arguments.next().unwrap();
    let life: u64 = arguments.next().unwrap().parse().unwrap();
    let marks = CommitMarks.with_filter(Targets::new().with_target("kuma::commit", Level::TRACE));
    tracing::subscriber::set_global_default(Registry::default().with(marks)).unwrap();
    let kuma = Kuma::start(options(directory.as_ref())).await.unwrap();
    say("R");
    let writers: Vec<_> = (0..WRITERS).map(|writer| tokio::spawn(write(kuma.clone(), life, writer))).collect();
    for writer in writers {
        writer.await.unwrap();
    }
}

/// Appends for ever; every other writer has 8 appends on the way.
async fn write(kuma: Kuma, life: u64, writer: u64) {
    let mut random = StdRng::seed_from_u64(life << 16 | writer);
    let in_flight_max = if writer.is_multiple_of(2) { 8 } else { 1 };
    let mut in_flight: VecDeque<(String, TestAppend, Pending)> = VecDeque::new();
    for number in 0.. {
        if in_flight.len() == in_flight_max
            && let Some((entity, append, pending)) = in_flight.pop_front()
        {
            let version = pending.await.unwrap();
            say(&format!("A {entity} {} {} {} {version}", append.id, append.events, append.bytes));
        }
        // Most writers share entities; now and then there is a new one.
        let entity = match random.random_range(0..30) {
            0 => format!("life-{life}-{writer}-{number}"),
            _ => format!("entity-{}", random.random_range(0..ENTITIES)),
        };
        let append = TestAppend {
            id: life << 40 | writer << 32 | number,
            events: random.random_range(1..=20),
            bytes: random.random_range(0..400),
        };
        let handle = kuma.entity::<Probe>(&entity);
        let pending = loop {
            match handle.append_all(append.events()).submit().await {
                Ok(pending) => break pending,
                Err(AppendError::Unavailable(Unavailable::Overloaded { retry_after, .. })) => {
                    tokio::time::sleep(retry_after.min(Duration::from_millis(20))).await;
                }
                Err(error) => unreachable!("{error}"),
            }
        };
        in_flight.push_back((entity, append, pending));
    }
}
