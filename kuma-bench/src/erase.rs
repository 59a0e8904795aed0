//! `erase`: entities erased from a full shard, alone, under load and in bulk, against a bare delete of the same rows.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use hdrhistogram::Histogram;
use kuma_core::{Handle, Kuma, Pending, Reason, Stats};
use rusqlite::Connection;
use serde::Serialize;

use crate::{
    Common,
    frame::{self, Figures, Frame},
    load::{self, Load, Payloads},
    progress::Progress,
    store, tasks,
    usage::{self, Machine, Usage},
};

#[derive(Clone, Debug, clap::Args, Serialize)]
pub(crate) struct EraseArgs {
    /// Events of each entity that is erased alone, one event a commit, spread over the whole shard
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(10..=1_000_000))]
    events: u64,
    /// MiB of other entities' events in the shard
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    fill: u64,
    /// Entities that are erased in bulk
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    bulk: u64,
    /// Events of each of them, one event a commit
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    bulk_events: u64,
    /// Random bytes in each event
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(i64::from(load::PAYLOAD_BYTES_MIN)..=1_000_000))]
    payload: u32,
    /// Appends a second to other entities of the shard while entities are erased under load
    #[arg(long, default_value_t = 2000, value_parser = clap::value_parser!(u64).range(20..=1_000_000))]
    load: u64,
    #[command(flatten)]
    #[serde(flatten)]
    common: Common,
}

/// Entities that are erased: alone, under load, and by the reference.
const ALONE: u64 = 8;
const UNDER_LOAD: u64 = 8;
const REFERENCE: u64 = 4;
const VICTIMS: u64 = ALONE + UNDER_LOAD + REFERENCE;
/// Entities that fill the shard and are appended to under load, and the first of them.
const NEIGHBOURS: u64 = 20;
const FIRST_NEIGHBOUR: u64 = 1_000;
const FIRST_IN_BULK: u64 = 10_000;
/// Events in a commit of the filling.
const FILL_BATCH: u64 = 100;
/// Appends that are on their way at a time while the store is filled.
const IN_FLIGHT: usize = 512;
/// How long appends are measured without erasures, and at least with them.
const LOAD_TIME: Duration = Duration::from_secs(5);

pub(crate) async fn run(mut args: EraseArgs) -> Result<()> {
    let base = args.common.prepare()?;
    args.common.shards.get_or_insert(1);
    let (mut runs, mut durability) = (Vec::new(), String::new());
    for run in 1..=args.common.runs {
        let progress = Progress::of_run(run, args.common.runs);
        let (figures, stats) = one_run(&args, &base, &progress).await.with_context(|| format!("run {run}"))?;
        durability = stats.durability.as_str().to_owned();
        runs.push(figures);
    }
    let json = args.common.json.clone();
    Frame::new("erase", durability, Machine::this(&base), serde_json::to_value(&args)?, runs).publish(json.as_deref())
}

