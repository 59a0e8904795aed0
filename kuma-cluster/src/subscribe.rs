//! Subscriptions to a whole cluster: the logs of all slots, wherever they are.
//!
//! ```text
//!  feed of this node's slots ──answers──┐
//!  feed of node two ─────────answers────┼──► is it the next commit of its slot? ──► next() ──► the subscriber
//!  feed of node three ───────answers────┘            ▲
//!                                        erasures, by this node's ledger
//! ```
//! Each node is read by the positions of its shards, and what comes is put in its place by slot and seq. Nobody has to be told when a slot moves: its
//! new owner has its whole log at new positions, and what was handed out before is passed over.
//!
//! Invariants:
//! - Of each slot the commits are handed out in the order of their seqs, each once, none left out; between slots there is no order. Whoever goes on
//!   from a checkpoint gets every commit behind it, and may get the one again of which a part was handed out.
//! - A node that cannot be asked holds back what it owns, and nothing else.
//! - What this node knows to be erased is not handed out. That an entity is erased is told after its last event, and before the first one of a
//!   later life.
//! - A node is asked for more when what it answered is handed out: two answers of each node are all that is held, however slow the subscriber.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque},
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst},
    },
    time::{Duration, Instant, SystemTime},
    vec,
};

use futures_util::{
    future::join_all,
    stream::{self, Stream},
};
use kuma_core::{
    ClusterGauge, Delivery, DiskId, Erased, FedItem, FeedAnswer, FeedAsk, FeedPart, Filter, SLOTS, Slot, SlotEnds,
    StoredEvent, Unreadable,
};
use parking_lot::Mutex;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch},
    task::{AbortHandle, JoinSet},
};

use crate::{
    shared::Shared,
    slot_checkpoint::{EVER, SlotCheckpoint, SlotCheckpointError},
    wire::{self, CommitFrame, CommitReply, FeedFrame, FeedReply, kind},
};

/// Answers of one node that are held: one that is being handed out, and the next.
const ANSWERS_AHEAD: usize = 2;
/// How long a node that has nothing waits for something before it says so.
const WAIT: Duration = Duration::from_secs(1);
/// A node that has not answered by then is asked again.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// A node that cannot be asked is asked again after this; each time later.
const AGAIN: [Duration; 2] = [Duration::from_millis(50), Duration::from_secs(2)];
/// How often it is looked which nodes there are.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// How long to find out where the logs of all slots end.
const ENDS_WITHIN: Duration = Duration::from_secs(15);
/// What is not decided yet is looked at again after this.
const UNDECIDED_WAIT: Duration = Duration::from_millis(10);
/// Erasures that are read at once.
const ERASURES_MAX: u32 = 256;

/// Where a subscription begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StartAt {
    /// With the first event of each slot.
    Beginning,
    /// With what is committed from now on. Every owner of a slot must be in reach.
    Now,
    /// With what was committed at this time or later, by the clocks of the nodes that committed it.
    Time(SystemTime),
    /// Behind what was handed out when this checkpoint was taken, at whichever node.
    Checkpoint(SlotCheckpoint),
}

/// Why a subscription cannot begin or go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SubscribeError {
    /// The checkpoint does not fit.
    #[error(transparent)]
    Checkpoint(#[from] SlotCheckpointError),
    /// Where the log of a slot ends is not known, so that there is no "now".
    #[error("where the log of slot {slot} ends is not known, for its owner{} is out of reach; start from a checkpoint or a time", named(.node))]
    OwnerUnreachable {
        /// The slot.
        slot: Slot,
        /// Its owner, as far as is known.
        node: Option<String>,
    },
    /// What this node knows of erasures cannot be read. Ask for the next one again.
    #[error(transparent)]
    Store(#[from] kuma_core::SubscribeError),
    /// The node is shutting down.
    #[error("the node is shutting down")]
    ShuttingDown,
}

fn named(node: &Option<String>) -> String {
    node.as_ref().map(|node| format!(" ({node})")).unwrap_or_default()
}

/// A node that is read, as its reader sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceStatus {
    /// What people call it.
    pub node: String,
    /// Commits in its files that it was not asked for yet, wanted or not, when it answered last. Of a slow subscriber that may be a while ago.
    pub behind: u64,
    /// Why it cannot be read for now, and since when.
    pub trouble: Option<(String, Instant)>,
}

/// A slot whose events wait for its owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldBack {
    /// The slot.
    pub slot: Slot,
    /// Its owner, as far as is known.
    pub node: Option<String>,
}

