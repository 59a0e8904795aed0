//! The machine that loses power: every file operation of one VFS passes here, one at a time.
//!
//! ```text
//!  write ----> real file (what all connections read)
//!    |
//!    +-------> FileDisk.unsynced --sync--> FileDisk.durable
//!                      |                        |
//!                      +--- cut: some of it ----+--> a new file under the old name
//! ```
//!
//! Invariants:
//! - The lock is held from the decision to its effect, so that a cut falls between operations, never into one. A slow
//!   sync is the exception: it lets go of the lock while it waits, and a cut may fall into it.
//! - Once `dead` is true no operation changes anything, and none of these files is touched by this VFS again.
//! - A cut leaves *new* files under the old names. Connections that are still open keep the old, unlinked ones, with
//!   their POSIX locks and their shared memory; SQLite finds both by inode, so that a connection opened later starts
//!   with neither.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use libsqlite3_sys::{
    SQLITE_IOERR, SQLITE_IOERR_DELETE, SQLITE_IOERR_FSTAT, SQLITE_IOERR_FSYNC, SQLITE_IOERR_TRUNCATE,
    SQLITE_IOERR_WRITE,
};

use crate::directory::{Directory, Fate, Identity, Inode};
use crate::disk::{FileDisk, SECTOR_BYTES};
use crate::faults::{Faults, Injected, Operation};
use crate::power::{Counts, Disk};
use crate::rng::Rng;

/// A SQLite result code other than `SQLITE_OK`.
pub(crate) type Code = i32;

/// The file of the wrapped VFS.
pub(crate) trait RealFile {
    /// Fills `buffer` from `offset`; the file is long enough.
    fn read(&mut self, buffer: &mut [u8], offset: u64) -> Result<(), Code>;
    fn write(&mut self, bytes: &[u8], offset: u64) -> Result<(), Code>;
    fn truncate(&mut self, len: u64) -> Result<(), Code>;
    fn len(&mut self) -> Result<u64, Code>;
}

/// A file that the machine keeps account of, as one handle sees it.
#[derive(Debug)]
pub(crate) struct Tracked {
    inode: Inode,
    path: PathBuf,
    /// The unix VFS syncs the directory with the first sync of a handle that may have created a WAL or a journal.
    syncs_directory: bool,
}

/// The machine, shared by all connections of one VFS.
#[derive(Debug)]
pub(crate) struct Machine {
    dead: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug)]
pub(crate) struct State {
    disk: Disk,
    directory: Directory,
    pub(crate) faults: Faults,
    pub(crate) sync_time: Duration,
    doom: Option<Doom>,
    counts: Counts,
}

/// A cut to come.
#[derive(Debug)]
struct Doom {
    passes: u64,
    seed: u64,
}

/// May an operation take place?
enum Verdict {
    Go,
    Dead,
    Fail(Injected),
}

impl Machine {
    pub(crate) fn new(disk: Disk) -> Self {
        let state = State {
            disk,
            directory: Directory::default(),
            faults: Faults::default(),
            sync_time: Duration::ZERO,
            doom: None,
            counts: Counts::default(),
        };
        Self { dead: AtomicBool::new(false), state: Mutex::new(state) }
    }

