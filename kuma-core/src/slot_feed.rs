//! The feed of a node's slots: what this disk has of the logs of its slots, for whoever puts those of all nodes together.
//!
//! ```text
//!  cursor of each shard ──► pages of its log ──► rows of slots that this disk has a right to ──► (slot, seq) and opened events
//! ```
//!
//! Invariants:
//! - `(slot, seq)` names one commit for ever, whichever node says it: an owner has the whole log of its slot, and nobody else writes to it.
//! - Read from position 0, or from where a reader has come, the rows of a slot come in the order of their seqs, without gaps. A slot that comes to
//!   this disk comes at new positions, all of it; one that has left is passed over, and its new owner goes on with it.
//! - A slot is passed over by a look at its token *after* keys were looked up: what was given away meanwhile is not taken for what cannot be read.
//! - An answer is bounded in bytes and in rows, whatever is asked.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::{Duration, SystemTime},
};

use kuma_shard::{CopyId, EntityHash, Epoch, Slot, SlotRecord, Token, Tombstone};
use serde::{Deserialize, Serialize};
use tokio::sync::{Semaphore, watch};

use crate::{
    Erased, Filter, Metadata, RecordedEvent, ReplayError, SlotError, StoredEvent, SubscribeError, Unreadable, Version,
    feed::{Feed, FeedFrom, FeedItem, SlotPlace, Standing, read_one},
    ledger::time_of,
    micros,
    shard_core::ShardCore,
    slots::Slots,
    subscribe,
};

/// An answer ends with the event that makes it so large.
const ANSWER_BYTES: usize = 512 << 10;
/// And with the page that makes it so many rows, wanted or not.
const ANSWER_ROWS: usize = 8192;
/// What a commit has beside its events, and an event beside its data.
const COMMIT_BYTES: usize = 96;

/// What is asked of a node's feed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FeedAsk {
    /// Which events.
    pub filter: Filter,
    /// Commits that are older are not wanted. Microseconds since 1970.
    pub since_us: i64,
    /// By shard, up to where it was read; 0 where it ends.
    pub after: Vec<u64>,
    /// The shard that is looked at first.
    pub first: u16,
    /// Up to which seq slots are known that came here from elsewhere, or that are read once more.
    pub seen: Vec<(Slot, u64)>,
}

/// What a node's feed answers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FeedAnswer {
    /// By shard, where its log ended. 0 for one that is out of use.
    pub ends: Vec<u64>,
    /// What there is.
    pub parts: Vec<FeedPart>,
    /// Slots that came from elsewhere: say up to where they are known, so that it is not all told again.
    pub unknown: Vec<Slot>,
    /// Whether there are rows in it that came from elsewhere.
    pub came: bool,
    /// Shards that cannot be read, with why.
    pub troubles: Vec<(u16, String)>,
}

impl FeedAnswer {
    /// Whether a reader gets any further with it.
    pub fn is_news(&self) -> bool {
        !self.parts.is_empty() || !self.unknown.is_empty()
    }
}

/// A piece of one shard's log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FeedPart {
    /// The shard.
    pub shard: u16,
    /// Everything up to this position is in it or was before.
    pub last: u64,
    /// Of each slot that has rows in it, the first and the last seq.
    pub passed: Vec<(Slot, u64, u64)>,
    /// What is wanted of it, in the order of the log.
    pub items: Vec<FedItem>,
}

/// A commit, or what stands in its place.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum FedItem {
    /// A commit.
    Commit(FedCommit),
    /// One that cannot be read; with its place, if that is known.
    Unreadable(Option<(Slot, u64)>, Unreadable),
}

impl FedItem {
    /// Its place.
    pub fn place(&self) -> Option<(Slot, u64)> {
        match self {
            FedItem::Commit(commit) => Some((commit.slot, commit.seq)),
            FedItem::Unreadable(place, _) => *place,
        }
    }

    /// About how many bytes it has.
    pub fn bytes(&self) -> usize {
        let event = |event: &FedEvent| event.data.len() + event.name.len() + COMMIT_BYTES;
        match self {
            FedItem::Commit(commit) => commit.id.len() + COMMIT_BYTES + commit.events.iter().map(event).sum::<usize>(),
            FedItem::Unreadable(..) => COMMIT_BYTES,
        }
    }
}

