//! The command line: `start` runs a node, the other verbs speak to one that runs.
//!
//! Invariants:
//! - Results go to standard output and everything else to standard error, so that a pipe holds results only.
//! - How it ended is in the exit code ([`Exit`]), for every verb alike.
//! - Colours and progress are for terminals; with `--json` output is JSON, whatever it goes to.

mod ask;
mod audit;
mod backup;
pub(crate) mod bench;
mod cluster;
mod completions;
pub mod config;
mod cookie;
mod entity;
mod export;
mod import;
mod input;
mod leave;
mod moves;
mod output;
mod projections;
mod receipt;
mod restore;
mod save;
mod start;
mod status;
mod subscriptions;
mod table;
pub mod token;
mod verify;

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context;
use clap::{Args, Parser, Subcommand};

use self::output::{Output, OutputError};
use crate::client::{Client, ClientError, ClientOptions};

/// How a verb ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It is done.
    Done = 0,
    /// It was refused, or failed.
    Failed = 1,
    /// The command line is wrong.
    Usage = 2,
    /// It cannot be done now: the node does not answer, or asks to come back later.
    Unavailable = 3,
    /// It is done, and found damage.
    Damage = 4,
}

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  refused, or failed
  2  the command line is wrong
  3  unavailable: the node does not answer, is not ready, or asks to come back later
  4  damage was found (verify, receipt verify)";

/// A server of entities and their events, and the command line to operate it.
#[derive(Debug, Parser)]
#[command(name = "kuma-node", version, after_help = EXIT_CODES, disable_help_subcommand = true)]
pub struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Args)]
struct Global {
    /// Print JSON: one document, or one a line for streams
    #[arg(long, global = true, help_heading = "Output")]
    json: bool,
    /// Print no colours; so does NO_COLOR
    #[arg(long, global = true, help_heading = "Output")]
    no_color: bool,
    /// Where the node is
    #[arg(
        long,
        global = true,
        env = "KUMA_URL",
        hide_env_values = true,
        value_name = "URL",
        default_value = "http://127.0.0.1:4870",
        help_heading = "Connection"
    )]
    url: String,
    /// The token; others on this machine may see it here, and not in the environment or a file
    #[arg(
        long,
        global = true,
        env = "KUMA_TOKEN",
        hide_env_values = true,
        value_name = "TOKEN",
        help_heading = "Connection"
    )]
    token: Option<String>,
    /// A file with the token alone; it counts more than --token
    #[arg(long, global = true, value_name = "FILE", help_heading = "Connection")]
    token_file: Option<PathBuf>,
    /// Trust the certificates in this file (PEM) instead of the system's
    #[arg(long, global = true, value_name = "FILE", help_heading = "Connection")]
    ca_cert: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Run a node
    Start(crate::config::StartArguments),
    /// Print the settings in force
    Config(config::ConfigArguments),
    /// Create, list and revoke tokens
    Token(token::TokenArguments),
    /// How the node is; exit code 3 if it takes no requests
    Status,
    /// The nodes of the cluster
    Members,
    /// The slots of the cluster: who owns each, and who should
    Slots(cluster::SlotsArguments),
    /// Slots on their way, and what moves have come to
    Moves(moves::MovesArguments),
    /// Have a slot moved to a node, where it stays; or all that are not where they should be
    Migrate(moves::MigrateArguments),
    /// Have slots moved to where they should be, or show what would move
    Rebalance(moves::RebalanceArguments),
    /// Have a node give all its slots to the others, before it is stopped
    Drain(leave::DrainArguments),
    /// Take a node out of the cluster for ever; what it owns stays with it
    Forget(leave::ForgetArguments),
    /// Make the secret that the nodes of a cluster share
    Cookie(cookie::CookieArguments),
    /// Look at an entity, append to it, export or erase it
    #[command(subcommand)]
    Entity(entity::EntityVerb),
    /// Show and verify receipts of erasures
    #[command(subcommand)]
    Receipt(receipt::ReceiptVerb),
    /// Look at read models, query and operate them
    #[command(subcommand)]
    Projections(projections::ProjectionsVerb),
    /// Follow the events of the store
    #[command(subcommand)]
    Subscriptions(subscriptions::SubscriptionsVerb),
    /// Read and check everything; exit code 4 if something is damaged
    Verify,
    /// Back the store up, on the node's machine
    Backup(backup::BackupArguments),
    /// Restore a store from its backups into a new directory, without a node
    Restore(restore::RestoreArguments),
    /// Export all entities as lines of JSON
    Export(export::ExportArguments),
    /// Import lines of JSON; run again, each line happens once
    Import(import::ImportArguments),
    /// Measure appends over HTTP to a running node
    ///
    /// It appends to entities of the kind `load`, which stay: use a store that is for this.
    Bench(bench::BenchArguments),
    /// Print the audit log: who had what erased, when and why
    Audit(audit::AuditArguments),
    /// Print a script that completes this command line in a shell
    Completions(completions::CompletionsArguments),
}

