//! What projections and durable subscriptions of a node are fed with: a subscription to the whole cluster, page by page or event by event.
//!
//! A model keeps the seqs of all slots itself, in the transaction with what their events did; what is kept of the subscription beside them are the
//! positions of disks, which save work and decide nothing (docs/adr/0028-projections-of-a-cluster.md).

use std::sync::{Arc, Weak};

use futures_util::future::BoxFuture;
use kuma_core::{
    ClusterEvents, ClusterGauge, ClusterLogs, ClusterPage, ClusterPlace, ClusterReader, Delivery, EntityHash, FedItem,
    Filter, FollowFrom, Slot, SubscribeError,
};

use crate::{
    shared::Shared,
    slot_checkpoint::{EVER, SlotCheckpoint},
    subscribe::{self, StartAt, Subscription, seqs_now},
    wire::CommitFrame,
};

/// The logs of the cluster that a node is of.
pub(crate) struct Logs(Weak<Shared>);

struct Reader(Subscription);

impl Logs {
    pub(crate) fn new(shared: &Arc<Shared>) -> Arc<Self> {
        Arc::new(Logs(Arc::downgrade(shared)))
    }

    fn shared(&self) -> Result<Arc<Shared>, String> {
        self.0.upgrade().ok_or_else(|| "the node is shutting down".to_owned())
    }
}

impl ClusterLogs for Logs {
    fn ends(&self) -> BoxFuture<'_, Result<Vec<u64>, String>> {
        Box::pin(async {
            let shared = self.shared()?;
            seqs_now(&shared).await.map_err(|slot| match shared.routes.get(slot) {
                Some((_, disk)) => {
                    format!("slot {slot} is out of reach with node {}, or on its way", shared.name_of(disk))
                }
                None => format!("who owns slot {slot} is not known yet"),
            })
        })
    }

    fn read(
        &self,
        filter: Filter,
        ClusterPlace { seqs, mark }: ClusterPlace,
    ) -> BoxFuture<'_, Result<Box<dyn ClusterReader>, String>> {
        Box::pin(async move {
            let shared = self.shared()?;
            let told = *shared.slots.told().borrow();
            let start = SlotCheckpoint { seqs, ..begun(&shared, mark, told, EVER) };
            let opened = Subscription::open(&shared, filter, StartAt::Checkpoint(start)).await;
            Ok(Box::new(Reader(opened.map_err(|error| error.to_string())?)) as Box<dyn ClusterReader>)
        })
    }

    fn follow(
        &self,
        filter: Filter,
        FollowFrom { place: ClusterPlace { seqs, mark }, erasures, since_us }: FollowFrom,
    ) -> BoxFuture<'_, Result<Box<dyn ClusterEvents>, SubscribeError>> {
        Box::pin(async move {
            let shared = self.shared().map_err(|_| SubscribeError::ShuttingDown)?;
            let start = begun(&shared, mark, erasures, since_us);
            let start = SlotCheckpoint { seqs, told: (shared.own, erasures), since_us, ..start };
            let opened = Subscription::open(&shared, filter, StartAt::Checkpoint(start)).await.map_err(in_words)?;
            Ok(Box::new(opened) as Box<dyn ClusterEvents>)
        })
    }

    fn commit(
        &self,
        filter: Filter,
        slot: Slot,
        seq: u64,
        entity: EntityHash,
    ) -> BoxFuture<'_, Result<Option<FedItem>, SubscribeError>> {
        Box::pin(async move {
            let shared = self.shared().map_err(|_| SubscribeError::ShuttingDown)?;
            let frame = CommitFrame { filter, slot, seq, entity };
            subscribe::commit_of(&shared, frame).await.map_err(|why| SubscribeError::Cluster { why })
        })
    }
}

/// A checkpoint as its mark says; of one that has none, at its beginning.
fn begun(shared: &Shared, mark: Option<String>, told: i64, since_us: i64) -> SlotCheckpoint {
    let marked = mark.and_then(|mark| mark.parse::<SlotCheckpoint>().ok());
    marked.unwrap_or_else(|| SlotCheckpoint::new(shared.state().cluster, (shared.own, told), since_us))
}

fn in_words(error: subscribe::SubscribeError) -> SubscribeError {
    match error {
        subscribe::SubscribeError::Store(error) => error,
        subscribe::SubscribeError::ShuttingDown => SubscribeError::ShuttingDown,
        error => SubscribeError::Cluster { why: error.to_string() },
    }
}

impl ClusterEvents for Subscription {
    fn next(&mut self) -> BoxFuture<'_, Result<Delivery, SubscribeError>> {
        Box::pin(async { Subscription::next(self).await.map_err(in_words) })
    }

    fn next_before<'a>(&'a mut self, ends: &'a [u64]) -> BoxFuture<'a, Result<Option<Delivery>, SubscribeError>> {
        Box::pin(async { Subscription::next_before(self, ends).await.map_err(in_words) })
    }

    fn place(&self) -> ClusterPlace {
        let mut checkpoint = self.checkpoint();
        let seqs = std::mem::take(&mut checkpoint.seqs);
        ClusterPlace { seqs, mark: Some(checkpoint.without_seqs().to_string()) }
    }

    fn erasures(&self) -> i64 {
        self.told_up_to()
    }

    fn last_place(&self) -> Option<(Slot, u64)> {
        Subscription::last_place(self)
    }
}

impl ClusterReader for Reader {
    fn page(&mut self) -> BoxFuture<'_, Result<ClusterPage, String>> {
        Box::pin(async {
            let (items, passed) = self.0.page().await.map_err(|error| error.to_string())?;
            // Its seqs are the model's.
            let mark = self.0.checkpoint().without_seqs().to_string();
            Ok(ClusterPage { items, passed, mark })
        })
    }

    fn gauge(&self) -> Arc<dyn ClusterGauge> {
        Arc::new(self.0.gauge())
    }
}
