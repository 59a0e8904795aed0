//! Every bad input gets a typed error with a sentence that says what to do, and leaves the store as it was.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use crate::common;
use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use crate::common::{Files, Ledger, assert_clean, directory, entered, read_files, sentence, write_files};
use insta::assert_snapshot;
use kuma_core::{
    AppendError, DataDirError, Entity, Kuma, MasterKeyError, MasterKeySource, NewEvent, OpenError, Options,
    RecordedEvent, Refused, StartError, Version,
};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tempfile::TempDir;

/// A store with three events of one ledger in it, closed.
struct Fixture {
    dir: TempDir,
    files: Files,
    events: Vec<RecordedEvent>,
}

fn options(path: &Path) -> Options {
    Options::new(path).shards(2).context("payments")
}

impl Fixture {
    async fn new() -> Fixture {
        let dir = directory();
        let kuma = Kuma::start(options(dir.path())).await.unwrap();
        kuma.entity::<Ledger>("l-1").append_all([1, 2, 3].map(entered)).await.unwrap();
        let events = common::history(&kuma, "ledger", "l-1").await;
        kuma.shutdown().await;
        drop(kuma);
        let files = files(dir.path());
        Fixture { dir, files, events }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    async fn start(&self) -> Kuma {
        let kuma = Kuma::start(options(self.path())).await.unwrap();
        // Before a handle without the type takes the kind for documents.
        kuma.register::<Ledger>().unwrap();
        kuma
    }

    /// Sees that the start is refused without changing a byte, and returns the words.
    async fn refused(&self, options: Options) -> (StartError, String) {
        let before = files(self.path());
        let error = Kuma::start(options).await.map(|_| ()).unwrap_err();
        assert_eq!(names(&before), names(&files(self.path())), "{error}");
        assert!(before == files(self.path()), "{error}");
        let words = sentence(&error, self.path());
        (error, words)
    }

    /// Sees that nothing was lost and nothing half-written.
    async fn unharmed(&self) {
        let kuma = self.start().await;
        unharmed(&kuma, &self.events).await;
        kuma.shutdown().await;
    }

    fn restore(&self) {
        write_files(self.path(), &self.files);
        fs::set_permissions(self.path().join("master.key"), fs::Permissions::from_mode(0o600)).unwrap();
    }
}

async fn unharmed(kuma: &Kuma, events: &[RecordedEvent]) {
    assert_eq!(common::history(kuma, "ledger", "l-1").await, events);
    let ledger = kuma.entity::<Ledger>("l-1").read().await.unwrap();
    assert_eq!((ledger.version(), ledger.entries.as_slice()), (Version(3), &[1, 2, 3][..]));
    assert_clean(kuma).await;
    assert_eq!(kuma.verify(|_| {}).await.unwrap().totals(), (1, 1, 3), "entities, commits, events");
}

/// All but the lock, which names its holder, and what SQLite keeps in memory.
fn files(path: &Path) -> Files {
    let mut files = read_files(path);
    files.retain(|name, bytes| {
        name != "kuma.lock" && !name.ends_with("-shm") && !(name.ends_with("-wal") && bytes.is_empty())
    });
    files
}

fn names(files: &Files) -> Vec<&String> {
    files.keys().collect()
}

fn refusal(result: Result<Version, AppendError>, path: &Path) -> String {
    let error = result.unwrap_err();
    assert!(matches!(error, AppendError::Refused(_)), "{error:?}");
    assert!(!error.is_retry_safe());
    sentence(&error, path)
}

fn text(bytes: usize) -> NewEvent {
    NewEvent::json("Written", &json!({ "text": "x".repeat(bytes) })).unwrap()
}

#[tokio::test]
async fn an_append_that_cannot_be_granted_says_why_and_writes_nothing() {
    let fixture = Fixture::new().await;
    let path = fixture.path();
    let kuma = fixture.start().await;
    let ledger = kuma.entity::<Ledger>("l-1");
    let raw = kuma.raw("note", "n-1");

    let wrong = ledger.append(entered(4)).expecting(Version(7)).await;
    assert!(matches!(
        wrong,
        Err(AppendError::Refused(Refused::WrongVersion { expected: Version(7), actual: Version(3), .. }))
    ));
    assert_snapshot!(refusal(wrong, path), @"entity [hex] is at version 3, expected 7; nothing was written, read it again and decide anew");
    assert_snapshot!(refusal(ledger.append(entered(4)).expecting(Version(0)).await, path), @"entity [hex] is at version 3, expected 0; nothing was written, read it again and decide anew");
    assert_snapshot!(refusal(ledger.append_all([]).await, path), @"an append needs at least one event");
    assert_snapshot!(refusal(raw.append_all([]).await, path), @"an append needs at least one event");
    assert_snapshot!(refusal(raw.append(text(1 << 20)).await, path), @"event 0 of the append has 1048596 bytes, the limit is 1048576; split it, or keep large content elsewhere and append its name");
    assert_snapshot!(refusal(raw.append_all(vec![text(900_000); 5]).await, path), @"the append has at least 4500100 bytes, the limit is 4194304; split it");
    assert_snapshot!(refusal(raw.append_all(vec![text(1); 4097]).await, path), @"the append has more than 4096 events; split it");
    assert_snapshot!(refusal(ledger.append_all((0..4097).map(entered)).await, path), @"the append has more than 4096 events; split it");
    unharmed(&kuma, &fixture.events).await;
    kuma.shutdown().await;
    drop((kuma, ledger, raw));
    fixture.unharmed().await;
}

/// The limits themselves are granted.
#[tokio::test]
async fn an_append_at_the_limits_is_granted() {
    let dir = directory();
    let kuma = common::start(dir.path(), 1).await;
    let raw = kuma.raw("note", "n".repeat(512));
    assert_eq!(raw.append(text((1 << 20) - 20)).await.unwrap(), Version(1));
    assert_eq!(raw.append_all(vec![text((1 << 20) - 20); 4]).await.unwrap(), Version(5));
    assert_eq!(raw.append_all(vec![text(1); 4096]).await.unwrap(), Version(4101));
    assert_eq!(raw.events(.., usize::MAX).await.unwrap().len(), 4101);
    assert_clean(&kuma).await;
}

#[tokio::test]
async fn an_id_or_kind_that_cannot_be_is_refused_at_first_use_and_never_stored() {
    let fixture = Fixture::new().await;
    let path = fixture.path();
    let kuma = fixture.start().await;
    assert_snapshot!(refusal(kuma.entity::<Ledger>("").append(entered(1)).await, path), @"the entity id is refused: it is empty; an id is 1 to 512 bytes of UTF-8");
    assert_snapshot!(refusal(kuma.entity::<Ledger>("x".repeat(513)).append(entered(1)).await, path), @"the entity id is refused: it is over 512 bytes; an id is 1 to 512 bytes of UTF-8");
    assert_snapshot!(refusal(kuma.entity::<Ledger>([b'x', 0xff]).append(entered(1)).await, path), @"the entity id is refused: it is not UTF-8; an id is 1 to 512 bytes of UTF-8");
    for kind in ["", "1a", "a b", "naïve", "a/b", "a\0", "_a", &"k".repeat(65)] {
        let handle = kuma.raw(kind, "x");
        let refused = handle.append(text(1)).await;
        assert!(matches!(refused, Err(AppendError::Refused(Refused::InvalidKind { .. }))), "{kind:?}: {refused:?}");
        assert!(
            handle.read().await.is_err() && handle.events(.., 1).await.is_err() && handle.passivate().await.is_err()
        );
    }
    assert_snapshot!(refusal(kuma.raw("a b", "x").append(text(1)).await, path), @"the kind (3 bytes) is refused; a kind is 1 to 64 ASCII letters, digits, '_', '-' or '.', starting with a letter");
    unharmed(&kuma, &fixture.events).await;
    kuma.shutdown().await;
    drop(kuma);
    fixture.unharmed().await;
}

/// The same kind as the ledger, with another type.
#[derive(Clone, Default, Serialize, Deserialize)]
struct Impostor;

#[derive(Serialize, Deserialize)]
enum ImpostorEvent {
    Forged,
}

impl Entity for Impostor {
    const KIND: &'static str = "ledger";
    type Event = ImpostorEvent;
    fn apply(&mut self, _: &ImpostorEvent) {}
}

/// A kind whose events have no names.
#[derive(Clone, Default, Serialize, Deserialize)]
struct Nameless;

impl Entity for Nameless {
    const KIND: &'static str = "nameless";
    type Event = u64;
    fn apply(&mut self, _: &u64) {}
}

#[tokio::test]
async fn what_could_not_be_read_back_is_not_written() {
    let fixture = Fixture::new().await;
    let path = fixture.path();
    let kuma = fixture.start().await;
    let ledger = kuma.raw("ledger", "l-1");
    let json = |name: &str, data| NewEvent::json(name, &data).unwrap();
    assert_snapshot!(refusal(ledger.append(json("Entered", json!({ "number": "four", "note": "" }))).await, path), @"an event of Entered cannot be stored: wrong msgpack marker FixStr(4)");
    assert_snapshot!(refusal(ledger.append(json("Entered", json!({ "number": 4 }))).await, path), @"an event of Entered cannot be stored: missing field `note`");
    assert_snapshot!(refusal(ledger.append(json("Vanished", json!({}))).await, path), @"an event of Vanished cannot be stored: unknown variant `Vanished`, expected `Entered`");
    assert_snapshot!(refusal(ledger.append(json("", json!({}))).await, path), @"an event of  cannot be stored: an event name has 1 to 128 bytes");
    assert_snapshot!(refusal(ledger.append(json(&"n".repeat(129), json!({}))).await, path).replace(&"n".repeat(129), "n..."), @"an event of n... cannot be stored: an event name has 1 to 128 bytes");
    let note = kuma.raw("note", "n-1");
    let bad: [&[u8]; 5] = [&[], &[0xc1], &[0x92, 1], &[1, 2], &[0xda, 0xff, 0xff, b'x']];
    for data in bad {
        let refused = refusal(note.append(NewEvent::message_pack("Odd", data.to_vec())).await, path);
        assert_eq!(refused, "an event of Odd cannot be stored: its data is not one MessagePack value", "{data:?}");
    }
    // Nested deeper than any stack.
    let deep = NewEvent::message_pack("Deep", [vec![0x91; 1_000_000], vec![1]].concat());
    assert_snapshot!(refusal(note.append(deep).await, path), @"an event of Deep cannot be stored: its data is nested more than 128 deep");
    assert_snapshot!(refusal(kuma.entity::<Nameless>("x").append(7).await, path), @"an event of nameless cannot be stored: events must be an externally tagged enum");
    assert_snapshot!(refusal(kuma.entity::<Impostor>("l-1").append(ImpostorEvent::Forged).await, path), @"the kind ledger is in use in this process with another type, or as a document without one; use one type for it, and make it known with `Kuma::register` before `Kuma::raw` or an import asks for the kind");
    unharmed(&kuma, &fixture.events).await;
    kuma.shutdown().await;
    drop((kuma, ledger, note));
    fixture.unharmed().await;
}

#[tokio::test]
async fn a_master_key_that_is_missing_wrong_or_open_to_others_is_refused() {
    let fixture = Fixture::new().await;
    let path = fixture.path();
    let key_path = path.join("master.key");

    fs::rename(&key_path, path.join("elsewhere.key")).unwrap();
    let (error, words) = fixture.refused(options(path)).await;
    assert!(matches!(error, StartError::MasterKey(MasterKeyError::FileMissing { .. })), "{error:?}");
    assert_snapshot!(words, @"no master key, without which nothing in the store can be read: master key file [dir]/master.key is missing; put the key back, a new one cannot open this store");
    fs::rename(path.join("elsewhere.key"), &key_path).unwrap();

    fs::set_permissions(&key_path, fs::Permissions::from_mode(0o640)).unwrap();
    let (error, words) = fixture.refused(options(path)).await;
    assert!(matches!(error, StartError::MasterKey(MasterKeyError::PermissionsTooOpen { .. })), "{error:?}");
    assert_snapshot!(words, @"no master key, without which nothing in the store can be read: master key file [dir]/master.key is open to group or others (mode 0640); run: chmod 600 [dir]/master.key");
    fs::set_permissions(&key_path, fs::Permissions::from_mode(0o600)).unwrap();

    let other = directory();
    let other_key = other.path().join("other.key");
    kuma_core::LocalMasterKey::create_file(&other_key).unwrap();
    let (error, words) = fixture.refused(options(path).master_key(MasterKeySource::File(other_key))).await;
    assert!(matches!(error, StartError::WrongMasterKey(MasterKeyError::UnknownKek { .. })), "{error:?}");
    assert_snapshot!(words, @"the master key does not open this store; use the one it was created with, nothing was changed: wrapped by master key [hex], at hand: [hex]; this is the wrong master key, or an older one is missing");

    fs::write(&key_path, "not a key\n").unwrap();
    let (_, words) = fixture.refused(options(path)).await;
    assert_snapshot!(words, @"no master key, without which nothing in the store can be read: line 1 of [dir]/master.key is not a master key; a key is 64 hex digits, a comment starts with #");

    let (_, words) =
        fixture.refused(options(path).master_key(MasterKeySource::Env("KUMA_NO_SUCH_VARIABLE".into()))).await;
    assert_snapshot!(words, @"no master key, without which nothing in the store can be read: environment variable KUMA_NO_SUCH_VARIABLE is not set; put the master key in it");

    fixture.restore();
    fixture.unharmed().await;
}

const CHILD: &str = "KUMA_CHILD_DIRECTORY";

/// Not a promise: what another process does in the test below.
#[tokio::test]
async fn as_the_second_process() {
    let Some(path) = std::env::var_os(CHILD).map(PathBuf::from) else { return };
    match Kuma::start(options(&path)).await {
        Ok(_) => println!("answer: it opened"),
        Err(error) => println!("answer: {error}"),
    }
}

#[tokio::test]
async fn a_second_user_of_the_directory_is_told_who_has_it() {
    let fixture = Fixture::new().await;
    let path = fixture.path();
    let kuma = fixture.start().await;
    let error = Kuma::start(options(path)).await.map(|_| ()).unwrap_err();
    assert!(matches!(error, StartError::DataDir(DataDirError::InUse { .. })), "{error:?}");
    assert_snapshot!(sentence(&error, path), @"[dir] is in use by this very process, or by a store of it that was dropped and is still closing; call `shutdown` on that one first, or choose another data directory");

    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "bad_input::as_the_second_process", "--nocapture"])
        .env(CHILD, path)
        .output()
        .unwrap();
    let said = String::from_utf8(child.stdout).unwrap();
    let answer = said.lines().find_map(|line| line.split_once("answer: ")).unwrap().1;
    let (path, pid) = (path.display(), std::process::id());
    assert_eq!(
        answer,
        format!(
            "{path} is in use by another process (process {pid}); stop that one first, or choose another data directory"
        )
    );

    // The first one did not notice.
    unharmed(&kuma, &fixture.events).await;
    kuma.shutdown().await;
    drop(kuma);
    fixture.unharmed().await;
}