    pub(crate) fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Acquire)
    }

    /// The state. A panic elsewhere (a failed assertion of a test) does not make it unusable.
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state, unless the power is lost. It cannot be lost while this is held.
    pub(crate) fn lock_alive(&self) -> Option<MutexGuard<'_, State>> {
        let state = self.lock();
        if self.is_dead() { None } else { Some(state) }
    }

    pub(crate) fn cut(&self, seed: u64) {
        self.cut_locked(&mut self.lock(), seed);
    }

    /// The power goes before the operation after `passes` more.
    pub(crate) fn doom(&self, passes: u64, seed: u64) {
        self.lock().doom = Some(Doom { passes, seed });
    }

    pub(crate) fn counts(&self) -> Counts {
        let state = self.lock();
        let mut counts = state.counts.clone();
        counts.faults_injected = state.faults.injected();
        if !self.is_dead() {
            counts.unsynced_bytes = state.unsynced_bytes();
        }
        counts
    }

    /// Opens a file that can be lost, with `open`; its content is durable if it was there before and nobody had it
    /// open.
    pub(crate) fn open<R: RealFile>(
        &self,
        path: &Path,
        syncs_directory: bool,
        open: impl FnOnce() -> Result<R, Code>,
    ) -> Result<(R, Tracked), Code> {
        let mut state = self.lock_alive().ok_or(SQLITE_IOERR)?;
        let before = identity(path);
        let mut real = open()?;
        let now = identity(path).ok_or(SQLITE_IOERR_FSTAT)?;
        let known = state.directory.current(path);
        let is_the_known =
            known.and_then(|inode| state.directory.file(inode)).is_some_and(|file| file.identity.is(now));
        let inode = match (known, before) {
            (Some(inode), _) if is_the_known => inode,
            (_, None) => state.directory.create(path, now),
            (_, Some(_)) => {
                let mut content = vec![0; real.len()? as usize];
                real.read(&mut content, 0)?;
                state.directory.adopt(path, content, now)
            }
        };
        state.directory.opened(inode);
        Ok((real, Tracked { inode, path: path.to_owned(), syncs_directory }))
    }

    pub(crate) fn close(&self, tracked: &Tracked) {
        self.lock().directory.closed(tracked.inode);
    }

    pub(crate) fn write(
        &self,
        tracked: &Tracked,
        real: &mut impl RealFile,
        bytes: &[u8],
        offset: u64,
    ) -> Result<(), Code> {
        let mut state = self.lock();
        state.counts.writes += 1;
        match self.verdict(&mut state, Operation::Write, &tracked.path) {
            Verdict::Go => state.write(tracked, real, bytes, offset),
            Verdict::Dead => Err(SQLITE_IOERR_WRITE),
            Verdict::Fail(injected) => {
                let prefix = bytes.len() / 2 / SECTOR_BYTES as usize * SECTOR_BYTES as usize;
                if injected.leaves_prefix && prefix > 0 {
                    state.write(tracked, real, &bytes[..prefix], offset)?;
                }
                Err(injected.code)
            }
        }
    }

    pub(crate) fn truncate(&self, tracked: &Tracked, real: &mut impl RealFile, len: u64) -> Result<(), Code> {
        let mut state = self.lock();
        state.counts.truncates += 1;
        match self.verdict(&mut state, Operation::Truncate, &tracked.path) {
            Verdict::Go => {
                real.truncate(len)?;
                if let Some(file) = state.directory.file(tracked.inode) {
                    file.disk.truncated(len);
                }
                Ok(())
            }
            Verdict::Dead => Err(SQLITE_IOERR_TRUNCATE),
            Verdict::Fail(injected) => Err(injected.code),
        }
    }

    /// Makes the file's changes durable, in this model only: the real file needs no sync, as the real machine keeps its
    /// power.
    pub(crate) fn sync(&self, tracked: &mut Tracked) -> Result<(), Code> {
        let mut state = self.lock();
        state.counts.syncs += 1;
        match self.verdict(&mut state, Operation::Sync, &tracked.path) {
            Verdict::Go => {}
            Verdict::Dead => return Err(SQLITE_IOERR_FSYNC),
            Verdict::Fail(injected) => {
                if let Some(file) = state.directory.file(tracked.inode) {
                    file.disk.sync_failed();
                }
                return Err(injected.code);
            }
        }
        let Some(ticket) = state.directory.file(tracked.inode).map(|file| file.disk.sync_begins()) else {
            return Err(SQLITE_IOERR_FSYNC);
        };
        if !state.sync_time.is_zero() {
            let sync_time = state.sync_time;
            state.counts.syncs_in_flight += 1;
            drop(state);
            thread::sleep(sync_time);
            // After a cut, the count of those in flight stays as the cut found it.
            state = self.lock_alive().ok_or(SQLITE_IOERR_FSYNC)?;
            state.counts.syncs_in_flight -= 1;
        }
        if state.disk == Disk::LyingSync {
            return Ok(());
        }
        if !state.directory.file(tracked.inode).is_some_and(|file| file.disk.sync_ends(ticket)) {
            return Err(SQLITE_IOERR_FSYNC);
        }
        if std::mem::take(&mut tracked.syncs_directory) {
            state.sync_directory_of(&tracked.path);
        }
        Ok(())
    }

    /// Deletes a file with `delete`; it may come back unless the directory is synced too.
    pub(crate) fn delete(
        &self,
        path: &Path,
        sync_directory: bool,
        delete: impl FnOnce() -> Result<(), Code>,
    ) -> Result<(), Code> {
        let mut state = self.lock_alive().ok_or(SQLITE_IOERR_DELETE)?;
        if state.directory.current(path).is_none() {
            // Nobody has it open, and what could come back must be known. A WAL or a journal carries no POSIX locks,
            // hence opening and closing it here drops none; SQLite deletes no other files.
            if let (Some(identity), Ok(content)) = (identity(path), fs::read(path)) {
                state.directory.adopt(path, content, identity);
            }
        }
        delete()?;
        state.directory.delete(path);
        if sync_directory && state.disk == Disk::Honest {
            state.sync_directory_of(path);
        }
        Ok(())
    }

    fn verdict(&self, state: &mut State, operation: Operation, path: &Path) -> Verdict {
        if self.is_dead() {
            return Verdict::Dead;
        }
        match &mut state.doom {
            Some(Doom { passes: 0, seed }) => {
                let seed = *seed;
                self.cut_locked(state, seed);
                return Verdict::Dead;
            }
            Some(doom) => doom.passes -= 1,
            None => {}
        }
        state.faults.strike(operation, path).map_or(Verdict::Go, Verdict::Fail)
    }

    fn cut_locked(&self, state: &mut State, seed: u64) {
        if self.dead.swap(true, Ordering::AcqRel) {
            return;
        }
        state.counts.unsynced_bytes = state.unsynced_bytes();
        for (path, _) in state.directory.files().filter(|(_, disk)| disk.is_unsynced()) {
            if has_suffix(path, "-wal") {
                state.counts.cut_between_wal_write_and_sync = true;
            } else if !has_suffix(path, "-journal") {
                state.counts.cut_between_database_write_and_sync = true;
            }
        }
        let mut rng = Rng::new(seed);
        for fate in state.directory.cut(&mut rng) {
            let path = fate.path.clone();
            if let Err(error) = state.leave(fate, &mut rng) {
                broken(&path, &error);
            }
        }
    }
}

