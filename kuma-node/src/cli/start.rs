//! Verbs that are made elsewhere.

use super::{Exit, Session};

/// What `start` takes.
#[derive(Debug, clap::Args)]
pub(crate) struct StartArguments {}

/// What `config` takes.
#[derive(Debug, clap::Args)]
pub(crate) struct ConfigArguments {}

/// What `token` takes.
#[derive(Debug, clap::Args)]
pub(crate) struct TokenArguments {}

pub(crate) async fn start(_: &Session, _: StartArguments) -> anyhow::Result<Exit> {
    anyhow::bail!("this build has no server");
}

pub(crate) fn config(_: &Session, _: ConfigArguments) -> anyhow::Result<Exit> {
    anyhow::bail!("this build has no server");
}

pub(crate) fn token(_: &Session, _: TokenArguments) -> anyhow::Result<Exit> {
    anyhow::bail!("this build has no server");
}
