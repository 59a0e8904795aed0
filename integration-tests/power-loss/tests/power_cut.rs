//! Power is lost in the middle of things: FULL loses nothing, and the controls show that this test would see it if it
//! did.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod oracle;

use std::error::Error;
use std::time::{SystemTime, UNIX_EPOCH};

use oracle::{Found, Oracle};
use power_loss::{Counts, Disk, PowerLoss};
use sqlx::sqlite::{SqliteConnectOptions, SqliteSynchronous};
use sqlx::{ConnectOptions, Connection};

type Judgement = Result<Found, Box<dyn Error + Send + Sync>>;

/// A seed for this run; `POWER_LOSS_SEED` repeats one, and `POWER_LOSS_CUTS` makes more cuts than CI has time for.
fn seed(test: &str) -> u64 {
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64 % 1_000_000_000;
    let seed = std::env::var("POWER_LOSS_SEED").map_or_else(|_| now(), |text| text.parse().unwrap());
    println!("{test}: POWER_LOSS_SEED={seed}");
    seed
}

/// The next number of a small generator, in `0..bound`.
fn roll(state: &mut u64, bound: u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*state >> 33) % bound
}

/// One writer, a reader and a checkpointer on one file, until the first error.
async fn work(options: &SqliteConnectOptions, oracle: &mut Oracle) -> sqlx::Result<()> {
    let mut writer = options.clone().connect().await?;
    oracle::create(&mut writer).await?;
    oracle.created = true;
    let mut reader = options.clone().connect().await?;
    let mut checkpointer = options.clone().connect().await?;
    loop {
        oracle::append(&mut writer, oracle.acked).await?;
        oracle.acked += 1;
        match oracle.acked % 12 {
            4 => oracle::checkpoint(&mut checkpointer, "PASSIVE").await?,
            7 => drop(oracle::read(&mut reader).await?),
            11 => oracle::checkpoint(&mut checkpointer, "TRUNCATE").await?,
            _ => {}
        }
    }
}

/// Works until the power is cut at a random operation, and judges what is left on the ordinary VFS.
async fn one_cut(disk: Disk, synchronous: SqliteSynchronous, mut random: u64) -> (Oracle, Counts, Judgement) {
    let directory = tempfile::tempdir().unwrap();
    let options = oracle::options(&directory.path().join("shard.db"), synchronous);
    let power = PowerLoss::register(disk);
    power.cut_after(1 + roll(&mut random, 500), roll(&mut random, u64::from(u32::MAX)));
    let mut oracle = Oracle::default();
    let error = work(&options.clone().vfs(power.vfs_name().to_owned()), &mut oracle).await.unwrap_err();
    assert!(power.is_cut(), "it worked until the cut: {error}");
    let found = oracle::judge(&options, &oracle).await;
    (oracle, power.counts(), found)
}

#[tokio::test]
async fn full_on_an_honest_disk_loses_nothing_that_was_acknowledged() {
    let seed = seed("full_on_an_honest_disk");
    let (mut acked, mut inside_commits, mut inside_checkpoints, mut lost_writes, mut torn_writes) = (0, 0, 0, 0, 0);
    let cuts = std::env::var("POWER_LOSS_CUTS").map_or(60, |text| text.parse().unwrap());
    for cut in 0..cuts {
        let (oracle, counts, found) = one_cut(Disk::Honest, SqliteSynchronous::Full, seed + cut).await;
        let found = found.unwrap_or_else(|error| panic!("cut {cut}: {error}"));
        assert_eq!(found.lost, [], "cut {cut}: {oracle:?} {counts:?}");
        assert!(
            found.present <= oracle.acked + 1,
            "cut {cut}: only the transaction in flight may be there unacknowledged"
        );
        acked += oracle.acked;
        inside_commits += i64::from(counts.cut_between_wal_write_and_sync);
        inside_checkpoints += i64::from(counts.cut_between_database_write_and_sync);
        lost_writes += counts.lost_writes;
        torn_writes += counts.torn_writes;
    }
    println!(
        "{cuts} cuts, {acked} acked, 0 lost; {inside_commits} inside a commit, {inside_checkpoints} inside a \
         checkpoint; {lost_writes} writes lost, {torn_writes} torn"
    );
    assert!(inside_commits > 0 && inside_checkpoints > 0 && lost_writes > 0 && torn_writes > 0, "the cuts hit nothing");
}

/// One file lives through many cuts, each on a disk of its own, some of them before recovery is done with the last one.
#[tokio::test]
async fn a_file_survives_cut_after_cut() {
    let mut random = seed("cut_after_cut");
    let directory = tempfile::tempdir().unwrap();
    let options = oracle::options(&directory.path().join("shard.db"), SqliteSynchronous::Full);
    let mut connection = options.clone().connect().await.unwrap();
    oracle::create(&mut connection).await.unwrap();
    connection.close().await.unwrap();
    let mut oracle = Oracle { created: true, acked: 0 };
    for life in 0..40 {
        let power = PowerLoss::register(Disk::Honest);
        power.cut_after(1 + roll(&mut random, if life % 2 == 0 { 8 } else { 150 }), roll(&mut random, 1 << 30));
        let error = live(&options.clone().vfs(power.vfs_name().to_owned()), &mut oracle).await.unwrap_err();
        assert!(power.is_cut(), "life {life}: {error}");
    }
    let found = oracle::judge(&options, &oracle).await.unwrap();
    println!("40 cuts of one file: {} acked, {} present", oracle.acked, found.present);
    assert_eq!(found.lost, []);
}

