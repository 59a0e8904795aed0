//! The data directory: its lock, its identity, and which files it must hold.
//!
//! Invariants:
//! - One process at a time. The lock is the operating system's, so that it ends with the process, however that ends.
//! - `store.json` says "creating" until every file is there and synced, and "ready" from then on. A directory that is still being
//!   created holds nothing that anyone was promised, and is made anew; one that is ready never loses a file silently.
//! - It says "restoring" while a backup is put into it: nobody but a restore opens such a directory, and that begins anew.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{DiskId, OpenError, keys, open::directory_error, shard};

/// The newest format of a data directory known here.
pub const STORE_FORMAT: u32 = 1;
const STORE_FILE: &str = "store.json";
const LOCK_FILE: &str = "kuma.lock";

/// Why a data directory cannot be used. Nothing in it was changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataDirError {
    /// Another process uses it.
    #[error("{path} is in use by {holder}, or choose another data directory")]
    InUse {
        /// The directory.
        path: PathBuf,
        /// By whom, as far as that is known, and what to do.
        holder: String,
    },
    /// It belongs to a store with another name.
    #[error(
        "{path} holds the store \"{found}\", not \"{expected}\"; choose its data directory, or open it under its own name"
    )]
    OtherContext {
        /// The directory.
        path: PathBuf,
        /// The name kept with the data.
        found: String,
        /// The name asked for.
        expected: String,
    },
    /// The number of shards is fixed at creation.
    #[error(
        "{path} was created with {found} shards, not {expected}; leave the option out, or move the data to a new store"
    )]
    OtherShards {
        /// The directory.
        path: PathBuf,
        /// As created.
        found: u16,
        /// As asked for.
        expected: u16,
    },
    /// A newer Kuma made it.
    #[error(
        "{path} has format {found}, this version of Kuma reads up to {supported}; use the newer version, nothing was changed"
    )]
    Newer {
        /// The directory.
        path: PathBuf,
        /// Its format.
        found: u32,
        /// The newest format known here.
        supported: u32,
    },
    /// `store.json` cannot be read, or is missing while there is data.
    #[error("{path} is {state}, and Kuma does not guess whose data that is; put the file back from a backup")]
    NoIdentity {
        /// `store.json`.
        path: PathBuf,
        /// What is wrong with it.
        state: String,
    },
    /// Something else has its name.
    #[error("{path} is not a directory; choose another path, or move what is there away")]
    NotADirectory {
        /// The path.
        path: PathBuf,
    },
    /// A restore into it was interrupted.
    #[error(
        "{path} holds a restore that did not come to its end, which may lack events and hold what was erased; run the restore again, it begins anew"
    )]
    Restoring {
        /// The directory.
        path: PathBuf,
    },
    /// A restore needs a directory of its own.
    #[error("{path} is not empty ({found}), and a restore replaces nothing; choose a new directory")]
    NotEmpty {
        /// The directory.
        path: PathBuf,
        /// What is in it.
        found: String,
    },
    /// There are no random bytes for an identity.
    #[error("the operating system gives no random bytes for the identity of a new store")]
    NoRandomness,
    /// The directory itself.
    #[error(transparent)]
    Open(#[from] OpenError),
}

/// What a directory says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct StoreFile {
    format: u32,
    state: StoreState,
    context: String,
    shards: u16,
    disk_id: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum StoreState {
    Creating,
    Ready,
    Restoring,
}

/// A locked data directory.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    store: StoreFile,
    disk_id: DiskId,
    /// Held for as long as the directory is in use.
    lock: Lock,
}

/// The lock of a data directory.
///
/// Given back by name, not only by closing the file: a child process that is being started at this moment, by whatever part of the
/// service, has a copy of the descriptor until it runs its own program, and would keep the lock until then.
#[derive(Debug)]
struct Lock(File);

impl Drop for Lock {
    fn drop(&mut self) {
        // Closing follows in any case.
        let _ = self.0.unlock();
    }
}

