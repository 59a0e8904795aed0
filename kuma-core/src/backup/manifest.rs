//! The manifest of a backup: what is in its directory.
//!
//! Invariants:
//! - It is written last, as a whole, and synced: a directory without one holds no backup.
//! - It is one line of JSON, written in one way only, under a checksum of its own: a flipped bit is noticed.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
};

use kuma_shard::{DiskId, ShardContents, sync_directory};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

pub(crate) const FORMAT: u32 = 1;
pub(crate) const FILE_NAME: &str = "manifest.json";
/// A manifest is shorter than this: 256 shards and 4096 slots take less than 1 MiB.
const BYTES_MAX: u64 = 16 << 20;

/// What a backup is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backed {
    /// The shards of a store.
    Events,
    /// Its wrapped keys.
    Keys,
}

impl std::fmt::Display for Backed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Backed::Events => "events",
            Backed::Keys => "keys",
        })
    }
}

/// What every manifest begins with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupOf {
    /// 1.
    pub format: u32,
    /// What the backup is of.
    pub backup: Backed,
    /// The store's name.
    pub context: String,
    /// The identity of the data directory, in hex.
    pub disk_id: String,
    /// All that was acknowledged then is in it. RFC 3339 in UTC.
    pub taken_at: String,
}

impl BackupOf {
    pub(crate) fn disk_id(&self) -> Option<DiskId> {
        self.disk_id.parse().ok()
    }

    pub(crate) fn taken_at_us(&self) -> Option<i64> {
        crate::ledger::us_of(&self.taken_at)
    }
}

/// A file of a backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackupFileEntry {
    /// Its name.
    pub file: String,
    /// Its length.
    pub bytes: u64,
    /// BLAKE3 of its content, in hex; none if it was not verified.
    pub blake3: Option<String>,
}

/// The copy of a shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardEntry {
    /// The file.
    pub file: BackupFileEntry,
    /// The commit counter of the shard that it is as of.
    pub commits: u64,
    /// The position of its last row.
    pub position: u64,
    /// The number of its last entity.
    pub last_entity: i64,
    /// The sum of its rows, in hex.
    pub digest: String,
    /// Each slot with rows: its number, how many, and their sum in hex.
    pub slots: Vec<(u16, u64, String)>,
}

impl ShardEntry {
    pub(crate) fn new(file: BackupFileEntry, contents: &ShardContents) -> Self {
        let slots = contents.slots.iter();
        ShardEntry {
            file,
            commits: contents.commits,
            position: contents.position,
            last_entity: contents.last_eid,
            digest: hex::encode(contents.digest.to_bytes()),
            slots: slots.map(|(slot, len, digest)| (slot.number(), *len, hex::encode(digest.to_bytes()))).collect(),
        }
    }
}

/// The ledger in a backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LedgerEntry {
    /// The name of the file.
    pub file: String,
    /// Erasures in it.
    pub tombstones: u64,
    /// All erasures that had begun then are in it. RFC 3339 in UTC.
    pub as_of: String,
}

/// The manifest of a backup of events.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventsManifest {
    /// Of what.
    #[serde(flatten)]
    pub of: BackupOf,
    /// The shards, in the order of their numbers.
    pub shards: Vec<ShardEntry>,
    /// The ledger as of then.
    pub ledger: LedgerEntry,
    checksum: String,
}

/// The manifest of a backup of keys.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeysManifest {
    /// Of what.
    #[serde(flatten)]
    pub of: BackupOf,
    /// The copy of `keys.db`.
    pub file: BackupFileEntry,
    /// Keys.
    pub keys: u64,
    /// Keys that were destroyed.
    pub destroyed: u64,
    /// The sum of both, in hex.
    pub digest: String,
    /// The ledger as of then.
    pub ledger: LedgerEntry,
    checksum: String,
}

impl EventsManifest {
    pub(crate) fn new(of: BackupOf, shards: Vec<ShardEntry>, ledger: LedgerEntry) -> Self {
        EventsManifest { of, shards, ledger, checksum: String::new() }
    }
}

impl KeysManifest {
    pub(crate) fn new(
        of: BackupOf,
        file: BackupFileEntry,
        contents: &kuma_shard::KeysContents,
        ledger: LedgerEntry,
    ) -> Self {
        KeysManifest {
            of,
            file,
            keys: contents.keys,
            destroyed: contents.destroyed,
            digest: hex::encode(contents.digest.to_bytes()),
            ledger,
            checksum: String::new(),
        }
    }
}

/// Both of them.
pub(crate) trait Sealed: Serialize + DeserializeOwned {
    const BACKED: Backed;

    fn of(&self) -> &BackupOf;
    fn checksum(&mut self) -> &mut String;
}

impl Sealed for EventsManifest {
    const BACKED: Backed = Backed::Events;

    fn of(&self) -> &BackupOf {
        &self.of
    }

    fn checksum(&mut self) -> &mut String {
        &mut self.checksum
    }
}

impl Sealed for KeysManifest {
    const BACKED: Backed = Backed::Keys;

    fn of(&self) -> &BackupOf {
        &self.of
    }

    fn checksum(&mut self) -> &mut String {
        &mut self.checksum
    }
}

