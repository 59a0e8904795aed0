//! `entity recreate` and `entity restore-to`: new lives.

use clap::Args;

use super::Name;
use crate::{
    cli::{Exit, Session, ask},
    wire::{LifeBody, ReasonBody, RestoreToBody},
};

/// What `entity recreate` takes.
#[derive(Debug, Args)]
pub(in crate::cli) struct RecreateArguments {
    #[command(flatten)]
    name: Name,
    /// Why. Name no person: it goes into the audit log, which is never erased
    #[arg(long)]
    reason: String,
    /// On whose behalf
    #[arg(long, value_name = "WHO")]
    by: Option<String>,
}

/// What `entity restore-to` takes.
#[derive(Debug, Args)]
pub(in crate::cli) struct RestoreToArguments {
    #[command(flatten)]
    name: Name,
    /// The version; the last one of an append
    version: u64,
    /// Why. Name no person: it goes into the audit log, which is never erased
    #[arg(long)]
    reason: String,
    /// On whose behalf
    #[arg(long, value_name = "WHO")]
    by: Option<String>,
    /// Do not ask
    #[arg(long)]
    yes: bool,
}

pub(in crate::cli) async fn recreate(session: &Session, arguments: RecreateArguments) -> anyhow::Result<Exit> {
    let RecreateArguments { name, reason, by } = arguments;
    let life = session.client()?.recreate(&name.kind, &name.id, &ReasonBody { reason, by }).await?;
    print(session, &name, &life)
}

pub(in crate::cli) async fn restore_to(session: &Session, arguments: RestoreToArguments) -> anyhow::Result<Exit> {
    let RestoreToArguments { name, version, reason, by, yes } = arguments;
    if !yes {
        ask::confirm(&format!("restore {name} to version {version}, and erase what came after it"), &name.id)?;
    }
    let body = RestoreToBody { version, reason, by };
    let life = session.client()?.restore_to(&name.kind, &name.id, &body).await?;
    print(session, &name, &life)
}

fn print(session: &Session, name: &Name, life: &LifeBody) -> anyhow::Result<Exit> {
    if session.output.is_json() {
        session.output.json(life)?;
    } else {
        let LifeBody { life, version } = life;
        let name = name.to_string();
        let name = crate::cli::output::printable(&name);
        session.output.line(format_args!("{name} is in life {life}, at version {version}"))?;
    }
    Ok(Exit::Done)
}
