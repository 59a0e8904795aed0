//! Lines of a file, numbered and digested, the next one only.
//!
//! Invariant: memory is bounded by the longest line that is allowed, also where a line has no end.

use std::io;

use sha2::{Digest, Sha256};
use tokio::io::{AsyncBufRead, AsyncBufReadExt};

/// The line of a file that was read last.
pub(super) struct Lines<R> {
    reader: R,
    bytes_max: usize,
    /// With its end.
    line: Vec<u8>,
    number: u64,
    bytes: u64,
    /// Of all lines before this one.
    digest: Sha256,
}

/// Why there is no next line.
#[derive(Debug)]
pub(super) enum LinesError {
    /// The reader failed.
    Io(io::Error),
    /// The line is longer than allowed. It was not read to its end.
    TooLong,
}

impl<R: AsyncBufRead + Unpin> Lines<R> {
    pub(super) fn new(reader: R, bytes_max: usize) -> Self {
        Lines { reader, bytes_max, line: Vec::new(), number: 0, bytes: 0, digest: Sha256::new() }
    }

    /// Reads the next line; false at the end of the file.
    ///
    /// After an error [`Lines::number`] is that of the line which could not be read.
    pub(super) async fn next(&mut self) -> Result<bool, LinesError> {
        self.digest.update(&self.line);
        self.line.clear();
        self.number += 1;
        loop {
            let available = self.reader.fill_buf().await.map_err(LinesError::Io)?;
            if available.is_empty() {
                break;
            }
            let end = available.iter().position(|byte| *byte == b'\n');
            let taken = end.map_or(available.len(), |end| end + 1);
            // The end of a line does not count.
            if self.line.len() + end.unwrap_or(taken) > self.bytes_max {
                return Err(LinesError::TooLong);
            }
            self.line.extend_from_slice(&available[..taken]);
            self.reader.consume(taken);
            if end.is_some() {
                break;
            }
        }
        self.bytes += self.line.len() as u64;
        if self.line.is_empty() {
            self.number -= 1;
            return Ok(false);
        }
        Ok(true)
    }

    /// The line, with its end.
    pub(super) fn line(&self) -> &[u8] {
        &self.line
    }

    /// Whether the line has its end.
    pub(super) fn is_whole(&self) -> bool {
        self.line.ends_with(b"\n")
    }

    /// The number of the line, from 1; 0 before the first one.
    pub(super) fn number(&self) -> u64 {
        self.number
    }

    /// Bytes read, with this line.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The SHA-256 of all bytes before this line, in hexadecimal digits.
    pub(super) fn digest_before(&self) -> String {
        hex::encode(self.digest.clone().finalize())
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::BufReader;

    use super::*;

    /// Whatever the pieces in which they come.
    #[tokio::test]
    async fn lines_come_whole_numbered_and_digested() {
        for capacity in [1, 3, 100] {
            let mut lines = Lines::new(BufReader::with_capacity(capacity, &b"one\n\nthree\r\nfour"[..]), 6);
            let mut found = Vec::new();
            while lines.next().await.unwrap() {
                found.push((lines.number(), lines.line().to_vec(), lines.is_whole()));
            }
            let line = |number, text: &str, is_whole| (number, text.as_bytes().to_vec(), is_whole);
            assert_eq!(
                found,
                [line(1, "one\n", true), line(2, "\n", true), line(3, "three\r\n", true), line(4, "four", false)]
            );
            assert_eq!((lines.number(), lines.bytes()), (4, 16));
            assert_eq!(lines.digest_before(), hex::encode(Sha256::digest("one\n\nthree\r\nfour")));
            assert!(!lines.next().await.unwrap(), "the end stays the end");
        }
    }

    #[tokio::test]
    async fn a_line_without_end_is_refused_before_it_fills_the_memory() {
        let mut lines = Lines::new(BufReader::with_capacity(8, tokio::io::repeat(b'x')), 1000);
        assert!(matches!(lines.next().await, Err(LinesError::TooLong)));
        assert!(lines.line.capacity() < 4000 && lines.number() == 1);
    }
}
