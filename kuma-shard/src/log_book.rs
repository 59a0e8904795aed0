//! The book of a shard: entities and the log of their commits.
//!
//! Invariants:
//! - One row is one commit. Rows are only ever added; an erasure turns those of one entity into stubs where they stand.
//! - `position` and `seq` are assigned here, in the order of the group, and only kept if the group is.
//! - A commit is written only under an owned slot, under an activation that is not void, and as the version that follows both what
//!   that activation wrote and what the log holds: a second activation of an entity is refused here, whatever let it come about.
//! - An append key of an entity that the tail or the group knows is not written again: the last line of defence against a request that
//!   would happen twice. Whoever decides a commit looks its key up before.
//! - One commit that cannot be written fails alone, with the later ones of its activation.
//! - Snapshots go with a group and are given up before a commit of it fails because of them. So are the steps of an erasure, which are
//!   simply taken again.
//! - A transaction with a step of an erasure, or with a change of who owns a slot, persists the marks: it changes what is in front of them.
//! - Nothing is written for an entity that is erased, or is being erased in the same group.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use parking_lot::RwLock;
use sqlx::SqliteConnection;
use tokio::sync::watch;

use crate::{
    Activation, CommitError, Digest, EntityRow, NotWritten, Slot, SnapshotRow, Token, TransferId, Txn,
    append_keys::AppendKeys,
    book::{Book, Progress, Size},
    erase::{self, EraseStep, ErasedRows, StepDone, Stubbed},
    log_entry::{Commit, LogEntry, Moving, Work},
    moving::{self, SlotChange},
    progress::Stored,
    replace::Replacement,
    row_hash::{RowFields, RowHash},
    slots::{self, SharedSlots, SlotImage, SlotSum},
    snapshots,
    sqlite::{self, Trouble},
    statements::{self, Head, Transaction},
    tail::{SharedTail, TAIL_ROWS_MAX, TailRow},
    writer::GROUP_EVENTS_MAX,
};

/// What a group changes, until it is known to be durable.
#[derive(Clone)]
struct Staged {
    slots: BTreeMap<usize, SlotImage>,
    next_position: u64,
    digest: Digest,
    rows: Vec<TailRow>,
    keys: AppendKeys,
    /// The newest version of each entity written to.
    heads: BTreeMap<i64, Head>,
    /// How many snapshots were written.
    snapshots: u64,
    marks: bool,
    indexed: bool,
    /// Whether what is being written now can wait: a snapshot, or a step of an erasure.
    can_wait: bool,
    /// Slots that come or leave, to be written.
    moves: Vec<Move>,
}

/// Rows of a slot that come or leave.
#[derive(Clone, Copy)]
enum Move {
    Leave { slot: Slot, transfer: TransferId, at_us: i64 },
    Come { transfer: TransferId, first_eid: i64, first_position: u64, rows: u64 },
}

pub(crate) struct LogBook {
    file: Arc<str>,
    shards: u16,
    slots: SharedSlots,
    /// Slots that changed since the mark.
    dirty: BTreeSet<usize>,
    next_position: u64,
    mark_position: u64,
    indexed_position: u64,
    digest: Digest,
    tail: SharedTail,
    /// The newest version of entities that were written to: the fence against a second writer of one entity. Only a cache.
    heads: HashMap<i64, Head>,
    marks_due: bool,
    snapshots_written: metrics::Counter,
    /// The last position that is durable.
    end: watch::Sender<u64>,
    staged: Option<Staged>,
}

/// Heads that are kept; when there are more, they are looked up anew.
const HEADS_MAX: usize = 1 << 20;

impl LogBook {
    /// The book of a shard whose slots are as of `progress`, except for those in `dirty`, which were folded in.
    pub(crate) fn new(
        file: Arc<str>,
        shards: u16,
        slots: Vec<SlotImage>,
        dirty: BTreeSet<usize>,
        progress: Progress,
        tail: SharedTail,
    ) -> Self {
        let Progress { next_position, mark_position, indexed_position, digest } = progress;
        LogBook {
            snapshots_written: crate::metrics::snapshots_written(&file),
            file,
            shards,
            slots: Arc::new(RwLock::new(slots)),
            dirty,
            next_position,
            mark_position,
            indexed_position,
            digest,
            tail,
            heads: HashMap::new(),
            marks_due: false,
            end: watch::Sender::new(next_position.saturating_sub(1)),
            staged: None,
        }
    }

