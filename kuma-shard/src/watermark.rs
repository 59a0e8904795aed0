//! The watermark: how far a database file had come, kept outside that file.
//!
//! SQLite takes a damaged or missing `-wal` for the end of the log and says nothing: one flipped bit made 192 of 200 acknowledged
//! commits vanish with `integrity_check = ok`. So each database has a small file beside it that names its newest commit.
//!
//! ```text
//!  0        4          12        28       60       64
//!  | "KWM1" | commits  | disk id | digest | CRC32C |     two such records, at 0 and at 64, written in turn
//! ```
//!
//! Invariants:
//! - It is written and synced **after** the commit that it names, never before: a database behind its watermark has lost
//!   acknowledged commits, whatever the reason.
//! - It is at most [`WATERMARK_DELAY`] behind the newest acknowledged commit on a disk that syncs within a few milliseconds, and
//!   later on a slower one; a loss inside that window is not noticed (docs/guarantees.md).
//! - The older record, or the one that is not whole, is written over, also after a reopening, so that a torn write leaves the newest.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::{Digest, DiskId};

/// How long after a commit its watermark is on the disk, where a sync takes a few milliseconds.
pub const WATERMARK_DELAY: Duration = Duration::from_millis(50);

const RECORD_BYTES: usize = 64;
const MAGIC: [u8; 4] = *b"KWM1";

/// What one record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mark {
    pub(crate) commits: u64,
    pub(crate) disk_id: DiskId,
    /// Of all rows at that commit.
    pub(crate) digest: Digest,
}

impl Mark {
    fn encode(&self) -> [u8; RECORD_BYTES] {
        let mut record = [0; RECORD_BYTES];
        record[..4].copy_from_slice(&MAGIC);
        record[4..12].copy_from_slice(&self.commits.to_le_bytes());
        record[12..28].copy_from_slice(&self.disk_id.0);
        record[28..60].copy_from_slice(&self.digest.to_bytes());
        let crc = crc32c::crc32c(&record[..60]);
        record[60..].copy_from_slice(&crc.to_le_bytes());
        record
    }

    fn decode(record: &[u8]) -> Option<Self> {
        let record: &[u8; RECORD_BYTES] = record.try_into().ok()?;
        let (body, crc) = record.split_at(60);
        if body[..4] != MAGIC || crc32c::crc32c(body).to_le_bytes() != crc {
            return None;
        }
        Some(Mark {
            commits: u64::from_le_bytes(body[4..12].try_into().ok()?),
            disk_id: DiskId(body[12..28].try_into().ok()?),
            digest: Digest::from_bytes(body[28..60].try_into().ok()?),
        })
    }
}

/// What is known of a database from its watermark file.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Found {
    Missing,
    /// Neither record is whole.
    Damaged,
    Newest(Mark),
}

/// An open watermark file.
pub(crate) struct WatermarkFile {
    file: File,
    turn: u64,
}

impl WatermarkFile {
    /// `shard-000.db` has its watermark in `shard-000.watermark`.
    pub(crate) fn path_for(database: &Path) -> PathBuf {
        database.with_extension("watermark")
    }

    pub(crate) fn read(path: &Path) -> io::Result<Found> {
        let bytes = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found::Missing),
            Err(error) => return Err(error),
        };
        let newest = bytes.chunks(RECORD_BYTES).take(2).filter_map(Mark::decode).max_by_key(|mark| mark.commits);
        Ok(newest.map_or(Found::Damaged, Found::Newest))
    }

    /// Opens the file, or makes it with room for both records, so that later writes need no space.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        if file.metadata()?.len() < 2 * RECORD_BYTES as u64 {
            file.set_len(2 * RECORD_BYTES as u64)?;
        }
        let mut records = [0; 2 * RECORD_BYTES];
        file.read_exact_at(&mut records, 0)?;
        let commits = |record: &[u8]| Mark::decode(record).map(|mark| mark.commits);
        let (first, second) = records.split_at(RECORD_BYTES);
        // The older one, or the one that is not whole, is written next.
        let turn = u64::from(commits(first) > commits(second));
        Ok(WatermarkFile { file, turn })
    }

    /// Writes `mark` over the older record and syncs it.
    pub(crate) fn write(&mut self, mark: &Mark) -> io::Result<()> {
        self.file.write_all_at(&mark.encode(), (self.turn % 2) * RECORD_BYTES as u64)?;
        self.file.sync_data()?;
        self.turn += 1;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(commits: u64) -> Mark {
        Mark { commits, disk_id: DiskId([7; 16]), digest: Digest::from_bytes([3; 32]) }
    }

    #[test]
    fn a_torn_watermark_leaves_the_one_before() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("shard-000.watermark");
        let mut file = WatermarkFile::open(&path).unwrap();
        for commits in 1..=5 {
            file.write(&mark(commits)).unwrap();
            assert_eq!(WatermarkFile::read(&path).unwrap(), Found::Newest(mark(commits)));
        }
        // The fifth record stands first; tear it.
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[10] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(WatermarkFile::read(&path).unwrap(), Found::Newest(mark(4)));
        bytes[70] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(WatermarkFile::read(&path).unwrap(), Found::Damaged);
    }

    /// A torn write after a restart must not cost the newest record either.
    #[test]
    fn a_reopened_watermark_is_written_over_its_older_record() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("shard-000.watermark");
        for commits in 1..=6 {
            let before = WatermarkFile::read(&path).unwrap();
            WatermarkFile::open(&path).unwrap().write(&mark(commits)).unwrap();
            let bytes = std::fs::read(&path).unwrap();
            let records: Vec<_> = bytes.chunks(RECORD_BYTES).filter_map(Mark::decode).collect();
            assert!(records.contains(&mark(commits)));
            if let Found::Newest(before) = before {
                assert!(records.contains(&before), "commit {} was written over", before.commits);
            }
        }
    }

    #[test]
    fn a_watermark_record_is_pinned_to_the_byte() {
        assert_eq!(
            hex::encode(mark(258).encode()),
            "4b574d310201000000000000070707070707070707070707070707070303030303030303030303030303030303030303030303030303030303030303159cc5bf"
        );
    }
}
