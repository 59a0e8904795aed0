//! The answer to a long work, line by line.
//!
//! Invariant: a work whose last line did not come was cut off; it is never taken for done.

use std::marker::PhantomData;

use reqwest::Response;
use serde::de::DeserializeOwned;

use super::{ClientError, lines::Lines};
use crate::wire::WorkLine;

/// A line has no more than this, also where damage is told.
const LINE_BYTES_MAX: usize = 16 << 20;

/// A work that goes on as long as its answer is read. Dropping it ends it.
#[derive(Debug)]
#[must_use = "a work ends when its answer is not read"]
pub struct Work<P, D> {
    response: Response,
    lines: Lines,
    url: String,
    of: PhantomData<fn() -> (P, D)>,
}

impl<P, D> Work<P, D> {
    pub(super) fn new(response: Response, url: String) -> Self {
        Work { response, lines: Lines::default(), url, of: PhantomData }
    }
}

impl<P: DeserializeOwned, D: DeserializeOwned> Work<P, D> {
    /// Waits until it is done, and tells how far it is meanwhile.
    ///
    /// # Errors
    /// [`ClientError::Problem`]: it failed. [`ClientError::Interrupted`]: it was cut off.
    pub async fn finish(mut self, mut progress: impl FnMut(P)) -> Result<D, ClientError> {
        loop {
            while let Some(line) = self.lines.next() {
                let line: WorkLine<P, D> = serde_json::from_slice(line).map_err(|error| {
                    ClientError::Unexpected(format!(
                        "a line of the answer is none that a node of this version sends: {error}"
                    ))
                })?;
                match line {
                    WorkLine::Progress(now) => progress(now),
                    WorkLine::Done(done) => return Ok(done),
                    WorkLine::Problem(problem) => return Err(ClientError::Problem(Box::new(problem))),
                }
            }
            if self.lines.waiting() > LINE_BYTES_MAX {
                return Err(ClientError::Unexpected("a line of the answer does not end".to_owned()));
            }
            match self.response.chunk().await {
                Ok(Some(piece)) => self.lines.push(&piece),
                Ok(None) => return Err(ClientError::Interrupted(None)),
                Err(error) => return Err(ClientError::of(error, &self.url)),
            }
        }
    }
}
