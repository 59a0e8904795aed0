//! `entity show` and `entity at`: an entity's state, now or then.

use clap::Args;

use super::Name;
use crate::{
    cli::{
        Exit, Session, input,
        output::{FAINT, STRONG, printable},
    },
    client::At,
};

/// What `entity show` takes.
#[derive(Debug, Args)]
pub(in crate::cli) struct ShowArguments {
    #[command(flatten)]
    name: Name,
}

/// What `entity at` takes.
#[derive(Debug, Args)]
pub(in crate::cli) struct AtArguments {
    #[command(flatten)]
    name: Name,
    #[command(flatten)]
    when: When,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct When {
    /// After its first N events
    #[arg(long, value_name = "N")]
    version: Option<u64>,
    /// As it was at a time: 2026-01-31T12:00:00Z
    #[arg(long, value_name = "TIME", value_parser = input::time)]
    time: Option<String>,
}

pub(in crate::cli) async fn show(session: &Session, arguments: ShowArguments) -> anyhow::Result<Exit> {
    print(session, &arguments.name, &At::Now).await
}

pub(in crate::cli) async fn at(session: &Session, arguments: AtArguments) -> anyhow::Result<Exit> {
    let at = match (arguments.when.version, arguments.when.time) {
        (Some(version), _) => At::Version(version),
        (None, Some(time)) => At::Time(time),
        (None, None) => At::Now,
    };
    print(session, &arguments.name, &at).await
}

async fn print(session: &Session, name: &Name, at: &At) -> anyhow::Result<Exit> {
    let entity = session.client()?.entity(&name.kind, &name.id, at).await?;
    if session.output.is_json() {
        session.output.json(&entity)?;
        return Ok(Exit::Done);
    }
    let title = format!("{}/{}", entity.kind, entity.id);
    let title = printable(&title);
    session.output.line(format_args!("{STRONG}{title}{STRONG:#} {FAINT}at version {}{FAINT:#}", entity.version))?;
    session.output.json(&entity.state)?;
    Ok(Exit::Done)
}