/// The wanted events of a commit, opened: inside an encrypted link and nowhere else.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct FedCommit {
    /// The slot.
    pub slot: Slot,
    /// The place in the slot's log.
    pub seq: u64,
    /// The kind of its entity.
    pub kind: Arc<str>,
    /// The id of its entity.
    pub id: Arc<str>,
    /// The keyed hash of it.
    pub entity: EntityHash,
    /// Which life.
    pub life: u32,
    /// The key of that life, by name.
    pub key_id: [u8; 16],
    /// The events.
    pub events: Vec<FedEvent>,
}

impl std::fmt::Debug for FedCommit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let FedCommit { slot, seq, entity, events, .. } = self;
        write!(f, "FedCommit {{ slot: {slot}, seq: {seq}, entity: {entity}, events: {} }}", events.len())
    }
}

/// An event of a [`FedCommit`].
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct FedEvent {
    version: u64,
    name: String,
    schema: u32,
    at_us: i64,
    metadata: Option<Metadata>,
    #[serde(with = "serde_bytes")]
    data: Vec<u8>,
}

impl FedCommit {
    /// Its events, as subscribers get them.
    pub fn into_events(self) -> impl Iterator<Item = StoredEvent> {
        let FedCommit { slot, seq, kind, id, entity, life, events, .. } = self;
        events.into_iter().map(move |event| {
            let FedEvent { version, name, schema, at_us, metadata, data } = event;
            let event = RecordedEvent { version: Version(version), name, schema, at: time_of(at_us), metadata, data };
            StoredEvent { slot, seq, kind: kind.clone(), id: id.clone(), entity, life, event }
        })
    }
}

/// How far the logs of a node's slots go.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotEnds {
    /// By shard, where its log ended before the slots were looked at.
    pub positions: Vec<u64>,
    /// The slots that it owns, with the seqs of their last commits.
    pub slots: Vec<(Slot, u64)>,
}

impl Slots {
    /// How far the logs of the slots go that this disk owns.
    ///
    /// # Errors
    /// A shard is out of use.
    pub fn ends(&self) -> Result<SlotEnds, SlotError> {
        let positions =
            self.cores().map(|core| core.map(|core| *core.shard.end().borrow())).collect::<Result<_, _>>()?;
        let last = |(slot, record): (Slot, SlotRecord)| record.owned().map(|_| (slot, record.content.len));
        Ok(SlotEnds { positions, slots: self.records().into_iter().filter_map(last).collect() })
    }

