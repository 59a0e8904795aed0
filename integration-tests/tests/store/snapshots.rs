//! Snapshots spare work and can do no harm: whatever becomes of one, its entity loads and its state is right.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use crate::inside;
use std::{
    path::Path,
    sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    time::Duration,
};

use crate::common::{OnDisk, assert_clean, crash_copy, directory, image, read_files, until, write_files};
use crate::inside::Inside;
use futures_util::{StreamExt, future::try_join_all, stream};
use integration_tests::{eventually, seed};
use kuma_core::{Entity, Handle, Kuma, Options, Version};
use kuma_shard::SnapshotRow;
use power_loss::{Disk, Errno, Fault, PowerLoss};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

const SOON: Duration = Duration::from_secs(10);

/// Makes a kind that counts how often an event of it is applied. Each test has one of its own, for they run side by side.
macro_rules! counted {
    ($module:ident, $kind:literal) => {
        // Not every test looks at everything.
        #[allow(dead_code)]
        mod $module {
            use super::*;

            pub(super) static APPLIED: AtomicU64 = AtomicU64::new(0);

            #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
            pub(super) struct Counted {
                pub(super) sum: u64,
                pub(super) order: u64,
            }

            #[derive(Debug, Serialize, Deserialize)]
            pub(super) enum CountedEvent {
                Added { number: u64, filler: String },
            }

            impl Entity for Counted {
                const KIND: &'static str = $kind;
                type Event = CountedEvent;

                fn apply(&mut self, CountedEvent::Added { number, .. }: &CountedEvent) {
                    APPLIED.fetch_add(1, SeqCst);
                    self.sum += number;
                    self.order = self.order.wrapping_mul(31).wrapping_add(*number);
                }
            }

            pub(super) fn added(number: u64) -> CountedEvent {
                CountedEvent::Added { number, filler: String::new() }
            }

            /// The state after events of 1 to `last`.
            pub(super) fn folded(last: u64) -> Counted {
                let mut state = Counted::default();
                (1..=last).for_each(|number| state.apply(&added(number)));
                state
            }

            /// How many events were applied to bring the entity into memory.
            pub(super) async fn replayed(handle: &Handle<Counted>) -> u64 {
                handle.raw().passivate().await.unwrap();
                APPLIED.store(0, SeqCst);
                handle.read().await.unwrap();
                APPLIED.load(SeqCst)
            }

            /// Appends single events of these numbers.
            pub(super) async fn append(handle: &Handle<Counted>, numbers: std::ops::RangeInclusive<u64>) {
                for number in numbers {
                    assert_eq!(handle.append(added(number)).await.unwrap(), Version(number));
                }
            }
        }
    };
}

fn options(path: &Path) -> Options {
    Options::new(path).shards(1).scrub_bytes_per_second(0)
}

async fn start(path: &Path, commits: u64) -> Kuma {
    Kuma::start(options(path).snapshot_every(commits, 1 << 30)).await.unwrap()
}

// ---- what they are for

counted!(after_commits, "after-commits");

#[tokio::test]
async fn after_enough_commits_an_activation_replays_only_the_rest() {
    use after_commits::{Counted, append, folded, replayed};
    let dir = directory();
    let kuma = start(dir.path(), 10).await;
    let counted = kuma.entity::<Counted>("c-1");
    append(&counted, 1..=9).await;
    assert_eq!(replayed(&counted).await, 9, "nine are not enough");
    append(&counted, 10..=25).await;
    until("there is a snapshot of most of it", async || replayed(&counted).await < 10).await;
    assert_eq!(*counted.read().await.unwrap(), folded(25));
    // What lies behind it goes on from there.
    append(&counted, 26..=27).await;
    assert!(replayed(&counted).await < 12);
    assert_eq!(*counted.read().await.unwrap(), folded(27));
    assert_eq!(counted.at_version(Version(7)).await.unwrap().into_arc().as_ref(), &folded(7), "what lies before it");
    assert_eq!(kuma.stats().snapshots_ignored, 0);
    assert_clean(&kuma).await;
    let hash = counted.raw().hash().unwrap();
    kuma.shutdown().await;
    assert!(inside::snapshot(dir.path(), hash).await.unwrap().version >= 18);

    // The next process.
    let kuma = start(dir.path(), 10).await;
    assert!(replayed(&kuma.entity("c-1")).await < 12);
    assert_eq!(*kuma.entity::<Counted>("c-1").read().await.unwrap(), folded(27));
}

