//! Promises 2 and 3 under power loss: what was acknowledged is there, whole and unaltered, although unsynced writes are lost and torn.
//!
//! The store runs on a VFS that loses power at a random write or sync: while it creates its files, opens them, makes entities,
//! commits, checkpoints. From that instant on nothing runs any more (the runtime is dropped), and the store is opened on the ordinary
//! VFS. The watermark files are written beside the VFS, and count as synced at once: they must never make a healthy store refuse.

#![allow(clippy::unwrap_used, clippy::panic)] // the helpers of tests are tests too

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use integration_tests::{Oracle, Probe, TestAppend, options, seed};
use kuma_core::{Durability, Kuma, Options};
use parking_lot::Mutex;
use power_loss::{Counts, Disk, PowerLoss};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::runtime::Runtime;

const ENTITIES: u64 = 12;
const WRITERS: u64 = 6;
/// A disk that is never cut would hang the test.
const LIFE_MAX: Duration = Duration::from_secs(60);

/// One life of a store: the disk it runs on, the load and when the power goes.
#[derive(Clone, Debug)]
struct Plan {
    disk: Disk,
    durability: Durability,
    /// The power goes at this write, sync or truncation.
    operations: u64,
    seed: u64,
    life: u64,
    event_bytes: u32,
    /// Wait until every caller was answered, instead of ending all at the cut.
    answered: bool,
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// Runs a store until the power is gone.
fn live(directory: &Path, plan: &Plan, oracle: &Arc<Mutex<Oracle>>) -> Counts {
    let power = PowerLoss::register(plan.disk);
    power.cut_after(plan.operations, plan.seed);
    let options = options(directory).vfs(power.vfs_name()).durability(plan.durability);
    let runtime = runtime();
    let kuma = runtime.block_on(run(options, plan, power.clone(), oracle.clone()));
    // Everything ends here, as it does when the power goes; without a runtime the store cannot even shut down.
    drop(runtime);
    drop(kuma);
    power.counts()
}

async fn run(options: Options, plan: &Plan, power: PowerLoss, oracle: Arc<Mutex<Oracle>>) -> Option<Kuma> {
    let kuma = match Kuma::start(options).await {
        Ok(kuma) => kuma,
        Err(error) => {
            assert!(power.is_cut(), "a healthy store did not start: {error:?}");
            return None;
        }
    };
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| tokio::spawn(write(kuma.clone(), plan.clone(), writer, power.clone(), oracle.clone())))
        .collect();
    let since = Instant::now();
    while !power.is_cut() {
        assert!(since.elapsed() < LIFE_MAX, "{plan:?}: the load never came to the cut: {:?}", power.counts());
        tokio::time::sleep(Duration::from_micros(200)).await;
    }
    if plan.answered {
        join_all(writers).await.into_iter().for_each(|writer| writer.unwrap());
    }
    Some(kuma)
}

/// Appends until the power is gone.
async fn write(kuma: Kuma, plan: Plan, writer: u64, power: PowerLoss, oracle: Arc<Mutex<Oracle>>) {
    let mut random = StdRng::seed_from_u64(plan.seed ^ writer << 32);
    for number in 0.. {
        let entity = match random.random_range(0..8) {
            0 => format!("life-{}-{writer}-{number}", plan.life),
            _ => format!("entity-{}", random.random_range(0..ENTITIES)),
        };
        let append = TestAppend {
            id: plan.life << 40 | writer << 32 | number,
            events: random.random_range(1..=8),
            bytes: random.random_range(0..=plan.event_bytes),
        };
        oracle.lock().touch(&entity);
        let outcome = kuma.entity::<Probe>(&entity).append_all(append.events()).await;
        oracle.lock().told(&entity, append, &outcome);
        if let Err(error) = outcome {
            assert!(power.is_cut(), "a healthy store refused: {error:?}");
            return;
        }
    }
}

/// What a cut left: on an honest disk nothing may be amiss.
enum Verdict {
    Clean { events: u64 },
    Lost(String),
    LostAndNoticed(String),
}

/// Opens the store on the ordinary VFS and compares.
fn judge(directory: &Path, durability: Durability, oracle: &Oracle) -> Verdict {
    runtime().block_on(async {
        let kuma = match Kuma::start(options(directory).durability(durability)).await {
            Ok(kuma) => kuma,
            Err(error) => return Verdict::LostAndNoticed(format!("{error}: {error:?}")),
        };
        let findings = oracle.judge(&kuma).await;
        kuma.shutdown().await;
        match findings {
            findings if findings.is_clean() => Verdict::Clean { events: findings.events },
            // With some of it noticed, all of it is: whoever restores the shard restores all.
            findings if !findings.unreadable.is_empty() => Verdict::LostAndNoticed(format!("{findings:#?}")),
            findings => Verdict::Lost(format!("{findings:#?}")),
        }
    })
}