/// What a verb works with.
pub(crate) struct Session {
    pub(crate) output: Output,
    connection: ClientOptions,
}

impl Session {
    /// A client of the node that was named.
    pub(crate) fn client(&self) -> Result<Client, ClientError> {
        Client::new(&self.connection)
    }
}

/// The command line itself is wrong, in a way that the parser does not see.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct UsageError(pub(crate) String);

/// Reads the command line, does what it says, and returns the exit code.
pub async fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help was asked for, or is given: clap knows where it goes. A reader who went away does not want to know.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { Exit::Usage as u8 } else { Exit::Done as u8 });
        }
    };
    if cli.global.no_color {
        anstream::ColorChoice::Never.write_global();
    }
    let output = Output::of_process(cli.global.json);
    let exit = match run(cli, output).await {
        Ok(exit) => exit,
        Err(error) => {
            let exit = exit_of(&error);
            if !is_reader_gone(&error) {
                output.error(&error, exit, problem_of(&error));
            }
            exit
        }
    };
    ExitCode::from(exit as u8)
}

async fn run(cli: Cli, output: Output) -> anyhow::Result<Exit> {
    let Cli { global, verb } = cli;
    let session = Session { output, connection: connection(global)? };
    match verb {
        Verb::Start(arguments) => start::run(&arguments).await,
        Verb::Config(arguments) => arguments.run(session.output.is_json()).map(|_| Exit::Done),
        Verb::Token(arguments) => arguments.run(session.output.is_json()).map(|_| Exit::Done),
        Verb::Bench(arguments) => bench::run(&session, arguments).await,
        Verb::Status => status::run(&session).await,
        Verb::Members => cluster::members(&session).await,
        Verb::Slots(arguments) => cluster::slots(&session, arguments).await,
        Verb::Moves(arguments) => moves::run(&session, arguments).await,
        Verb::Migrate(arguments) => moves::migrate(&session, arguments).await,
        Verb::Rebalance(arguments) => moves::rebalance(&session, arguments).await,
        Verb::Drain(arguments) => leave::drain(&session, arguments).await,
        Verb::Forget(arguments) => leave::forget(&session, arguments).await,
        Verb::Cookie(arguments) => cookie::run(&session, &arguments),
        Verb::Entity(verb) => entity::run(&session, verb).await,
        Verb::Receipt(verb) => receipt::run(&session, verb).await,
        Verb::Projections(verb) => projections::run(&session, verb).await,
        Verb::Subscriptions(verb) => subscriptions::run(&session, verb).await,
        Verb::Verify => verify::run(&session).await,
        Verb::Backup(arguments) => backup::run(&session, arguments).await,
        Verb::Restore(arguments) => restore::run(&session, arguments).await,
        Verb::Export(arguments) => export::run(&session, arguments).await,
        Verb::Import(arguments) => import::run(&session, arguments).await,
        Verb::Audit(arguments) => audit::run(&session, arguments).await,
        Verb::Completions(arguments) => completions::run(&session, &arguments),
    }
}

