//! `http`: appends over HTTP on loopback, the server in a process of its own.

use std::{
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use kuma_node::{
    Config, Server,
    load::{Load, LoadReport},
};
use serde::Serialize;

use crate::{
    Common,
    dawdle::Dawdlers,
    frame::{Figures, Frame},
    progress::Progress,
    store,
    usage::Machine,
};

/// Connections of the measurement beside dawdlers: so few that nobody waits for the processor.
const FEW: usize = 4;

#[derive(Clone, Debug, clap::Args, Serialize)]
pub(crate) struct HttpArgs {
    /// How long each measurement lasts, in seconds
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
    /// Random text in each event, in bytes
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    payload: u32,
    /// Entities that are appended to
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    entities: u64,
    /// Connections of the appends of 100 events
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    batch_connections: u32,
    /// Connections of the appends of 1 event
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    connections: u32,
    /// Streams
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=1000))]
    streams: u32,
    /// Appends on their way of each stream
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    in_flight: u32,
    /// Connections that never finish their requests, beside which a few clients are measured
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(0..=10_000))]
    dawdlers: u32,
    /// JSON instead of MessagePack
    #[arg(long)]
    json_bodies: bool,
    #[command(flatten)]
    #[serde(flatten)]
    common: Common,
}

/// The server of a measurement.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct ServeArgs {
    #[arg(long)]
    data: PathBuf,
    #[arg(long)]
    shards: Option<u16>,
}

/// Answers until its standard input is closed.
pub(crate) async fn serve(args: ServeArgs) -> Result<()> {
    let config = Config {
        shards: args.shards,
        listen: ([127, 0, 0, 1], 0).into(),
        access_log: false,
        scrub_bytes_per_second: 0,
        ..Config::new(args.data)
    };
    let server = Server::start(config).await?;
    println!("{}", server.url());
    tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut Vec::new())).await??;
    server.stop().await;
    Ok(())
}

/// A server in a process of its own; it ends when it is dropped.
struct Served {
    child: Child,
    input: Option<ChildStdin>,
    url: String,
}

impl Served {
    fn start(data: &Path, shards: Option<u16>) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("http-serve").arg("--data").arg(data);
        if let Some(shards) = shards {
            command.args(["--shards", &shards.to_string()]);
        }
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (input, output) = (child.stdin.take(), child.stdout.take().context("no standard output")?);
        let mut url = String::new();
        BufReader::new(output).read_line(&mut url)?;
        let url = url.trim().to_owned();
        ensure!(url.starts_with("http"), "the server did not start");
        Ok(Served { child, input, url })
    }

    /// User and system time, and resident memory now.
    fn usage(&self) -> Option<(f64, f64)> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).ok()?;
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let ticks: f64 = fields.get(11)?.parse::<f64>().ok()? + fields.get(12)?.parse::<f64>().ok()?;
        let pages: f64 = fields.get(21)?.parse().ok()?;
        Some((ticks / 100.0, pages * 4096.0 / f64::from(1 << 20)))
    }

    async fn stop(mut self) -> Result<()> {
        self.input.take();
        let status = tokio::task::spawn_blocking(move || self.child.wait()).await??;
        ensure!(status.success(), "the server ended with {status}");
        Ok(())
    }
}

pub(crate) async fn run(args: HttpArgs) -> Result<()> {
    let base = args.common.prepare()?;
    let mut runs = Vec::new();
    for run in 1..=args.common.runs {
        let progress = Arc::new(Progress::of_run(run, args.common.runs));
        runs.push(one_run(&args, &base, &progress).await.with_context(|| format!("run {run}"))?);
    }
    let json = args.common.json.clone();
    Frame::new("http", "full".to_owned(), Machine::this(&base), serde_json::to_value(&args)?, runs)
        .publish(json.as_deref())
}

/// What the figures of a measurement are called.
struct Names {
    warm_up: &'static str,
    phase: &'static str,
    events_per_second: &'static str,
    p50_ms: &'static str,
    p99_ms: &'static str,
    server_cpu_us: &'static str,
    server_rss_mib: &'static str,
}

macro_rules! names {
    ($phase:literal) => {
        Names {
            warm_up: concat!($phase, ": warm up"),
            phase: $phase,
            events_per_second: concat!($phase, "_events_per_second"),
            p50_ms: concat!($phase, "_p50_ms"),
            p99_ms: concat!($phase, "_p99_ms"),
            server_cpu_us: concat!($phase, "_server_cpu_us_per_event"),
            server_rss_mib: concat!($phase, "_server_rss_mib"),
        }
    };
}

