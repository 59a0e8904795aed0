//! A master key in another process: a store goes on with it, without it, and while its key is changed for another one.
//!
//! The process is the example `kms`, as is the store's side; docs/kms.md is the interface. What a healthy KMS never answers comes from
//! a second implementation of it, in here.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../../../kuma-core/examples/kms.rs"]
#[allow(unused)] // all but the client
mod example;

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    os::unix::{fs::PermissionsExt, net::UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use crate::common::{Ledger, assert_clean, directory, entered, sentence, until};
use base64::{Engine, engine::general_purpose::STANDARD};
use example::KmsMasterKey;
use futures_util::future::join_all;
use kuma_core::{
    AppendError, Kuma, LocalMasterKey, MasterKey, MasterKeyError, MasterKeySource, Options, ReadError, StartError,
    Unavailable, VaultError,
};
use kuma_crypto::{BoxFuture, KekId, Secret32};
use parking_lot::Mutex;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt},
    net::UnixListener,
};

/// Long enough for a busy machine, short enough for a test that lets it pass.
const DEADLINE: Duration = Duration::from_millis(500);

/// `kms serve` as a process of its own; killed with the test.
struct Kms {
    child: Child,
    socket: PathBuf,
    log: PathBuf,
}

impl Kms {
    /// Serves the keys in `kms.key`, makes one if there is none; returns when it is ready.
    fn serve(dir: &Path) -> Kms {
        let (socket, log) = (dir.join("kms.sock"), dir.join("kms.log"));
        let mut child = Command::new(env!("CARGO_BIN_EXE_kms"))
            .args(["serve", "--create", "--key-file"])
            .arg(dir.join("kms.key"))
            .arg("--socket")
            .arg(&socket)
            .env("RUST_LOG", "trace")
            .stdout(Stdio::piped())
            .stderr(fs::OpenOptions::new().create(true).append(true).open(&log).unwrap())
            .spawn()
            .unwrap();
        let mut said = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut said).unwrap();
        assert!(said.starts_with("serving"), "{said} {}", fs::read_to_string(&log).unwrap());
        Kms { child, socket, log }
    }

    async fn key(&self) -> Arc<KmsMasterKey> {
        KmsMasterKey::connect(&self.socket, DEADLINE).await.unwrap()
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// How many requests it answered.
    fn answered(&self) -> usize {
        fs::read_to_string(&self.log).unwrap().matches("op=").count()
    }
}

impl Drop for Kms {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn options(dir: &Path, master: Arc<dyn MasterKey>) -> Options {
    Options::new(dir.join("data")).shards(2).master_key(MasterKeySource::Provider(master))
}

async fn start(dir: &Path, master: Arc<dyn MasterKey>) -> Kuma {
    Kuma::start(options(dir, master)).await.unwrap()
}

/// Puts a new key in front of the keys of the KMS, and returns the lines: the new key, the old one.
fn add_key(dir: &Path) -> (String, String) {
    let path = dir.join("kms.key");
    let old = fs::read_to_string(&path).unwrap().lines().last().unwrap().to_owned();
    let other = dir.join("other.key");
    LocalMasterKey::create_file(&other).unwrap();
    let new = fs::read_to_string(&other).unwrap().lines().last().unwrap().to_owned();
    fs::write(&path, format!("{new}\n{old}\n")).unwrap();
    (new, old)
}

async fn fill(kuma: &Kuma, entities: u64) {
    let append = |number| async move { kuma.entity::<Ledger>(format!("l-{number}")).append(entered(number)).await };
    for appended in join_all((0..entities).map(append)).await {
        appended.unwrap();
    }
}

async fn assert_readable(kuma: &Kuma, entities: u64) {
    for number in 0..entities {
        assert_eq!(kuma.entity::<Ledger>(format!("l-{number}")).read().await.unwrap().entries, [number]);
    }
    assert_clean(kuma).await;
}

/// A KMS in this process that answers what it is told to: the protocol, written a second time.
#[derive(Clone, Default)]
struct Fake {
    /// Instead of an answer to `wrap` and `unwrap`; the connection is closed after it.
    script: Arc<Mutex<Option<Vec<u8>>>>,
    /// Wraps something else than it was given.
    lies: Arc<AtomicBool>,
}

impl Fake {
    fn serve(&self, socket: &Path) {
        let (listener, fake, key) =
            (UnixListener::bind(socket).unwrap(), self.clone(), Arc::new(LocalMasterKey::generate()));
        tokio::spawn(async move {
            loop {
                let (stream, fake, key) = (listener.accept().await.unwrap().0, fake.clone(), key.clone());
                tokio::spawn(async move { fake.converse(stream, &key).await });
            }
        });
    }

