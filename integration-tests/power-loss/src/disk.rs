//! One file on a disk with a volatile write cache: what is durable, and what would be lost.
//!
//! The bytes that reads see are not here: they are in the real file, written through at once. Here is what the platter
//! holds and which changes have not reached it.
//!
//! Invariants:
//! - `durable` changes only when a sync succeeds, and then by exactly the changes that were made before this sync
//!   began.
//! - A change holds whole sectors as the page cache had them right after it, neighbours included, so that a sector on
//!   the platter is always one the page cache held at some instant. A sector is never torn.
//! - After a failed sync its changes are forgotten (Linux marks the pages clean): they stay visible, no later sync
//!   writes them, and only being written again makes them durable. See Rebello et al., "Can Applications Recover from
//!   fsync Failures?" (USENIX ATC 2020).
//! - A cut may lose, keep or tear any unsynced change, in any order, and nothing else.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;

use crate::rng::Rng;

/// What a disk writes as a whole, in bytes.
pub(crate) const SECTOR_BYTES: u64 = 512;

/// The durable bytes of one file, and the changes since.
#[derive(Debug, Default)]
pub(crate) struct FileDisk {
    durable: Vec<u8>,
    unsynced: VecDeque<Change>,
    len: u64,
    next_number: u64,
    failed_syncs: u64,
}

/// A change that has not been synced.
#[derive(Debug)]
struct Change {
    number: u64,
    len_after: u64,
    what: What,
}

#[derive(Debug)]
enum What {
    /// `sectors` are whole; `written` is what the caller wrote of them, in bytes.
    Write { start: u64, sectors: Vec<u8>, written: u64 },
    /// The file was cut or extended to `len_after`.
    Truncate,
}

/// Which changes a sync covers: those made before it began.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SyncTicket {
    before: u64,
    failed_syncs: u64,
}

/// What a cut left of a file.
#[derive(Debug)]
pub(crate) struct Remains {
    /// The file's bytes.
    pub(crate) bytes: Vec<u8>,
    /// Unsynced writes of which nothing was left.
    pub(crate) lost_writes: u64,
    /// Unsynced writes of which a part was left.
    pub(crate) torn_writes: u64,
}

/// Which sectors of one write reached the platter.
enum Reach {
    All,
    None,
    Prefix(u64),
    Some,
}

impl FileDisk {
    /// A file whose `content` is durable already.
    pub(crate) fn holding(content: Vec<u8>) -> Self {
        Self { len: content.len() as u64, durable: content, ..Self::default() }
    }

    /// The length that callers see.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// The sectors that a write of `amount` bytes at `offset` touches, as a range of bytes.
    pub(crate) fn span(offset: u64, amount: u64) -> Range<u64> {
        offset / SECTOR_BYTES * SECTOR_BYTES..(offset + amount).div_ceil(SECTOR_BYTES) * SECTOR_BYTES
    }

    /// A write took place; `sectors` are the bytes of its [`FileDisk::span`] now, zeros after the end of the file.
    pub(crate) fn wrote(&mut self, offset: u64, amount: u64, sectors: Vec<u8>) {
        let span = Self::span(offset, amount);
        debug_assert_eq!(sectors.len() as u64, span.end - span.start, "a write is recorded in whole sectors");
        self.len = self.len.max(offset + amount);
        self.push(What::Write { start: span.start, sectors, written: amount });
    }

    /// The file now has `len` bytes.
    pub(crate) fn truncated(&mut self, len: u64) {
        self.len = len;
        self.push(What::Truncate);
    }

    /// A sync begins. What is changed from now on is not covered by it.
    pub(crate) fn sync_begins(&self) -> SyncTicket {
        SyncTicket { before: self.next_number, failed_syncs: self.failed_syncs }
    }

    /// A sync is over. False if another sync failed in the meantime and took this one's changes with it.
    #[must_use]
    pub(crate) fn sync_ends(&mut self, ticket: SyncTicket) -> bool {
        while self.unsynced.front().is_some_and(|change| change.number < ticket.before) {
            let Some(change) = self.unsynced.pop_front() else { break };
            if let What::Write { start, sectors, .. } = &change.what {
                put(&mut self.durable, *start, sectors);
            }
            self.durable.resize(change.len_after as usize, 0);
        }
        self.failed_syncs == ticket.failed_syncs
    }

    /// A sync failed: nothing of what was unsynced will reach the platter by itself.
    pub(crate) fn sync_failed(&mut self) {
        self.failed_syncs += 1;
        self.unsynced.clear();
    }

    /// The bytes written and not synced, counting what was written twice twice.
    pub(crate) fn unsynced_bytes(&self) -> u64 {
        self.unsynced.iter().map(|change| if let What::Write { written, .. } = change.what { written } else { 0 }).sum()
    }

    /// True if something was changed and not synced.
    pub(crate) fn is_unsynced(&self) -> bool {
        !self.unsynced.is_empty()
    }

    /// True if the platter holds what callers see, so that this record can be dropped and read anew.
    pub(crate) fn is_settled(&self) -> bool {
        self.unsynced.is_empty() && self.failed_syncs == 0
    }

