//! A full disk: appends are refused with a typed error, reads go on, nothing acknowledged is lost, and appends go on by themselves
//! when there is space again, or after a restart.
//!
//! On a small tmpfs of its own, hence only as root; elsewhere the tests say that they were skipped.

#![allow(clippy::unwrap_used, clippy::panic)] // the helpers of tests are tests too

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use integration_tests::{Oracle, Probe, TestAppend, eventually, options, seed, start};
use kuma_core::{
    AppendError, CommitError, DataDirError, Kuma, NotWritten, OpenError, StartError, Unavailable, VaultError, Version,
};
use rand::{RngExt, SeedableRng, rngs::StdRng};

const SOON: Duration = Duration::from_secs(10);
const ENTITIES: usize = 8;

/// A small tmpfs.
struct SmallDisk {
    directory: tempfile::TempDir,
}

impl SmallDisk {
    /// None, with the reason printed, where one may not mount.
    fn mount(kib: u64) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let size = format!("size={kib}k");
        let output = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(directory.path()).output();
        match output {
            Ok(output) if output.status.success() => Some(SmallDisk { directory }),
            Ok(output) => {
                println!("skipped: mount: {}", String::from_utf8_lossy(&output.stderr).trim());
                None
            }
            Err(error) => {
                println!("skipped: mount: {error}");
                None
            }
        }
    }

    fn data(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    fn resize(&self, kib: u64) {
        let size = format!("remount,size={kib}k");
        assert!(Command::new("mount").args(["-o", &size]).arg(self.directory.path()).status().unwrap().success());
    }

    fn ballast(&self) -> PathBuf {
        self.directory.path().join("ballast")
    }

    /// Fills the disk with something else, but for `pages` of 4 KiB.
    fn fill_but(&self, pages: u64) {
        let mut ballast = std::fs::File::create(self.ballast()).unwrap();
        while ballast.write_all(&[7; 4096]).is_ok() {}
        let len = ballast.metadata().unwrap().len() / 4096 * 4096;
        ballast.set_len(len.saturating_sub(pages * 4096)).unwrap();
    }

    fn empty(&self) {
        std::fs::remove_file(self.ballast()).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: a store of a failed test may still have it open.
        let _ = Command::new("umount").arg("-l").arg(self.directory.path()).status();
    }
}

fn name(entity: usize) -> String {
    format!("entity-{entity}")
}

/// Appends until every entity was refused, and checks that the refusals say why.
async fn append_until_full(kuma: &Kuma, oracle: &mut Oracle, round: u64, random: &mut StdRng) {
    let mut refused = [false; ENTITIES];
    for number in 0.. {
        let entity = number as usize % ENTITIES;
        if refused.iter().all(|refused| *refused) {
            return;
        }
        let append = TestAppend {
            id: round << 32 | number,
            events: random.random_range(1..=20),
            bytes: random.random_range(0..2000),
        };
        let outcome = kuma.entity::<Probe>(name(entity)).append_all(append.events()).await;
        oracle.told(&name(entity), append, &outcome);
        match outcome {
            // A smaller one may still fit.
            Ok(_) => {}
            Err(AppendError::Unavailable(Unavailable::NotWritten { cause: NotWritten::DiskFull { .. }, .. })) => {
                refused[entity] = true;
            }
            Err(error) => panic!("a full disk is not told as such: {error:?}"),
        }
    }
}

async fn append_until_acked(kuma: &Kuma, oracle: &mut Oracle, entity: &str, round: u64) {
    let mut id = round << 32;
    eventually("an append when there is space", SOON, async || {
        id += 1;
        let append = TestAppend { id, events: 3, bytes: 100 };
        let outcome = kuma.entity::<Probe>(entity).append_all(append.events()).await;
        oracle.told(entity, append, &outcome);
        outcome.ok()
    })
    .await;
}

