//! `project`: events on their way out, to subscribers and into read models; against bare reads of the log and bare upserts.

mod account;
mod appends;
mod readers;
mod reference;

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use hdrhistogram::Histogram;
use kuma_core::{Delivery, Filter, Handle, Kuma, Options, Pending, ProjectionHandle, Stats};
use serde::Serialize;
use tokio::sync::mpsc;

use self::{
    account::{Account, Events, InRust, Totals},
    appends::{Appends, Rate},
};
use crate::{
    Common,
    activate::warm_page_cache,
    frame::{Figures, Frame},
    load::{self, Payloads},
    progress::Progress,
    store, tasks,
    usage::Machine,
};

#[derive(Clone, Debug, clap::Args, Serialize)]
pub(crate) struct ProjectArgs {
    /// Events in the store when a subscription or a projection begins
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(100..=100_000_000))]
    events: u64,
    /// Entities that the events are spread over evenly
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    entities: u64,
    /// Events in each commit that projections catch up on
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=4096))]
    batch: u64,
    /// Bytes in each event: random ones for subscribers, about as many as JSON for projections
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(i64::from(account::PAYLOAD_BYTES_MIN)..=1_000_000))]
    payload: u32,
    /// Events a second that are appended while projections follow
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u64).range(20..=10_000_000))]
    rate: u64,
    /// Events in each of these appends
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=4096))]
    rate_batch: u64,
    /// Seconds for which each measurement beside such appends lasts
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=3600))]
    seconds: u64,
    #[command(flatten)]
    #[serde(flatten)]
    common: Common,
}

impl ProjectArgs {
    fn rate(&self) -> Rate {
        Rate { events: self.rate, batch: self.rate_batch }
    }

    fn phase(&self) -> Duration {
        Duration::from_secs(self.seconds)
    }
}

/// Appends that are on their way at a time while a store is filled.
const IN_FLIGHT: usize = 1000;
/// A projection that has not caught up after this time never will.
const CATCH_UP_MAX: Duration = Duration::from_secs(600);
/// A model that is built anew beside appends may never catch up on a machine that is too slow.
const REBUILD_MAX: Duration = Duration::from_secs(120);

pub(crate) async fn run(mut args: ProjectArgs) -> Result<()> {
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
    Frame::new("project", durability, Machine::this(&base), serde_json::to_value(&args)?, runs).publish(json.as_deref())
}

async fn one_run(args: &ProjectArgs, base: &Path, progress: &Progress) -> Result<(Figures, Stats)> {
    let mut figures = Figures::default();
    for (batch, names) in [
        (
            100,
            ["subscribe_batch100_events_per_second", "raw_read_batch100_events_per_second", "subscribe_batch100_ratio"],
        ),
        (1, ["subscribe_batch1_events_per_second", "raw_read_batch1_events_per_second", "subscribe_batch1_ratio"]),
    ] {
        let (kuma, raw) = subscribe(args, base, batch, progress).await?;
        let values = [args.events as f64 / kuma, args.events as f64 / raw, raw / kuma.max(1e-9)];
        names.into_iter().zip(values).for_each(|(name, value)| figures.push(name, value));
    }

    let directory = store::temporary(base)?;
    // A scrub in the background would be measured along.
    let options = || store::options(directory.path(), args.common.shards).scrub_bytes_per_second(0);
    let (totals, stats) = fill_accounts(args, options(), progress).await?;
    warm_page_cache(directory.path())?;
    progress.phase("reference", 0);
    let (path, filled) = (directory.path().to_owned(), args.clone());
    let raw = move || reference::upsert(&path, filled.entities, filled.events, filled.batch, totals);
    let raw_seconds = tokio::task::spawn_blocking(raw).await??;
    let kuma = store::start(options()).await?;
    let projection = catch_up(args, &kuma, totals, raw_seconds, &mut figures, progress).await?;
    live(args, &kuma, &projection, &mut figures, progress).await?;
    kuma.shutdown().await;
    Ok((figures, stats))
}

