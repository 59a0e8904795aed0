//! Readers of a read model that is being fed: when they see an event, and what they see while another model takes its place.
//!
//! What counts is the moment at which a reader has the answer. So the time of a query, and the wait for the next one, are in every figure.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use anyhow::{Result, bail, ensure};
use hdrhistogram::Histogram;
use kuma_core::{ModelBuild, ProjectionHandle, rusqlite::types::Value};
use tokio::sync::mpsc;

use super::{
    account::{id, integer},
    appends::Sample,
};
use crate::tasks;

/// How long a reader waits between two queries.
const LOOK_AGAIN: Duration = Duration::from_millis(1);
/// What is not in the model after this time never will be.
const LOST_AFTER: Duration = Duration::from_secs(60);
/// What happens this long before and after a model took another's place counts as around it.
const AROUND: Duration = Duration::from_secs(1);

/// A reader in a task of its own.
pub(crate) struct Reader<T> {
    stop: Arc<AtomicBool>,
    task: tokio::task::JoinHandle<Result<T>>,
}

impl<T: Send + 'static> Reader<T> {
    fn start<F: Future<Output = Result<T>> + Send + 'static>(read: impl FnOnce(Arc<AtomicBool>) -> F) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        Reader { stop: stop.clone(), task: tokio::spawn(read(stop)) }
    }

    pub(crate) fn is_finished(&self) -> bool {
        self.task.is_finished()
    }

    pub(crate) async fn stop(self) -> Result<T> {
        self.stop.store(true, Relaxed);
        self.task.await?
    }
}

/// What a reader saw that looked for events.
pub(crate) struct Lags {
    /// From an event's acknowledgement until an answer had it.
    pub(crate) since_acknowledged: Histogram<u32>,
    /// The same from when its append was due.
    pub(crate) since_due: Histogram<u32>,
    /// How long queries took.
    pub(crate) queries: Histogram<u32>,
}

