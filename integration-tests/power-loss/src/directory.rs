//! Names and the files behind them: which creations and deletions would survive.
//!
//! POSIX promises that a name is durable once its *directory* was synced, not when the file was; so a name has a
//! durable meaning and the meanings it got since, and a cut may leave it with any of them. The order between names is
//! not kept either.
//!
//! Invariants:
//! - A file lives here while a name can still mean it after a cut, or a handle is open on it.
//! - The last handle of a settled file with a settled name takes the record with it, so that what others do to a closed
//!   file (copy, move, delete: outside of this VFS) is read anew when it is next opened.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use crate::disk::FileDisk;
use crate::rng::Rng;

/// A file, whatever it is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Inode(u64);

/// The real file behind a record: to see that somebody replaced it, and to give its permissions to what a cut leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) device: u64,
    pub(crate) number: u64,
    pub(crate) mode: u32,
}

/// All names and files.
#[derive(Debug, Default)]
pub(crate) struct Directory {
    names: BTreeMap<PathBuf, Name>, // ordered, so that a seed always meets the files in the same order
    files: HashMap<Inode, File>,
    next_inode: u64,
}

/// A file and who has it open.
#[derive(Debug)]
pub(crate) struct File {
    pub(crate) disk: FileDisk,
    pub(crate) identity: Identity,
    handles: u64,
}

#[derive(Debug, Default)]
struct Name {
    durable: Option<Inode>,
    since: Vec<Option<Inode>>,
}

/// What a cut does to one name.
#[derive(Debug)]
pub(crate) struct Fate {
    pub(crate) path: PathBuf,
    /// The file that callers saw under this name.
    pub(crate) seen: Option<Identity>,
    /// The file that the name means from now on.
    pub(crate) left: Option<(FileDisk, Identity)>,
}

impl Name {
    fn current(&self) -> Option<Inode> {
        self.since.last().copied().unwrap_or(self.durable)
    }

    fn may_mean(&self, inode: Inode) -> bool {
        self.durable == Some(inode) || self.since.contains(&Some(inode))
    }
}

impl Directory {
    /// The file that `path` means now.
    pub(crate) fn current(&self, path: &Path) -> Option<Inode> {
        self.names.get(path).and_then(Name::current)
    }

    pub(crate) fn file(&mut self, inode: Inode) -> Option<&mut File> {
        self.files.get_mut(&inode)
    }

    pub(crate) fn files(&self) -> impl Iterator<Item = (&Path, &FileDisk)> {
        self.names.iter().filter_map(|(path, name)| Some((path.as_path(), &self.files.get(&name.current()?)?.disk)))
    }

    /// A file that was there before this VFS: it is durable, and so is its name.
    pub(crate) fn adopt(&mut self, path: &Path, content: Vec<u8>, identity: Identity) -> Inode {
        let inode = self.add(FileDisk::holding(content), identity);
        self.names.insert(path.to_owned(), Name { durable: Some(inode), since: Vec::new() });
        self.sweep();
        inode
    }

    /// A new, empty file. Its name is not durable.
    pub(crate) fn create(&mut self, path: &Path, identity: Identity) -> Inode {
        let inode = self.add(FileDisk::default(), identity);
        self.names.entry(path.to_owned()).or_default().since.push(Some(inode));
        inode
    }

    /// The name was removed; not durably, so the file may come back.
    pub(crate) fn delete(&mut self, path: &Path) {
        self.names.entry(path.to_owned()).or_default().since.push(None);
        self.sweep();
    }

    /// The directory was synced: every name in it is durable as it is now.
    pub(crate) fn sync(&mut self, directory: &Path) {
        for (path, name) in &mut self.names {
            if path.parent() == Some(directory) {
                name.durable = name.current();
                name.since.clear();
            }
        }
        self.names.retain(|_, name| name.durable.is_some() || !name.since.is_empty());
        self.sweep();
    }

    pub(crate) fn opened(&mut self, inode: Inode) {
        if let Some(file) = self.files.get_mut(&inode) {
            file.handles += 1;
        }
    }

    pub(crate) fn closed(&mut self, inode: Inode) {
        let Some(file) = self.files.get_mut(&inode) else { return };
        file.handles -= 1;
        if file.handles == 0 && file.disk.is_settled() {
            self.names.retain(|_, name| name.durable != Some(inode) || !name.since.is_empty());
        }
        self.sweep();
    }

