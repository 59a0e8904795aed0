//! Verifying a receipt: whether what it says holds now, in the live files.
//!
//! Each check says what it looked at and what it found; one that could not be made is not one that passed.

use std::{fmt, path::Path};

use kuma_shard::{CopyId, EntityRow, Residue, Slot, Tombstone};

use crate::{
    Entity, Handle, Kuma, RawHandle, Receipt,
    scan::{self, Needle},
    shard_core::ShardCore,
};

/// Shorter ids are found everywhere by chance.
const NEEDLE_BYTES_MIN: usize = 8;
/// A page may be looked at while it is being written.
const LOOKS: usize = 3;

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// What.
    pub what: String,
    /// What was found, and is as it should be; or what is not.
    pub outcome: Result<String, String>,
}

/// What [`Kuma::verify_receipt`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReceiptVerification {
    /// In the order in which they were made.
    pub checks: Vec<Check>,
}

impl ReceiptVerification {
    /// Whether every check passed.
    pub fn is_clean(&self) -> bool {
        self.checks.iter().all(|check| check.outcome.is_ok())
    }

    fn check<E: fmt::Display>(&mut self, what: impl Into<String>, outcome: Result<impl Into<String>, E>) {
        let outcome = outcome.map(Into::into).map_err(|error| error.to_string());
        self.checks.push(Check { what: what.into(), outcome });
    }
}

/// A line for each check.
impl fmt::Display for ReceiptVerification {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.checks.iter().try_for_each(|check| match &check.outcome {
            Ok(found) => writeln!(f, "ok      {}: {found}", check.what),
            Err(found) => writeln!(f, "FAILED  {}: {found}", check.what),
        })
    }
}

/// What a receipt names, as bytes.
struct Named {
    receipt_id: [u8; 16],
    id_hash: [u8; 16],
    key_id: [u8; 16],
    slot: Slot,
}

impl Named {
    fn by(receipt: &Receipt) -> Option<Self> {
        let bytes = |text: &str| hex::decode(text).ok()?.try_into().ok();
        let statement = &receipt.receipt;
        Some(Named {
            receipt_id: statement.id.0,
            id_hash: bytes(&statement.entity)?,
            key_id: bytes(&statement.key)?,
            slot: Slot::new(statement.slot.into()),
        })
    }
}

impl Kuma {
    /// Looks at the live files again: whether the receipt is this store's and unaltered, its entity's key is destroyed, its rows are
    /// stubs, and no unused space of the files with keys or sealed bytes holds a byte.
    ///
    /// The files are read by a child process ([`Options::file_reader`](crate::Options::file_reader)); appends go on meanwhile.
    /// [`RawHandle::verify_receipt`] also looks for the id itself.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn verify_receipt(&self, receipt: &Receipt) -> ReceiptVerification {
        self.look_at(receipt, None).await
    }

    async fn look_at(&self, receipt: &Receipt, id: Option<&str>) -> ReceiptVerification {
        let mut found = ReceiptVerification::default();
        let own = self.public_key();
        found.check("signature", receipt.verify(&own).map(|()| format!("by this store's key {own}")));
        let Some(named) = Named::by(receipt) else {
            found.check("names", Err::<String, _>("the entity or the key is not 32 hex digits"));
            return found;
        };
        found.check("node.db", self.look_at_node(receipt, &named).await);
        found.check("keys.db", self.look_at_key(&named).await);
        match self.inner.core_of_slot(named.slot) {
            Some(core) => found.check(core.shard.file(), look_at_shard(&core, &named).await),
            None => found.check(format!("slot {}", named.slot), Err::<String, _>("its shard is out of use")),
        }
        self.scan(&mut found, id).await;
        found
    }

    async fn look_at_node(&self, receipt: &Receipt, named: &Named) -> Result<String, String> {
        let node = self.inner.node();
        let tombstones = node.tombstones_of(kuma_shard::EntityHash(named.id_hash)).await;
        let is_it =
            |tombstone: &Tombstone| tombstone.key_id == named.key_id && tombstone.receipt_id == named.receipt_id;
        if !tombstones.map_err(|error| error.to_string())?.iter().any(is_it) {
            return Err("there is no tombstone of this erasure".to_owned());
        }
        match node.receipt(named.receipt_id).await.map_err(|error| error.to_string())? {
            None => Err("the erasure is not complete".to_owned()),
            Some(body) if body.parse::<Receipt>().is_ok_and(|stored| stored == *receipt) => {
                Ok("holds the tombstone and this receipt".to_owned())
            }
            Some(body) if body.parse::<Receipt>().is_ok_and(|stored| stored.agrees_with(receipt)) => {
                Ok("holds the tombstone and a receipt that agrees; subscribers have confirmed since".to_owned())
            }
            Some(_) => Err("holds another receipt of this erasure".to_owned()),
        }
    }

    async fn look_at_key(&self, named: &Named) -> Result<String, String> {
        let row = self.vault().keys.get(named.key_id).await.map_err(|error| error.to_string())?;
        match row {
            None => Ok("has no such key".to_owned()),
            Some(row) if row.is_destroyed() => Ok("the key is destroyed, its name stays".to_owned()),
            Some(_) => Err("THE KEY IS THERE".to_owned()),
        }
    }

    /// Looks at the bytes of every file.
    async fn scan(&self, found: &mut ReceiptVerification, id: Option<&str>) {
        let directory = self.inner.data_dir().to_owned();
        let files = match scan::files(&directory) {
            Ok(files) => files,
            Err(error) => return found.check("files", Err::<String, _>(error)),
        };
        let name = |path: &Path| path.strip_prefix(&directory).unwrap_or(path).display().to_string();
        let id = id.filter(|id| id.len() >= NEEDLE_BYTES_MIN);
        let (mut bytes, mut holding) = (0, Vec::new());
        let mut unread = None;
        for path in &files {
            let roots = match self.roots_of(&name(path)).await {
                Ok(roots) => roots,
                Err(why) => {
                    found.check(name(path), Err::<String, _>(why));
                    None
                }
            };
            for look in 1..=LOOKS {
                let mut residue = Residue::default();
                let mut needle = Needle::new(id.unwrap_or_default().as_bytes());
                let read = self.inner.file_reader().read(path, |chunk| {
                    if roots.is_some() {
                        residue.feed(chunk);
                    }
                    if id.is_some() {
                        needle.feed(chunk);
                    }
                });
                match read.await {
                    Ok(read) => bytes += read,
                    // One that is gone by now holds nothing.
                    Err(_) if !path.exists() => break,
                    Err(error) => {
                        unread.get_or_insert(format!("{}: {error}", name(path)));
                        break;
                    }
                }
                if needle.found {
                    holding.push(name(path));
                }
                let Some(roots) = &roots else { break };
                let pages = residue.found(roots);
                if pages.unclean == 0 || look == LOOKS {
                    let outcome = match pages.unclean {
                        0 => Ok(format!("unused space of {} pages is zero", pages.leaves)),
                        unclean => Err(format!("{unclean} of {} pages hold bytes of no row", pages.leaves)),
                    };
                    found.check(name(path), outcome);
                    break;
                }
            }
        }
        let scanned = format!("{} files, {bytes} bytes", files.len());
        match (unread, id) {
            (Some(why), _) => found.check("files", Err::<String, _>(why)),
            (None, None) => found.check(
                "files",
                Ok::<_, String>(format!("{scanned}; no id was given, or too short a one, to look for")),
            ),
            (None, Some(_)) if holding.is_empty() => {
                found.check("files", Ok::<_, String>(format!("{scanned}; the id is in none of them")));
            }
            (None, Some(_)) => found.check("files", Err::<String, _>(format!("the id is in {}", holding.join(", ")))),
        }
    }

    /// The tables of a file whose unused space is to be zero; none if it is not such a file.
    async fn roots_of(&self, name: &str) -> Result<Option<Vec<u32>>, String> {
        if name == "keys.db" {
            return self.vault().keys.key_roots().await.map(Some).map_err(|error| error.to_string());
        }
        for (_, open) in self.open_shards() {
            if let Ok(core) = open
                && core.shard.file() == name
            {
                return core.shard.sealed_roots().await.map(Some).map_err(|error| error.to_string());
            }
        }
        Ok(None)
    }
}