    fn stage(&mut self) -> &mut Staged {
        let (next_position, digest) = (self.next_position, self.digest);
        self.staged.insert(Staged {
            slots: BTreeMap::new(),
            next_position,
            digest,
            rows: Vec::new(),
            keys: AppendKeys::default(),
            heads: BTreeMap::new(),
            snapshots: 0,
            marks: false,
            indexed: false,
            can_wait: false,
            moves: Vec::new(),
        })
    }

    /// The rows that are not in the indexes yet, shared with the readers.
    pub(crate) fn tail(&self) -> SharedTail {
        self.tail.clone()
    }

    /// The slots as of the last group that is durable.
    pub(crate) fn shared_slots(&self) -> SharedSlots {
        self.slots.clone()
    }

    /// The last position of the log that is durable.
    pub(crate) fn end(&self) -> watch::Receiver<u64> {
        self.end.subscribe()
    }

    /// Entities in `group` that have commits in the log, and whose heads are not known.
    fn unknown_heads(&self, group: &[LogEntry]) -> BTreeSet<i64> {
        let commits = group.iter().flat_map(LogEntry::commits);
        let stored = commits.filter(|commit| !commit.create).map(|commit| commit.entity.eid);
        let replaced = group.iter().filter_map(LogEntry::replacement).map(|replacement| replacement.former.eid);
        stored.chain(replaced).filter(|eid| !self.heads.contains_key(eid)).collect()
    }

    async fn learn_heads(&mut self, connection: &mut SqliteConnection, entities: BTreeSet<i64>) -> sqlx::Result<()> {
        for eid in entities {
            let newest = self.tail.read().at_or_below(eid, u64::MAX);
            let head = match newest {
                Some(row) => statements::head_at(connection, row.position).await?,
                None => statements::indexed_head(connection, eid).await?,
            };
            self.heads.insert(eid, head);
        }
        Ok(())
    }

    /// The newest version of an entity, staged commits included, if it was written to or looked up.
    fn known_head(&self, eid: i64) -> Option<Head> {
        let staged = self.staged.as_ref().and_then(|staged| staged.heads.get(&eid));
        staged.or_else(|| self.heads.get(&eid)).copied()
    }

    fn head(&self, eid: i64) -> Head {
        self.known_head(eid).unwrap_or(Head::At(0))
    }

    fn image(&self, slot: Slot) -> Option<(usize, SlotImage)> {
        let index = slots::index(slot, self.shards);
        let staged = self.staged.as_ref().and_then(|staged| staged.slots.get(&index)).copied();
        staged
            .or_else(|| self.slots.read().get(index).copied())
            .filter(|image| image.slot == slot)
            .map(|image| (index, image))
    }

    /// Whether `commit` may be written after what is staged.
    fn check(&self, activation: &Arc<Activation>, commit: &Commit, poisoned: &[usize]) -> Result<(), NotWritten> {
        if activation.is_voided() || poisoned.contains(&address(activation)) {
            return Err(NotWritten::Voided);
        }
        let slot = commit.entity.slot;
        if self.image(slot).is_none_or(|(_, image)| image.owned().is_none()) {
            return Err(NotWritten::NotOwner { slot });
        }
        let expected = match self.head(commit.entity.eid) {
            Head::At(version) => version + 1,
            Head::Erased => return Err(NotWritten::Erased),
        };
        let follows = commit.first_version == expected && commit.first_version == activation.written() + 1;
        if !follows || commit.count == 0 {
            let detail = format!("version {} where {expected} is next", commit.first_version);
            return Err(NotWritten::Conflict { file: self.file.to_string(), detail });
        }
        if let Some(position) = commit.append_key.as_deref().and_then(|key| self.noted_key(commit.entity.eid, key)) {
            let detail = format!("its append key is that of the commit at position {position}");
            return Err(NotWritten::Conflict { file: self.file.to_string(), detail });
        }
        Ok(())
    }

    /// Whether the former life is the one that the next one was made from.
    fn check_replacement(&self, replacement: &Replacement) -> Result<(), NotWritten> {
        let Replacement { former, version, commits } = replacement;
        if self.image(former.slot).is_none_or(|(_, image)| image.owned().is_none()) {
            return Err(NotWritten::NotOwner { slot: former.slot });
        }
        let head = self.head(former.eid);
        if head != Head::At(*version) || commits.is_empty() {
            let detail = format!("the life to be replaced is not at version {version}");
            return Err(NotWritten::Conflict { file: self.file.to_string(), detail });
        }
        Ok(())
    }

    /// The commit with this append key, if it is staged or in the tail. Those in the index are not looked at: that would be a page
    /// to read for each commit.
    fn noted_key(&self, eid: i64, append_key: &[u8]) -> Option<u64> {
        let staged = self.staged.as_ref().and_then(|staged| staged.keys.find(eid, append_key));
        staged.or_else(|| self.tail.read().keys().find(eid, append_key))
    }

