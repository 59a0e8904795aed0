//! The metrics of a database file.
//!
//! | name | kind | what |
//! |---|---|---|
//! | `kuma_commit_groups_total` | counter | groups that were committed, or failed to be |
//! | `kuma_commit_entries_total` | counter | what was handed in with them: commits, barriers, snapshots, keys |
//! | `kuma_commit_failures_total` | counter | groups that ended in an error of SQLite or the disk; some turn out to be written |
//! | `kuma_commit_seconds` | histogram | a group without an error, from BEGIN until COMMIT has returned, sync included |
//! | `kuma_checkpoints_total` | counter | finished checkpoints |
//! | `kuma_checkpoint_seconds` | histogram | a checkpoint, from the first page copied beside the writer to the last one copied by it |
//! | `kuma_wal_pages` | gauge | pages in the write-ahead log when it was last looked at |
//! | `kuma_watermark_failures_total` | counter | watermarks that could not be written |
//! | `kuma_file_closed` | gauge | 1 while the file is closed after a failure, 0 otherwise |
//! | `kuma_snapshots_written_total` | counter | snapshots that became durable; shards only |
//!
//! Each has the label `file`, the name of the database file. Two stores in one process that have files of the same name share them.
//!
//! Invariant: handles are made when a file is opened, so that counting is an atomic addition and no lookup. A collector that is
//! installed later sees only files that are opened later.

use std::sync::Arc;

use metrics::{
    Counter, Gauge, Histogram, Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram,
};

const GROUPS: &str = "kuma_commit_groups_total";
const ENTRIES: &str = "kuma_commit_entries_total";
const FAILURES: &str = "kuma_commit_failures_total";
const COMMIT_SECONDS: &str = "kuma_commit_seconds";
const CHECKPOINTS: &str = "kuma_checkpoints_total";
const CHECKPOINT_SECONDS: &str = "kuma_checkpoint_seconds";
const WAL_PAGES: &str = "kuma_wal_pages";
const WATERMARK_FAILURES: &str = "kuma_watermark_failures_total";
const CLOSED: &str = "kuma_file_closed";
const SNAPSHOTS: &str = "kuma_snapshots_written_total";

/// What is counted for every file.
pub(crate) struct FileMetrics {
    pub(crate) groups: Counter,
    pub(crate) entries: Counter,
    pub(crate) failures: Counter,
    pub(crate) commit_seconds: Histogram,
    pub(crate) checkpoints: Counter,
    pub(crate) checkpoint_seconds: Histogram,
    pub(crate) wal_pages: Gauge,
    pub(crate) watermark_failures: Counter,
    pub(crate) closed: Gauge,
}

impl FileMetrics {
    /// Of a file that is open.
    pub(crate) fn new(file: &Arc<str>) -> Self {
        describe();
        let label = || file.clone();
        let metrics = FileMetrics {
            groups: counter!(GROUPS, "file" => label()),
            entries: counter!(ENTRIES, "file" => label()),
            failures: counter!(FAILURES, "file" => label()),
            commit_seconds: histogram!(COMMIT_SECONDS, "file" => label()),
            checkpoints: counter!(CHECKPOINTS, "file" => label()),
            checkpoint_seconds: histogram!(CHECKPOINT_SECONDS, "file" => label()),
            wal_pages: gauge!(WAL_PAGES, "file" => label()),
            watermark_failures: counter!(WATERMARK_FAILURES, "file" => label()),
            closed: gauge!(CLOSED, "file" => label()),
        };
        // It may have been closed in an earlier life of the process's store.
        metrics.closed.set(0.0);
        metrics
    }
}

/// The counter of a shard's durable snapshots.
pub(crate) fn snapshots_written(file: &Arc<str>) -> Counter {
    counter!(SNAPSHOTS, "file" => file.clone())
}

/// At each opening and not once in the process: it is cheap, and a collector may be installed between two openings.
fn describe() {
    describe_counter!(GROUPS, "Groups that were committed, or failed to be");
    describe_counter!(ENTRIES, "Entries of all groups");
    describe_counter!(FAILURES, "Groups that ended in an error of SQLite or the disk");
    describe_histogram!(COMMIT_SECONDS, Unit::Seconds, "One group, from BEGIN until COMMIT has returned");
    describe_counter!(CHECKPOINTS, "Finished checkpoints");
    describe_histogram!(CHECKPOINT_SECONDS, Unit::Seconds, "One checkpoint, from its first page to its last");
    describe_gauge!(WAL_PAGES, "Pages in the write-ahead log when it was last looked at");
    describe_counter!(WATERMARK_FAILURES, "Watermarks that could not be written");
    describe_gauge!(CLOSED, "1 while the file is closed after a failure");
    describe_counter!(SNAPSHOTS, "Snapshots that became durable");
}

