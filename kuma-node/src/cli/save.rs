//! Results that go into a file: it is there when it is whole.
//!
//! Invariant: until then it has the ending `.part`; if something fails, what was written of it is removed.

use std::{
    ffi::OsString,
    fs::{File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::Context;
use kuma_core::Manifest;

use super::output::Output;
use crate::client::Download;

/// A file on its way.
pub(super) struct Partial {
    file: File,
    part: PathBuf,
    path: PathBuf,
    is_whole: bool,
}

impl Partial {
    /// Begins a file. Only its owner may read it: what is saved was sealed.
    pub(super) fn create(path: &Path) -> anyhow::Result<Self> {
        use std::os::unix::fs::OpenOptionsExt;
        let mut part: OsString = path.to_owned().into();
        part.push(".part");
        let part = PathBuf::from(part);
        let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&part);
        let file = file.with_context(|| format!("cannot write {}", part.display()))?;
        Ok(Partial { file, part, path: path.to_owned(), is_whole: false })
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        self.file.write_all(bytes).with_context(|| format!("cannot write {}", self.part.display()))
    }

    /// Gives it its name, once its bytes are on the disk.
    pub(super) fn finish(mut self) -> anyhow::Result<()> {
        let place = || format!("cannot write {}", self.path.display());
        self.file.sync_all().with_context(place)?;
        std::fs::rename(&self.part, &self.path).with_context(place)?;
        self.is_whole = true;
        Ok(())
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.is_whole {
            // It is of no use, and it was said why.
            let _ = std::fs::remove_file(&self.part);
        }
    }
}

/// Where an export goes to.
pub(super) fn target(path: Option<&Path>) -> Option<&Path> {
    path.filter(|path| *path != Path::new("-"))
}

/// Writes an export to a file, or to standard output, and returns its manifest: it was compared with what came.
pub(super) async fn download(output: &Output, mut from: Download, to: Option<&Path>) -> anyhow::Result<Manifest> {
    let mut file = target(to).map(Partial::create).transpose()?;
    let progress = output.bar("{spinner} exporting {bytes} {bytes_per_sec}");
    let received = async {
        while let Some(piece) = from.next().await? {
            progress.inc(piece.len() as u64);
            match &mut file {
                Some(file) => file.write(&piece)?,
                None => output.bytes(&piece)?,
            }
        }
        anyhow::Ok(from.manifest()?)
    };
    let received = received.await;
    progress.finish_and_clear();
    let manifest = received.context("the export was cut off")?;
    match file {
        Some(file) => file.finish()?,
        None => output.flush()?,
    }
    Ok(manifest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_there_when_it_is_whole() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("receipt.json");
        let mut cut = Partial::create(&path).unwrap();
        cut.write(b"half").unwrap();
        drop(cut);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);

        let mut whole = Partial::create(&path).unwrap();
        whole.write(b"all of it").unwrap();
        assert!(!path.exists());
        whole.finish().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"all of it");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