async fn look_at_shard(core: &ShardCore, named: &Named) -> Result<String, String> {
    let words = |error: kuma_shard::ReadError| error.to_string();
    let lives = core.shard.lives(CopyId::LIVE, kuma_shard::EntityHash(named.id_hash)).await.map_err(words)?;
    let Some(row) = lives.into_iter().find(|row| row.key_id == named.key_id) else {
        return Ok("holds nothing of it".to_owned());
    };
    let EntityRow { erased_at_us, sealed_id, .. } = &row;
    if erased_at_us.is_none() || !sealed_id.is_empty() {
        return Err("THE ENTITY IS NOT ERASED".to_owned());
    }
    let mut after = 0;
    let mut stubs = 0_u64;
    loop {
        let page = core.shard.read_log(&row, after, 1024).await.map_err(words)?;
        let Some(last) = page.last() else { break };
        after = last.version;
        stubs += page.len() as u64;
        if !page.iter().all(kuma_shard::LogRow::is_stub) {
            return Err("A COMMIT OF IT IS THERE".to_owned());
        }
    }
    if core.shard.find_snapshot(row.eid).await.map_err(words)?.is_some() {
        return Err("A SNAPSHOT OF IT IS THERE".to_owned());
    }
    if !core.shard.append_keys(&row, 1).await.map_err(words)?.is_empty() {
        return Err("AN IDEMPOTENCY KEY OF IT IS THERE".to_owned());
    }
    Ok(format!("life {}: {stubs} stubs, no id, no snapshot, no idempotency key", row.life))
}

impl RawHandle {
    /// Looks at the live files again, also for the id itself (if it has at least 8 bytes), and whether the receipt is of this entity. See
    /// [`Kuma::verify_receipt`].
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn verify_receipt(&self, receipt: &Receipt) -> ReceiptVerification {
        let kuma = Kuma { inner: self.store().clone() };
        let (id, of) = match self.who() {
            Ok(who) => {
                let is_of = who.identity.hash.to_hex() == receipt.receipt.entity;
                let of = match is_of {
                    true => Ok("the receipt is of this entity".to_owned()),
                    false => Err("the receipt is of another entity".to_owned()),
                };
                (Some(&*who.identity.id), of)
            }
            Err(refused) => (None, Err(refused.to_string())),
        };
        let mut found = kuma.look_at(receipt, id).await;
        found.check("entity", of);
        found
    }
}

impl<E: Entity> Handle<E> {
    /// Looks at the live files again. See [`RawHandle::verify_receipt`].
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn verify_receipt(&self, receipt: &Receipt) -> ReceiptVerification {
        self.raw().verify_receipt(receipt).await
    }
}
