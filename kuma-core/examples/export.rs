//! Exports the history of one entity, or of all of them, as lines of JSON that `import` reads.
//!
//! ```sh
//! cargo run --release --example export -p kuma-core -- aircraft N14228 --data ./flights             # to standard output
//! cargo run --release --example export -p kuma-core -- --all --data ./flights --output all.ndjson
//! head -n -1 all.ndjson | sha256sum                      # the digest in the last line
//! ```
//!
//! What comes out is not sealed: it holds ids and events in clear.

use std::{
    io::ErrorKind,
    io::IsTerminal,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, ensure};
use clap::Parser;
use indicatif::{HumanBytes, HumanCount, ProgressBar};
use kuma_core::{ExportError, Kuma, Manifest, Options};
use tokio::io::AsyncWrite;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Exports the history of one entity, or of all of them.
#[derive(Parser)]
#[command(name = "export")]
struct Arguments {
    /// The entity's kind.
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    kind: Option<String>,
    /// The entity's id.
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    id: Option<String>,
    /// Exports every entity of the store.
    #[arg(long)]
    all: bool,
    /// The store's directory.
    #[arg(long, value_name = "DIR", default_value = "./data")]
    data: PathBuf,
    /// Where to. It is there when it is complete; until then it has the ending `.partial`. Default: standard output.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let data = &arguments.data;
    // Opening would create it.
    ensure!(data.join("store.json").exists(), "there is no store in {}", data.display());
    let kuma = Kuma::start(Options::new(data)).await.context("the store did not open")?;
    let outcome = match &arguments.output {
        Some(path) => to_file(&kuma, &arguments, path).await,
        None => export(&kuma, &arguments, &mut tokio::io::stdout()).await.context("the export failed"),
    };
    kuma.shutdown().await;
    let manifest = match outcome {
        Err(error) if is_reader_gone(&error) => return Ok(()),
        outcome => outcome?,
    };
    check(&manifest, &arguments)?;
    let Manifest { entities, commits, events, .. } = manifest;
    let [entities, commits, events] = [entities, commits, events].map(HumanCount);
    // Standard output may be the export.
    eprintln!("exported {events} events in {commits} commits of {entities} entities");
    Ok(())
}

/// A reader who went away (`| head`) does not want to know.
fn is_reader_gone(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(ExportError::Write(error)) if error.kind() == ErrorKind::BrokenPipe)
}

async fn to_file(kuma: &Kuma, arguments: &Arguments, path: &Path) -> anyhow::Result<Manifest> {
    let mut partial = path.to_owned().into_os_string();
    partial.push(".partial");
    let place = || format!("cannot write {}", path.display());
    let mut file = tokio::fs::File::create(&partial).await.with_context(place)?;
    let exported = async {
        let manifest = export(kuma, arguments, &mut file).await.context("the export failed")?;
        check(&manifest, arguments)?;
        file.sync_all().await.with_context(place)?;
        tokio::fs::rename(&partial, path).await.with_context(place)?;
        Ok(manifest)
    };
    let exported = exported.await;
    if exported.is_err() {
        // It is of no use, and it was said why.
        let _ = tokio::fs::remove_file(&partial).await;
    }
    exported
}

/// An entity that was asked for by name is there.
fn check(manifest: &Manifest, arguments: &Arguments) -> anyhow::Result<()> {
    ensure!(manifest.events > 0 || arguments.all, "there is no such entity, or it has no events");
    Ok(())
}

async fn export(
    kuma: &Kuma,
    arguments: &Arguments,
    to: &mut (impl AsyncWrite + Unpin + Send),
) -> Result<Manifest, ExportError> {
    match (&arguments.kind, &arguments.id) {
        (Some(kind), Some(id)) => kuma.raw(kind, id).export(to).await,
        _ => {
            // Drawn on a terminal only.
            let progress = ProgressBar::new_spinner();
            let exported = kuma.export_all(to, |done| {
                progress.set_message(format!("{} entities, {}", HumanCount(done.entities), HumanBytes(done.bytes)));
                progress.tick();
            });
            let exported = exported.await;
            progress.finish_and_clear();
            exported
        }
    }
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
