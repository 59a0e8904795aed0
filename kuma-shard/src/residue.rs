//! What is left in the unused space of a database file, seen page by page from outside: whether a byte is there that belongs to no row.
//!
//! ```text
//! table leaf   | header | pointers | unused: must be zero | cell  cell  free: must be zero  cell |
//! ```
//! Only leaves of tables with sealed bytes or keys are judged; indexes hold numbers and hashes. Free pages are zeroed by SQLite when they are
//! freed. Source: <https://sqlite.org/fileformat.html>, "B-tree Pages".
//!
//! Invariant: memory is bounded by the interior pages, one for some hundred leaves, however large the file is.

use std::collections::{HashMap, HashSet};

use crate::sqlite::PAGE_BYTES;

const LEAF: u8 = 0x0d;
const INTERIOR: u8 = 0x05;
/// The first page begins with the file's header.
const FILE_HEADER: usize = 100;

/// Pages of a file as they come by, in order.
#[derive(Debug, Default)]
pub struct Residue {
    pages: u32,
    part: Vec<u8>,
    /// Of each interior page of a table its children.
    children: HashMap<u32, Vec<u32>>,
    /// Leaves whose unused space is not zero.
    unclean: HashSet<u32>,
    leaves: HashSet<u32>,
}

/// What was found in the tables that were asked about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ResidueFound {
    /// Leaves that were looked at.
    pub leaves: u64,
    /// Those with bytes that belong to no row.
    pub unclean: u64,
}

impl Residue {
    /// Takes the next bytes of the file.
    pub fn feed(&mut self, mut bytes: &[u8]) {
        let page = PAGE_BYTES as usize;
        while self.part.len() + bytes.len() >= page {
            let (now, later) = bytes.split_at(page - self.part.len());
            self.part.extend_from_slice(now);
            bytes = later;
            let whole = std::mem::take(&mut self.part);
            self.pages += 1;
            self.look(self.pages, &whole);
            self.part = whole;
            self.part.clear();
        }
        self.part.extend_from_slice(bytes);
    }

    fn look(&mut self, number: u32, page: &[u8]) {
        let start = if number == 1 { FILE_HEADER } else { 0 };
        match page.get(start) {
            Some(&LEAF) => {
                self.leaves.insert(number);
                if !is_clean(page, start).unwrap_or(false) {
                    self.unclean.insert(number);
                }
            }
            Some(&INTERIOR) => {
                self.children.insert(number, children(page, start).unwrap_or_default());
            }
            _ => {}
        }
    }

    /// What there is in the tables whose first pages are `roots`.
    pub fn found(&self, roots: &[u32]) -> ResidueFound {
        let mut found = ResidueFound::default();
        let mut seen = HashSet::new();
        let mut next: Vec<u32> = roots.to_vec();
        while let Some(page) = next.pop() {
            if !seen.insert(page) {
                continue;
            }
            if let Some(children) = self.children.get(&page) {
                next.extend(children);
            } else if self.leaves.contains(&page) {
                found.leaves += 1;
                found.unclean += u64::from(self.unclean.contains(&page));
            }
        }
        found
    }
}

fn u16_at(page: &[u8], at: usize) -> Option<usize> {
    Some(usize::from(u16::from_be_bytes(page.get(at..at + 2)?.try_into().ok()?)))
}

fn u32_at(page: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(page.get(at..at + 4)?.try_into().ok()?))
}

/// None where the page is not what it says.
fn is_clean(page: &[u8], start: usize) -> Option<bool> {
    let cells = u16_at(page, start + 3)?;
    // 0 stands for 65,536, which pages of 4096 bytes do not have; a leaf without cells has its end there.
    let content = u16_at(page, start + 5)?;
    let pointers_end = start + 8 + 2 * cells;
    if !page.get(pointers_end..content)?.iter().all(|byte| *byte == 0) {
        return Some(false);
    }
    let mut block = u16_at(page, start + 1)?;
    let mut steps = 0;
    while block != 0 {
        let (following, size) = (u16_at(page, block)?, u16_at(page, block + 2)?);
        if !page.get(block + 4..block + size)?.iter().all(|byte| *byte == 0) {
            return Some(false);
        }
        steps += 1;
        block = if steps > page.len() { return None } else { following };
    }
    Some(true)
}

fn children(page: &[u8], start: usize) -> Option<Vec<u32>> {
    let cells = u16_at(page, start + 3)?;
    let child = |index| u32_at(page, u16_at(page, start + 12 + 2 * index)?);
    let mut children: Vec<u32> = (0..cells).map(child).collect::<Option<_>>()?;
    children.push(u32_at(page, start + 8)?);
    Some(children)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_shard::TestShard;

    async fn look(shard: &TestShard) -> ResidueFound {
        let mut residue = Residue::default();
        // It is closed.
        let bytes = std::fs::read(shard.options.directory.join(shard.file())).unwrap();
        bytes.chunks(1000).for_each(|chunk| residue.feed(chunk));
        residue.found(&shard.sealed_roots().await.unwrap())
    }

    async fn erased(keep_deleted_bytes: bool) -> ResidueFound {
        let mut shard = TestShard::new().await;
        shard.options.file.keep_deleted_bytes = keep_deleted_bytes;
        shard.reopen().await;
        let entities = [shard.entity(1, 0), shard.entity(2, 2)];
        for version in 1..=400 {
            for entity in &entities {
                shard.append(entity, version..=version).await;
            }
            let body = vec![7; 10 * version as usize];
            let snapshot = crate::SnapshotRow { eid: entities[0].eid, version, schema: 1, body };
            shard.save(snapshot).await.unwrap().unwrap();
        }
        shard.erase(&entities[0], 1).await.unwrap();
        shard.truncate_log().await.unwrap();
        let found = look(&shard).await;
        shard.stop().await;
        found
    }

    #[tokio::test]
    async fn what_was_erased_leaves_no_byte_in_unused_space() {
        let found = erased(false).await;
        assert!(found.leaves > 10 && found.unclean == 0, "{found:?}");
        let found = erased(true).await;
        assert!(found.unclean > 0, "the control: {found:?}");
    }

    #[tokio::test]
    async fn a_page_that_is_not_one_is_no_panic() {
        let mut random = 0x9e37_79b9_7f4a_7c15_u64;
        for _ in 0..200 {
            let mut page = vec![0; 4096];
            for byte in &mut page {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                *byte = (random >> 56) as u8;
            }
            for kind in [LEAF, INTERIOR] {
                page[0] = kind;
                let mut residue = Residue::default();
                residue.feed(&[0; 4096]);
                residue.feed(&page);
                residue.found(&[2]);
            }
        }
    }
}