/// An open subscription to a cluster, see [`Node::subscribe`](crate::Node::subscribe). It ends when it is dropped.
pub struct Subscription {
    shared: Arc<Shared>,
    common: Arc<Common>,
    answers: mpsc::UnboundedReceiver<Told>,
    /// The readers end with it.
    _readers: JoinSet<()>,
    /// Of what was handed out, but for the seqs, which its readers know too.
    checkpoint: SlotCheckpoint,
    current: Option<Current>,
    /// The place of the commit of which something was handed out last.
    last: Option<(Slot, u64)>,
    told: watch::Receiver<i64>,
    /// Whether there may be erasures that were not read yet.
    untold: bool,
    notices: VecDeque<(i64, Erased)>,
    /// Erasures up to this one are told before anything else is handed out.
    told_first: i64,
    failed: Option<SlotCheckpointError>,
}

/// What a subscription and its readers share.
struct Common {
    filter: Filter,
    since_us: i64,
    /// By slot, the last commit that was handed out.
    seqs: Box<[AtomicU64]>,
    /// Where it began.
    began: SlotCheckpoint,
    sources: Mutex<BTreeMap<DiskId, Arc<Source>>>,
}

/// A node that is read.
struct Source {
    disk: DiskId,
    /// Counts how often it is read from its beginning because something was missing.
    scan: AtomicU32,
    has_answered: AtomicBool,
    behind: AtomicU64,
    trouble: Mutex<Option<(String, Instant)>>,
}

enum Told {
    Answer(Answer),
    Ahead(SlotCheckpointError),
}

/// What a node answered.
struct Answer {
    source: Arc<Source>,
    scan: u32,
    /// Whether its logs are read from their beginning: what is missing then is nowhere.
    is_whole: bool,
    parts: VecDeque<FeedPart>,
    /// Given back with it.
    _room: OwnedSemaphorePermit,
}

/// Says how far behind a subscription is.
pub(crate) struct Gauge {
    shared: Weak<Shared>,
    common: Arc<Common>,
}

impl Gauge {
    fn name_of(&self, source: &Source) -> String {
        self.shared.upgrade().map_or_else(|| format!("disk {}", source.disk), |shared| shared.name_of(source.disk))
    }
}

impl ClusterGauge for Gauge {
    fn commits_behind(&self) -> Result<u64, String> {
        let sources = self.common.sources.lock();
        let behind = |source: &Arc<Source>| match (source.has_answered.load(SeqCst), &*source.trouble.lock()) {
            (true, _) => Ok(source.behind.load(SeqCst)),
            (false, Some((why, _))) => Err(format!("node {} cannot be read yet: {why}", self.name_of(source))),
            (false, None) => Err(format!("node {} has not answered yet", self.name_of(source))),
        };
        match sources.is_empty() {
            true => Err("no node has been asked yet".to_owned()),
            false => sources.values().map(behind).sum(),
        }
    }

    fn cut_off_for(&self) -> Option<Duration> {
        let sources = self.common.sources.lock();
        sources.values().filter_map(|source| Some(source.trouble.lock().as_ref()?.1.elapsed())).max()
    }
}

/// What a subscription has.
enum Ready {
    /// It is to be told first.
    Erased(Erased),
    /// The current answer can be handed out.
    Answer,
    Nothing,
}

/// An answer that is being handed out.
struct Current {
    answer: Answer,
    /// Whether what is erased was taken out of it.
    is_checked: bool,
    part: Option<Part>,
}

/// A part that is being handed out.
struct Part {
    shard: u16,
    last: u64,
    /// Of each slot, how far it is handed out at the end of the part.
    passed: Vec<(Slot, u64)>,
    items: vec::IntoIter<FedItem>,
    commit: Option<Rest>,
}

/// What is left of a commit.
struct Rest {
    place: (Slot, u64),
    key_id: [u8; 16],
    events: vec::IntoIter<StoredEvent>,
}

impl Source {
    fn in_trouble(&self, why: String) {
        let mut trouble = self.trouble.lock();
        let since = trouble.as_ref().map_or_else(Instant::now, |(_, since)| *since);
        *trouble = Some((why, since));
    }
}

impl Common {
    fn seq(&self, slot: Slot) -> u64 {
        self.seqs.get(usize::from(slot.number())).map_or(0, |seq| seq.load(SeqCst))
    }

    fn pass(&self, slot: Slot, seq: u64) {
        if let Some(at) = self.seqs.get(usize::from(slot.number())) {
            at.fetch_max(seq, SeqCst);
        }
    }

    fn seqs(&self) -> Vec<u64> {
        self.seqs.iter().map(|seq| seq.load(SeqCst)).collect()
    }
}