/// Looks for samples in the model until each of them was seen.
///
/// # Errors
/// A query fails, or an event does not come.
pub(crate) fn watch_lags(projection: ProjectionHandle, mut samples: mpsc::UnboundedReceiver<Sample>) -> Reader<Lags> {
    Reader::start(async move |stop| {
        let mut lags = Lags {
            since_acknowledged: tasks::histogram()?,
            since_due: tasks::histogram()?,
            queries: tasks::histogram()?,
        };
        let mut waiting: Vec<Sample> = Vec::new();
        loop {
            let is_last = stop.load(Relaxed);
            while let Ok(sample) = samples.try_recv() {
                waiting.push(sample);
            }
            if waiting.is_empty() && is_last {
                return Ok(lags);
            }
            if !waiting.is_empty() {
                let ids: Vec<String> = waiting.iter().map(|sample| id(sample.account)).collect();
                let sql = "SELECT account, events FROM total WHERE account IN (SELECT value FROM json_each(?))";
                let start = Instant::now();
                let answer = projection.query(sql).bind(serde_json::to_string(&ids)?).run().await?;
                tasks::record(&mut lags.queries, start);
                let versions: HashMap<String, i64> = answer
                    .rows
                    .iter()
                    .filter_map(|row| match row.as_slice() {
                        [Value::Text(account), events] => Some((account.clone(), integer(events))),
                        _ => None,
                    })
                    .collect();
                waiting.retain(|sample| {
                    let version = versions.get(&id(sample.account)).map_or(0, |version| version.cast_unsigned());
                    if version >= sample.version {
                        tasks::record(&mut lags.since_acknowledged, sample.acknowledged);
                        tasks::record(&mut lags.since_due, sample.due);
                    }
                    version < sample.version
                });
            }
            if let Some(lost) = waiting.iter().find(|sample| sample.acknowledged.elapsed() > LOST_AFTER) {
                bail!("version {} of {} is not in the model after {LOST_AFTER:?}", lost.version, id(lost.account));
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    })
}

/// One answer.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Seen {
    /// When it was asked, and when it was answered, since the reader began.
    asked: Duration,
    answered: Duration,
    model: ModelBuild,
    events: i64,
}

/// What a reader saw that asked for the number of events over and over.
pub(crate) struct Answers(Vec<Seen>);

/// Asks how many events are in the model, over and over, until it is stopped, or for a second after another model answered for the first time.
///
/// # Errors
/// A query fails, or its answer is older than the one before.
pub(crate) fn watch_swap(projection: ProjectionHandle) -> Reader<Answers> {
    Reader::start(async move |stop| {
        let (begin, mut answers) = (Instant::now(), Vec::<Seen>::new());
        let mut swapped: Option<Duration> = None;
        while !stop.load(Relaxed) && swapped.is_none_or(|swapped| begin.elapsed() < swapped + AROUND) {
            let asked = begin.elapsed();
            let answer = projection.query("SELECT sum(events) FROM total").run().await?;
            let answered = begin.elapsed();
            let events = answer.rows.first().and_then(|row| row.first()).map_or(0, integer);
            let seen = Seen { asked, answered, model: answer.as_of.model, events };
            if let Some(last) = answers.last() {
                let Seen { model, events, .. } = last;
                ensure!(seen.events >= *events, "{model} had {events} events, then {} had {}", seen.model, seen.events);
                if *model != seen.model {
                    ensure!(swapped.is_none(), "a second model took the place of {model}");
                    swapped = Some(answered);
                }
            }
            ensure!(seen.events > 0, "{} is served and empty", seen.model);
            answers.push(seen);
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        Ok(Answers(answers))
    })
}

/// How a model took another's place, as its readers see it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Swap {
    /// From the beginning of the reading until the new model answered.
    pub(crate) after: Duration,
    /// The longest time in which no answer had anything new, of those that touch the second before and the second after the swap.
    pub(crate) pause: Duration,
    /// The longest query of these two seconds.
    pub(crate) query_max: Duration,
    /// The longest time in which no answer had anything new, of all.
    pub(crate) standstill_max: Duration,
}

impl Answers {
    /// None if no other model took the place of the first one.
    pub(crate) fn swap(&self) -> Option<Swap> {
        let first = self.0.first()?;
        let after = self.0.iter().find(|seen| seen.model != first.model)?.answered;
        let is_around = |from: Duration, to: Duration| to + AROUND >= after && from <= after + AROUND;
        let (mut pause, mut query_max, mut standstill_max) = (Duration::ZERO, Duration::ZERO, Duration::ZERO);
        let mut last_new = first;
        for seen in &self.0 {
            if is_around(seen.asked, seen.answered) {
                query_max = query_max.max(seen.answered - seen.asked);
            }
            if seen.events > last_new.events {
                let stood = seen.answered - last_new.answered;
                standstill_max = standstill_max.max(stood);
                if is_around(last_new.answered, seen.answered) {
                    pause = pause.max(stood);
                }
                last_new = seen;
            }
        }
        Some(Swap { after, pause, query_max, standstill_max })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pause_is_the_longest_time_without_anything_new_around_the_swap() {
        let build = |build| ModelBuild { version: 1, build };
        let seen = |asked, answered, model, events| Seen {
            asked: Duration::from_millis(asked),
            answered: Duration::from_millis(answered),
            model: build(model),
            events,
        };
        let mut answers = vec![
            seen(0, 1, 1, 10),
            seen(2, 500, 1, 20),
            seen(1900, 1901, 1, 30), // nothing new for 1401 ms, long before
            seen(2990, 3000, 1, 40),
            seen(3001, 3004, 1, 40),
        ];
        assert_eq!(Answers(answers.clone()).swap(), None);
        answers.extend([seen(3020, 3050, 2, 40), seen(3100, 3130, 2, 50), seen(3131, 3135, 2, 51)]);
        let ms = Duration::from_millis;
        let expected = Swap { after: ms(3050), pause: ms(1099), query_max: ms(30), standstill_max: ms(1401) };
        assert_eq!(Answers(answers).swap(), Some(expected));
    }
}