counted!(after_bytes, "after-bytes");

#[tokio::test]
async fn after_enough_bytes_an_activation_replays_only_the_rest() {
    use after_bytes::{Counted, CountedEvent, replayed};
    let dir = directory();
    let kuma = Kuma::start(options(dir.path()).snapshot_every(1 << 30, 20_000)).await.unwrap();
    let counted = kuma.entity::<Counted>("c-1");
    for number in 1..=12 {
        counted.append(CountedEvent::Added { number, filler: "x".repeat(4000) }).await.unwrap();
    }
    until("there is a snapshot", async || replayed(&counted).await < 8).await;
    assert_eq!(counted.read().await.unwrap().sum, 78);
}

counted!(on_replay, "on-replay");

/// They are made when a replay was long as well, not only behind appends.
#[tokio::test]
async fn a_store_that_had_none_gets_its_snapshots_as_its_entities_are_used() {
    use on_replay::{Counted, append, folded, replayed};
    let dir = directory();
    let kuma = Kuma::start(options(dir.path()).no_snapshots()).await.unwrap();
    append(&kuma.entity("c-1"), 1..=30).await;
    assert_eq!(replayed(&kuma.entity("c-1")).await, 30);
    kuma.shutdown().await;
    let kuma = start(dir.path(), 10).await;
    let counted = kuma.entity::<Counted>("c-1");
    until("there is a snapshot", async || replayed(&counted).await == 0).await;
    assert_eq!(*counted.read().await.unwrap(), folded(30));
    let hash = counted.raw().hash().unwrap();
    kuma.shutdown().await;
    let before = inside::snapshot(dir.path(), hash).await.unwrap();
    assert_eq!(before.version, 30);
    // Turned off, they are neither used nor made nor touched.
    let kuma = Kuma::start(options(dir.path()).no_snapshots()).await.unwrap();
    let counted = kuma.entity::<Counted>("c-1");
    assert_eq!(replayed(&counted).await, 30);
    append(&counted, 31..=60).await;
    assert_eq!(replayed(&counted).await, 60);
    assert_eq!(*counted.read().await.unwrap(), folded(60));
    kuma.shutdown().await;
    assert_eq!(inside::snapshot(dir.path(), hash).await.unwrap(), before);
    // On again, the old one is as good as ever.
    let kuma = start(dir.path(), 1000).await;
    assert_eq!(replayed(&kuma.entity("c-1")).await, 30);
    assert_eq!(*kuma.entity::<Counted>("c-1").read().await.unwrap(), folded(60));
}

// ---- other code

/// Makes a type for the kind "shaped", with these fields and this version of what `apply` means.
macro_rules! shaped {
    ($name:ident, $schema:literal, $state_schema:literal, { $($field:ident: $type:ty),* }, |$state:ident, $number:ident| $apply:block) => {
        #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
        struct $name { $($field: $type),* }
        impl Entity for $name {
            const KIND: &'static str = "shaped";
            const SCHEMA: u32 = $schema;
            const STATE_SCHEMA: u32 = $state_schema;
            type Event = ShapedEvent;
            fn apply(&mut self, ShapedEvent::Added { number: $number }: &ShapedEvent) {
                SHAPED_APPLIED.fetch_add(1, SeqCst);
                let $state = self;
                $apply
            }
        }
    };
}

#[derive(Serialize, Deserialize)]
enum ShapedEvent {
    Added { number: u64 },
}

