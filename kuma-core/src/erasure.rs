//! Erasing an entity: one operation, that goes on by itself once it has begun.
//!
//! ```text
//! asked ──audit: requested──► tombstone durable ──► drained ──► read models purged ──► key destroyed ──► rows are stubs ──► logs cut ──► audit: completed, receipt
//!   ▲                              │ from here on the entity answers "erased", and there is no way back
//!   └── nothing happened           └── after a failure or a crash: begun again here, until it succeeds
//! ```
//!
//! Invariants:
//! - The tombstone is durable before anything is destroyed, and the key is destroyed before any row: what a crash leaves of the rows
//!   cannot be read.
//! - A receipt is given only when nothing of the entity is in any live file: each log that held it was cut to nothing.
//! - One actor a store erases. Erasures that are asked for while it works are one batch, which shares every sync and cuts each log once.
//! - Each step can be repeated: it does what is left.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use fail::fail_point;
use futures_util::future::{join_all, try_join_all};
use kuma_crypto::KeyId;
use kuma_shard::{
    CommitError, CopyId, EntityHash, EntityRow, ErasedRows, NodeStore, Purged, ReceiptRow, Slot, Tombstone,
};
use ractor::{Actor, ActorProcessingErr, ActorRef};
use tokio::sync::oneshot;

use crate::{
    EraseError, ReadError, Reason, Receipt, ReceiptId, Refused, Unavailable, VaultError,
    audit::{AuditEvent, patiently},
    durable::DurableSubscriptions,
    elsewhere::{Elsewhere, ErasedLife},
    ledger::text_of,
    model_dir::ModelDir,
    projections::PurgedModel,
    projector::PurgedLife,
    receipt::{LastBackups, Statement, StoreOutcome},
    replay::Opener,
    restore_to::{self, Replaced, RestoreRequest, Restored},
    shard_core::{Erasing, Fate, ShardCore, Working},
    store::{self, Inner},
};

/// Erasures in a batch.
const BATCH_MAX: usize = 256;
/// How long an entity has to come to an end with what it was asked. One that takes longer (its code hangs) keeps no other waiting.
const DRAIN_MAX: Duration = Duration::from_secs(5);
/// How long durable subscriptions that are being consumed have to confirm an erasure before its receipt says that they have not.
const CONFIRM_MAX: Duration = Duration::from_secs(5);
/// How long until an erasure that failed is tried again; each time twice as long, up to a minute: a shard that is out of use stays so.
const RETRY_AFTER: Duration = Duration::from_secs(1);
const RETRIES_DOUBLED: u32 = 6;

/// What the eraser can be asked.
pub(crate) enum EraserMessage {
    /// Erase this entity.
    Erase(Request),
    /// Restore this entity to an earlier version.
    Restore(Box<RestoreRequest>),
    /// Erase what has gathered.
    Flush,
    /// Go on with what is not finished.
    Resume,
    /// There are tombstones that subscribers are to be told of.
    Told,
    /// A subscriber has confirmed the erasures whose tombstones have these numbers: the ones behind `after`, up to `last`.
    Confirmed { who: String, after: i64, last: i64, done: oneshot::Sender<()> },
}

impl ractor::Message for EraserMessage {} // local only

/// Whoever asks.
pub(crate) struct Request {
    pub(crate) entity: EntityHash,
    pub(crate) core: Arc<ShardCore>,
    pub(crate) slot: Slot,
    /// Which life of it; none: the one that it has.
    pub(crate) life: Option<u32>,
    pub(crate) reason: Arc<Reason>,
    pub(crate) reply: Reply,
}

pub(crate) type Reply = oneshot::Sender<Result<Receipt, EraseError>>;

pub(crate) struct Eraser;

pub(crate) struct EraserState {
    /// The store does not stay open for its eraser.
    pub(crate) store: Weak<Inner>,
    pub(crate) node: NodeStore,
    pub(crate) erasing: Erasing,
    pending: Vec<Request>,
    flush_queued: bool,
    /// Whether there is, or may be, something unfinished.
    owing: bool,
    resume_queued: bool,
    /// Whether there may be a tombstone that is not acted on: it is not known whether it was written.
    uncertain: bool,
    /// How often in a row something was left unfinished.
    retries: u32,
    /// Lives that are gone here, and that other disks have not answered of.
    elsewhere: HashSet<[u8; 16]>,
}

impl EraserState {
    /// Of a store that was opened with unfinished erasures, or without.
    pub(crate) fn new(store: Weak<Inner>, node: NodeStore, erasing: Erasing, owing: bool) -> Self {
        EraserState {
            store,
            node,
            erasing,
            pending: Vec::new(),
            flush_queued: false,
            owing,
            resume_queued: owing,
            uncertain: false,
            retries: 0,
            elsewhere: HashSet::new(),
        }
    }
}

impl Actor for Eraser {
    type Msg = EraserMessage;
    type State = EraserState;
    type Arguments = EraserState;

