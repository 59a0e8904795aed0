//! `handoff`: slots on their way between nodes while clients go on: what it costs them, and whether anything is lost.
//!
//! Three nodes in one process, linked over loopback, are filled and serve clients at a fixed rate. Two more join at once; then two of the five are
//! drained. Afterwards every entity is read back and compared with what was acknowledged.

use std::{
    collections::BTreeSet,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use anyhow::{Result, bail, ensure};
use hdrhistogram::Histogram;
use kuma_cluster::{Node, NodeOptions};
use kuma_core::{Command, Entity, ExecuteError, SLOTS};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::{
    Common,
    frame::{self, Figures},
    load,
    nodes::{Cluster, PATIENCE, SHARDS},
    progress::Progress,
    tasks, usage,
};

#[derive(Clone, Debug, clap::Args, Serialize)]
pub(crate) struct HandoffArgs {
    /// Entities that the cluster has
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    entities: u64,
    /// Events of each when the first slot moves, one in each commit
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    events: u64,
    /// Clients
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    clients: u64,
    /// Requests a second of all of them together: a third each appends, reads and commands
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    rate: u64,
    #[command(flatten)]
    #[serde(flatten)]
    common: Common,
}

/// Counts, and remembers what was added when, so that nothing can be lost or doubled unseen.
#[derive(Default, Clone, Serialize, Deserialize)]
struct Tally {
    stamps: Vec<u64>,
    taken: u64,
}

#[derive(Serialize, Deserialize)]
enum TallyEvent {
    Added { stamp: u64, filler: String },
    Taken,
}

impl Entity for Tally {
    const KIND: &'static str = "tally";
    type Event = TallyEvent;

    fn apply(&mut self, event: &TallyEvent) {
        match event {
            TallyEvent::Added { stamp, .. } => self.stamps.push(*stamp),
            TallyEvent::Taken => self.taken += 1,
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Take;

#[derive(Debug, thiserror::Error, Serialize, Deserialize)]
#[error("there is nothing left")]
struct Empty;

impl Command<Tally> for Take {
    type Rejection = Empty;

    fn decide(self, tally: &Tally) -> Result<Vec<TallyEvent>, Empty> {
        match tally.taken < tally.stamps.len() as u64 {
            true => Ok(vec![TallyEvent::Taken]),
            false => Err(Empty),
        }
    }
}

fn added(stamp: u64) -> TallyEvent {
    TallyEvent::Added { stamp, filler: "x".repeat(160) }
}

fn id(entity: u64) -> String {
    format!("tally-{entity}")
}

/// The load before the first slot moves, to compare with.
const BEFORE: Duration = Duration::from_secs(5);

pub(crate) async fn run(mut args: HandoffArgs) -> Result<()> {
    let base = args.common.prepare()?;
    args.common.shards = args.common.shards.or(Some(SHARDS));
    let params = serde_json::to_value(&args)?;
    frame::publish_runs("handoff", &args.common, &base, params, async |progress| one_run(&args, &base, progress).await)
        .await
}

/// What clients did.
struct Clients {
    nodes: Mutex<Vec<Node>>,
    acknowledged: Mutex<Vec<BTreeSet<u64>>>,
    failed: Mutex<Vec<String>>,
    phase: Mutex<Histogram<u32>>,
    is_over: AtomicBool,
}

impl Clients {
    async fn go(self: Arc<Self>, number: u64, args: HandoffArgs) -> Result<()> {
        let pause = Duration::from_secs_f64(args.clients as f64 / args.rate as f64);
        let mut due = Instant::now() + pause.mul_f64(number as f64 / args.clients as f64);
        let mut turn = 0_u64;
        while !self.is_over.load(SeqCst) {
            tokio::time::sleep_until(due.into()).await;
            let mixed = load::mix(number << 40 | turn);
            let node = {
                let nodes = self.nodes.lock();
                nodes[(mixed % nodes.len() as u64) as usize].clone()
            };
            let entity = (mixed >> 8) % args.entities;
            let handle = node.entity::<Tally>(id(entity));
            let stamp = 1 << 60 | number << 40 | turn;
            let outcome = match turn % 3 {
                0 => handle.read().await.map(|_| ()).map_err(|error| error.to_string()),
                1 => match handle.execute(Take).await {
                    Ok(_) | Err(ExecuteError::Rejected(_)) => Ok(()),
                    Err(ExecuteError::Failed(error)) => Err(error.to_string()),
                },
                _ => match handle.append(added(stamp)).idempotency_key(stamp.to_le_bytes()).await {
                    Ok(_) => {
                        self.acknowledged.lock()[entity as usize].insert(stamp);
                        Ok(())
                    }
                    Err(error) => Err(error.to_string()),
                },
            };
            tasks::record(&mut self.phase.lock(), due);
            if let Err(why) = outcome {
                self.failed.lock().push(why);
            }
            turn += 1;
            due += pause;
        }
        Ok(())
    }

    /// The latencies since the last time, and begins anew.
    fn latencies(&self) -> Result<Histogram<u32>> {
        Ok(std::mem::replace(&mut *self.phase.lock(), tasks::histogram()?))
    }
}

async fn one_run(args: &HandoffArgs, base: &Path, progress: &Progress) -> Result<(Figures, String)> {
    let shards = args.common.shards.unwrap_or(SHARDS);
    let kinds = |options: NodeOptions| options.entity::<Tally>().command::<Tally, Take>();
    let mut cluster = Cluster::found(base, shards, kinds).await?;
    progress.phase("fill", args.entities);
    fill(args, &cluster.nodes[0].0, progress).await?;
    progress.phase("three nodes", 0);
    for name in ["n2", "n3"] {
        let node = cluster.start(name).await?;
        cluster.nodes.push(node);
    }
    cluster.settled().await?;
    let durability = cluster.nodes[0].0.store().stats().durability.as_str().to_owned();

    let clients = Arc::new(Clients {
        nodes: Mutex::new(cluster.nodes()),
        acknowledged: Mutex::new(vec![BTreeSet::new(); args.entities as usize]),
        failed: Mutex::default(),
        phase: Mutex::new(tasks::histogram()?),
        is_over: AtomicBool::new(false),
    });
    let all: Vec<_> = (0..args.clients).map(|number| tokio::spawn(clients.clone().go(number, args.clone()))).collect();
    progress.phase("clients alone", 0);
    tokio::time::sleep(BEFORE).await;
    let before = clients.latencies()?;

    progress.phase("two join", 0);
    usage::forget_peak();
    let given = |cluster: &Cluster| cluster.nodes.iter().map(|(node, _)| node.move_totals().given).sum::<u64>();
    let given_before = given(&cluster);
    let begun = Instant::now();
    let (fourth, fifth) = tokio::join!(cluster.start("n4"), cluster.start("n5"));
    cluster.nodes.extend([fourth?, fifth?]);
    *clients.nodes.lock() = cluster.nodes();
    cluster.settled().await?;
    let join_seconds = begun.elapsed().as_secs_f64();
    let moved = given(&cluster) - given_before;
    let predicted = cluster.ring(&[0, 1, 2]).moves_to(&cluster.ring(&[0, 1, 2, 3, 4])).count();

    progress.phase("two leave", 0);
    let begun = Instant::now();
    for leaving in [1, 3] {
        cluster.nodes[leaving].0.drain().await?;
    }
    while cluster.nodes[1].0.owned() + cluster.nodes[3].0.owned() > 0 {
        ensure!(begun.elapsed() < PATIENCE, "two nodes still have slots after {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    cluster.settled().await?;
    let drain_seconds = begun.elapsed().as_secs_f64();
    let during = clients.latencies()?;
    let peak = usage::peak_resident_bytes();
    clients.is_over.store(true, SeqCst);
    for client in all {
        client.await??;
    }

    progress.phase("read back", args.entities);
    let (lost, doubled) = read_back(args, &clients, &cluster.nodes[0].0, progress).await?;
    let failed = clients.failed.lock().clone();
    if let Some(first) = failed.first() {
        eprintln!("warning: {} requests failed; the first: {first}", failed.len());
    }
    let mut pauses = tasks::histogram()?;
    for pause in cluster.nodes.iter().flat_map(|(node, _)| node.move_totals().pauses) {
        pauses.saturating_record(pause.as_nanos() as u64);
    }
    for (node, _) in &cluster.nodes {
        let report = node.store().verify(|_| ()).await?;
        ensure!(report.is_clean(), "a store is not clean: {report:?}");
        node.shutdown().await;
    }
    let ms = |latencies: &Histogram<u32>, quantile| latencies.value_at_quantile(quantile) as f64 / 1e6;
    let mut figures = Figures::default();
    figures.push("moved_fraction", moved as f64 / f64::from(SLOTS));
    figures.push("predicted_fraction", predicted as f64 / f64::from(SLOTS));
    figures.push("join_seconds", join_seconds);
    figures.push("drain_seconds", drain_seconds);
    figures.push("failed_requests", failed.len() as f64);
    figures.push("lost_events", lost as f64);
    figures.push("duplicated_events", doubled as f64);
    figures.push("pause_p50_ms", ms(&pauses, 0.5));
    figures.push("pause_p99_ms", ms(&pauses, 0.99));
    figures.push("pause_max_ms", pauses.max() as f64 / 1e6);
    figures.push("request_p99_ms", ms(&before, 0.99));
    figures.push("request_while_moving_p99_ms", ms(&during, 0.99));
    figures.push("added_request_p99_ms", (ms(&during, 0.99) - ms(&before, 0.99)).max(0.0));
    figures.push_some("rss_mib", peak.map(|bytes| bytes as f64 / f64::from(1 << 20)));
    Ok((figures, durability))
}

async fn fill(args: &HandoffArgs, node: &Node, progress: &Progress) -> Result<()> {
    let events = args.events;
    let fill = |entity| {
        let handle = node.store().entity::<Tally>(id(entity));
        async move {
            let mut pending = Vec::new();
            for stamp in 0..events {
                pending.push(handle.append(added(stamp)).submit().await?);
            }
            for append in pending {
                append.await?;
            }
            Ok(())
        }
    };
    let counted = (0..args.entities).map(fill).inspect(|_| progress.add(1));
    tasks::join_bounded(counted).await
}

/// How many acknowledged events are not there, and how many are there twice.
async fn read_back(args: &HandoffArgs, clients: &Clients, node: &Node, progress: &Progress) -> Result<(u64, u64)> {
    let (mut lost, mut doubled) = (0, 0);
    let acknowledged = clients.acknowledged.lock().clone();
    for (entity, wanted) in (0..args.entities).zip(acknowledged) {
        let (tally, version) = node.entity::<Tally>(id(entity)).read().await?;
        let found: BTreeSet<u64> = tally.stamps.iter().copied().collect();
        doubled += (tally.stamps.len() - found.len()) as u64;
        let filled = (0..args.events).filter(|stamp| !found.contains(stamp)).count();
        lost += (filled + wanted.difference(&found).count()) as u64;
        if version.0 != tally.stamps.len() as u64 + tally.taken {
            bail!("the versions of an entity are not dense");
        }
        progress.add(1);
    }
    Ok((lost, doubled))
}
