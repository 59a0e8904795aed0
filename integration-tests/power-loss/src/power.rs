//! The handle that a test holds: cut the power, inject errors, read the counters.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::faults::{Errno, Fault};
use crate::machine::Machine;
use crate::vfs;

/// What a sync is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disk {
    /// What was synced survives.
    Honest,
    /// Every sync answers OK and syncs nothing, as a disk does that ignores flushes. The control: a test that loses
    /// nothing on this disk tests nothing.
    LyingSync,
}

/// What happened on a disk.
///
/// Only database, WAL and journal files count; temporary files do not.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counts {
    /// Writes asked for, the failed ones included.
    pub writes: u64,
    /// Syncs asked for, the failed ones included.
    pub syncs: u64,
    /// Truncations asked for, the failed ones included.
    pub truncates: u64,
    /// Operations that failed because of [`PowerLoss::fail_nth`] or [`PowerLoss::fail_from_nth`].
    pub faults_injected: u64,
    /// Bytes written and not synced: now, or when the power was cut. What a failed sync dropped is not counted.
    pub unsynced_bytes: u64,
    /// Unsynced writes of which the cut left nothing.
    pub lost_writes: u64,
    /// Unsynced writes of which the cut left some sectors.
    pub torn_writes: u64,
    /// Syncs that have begun and not ended: now, or when the power was cut. Always 0 unless [`PowerLoss::sync_takes`]
    /// was used.
    pub syncs_in_flight: u64,
    /// The cut fell between a write to a WAL and its sync: inside a commit, if every commit is synced.
    pub cut_between_wal_write_and_sync: bool,
    /// The cut fell between a write to a database file and its sync: inside a checkpoint.
    pub cut_between_database_write_and_sync: bool,
}

/// A disk with a volatile write cache, registered with SQLite as a VFS.
///
/// All clones are the same disk. A test opens its databases with `SqliteConnectOptions::vfs(disk.vfs_name())`, cuts the
/// power, and opens them again on the ordinary VFS, or on a new `PowerLoss` to cut it a second time. After the cut this
/// one is of no use.
#[derive(Clone)]
pub struct PowerLoss {
    machine: Arc<Machine>,
    name: Arc<str>,
}

impl PowerLoss {
    /// Registers a new disk with SQLite, under a name of its own, so that tests can run side by side.
    ///
    /// The registration lasts as long as the process: SQLite keeps pointers to it. It costs a few hundred bytes.
    ///
    /// # Panics
    /// If SQLite refuses the registration: out of memory, or a platform without the `unix` VFS.
    pub fn register(disk: Disk) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name: Arc<str> = format!("power-loss-{}", NEXT.fetch_add(1, Ordering::Relaxed)).into();
        let machine = Arc::new(Machine::new(disk));
        vfs::register(&name, Arc::clone(&machine));
        Self { machine, name }
    }

    /// The name to give to `SqliteConnectOptions::vfs`.
    pub fn vfs_name(&self) -> &str {
        &self.name
    }

    /// The power is lost now. Every later operation on this disk fails with an I/O error; closing still works.
    ///
    /// On return the real files are as the disk holds them: what was synced is intact; of the unsynced writes a random
    /// subset is there, in random order, some of them torn between sectors of 512 bytes; unsynced truncations,
    /// creations and deletions may or may not have happened; `-shm` files are gone. The same `seed` after the same
    /// operations leaves the same files. A second cut does nothing.
    ///
    /// # Panics
    /// If the real disk cannot hold the result.
    pub fn cut(&self, seed: u64) {
        self.machine.cut(seed);
    }

    /// The power will be lost just before the `operations`-th write, sync or truncation from now (1-based), whoever
    /// asks for it.
    ///
    /// That operation does not take place, and its caller is the first to see an error. 0 is taken as 1. Replaces an
    /// earlier one.
    pub fn cut_after(&self, operations: u64, seed: u64) {
        self.machine.doom(operations.saturating_sub(1), seed);
    }

    /// True once the power is lost.
    pub fn is_cut(&self) -> bool {
        self.machine.is_dead()
    }

    /// The `n`-th matching operation from now (1-based) fails once.
    ///
    /// A failed write is not applied, or only a prefix of it is; a failed truncation is not applied. A failed sync
    /// drops what was unsynced in the file, as Linux does: it stays visible, and no later sync makes it durable unless
    /// it is written again.
    pub fn fail_nth(&self, what: Fault, n: u64, error: Errno) {
        self.machine.lock().faults.add(what, n, error, false);
    }

    /// The `n`-th matching operation from now (1-based) fails, and all after it, until [`PowerLoss::heal`].
    pub fn fail_from_nth(&self, what: Fault, n: u64, error: Errno) {
        self.machine.lock().faults.add(what, n, error, true);
    }

    /// No more injected errors, and none to come. What they have done to the files stays done.
    pub fn heal(&self) {
        self.machine.lock().faults.clear();
    }

    /// Injects errors only into the files that `admits` admits; others are not counted either. Replaces an earlier
    /// filter.
    ///
    /// It sees absolute paths, such as `/data/shard-0.db-wal`. It must not use this `PowerLoss`.
    pub fn only_files_matching(&self, admits: impl Fn(&Path) -> bool + Send + Sync + 'static) {
        self.machine.lock().faults.set_filter(Box::new(admits));
    }

    /// Every sync takes this long from now on; before, it takes no time.
    ///
    /// While it waits, other files and connections go on, and the power can be cut.
    pub fn sync_takes(&self, time: Duration) {
        self.machine.lock().sync_time = time;
    }

    /// What happened so far.
    pub fn counts(&self) -> Counts {
        self.machine.counts()
    }
}

impl fmt::Debug for PowerLoss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PowerLoss").field("name", &self.name).field("is_cut", &self.is_cut()).finish_non_exhaustive()
    }
}
