//! The file that is imported: read, and unpacked, in a thread of its own.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Cursor, Read},
    path::Path,
    pin::Pin,
    sync::Arc,
    task,
};

use anyhow::Context;
use flate2::bufread::MultiGzDecoder;
use futures_util::stream;
use indicatif::ProgressBar;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, ReadBuf};
use tokio_util::io::{ReaderStream, StreamReader};

/// Bytes that the thread hands over at once, and how many such pieces may wait.
const PIECE_BYTES: usize = 256 << 10;
const PIECES_MAX: usize = 4;

/// The lines of a file.
pub(super) struct Source {
    reader: Box<dyn BufRead + Send>,
}

/// Why the file could not be read further, if that is so.
#[derive(Clone, Debug, Default)]
pub(super) struct Failure(Arc<Mutex<Option<io::Error>>>);

impl Failure {
    pub(super) fn take(&self) -> Option<io::Error> {
        self.0.lock().take()
    }
}

impl Source {
    /// Opens it; `progress` follows how much of the file itself was read.
    pub(super) fn open(path: &Path, progress: &ProgressBar) -> anyhow::Result<Self> {
        let place = || format!("cannot read {}", path.display());
        let file: Box<dyn Read + Send> = if path == Path::new("-") {
            Box::new(io::stdin())
        } else {
            let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
            let metadata = file.metadata().with_context(place)?;
            // Of a pipe no length is known.
            if metadata.is_file() {
                progress.set_length(metadata.len());
            }
            Box::new(file)
        };
        progress.set_position(0);
        let mut file = BufReader::with_capacity(PIECE_BYTES, progress.wrap_read(file));
        // A pipe may hand over one byte at first: that is no line either.
        let gzipped = file.fill_buf().with_context(place)?.starts_with(&[0x1f]);
        let reader: Box<dyn BufRead + Send> = if gzipped {
            Box::new(BufReader::with_capacity(PIECE_BYTES, MultiGzDecoder::new(file)))
        } else {
            Box::new(file)
        };
        Ok(Source { reader })
    }

    /// What is sent, and where it is told why that ended early. What is dropped is read no further.
    pub(super) fn into_body(self) -> (reqwest::Body, Failure) {
        let failure = Failure::default();
        let reader = Told { reader: read_apart(self.reader), failure: failure.clone() };
        (reqwest::Body::wrap_stream(ReaderStream::with_capacity(reader, PIECE_BYTES)), failure)
    }
}

/// Reads in a thread of its own: a file makes its reader wait, and unpacking takes time.
fn read_apart(mut reader: Box<dyn BufRead + Send>) -> impl AsyncRead + Unpin + Send {
    let (sender, mut receiver) = tokio::sync::mpsc::channel(PIECES_MAX);
    tokio::task::spawn_blocking(move || {
        loop {
            // What is there and no more: whoever writes into a pipe line by line does not wait for a whole piece.
            let piece = match reader.fill_buf() {
                Ok([]) => return,
                Ok(piece) => Ok(Cursor::new(piece.to_vec())),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => Err(error),
            };
            let read = piece.as_ref().map_or(0, |piece| piece.get_ref().len());
            reader.consume(read);
            // An import that has stopped reads no further.
            if sender.blocking_send(piece).is_err() || read == 0 {
                return;
            }
        }
    });
    StreamReader::new(stream::poll_fn(move |context| receiver.poll_recv(context)))
}

/// Keeps an error apart: what becomes of it on its way through the client says less.
struct Told<R> {
    reader: R,
    failure: Failure,
}

impl<R: AsyncRead + Unpin> AsyncRead for Told<R> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut task::Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> task::Poll<io::Result<()>> {
        let read = Pin::new(&mut self.reader).poll_read(context, buffer);
        if let task::Poll::Ready(Err(error)) = read {
            let kind = error.kind();
            *self.failure.0.lock() = Some(error);
            return task::Poll::Ready(Err(kind.into()));
        }
        read
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use tokio::io::AsyncReadExt;

    use super::*;

    async fn text(bytes: &[u8]) -> Result<String, String> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        let progress = ProgressBar::hidden();
        let source = Source::open(file.path(), &progress).unwrap();
        assert_eq!(progress.length(), Some(bytes.len() as u64));
        let failure = Failure::default();
        let mut reader = Told { reader: read_apart(source.reader), failure: failure.clone() };
        let mut text = String::new();
        match reader.read_to_string(&mut text).await {
            Ok(_) => {
                assert_eq!(progress.position(), bytes.len() as u64);
                Ok(text)
            }
            Err(_) => Err(failure.take().unwrap().to_string()),
        }
    }

    fn gzipped(text: &str) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(text.as_bytes()).unwrap();
        encoder.finish().unwrap()
    }

    #[tokio::test]
    async fn plain_and_gzipped_files_are_the_same_lines() {
        let lines = "{\"a\":1}\n".repeat(100_000);
        assert_eq!(text(lines.as_bytes()).await.unwrap(), lines);
        assert_eq!(text(&gzipped(&lines)).await.unwrap(), lines);
        // Files that were packed apart and joined.
        assert_eq!(text(&[gzipped("one\n"), gzipped("two\n")].concat()).await.unwrap(), "one\ntwo\n");
        assert_eq!(text(b"").await.unwrap(), "");
    }

    #[tokio::test]
    async fn why_a_file_cannot_be_read_is_kept() {
        let whole = gzipped(&"line\n".repeat(1000));
        assert!(text(&whole[..whole.len() - 10]).await.is_err());
        let mut damaged = whole.clone();
        let end = damaged.len() - 6;
        damaged[end] ^= 1;
        assert!(text(&damaged).await.unwrap_err().contains("corrupt"));
    }
}