async fn one_run(args: &EraseArgs, base: &Path, progress: &Progress) -> Result<(Figures, Stats)> {
    let mut figures = Figures::default();
    let per_1000 = |ms: f64| ms * 1e3 / args.events as f64;
    // The same entities in a store that holds little else.
    let small = store::temporary(base)?;
    let kuma = store::start(store::options(small.path(), args.common.shards).scrub_bytes_per_second(0)).await?;
    fill(&EraseArgs { fill: 1, bulk: 1, ..args.clone() }, &kuma, progress).await?;
    progress.phase("erase from a small shard", ALONE);
    let (small_ms, _) = erase_alone(args, &kuma, 0..ALONE, progress).await?;
    kuma.shutdown().await;
    drop((kuma, small));

    let directory = store::temporary(base)?;
    let kuma = store::start(store::options(directory.path(), args.common.shards).scrub_bytes_per_second(0)).await?;
    fill(args, &kuma, progress).await?;
    figures.push("store_mib", usage::disk_bytes(directory.path())? as f64 / f64::from(1 << 20));

    progress.phase("erase", ALONE);
    let (ms, written) = erase_alone(args, &kuma, 0..ALONE, progress).await?;
    figures.push("erase_ms_per_1000_events", per_1000(ms));
    figures
        .push_some("erase_io_kib_per_event", written.map(|bytes| bytes as f64 / 1024.0 / (ALONE * args.events) as f64));
    figures.push("small_store_ratio", ms / small_ms.max(1e-9));

    progress.phase("append without erasures", 0);
    let appends = Appends::start(&kuma, args);
    tokio::time::sleep(LOAD_TIME).await;
    let quiet = appends.stop().await?;
    progress.phase("append and erase", UNDER_LOAD);
    let appends = Appends::start(&kuma, args);
    let started = Instant::now();
    let (loaded_ms, _) = erase_alone(args, &kuma, ALONE..ALONE + UNDER_LOAD, progress).await?;
    let erasing = started.elapsed();
    let beside = appends.stop().await?;
    let ms_of = |latencies: &Histogram<u32>, quantile| latencies.value_at_quantile(quantile) as f64 / 1e6;
    figures.push("erase_under_load_ms_per_1000_events", per_1000(loaded_ms));
    figures.push("erasing_seconds_under_load", erasing.as_secs_f64());
    figures.push("append_p50_ms", ms_of(&quiet, 0.5));
    figures.push("append_p99_ms", ms_of(&quiet, 0.99));
    figures.push("append_p99_while_erasing_ms", ms_of(&beside, 0.99));
    figures.push("append_max_while_erasing_ms", ms_of(&beside, 1.0));
    figures.push("added_append_p99_ms", ms_of(&beside, 0.99) - ms_of(&quiet, 0.99));

    progress.phase("erase in bulk", args.bulk);
    let entities = (0..args.bulk).map(|number| load::handle(&kuma, FIRST_IN_BULK + number).raw().clone());
    let started = Instant::now();
    let done = kuma.erase_many(entities, Reason::new("benchmark"), |_, _| progress.add(1)).await?;
    let seconds = started.elapsed().as_secs_f64();
    ensure!(done.erased == args.bulk, "{done:?}");
    figures.push("erasures_per_second", args.bulk as f64 / seconds);

    progress.phase("verify", 0);
    let found = kuma.verify(|_| {}).await?;
    ensure!(found.is_clean(), "verify found damage: {found:?}");
    let stats = kuma.stats();
    kuma.shutdown().await;
    drop(kuma);

    progress.phase("reference", REFERENCE);
    let path = directory.path().to_owned();
    let rows = args.events;
    let raw_ms = tokio::task::spawn_blocking(move || reference(&path, rows)).await??;
    figures.push("raw_delete_ms_per_1000_rows", per_1000(raw_ms));
    figures.push("erase_ratio", ms / raw_ms.max(1e-9));
    Ok((figures, stats))
}

/// Commits of the victims, of those in bulk and of their neighbours, spread evenly over the log.
async fn fill(args: &EraseArgs, kuma: &Kuma, progress: &Progress) -> Result<()> {
    let payloads = Payloads::new(args.payload);
    let commits = (args.fill << 20).div_ceil(FILL_BATCH * u64::from(args.payload));
    let rounds = args.events;
    progress.phase("fill", rounds);
    let mut window: Vec<Pending> = Vec::with_capacity(IN_FLIGHT);
    let (mut neighbours, mut in_bulk) = (0, 0);
    let victims: Vec<Handle<Load>> = (0..VICTIMS).map(|number| load::handle(kuma, number)).collect();
    for round in 1..=rounds {
        for (number, victim) in (0..).zip(&victims) {
            push(&mut window, victim.append_all(payloads.events(number, round..round + 1)).submit().await?).await?;
        }
        while neighbours < commits * round / rounds {
            let number = FIRST_NEIGHBOUR + neighbours % NEIGHBOURS;
            let first = 1 + neighbours / NEIGHBOURS * FILL_BATCH;
            let handle = load::handle(kuma, number);
            let append = handle.append_all(payloads.events(number, first..first + FILL_BATCH));
            push(&mut window, append.submit().await?).await?;
            neighbours += 1;
        }
        while in_bulk < args.bulk * args.bulk_events * round / rounds {
            let number = FIRST_IN_BULK + in_bulk % args.bulk;
            let stamp = 1 + in_bulk / args.bulk;
            let handle = load::handle(kuma, number);
            push(&mut window, handle.append_all(payloads.events(number, stamp..stamp + 1)).submit().await?).await?;
            in_bulk += 1;
        }
        progress.add(1);
    }
    settle(&mut window).await
}

async fn push(window: &mut Vec<Pending>, append: Pending) -> Result<()> {
    window.push(append);
    if window.len() >= IN_FLIGHT { settle(window).await } else { Ok(()) }
}

