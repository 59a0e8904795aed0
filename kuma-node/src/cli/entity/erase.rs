//! `entity erase`: destroys an entity, and keeps the receipt.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, bail};
use clap::Args;
use serde_json::value::RawValue;

use super::Name;
use crate::{
    cli::{
        Exit, Session, UsageError, ask,
        output::{Output, duration},
        save::Partial,
    },
    client::{At, Backoff, Client, ClientError, chance},
    wire::ReasonBody,
};

/// How often an erasure that has begun is asked for its receipt.
const TRIES: u32 = 8;

/// What `entity erase` takes.
#[derive(Debug, Args)]
pub(in crate::cli) struct EraseArguments {
    #[command(flatten)]
    name: Name,
    /// Why. Name no person: it goes into the audit log, which is never erased
    #[arg(long)]
    reason: String,
    /// On whose behalf
    #[arg(long, value_name = "WHO")]
    by: Option<String>,
    /// Only this life of it, 1 at first: if it was recreated meanwhile that is left alone
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    life: Option<u32>,
    /// Do not ask
    #[arg(long)]
    yes: bool,
    /// Save the receipt here as well; it is printed in any case
    #[arg(long, value_name = "FILE")]
    receipt: Option<PathBuf>,
}

pub(in crate::cli) async fn run(session: &Session, arguments: EraseArguments) -> anyhow::Result<Exit> {
    let EraseArguments { name, reason, by, life, yes, receipt: path } = arguments;
    let client = session.client()?;
    if !yes {
        let what = match client.entity(&name.kind, &name.id, &At::Now).await {
            Ok(entity) => format!("erase {name} and its {} events", entity.version),
            // Whoever may erase need not be able to read.
            Err(_) => format!("erase {name}"),
        };
        ask::confirm(&what, &name.id)?;
    }
    // What cannot be saved is to be known before, not after.
    let file = path.as_deref().map(create).transpose()?;
    let receipt = erase(&client, &name, life, &ReasonBody { reason, by }, &session.output).await?;
    // Whichever of the two places fails, the receipt is in the other one.
    let saved = file.map_or(Ok(()), |file| save(file, &receipt));
    let printed = session.output.json(&receipt);
    saved?;
    printed?;
    session.output.note(format_args!("{name} is erased; keep the receipt"));
    Ok(Exit::Done)
}

/// Begins the file of the receipt. One that is there is of another erasure, and is kept.
fn create(path: &Path) -> anyhow::Result<Partial> {
    if path.exists() {
        bail!(UsageError(format!("{} is there already; give the receipt another name", path.display())));
    }
    Partial::create(path)
}

fn save(mut file: Partial, receipt: &RawValue) -> anyhow::Result<()> {
    file.write(receipt.get().as_bytes())?;
    file.write(b"\n")?;
    file.finish()
}

/// Asking again is asking for the receipt, so that it can be done as often as it takes.
async fn erase(
    client: &Client,
    name: &Name,
    life: Option<u32>,
    reason: &ReasonBody,
    output: &Output,
) -> anyhow::Result<Box<RawValue>> {
    let mut backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(10));
    loop {
        let error = match client.erase(&name.kind, &name.id, life, reason).await {
            Ok(receipt) => return Ok(receipt),
            Err(error) => error,
        };
        let is_connected = !matches!(error, ClientError::Connect { .. });
        // A node that never answered is told of at once.
        if !error.is_retry_safe() || backoff.failures() + 1 >= TRIES || (backoff.failures() == 0 && !is_connected) {
            return Err(error)
                .context("there is no receipt yet; the erasure may have begun, ask again for its receipt");
        }
        let wait = backoff.wait(error.retry_after(), chance());
        output.warn(format_args!("{error}; asking again in {}", duration(wait)));
        tokio::time::sleep(wait).await;
    }
}