#[cfg(test)]
mod tests {
    use std::{
        collections::{BTreeMap, BTreeSet},
        sync::atomic::{AtomicU64, Ordering::Relaxed},
    };

    use metrics::{HistogramFn, Key, KeyName, Metadata, Recorder, SharedString};
    use parking_lot::Mutex;

    use super::*;
    use crate::{
        Activation, Commit, SnapshotRow,
        test_shard::{TestShard, commit},
    };

    /// Of a histogram only the number of values, of a gauge the bits.
    #[derive(Default)]
    struct Collector {
        values: Mutex<BTreeMap<String, Arc<AtomicU64>>>,
        described: Mutex<BTreeSet<String>>,
    }

    struct Count(Arc<AtomicU64>);

    impl HistogramFn for Count {
        fn record(&self, _: f64) {
            self.0.fetch_add(1, Relaxed);
        }
    }

    impl Collector {
        fn register(&self, key: &Key) -> Arc<AtomicU64> {
            let labels: Vec<_> = key.labels().map(|label| (label.key(), label.value())).collect();
            assert_eq!(labels, [("file", "shard-000.db")]);
            self.values.lock().entry(key.name().to_owned()).or_default().clone()
        }

        fn values(&self) -> BTreeMap<String, u64> {
            self.values.lock().iter().map(|(name, value)| (name.clone(), value.load(Relaxed))).collect()
        }

        fn describe(&self, name: KeyName) {
            self.described.lock().insert(name.as_str().to_owned());
        }
    }

    impl Recorder for Collector {
        fn describe_counter(&self, name: KeyName, _: Option<Unit>, _: SharedString) {
            self.describe(name);
        }

        fn describe_gauge(&self, name: KeyName, _: Option<Unit>, _: SharedString) {
            self.describe(name);
        }

        fn describe_histogram(&self, name: KeyName, _: Option<Unit>, _: SharedString) {
            self.describe(name);
        }

        fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
            Counter::from_arc(self.register(key))
        }

        fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
            Gauge::from_arc(self.register(key))
        }

        fn register_histogram(&self, key: &Key, _: &Metadata<'_>) -> Histogram {
            Histogram::from_arc(Arc::new(Count(self.register(key))))
        }
    }

    async fn observed() -> (TestShard, Collector) {
        let collector = Collector::default();
        let shard = {
            let _installed = metrics::set_default_local_recorder(&collector);
            TestShard::new().await
        };
        (shard, collector)
    }

    #[tokio::test]
    async fn a_file_tells_how_its_writer_fares() {
        let (shard, collector) = observed().await;
        let entity = shard.entity(1, 0);
        shard.append(&entity, 1..=5).await;
        for version in [3, 2] {
            let snapshot = SnapshotRow { eid: entity.eid, version, schema: 1, body: vec![1] };
            shard.save(snapshot).await.unwrap().unwrap();
        }
        let expected = [
            (GROUPS, 3),
            (ENTRIES, 7),
            (FAILURES, 0),
            (COMMIT_SECONDS, 3),
            (CHECKPOINTS, 0),
            (CHECKPOINT_SECONDS, 0),
            (WAL_PAGES, 0),
            (WATERMARK_FAILURES, 0),
            (CLOSED, 0),
            (SNAPSHOTS, 1),
        ];
        let expected: BTreeMap<String, u64> = expected.map(|(name, value)| (name.to_owned(), value)).into();
        assert_eq!(collector.values(), expected);
        assert!(collector.described.lock().iter().eq(expected.keys()));
        let stats = shard.stats();
        assert_eq!((stats.groups, stats.entries), (3, 7));
        shard.stop().await;
    }
    /// The log is copied when it has 16 MiB; how much more is written until then is the checkpointer's affair.
    #[tokio::test]
    async fn a_checkpoint_is_counted_and_timed() {
        let (shard, collector) = observed().await;
        let entity = shard.entity(1, 0);
        let activation = Arc::new(Activation::at(0));
        for version in 1..=200 {
            let body = vec![7; 1 << 20];
            shard.submit(&activation, Commit { body, ..commit(&entity, version) }).await.unwrap().unwrap();
            if shard.stats().checkpoints > 0 {
                break;
            }
        }
        let (stats, values) = (shard.stats(), collector.values());
        assert!(stats.checkpoints > 0, "{stats:?}");
        assert_eq!((values[CHECKPOINTS], values[CHECKPOINT_SECONDS]), (stats.checkpoints, stats.checkpoints));
        assert_eq!(f64::from_bits(values[WAL_PAGES]), stats.wal_pages as f64);
        shard.stop().await;
    }
}
