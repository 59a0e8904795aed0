//! The directory of a projection: the files of its models, and which of them is served.
//!
//! ```text
//! projections/carriers/serving.json      {"serving": "v2-1", "previous": "v1-3", "rolled_back": false}
//!                      v1-3.db v2-1.db   version 1, built for the third time; version 2
//! ```
//!
//! Invariants:
//! - `serving.json` is replaced as a whole, and synced before a file that it does not name any more is deleted.
//! - A file that it does not name was never served: it is being built, or is left over.

use std::{
    fmt, fs, io,
    io::Write,
    path::{Path, PathBuf},
    str::FromStr,
};

use kuma_shard::{create_directory, sync_directory};
use serde::{Deserialize, Serialize};

/// Under this name the data directory holds the directories of projections.
pub(crate) const PROJECTIONS: &str = "projections";
const SERVING: &str = "serving.json";

/// A model that was built: which version of the projection, and for which time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ModelBuild {
    /// The version of the projection.
    pub version: u32,
    /// Counted from 1, one more with each rebuild.
    pub build: u32,
}

impl fmt::Display for ModelBuild {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "v{}-{}", self.version, self.build)
    }
}

impl FromStr for ModelBuild {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let parse = || {
            let (version, build) = text.strip_prefix('v')?.split_once('-')?;
            let found = ModelBuild { version: version.parse().ok()?, build: build.parse().ok()? };
            // One spelling alone.
            (found.to_string() == text).then_some(found)
        };
        parse().ok_or(())
    }
}

impl Serialize for ModelBuild {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ModelBuild {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(|()| serde::de::Error::custom("not a model's name"))
    }
}

/// What `serving.json` says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Served {
    pub(crate) serving: Option<ModelBuild>,
    pub(crate) previous: Option<ModelBuild>,
    /// Whether the one that is served is there because the one after it was not wanted: it stays, although its version is not that of the code.
    #[serde(default)]
    pub(crate) rolled_back: bool,
}

/// The directory of one projection.
#[derive(Clone, Debug)]
pub(crate) struct ModelDir {
    path: PathBuf,
}

impl ModelDir {
    pub(crate) fn of(data_dir: &Path, name: &str) -> Self {
        ModelDir { path: data_dir.join(PROJECTIONS).join(name) }
    }

    /// The directories of all projections that have one, with their names.
    pub(crate) fn all(data_dir: &Path) -> io::Result<Vec<(String, ModelDir)>> {
        let entries = match fs::read_dir(data_dir.join(PROJECTIONS)) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                let name = entry.file_name().to_string_lossy().into_owned();
                found.push((name, ModelDir { path: entry.path() }));
            }
        }
        found.sort_by(|one, other| one.0.cmp(&other.0));
        Ok(found)
    }

    /// Makes the directory, durably.
    pub(crate) fn create(&self) -> io::Result<()> {
        match self.path.parent() {
            Some(parent) if !parent.try_exists()? => create_directory(parent)?,
            _ => {}
        }
        match self.path.try_exists()? {
            true => Ok(()),
            false => create_directory(&self.path),
        }
    }

    pub(crate) fn file(&self, build: ModelBuild) -> PathBuf {
        self.path.join(format!("{build}.db"))
    }

    /// The models that there are files of, in order.
    pub(crate) fn builds(&self) -> io::Result<Vec<ModelBuild>> {
        let mut builds = Vec::new();
        let entries = match fs::read_dir(&self.path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        for entry in entries {
            let name = entry?.file_name();
            let build = |build: &str| build.parse::<ModelBuild>().ok();
            builds.extend(name.to_string_lossy().strip_suffix(".db").and_then(build));
        }
        builds.sort_unstable();
        Ok(builds)
    }

    /// What is served. What cannot be read says nothing: the models are built again then.
    pub(crate) fn served(&self) -> io::Result<Served> {
        match fs::read(self.path.join(SERVING)) {
            Ok(bytes) => Ok(serde_json::from_slice(&bytes).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Served::default()),
            Err(error) => Err(error),
        }
    }

    pub(crate) fn set_served(&self, served: &Served) -> io::Result<()> {
        let (target, temporary) = (self.path.join(SERVING), self.path.join(format!("{SERVING}.new")));
        let mut file = fs::File::create(&temporary)?;
        serde_json::to_writer(&mut file, served)?;
        file.write_all(b"\n")?;
        file.sync_all()?;
        fs::rename(&temporary, &target)?;
        sync_directory(&self.path)
    }

    /// Deletes the file of a model, with its log.
    pub(crate) fn remove(&self, build: ModelBuild) -> io::Result<()> {
        // The log first: it would be taken for that of a new file of this name.
        for suffix in [".db-wal", ".db-shm", ".db-journal", ".db"] {
            match fs::remove_file(self.path.join(format!("{build}{suffix}"))) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Deletes everything of the projection.
    pub(crate) fn remove_all(&self) -> io::Result<()> {
        match fs::remove_dir_all(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_tells_what_is_served_and_which_files_there_are() {
        let data = tempfile::tempdir().unwrap();
        let directory = ModelDir::of(data.path(), "carriers");
        assert_eq!((directory.served().unwrap(), directory.builds().unwrap()), (Served::default(), vec![]));
        directory.create().unwrap();
        directory.create().unwrap();
        let build = |version, build| ModelBuild { version, build };
        for name in ["v2-1.db", "v10-1.db", "v2-3.db", "v2-3.db-wal", "v02-1.db", "x.db", "serving.json.new"] {
            std::fs::write(directory.path.join(name), b"").unwrap();
        }
        assert_eq!(directory.builds().unwrap(), [build(2, 1), build(2, 3), build(10, 1)]);
        let served = Served { serving: Some(build(2, 3)), previous: Some(build(2, 1)), rolled_back: false };
        directory.set_served(&served).unwrap();
        assert_eq!(directory.served().unwrap(), served);
        directory.remove(build(2, 3)).unwrap();
        assert!(!directory.path.join("v2-3.db-wal").exists());
        let all = ModelDir::all(data.path()).unwrap();
        assert_eq!(all.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["carriers"]);
        // Damaged, it says nothing.
        std::fs::write(directory.path.join(SERVING), b"{\"serving\": \"v2").unwrap();
        assert_eq!(directory.served().unwrap(), Served::default());
        directory.remove_all().unwrap();
        directory.remove_all().unwrap();
        assert!(ModelDir::all(data.path()).unwrap().is_empty());
    }
}
