//! Backs a store up, and restores one.
//!
//! ```sh
//! run="cargo run --release --example backup -p kuma-core --"
//! $run backup      --data ./data /backup/events        # what is new; as often as you like
//! $run backup-keys --data ./data /vault/keys           # after it, in another place; few, and not for long
//! $run ledger      --data ./data /elsewhere/ledger     # in a third place, for good
//! $run restore /backup/events --keys /vault/keys --ledger /elsewhere/ledger --master-key /safe/master.key --data ./new
//! ```
//!
//! The store is opened for it, so no other process may have it open: a service calls `Kuma::backup` on its own store, beside its appends.

use std::{
    io::IsTerminal,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, ensure};
use clap::{Args, Parser, Subcommand};
use indicatif::{HumanBytes, HumanCount, ProgressBar, ProgressStyle};
use kuma_core::{
    BackupProgress, BackupStep, Kuma, MasterKeySource, Options, Restore, RestoreProgress, RestoreReport, RestoreStep,
};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Backs a store up, and restores one.
#[derive(Parser)]
#[command(name = "backup")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Makes a backup of the events, or brings one up to date. There is no key in it.
    Backup {
        #[command(flatten)]
        store: Store,
        /// Where to; a directory of its own.
        directory: PathBuf,
        /// Does not read back what was copied.
        #[arg(long)]
        no_verify: bool,
    },
    /// Makes a backup of the wrapped keys, in place of the one that is there.
    BackupKeys {
        #[command(flatten)]
        store: Store,
        /// Where to; a directory of its own.
        directory: PathBuf,
    },
    /// Writes the ledger: who was erased, by hash and key.
    Ledger {
        #[command(flatten)]
        store: Store,
        /// Where to. It is there when it is complete.
        file: PathBuf,
    },
    /// Restores a store from its backups into a new directory.
    Restore {
        #[command(flatten)]
        store: Store,
        /// The backup of the events.
        directory: PathBuf,
        /// The backup of the keys.
        #[arg(long, value_name = "DIR")]
        keys: Option<PathBuf>,
        /// A ledger that is newer than the backups; may be given more than once.
        #[arg(long, value_name = "FILE")]
        ledger: Vec<PathBuf>,
        /// A receipt of an erasure that is newer than the newest ledger; may be given more than once.
        #[arg(long, value_name = "FILE")]
        receipt: Vec<PathBuf>,
    },
}

#[derive(Args)]
struct Store {
    /// The store's directory.
    #[arg(long, value_name = "DIR", default_value = "./data")]
    data: PathBuf,
    /// The store's name.
    #[arg(long, value_name = "NAME", default_value = "kuma")]
    context: String,
    /// The file with the master key. Default: master.key in the store's directory.
    #[arg(long, value_name = "FILE")]
    master_key: Option<PathBuf>,
}

impl Store {
    fn options(&self) -> Options {
        let options = Options::new(&self.data).context(&self.context);
        match &self.master_key {
            Some(path) => options.master_key(MasterKeySource::File(path.clone())),
            None => options,
        }
    }

    async fn open(&self) -> anyhow::Result<Kuma> {
        // Opening would create it.
        ensure!(self.data.join("store.json").exists(), "there is no store in {}", self.data.display());
        Kuma::start(self.options()).await.context("the store did not open")
    }
}

