//! Appends at a fixed rate, each timed from when it was due: an open loop, which waits for no append before it makes the next one.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use futures_util::{StreamExt, stream::FuturesUnordered};
use hdrhistogram::Histogram;
use kuma_core::{Handle, Pending};
use tokio::{sync::mpsc, task::JoinSet};

use super::account::{Account, Events};
use crate::tasks;

/// Tasks that append, each to accounts of its own.
const WRITERS: usize = 20;
/// One append in so many is a sample.
const APPENDS_PER_SAMPLE: u64 = 20;

/// How appends are made.
#[derive(Clone, Copy)]
pub(crate) struct Rate {
    /// Events a second, of all writers.
    pub(crate) events: u64,
    /// Events in each append.
    pub(crate) batch: u64,
}

/// An append whose events are to be looked for in a read model.
pub(crate) struct Sample {
    pub(crate) account: u64,
    /// Of its last event.
    pub(crate) version: u64,
    pub(crate) due: Instant,
    pub(crate) acknowledged: Instant,
}

/// What became of appends.
pub(crate) struct Appended {
    /// From when each was due until it was acknowledged.
    pub(crate) latencies: Histogram<u32>,
    pub(crate) events_per_second: f64,
}

/// Appends that go on until they are stopped.
pub(crate) struct Appends {
    began: Instant,
    batch: u64,
    stop: Arc<AtomicBool>,
    writers: JoinSet<Result<Histogram<u32>>>,
}

impl Appends {
    /// To these accounts, which live already. Some are sent to `samples` once they are acknowledged; whether anybody is there does not matter.
    pub(crate) fn start(
        accounts: &[Handle<Account>],
        events: &Arc<Events>,
        rate: Rate,
        samples: &mpsc::UnboundedSender<Sample>,
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let every = Duration::from_secs_f64((WRITERS as u64 * rate.batch) as f64 / rate.events as f64);
        let began = Instant::now();
        let writer = |number: usize| {
            let of_writer = (0..).zip(accounts).skip(number).step_by(WRITERS);
            let writer = Writer {
                accounts: of_writer.map(|(number, handle)| (number, handle.clone(), None)).collect(),
                events: events.clone(),
                batch: rate.batch,
                every,
                samples: samples.clone(),
                stop: stop.clone(),
            };
            writer.run(number as u64, began + every.mul_f64(number as f64 / WRITERS as f64))
        };
        let writers = (0..WRITERS.min(accounts.len())).map(writer).collect();
        Appends { began, batch: rate.batch, stop, writers }
    }

    /// Stops, and says how it went.
    pub(crate) async fn stop(mut self) -> Result<Appended> {
        let seconds = self.began.elapsed().as_secs_f64();
        self.stop.store(true, Relaxed);
        let mut parts = Vec::new();
        while let Some(part) = self.writers.join_next().await {
            parts.push(part??);
        }
        let latencies = tasks::merge(parts)?;
        let events_per_second = (latencies.len() * self.batch) as f64 / seconds.max(1e-9);
        Ok(Appended { latencies, events_per_second })
    }
}

struct Writer {
    /// With the version that the next append begins behind, once it is known.
    accounts: Vec<(u64, Handle<Account>, Option<u64>)>,
    events: Arc<Events>,
    batch: u64,
    every: Duration,
    samples: mpsc::UnboundedSender<Sample>,
    stop: Arc<AtomicBool>,
}

impl Writer {
    /// Appends from `due` on. `turn` sets its samples off from those of other writers.
    async fn run(mut self, mut turn: u64, mut due: Instant) -> Result<Histogram<u32>> {
        let mut latencies = tasks::histogram()?;
        let mut on_the_way = FuturesUnordered::new();
        let mut next = 0;
        loop {
            let is_over = self.stop.load(Relaxed);
            tokio::select! {
                Some(appended) = on_the_way.next() => {
                    let (sample, is_sample): (Sample, bool) = appended?;
                    tasks::record(&mut latencies, sample.due);
                    if is_sample {
                        let _ = self.samples.send(sample);
                    }
                }
                () = tokio::time::sleep_until(due.into()), if !is_over => {
                    let (account, append) = self.submit(next).await?;
                    let is_sample = turn.is_multiple_of(APPENDS_PER_SAMPLE);
                    on_the_way.push(async move {
                        let version = append.await?.0;
                        anyhow::Ok((Sample { account, version, due, acknowledged: Instant::now() }, is_sample))
                    });
                    next = (next + 1) % self.accounts.len();
                    turn += 1;
                    due += self.every;
                }
                else => return Ok(latencies),
            }
        }
    }

    async fn submit(&mut self, place: usize) -> Result<(u64, Pending)> {
        let (account, handle, version) = self.accounts.get_mut(place).context("a writer without an account")?;
        let before = match *version {
            Some(version) => version,
            None => handle.read().await?.version().0,
        };
        let after = before + self.batch;
        let pending = handle.append_all(self.events.of(*account, before + 1..after + 1)).submit().await?;
        *version = Some(after);
        Ok((*account, pending))
    }
}