    async fn pre_start(
        &self,
        me: ActorRef<EraserMessage>,
        state: EraserState,
    ) -> Result<EraserState, ActorProcessingErr> {
        if state.owing {
            me.cast(EraserMessage::Resume)?;
        }
        Ok(state)
    }

    async fn handle(
        &self,
        me: ActorRef<EraserMessage>,
        message: EraserMessage,
        state: &mut EraserState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            EraserMessage::Erase(request) => {
                state.pending.push(request);
                if state.pending.len() >= BATCH_MAX {
                    state.flush().await;
                } else if !state.flush_queued {
                    // Behind all that has gathered. It fails only for an actor on its way out.
                    state.flush_queued = me.cast(EraserMessage::Flush).is_ok();
                }
            }
            EraserMessage::Restore(request) => state.restore(*request).await,
            EraserMessage::Flush => {
                state.flush_queued = false;
                state.flush().await;
            }
            EraserMessage::Resume => {
                state.resume_queued = false;
                state.resume().await;
            }
            EraserMessage::Told => state.tell().await,
            EraserMessage::Confirmed { who, after, last, done } => {
                if let Err(error) = state.confirm(&who, after, last).await {
                    // Then it is done again when the subscription is opened again.
                    tracing::warn!(%who, %error, "that an erasure was confirmed could not be noted in its receipt yet");
                } else {
                    let _ = done.send(());
                }
            }
        }
        if state.owing && !state.resume_queued {
            state.resume_queued = true;
            me.send_after(RETRY_AFTER * (1 << state.retries.min(RETRIES_DOUBLED)), || EraserMessage::Resume);
        }
        Ok(())
    }
}

/// An erasure on its way.
struct Job {
    tombstone: Tombstone,
    /// None if the shard is out of use.
    core: Option<Arc<ShardCore>>,
    /// Why; none if it was begun before.
    reason: Option<Arc<Reason>>,
    waiting: Vec<Reply>,
    rows: ErasedRows,
    /// Read models that were purged.
    models: Vec<PurgedModel>,
    /// Subscribers that have not confirmed.
    pending: Vec<String>,
    /// The entity as it was found.
    row: Option<EntityRow>,
    /// Why it cannot be finished now.
    obstacle: Option<String>,
    receipt: Option<Receipt>,
    /// Keeps the slot here while its rows change.
    working: Option<Working>,
    /// Whether nothing of it is on this disk any more.
    is_gone_here: bool,
    /// Kind and id, for read models on other nodes.
    name: Option<(String, String)>,
    /// Other nodes that have no key any more, and disks that were not asked.
    nodes: Vec<String>,
    without: Vec<String>,
}

impl Job {
    fn new(tombstone: Tombstone, core: Option<Arc<ShardCore>>, reason: Option<Arc<Reason>>) -> Self {
        let (waiting, rows, models, pending) = (Vec::new(), ErasedRows::default(), Vec::new(), Vec::new());
        Job {
            tombstone,
            core,
            reason,
            waiting,
            rows,
            models,
            pending,
            row: None,
            obstacle: None,
            receipt: None,
            working: None,
            is_gone_here: false,
            name: None,
            nodes: Vec::new(),
            without: Vec::new(),
        }
    }

    fn entity(&self) -> EntityHash {
        self.tombstone.id_hash
    }

    fn receipt_id(&self) -> ReceiptId {
        ReceiptId(self.tombstone.receipt_id)
    }

    fn block(&mut self, why: &impl std::fmt::Display) {
        self.obstacle.get_or_insert_with(|| why.to_string());
    }

    /// Takes the entity out of memory.
    async fn drain(&mut self) {
        let Some(core) = self.core.clone() else { return };
        if let Err(why) = drain(&core, self.entity()).await {
            self.block(&why);
        }
        // It may be quarantined. Whatever was wrong with it, it is erased now.
        core.forgive(self.entity());
    }

    /// Makes stubs of the entity's rows.
    async fn erase_rows(&mut self) {
        if self.obstacle.is_some() {
            return;
        }
        let Some(core) = self.core.clone() else { return self.block(&"its shard is out of use") };
        match erase_rows(&core, &self.tombstone, self.reason.is_none()).await {
            Ok((rows, row)) => (self.rows, self.row) = (rows, row),
            Err(why) => self.block(&why),
        }
    }
}

async fn erase_rows(
    core: &ShardCore,
    tombstone: &Tombstone,
    resumed: bool,
) -> Result<(ErasedRows, Option<EntityRow>), String> {
    let words = |error: &dyn std::fmt::Display| error.to_string();
    let lives = core.shard.lives(CopyId::LIVE, tombstone.id_hash).await.map_err(|error| words(&error))?;
    let Some(row) = lives.into_iter().find(|row| row.key_id == tombstone.key_id) else {
        return Ok((ErasedRows::default(), None));
    };
    let mut rows = core.shard.erase(&row, tombstone.at_us).await.map_err(|error| words(&error))?;
    if resumed {
        // Those of the runs before as well.
        (rows.commits, rows.events) = core.shard.stubs(&row).await.map_err(|error| words(&error))?;
    }
    Ok((rows, Some(row)))
}

