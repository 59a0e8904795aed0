//! One entity, one actor, one writer: in the directory of live entities, and once more in front of the disk.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use crate::common;
use std::sync::{
    Arc,
    atomic::{AtomicI64, Ordering::Relaxed},
};

use crate::common::{Ledger, assert_clean, directory, entered};
use futures_util::future::{join_all, try_join_all};
use kuma_core::Version;
use kuma_shard::{
    Activation, Commit, CommitCheck, CommitError, CopyId, DataDir, EntityHash, EntityRow, FileOptions, LogRow,
    NotWritten, Shard, ShardOptions, Slot, Submission,
};
use ractor::{Actor, ActorProcessingErr, ActorRef, SupervisionEvent};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::sync::{Barrier, oneshot};

const ROUNDS: usize = 200;
const TASKS: u64 = 8;

/// Eight tasks meet at an id that nobody has used. Two actors would both write version 1.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn concurrent_first_uses_activate_one_actor() {
    let dir = directory();
    let kuma = common::start(dir.path(), 2).await;
    for round in 0..ROUNDS {
        let barrier = Arc::new(Barrier::new(TASKS as usize));
        let tasks = (0..TASKS).map(|task| {
            let (kuma, barrier) = (kuma.clone(), barrier.clone());
            tokio::spawn(async move {
                let ledger = kuma.entity::<Ledger>(format!("l-{round}"));
                barrier.wait().await;
                ledger.append(entered(task)).await.unwrap()
            })
        });
        let mut versions: Vec<Version> = try_join_all(tasks).await.unwrap();
        versions.sort_unstable();
        assert_eq!(versions, (1..=TASKS).map(Version).collect::<Vec<_>>(), "round {round}");
        assert_eq!(kuma.stats().live_entities(), round + 1);
    }
    let failures: u64 = kuma.stats().shards.iter().map(|shard| shard.writer.unwrap().failures).sum();
    assert_eq!(failures, 0);
    assert_clean(&kuma).await;
}

/// The same while the entity is sent away again and again: appends go to the actor before or to the one after, never to both.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn first_uses_that_race_with_passivation_are_all_served_once() {
    let seed: u64 = rand::random();
    println!("seed: {seed}");
    let dir = directory();
    let kuma = common::start(dir.path(), 2).await;
    for round in 0..ROUNDS {
        let barrier = Arc::new(Barrier::new(TASKS as usize + 1));
        let tasks = (0..=TASKS).map(|task| {
            let (kuma, barrier) = (kuma.clone(), barrier.clone());
            let mut random = StdRng::seed_from_u64(seed ^ (round as u64 * 100 + task));
            tokio::spawn(async move {
                let ledger = kuma.entity::<Ledger>(format!("l-{round}"));
                barrier.wait().await;
                for step in 0..3 {
                    if task == TASKS || random.random_ratio(1, 4) {
                        ledger.raw().passivate().await.unwrap();
                    }
                    if task < TASKS {
                        ledger.append(entered(task * 3 + step)).await.unwrap();
                    }
                }
            })
        });
        join_all(tasks).await.into_iter().for_each(|done| done.unwrap());
        let ledger = kuma.entity::<Ledger>(format!("l-{round}")).read().await.unwrap();
        assert_eq!(ledger.version(), Version(TASKS * 3), "round {round}");
        let mut entries = ledger.entries.clone();
        for task in 0..TASKS {
            let own: Vec<u64> = entries.iter().copied().filter(|entry| entry / 3 == task).collect();
            assert_eq!(own, [task * 3, task * 3 + 1, task * 3 + 2], "the order of task {task} in round {round}");
        }
        entries.sort_unstable();
        entries.dedup();
        assert_eq!(entries.len() as u64, TASKS * 3, "round {round}");
    }
    assert_clean(&kuma).await;
}

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

/// A shard of its own, without anything above it.
struct Alone {
    shard: Shard,
    /// The next one's number.
    entities: AtomicI64,
    _data_dir: DataDir,
    _dir: tempfile::TempDir,
}

const SHARDS: u16 = 2;

