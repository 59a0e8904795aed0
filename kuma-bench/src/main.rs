//! Benchmarks of Kuma, each beside a reference that is measured in the same run.
//!
//! `kuma-bench <command> --help` says what a command measures; the figures and the JSON frame are described in `frame`.

mod activate;
mod dawdle;
mod erase;
mod forward;
mod frame;
mod handoff;
mod http;
mod idle;
mod load;
mod memory;
mod nodes;
mod progress;
mod project;
mod raw;
mod read;
mod replay;
mod store;
mod tasks;
mod usage;
mod write;

use std::io::IsTerminal;
use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context, Result, anyhow, ensure};
use clap::{Parser, Subcommand};
use serde::Serialize;
use tracing_subscriber::EnvFilter;

/// glibc keeps freed memory, which would be counted as the store's.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Benchmarks of Kuma, each beside a reference measured in the same run.
///
/// Prints a table of medians with their spread to stdout, progress and warnings to stderr. RUST_LOG sets what is logged.
#[derive(Debug, Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Appends by many writers at once, against a bare SQLite loop
    ///
    /// The reference writes as many rows of the same size into the same table with the same indexes, pragmas and number of files,
    /// with prepared statements, one thread for each file, and as many rows a commit as Kuma's run had on average.
    ///
    /// Times of acknowledgement run from before an append is sent until it is durable. CPU is user and system time of the whole
    /// process, the writers' included. Bytes of I/O are counted until the store is shut down, its last checkpoints included.
    /// rss_mib is the peak (VmHWM) while the run lasted.
    Write(write::WriteArgs),
    /// Reads of live entities, against a map behind a mutex
    ///
    /// Each reader is a task with handles of its own and reads entities in no order. The readers of the first measurement read as
    /// fast as it goes and let others run after 64 reads; one read in 8 is timed. The 200 readers of the second one are a closed
    /// loop: each request is queued by the runtime like any other task, and its time runs from then, so that it contains the
    /// waiting for 200 others on a few threads.
    ///
    /// The reference clones an `Arc` out of a hash map behind a mutex, by as many readers. read_ratio is Kuma's rate by its rate.
    Read(read::ReadArgs),
    /// First use of entities that are not in memory, against a bare read of their rows
    ///
    /// The store is filled, shut down and opened again, its files are read once into the page cache, and each entity is read once,
    /// one after the other in no order. The reference reads the same rows with a prepared statement and drops them.
    /// activate_ratio is Kuma's median by its median.
    Activate(activate::ActivateArgs),
    /// A long history brought into memory, from its events and from a snapshot, against a bare read of its rows
    ///
    /// One entity. replay_* is its first use without snapshots, key and opening of each commit included, and replay_rss_mib how much
    /// resident memory grew meanwhile, at its peak; history_* the stream of its events to a reader. snapshot_activation_first_ms is
    /// its first use after the store was opened, snapshot_activation_ms the median of 100 more, each after it left memory. The
    /// reference reads the same rows with a prepared statement and drops them; replay_ratio is Kuma's time by its time.
    Replay(replay::ReplayArgs),
    /// Entities erased from a full shard, against a bare delete of the same rows
    ///
    /// One shard unless told otherwise, filled with the events of other entities, those to be erased spread evenly among them.
    /// erase_ms_per_1000_events is the median of entities erased one after the other with nothing else going on, receipt included;
    /// small_store_ratio that time by the time in a store that holds little else; erase_io_kib_per_event what was written for it,
    /// index flushes and checkpoints included. Then appends go on at a fixed rate, each timed from when it was due: append_p99_ms
    /// without erasures, append_p99_while_erasing_ms with entities being erased one after the other. erasures_per_second is that of
    /// erase_many. The reference deletes the rows of as large entities with plain statements and cuts the log.
    Erase(erase::EraseArgs),
    /// Events on their way to subscribers and into read models, against bare reads and bare upserts
    ///
    /// Stores are filled, shut down and opened again, their files are read once into the page cache. subscribe_*: a subscription to all
    /// events that takes whole pages, until it has each event once, on commits of 100 events and of 1. raw_read_* reads the rows of the
    /// same logs, one file after the other.
    ///
    /// sql_catch_up and rust_catch_up: from when a projection is registered until it has caught up. It counts the events of each entity
    /// and adds up a number of them, in a text of SQL and in Rust. both_catch_up: the two of them at once, events of both counted.
    /// raw_upserts executes the same upserts into the same table with the same pragmas, 16,384 a transaction, on one thread, from ids
    /// and numbers that are there already. A ratio is Kuma's rate by that of its reference.
    ///
    /// Then appends go on at a fixed rate to all entities, which live already, whether earlier ones are acknowledged or not. append_*
    /// runs from when an append was due until it is acknowledged: alone, with a subscriber that took one event and stopped, with the
    /// projection in SQL, and while its model is built anew. appended_events_per_second is the lowest rate of the four.
    ///
    /// lag_*: one append in 20 is looked for in the model by queries, each a millisecond after the one before was answered. It runs from
    /// the acknowledgement, or from when the append was due, until there is an answer with all its events, so that it contains the
    /// query. query_p99_ms is that of these queries.
    ///
    /// While the model is built anew, beside the one that is served, another reader asks for the number of all events, each time a
    /// millisecond after the answer before. rebuild_seconds runs until the new model answers, swap_pause_ms is the longest time without a
    /// larger number from a second before to a second after that, swap_query_max_ms the longest query in it, rebuild_standstill_max_ms
    /// the longest time without a larger number of all. A number that falls, or no answer, ends the run with an error.
    Project(project::ProjectArgs),
    /// Appends over HTTP on loopback, client and server sharing the machine
    ///
    /// The server is a process of its own. Each measurement has a store of its own, whose entities are in memory when it begins. batch100_*:
    /// requests of 100 events, as MessagePack; batch1_*: of 1 event, over as many connections as there are callers; stream_batch1_*: appends of 1
    /// event through the stream /v1/append, each with its idempotency key. Times of acknowledgement run from before a request (or message) is sent
    /// until its answer is there. server_cpu_us_per_event is what the server's process took, without the client's.
    ///
    /// few_* are 4 connections with appends of 1 event, alone; few_beside_dawdlers_* the same beside connections that send a byte of a head now
    /// and then and never its end. few_beside_dawdlers_p99_ratio is the one p99 by the other.
    Http(http::HttpArgs),
    /// The server of `http`.
    #[command(hide = true)]
    HttpServe(http::ServeArgs),
    /// Slots on their way between nodes while clients go on
    ///
    /// Nodes in one process, linked over loopback. Three are filled and serve clients at a fixed rate; two more join at once; then two of the five
    /// are drained. moved_fraction is the part of all slots that moved when the two joined, predicted_fraction what the ring says. pause_* is how
    /// long writes to a slot waited: from its seal until the other node said that it owns it. Times of requests run from when they were due;
    /// added_request_p99_ms is that while slots moved less that before. Every entity is read back and compared with what was acknowledged.
    Handoff(handoff::HandoffArgs),
    /// Appends asked of one node and done by another, against the same asked of the one that does them
    ///
    /// Two nodes in one process, linked over loopback, encrypted. Each caller has an entity of its own, of the second node, and appends to it, one
    /// append after the other. *_ratio is the rate of appends that the first node passes on by that of appends that the second is asked for.
    Forward(forward::ForwardArgs),
    /// What a cluster costs that nobody asks anything
    ///
    /// Nodes in one process, linked over loopback, without entities. cpu_percent_per_node is user and system time of the process, of one core.
    Idle(idle::IdleArgs),
    /// Memory of live entities, against bare tasks with a channel
    ///
    /// The growth of the resident memory by the number of entities, each in a process of its own: after one append of 64 B to
    /// each; after the store was opened again and each was read; and for as many tasks that wait on a channel. Handles are not
    /// kept. What grows with use beside them, SQLite's page caches above all (at most 16 MB a shard), is counted too.
    Memory(memory::MemoryArgs),
    /// One measurement of `memory`.
    #[command(hide = true)]
    MemoryPhase(memory::PhaseArgs),
}

