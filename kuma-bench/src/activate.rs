//! `activate`: the first use of an entity that is not in memory, against a bare read of the same rows in the same run.

use std::{path::Path, sync::Arc, time::Instant};

use anyhow::{Context, Result, ensure};
use hdrhistogram::Histogram;
use kuma_core::Stats;
use rusqlite::Statement;
use serde::Serialize;

use crate::{
    Common,
    frame::{Figures, Frame},
    load::{self, Payloads},
    progress::Progress,
    store, tasks,
    usage::Machine,
};

#[derive(Clone, Debug, clap::Args, Serialize)]
pub(crate) struct ActivateArgs {
    /// Entities, each activated once in each run; more would not all stay in the store's default memory budget
    #[arg(long, default_value_t = 2000, value_parser = clap::value_parser!(u64).range(1..=90_000))]
    entities: u64,
    /// Events of each entity, one in each commit
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    events: u64,
    /// Random bytes in each event
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(i64::from(load::PAYLOAD_BYTES_MIN)..=1_000_000))]
    payload: u32,
    #[command(flatten)]
    #[serde(flatten)]
    common: Common,
}

/// Appends of one entity that are on their way at a time while the store is filled; it admits 1024.
const IN_FLIGHT: u64 = 256;

pub(crate) async fn run(mut args: ActivateArgs) -> Result<()> {
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
    Frame::new("activate", durability, Machine::this(&base), serde_json::to_value(&args)?, runs)
        .publish(json.as_deref())
}

async fn one_run(args: &ActivateArgs, base: &Path, progress: &Progress) -> Result<(Figures, Stats)> {
    let directory = store::temporary(base)?;
    progress.phase("append", 0);
    let kuma = store::start(store::options(directory.path(), args.common.shards)).await?;
    let (payloads, events) = (Arc::new(Payloads::new(args.payload)), args.events);
    let fill = |entity| {
        let (handle, payloads) = (load::handle(&kuma, entity), payloads.clone());
        async move {
            for first in (1..=events).step_by(IN_FLIGHT as usize) {
                let mut pending = Vec::new();
                for stamp in first..=events.min(first + IN_FLIGHT - 1) {
                    pending.push(handle.append_all(payloads.events(entity, stamp..stamp + 1)).submit().await?);
                }
                for append in pending {
                    append.await?;
                }
            }
            Ok(())
        }
    };
    tasks::join_bounded((0..args.entities).map(fill)).await?;
    let stats = kuma.stats();
    kuma.shutdown().await;
    drop(kuma);
    warm_page_cache(directory.path())?;

    progress.phase("activate", args.entities);
    let kuma = store::start(store::options(directory.path(), None)).await?;
    let mut latencies = tasks::histogram()?;
    for entity in shuffled((0..args.entities).collect()) {
        let handle = load::handle(&kuma, entity);
        let start = Instant::now();
        let current = handle.read().await?;
        tasks::record(&mut latencies, start);
        ensure!(
            current.version().0 == events && current.events == events,
            "entity {entity} is at {}",
            current.version()
        );
        progress.add(1);
    }
    kuma.shutdown().await;
    drop(kuma);

    progress.phase("reference", 0);
    let path = directory.path().to_owned();
    let reference = tokio::task::spawn_blocking(move || reference(&path, events)).await??;
    let quantile_ms = |latencies: &Histogram<u32>, quantile| latencies.value_at_quantile(quantile) as f64 / 1e6;
    let mut figures = Figures::default();
    figures.push("activate_p50_ms", quantile_ms(&latencies, 0.5));
    figures.push("activate_p99_ms", quantile_ms(&latencies, 0.99));
    figures.push("activate_max_ms", latencies.max() as f64 / 1e6);
    figures.push("reference_p50_ms", quantile_ms(&reference, 0.5));
    figures.push("reference_p99_ms", quantile_ms(&reference, 0.99));
    figures.push(
        "activate_ratio",
        latencies.value_at_quantile(0.5) as f64 / reference.value_at_quantile(0.5).max(1) as f64,
    );
    Ok((figures, stats))
}

/// The same rows by a prepared statement on an open connection: what reading them takes, without opening or folding them.
pub(crate) fn reference(directory: &Path, events: u64) -> Result<Histogram<u32>> {
    let files = store::shard_files(directory)?;
    let (mut entities, mut selects) = (Vec::new(), Vec::new());
    for (file, connection) in files.iter().enumerate() {
        // As large as that of Kuma's readers.
        connection.execute_batch("PRAGMA cache_size = -2000; PRAGMA mmap_size = 0;")?;
        let mut select = connection.prepare("SELECT eid FROM entity")?;
        let eids = select.query_map([], |row| row.get::<_, i64>(0))?;
        entities.extend(eids.collect::<rusqlite::Result<Vec<i64>>>()?.into_iter().map(|eid| (file, eid)));
        selects.push(connection.prepare(
            "SELECT log.* FROM log_index CROSS JOIN log ON log.position = log_index.position
             WHERE log_index.eid = ? AND log_index.version > 0 ORDER BY log_index.version",
        )?);
    }
    let mut latencies = tasks::histogram()?;
    for (file, eid) in shuffled(entities) {
        let select = selects.get_mut(file).context("a shard file is gone")?;
        let start = Instant::now();
        let rows = read_rows(select, eid)?;
        tasks::record(&mut latencies, start);
        ensure!(rows == events, "an entity has {rows} rows, expected {events}");
    }
    Ok(latencies)
}

fn read_rows(select: &mut Statement<'_>, eid: i64) -> Result<u64> {
    let mut rows = select.query([eid])?;
    let mut count = 0;
    while let Some(row) = rows.next()? {
        let numbers: [i64; 9] = [0, 1, 2, 3, 4, 5, 6, 7, 9].map(|column| row.get(column).unwrap_or_default());
        let body: Vec<u8> = row.get(10)?;
        std::hint::black_box((numbers, body));
        count += 1;
    }
    Ok(count)
}

/// Reads every file once.
pub(crate) fn warm_page_cache(directory: &Path) -> Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        if entry.metadata()?.is_file() {
            let mut file = std::fs::File::open(entry.path())?;
            std::io::copy(&mut file, &mut std::io::sink())?;
        }
    }
    Ok(())
}

/// In an order that says nothing about where things are stored, and is the same in each run.
fn shuffled<T>(items: Vec<T>) -> Vec<T> {
    let mut items: Vec<(u64, T)> = (0..).map(load::mix).zip(items).collect();
    items.sort_by_key(|(place, _)| *place);
    items.into_iter().map(|(_, item)| item).collect()
}