/// Takes an entity out of memory, unless it does not come to an end with what it was asked.
pub(crate) async fn drain(core: &ShardCore, entity: EntityHash) -> Result<(), &'static str> {
    let drained = tokio::time::timeout(DRAIN_MAX, store::passivate(core, entity)).await;
    drained.map_err(|_| "the entity is still busy with what it was asked before")
}

impl EraserState {
    /// Erases what has gathered.
    async fn flush(&mut self) {
        let requests = std::mem::take(&mut self.pending);
        // Nobody is left to be told either.
        let Some(inner) = self.store.upgrade() else { return };
        let mut jobs = self.resolve(&inner, requests).await;
        if jobs.is_empty() {
            return;
        }
        match self.begin(&inner, &jobs).await {
            Ok(()) => self.carry_out(&inner, jobs).await,
            Err(NotBegun { detail, is_known }) => {
                self.owing |= !is_known;
                self.uncertain |= !is_known;
                for job in &mut jobs {
                    let (entity, receipt_id, detail) = (job.entity(), job.receipt_id(), detail.clone());
                    let error = || match is_known && job.reason.is_some() {
                        true => Unavailable::NotErased { entity, detail: detail.clone() }.into(),
                        // It was begun before, or may have been now.
                        false => EraseError::Unfinished { entity, receipt_id, detail: detail.clone() },
                    };
                    // A caller that is gone does not want to know.
                    job.waiting.drain(..).for_each(|reply| drop(reply.send(Err(error()))));
                    if let Some(working) = job.working.take().filter(|_| !is_known) {
                        self.erasing.hold(job.tombstone.key_id, working);
                    }
                }
            }
        }
    }

    fn is_erasing(&self, key_id: [u8; 16]) -> bool {
        self.erasing.fate(key_id) == Some(Fate::Erased)
    }

    /// Finds out what each request is about, and answers those that need no work.
    async fn resolve(&self, inner: &Inner, requests: Vec<Request>) -> Vec<Job> {
        let at_us = inner.now_us();
        let mut jobs: Vec<Job> = Vec::new();
        let mut by_key: HashMap<[u8; 16], usize> = HashMap::new();
        for Request { entity, core, slot, life, reason, reply } in requests {
            // In this order: whoever closes the gate waits for work that has begun.
            let working = self.erasing.work_in(slot);
            let found = match inner.gates().check(slot) {
                Ok(()) => self.look_up(&core, entity, slot, life, reason, at_us).await,
                Err(elsewhere) => Err(elsewhere.into()),
            };
            match found {
                Ok(Found::Done(receipt)) => drop(reply.send(Ok(*receipt))),
                Ok(Found::ToDo(job)) => {
                    // The same entity may be asked for twice.
                    let index = *by_key.entry(job.tombstone.key_id).or_insert(jobs.len());
                    if index == jobs.len() {
                        jobs.push(Job { working: Some(working), ..*job });
                    }
                    jobs[index].waiting.push(reply);
                }
                Err(error) => drop(reply.send(Err(error))),
            }
        }
        jobs
    }

    async fn look_up(
        &self,
        core: &Arc<ShardCore>,
        entity: EntityHash,
        slot: Slot,
        life: Option<u32>,
        reason: Arc<Reason>,
        at_us: i64,
    ) -> Result<Found, EraseError> {
        let unreadable = |error: kuma_shard::ReadError| EraseError::from(ReadError::unreadable(entity, error));
        let row = core.shard.find_entity(CopyId::LIVE, entity).await.map_err(unreadable)?;
        let row = row.ok_or(Refused::NeverWritten { entity })?;
        if let Some(asked) = life.filter(|asked| *asked != row.life) {
            return match self.receipt_of_life(entity, asked).await? {
                Some(receipt) => Ok(Found::Done(Box::new(receipt))),
                None => Err(Refused::OtherLife { entity, asked, actual: row.life }.into()),
            };
        }
        if row.erased_at_us.is_some() || self.is_erasing(row.key_id) {
            let tombstones = self.node.tombstones_of(entity).await.map_err(unreadable)?;
            if let Some(tombstone) = tombstones.into_iter().find(|tombstone| tombstone.key_id == row.key_id) {
                let receipt = self.node.receipt(tombstone.receipt_id).await.map_err(unreadable)?;
                return match receipt.filter(|_| !self.is_erasing(row.key_id)) {
                    Some(body) => Ok(Found::Done(Box::new(parse(entity, &body)?))),
                    None => Ok(Found::ToDo(Box::new(Job::new(tombstone, Some(core.clone()), None)))),
                };
            }
        }
        let mut receipt_id = [0; 16];
        getrandom::fill(&mut receipt_id)
            .map_err(|error| Unavailable::NotErased { entity, detail: error.to_string() })?;
        let tombstone = Tombstone { key_id: row.key_id, id_hash: entity, slot, receipt_id, at_us };
        Ok(Found::ToDo(Box::new(Job::new(tombstone, Some(core.clone()), Some(reason)))))
    }