/// Drawn on a terminal only.
fn bar() -> ProgressBar {
    let style = ProgressStyle::with_template("{msg:24} {bar:32} {human_pos}/{human_len} {per_sec}");
    ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

async fn backup(kuma: &Kuma, directory: &Path, no_verify: bool) -> anyhow::Result<()> {
    let backup = kuma.backup(directory);
    let backup = if no_verify { backup.without_verification() } else { backup };
    let bar = bar();
    let report = backup.run(|now: &BackupProgress| {
        let verb = match now.step {
            BackupStep::Copy => "copying",
            BackupStep::Verify => "reading back",
        };
        bar.set_message(format!("{verb} shard {}/{}", now.shard, now.shards));
        bar.set_length(now.commits_total);
        bar.set_position(now.commits);
    });
    let report = report.await;
    bar.finish_and_clear();
    let report = report?;
    println!(
        "backed up to {}: {} new commits ({}), {} became stubs; as of {}",
        directory.display(),
        HumanCount(report.commits),
        HumanBytes(report.bytes),
        HumanCount(report.stubs),
        report.manifest.of.taken_at,
    );
    match report.verified {
        Some(held) => println!(
            "read back: {} events in {} commits of {} entities ({} of them erased), as they were committed",
            HumanCount(held.events),
            HumanCount(held.commits),
            HumanCount(held.entities),
            HumanCount(held.erased)
        ),
        None => println!("not read back"),
    }
    println!("there is no key in it: back the keys up as well (backup-keys), to another place");
    ensure!(
        report.bad_slots.is_empty(),
        "{} slots of the store do not hold what was committed; the backup holds what is there, verify the store",
        report.bad_slots.len()
    );
    Ok(())
}

async fn backup_keys(kuma: &Kuma, directory: &Path) -> anyhow::Result<()> {
    let report = kuma.backup_keys(directory).await?;
    println!(
        "backed up to {}: {} wrapped keys, {} destroyed; as of {}",
        directory.display(),
        HumanCount(report.keys),
        HumanCount(report.destroyed),
        report.manifest.of.taken_at,
    );
    println!("the master key is not in it: keep a copy of that as well");
    Ok(())
}

async fn ledger(kuma: &Kuma, path: &Path) -> anyhow::Result<()> {
    let mut partial = path.to_owned().into_os_string();
    partial.push(".partial");
    let place = || format!("cannot write {}", path.display());
    let mut file = tokio::fs::File::create(&partial).await.with_context(place)?;
    let written = async {
        let summary = kuma.export_ledger(&mut file).await?;
        file.sync_all().await.with_context(place)?;
        tokio::fs::rename(&partial, path).await.with_context(place)?;
        anyhow::Ok(summary)
    };
    let written = written.await;
    if written.is_err() {
        // It is of no use, and it was said why.
        let _ = tokio::fs::remove_file(&partial).await;
    }
    println!("wrote {}: {} erasures", path.display(), HumanCount(written?.tombstones));
    Ok(())
}

async fn restore(restore: Restore, options: Options) -> anyhow::Result<()> {
    let bar = bar();
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
    let RestoreReport { contents, erased_again, keys, keys_destroyed, without_key_named, warnings, .. } = &report;
    println!(
        "restored {} events in {} commits of {} entities, {} of them erased ({} again now); {} keys, {} destroyed",
        HumanCount(contents.events),
        HumanCount(contents.commits),
        HumanCount(contents.entities),
        HumanCount(contents.erased),
        HumanCount(*erased_again),
        HumanCount(*keys),
        HumanCount(*keys_destroyed),
    );
    let until = jiff_text(report.erasures_known_until);
    println!("it knows erasures up to {until}; what was erased later is back");
    for warning in warnings {
        eprintln!("warning: {warning}");
    }
    for entity in without_key_named {
        eprintln!("without a key: entity {entity}");
    }
    Ok(())
}

fn jiff_text(at: std::time::SystemTime) -> String {
    jiff::Timestamp::try_from(at).map_or_else(|_| "an unknown time".to_owned(), |at| format!("{at:.0}"))
}

async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let (kuma, outcome) = match &arguments.command {
        Command::Restore { store, directory, keys, ledger, receipt } => {
            let mut described = Restore::new(directory);
            if let Some(keys) = keys {
                described = described.keys(keys);
            }
            described = ledger.iter().fold(described, Restore::ledger);
            described = receipt.iter().fold(described, Restore::receipt);
            return restore(described, store.options()).await;
        }
        Command::Backup { store, directory, no_verify } => {
            let kuma = store.open().await?;
            let outcome = backup(&kuma, directory, *no_verify).await;
            (kuma, outcome)
        }
        Command::BackupKeys { store, directory } => {
            let kuma = store.open().await?;
            let outcome = backup_keys(&kuma, directory).await;
            (kuma, outcome)
        }
        Command::Ledger { store, file } => {
            let kuma = store.open().await?;
            let outcome = ledger(&kuma, file).await;
            (kuma, outcome)
        }
    };
    kuma.shutdown().await;
    outcome
}

#[tokio::main]
async fn main() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "warn".into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
    match run(Arguments::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