/// A process that is being started has a copy of every open file for a moment, that of the lock included.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_that_is_refused_lets_go_of_the_directory_also_while_processes_are_started() {
    let fixture = Fixture::new().await;
    let path = fixture.path();
    let done = Arc::new(AtomicBool::new(false));
    let starter = std::thread::spawn({
        let done = done.clone();
        move || {
            while !done.load(Relaxed) {
                assert!(Command::new("true").status().unwrap().success());
            }
        }
    });
    let mut refused = Vec::new();
    for _ in 0..25 {
        assert!(Kuma::start(options(path).context("orders")).await.is_err());
        match Kuma::start(options(path)).await {
            Ok(kuma) => kuma.shutdown().await,
            Err(error) => refused.push(error.to_string()),
        }
    }
    done.store(true, Relaxed);
    starter.join().unwrap();
    assert!(refused.is_empty(), "{refused:?}");
}

fn replace(path: &Path, from: &str, to: &str) {
    let text = fs::read_to_string(path).unwrap();
    assert!(text.contains(from), "{text}");
    fs::write(path, text.replace(from, to)).unwrap();
}

#[tokio::test]
async fn a_directory_of_a_newer_version_is_refused_and_left_alone() {
    let fixture = Fixture::new().await;
    let path = fixture.path();
    replace(&path.join("store.json"), "\"format\": 1", "\"format\": 2");
    let (error, words) = fixture.refused(options(path)).await;
    assert!(matches!(error, StartError::DataDir(DataDirError::Newer { found: 2, supported: 1, .. })), "{error:?}");
    assert_snapshot!(words, @"[dir] has format 2, this version of Kuma reads up to 1; use the newer version, nothing was changed");
    fixture.restore();

    for name in ["shard-001.db", "keys.db", "node.db"] {
        let mut bytes = fs::read(path.join(name)).unwrap();
        assert_eq!(bytes[60..64], [0, 0, 0, 4], "the user version of SQLite's header");
        bytes[63] = 5;
        fs::write(path.join(name), bytes).unwrap();
        let (error, words) = fixture.refused(options(path)).await;
        assert!(matches!(error, StartError::Open(OpenError::Newer { found: 5, supported: 4, .. })), "{error:?}");
        assert_eq!(
            words,
            format!(
                "[dir]/{name} has format 5, this version of Kuma reads up to 4; use the newer version, nothing was changed"
            )
        );
        fixture.restore();
    }
    fixture.unharmed().await;
}

