//! `bench`: load over HTTP against a running node.

use std::time::Duration;

use indicatif::HumanCount;

use super::{Exit, Session, table};
use crate::load::Load;

/// What `bench` takes.
#[derive(Debug, clap::Args)]
pub(crate) struct BenchArguments {
    /// Connections at once
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    connections: u32,
    /// Events of each append
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=4096))]
    batch: u32,
    /// Append through streams, with so many appends on their way a connection
    #[arg(long, value_name = "APPENDS", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    stream: Option<u32>,
    /// How long, in seconds
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    seconds: u64,
    /// Random text in each event, in bytes
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    payload: u32,
    /// Entities of the kind `load` that are appended to
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(1..))]
    entities: u64,
    /// Send JSON instead of MessagePack
    #[arg(long)]
    json_bodies: bool,
    /// Send an idempotency key with each append; streams always do
    #[arg(long)]
    keys: bool,
}

pub(super) async fn run(session: &Session, arguments: BenchArguments) -> anyhow::Result<Exit> {
    let client = session.client()?;
    // That the node can be reached, and the token is good, is told as everywhere.
    client.status().await?;
    let load = Load {
        connections: arguments.connections as usize,
        batch: arguments.batch as usize,
        in_flight: arguments.stream.map(|appends| appends as usize),
        payload_bytes: arguments.payload as usize,
        entities: arguments.entities,
        message_pack: !arguments.json_bodies,
        keys: arguments.keys,
        duration: Duration::from_secs(arguments.seconds),
        events_max: u64::MAX,
    };
    let output = &session.output;
    let progress = output.spinner();
    let told = progress.clone();
    let (http, token) = client.http();
    let report = load
        .send(http, token, client.url(), move |events| {
            told.inc(events);
            told.set_message(format!("{} events acknowledged", HumanCount(told.position())));
        })
        .await;
    progress.finish_and_clear();
    let report = report?;
    if output.is_json() {
        output.json(&report)?;
    } else {
        output.line(table::pairs([
            ("events/s", HumanCount(report.events_per_second as u64).to_string()),
            ("events", HumanCount(report.events).to_string()),
            ("seconds", format!("{:.1}", report.seconds)),
            ("ack p50", format!("{:.2} ms", report.p50_ms)),
            ("ack p99", format!("{:.2} ms", report.p99_ms)),
            ("ack max", format!("{:.2} ms", report.max_ms)),
            ("failures", HumanCount(report.failures).to_string()),
        ]))?;
        if let Some(failure) = &report.failure {
            output.warn(format_args!("the first failure: {failure}"));
        }
    }
    Ok(if report.failures == 0 { Exit::Done } else { Exit::Failed })
}