    /// The receipt of a life that the entity had.
    async fn receipt_of_life(&self, entity: EntityHash, life: u32) -> Result<Option<Receipt>, EraseError> {
        let unreadable = |error: kuma_shard::ReadError| EraseError::from(ReadError::unreadable(entity, error));
        for tombstone in self.node.tombstones_of(entity).await.map_err(unreadable)? {
            if let Some(body) = self.node.receipt(tombstone.receipt_id).await.map_err(unreadable)? {
                let receipt = parse(entity, &body)?;
                if receipt.receipt.life == Some(life) {
                    return Ok(Some(receipt));
                }
            }
        }
        Ok(None)
    }

    /// Makes the intent durable: from then on there is no way back.
    async fn begin(&self, inner: &Arc<Inner>, jobs: &[Job]) -> Result<(), NotBegun> {
        let audit = &inner.own_audit_log();
        let new = || jobs.iter().filter_map(|job| Some((job, job.reason.as_deref()?)));
        let requested = new().map(|(job, reason)| AuditEvent::requested(job.receipt_id(), job.entity(), reason));
        try_join_all(requested.map(|event| patiently(move || audit.append(event.clone()))))
            .await
            .map_err(|error| NotBegun { detail: error.to_string(), is_known: true })?;
        fail_point!("erase.requested");
        let tombstones: Vec<Tombstone> = new().map(|(job, _)| job.tombstone).collect();
        if !tombstones.is_empty() {
            self.node.entomb(tombstones).await.map_err(|error| match error {
                CommitError::NotWritten(why) => NotBegun { detail: why.to_string(), is_known: true },
                error => {
                    NotBegun { detail: format!("whether it has begun is not known yet: {error}"), is_known: false }
                }
            })?;
        }
        fail_point!("erase.tombstones_durable", |_| unreachable!("it only waits"));
        new().for_each(|(job, _)| self.erasing.entomb(&job.tombstone));
        Ok(())
    }

    /// Replaces the life of an entity, and erases the former one.
    async fn restore(&mut self, request: RestoreRequest) {
        let Some(inner) = self.store.upgrade() else { return };
        let (entity, slot) = (request.who.identity.hash, request.who.identity.slot);
        let working = self.erasing.work_in(slot);
        let replaced = match inner.gates().check(slot) {
            Ok(()) => restore_to::replace(&inner, &self.node, &self.erasing, &request).await,
            Err(elsewhere) => Err(elsewhere.into()),
        };
        let restored = match replaced {
            Ok(Replaced { tombstone, life }) => {
                let (reply, receipt) = oneshot::channel();
                let mut job = Job::new(tombstone, Some(request.core.clone()), Some(request.reason.clone()));
                job.working = Some(working);
                job.waiting.push(reply);
                self.carry_out(&inner, vec![job]).await;
                let receipt = receipt.await.unwrap_or_else(|_| Err(Unavailable::ShuttingDown.into()));
                receipt.map(|receipt| Restored { life, version: request.version, receipt })
            }
            Err(error) => {
                // What is not certain is found out; the slot stays until then.
                self.erasing.hold(entity.0, working);
                self.owing = true;
                Err(error)
            }
        };
        // A caller that is gone does not want to know.
        let _ = request.reply.send(restored);
    }

    /// Goes on with what is not finished.
    async fn resume(&mut self) {
        let Some(inner) = self.store.upgrade() else { return };
        if let Err(error) = restore_to::settle(&inner, &self.node, &self.erasing).await {
            return tracing::warn!(%error, "it is not known yet which entities were restored; it is looked at again");
        }
        // Before the ledger is read: what came with its slot later is looked at later.
        let taken_over = self.erasing.taken_over();
        let unfinished = match self.node.unfinished().await {
            Ok(unfinished) => unfinished,
            Err(error) => {
                self.erasing.note_taken_over(taken_over);
                return tracing::warn!(%error, "unfinished erasures cannot be read; they are looked for again");
            }
        };
        self.owing = false;
        let open: HashSet<[u8; 16]> = unfinished.iter().map(|tombstone| tombstone.key_id).collect();
        // Its receipt came before its slot did: there is nothing to go on with.
        taken_over.iter().filter(|key_id| !open.contains(*key_id)).for_each(|key_id| self.erasing.remove(*key_id));
        let (own, others): (Vec<Tombstone>, Vec<Tombstone>) =
            unfinished.into_iter().partition(|tombstone| inner.owns(tombstone.slot));
        self.leave_to_others(&own, others);
        own.iter().for_each(|tombstone| self.erasing.entomb(tombstone));
        self.uncertain = false;
        self.tell().await;
        let are_up = inner.other_disks().is_none_or(|others| others.are_up());
        let mut left = own.into_iter().filter(|tombstone| are_up || !self.elsewhere.contains(&tombstone.key_id));
        let left: Vec<Tombstone> = left.by_ref().collect();
        self.owing |= !are_up && !self.elsewhere.is_empty();
        for batch in left.chunks(BATCH_MAX) {
            let mut jobs = Vec::with_capacity(batch.len());
            for tombstone in batch {
                let working = self.erasing.work_in(tombstone.slot);
                match inner.gates().check(tombstone.slot) {
                    Ok(()) => {
                        let job = Job::new(*tombstone, inner.core_of_slot(tombstone.slot), None);
                        jobs.push(Job { working: Some(working), ..job });
                    }
                    // The slot is about to leave, or is not served yet.
                    Err(_) => self.owing = true,
                }
            }
            if !jobs.is_empty() {
                self.carry_out(&inner, jobs).await;
            }
        }
        self.retries = if self.owing { self.retries + 1 } else { 0 };
    }

