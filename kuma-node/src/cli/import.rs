//! `import`: lines of a file become events, once.
//!
//! Invariants:
//! - Each try sends the whole file from its beginning under the same name: what was appended before is told from what was not by the node.
//! - The file is read as fast as the node takes it, and no faster.

mod source;

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use clap::Args;
use indicatif::HumanCount;
use serde_json::json;

use self::source::Source;
use super::{
    Exit, Session, UsageError,
    output::{Output, duration},
};
use crate::{
    client::{Backoff, Client, ClientError, chance},
    wire::{ImportProgressBody, ImportReportBody},
};

/// How often in a row a file is sent without that more of it gets into the store.
const TRIES: u32 = 6;

/// What `import` takes.
#[derive(Debug, Args)]
pub(super) struct ImportArguments {
    /// One event a line: {"kind", "id", "type", "data"} and more; plain or gzipped; - for standard input
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Names the file, so that running it again doubles nothing. Default: the name of the file without its directories
    #[arg(long, value_name = "NAME")]
    source: Option<String>,
}

pub(super) async fn run(session: &Session, arguments: ImportArguments) -> anyhow::Result<Exit> {
    let ImportArguments { file, source } = arguments;
    let (client, output) = (session.client()?, &session.output);
    let is_stdin = file == Path::new("-");
    let name = match source {
        Some(name) => name,
        None if is_stdin => bail!(UsageError(
            "standard input has no name; give one by --source, and the same one again when you run it again".to_owned()
        )),
        None => {
            let name = file.file_name().map(|name| name.to_string_lossy().into_owned());
            name.ok_or_else(|| UsageError("the file has no name; give one by --source".to_owned()))?
        }
    };
    let start = Instant::now();
    let bar = output.bar("{msg} {wide_bar} {bytes}/{total_bytes}  {eta}");
    bar.set_message("importing");
    let imported = import(&client, output, &file, &name, &bar).await;
    bar.finish_and_clear();
    let report = imported?;
    print(output, &name, &report, start.elapsed())?;
    Ok(Exit::Done)
}

/// Sends the file until all of it is in the store.
async fn import(
    client: &Client,
    output: &Output,
    file: &Path,
    name: &str,
    bar: &indicatif::ProgressBar,
) -> anyhow::Result<ImportReportBody> {
    let mut backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(15));
    // The most commits of the file that were seen to be durable.
    let mut durable = 0;
    loop {
        let begun = durable;
        let mut shown = Shown::new(bar.clone());
        let source = Source::open(file, bar)?;
        let (lines, failure) = source.into_body();
        let sent = async {
            client
                .import(name, lines)
                .await?
                .finish(|now| {
                    durable = durable.max(now.commits);
                    shown.show(&now);
                })
                .await
        };
        let error = match sent.await {
            Ok(report) => return Ok(report),
            Err(error) => error,
        };
        let stopped = || {
            format!(
                "stopped; {} commits of {name} are known to be in the store, run it again when it is mended",
                HumanCount(durable)
            )
        };
        // Why the file could not be read says more than that the request was not whole.
        if let Some(failure) = failure.take() {
            return Err(failure).with_context(|| format!("cannot read {}", file.display())).with_context(stopped);
        }
        if durable > begun {
            backoff.reset();
        }
        let has_begun = durable > 0 || backoff.failures() > 0 || !matches!(error, ClientError::Connect { .. });
        if !error.is_retry_safe() || !has_begun || backoff.failures() + 1 >= TRIES || file == Path::new("-") {
            return Err(error).with_context(stopped);
        }
        let wait = backoff.wait(error.retry_after(), chance());
        bar.suspend(|| {
            output.warn(format_args!(
                "{error}; beginning again in {}: what is there already is not doubled",
                duration(wait)
            ));
        });
        tokio::time::sleep(wait).await;
    }
}

/// What is shown of the progress.
struct Shown {
    bar: indicatif::ProgressBar,
    start: Instant,
}

impl Shown {
    fn new(bar: indicatif::ProgressBar) -> Self {
        Shown { bar, start: Instant::now() }
    }

    fn show(&mut self, now: &ImportProgressBody) {
        let rate = now.events as f64 / self.start.elapsed().as_secs_f64().max(0.001);
        let again = match now.repeated {
            0 => String::new(),
            repeated => format!(", {} commits were there", HumanCount(repeated)),
        };
        self.bar.set_message(format!("{} events, {}/s{again}", HumanCount(now.events), HumanCount(rate as u64)));
    }
}

fn print(output: &Output, name: &str, report: &ImportReportBody, took: Duration) -> anyhow::Result<()> {
    let repeated = report.events.saturating_sub(report.new_events);
    if output.is_json() {
        return Ok(output.json(&json!({
            "source": name,
            "lines": report.lines,
            "entities": report.entities,
            "commits": report.commits,
            "events": report.events,
            "new_events": report.new_events,
            "repeated_events": repeated,
            "took_ms": u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
        }))?);
    }
    let entities = report.entities.map(|entities| format!(" of {} entities", HumanCount(entities))).unwrap_or_default();
    output.line(format_args!("the file has {} events{entities}", HumanCount(report.events)))?;
    let took_text = duration(took);
    if report.events > 0 && report.new_events == 0 {
        output.line(format_args!("nothing was new: the store had all of it, which took {took_text} to see"))?;
    } else if report.events > 0 {
        let rate = HumanCount((report.new_events as f64 / took.as_secs_f64().max(0.001)) as u64);
        let new = HumanCount(report.new_events);
        output.line(format_args!("imported {new} new events in {took_text}: {rate} events/s"))?;
        if repeated > 0 {
            output.line(format_args!("{} events were there already", HumanCount(repeated)))?;
        }
    }
    Ok(())
}
