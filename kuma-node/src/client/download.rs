//! An export on its way.
//!
//! Invariant: it is whole when its last line is a manifest with the digest of all that came before; nothing else is taken for whole.

use std::ops::Range;

use reqwest::Response;
use serde::Deserialize;
use sha2::{Digest, Sha256};

use kuma_core::Manifest;

use super::ClientError;

/// An export on its way. Its pieces are to be written in their order.
#[derive(Debug)]
#[must_use = "nothing is read until it is asked for"]
pub struct Download {
    response: Response,
    url: String,
    check: Check,
}

impl Download {
    pub(super) fn new(response: Response, url: String) -> Self {
        Download { response, url, check: Check::default() }
    }

    /// The next piece; none at the end, which is not said to be whole by that: ask [`Download::manifest`].
    ///
    /// # Errors
    /// [`ClientError::Interrupted`]: it was cut off.
    pub async fn next(&mut self) -> Result<Option<bytes::Bytes>, ClientError> {
        let piece = self.response.chunk().await.map_err(|error| ClientError::of(error, &self.url))?;
        if let Some(piece) = &piece {
            self.check.push(piece);
        }
        Ok(piece)
    }

    /// The last line, if it fits what was read.
    ///
    /// # Errors
    /// [`ClientError::Interrupted`]: there is none. [`ClientError::Unexpected`]: the bytes are not those that the node wrote.
    pub fn manifest(self) -> Result<Manifest, ClientError> {
        self.check.manifest()
    }
}

/// The digest of all lines but the last one.
#[derive(Debug, Default)]
struct Check {
    digest: Sha256,
    /// From the beginning of the last line that has begun.
    last: Vec<u8>,
}

impl Check {
    fn push(&mut self, piece: &[u8]) {
        self.last.extend_from_slice(piece);
        let last_line = last_line(&self.last);
        self.digest.update(&self.last[..last_line.start]);
        self.last.drain(..last_line.start);
    }

    fn manifest(self) -> Result<Manifest, ClientError> {
        #[derive(Deserialize)]
        struct Line {
            manifest: Manifest,
        }
        let line: Line = match serde_json::from_slice(&self.last) {
            Ok(line) if self.last.ends_with(b"\n") => line,
            _ => return Err(ClientError::Interrupted(None)),
        };
        if line.manifest.sha256 != hex::encode(self.digest.finalize()) {
            return Err(ClientError::Unexpected(
                "the digest in the last line is not that of the lines before: something between here and the node changes what it sends".to_owned(),
            ));
        }
        Ok(line.manifest)
    }
}

/// Where the last line is, its end included.
fn last_line(bytes: &[u8]) -> Range<usize> {
    let content = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    let start = content.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
    start..bytes.len()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn export(lines: &str) -> String {
        let sha256 = hex::encode(Sha256::digest(lines));
        format!(
            "{lines}{{\"manifest\":{{\"format\":1,\"entities\":1,\"commits\":1,\"events\":1,\"sha256\":\"{sha256}\"}}}}\n"
        )
    }

    fn check(pieces: &[&[u8]]) -> Result<Manifest, ClientError> {
        let mut check = Check::default();
        pieces.iter().for_each(|piece| check.push(piece));
        check.manifest()
    }

    #[test]
    fn an_export_without_its_whole_end_was_cut_off() {
        let text = export("{\"a\":1}\n{\"b\":2}\n");
        assert_eq!(check(&[text.as_bytes()]).unwrap().events, 1);
        for end in 0..text.len() {
            assert!(matches!(check(&[&text.as_bytes()[..end]]), Err(ClientError::Interrupted(_))), "{end}");
        }
    }

    #[test]
    fn an_export_that_was_changed_is_refused() {
        let text = export("{\"a\":1}\n").replace("\"a\"", "\"b\"");
        assert!(matches!(check(&[text.as_bytes()]), Err(ClientError::Unexpected(_))));
    }

    proptest! {
        #[test]
        fn cuts_do_not_matter(lines in "(\\{\"a\":[0-9]\\}\n){0,5}", cuts in prop::collection::vec(0usize..250, 0..8)) {
            let text = export(&lines);
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(text.len())).chain([0, text.len()]).collect();
            cuts.sort_unstable();
            let pieces: Vec<&[u8]> = cuts.windows(2).map(|cut| &text.as_bytes()[cut[0]..cut[1]]).collect();
            prop_assert!(check(&pieces).is_ok());
        }
    }
}
