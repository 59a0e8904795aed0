//! What a store counts and times, through the `metrics` facade. Install a recorder before the store is started; without one all of
//! this costs a few nanoseconds. The names are documented in docs/observability.md; no label names an entity.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use metrics::{
    Counter, Gauge, Histogram, Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram,
};

use crate::{AppendError, reply::Written, snapshot::Misfit};

/// A counter that is also there when nobody installed a recorder.
pub(crate) struct Tally {
    count: AtomicU64,
    metric: Counter,
}

impl Tally {
    fn new(metric: Counter) -> Self {
        Tally { count: AtomicU64::new(0), metric }
    }

    pub(crate) fn add(&self, amount: u64) {
        self.count.fetch_add(amount, Relaxed);
        self.metric.increment(amount);
    }

    pub(crate) fn count(&self) -> u64 {
        self.count.load(Relaxed)
    }
}

/// Handles made once, so that nothing is looked up on the way of an append.
pub(crate) struct CoreMetrics {
    store: String,
    committed: Counter,
    repeated: Counter,
    rejected: Counter,
    refused: Counter,
    unavailable: Counter,
    /// Counted where requests are admitted.
    pub(crate) overloaded: Counter,
    unknown: Counter,
    write_seconds: Histogram,
    pub(crate) events: Counter,
    activations_log: Counter,
    activations_snapshot: Counter,
    activation_seconds: Histogram,
    replayed_commits: Counter,
    pub(crate) passivations: Counter,
    pub(crate) live_entities: Gauge,
    pub(crate) failures: Counter,
    ignored: [(Misfit, Counter); 5],
    pub(crate) snapshots_ignored: Tally,
    pub(crate) snapshots_skipped: Tally,
    pub(crate) erasures_completed: Counter,
    pub(crate) erasures_interrupted: Counter,
    pub(crate) erasures_unfinished: Gauge,
    pub(crate) erase_seconds: Histogram,
    pub(crate) scrub: ScrubMetrics,
}

/// What the scrub has done.
pub(crate) struct ScrubMetrics {
    pub(crate) commits: Tally,
    pub(crate) bytes: Tally,
    pub(crate) bad_rows: Tally,
    pub(crate) passes: Tally,
}

impl CoreMetrics {
    pub(crate) fn new(store: &str) -> Self {
        describe();
        let name = store.to_owned();
        let store = || store.to_owned();
        let write = |result: &'static str| counter!("kuma_writes_total", "store" => store(), "result" => result);
        let activations = |from: &'static str| counter!("kuma_activations_total", "store" => store(), "from" => from);
        let reasons = [Misfit::Schema, Misfit::Damaged, Misfit::Undecodable, Misfit::NotInLog, Misfit::Unreadable];
        CoreMetrics {
            store: name,
            committed: write("committed"),
            repeated: write("repeated"),
            rejected: write("rejected"),
            refused: write("refused"),
            unavailable: write("unavailable"),
            overloaded: write("overloaded"),
            unknown: write("unknown"),
            write_seconds: histogram!("kuma_write_seconds", "store" => store()),
            events: counter!("kuma_events_total", "store" => store()),
            activations_log: activations("log"),
            activations_snapshot: activations("snapshot"),
            activation_seconds: histogram!("kuma_activation_seconds", "store" => store()),
            replayed_commits: counter!("kuma_replayed_commits_total", "store" => store()),
            passivations: counter!("kuma_passivations_total", "store" => store()),
            live_entities: gauge!("kuma_live_entities", "store" => store()),
            failures: counter!("kuma_entity_failures_total", "store" => store()),
            ignored: reasons.map(|reason| {
                let name = reason.as_str();
                (reason, counter!("kuma_snapshots_ignored_total", "store" => store(), "reason" => name))
            }),
            snapshots_ignored: Tally::new(Counter::noop()),
            snapshots_skipped: Tally::new(counter!("kuma_snapshots_skipped_total", "store" => store())),
            erasures_completed: counter!("kuma_erasures_total", "store" => store(), "result" => "completed"),
            erasures_interrupted: counter!("kuma_erasures_total", "store" => store(), "result" => "interrupted"),
            erasures_unfinished: gauge!("kuma_erasures_unfinished", "store" => store()),
            erase_seconds: histogram!("kuma_erase_seconds", "store" => store()),
            scrub: ScrubMetrics {
                commits: Tally::new(counter!("kuma_scrub_commits_total", "store" => store())),
                bytes: Tally::new(counter!("kuma_scrub_bytes_total", "store" => store())),
                bad_rows: Tally::new(counter!("kuma_scrub_bad_rows_total", "store" => store())),
                passes: Tally::new(counter!("kuma_scrub_passes_total", "store" => store())),
            },
        }
    }