/// What every command can be told.
#[derive(Clone, Debug, clap::Args, Serialize)]
struct Common {
    /// Shard files [default: the store's default, 2 for each core, 4 to 16]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=256))]
    shards: Option<u16>,
    /// How often everything is measured; the table shows medians
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// Where each run makes a directory and removes it afterwards [default: target/kuma-bench]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Where the figures are written as JSON
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    json: Option<PathBuf>,
}

impl Common {
    /// The directory for the runs' directories. Fails before anything is measured if the result could not be written.
    fn prepare(&self) -> Result<PathBuf> {
        if let Some(json) = &self.json {
            let parent = json.parent().filter(|parent| !parent.as_os_str().is_empty());
            ensure!(parent.is_none_or(|parent| parent.is_dir()), "there is no directory for {}", json.display());
        }
        let base = store::base(self.data.as_deref())?;
        let filesystem = usage::Machine::this(&base).filesystem;
        if usage::is_memory(&filesystem) {
            eprintln!("warning: {} is on {filesystem}: these figures say nothing about a disk", base.display());
        }
        Ok(base)
    }
}

fn main() -> ExitCode {
    // Each run makes a store with a new master key; that its file should be backed up is no news here.
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn,kuma_core::options=error"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kuma-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("the runtime cannot start")?;
    let work = async {
        match command {
            Command::Write(args) => write::run(args).await,
            Command::Read(args) => read::run(args).await,
            Command::Activate(args) => activate::run(args).await,
            Command::Replay(args) => replay::run(args).await,
            Command::Erase(args) => erase::run(args).await,
            Command::Project(args) => project::run(args).await,
            Command::Http(args) => http::run(args).await,
            Command::HttpServe(args) => http::serve(args).await,
            Command::Handoff(args) => handoff::run(args).await,
            Command::Forward(args) => forward::run(args).await,
            Command::Idle(args) => idle::run(args).await,
            Command::Memory(args) => memory::run(args).await,
            Command::MemoryPhase(args) => memory::phase(args).await,
        }
    };
    let outcome = runtime.block_on(async {
        tokio::select! {
            outcome = work => outcome,
            // The run's directory is removed as its future is dropped.
            _ = tokio::signal::ctrl_c() => Err(anyhow!("interrupted")),
        }
    });
    runtime.shutdown_background();
    outcome
}