async fn settle(window: &mut Vec<Pending>) -> Result<()> {
    for append in window.drain(..) {
        append.await?;
    }
    Ok(())
}

/// Erases entities one after the other: the median of their times, and what was written for all.
async fn erase_alone(
    args: &EraseArgs,
    kuma: &Kuma,
    victims: std::ops::Range<u64>,
    progress: &Progress,
) -> Result<(f64, Option<u64>)> {
    let before = Usage::now();
    let mut times = Vec::new();
    for number in victims {
        let handle = load::handle(kuma, number);
        let started = Instant::now();
        let receipt = handle.erase(Reason::new("benchmark")).await?;
        times.push(started.elapsed().as_secs_f64() * 1e3);
        let events: u64 = receipt.receipt.stores.iter().map(|store| store.events).sum();
        ensure!(events == args.events, "{events} events were erased, expected {}", args.events);
        progress.add(1);
    }
    Ok((frame::median(times), Usage::now().since(&before).written))
}

/// Appends at a fixed rate to the neighbours, each timed from when it was due.
struct Appends {
    stop: Arc<AtomicBool>,
    writers: Vec<tokio::task::JoinHandle<Result<Histogram<u32>>>>,
}

impl Appends {
    fn start(kuma: &Kuma, args: &EraseArgs) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let payloads = Arc::new(Payloads::new(args.payload));
        let every = Duration::from_secs_f64(NEIGHBOURS as f64 / args.load as f64);
        let writer = |number| {
            let (stop, payloads) = (stop.clone(), payloads.clone());
            let handle = load::handle(kuma, FIRST_NEIGHBOUR + number);
            tokio::spawn(async move {
                let mut latencies = tasks::histogram()?;
                // It is brought into memory before anything is timed.
                let mut stamp = handle.read().await?.version().0;
                let mut due = Instant::now() + every.mul_f64(number as f64 / NEIGHBOURS as f64);
                while !stop.load(Relaxed) {
                    tokio::time::sleep_until(due.into()).await;
                    stamp += 1;
                    handle.append_all(payloads.events(FIRST_NEIGHBOUR + number, stamp..stamp + 1)).await?;
                    tasks::record(&mut latencies, due);
                    due += every;
                }
                Ok(latencies)
            })
        };
        Appends { stop: stop.clone(), writers: (0..NEIGHBOURS).map(writer).collect() }
    }

    async fn stop(self) -> Result<Histogram<u32>> {
        self.stop.store(true, Relaxed);
        let mut parts = Vec::new();
        for writer in self.writers {
            parts.push(writer.await??);
        }
        tasks::merge(parts)
    }
}

/// Deletes the rows of entities that were not erased with plain statements under the same pragmas, and cuts the log: the median time.
fn reference(directory: &Path, rows: u64) -> Result<f64> {
    let mut times = Vec::new();
    for connection in store::shard_files(directory)? {
        let path = connection.path().map(str::to_owned).context("a file without a name")?;
        drop(connection);
        let connection = Connection::open(path)?;
        connection.execute_batch(
            "PRAGMA synchronous = FULL; PRAGMA wal_autocheckpoint = 0; PRAGMA secure_delete = ON; PRAGMA cache_size = -16000",
        )?;
        let sql = "SELECT log.eid FROM log JOIN entity USING (eid) WHERE log.count = 1 AND entity.erased_at IS NULL
                   GROUP BY log.eid HAVING count(*) = ? ORDER BY min(log.position) LIMIT ?";
        let mut statement = connection.prepare(sql)?;
        let entities: Vec<i64> =
            statement.query_map([rows as i64, REFERENCE as i64], |row| row.get(0))?.collect::<rusqlite::Result<_>>()?;
        for eid in entities {
            let started = Instant::now();
            connection.execute_batch("BEGIN IMMEDIATE")?;
            let positions = "DELETE FROM log WHERE position IN (SELECT position FROM log_index WHERE eid = ?)";
            let deleted = connection.execute(positions, [eid])?;
            ensure!(deleted as u64 == rows, "{deleted} rows, expected {rows}");
            connection.execute("DELETE FROM log_index WHERE eid = ?", [eid])?;
            connection.execute_batch("COMMIT")?;
            connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))?;
            times.push(started.elapsed().as_secs_f64() * 1e3);
        }
    }
    ensure!(!times.is_empty(), "there is no entity left for the reference");
    Ok(frame::median(times))
}
