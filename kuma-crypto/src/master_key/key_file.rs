//! The key file on disk: created once, whole or not at all, for its owner's eyes only.
//!
//! ```text
//! write .<name>.<random>.tmp (new, 0600) -> sync it -> link it to <name> (fails if that exists)
//!     -> unlink the temporary name -> sync the directory
//! ```
//! Invariants: an existing file is never replaced, for a store may depend on it; `<name>` is never seen torn, for it
//! appears with its full, synced content. A crash can leave the temporary name behind: an unused
//! key, or a second name of the key file, and no obstacle.
//!
//! A hard link instead of a rename: rename replaces, and its refusing form is not portable.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use super::MasterKeyError;
use super::key_text::TEXT_BYTES_MAX;
use crate::random;

/// Writes `text` to a new file at `path` and makes it durable.
pub(super) fn create(path: &Path, text: &[u8]) -> Result<(), MasterKeyError> {
    create_new(path, text).map_err(|source| match source.kind() {
        io::ErrorKind::AlreadyExists => MasterKeyError::FileExists { path: path.to_owned() },
        _ => MasterKeyError::Io { path: path.to_owned(), source },
    })
}

/// Reads the file at `path`, provided that nobody but its owner can.
pub(super) fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>, MasterKeyError> {
    let io = |source| MasterKeyError::Io { path: path.to_owned(), source };
    let file = File::open(path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => MasterKeyError::FileMissing { path: path.to_owned() },
        _ => io(source),
    })?;
    // The open file is judged, not the path: what is checked is what is read.
    refuse_open_permissions(&file, path)?;
    // All the room at once (one byte more than allowed, so that too much is seen): growing would leave copies behind.
    let mut text = Zeroizing::new(Vec::with_capacity(TEXT_BYTES_MAX + 1));
    file.take(TEXT_BYTES_MAX as u64 + 1).read_to_end(&mut text).map_err(io)?;
    Ok(text)
}

fn create_new(path: &Path, text: &[u8]) -> io::Result<()> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut temporary = OsString::from(".");
    temporary.push(name);
    temporary.push(format!(".{}.tmp", hex::encode(random::public::<8>())));

    let temporary = Temporary(directory.join(temporary));
    let mut file = new_private_file(&temporary.0)?;
    file.write_all(text)?;
    file.sync_all()?;
    fs::hard_link(&temporary.0, path)?;
    drop(temporary);
    sync_directory(directory)
}

/// A file that is removed again, whatever happens.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        // It may not even exist; and if it cannot be removed it is an extra name of a file that only its owner can
        // read.
        let _ = fs::remove_file(&self.0);
    }
}

#[cfg(unix)]
fn new_private_file(path: &Path) -> io::Result<File> {
    use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    // A strict umask would leave a file that its own process cannot read at the next start.
    file.set_permissions(fs::Permissions::from_mode(0o600))?;
    Ok(file)
}

#[cfg(not(unix))]
fn new_private_file(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create_new(true).open(path)
}