static SHAPED_APPLIED: AtomicU64 = AtomicU64::new(0);

shaped!(Original, 1, 1, { sum: u64 }, |state, number| { state.sum += number });
shaped!(MoreFields, 1, 1, { sum: u64, count: u64 }, |state, number| {
    state.sum += number;
    state.count += 1;
});
shaped!(Retyped, 1, 1, { sum: f64 }, |state, number| { state.sum += *number as f64 });
shaped!(OtherMeaning, 1, 2, { sum: u64 }, |state, number| { state.sum += 2 * number });
shaped!(NewEvents, 2, 2, { sum: u64 }, |state, number| { state.sum += 2 * number });
shaped!(FewerFields, 2, 2, {}, |_state, _number| {});

/// Opens the store with this type: the state is right at once, and soon there is a snapshot of its own shape.
async fn is_read_as<E: Entity + PartialEq + std::fmt::Debug>(path: &Path, expected: E, schemas: &mut Vec<u64>) {
    let kuma = start(path, 10).await;
    let handle = kuma.entity::<E>("s-1");
    SHAPED_APPLIED.store(0, SeqCst);
    let version = handle.read().await.unwrap();
    assert_eq!((version.version(), &*version), (Version(20), &expected));
    assert_eq!((SHAPED_APPLIED.load(SeqCst), kuma.stats().snapshots_ignored), (20, 1), "an older one was used");
    until("it is made anew", async || {
        handle.raw().passivate().await.unwrap();
        SHAPED_APPLIED.store(0, SeqCst);
        assert_eq!(*handle.read().await.unwrap(), expected);
        SHAPED_APPLIED.load(SeqCst) == 0
    })
    .await;
    let hash = handle.raw().hash().unwrap();
    kuma.shutdown().await;
    let schema = inside::snapshot(path, hash).await.unwrap().schema;
    assert!(!schemas.contains(&schema), "{schemas:?}");
    schemas.push(schema);
}

#[tokio::test]
async fn a_snapshot_of_other_code_is_ignored_and_made_anew() {
    let dir = directory();
    let kuma = start(dir.path(), 10).await;
    let handle = kuma.entity::<Original>("s-1");
    for number in 1..=20 {
        handle.append(ShapedEvent::Added { number }).await.unwrap();
    }
    until("there is a snapshot", async || {
        handle.raw().passivate().await.unwrap();
        SHAPED_APPLIED.store(0, SeqCst);
        handle.read().await.unwrap();
        SHAPED_APPLIED.load(SeqCst) <= 10
    })
    .await;
    kuma.shutdown().await;
    let mut schemas = Vec::new();
    is_read_as(dir.path(), MoreFields { sum: 210, count: 20 }, &mut schemas).await;
    is_read_as(dir.path(), Retyped { sum: 210.0 }, &mut schemas).await;
    is_read_as(dir.path(), OtherMeaning { sum: 420 }, &mut schemas).await;
    is_read_as(dir.path(), NewEvents { sum: 420 }, &mut schemas).await;
    is_read_as(dir.path(), FewerFields {}, &mut schemas).await;
    // And back to where it began.
    is_read_as(dir.path(), Original { sum: 210 }, &mut schemas).await;
}

// ---- damage

counted!(flipped, "flipped");