impl Subscription {
    pub(crate) async fn open(shared: &Arc<Shared>, filter: Filter, start: StartAt) -> Result<Self, SubscribeError> {
        let state = shared.state();
        // Before anything is read: what is erased from here on is told.
        let told = shared.slots.told();
        let fresh = |since_us| SlotCheckpoint::new(state.cluster, (shared.own, *told.borrow()), since_us);
        let mut checkpoint = match start {
            StartAt::Beginning => fresh(EVER),
            StartAt::Time(time) => fresh(FeedAsk::since(time)),
            StartAt::Now => {
                let (seqs, positions) = now(shared).await?;
                SlotCheckpoint { seqs, positions, ..fresh(EVER) }
            }
            StartAt::Checkpoint(checkpoint) if checkpoint.cluster != state.cluster => {
                return Err(SlotCheckpointError::OtherCluster.into());
            }
            StartAt::Checkpoint(checkpoint) => checkpoint,
        };
        if checkpoint.told.0 != shared.own {
            // The numbers are another disk's.
            checkpoint.told = (shared.own, 0);
        }
        let common = Arc::new(Common {
            filter,
            since_us: checkpoint.since_us,
            seqs: checkpoint.seqs.iter().copied().map(AtomicU64::new).collect(),
            began: checkpoint.clone(),
            sources: Mutex::default(),
        });
        let (sender, answers) = mpsc::unbounded_channel();
        let mut readers = JoinSet::new();
        readers.spawn(read_all(Arc::downgrade(shared), common.clone(), sender));
        Ok(Subscription {
            shared: shared.clone(),
            common,
            answers,
            _readers: readers,
            checkpoint,
            current: None,
            last: None,
            told,
            untold: true,
            notices: VecDeque::new(),
            told_first: 0,
            failed: None,
        })
    }

    /// The next event, or that an entity was erased; waits until there is one.
    ///
    /// # Errors
    /// It can be called again, except when the node is shutting down or the cluster has lost what the checkpoint tells of.
    /// # Cancel safety
    /// Cancel safe: nothing is lost.
    pub async fn next(&mut self) -> Result<Delivery, SubscribeError> {
        loop {
            match self.ready().await? {
                Ready::Erased(erased) => return Ok(Delivery::Erased(erased)),
                Ready::Answer => match self.hand_out() {
                    Some(delivery) => return Ok(delivery),
                    None => self.current = None,
                },
                Ready::Nothing => self.wait().await?,
            }
        }
    }

    /// The next one of those that are before `ends`, which are seqs by slot; none when all of them were handed out.
    ///
    /// # Cancel safety
    /// Cancel safe: nothing is lost.
    pub(crate) async fn next_before(&mut self, ends: &[u64]) -> Result<Option<Delivery>, SubscribeError> {
        loop {
            match self.ready().await? {
                Ready::Erased(erased) => return Ok(Some(Delivery::Erased(erased))),
                Ready::Answer => match self.hand_out() {
                    Some(delivery) => return Ok(Some(delivery)),
                    None => self.current = None,
                },
                Ready::Nothing => {
                    let is_there = (0..).map(Slot::new).zip(ends).all(|(slot, end)| self.common.seq(slot) >= *end);
                    if self.current.is_none() && is_there {
                        return Ok(None);
                    }
                    self.wait().await?;
                }
            }
        }
    }

    /// The place of the commit of which something was handed out last, if it has one.
    pub(crate) fn last_place(&self) -> Option<(Slot, u64)> {
        self.last
    }

    /// The number of the last erasure that was told.
    pub(crate) fn told_up_to(&self) -> i64 {
        self.checkpoint.told.1
    }

    /// Whole commits of what comes next, and up to where that goes; waits until there is something. Not to be mixed with [`Subscription::next`].
    ///
    /// # Cancel safety
    /// Cancel safe: nothing is lost.
    pub(crate) async fn page(&mut self) -> Result<(Vec<FedItem>, Vec<(Slot, u64)>), SubscribeError> {
        loop {
            match self.ready().await? {
                // Whoever wants whole commits has the ledger for that.
                Ready::Erased(_) => {}
                Ready::Answer => {
                    let (before, mut items) = (self.common.seqs(), Vec::new());
                    while let Some(item) = self.next_item() {
                        if let Some((slot, seq)) = item.place() {
                            self.common.pass(slot, seq);
                        }
                        items.push(item);
                    }
                    self.current = None;
                    let after = (0..).map(Slot::new).zip(self.common.seqs());
                    let passed = after.zip(before).filter(|((_, after), before)| after > before);
                    let passed: Vec<(Slot, u64)> = passed.map(|(passed, _)| passed).collect();
                    if !passed.is_empty() || !items.is_empty() {
                        return Ok((items, passed));
                    }
                }
                Ready::Nothing => self.wait().await?,
            }
        }
    }

    /// All that follows, as a stream. It ends when the node shuts down.
    pub fn into_stream(self) -> impl Stream<Item = Result<Delivery, SubscribeError>> + Send {
        stream::unfold(self, |mut subscription| async {
            match subscription.next().await {
                Err(SubscribeError::ShuttingDown) => None,
                next => Some((next, subscription)),
            }
        })
    }

