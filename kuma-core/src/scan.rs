//! Reading the bytes of the store's own files while they are in use.
//!
//! A file is read by a child process, which writes it to a pipe: were one of SQLite's files opened and closed in this process, the operating
//! system would drop SQLite's locks on it with it. Source: <https://sqlite.org/howtocorrupt.html>, "Posix advisory locks".
//!
//! Invariant: memory is bounded, whatever the files.

use std::{
    io,
    path::{Path, PathBuf},
    process::Stdio,
};

use tokio::{io::AsyncReadExt, process::Command};

const CHUNK_BYTES: usize = 256 << 10;

/// The program that writes a file, its last argument, to its standard output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FileReader {
    pub(crate) program: PathBuf,
    pub(crate) arguments: Vec<String>,
}

impl Default for FileReader {
    fn default() -> Self {
        FileReader { program: "cat".into(), arguments: vec!["--".to_owned()] }
    }
}

impl FileReader {
    /// Hands all bytes of a file to `take`, in order; returns how many there were.
    pub(crate) async fn read(&self, path: &Path, mut take: impl FnMut(&[u8])) -> io::Result<u64> {
        let mut child = Command::new(&self.program)
            .args(&self.arguments)
            .arg(path)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()?;
        let mut bytes = 0;
        if let Some(mut output) = child.stdout.take() {
            let mut chunk = vec![0; CHUNK_BYTES];
            loop {
                let read = output.read(&mut chunk).await?;
                if read == 0 {
                    break;
                }
                bytes += read as u64;
                take(chunk.get(..read).unwrap_or_default());
            }
        }
        let status = child.wait().await?;
        match status.success() {
            true => Ok(bytes),
            false => Err(io::Error::other(format!("{} could not read it ({status})", self.program.display()))),
        }
    }
}

/// Looks for some bytes in what comes by in chunks.
pub(crate) struct Needle {
    bytes: Vec<u8>,
    /// The end of what came before.
    rest: Vec<u8>,
    pub(crate) found: bool,
}

impl Needle {
    pub(crate) fn new(bytes: &[u8]) -> Self {
        Needle { bytes: bytes.to_vec(), rest: Vec::new(), found: false }
    }

    pub(crate) fn feed(&mut self, chunk: &[u8]) {
        if self.found {
            return;
        }
        let overlap = self.bytes.len().saturating_sub(1);
        self.rest.extend_from_slice(chunk.get(..overlap.min(chunk.len())).unwrap_or_default());
        let is_in = |hay: &[u8]| memchr::memmem::find(hay, &self.bytes).is_some();
        self.found = is_in(&self.rest) || is_in(chunk);
        match chunk.len() >= overlap {
            true => self.rest = chunk.get(chunk.len() - overlap..).unwrap_or_default().to_vec(),
            false => drop(self.rest.drain(..self.rest.len().saturating_sub(overlap))),
        }
    }
}

/// Every file under `directory`, in the order of their names.
pub(crate) fn files(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let (mut found, mut directories) = (Vec::new(), vec![directory.to_owned()]);
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(&directory)? {
            let entry = entry?;
            let kind = entry.file_type()?;
            if kind.is_dir() {
                directories.push(entry.path());
            } else if kind.is_file() {
                found.push(entry.path());
            }
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_needle_is_found_wherever_the_chunks_end() {
        let hay = b"what is looked for is here, and here is the end";
        for chunk in 1..hay.len() {
            for (needle, expected) in
                [("here, and", true), ("what", true), ("end", true), ("nowhere", false), ("w", true)]
            {
                let mut needle = Needle::new(needle.as_bytes());
                hay.chunks(chunk).for_each(|chunk| needle.feed(chunk));
                assert_eq!(needle.found, expected, "chunks of {chunk}");
            }
        }
    }

    #[tokio::test]
    async fn a_file_is_read_by_another_process() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("-rf"); // a name that looks like an option
        std::fs::write(&path, vec![7; 1_000_000]).unwrap();
        let mut bytes = 0;
        let read = FileReader::default().read(&path, |chunk| bytes += chunk.len()).await.unwrap();
        assert_eq!((read, bytes), (1_000_000, 1_000_000));
        assert!(FileReader::default().read(&dir.path().join("missing"), |_| {}).await.is_err());
        let none = FileReader { program: dir.path().join("no-such-program"), arguments: Vec::new() };
        assert!(none.read(&path, |_| {}).await.is_err());
    }
}