    /// Assigns position and seq to a commit.
    fn place(&mut self, commit: &Commit) -> Option<Place> {
        let (index, mut image) = self.image(commit.entity.slot)?;
        let epoch = image.owned()?;
        let staged = self.staged.as_mut()?;
        let mut place =
            Place { position: staged.next_position, seq: image.next_seq, epoch: epoch.to_i64(), checksum: 0 };
        let hash = RowHash::of(&RowFields {
            slot: commit.entity.slot,
            seq: place.seq,
            id_hash: &commit.entity.id_hash.0,
            key_id: &commit.entity.key_id,
            version: commit.first_version,
            count: commit.count,
            at_us: commit.at_us,
            epoch,
            append_key: commit.append_key.as_deref(),
            body: &commit.body,
        });
        place.checksum = hash.checksum();
        staged.next_position += 1;
        staged.digest.add(&hash);
        staged.rows.push(TailRow { eid: commit.entity.eid, version: commit.first_version, position: place.position });
        if let Some(append_key) = &commit.append_key {
            staged.keys.note(commit.entity.eid, append_key, place.position);
        }
        staged.heads.insert(commit.entity.eid, Head::At(commit.last_version()));
        image.next_seq += 1;
        image.len += 1;
        image.digest.add(&hash);
        staged.slots.insert(index, image);
        Some(place)
    }

    /// Checks the group and gives each commit its place; those that cannot be written are refused.
    fn stage_all(&mut self, group: &mut [LogEntry]) -> Vec<Place> {
        let erased = group.iter().filter_map(LogEntry::erase_step).map(|step| (step.entity.eid, Head::Erased));
        self.stage().heads.extend(erased);
        let mut poisoned = Vec::new();
        let mut places = Vec::with_capacity(group.len());
        for entry in group.iter_mut() {
            match &entry.work {
                Work::Commit(activation, commit) => match self.check(activation, commit, &poisoned) {
                    Ok(()) => {
                        places.extend(self.place(commit));
                        activation.set_written(commit.last_version());
                    }
                    Err(refusal) => {
                        poisoned.push(address(activation));
                        entry.refusal = Some(refusal);
                    }
                },
                Work::Replace(replacement) => match self.check_replacement(replacement) {
                    Ok(()) => {
                        if let Some(staged) = &mut self.staged {
                            staged.heads.insert(replacement.former.eid, Head::Erased);
                        }
                        for commit in &replacement.commits {
                            places.extend(self.place(commit));
                        }
                    }
                    Err(refusal) => entry.refusal = Some(refusal),
                },
                Work::ChangeSlot(change) => {
                    if !self.stage_change(change) {
                        entry.refusal = Some(NotWritten::TokenChanged { slot: change.slot });
                    }
                }
                Work::Moving(Moving::Incoming(incoming)) => {
                    let (slot, transfer) = (incoming.slot, incoming.transfer);
                    if !self.may_change(slot, transfer) {
                        entry.refusal = Some(NotWritten::TokenChanged { slot });
                    }
                }
                Work::Moving(Moving::Drop { slot, transfer, .. }) => {
                    if self.image(*slot).is_none_or(|(_, image)| is_staged(&image, *transfer)) {
                        entry.refusal = Some(NotWritten::TokenChanged { slot: *slot });
                    }
                }
                Work::Barrier(_) | Work::Snapshot(_) | Work::Erase(_) | Work::Create(_) | Work::Moving(_) => {}
            }
        }
        places
    }

    /// Changes a token, if it allows that as of all that is staged before. What else has to be written is noted.
    fn stage_change(&mut self, change: &SlotChange) -> bool {
        let Some((index, image)) = self.image(change.slot) else { return false };
        if !image.record().allows(&change.txn) || change.slot == Slot::OWN {
            return false;
        }
        let mut after = image.after(&change.txn);
        let Some(staged) = &mut self.staged else { return false };
        let leaves = match (change.txn, image.token) {
            (Txn::ConfirmTaken { transfer }, _) => Some(transfer),
            // A higher epoch proves that what was released before was taken.
            (Txn::Take { .. }, Token::Released { transfer, is_taken: false, .. }) => Some(transfer),
            _ => None,
        };
        if let Some(transfer) = leaves {
            staged.moves.push(Move::Leave { slot: change.slot, transfer, at_us: change.at_us });
            after.rewrites += 1;
        }
        if let Txn::Take { transfer, .. } = change.txn {
            let (first_eid, first_position) = (change.first_eid, staged.next_position);
            staged.moves.push(Move::Come { transfer, first_eid, first_position, rows: after.len });
            staged.next_position += after.len;
        }
        staged.digest.subtract_digest(&image.digest);
        staged.digest.add_digest(&after.digest);
        staged.slots.insert(index, after);
        true
    }

