//! Denials on their way to the audit log.
//!
//! ```text
//! denied ──► gathered while the last append is younger than a second ──► one append ──► answered
//! ```
//!
//! Invariants:
//! - Whoever is denied is answered when that stands in the audit log, or cannot be written there (which is logged).
//! - However many are denied, the log grows by one append a second: what is the same is counted. So it also slows down whoever guesses.

use std::{collections::BTreeMap, time::Duration};

use kuma_core::{Denial, Kuma};
use tokio::{
    sync::{Mutex, mpsc, oneshot},
    task::JoinHandle,
    time::{Instant, sleep_until},
};

/// Between two appends.
const PACE: Duration = Duration::from_secs(1);
/// Denials that wait. There are as many as there are requests.
const WAITING_MAX: usize = 1024;
/// Different denials of one append; there are fewer by their nature.
const DIFFERENT_MAX: usize = 256;

type Denied = (Denial, oneshot::Sender<()>);

/// Gathers denials.
pub(crate) struct Denials {
    sender: Mutex<Option<mpsc::Sender<Denied>>>,
    task: Mutex<Option<JoinHandle<()>>>,
}

impl Denials {
    pub(crate) fn start(kuma: Kuma) -> Self {
        let (sender, receiver) = mpsc::channel(WAITING_MAX);
        let task = tokio::spawn(gather(kuma, receiver));
        Denials { sender: Mutex::new(Some(sender)), task: Mutex::new(Some(task)) }
    }

    /// Returns when it is noted.
    pub(crate) async fn note(&self, denial: Denial) {
        let (done, noted) = oneshot::channel();
        let sender = self.sender.lock().await.clone();
        if let Some(sender) = sender
            && sender.send((denial, done)).await.is_ok()
        {
            let _ = noted.await;
        }
    }

    /// Notes what waits, and ends.
    pub(crate) async fn stop(&self) {
        self.sender.lock().await.take();
        if let Some(task) = self.task.lock().await.take() {
            let _ = task.await;
        }
    }
}

async fn gather(kuma: Kuma, mut receiver: mpsc::Receiver<Denied>) {
    let mut next = Instant::now();
    while let Some((denial, done)) = receiver.recv().await {
        let (mut same, mut waiting) = (BTreeMap::new(), vec![done]);
        *same.entry(key(denial)).or_insert(0) += 1;
        // The channel is closed when the server stops; then nothing is waited for.
        let until = sleep_until(next);
        tokio::pin!(until);
        loop {
            tokio::select! {
                biased;
                more = receiver.recv(), if same.len() < DIFFERENT_MAX => match more {
                    Some((denial, done)) => {
                        *same.entry(key(denial)).or_insert(0) += 1;
                        waiting.push(done);
                    }
                    None => break,
                },
                () = &mut until => break,
            }
        }
        let denials =
            same.into_iter().map(|((token, scope, request, why), times)| Denial { token, scope, request, why, times });
        if let Err(error) = kuma.audit_denials(denials.collect()).await {
            tracing::error!(%error, denied = waiting.len(), "denials could not be noted in the audit log");
        }
        next = Instant::now() + PACE;
        // Whoever hung up does not care.
        for done in waiting {
            let _ = done.send(());
        }
    }
}

fn key(denial: Denial) -> (Option<String>, String, String, String) {
    (denial.token, denial.scope, denial.request, denial.why)
}
