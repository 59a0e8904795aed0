//! `subscriptions`: following the store.

mod tail;

use clap::Subcommand;

use super::{Exit, Session};

/// What can be done with subscriptions.
#[derive(Debug, Subcommand)]
pub(super) enum SubscriptionsVerb {
    /// Print events as they come, until Ctrl-C
    Tail(tail::TailArguments),
}

pub(super) async fn run(session: &Session, verb: SubscriptionsVerb) -> anyhow::Result<Exit> {
    match verb {
        SubscriptionsVerb::Tail(arguments) => tail::run(session, arguments).await,
    }
}