/// Whether an error says that there is no space.
fn is_about_space(error: &StartError) -> bool {
    match error {
        StartError::Open(error) | StartError::DataDir(DataDirError::Open(error)) => {
            matches!(error, OpenError::DiskFull { .. })
        }
        StartError::Vault(VaultError::Write(CommitError::NotWritten(cause))) => {
            matches!(cause, NotWritten::DiskFull { .. })
        }
        StartError::MasterKey(error) => format!("{error:?}").contains("StorageFull"),
        _ => false,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_refuses_appends_and_loses_nothing() {
    let mut random = StdRng::seed_from_u64(seed("a_full_disk_refuses_appends"));
    let Some(disk) = SmallDisk::mount(3 << 10) else { return };
    let mut oracle = Oracle::default();
    let kuma = start(&disk.data()).await;
    for round in 0..4 {
        append_until_full(&kuma, &mut oracle, 1 + round, &mut random).await;
        let acks = oracle.acks();
        println!(
            "full for the {}. time after {acks} acknowledged appends, {} refused",
            round + 1,
            oracle.not_written()
        );
        for entity in 0..ENTITIES {
            assert!(kuma.entity::<Probe>(name(entity)).read().await.unwrap().version() > Version(0), "reads go on");
        }
        match kuma
            .entity::<Probe>(format!("new-{round}"))
            .append_all(TestAppend { id: 7, events: 1, bytes: 1 }.events())
            .await
        {
            Ok(_) | Err(AppendError::Unavailable(Unavailable::NoKey { .. } | Unavailable::NotWritten { .. })) => {}
            Err(error) => panic!("a new entity on a full disk: {error:?}"),
        }
        oracle.judge(&kuma).await.assert_clean(format!("full for the {round}. time"));
        disk.resize((4 + round) << 10);
        for entity in 0..ENTITIES {
            append_until_acked(&kuma, &mut oracle, &name(entity), 100 + round).await;
        }
    }
    append_until_full(&kuma, &mut oracle, 50, &mut random).await;
    // It closes as it is, and has to be opened with more space, or without.
    kuma.shutdown().await;
    match Kuma::start(options(&disk.data())).await {
        Ok(kuma) => {
            println!("a full disk was enough to start again");
            oracle.judge(&kuma).await.assert_clean("started on a full disk");
            kuma.shutdown().await;
        }
        Err(error) => assert!(is_about_space(&error), "{error:?}"),
    }
    disk.resize(32 << 10);
    let kuma = start(&disk.data()).await;
    oracle.judge(&kuma).await.assert_clean("after a restart with more space");
    append_until_acked(&kuma, &mut oracle, "entity-0", 200).await;
    oracle.judge(&kuma).await.assert_clean("after going on");
    kuma.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_cannot_be_made_for_want_of_space_is_made_later() {
    let Some(disk) = SmallDisk::mount(4 << 10) else { return };
    let mut refused = 0;
    for pages in (0..260).step_by(4) {
        disk.fill_but(pages);
        match Kuma::start(options(&disk.data())).await {
            Ok(kuma) => kuma.shutdown().await,
            Err(error) => {
                assert!(is_about_space(&error), "{pages} pages: {error:?}");
                refused += 1;
            }
        }
        disk.empty();
        let mut oracle = Oracle::default();
        let kuma = start(&disk.data()).await;
        append_until_acked(&kuma, &mut oracle, "a", 1).await;
        oracle.judge(&kuma).await.assert_clean(format!("{pages} pages"));
        kuma.shutdown().await;
        std::fs::remove_dir_all(disk.data()).unwrap();
    }
    println!("{refused} of 65 creations refused");
    assert!(refused > 5, "the disk was never full");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_cannot_be_opened_for_want_of_space_loses_nothing() {
    let Some(disk) = SmallDisk::mount(12 << 10) else { return };
    let mut oracle = Oracle::default();
    let kuma = start(&disk.data()).await;
    for number in 0..40 {
        let (entity, append) = (name(number as usize), TestAppend { id: number, events: 10, bytes: 3000 });
        let outcome = kuma.entity::<Probe>(&entity).append_all(append.events()).await;
        assert!(outcome.is_ok());
        oracle.told(&entity, append, &outcome);
    }
    let mut refused = 0;
    let crashed = disk.directory.path().join("crashed");
    for pages in (0..400).step_by(10) {
        // As a crash would leave it, with all in the logs; every other time on a file system that came back without the `-shm` files.
        copy(&disk.data(), &crashed);
        if pages % 20 == 0 {
            for file in std::fs::read_dir(&crashed).unwrap().map(|file| file.unwrap().path()) {
                if file.to_string_lossy().ends_with("-shm") {
                    std::fs::remove_file(file).unwrap();
                }
            }
        }
        disk.fill_but(pages);
        match Kuma::start(options(&crashed)).await {
            Ok(kuma) => kuma.shutdown().await,
            Err(error) => {
                assert!(is_about_space(&error), "{pages} pages: {error:?}");
                refused += 1;
            }
        }
        disk.empty();
        let kuma = start(&crashed).await;
        oracle.judge(&kuma).await.assert_clean(format!("opened with {pages} pages left"));
        kuma.shutdown().await;
        std::fs::remove_dir_all(&crashed).unwrap();
    }
    kuma.shutdown().await;
    println!("{refused} of 40 starts refused");
    assert!(refused > 0, "the disk was never full");
}

/// By another process: SQLite's locks are POSIX locks, which this one would lose by closing a file that it has copied.
fn copy(from: &Path, to: &Path) {
    assert!(Command::new("cp").arg("-r").arg(from).arg(to).status().unwrap().success());
}
