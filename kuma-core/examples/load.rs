//! Loads a file of events into a store: one JSON object a line, `{"kind", "id", "type", "at", "data"}`, plain or gzipped.
//!
//! ```sh
//! cargo run --release --example load -p kuma-core                  # the sample beside this file, into ./data
//! cargo run --release --example load -p kuma-core -- FILE.ndjson.gz --data ./flights
//! ```
//!
//! Each line becomes one event of `kind/id`, in the order of the file. Lines are sent without waiting for the one before
//! ([`Append::submit`](kuma_core::Append::submit)), so that they share disk syncs.
//!
//! It can be killed at any moment and run again: an entity at version `n` has its first `n` lines, and goes on with the next. Each
//! append says which version it expects, so that no line is ever appended twice or out of order. Run again on a complete store it
//! appends nothing and only reads.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    fmt::Display,
    fs::File,
    io::{BufRead, BufReader, Read, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use clap::Parser;
use flate2::read::MultiGzDecoder;
use futures_util::{StreamExt, TryStreamExt, stream};
use indicatif::{ProgressBar, ProgressStyle};
use kuma_core::{AppendError, Kuma, Metadata, NewEvent, Options, Pending, RawHandle, Unavailable, Version};
use serde::Deserialize;
use serde_json::{Map, Value};

/// glibc keeps what was freed, and is slow at passing memory between threads, which is what an append does.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Appends on their way at once. Enough that a group is full while the one before it is being synced.
const IN_FLIGHT_MAX: usize = 4096;
/// Entities that are looked up at once.
const LOOKUPS_MAX: usize = 64;
/// An event has at most 1 MiB, so that a longer line is not one.
const LINE_BYTES_MAX: u64 = 1 << 20;
const EVENT_NAME_BYTES_MAX: usize = 128;
const SAMPLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/flights-sample.ndjson");

/// Loads a file of events into a store; run again, it goes on where it was and reads what is there.
#[derive(Parser)]
#[command(name = "load")]
struct Arguments {
    /// One event a line: {"kind", "id", "type", "at", "data"}; plain or gzipped. Default: a sample of 2,000 flights and weather
    /// observations.
    file: Option<PathBuf>,
    /// The store's directory. It is created if it does not exist.
    #[arg(long, value_name = "DIR", default_value = "./data")]
    data: PathBuf,
}

/// One line of the file.
#[derive(Deserialize)]
struct Line {
    kind: String,
    id: String,
    #[serde(rename = "type")]
    name: String,
    at: Option<String>,
    /// An object: the events of a kind without Rust code are merged into its state, field by field.
    data: Map<String, Value>,
}

/// A file being read, which knows where it is.
struct Lines {
    path: String,
    reader: Box<dyn BufRead + Send>,
    bytes: Vec<u8>,
    number: u64,
}

impl Lines {
    fn open(path: &Path) -> anyhow::Result<Self> {
        let name = path.display().to_string();
        let mut file = BufReader::new(File::open(path).with_context(|| format!("cannot open {name}"))?);
        let gzipped = file.fill_buf().with_context(|| format!("cannot read {name}"))?.starts_with(&[0x1f, 0x8b]);
        let reader: Box<dyn BufRead + Send> =
            if gzipped { Box::new(BufReader::new(MultiGzDecoder::new(file))) } else { Box::new(file) };
        Ok(Lines { path: name, reader, bytes: Vec::new(), number: 0 })
    }

    /// The next line that is not empty.
    fn next(&mut self) -> anyhow::Result<Option<Line>> {
        loop {
            self.bytes.clear();
            self.number += 1;
            let read = self.reader.by_ref().take(LINE_BYTES_MAX + 1).read_until(b'\n', &mut self.bytes);
            if read.with_context(|| self.place())? == 0 {
                return Ok(None);
            }
            ensure!(self.bytes.len() as u64 <= LINE_BYTES_MAX, "{}: the line is longer than 1 MiB", self.place());
            if !self.bytes.trim_ascii().is_empty() {
                return self.parse().map(Some);
            }
        }
    }

    fn parse(&self) -> anyhow::Result<Line> {
        let line: Line = serde_json::from_slice(&self.bytes).map_err(|error| {
            let text = error.to_string();
            // Its own line number is always 1.
            let what = text.split(" at line ").next().unwrap_or_default();
            anyhow::anyhow!("{}:{}: {what}", self.place(), error.column())
        })?;
        let named = (1..=EVENT_NAME_BYTES_MAX).contains(&line.name.len());
        ensure!(named, "{}: a type has 1 to {EVENT_NAME_BYTES_MAX} bytes", self.place());
        Ok(line)
    }

    fn place(&self) -> String {
        format!("{}:{}", self.path, self.number)
    }
}

/// An entity that the file names.
struct InFile {
    first_line: u64,
    events: u64,
}

type Name = (String, String);

/// Reads the whole file once, so that a bad line is found before anything is appended.
fn check(path: &Path) -> anyhow::Result<BTreeMap<Name, InFile>> {
    let mut lines = Lines::open(path)?;
    let mut entities = BTreeMap::new();
    while let Some(line) = lines.next()? {
        let first_line = lines.number;
        entities.entry((line.kind, line.id)).or_insert(InFile { first_line, events: 0 }).events += 1;
    }
    ensure!(!entities.is_empty(), "{} holds no events", path.display());
    Ok(entities)
}

/// An entity while the file is loaded.
struct Loading {
    handle: RawHandle,
    /// Its version when the store was opened.
    stored: u64,
    /// How many lines of it the file has.
    in_file: u64,
    /// Lines of it that were passed so far.
    lines: u64,
}

async fn look_up(
    kuma: &Kuma,
    path: &Path,
    entities: &BTreeMap<Name, InFile>,
) -> anyhow::Result<HashMap<Name, Loading>> {
    let progress = progress_bar(entities.len() as u64, "looking up entities");
    let lookups = entities.iter().map(|(name, in_file)| {
        let (progress, handle) = (progress.clone(), kuma.raw(&name.0, &name.1));
        async move {
            // Also where a kind or id that the store refuses comes to light: nothing was appended yet.
            let place = || format!("{}:{}: {}/{}", path.display(), in_file.first_line, name.0, name.1);
            let (_, version) = handle.read().await.with_context(place)?;
            progress.inc(1);
            anyhow::Ok((name.clone(), Loading { handle, stored: version.0, in_file: in_file.events, lines: 0 }))
        }
    });
    let found = stream::iter(lookups).buffer_unordered(LOOKUPS_MAX).try_collect().await;
    progress.finish_and_clear();
    found
}

/// Appends on their way, the oldest first, with their places in the file.
#[derive(Default)]
struct InFlight {
    appends: VecDeque<(u64, Pending)>,
    appended: u64,
}

impl InFlight {
    /// Waits for the oldest one; false if there is none.
    async fn settle_oldest(&mut self, path: &Path) -> anyhow::Result<bool> {
        let Some((line, pending)) = self.appends.pop_front() else { return Ok(false) };
        pending.await.with_context(|| format!("{}:{line}", path.display()))?;
        self.appended += 1;
        Ok(true)
    }
}

/// Appends what the store does not have yet; returns how many events that were.
async fn load(path: &Path, entities: &mut HashMap<Name, Loading>, progress: &ProgressBar) -> anyhow::Result<u64> {
    let mut lines = Lines::open(path)?;
    let mut in_flight = InFlight::default();
    while let Some(line) = lines.next()? {
        progress.inc(1);
        let name = (line.kind, line.id);
        let entity = entities
            .get_mut(&name)
            .with_context(|| format!("{}: the file changed while it was read", lines.place()))?;
        entity.lines += 1;
        let data = Value::Object(line.data);
        if entity.lines <= entity.stored {
            if entity.lines == entity.stored.min(entity.in_file) {
                same_event(entity, &line.name, &data).await.with_context(|| lines.place())?;
            }
            continue;
        }
        let event = NewEvent::json(line.name, &data).with_context(|| lines.place())?;
        let metadata =
            Metadata { headers: line.at.map(|at| ("at".to_owned(), at)).into_iter().collect(), ..Metadata::default() };
        let pending = loop {
            // The expected version keeps the order even if an append before this one fails: then this one is refused.
            let append =
                entity.handle.append(event.clone()).metadata(metadata.clone()).expecting(Version(entity.lines - 1));
            match append.submit().await {
                Ok(pending) => break pending,
                Err(AppendError::Unavailable(Unavailable::Overloaded { retry_after, .. })) => {
                    // Nothing was sent. There is room again when the oldest one is settled.
                    if !in_flight.settle_oldest(path).await? {
                        tokio::time::sleep(retry_after).await;
                    }
                }
                Err(error) => return Err(error).with_context(|| lines.place()),
            }
        };
        in_flight.appends.push_back((lines.number, pending));
        while in_flight.appends.len() >= IN_FLIGHT_MAX {
            in_flight.settle_oldest(path).await?;
        }
    }
    while in_flight.settle_oldest(path).await? {}
    Ok(in_flight.appended)
}

/// Whether the newest event that store and file both have of an entity is the same: else it was loaded from another file.
async fn same_event(entity: &Loading, name: &str, data: &Value) -> anyhow::Result<()> {
    let version = entity.lines;
    let events = entity.handle.events(version..=version, 1).await?;
    let stored = events.first().with_context(|| format!("the store does not give back version {version}"))?;
    if stored.name != name || stored.json()? != *data {
        bail!(
            "the store has another event at version {version}: it was not loaded from this file; choose another --data"
        );
    }
    Ok(())
}

fn progress_bar(length: u64, what: &'static str) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} {wide_bar} {human_pos}/{human_len}  {per_sec}  {eta}");
    let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
    // Drawn on a terminal only.
    ProgressBar::new(length).with_style(style).with_message(what)
}

/// Prints a line. A reader who went away (`| head`) does not want to know.
fn say(line: impl Display) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

fn thousands(number: u64) -> String {
    indicatif::HumanCount(number).to_string()
}

/// How much of the file the store has, by kind.
fn print_stored(entities: &HashMap<Name, Loading>) {
    let mut kinds: BTreeMap<&str, Vec<u64>> = BTreeMap::new();
    for ((kind, _), entity) in entities.iter().filter(|(_, entity)| entity.stored > 0) {
        kinds.entry(kind).or_default().push(entity.stored);
    }
    for (kind, versions) in kinds {
        let (least, most) = (versions.iter().min().unwrap_or(&0), versions.iter().max().unwrap_or(&0));
        say(format_args!(
            "already there: {} of kind {kind}, at versions {least} to {most}",
            thousands(versions.len() as u64)
        ));
    }
}

/// The three busiest entities of the file, and the busiest one of each kind that is not among them.
fn shown(entities: &BTreeMap<Name, InFile>) -> Vec<&Name> {
    let mut by_events: Vec<(&Name, u64)> = entities.iter().map(|(name, entity)| (name, entity.events)).collect();
    by_events.sort_by_key(|(_, events)| std::cmp::Reverse(*events));
    let mut shown: Vec<&Name> = by_events.iter().take(3).map(|(name, _)| *name).collect();
    for (name, _) in by_events {
        if shown.iter().all(|other| other.0 != name.0) {
            shown.push(name);
        }
    }
    shown
}

async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let path = arguments.file.unwrap_or_else(|| SAMPLE.into());
    let entities = check(&path)?;
    let in_file: u64 = entities.values().map(|entity| entity.events).sum();
    say(format_args!(
        "{}: {} events of {} entities",
        path.display(),
        thousands(in_file),
        thousands(entities.len() as u64)
    ));

    let start = Instant::now();
    let kuma = Kuma::start(Options::new(&arguments.data)).await.context("the store did not open")?;
    let stats = kuma.stats();
    let durability = stats.durability.as_str();
    let opened = start.elapsed();
    say(format_args!(
        "{}: open with {} shards after {opened:.2?}; durability: {durability}",
        arguments.data.display(),
        stats.shards.len()
    ));

    let outcome = load_and_show(&kuma, &path, &entities, in_file, durability).await;
    // What was submitted is finished also after an error.
    kuma.shutdown().await;
    outcome
}