    /// The power is gone: what is left of the file?
    ///
    /// Sizes are journaled by file systems, hence survive as a prefix of what happened; data sectors survive in any
    /// order, for a sector written twice either version may be the last on the platter. A truncation that happened
    /// leaves zeros behind it.
    pub(crate) fn cut(self, rng: &mut Rng) -> Remains {
        let Self { mut durable, unsynced, .. } = self;
        let sizes_kept = if rng.percent(50) { unsynced.len() } else { rng.below(unsynced.len() as u64 + 1) as usize };
        let final_len = sizes_kept.checked_sub(1).map_or(durable.len() as u64, |last| unsynced[last].len_after);
        let kept_percent = [0, 20, 50, 80, 100][rng.below(5) as usize];
        // The rank of the write that a sector on the platter is from: the writes reach it in the order of their ranks.
        let mut ranks = HashMap::<u64, u64>::new();
        let mut reachable = u64::MAX; // blocks behind a truncation that did not happen were never linked into the file
        let (mut lost_writes, mut torn_writes) = (0, 0);
        for (index, change) in unsynced.iter().enumerate() {
            match &change.what {
                What::Truncate if index < sizes_kept => {
                    durable.truncate(change.len_after as usize);
                    ranks.retain(|sector, _| sector * SECTOR_BYTES < change.len_after);
                }
                What::Truncate => reachable = reachable.min(change.len_after),
                What::Write { start, sectors, .. } => {
                    let count = sectors.len() as u64 / SECTOR_BYTES;
                    let reach = Reach::of_one_write(kept_percent, count, rng);
                    let (rank, mut reached) = (rng.next(), 0);
                    for (sector, bytes) in (0..count).zip(sectors.chunks_exact(SECTOR_BYTES as usize)) {
                        let at = start + sector * SECTOR_BYTES;
                        if !reach.includes(sector, rng) || at >= reachable || at >= final_len {
                            continue;
                        }
                        reached += 1;
                        let newest = ranks.entry(at / SECTOR_BYTES).or_insert(rank);
                        if *newest <= rank {
                            *newest = rank;
                            put(&mut durable, at, bytes);
                        }
                    }
                    lost_writes += u64::from(reached == 0);
                    torn_writes += u64::from(reached > 0 && reached < count);
                }
            }
        }
        durable.resize(final_len as usize, 0);
        Remains { bytes: durable, lost_writes, torn_writes }
    }

    fn push(&mut self, what: What) {
        self.unsynced.push_back(Change { number: self.next_number, len_after: self.len, what });
        self.next_number += 1;
    }
}

impl Reach {
    fn of_one_write(kept_percent: u64, sectors: u64, rng: &mut Rng) -> Self {
        match (rng.percent(kept_percent), rng.below(4)) {
            (false, _) => Self::None,
            (true, 0) => Self::Prefix(rng.below(sectors + 1)),
            (true, 1) => Self::Some,
            (true, _) => Self::All,
        }
    }

    fn includes(&self, sector: u64, rng: &mut Rng) -> bool {
        match self {
            Self::All => true,
            Self::None => false,
            Self::Prefix(end) => sector < *end,
            Self::Some => rng.percent(50),
        }
    }
}