/// Every byte of it, in the file.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flipped_byte_of_a_snapshot_costs_a_replay_and_nothing_else() {
    use flipped::{Counted, append, folded};
    let dir = directory();
    let kuma = start(dir.path(), 4).await;
    let counted = kuma.entity::<Counted>("c-1");
    append(&counted, 1..=6).await;
    until("there is a snapshot", async || flipped::replayed(&counted).await < 6).await;
    let hash = counted.raw().hash().unwrap();
    kuma.shutdown().await;
    let snapshot = inside::snapshot(dir.path(), hash).await.unwrap();
    let files = read_files(dir.path());
    let at = files["shard-000.db"].windows(snapshot.body.len()).rposition(|bytes| bytes == snapshot.body).unwrap();
    let looks = stream::iter(0..snapshot.body.len()).map(|byte| {
        let mut files = files.clone();
        files.get_mut("shard-000.db").unwrap()[at + byte] ^= 1 << (byte % 8);
        async move {
            let dir = directory();
            write_files(dir.path(), &files);
            let kuma = start(dir.path(), 4).await;
            let counted = kuma.entity::<Counted>("c-1");
            assert_eq!(*counted.read().await.unwrap(), folded(6), "byte {byte}");
            assert_eq!(kuma.stats().snapshots_ignored, 1, "byte {byte} was not noticed");
            for version in [0, 3, 6] {
                assert_eq!(*counted.at_version(Version(version)).await.unwrap(), folded(version), "byte {byte}");
            }
            assert_eq!(counted.append(flipped::added(7)).await.unwrap(), Version(7));
            assert_eq!(kuma.stats().shards[0].quarantined, 0);
            until("it is made anew", async || {
                counted.raw().passivate().await.unwrap();
                let ignored = kuma.stats().snapshots_ignored;
                assert_eq!(*counted.read().await.unwrap(), folded(7), "byte {byte}");
                kuma.stats().snapshots_ignored == ignored
            })
            .await;
            kuma.shutdown().await;
        }
    });
    let done: Vec<()> = looks.buffer_unordered(3).collect().await;
    println!("{} bytes", done.len());
}

counted!(altered, "altered");

/// What the row says beside its body, and bodies that are not its own.
#[tokio::test]
async fn a_snapshot_that_is_not_what_its_row_says_is_ignored() {
    use altered::{Counted, append, folded};
    let dir = directory();
    let kuma = start(dir.path(), 4).await;
    let (one, other) = (kuma.entity::<Counted>("c-1"), kuma.entity::<Counted>("c-2"));
    for handle in [&one, &other] {
        append(handle, 1..=4).await;
        until("there is a snapshot", async || altered::replayed(handle).await == 0).await;
    }
    let (one, other) = (one.raw().hash().unwrap(), other.raw().hash().unwrap());
    kuma.shutdown().await;
    let inside = Inside::open(dir.path()).await;
    let (first, second) = (inside.snapshot(one).await.unwrap(), inside.snapshot(other).await.unwrap());
    assert_eq!((first.version, second.version, first.schema), (4, 4, second.schema));
    // An older one of the same entity, from a restored file say. It is true, and less.
    let kuma = {
        inside.close().await;
        let kuma = start(dir.path(), 4).await;
        append(&kuma.entity("c-1"), 5..=8).await;
        until("there is a newer one", async || altered::replayed(&kuma.entity("c-1")).await == 0).await;
        kuma
    };
    kuma.shutdown().await;
    let newer = inside::snapshot(dir.path(), one).await.unwrap();
    assert_eq!(newer.version, 8);
    let swapped = SnapshotRow { body: second.body.clone(), version: 4, ..newer.clone() };
    let cases = [
        ("the body of another entity", swapped, true),
        ("an older body under a newer version", SnapshotRow { body: first.body.clone(), ..newer.clone() }, true),
        ("a newer body under an older version", SnapshotRow { version: 4, ..newer.clone() }, true),
        ("another version", SnapshotRow { version: 7, ..newer.clone() }, true),
        ("another schema", SnapshotRow { schema: newer.schema ^ 1, ..newer.clone() }, true),
        ("no body", SnapshotRow { body: Vec::new(), ..newer.clone() }, true),
        ("a short body", SnapshotRow { body: newer.body[..9].to_vec(), ..newer.clone() }, true),
        ("an older one as it was", first.clone(), false),
        ("the newest one", newer.clone(), false),
    ];
    for (what, row, is_ignored) in cases {
        let inside = Inside::open(dir.path()).await;
        inside.put(row).await;
        inside.close().await;
        let kuma = start(dir.path(), 4).await;
        let counted = kuma.entity::<Counted>("c-1");
        altered::APPLIED.store(0, SeqCst);
        let now = counted.read().await.unwrap();
        let replayed = altered::APPLIED.load(SeqCst);
        assert_eq!(*now, folded(8), "{what}");
        assert_eq!((kuma.stats().snapshots_ignored, replayed == 8), (u64::from(is_ignored), is_ignored), "{what}");
        for version in 0..=8 {
            assert_eq!(*counted.at_version(Version(version)).await.unwrap(), folded(version), "{what}: {version}");
        }
        assert_clean(&kuma).await;
        kuma.shutdown().await;
    }
    // Both swapped.
    let inside = Inside::open(dir.path()).await;
    inside.put(SnapshotRow { eid: second.eid, ..first.clone() }).await;
    inside.put(SnapshotRow { eid: first.eid, ..second.clone() }).await;
    inside.close().await;
    let kuma = start(dir.path(), 4).await;
    assert_eq!(*kuma.entity::<Counted>("c-1").read().await.unwrap(), folded(8));
    assert_eq!(*kuma.entity::<Counted>("c-2").read().await.unwrap(), folded(4));
    assert_eq!(kuma.stats().snapshots_ignored, 2);
    kuma.shutdown().await;
}