    /// Erasures in slots that are another node's are that one's to go on with.
    fn leave_to_others(&mut self, own: &[Tombstone], others: Vec<Tombstone>) {
        for tombstone in others {
            self.erasing.remove(tombstone.key_id);
            self.erasing.owe(tombstone);
        }
        let own: HashSet<[u8; 16]> = own.iter().map(|tombstone| tombstone.key_id).collect();
        self.elsewhere.retain(|key_id| own.contains(key_id));
        self.erasing.hold_only(|key_id| own.contains(&key_id));
    }

    /// Has subscribers told of all tombstones.
    async fn tell(&mut self) {
        if self.uncertain {
            return;
        }
        match self.node.newest_tombstone().await {
            Ok(number) => self.erasing.tell(number),
            Err(error) => {
                self.owing = true;
                tracing::warn!(%error, "subscribers cannot be told of an erasure yet; it is tried again");
            }
        }
    }

    /// Everything from the tombstone to the receipt.
    async fn carry_out(&mut self, inner: &Arc<Inner>, mut jobs: Vec<Job>) {
        let began = Instant::now();
        self.tell().await;
        fail_point!("erase.entombed");
        join_all(jobs.iter_mut().map(Job::drain)).await;
        fail_point!("erase.drained");
        let (jobs_busy, mut jobs): (Vec<Job>, Vec<Job>) = jobs.into_iter().partition(|job| job.obstacle.is_some());
        self.end(inner, jobs_busy, began);
        if jobs.is_empty() {
            return;
        }
        if let Err(error) = purge_models(inner, &mut jobs).await {
            jobs.iter_mut().for_each(|job| job.block(&error));
            return self.end(inner, jobs, began);
        }
        let (jobs_damaged, jobs_left): (Vec<Job>, Vec<Job>) = jobs.into_iter().partition(|job| job.obstacle.is_some());
        self.end(inner, jobs_damaged, began);
        jobs = jobs_left;
        if jobs.is_empty() {
            return;
        }
        fail_point!("erase.models_purged");
        if let Err(error) = destroy_keys(inner, &jobs).await {
            jobs.iter_mut().for_each(|job| job.block(&error));
            return self.end(inner, jobs, began);
        }
        join_all(jobs.iter_mut().map(Job::erase_rows)).await;
        if jobs.len() > 1 {
            // Steps that gather in one group fail together, also for damage that only one of them met. Each alone, then.
            for job in jobs.iter_mut().filter(|job| job.core.is_some() && job.obstacle.is_some()) {
                job.obstacle = None;
                job.erase_rows().await;
            }
        }
        fail_point!("erase.rows_erased");
        cut_logs(&mut jobs).await;
        fail_point!("erase.logs_cut");
        for job in jobs.iter_mut().filter(|job| job.obstacle.is_none()) {
            job.is_gone_here = true;
            // From here on the slot may leave: its next owner finds what is not finished.
            job.working = None;
            self.erasing.let_go(job.tombstone.key_id);
        }
        shred_elsewhere(inner, &mut jobs).await;
        if let Err(error) = ask_subscribers(inner, &mut jobs).await {
            jobs.iter_mut().for_each(|job| job.block(&error));
        }
        if let Err(error) = self.attest(inner, &mut jobs).await {
            jobs.iter_mut().for_each(|job| job.block(&error));
        }
        self.end(inner, jobs, began);
    }

    /// Has receipts say that a subscriber has confirmed what they say is pending.
    async fn confirm(&self, who: &str, mut after: i64, last: i64) -> Result<(), String> {
        let Some(inner) = self.store.upgrade() else { return Err("the store is closing".to_owned()) };
        let words = |error: &dyn std::fmt::Display| error.to_string();
        loop {
            let page = self.node.tombstones(after, BATCH_MAX as u32).await.map_err(|error| words(&error))?;
            let mut renewed = Vec::new();
            for (_, tombstone) in page.iter().filter(|(number, _)| *number <= last) {
                let Tombstone { receipt_id, key_id, .. } = *tombstone;
                let body = self.node.receipt(receipt_id).await.map_err(|error| words(&error))?;
                // One that is not there yet is made when the subscriber has confirmed.
                let Some(Ok(receipt)) = body.map(|body| body.parse::<Receipt>()) else { continue };
                if let Some(receipt) =
                    receipt.confirmed_by(who, inner.vault().node_key()).map_err(|error| words(&error))?
                {
                    let body = serde_json::to_string(&receipt).map_err(|error| words(&error))?;
                    renewed.push(ReceiptRow { receipt_id, key_id, body });
                }
            }
            if !renewed.is_empty() {
                self.node.renew(renewed).await.map_err(|error| words(&error))?;
            }
            match page.last() {
                Some((number, _)) if *number < last && page.len() == BATCH_MAX => after = *number,
                _ => return Ok(()),
            }
        }
    }