    async fn converse(&self, stream: tokio::net::UnixStream, key: &LocalMasterKey) -> Option<()> {
        let (read, mut write) = stream.into_split();
        let mut lines = tokio::io::BufReader::new(read).lines();
        while let Some(line) = lines.next_line().await.ok()? {
            let request: Value = serde_json::from_str(&line).unwrap();
            let bytes = |field: &str| STANDARD.decode(request[field].as_str().unwrap()).unwrap();
            let script = self.script.lock().clone();
            let answer = match (request["op"].as_str().unwrap(), script) {
                ("current", _) => json!({ "ok": key.current().to_string() }),
                (_, Some(script)) => {
                    write.write_all(&script).await.ok()?;
                    return None;
                }
                ("wrap", None) => {
                    let given = Secret32::from_bytes(&bytes("secret").try_into().unwrap());
                    let secret = if self.lies.load(SeqCst) { Secret32::generate() } else { given };
                    json!({ "ok": STANDARD.encode(key.wrap(&secret, &bytes("aad")).await.unwrap()) })
                }
                ("unwrap", None) => match key.unwrap(&bytes("wrapped"), &bytes("aad")).await {
                    Ok(secret) => json!({ "ok": STANDARD.encode(secret.expose()) }),
                    Err(error) => json!({ "error": { "kind": "does_not_authenticate", "message": error.to_string() } }),
                },
                other => panic!("{other:?}"),
            };
            write.write_all(format!("{answer}\n").as_bytes()).await.ok()?;
        }
        None
    }
}

#[tokio::test]
async fn a_store_under_an_external_kms_writes_reopens_and_reads() {
    let dir = directory();
    let kms = Kms::serve(dir.path());
    assert_eq!(fs::metadata(&kms.socket).unwrap().permissions().mode() & 0o777, 0o600);
    let kuma = start(dir.path(), kms.key().await).await;
    fill(&kuma, 20).await;
    kuma.shutdown().await;
    assert!(!dir.path().join("data/master.key").exists());

    let kuma = start(dir.path(), kms.key().await).await;
    assert_readable(&kuma, 20).await;
    kuma.shutdown().await;
}

#[tokio::test]
async fn the_kms_is_asked_for_an_entity_and_never_for_an_event() {
    let dir = directory();
    let kms = Kms::serve(dir.path());
    let kuma = start(dir.path(), kms.key().await).await;
    let ledger = kuma.entity::<Ledger>("l");
    ledger.append(entered(0)).await.unwrap();
    let asked = kms.answered();
    for number in 1..100 {
        ledger.append(entered(number)).await.unwrap();
        ledger.read().await.unwrap();
    }
    assert_eq!(kms.answered(), asked);
    ledger.raw().passivate().await.unwrap();
    ledger.read().await.unwrap();
    assert_eq!(kms.answered(), asked + 1, "it came back into memory: one unwrap");
    kuma.shutdown().await;
}

#[tokio::test]
async fn with_the_kms_down_live_entities_go_on_others_wait_and_it_heals_by_itself() {
    let dir = directory();
    let mut kms = Kms::serve(dir.path());
    let kuma = start(dir.path(), kms.key().await).await;
    let [live, asleep, fresh] = ["live", "asleep", "fresh"].map(|id| kuma.entity::<Ledger>(id));
    live.append(entered(1)).await.unwrap();
    asleep.append(entered(1)).await.unwrap();
    asleep.raw().passivate().await.unwrap();

    kms.kill();
    live.append(entered(2)).await.unwrap();
    assert_eq!(live.read().await.unwrap().entries, [1, 2]);
    // More often than it takes to quarantine an entity that fails by its own fault.
    for _ in 0..5 {
        let error = fresh.append(entered(1)).await.unwrap_err();
        assert!(matches!(error, AppendError::Unavailable(Unavailable::NoKey { .. })), "{error:?}");
        assert!(error.is_retry_safe());
        let said = sentence(&error, dir.path());
        for part in ["nothing was written", "a retry is safe", "no KMS is at [dir]/kms.sock; start it"] {
            assert!(said.contains(part), "{said}");
        }
        let error = asleep.append(entered(2)).await.unwrap_err();
        assert!(matches!(error, AppendError::Unavailable(Unavailable::Unreadable { .. })), "{error:?}");
        let error = asleep.read().await.unwrap_err();
        assert!(matches!(error, ReadError::Unavailable(Unavailable::Unreadable { .. })), "{error:?}");
        assert!(sentence(&error, dir.path()).contains("a retry is safe"), "{error:?}");
    }

    // The KMS comes back; nobody touches the store.
    let _kms = Kms::serve(dir.path());
    assert_eq!(asleep.read().await.unwrap().entries, [1]);
    asleep.append(entered(2)).await.unwrap();
    fresh.append(entered(1)).await.unwrap();
    assert_eq!(asleep.read().await.unwrap().entries, [1, 2]);
    assert_eq!(fresh.read().await.unwrap().entries, [1]);
    assert_clean(&kuma).await;
    kuma.shutdown().await;
}

/// It takes requests and answers none. Each of 200 appends to one entity needs the key; the first one waits for the deadline, the
/// others do not wait for it one after the other.
#[tokio::test]
async fn a_kms_that_is_stuck_costs_a_deadline_and_not_one_for_each_request() {
    let dir = directory();
    let kms = Kms::serve(dir.path());
    let kuma = start(dir.path(), kms.key().await).await;
    kms.signal(Signal::STOP);
    let since = Instant::now();
    let fresh = kuma.entity::<Ledger>("fresh");
    let outcomes = join_all((0..200).map(|number| fresh.append(entered(number)).into_future())).await;
    assert!(outcomes.iter().all(|outcome| matches!(outcome, Err(error) if error.is_retry_safe())));
    assert!(since.elapsed() < 6 * DEADLINE, "{:?}", since.elapsed());
    let said = sentence(outcomes[0].as_ref().unwrap_err(), dir.path());
    assert!(said.contains("did not answer within 500ms"), "{said}");

    kms.signal(Signal::CONT);
    until("it is asked again", async || fresh.append(entered(7)).await.is_ok()).await;
    assert_eq!(fresh.read().await.unwrap().entries, [7]);
    kms.signal(Signal::STOP);
    kuma.shutdown().await;
    kms.signal(Signal::CONT);
}

#[tokio::test]
async fn a_store_does_not_start_without_its_kms_and_says_so() {
    let dir = directory();
    let mut kms = Kms::serve(dir.path());
    let key = kms.key().await;
    start(dir.path(), key.clone()).await.shutdown().await;
    kms.kill();
    let error = Kuma::start(options(dir.path(), key.clone())).await.map(drop).unwrap_err();
    let provider = |error: &StartError| {
        matches!(error, StartError::Vault(VaultError::MasterKey(MasterKeyError::Provider { retry_safe: true, .. })))
    };
    assert!(provider(&error), "{error:?}");
    let error = KmsMasterKey::connect(&kms.socket, DEADLINE).await.unwrap_err();
    assert!(matches!(error, MasterKeyError::Provider { retry_safe: true, .. }), "{error:?}");

    let _kms = Kms::serve(dir.path());
    start(dir.path(), key).await.shutdown().await;
}

/// What a broken, foreign or unwilling KMS answers, and whether a retry is said to help.
fn bad_answers() -> Vec<(&'static str, Vec<u8>, bool)> {
    let error =
        |kind: &str| format!("{}\n", json!({ "error": { "kind": kind, "message": "because\u{7}" } })).into_bytes();
    vec![
        ("a refusal", error("denied"), false),
        ("for later", error("unavailable"), true),
        ("a misunderstanding", error("malformed"), false),
        ("an error of a newer KMS", error("on_holiday"), false),
        ("no JSON", b"HTTP/1.1 400 Bad Request\n".to_vec(), false),
        ("an empty line", b"\n".to_vec(), false),
        ("other JSON", b"{\"okay\":1}\n".to_vec(), false),
        ("no text", b"{\"ok\":17}\n".to_vec(), false),
        ("no base64", b"{\"ok\":\"%%%\"}\n".to_vec(), false),
        ("nothing in base64", b"{\"ok\":\"\"}\n".to_vec(), false),
        ("too few bytes", b"{\"ok\":\"AAECAw==\"}\n".to_vec(), false),
        ("too many bytes", format!("{{\"ok\":\"{}\"}}\n", STANDARD.encode([1; 33])).into_bytes(), false),
        ("not UTF-8", b"{\"ok\":\"\xff\xfe\"}\n".to_vec(), false),
        ("half a line", b"{\"ok\":\"AAEC".to_vec(), true),
        ("nothing", Vec::new(), true),
        ("two lines", b"{\"ok\":\"AAECAw==\"}\n{}\n".to_vec(), false),
        ("a line without an end", vec![b'x'; 9000], false),
        ("deep JSON", [vec![b'['; 5000], vec![b'\n']].concat(), false),
    ]
}

#[tokio::test]
async fn answers_that_are_none_are_typed_errors_and_harm_nothing() {
    let dir = directory();
    let (socket, fake) = (dir.path().join("fake.sock"), Fake::default());
    fake.serve(&socket);
    let master = KmsMasterKey::connect(&socket, DEADLINE).await.unwrap();
    let kuma = start(dir.path(), master.clone()).await;
    let asleep = kuma.entity::<Ledger>("asleep");
    asleep.append(entered(1)).await.unwrap();
    let wrapped = master.wrap(&Secret32::generate(), b"place").await.unwrap();
    for (what, answer, may_pass) in bad_answers() {
        *fake.script.lock() = Some(answer);
        let wrap = master.wrap(&Secret32::generate(), b"place").await.map(drop);
        for outcome in [wrap, master.unwrap(&wrapped, b"place").await.map(drop)] {
            let error = outcome.unwrap_err();
            assert!(
                matches!(error, MasterKeyError::Provider { retry_safe, .. } if retry_safe == may_pass),
                "{what}: {error:?}"
            );
            let said = sentence(&error, dir.path());
            assert!(said.contains("nothing was changed") && !said.contains('\u{7}'), "{what}: {said}");
        }
        asleep.raw().passivate().await.unwrap();
        let error = asleep.read().await.unwrap_err();
        assert!(matches!(error, ReadError::Unavailable(Unavailable::Unreadable { .. })), "{what}: {error:?}");
        let error = kuma.entity::<Ledger>("fresh").append(entered(1)).await.unwrap_err();
        assert!(matches!(error, AppendError::Unavailable(Unavailable::NoKey { .. })), "{what}: {error:?}");
    }
    for (kind, wanted) in [("unknown_key", "UnknownKek"), ("does_not_authenticate", "DoesNotAuthenticate")] {
        *fake.script.lock() = Some(format!("{}\n", json!({ "error": { "kind": kind, "message": "" } })).into_bytes());
        let error = master.unwrap(&wrapped, b"place").await.unwrap_err();
        assert!(format!("{error:?}").starts_with(wanted), "{error:?}");
    }
    *fake.script.lock() = None;
    assert_eq!(asleep.read().await.unwrap().entries, [1]);
    kuma.entity::<Ledger>("fresh").append(entered(1)).await.unwrap();
    assert_clean(&kuma).await;
    kuma.shutdown().await;
}

/// It mixes up its callers, say. Had the store believed it, what it then seals would be lost at the next passivation.
#[tokio::test]
async fn a_kms_that_wraps_something_else_is_found_out_before_anything_is_sealed() {
    let dir = directory();
    let (socket, fake) = (dir.path().join("fake.sock"), Fake::default());
    fake.serve(&socket);
    let kuma = start(dir.path(), KmsMasterKey::connect(&socket, DEADLINE).await.unwrap()).await;
    fake.lies.store(true, SeqCst);
    let fresh = kuma.entity::<Ledger>("fresh");
    let error = fresh.append(entered(1)).await.unwrap_err();
    assert!(sentence(&error, dir.path()).contains("unwraps to something else"), "{error:?}");
    fake.lies.store(false, SeqCst);
    fresh.append(entered(1)).await.unwrap();
    fresh.raw().passivate().await.unwrap();
    assert_eq!(fresh.read().await.unwrap().entries, [1]);
    kuma.shutdown().await;
}

#[tokio::test]
async fn the_kms_refuses_what_is_no_request_and_goes_on() {
    let dir = directory();
    let kms = Kms::serve(dir.path());
    let connect = || UnixStream::connect(&kms.socket).unwrap();
    let ask = |stream: &mut UnixStream, line: &[u8]| {
        stream.write_all(line).unwrap();
        let mut answer = Vec::new();
        let mut byte = [0];
        while stream.read(&mut byte).unwrap() == 1 && byte != *b"\n" {
            answer.push(byte[0]);
        }
        serde_json::from_slice::<Value>(&answer).unwrap()
    };
    // Holds a connection, and never ends its line.
    let mut slow = connect();
    slow.write_all(b"{\"op\":").unwrap();
    let mut stream = connect();
    let no_requests: [&[u8]; 6] = [
        b"\n",
        b"hello\n",
        b"{\"op\":\"destroy\"}\n",
        b"{\"op\":\"wrap\"}\n",
        b"{\"op\":\"wrap\",\"secret\":\"%\",\"aad\":\"\"}\n",
        b"{\"op\":\"wrap\",\"secret\":\"c2hvcnQtc2VjcmV0\",\"aad\":\"\"}\n",
    ];
    for line in no_requests {
        let answer = ask(&mut stream, line);
        assert_eq!(answer["error"]["kind"], "malformed", "{answer}");
        assert!(!answer.to_string().contains("destroy") && !answer.to_string().contains("c2hv"), "{answer}");
    }
    assert!(ask(&mut stream, b"{\"op\":\"current\"}\n")["ok"].is_string());
    for (line, kind) in [
        ("{\"op\":\"unwrap\",\"wrapped\":\"AQ==\",\"aad\":\"\"}\n".to_owned(), "malformed"),
        (format!("{{\"op\":\"unwrap\",\"wrapped\":\"{}\",\"aad\":\"\"}}\n", STANDARD.encode([1; 81])), "unknown_key"),
    ] {
        assert_eq!(ask(&mut stream, line.as_bytes())["error"]["kind"], kind);
    }
    assert_eq!(ask(&mut stream, &[b'x'; 8192])["error"]["kind"], "malformed");
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0, "nobody knows where the next line begins");
    assert_eq!(ask(&mut slow, b"\"current\"}\n")["ok"], ask(&mut connect(), b"{\"op\":\"current\"}\n")["ok"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_master_key_is_rotated_while_appends_go_on() {
    const ENTITIES: u64 = 60;
    let dir = directory();
    let mut kms = Kms::serve(dir.path());
    let master = kms.key().await;
    let kuma = start(dir.path(), master.clone()).await;
    fill(&kuma, ENTITIES).await;
    let old_id = master.current();

    kms.kill();
    let (new, old) = add_key(dir.path());
    let mut kms = Kms::serve(dir.path());
    assert_ne!(master.refresh().await.unwrap(), old_id);
    let stop = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..4)
        .map(|writer| {
            let (kuma, stop) = (kuma.clone(), stop.clone());
            tokio::spawn(async move {
                let mut appends = 0;
                while !stop.load(SeqCst) {
                    // One that is known, and one that is new.
                    kuma.entity::<Ledger>(format!("known-{writer}")).append(entered(appends)).await.unwrap();
                    kuma.entity::<Ledger>(format!("new-{writer}-{appends}")).append(entered(appends)).await.unwrap();
                    appends += 1;
                }
                appends
            })
        })
        .collect();
    until("appends go on", async || kuma.stats().live_entities() as u64 > ENTITIES + 20).await;
    let deadline = Duration::from_secs(10);
    let rewrapped =
        tokio::time::timeout(deadline, kuma.rotate_master_key()).await.expect("it ends under load").unwrap();
    assert_eq!(rewrapped, ENTITIES);
    stop.store(true, SeqCst);
    let appends: Vec<u64> = join_all(writers).await.into_iter().map(Result::unwrap).collect();
    assert_eq!(kuma.rotate_master_key().await.unwrap(), 0);
    kuma.shutdown().await;

    kms.kill();
    fs::write(dir.path().join("kms.key"), &new).unwrap();
    let mut kms = Kms::serve(dir.path());
    let kuma = start(dir.path(), kms.key().await).await;
    assert_readable(&kuma, ENTITIES).await;
    for (writer, appends) in appends.into_iter().enumerate() {
        let known = kuma.entity::<Ledger>(format!("known-{writer}")).read().await.unwrap();
        assert_eq!(known.entries, (0..appends).collect::<Vec<u64>>());
    }
    kuma.shutdown().await;

    kms.kill();
    fs::write(dir.path().join("kms.key"), &old).unwrap();
    let kms = Kms::serve(dir.path());
    let error = Kuma::start(options(dir.path(), kms.key().await)).await.map(drop).unwrap_err();
    assert!(matches!(error, StartError::WrongMasterKey(MasterKeyError::UnknownKek { .. })), "{error:?}");
}

/// Calls something before a certain wrap, and remembers every secret that passes.
#[derive(Clone)]
struct Watched {
    master: Arc<KmsMasterKey>,
    wraps: Arc<AtomicU64>,
    before: Arc<dyn Fn(u64) + Send + Sync>,
    secrets: Arc<Mutex<Vec<[u8; 32]>>>,
}

impl Watched {
    fn new(master: Arc<KmsMasterKey>, before: impl Fn(u64) + Send + Sync + 'static) -> Watched {
        Watched { master, wraps: Arc::default(), before: Arc::new(before), secrets: Arc::default() }
    }
}

impl std::fmt::Debug for Watched {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.master.fmt(f)
    }
}

impl MasterKey for Watched {
    fn current(&self) -> KekId {
        self.master.current()
    }

