//! What would show that an erased entity was there: its sealed bytes, its key and what is written in it, looked for in every file.
//!
//! Sealed bytes and keys are random, so that eight of them in a row are told from everything else. They are noted while the entity
//! lives, and looked for when it is gone.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    path::{Path, PathBuf},
    process::Command,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use kuma_core::MasterKey;
use kuma_crypto::{IdHash, KeyId, wrap_aad};
use rusqlite::{Connection, OpenFlags};

use crate::common::directory;

/// Stands in every id, header, idempotency key and payload that must be seen nowhere.
pub(crate) const TOKEN: &str = "K4n4ryTokenXq7";
/// Under this name [`TOKEN`] is found, whosever it is.
const ANYBODY: &str = "anybody";
/// Bits in the filter: most of what is read is told by it alone.
const FILTER_BITS: u32 = 27;
/// Of sealed bytes each fourth place is noted, so that any eleven of them in a row are found.
const SEALED_STRIDE: usize = 4;
/// A wrapped key begins with the name of the master key.
const WRAPPED_HEAD: usize = 9;

/// Something that must not be there.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Trace {
    pub(crate) file: String,
    /// The hash of the entity.
    pub(crate) of: String,
    pub(crate) what: &'static str,
}

impl Trace {
    /// The index of idempotency keys is the one table with rows of the erased whose rows move, and SQLite does not zero the copy that
    /// rebalancing a page leaves in its unused space. What may stay there is a hash, keyed with the key that was destroyed: it says
    /// nothing to anyone.
    fn is_harmless(&self) -> bool {
        self.what == "an append key" && (self.file.ends_with(".db") || self.file.ends_with(".db-wal"))
    }
}

#[derive(Clone)]
pub(crate) struct Traces {
    filter: Vec<u64>,
    /// By its last eight bytes: whose it is, what, and the eight before, where those alone say too little (hex digits).
    noted: HashMap<u64, (u32, &'static str, Option<u64>)>,
    /// By owner: whatever is noted of it.
    owners: HashMap<String, u32>,
    names: Vec<String>,
    of_owner: Vec<Vec<u64>>,
    looked_for: HashSet<u32>,
    /// What was read of each file already.
    read_to: HashMap<PathBuf, i64>,
    seen: HashSet<Vec<u8>>,
    /// How many of what were noted.
    pub(crate) counts: BTreeMap<&'static str, usize>,
}

fn bit(word: u64) -> (usize, u64) {
    let bit = word.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - FILTER_BITS);
    ((bit >> 6) as usize, 1 << (bit & 63))
}

/// The text as it may have been written down.
fn spellings(bytes: &[u8]) -> Vec<Vec<u8>> {
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let utf16 =
        |swap: bool| -> Vec<u8> { bytes.iter().flat_map(|byte| if swap { [0, *byte] } else { [*byte, 0] }).collect() };
    let mut spellings =
        vec![bytes.to_vec(), hex.to_uppercase().into_bytes(), hex.into_bytes(), utf16(true), utf16(false)];
    // Wherever in a longer text it stands: without the digits that its neighbours have a part in.
    for before in 0..3 {
        let padded = [&[0; 3][..before], bytes].concat();
        let whole = padded.len() / 3 * 4;
        spellings.push(STANDARD.encode(&padded).as_bytes()[(before * 8).div_ceil(6)..whole].to_vec());
    }
    spellings
}

impl Traces {
    pub(crate) fn new() -> Traces {
        let mut traces = Traces {
            filter: vec![0; 1 << (FILTER_BITS - 6)],
            noted: HashMap::new(),
            owners: HashMap::new(),
            names: Vec::new(),
            of_owner: Vec::new(),
            looked_for: HashSet::new(),
            read_to: HashMap::new(),
            seen: HashSet::new(),
            counts: BTreeMap::new(),
        };
        traces.note_spellings(ANYBODY, "the canary", TOKEN.as_bytes());
        traces.look_for(ANYBODY);
        traces
    }

    fn owner(&mut self, of: &str) -> u32 {
        if let Some(number) = self.owners.get(of) {
            return *number;
        }
        let number = self.names.len() as u32;
        self.owners.insert(of.to_owned(), number);
        self.names.push(of.to_owned());
        self.of_owner.push(Vec::new());
        number
    }

