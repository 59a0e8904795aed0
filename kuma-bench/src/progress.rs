//! Progress on a terminal, on stderr; nothing where stderr is not one.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

const TICK: Duration = Duration::from_millis(200);

/// Where a command is.
pub(crate) struct Progress {
    bar: ProgressBar,
    run: String,
}

impl Progress {
    /// Of run `run` of `runs`.
    pub(crate) fn of_run(run: u32, runs: u32) -> Self {
        let bar = ProgressBar::new_spinner();
        let template = "{msg} {wide_bar} {human_pos}/{human_len} {per_sec} {eta}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.enable_steady_tick(TICK);
        Progress { bar, run: format!("run {run} of {runs}") }
    }

    #[cfg(test)]
    pub(crate) fn hidden() -> Self {
        Progress { bar: ProgressBar::hidden(), run: String::new() }
    }

    /// Begins something that takes `steps` steps; 0 if that is not known.
    pub(crate) fn phase(&self, name: &str, steps: u64) {
        self.bar.reset();
        self.bar.set_length(steps);
        self.bar.set_message(format!("{}: {name}", self.run));
    }

    pub(crate) fn add(&self, steps: u64) {
        self.bar.inc(steps);
    }

    /// Shows what `steps` says while `work` goes on. The work itself is not slowed down by telling.
    pub(crate) async fn watch<T>(&self, work: impl Future<Output = T>, steps: impl Fn() -> u64) -> T {
        let mut work = std::pin::pin!(work);
        let mut tick = tokio::time::interval(TICK);
        loop {
            tokio::select! {
                done = &mut work => return done,
                _ = tick.tick() => self.bar.set_position(steps()),
            }
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
