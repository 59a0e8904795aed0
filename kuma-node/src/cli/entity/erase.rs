//! `entity erase`: destroys an entity, and keeps the receipt.

use std::{path::PathBuf, time::Duration};

use anyhow::Context;
use clap::Args;
use serde_json::value::RawValue;

use super::Name;
use crate::{
    cli::{
        Exit, Session, ask,
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
    /// Do not ask
    #[arg(long)]
    yes: bool,
    /// Save the receipt here as well; it is printed in any case
    #[arg(long, value_name = "FILE")]
    receipt: Option<PathBuf>,
}

pub(in crate::cli) async fn run(session: &Session, arguments: EraseArguments) -> anyhow::Result<Exit> {
    let EraseArguments { name, reason, by, yes, receipt: path } = arguments;
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
    let file = path.as_deref().map(Partial::create).transpose()?;
    let receipt = erase(&client, &name, &ReasonBody { reason, by }, &session.output).await?;
    // First of all: whatever happens to the file, it was told.
    session.output.json(&receipt)?;
    if let Some(mut file) = file {
        file.write(receipt.get().as_bytes())?;
        file.write(b"\n")?;
        file.finish()?;
    }
    session.output.note(format_args!("{name} is erased; keep the receipt"));
    Ok(Exit::Done)
}

/// Asking again is asking for the receipt, so that it can be done as often as it takes.
async fn erase(client: &Client, name: &Name, reason: &ReasonBody, output: &Output) -> anyhow::Result<Box<RawValue>> {
    let mut backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(10));
    loop {
        let error = match client.erase(&name.kind, &name.id, reason).await {
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
