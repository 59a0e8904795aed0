//! The ledger: who was erased, by hash and key, as lines of text to be kept outside of every backup.
//!
//! ```text
//! {"ledger":{"format":1,"context":"payments","public_key":"...","as_of":"..."}}
//! {"tombstone":{"entity":"...","key":"...","slot":17,"receipt":"...","at":"..."}}      one for each erasure
//! {"end":{"tombstones":1,"sha256":"...","signature":"..."}}
//! ```
//! Invariants:
//! - No personal data: an entity is named by its hash, a key by its random name.
//! - Every erasure that had begun at `as_of` is in it, complete or not.
//! - The signature is over the SHA-256 of all bytes before the last line: a ledger that was cut or altered is none.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read},
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use kuma_crypto::{PublicKey, Signature, SigningKey};
use kuma_shard::{EntityHash, Slot, Tombstone};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncWrite, AsyncWriteExt};

use crate::{Kuma, ndjson::time_text};

const FORMAT: u32 = 1;
/// What a signature is for.
const SIGNED_AS: &str = "kuma ledger v1";
/// A line of a ledger is shorter than this.
const LINE_BYTES_MAX: u64 = 4096;
/// Tombstones that are read at once.
const PAGE_ROWS: u32 = 1024;

/// What [`Kuma::export_ledger`] wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LedgerSummary {
    /// Erasures in it.
    pub tombstones: u64,
    /// All erasures that had begun then are in it.
    pub as_of: SystemTime,
}