async fn alone() -> Alone {
    let dir = directory();
    let data_dir = DataDir::open(dir.path(), "fence", Some(SHARDS), SHARDS).unwrap();
    let options = ShardOptions {
        number: 0,
        shards: SHARDS,
        directory: dir.path().to_owned(),
        disk_id: data_dir.disk_id(),
        file: FileOptions::default(),
        queue_bytes_max: 1 << 20,
        owns_slots: true,
    };
    Shard::create(&options).await.unwrap();
    let (root, _) = Actor::spawn(None, Root, ()).await.unwrap();
    let shard = Shard::open(&options, root.get_cell()).await.unwrap();
    Alone { shard, entities: AtomicI64::new(1), _data_dir: data_dir, _dir: dir }
}

impl Alone {
    fn entity(&self, name: u8, slot: u64) -> Arc<EntityRow> {
        Arc::new(EntityRow {
            eid: self.entities.fetch_add(1, Relaxed),
            copy: CopyId::LIVE,
            slot: Slot::new(slot),
            kind: "thing".into(),
            id_hash: EntityHash([name; 16]),
            life: 1,
            sealed_id: vec![name],
            key_id: [name; 16],
            created_at_us: 1,
            erased_at_us: None,
        })
    }

    fn submit(
        &self,
        activation: &Arc<Activation>,
        commit: Option<Commit>,
    ) -> oneshot::Receiver<Result<(), CommitError>> {
        let (told, outcome) = oneshot::channel();
        let on_settled = Box::new(move |result| told.send(result).unwrap());
        self.shard.submit(Submission { activation: activation.clone(), commit, on_settled });
        outcome
    }

    async fn versions(&self, entity: &EntityRow) -> Vec<(u64, u64, u64)> {
        let rows = self.shard.read_log(entity, 0, 1000).await.unwrap();
        rows.iter().map(|row| (row.version, row.position, row.seq)).collect()
    }

    async fn assert_clean(&self) {
        let report = self.shard.verify(&mut Trusting).await.unwrap();
        assert!(report.is_clean(), "{report:?}");
    }
}

struct Trusting;

impl CommitCheck for Trusting {
    async fn check(&mut self, _: &EntityRow, _: &LogRow) -> Result<(), String> {
        Ok(())
    }
}

fn commit(entity: &Arc<EntityRow>, version: u64) -> Commit {
    Commit {
        entity: entity.clone(),
        create: version == 1,
        first_version: version,
        count: 1,
        at_us: 1,
        append_key: None,
        body: format!("{} {version}", entity.eid).into_bytes(),
    }
}

fn is_conflict(result: &Result<(), CommitError>) -> bool {
    matches!(result, Err(CommitError::NotWritten(NotWritten::Conflict { .. })))
}

const VOIDED: Result<(), CommitError> = Err(CommitError::NotWritten(NotWritten::Voided));

/// Should there ever be two actors of one entity, the writer lets one of them write. On a current-thread runtime all that is
/// submitted without an await in between is one group.
#[tokio::test]
async fn of_two_activations_with_the_same_version_one_is_written_and_their_neighbours_never_notice() {
    let alone = alone().await;
    let (entity, before, after) = (alone.entity(1, 0), alone.entity(2, 0), alone.entity(3, 2));
    let first = Arc::new(Activation::at(0));
    alone.submit(&first, Some(commit(&entity, 1))).await.unwrap().unwrap();
    let groups = alone.shard.stats().groups;

    let (one, other) = (Arc::new(Activation::at(1)), Arc::new(Activation::at(1)));
    let neighbours = [Arc::new(Activation::at(0)), Arc::new(Activation::at(0))];
    let outcomes = [
        alone.submit(&neighbours[0], Some(commit(&before, 1))),
        alone.submit(&one, Some(commit(&entity, 2))),
        alone.submit(&other, Some(commit(&entity, 2))),
        alone.submit(&one, Some(commit(&entity, 3))),
        alone.submit(&other, Some(commit(&entity, 3))),
        alone.submit(&other, None),
        alone.submit(&one, None),
        alone.submit(&neighbours[1], Some(commit(&after, 1))),
        alone.submit(&neighbours[0], Some(commit(&before, 2))),
    ];
    let outcomes: Vec<Result<(), CommitError>> = join_all(outcomes).await.into_iter().map(Result::unwrap).collect();
    assert_eq!(alone.shard.stats().groups, groups + 1, "they were meant to be one group");

    assert!(is_conflict(&outcomes[2]), "{outcomes:?}");
    assert_eq!([&outcomes[4], &outcomes[5]], [&VOIDED, &VOIDED]);
    assert!([0, 1, 3, 6, 7, 8].iter().all(|index| outcomes[*index] == Ok(())), "{outcomes:?}");
    assert!(other.is_voided() && !one.is_voided());
    assert_eq!((one.committed(), other.committed()), (3, 1));

    // version, position, seq: no position and no seq was spent on what was not written.
    assert_eq!(alone.versions(&entity).await, [(1, 1, 1), (2, 3, 3), (3, 4, 4)]);
    assert_eq!(alone.versions(&before).await, [(1, 2, 2), (2, 6, 5)]);
    assert_eq!(alone.versions(&after).await, [(1, 5, 1)]);

    // Voided for good, also in later groups.
    assert_eq!(alone.submit(&other, Some(commit(&entity, 2))).await.unwrap(), VOIDED);
    alone.submit(&one, Some(commit(&entity, 4))).await.unwrap().unwrap();
    assert_eq!(alone.versions(&entity).await.last(), Some(&(4, 7, 6)));
    alone.assert_clean().await;
    alone.shard.stop().await;
}

