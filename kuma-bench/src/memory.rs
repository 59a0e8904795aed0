//! `memory`: what a live entity takes, against a bare task with a channel.
//!
//! Each measurement is a process of its own (a hidden command of this binary): memory that an earlier one freed would be taken
//! first and not be seen.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use kuma_core::Kuma;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::{
    Common,
    frame::{Figures, Frame},
    load::{self, Payloads},
    progress::Progress,
    store, tasks,
    usage::{self, Machine},
};

#[derive(Clone, Debug, clap::Args, Serialize)]
pub(crate) struct MemoryArgs {
    /// Entities that live at the same time
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    entities: u64,
    #[command(flatten)]
    #[serde(flatten)]
    common: Common,
}

/// One measurement in a process of its own.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct PhaseArgs {
    phase: Phase,
    #[arg(long)]
    entities: u64,
    #[arg(long)]
    store: PathBuf,
    #[arg(long)]
    shards: Option<u16>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Phase {
    /// Entities that were appended to.
    Append,
    /// The same entities in a store that was opened again, read only.
    Read,
    /// Tasks with a channel each, and no store.
    Reference,
}

/// What such a process says, on one line.
#[derive(Debug, Serialize, Deserialize)]
struct Measured {
    live_entities: u64,
    bytes: u64,
    shards: u16,
    durability: String,
}

/// Twice as many entities are used before memory is looked at as are measured, and stay: SQLite's caches (up to 16 MB for each
/// writer) fill with the rows of the first ones, and would otherwise be counted as theirs.
fn warm_up(entities: u64) -> u64 {
    (2 * entities).max(1000)
}

pub(crate) async fn run(mut args: MemoryArgs) -> Result<()> {
    let base = args.common.prepare()?;
    let (mut runs, mut durability) = (Vec::new(), String::new());
    for run in 1..=args.common.runs {
        let progress = Progress::of_run(run, args.common.runs);
        let directory = store::temporary(&base)?;
        let measure = async |phase: Phase, name: &str| {
            progress.phase(name, 0);
            child(phase, &args, directory.path()).await.with_context(|| format!("run {run}, {name}"))
        };
        let appended = measure(Phase::Append, "append").await?;
        let read = measure(Phase::Read, "read").await?;
        let reference = measure(Phase::Reference, "reference").await?;
        let per_entity = |measured: &Measured| measured.bytes as f64 / measured.live_entities.max(1) as f64;
        let mut figures = Figures::default();
        figures.push("live_entities", appended.live_entities as f64);
        figures.push("bytes_per_entity", per_entity(&appended));
        figures.push("bytes_per_read_only_entity", per_entity(&read));
        figures.push("reference_bytes_per_entity", per_entity(&reference));
        figures.push("memory_ratio", per_entity(&appended) / per_entity(&reference).max(1.0));
        runs.push(figures);
        (durability, args.common.shards) = (appended.durability, Some(appended.shards));
    }
    let json = args.common.json.clone();
    Frame::new("memory", durability, Machine::this(&base), serde_json::to_value(&args)?, runs).publish(json.as_deref())
}

async fn child(phase: Phase, args: &MemoryArgs, directory: &Path) -> Result<Measured> {
    let phase = phase.to_possible_value().context("a phase without a name")?;
    let mut command = tokio::process::Command::new(std::env::current_exe()?);
    command.arg("memory-phase").arg(phase.get_name()).arg("--entities").arg(args.entities.to_string());
    command.arg("--store").arg(directory.join("store"));
    if let Some(shards) = args.common.shards {
        command.arg("--shards").arg(shards.to_string());
    }
    let output = command.stdin(Stdio::null()).stderr(Stdio::inherit()).kill_on_drop(true).output().await?;
    ensure!(output.status.success(), "the process that measures ended with {}", output.status);
    serde_json::from_slice(&output.stdout).context("the process that measures did not say what it found")
}

/// Measures, and says it on stdout.
pub(crate) async fn phase(args: PhaseArgs) -> Result<()> {
    let measured = match args.phase {
        Phase::Reference => reference(args.entities).await?,
        Phase::Append | Phase::Read => entities(&args).await?,
    };
    println!("{}", serde_json::to_string(&measured)?);
    Ok(())
}

async fn entities(args: &PhaseArgs) -> Result<Measured> {
    let options =
        store::options(&args.store, args.shards).memory_budget(1 << 40).idle_timeout(Duration::from_secs(1 << 20));
    let kuma = store::start(options).await?;
    let payloads = Arc::new(Payloads::new(64));
    let phase = args.phase;
    // Handles are dropped at once: an entity lives without them.
    let use_once = |entity: u64| {
        let (handle, payloads) = (load::handle(&kuma, entity), payloads.clone());
        async move {
            match phase {
                Phase::Append => drop(handle.append_all(payloads.events(entity, 1..2)).await?),
                Phase::Read | Phase::Reference => drop(handle.read().await?),
            }
            Ok(())
        }
    };
    // The warm-up has entities of its own, behind the others.
    tasks::join_bounded((args.entities..args.entities + warm_up(args.entities)).map(use_once)).await?;
    let before = settled(&kuma).await?;
    tasks::join_bounded((0..args.entities).map(use_once)).await?;
    let after = settled(&kuma).await?;
    let stats = kuma.stats();
    kuma.shutdown().await;
    Ok(Measured {
        live_entities: (stats.live_entities() as u64).saturating_sub(warm_up(args.entities)),
        bytes: after.saturating_sub(before),
        shards: stats.shards.len() as u16,
        durability: stats.durability.as_str().to_owned(),
    })
}

/// The memory in use once nothing is on its way.
async fn settled(kuma: &Kuma) -> Result<u64> {
    while kuma.stats().shards.iter().any(|shard| shard.waiting_bytes > 0) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // Watermarks and checkpoints follow within that time.
    tokio::time::sleep(Duration::from_millis(500)).await;
    resident()
}

/// Tasks that own a state and wait for a message, each used once: an actor without anything that Kuma adds.
async fn reference(entities: u64) -> Result<Measured> {
    let start = |_| {
        let (sender, mut receiver) = mpsc::unbounded_channel::<(u64, mpsc::UnboundedSender<u64>)>();
        tokio::spawn(async move {
            let mut state = 0;
            while let Some((number, reply)) = receiver.recv().await {
                state += number;
                let _ = reply.send(state);
            }
        });
        sender
    };
    let use_all = async |actors: &[mpsc::UnboundedSender<_>]| {
        let (reply, mut answers) = mpsc::unbounded_channel();
        for actor in actors {
            actor.send((1, reply.clone()))?;
            answers.recv().await.context("a task ended")?;
        }
        anyhow::Ok(())
    };
    let warm_up: Vec<_> = (0..warm_up(entities)).map(start).collect();
    use_all(&warm_up).await?;
    let before = resident()?;
    let actors: Vec<_> = (0..entities).map(start).collect();
    use_all(&actors).await?;
    let bytes = resident()?.saturating_sub(before);
    Ok(Measured { live_entities: actors.len() as u64, bytes, shards: 0, durability: String::new() })
}

fn resident() -> Result<u64> {
    usage::resident_bytes().context("this system does not say how much memory a process uses (/proc/self/status)")
}
