//! `read`: warm reads of live entities, against a map behind a mutex in the same run.

use std::{
    collections::HashMap,
    hint::black_box,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use hdrhistogram::Histogram;
use kuma_core::{Handle, Kuma};
use parking_lot::Mutex;
use serde::Serialize;

use crate::{
    Common,
    frame::{Figures, Frame},
    load::{self, Load, Payloads},
    progress::Progress,
    store, tasks,
    usage::Machine,
};

#[derive(Clone, Debug, clap::Args, Serialize)]
pub(crate) struct ReadArgs {
    /// Live entities; more would not all stay in the store's default memory budget
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..=90_000))]
    entities: u64,
    /// Concurrent readers of the first measurement
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    readers: u32,
    /// Reads in each measurement, all readers together
    #[arg(long, default_value_t = 2_000_000, value_parser = clap::value_parser!(u64).range(1..))]
    reads: u64,
    #[command(flatten)]
    #[serde(flatten)]
    common: Common,
}

/// Readers of the second measurement.
const MANY_READERS: u32 = 200;
/// How often a reader lets others run in the first measurement. Reading never waits, so it would never do so by itself.
const TURN_READS: u64 = 64;
/// One read in this many is timed on its own in the first measurement: two looks at the clock take half as long as a read.
const TIMED_READS: u64 = 8;

pub(crate) async fn run(mut args: ReadArgs) -> Result<()> {
    let base = args.common.prepare()?;
    let (mut runs, mut durability) = (Vec::new(), String::new());
    for run in 1..=args.common.runs {
        let progress = Progress::of_run(run, args.common.runs);
        let directory = store::temporary(&base)?;
        let kuma = store::start(store::options(directory.path(), args.common.shards)).await?;
        let figures = one_run(&args, &kuma, &progress).await.with_context(|| format!("run {run}"));
        durability = kuma.stats().durability.as_str().to_owned();
        args.common.shards = Some(kuma.stats().shards.len() as u16);
        kuma.shutdown().await;
        runs.push(figures?);
    }
    let json = args.common.json.clone();
    Frame::new("read", durability, Machine::this(&base), serde_json::to_value(&args)?, runs).publish(json.as_deref())
}

async fn one_run(args: &ReadArgs, kuma: &Kuma, progress: &Progress) -> Result<Figures> {
    progress.phase("append", args.entities);
    let payloads = Arc::new(Payloads::new(64));
    let first_append = |entity| {
        let (handle, payloads) = (load::handle(kuma, entity), payloads.clone());
        async move { Ok(handle.append_all(payloads.events(entity, 1..2)).await?) }
    };
    tasks::join_bounded((0..args.entities).map(first_append)).await?;

    progress.phase("read", 0);
    let readers = Reader::several(kuma, args.entities, args.readers, args.reads).await?;
    let start = Instant::now();
    let few = tasks::merge(tasks::join(readers.into_iter().map(Reader::run)).await?)?;
    let wall = start.elapsed();

    progress.phase("read by 200", 0);
    let readers = Reader::several(kuma, args.entities, MANY_READERS, args.reads).await?;
    let start = Instant::now();
    let many = tasks::merge(tasks::join(readers.into_iter().map(Reader::run_in_turns)).await?)?;
    let wall_of_many = start.elapsed();

    progress.phase("reference", 0);
    let wall_of_reference = reference(args).await?;

    let per_second = |wall: Duration, readers: u32| {
        (args.reads.div_ceil(u64::from(readers)) * u64::from(readers)) as f64 / wall.as_secs_f64()
    };
    let quantile_us = |latencies: &Histogram<u32>, quantile| latencies.value_at_quantile(quantile) as f64 / 1e3;
    let (reads, reference) = (per_second(wall, args.readers), per_second(wall_of_reference, args.readers));
    let mut figures = Figures::default();
    figures.push("reads_per_second", reads);
    figures.push("reference_reads_per_second", reference);
    figures.push("read_ratio", reads / reference);
    figures.push("read_p50_us", quantile_us(&few, 0.5));
    figures.push("read_p99_us", quantile_us(&few, 0.99));
    figures.push("read_200_per_second", per_second(wall_of_many, MANY_READERS));
    figures.push("read_200_p50_us", quantile_us(&many, 0.5));
    figures.push("read_200_p99_us", quantile_us(&many, 0.99));
    Ok(figures)
}

/// One of several readers, with handles of its own to all entities.
struct Reader {
    handles: Vec<Handle<Load>>,
    place: u64,
    reads: u64,
    latencies: Histogram<u32>,
}

impl Reader {
    async fn several(kuma: &Kuma, entities: u64, readers: u32, reads: u64) -> Result<Vec<Self>> {
        let mut made = Vec::new();
        for number in 0..readers {
            let handles: Vec<Handle<Load>> = (0..entities).map(|entity| load::handle(kuma, entity)).collect();
            for handle in &handles {
                handle.read().await?;
            }
            let place = load::mix(u64::from(number));
            made.push(Reader {
                handles,
                place,
                reads: reads.div_ceil(u64::from(readers)),
                latencies: tasks::histogram()?,
            });
        }
        Ok(made)
    }

    /// An entity in no order.
    fn next(&mut self) -> Result<&Handle<Load>> {
        self.place = self.place.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let place = (self.place >> 33) as usize % self.handles.len().max(1);
        self.handles.get(place).context("a reader without an entity")
    }

    /// Reads as fast as it goes.
    async fn run(mut self) -> Result<Histogram<u32>> {
        for read in 1..=self.reads {
            let handle = self.next()?;
            if read % TIMED_READS == 0 {
                let start = Instant::now();
                black_box(handle.read().await?);
                tasks::record(&mut self.latencies, start);
            } else {
                black_box(handle.read().await?);
            }
            if read % TURN_READS == 0 {
                tokio::task::yield_now().await;
            }
        }
        Ok(self.latencies)
    }

    /// A closed loop: each request joins the queue of the runtime like any other task, and its time runs from then.
    async fn run_in_turns(mut self) -> Result<Histogram<u32>> {
        for _ in 0..self.reads {
            let start = Instant::now();
            tokio::task::yield_now().await;
            black_box(self.next()?.read().await?);
            tasks::record(&mut self.latencies, start);
        }
        Ok(self.latencies)
    }
}

/// The least that a shared cache of states takes: an `Arc` cloned out of a map behind a mutex, by as many readers.
async fn reference(args: &ReadArgs) -> Result<Duration> {
    let states: HashMap<u64, Arc<Load>> = (0..args.entities).map(|entity| (entity, Arc::default())).collect();
    let states = Arc::new(Mutex::new(states));
    let reads = args.reads.div_ceil(u64::from(args.readers));
    let reader = |number: u32| {
        let (states, entities) = (states.clone(), args.entities);
        async move {
            let mut place = load::mix(u64::from(number));
            for read in 1..=reads {
                place = place.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let state = states.lock().get(&((place >> 33) % entities)).cloned();
                black_box(state);
                if read % TURN_READS == 0 {
                    tokio::task::yield_now().await;
                }
            }
            Ok(())
        }
    };
    let start = Instant::now();
    tasks::join((0..args.readers).map(reader)).await?;
    Ok(start.elapsed())
}