    /// Notes these bytes; once, however often they are seen.
    fn note(&mut self, of: &str, what: &'static str, bytes: &[u8], stride: usize) {
        let sparse = bytes.iter().all(u8::is_ascii_hexdigit);
        if bytes.len() < 8 || !self.seen.insert(bytes[..bytes.len().min(48)].to_vec()) {
            return;
        }
        *self.counts.entry(what).or_default() += 1;
        let owner = self.owner(of);
        let word = |place: usize| u64::from_be_bytes(bytes[place..place + 8].try_into().unwrap());
        for place in (0..=bytes.len() - 8).step_by(stride).skip(if sparse { 8 } else { 0 }) {
            let before = sparse.then(|| word(place - 8));
            let word = word(place);
            self.noted.insert(word, (owner, what, before));
            self.of_owner[owner as usize].push(word);
        }
    }

    fn note_spellings(&mut self, of: &str, what: &'static str, bytes: &[u8]) {
        spellings(bytes).iter().for_each(|spelling| self.note(of, what, spelling, 1));
    }

    /// Notes all that the files of the store hold of anybody now. They may be in use: it is the same SQLite that reads them.
    pub(crate) async fn note_all(&mut self, data: &Path, master: &dyn MasterKey) {
        for path in databases(data) {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if name.starts_with("shard-") {
                self.note_shard(&path);
            } else if name == "keys.db" {
                self.note_keys(&path, master).await;
            }
        }
    }

    fn note_shard(&mut self, path: &Path) {
        let connection = open(path);
        let after = self.read_to.get(path).copied().unwrap_or(0);
        let mut rows = connection
            .prepare("SELECT lower(hex(id_hash)), body, append_key, position FROM log JOIN entity USING (eid) WHERE position > ? ORDER BY position")
            .unwrap();
        let mut rows = rows.query([after]).unwrap();
        while let Some(row) = rows.next().unwrap() {
            let (of, body): (String, Vec<u8>) = (row.get(0).unwrap(), row.get(1).unwrap());
            self.note(&of, "a commit", &body, SEALED_STRIDE);
            if let Some(key) = row.get::<_, Option<Vec<u8>>>(2).unwrap() {
                self.note(&of, "an append key", &key, 1);
            }
            self.read_to.insert(path.to_owned(), row.get(3).unwrap());
        }
        for (statement, what) in [
            ("SELECT lower(hex(id_hash)), sealed_id FROM entity", "a sealed id"),
            ("SELECT lower(hex(id_hash)), body FROM snapshot JOIN entity USING (eid)", "a snapshot"),
        ] {
            let mut rows = connection.prepare(statement).unwrap();
            let mut rows = rows.query([]).unwrap();
            while let Some(row) = rows.next().unwrap() {
                let (of, bytes): (String, Vec<u8>) = (row.get(0).unwrap(), row.get(1).unwrap());
                self.note(&of, what, &bytes, SEALED_STRIDE);
            }
        }
    }

