//! Imports a file of events into a store: one JSON object a line, plain or gzipped.
//!
//! ```sh
//! cargo run --release --example import -p kuma-core                  # the sample beside this file, into ./data
//! cargo run --release --example import -p kuma-core -- FILE.ndjson.gz --data ./flights
//! ```
//!
//! Each line becomes one event of `kind/id`, in the order of the file; [`Kuma::import`] says what else a line may hold. It can be
//! killed at any moment and run again: every line happens once. Run again on a complete store it appends nothing.

use std::{
    collections::{BTreeMap, HashMap},
    fmt::Display,
    fs::File,
    io::IsTerminal,
    io::{BufRead, BufReader, Cursor, Read, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow};
use clap::Parser;
use flate2::read::MultiGzDecoder;
use futures_util::stream;
use indicatif::{ProgressBar, ProgressStyle};
use kuma_core::{ImportReport, Kuma, Options};
use serde::Deserialize;
use tokio::io::AsyncBufRead;
use tokio_util::io::StreamReader;

/// glibc keeps what was freed, and is slow at passing memory between threads, which is what an append does.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const SAMPLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/flights-sample.ndjson");
/// Bytes that the thread which reads (and unpacks) the file hands over at once, and how many such pieces may wait.
const PIECE_BYTES: usize = 256 << 10;
const PIECES_MAX: usize = 4;
/// Lines that are looked at to find entities worth showing.
const PREVIEW_LINES: usize = 2000;
const PREVIEW_BYTES: u64 = 16 << 20;

/// Imports a file of events into a store; run again, it goes on where it was.
#[derive(Parser)]
#[command(name = "import")]
struct Arguments {
    /// One event a line: {"kind", "id", "type", "data"} and more; plain or gzipped. Default: a sample of 2,000 flights and weather
    /// observations.
    file: Option<PathBuf>,
    /// The store's directory. It is created if it does not exist.
    #[arg(long, value_name = "DIR", default_value = "./data")]
    data: PathBuf,
    /// Names the file, so that running it again doubles nothing. Default: the name of the file without its directories.
    #[arg(long, value_name = "NAME")]
    source: Option<String>,
}

/// The file's text; `progress` follows how much of the file itself was read.
fn open(path: &Path, progress: &ProgressBar) -> anyhow::Result<Box<dyn BufRead + Send>> {
    let place = || format!("cannot read {}", path.display());
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    progress.set_length(file.metadata().with_context(place)?.len());
    let mut file = BufReader::with_capacity(PIECE_BYTES, progress.wrap_read(file));
    let gzipped = file.fill_buf().with_context(place)?.starts_with(&[0x1f, 0x8b]);
    Ok(if gzipped { Box::new(BufReader::new(MultiGzDecoder::new(file))) } else { Box::new(file) })
}

/// Reads in a thread of its own: a file makes its reader wait, and unpacking takes time.
fn read_apart(mut reader: Box<dyn BufRead + Send>) -> impl AsyncBufRead + Unpin + Send {
    let (sender, mut receiver) = tokio::sync::mpsc::channel(PIECES_MAX);
    tokio::task::spawn_blocking(move || {
        loop {
            let mut piece = Vec::with_capacity(PIECE_BYTES);
            let read = reader.by_ref().take(PIECE_BYTES as u64).read_to_end(&mut piece);
            let is_last = !matches!(read, Ok(1..));
            // What was read before an error counts as well.
            let pieces = [Ok(Cursor::new(piece)), read.map(|_| Cursor::new(Vec::new()))];
            // An import that has stopped reads no further.
            if pieces.into_iter().any(|piece| sender.blocking_send(piece).is_err()) || is_last {
                return;
            }
        }
    });
    StreamReader::new(stream::poll_fn(move |context| receiver.poll_recv(context)))
}

/// The busiest entities at the beginning of the file: three, and the busiest one of each kind that is not among them.
fn preview(path: &Path) -> anyhow::Result<Vec<(String, String)>> {
    #[derive(Deserialize, PartialEq, Eq, Hash)]
    struct Name {
        kind: String,
        id: String,
    }
    let mut events: HashMap<Name, u64> = HashMap::new();
    for line in open(path, &ProgressBar::hidden())?.take(PREVIEW_BYTES).split(b'\n').take(PREVIEW_LINES) {
        // What is wrong with a line is for the import to say.
        if let Some(name) = line.ok().and_then(|line| serde_json::from_slice(&line).ok()) {
            *events.entry(name).or_default() += 1;
        }
    }
    let by_events: BTreeMap<_, _> =
        events.into_iter().map(|(Name { kind, id }, events)| ((u64::MAX - events, kind, id), ())).collect();
    let mut shown: Vec<(String, String)> = Vec::new();
    for (place, (_, kind, id)) in by_events.into_keys().enumerate() {
        if place < 3 || shown.iter().all(|(other, _)| *other != kind) {
            shown.push((kind, id));
        }
    }
    Ok(shown)
}

fn progress_bar() -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes}  {eta}");
    let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
    // Drawn on a terminal only.
    ProgressBar::new(0).with_style(style).with_message("importing")
}

