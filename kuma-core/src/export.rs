//! Export: an entity's history, or that of all entities, as lines of text (see `ndjson.rs`).
//!
//! Invariants:
//! - Memory is bounded by a page of commits and a few lines, whatever is exported and however slow the writer.
//! - Only whole commits are written, each of them verified and opened. The manifest is the last line; an export that failed or was
//!   cut has none, which an import notices.
//! - What cannot be read ends the export: a file that silently lacks an entity would be taken for a whole one.

use std::{io, pin::pin, sync::Arc};

use futures_util::TryStreamExt;
use kuma_crypto::KeyId;
use kuma_shard::{EntityHash, EntityRow};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncWrite, AsyncWriteExt};

use crate::{
    Direction, Entity, Handle, Kuma, RawHandle, ReadError, Refused, Unavailable, VaultError, Version, audit,
    history::{self, CommitEvents, Span},
    kind::{DocumentKind, Kind},
    kind_options::Tuning,
    ndjson::{self, CommitSpan, EventHead, LINE_BYTES_MAX, Manifest, MetadataLine},
    replay::Opener,
    shard_core::ShardCore,
};

/// Bytes that are gathered before they are handed to the writer.
const BUFFER_BYTES: usize = 64 << 10;
/// Entities that are listed at once.
const PAGE_ROWS: u32 = 256;

/// Why an export ended early. What was written until then has no manifest, so that no import takes it for a whole export.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// An entity cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The entities of a shard cannot be listed.
    #[error("the entities of shard {shard} cannot be listed: {cause}")]
    List {
        /// The shard.
        shard: u16,
        /// Why.
        #[source]
        cause: kuma_shard::ReadError,
    },
    /// The row that says who an entity is, is damaged.
    #[error(
        "entity number {number} of shard {shard} is damaged, so that it is not known which one it is: {why}; restore it from a backup"
    )]
    Damaged {
        /// The shard.
        shard: u16,
        /// The number of the entity in it.
        number: i64,
        /// Its hash, if that can be told.
        entity: Option<EntityHash>,
        /// What is wrong.
        why: String,
    },
    /// An event has so much metadata that no import would read its line.
    #[error(
        "entity {entity}: the line of version {version} would have {bytes} bytes, an import reads at most {bytes_max}"
    )]
    LineTooLong {
        /// The entity.
        entity: EntityHash,
        /// The version of the event.
        version: Version,
        /// What the line would have.
        bytes: usize,
        /// What an import reads.
        bytes_max: usize,
    },
    /// What read models hold of the entity cannot be read. Only of an archive.
    #[error("what read models hold of the entity cannot be read: {0}")]
    Models(#[source] io::Error),
    /// The writer failed; nothing is wrong with the store.
    #[error("the export cannot be written: {0}")]
    Write(#[source] io::Error),
}

/// How far [`Kuma::export_all`] has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExportProgress {
    /// Entities exported.
    pub entities: u64,
    /// Their commits.
    pub commits: u64,
    /// Their events.
    pub events: u64,
    /// Bytes written.
    pub bytes: u64,
}

impl RawHandle {
    /// Writes the entity's whole history, one event a line, oldest first, and a manifest at the end; flushes. An entity without
    /// events gives a manifest alone. [`Kuma::import`] reads it into this or another store: the same events, of the same commits,
    /// at the same versions, data equal to the byte.
    ///
    /// Events are written in the shape of the kind's current schema version. Commits that are appended meanwhile may or may not be
    /// in it, but never a part of one. **The export is not sealed**: it holds the entity's id and events in clear.
    ///
    /// # Errors
    /// [`ExportError::Write`] if `to` failed; all other variants tell of the store.
    /// # Cancel safety
    /// Not cancel safe: what was written has no manifest. Start again with an empty file.
    pub async fn export(&self, to: &mut (impl AsyncWrite + Unpin + Send)) -> Result<Manifest, ExportError> {
        let mut export = Export::new(to);
        export.entity(self).await?;
        export.finish().await
    }
}