counted!(ahead, "ahead");

/// The log was restored from an older backup than the snapshots: it does not hold what the snapshot ends with.
#[tokio::test]
async fn a_snapshot_of_a_commit_that_the_log_does_not_hold_is_ignored() {
    use ahead::{Counted, append, folded};
    let dir = directory();
    let kuma = start(dir.path(), 1 << 20).await;
    append(&kuma.entity("c-1"), 1..=5).await;
    let hash = kuma.entity::<Counted>("c-1").raw().hash().unwrap();
    kuma.shutdown().await;
    let backup = read_files(dir.path());
    let kuma = start(dir.path(), 4).await;
    append(&kuma.entity("c-1"), 6..=9).await;
    until("there is a snapshot of all of it", async || ahead::replayed(&kuma.entity("c-1")).await == 0).await;
    kuma.shutdown().await;
    let newer = inside::snapshot(dir.path(), hash).await.unwrap();
    assert_eq!(newer.version, 9);
    write_files(dir.path(), &backup);
    // The shard itself refuses to write such a one; only a file that was put together by hand has it.
    let inside = Inside::open(dir.path()).await;
    let eid = inside.entity(hash).await.unwrap().eid;
    assert_eq!(eid, newer.eid);
    // Under a version that the log has, the seal does not fit.
    inside.put(SnapshotRow { version: 5, ..newer }).await;
    inside.close().await;
    let kuma = start(dir.path(), 1 << 20).await;
    assert_eq!(*kuma.entity::<Counted>("c-1").read().await.unwrap(), folded(5));
    assert_eq!(kuma.stats().snapshots_ignored, 1);
    append(&kuma.entity("c-1"), 6..=9).await;
    assert_eq!(*kuma.entity::<Counted>("c-1").read().await.unwrap(), folded(9));
}

// ---- states that cannot be saved

static SAVE_PANICS: AtomicBool = AtomicBool::new(false);
static SAVE_FAILS: AtomicBool = AtomicBool::new(false);
static RESTORE_PANICS: AtomicBool = AtomicBool::new(false);
static RESTORE_FAILS: AtomicBool = AtomicBool::new(false);
static STUBBORN_APPLIED: AtomicU64 = AtomicU64::new(0);

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Stubborn {
    #[serde(serialize_with = "save", deserialize_with = "restore")]
    sum: u64,
}

fn save<S: Serializer>(sum: &u64, to: S) -> Result<S::Ok, S::Error> {
    assert!(!SAVE_PANICS.load(SeqCst), "saving panics, as told");
    match SAVE_FAILS.load(SeqCst) {
        true => Err(serde::ser::Error::custom("saving fails, as told")),
        false => sum.serialize(to),
    }
}