    /// Whether rows of this transfer may come in.
    fn may_change(&self, slot: Slot, transfer: TransferId) -> bool {
        self.image(slot).is_some_and(|(_, image)| image.owned().is_none() && !is_staged(&image, transfer))
    }

    /// Writes what comes in of slots that move, and what else they need, into the open transaction.
    async fn write_moving(&mut self, connection: &mut SqliteConnection, group: &mut [LogEntry]) -> sqlx::Result<()> {
        for entry in group.iter_mut().filter(|entry| entry.refusal.is_none()) {
            let Work::Moving(work) = &entry.work else { continue };
            match work {
                Moving::Incoming(incoming) => entry.refusal = moving::receive(connection, incoming).await?.err(),
                Moving::Drop { transfer, done, .. } => *done.lock() = moving::drop_some(connection, *transfer).await?,
                Moving::Stub { slot, transfer, done } => {
                    *done.lock() = moving::stub_some(connection, *slot, *transfer).await?;
                    let Some((index, mut image)) = self.image(*slot) else { continue };
                    let Some(staged) = self.staged.as_mut() else { continue };
                    image.rewrites += 1;
                    staged.slots.insert(index, image);
                }
                Moving::IndexSlots => {
                    statements::execute(connection, "CREATE INDEX IF NOT EXISTS entity_slot ON entity(slot)").await?;
                }
            }
        }
        Ok(())
    }

