//! Read models in SQL over a store, fed live while a file is imported into it.
//!
//! ```sh
//! cargo run --release --example projections -p kuma-core                  # the sample, and the two .sql files beside this file
//! cargo run --release --example projections -p kuma-core -- FILE.ndjson.gz --data ./flights
//! cargo run --release --example projections -p kuma-core -- --ask 'SELECT * FROM carriers' --of carriers
//! ```

use std::{
    fs::File,
    io::IsTerminal,
    io::{BufReader, Read, Write},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use clap::Parser;
use flate2::read::MultiGzDecoder;
use kuma_core::{Kuma, Options, ProjectionHandle, ProjectionState, SqlProjection};

/// glibc keeps what was freed.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const SAMPLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/flights-sample.ndjson");
const PROJECTIONS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/projections");
/// What is asked of each of the two if nothing else is.
const QUESTIONS: [(&str, &str); 2] = [
    ("carriers", "SELECT * FROM carriers LIMIT 10"),
    ("busiest_aircraft", "SELECT tail, flights, miles FROM busiest_aircraft LIMIT 5"),
];

/// Feeds read models in SQL while a file of events is imported, and asks them.
#[derive(Parser)]
#[command(name = "projections")]
struct Arguments {
    /// One event a line, plain or gzipped, as for the example `import`; run again, nothing is doubled. Default: the sample
    file: Option<PathBuf>,
    /// The store's directory. It is created if it does not exist
    #[arg(long, value_name = "DIR", default_value = "./data")]
    data: PathBuf,
    /// Where the .sql files are. Default: those beside this example
    #[arg(long, value_name = "DIR")]
    sql: Option<PathBuf>,
    /// A question for one of them
    #[arg(long, value_name = "SELECT", requires = "of")]
    ask: Option<String>,
    /// Which one
    #[arg(long, value_name = "PROJECTION", requires = "ask")]
    of: Option<String>,
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut file = BufReader::new(File::open(path)?);
    file.read_to_end(&mut bytes)?;
    if bytes.starts_with(&[0x1f, 0x8b]) {
        let mut plain = Vec::new();
        MultiGzDecoder::new(&bytes[..]).read_to_end(&mut plain)?;
        return Ok(plain);
    }
    Ok(bytes)
}

/// Prints a line. A reader who went away (`| head`) does not want to know.
fn say(line: impl std::fmt::Display) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

async fn show(projections: &[ProjectionHandle]) -> Result<()> {
    for projection in projections {
        let status = projection.status().await?;
        let model = status.building.or(status.serving).context("there is no model")?;
        let state = model.state.unwrap_or(ProjectionState::Live);
        say(format_args!(
            "{:>18}: {state}; {} events, lag {:.1} s",
            projection.name(),
            model.events,
            status.lag.as_secs_f64()
        ));
    }
    Ok(())
}

async fn run(kuma: &Kuma, arguments: &Arguments) -> Result<()> {
    let directory = arguments.sql.clone().unwrap_or_else(|| PROJECTIONS.into());
    let mut projections = Vec::new();
    for (path, loaded) in SqlProjection::load_directory(&directory).with_context(|| directory.display().to_string())? {
        let loaded = loaded.with_context(|| path.display().to_string())?;
        projections.push(kuma.projection(loaded).await?);
    }
    if projections.is_empty() {
        bail!("{} holds no .sql file", directory.display());
    }

    let path = arguments.file.clone().unwrap_or_else(|| SAMPLE.into());
    let lines = read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let source = path.file_name().map(|name| name.to_string_lossy().into_owned()).context("the file has no name")?;
    let begun = Instant::now();
    let importing = async { kuma.import(&*source).run(&lines[..], |_| {}).await };
    let mut importing = std::pin::pin!(importing);
    let report = loop {
        match tokio::time::timeout(Duration::from_secs(1), &mut importing).await {
            Ok(report) => break report?,
            Err(_) => show(&projections).await?,
        }
    };
    say(format_args!(
        "imported {} events in {:.1?}, {} of them new",
        report.events,
        begun.elapsed(),
        report.new_events()
    ));
    for projection in &projections {
        projection.caught_up(Duration::from_secs(600)).await?;
    }
    show(&projections).await?;

    let questions = match (&arguments.of, &arguments.ask) {
        (Some(of), Some(ask)) => vec![(of.as_str(), ask.as_str())],
        _ => QUESTIONS.to_vec(),
    };
    for (name, question) in questions {
        // Other files have other tables.
        let Some(projection) = projections.iter().find(|projection| projection.name() == name) else {
            if arguments.of.is_none() {
                continue;
            }
            let names: Vec<&str> = projections.iter().map(ProjectionHandle::name).collect();
            bail!("there is no projection {name}; there are: {}", names.join(", "));
        };
        let answer = projection.query(question).run().await?;
        say(format_args!("\n{name}: {question}\n{}", answer.columns.join("\t")));
        for row in answer.json().as_array().into_iter().flatten() {
            let values = answer.columns.iter().map(|column| row[column].to_string());
            say(values.collect::<Vec<_>>().join("\t"));
        }
    }
    Ok(())
}

#[tokio::main]
async fn main() -> Result<()> {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_max_level(tracing_subscriber::filter::LevelFilter::WARN)
        .init();
    let arguments = Arguments::parse();
    let kuma = Kuma::start(Options::new(&arguments.data)).await.context("the store did not open")?;
    let outcome = run(&kuma, &arguments).await;
    kuma.shutdown().await;
    outcome
}