#[derive(Debug, Default)]
struct Tally {
    cuts: u64,
    acks: u64,
    inside_commits: u64,
    inside_checkpoints: u64,
    lost_writes: u64,
    torn_writes: u64,
    lost: u64,
    lost_and_noticed: u64,
}

impl Tally {
    fn count(&mut self, counts: &Counts) {
        self.cuts += 1;
        self.inside_commits += u64::from(counts.cut_between_wal_write_and_sync);
        self.inside_checkpoints += u64::from(counts.cut_between_database_write_and_sync);
        self.lost_writes += counts.lost_writes;
        self.torn_writes += counts.torn_writes;
    }
}

#[test]
fn an_acknowledged_append_survives_power_loss() {
    let seed = seed("an_acknowledged_append_survives_power_loss");
    let mut random = StdRng::seed_from_u64(seed);
    let mut tally = Tally::default();
    let mut events_max = 0;
    for store in 0..35 {
        let directory = tempfile::tempdir().unwrap();
        let data = directory.path().join("data");
        let oracle = Arc::new(Mutex::new(Oracle::default()));
        for life in 0..3 {
            // Creation and opening; a few commits; many; or, with large events, checkpoints.
            let (operations, event_bytes) = match (store % 12, life) {
                (0 | 4 | 8, _) => (random.random_range(1..120), 100),
                (6, 1) => (random.random_range(9_000..24_000), 60_000),
                _ => (random.random_range(50..900), 300),
            };
            let plan = Plan {
                disk: Disk::Honest,
                durability: Durability::Full,
                operations,
                seed: random.random(),
                life,
                event_bytes,
                answered: random.random_range(0..8) == 0,
            };
            tally.count(&live(&data, &plan, &oracle));
            // Now and then the power goes a second time before anyone has looked.
            if life < 2 && random.random_range(0..4) == 0 {
                continue;
            }
            match judge(&data, plan.durability, &oracle.lock()) {
                Verdict::Clean { events } => events_max = events_max.max(events),
                Verdict::Lost(what) | Verdict::LostAndNoticed(what) => panic!("store {store}, {plan:?}: {what}"),
            }
        }
        tally.acks += oracle.lock().acks() as u64;
    }
    println!("{tally:?}, at most {events_max} events in a store");
    assert!(tally.cuts >= 100 && tally.acks > tally.cuts, "there was no load: {tally:?}");
    assert!(tally.inside_commits > 20 && tally.inside_checkpoints > 0, "the cuts hit nothing: {tally:?}");
    assert!(tally.lost_writes > 0 && tally.torn_writes > 0, "the cuts harmed nothing: {tally:?}");
}

/// The same load and the same judge where acknowledged appends can be lost: a test that finds nothing here finds nothing at all.
fn control(disk: Disk, durability: Durability, seed: u64) -> Tally {
    let mut random = StdRng::seed_from_u64(seed);
    let mut tally = Tally::default();
    for store in 0..20 {
        let directory = tempfile::tempdir().unwrap();
        let data = directory.path().join("data");
        let oracle = Arc::new(Mutex::new(Oracle::default()));
        let operations = random.random_range(150..900);
        let plan = Plan {
            disk,
            durability,
            operations,
            seed: random.random(),
            life: store,
            event_bytes: 300,
            answered: false,
        };
        // The store itself is made with care: what is lost is appends.
        runtime().block_on(async { Kuma::start(options(&data)).await.unwrap().shutdown().await });
        tally.count(&live(&data, &plan, &oracle));
        let oracle = oracle.lock();
        tally.acks += oracle.acks() as u64;
        match judge(&data, durability, &oracle) {
            Verdict::Clean { .. } => {}
            Verdict::Lost(_) => tally.lost += 1,
            Verdict::LostAndNoticed(_) => tally.lost_and_noticed += 1,
        }
    }
    tally
}

#[test]
fn control_normal_durability_loses_acknowledged_appends() {
    let tally = control(Disk::Honest, Durability::Normal, seed("control_normal"));
    println!("normal durability: {tally:?}");
    assert!(tally.lost + tally.lost_and_noticed > 0, "a power loss that costs nothing is none: {tally:?}");
}

#[test]
fn control_a_disk_that_lies_loses_acknowledged_appends() {
    let tally = control(Disk::LyingSync, Durability::Full, seed("control_lying_disk"));
    println!("lying disk: {tally:?}");
    assert!(tally.lost + tally.lost_and_noticed > 0, "a power loss that costs nothing is none: {tally:?}");
}