/// A subscription that catches up on a store of commits of `batch` events, and a bare read of its rows: how long each took, in seconds.
async fn subscribe(args: &ProjectArgs, base: &Path, batch: u64, progress: &Progress) -> Result<(f64, f64)> {
    let directory = store::temporary(base)?;
    let options = || store::options(directory.path(), args.common.shards).scrub_bytes_per_second(0);
    progress.phase("fill", args.events);
    let kuma = store::start(options()).await?;
    let payloads = Payloads::new(args.payload);
    let handles: Vec<_> = (0..args.entities).map(|number| load::handle(&kuma, number)).collect();
    let mut window = Window::new(progress);
    for Commit { entity, stamps } in commits(args.events, args.entities, batch) {
        let Some(handle) = handles.get(entity as usize) else { continue };
        let events = stamps.end - stamps.start;
        window.push(handle.append_all(payloads.events(entity, stamps)).submit().await?, events).await?;
    }
    window.settle().await?;
    kuma.shutdown().await;
    drop((kuma, handles));
    warm_page_cache(directory.path())?;

    progress.phase("subscribe", args.events);
    let kuma = store::start(options()).await?;
    let mut versions = vec![0; args.entities as usize];
    let (start, mut events) = (Instant::now(), 0);
    let mut subscription = kuma.subscribe(Filter::all()).open().await?;
    while events < args.events {
        let page = subscription.next_page().await?;
        for delivery in &page {
            let Delivery::Event(stored) = delivery else { bail!("that is no event: {delivery:?}") };
            let number = stored.id.rsplit('-').next().and_then(|number| number.parse::<usize>().ok());
            let version = number.and_then(|number| versions.get_mut(number)).context("the id of no entity")?;
            *version += 1;
            ensure!(
                stored.event.version.0 == *version,
                "version {} came in the place of {version}",
                stored.event.version
            );
        }
        events += page.len() as u64;
        progress.add(page.len() as u64);
    }
    let seconds = start.elapsed().as_secs_f64();
    ensure!(events == args.events && versions.iter().sum::<u64>() == events, "{events} events came");
    drop(subscription);
    kuma.shutdown().await;
    drop(kuma);

    progress.phase("reference", 0);
    let (path, rows) = (directory.path().to_owned(), commits(args.events, args.entities, batch).count() as u64);
    let raw = tokio::task::spawn_blocking(move || reference::read_logs(&path, rows)).await??;
    Ok((seconds, raw))
}

/// A commit of those that a store is filled with.
struct Commit {
    entity: u64,
    stamps: std::ops::Range<u64>,
}

/// One commit to each entity in turn. The last one may be shorter.
fn commits(events: u64, entities: u64, batch: u64) -> impl Iterator<Item = Commit> {
    (0..events.div_ceil(batch)).map(move |number| {
        let first = 1 + number / entities * batch;
        let count = batch.min(events - number * batch);
        Commit { entity: number % entities, stamps: first..first + count }
    })
}

/// Appends that are on their way.
struct Window<'a> {
    pending: Vec<Pending>,
    progress: &'a Progress,
}

impl<'a> Window<'a> {
    fn new(progress: &'a Progress) -> Self {
        Window { pending: Vec::with_capacity(IN_FLIGHT), progress }
    }

    async fn push(&mut self, append: Pending, events: u64) -> Result<()> {
        self.pending.push(append);
        self.progress.add(events);
        if self.pending.len() >= IN_FLIGHT { self.settle().await } else { Ok(()) }
    }

    async fn settle(&mut self) -> Result<()> {
        for append in self.pending.drain(..) {
            append.await?;
        }
        Ok(())
    }
}

