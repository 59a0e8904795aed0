//! `forward`: appends that are asked of one node and done by another, against the same appends asked of the one that does them.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use hdrhistogram::Histogram;
use kuma_cluster::{Handle, Node, NodeOptions};
use kuma_core::Entity;
use serde::{Deserialize, Serialize};

use crate::{
    Common,
    frame::{self, Figures},
    load,
    nodes::{Cluster, SHARDS},
    progress::Progress,
    tasks,
    usage::Usage,
};

#[derive(Clone, Debug, clap::Args, Serialize)]
pub(crate) struct ForwardArgs {
    /// How long each measurement takes
    #[arg(long, default_value_t = 5.0, value_parser = seconds)]
    seconds: f64,
    /// Callers at once with one event an append
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    callers: u64,
    /// Callers at once with a hundred events an append
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    batch_callers: u64,
    /// Bytes of an event
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u64).range(0..=1 << 20))]
    payload: u64,
    #[command(flatten)]
    #[serde(flatten)]
    common: Common,
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.1..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err("a number of seconds between 0.1 and 3600".to_owned()),
    }
}

/// Counts its events.
#[derive(Default, Clone, Serialize, Deserialize)]
struct Count {
    events: u64,
}

#[derive(Clone, Serialize, Deserialize)]
enum CountEvent {
    Counted { filler: String },
}

impl Entity for Count {
    const KIND: &'static str = "count";
    type Event = CountEvent;

    fn apply(&mut self, _: &CountEvent) {
        self.events += 1;
    }
}

pub(crate) async fn run(mut args: ForwardArgs) -> Result<()> {
    let base = args.common.prepare()?;
    args.common.shards = args.common.shards.or(Some(SHARDS));
    let params = serde_json::to_value(&args)?;
    frame::publish_runs("forward", &args.common, &base, params, async |progress| one_run(&args, &base, progress).await)
        .await
}

async fn one_run(args: &ForwardArgs, base: &Path, progress: &Progress) -> Result<(Figures, String)> {
    let shards = args.common.shards.unwrap_or(SHARDS);
    let mut cluster = Cluster::found(base, shards, NodeOptions::entity::<Count>).await?;
    let second = cluster.start("n2").await?;
    cluster.nodes.push(second);
    cluster.settled().await?;
    let [asked, owner] = [0, 1].map(|index: usize| cluster.nodes[index].0.clone());
    let durability = asked.store().stats().durability.as_str().to_owned();
    let ids = ids_of(&owner, args.callers.max(args.batch_callers) as usize)?;
    let mut figures = Figures::default();
    let measure = async |node: &Node, callers: u64, batch: usize, name: &str| {
        progress.phase(name, 0);
        measure(args, node, &ids[..callers as usize], batch).await
    };
    let forwarded = measure(&asked, args.batch_callers, 100, "100 events, forwarded").await?;
    let direct = measure(&owner, args.batch_callers, 100, "100 events, direct").await?;
    figures.push("batch100_events_per_second", forwarded.rate);
    figures.push("batch100_direct_events_per_second", direct.rate);
    figures.push("batch100_ratio", forwarded.rate / direct.rate);
    figures.push("batch100_p99_ms", forwarded.p99_ms);
    figures.push("batch100_cpu_us_per_event", forwarded.cpu_us);
    let forwarded = measure(&asked, args.callers, 1, "1 event, forwarded").await?;
    let direct = measure(&owner, args.callers, 1, "1 event, direct").await?;
    figures.push("batch1_events_per_second", forwarded.rate);
    figures.push("batch1_direct_events_per_second", direct.rate);
    figures.push("batch1_ratio", forwarded.rate / direct.rate);
    figures.push("batch1_p99_ms", forwarded.p99_ms);
    figures.push("batch1_cpu_us_per_event", forwarded.cpu_us);
    for (node, _) in &cluster.nodes {
        node.shutdown().await;
    }
    Ok((figures, durability))
}

/// Ids of entities whose slots are this node's.
fn ids_of(owner: &Node, count: usize) -> Result<Vec<String>> {
    let own = owner.members().into_iter().find(|member| member.is_own).context("the node is no member")?;
    ensure!(own.owns > 0, "the node owns nothing");
    let owned: std::collections::HashSet<_> = owner
        .slots()
        .into_iter()
        .filter(|slot| matches!(slot.token, kuma_cluster::Token::Owned(_)))
        .map(|slot| slot.slot)
        .collect();
    let ids = (0_u64..).map(|number| format!("count-{:016x}", load::mix(number)));
    Ok(ids.filter(|id| owned.contains(&kuma_core::slot_of(Count::KIND, id))).take(count).collect())
}

struct Measured {
    rate: f64,
    p99_ms: f64,
    cpu_us: f64,
}

/// Each caller has an entity of its own and appends to it, one append after the other.
async fn measure(args: &ForwardArgs, node: &Node, ids: &[String], batch: usize) -> Result<Measured> {
    let handles: Vec<Handle<Count>> = ids.iter().map(|id| node.entity::<Count>(id)).collect();
    let event = CountEvent::Counted { filler: "x".repeat(args.payload as usize) };
    // All of them are in memory when it begins.
    let first = handles.clone().into_iter().zip(std::iter::repeat(event.clone()));
    tasks::join_bounded(first.map(|(handle, event)| async move { Ok(handle.append(event).await.map(drop)?) })).await?;
    let (begun, before) = (Instant::now(), Usage::now());
    let until = begun + Duration::from_secs_f64(args.seconds);
    let caller = |handle: Handle<Count>| {
        let event = event.clone();
        async move {
            let mut latencies = tasks::histogram()?;
            while Instant::now() < until {
                let sent = Instant::now();
                handle.append_all(std::iter::repeat_n(event.clone(), batch)).await?;
                tasks::record(&mut latencies, sent);
            }
            Ok(latencies)
        }
    };
    let latencies: Histogram<u32> = tasks::merge(tasks::join(handles.into_iter().map(caller)).await?)?;
    let (took, used) = (begun.elapsed().as_secs_f64(), Usage::now().since(&before));
    let events = (latencies.len() * batch as u64) as f64;
    Ok(Measured {
        rate: events / took,
        p99_ms: latencies.value_at_quantile(0.99) as f64 / 1e6,
        cpu_us: used.cpu.as_secs_f64() * 1e6 / events,
    })
}