    /// How far what was handed out reaches: go on from there with [`StartAt::Checkpoint`], at whichever node of the cluster. Of a commit that was
    /// handed out in part, all is handed out again.
    pub fn checkpoint(&self) -> SlotCheckpoint {
        SlotCheckpoint { seqs: self.common.seqs(), ..self.checkpoint.clone() }
    }

    /// The nodes that are read, and how that goes.
    pub fn sources(&self) -> Vec<SourceStatus> {
        let status = |source: &Arc<Source>| SourceStatus {
            node: self.shared.name_of(source.disk),
            behind: source.behind.load(SeqCst),
            trouble: source.trouble.lock().clone(),
        };
        self.common.sources.lock().values().map(status).collect()
    }

    /// Says how far behind it is, also while it is being read.
    pub(crate) fn gauge(&self) -> Gauge {
        Gauge { shared: Arc::downgrade(&self.shared), common: self.common.clone() }
    }

    /// Slots whose events wait for their owners, which are out of reach or not known yet.
    pub fn held_back(&self) -> Vec<HeldBack> {
        let routes = self.shared.routes.all();
        let is_up = |disk| disk == self.shared.own || self.shared.transport().is_some_and(|links| links.is_up(disk));
        let held = |(number, route): (u64, &Option<(kuma_core::Epoch, DiskId)>)| match route {
            Some((_, disk)) if is_up(*disk) => None,
            route => {
                let node = route.map(|(_, disk)| self.shared.name_of(disk));
                Some(HeldBack { slot: Slot::new(number), node })
            }
        };
        (0..).zip(&routes).filter_map(held).collect()
    }

    /// Waits until there may be something to hand out.
    async fn wait(&mut self) -> Result<(), SubscribeError> {
        if self.current.is_some() {
            // An erasure is to be told first.
            let _ = tokio::time::timeout(UNDECIDED_WAIT, self.told.changed()).await;
            self.untold = true;
            return Ok(());
        }
        tokio::select! {
            told = self.answers.recv() => match told {
                Some(Told::Answer(answer)) => self.current = Some(Current { answer, is_checked: false, part: None }),
                Some(Told::Ahead(error)) => self.failed = Some(error),
                None => return Err(SubscribeError::ShuttingDown),
            },
            _ = self.told.changed() => self.untold = true,
        }
        Ok(())
    }

    /// What can be handed out now.
    async fn ready(&mut self) -> Result<Ready, SubscribeError> {
        if let Some(failed) = &self.failed {
            return Err(failed.clone().into());
        }
        let ready = self.look().await;
        match self.shared.is_closing.load(SeqCst) && !matches!(ready, Ok(Ready::Erased(_) | Ready::Answer)) {
            true => Err(SubscribeError::ShuttingDown),
            false => ready,
        }
    }

    async fn look(&mut self) -> Result<Ready, SubscribeError> {
        loop {
            if self.told.has_changed().unwrap_or(false) {
                self.told.mark_unchanged();
                self.untold = true;
            }
            self.learn_erasures().await?;
            if let Some((number, erased)) = self.notices.pop_front() {
                self.checkpoint.told.1 = number;
                return Ok(Ready::Erased(erased));
            }
            if self.current.is_none() {
                return Ok(Ready::Nothing);
            }
            self.check().await?;
            if self.checkpoint.told.1 < self.told_first {
                return Ok(Ready::Nothing);
            }
            if !self.told.has_changed().unwrap_or(false) {
                return Ok(Ready::Answer);
            }
        }
    }

    /// Takes out of an answer what was erased before it came.
    async fn check(&mut self) -> Result<(), SubscribeError> {
        let Some(current) = self.current.as_mut().filter(|current| !current.is_checked) else { return Ok(()) };
        let (mut keys, mut is_later_life) = (HashSet::new(), false);
        for item in current.answer.parts.iter().flat_map(|part| &part.items) {
            if let FedItem::Commit(commit) = item {
                keys.insert(commit.key_id);
                is_later_life |= commit.life > 1;
            }
        }
        let keys: Vec<[u8; 16]> = keys.into_iter().collect();
        let erased = self.shared.slots.erased_among(&keys).await?;
        if is_later_life {
            // That the lives before it are erased is on this disk: a new one begins after every disk has it.
            self.told_first = self.told_first.max(self.shared.slots.newest_erasure().await?);
            self.untold |= self.checkpoint.told.1 < self.told_first;
        }
        current.take_out(&erased);
        current.is_checked = true;
        Ok(())
    }

