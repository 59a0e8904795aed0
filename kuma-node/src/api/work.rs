//! Long work, answered line by line: how far it is now and then, and at the end what was done or why it failed.
//!
//! Invariants:
//! - The last line says how it ended; an answer without one was cut off.
//! - The work is part of the answer: whoever hangs up ends it.

use std::{pin::Pin, time::Duration};

use axum::{
    body::{Body, Bytes},
    http::header,
    response::{IntoResponse, Response},
};
use futures_util::stream;
use serde::Serialize;
use tokio::{
    sync::{OwnedSemaphorePermit, watch},
    time::{Interval, MissedTickBehavior, interval, timeout},
};

use crate::{problem::Problem, wire::WorkLine};

/// Between two lines.
const EVERY: Duration = Duration::from_millis(500);
/// What fails within this time is answered with its status instead.
const AT_ONCE: Duration = Duration::from_millis(200);

struct Work<P, D> {
    work: Pin<Box<dyn Future<Output = Result<D, Problem>> + Send>>,
    progress: watch::Receiver<P>,
    every: Interval,
    _permit: OwnedSemaphorePermit,
}

/// Answers with the lines of a work, which tells its progress to the sender that it is given.
///
/// # Errors
/// It failed at once.
pub(super) async fn answer<P, D, F>(
    permit: OwnedSemaphorePermit,
    begin: P,
    work: impl FnOnce(watch::Sender<P>) -> F,
) -> Result<Response, Problem>
where
    P: Clone + Serialize + Send + Sync + 'static,
    D: Serialize + Send + 'static,
    F: Future<Output = Result<D, Problem>> + Send + 'static,
{
    let (sender, progress) = watch::channel(begin);
    let mut work: Pin<Box<dyn Future<Output = Result<D, Problem>> + Send>> = Box::pin(work(sender));
    let early = match timeout(AT_ONCE, &mut work).await {
        Ok(Err(problem)) => return Err(problem),
        Ok(Ok(done)) => Some(done),
        Err(_) => None,
    };
    let headers = [(header::CONTENT_TYPE, "application/x-ndjson")];
    if let Some(done) = early {
        return Ok((headers, Body::from(line(&WorkLine::<P, D>::Done(done)))).into_response());
    }
    let mut every = interval(EVERY);
    every.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let work = Work { work, progress, every, _permit: permit };
    let lines = stream::unfold(Some(work), |work| async {
        let mut work = work?;
        tokio::select! {
            biased;
            done = &mut work.work => {
                let last = match done {
                    Ok(done) => WorkLine::<P, D>::Done(done),
                    Err(problem) => WorkLine::Problem(problem.body(None)),
                };
                Some((Ok::<_, std::convert::Infallible>(line(&last)), None))
            }
            _ = work.every.tick() => {
                let progress = work.progress.borrow_and_update().clone();
                Some((Ok(line(&WorkLine::<P, D>::Progress(progress))), Some(work)))
            }
        }
    });
    Ok((headers, Body::from_stream(lines)).into_response())
}

fn line(line: &impl Serialize) -> Bytes {
    let mut text = serde_json::to_vec(line).unwrap_or_default();
    text.push(b'\n');
    text.into()
}
