//! Stores to begin with: making one takes longer than copying it.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use kuma_core::{Kuma, Options, Seat};
use tempfile::TempDir;

/// Disks of a run at its beginning, and those that come in the place of lost ones.
pub(crate) const DISKS_MAX: usize = 5;
pub(crate) const SPARE: usize = 4;

/// The directories of a founder and of joiners that own nothing yet.
pub struct Templates {
    root: TempDir,
}

/// As the stores of all runs are opened.
pub(crate) fn options(directory: &Path, seat: Seat, id_secret: Option<[u8; 32]>) -> Options {
    let options = Options::new(directory).shards(2).clustered(seat, id_secret).no_snapshots().scrub_bytes_per_second(0);
    // A commit that is refused is what is asked for here.
    options.quarantine(1_000_000, Duration::from_secs(1), Duration::from_millis(1))
}

/// Where files are in memory, if there is such a place.
pub(crate) fn scratch() -> TempDir {
    let memory = Path::new("/dev/shm");
    let made = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
    made.or_else(|_| tempfile::tempdir()).unwrap()
}

impl Templates {
    /// Makes them.
    pub async fn make() -> Self {
        let root = scratch();
        let founder = Kuma::start(options(&root.path().join("0"), Seat::Founder, None)).await.unwrap();
        founder.slots().index().await.unwrap();
        let secret = founder.slots().id_secret();
        founder.shutdown().await;
        for number in 1..DISKS_MAX + SPARE {
            let path = root.path().join(number.to_string());
            let joiner = Kuma::start(options(&path, Seat::Joiner, Some(secret))).await.unwrap();
            joiner.slots().index().await.unwrap();
            joiner.shutdown().await;
        }
        Templates { root }
    }

    /// Copies one to `to`.
    pub(crate) fn copy(&self, number: usize, to: &Path) {
        copy_directory(&self.root.path().join(number.to_string()), to);
    }
}

/// Copies the files of a directory. Watermarks first: they may be behind what they are of, and never ahead.
pub(crate) fn copy_directory(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    let mut files: Vec<PathBuf> = fs::read_dir(from).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort_by_key(|path| (path.extension().is_none_or(|extension| extension != "watermark"), path.clone()));
    for file in files {
        if file.is_dir() {
            copy_directory(&file, &to.join(file.file_name().unwrap()));
        } else if file.extension().is_none_or(|extension| extension != "db-shm") {
            fs::copy(&file, to.join(file.file_name().unwrap())).unwrap();
        }
    }
}
