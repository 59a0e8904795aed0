//! The n-th write or sync fails, for every n: it is reported, and nothing that was acknowledged before is lost.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod oracle;

use oracle::Oracle;
use power_loss::{Disk, Errno, Fault, PowerLoss};
use sqlx::ConnectOptions;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqliteSynchronous};

/// Opening, a table, five transactions, a checkpoint, three transactions: up to the first error, which it returns.
async fn work(
    options: SqliteConnectOptions,
    oracle: &mut Oracle,
    connection: &mut Option<SqliteConnection>,
) -> sqlx::Result<()> {
    let connection = connection.insert(options.connect().await?);
    oracle::create(connection).await?;
    oracle.created = true;
    for tx in 0..8 {
        if tx == 5 {
            oracle::checkpoint(connection, "TRUNCATE").await?;
        }
        oracle::append(connection, tx).await?;
        oracle.acked += 1;
    }
    Ok(())
}

/// Runs the workload with a fault at n = 1, 2, 3, ... until it runs through.
async fn fail_each(what: Fault, error: Errno, code: &[&str]) {
    for n in 1.. {
        let directory = tempfile::tempdir().unwrap();
        let options = oracle::options(&directory.path().join("shard.db"), SqliteSynchronous::Full);
        let power = PowerLoss::register(Disk::Honest);
        power.fail_nth(what, n, error);
        let (mut oracle, mut connection) = (Oracle::default(), None);
        let outcome = work(options.clone().vfs(power.vfs_name().to_owned()), &mut oracle, &mut connection).await;
        let injected = power.counts().faults_injected;
        match &outcome {
            Ok(()) => assert_eq!(injected, 0, "{what:?} {n} failed and nobody was told"),
            Err(sqlx::Error::Database(reported)) => {
                assert_eq!(injected, 1, "{what:?} {n}: {reported}");
                let reported = reported.code().unwrap();
                assert!(code.contains(&&*reported), "{what:?} {n}: {reported}");
            }
            Err(other) => panic!("{what:?} {n}: {other}"),
        }
        // Half of the time the machine goes on, half of the time it loses power as well.
        if n % 2 == 0 {
            power.cut(n);
        }
        drop(connection.take());
        let found = oracle::judge(&options, &oracle).await.unwrap();
        assert_eq!(found.lost, [], "{what:?} {n}: {oracle:?}");
        if outcome.is_ok() {
            println!("{what:?}: each of {} operations failed once", n - 1);
            assert!(n > 8, "there was nothing to fail");
            return;
        }
    }
}

#[tokio::test]
async fn a_failed_sync_is_reported_and_loses_nothing_acknowledged() {
    fail_each(Fault::Sync, Errno::Io, &["1034"]).await; // SQLITE_IOERR_FSYNC
}

#[tokio::test]
async fn a_failed_write_is_reported_and_loses_nothing_acknowledged() {
    fail_each(Fault::Write, Errno::Io, &["778"]).await; // SQLITE_IOERR_WRITE
}

#[tokio::test]
async fn a_full_disk_is_reported_and_loses_nothing_acknowledged() {
    fail_each(Fault::WriteOrSync, Errno::Full, &["13"]).await; // SQLITE_FULL
}

/// The disk is full for a while; reads go on, and so do writes once there is room.
#[tokio::test]
async fn a_lasting_fault_lasts_until_it_is_healed() {
    let directory = tempfile::tempdir().unwrap();
    let options = oracle::options(&directory.path().join("shard.db"), SqliteSynchronous::Full);
    let power = PowerLoss::register(Disk::Honest);
    let on_power = options.clone().vfs(power.vfs_name().to_owned());
    let mut writer = on_power.clone().connect().await.unwrap();
    oracle::create(&mut writer).await.unwrap();
    oracle::append(&mut writer, 0).await.unwrap();
    power.only_files_matching(|path| path.to_string_lossy().ends_with("-wal"));
    power.fail_from_nth(Fault::Write, 1, Errno::Full);
    for _ in 0..3 {
        let mut writer = on_power.clone().connect().await.unwrap();
        assert!(oracle::append(&mut writer, 1).await.is_err());
        assert_eq!(oracle::read(&mut writer).await.unwrap(), oracle::parts_of(0));
    }
    power.heal();
    oracle::append(&mut writer, 1).await.unwrap();
    power.cut(1);
    assert_eq!(oracle::judge(&options, &Oracle { created: true, acked: 2 }).await.unwrap().lost, []);
}

/// fsyncgate: after a failed sync the commit may be *seen* by whoever opens the database next, from the page cache, and
/// a later sync that succeeds does not save it. This is why a shard must not go on after a failed sync, whatever it
/// reads.
#[tokio::test]
async fn a_commit_whose_sync_failed_can_be_seen_after_reopening_and_be_gone_after_a_cut() {
    let directory = tempfile::tempdir().unwrap();
    let options = oracle::options(&directory.path().join("shard.db"), SqliteSynchronous::Full);
    let power = PowerLoss::register(Disk::Honest);
    let on_power = options.clone().vfs(power.vfs_name().to_owned());
    let mut writer = on_power.clone().connect().await.unwrap();
    oracle::create(&mut writer).await.unwrap();
    oracle::append(&mut writer, 0).await.unwrap();
    power.fail_nth(Fault::Sync, 1, Errno::Io);
    assert!(oracle::append(&mut writer, 1).await.is_err());
    // The process dies here: nobody checkpoints, nobody cleans up. Its memory is gone, the page cache is not.
    std::mem::forget(writer);
    let copy = directory.path().join("copy.db");
    std::fs::copy(directory.path().join("shard.db"), &copy).unwrap();
    std::fs::copy(directory.path().join("shard.db-wal"), directory.path().join("copy.db-wal")).unwrap();
    let seen = oracle::judge(&oracle::options(&copy, SqliteSynchronous::Full), &Oracle::default()).await.unwrap();
    assert_eq!(seen.present, 2, "the page cache has the commit that failed");
    power.cut(3);
    let left = oracle::judge(&options, &Oracle { created: true, acked: 1 }).await.unwrap();
    assert_eq!((left.lost.len(), left.present), (0, 1), "the disk has not");
}