/// Opens the file, finds what was acknowledged and goes on from there, until the first error.
async fn live(options: &SqliteConnectOptions, oracle: &mut Oracle) -> sqlx::Result<()> {
    let mut connection = options.clone().connect().await?;
    let present: i64 = sqlx::query_scalar("SELECT count(DISTINCT tx) FROM part").fetch_one(&mut connection).await?;
    assert!(present >= oracle.acked, "{present} transactions of {} acknowledged ones are left", oracle.acked);
    // One that was in flight may be seen now, but what is read after recovery is durable only with the next commit.
    let mut next = present;
    loop {
        oracle::append(&mut connection, next).await?;
        next += 1;
        oracle.acked = next;
        if next % 10 == 0 {
            oracle::checkpoint(&mut connection, "RESTART").await?;
        }
    }
}

/// How many of 20 cuts lost something acknowledged, or left a file that SQLite cannot read.
async fn losing_cuts(disk: Disk, synchronous: SqliteSynchronous, seed: u64) -> usize {
    let mut losing = 0;
    for cut in 0..20 {
        let (_, _, found) = one_cut(disk, synchronous, seed + cut).await;
        losing += usize::from(!found.is_ok_and(|found| found.lost.is_empty()));
    }
    losing
}

#[tokio::test]
async fn control_normal_loses_acknowledged_rows() {
    let losing = losing_cuts(Disk::Honest, SqliteSynchronous::Normal, seed("control_normal")).await;
    println!("NORMAL: {losing} of 20 cuts lost something");
    assert!(losing >= 1);
}

#[tokio::test]
async fn control_a_disk_that_lies_loses_acknowledged_rows() {
    let losing = losing_cuts(Disk::LyingSync, SqliteSynchronous::Full, seed("control_lying_disk")).await;
    println!("lying disk: {losing} of 20 cuts lost something");
    assert!(losing >= 1);
}

/// Four files with a writer, a reader and a checkpointer each, all at once; the old connections are still open, and
/// some of them inside a transaction, while the files are judged.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_connections_lose_power_together() {
    let seed = seed("many_connections");
    for round in 0..8 {
        let mut random = seed + round;
        let directory = tempfile::tempdir().unwrap();
        let power = PowerLoss::register(Disk::Honest);
        let shards: Vec<_> = (0..4)
            .map(|shard| oracle::options(&directory.path().join(format!("shard-{shard}.db")), SqliteSynchronous::Full))
            .collect();
        let mut bystanders = Vec::new();
        for shard in &shards {
            let mut writer = shard.clone().vfs(power.vfs_name().to_owned()).connect().await.unwrap();
            oracle::create(&mut writer).await.unwrap();
            let mut reader = shard.clone().vfs(power.vfs_name().to_owned()).connect().await.unwrap();
            let _snapshot = sqlx::raw_sql("BEGIN; SELECT count(*) FROM part").execute(&mut reader).await.unwrap();
            bystanders.push((writer, reader));
        }
        power.cut_after(200 + roll(&mut random, 1500), roll(&mut random, u64::from(u32::MAX)));
        let workers: Vec<_> = (shards.iter().cloned())
            .map(|shard| tokio::spawn(append_until_cut(shard.vfs(power.vfs_name().to_owned()), power.clone())))
            .collect();
        for (shard, worker) in shards.iter().zip(workers) {
            let oracle = worker.await.unwrap();
            let found = oracle::judge(shard, &oracle).await.unwrap();
            assert_eq!(found.lost, [], "round {round}: {:?}", power.counts());
        }
        for (mut writer, reader) in bystanders {
            assert!(oracle::append(&mut writer, 1 << 40).await.is_err(), "there is no power");
            writer.close().await.unwrap();
            drop(reader);
        }
        for shard in &shards {
            oracle::judge(shard, &Oracle::default()).await.unwrap(); // closing the old connections harmed nothing
        }
    }
}

async fn append_until_cut(shard: SqliteConnectOptions, power: PowerLoss) -> Oracle {
    let mut oracle = Oracle { created: true, acked: 0 };
    let checkpoints = tokio::spawn({
        let (shard, power) = (shard.clone(), power.clone());
        async move {
            let Ok(mut checkpointer) = shard.connect().await else { return };
            while oracle::checkpoint(&mut checkpointer, "PASSIVE").await.is_ok() && !power.is_cut() {
                tokio::task::yield_now().await;
            }
        }
    });
    if let Ok(mut writer) = shard.connect().await {
        while oracle::append(&mut writer, oracle.acked).await.is_ok() {
            oracle.acked += 1;
        }
    }
    assert!(power.is_cut(), "a writer failed before the cut");
    checkpoints.await.unwrap();
    oracle
}

/// A sync that takes time can be cut while it is in flight: its transaction is not acknowledged, and may be there or
/// not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sync_in_flight_does_not_acknowledge() {
    let directory = tempfile::tempdir().unwrap();
    let options = oracle::options(&directory.path().join("shard.db"), SqliteSynchronous::Full);
    let power = PowerLoss::register(Disk::Honest);
    let mut writer = options.clone().vfs(power.vfs_name().to_owned()).connect().await.unwrap();
    oracle::create(&mut writer).await.unwrap();
    oracle::append(&mut writer, 0).await.unwrap();
    power.sync_takes(std::time::Duration::from_millis(200));
    let append = tokio::spawn(async move { oracle::append(&mut writer, 1).await });
    while power.counts().syncs_in_flight == 0 {
        tokio::task::yield_now().await;
    }
    power.cut(seed("a_sync_in_flight"));
    assert!(append.await.unwrap().is_err());
    assert_eq!(power.counts().syncs_in_flight, 1);
    assert!(power.counts().cut_between_wal_write_and_sync);
    let found = oracle::judge(&options, &Oracle { created: true, acked: 1 }).await.unwrap();
    assert_eq!(found.lost, []);
}
