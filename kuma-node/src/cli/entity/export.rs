//! `entity export`: an entity's events as lines.

use std::path::PathBuf;

use clap::Args;
use indicatif::HumanCount;

use super::Name;
use crate::cli::{Exit, Session, save};

/// What `entity export` takes.
#[derive(Debug, Args)]
pub(in crate::cli) struct EntityExportArguments {
    #[command(flatten)]
    name: Name,
    /// Where to; the file is there when it is whole. Default: standard output
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Everything that is held of it, also by read models: for the person who asks
    #[arg(long)]
    archive: bool,
}

pub(in crate::cli) async fn run(session: &Session, arguments: EntityExportArguments) -> anyhow::Result<Exit> {
    let EntityExportArguments { name, output, archive } = arguments;
    let download = session.client()?.export(&name.kind, &name.id, archive).await?;
    let manifest = save::download(&session.output, download, output.as_deref()).await?;
    let Some(path) = save::target(output.as_deref()) else { return Ok(Exit::Done) };
    if session.output.is_json() {
        session.output.json(&manifest)?;
    } else {
        let events = HumanCount(manifest.events);
        session.output.line(format_args!("exported {events} events to {}", path.display()))?;
    }
    Ok(Exit::Done)
}