/// Puts `bytes` at `offset`, zeros in between if the file was shorter.
fn put(file: &mut Vec<u8>, offset: u64, bytes: &[u8]) {
    let (start, end) = (offset as usize, offset as usize + bytes.len());
    if file.len() < end {
        file.resize(end, 0);
    }
    file[start..end].copy_from_slice(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file as the VFS drives it: the page cache in `cache`, the disk below.
    struct TestFile {
        cache: Vec<u8>,
        disk: FileDisk,
    }

    impl TestFile {
        fn holding(content: &[u8]) -> Self {
            Self { cache: content.to_vec(), disk: FileDisk::holding(content.to_vec()) }
        }

        fn write(&mut self, offset: u64, bytes: &[u8]) {
            put(&mut self.cache, offset, bytes);
            let span = FileDisk::span(offset, bytes.len() as u64);
            let mut sectors = self.cache[span.start as usize..(span.end as usize).min(self.cache.len())].to_vec();
            sectors.resize((span.end - span.start) as usize, 0);
            self.disk.wrote(offset, bytes.len() as u64, sectors);
        }

        fn truncate(&mut self, len: u64) {
            self.cache.resize(len as usize, 0);
            self.disk.truncated(len);
        }

        fn sync(&mut self) {
            let ticket = self.disk.sync_begins();
            assert!(self.disk.sync_ends(ticket));
        }

        fn cut(self, seed: u64) -> Remains {
            self.disk.cut(&mut Rng::new(seed))
        }
    }

    #[test]
    fn synced_bytes_survive_every_cut() {
        for seed in 0..200 {
            let mut file = TestFile::holding(b"old");
            file.write(0, &[1; 1000]);
            file.write(1000, &[2; 3000]);
            file.truncate(3500);
            file.sync();
            let expected = file.cache.clone();
            file.write(4096, &[3; 100]); // beyond the synced sectors
            assert_eq!(file.cut(seed).bytes[..3500], expected, "seed {seed}");
        }
    }

    /// The neighbours in a shared sector were synced; losing or keeping the write beside them must not touch them.
    #[test]
    fn a_write_never_damages_bytes_outside_it() {
        for seed in 0..200 {
            let mut file = TestFile::holding(&[]);
            file.write(0, &[1; 700]);
            file.sync();
            file.write(700, &[2; 700]);
            let bytes = file.cut(seed).bytes;
            assert_eq!(bytes[..700], [1; 700], "seed {seed}");
            assert!(bytes[700..].iter().all(|&byte| byte == 0 || byte == 2), "seed {seed}");
        }
    }

    #[test]
    fn unsynced_writes_are_lost_kept_and_torn_at_sectors() {
        let (mut lost, mut kept, mut torn) = (0, 0, 0);
        for seed in 0..400 {
            let mut file = TestFile::holding(&[0; 4096]);
            file.write(0, &[7; 4096]);
            let remains = file.cut(seed);
            assert_eq!(remains.bytes.len(), 4096);
            for sector in remains.bytes.chunks(512) {
                assert!(sector.iter().all(|&byte| byte == sector[0]), "a sector is never torn, seed {seed}");
            }
            match remains.bytes.iter().filter(|&&byte| byte == 7).count() {
                0 => lost += 1,
                4096 => kept += 1,
                _ => torn += 1,
            }
        }
        assert!(lost > 20 && kept > 20 && torn > 20, "lost {lost}, kept {kept}, torn {torn}");
    }

    #[test]
    fn the_second_write_may_reach_the_platter_without_the_first() {
        let reordered = (0..200).any(|seed| {
            let mut file = TestFile::holding(&[0; 1024]);
            file.write(0, &[1; 512]);
            file.write(512, &[2; 512]);
            let bytes = file.cut(seed).bytes;
            bytes[0] == 0 && bytes[512] == 2
        });
        assert!(reordered);
    }

    #[test]
    fn a_sector_written_twice_may_be_left_in_any_of_its_versions() {
        let mut seen = [false; 3];
        for seed in 0..200 {
            let mut file = TestFile::holding(&[0; 512]);
            file.write(0, &[1; 512]);
            file.write(0, &[2; 512]);
            seen[usize::from(file.cut(seed).bytes[0])] = true;
        }
        assert_eq!(seen, [true; 3]);
    }

    #[test]
    fn an_unsynced_truncate_may_or_may_not_have_happened() {
        let mut lengths = std::collections::BTreeSet::new();
        for seed in 0..200 {
            let mut file = TestFile::holding(&[9; 2048]);
            file.truncate(0);
            file.write(0, &[1; 512]);
            let bytes = file.cut(seed).bytes;
            lengths.insert(bytes.len());
            // What was written after the truncation is never seen in a file that was not truncated.
            assert!(bytes.len() < 2048 || bytes == [9; 2048], "seed {seed}");
        }
        assert_eq!(lengths.into_iter().collect::<Vec<_>>(), [0, 512, 2048]);
    }

    /// fsyncgate: the sync that follows a failed one succeeds and means nothing for what the failed one dropped.
    #[test]
    fn after_a_failed_sync_a_later_one_does_not_make_the_writes_durable() {
        for seed in 0..50 {
            let mut file = TestFile::holding(&[0; 1536]);
            file.write(0, &[1; 512]);
            file.disk.sync_failed();
            file.write(1024, &[2; 512]);
            file.sync();
            assert_eq!(file.cache[..512], [1; 512], "it stays visible");
            let bytes = file.cut(seed).bytes;
            assert_eq!((bytes[0], bytes[1024]), (0, 2), "seed {seed}");
        }
    }

    #[test]
    fn what_is_written_again_after_a_failed_sync_becomes_durable() {
        let mut file = TestFile::holding(&[0; 512]);
        file.write(0, &[1; 512]);
        file.disk.sync_failed();
        assert!(!file.disk.is_settled(), "the page cache and the platter differ for good");
        file.write(0, &[1; 512]);
        file.sync();
        assert_eq!(file.cut(0).bytes, [1; 512]);
    }

    #[test]
    fn a_sync_covers_only_what_was_written_before_it_began() {
        let lost = (0..50).any(|seed| {
            let mut file = TestFile::holding(&[0; 1024]);
            file.write(0, &[1; 512]);
            let ticket = file.disk.sync_begins();
            file.write(512, &[2; 512]);
            assert!(file.disk.sync_ends(ticket));
            assert_eq!(file.disk.unsynced_bytes(), 512);
            let bytes = file.cut(seed).bytes;
            assert_eq!(bytes[0], 1);
            bytes[512] == 0
        });
        assert!(lost);
    }

    #[test]
    fn a_sync_in_flight_fails_with_the_one_that_dropped_its_writes() {
        let mut file = TestFile::holding(&[0; 512]);
        file.write(0, &[1; 512]);
        let ticket = file.disk.sync_begins();
        file.disk.sync_failed();
        assert!(!file.disk.sync_ends(ticket));
    }
}
