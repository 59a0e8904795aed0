//! What a file's writer counts: once, for [`StatsView`] and for whoever collects metrics.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use crate::metrics::FileMetrics;

/// What the writer counts, since the file was opened.
pub(crate) struct WriterStats {
    groups: AtomicU64,
    entries: AtomicU64,
    failures: AtomicU64,
    checkpoints: AtomicU64,
    wal_pages: AtomicU64,
    watermark_failures: AtomicU64,
    closed: AtomicBool,
    suspect: AtomicBool,
    metrics: FileMetrics,
}

/// What a writer counted, since its file was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatsView {
    /// Group commits.
    pub groups: u64,
    /// What was submitted to them.
    pub entries: u64,
    /// Groups that failed.
    pub failures: u64,
    /// Finished checkpoints.
    pub checkpoints: u64,
    /// Pages in the write-ahead log when it was last looked at.
    pub wal_pages: u64,
    /// Watermarks that could not be written.
    pub watermark_failures: u64,
    /// Whether the file is closed after a failure; it is tried again by itself.
    pub closed: bool,
}

impl WriterStats {
    /// Of an open file with this name.
    pub(crate) fn new(file: &Arc<str>) -> Self {
        WriterStats {
            groups: AtomicU64::new(0),
            entries: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            checkpoints: AtomicU64::new(0),
            wal_pages: AtomicU64::new(0),
            watermark_failures: AtomicU64::new(0),
            closed: AtomicBool::new(false),
            suspect: AtomicBool::new(false),
            metrics: FileMetrics::new(file),
        }
    }

    /// A group ended, well or not.
    pub(crate) fn group_ended(&self, entries: u64) {
        self.groups.fetch_add(1, Relaxed);
        self.entries.fetch_add(entries, Relaxed);
        self.metrics.groups.increment(1);
        self.metrics.entries.increment(entries);
    }

    /// `COMMIT` of a group returned.
    pub(crate) fn group_committed(&self, took: Duration) {
        self.metrics.commit_seconds.record(took);
    }

    pub(crate) fn group_failed(&self) {
        self.failures.fetch_add(1, Relaxed);
        self.metrics.failures.increment(1);
    }

    pub(crate) fn checkpoint_finished(&self, took: Duration) {
        self.checkpoints.fetch_add(1, Relaxed);
        self.metrics.checkpoints.increment(1);
        self.metrics.checkpoint_seconds.record(took);
    }

    pub(crate) fn set_wal_pages(&self, pages: u64) {
        self.wal_pages.store(pages, Relaxed);
        self.metrics.wal_pages.set(pages as f64);
    }

    pub(crate) fn watermark_failed(&self) {
        self.watermark_failures.fetch_add(1, Relaxed);
        self.metrics.watermark_failures.increment(1);
    }

    pub(crate) fn set_closed(&self, closed: bool) {
        self.closed.store(closed, Relaxed);
        self.metrics.closed.set(f64::from(u8::from(closed)));
    }

    /// Whether it is not known what is on the disk: a sync failed and the log was not yet copied. Nothing may be read then.
    pub(crate) fn is_suspect(&self) -> bool {
        self.suspect.load(Relaxed)
    }

    pub(crate) fn set_suspect(&self, suspect: bool) {
        self.suspect.store(suspect, Relaxed);
    }

    pub(crate) fn view(&self) -> StatsView {
        StatsView {
            groups: self.groups.load(Relaxed),
            entries: self.entries.load(Relaxed),
            failures: self.failures.load(Relaxed),
            checkpoints: self.checkpoints.load(Relaxed),
            wal_pages: self.wal_pages.load(Relaxed),
            watermark_failures: self.watermark_failures.load(Relaxed),
            closed: self.closed.load(Relaxed),
        }
    }
}
