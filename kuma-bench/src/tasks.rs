//! Many tasks at once, and the latencies they measured.

use std::time::{Duration, Instant};

use anyhow::Result;
use hdrhistogram::Histogram;
use tokio::task::JoinSet;

/// The longest latency that is told apart. What is longer counts as this.
const LATENCY_MAX: Duration = Duration::from_secs(100);

const AT_A_TIME: usize = 256;

/// Runs each future as a task of its own. The first error ends the others.
pub(crate) async fn join<T: Send + 'static>(
    futures: impl IntoIterator<Item = impl Future<Output = Result<T>> + Send + 'static>,
) -> Result<Vec<T>> {
    let mut tasks: JoinSet<Result<T>> = futures.into_iter().collect();
    let mut results = Vec::with_capacity(tasks.len());
    while let Some(result) = tasks.join_next().await {
        results.push(result??);
    }
    Ok(results)
}

/// Runs all futures, a few hundred at a time. The first error ends the others.
pub(crate) async fn join_bounded<T: Send + 'static>(
    futures: impl IntoIterator<Item = impl Future<Output = Result<T>> + Send + 'static>,
) -> Result<()> {
    let mut tasks: JoinSet<Result<T>> = JoinSet::new();
    for future in futures {
        while tasks.len() >= AT_A_TIME {
            tasks.join_next().await.transpose()?.transpose()?;
        }
        tasks.spawn(future);
    }
    while let Some(result) = tasks.join_next().await {
        result??;
    }
    Ok(())
}

/// A histogram of nanoseconds, exact to 1 %. One for each task: nothing is shared while the clock runs.
pub(crate) fn histogram() -> Result<Histogram<u32>> {
    Ok(Histogram::new_with_max(LATENCY_MAX.as_nanos() as u64, 2)?)
}

/// Records the time since `start`.
pub(crate) fn record(latencies: &mut Histogram<u32>, start: Instant) {
    latencies.saturating_record(u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX));
}

/// All of them in one.
pub(crate) fn merge(parts: impl IntoIterator<Item = Histogram<u32>>) -> Result<Histogram<u32>> {
    let mut whole = histogram()?;
    for part in parts {
        whole.add(part)?;
    }
    Ok(whole)
}