/// Why a ledger could not be written, or is not believed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LedgerError {
    /// The store could not be read.
    #[error("node.db cannot be read, so that nothing is known of the erasures; retry")]
    Store(#[from] kuma_shard::ReadError),
    /// The writer failed; nothing is wrong with the store. What was written is no ledger.
    #[error("the ledger cannot be written")]
    Write(#[source] io::Error),
    /// The file cannot be read.
    #[error("the ledger {path} cannot be read")]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// It is not a ledger, or not all of it.
    #[error("{path} is not a whole ledger (line {line}: {detail}); take another copy of it")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The number of the line, from 1.
        line: u64,
        /// What is wrong with it.
        detail: String,
    },
    /// A newer Kuma wrote it.
    #[error("the ledger {path} has format {found}, this version of Kuma reads up to {FORMAT}; use the newer version")]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
    /// It is the ledger of another store.
    #[error("{path} is the ledger of another store ({detail}); give the one of this store")]
    OtherStore {
        /// The file.
        path: PathBuf,
        /// What differs.
        detail: String,
    },
    /// It was altered, or another key signed it.
    #[error("the ledger {path} was altered, or this store did not sign it; take another copy of it")]
    Signature {
        /// The file.
        path: PathBuf,
    },
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    Ledger(Head),
    Tombstone(TombstoneLine),
    End(End),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Head {
    format: u32,
    context: String,
    public_key: String,
    as_of: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct TombstoneLine {
    entity: String,
    key: String,
    slot: u16,
    receipt: String,
    at: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct End {
    tombstones: u64,
    sha256: String,
    signature: String,
}

/// A time as it is written in ledgers, manifests, receipts and archives.
pub(crate) fn text_of(at_us: i64) -> String {
    time_text(time_of(at_us))
}

/// The inverse of [`text_of`].
pub(crate) fn us_of(text: &str) -> Option<i64> {
    text.parse::<jiff::Timestamp>().ok().map(jiff::Timestamp::as_microsecond)
}

/// The inverse of [`crate::micros`].
pub(crate) fn time_of(at_us: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_micros(at_us.max(0).unsigned_abs())
}

fn sixteen(text: &str) -> Option<[u8; 16]> {
    hex::decode(text).ok()?.try_into().ok()
}

impl From<&Tombstone> for TombstoneLine {
    fn from(tombstone: &Tombstone) -> Self {
        TombstoneLine {
            entity: tombstone.id_hash.to_hex(),
            key: hex::encode(tombstone.key_id),
            slot: tombstone.slot.number(),
            receipt: hex::encode(tombstone.receipt_id),
            at: text_of(tombstone.at_us),
        }
    }
}

/// A tombstone of its texts, if they are what they should be.
pub(crate) fn tombstone_of(entity: &str, key: &str, slot: u16, receipt: &str, at: &str) -> Option<Tombstone> {
    Some(Tombstone {
        key_id: sixteen(key)?,
        id_hash: EntityHash(sixteen(entity)?),
        slot: Some(slot).filter(|slot| *slot < kuma_shard::SLOTS).map(|slot| Slot::new(slot.into()))?,
        receipt_id: sixteen(receipt)?,
        at_us: us_of(at)?,
    })
}

impl Kuma {
    /// Writes the ledger: every erasure that has begun, by hash and key, signed; flushes. It has no personal data, so keep it wherever
    /// backups are not, and for good: a [`Restore`](crate::Restore) of an older backup needs it to know what was erased since.
    ///
    /// # Errors
    /// [`LedgerError::Write`] if `to` failed, [`LedgerError::Store`] if `node.db` cannot be read. What was written is no ledger then.
    /// # Cancel safety
    /// Not cancel safe: what was written is no ledger. Start again with an empty file.
    pub async fn export_ledger(&self, to: &mut (impl AsyncWrite + Unpin + Send)) -> Result<LedgerSummary, LedgerError> {
        // Before the first look, so that what had begun by then is found.
        let as_of = self.inner.now_us();
        let key = self.vault().node_key();
        let (context, public_key) = (self.context().to_owned(), key.public().to_string());
        let head = Head { format: FORMAT, context, public_key, as_of: text_of(as_of) };
        let mut sha256 = Sha256::new();
        let mut buffer = line(&Line::Ledger(head))?;
        let (mut after, mut tombstones) = (0, 0);
        loop {
            let page = self.inner.node().tombstones(after, PAGE_ROWS).await?;
            for (_, tombstone) in &page {
                buffer.extend(line(&Line::Tombstone(tombstone.into()))?);
            }
            sha256.update(&buffer);
            to.write_all(&buffer).await.map_err(LedgerError::Write)?;
            buffer.clear();
            tombstones += page.len() as u64;
            let Some((last, _)) = page.last() else { break };
            after = *last;
        }
        let end = line(&Line::End(sign(key, tombstones, &sha256.finalize())))?;
        to.write_all(&end).await.map_err(LedgerError::Write)?;
        to.flush().await.map_err(LedgerError::Write)?;
        Ok(LedgerSummary { tombstones, as_of: time_of(as_of) })
    }
}

fn sign(key: &SigningKey, tombstones: u64, sha256: &[u8]) -> End {
    let signature = key.sign(SIGNED_AS, sha256).to_string();
    End { tombstones, sha256: hex::encode(sha256), signature }
}

fn line(line: &Line) -> Result<Vec<u8>, LedgerError> {
    let mut bytes = serde_json::to_vec(line).map_err(|error| LedgerError::Write(error.into()))?;
    bytes.push(b'\n');
    Ok(bytes)
}

/// A ledger that was read and is believed.
pub(crate) struct Ledger {
    pub(crate) as_of_us: i64,
    pub(crate) tombstones: Vec<Tombstone>,
}

impl Ledger {
    /// Reads the ledger at `path`, which must be that of the store `context`, signed with the key `public_key`.
    pub(crate) fn read(path: &Path, context: &str, public_key: &PublicKey) -> Result<Self, LedgerError> {
        let cannot = |source| LedgerError::Read { path: path.to_owned(), source };
        let mut reader = Lines { from: BufReader::new(File::open(path).map_err(cannot)?), path, number: 0 };
        let mut sha256 = Sha256::new();
        let (bytes, first) = reader.next()?;
        sha256.update(&bytes);
        let Line::Ledger(head) = first else { return Err(reader.unreadable("it does not begin as a ledger")) };
        if head.context != context {
            let detail = format!("\"{}\", not \"{context}\"", head.context);
            return Err(LedgerError::OtherStore { path: path.to_owned(), detail });
        }
        if head.public_key != public_key.to_string() {
            let detail = format!("signed with key {:.12}, not {:.12}", head.public_key, public_key.to_string());
            return Err(LedgerError::OtherStore { path: path.to_owned(), detail });
        }
        let as_of_us = us_of(&head.as_of).ok_or_else(|| reader.unreadable("its time is none"))?;
        let mut tombstones = Vec::new();
        loop {
            match reader.next()? {
                (bytes, Line::Tombstone(line)) => {
                    sha256.update(&bytes);
                    let TombstoneLine { entity, key, slot, receipt, at } = line;
                    let tombstone = tombstone_of(&entity, &key, slot, &receipt, &at);
                    tombstones.push(tombstone.ok_or_else(|| reader.unreadable("its tombstone is none"))?);
                }
                (_, Line::End(end)) => {
                    let sha256 = sha256.finalize();
                    let signed = |signature: &Signature| {
                        // Written in one way only.
                        signature.to_string() == end.signature
                            && public_key.verify(SIGNED_AS, &sha256, signature).is_ok()
                    };
                    let is_signed = end.signature.parse().is_ok_and(|signature| signed(&signature));
                    if !is_signed || end.sha256 != hex::encode(sha256) || end.tombstones != tombstones.len() as u64 {
                        return Err(LedgerError::Signature { path: path.to_owned() });
                    }
                    reader.end()?;
                    return Ok(Ledger { as_of_us, tombstones });
                }
                (_, Line::Ledger(_)) => return Err(reader.unreadable("a second ledger begins")),
            }
        }
    }
}

struct Lines<'a> {
    from: BufReader<File>,
    path: &'a Path,
    number: u64,
}

impl Lines<'_> {
    fn unreadable(&self, detail: impl Into<String>) -> LedgerError {
        LedgerError::Unreadable { path: self.path.to_owned(), line: self.number, detail: detail.into() }
    }

    fn cannot(&self, source: io::Error) -> LedgerError {
        LedgerError::Read { path: self.path.to_owned(), source }
    }

    fn next(&mut self) -> Result<(Vec<u8>, Line), LedgerError> {
        /// The format alone: the rest of a newer ledger may look different.
        #[derive(Deserialize)]
        struct FormatOnly {
            ledger: Format,
        }
        #[derive(Deserialize)]
        struct Format {
            format: u32,
        }
        self.number += 1;
        let mut bytes = Vec::new();
        let read = self.from.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut bytes);
        read.map_err(|error| self.cannot(error))?;
        if bytes.last() != Some(&b'\n') {
            return Err(self.unreadable("it ends before its last line"));
        }
        if self.number == 1
            && let Ok(FormatOnly { ledger: Format { format } }) = serde_json::from_slice(&bytes)
            && format > FORMAT
        {
            return Err(LedgerError::Newer { path: self.path.to_owned(), found: format });
        }
        // What stands in it is not repeated.
        let line = serde_json::from_slice(&bytes).map_err(|_| self.unreadable("it is not a line of a ledger"))?;
        Ok((bytes, line))
    }

    fn end(&mut self) -> Result<(), LedgerError> {
        let more = self.from.fill_buf().map(|more| !more.is_empty());
        match more.map_err(|error| self.cannot(error))? {
            true => Err(self.unreadable("something follows its last line")),
            false => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tombstone(number: u8) -> Tombstone {
        Tombstone {
            key_id: [number; 16],
            id_hash: EntityHash([0x0a; 16]),
            slot: Slot::new(17),
            receipt_id: [number; 16],
            at_us: 1_357_020_000_000_001,
        }
    }

    fn written(key: &SigningKey, tombstones: u8) -> Vec<u8> {
        let head = Head {
            format: FORMAT,
            context: "payments".to_owned(),
            public_key: key.public().to_string(),
            as_of: text_of(1_357_020_000_000_002),
        };
        let mut bytes = line(&Line::Ledger(head)).unwrap();
        for number in 1..=tombstones {
            bytes.extend(line(&Line::Tombstone((&tombstone(number)).into())).unwrap());
        }
        let end = sign(key, tombstones.into(), &Sha256::digest(&bytes));
        bytes.extend(line(&Line::End(end)).unwrap());
        bytes
    }

    fn read(bytes: &[u8], key: &SigningKey) -> Result<Ledger, LedgerError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        Ledger::read(file.path(), "payments", &key.public())
    }

    #[test]
    fn a_ledger_is_read_as_it_was_written() {
        let key = SigningKey::generate();
        let ledger = read(&written(&key, 3), &key).unwrap();
        assert_eq!((ledger.as_of_us, ledger.tombstones), (1_357_020_000_000_002, (1..=3).map(tombstone).collect()));
        assert!(read(&written(&key, 0), &key).unwrap().tombstones.is_empty());
    }

    #[test]
    fn the_lines_are_pinned() {
        let key = SigningKey::generate();
        let text = String::from_utf8(written(&key, 1)).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines[0],
            format!(
                r#"{{"ledger":{{"format":1,"context":"payments","public_key":"{}","as_of":"2013-01-01T06:00:00.000002Z"}}}}"#,
                key.public()
            )
        );
        assert_eq!(
            lines[1],
            r#"{"tombstone":{"entity":"0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a","key":"01010101010101010101010101010101","slot":17,"receipt":"01010101010101010101010101010101","at":"2013-01-01T06:00:00.000001Z"}}"#
        );
        assert!(lines[2].starts_with(r#"{"end":{"tombstones":1,"sha256":""#) && lines.len() == 3);
    }

    #[test]
    fn a_ledger_that_is_cut_altered_or_of_another_store_is_refused() {
        let key = SigningKey::generate();
        let bytes = written(&key, 2);
        for cut in 0..bytes.len() {
            assert!(read(&bytes[..cut], &key).is_err(), "cut at {cut}");
        }
        for at in 0..bytes.len() {
            let mut altered = bytes.clone();
            for bit in 0..8 {
                altered[at] = bytes[at] ^ 1 << bit;
                assert!(read(&altered, &key).is_err(), "bit {bit} of byte {at}");
            }
        }
        let lines: Vec<&[u8]> = bytes.split_inclusive(|byte| *byte == b'\n').collect();
        assert!(matches!(read(&[lines[0], lines[1], lines[3]].concat(), &key), Err(LedgerError::Signature { .. })));
        assert!(matches!(read(&[&bytes[..], b"x"].concat(), &key), Err(LedgerError::Unreadable { .. })));
        let other = SigningKey::generate();
        assert!(matches!(read(&bytes, &other), Err(LedgerError::OtherStore { .. })));
        let text = String::from_utf8(bytes).unwrap();
        let newer = text.replace("\"format\":1", "\"format\":2");
        assert!(matches!(read(newer.as_bytes(), &key), Err(LedgerError::Newer { found: 2, .. })));
        let renamed = text.replace("payments", "payment5");
        assert!(matches!(read(renamed.as_bytes(), &key), Err(LedgerError::OtherStore { .. })));
        assert!(matches!(read(b"", &key), Err(LedgerError::Unreadable { line: 1, .. })));
        assert!(read(&[b'['; 100_000], &key).is_err());
    }
}