    pub(crate) fn write_ended(&self, outcome: &Result<Written, AppendError>, after: Duration) {
        let counter = match outcome {
            Ok(Written::Committed(_)) => &self.committed,
            Ok(Written::Repeated(..)) => &self.repeated,
            Ok(Written::Rejected) => &self.rejected,
            Err(AppendError::Refused(_)) => &self.refused,
            Err(AppendError::Unavailable(_)) => &self.unavailable,
            Err(AppendError::Unknown { .. }) => &self.unknown,
        };
        counter.increment(1);
        self.write_seconds.record(after);
    }

    pub(crate) fn activated(&self, from_snapshot: bool, commits: u64, after: Duration) {
        if from_snapshot { &self.activations_snapshot } else { &self.activations_log }.increment(1);
        self.activation_seconds.record(after);
        self.replayed_commits.increment(commits);
    }

    /// Events were applied to a read model.
    pub(crate) fn projected(&self, projection: &str, events: u64) {
        let labels = || [("store", self.store.clone()), ("projection", projection.to_owned())];
        counter!("kuma_projected_events_total", &labels()).increment(events);
    }

    /// How late a projection is, and whether it stands still at an event.
    pub(crate) fn projection_lag(&self, projection: &str, lag: Duration, failed: bool) {
        let labels = || [("store", self.store.clone()), ("projection", projection.to_owned())];
        gauge!("kuma_projection_lag_seconds", &labels()).set(lag.as_secs_f64());
        gauge!("kuma_projection_failed", &labels()).set(f64::from(u8::from(failed)));
    }

    pub(crate) fn snapshot_ignored(&self, why: Misfit) {
        self.snapshots_ignored.add(1);
        if let Some((_, counter)) = self.ignored.iter().find(|(reason, _)| *reason == why) {
            counter.increment(1);
        }
    }
}

fn describe() {
    describe_counter!("kuma_writes_total", "Appends and commands by how they ended");
    describe_histogram!("kuma_write_seconds", Unit::Seconds, "From admission to the answer, the disk included");
    describe_counter!("kuma_events_total", "Events that became durable");
    describe_counter!("kuma_activations_total", "Entities brought into memory, by what they were rebuilt from");
    describe_histogram!("kuma_activation_seconds", Unit::Seconds, "Key, snapshot and replay of one entity");
    describe_counter!("kuma_replayed_commits_total", "Commits replayed to bring entities into memory");
    describe_counter!("kuma_passivations_total", "Entities that left memory");
    describe_gauge!("kuma_live_entities", "Entities in memory");
    describe_counter!("kuma_entity_failures_total", "Failures that count towards a quarantine");
    describe_counter!("kuma_snapshots_ignored_total", "Snapshots that did not fit; the entity was replayed");
    describe_counter!("kuma_snapshots_skipped_total", "Snapshots that were due and not made");
    describe_counter!("kuma_erasures_total", "Erasures that were completed, or interrupted and go on by themselves");
    describe_gauge!("kuma_erasures_unfinished", "Erasures that have begun and are not complete");
    describe_histogram!("kuma_erase_seconds", Unit::Seconds, "From the tombstone to the receipt");
    describe_counter!("kuma_projected_events_total", "Events applied to read models");
    describe_gauge!(
        "kuma_projection_lag_seconds",
        Unit::Seconds,
        "Age of the oldest event that a projection has not applied"
    );
    describe_gauge!("kuma_projection_failed", "Whether a projection stands still at an event");
    describe_counter!("kuma_scrub_commits_total", "Commits read and verified in the background");
    describe_counter!("kuma_scrub_bytes_total", Unit::Bytes, "Bytes of commits read and verified in the background");
    describe_counter!("kuma_scrub_bad_rows_total", "Damaged rows that the scrub found");
    describe_counter!("kuma_scrub_passes_total", "Times the scrub has been through all shards");
}