    /// What there is behind where the asker has come. Does not wait for more.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn feed(&self, ask: &FeedAsk) -> FeedAnswer {
        let shards = self.inner.shards();
        let mut answer = FeedAnswer::default();
        let (filter, seen) = (Arc::new(ask.filter.clone()), ask.seen.iter().copied().collect());
        let mut reading = Reading { filter, since_us: ask.since_us, seen, bytes: 0, rows: 0 };
        answer.ends = vec![0; usize::from(shards)];
        for shard in (0..shards).map(|number| (number + ask.first) % shards.max(1)) {
            let Some(core) = self.inner.core_of_shard(shard) else {
                answer.troubles.push((shard, "it is out of use".to_owned()));
                continue;
            };
            let end = *core.shard.end().borrow();
            answer.ends[usize::from(shard)] = end;
            let mut after = ask.after.get(usize::from(shard)).copied().unwrap_or_default();
            while after < end && reading.has_room() {
                match reading.page(self, &core, after, end, &mut answer).await {
                    Ok(Some(last)) => after = last,
                    Ok(None) => break,
                    Err(error) => {
                        answer.troubles.push((shard, error.to_string()));
                        break;
                    }
                }
            }
        }
        answer
    }

    /// The commit with this seq of a slot's log, if it is an entity's that is not erased.
    ///
    /// # Errors
    /// It cannot be read here, in words.
    pub async fn commit(
        &self,
        filter: &Filter,
        slot: Slot,
        seq: u64,
        entity: EntityHash,
    ) -> Result<Option<FedItem>, String> {
        let core = self.inner.core_of_slot(slot).ok_or("its shard is out of use")?;
        let words = |error: kuma_shard::ReadError| error.to_string();
        let Some(found) = core.shard.find_entity(CopyId::LIVE, entity).await.map_err(words)? else { return Ok(None) };
        let Some(position) = core.shard.position_of(&found, slot, seq).await.map_err(words)? else { return Ok(None) };
        let place = SlotPlace { position, slot, seq, epoch: Epoch::NEVER };
        let item = read_one(&self.inner, filter, core.shard.number(), position).await?;
        Ok(item.map(|item| match item {
            FeedItem::Commit(commit) => FedItem::Commit(fed(commit, &place)),
            FeedItem::Unreadable { unreadable, .. } => FedItem::Unreadable(Some((slot, seq)), unreadable),
        }))
    }

    /// Returns when a shard has more than that, or after `within`.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn more_than(&self, after: &[u64], within: Duration) {
        let ends: Vec<watch::Receiver<u64>> =
            self.cores().filter_map(Result::ok).map(|core| core.shard.end()).collect();
        let more = ends.into_iter().enumerate().map(|(shard, mut end)| {
            let after = after.get(shard).copied().unwrap_or_default();
            Box::pin(async move {
                if end.wait_for(|end| *end > after).await.is_err() {
                    // The store closes; whoever asks next is told.
                    std::future::pending::<()>().await;
                }
            })
        });
        let _ = tokio::time::timeout(within, futures_util::future::select_all(more)).await;
    }

    /// Up to which number erasures can be told to subscribers; they are, in the order of their numbers on this disk.
    pub fn told(&self) -> watch::Receiver<i64> {
        self.inner.erasing().entombed()
    }

    /// The number of the newest erasure that is durable on this disk.
    ///
    /// # Errors
    /// `node.db` cannot be read.
    pub async fn newest_erasure(&self) -> Result<i64, SubscribeError> {
        self.inner.node().newest_tombstone().await.map_err(SubscribeError::Erasures)
    }

    /// Erasures behind the one with this number, with their numbers and the names of the keys, up to `last`.
    ///
    /// # Errors
    /// They cannot be read.
    pub async fn erasures_behind(
        &self,
        after: i64,
        last: i64,
        erasures_max: u32,
    ) -> Result<Vec<(i64, [u8; 16], Erased)>, SubscribeError> {
        let page = self.inner.node().tombstones(after, erasures_max).await.map_err(SubscribeError::Erasures)?;
        let mut found = Vec::with_capacity(page.len());
        for (number, tombstone) in page.into_iter().filter(|(number, _)| *number <= last) {
            found.push((number, tombstone.key_id, subscribe::erased(&self.inner, number, &tombstone).await?));
        }
        Ok(found)
    }

    /// Which of these keys are destroyed, as this disk knows.
    ///
    /// # Errors
    /// `node.db` cannot be read.
    pub async fn erased_among(&self, key_ids: &[[u8; 16]]) -> Result<BTreeSet<[u8; 16]>, SubscribeError> {
        let found = self.inner.node().tombstones_by_key(key_ids).await.map_err(SubscribeError::Erasures)?;
        Ok(found.into_iter().map(|Tombstone { key_id, .. }| key_id).collect())
    }

    fn cores(&self) -> impl Iterator<Item = Result<Arc<ShardCore>, SlotError>> {
        let core = |shard| self.inner.core_of_shard(shard).ok_or(SlotError::OutOfUse { slot: Slot::new(shard.into()) });
        (0..self.inner.shards()).map(core)
    }
}

impl FeedAsk {
    /// Commits of any time.
    pub const EVER: i64 = crate::checkpoint::EVER;

    /// A time as it stands in [`FeedAsk::since_us`].
    pub fn since(time: SystemTime) -> i64 {
        micros(time)
    }
}

struct Reading {
    filter: Arc<Filter>,
    since_us: i64,
    seen: HashMap<Slot, u64>,
    bytes: usize,
    rows: usize,
}

impl Reading {
    fn has_room(&self) -> bool {
        self.bytes < ANSWER_BYTES && self.rows < ANSWER_ROWS
    }