impl<E: Entity> Handle<E> {
    /// Writes the entity's whole history. See [`RawHandle::export`].
    ///
    /// # Errors
    /// As [`RawHandle::export`].
    /// # Cancel safety
    /// As [`RawHandle::export`].
    pub async fn export(&self, to: &mut (impl AsyncWrite + Unpin + Send)) -> Result<Manifest, ExportError> {
        self.raw().export(to).await
    }
}

impl Kuma {
    /// Writes the history of every entity of the store, one entity after the other, and one manifest at the end. Erased entities have
    /// no history any more and are left out; one that is erased just while it is written ends the export: start again. `progress` is called after
    /// each entity.
    ///
    /// Each entity is as [`RawHandle::export`] writes it. Appends go on meanwhile: an entity is whole as of the moment when it was
    /// read, and one that is new since the export began may or may not be there. Kinds with a Rust type are to be made known first
    /// ([`Kuma::register`]): events of kinds that are not are written as they are stored, without upcasting.
    ///
    /// # Errors
    /// [`ExportError::Write`] if `to` failed; all other variants tell of the store. The export ends at the first entity that cannot be
    /// read; export the others one by one if they are wanted without it.
    /// # Cancel safety
    /// As [`RawHandle::export`].
    pub async fn export_all(
        &self,
        to: &mut (impl AsyncWrite + Unpin + Send),
        mut progress: impl FnMut(&ExportProgress) + Send,
    ) -> Result<Manifest, ExportError> {
        let mut export = Export::new(to);
        for (shard, open) in self.open_shards() {
            let core = open.map_err(|why| {
                let why = why.to_owned();
                ReadError::from(Unavailable::ShardOutOfUse { shard, why })
            })?;
            let mut after = 0;
            loop {
                let page = core.shard.entities(after, PAGE_ROWS).await;
                let page = page.map_err(|cause| ExportError::List { shard, cause })?;
                let is_last = page.len() < PAGE_ROWS as usize;
                for row in page {
                    let row = row.map_err(|number| ExportError::Damaged {
                        shard,
                        number,
                        entity: None,
                        why: "its row does not match its checksum".to_owned(),
                    })?;
                    after = row.eid;
                    // Neither what is erased nor what only this store can write.
                    if row.erased_at_us.is_none() && !core.is_erasing(&row) && !audit::is_reserved(&row.kind) {
                        self.export_unless_erased(core, row, &mut export).await?;
                        progress(&export.progress);
                    }
                }
                if is_last {
                    break;
                }
            }
        }
        export.finish().await
    }

    /// An entity that is erased meanwhile is left out, if nothing of it was written yet.
    async fn export_unless_erased<W: AsyncWrite + Unpin>(
        &self,
        core: &ShardCore,
        row: EntityRow,
        export: &mut Export<'_, W>,
    ) -> Result<(), ExportError> {
        let before = export.progress.commits;
        let exported = match self.handle_of(core, row).await {
            Ok(handle) => export.entity(&handle).await,
            Err(error) => Err(error),
        };
        match exported {
            Err(ExportError::Read(ReadError::Refused(Refused::Erased { .. }))) if export.progress.commits == before => {
                Ok(())
            }
            other => other,
        }
    }

    /// The handle of a stored entity.
    async fn handle_of(&self, core: &ShardCore, row: EntityRow) -> Result<RawHandle, ExportError> {
        let entity = row.id_hash;
        let unreadable = |cause: VaultError| ReadError::unreadable(entity, cause);
        let key = core.vault.key(entity, KeyId(row.key_id)).await.map_err(unreadable)?;
        let opener = Opener { row: Arc::new(row), key };
        let id = opener.id().map_err(|why| ExportError::Damaged {
            shard: core.shard.number(),
            number: opener.row.eid,
            entity: Some(entity),
            why,
        })?;
        let name = &opener.row.kind;
        // Not `Kuma::raw`: a kind that was only exported could not be given its Rust type any more.
        let kind: Arc<dyn Kind> = match self.inner.kinds.read().get(&**name) {
            Some(kind) => kind.clone(),
            None => Arc::new(DocumentKind::new(name, Tuning::default())),
        };
        Ok(RawHandle::new(self.inner.clone(), Ok(kind), name, id.as_bytes()))
    }
}