async fn one_run(args: &HttpArgs, base: &Path, progress: &Arc<Progress>) -> Result<Figures> {
    let mut figures = Figures::default();
    let load = Load {
        payload_bytes: args.payload as usize,
        entities: args.entities,
        message_pack: !args.json_bodies,
        duration: Duration::from_secs_f64(args.seconds),
        ..Load::default()
    };
    let batch100 = Load { connections: args.batch_connections as usize, batch: 100, ..load.clone() };
    measure(&names!("batch100"), batch100, args, base, progress, &mut figures).await?;
    let batch1 = Load { connections: args.connections as usize, ..load.clone() };
    measure(&names!("batch1"), batch1, args, base, progress, &mut figures).await?;
    let stream = Load { connections: args.streams as usize, in_flight: Some(args.in_flight as usize), ..load.clone() };
    measure(&names!("stream_batch1"), stream, args, base, progress, &mut figures).await?;
    if args.dawdlers > 0 {
        let few = Load { connections: FEW, ..load };
        beside_dawdlers(few, args, base, progress, &mut figures).await?;
    }
    Ok(figures)
}

/// What a few clients see, alone and then beside connections that never finish their requests.
async fn beside_dawdlers(
    load: Load,
    args: &HttpArgs,
    base: &Path,
    progress: &Arc<Progress>,
    figures: &mut Figures,
) -> Result<()> {
    let directory = store::temporary(base)?;
    let served = Served::start(&directory.path().join("store"), args.common.shards)?;
    progress.phase("few: warm up", 0);
    sent(load.clone(), &served.url, progress).await?;
    progress.phase("few alone", 0);
    let alone = sent(load.clone(), &served.url, progress).await?;
    progress.phase("few beside dawdlers", 0);
    let dawdlers = Dawdlers::start(&served.url, args.dawdlers).await?;
    let beside = sent(load, &served.url, progress).await?;
    drop(dawdlers);
    for report in [&alone, &beside] {
        ensure!(report.failures == 0, "{} of {} appends failed: {:?}", report.failures, report.appends, report.failure);
    }
    figures.push("few_p50_ms", alone.p50_ms);
    figures.push("few_p99_ms", alone.p99_ms);
    figures.push("few_beside_dawdlers_p50_ms", beside.p50_ms);
    figures.push("few_beside_dawdlers_p99_ms", beside.p99_ms);
    figures.push("few_beside_dawdlers_p99_ratio", beside.p99_ms / alone.p99_ms.max(f64::MIN_POSITIVE));
    served.stop().await
}

/// A load against a store of its own. What it brings into memory is there when it begins.
async fn measure(
    names: &Names,
    load: Load,
    args: &HttpArgs,
    base: &Path,
    progress: &Arc<Progress>,
    figures: &mut Figures,
) -> Result<()> {
    let directory = store::temporary(base)?;
    let served = Served::start(&directory.path().join("store"), args.common.shards)?;
    progress.phase(names.warm_up, 0);
    let warm_up = Load {
        in_flight: Some(1024),
        connections: 1,
        batch: 1,
        events_max: 2 * args.entities,
        duration: Duration::from_secs(60),
        ..load.clone()
    };
    let warm = sent(warm_up, &served.url, progress).await?;
    ensure!(warm.failures == 0, "{:?}", warm.failure);
    let before = served.usage();
    progress.phase(names.phase, 0);
    let report = sent(load, &served.url, progress).await?;
    ensure!(report.failures == 0, "{} of {} appends failed: {:?}", report.failures, report.appends, report.failure);
    let after = served.usage();
    figures.push(names.events_per_second, report.events_per_second);
    figures.push(names.p50_ms, report.p50_ms);
    figures.push(names.p99_ms, report.p99_ms);
    if let (Some((cpu_before, _)), Some((cpu, rss))) = (before, after) {
        figures.push(names.server_cpu_us, (cpu - cpu_before) * 1e6 / report.events.max(1) as f64);
        figures.push(names.server_rss_mib, rss);
    }
    served.stop().await
}

async fn sent(load: Load, url: &str, progress: &Arc<Progress>) -> Result<LoadReport> {
    let client = kuma_node::load::client()?;
    let progress = progress.clone();
    Ok(load.send(client, None, url, move |events| progress.add(events)).await?)
}
