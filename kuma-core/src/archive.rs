//! An archive: all that is held about one entity, in one file. What a person who asks is given, and what is kept before an erasure.
//!
//! Invariants:
//! - It is an export with parts between its lines that say what else is held. [`Kuma::import`] reads it like any export: what is no
//!   event it passes over, because it follows from the events.
//! - Memory is bounded as by an export, but for one state.

use base64::{Engine, engine::general_purpose::STANDARD};
use kuma_crypto::{IdHash, KeyId, SnapshotPlace, open_snapshot};
use serde::Serialize;
use tokio::io::AsyncWrite;

use crate::{
    Entity, ExportError, Handle, Manifest, RawHandle, ReadError,
    export::Export,
    ledger::text_of,
    ndjson::{LINE_BYTES_MAX, write_archive},
    projections::{HeldRows, held_rows},
    replay::Opener,
    shard_core::ShardCore,
};

/// A part of an archive that is no event.
#[derive(Serialize)]
#[serde(tag = "part", rename_all = "snake_case")]
enum Part<'a> {
    /// What the store itself says of the entity.
    Entity {
        kind: &'a str,
        id: &'a str,
        /// The keyed hash by which logs and receipts name it, in hex.
        hash: String,
        life: u32,
        slot: u16,
        /// The name of its key, in hex.
        key: String,
        created_at: String,
        archived_at: String,
        /// How many idempotency keys are kept, as keyed hashes that cannot be turned back.
        idempotency_keys: usize,
    },
    /// What its events add up to. Without data if it has no JSON form, or too large a one.
    State { version: u64, data: Option<serde_json::Value> },
    /// The state as it is saved to spare replays: MessagePack, base64.
    Snapshot { version: u64, schema: String, bytes: String },
    /// What read models hold of it.
    Projections { projections: Vec<HeldRows> },
}

/// Idempotency keys that are counted.
const KEYS_MAX: u32 = 1_000_000;

impl RawHandle {
    /// Writes all that is held about the entity into one archive: what the store says of it, its whole history with metadata, its state and its
    /// snapshot. It begins and ends like [`RawHandle::export`] does, and [`Kuma::import`](crate::Kuma::import) reads it.
    ///
    /// **It is not sealed**: it holds the entity's id and events in clear. Commits that are appended meanwhile may or may not be in it: see to it
    /// that nobody appends, if the entity is erased afterwards.
    ///
    /// # Errors
    /// As [`RawHandle::export`].
    /// # Cancel safety
    /// As [`RawHandle::export`].
    pub async fn archive(&self, to: &mut (impl AsyncWrite + Unpin + Send)) -> Result<Manifest, ExportError> {
        let mut export = Export::new(to);
        if let Some(opener) = self.opener().await? {
            let core = self.core()?;
            self.head(core, &opener, &mut export).await?;
            export.entity(self).await?;
            self.state(core, &opener, &mut export).await?;
        }
        export.finish().await
    }

    async fn head<W: AsyncWrite + Unpin>(
        &self,
        core: &ShardCore,
        opener: &Opener,
        export: &mut Export<'_, W>,
    ) -> Result<(), ExportError> {
        let who = self.who().map_err(ReadError::from)?;
        let row = &opener.row;
        let unreadable = |error: kuma_shard::ReadError| ExportError::from(ReadError::unreadable(row.id_hash, error));
        let idempotency_keys = core.shard.append_keys(row, KEYS_MAX).await.map_err(unreadable)?.len();
        export.part(&Part::Entity {
            kind: &row.kind,
            id: &who.identity.id,
            hash: row.id_hash.to_hex(),
            life: row.life,
            slot: row.slot.number(),
            key: hex::encode(row.key_id),
            created_at: text_of(row.created_at_us),
            archived_at: text_of(self.store().now_us()),
            idempotency_keys,
        })
    }

    async fn state<W: AsyncWrite + Unpin>(
        &self,
        core: &ShardCore,
        opener: &Opener,
        export: &mut Export<'_, W>,
    ) -> Result<(), ExportError> {
        let row = &opener.row;
        let unreadable = |error: kuma_shard::ReadError| ExportError::from(ReadError::unreadable(row.id_hash, error));
        // An event that the kind's type does not know is archived all the same.
        if let Ok((data, version)) = self.read().await {
            let is_small = serde_json::to_vec(&data).is_ok_and(|text| text.len() < LINE_BYTES_MAX / 2);
            export.part(&Part::State { version: version.0, data: is_small.then_some(data) })?;
        }
        if let Some(snapshot) = core.shard.find_snapshot(row.eid).await.map_err(unreadable)? {
            let place = SnapshotPlace {
                kind: &row.kind,
                id_hash: IdHash(row.id_hash.0),
                version: snapshot.version,
                schema: snapshot.schema,
                key_id: KeyId(row.key_id),
            };
            // One that does not open is of no use to anybody.
            if let Ok(plaintext) = open_snapshot(&opener.key, &place, &snapshot.body)
                && plaintext.len() < LINE_BYTES_MAX / 2
            {
                let schema = format!("{:016x}", snapshot.schema);
                let bytes = STANDARD.encode(plaintext.get(8..).unwrap_or_default());
                export.part(&Part::Snapshot { version: snapshot.version, schema, bytes })?;
            }
        }
        let who = self.who().map_err(ReadError::from)?;
        let (kind, id) = (row.kind.clone(), who.identity.id.to_string());
        let (data_dir, options) = (self.store().data_dir().to_owned(), self.store().file_options().clone());
        let held = tokio::task::spawn_blocking(move || held_rows(&data_dir, &options, &kind, &id)).await;
        let held = held.map_err(std::io::Error::other).and_then(|held| held).map_err(ExportError::Models)?;
        export.part(&Part::Projections { projections: held })
    }
}

impl<E: Entity> Handle<E> {
    /// Writes all that is held about the entity into one archive. See [`RawHandle::archive`].
    ///
    /// # Errors
    /// As [`RawHandle::export`].
    /// # Cancel safety
    /// As [`RawHandle::export`].
    pub async fn archive(&self, to: &mut (impl AsyncWrite + Unpin + Send)) -> Result<Manifest, ExportError> {
        self.raw().archive(to).await
    }
}

impl<W: AsyncWrite + Unpin> Export<'_, W> {
    fn part(&mut self, part: &Part<'_>) -> Result<(), ExportError> {
        write_archive(self.buffer(), part).map_err(|error| ExportError::Write(error.into()))
    }
}