fn restore<'a, D: Deserializer<'a>>(from: D) -> Result<u64, D::Error> {
    assert!(!RESTORE_PANICS.load(SeqCst), "restoring panics, as told");
    match RESTORE_FAILS.load(SeqCst) {
        true => Err(serde::de::Error::custom("restoring fails, as told")),
        false => u64::deserialize(from),
    }
}

#[derive(Serialize, Deserialize)]
enum StubbornEvent {
    Added(u64),
}

impl Entity for Stubborn {
    const KIND: &'static str = "stubborn";
    type Event = StubbornEvent;

    fn apply(&mut self, StubbornEvent::Added(number): &StubbornEvent) {
        STUBBORN_APPLIED.fetch_add(1, SeqCst);
        self.sum += number;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_state_that_cannot_be_saved_or_restored_has_no_snapshot_and_works() {
    let dir = directory();
    let kuma = start(dir.path(), 3).await;
    let replayed = async |handle: &Handle<Stubborn>| {
        handle.raw().passivate().await.unwrap();
        STUBBORN_APPLIED.store(0, SeqCst);
        handle.read().await.unwrap();
        STUBBORN_APPLIED.load(SeqCst)
    };
    // What its shape is was told before anything went wrong.
    let whole = kuma.entity::<Stubborn>("whole");
    for number in 1..=3 {
        whole.append(StubbornEvent::Added(number)).await.unwrap();
    }
    until("there is a snapshot", async || replayed(&whole).await == 0).await;
    for (name, switch) in [
        ("save panics", &SAVE_PANICS),
        ("save fails", &SAVE_FAILS),
        ("restore panics", &RESTORE_PANICS),
        ("restore fails", &RESTORE_FAILS),
    ] {
        switch.store(true, SeqCst);
        let stubborn = kuma.entity::<Stubborn>(name);
        let skipped = kuma.stats().snapshots_skipped;
        for number in 1..=9 {
            assert_eq!(stubborn.append(StubbornEvent::Added(number)).await.unwrap(), Version(number));
        }
        until("it was tried", async || {
            stubborn.append(StubbornEvent::Added(0)).await.unwrap();
            kuma.stats().snapshots_skipped > skipped
        })
        .await;
        let version = stubborn.read().await.unwrap().version().0;
        assert_eq!(replayed(&stubborn).await, version, "{name}: there is a snapshot");
        assert_eq!(stubborn.read().await.unwrap().sum, 45, "{name}");
        // A snapshot that was good once does no harm now.
        let expected = if name.starts_with("restore") { 3 } else { 0 };
        assert_eq!((replayed(&whole).await, whole.read().await.unwrap().sum), (expected, 6), "{name}");
        switch.store(false, SeqCst);
        until("its snapshot is used, or made", async || replayed(&stubborn).await == 0).await;
        assert_eq!(stubborn.read().await.unwrap().sum, 45, "{name}");
    }
    assert_eq!(kuma.stats().shards[0].quarantined, 0);
    assert_clean(&kuma).await;
}

// ---- crashes and faults

counted!(crashed, "crashed");

/// Appends with the n-th write or sync failing, or the power going; every second commit asks for a snapshot.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whenever_the_power_goes_what_a_snapshot_says_the_log_says() {
    use crashed::{Counted, added, folded};
    let template = directory();
    let kuma = start(template.path(), 2).await;
    crashed::append(&kuma.entity("c-1"), 1..=3).await;
    let files = image(template.path());
    kuma.shutdown().await;
    let one = |n: u64| {
        let files = files.clone();
        async move {
            let dir = directory();
            write_files(dir.path(), &files);
            let power = PowerLoss::register(Disk::Honest);
            let options = options(dir.path()).snapshot_every(2, 1 << 30).vfs(power.vfs_name());
            let kuma = Kuma::start(options).await.unwrap();
            match n % 3 {
                0 => power.fail_nth(Fault::Sync, 1 + n / 3, Errno::Io),
                1 => power.fail_nth(Fault::Write, 1 + n / 2, Errno::Full),
                _ => power.cut_after(1 + n, n),
            }
            let counted = kuma.entity::<Counted>("c-1");
            let (mut next, mut told) = (4, 3);
            for _ in 0..12 {
                match counted.append(added(next)).await {
                    Ok(version) => {
                        assert_eq!(version, Version(next));
                        (told, next) = (next, next + 1);
                    }
                    Err(_) if power.is_cut() => break,
                    Err(error) => assert!(error.is_retry_safe(), "{n}: {error:?}"),
                }
            }
            power.cut(n);
            kuma.shutdown().await;
            let kuma = start(dir.path(), 2).await;
            let counted = kuma.entity::<Counted>("c-1");
            let now = counted.read().await.unwrap();
            let events = counted.raw().events(.., usize::MAX).await.unwrap();
            let version = events.len() as u64;
            assert!(version >= told, "{n}: {version} events, told of {told}");
            assert_eq!((now.version().0, &*now), (version, &folded(version)), "{n}");
            assert_eq!(kuma.stats().snapshots_ignored, 0, "{n}: a snapshot and the log differ");
            for then in 0..=version {
                assert_eq!(*counted.at_version(Version(then)).await.unwrap(), folded(then), "{n}");
            }
            assert_clean(&kuma).await;
            kuma.shutdown().await;
            inside::snapshot(dir.path(), counted.raw().hash().unwrap()).await.map_or(0, |row| row.version)
        }
    };
    let versions: Vec<u64> = stream::iter(0..45).map(one).buffer_unordered(4).collect().await;
    println!("snapshots of versions {versions:?}");
    assert!(versions.iter().any(|version| *version > 4));
}

counted!(copied, "copied");

/// A process that dies while snapshots are being made, as its files are at that moment.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_of_the_files_at_any_moment_has_whole_snapshots_or_none() {
    use copied::{Counted, CountedEvent};
    let dir = directory();
    let kuma = start(dir.path(), 2).await;
    let writer = tokio::spawn({
        let kuma = kuma.clone();
        async move {
            let mut appends = 0;
            for number in 1..=600 {
                let counted = kuma.entity::<Counted>(format!("c-{}", number % 3));
                counted.append(CountedEvent::Added { number, filler: "x".repeat(50) }).await.unwrap();
                appends += 1;
            }
            appends
        }
    });
    let (mut copies, mut from_snapshot) = (0, 0);
    while !writer.is_finished() && copies < 12 {
        let copy = crash_copy(dir.path());
        let kuma = Kuma::start(options(copy.path()).snapshot_every(2, 1 << 30)).await.unwrap();
        for id in ["c-0", "c-1", "c-2"] {
            let counted = kuma.entity::<Counted>(id);
            let now = counted.read().await.unwrap();
            let mut state = Counted::default();
            for event in counted.raw().events(.., usize::MAX).await.unwrap() {
                state.apply(&event.decode::<Counted>().unwrap());
            }
            assert_eq!(*now, state);
        }
        assert_eq!(kuma.stats().snapshots_ignored, 0);
        assert_clean(&kuma).await;
        kuma.shutdown().await;
        let inside = Inside::open(copy.path()).await;
        for id in ["c-0", "c-1", "c-2"] {
            from_snapshot +=
                u64::from(inside.snapshot(kuma.entity::<Counted>(id).raw().hash().unwrap()).await.is_some());
        }
        inside.close().await;
        copies += 1;
    }
    assert_eq!(writer.await.unwrap(), 600);
    println!("{copies} copies with {from_snapshot} snapshots");
    assert!(copies > 0);
    kuma.shutdown().await;
}

