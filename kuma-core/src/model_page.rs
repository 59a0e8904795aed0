//! A page as a model takes it: of one of this store's shards, or of the logs of a whole cluster.
//!
//! Each has items of logs: a shard's log with positions, or a slot's with seqs. Within a log they come in order, and how far a model is says up to
//! where each log is applied.

use std::collections::{BTreeMap, HashSet};

use kuma_shard::{Epoch, ModelProgress, Slot};

use crate::{
    StoredEvent, Unreadable,
    cluster_logs::WidePage,
    feed::{FeedItem, FeedPage, Standing},
    store::Inner,
};

/// Behind the slots: logs of commits that are damaged so far that their slots are not known, by the shards that they are in.
const UNKNOWN_SLOT: u16 = kuma_shard::SLOTS + 1;

/// A page of whichever logs a model is fed with.
pub(crate) enum ModelPage {
    /// Of one shard.
    Shard(FeedPage),
    /// Of all slots of a cluster.
    Cluster(WidePage),
}

/// A commit, or what stands in its place.
pub(crate) struct ModelItem<'a> {
    /// Of which log: a shard; in a cluster a slot, by its number.
    pub(crate) log: u16,
    /// Where in it.
    pub(crate) position: u64,
    /// The place in its slot's log, if that is known.
    pub(crate) place: Option<(Slot, u64)>,
    pub(crate) what: Result<&'a [StoredEvent], &'a Unreadable>,
}

/// How far pages take a model: what its file says from then on, and the same by log.
#[derive(Default)]
pub(crate) struct Reach {
    pub(crate) progress: ModelProgress,
    pub(crate) logs: BTreeMap<u16, u64>,
    pub(crate) events: u64,
}

impl ModelPage {
    /// Takes out what is erased, and says whether the rest can be applied. `purged`: of which lives the model knows nothing any more.
    pub(crate) async fn settle(&mut self, inner: &Inner, purged: &HashSet<[u8; 16]>) -> Result<Standing, String> {
        match self {
            ModelPage::Shard(page) => {
                page.settle(|key_id| purged.contains(key_id)).await.map_err(|error| error.to_string())
            }
            ModelPage::Cluster(page) => page.settle(inner, purged).await.map_err(|error| error.to_string()),
        }
    }

    pub(crate) fn events(&self) -> usize {
        match self {
            ModelPage::Shard(page) => page.events(),
            ModelPage::Cluster(page) => page.events(),
        }
    }

    /// How many items it has.
    pub(crate) fn len(&self) -> usize {
        match self {
            ModelPage::Shard(page) => page.items.len(),
            ModelPage::Cluster(page) => page.items.len(),
        }
    }

    /// The first so many items, in their order.
    pub(crate) fn items(&self, count: usize) -> impl Iterator<Item = ModelItem<'_>> {
        (0..count.min(self.len())).filter_map(|index| self.item(index))
    }

    fn item(&self, index: usize) -> Option<ModelItem<'_>> {
        match self {
            ModelPage::Shard(page) => {
                let (item, log) = (page.items.get(index)?, page.core.shard.number());
                let position = item.position();
                Some(match item {
                    FeedItem::Commit(commit) => {
                        let place = commit.events.first().map(|event| (event.slot, event.seq));
                        ModelItem { log, position, place, what: Ok(&commit.events) }
                    }
                    FeedItem::Unreadable { unreadable, .. } => {
                        ModelItem { log, position, place: None, what: Err(unreadable) }
                    }
                })
            }
            ModelPage::Cluster(page) => {
                let item = page.items.get(index)?;
                let (log, position) = match (&item.what, item.place) {
                    (_, Some((slot, seq))) => (slot.number(), seq),
                    (Err(unreadable), None) => (UNKNOWN_SLOT.saturating_add(unreadable.shard), unreadable.position),
                    // A commit has its place.
                    (Ok(_), None) => return None,
                };
                let what = item.what.as_ref().map(|commit| &commit.events[..]);
                Some(ModelItem { log, position, place: item.place, what })
            }
        }
    }

    /// Adds how far the model is with the first `count` items of the page; with all of it, if `is_whole`.
    pub(crate) fn reach(&self, count: usize, is_whole: bool, reach: &mut Reach) {
        let applied = |item: ModelItem<'_>| item.what.map_or(0, |events| events.len() as u64);
        let events: u64 = self.items(count).map(applied).sum();
        reach.events += events;
        match self {
            ModelPage::Shard(page) => {
                let first_left = page.items.get(count).filter(|_| !is_whole);
                let last = first_left.map_or(page.last, |item| item.position().saturating_sub(1));
                let shard = page.core.shard.number();
                let at = reach.progress.positions.entry(shard).or_insert((0, 0));
                *at = (last, at.1 + events);
                reach.logs.insert(shard, last);
                let places = page.places.iter().take_while(|place| place.position <= last);
                reach.progress.places.extend(places.map(|place| (place.slot, (place.seq, place.epoch))));
            }
            ModelPage::Cluster(page) => {
                // Only for the number of events: positions of this disk say nothing here.
                reach.progress.positions.entry(0).or_insert((0, 0)).1 += events;
                let mut pass = |slot: Slot, seq: u64| {
                    reach.progress.places.insert(slot, (seq, Epoch::NEVER));
                    reach.logs.insert(slot.number(), seq);
                };
                self.items(count).filter_map(|item| item.place).for_each(|(slot, seq)| pass(slot, seq));
                if is_whole {
                    page.passed.iter().for_each(|(slot, seq)| pass(*slot, *seq));
                    let unplaced = self.items(count).filter(|item| item.place.is_none());
                    reach.logs.extend(unplaced.map(|item| (item.log, item.position)));
                    reach.progress.meta.retain(|(name, _)| *name != MARK);
                    reach.progress.meta.push((MARK, page.mark.clone()));
                }
            }
        }
    }
}

/// What a model's file calls the mark of its reader.
pub(crate) const MARK: &str = "cluster_mark";