impl DataDir {
    /// Locks `path` and reads its identity, or gives it one if it is new (or was never finished). `shards` is checked against an
    /// existing store; where it is `None`, an existing store keeps its own and a new one gets `shards_default`.
    ///
    /// # Errors
    /// See [`DataDirError`]. An existing store is left untouched.
    pub fn open(path: &Path, context: &str, shards: Option<u16>, shards_default: u16) -> Result<Self, DataDirError> {
        let fail = |error| directory_error(path, error);
        let is_new = !path.try_exists().map_err(fail)?;
        if is_new {
            create_directory(path).map_err(fail)?;
        } else if !path.is_dir() {
            return Err(DataDirError::NotADirectory { path: path.to_owned() });
        }
        let lock = lock(path)?;
        let store_path = path.join(STORE_FILE);
        let found = match fs::read(&store_path) {
            Ok(bytes) => Some(parse(&store_path, path, &bytes)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(directory_error(&store_path, error).into()),
        };
        match &found {
            // Nobody was promised anything yet: it belongs to whoever finishes it.
            Some((store, _)) if store.state == StoreState::Creating => {}
            Some((store, _)) if store.state == StoreState::Restoring => {
                return Err(DataDirError::Restoring { path: path.to_owned() });
            }
            Some((store, disk_id)) => {
                if store.context != context {
                    let (found, expected) = (store.context.clone(), context.to_owned());
                    return Err(DataDirError::OtherContext { path: path.to_owned(), found, expected });
                }
                if let Some(expected) = shards.filter(|shards| *shards != store.shards) {
                    return Err(DataDirError::OtherShards { path: path.to_owned(), found: store.shards, expected });
                }
                return Ok(DataDir { path: path.to_owned(), store: store.clone(), disk_id: *disk_id, lock });
            }
            None if has_data(path) => {
                return Err(DataDirError::NoIdentity {
                    path: store_path,
                    state: "missing although there is data".to_owned(),
                });
            }
            None => {}
        }
        let shards = shards.unwrap_or(shards_default);
        DataDir::begin(path, lock, StoreState::Creating, context, shards)
    }

    /// Locks `path`, makes it if it does not exist, and gives it the identity of a store that is being restored. It must be empty, but for
    /// a master key in `keep` and what a restore that never finished has left.
    ///
    /// # Errors
    /// See [`DataDirError`]. What is there is left untouched.
    pub fn begin_restore(path: &Path, context: &str, shards: u16, keep: &[&str]) -> Result<Self, DataDirError> {
        let fail = |error| directory_error(path, error);
        if !path.try_exists().map_err(fail)? {
            create_directory(path).map_err(fail)?;
        } else if !path.is_dir() {
            return Err(DataDirError::NotADirectory { path: path.to_owned() });
        }
        // Before the lock makes a file.
        let is_restore = match fs::read(path.join(STORE_FILE)) {
            Ok(bytes) => parse(&path.join(STORE_FILE), path, &bytes)?.0.state == StoreState::Restoring,
            Err(_) => false,
        };
        for entry in fs::read_dir(path).map_err(fail)? {
            let name = entry.map_err(fail)?.file_name();
            let name = name.to_string_lossy();
            let allowed = name == LOCK_FILE || name == "lost+found" || keep.contains(&&*name);
            let left = is_restore && (is_ours(&name) || name.starts_with(STORE_FILE));
            if !allowed && !left {
                return Err(DataDirError::NotEmpty { path: path.to_owned(), found: name.into_owned() });
            }
        }
        let lock = lock(path)?;
        DataDir::begin(path, lock, StoreState::Restoring, context, shards)
    }

    /// Opens a directory that [`DataDir::begin_restore`] began, whose files are all there, once more before [`DataDir::finish`].
    ///
    /// # Errors
    /// See [`DataDirError`].
    pub fn open_restored(path: &Path) -> Result<Self, DataDirError> {
        let lock = lock(path)?;
        let store_path = path.join(STORE_FILE);
        let bytes = fs::read(&store_path).map_err(|error| directory_error(&store_path, error))?;
        let (store, disk_id) = parse(&store_path, path, &bytes)?;
        if store.state != StoreState::Restoring {
            return Err(DataDirError::NotEmpty { path: path.to_owned(), found: STORE_FILE.to_owned() });
        }
        Ok(DataDir { path: path.to_owned(), store, disk_id, lock })
    }

    /// Takes away what was made for a store that is not finished, its identity last.
    ///
    /// # Errors
    /// A file could not be removed.
    pub fn abandon(self) -> Result<(), DataDirError> {
        let fail = |error| directory_error(&self.path, error);
        if self.store.state == StoreState::Ready {
            return Ok(());
        }
        remove_unfinished(&self.path).map_err(fail)?;
        fs::remove_file(self.path.join(STORE_FILE)).map_err(fail)?;
        fs::remove_file(self.path.join(LOCK_FILE)).map_err(fail)?;
        Ok(())
    }

    /// A new identity, of a store whose files are still to be made.
    fn begin(path: &Path, lock: Lock, state: StoreState, context: &str, shards: u16) -> Result<Self, DataDirError> {
        remove_unfinished(path).map_err(|error| directory_error(path, error))?;
        let disk_id = DiskId::generate().map_err(|_| DataDirError::NoRandomness)?;
        let store = StoreFile {
            format: STORE_FORMAT,
            state,
            context: context.to_owned(),
            shards,
            disk_id: disk_id.to_string(),
        };
        let data_dir = DataDir { path: path.to_owned(), store, disk_id, lock };
        data_dir.write_store()?;
        Ok(data_dir)
    }

    /// Whether the files are still to be made; end that with [`DataDir::finish`].
    pub fn is_new(&self) -> bool {
        self.store.state == StoreState::Creating
    }

    /// Every file of a new store is in place: from now on none may be missing.
    ///
    /// # Errors
    /// `store.json` cannot be written.
    pub fn finish(&mut self) -> Result<(), DataDirError> {
        self.store.state = StoreState::Ready;
        self.write_store()
    }

    /// Lets another process have the directory, although this value is still held: all files in it are closed.
    pub fn release(&self) {
        if let Err(error) = self.lock.0.unlock() {
            tracing::warn!(path = %self.path.display(), %error, "the data directory stays locked until the store's last handle is gone");
        }
    }

    /// Where the data is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How many shards the store has.
    pub fn shards(&self) -> u16 {
        self.store.shards
    }

    /// The identity of this copy of the data.
    pub fn disk_id(&self) -> DiskId {
        self.disk_id
    }

    /// Replaces `store.json` as a whole, durably.
    fn write_store(&self) -> Result<(), DataDirError> {
        let target = self.path.join(STORE_FILE);
        let fail = |error| directory_error(&target, error);
        let text = serde_json::to_vec_pretty(&self.store).map_err(|error| fail(error.into()))?;
        let temporary = self.path.join(format!("{STORE_FILE}.new"));
        let mut file = File::create(&temporary).map_err(fail)?;
        file.write_all(&text).and_then(|()| file.write_all(b"\n")).and_then(|()| file.sync_all()).map_err(fail)?;
        fs::rename(&temporary, &target).and_then(|()| sync_directory(&self.path)).map_err(fail)?;
        Ok(())
    }
}

fn parse(store_path: &Path, path: &Path, bytes: &[u8]) -> Result<(StoreFile, DiskId), DataDirError> {
    /// The format alone: the rest of a newer file may look different.
    #[derive(Deserialize)]
    struct FormatOnly {
        format: u32,
    }
    let unreadable = |state: String| DataDirError::NoIdentity { path: store_path.to_owned(), state };
    let FormatOnly { format: found } =
        serde_json::from_slice(bytes).map_err(|error| unreadable(format!("not readable ({error})")))?;
    if found > STORE_FORMAT {
        return Err(DataDirError::Newer { path: path.to_owned(), found, supported: STORE_FORMAT });
    }
    let store: StoreFile =
        serde_json::from_slice(bytes).map_err(|error| unreadable(format!("not readable ({error})")))?;
    let disk_id = hex::decode(&store.disk_id).ok().and_then(|bytes| bytes.try_into().ok());
    let disk_id = disk_id.ok_or_else(|| unreadable("damaged (its disk id)".to_owned()))?;
    Ok((store, DiskId(disk_id)))
}

fn lock(path: &Path) -> Result<Lock, DataDirError> {
    let lock_path = path.join(LOCK_FILE);
    let fail = |error| directory_error(&lock_path, error);
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&lock_path).map_err(fail)?;
    let lock = match file.try_lock() {
        Ok(()) => Lock(file),
        Err(fs::TryLockError::WouldBlock) => {
            let holder = fs::read_to_string(&lock_path).ok().filter(|text| !text.trim().is_empty());
            let holder = match holder.as_deref().map(str::trim) {
                Some(pid) if pid == std::process::id().to_string() => {
                    "this very process, or by a store of it that was dropped and is still closing; call `shutdown` on that one first".to_owned()
                }
                Some(pid) => format!("another process (process {pid}); stop that one first"),
                None => "another process; stop that one first".to_owned(),
            };
            return Err(DataDirError::InUse { path: path.to_owned(), holder });
        }
        Err(fs::TryLockError::Error(error)) => return Err(fail(error).into()),
    };
    // For the message of whoever comes second; the lock itself does not depend on it.
    let written = lock.0.set_len(0).and_then(|()| writeln!(&lock.0, "{}", std::process::id()));
    written.map_err(fail)?;
    Ok(lock)
}