/// Why a manifest cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ManifestError {
    /// There is none.
    #[error("{path} is missing: {} holds no backup that came to its end", .path.parent().unwrap_or(.path).display())]
    Missing {
        /// Where it should be.
        path: PathBuf,
    },
    /// It is not as it was written.
    #[error("{path} is damaged ({detail})")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was found.
        detail: String,
    },
    /// It is that of another thing.
    #[error("{path} is that of a backup of {found}, not of {expected}")]
    OtherBackup {
        /// The file.
        path: PathBuf,
        /// What it is of.
        found: Backed,
        /// What it was to be of.
        expected: Backed,
    },
    /// A newer Kuma wrote it.
    #[error("{path} has format {found}, this version of Kuma reads up to {FORMAT}; use the newer version")]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
    /// The operating system refused.
    #[error("{path} cannot be read or written")]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// Reads the manifest in `directory`.
pub(crate) fn read<M: Sealed>(directory: &Path) -> Result<M, ManifestError> {
    #[derive(Deserialize)]
    struct FormatOnly {
        format: u32,
    }
    #[derive(Deserialize)]
    struct BackupOnly {
        backup: Backed,
    }
    let path = directory.join(FILE_NAME);
    let mut bytes = Vec::new();
    let read = File::open(&path).and_then(|file| file.take(BYTES_MAX).read_to_end(&mut bytes));
    match read {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(ManifestError::Missing { path }),
        Err(source) => return Err(ManifestError::Io { path, source }),
    }
    let damaged = |detail: &str| ManifestError::Damaged { path: path.clone(), detail: detail.to_owned() };
    match serde_json::from_slice(&bytes) {
        Ok(FormatOnly { format }) if format > FORMAT => return Err(ManifestError::Newer { path, found: format }),
        Ok(_) => {}
        Err(error) => return Err(damaged(&format!("it cannot be read: {error}"))),
    }
    if let Ok(BackupOnly { backup }) = serde_json::from_slice(&bytes)
        && backup != M::BACKED
    {
        return Err(ManifestError::OtherBackup { path, found: backup, expected: M::BACKED });
    }
    let manifest: Result<M, _> = serde_json::from_slice(&bytes);
    let mut manifest = manifest.map_err(|error| damaged(&format!("it cannot be read: {error}")))?;
    let found = std::mem::take(manifest.checksum());
    let whole = text(&mut manifest).map_err(|_| damaged("it cannot be written again"))?;
    if whole != bytes || found != *manifest.checksum() {
        return Err(damaged("it does not match its checksum"));
    }
    if manifest.of().disk_id().is_none() || manifest.of().taken_at_us().is_none() {
        return Err(damaged("it does not say of which store, and of when, it is"));
    }
    Ok(manifest)
}

/// The only way in which it is written.
fn text<M: Sealed>(manifest: &mut M) -> serde_json::Result<Vec<u8>> {
    manifest.checksum().clear();
    *manifest.checksum() = blake3::hash(&serde_json::to_vec(manifest)?).to_hex().to_string();
    let mut bytes = serde_json::to_vec(manifest)?;
    bytes.push(b'\n');
    Ok(bytes)
}

/// Puts a manifest in the place of the one in `directory`, durably.
pub(crate) fn write<M: Sealed>(directory: &Path, manifest: &mut M) -> Result<(), ManifestError> {
    let path = directory.join(FILE_NAME);
    let bytes = text(manifest).map_err(io::Error::from);
    let written = bytes.and_then(|bytes| replace(&path, &bytes));
    written.map_err(|source| ManifestError::Io { path, source })
}

/// Puts a file in the place of another, as a whole and durably.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let mut file = File::create(&partial)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&partial, path)?;
    sync_directory(path.parent().unwrap_or(Path::new(".")))
}

/// Length and BLAKE3 of a file that nothing writes to.
pub(crate) fn measure(path: &Path, hashed: bool) -> io::Result<(u64, Option<String>)> {
    let mut file = File::open(path)?;
    let bytes = file.metadata()?.len();
    if !hashed {
        return Ok((bytes, None));
    }
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok((bytes, Some(hasher.finalize().to_hex().to_string()))),
            read => hasher.update(&buffer[..read]),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> KeysManifest {
        let of = BackupOf {
            format: FORMAT,
            backup: Backed::Keys,
            context: "payments".to_owned(),
            disk_id: "02".repeat(16),
            taken_at: "2013-01-01T06:00:00.000000Z".to_owned(),
        };
        let file = BackupFileEntry { file: "keys-a.db".to_owned(), bytes: 7, blake3: None };
        let as_of = of.taken_at.clone();
        let ledger = LedgerEntry { file: "ledger.ndjson".to_owned(), tombstones: 0, as_of };
        KeysManifest::new(of, file, &Default::default(), ledger)
    }

    #[test]
    fn every_altered_byte_of_a_manifest_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(read::<KeysManifest>(dir.path()), Err(ManifestError::Missing { .. })));
        let mut written = manifest();
        write(dir.path(), &mut written).unwrap();
        assert_eq!(read::<KeysManifest>(dir.path()).unwrap(), written);
        assert!(matches!(read::<EventsManifest>(dir.path()), Err(ManifestError::OtherBackup { .. })));
        let path = dir.path().join(FILE_NAME);
        let bytes = fs::read(&path).unwrap();
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut altered = bytes.clone();
                altered[at] ^= 1 << bit;
                fs::write(&path, altered).unwrap();
                assert!(read::<KeysManifest>(dir.path()).is_err(), "bit {bit} of byte {at}");
            }
            fs::write(&path, &bytes[..at]).unwrap();
            assert!(read::<KeysManifest>(dir.path()).is_err(), "cut at {at}");
        }
        fs::write(&path, [&bytes[..], b" "].concat()).unwrap();
        assert!(read::<KeysManifest>(dir.path()).is_err());
    }
}
