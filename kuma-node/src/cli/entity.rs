//! `entity`: one entity and its events.

mod append;
mod diff;
mod erase;
mod export;
mod history;
mod life;
mod show;

use clap::{Args, Subcommand};

pub(super) use self::history::print as print_events;
use super::{Exit, Session};

/// Names an entity.
#[derive(Debug, Args)]
struct Name {
    /// The entity's kind: account, say
    kind: String,
    /// Its id; anything that is not empty
    #[arg(allow_hyphen_values = true)]
    id: String,
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.kind, self.id)
    }
}

/// What can be done with an entity.
#[derive(Debug, Subcommand)]
pub(super) enum EntityVerb {
    /// Print its state
    Show(show::ShowArguments),
    /// Print its events
    History(history::HistoryArguments),
    /// Print its state as it was
    At(show::AtArguments),
    /// Print what differs between two of its versions
    Diff(diff::DiffArguments),
    /// Append an event
    Append(append::AppendArguments),
    /// Export its events as lines of JSON
    Export(export::EntityExportArguments),
    /// Erase it: destroy its key and delete its events. This cannot be undone
    Erase(erase::EraseArguments),
    /// Begin a new life of an erased entity
    Recreate(life::RecreateArguments),
    /// Restore it to an earlier version, and erase what came after it
    RestoreTo(life::RestoreToArguments),
}

pub(super) async fn run(session: &Session, verb: EntityVerb) -> anyhow::Result<Exit> {
    match verb {
        EntityVerb::Show(arguments) => show::show(session, arguments).await,
        EntityVerb::History(arguments) => history::run(session, arguments).await,
        EntityVerb::At(arguments) => show::at(session, arguments).await,
        EntityVerb::Diff(arguments) => diff::run(session, arguments).await,
        EntityVerb::Append(arguments) => append::run(session, arguments).await,
        EntityVerb::Export(arguments) => export::run(session, arguments).await,
        EntityVerb::Erase(arguments) => erase::run(session, arguments).await,
        EntityVerb::Recreate(arguments) => life::recreate(session, arguments).await,
        EntityVerb::RestoreTo(arguments) => life::restore_to(session, arguments).await,
    }
}