    fn wrap<'a>(&'a self, secret: &'a Secret32, aad: &'a [u8]) -> BoxFuture<'a, Result<Vec<u8>, MasterKeyError>> {
        Box::pin(async move {
            (self.before)(self.wraps.fetch_add(1, SeqCst));
            self.secrets.lock().push(*secret.expose());
            self.master.wrap(secret, aad).await
        })
    }

    fn unwrap<'a>(&'a self, wrapped: &'a [u8], aad: &'a [u8]) -> BoxFuture<'a, Result<Secret32, MasterKeyError>> {
        Box::pin(async move {
            let secret = self.master.unwrap(wrapped, aad).await?;
            self.secrets.lock().push(*secret.expose());
            Ok(secret)
        })
    }
}

#[tokio::test]
async fn a_rotation_that_the_kms_did_not_live_through_is_finished_by_running_it_again() {
    const ENTITIES: u64 = 400;
    let dir = directory();
    let mut kms = Kms::serve(dir.path());
    let kuma = start(dir.path(), kms.key().await).await;
    fill(&kuma, ENTITIES).await;
    kuma.shutdown().await;

    kms.kill();
    let (new, _) = add_key(dir.path());
    let kms = Kms::serve(dir.path());
    let key = kms.key().await;
    let kms = Arc::new(Mutex::new(kms));
    let killed = kms.clone();
    let master = Watched::new(key, move |wraps| {
        if wraps == 300 {
            killed.lock().kill();
        }
    });
    let kuma = start(dir.path(), Arc::new(master.clone())).await;
    kuma.entity::<Ledger>("l-0").read().await.unwrap();
    let error = kuma.rotate_master_key().await.unwrap_err();
    assert!(matches!(error, VaultError::MasterKey(MasterKeyError::Provider { retry_safe: true, .. })), "{error:?}");
    assert_eq!(kuma.entity::<Ledger>("l-0").read().await.unwrap().entries, [0]);

    *kms.lock() = Kms::serve(dir.path());
    // Some under the old key, some under the new one.
    assert_readable(&kuma, ENTITIES).await;
    let left = kuma.rotate_master_key().await.unwrap();
    assert!(0 < left && left < ENTITIES, "it goes on where it was: {left}");
    assert_eq!(kuma.rotate_master_key().await.unwrap(), 0);
    kuma.shutdown().await;

    kms.lock().kill();
    fs::write(dir.path().join("kms.key"), &new).unwrap();
    let kms = Kms::serve(dir.path());
    let kuma = start(dir.path(), kms.key().await).await;
    assert_readable(&kuma, ENTITIES).await;
    kuma.shutdown().await;
}

