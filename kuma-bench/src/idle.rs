//! `idle`: what a cluster costs that nobody asks anything.

use std::{path::Path, time::Duration};

use anyhow::Result;
use serde::Serialize;

use crate::{
    Common,
    frame::{self, Figures},
    nodes::{Cluster, SHARDS},
    progress::Progress,
    usage::{self, Usage},
};

#[derive(Clone, Debug, clap::Args, Serialize)]
pub(crate) struct IdleArgs {
    /// Nodes
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=64))]
    nodes: u64,
    /// How long they are watched, once every slot is where it should be and they have come to rest
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
    seconds: u64,
    #[command(flatten)]
    #[serde(flatten)]
    common: Common,
}

/// From the last slot's arrival until they are watched.
const REST: Duration = Duration::from_secs(5);

pub(crate) async fn run(mut args: IdleArgs) -> Result<()> {
    let base = args.common.prepare()?;
    args.common.shards = args.common.shards.or(Some(SHARDS));
    let params = serde_json::to_value(&args)?;
    frame::publish_runs("idle", &args.common, &base, params, async |progress| one_run(&args, &base, progress).await)
        .await
}

async fn one_run(args: &IdleArgs, base: &Path, progress: &Progress) -> Result<(Figures, String)> {
    let shards = args.common.shards.unwrap_or(SHARDS);
    progress.phase("start", 0);
    let mut cluster = Cluster::found(base, shards, |options| options).await?;
    for number in 2..=args.nodes {
        let node = cluster.start(&format!("n{number}")).await?;
        cluster.nodes.push(node);
    }
    cluster.settled().await?;
    let durability = cluster.nodes[0].0.store().stats().durability.as_str().to_owned();
    progress.phase("rest", 0);
    tokio::time::sleep(REST).await;
    progress.phase("watch", 0);
    let before = Usage::now();
    let watched = Duration::from_secs(args.seconds);
    tokio::time::sleep(watched).await;
    let used = Usage::now().since(&before);
    for (node, _) in &cluster.nodes {
        node.shutdown().await;
    }
    let per_node = 1.0 / (args.nodes * args.seconds) as f64;
    let mut figures = Figures::default();
    figures.push("cpu_percent_per_node", used.cpu.as_secs_f64() * 100.0 * per_node);
    figures.push_some("written_bytes_per_second_per_node", used.written.map(|bytes| bytes as f64 * per_node));
    figures.push_some("rss_mib", usage::resident_bytes().map(|bytes| bytes as f64 / f64::from(1 << 20)));
    Ok((figures, durability))
}
