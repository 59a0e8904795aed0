//! `write`: appends by many writers at once, against a bare SQLite loop in the same run.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use futures_util::{StreamExt, stream::FuturesUnordered};
use hdrhistogram::Histogram;
use kuma_core::{AppendError, Handle, Kuma, Pending, Stats, Unavailable};
use serde::Serialize;

use crate::{
    Common,
    frame::{Figures, Frame},
    load::{self, Load, Payloads, Stamps},
    progress::Progress,
    raw, store, tasks,
    usage::{self, Machine, Usage},
};

#[derive(Clone, Debug, clap::Args, Serialize)]
pub(crate) struct WriteArgs {
    /// Events in each run
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1..))]
    events: u64,
    /// Concurrent writers; writer i has the entities i, i + writers, ...
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..))]
    writers: u32,
    /// Events in each append
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=4096))]
    batch: u32,
    /// Random bytes in each event
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(i64::from(load::PAYLOAD_BYTES_MIN)..=1_000_000))]
    payload: u32,
    /// Entities; fewer than writers share them
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u64).range(1..=100_000_000))]
    entities: u64,
    /// Appends that each writer has on their way at a time
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    in_flight: u32,
    /// Give each append an idempotency key of its own
    #[arg(long)]
    keys: bool,
    /// Read everything back after each run and compare counts and contents; exit with 1 if anything differs
    #[arg(long)]
    verify: bool,
    #[command(flatten)]
    #[serde(flatten)]
    common: Common,
}

pub(crate) async fn run(mut args: WriteArgs) -> Result<()> {
    let base = args.common.prepare()?;
    let (mut runs, mut durability) = (Vec::new(), String::new());
    for run in 1..=args.common.runs {
        let progress = Progress::of_run(run, args.common.runs);
        let (figures, stats) = one_run(&args, &base, &progress).await.with_context(|| format!("run {run}"))?;
        durability = stats.durability.as_str().to_owned();
        args.common.shards = Some(stats.shards.len() as u16);
        runs.push(figures);
    }
    let json = args.common.json.clone();
    Frame::new("write", durability, Machine::this(&base), serde_json::to_value(&args)?, runs).publish(json.as_deref())
}

async fn one_run(args: &WriteArgs, base: &Path, progress: &Progress) -> Result<(Figures, Stats)> {
    let directory = store::temporary(base)?;
    let store_dir = directory.path().join("store");
    let disk_sync_p50_ms = usage::disk_sync_p50_ms(directory.path())?;
    usage::forget_peak();

    let kuma = store::start(store::options(&store_dir, args.common.shards)).await?;
    let plan = Arc::new(Plan {
        payloads: Payloads::new(args.payload),
        stamps: Stamps::new(args.entities),
        batch: u64::from(args.batch),
        in_flight: args.in_flight as usize,
        keys: args.keys,
        left: AtomicU64::new(args.events),
        overloads: AtomicU64::new(0),
    });
    progress.phase("activate", 0);
    let writers: Vec<Writer> =
        (0..args.writers).map(|number| Writer::new(&kuma, &plan, args, number)).collect::<Result<_>>()?;
    let writers = tasks::join(writers.into_iter().map(Writer::warm_up)).await?;

    progress.phase("append", args.events);
    let (stats_before, usage_before, start) = (kuma.stats(), Usage::now(), Instant::now());
    let running = tasks::join(writers.into_iter().map(Writer::run));
    let of_writers = progress.watch(running, || args.events - plan.left.load(Relaxed)).await?;
    let (wall, used, stats) = (start.elapsed(), Usage::now().since(&usage_before), kuma.stats());
    let latencies = tasks::merge(of_writers)?;
    let resident = usage::peak_resident_bytes();
    progress.phase("close", 0);
    let start = Instant::now();
    kuma.shutdown().await;
    drop(kuma);
    let (shutdown, used_in_all) = (start.elapsed(), Usage::now().since(&usage_before));
    let disk_bytes = usage::disk_bytes(&store_dir)?;

    let (groups, entries) = groups_and_entries(&stats_before, &stats);
    let appends = args.events.div_ceil(plan.batch);
    let appends_per_commit = entries as f64 / groups.max(1) as f64;
    let reference = raw::Plan {
        files: stats.shards.len() as u64,
        rows: appends,
        rows_per_commit: (appends_per_commit.round() as u64).max(1),
        batch: plan.batch,
        // A run of less than one batch has only its warm-up to go by.
        body_bytes: store::body_bytes(&store_dir, plan.batch.min(args.events))?.round() as u32,
        entities: args.entities,
    };
    ensure!(reference.body_bytes > 0, "no commit of {} events is stored", plan.batch);
    progress.phase("reference", 0);
    let (raw_dir, raw_plan) = (directory.path().join("raw"), reference.clone());
    let raw = tokio::task::spawn_blocking(move || raw::run(&raw_dir, &raw_plan)).await??;

    if args.verify {
        let kuma = store::start(store::options(&store_dir, None)).await?;
        let shared = args.entities < u64::from(args.writers);
        let checked = load::check(&kuma, &plan.stamps, &plan.payloads, shared, progress).await;
        kuma.shutdown().await;
        checked.context("what is stored is not what was written")?;
    }

    let events = args.events as f64;
    let per_event = |bytes: Option<u64>| bytes.map(|bytes| bytes as f64 / events);
    let per_second = |wall: Duration| events / wall.as_secs_f64();
    let quantile_ms = |quantile| latencies.value_at_quantile(quantile) as f64 / 1e6;
    let mut figures = Figures::default();
    figures.push("events_per_second", per_second(wall));
    figures.push("raw_sqlite_events_per_second", per_second(raw.wall));
    figures.push("raw_ratio", raw.wall.as_secs_f64() / wall.as_secs_f64());
    figures.push("ack_p50_ms", quantile_ms(0.5));
    figures.push("ack_p99_ms", quantile_ms(0.99));
    figures.push("ack_max_ms", latencies.max() as f64 / 1e6);
    figures.push("cpu_us_per_event", used.cpu.as_secs_f64() * 1e6 / events);
    figures.push("raw_cpu_us_per_event", raw.cpu.as_secs_f64() * 1e6 / events);
    figures.push_some("io_bytes_per_event", per_event(used_in_all.written));
    figures.push_some("raw_io_bytes_per_event", per_event(raw.written));
    figures.push("disk_bytes_per_event", disk_bytes as f64 / plan.stamps.total() as f64);
    figures.push_some("rss_mib", resident.map(|bytes| bytes as f64 / f64::from(1 << 20)));
    figures.push("appends_per_commit", appends_per_commit);
    figures.push("events_per_commit", appends_per_commit * events / appends as f64);
    figures.push("body_bytes_per_append", f64::from(reference.body_bytes));
    figures.push("overloaded_refusals", plan.overloads.load(Relaxed) as f64);
    figures.push("checkpoints", checkpoints(&stats) - checkpoints(&stats_before));
    figures.push("shutdown_ms", shutdown.as_secs_f64() * 1e3);
    figures.push("disk_sync_p50_ms", disk_sync_p50_ms);
    Ok((figures, stats))
}