/// The name of a file is durable once its directory is synced.
#[cfg(unix)]
fn sync_directory(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

#[cfg(not(unix))]
fn sync_directory(_directory: &Path) -> io::Result<()> {
    Ok(())
}

#[cfg(unix)]
fn refuse_open_permissions(file: &File, path: &Path) -> Result<(), MasterKeyError> {
    use std::os::unix::fs::PermissionsExt;
    let metadata = file.metadata().map_err(|source| MasterKeyError::Io { path: path.to_owned(), source })?;
    match metadata.permissions().mode() & 0o7777 {
        mode if mode & 0o077 != 0 => Err(MasterKeyError::PermissionsTooOpen { path: path.to_owned(), mode }),
        _ => Ok(()),
    }
}

#[cfg(not(unix))]
fn refuse_open_permissions(_file: &File, _path: &Path) -> Result<(), MasterKeyError> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use tempfile::TempDir;

    use super::*;
    use crate::{LocalMasterKey, MasterKey};

    fn directory() -> (TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("master.key");
        (directory, path)
    }

    #[test]
    fn a_created_key_file_is_read_again() {
        let (directory, path) = directory();
        let created = LocalMasterKey::create_file(&path).unwrap();
        assert_eq!(LocalMasterKey::from_file(&path).unwrap().current(), created.current());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "no temporary file stays");
    }

    #[test]
    fn an_existing_key_file_is_never_overwritten() {
        let (directory, path) = directory();
        fs::write(&path, "whatever it is").unwrap();
        let error = LocalMasterKey::create_file(&path).unwrap_err();
        assert!(matches!(error, MasterKeyError::FileExists { .. }), "{error:?}");
        assert_eq!(fs::read(&path).unwrap(), b"whatever it is");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    /// Eight nodes start at once on an empty directory: they must agree on one key, and the others must know that they
    /// lost.
    #[test]
    fn of_many_who_create_a_key_file_one_wins() {
        let (directory, path) = directory();
        let start = Barrier::new(8);
        let created = std::thread::scope(|scope| {
            let create = || {
                start.wait();
                LocalMasterKey::create_file(&path)
            };
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(create)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        });
        let winners: Vec<_> = created.iter().flatten().collect();
        assert_eq!(winners.len(), 1);
        assert_eq!(winners[0].current(), LocalMasterKey::from_file(&path).unwrap().current());
        assert!(
            created
                .iter()
                .flat_map(|result| result.as_ref().err())
                .all(|e| matches!(e, MasterKeyError::FileExists { .. }))
        );
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_missing_key_file_asks_for_the_key_back() {
        let (_directory, path) = directory();
        let error = LocalMasterKey::from_file(&path).unwrap_err();
        assert!(matches!(error, MasterKeyError::FileMissing { .. }));
        let text = error.to_string();
        assert!(text.contains("put the key back") && text.contains("master.key"), "{text}");
    }

    #[test]
    fn a_directory_that_is_missing_is_an_error_and_leaves_nothing() {
        let (directory, _) = directory();
        let error = LocalMasterKey::create_file(&directory.path().join("no/such/master.key")).unwrap_err();
        assert!(matches!(error, MasterKeyError::Io { .. }), "{error:?}");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[cfg(unix)]
    #[test]
    fn a_created_key_file_is_for_its_owner_only() {
        use std::os::unix::fs::PermissionsExt;
        let (_directory, path) = directory();
        LocalMasterKey::create_file(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
    }

    #[cfg(unix)]
    #[test]
    fn a_key_file_that_others_can_use_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let (_directory, path) = directory();
        LocalMasterKey::create_file(&path).unwrap();
        for open in [0o640, 0o604, 0o620, 0o602, 0o601, 0o777] {
            fs::set_permissions(&path, fs::Permissions::from_mode(open)).unwrap();
            let error = LocalMasterKey::from_file(&path).unwrap_err();
            assert!(matches!(error, MasterKeyError::PermissionsTooOpen { mode, .. } if mode == open), "{error:?}");
            assert!(error.to_string().contains("chmod 600"), "{error}");
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o400)).unwrap();
        assert!(LocalMasterKey::from_file(&path).is_ok());
    }

    #[test]
    fn a_file_that_is_no_key_file_is_refused_with_its_path_and_line() {
        let (_directory, path) = directory();
        drop(new_private_file(&path).unwrap());
        assert!(matches!(LocalMasterKey::from_file(&path), Err(MasterKeyError::NoKey { .. })));
        fs::write(&path, "# a comment\nhunter2\n").unwrap();
        let text = LocalMasterKey::from_file(&path).unwrap_err().to_string();
        assert!(text.contains("line 2") && text.contains("master.key") && !text.contains("hunter2"), "{text}");
        fs::write(&path, vec![b'\n'; TEXT_BYTES_MAX + 1]).unwrap();
        assert!(matches!(LocalMasterKey::from_file(&path), Err(MasterKeyError::TooLarge { .. })));
    }
}