/// Makes the directory and its missing parents, and syncs the parent of each: a database in a directory whose own entry was never
/// synced is gone after a power loss, however well it was synced itself.
///
/// # Errors
/// The operating system refused.
pub fn create_directory(path: &Path) -> io::Result<()> {
    let missing: Vec<&Path> =
        path.ancestors().take_while(|path| !path.as_os_str().is_empty() && !path.exists()).collect();
    fs::create_dir_all(path)?;
    for made in missing.iter().rev() {
        let parent = made.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        sync_directory(parent)?;
    }
    Ok(())
}

/// Syncs the entries of a directory.
///
/// # Errors
/// The operating system refused.
pub fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

fn has_data(path: &Path) -> bool {
    path.join(keys::FILE_NAME).exists() || (0..=u16::from(u8::MAX)).any(|number| shard::exists(path, number))
}

/// Removes what a creation that never finished has left.
fn remove_unfinished(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if is_ours(&entry.file_name().to_string_lossy()) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Whether a file has the name of one that a store is made of.
fn is_ours(name: &str) -> bool {
    let (stem, extension) = name.split_once('.').unwrap_or((name, ""));
    let ours = stem == "keys"
        || stem == "node"
        || stem.strip_prefix("shard-").is_some_and(|number| number.parse::<u16>().is_ok());
    ours && matches!(extension, "db" | "db-wal" | "db-shm" | "db-journal" | "watermark")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(path: &Path) -> Result<DataDir, DataDirError> {
        DataDir::open(path, "test", None, 4)
    }

    #[test]
    fn a_directory_whose_creation_was_cut_short_is_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b/data");
        let first = open(&path).unwrap();
        fs::write(path.join("shard-000.db"), b"half").unwrap();
        fs::write(path.join("mine.txt"), b"not ours").unwrap();
        let id = first.disk_id();
        drop(first);
        let mut second = open(&path).unwrap();
        assert!(second.is_new() && second.disk_id() != id);
        assert!(!path.join("shard-000.db").exists() && path.join("mine.txt").exists());
        second.finish().unwrap();
        drop(second);
        assert!(!open(&path).unwrap().is_new());
    }

    #[test]
    fn a_second_user_of_a_directory_is_refused_with_the_name_of_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let _first = open(dir.path()).unwrap();
        let error = open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("in use by this very process"), "{error}");
        fs::write(dir.path().join(LOCK_FILE), "1234\n").unwrap();
        let error = open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("in use by another process (process 1234)"), "{error}");
    }

    /// A store that was shut down kept its directory until its last handle was dropped.
    #[test]
    fn a_released_directory_is_free_although_its_value_is_still_held() {
        let dir = tempfile::tempdir().unwrap();
        let first = open(dir.path()).unwrap();
        assert!(matches!(open(dir.path()), Err(DataDirError::InUse { .. })));
        first.release();
        open(dir.path()).unwrap();
    }

    #[test]
    fn a_restore_that_did_not_finish_is_opened_by_nobody_and_begun_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data");
        let begin = |path: &Path| DataDir::begin_restore(path, "test", 4, &["master.key"]);
        let first = begin(&path).unwrap();
        fs::write(path.join("shard-000.db"), b"half").unwrap();
        fs::write(path.join("master.key"), b"key").unwrap();
        let id = first.disk_id();
        drop(first);
        assert!(matches!(open(&path), Err(DataDirError::Restoring { .. })));
        let second = begin(&path).unwrap();
        assert!(second.disk_id() != id && !path.join("shard-000.db").exists() && path.join("master.key").exists());
        drop(second);
        DataDir::open_restored(&path).unwrap().finish().unwrap();
        assert!(!open(&path).unwrap().is_new());
        // From now on it is a store like any other.
        assert!(matches!(begin(&path), Err(DataDirError::NotEmpty { .. })));
        fs::write(dir.path().join("mine.txt"), b"not ours").unwrap();
        assert!(
            matches!(begin(dir.path()), Err(DataDirError::NotEmpty { found, .. }) if found != "data" || !found.is_empty())
        );
    }

    #[test]
    fn an_abandoned_restore_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let data_dir = DataDir::begin_restore(dir.path(), "test", 4, &[]).unwrap();
        fs::write(dir.path().join("keys.db"), b"half").unwrap();
        data_dir.abandon().unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_directory_that_lost_its_identity_is_not_adopted() {
        let dir = tempfile::tempdir().unwrap();
        open(dir.path()).unwrap().finish().unwrap();
        fs::write(dir.path().join("shard-003.db"), b"data").unwrap();
        fs::remove_file(dir.path().join(STORE_FILE)).unwrap();
        assert!(matches!(open(dir.path()), Err(DataDirError::NoIdentity { .. })));
        fs::write(dir.path().join(STORE_FILE), b"{").unwrap();
        assert!(matches!(open(dir.path()), Err(DataDirError::NoIdentity { .. })));
    }

    #[test]
    fn another_store_another_shard_count_and_a_newer_format_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        open(dir.path()).unwrap().finish().unwrap();
        let other = DataDir::open(dir.path(), "other", None, 4);
        assert!(matches!(other, Err(DataDirError::OtherContext { .. })));
        let other = DataDir::open(dir.path(), "test", Some(8), 4);
        assert!(matches!(other, Err(DataDirError::OtherShards { found: 4, expected: 8, .. })));
        fs::write(dir.path().join(STORE_FILE), br#"{"format": 2, "new": true}"#).unwrap();
        assert!(matches!(open(dir.path()), Err(DataDirError::Newer { found: 2, supported: 1, .. })));
    }
}