    /// The power is gone: what does each name mean?
    pub(crate) fn cut(&mut self, rng: &mut Rng) -> Vec<Fate> {
        let mut fates = Vec::new();
        for (path, name) in std::mem::take(&mut self.names) {
            let seen = name.current().and_then(|inode| self.files.get(&inode)).map(|file| file.identity);
            let chosen = rng.below(name.since.len() as u64 + 1).checked_sub(1);
            let meaning = chosen.map_or(name.durable, |index| name.since[index as usize]);
            let left = meaning.and_then(|inode| self.files.remove(&inode)).map(|file| (file.disk, file.identity));
            fates.push(Fate { path, seen, left });
        }
        self.files.clear();
        fates
    }

    fn add(&mut self, disk: FileDisk, identity: Identity) -> Inode {
        let inode = Inode(self.next_inode);
        self.next_inode += 1;
        self.files.insert(inode, File { disk, identity, handles: 0 });
        inode
    }

    /// Drops the files that nothing can reach. An inode that was just added has its name already.
    fn sweep(&mut self) {
        self.files.retain(|&inode, file| file.handles > 0 || self.names.values().any(|name| name.may_mean(inode)));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const SOME_FILE: Identity = Identity { device: 1, number: 1, mode: 0o600 };

    fn path() -> &'static Path {
        Path::new("/data/shard-wal")
    }

    /// What a name can mean after a cut: each file by its first byte, `None` for no file.
    fn outcomes(make: impl Fn() -> Directory) -> Vec<Option<u8>> {
        let mut seen = std::collections::BTreeSet::new();
        for seed in 0..100 {
            let mut rng = Rng::new(seed);
            let fates = make().cut(&mut rng);
            let left = fates.into_iter().find(|fate| fate.path == path()).and_then(|fate| fate.left);
            seen.insert(left.map(|(disk, _)| disk.cut(&mut rng).bytes.first().copied().unwrap_or(0)));
        }
        seen.into_iter().collect()
    }

    #[test]
    fn a_created_file_may_vanish_until_its_directory_is_synced() {
        let create = || {
            let mut directory = Directory::default();
            directory.create(path(), SOME_FILE);
            directory
        };
        assert_eq!(outcomes(create), [None, Some(0)]);
        let create_and_sync = || {
            let mut directory = create();
            directory.sync(Path::new("/elsewhere"));
            directory.sync(Path::new("/data"));
            directory
        };
        assert_eq!(outcomes(create_and_sync), [Some(0)]);
    }

    #[test]
    fn a_deleted_file_may_come_back_until_its_directory_is_synced() {
        let delete = || {
            let mut directory = Directory::default();
            directory.adopt(path(), vec![7], SOME_FILE);
            directory.delete(path());
            directory
        };
        assert_eq!(outcomes(delete), [None, Some(7)]);
        let delete_and_sync = || {
            let mut directory = delete();
            directory.sync(Path::new("/data"));
            directory
        };
        assert_eq!(outcomes(delete_and_sync), [None]);
    }

    #[test]
    fn a_file_deleted_and_created_anew_may_be_the_old_one_the_new_one_or_none() {
        let replace = || {
            let mut directory = Directory::default();
            directory.adopt(path(), vec![7], SOME_FILE);
            directory.delete(path());
            directory.create(path(), SOME_FILE);
            directory
        };
        assert_eq!(outcomes(replace), [None, Some(0), Some(7)]);
    }

    #[test]
    fn a_settled_file_is_forgotten_when_its_last_handle_closes() {
        let mut directory = Directory::default();
        let inode = directory.adopt(path(), vec![7], SOME_FILE);
        directory.opened(inode);
        directory.opened(inode);
        directory.closed(inode);
        assert_eq!(directory.current(path()), Some(inode));
        directory.closed(inode);
        assert_eq!(directory.current(path()), None);
        assert!(directory.file(inode).is_none());
    }

    #[test]
    fn an_unsynced_file_is_remembered_after_its_last_handle_closed() {
        let mut directory = Directory::default();
        let inode = directory.adopt(path(), vec![7], SOME_FILE);
        directory.opened(inode);
        directory.file(inode).unwrap().disk.truncated(0);
        directory.closed(inode);
        assert_eq!(directory.current(path()), Some(inode));
    }
}