    async fn note_keys(&mut self, path: &Path, master: &dyn MasterKey) {
        let keys: Vec<(Vec<u8>, Vec<u8>, Vec<u8>)> = {
            let connection = open(path);
            let mut rows = connection
                .prepare("SELECT id_hash, key_id, wrapped FROM data_key WHERE key_id IS NOT NULL AND wrapped <> x''")
                .unwrap();
            let keys = rows.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?))).unwrap();
            keys.map(Result::unwrap).collect()
        };
        for (id_hash, key_id, wrapped) in keys {
            let of: String = id_hash.iter().map(|byte| format!("{byte:02x}")).collect();
            let names = (IdHash(id_hash.try_into().unwrap()), KeyId(key_id.try_into().unwrap()));
            let key = master.unwrap(&wrapped, &wrap_aad("kuma", names.0, names.1)).await.unwrap();
            self.note_spellings(&of, "a key", key.expose());
            self.note(&of, "a wrapped key", &wrapped[WRAPPED_HEAD..], 1);
        }
    }

    /// From now on nothing of this entity may be found.
    pub(crate) fn look_for(&mut self, of: &str) {
        let owner = self.owner(of);
        self.looked_for.insert(owner);
        for word in &self.of_owner[owner as usize] {
            let (index, mask) = bit(*word);
            self.filter[index] |= mask;
        }
    }

    pub(crate) fn look_for_everybody(&mut self) {
        self.names.clone().iter().for_each(|name| self.look_for(name));
    }

    pub(crate) fn look_for_nobody(&mut self) {
        self.filter.fill(0);
        self.looked_for.clear();
        self.look_for(ANYBODY);
    }

    /// What these bytes hold of those who are looked for.
    pub(crate) fn in_bytes(&self, bytes: &[u8]) -> HashSet<(u32, &'static str)> {
        let mut found = HashSet::new();
        let (mut word, mut place, mut begin) = (0_u64, 0, 0);
        // In one loop without calls: it runs without optimisation, over gigabytes.
        while place < bytes.len() {
            if word == 0 && place % 4096 == 0 && bytes.get(place..place + 4096) == Some(&[0; 4096]) {
                place += 4096;
                begin = place;
                continue;
            }
            word = word << 8 | bytes[place] as u64;
            place += 1;
            let bit = word.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - FILTER_BITS);
            if self.filter[(bit >> 6) as usize] >> (bit & 63) & 1 == 1
                && let Some(noted) = self.noted.get(&word)
                && self.looked_for.contains(&noted.0)
                && noted
                    .2
                    .is_none_or(|before| place >= begin + 16 && bytes[place - 16..place - 8] == before.to_be_bytes())
            {
                found.insert((noted.0, noted.1));
            }
        }
        found
    }

    /// What the files of a store hold of those who are looked for.
    pub(crate) fn in_files(&self, data: &Path) -> Vec<Trace> {
        let files = Self::read(data);
        let names: Vec<&String> = files.keys().collect();
        let halves = std::thread::scope(|scope| {
            let half = |odd: usize| {
                let mine: Vec<&&String> = names.iter().skip(odd).step_by(2).collect();
                let files = &files;
                scope.spawn(move || {
                    let traces = |name: &&&String| {
                        let found = self.in_bytes(&files[**name]).into_iter();
                        let trace = |(of, what): (u32, _)| Trace {
                            file: (***name).clone(),
                            of: self.names[of as usize].clone(),
                            what,
                        };
                        found.map(trace).collect::<Vec<_>>()
                    };
                    mine.iter().flat_map(traces).collect::<Vec<_>>()
                })
            };
            [half(0), half(1)].map(|half| half.join().unwrap())
        });
        let mut found = halves.concat();
        found.sort();
        found
    }

    #[track_caller]
    pub(crate) fn assert_none(&self, data: &Path, when: &str) {
        let (hashes, found): (Vec<Trace>, Vec<Trace>) = self.in_files(data).into_iter().partition(Trace::is_harmless);
        if !hashes.is_empty() {
            println!("{when}: {} hashes of idempotency keys in unused space of an index", hashes.len());
        }
        assert!(found.is_empty(), "{when}: {} traces, {:#?}", found.len(), &found[..found.len().min(20)]);
    }

    /// All files in a directory, by another process, for the sake of SQLite's locks.
    fn read(data: &Path) -> BTreeMap<String, Vec<u8>> {
        let copy = directory();
        let copied = Command::new("cp").arg("-r").arg(data).arg(copy.path().join("data")).status().unwrap();
        assert!(copied.success());
        let mut files = BTreeMap::new();
        let mut directories = vec![copy.path().join("data")];
        while let Some(next) = directories.pop() {
            for path in std::fs::read_dir(next).unwrap().map(|entry| entry.unwrap().path()) {
                if path.is_dir() {
                    directories.push(path);
                } else {
                    let name = path.strip_prefix(copy.path()).unwrap().to_string_lossy().into_owned();
                    assert!(!name.contains(TOKEN));
                    files.insert(name, std::fs::read(&path).unwrap());
                }
            }
        }
        files
    }
}

fn databases(data: &Path) -> Vec<PathBuf> {
    let paths = std::fs::read_dir(data).unwrap().map(|entry| entry.unwrap().path());
    let mut databases: Vec<PathBuf> = paths.filter(|path| path.extension().is_some_and(|end| end == "db")).collect();
    databases.sort();
    databases
}

/// A connection that only reads. It is of the same SQLite as the store's own, so that closing it costs nobody a lock.
pub(crate) fn open(path: &Path) -> Connection {
    let connection = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY).unwrap();
    connection.busy_timeout(std::time::Duration::from_secs(10)).unwrap();
    connection
}

/// The same for a store that is closed: read as it is, and nothing is left beside it.
pub(crate) fn open_closed(path: &Path) -> Connection {
    let uri = format!("file:{}?immutable=1", path.display());
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_URI;
    Connection::open_with_flags(uri, flags).unwrap()
}

/// Of each slot what its token says: how many commits, and their digest. The store is closed.
pub(crate) fn slot_sums(data: &Path) -> BTreeMap<i64, (i64, i64, Vec<u8>)> {
    let mut sums = BTreeMap::new();
    for path in databases(data).iter().filter(|path| path.to_string_lossy().contains("shard-")) {
        let connection = open_closed(path);
        let mut rows = connection.prepare("SELECT slot, next_seq, len, digest FROM slot_token").unwrap();
        let sum = |row: &rusqlite::Row<'_>| Ok((row.get(0)?, (row.get(1)?, row.get(2)?, row.get(3)?)));
        sums.extend(rows.query_map([], sum).unwrap().map(Result::unwrap));
    }
    sums
}