    /// Looks for receipts from a former life of this store: those stay.
    async fn look_for_receipts(&self, jobs: &mut [Job]) {
        for job in jobs.iter_mut().filter(|job| job.reason.is_none() && job.obstacle.is_none()) {
            match self.node.receipt(job.tombstone.receipt_id).await.map(|body| body.map(|body| body.parse())) {
                Ok(None) => {}
                Ok(Some(Ok(receipt))) => job.receipt = Some(receipt),
                Ok(Some(Err(error))) => job.block(&error),
                Err(error) => job.block(&error),
            }
        }
    }

    /// Signs and stores the receipts of what is complete.
    async fn attest(&self, inner: &Arc<Inner>, jobs: &mut [Job]) -> Result<(), String> {
        self.look_for_receipts(jobs).await;
        let complete: Vec<&Job> = jobs.iter().filter(|job| job.obstacle.is_none()).collect();
        let words = |error: &dyn std::fmt::Display| error.to_string();
        let backup = async |what| self.node.last_backup(what).await.map_err(|error| words(&error));
        let backups =
            LastBackups { events: backup("events").await?.map(text_of), keys: backup("keys").await?.map(text_of) };
        let mut receipts = Vec::with_capacity(complete.len());
        for job in &complete {
            receipts.push(match &job.receipt {
                Some(receipt) => receipt.clone(),
                None => Receipt::sign(state(inner, job, backups.clone()), inner.vault().node_key())
                    .map_err(|error| words(&error))?,
            });
        }
        let audit = inner.own_audit_log();
        let completed = complete.iter().map(|job| job.receipt_id()).map(|receipt| {
            let audit = &audit;
            // Once, although it may be begun again from here.
            async move {
                let append = || audit.append(AuditEvent::ErasureCompleted { receipt });
                patiently(|| append().idempotency_key(format!("completed/{receipt}"))).await
            }
        });
        try_join_all(completed).await.map_err(|error| words(&error))?;
        fail_point!("erase.attested");
        let rows = complete_receipts(&complete, &receipts)?;
        if !rows.is_empty() {
            self.node.finish(rows).await.map_err(|error| words(&error))?;
        }
        fail_point!("erase.finished");
        if let Some(others) = inner.other_disks() {
            let told = complete_receipts(&complete, &receipts)?;
            others.tell(told.into_iter().map(Into::into).collect());
        }
        let complete = jobs.iter_mut().filter(|job| job.obstacle.is_none());
        complete.zip(receipts).for_each(|(job, receipt)| job.receipt = Some(receipt));
        Ok(())
    }

    /// Tells whoever waits.
    fn end(&mut self, inner: &Inner, jobs: Vec<Job>, began: Instant) {
        let metrics = inner.metrics();
        let mut interrupted: Option<(u64, String)> = None;
        for job in jobs {
            let (entity, receipt_id) = (job.entity(), job.receipt_id());
            let outcome = match job.receipt.filter(|_| job.obstacle.is_none()) {
                Some(receipt) => {
                    self.erasing.remove(job.tombstone.key_id);
                    self.elsewhere.remove(&job.tombstone.key_id);
                    metrics.erasures_completed.increment(1);
                    metrics.erase_seconds.record(began.elapsed());
                    tracing::info!(%entity, %receipt_id, commits = job.rows.commits, "an entity was erased");
                    Ok(receipt)
                }
                None => {
                    self.owing = true;
                    let detail = job.obstacle.unwrap_or_default();
                    match job.working {
                        Some(working) => self.erasing.hold(job.tombstone.key_id, working),
                        None if job.is_gone_here => drop(self.elsewhere.insert(job.tombstone.key_id)),
                        None => {}
                    }
                    metrics.erasures_interrupted.increment(1);
                    tracing::debug!(%entity, %receipt_id, %detail, "an erasure is not complete");
                    interrupted.get_or_insert_with(|| (0, detail.clone())).0 += 1;
                    Err(detail)
                }
            };
            for reply in job.waiting {
                let outcome = outcome.clone();
                let unfinished = |detail| EraseError::Unfinished { entity, receipt_id, detail };
                // A caller that is gone does not want to know.
                let _ = reply.send(outcome.map_err(unfinished));
            }
        }
        match interrupted {
            Some((erasures, detail)) if inner.is_closing() => {
                tracing::info!(erasures, %detail, "erasures are not complete; they go on when the store is opened again");
            }
            Some((erasures, detail)) => {
                tracing::warn!(erasures, %detail, "erasures are not complete; they go on by themselves");
            }
            None => {}
        }
        metrics.erasures_unfinished.set(self.erasing.len() as f64);
    }
}

