//! `entity append`: one event, which happens once however often it is sent.

use anyhow::Context;
use clap::Args;
use serde_json::json;

use super::Name;
use crate::{
    cli::{Exit, Session, input, output::duration},
    client::{ClientError, NewEvent},
};

/// What `entity append` takes.
#[derive(Debug, Args)]
pub(in crate::cli) struct AppendArguments {
    #[command(flatten)]
    name: Name,
    /// What happened: Deposited, say
    #[arg(value_name = "TYPE")]
    event: String,
    /// Its data as JSON; @FILE for that of a file, - for standard input
    #[arg(allow_hyphen_values = true)]
    data: String,
    /// The idempotency key: sent again with the same one, it happens once. Default: a random one, which is told if it fails
    #[arg(long)]
    key: Option<String>,
    /// Append only if the entity is at this version; 0 if it has no events
    #[arg(long, value_name = "VERSION")]
    expect: Option<u64>,
    /// The version of the data's shape
    #[arg(long, value_name = "N", default_value_t = 1)]
    schema: u32,
}

pub(in crate::cli) async fn run(session: &Session, arguments: AppendArguments) -> anyhow::Result<Exit> {
    let AppendArguments { name, event, data, key, expect, schema } = arguments;
    let data = input::json(&input::text(&data)?)?;
    let client = session.client()?;
    let key = match key {
        Some(key) => key,
        None => random_key()?,
    };
    let events = [NewEvent { name: event, data, schema }];
    let output = &session.output;
    let appended = client.append(&name.kind, &name.id, &events, expect, &key, |error, wait| {
        output.warn(format_args!("{error}; trying again with the same key in {}", duration(wait)));
    });
    let appended = match appended.await {
        Ok(appended) => appended,
        Err(error) if may_be_sent_again(&error) => {
            return Err(error)
                .context(format!("it may have been appended, or not; run it again with --key {key}, it happens once"));
        }
        Err(error) => return Err(error.into()),
    };
    if output.is_json() {
        output.json(&json!({ "version": appended.version, "repeated": appended.repeated, "key": key }))?;
    } else if appended.repeated {
        output.line(format_args!("it had been appended before: version {}", appended.version))?;
    } else {
        output.line(format_args!("appended: version {}", appended.version))?;
    }
    Ok(Exit::Done)
}

/// Whether the key is of use to whoever tries it again.
fn may_be_sent_again(error: &ClientError) -> bool {
    error.is_retry_safe() || error.is_unavailable()
}

fn random_key() -> anyhow::Result<String> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).context("the system gives no random bytes for a key; name one by --key")?;
    Ok(hex::encode(bytes))
}