fn connection(global: Global) -> anyhow::Result<ClientOptions> {
    let token = match &global.token_file {
        Some(path) => {
            let text = std::fs::read_to_string(path);
            let text = text.with_context(|| format!("cannot read the token from {}", path.display()))?;
            Some(text.trim().to_owned())
        }
        None => global.token,
    };
    // An empty variable is one that was not set.
    let token = token.filter(|token| !token.is_empty());
    Ok(ClientOptions { url: global.url, token, ca_cert: global.ca_cert })
}

/// A failure as an exit code.
fn exit_of(error: &anyhow::Error) -> Exit {
    if is_reader_gone(error) {
        return Exit::Done;
    }
    if error.chain().any(|cause| cause.is::<UsageError>()) {
        return Exit::Usage;
    }
    match client_error(error) {
        Some(error) if error.is_unavailable() => Exit::Unavailable,
        Some(ClientError::Settings(_) | ClientError::Name(_)) => Exit::Usage,
        _ => Exit::Failed,
    }
}

fn client_error(error: &anyhow::Error) -> Option<&ClientError> {
    error.chain().find_map(|cause| cause.downcast_ref())
}

fn problem_of(error: &anyhow::Error) -> Option<&crate::wire::Problem> {
    client_error(error).and_then(ClientError::problem)
}

/// A reader who went away (`| head`) does not want to know.
fn is_reader_gone(error: &anyhow::Error) -> bool {
    error.chain().filter_map(|cause| cause.downcast_ref::<OutputError>()).any(OutputError::is_reader_gone)
}

#[cfg(test)]
mod tests {
    use std::io;

    use clap::CommandFactory;

    use super::*;
    use crate::wire::Problem;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    /// What each verb takes is part of what is promised: a change is to be seen.
    #[test]
    fn the_help_of_every_verb() {
        fn add(command: &mut clap::Command, path: &str, text: &mut String) {
            let name = format!("{path} {}", command.get_name()).trim().to_owned();
            let help = command.clone().bin_name(&name).render_help().to_string();
            // What every verb takes is shown once.
            let own = if path.is_empty() { help.as_str() } else { help.split("\nOutput:\n").next().unwrap() };
            text.push_str(&format!("$ {name} --help\n{own}\n"));
            command.get_subcommands_mut().for_each(|command| add(command, &name, text));
        }
        let mut command = Cli::command().term_width(100);
        command.build();
        let mut text = String::new();
        add(&mut command, "", &mut text);
        insta::assert_snapshot!(text);
    }

    fn problem(status: u16) -> ClientError {
        ClientError::Problem(Box::new(Problem {
            kind: "urn:kuma:x".to_owned(),
            title: "x".to_owned(),
            status,
            code: "x".to_owned(),
            detail: "x".to_owned(),
            retry_safe: false,
            retry_after_ms: None,
            actual_version: None,
            request_id: None,
        }))
    }

    #[test]
    fn each_failure_has_its_exit_code() {
        let exit = |error: anyhow::Error| exit_of(&error.context("while doing something"));
        assert_eq!(exit(problem(412).into()), Exit::Failed);
        assert_eq!(exit(problem(401).into()), Exit::Failed);
        assert_eq!(exit(problem(503).into()), Exit::Unavailable);
        assert_eq!(exit(problem(429).into()), Exit::Unavailable);
        assert_eq!(exit(ClientError::Interrupted(None).into()), Exit::Unavailable);
        assert_eq!(exit(ClientError::Settings("no URL".to_owned()).into()), Exit::Usage);
        assert_eq!(exit(UsageError("no terminal".to_owned()).into()), Exit::Usage);
        assert_eq!(exit(OutputError(io::ErrorKind::BrokenPipe.into()).into()), Exit::Done);
        assert_eq!(exit(OutputError(io::ErrorKind::StorageFull.into()).into()), Exit::Failed);
        assert_eq!(exit(anyhow::anyhow!("anything")), Exit::Failed);
    }

    #[test]
    fn global_options_may_stand_behind_the_verb() {
        let cli =
            Cli::try_parse_from(["kuma-node", "entity", "show", "a", "b", "--json", "--url", "http://x"]).unwrap();
        assert!(cli.global.json && cli.global.url == "http://x");
    }
}