/// Why nothing was begun, or may not have been.
struct NotBegun {
    detail: String,
    is_known: bool,
}

enum Found {
    Done(Box<Receipt>),
    ToDo(Box<Job>),
}

/// Deletes what read models hold of the entities. While there is still a key: rows of a model are found by the id, which is sealed with it. A key
/// that is destroyed says that this was done.
async fn purge_models(inner: &Arc<Inner>, jobs: &mut [Job]) -> Result<(), String> {
    let models = ModelDir::all(inner.data_dir()).map_err(|error| format!("the files of projections: {error}"))?;
    if inner.is_clustered() {
        // Models on other nodes may hold it.
        for job in jobs.iter_mut() {
            match purged_life(inner, job).await {
                Ok(life) => job.name = life.map(|life| (life.entity.kind.to_string(), life.entity.id.to_string())),
                Err(why) => job.block(&why),
            }
        }
    }
    if models.is_empty() && !DurableSubscriptions::exist(inner.data_dir())? {
        return Ok(());
    }
    let mut lives = Vec::with_capacity(jobs.len());
    for job in jobs.iter_mut() {
        match purged_life(inner, job).await {
            Ok(life) => lives.extend(life),
            Err(why) => job.block(&why),
        }
    }
    if lives.is_empty() {
        return Ok(());
    }
    let entities: Vec<Purged> = lives.iter().map(|life| life.entity.clone()).collect();
    inner.durables().purge(inner, &entities).await?;
    let kinds: HashMap<[u8; 16], Arc<str>> =
        lives.iter().map(|life: &PurgedLife| (life.key_id, life.entity.kind.clone())).collect();
    let models = inner.projections().purge(inner.data_dir(), inner.file_options(), lives.into()).await?;
    for job in jobs.iter_mut() {
        let kind = kinds.get(&job.tombstone.key_id);
        let is_concerned = |model: &&PurgedModel| kind.is_some_and(|kind| model.filter.matches_kind(kind));
        job.models.extend(models.iter().filter(is_concerned).cloned());
    }
    Ok(())
}

/// The life in clear; none where its key is destroyed, or nothing of it is here.
async fn purged_life(inner: &Inner, job: &Job) -> Result<Option<PurgedLife>, String> {
    let words = |error: &dyn std::fmt::Display| error.to_string();
    let Tombstone { key_id, id_hash, .. } = job.tombstone;
    // Its id is there, which its key must stay for.
    let Some(core) = &job.core else { return Err("its shard is out of use".to_owned()) };
    let lives = core.shard.lives(CopyId::LIVE, id_hash).await.map_err(|error| words(&error))?;
    if !lives.iter().any(|row| row.key_id == key_id) {
        return Ok(None);
    }
    match inner.vault().key(id_hash, KeyId(key_id)).await {
        Ok(_) => {}
        // Then nobody was able to read its events, and no model holds them.
        Err(VaultError::KeyDestroyed | VaultError::KeyMissing) => return Ok(None),
        Err(error) => return Err(words(&error)),
    }
    // A life that was replaced has given up its id, which is that of the next one.
    let is_it = |row: &EntityRow| row.key_id == key_id;
    let with_id = |row: &&EntityRow| !row.sealed_id.is_empty();
    let Some(row) = lives.iter().filter(with_id).max_by_key(|row| is_it(row)).cloned() else { return Ok(None) };
    let key = match inner.vault().key(id_hash, KeyId(row.key_id)).await {
        Ok(key) => key,
        // The next one is erased as well, and models were purged of the id then.
        Err(VaultError::KeyDestroyed | VaultError::KeyMissing) => return Ok(None),
        Err(error) => return Err(words(&error)),
    };
    let kind = row.kind.clone();
    let id = Opener { row: Arc::new(row), key }.id()?;
    Ok(Some(PurgedLife { key_id, entity: Purged { key_id, kind, id: id.into(), hash: id_hash } }))
}

/// Has the other disks of the cluster take their part.
async fn shred_elsewhere(inner: &Inner, jobs: &mut [Job]) {
    if !inner.is_clustered() {
        return;
    }
    let mut here: Vec<&mut Job> = jobs.iter_mut().filter(|job| job.obstacle.is_none()).collect();
    let Some(others) = inner.other_disks() else {
        return here.iter_mut().for_each(|job| job.block(&"this node does not take part in its cluster yet"));
    };
    let lives = here.iter().map(|job| ErasedLife { name: job.name.clone(), ..job.tombstone.into() }).collect();
    let told = others.shred(lives).await;
    for (job, told) in here.into_iter().zip(told) {
        match told {
            Elsewhere::Ended { nodes, without, receipt } => {
                (job.nodes, job.without) = (nodes, without);
                job.receipt = receipt.and_then(|body| body.parse().ok());
            }
            Elsewhere::Waiting(why) => job.block(&why),
        }
    }
}