async fn load_and_show(
    kuma: &Kuma,
    path: &Path,
    entities: &BTreeMap<Name, InFile>,
    in_file: u64,
    durability: &str,
) -> anyhow::Result<()> {
    let mut loading = look_up(kuma, path, entities).await?;
    print_stored(&loading);

    let progress = progress_bar(in_file, "loading");
    let start = Instant::now();
    let appended = load(path, &mut loading, &progress).await;
    progress.finish_and_clear();
    let appended = appended.context("stopped, what was appended before stays")?;
    let seconds = start.elapsed().max(Duration::from_millis(1)).as_secs_f64();
    if appended == 0 {
        say("nothing to append: the store has all of the file");
    } else {
        let rate = thousands((appended as f64 / seconds) as u64);
        say(format_args!(
            "appended {} events in {seconds:.2} s: {rate} events/s; durability: {durability}",
            thousands(appended)
        ));
    }

    for (kind, id) in shown(entities) {
        let (state, version) = kuma.raw(kind, id).read().await.with_context(|| format!("{kind}/{id}"))?;
        say(format_args!("\n{kind}/{id} at version {version}\n{state:#}"));
    }
    Ok(())
}

#[tokio::main]
async fn main() -> ExitCode {
    // Where Kuma says that a new master key was made, or that something is not as it should be.
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "warn".into());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false).init();
    match run(Arguments::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
