//! `replay`: a long history brought into memory, from its events and from a snapshot, against a bare read of the same rows.

use std::{path::Path, time::Instant};

use anyhow::{Context, Result, ensure};
use kuma_core::{Direction, Handle, Kuma, Options, Stats};
use serde::Serialize;

use crate::{
    Common,
    activate::{reference, warm_page_cache},
    frame::{Figures, Frame},
    load::{self, Load, Payloads},
    progress::Progress,
    store, tasks,
    usage::{self, Machine},
};

#[derive(Clone, Debug, clap::Args, Serialize)]
pub(crate) struct ReplayArgs {
    /// Events of the one entity
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1..=100_000_000))]
    events: u64,
    /// Events in each commit
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=4096))]
    batch: u64,
    /// Random bytes in each event
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(i64::from(load::PAYLOAD_BYTES_MIN)..=1_000_000))]
    payload: u32,
    #[command(flatten)]
    #[serde(flatten)]
    common: Common,
}

/// Appends that are on their way at a time while the store is filled; an entity admits 1024.
const IN_FLIGHT: u64 = 1000;
/// How often the entity is brought into memory from its snapshot.
const ACTIVATIONS: u64 = 100;

pub(crate) async fn run(mut args: ReplayArgs) -> Result<()> {
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
    Frame::new("replay", durability, Machine::this(&base), serde_json::to_value(&args)?, runs).publish(json.as_deref())
}

async fn one_run(args: &ReplayArgs, base: &Path, progress: &Progress) -> Result<(Figures, Stats)> {
    let directory = store::temporary(base)?;
    // A scrub in the background would be measured along.
    let options = || store::options(directory.path(), args.common.shards).scrub_bytes_per_second(0);
    let stats = fill(args, options(), progress).await?;
    warm_page_cache(directory.path())?;
    let mut figures = Figures::default();

    progress.phase("replay", 1);
    let (kuma, handle) = open(options().no_snapshots()).await?;
    usage::forget_peak();
    let before = usage::resident_bytes();
    let seconds = read(&handle, args.events).await?;
    figures.push("replay_events_per_second", args.events as f64 / seconds);
    figures.push("replay_ms", seconds * 1e3);
    let grown = before.zip(usage::peak_resident_bytes()).map(|(before, peak)| peak.saturating_sub(before));
    figures.push_some("replay_rss_mib", grown.map(|bytes| bytes as f64 / f64::from(1 << 20)));
    progress.add(1);

    progress.phase("history", args.events);
    let start = Instant::now();
    let mut history = handle.history(.., Direction::Forward);
    let mut events = 0;
    while let Some(event) = history.next().await {
        events = event?.version.0;
        progress.add(1);
    }
    ensure!(events == args.events, "the history ends at version {events}");
    figures.push("history_events_per_second", events as f64 / start.elapsed().as_secs_f64());
    kuma.shutdown().await;
    drop((kuma, handle));

    progress.phase("activate", ACTIVATIONS);
    let (kuma, handle) = open(options()).await?;
    figures.push("snapshot_activation_first_ms", read(&handle, args.events).await? * 1e3);
    let mut latencies = tasks::histogram()?;
    for _ in 0..ACTIVATIONS {
        handle.raw().passivate().await?;
        let start = Instant::now();
        read(&handle, args.events).await?;
        tasks::record(&mut latencies, start);
        progress.add(1);
    }
    let ms = |quantile| latencies.value_at_quantile(quantile) as f64 / 1e6;
    figures.push("snapshot_activation_ms", ms(0.5));
    figures.push("snapshot_activation_p99_ms", ms(0.99));
    ensure!(kuma.stats().snapshots_ignored == 0, "a snapshot was ignored");
    kuma.shutdown().await;
    drop((kuma, handle));

    progress.phase("reference", 0);
    let path = directory.path().to_owned();
    let rows = args.events.div_ceil(args.batch);
    let raw = tokio::task::spawn_blocking(move || reference(&path, rows)).await??;
    let raw_seconds = raw.value_at_quantile(0.5) as f64 / 1e9;
    figures.push("raw_read_ms", raw_seconds * 1e3);
    figures.push("replay_ratio", seconds / raw_seconds.max(1e-9));
    Ok((figures, stats))
}

async fn fill(args: &ReplayArgs, options: Options, progress: &Progress) -> Result<Stats> {
    progress.phase("append", args.events);
    let (kuma, handle) = open(options).await?;
    let payloads = Payloads::new(args.payload);
    let mut first = 1;
    while first <= args.events {
        let mut pending = Vec::new();
        while first <= args.events && (pending.len() as u64) < IN_FLIGHT {
            let end = (first + args.batch).min(args.events + 1);
            pending.push(handle.append_all(payloads.events(0, first..end)).submit().await?);
            progress.add(end - first);
            first = end;
        }
        for append in pending {
            append.await?;
        }
    }
    let stats = kuma.stats();
    kuma.shutdown().await;
    Ok(stats)
}

async fn open(options: Options) -> Result<(Kuma, Handle<Load>)> {
    let kuma = store::start(options).await?;
    let handle = load::handle(&kuma, 0);
    Ok((kuma, handle))
}

/// Reads the state, and says how long that took.
async fn read(handle: &Handle<Load>, events: u64) -> Result<f64> {
    let start = Instant::now();
    let current = handle.read().await?;
    let seconds = start.elapsed().as_secs_f64();
    ensure!(current.version().0 == events && current.events == events, "the entity is at {}", current.version());
    Ok(seconds)
}