counted!(speculative, "speculative");

/// Commits that are in flight are not in a snapshot: they may never come true.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_snapshot_never_holds_what_was_not_durable() {
    use speculative::{Counted, added};
    let seed = seed("speculative snapshots");
    let mut random = StdRng::seed_from_u64(seed);
    let on = OnDisk::new().await;
    on.kuma.shutdown().await;
    let open = async || {
        let options = options(on.dir.path()).snapshot_every(1, 1).vfs(on.disk.vfs_name());
        Kuma::start(options).await.unwrap()
    };
    let mut kuma = open().await;
    kuma.entity::<Counted>("c-1").append(added(1)).await.unwrap();
    on.fail_in_log_only();
    on.disk.sync_takes(Duration::from_millis(1));
    for round in 0..25 {
        let counted = kuma.entity::<Counted>("c-1");
        on.disk.fail_nth(Fault::Sync, random.random_range(1..4), Errno::Io);
        let mut pending = Vec::new();
        for number in 0..8 {
            pending.extend(counted.append(added(1000 * round + number)).submit().await);
        }
        let told = futures_util::future::join_all(pending).await;
        let told = told.iter().flatten().map(|version| version.0).max().unwrap_or(0);
        if round % 5 == 4 {
            on.disk.heal();
            kuma.shutdown().await;
            kuma = open().await;
        }
        let counted = kuma.entity::<Counted>("c-1");
        let events =
            eventually("the history is read", SOON, async || counted.raw().events(.., usize::MAX).await.ok()).await;
        let now = eventually("the state is read", SOON, async || counted.read().await.ok()).await;
        let mut state = Counted::default();
        events.iter().for_each(|event| state.apply(&event.decode::<Counted>().unwrap()));
        assert_eq!((now.version().0, &*now), (events.len() as u64, &state), "KUMA_SEED={seed} round {round}");
        assert!(events.len() as u64 >= told);
        assert_eq!(kuma.stats().snapshots_ignored, 0, "KUMA_SEED={seed} round {round}");
    }
    on.disk.heal();
    kuma.shutdown().await;
}

