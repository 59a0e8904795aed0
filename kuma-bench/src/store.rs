//! Stores that live as long as a run, and a look into their files.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use kuma_core::{Kuma, Options};
use rusqlite::{Connection, OpenFlags};
use tempfile::TempDir;

/// Below the working directory, so that it is on a disk; a system's temporary directory may be memory.
const DATA_DIR: &str = "target/kuma-bench";

/// Where runs have their directories; it is created if need be.
pub(crate) fn base(data: Option<&Path>) -> Result<PathBuf> {
    let base = data.unwrap_or(Path::new(DATA_DIR)).to_owned();
    std::fs::create_dir_all(&base).with_context(|| format!("cannot create {}", base.display()))?;
    Ok(base)
}

/// A directory for one run, removed with all that is in it when it is dropped.
pub(crate) fn temporary(base: &Path) -> Result<TempDir> {
    let made = tempfile::Builder::new().prefix("run-").tempdir_in(base);
    made.with_context(|| format!("cannot create a directory in {}", base.display()))
}

/// The options of a benchmark: the product's defaults.
pub(crate) fn options(directory: &Path, shards: Option<u16>) -> Options {
    let options = Options::new(directory);
    match shards {
        Some(shards) => options.shards(shards),
        None => options,
    }
}

pub(crate) async fn start(options: Options) -> Result<Kuma> {
    Kuma::start(options).await.context("the store cannot be opened")
}

/// Connections that read the shard files of a store that is shut down.
pub(crate) fn shard_files(directory: &Path) -> Result<Vec<Connection>> {
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))? {
        let path = entry?.path();
        let is_shard = path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with("shard-"));
        if is_shard && path.extension().is_some_and(|extension| extension == "db") {
            paths.push(path);
        }
    }
    paths.sort();
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let open = |path: &PathBuf| {
        Connection::open_with_flags(path, flags).with_context(|| format!("cannot open {}", path.display()))
    };
    paths.iter().map(open).collect()
}

/// The mean length of the bodies of commits with `count` events; 0 if there are none.
pub(crate) fn body_bytes(directory: &Path, count: u64) -> Result<f64> {
    let (mut rows, mut bytes) = (0, 0);
    for connection in shard_files(directory)? {
        let sql = "SELECT count(*), coalesce(sum(length(body)), 0) FROM log WHERE count = ?";
        let (more_rows, more_bytes) =
            connection.query_row(sql, [count as i64], |row| Ok((row.get::<_, i64>(0)?, row.get::<_, i64>(1)?)))?;
        (rows, bytes) = (rows + more_rows, bytes + more_bytes);
    }
    Ok(if rows == 0 { 0.0 } else { bytes as f64 / rows as f64 })
}
