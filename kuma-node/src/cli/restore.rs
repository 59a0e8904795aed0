//! `restore`: a store from its backups, without a node.

use std::io::IsTerminal;
use std::{path::PathBuf, time::SystemTime};

use clap::Args;
use indicatif::HumanCount;
use kuma_core::{MasterKeySource, Options, Restore, RestoreProgress, RestoreReport, RestoreStep};
use serde_json::json;

use super::{Exit, Session};

/// What `restore` takes.
#[derive(Debug, Args)]
pub(super) struct RestoreArguments {
    /// The backup of the events
    #[arg(value_name = "BACKUP")]
    backup: PathBuf,
    /// The backup of the keys
    #[arg(long, value_name = "DIR")]
    keys: PathBuf,
    /// A ledger that is newer than the backups; may be given more than once
    #[arg(long, value_name = "FILE")]
    ledger: Vec<PathBuf>,
    /// A receipt of an erasure that is newer than the newest ledger; may be given more than once
    #[arg(long, value_name = "FILE")]
    receipt: Vec<PathBuf>,
    /// Where to; a new or empty directory
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// The store's name
    #[arg(long, value_name = "NAME", default_value = "kuma")]
    context: String,
    /// The file with the master key. Default: master.key in the new directory
    #[arg(long, value_name = "FILE")]
    master_key: Option<PathBuf>,
}

pub(super) async fn run(session: &Session, arguments: RestoreArguments) -> anyhow::Result<Exit> {
    let output = &session.output;
    // Where Kuma says that something is not as it should be.
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "warn".into());
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false);
    // A program that this is part of may log already.
    let _ = log.try_init();

    let RestoreArguments { backup, keys, ledger, receipt, data, context, master_key } = arguments;
    let mut options = Options::new(&data).context(context);
    if let Some(path) = master_key {
        options = options.master_key(MasterKeySource::File(path));
    }
    let restore = Restore::new(backup).keys(keys);
    let restore = ledger.iter().fold(restore, Restore::ledger);
    let restore = receipt.iter().fold(restore, Restore::receipt);
    let bar = output.bar("{msg:24} {bar:32} {human_pos}/{human_len} {per_sec}");
    let report = restore.run(options, |now: &RestoreProgress| {
        bar.set_message(match now.step {
            RestoreStep::Check => format!("checking shard {}/{}", now.shard, now.shards),
            RestoreStep::Copy => format!("restoring shard {}/{}", now.shard, now.shards),
            RestoreStep::Erase => "erasing again".to_owned(),
            RestoreStep::Verify => format!("reading back shard {}/{}", now.shard, now.shards),
        });
        bar.set_length(now.commits_total);
        bar.set_position(now.commits);
    });
    let report = report.await;
    bar.finish_and_clear();
    let report = report?;
    if output.is_json() {
        output.json(&document(&report))?;
        return Ok(Exit::Done);
    }
    let RestoreReport { contents, erased_again, keys, keys_destroyed, .. } = &report;
    output.line(format_args!(
        "restored {} events in {} commits of {} entities, {} of them erased ({} again now); {} keys, {} destroyed",
        HumanCount(contents.events),
        HumanCount(contents.commits),
        HumanCount(contents.entities),
        HumanCount(contents.erased),
        HumanCount(*erased_again),
        HumanCount(*keys),
        HumanCount(*keys_destroyed),
    ))?;
    let until = time(report.erasures_known_until).unwrap_or_else(|| "an unknown time".to_owned());
    output.line(format_args!("it knows erasures up to {until}; what was erased later is back"))?;
    report.warnings.iter().for_each(|warning| output.warn(warning));
    report.without_key_named.iter().for_each(|entity| output.warn(format_args!("entity {entity} has no key")));
    output.note("see that the former store is not started any more, and begin new directories for backups");
    Ok(Exit::Done)
}

fn document(report: &RestoreReport) -> serde_json::Value {
    let warnings: Vec<String> = report.warnings.iter().map(ToString::to_string).collect();
    let without_key: Vec<String> = report.without_key_named.iter().map(|entity| entity.to_hex()).collect();
    json!({
        "taken_at": time(report.taken_at),
        "erasures_known_until": time(report.erasures_known_until),
        "entities": report.contents.entities,
        "commits": report.contents.commits,
        "events": report.contents.events,
        "erased": report.contents.erased,
        "erased_again": report.erased_again,
        "keys": report.keys,
        "keys_destroyed": report.keys_destroyed,
        "without_key": report.without_key,
        "without_key_named": without_key,
        "warnings": warnings,
    })
}

fn time(at: SystemTime) -> Option<String> {
    jiff::Timestamp::try_from(at).ok().map(|at| format!("{at:.0}"))
}