    /// Takes slots in and gives slots away, in the open transaction; of the entities in `created` those that have to be written before. Returns
    /// the others.
    async fn write_moves<'a, 'b>(
        &mut self,
        connection: &mut SqliteConnection,
        mut created: &'a [&'b EntityRow],
    ) -> sqlx::Result<&'a [&'b EntityRow]> {
        let Some(staged) = &mut self.staged else { return Ok(created) };
        for step in std::mem::take(&mut staged.moves) {
            match step {
                Move::Leave { slot, transfer, at_us } => {
                    let left = moving::depart(connection, slot, transfer, at_us).await?;
                    staged.heads.extend(left.into_iter().map(|eid| (eid, Head::Erased)));
                }
                Move::Come { transfer, first_eid, first_position, rows } => {
                    // In the order of their numbers, so that none ever moves.
                    let (before, after) = created.split_at(created.partition_point(|entity| entity.eid < first_eid));
                    statements::insert_entities(connection, before).await?;
                    created = after;
                    if moving::take(connection, transfer, first_eid, first_position).await? != rows {
                        return Err(sqlx::Error::Decode("what came in of a slot is not what was staged".into()));
                    }
                }
            }
        }
        Ok(created)
    }

    /// The usual way: all rows in as few round trips as possible.
    async fn write_together(
        &mut self,
        connection: &mut SqliteConnection,
        group: &mut [LogEntry],
        commits: u64,
        committing: &mut bool,
    ) -> sqlx::Result<()> {
        let unknown = self.unknown_heads(group);
        self.learn_heads(connection, unknown).await?;
        let places = self.stage_all(group);
        let changes = group.iter().any(|entry| matches!(entry.work, Work::ChangeSlot(_)));
        let moves = changes || group.iter().any(|entry| matches!(entry.work, Work::Moving(_)));
        let mut transaction = Transaction::New;
        if moves {
            statements::execute(connection, "BEGIN IMMEDIATE").await?;
            transaction = Transaction::Open;
            self.write_moving(connection, group).await?;
        }
        let written = group.iter().filter(|entry| entry.refusal.is_none());
        let rows: Vec<(&Commit, Place)> = written.flat_map(LogEntry::commits).zip(places).collect();
        let created: Vec<&EntityRow> =
            group.iter().filter(|entry| entry.refusal.is_none()).filter_map(LogEntry::new_entity).collect();
        let replaced: Vec<&EntityRow> = group
            .iter()
            .filter(|entry| entry.refusal.is_none())
            .filter_map(|entry| Some(&entry.replacement()?.former))
            .collect();
        let snapshots: Vec<&SnapshotRow> = group.iter().filter_map(LogEntry::snapshot_row).collect();
        let erasures: Vec<EraseStep> = group.iter().filter_map(LogEntry::erase_step).cloned().collect();
        // It changes rows in front of the mark, and is led to them by the index; or it changes who owns a slot.
        self.marks_due |= !erasures.is_empty() || changes;
        let mut last = rows.as_slice();
        let one_script = created.is_empty() && snapshots.is_empty() && !moves && statements::is_one_script(rows.len());
        if !one_script || self.index_due() {
            if transaction == Transaction::New {
                statements::execute(connection, "BEGIN IMMEDIATE").await?;
                transaction = Transaction::Open;
            }
            let created = self.write_moves(connection, &created).await?;
            statements::insert_entities(connection, created).await?;
            last = statements::insert_all_but_last(connection, last).await?;
            self.write_snapshots(connection, &snapshots).await?;
            for former in replaced {
                erase::begin(connection, former).await?;
            }
        }
        self.write_index(connection).await?;
        self.erase(connection, &erasures).await?;
        let stored = self.finish(connection, commits).await?;
        *committing = true;
        statements::insert_and_commit(connection, transaction, &stored, last).await
    }

    /// The way to find out which commit of a group does not fit: each in a savepoint of its own, and without the snapshots.
    async fn write_one_by_one(
        &mut self,
        connection: &mut SqliteConnection,
        group: &mut [LogEntry],
        commits: u64,
        committing: &mut bool,
    ) -> sqlx::Result<()> {
        self.stage();
        statements::execute(connection, "BEGIN IMMEDIATE").await?;
        let mut poisoned = Vec::new();
        for entry in group.iter_mut().filter(|entry| entry.refusal.is_none()) {
            if let Work::Create(row) = &entry.work {
                if let Err(error) =
                    savepoint(connection, async |connection| statements::insert_entities(connection, &[row]).await)
                        .await?
                {
                    let detail = sqlite::detail(&error);
                    entry.refusal = Some(NotWritten::Conflict { file: self.file.to_string(), detail });
                }
                continue;
            }
            let Work::Commit(activation, commit) = &entry.work else { continue };
            if poisoned.contains(&address(activation)) {
                entry.refusal = Some(NotWritten::Voided);
                continue;
            }
            let before = self.staged.clone();
            let Some(place) = self.place(commit) else { continue };
            let written = savepoint(connection, async |connection| write_one(connection, commit, place).await).await?;
            if let Err(error) = written {
                self.staged = before;
                poisoned.push(address(activation));
                let detail = sqlite::detail(&error);
                entry.refusal = Some(NotWritten::Conflict { file: self.file.to_string(), detail });
            }
        }
        self.write_index(connection).await?;
        let stored = self.finish(connection, commits).await?;
        *committing = true;
        statements::commit(connection, &stored).await
    }

    /// Writes those snapshots that say no more than the log holds, into the open transaction.
    async fn write_snapshots(
        &mut self,
        connection: &mut SqliteConnection,
        snapshots: &[&SnapshotRow],
    ) -> sqlx::Result<()> {
        self.writing_what_can_wait(true);
        let mut written = 0;
        for snapshot in snapshots {
            if self.known_head(snapshot.eid).is_none() {
                self.learn_heads(connection, [snapshot.eid].into()).await?;
            }
            if matches!(self.head(snapshot.eid), Head::At(version) if snapshot.version <= version) {
                written += u64::from(snapshots::save(connection, snapshot).await?);
            }
        }
        if let Some(staged) = &mut self.staged {
            staged.snapshots = written;
        }
        self.writing_what_can_wait(false);
        Ok(())
    }

    fn writing_what_can_wait(&mut self, now: bool) {
        if let Some(staged) = &mut self.staged {
            staged.can_wait = now;
        }
    }

    /// Whether one entry of the group is to blame for `error`, so that the others can be written without it.
    fn is_of_one(&self, error: &sqlx::Error) -> bool {
        match sqlite::trouble(error) {
            Trouble::Constraint => true,
            // A damaged page that only a snapshot or an erasure met. They may not fail the commits of others.
            Trouble::Corrupt => self.staged.as_ref().is_some_and(|staged| staged.can_wait),
            _ => false,
        }
    }

    fn give_up_what_can_wait(&self, group: &mut [LogEntry], error: &sqlx::Error) {
        let (file, detail) = (self.file.to_string(), sqlite::detail(error));
        let why = match sqlite::trouble(error) {
            Trouble::Constraint => NotWritten::Conflict { file, detail },
            _ => {
                tracing::warn!(%file, error = %detail, "snapshots or erasures could not be written; commits go on");
                NotWritten::Io { file, detail }
            }
        };
        let can_wait = |entry: &&mut LogEntry| {
            let moves = matches!(entry.work, Work::ChangeSlot(_) | Work::Moving(_));
            moves || matches!(entry.work, Work::Snapshot(_) | Work::Erase(_) | Work::Replace(_))
        };
        for entry in group.iter_mut().filter(can_wait) {
            entry.refusal = Some(why.clone());
        }
    }

    /// Takes the steps of erasures, into the open transaction in which the index is up to date.
    async fn erase(&mut self, connection: &mut SqliteConnection, steps: &[EraseStep]) -> sqlx::Result<()> {
        self.writing_what_can_wait(true);
        for EraseStep { entity, after, done } in steps {
            let mut erased = ErasedRows::default();
            if *after == 0 {
                erased = erase::begin(connection, entity).await?;
            }
            let (rows, damaged, next) = erase::rows(connection, entity, *after).await?;
            erase::stub(connection, entity, &rows).await?;
            erased.damaged = damaged;
            let Some((index, mut image)) = self.image(entity.slot) else { continue };
            let Some(staged) = self.staged.as_mut() else { continue };
            for Stubbed { row, before, after } in &rows {
                // What was given away is in no digest.
                for digest in [&mut image.digest, &mut staged.digest].into_iter().filter(|_| !entity.is_departed()) {
                    digest.subtract(before);
                    digest.add(after);
                }
                erased.commits += 1;
                erased.events += u64::from(row.count);
                erased.bytes += row.body.len() as u64;
                erased.append_keys += u64::from(row.append_key.is_some());
            }
            image.rewrites += 1;
            staged.slots.insert(index, image);
            *done.lock() = StepDone { rows: erased, next };
        }
        self.writing_what_can_wait(false);
        Ok(())
    }

    /// What comes last in every transaction: the marks where they are due (it is open then), and the progress to be stored.
    async fn finish(&mut self, connection: &mut SqliteConnection, commits: u64) -> sqlx::Result<Stored> {
        self.write_marks(connection).await?;
        Ok(Stored { commits, progress: self.progress() })
    }

    /// Marks bring the indexes up to date as well, so that opening never has more to read than what is behind the mark.
    fn index_due(&self) -> bool {
        let staged = self.staged.as_ref().map_or(0, |staged| staged.rows.len());
        self.marks_due || self.tail.read().len() + staged >= TAIL_ROWS_MAX
    }

    async fn write_index(&mut self, connection: &mut SqliteConnection) -> sqlx::Result<()> {
        if !self.index_due() {
            return Ok(());
        }
        let Some(staged) = &mut self.staged else { return Ok(()) };
        let (rows, keys) = {
            let tail = self.tail.read();
            (tail.sorted_with(&staged.rows), tail.keys().sorted_with(&staged.keys))
        };
        staged.indexed = true;
        statements::insert_index(connection, &rows).await?;
        statements::insert_keys(connection, &keys).await
    }

    async fn write_marks(&mut self, connection: &mut SqliteConnection) -> sqlx::Result<()> {
        let Some(staged) = self.staged.as_mut().filter(|_| self.marks_due) else { return Ok(()) };
        let changed: BTreeSet<usize> = self.dirty.iter().chain(staged.slots.keys()).copied().collect();
        let images: Vec<SlotImage> = {
            let kept = self.slots.read();
            changed.iter().filter_map(|index| staged.slots.get(index).or_else(|| kept.get(*index)).copied()).collect()
        };
        statements::insert_slots(connection, &images).await?;
        staged.marks = true;
        Ok(())
    }
}

