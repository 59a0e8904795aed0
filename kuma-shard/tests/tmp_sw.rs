#![allow(clippy::all, missing_docs)]
use futures_util::future::join_all;
use kuma_shard::{
    Activation, Commit, CommitCheck, CommitError, CopyId, DataDir, EntityHash, EntityRow, FileOptions, LogRow,
    NotWritten, Shard, ShardOptions, Slot, Submission,
};
use ractor::{Actor, ActorProcessingErr, ActorRef, SupervisionEvent};
use std::sync::Arc;
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

/// A shard of its own, without anything above it.
struct Alone {
    shard: Shard,
    _data_dir: DataDir,
    _dir: tempfile::TempDir,
}

const SHARDS: u16 = 2;

async fn alone() -> Alone {
    let dir = tempfile::tempdir().unwrap();
    let data_dir = DataDir::open(dir.path(), "fence", Some(SHARDS), SHARDS).unwrap();
    let options = ShardOptions {
        number: 0,
        shards: SHARDS,
        directory: dir.path().to_owned(),
        disk_id: data_dir.disk_id(),
        file: FileOptions::default(),
        queue_bytes_max: 1 << 20,
    };
    Shard::create(&options).await.unwrap();
    let (root, _) = Actor::spawn(None, Root, ()).await.unwrap();
    let shard = Shard::open(&options, root.get_cell()).await.unwrap();
    Alone { shard, _data_dir: data_dir, _dir: dir }
}

impl Alone {
    fn entity(&self, name: u8, slot: u64) -> Arc<EntityRow> {
        Arc::new(EntityRow {
            eid: self.shard.allocate_eid(),
            copy: CopyId::GENESIS,
            slot: Slot::new(slot),
            kind: "thing".into(),
            id_hash: EntityHash([name; 16]),
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

    // The same idempotency key twice.
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

#[tokio::test]
async fn failing_group() {
    use kuma_shard::SnapshotRow;
    let alone = alone().await;
    let (entity, b) = (alone.entity(1, 0), alone.entity(2, 0));
    let a = Arc::new(Activation::at(0));
    alone.submit(&a, Some(commit(&entity, 1))).await.unwrap().unwrap();
    let path = alone._dir.path().join("shard-000.db");
    let mut child = std::process::Command::new("python3").arg("-c").arg(format!(
        "import sqlite3,time,sys\nc=sqlite3.connect('{}',isolation_level=None)\nc.execute('BEGIN IMMEDIATE')\nprint('x',flush=True)\ntime.sleep(27)\nc.execute('ROLLBACK')", path.display()))
        .stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut out = [0; 1];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut out).unwrap();
    let t = std::time::Instant::now();
    let snap = |version| SnapshotRow { eid: entity.eid, version, schema: 1, body: vec![1] };
    let (told, saved) = oneshot::channel();
    alone.shard.save_snapshot(snap(1), Box::new(move |r| told.send(r).unwrap()));
    let (w, n) =
        (alone.submit(&a, Some(commit(&entity, 2))), alone.submit(&Arc::new(Activation::at(0)), Some(commit(&b, 1))));
    println!("{:?} {:?} {:?} {:?}", saved.await, w.await, n.await, t.elapsed());
    println!("{:?}", alone.shard.stats());
    println!("{:?}", alone.shard.find_snapshot(entity.eid).await);
    println!("{:?}", alone.shard.verify(&mut Trusting).await.map(|r| r.is_clean()));
    println!("{:?}", alone.shard.scrub_page(0, 9).await.map(|r| r.rows.len()));
    loop {
        let (told, saved) = oneshot::channel();
        alone.shard.save_snapshot(snap(1), Box::new(move |r| told.send(r).unwrap()));
        let r = saved.await.unwrap();
        println!("{:?} {:?}", r, t.elapsed());
        if r.is_ok() {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    }
    println!("{:?}", alone.shard.find_snapshot(entity.eid).await);
    alone.assert_clean().await;
    child.wait().unwrap();
    alone.shard.stop().await;
}

/// A small loop device is not at hand: fill a tmpfs.
#[tokio::test]
async fn disk_full() {
    use kuma_shard::SnapshotRow;
    let Ok(dir) = std::env::var("KUMA_SMALL") else {
        println!("no small disk");
        return;
    };
    let data_dir = DataDir::open(std::path::Path::new(&dir), "fence", Some(SHARDS), SHARDS).unwrap();
    let options = ShardOptions {
        number: 0,
        shards: SHARDS,
        directory: dir.clone().into(),
        disk_id: data_dir.disk_id(),
        file: FileOptions::default(),
        queue_bytes_max: 1 << 20,
    };
    Shard::create(&options).await.unwrap();
    let (root, _) = Actor::spawn(None, Root, ()).await.unwrap();
    let shard = Shard::open(&options, root.get_cell()).await.unwrap();
    let alone = Alone { shard, _data_dir: data_dir, _dir: tempfile::tempdir().unwrap() };
    let entity = alone.entity(1, 0);
    let a = Arc::new(Activation::at(0));
    alone.submit(&a, Some(commit(&entity, 1))).await.unwrap().unwrap();
    let snap = |bytes| SnapshotRow { eid: entity.eid, version: 1, schema: bytes as u64, body: vec![1; bytes] };
    for round in 0..3 {
        let b = Arc::new(Activation::at(1 + round));
        let (told, saved) = oneshot::channel();
        alone.shard.save_snapshot(snap(20 << 20), Box::new(move |r| told.send(r).unwrap()));
        let w = alone.submit(&b, Some(commit(&entity, 2 + round)));
        println!("{:?} {:?}", saved.await.unwrap(), w.await.unwrap());
        let b = Arc::new(Activation::at(1 + round));
        let (told, saved) = oneshot::channel();
        alone.shard.save_snapshot(snap(1000 + round as usize), Box::new(move |r| told.send(r).unwrap()));
        println!("{:?} {:?}", alone.submit(&b, Some(commit(&entity, 2 + round))).await, saved.await.unwrap());
    }
    println!("{:?}", alone.shard.find_snapshot(entity.eid).await.map(|s| s.map(|s| s.body.len())));
    alone.assert_clean().await;
    alone.shard.stop().await;
}