/// Prints a line. A reader who went away (`| head`) does not want to know.
fn say(line: impl Display) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

fn thousands(number: u64) -> String {
    indicatif::HumanCount(number).to_string()
}

/// The most memory that the process has had, where the system tells.
fn peak_memory() -> Option<String> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(format!("{} MiB", kib >> 10))
}

async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let path = arguments.file.unwrap_or_else(|| SAMPLE.into());
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
    let source = arguments.source.or(name).context("the file has no name; give one by --source")?;
    let shown = preview(&path)?;

    let start = Instant::now();
    let kuma = Kuma::start(Options::new(&arguments.data)).await.context("the store did not open")?;
    let stats = kuma.stats();
    let (shards, durability) = (stats.shards.len(), stats.durability.as_str());
    let opened = start.elapsed();
    say(format_args!(
        "{}: open with {shards} shards after {opened:.2?}; durability: {durability}",
        arguments.data.display()
    ));

    let outcome = async {
        import(&kuma, &path, &source).await?;
        for (kind, id) in &shown {
            let (state, version) = kuma.raw(kind, id).read().await.with_context(|| format!("{kind}/{id}"))?;
            say(format_args!("\n{kind}/{id} at version {version}\n{state:#}"));
        }
        Ok(())
    };
    let outcome = outcome.await;
    // What was submitted is finished also after an error.
    kuma.shutdown().await;
    outcome
}

async fn import(kuma: &Kuma, path: &Path, source: &str) -> anyhow::Result<()> {
    let progress = progress_bar();
    let reader = read_apart(open(path, &progress)?);
    let start = Instant::now();
    let mut told = Duration::ZERO;
    let outcome = kuma.import(source).run(reader, |done| {
        let since = start.elapsed();
        // No more often than somebody can read.
        if since > told + Duration::from_millis(100) {
            told = since;
            let rate = thousands((done.events as f64 / since.as_secs_f64()) as u64);
            progress.set_message(format!("{} events, {rate}/s", thousands(done.events)));
        }
    });
    let outcome = outcome.await;
    let seconds = start.elapsed().max(Duration::from_millis(1)).as_secs_f64();
    progress.finish_and_clear();
    match outcome {
        Ok(report) => {
            print_report(&report, seconds);
            Ok(())
        }
        Err(error) => {
            let path = path.display();
            let done = thousands(error.report.events);
            Err(anyhow!("{path}: {error}").context(format!(
                "stopped; {done} events of the file are in the store, run it again when it is mended"
            )))
        }
    }
}

fn print_report(report: &ImportReport, seconds: f64) {
    let entities = report.entities.map(|entities| format!(" of {} entities", thousands(entities))).unwrap_or_default();
    say(format_args!("the file has {} events{entities}", thousands(report.events)));
    if report.events == 0 {
        return;
    }
    if report.repeated_events == report.events {
        say(format_args!("nothing was new: the store had all of it, which took {seconds:.2} s to see"));
    } else {
        let new = report.new_events();
        let rate = thousands((new as f64 / seconds) as u64);
        say(format_args!("imported {} new events in {seconds:.2} s: {rate} events/s", thousands(new)));
    }
    if let Some(peak) = peak_memory() {
        say(format_args!("peak memory: {peak}"));
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    // Where Kuma says that a new master key was made, or that something is not as it should be.
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "warn".into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
    match run(Arguments::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