impl Book for LogBook {
    type Entry = LogEntry;

    fn size(entry: &LogEntry) -> Size {
        match &entry.work {
            Work::Commit(_, commit) => Size { bytes: commit.body.len() + 128, events: commit.count as usize },
            Work::Snapshot(snapshot) => Size { bytes: snapshot.body.len() + 64, events: 0 },
            Work::Barrier(_) => Size::default(),
            Work::Create(row) => Size { bytes: row.sealed_id.len() + 128, events: 0 },
            Work::Replace(replacement) => Size { bytes: replacement.bytes(), events: replacement.commits.len() },
            Work::Erase(_) => Size { bytes: 4096, events: GROUP_EVENTS_MAX / erase::STEPS_IN_GROUP },
            Work::Moving(Moving::Incoming(incoming)) => Size { bytes: incoming.bytes(), events: 0 },
            Work::Moving(Moving::Stub { .. } | Moving::Drop { .. }) => {
                Size { bytes: 1024, events: GROUP_EVENTS_MAX / 4 }
            }
            Work::ChangeSlot(_) | Work::Moving(_) => Size { bytes: 1024, events: 0 },
        }
    }

    fn has_work(&self, group: &[LogEntry]) -> bool {
        let marks = self.marks_due && !self.dirty.is_empty();
        marks
            || group.iter().any(|entry| match &entry.work {
                Work::Commit(activation, _) => !activation.is_voided(),
                Work::Snapshot(_) | Work::Erase(_) | Work::Create(_) | Work::Replace(_) => true,
                Work::ChangeSlot(_) | Work::Moving(_) => true,
                Work::Barrier(_) => false,
            })
    }

