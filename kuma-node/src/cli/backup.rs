//! `backup`: has a backup made on the node's machine.

use clap::{Args, ValueEnum};
use indicatif::{HumanBytes, HumanCount};

use super::{Exit, Session, output::printable};

/// What `backup` takes.
#[derive(Debug, Args)]
pub(super) struct BackupArguments {
    /// Names the backup, below the node's backup directory. The same name again brings it up to date
    name: String,
    /// What is backed up; each belongs in a place of its own
    #[arg(long, value_enum, default_value_t = Part::Events)]
    part: Part,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// The events, without a key
    Events,
    /// The wrapped keys; after the events, and not for long
    Keys,
    /// Who was erased, by hash; for good
    Ledger,
}

impl Part {
    fn as_str(self) -> &'static str {
        match self {
            Part::Events => "events",
            Part::Keys => "keys",
            Part::Ledger => "ledger",
        }
    }

    fn rows(self) -> &'static str {
        match self {
            Part::Events => "new commits",
            Part::Keys => "keys",
            Part::Ledger => "erasures",
        }
    }
}

pub(super) async fn run(session: &Session, arguments: BackupArguments) -> anyhow::Result<Exit> {
    let BackupArguments { name, part } = arguments;
    let output = &session.output;
    let work = session.client()?.backup(&name, part.as_str()).await?;
    let bar = output.bar("{msg:24} {bar:32} {human_pos}/{human_len} {per_sec}");
    let report = work.finish(|now| {
        let verb = if now.step == "verify" { "reading back" } else { "copying" };
        bar.set_message(format!("{verb} shard {}/{}", now.shard, now.shards));
        bar.set_length(now.commits_total);
        bar.set_position(now.commits);
    });
    let report = report.await;
    bar.finish_and_clear();
    let report = report?;
    if output.is_json() {
        output.json(&report)?;
        return Ok(Exit::Done);
    }
    output.line(format_args!(
        "backed up to {} on the node's machine: {} {} ({}); as of {}",
        printable(&report.directory),
        HumanCount(report.rows),
        part.rows(),
        HumanBytes(report.bytes),
        report.taken_at
    ))?;
    if report.is_verified {
        output.line("read back: everything is as it was committed")?;
    }
    report.warnings.iter().for_each(|warning| output.warn(printable(warning)));
    match part {
        Part::Events => {
            output.note("there is no key in it: back up the keys as well (--part keys), and keep them elsewhere")
        }
        Part::Keys => output.note("the master key is not in it: keep a copy of that as well"),
        Part::Ledger => {}
    }
    Ok(Exit::Done)
}
