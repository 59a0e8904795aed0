//! Promise 2 and 3 under kill -9: what was acknowledged is there, whole and unaltered.
//!
//! A child process appends and says on a pipe what was acknowledged; it is killed at a random instant; this process opens the
//! store and compares. The child also says when group commits begin and end, so that it is known where the kill fell.

#![allow(clippy::unwrap_used, clippy::panic)] // the helpers of tests are tests too

use std::{
    collections::BTreeSet,
    io::{BufRead, BufReader},
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use integration_tests::{Oracle, TestAppend, seed, start};
use kuma_core::Version;
use rand::{RngExt, SeedableRng, rngs::StdRng};

const KILLS: u64 = 60;
/// A directory lives through this many kills, so that later ones hit a store that has grown.
const KILLS_PER_DIRECTORY: u64 = 10;

/// When the child is killed.
#[derive(Debug)]
enum Instant9 {
    /// Some time after it was started: while it opens the store, or under load.
    After(Duration),
    /// When it has acknowledged this many appends.
    Acks(usize),
    /// When it has begun this many commits, and then a little later.
    Commits(usize, Duration),
}

impl Instant9 {
    fn random(random: &mut StdRng) -> Self {
        match random.random_range(0..5) {
            0 => Instant9::After(Duration::from_millis(random.random_range(5..120))),
            1 | 2 => Instant9::Acks(random.random_range(1..300)),
            _ => {
                let later = Duration::from_micros(random.random_range(0..1500));
                Instant9::Commits(random.random_range(1..40), later)
            }
        }
    }
}

/// What a child said before it died.
#[derive(Debug, Default)]
struct Life {
    open: bool,
    commits: usize,
    acks: usize,
    /// Files with a commit that has begun and not ended.
    committing: BTreeSet<String>,
}

impl Life {
    fn hear(&mut self, line: &str, oracle: &mut Oracle) {
        let words: Vec<&str> = line.split(' ').collect();
        match *words {
            ["R"] => self.open = true,
            ["B", file] => {
                self.commits += 1;
                self.committing.insert(file.to_owned());
            }
            ["E", file] => assert!(self.committing.remove(file), "{file}: a commit ended that never began"),
            ["A", entity, id, events, bytes, version] => {
                let append = TestAppend {
                    id: id.parse().unwrap(),
                    events: events.parse().unwrap(),
                    bytes: bytes.parse().unwrap(),
                };
                self.acks += 1;
                oracle.acked(entity, append, Version(version.parse().unwrap()));
            }
            _ => panic!("the child said {line:?}"),
        }
    }
}

/// Runs a child on `directory` and kills it.
fn live_and_die(directory: &Path, number: u64, instant: &Instant9, oracle: &mut Oracle) -> Life {
    let mut child = Command::new(env!("CARGO_BIN_EXE_crash_child"))
        .arg(directory)
        .arg(number.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut life = Life::default();
    if let Instant9::After(time) = instant {
        // The pipe holds what it says meanwhile; a full pipe only makes it wait.
        std::thread::sleep(*time);
    } else {
        for line in &mut lines {
            life.hear(&line.unwrap(), oracle);
            match instant {
                Instant9::Acks(acks) if life.acks >= *acks => break,
                Instant9::Commits(commits, _) if life.commits >= *commits => break,
                _ => {}
            }
        }
        if let Instant9::Commits(_, later) = instant {
            let since = Instant::now();
            while since.elapsed() < *later {
                std::hint::spin_loop();
            }
        }
    }
    child.kill().unwrap(); // SIGKILL
    for line in lines {
        life.hear(&line.unwrap(), oracle);
    }
    let status = child.wait().unwrap();
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9), "it was to die of the kill: {status}");
    life
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_acknowledged_append_survives_kill_9() {
    let mut random = StdRng::seed_from_u64(seed("an_acknowledged_append_survives_kill_9"));
    let mut directory = tempfile::tempdir().unwrap();
    let mut oracle = Oracle::default();
    let (mut inside, mut before_open, mut acks, mut events) = (0, 0, 0, 0);
    let mut unlooked = 0;
    for kill in 0..KILLS {
        if kill.is_multiple_of(KILLS_PER_DIRECTORY) {
            acks += oracle.acks();
            (directory, oracle) = (tempfile::tempdir().unwrap(), Oracle::default());
        }
        let data = directory.path().join("data");
        let instant = Instant9::random(&mut random);
        let life = live_and_die(&data, kill, &instant, &mut oracle);
        inside += u64::from(!life.committing.is_empty());
        before_open += u64::from(!life.open);
        // Now and then the next child finds what the last one left, and is killed while it recovers.
        let last = (kill + 1).is_multiple_of(KILLS_PER_DIRECTORY);
        if !last && random.random_range(0..3) == 0 {
            unlooked += 1;
            continue;
        }
        let kuma = start(&data).await;
        let findings = oracle.judge(&kuma).await;
        findings.assert_clean(format!("kill {kill}, {instant:?}, {life:?}"));
        events = findings.events;
        kuma.shutdown().await;
    }
    acks += oracle.acks();
    println!(
        "{KILLS} kills, {inside} inside a commit, {before_open} before the store was open, {unlooked} followed by another one at \
         once; {acks} appends acknowledged, {events} events in the last store, 0 lost"
    );
    assert!(inside * 2 >= KILLS, "{inside} of {KILLS} kills fell inside a commit");
    assert!(acks as u64 > KILLS * 10, "there was no load");
}