// ---- large states

static LARGE_APPLIED: AtomicU64 = AtomicU64::new(0);

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Large {
    content: String,
    count: u64,
}

#[derive(Serialize, Deserialize)]
enum LargeEvent {
    Grown { bytes: usize },
    Counted,
}

impl Entity for Large {
    const KIND: &'static str = "large";
    type Event = LargeEvent;

    fn apply(&mut self, event: &LargeEvent) {
        LARGE_APPLIED.fetch_add(1, SeqCst);
        match event {
            LargeEvent::Grown { bytes } => self.content = "x".repeat(*bytes),
            LargeEvent::Counted => self.count += 1,
        }
    }
}

/// What is written stays within what was appended: 5 MB are not written again for every few commits.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_state_is_saved_seldom() {
    let dir = directory();
    let kuma = start(dir.path(), 4).await;
    let large = kuma.entity::<Large>("l-1");
    let replayed = async || {
        large.raw().passivate().await.unwrap();
        LARGE_APPLIED.store(0, SeqCst);
        large.read().await.unwrap();
        LARGE_APPLIED.load(SeqCst)
    };
    large.append(LargeEvent::Grown { bytes: 5_000_000 }).await.unwrap();
    for _ in 0..3 {
        large.append(LargeEvent::Counted).await.unwrap();
    }
    until("there is a snapshot", async || replayed().await == 0).await;
    let mut pending = Vec::new();
    for _ in 0..600 {
        pending.push(large.append(LargeEvent::Counted).submit().await.unwrap());
    }
    try_join_all(pending).await.unwrap();
    assert_eq!(replayed().await, 600);
    let now = large.read().await.unwrap();
    assert_eq!((now.content.len(), now.count), (5_000_000, 603));
    assert_eq!(kuma.stats().snapshots_skipped, 0);
    let hash = large.raw().hash().unwrap();
    kuma.shutdown().await;
    assert_eq!(inside::snapshot(dir.path(), hash).await.unwrap().version, 4);
}
