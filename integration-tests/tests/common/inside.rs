//! A closed store, looked at and changed from below: through its shard's own interface, without any of the code above it.

use std::path::Path;

use kuma_core::EntityHash;
use kuma_shard::{CopyId, DataDir, EntityRow, FileOptions, Shard, ShardOptions, SnapshotRow};
use ractor::{Actor, ActorProcessingErr, ActorRef, SupervisionEvent};
use tokio::sync::oneshot;

/// Its children may end as they like.
struct Root;

impl Actor for Root {
    type Msg = ();
    type State = ();
    type Arguments = ();

    async fn pre_start(&self, _me: ActorRef<()>, (): ()) -> Result<(), ActorProcessingErr> {
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        _me: ActorRef<()>,
        _: SupervisionEvent,
        _: &mut (),
    ) -> Result<(), ActorProcessingErr> {
        Ok(())
    }
}

/// The first shard of a store that is closed.
pub(crate) struct Inside {
    shard: Shard,
    data_dir: DataDir,
}

impl Inside {
    pub(crate) async fn open(path: &Path) -> Inside {
        let data_dir = DataDir::open(path, "kuma", None, 1).unwrap();
        let options = ShardOptions {
            number: 0,
            shards: data_dir.shards(),
            directory: path.to_owned(),
            disk_id: data_dir.disk_id(),
            file: FileOptions::default(),
            queue_bytes_max: 1 << 20,
            owns_slots: true,
        };
        let (root, _) = Actor::spawn(None, Root, ()).await.unwrap();
        Inside { shard: Shard::open(&options, root.get_cell()).await.unwrap(), data_dir }
    }

    pub(crate) async fn close(self) {
        self.shard.stop().await;
        self.data_dir.release();
    }

    pub(crate) async fn entity(&self, entity: EntityHash) -> Option<EntityRow> {
        self.shard.find_entity(CopyId::LIVE, entity).await.unwrap()
    }

    pub(crate) async fn snapshot(&self, entity: EntityHash) -> Option<SnapshotRow> {
        let eid = self.entity(entity).await?.eid;
        self.shard.find_snapshot(eid).await.unwrap()
    }

    /// Puts a snapshot in the place of what is there.
    pub(crate) async fn put(&self, snapshot: SnapshotRow) {
        // One of another schema replaces any.
        for row in [SnapshotRow { schema: !snapshot.schema, ..snapshot.clone() }, snapshot.clone()] {
            let (told, settled) = oneshot::channel();
            self.shard.save_snapshot(row, Box::new(move |result| told.send(result).unwrap()));
            settled.await.unwrap().unwrap();
        }
        assert_eq!(self.shard.find_snapshot(snapshot.eid).await.unwrap(), Some(snapshot));
    }
}

/// The snapshot of an entity of a closed store.
pub(crate) async fn snapshot(path: &Path, entity: EntityHash) -> Option<SnapshotRow> {
    let inside = Inside::open(path).await;
    let snapshot = inside.snapshot(entity).await;
    inside.close().await;
    snapshot
}