    /// Reads erasures that came since.
    async fn learn_erasures(&mut self) -> Result<(), SubscribeError> {
        while self.untold && self.notices.is_empty() {
            // Whatever this disk's ledger has is taken out of all that comes: it can be told.
            let (after, last) = (self.checkpoint.told.1, self.told_first.max(*self.told.borrow()));
            let page = self.shared.slots.erasures_behind(after, last, ERASURES_MAX).await?;
            let is_last = page.len() < ERASURES_MAX as usize;
            let keys: BTreeSet<[u8; 16]> = page.iter().map(|(_, key_id, _)| *key_id).collect();
            if let Some(current) = &mut self.current {
                current.take_out(&keys);
            }
            let newest = page.last().map(|(number, ..)| *number);
            let filter = &self.common.filter;
            // Whose kind is not known may have been wanted.
            let is_wanted = |erased: &Erased| erased.kind.as_deref().is_none_or(|kind| filter.matches_kind(kind));
            self.notices = page
                .into_iter()
                .filter(|(_, _, erased)| is_wanted(erased))
                .map(|(number, _, erased)| (number, erased))
                .collect();
            if let Some(number) = newest.filter(|_| self.notices.is_empty()) {
                self.checkpoint.told.1 = number;
            }
            if is_last {
                self.untold = false;
                if self.notices.is_empty() {
                    self.checkpoint.told.1 = self.checkpoint.told.1.max(last);
                }
            }
        }
        Ok(())
    }

    /// The next of the current answer; none at its end.
    fn hand_out(&mut self) -> Option<Delivery> {
        loop {
            if let Some(part) = self.current.as_mut()?.part.as_mut()
                && let Some(rest) = &mut part.commit
            {
                let event = rest.events.next();
                self.last = Some(rest.place);
                if rest.events.len() == 0 {
                    self.common.pass(rest.place.0, rest.place.1);
                    part.commit = None;
                }
                match event {
                    Some(event) => return Some(Delivery::Event(event)),
                    None => continue,
                }
            }
            match self.next_item()? {
                FedItem::Commit(commit) => {
                    let (place, key_id) = ((commit.slot, commit.seq), commit.key_id);
                    let events: Vec<StoredEvent> = commit.into_events().collect();
                    let rest = Rest { place, key_id, events: events.into_iter() };
                    self.current.as_mut()?.part.as_mut()?.commit = Some(rest);
                }
                FedItem::Unreadable(place, unreadable) => {
                    self.last = place;
                    if let Some((slot, seq)) = place {
                        self.common.pass(slot, seq);
                    }
                    return Some(Delivery::Unreadable(unreadable));
                }
            }
        }
    }

    /// The next item of the current answer, which does not count as handed out yet; none at its end.
    fn next_item(&mut self) -> Option<FedItem> {
        let current = self.current.as_mut()?;
        loop {
            if current.part.is_none() {
                let part = current.answer.parts.pop_front()?;
                current.part =
                    Some(begin_part(&self.shared, &self.common, &mut self.checkpoint, &current.answer, part));
            }
            let Some(part) = &mut current.part else { return None };
            if let Some(item) = part.items.next() {
                return Some(item);
            }
            for (slot, seq) in part.passed.drain(..) {
                self.common.pass(slot, seq);
            }
            let (shard, last) = (usize::from(part.shard), part.last);
            let Answer { source, scan, .. } = &current.answer;
            if source.scan.load(SeqCst) == *scan {
                let positions = self.checkpoint.positions.entry(source.disk).or_default();
                positions.resize(positions.len().max(shard + 1), 0);
                positions[shard] = last;
            }
            current.part = None;
        }
    }
}

/// Looks what of a part comes next in its slot, and leaves out what was handed out before.
fn begin_part(
    shared: &Shared,
    common: &Common,
    checkpoint: &mut SlotCheckpoint,
    answer: &Answer,
    part: FeedPart,
) -> Part {
    let FeedPart { shard, last, passed, mut items } = part;
    let source = &answer.source;
    let mut missing = HashSet::new();
    let mut gaps = Vec::new();
    for (slot, first, _) in &passed {
        let next = common.seq(*slot) + 1;
        if *first <= next {
            continue;
        }
        if answer.is_whole {
            let why = format!(
                "commits {next} to {} of slot {slot} are not in the log of {}; restore that node from a backup",
                first - 1,
                shared.name_of(source.disk)
            );
            let unreadable = Unreadable { shard, position: 0, entity: None, version: None, why };
            gaps.push(FedItem::Unreadable(Some((*slot, first - 1)), unreadable));
        } else {
            // Its positions were of no use. It is read from its beginning.
            missing.insert(*slot);
        }
    }
    if !missing.is_empty() && source.scan.compare_exchange(answer.scan, answer.scan + 1, SeqCst, SeqCst).is_ok() {
        checkpoint.positions.remove(&source.disk);
        tracing::warn!(target: "kuma::cluster", node = %shared.name_of(source.disk), slots = missing.len(), "a subscription misses commits behind its checkpoint; the node's logs are read once more");
    }
    items.retain(|item| item.place().is_none_or(|(slot, seq)| seq > common.seq(slot) && !missing.contains(&slot)));
    gaps.extend(items);
    for item in &mut gaps {
        if let FedItem::Unreadable(_, unreadable) = item
            && source.disk != shared.own
        {
            unreadable.why = format!("at node {}: {}", shared.name_of(source.disk), unreadable.why);
        }
    }
    let passed = passed.into_iter().filter(|(slot, ..)| !missing.contains(slot)).map(|(slot, _, to)| (slot, to));
    Part { shard, last, passed: passed.collect(), items: gaps.into_iter(), commit: None }
}

