//! `completions`: scripts for shells.

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::{Cli, Exit, Session};

/// What `completions` takes.
#[derive(Debug, Args)]
pub(super) struct CompletionsArguments {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

pub(super) fn run(session: &Session, arguments: &CompletionsArguments) -> anyhow::Result<Exit> {
    // It would panic if standard output could not be written to.
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut Cli::command(), "kuma-node", &mut script);
    session.output.bytes(&script)?;
    session.output.flush()?;
    Ok(Exit::Done)
}
