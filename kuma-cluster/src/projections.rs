//! What projections of a node are fed with: a subscription to the whole cluster, page by page.
//!
//! A model keeps the seqs of all slots itself, in the transaction with what their events did; what is kept of the subscription beside them are the
//! positions of disks, which save work and decide nothing (docs/adr/0028-projections-of-a-cluster.md).

use std::sync::{Arc, Weak};

use futures_util::future::BoxFuture;
use kuma_core::{ClusterGauge, ClusterLogs, ClusterPage, ClusterPlace, ClusterReader, Filter};

use crate::{
    shared::Shared,
    slot_checkpoint::{EVER, SlotCheckpoint},
    subscribe::{StartAt, Subscription, seqs_now},
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
            let marked = mark.and_then(|mark| mark.parse::<SlotCheckpoint>().ok());
            let begun = marked.unwrap_or_else(|| {
                let told = *shared.slots.told().borrow();
                SlotCheckpoint::new(shared.state().cluster, (shared.own, told), EVER)
            });
            let start = StartAt::Checkpoint(SlotCheckpoint { seqs, ..begun });
            let opened = Subscription::open(&shared, filter, start).await.map_err(|error| error.to_string())?;
            Ok(Box::new(Reader(opened)) as Box<dyn ClusterReader>)
        })
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