/// What the writers share.
struct Plan {
    payloads: Payloads,
    stamps: Stamps,
    batch: u64,
    in_flight: usize,
    keys: bool,
    /// Events that no writer has taken yet. One count for all, so that they end together.
    left: AtomicU64,
    overloads: AtomicU64,
}

struct Writer {
    plan: Arc<Plan>,
    handles: Vec<(u64, Handle<Load>)>,
    next: usize,
    latencies: Histogram<u32>,
}

impl Writer {
    fn new(kuma: &Kuma, plan: &Arc<Plan>, args: &WriteArgs, number: u32) -> Result<Self> {
        let first = u64::from(number) % args.entities;
        let numbers = (first..args.entities).step_by(args.writers as usize);
        let handles = numbers.map(|entity| (entity, load::handle(kuma, entity))).collect();
        Ok(Writer { plan: plan.clone(), handles, next: 0, latencies: tasks::histogram()? })
    }

    /// Appends one event to each entity, so that it lives and has its key when the clock starts.
    async fn warm_up(mut self) -> Result<Self> {
        for _ in 0..self.handles.len() {
            self.submit(1).await?.await?;
        }
        Ok(self)
    }

    /// Appends until nothing is left, and keeps the time from before an append is sent until it is acknowledged.
    async fn run(mut self) -> Result<Histogram<u32>> {
        let mut on_the_way = FuturesUnordered::new();
        loop {
            while on_the_way.len() < self.plan.in_flight
                && let Some(count) = self.take()
            {
                let start = Instant::now();
                let pending = self.submit(count).await?;
                on_the_way.push(async move { (start, pending.await) });
            }
            let Some((start, outcome)) = on_the_way.next().await else { break };
            outcome?;
            tasks::record(&mut self.latencies, start);
        }
        Ok(self.latencies)
    }

    /// How many events the next append has; none when all are taken.
    fn take(&self) -> Option<u64> {
        let batch = self.plan.batch;
        let left = self.plan.left.fetch_update(Relaxed, Relaxed, |left| (left > 0).then(|| left.saturating_sub(batch)));
        left.ok().map(|left| left.min(batch))
    }

    /// Sends an append to the next of the entities. What is refused as overloaded is sent again after the time that was told.
    async fn submit(&mut self, count: u64) -> Result<Pending> {
        let plan = &self.plan;
        let (entity, handle) = self.handles.get(self.next).context("a writer without an entity")?;
        self.next = (self.next + 1) % self.handles.len();
        let stamps = plan.stamps.take(*entity, count);
        loop {
            let mut append = handle.append_all(plan.payloads.events(*entity, stamps.clone()));
            if plan.keys {
                append = append.idempotency_key(stamps.start.to_le_bytes());
            }
            match append.submit().await {
                Err(AppendError::Unavailable(Unavailable::Overloaded { retry_after, .. })) => {
                    plan.overloads.fetch_add(1, Relaxed);
                    tokio::time::sleep(retry_after).await;
                }
                outcome => return Ok(outcome?),
            }
        }
    }
}

/// Group commits of all shards between two readings, and the appends in them.
fn groups_and_entries(before: &Stats, after: &Stats) -> (u64, u64) {
    let sum = |stats: &Stats| {
        let writers = stats.shards.iter().filter_map(|shard| shard.writer);
        writers.fold((0, 0), |(groups, entries), writer| (groups + writer.groups, entries + writer.entries))
    };
    let ((groups, entries), (groups_before, entries_before)) = (sum(after), sum(before));
    (groups - groups_before, entries - entries_before)
}

fn checkpoints(stats: &Stats) -> f64 {
    stats.shards.iter().filter_map(|shard| shard.writer).map(|writer| writer.checkpoints).sum::<u64>() as f64
}