/// What the writer's memory cannot know the unique indexes of the file do: the group is undone and written one by one.
#[tokio::test]
async fn what_only_the_file_refuses_fails_alone_too() {
    let alone = alone().await;
    let (entity, neighbour) = (alone.entity(1, 0), alone.entity(2, 0));
    // A second row for the same entity.
    let twin = alone.entity(1, 0);
    let fresh = || Arc::new(Activation::at(0));
    let twins = fresh();
    let neighbours = fresh();
    let outcomes = [
        alone.submit(&fresh(), Some(commit(&entity, 1))),
        alone.submit(&twins, Some(commit(&twin, 1))),
        alone.submit(&twins, Some(commit(&twin, 2))),
        alone.submit(&neighbours, Some(commit(&neighbour, 1))),
        alone.submit(&neighbours, Some(commit(&neighbour, 2))),
    ];
    let outcomes: Vec<Result<(), CommitError>> = join_all(outcomes).await.into_iter().map(Result::unwrap).collect();
    assert!(is_conflict(&outcomes[1]), "{outcomes:?}");
    assert_eq!(outcomes[2], VOIDED);
    assert!([0, 3, 4].iter().all(|index| outcomes[*index] == Ok(())), "{outcomes:?}");
    assert_eq!(alone.shard.stats().groups, 1, "they were meant to be one group");
    assert_eq!(alone.versions(&entity).await, [(1, 1, 1)]);
    assert_eq!(alone.versions(&neighbour).await, [(1, 2, 2), (2, 3, 3)]);
    assert!(alone.versions(&twin).await.is_empty());

    // The same idempotency key twice: that the writer itself refuses.
    let keyed = |version| Commit { append_key: Some(vec![7]), ..commit(&neighbour, version) };
    alone.submit(&neighbours, Some(keyed(3))).await.unwrap().unwrap();
    let again = alone.submit(&neighbours, Some(keyed(4)));
    let behind = alone.submit(&neighbours, Some(commit(&neighbour, 5)));
    assert!(is_conflict(&again.await.unwrap()));
    assert_eq!(behind.await.unwrap(), VOIDED);
    alone.assert_clean().await;
    alone.shard.stop().await;
}

#[tokio::test]
async fn a_commit_that_skips_a_version_or_is_of_another_shards_slot_is_refused() {
    let alone = alone().await;
    let (entity, foreign) = (alone.entity(1, 0), alone.entity(2, 1));
    let fresh = || Arc::new(Activation::at(0));
    assert!(is_conflict(&alone.submit(&fresh(), Some(commit(&entity, 2))).await.unwrap()));
    assert!(is_conflict(&alone.submit(&fresh(), Some(Commit { count: 0, ..commit(&entity, 1) })).await.unwrap()));
    let refused = alone.submit(&fresh(), Some(commit(&foreign, 1))).await.unwrap();
    assert_eq!(refused, Err(NotWritten::NotOwner { slot: Slot::new(1) }.into()));
    alone.submit(&fresh(), Some(commit(&entity, 1))).await.unwrap().unwrap();
    assert_eq!(alone.versions(&entity).await, [(1, 1, 1)]);
    alone.assert_clean().await;
    alone.shard.stop().await;
    let stopped = alone.submit(&fresh(), Some(commit(&entity, 2))).await.unwrap();
    assert_eq!(stopped, Err(NotWritten::Stopping.into()));
}