impl State {
    fn unsynced_bytes(&self) -> u64 {
        self.directory.files().map(|(_, disk)| disk.unsynced_bytes()).sum()
    }

    fn write(&mut self, tracked: &Tracked, real: &mut impl RealFile, bytes: &[u8], offset: u64) -> Result<(), Code> {
        real.write(bytes, offset)?;
        let Some(file) = self.directory.file(tracked.inode) else { return Err(SQLITE_IOERR_WRITE) };
        let span = FileDisk::span(offset, bytes.len() as u64);
        let len = file.disk.len().max(offset + bytes.len() as u64);
        let mut sectors = vec![0; (span.end - span.start) as usize];
        if span == (offset..offset + bytes.len() as u64) {
            sectors.copy_from_slice(bytes);
        } else {
            real.read(&mut sectors[..(span.end.min(len) - span.start) as usize], span.start)?;
        }
        file.disk.wrote(offset, bytes.len() as u64, sectors);
        Ok(())
    }

    fn sync_directory_of(&mut self, path: &Path) {
        if let Some(directory) = path.parent() {
            self.directory.sync(directory);
        }
    }

    /// Puts under a name what the cut left of it. What others did to the name behind this VFS stands.
    fn leave(&mut self, fate: Fate, rng: &mut Rng) -> io::Result<()> {
        let Fate { path, seen, left } = fate;
        let now = identity(&path);
        let unchanged = match (now, seen) {
            (Some(now), Some(seen)) => now.is(seen),
            (now, seen) => now.is_none() && seen.is_none(),
        };
        if !unchanged || path.parent().is_none_or(|directory| !directory.exists()) {
            return Ok(());
        }
        match left {
            Some((disk, identity)) => {
                let remains = disk.cut(rng);
                self.counts.lost_writes += remains.lost_writes;
                self.counts.torn_writes += remains.torn_writes;
                let new = with_suffix(&path, ".power-loss");
                fs::write(&new, &remains.bytes)?;
                fs::set_permissions(&new, fs::Permissions::from_mode(identity.mode))?;
                fs::rename(&new, &path)?;
            }
            None if now.is_some() => fs::remove_file(&path)?,
            None => {}
        }
        match fs::remove_file(with_suffix(&path, "-shm")) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

impl Identity {
    fn is(self, other: Self) -> bool {
        (self.device, self.number) == (other.device, other.number)
    }
}

fn identity(path: &Path) -> Option<Identity> {
    let metadata = fs::metadata(path).ok()?;
    Some(Identity { device: metadata.dev(), number: metadata.ino(), mode: metadata.mode() })
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn has_suffix(path: &Path, suffix: &str) -> bool {
    path.as_os_str().as_encoded_bytes().ends_with(suffix.as_bytes())
}

/// The real disk refused the image of the simulated one. A test that went on would judge the wrong bytes.
#[expect(clippy::panic, reason = "no caller can do anything about it, and inside a call of SQLite the process ends")]
fn broken(path: &Path, error: &io::Error) -> ! {
    panic!("the power-loss disk cannot leave {} as it should be: {error}", path.display())
}