impl Current {
    /// Takes out the commits that were sealed with these keys.
    fn take_out(&mut self, keys: &BTreeSet<[u8; 16]>) {
        if keys.is_empty() {
            return;
        }
        let stays = |item: &FedItem| !matches!(item, FedItem::Commit(commit) if keys.contains(&commit.key_id));
        for part in &mut self.answer.parts {
            part.items.retain(stays);
        }
        let Some(part) = &mut self.part else { return };
        let items: Vec<FedItem> = std::mem::take(&mut part.items).filter(stays).collect();
        part.items = items.into_iter();
        if part.commit.as_ref().is_some_and(|rest| keys.contains(&rest.key_id)) {
            part.commit = None;
        }
    }
}

/// Reads every node that there is, for as long as it is one.
async fn read_all(shared: Weak<Shared>, common: Arc<Common>, sender: mpsc::UnboundedSender<Told>) {
    let mut readers = JoinSet::new();
    let mut running: HashMap<DiskId, AbortHandle> = HashMap::new();
    loop {
        let Some(here) = shared.upgrade().filter(|here| !here.is_closing.load(SeqCst)) else { return };
        let wanted: BTreeSet<DiskId> = here.peers().into_iter().chain([here.own]).collect();
        drop(here);
        running.retain(|disk, reader| {
            let stays = wanted.contains(disk);
            if !stays {
                reader.abort();
                common.sources.lock().remove(disk);
            }
            stays
        });
        for disk in wanted {
            running.entry(disk).or_insert_with(|| {
                let source = Arc::new(Source {
                    disk,
                    scan: AtomicU32::new(0),
                    has_answered: AtomicBool::new(false),
                    behind: AtomicU64::new(0),
                    trouble: Mutex::default(),
                });
                common.sources.lock().insert(disk, source.clone());
                readers.spawn(read_one(shared.clone(), common.clone(), source, sender.clone()))
            });
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// How far a node was read.
struct Cursor {
    scan: u32,
    after: Vec<u64>,
    is_whole: bool,
    /// Where its logs ended when they began to be read from their beginning.
    again_until: Option<Vec<u64>>,
    /// Slots that came to it from elsewhere.
    came: BTreeSet<Slot>,
    first: u16,
}

impl Cursor {
    fn new(scan: u32, after: Vec<u64>) -> Self {
        let is_whole = after.iter().all(|position| *position == 0);
        Cursor { scan, after, is_whole, again_until: None, came: BTreeSet::new(), first: 0 }
    }

    fn after(&self, shard: usize) -> u64 {
        self.after.get(shard).copied().unwrap_or_default()
    }

    fn ask(&self, common: &Common) -> FeedAsk {
        let is_again = self.is_whole
            && self
                .again_until
                .as_ref()
                .is_none_or(|ends| ends.iter().enumerate().any(|(shard, end)| self.after(shard) < *end));
        let known = (0..u64::from(SLOTS)).map(Slot::new).map(|slot| (slot, common.seq(slot)));
        let seen = known.filter(|(slot, seq)| is_again && *seq > 0 || self.came.contains(slot)).collect();
        FeedAsk {
            filter: common.filter.clone(),
            since_us: common.since_us,
            after: self.after.clone(),
            first: self.first,
            seen,
        }
    }

    fn take_in(&mut self, answer: &FeedAnswer) {
        if self.is_whole && self.again_until.is_none() {
            self.again_until = Some(answer.ends.clone());
        }
        self.after.resize(self.after.len().max(answer.ends.len()), 0);
        for part in &answer.parts {
            if let Some(after) = self.after.get_mut(usize::from(part.shard)) {
                *after = part.last.max(*after);
            }
        }
        match answer.came || !answer.unknown.is_empty() {
            true => self.came.extend(&answer.unknown),
            false => self.came.clear(),
        }
        self.first = (self.first + 1) % (answer.ends.len().max(1) as u16);
    }

    fn behind(&self, ends: &[u64]) -> u64 {
        ends.iter().enumerate().map(|(shard, end)| end.saturating_sub(self.after(shard))).sum()
    }
}

/// Reads one node.
async fn read_one(shared: Weak<Shared>, common: Arc<Common>, source: Arc<Source>, sender: mpsc::UnboundedSender<Told>) {
    // What bounds the channel.
    let room = Arc::new(Semaphore::new(ANSWERS_AHEAD));
    let mut cursor = Cursor::new(0, common.began.positions.get(&source.disk).cloned().unwrap_or_default());
    let (mut pause, mut is_checked) = (AGAIN[0], false);
    loop {
        let scan = source.scan.load(SeqCst);
        if scan != cursor.scan {
            cursor = Cursor::new(scan, Vec::new());
        }
        let Ok(permit) = room.clone().acquire_owned().await else { return };
        let Some(here) = shared.upgrade().filter(|here| !here.is_closing.load(SeqCst)) else { return };
        let asked = match is_checked {
            false => match ends_of(&here, source.disk).await {
                Ok(ends) => match ahead(&common.began, &ends) {
                    Some(error) => {
                        let _ = sender.send(Told::Ahead(error));
                        return;
                    }
                    None => {
                        is_checked = true;
                        feed_of(&here, source.disk, cursor.ask(&common)).await
                    }
                },
                Err(why) => Err(why),
            },
            true => feed_of(&here, source.disk, cursor.ask(&common)).await,
        };
        drop(here);
        let answer = match asked {
            Ok(answer) => answer,
            Err(why) => {
                drop(permit);
                source.in_trouble(why);
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(AGAIN[1]);
                continue;
            }
        };
        cursor.take_in(&answer);
        source.behind.store(cursor.behind(&answer.ends), SeqCst);
        source.has_answered.store(true, SeqCst);
        let is_troubled = !answer.troubles.is_empty();
        match answer.troubles.first() {
            Some((shard, why)) => source.in_trouble(format!("shard {shard}: {why}")),
            None => *source.trouble.lock() = None,
        }
        let has_parts = !answer.parts.is_empty();
        if has_parts {
            let (source, parts) = (source.clone(), answer.parts.into());
            let Cursor { scan, is_whole, .. } = cursor;
            if sender.send(Told::Answer(Answer { source, scan, is_whole, parts, _room: permit })).is_err() {
                return;
            }
        }
        match is_troubled && !has_parts {
            true => {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(AGAIN[1]);
            }
            false => pause = AGAIN[0],
        }
    }
}

/// Whether the checkpoint tells of commits that an owner does not have.
fn ahead(began: &SlotCheckpoint, ends: &SlotEnds) -> Option<SlotCheckpointError> {
    let ahead = ends.slots.iter().find(|(slot, end)| began.seq(*slot) > *end)?;
    Some(SlotCheckpointError::Ahead { slot: ahead.0, seq: began.seq(ahead.0), end: ahead.1 })
}

/// What comes next in the logs of a node.
async fn feed_of(shared: &Arc<Shared>, disk: DiskId, ask: FeedAsk) -> Result<FeedAnswer, String> {
    let frame = FeedFrame { ask, wait_ms: WAIT.as_millis() as u64 };
    let reply = match disk == shared.own {
        true => serve(shared, frame).await,
        false => {
            let reply = call(shared, disk, kind::FEED, wire::encode(&frame)).await?;
            wire::decode(&reply).ok_or("its answer cannot be read; it runs another version")?
        }
    };
    match reply {
        FeedReply::Answer(answer) => Ok(answer),
        FeedReply::NotReady => Err("it does not serve yet".to_owned()),
    }
}

/// One commit, from whoever owns its slot.
pub(crate) async fn commit_of(shared: &Arc<Shared>, frame: CommitFrame) -> Result<Option<FedItem>, String> {
    let until = Instant::now() + ENDS_WITHIN;
    loop {
        let slot = frame.slot;
        let owner =
            if shared.is_owner(slot) { Some(shared.own) } else { shared.routes.get(slot).map(|(_, disk)| disk) };
        let reply = match owner {
            None => Err(format!("who owns slot {slot} is not known yet")),
            Some(disk) if disk == shared.own => Ok(commit(shared, &frame).await),
            Some(disk) => match call(shared, disk, kind::COMMIT, wire::encode(&frame)).await {
                Ok(reply) => wire::decode(&reply).ok_or_else(|| {
                    format!("node {} runs another version: its answer cannot be read", shared.name_of(disk))
                }),
                Err(why) => Err(format!("slot {slot} is out of reach with node {}: {why}", shared.name_of(disk))),
            },
        };
        let why = match reply {
            Ok(CommitReply::Found(found)) => return Ok(found),
            Ok(CommitReply::Failed(why)) => return Err(why),
            Ok(CommitReply::NotOwner) => format!("slot {slot} is on its way"),
            Err(why) => why,
        };
        if Instant::now() > until || shared.is_closing.load(SeqCst) {
            return Err(why);
        }
        tokio::time::sleep(AGAIN[0]).await;
    }
}

/// One commit of a slot of this node.
pub(crate) async fn commit(shared: &Shared, frame: &CommitFrame) -> CommitReply {
    let CommitFrame { filter, slot, seq, entity } = frame;
    if !shared.has_passed.load(SeqCst) || !shared.is_owner(*slot) {
        return CommitReply::NotOwner;
    }
    match shared.slots.commit(filter, *slot, *seq, *entity).await {
        // It was given away meanwhile: that it is not here says nothing.
        _ if !shared.is_owner(*slot) => CommitReply::NotOwner,
        Ok(found) => CommitReply::Found(found),
        Err(why) => CommitReply::Failed(why),
    }
}

async fn ends_of(shared: &Arc<Shared>, disk: DiskId) -> Result<SlotEnds, String> {
    let ends = match disk == shared.own {
        true => ends(shared),
        false => {
            let reply = call(shared, disk, kind::ENDS, Vec::new()).await?;
            wire::decode::<Option<SlotEnds>>(&reply).ok_or("its answer cannot be read; it runs another version")?
        }
    };
    ends.ok_or_else(|| "it does not serve yet, or a shard of it is out of use".to_owned())
}

async fn call(shared: &Shared, disk: DiskId, kind: u8, body: Vec<u8>) -> Result<Vec<u8>, String> {
    let transport = shared.transport().ok_or("the node is starting")?;
    if !transport.is_up(disk) {
        return Err("there is no link to it".to_owned());
    }
    transport.call(disk, kind, body, ANSWER_WITHIN).await.map_err(|error| error.to_string())
}

/// Where the log of every slot ends, and positions that all of it is behind.
async fn now(shared: &Arc<Shared>) -> Result<(Vec<u64>, BTreeMap<DiskId, Vec<u64>>), SubscribeError> {
    let begun = Instant::now();
    loop {
        // Positions first: whatever is before them is before the seqs that are asked for then, wherever it goes meanwhile.
        let positions = ends_of_all(shared).await;
        let slot = match seqs_now(shared).await {
            Ok(seqs) => {
                return Ok((seqs, positions.into_iter().map(|(disk, ends)| (disk, ends.positions)).collect()));
            }
            Err(slot) => slot,
        };
        if shared.is_closing.load(SeqCst) {
            return Err(SubscribeError::ShuttingDown);
        }
        if begun.elapsed() > ENDS_WITHIN {
            let node = shared.routes.get(slot).map(|(_, disk)| shared.name_of(disk));
            return Err(SubscribeError::OwnerUnreachable { slot, node });
        }
        // It is on its way, or its owner is.
        tokio::time::sleep(AGAIN[0]).await;
    }
}

/// By slot, the seq of its last commit; or a slot whose owner cannot be asked.
pub(crate) async fn seqs_now(shared: &Arc<Shared>) -> Result<Vec<u64>, Slot> {
    let (mut seqs, mut known) = (vec![0; usize::from(SLOTS)], HashSet::new());
    for (slot, end) in ends_of_all(shared).await.into_iter().flat_map(|(_, ends)| ends.slots) {
        if let Some(seq) = seqs.get_mut(usize::from(slot.number())) {
            *seq = end.max(*seq);
            known.insert(slot);
        }
    }
    match (0..u64::from(SLOTS)).map(Slot::new).find(|slot| !known.contains(slot)) {
        Some(missing) => Err(missing),
        None => Ok(seqs),
    }
}

async fn ends_of_all(shared: &Arc<Shared>) -> Vec<(DiskId, SlotEnds)> {
    let disks = shared.peers().into_iter().chain([shared.own]);
    let asked = disks.map(|disk| async move { Some((disk, ends_of(shared, disk).await.ok()?)) });
    join_all(asked).await.into_iter().flatten().collect()
}

/// How far the logs of this node's slots go; none if that cannot be said.
pub(crate) fn ends(shared: &Shared) -> Option<SlotEnds> {
    if !shared.has_passed.load(SeqCst) {
        return None;
    }
    shared.slots.ends().ok()
}

/// Answers what comes next in the logs of this node's slots.
pub(crate) async fn serve(shared: &Arc<Shared>, frame: FeedFrame) -> FeedReply {
    let FeedFrame { ask, wait_ms } = frame;
    let until = Instant::now() + Duration::from_millis(wait_ms).min(WAIT);
    loop {
        if !shared.has_passed.load(SeqCst) || shared.is_closing.load(SeqCst) {
            return FeedReply::NotReady;
        }
        let Ok(turn) = shared.feeding.acquire().await else { return FeedReply::NotReady };
        let answer = shared.slots.feed(&ask).await;
        drop(turn);
        let left = until.saturating_duration_since(Instant::now());
        if answer.is_news() || !answer.troubles.is_empty() || left.is_zero() {
            return FeedReply::Answer(answer);
        }
        let is_undecided =
            answer.ends.iter().zip(ask.after.iter().chain(std::iter::repeat(&0))).any(|(end, at)| end > at);
        match is_undecided {
            true => tokio::time::sleep(UNDECIDED_WAIT.min(left)).await,
            false => shared.slots.more_than(&ask.after, left).await,
        }
    }
}