    /// Adds a page to the answer, and says up to where it goes; none if it does not go on for now.
    async fn page(
        &mut self,
        slots: &Slots,
        core: &Arc<ShardCore>,
        after: u64,
        end: u64,
        answer: &mut FeedAnswer,
    ) -> Result<Option<u64>, ReplayError> {
        let Ok(room) = Arc::new(Semaphore::new(1)).acquire_owned().await else { return Ok(None) };
        let from = FeedFrom { filter: self.filter.clone(), after, since_us: self.since_us };
        // A new one for each page: what it remembers of entities may have been given away since.
        let mut page = Feed::new(core.clone(), from).page(&slots.inner, after, end, room).await?;
        // The lives before one end, for the asker, by its own ledger.
        if page.settle(|_| true).await? == Standing::Undecided {
            return Ok(None);
        }
        self.rows += (page.last - after) as usize;
        let slots_of_page: BTreeSet<Slot> = page.places.iter().map(|place| place.slot).collect();
        let right = |slot: Slot| Some((slot, right_to(slot, &core.shard.slot(slot)?)?));
        let rights: HashMap<Slot, Epoch> = slots_of_page.into_iter().filter_map(right).collect();
        page.places.retain(|place| rights.contains_key(&place.slot));
        let came = |place: &&SlotPlace| rights.get(&place.slot).is_some_and(|since| place.epoch < *since);
        let is_unknown = |place: &&SlotPlace| !self.seen.contains_key(&place.slot);
        let unknown: BTreeSet<Slot> =
            page.places.iter().filter(came).filter(is_unknown).map(|place| place.slot).collect();
        let mut last = page.last;
        if let Some(first) = page.places.iter().find(|place| unknown.contains(&place.slot)) {
            last = first.position - 1;
        }
        answer.came |= page.places.iter().any(|place| came(&place));
        answer.unknown.extend(unknown);
        let places: HashMap<u64, SlotPlace> = page.places.iter().map(|place| (place.position, *place)).collect();
        let mut items = Vec::new();
        for item in std::mem::take(&mut page.items) {
            let position = item.position();
            if position > last {
                break;
            }
            let place = places.get(&position);
            let item = match (item, place) {
                (FeedItem::Unreadable { unreadable, .. }, place) => {
                    // It was given away meanwhile. Of what is damaged no version is known, nor a place.
                    if place.is_none() && unreadable.version.is_some() {
                        continue;
                    }
                    FedItem::Unreadable(place.map(|place| (place.slot, place.seq)), unreadable)
                }
                (FeedItem::Commit(_), None) => continue,
                (FeedItem::Commit(commit), Some(place)) => {
                    if self.seen.get(&place.slot).is_some_and(|seen| place.seq <= *seen) {
                        continue;
                    }
                    FedItem::Commit(fed(commit, place))
                }
            };
            self.bytes += item.bytes();
            items.push(item);
            if self.bytes >= ANSWER_BYTES {
                last = position;
                break;
            }
        }
        if last <= after {
            return Ok(None);
        }
        let mut passed: BTreeMap<Slot, (u64, u64)> = BTreeMap::new();
        for place in page.places.iter().filter(|place| place.position <= last) {
            let span = passed.entry(place.slot).or_insert((place.seq, place.seq));
            span.1 = place.seq;
        }
        let passed = passed.into_iter().map(|(slot, (from, to))| (slot, from, to)).collect();
        answer.parts.push(FeedPart { shard: core.shard.number(), last, passed, items });
        Ok((last == page.last).then_some(last))
    }
}

/// Since which epoch this disk has a right to tell of the slot, if it has one. What was given away is told of until it is taken.
fn right_to(slot: Slot, record: &SlotRecord) -> Option<Epoch> {
    match record.token {
        _ if slot == Slot::OWN => None,
        Token::Owned(epoch) => Some(epoch),
        Token::Released { is_taken: false, .. } => Some(record.last_owned),
        Token::Released { is_taken: true, .. } | Token::None => None,
    }
}

fn fed(commit: crate::feed::FeedCommit, place: &SlotPlace) -> FedCommit {
    let crate::feed::FeedCommit { life, events, .. } = commit;
    let (kind, entity) = (life.kind.clone(), life.id_hash);
    let id = events.first().map_or_else(|| "".into(), |event| event.id.clone());
    let event = |stored: StoredEvent| {
        let RecordedEvent { version, name, schema, at, metadata, data } = stored.event;
        FedEvent { version: version.0, name, schema, at_us: micros(at), metadata, data }
    };
    let events = events.into_iter().map(event).collect();
    FedCommit { slot: place.slot, seq: place.seq, kind, id, entity, life: life.life, key_id: life.key_id, events }
}