#[tokio::test]
async fn a_store_opens_only_under_its_own_name_and_with_its_own_number_of_shards() {
    let fixture = Fixture::new().await;
    let path = fixture.path();
    let (error, words) = fixture.refused(options(path).context("orders")).await;
    assert!(matches!(error, StartError::DataDir(DataDirError::OtherContext { .. })), "{error:?}");
    assert_snapshot!(words, @r#"[dir] holds the store "payments", not "orders"; choose its data directory, or open it under its own name"#);
    let (error, words) = fixture.refused(options(path).shards(3)).await;
    assert!(matches!(error, StartError::DataDir(DataDirError::OtherShards { found: 2, expected: 3, .. })), "{error:?}");
    assert_snapshot!(words, @"[dir] was created with 2 shards, not 3; leave the option out, or move the data to a new store");
    // The name is part of what the keys are bound to: editing the file does not help.
    replace(&path.join("store.json"), "payments", "orders");
    let (error, _) = fixture.refused(options(path).context("orders")).await;
    assert!(matches!(error, StartError::WrongMasterKey(_) | StartError::Vault(_)), "{error:?}");
    fixture.restore();
    fixture.unharmed().await;
}

#[tokio::test]
async fn an_option_that_cannot_be_is_refused_before_anything_is_made() {
    let dir = directory();
    let path = dir.path().join("data");
    let mut said = Vec::new();
    for options in [
        Options::new(&path).shards(0),
        Options::new(&path).shards(257),
        Options::new(&path).context(""),
        Options::new(&path).context("x".repeat(129)),
        Options::new(&path).event_bytes_max(0),
        Options::new(&path).event_bytes_max((1 << 20) + 1),
        Options::new(&path).entity_appends_max(0),
    ] {
        let error = Kuma::start(options).await.map(|_| ()).unwrap_err();
        assert!(matches!(error, StartError::Option { .. }), "{error:?}");
        said.push(error.to_string());
        assert!(!path.exists());
    }
    said.dedup();
    assert_snapshot!(said.join("\n"), @"
    the option shards is refused: a store has 1 to 256 shards
    the option context is refused: a name has 1 to 128 bytes
    the option event_bytes_max is refused: an event has at most 1 MiB
    the option entity_appends_max, shard_bytes_max is refused: nothing could ever be appended
    ");
}

/// Mounted read-only where this process may mount; by its permissions otherwise.
struct ReadOnly(PathBuf);

impl ReadOnly {
    fn make(path: &Path) -> Option<ReadOnly> {
        let mount = |arguments: &[&str]| {
            Command::new("mount").args(arguments).arg(path).output().is_ok_and(|done| done.status.success())
        };
        let text = path.to_string_lossy();
        if mount(&["--bind", &text]) {
            let made = ReadOnly(path.to_owned());
            return mount(&["-o", "remount,bind,ro"]).then_some(made);
        }
        fs::set_permissions(path, fs::Permissions::from_mode(0o555)).unwrap();
        fs::write(path.join("probe"), b"").is_err().then(|| ReadOnly(path.to_owned()))
    }
}

impl Drop for ReadOnly {
    fn drop(&mut self) {
        // One of the two undoes what was done.
        let _ = Command::new("umount").arg(&self.0).output();
        let _ = fs::set_permissions(&self.0, fs::Permissions::from_mode(0o755));
    }
}

#[tokio::test]
async fn a_read_only_directory_is_refused_as_such() {
    let fixture = Fixture::new().await;
    let path = fixture.path();
    let Some(read_only) = ReadOnly::make(path) else {
        println!("skipped: this process can neither mount nor be kept from writing");
        return;
    };
    let (error, words) = fixture.refused(options(path)).await;
    assert!(matches!(error, StartError::DataDir(DataDirError::Open(OpenError::ReadOnly { .. }))), "{error:?}");
    assert_snapshot!(words, @"[dir]/kuma.lock is read-only; Kuma needs to write there, check the permissions and the mount");
    let below = Kuma::start(options(&path.join("new"))).await.map(|_| ()).unwrap_err();
    assert_snapshot!(sentence(&below, path), @"[dir]/new is read-only; Kuma needs to write there, check the permissions and the mount");
    drop(read_only);
    fixture.unharmed().await;
}

#[tokio::test]
async fn a_file_where_the_directory_should_be_is_left_alone() {
    let dir = directory();
    let path = dir.path().join("data");
    fs::write(&path, b"mine").unwrap();
    let error = Kuma::start(Options::new(&path)).await.map(|_| ()).unwrap_err();
    assert_snapshot!(sentence(&error, dir.path()), @"[dir]/data is not a directory; choose another path, or move what is there away");
    assert_eq!(fs::read(&path).unwrap(), b"mine");
}

/// A start that failed before there was any data binds the directory to nothing.
#[tokio::test]
async fn a_first_start_that_failed_leaves_the_directory_to_the_next_one() {
    let dir = directory();
    let no_key = options(dir.path()).master_key(MasterKeySource::Env("KUMA_NO_SUCH_VARIABLE".into()));
    assert!(matches!(
        Kuma::start(no_key).await.map(|_| ()),
        Err(StartError::MasterKey(MasterKeyError::EnvMissing { .. }))
    ));
    let kuma = Kuma::start(Options::new(dir.path()).context("orders").shards(3)).await.unwrap();
    assert_eq!(kuma.entity::<Ledger>("l-1").append(entered(1)).await.unwrap(), Version(1));
}