fn complete_receipts(complete: &[&Job], receipts: &[Receipt]) -> Result<Vec<ReceiptRow>, String> {
    let row = |(job, receipt): (&&Job, &Receipt)| {
        let Tombstone { receipt_id, key_id, .. } = job.tombstone;
        Ok(ReceiptRow { receipt_id, key_id, body: serde_json::to_string(receipt)? })
    };
    let rows: Result<Vec<ReceiptRow>, serde_json::Error> = complete.iter().zip(receipts).map(row).collect();
    rows.map_err(|error| error.to_string())
}

async fn destroy_keys(inner: &Inner, jobs: &[Job]) -> Result<(), CommitError> {
    let keys = &inner.vault().keys;
    keys.destroy(jobs.iter().map(|job| job.tombstone.key_id).collect()).await?;
    fail_point!("erase.keys_destroyed", |_| unreachable!("it only kills"));
    keys.truncate_log().await?;
    fail_point!("erase.keys_cut", |_| unreachable!("it only kills"));
    Ok(())
}

/// Cuts the log of every shard that rows were erased in, once.
async fn cut_logs(jobs: &mut [Job]) {
    let shards: BTreeMap<u16, Arc<ShardCore>> =
        jobs.iter().filter_map(|job| job.core.clone()).map(|core| (core.shard.number(), core)).collect();
    let cut = shards.into_iter().map(|(number, core)| async move { (number, core.shard.truncate_log().await) });
    for (number, cut) in join_all(cut).await {
        let Err(error) = cut else { continue };
        let is_of = |job: &&mut Job| job.core.as_ref().is_some_and(|core| core.shard.number() == number);
        jobs.iter_mut().filter(is_of).for_each(|job| job.block(&error));
    }
}

/// Finds out which durable subscriptions have not confirmed.
async fn ask_subscribers(inner: &Arc<Inner>, jobs: &mut [Job]) -> Result<(), String> {
    if !DurableSubscriptions::exist(inner.data_dir())? {
        return Ok(());
    }
    let mut asked = Vec::new();
    for (index, job) in jobs.iter().enumerate() {
        let Some(row) = job.row.as_ref().filter(|_| job.obstacle.is_none()) else { continue };
        let number = inner.node().tombstone_number(job.tombstone.key_id).await.map_err(|error| error.to_string())?;
        asked.push((index, row.kind.clone(), number.unwrap_or_default()));
    }
    let erasures: Vec<(Arc<str>, i64)> = asked.iter().map(|(_, kind, number)| (kind.clone(), *number)).collect();
    let until = tokio::time::Instant::now() + CONFIRM_MAX;
    let pending = inner.durables().unconfirmed(inner, &erasures, until).await?;
    for ((index, ..), pending) in asked.into_iter().zip(pending) {
        if let Some(job) = jobs.get_mut(index) {
            job.pending = pending;
        }
    }
    Ok(())
}

/// What a receipt says.
fn state(inner: &Inner, job: &Job, backups: LastBackups) -> Statement {
    let Job { tombstone, rows, models, row, core, nodes, without, .. } = job;
    let store = |store: &str, outcome: &str| StoreOutcome {
        store: store.to_owned(),
        outcome: outcome.to_owned(),
        commits: 0,
        events: 0,
        snapshots: 0,
        bytes: 0,
    };
    let shard = core.as_ref().map_or_else(String::new, |core| core.shard.file().to_owned());
    let in_shard = match row {
        Some(_) => StoreOutcome {
            commits: rows.commits,
            events: rows.events,
            snapshots: rows.snapshots,
            bytes: rows.bytes,
            ..store(&shard, "events, snapshot, id and idempotency keys deleted; stubs and the keyed hash stay; log cut")
        },
        None => store(&shard, "held nothing of it"),
    };
    let mut stores = vec![store("memory", "taken out of memory"), store("keys.db", "key destroyed; log cut"), in_shard];
    stores.extend(models.iter().map(|model| store(&model.file, model.outcome)));
    stores.extend(nodes.iter().map(|node| store(&format!("node {node}"), "key destroyed in every copy; log cut")));
    stores.extend(
        without.iter().map(|disk| store(&format!("disk {disk}"), "attested to be destroyed; it was not asked")),
    );
    Statement {
        format: 0,
        id: job.receipt_id(),
        context: inner.context().to_owned(),
        disk_id: inner.disk_id().to_string(),
        entity: tombstone.id_hash.to_hex(),
        kind: row.as_ref().map(|row| row.kind.to_string()),
        life: row.as_ref().map(|row| row.life),
        slot: tombstone.slot.number(),
        key: hex::encode(tombstone.key_id),
        requested_at: text_of(tombstone.at_us),
        completed_at: text_of(inner.now_us()),
        resumed: job.reason.is_none(),
        stores,
        pending: job.pending.clone(),
        backups,
        public_key: String::new(),
    }
}

/// A receipt as it is stored.
fn parse(entity: EntityHash, body: &str) -> Result<Receipt, EraseError> {
    let parsed = body.parse::<Receipt>();
    parsed.map_err(|error| Unavailable::NotErased { entity, detail: error.to_string() }.into())
}