    async fn transact(
        &mut self,
        connection: &mut SqliteConnection,
        group: &mut [LogEntry],
        commits: u64,
        committing: &mut bool,
    ) -> sqlx::Result<()> {
        match self.write_together(connection, group, commits, committing).await {
            Err(error) if self.is_of_one(&error) => {
                // An insert was refused, so that COMMIT was never reached. All is undone, because SQLite writes nothing more in a
                // transaction that met a damaged page, whatever savepoint it goes back to.
                *committing = false;
                statements::execute(connection, "ROLLBACK").await?;
                self.give_up_what_can_wait(group, &error);
                self.write_one_by_one(connection, group, commits, committing).await
            }
            other => other,
        }
    }

    fn request_marks(&mut self) {
        self.marks_due = true;
    }

    fn progress(&self) -> Progress {
        match &self.staged {
            None => Progress {
                next_position: self.next_position,
                mark_position: self.mark_position,
                indexed_position: self.indexed_position,
                digest: self.digest,
            },
            Some(staged) => Progress {
                next_position: staged.next_position,
                mark_position: if staged.marks { staged.next_position - 1 } else { self.mark_position },
                indexed_position: if staged.indexed { staged.next_position - 1 } else { self.indexed_position },
                digest: staged.digest,
            },
        }
    }

    fn slots(&self) -> BTreeMap<Slot, SlotSum> {
        self.slots.read().iter().map(|image| (image.slot, image.sum())).collect()
    }

    fn rewrites(&self) -> BTreeMap<Slot, u64> {
        let slots = self.slots.read();
        let some = slots.iter().filter(|image| image.rewrites > 0);
        some.map(|image| (image.slot, image.rewrites)).collect()
    }

    fn keep(&mut self) {
        let progress = self.progress();
        let Some(staged) = self.staged.take() else { return };
        self.next_position = progress.next_position;
        self.mark_position = progress.mark_position;
        self.indexed_position = progress.indexed_position;
        self.digest = progress.digest;
        self.snapshots_written.increment(staged.snapshots);
        if staged.indexed {
            self.tail.write().clear();
        } else {
            self.tail.write().extend(staged.rows, staged.keys);
        }
        if self.heads.len() > HEADS_MAX {
            self.heads.clear();
        }
        self.heads.extend(staged.heads);
        self.dirty.extend(staged.slots.keys());
        let mut slots = self.slots.write();
        for (index, image) in staged.slots {
            if let Some(slot) = slots.get_mut(index) {
                *slot = image;
            }
        }
        drop(slots);
        if staged.marks {
            self.marks_due = false;
            self.dirty.clear();
        }
        let end = self.next_position.saturating_sub(1);
        self.end.send_if_modified(|known| std::mem::replace(known, end) != end);
    }

    fn drop_staged(&mut self) {
        self.staged = None;
    }

    fn settle(&mut self, entry: LogEntry, outcome: Result<(), CommitError>) {
        // What was refused for a reason of its own was not written whatever became of the group.
        let outcome = entry.refusal.map_or(outcome, |refusal| Err(refusal.into()));
        let result = match entry.work {
            Work::Commit(activation, commit) => {
                let result = outcome.and_then(|()| unless_voided(&activation));
                match &result {
                    Ok(()) => activation.commit(commit.last_version()),
                    Err(_) => activation.void(),
                }
                result
            }
            Work::Barrier(activation) => unless_voided(&activation),
            Work::Snapshot(_) | Work::Erase(_) | Work::Create(_) | Work::Replace(_) => outcome,
            Work::ChangeSlot(_) | Work::Moving(_) => outcome,
        };
        (entry.on_settled)(result);
    }
}

fn is_staged(image: &SlotImage, transfer: TransferId) -> bool {
    image.staged.is_some_and(|staged| staged.transfer == transfer)
}

fn unless_voided(activation: &Activation) -> Result<(), CommitError> {
    if activation.is_voided() { Err(NotWritten::Voided.into()) } else { Ok(()) }
}

/// Names an activation within one group, in which it is held alive.
fn address(activation: &Arc<Activation>) -> usize {
    Arc::as_ptr(activation).addr()
}

/// Where a commit stands in its shard.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    pub(crate) position: u64,
    pub(crate) seq: u64,
    pub(crate) epoch: i64,
    pub(crate) checksum: i64,
}