/// Whether a text holds a part of `secret`: as hex, base64, or numbers.
fn holds(text: &str, secret: &[u8; 32]) -> bool {
    let lower = text.to_lowercase();
    // Nine bytes are twelve characters of base64, wherever they stand in a longer text.
    secret.windows(9).any(|part| {
        let numbers = part[..4].iter().map(u8::to_string).collect::<Vec<_>>().join(", ");
        lower.contains(&hex(part)) || text.contains(&STANDARD.encode(part)) || text.contains(&numbers)
    })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[derive(Clone, Default)]
struct Buffer(Arc<Mutex<Vec<u8>>>);

impl Write for Buffer {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn no_secret_is_in_any_log_at_any_level() {
    let buffer = Buffer::default();
    let (ear, level) = (buffer.clone(), tracing::Level::TRACE);
    tracing_subscriber::fmt().with_max_level(level).with_writer(move || ear.clone()).with_ansi(false).init();
    let dir = directory();
    let mut kms = Kms::serve(dir.path());
    let master = Watched::new(kms.key().await, |_| {});
    let kuma = start(dir.path(), Arc::new(master.clone())).await;
    fill(&kuma, 5).await;
    kms.kill();
    let fresh = kuma.entity::<Ledger>("fresh");
    let mut errors = format!("{:?}", fresh.append(entered(1)).await.unwrap_err());
    let (new, old) = add_key(dir.path());
    let mut kms = Kms::serve(dir.path());
    master.master.refresh().await.unwrap();
    fresh.append(entered(1)).await.unwrap();
    assert_eq!(kuma.rotate_master_key().await.unwrap(), 5);
    kuma.entity::<Ledger>("l-1").raw().passivate().await.unwrap();
    kuma.entity::<Ledger>("l-1").read().await.unwrap();
    let wrapped = master.wrap(&Secret32::generate(), b"place").await.unwrap();
    errors += &format!("{:?}", master.unwrap(&wrapped, b"another place").await.unwrap_err());
    kuma.shutdown().await;
    kms.kill();

    let inside = String::from_utf8(buffer.0.lock().clone()).unwrap();
    let kms_log = fs::read_to_string(&kms.log).unwrap();
    assert!(inside.contains("TRACE") && inside.contains("kuma::commit"), "it listened");
    assert!(kms_log.contains("op=\"wrap\"") && kms_log.contains("does_not_authenticate"), "it was asked: {kms_log}");
    let logs = inside + &kms_log + &errors;
    let secrets = master.secrets.lock().clone();
    assert!(secrets.len() >= 12, "the id secret, six data keys, and some of them again");
    for secret in &secrets {
        let forms = [hex(secret).to_uppercase(), format!("{secret:?}"), STANDARD.encode([b"a", &secret[..]].concat())];
        assert!(forms.iter().all(|form| holds(form, secret)), "it would be seen");
        assert!(!holds(&logs, secret), "a data key or the id secret is in a log");
    }
    for line in [new, old] {
        let bytes: Vec<u8> = line
            .as_bytes()
            .chunks(2)
            .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
            .collect();
        assert!(!holds(&logs, &bytes.try_into().unwrap()), "a master key is in a log");
    }
}