/// Makes the store that projections catch up on, and says what all its events add up to.
async fn fill_accounts(args: &ProjectArgs, options: Options, progress: &Progress) -> Result<(Totals, Stats)> {
    progress.phase("fill", args.events);
    let kuma = store::start(options).await?;
    let events = Events::new(args.payload);
    let accounts: Vec<_> = (0..args.entities).map(|number| account::handle(&kuma, number)).collect();
    let (mut window, mut versions) = (Window::new(progress), vec![0; args.entities as usize]);
    for Commit { entity, stamps } in commits(args.events, args.entities, args.batch) {
        let (Some(handle), Some(version)) = (accounts.get(entity as usize), versions.get_mut(entity as usize)) else {
            continue;
        };
        *version = stamps.end - 1;
        let count = stamps.end - stamps.start;
        window.push(handle.append_all(events.of(entity, stamps)).submit().await?, count).await?;
    }
    window.settle().await?;
    let stats = kuma.stats();
    kuma.shutdown().await;
    Ok((Totals::of_versions(&versions), stats))
}

/// Projections that catch up: one in SQL, the same in Rust, and both at once. The one in SQL stays.
async fn catch_up(
    args: &ProjectArgs,
    kuma: &Kuma,
    totals: Totals,
    raw_seconds: f64,
    figures: &mut Figures,
    progress: &Progress,
) -> Result<ProjectionHandle> {
    progress.phase("project in SQL", 0);
    let start = Instant::now();
    let in_sql = kuma.projection(account::in_sql()?).await?;
    in_sql.caught_up(CATCH_UP_MAX).await?;
    let sql_seconds = start.elapsed().as_secs_f64();
    totals.check(&in_sql).await?;
    kuma.drop_projection(in_sql.name()).await?;

    progress.phase("project in Rust", 0);
    let start = Instant::now();
    let in_rust = kuma.projection(InRust).await?;
    in_rust.caught_up(CATCH_UP_MAX).await?;
    let rust_seconds = start.elapsed().as_secs_f64();
    totals.check(&in_rust).await?;
    kuma.drop_projection(in_rust.name()).await?;

    progress.phase("project in both", 0);
    let start = Instant::now();
    let (in_sql, in_rust) = (kuma.projection(account::in_sql()?).await?, kuma.projection(InRust).await?);
    in_sql.caught_up(CATCH_UP_MAX).await?;
    in_rust.caught_up(CATCH_UP_MAX).await?;
    let both_seconds = start.elapsed().as_secs_f64();
    for projection in [&in_sql, &in_rust] {
        totals.check(projection).await?;
    }
    kuma.drop_projection(in_rust.name()).await?;

    let events = args.events as f64;
    figures.push("sql_catch_up_events_per_second", events / sql_seconds);
    figures.push("rust_catch_up_events_per_second", events / rust_seconds);
    figures.push("both_catch_up_events_per_second", 2.0 * events / both_seconds);
    figures.push("raw_upserts_per_second", events / raw_seconds);
    figures.push("sql_ratio", raw_seconds / sql_seconds.max(1e-9));
    figures.push("rust_ratio", raw_seconds / rust_seconds.max(1e-9));
    Ok(in_sql)
}