/// An export on its way.
pub(crate) struct Export<'a, W> {
    to: &'a mut W,
    /// Lines that were not written yet.
    buffer: Vec<u8>,
    digest: Sha256,
    progress: ExportProgress,
}

impl<'a, W: AsyncWrite + Unpin> Export<'a, W> {
    pub(crate) fn new(to: &'a mut W) -> Self {
        Export { to, buffer: Vec::new(), digest: Sha256::new(), progress: ExportProgress::default() }
    }

    /// Where lines of other kinds are put between the events.
    pub(crate) fn buffer(&mut self) -> &mut Vec<u8> {
        &mut self.buffer
    }

    pub(crate) async fn entity(&mut self, handle: &RawHandle) -> Result<(), ExportError> {
        let who = handle.who().map_err(ReadError::from)?;
        let mut commits = pin!(history::commits(handle.clone(), Span::of(..), Direction::Forward));
        let mut is_empty = true;
        while let Some(commit) = commits.try_next().await? {
            is_empty = false;
            self.commit(who.kind.name(), &who.identity.id, who.identity.hash, &commit)?;
            if self.buffer.len() >= BUFFER_BYTES {
                self.write().await?;
            }
        }
        self.progress.entities += u64::from(!is_empty);
        Ok(())
    }

    fn commit(&mut self, kind: &str, id: &str, entity: EntityHash, commit: &CommitEvents) -> Result<(), ExportError> {
        let CommitEvents { first, count, events } = commit;
        let mut at = String::new();
        for event in events {
            // All events of a commit have the same time.
            if at.is_empty() {
                at = ndjson::time_text(event.at);
            }
            let head = EventHead {
                kind,
                id,
                version: event.version.0,
                commit: CommitSpan { first: *first, count: *count },
                name: &event.name,
                schema: event.schema,
                at: &at,
                metadata: event.metadata.as_ref().map(MetadataLine::from),
            };
            let before = self.buffer.len();
            ndjson::write_event(&mut self.buffer, &head, &event.data)
                .map_err(|error| ExportError::Write(error.into()))?;
            let bytes = self.buffer.len() - before;
            if bytes > LINE_BYTES_MAX {
                return Err(ExportError::LineTooLong {
                    entity,
                    version: event.version,
                    bytes,
                    bytes_max: LINE_BYTES_MAX,
                });
            }
        }
        self.progress.commits += 1;
        self.progress.events += u64::from(*count);
        Ok(())
    }

    /// Hands the writer what was gathered.
    async fn write(&mut self) -> Result<(), ExportError> {
        self.digest.update(&self.buffer);
        self.progress.bytes += self.buffer.len() as u64;
        self.to.write_all(&self.buffer).await.map_err(ExportError::Write)?;
        self.buffer.clear();
        Ok(())
    }

    pub(crate) async fn finish(mut self) -> Result<Manifest, ExportError> {
        self.write().await?;
        let ExportProgress { entities, commits, events, .. } = self.progress;
        let sha256 = hex::encode(self.digest.finalize_reset());
        let manifest = Manifest { format: ndjson::FORMAT, entities, commits, events, sha256 };
        ndjson::write_manifest(&mut self.buffer, &manifest).map_err(|error| ExportError::Write(error.into()))?;
        self.write().await?;
        self.to.flush().await.map_err(ExportError::Write)?;
        Ok(manifest)
    }
}