/// Writes something in a savepoint of its own; the inner error is that of what does not fit, and was undone.
async fn savepoint(
    connection: &mut SqliteConnection,
    write: impl AsyncFnOnce(&mut SqliteConnection) -> sqlx::Result<()>,
) -> sqlx::Result<sqlx::Result<()>> {
    statements::execute(connection, "SAVEPOINT one").await?;
    let written = write(connection).await;
    match &written {
        Ok(()) => {}
        Err(error) if sqlite::trouble(error) == Trouble::Constraint => {
            statements::execute(connection, "ROLLBACK TO one").await?;
        }
        Err(_) => return written.map(Ok),
    }
    statements::execute(connection, "RELEASE one").await?;
    Ok(written)
}

async fn write_one(connection: &mut SqliteConnection, commit: &Commit, place: Place) -> sqlx::Result<()> {
    if commit.create {
        statements::insert_entities(connection, &[&commit.entity]).await?;
    }
    statements::insert_one(connection, &(commit, place)).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_shard::{Settled, TestShard, commit};

    fn keyed(entity: &Arc<EntityRow>, version: u64, append_key: &[u8]) -> Commit {
        Commit { append_key: Some(append_key.to_vec()), ..commit(entity, version) }
    }

    async fn assert_refused(settled: Settled) {
        let refused = settled.await.unwrap();
        assert!(matches!(refused, Err(CommitError::NotWritten(NotWritten::Conflict { .. }))), "{refused:?}");
    }

    /// Whoever decides a commit looks its key up first. Should that ever fail, the request must not happen twice.
    #[tokio::test]
    async fn a_key_that_is_staged_or_in_the_tail_is_not_written_again() {
        let mut shard = TestShard::new().await;
        let (entity, neighbour) = (shard.entity(1, 0), shard.entity(2, 0));
        let one = Arc::new(Activation::at(0));
        let (first, again, behind, beside) = (
            shard.submit(&one, keyed(&entity, 1, b"key")),
            shard.submit(&one, keyed(&entity, 2, b"key")),
            shard.submit(&one, keyed(&entity, 3, b"other")),
            shard.submit(&Arc::new(Activation::at(0)), keyed(&neighbour, 1, b"key")),
        );
        first.await.unwrap().unwrap();
        assert_refused(again).await;
        assert_eq!(behind.await.unwrap(), Err(NotWritten::Voided.into()));
        beside.await.unwrap().unwrap();
        assert_eq!((shard.stats().groups, shard.tail().read().len()), (1, 2), "they were meant to be one group");

        // In the tail, as it was left and as it is made again. What was refused left no key behind.
        assert_refused(shard.submit(&Arc::new(Activation::at(1)), keyed(&entity, 2, b"key"))).await;
        shard.crash().await;
        assert_eq!(shard.tail().read().len(), 2);
        assert_refused(shard.submit(&Arc::new(Activation::at(1)), keyed(&entity, 2, b"key"))).await;
        shard.submit(&Arc::new(Activation::at(1)), keyed(&entity, 2, b"other")).await.unwrap().unwrap();
        assert_eq!(shard.find_append(&entity, b"key").await.unwrap().map(|row| row.version), Some(1));
        assert_eq!(shard.find_append(&entity, b"other").await.unwrap().map(|row| row.version), Some(2));
        shard.stop().await;
    }

    /// A group is written one by one because one of its commits does not fit. The keys of the others are noted once.
    #[tokio::test]
    async fn keys_of_a_group_that_is_written_one_by_one_are_noted() {
        let mut shard = TestShard::new().await;
        let (entity, twin) = (shard.entity(1, 0), shard.entity(1, 0));
        let one = Arc::new(Activation::at(0));
        let (first, refused, second) = (
            shard.submit(&one, keyed(&entity, 1, b"a")),
            shard.submit(&Arc::new(Activation::at(0)), keyed(&twin, 1, b"b")),
            shard.submit(&one, keyed(&entity, 2, b"c")),
        );
        first.await.unwrap().unwrap();
        assert_refused(refused).await;
        second.await.unwrap().unwrap();
        assert_eq!(shard.stats().groups, 1, "they were meant to be one group");
        for _ in 0..2 {
            assert_eq!(shard.find_append(&entity, b"c").await.unwrap().map(|row| row.position), Some(2));
            assert_eq!(shard.append_keys(&entity, 9).await.unwrap(), [b"a", b"c"]);
            assert!(shard.append_keys(&twin, 9).await.unwrap().is_empty());
            shard.reopen().await;
        }
        shard.stop().await;
    }
}