/// Appends at a fixed rate: alone, beside a subscriber that does not read on, beside a projection, and while its model is built anew.
async fn live(
    args: &ProjectArgs,
    kuma: &Kuma,
    projection: &ProjectionHandle,
    figures: &mut Figures,
    progress: &Progress,
) -> Result<()> {
    progress.phase("activate", args.entities);
    let accounts: Arc<[Handle<Account>]> = (0..args.entities).map(|number| account::handle(kuma, number)).collect();
    let read = |number: usize| {
        let accounts = accounts.clone();
        async move {
            if let Some(account) = accounts.get(number) {
                account.read().await?;
            }
            Ok(())
        }
    };
    tasks::join_bounded((0..accounts.len()).map(read)).await?;
    let events = Arc::new(Events::new(args.payload));
    let start = |samples: &mpsc::UnboundedSender<_>| Appends::start(&accounts, &events, args.rate(), samples);
    let ms = |latencies: &Histogram<u32>, quantile| latencies.value_at_quantile(quantile) as f64 / 1e6;

    progress.phase("append alone", 0);
    projection.pause().await?;
    let (nobody, _) = mpsc::unbounded_channel();
    let appends = start(&nobody);
    tokio::time::sleep(args.phase()).await;
    let alone = appends.stop().await?;
    figures.push("append_p50_ms", ms(&alone.latencies, 0.5));
    figures.push("append_p99_ms", ms(&alone.latencies, 0.99));

    progress.phase("append beside a stuck subscriber", 0);
    let mut stuck = kuma.subscribe(Filter::all()).open().await?;
    stuck.next().await?;
    let appends = start(&nobody);
    tokio::time::sleep(args.phase()).await;
    let beside_stuck = appends.stop().await?;
    ensure!(stuck.behind() > 0, "the subscriber is not stuck");
    drop(stuck);
    figures.push("append_p99_with_stuck_subscriber_ms", ms(&beside_stuck.latencies, 0.99));

    progress.phase("append and project", 0);
    projection.resume().await?;
    projection.caught_up(CATCH_UP_MAX).await?;
    let (samples, of_appends) = mpsc::unbounded_channel();
    let reader = readers::watch_lags(projection.clone(), of_appends);
    let appends = start(&samples);
    tokio::time::sleep(args.phase()).await;
    let beside_projection = appends.stop().await?;
    let lags = reader.stop().await?;
    figures.push("append_p99_with_projection_ms", ms(&beside_projection.latencies, 0.99));
    figures.push("lag_p50_ms", ms(&lags.since_acknowledged, 0.5));
    figures.push("lag_p99_ms", ms(&lags.since_acknowledged, 0.99));
    figures.push("lag_max_ms", ms(&lags.since_acknowledged, 1.0));
    figures.push("lag_since_due_p99_ms", ms(&lags.since_due, 0.99));
    figures.push("query_p99_ms", ms(&lags.queries, 0.99));

    progress.phase("append and build anew", 0);
    let (samples, of_appends) = mpsc::unbounded_channel();
    let lag_reader = readers::watch_lags(projection.clone(), of_appends);
    let swap_reader = readers::watch_swap(projection.clone());
    let appends = start(&samples);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let begun = Instant::now();
    projection.rebuild().await?;
    while !swap_reader.is_finished() && begun.elapsed() < REBUILD_MAX {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let beside_rebuild = appends.stop().await?;
    let lags = lag_reader.stop().await?;
    let swap = swap_reader.stop().await?.swap();
    let swap = swap.with_context(|| format!("no model was built anew within {REBUILD_MAX:?}"))?;
    figures.push("append_p99_while_rebuilding_ms", ms(&beside_rebuild.latencies, 0.99));
    figures.push("lag_p99_while_rebuilding_ms", ms(&lags.since_acknowledged, 0.99));
    figures.push("rebuild_seconds", swap.after.as_secs_f64() - 1.0);
    figures.push("swap_pause_ms", swap.pause.as_secs_f64() * 1e3);
    figures.push("swap_query_max_ms", swap.query_max.as_secs_f64() * 1e3);
    figures.push("rebuild_standstill_max_ms", swap.standstill_max.as_secs_f64() * 1e3);

    let rates = [&alone, &beside_stuck, &beside_projection, &beside_rebuild].map(|appended| appended.events_per_second);
    figures.push("appended_events_per_second", rates.into_iter().fold(f64::INFINITY, f64::min));

    progress.phase("check", 0);
    projection.caught_up(CATCH_UP_MAX).await?;
    let mut versions = Vec::with_capacity(accounts.len());
    for account in &*accounts {
        versions.push(account.read().await?.version().0);
    }
    Totals::of_versions(&versions).check(projection).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commits_are_spread_evenly_and_stamps_are_dense() {
        let mut versions = [0; 3];
        let mut events = 0;
        for Commit { entity, stamps } in commits(1003, 3, 10) {
            assert_eq!(stamps.start, versions[entity as usize] + 1);
            versions[entity as usize] = stamps.end - 1;
            events += stamps.end - stamps.start;
        }
        assert_eq!((events, versions), (1003, [340, 333, 330]));
    }
}
