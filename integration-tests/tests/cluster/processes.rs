//! A cluster whose nodes are processes, so that they can be killed and stopped; with clients, and with what was acknowledged to them.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    collections::{BTreeSet, HashMap},
    fs::File,
    path::{Path, PathBuf},
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

use crate::common::directory;
use integration_tests::cluster_child::{Answer, Ask, Question, Said, SlotNow, Status};
use kuma_cluster::Cookie;
use kuma_core::{SLOTS, slot_of};
use parking_lot::Mutex;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    process::{Child, Command},
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
};

/// Longer than anything takes.
pub(crate) const LONG: Duration = Duration::from_secs(120);

/// The deadline of requests: longer than it takes to be told that an owner is out of reach.
const WITHIN_MS: u64 = 4_000;

pub(crate) async fn soon(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let wait = async {
        while !is_so().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(LONG, wait).await.unwrap_or_else(|_| panic!("waited in vain: {what}"));
}

/// What has come of a process.
#[derive(Clone, Debug, Default)]
struct Heard {
    address: Option<String>,
    places: BTreeSet<String>,
    is_over: bool,
}

/// A node in a process of its own. It is killed when it is dropped.
pub(crate) struct Process {
    child: Mutex<Option<Child>>,
    pid: Pid,
    questions: mpsc::UnboundedSender<String>,
    open: Arc<Mutex<HashMap<u64, oneshot::Sender<Answer>>>>,
    next: AtomicU64,
    heard: watch::Receiver<Heard>,
}

impl Process {
    /// `how`: "found", "again", or the address of a seed.
    pub(crate) fn spawn(path: &Path, log: &Path, name: &str, cookie: &str, how: &str, places: &[&str]) -> Arc<Process> {
        Process::spawn_with(&[], path, log, &[&[name, cookie, how], places].concat())
    }

    /// Also with what it takes from its environment.
    pub(crate) fn spawn_with(
        environment: &[(&str, &str)],
        path: &Path,
        log: &Path,
        arguments: &[&str],
    ) -> Arc<Process> {
        let log = File::options().create(true).append(true).open(log).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_cluster_child"));
        command.arg(path).args(arguments).envs(environment.iter().copied());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log).kill_on_drop(true);
        let mut child = command.spawn().unwrap();
        let pid = Pid::from_raw(child.id().unwrap() as i32).unwrap();
        let (mut stdin, stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let (questions, mut asked) = mpsc::unbounded_channel::<String>();
        tokio::spawn(async move {
            while let Some(line) = asked.recv().await {
                if stdin.write_all(line.as_bytes()).await.is_err() {
                    return;
                }
            }
        });
        let open: Arc<Mutex<HashMap<u64, oneshot::Sender<Answer>>>> = Arc::default();
        let (hears, heard) = watch::channel(Heard::default());
        let answered = open.clone();
        tokio::spawn(async move {
            let mut lines = BufReader::new(stdout).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                match serde_json::from_str(&line).unwrap() {
                    Said::Up { address } => hears.send_modify(|heard| heard.address = Some(address)),
                    Said::At { place } => hears.send_modify(|heard| heard.places.extend([place])),
                    Said::Answer { number, answer } => {
                        if let Some(asked) = answered.lock().remove(&number) {
                            let _ = asked.send(answer);
                        }
                    }
                }
            }
            hears.send_modify(|heard| heard.is_over = true);
            // Whoever waits is told.
            answered.lock().clear();
        });
        let child = Mutex::new(Some(child));
        Arc::new(Process { child, pid, questions, open, next: AtomicU64::new(0), heard })
    }

    /// None: the process has ended before it answered.
    pub(crate) async fn ask(&self, ask: Ask) -> Option<Answer> {
        let number = self.next.fetch_add(1, SeqCst);
        let (asked, answer) = oneshot::channel();
        self.open.lock().insert(number, asked);
        let line = serde_json::to_string(&Question { number, ask }).unwrap() + "\n";
        if self.questions.send(line).is_err() || self.heard.borrow().is_over {
            self.open.lock().remove(&number);
        }
        answer.await.ok()
    }

    pub(crate) async fn done(&self, ask: Ask) {
        assert_eq!(self.ask(ask).await, Some(Answer::Done));
    }

    pub(crate) async fn status(&self) -> Option<Status> {
        match self.ask(Ask::Status).await? {
            Answer::Status(status) => Some(status),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) async fn slot(&self, slot: u64) -> Option<SlotNow> {
        match self.ask(Ask::Slot { slot }).await? {
            Answer::Slot(slot) => Some(slot),
            other => panic!("{other:?}"),
        }
    }

    async fn heard(&self, what: &str, mut is_heard: impl FnMut(&Heard) -> bool) -> Heard {
        let mut heard = self.heard.clone();
        let waited = tokio::time::timeout(LONG, heard.wait_for(|heard| is_heard(heard) || heard.is_over)).await;
        let heard = waited.unwrap_or_else(|_| panic!("waited in vain: {what}")).map(|heard| heard.clone());
        heard.unwrap_or_else(|_| Heard { is_over: true, ..Heard::default() })
    }

    /// Where it listens.
    pub(crate) async fn address(&self) -> String {
        let heard = self.heard("a process is up", |heard| heard.address.is_some()).await;
        heard.address.expect("it has ended instead")
    }

    /// Waits until it is at a fail point.
    pub(crate) async fn at(&self, place: &str) {
        let heard = self.heard(place, |heard| heard.places.contains(place)).await;
        assert!(heard.places.contains(place), "the process has ended before it came to {place}");
    }

    pub(crate) fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// Waits until it ends by itself.
    pub(crate) async fn over(&self) {
        self.heard("a process ends", |heard| heard.is_over).await;
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid, signal).unwrap();
    }

    /// kill -9, and waits until nothing of it is left.
    pub(crate) async fn kill(&self) {
        let child = self.child.lock().take();
        child.unwrap().kill().await.unwrap();
    }

    /// It ends as it should.
    pub(crate) async fn stop(&self) {
        let _ = self.ask(Ask::Stop).await;
        let child = self.child.lock().take();
        let status = child.unwrap().wait().await.unwrap();
        assert!(status.success(), "{status}");
    }
}

/// Three nodes, or more.
pub(crate) struct Cluster {
    pub(crate) root: TempDir,
    pub(crate) cookie: String,
    nodes: Mutex<Vec<Arc<Process>>>,
    /// Whom clients do not ask: they would wait for ever.
    pub(crate) is_away: Mutex<BTreeSet<usize>>,
    /// Nobody has to look into the logs.
    is_fine: AtomicBool,
}

pub(crate) fn name(node: usize) -> String {
    format!("n{node}")
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if !self.is_fine.load(SeqCst) {
            for node in 0..self.nodes.lock().len() {
                let log = std::fs::read_to_string(self.log(node)).unwrap_or_default();
                let lines: Vec<&str> = log.lines().collect();
                println!("--- {}, its last lines", name(node));
                lines.iter().skip(lines.len().saturating_sub(30)).for_each(|line| println!("{line}"));
            }
        }
    }
}

impl Cluster {
    /// So many nodes, each with its slots.
    pub(crate) async fn start(nodes: usize) -> Arc<Cluster> {
        let cluster = Cluster::empty();
        for node in 0..nodes {
            let how = if node == 0 { "found".to_owned() } else { cluster.node(0).address().await };
            cluster.add(&how, &[]);
            cluster.ready(node).await;
        }
        cluster.settled().await;
        cluster
    }

    pub(crate) fn empty() -> Arc<Cluster> {
        let cookie = Cookie::generate().unwrap().to_text().to_string();
        Arc::new(Cluster {
            root: directory(),
            cookie,
            nodes: Mutex::default(),
            is_away: Mutex::default(),
            is_fine: AtomicBool::default(),
        })
    }

    pub(crate) fn path(&self, node: usize) -> PathBuf {
        self.root.path().join(name(node))
    }

    pub(crate) fn log(&self, node: usize) -> PathBuf {
        self.root.path().join(format!("{}.log", name(node)))
    }

    fn spawn(&self, node: usize, how: &str, places: &[&str]) -> Arc<Process> {
        Process::spawn(&self.path(node), &self.log(node), &name(node), &self.cookie, how, places)
    }

    /// One more.
    pub(crate) fn add(&self, how: &str, places: &[&str]) {
        let mut nodes = self.nodes.lock();
        self.is_away.lock().insert(nodes.len());
        let next = self.spawn(nodes.len(), how, places);
        nodes.push(next);
    }

    pub(crate) fn node(&self, node: usize) -> Arc<Process> {
        self.nodes.lock()[node].clone()
    }

    pub(crate) fn nodes(&self) -> Vec<Arc<Process>> {
        self.nodes.lock().clone()
    }

    /// Stops all nodes; the test has passed.
    pub(crate) async fn end(&self) {
        for node in self.nodes() {
            node.stop().await;
        }
        self.is_fine.store(true, SeqCst);
    }

    /// Kills a node.
    pub(crate) async fn kill(&self, node: usize) {
        self.is_away.lock().insert(node);
        self.node(node).kill().await;
    }

    /// Starts a node again that was killed.
    pub(crate) fn again(&self, node: usize, places: &[&str]) {
        let process = self.spawn(node, "again", places);
        self.nodes.lock()[node] = process;
    }

    /// Waits until a node serves; clients may ask it from now on.
    pub(crate) async fn ready(&self, node: usize) {
        let process = self.node(node);
        process.address().await;
        soon("a node is ready", async || process.status().await.expect("it has ended").is_ready).await;
        self.is_away.lock().remove(&node);
    }

    /// Waits until all nodes are linked, each slot is where it should be, has one owner, and nothing is half on its way.
    pub(crate) async fn settled(&self) {
        let nodes = self.nodes();
        let mut seen = Vec::new();
        let wait = async {
            loop {
                seen.clear();
                for node in &nodes {
                    seen.push(node.status().await.expect("a node has ended"));
                }
                let is_quiet = |status: &Status| {
                    let is_clean = status.staged == 0 && status.granted == 0;
                    status.is_ready && status.is_settled && status.up.len() == nodes.len() && is_clean
                };
                let mut owned: Vec<u64> = seen.iter().flat_map(|status| status.owned.iter().copied()).collect();
                let all = owned.len();
                owned.sort_unstable();
                owned.dedup();
                // While slots move, what two nodes said at different times may not fit.
                if seen.iter().all(is_quiet) {
                    assert_eq!(all, owned.len(), "a slot has two owners");
                    if all == usize::from(SLOTS) {
                        return;
                    }
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        if tokio::time::timeout(LONG, wait).await.is_err() {
            for status in &mut seen {
                status.owned.truncate(3);
            }
            panic!("waited in vain: all slots are where they should be; {seen:#?}");
        }
    }

    /// Who owns a slot; the cluster is settled.
    pub(crate) async fn owner(&self, slot: u64) -> usize {
        for (number, node) in self.nodes().iter().enumerate() {
            if node.slot(slot).await == Some(SlotNow::Owned) {
                return number;
            }
        }
        panic!("nobody owns slot {slot}")
    }

    pub(crate) async fn append(&self, node: usize, id: &str, number: u64) -> Option<Answer> {
        self.node(node).ask(Ask::Append { id: id.to_owned(), number, within_ms: WITHIN_MS }).await
    }

    pub(crate) async fn read(&self, node: usize, id: &str) -> Option<Answer> {
        self.node(node).ask(Ask::Read { id: id.to_owned(), within_ms: WITHIN_MS }).await
    }
}

pub(crate) fn id(number: u64) -> String {
    format!("log-{number}")
}

pub(crate) fn slot(id: &str) -> u64 {
    slot_of("log", id).number().into()
}

/// Logs that clients write to.
pub(crate) const LOGS: u64 = 24;

/// Clients that append, and read what they were told.
pub(crate) struct Clients {
    told: Arc<Told>,
    tasks: Vec<JoinHandle<()>>,
}

/// What was acknowledged.
#[derive(Default)]
struct Told {
    /// By log: the numbers with the versions that they were acknowledged with.
    acks: Mutex<HashMap<u64, Vec<(u64, u64)>>>,
    /// What must not be.
    wrong: Mutex<Vec<String>>,
    /// Numbers of which was said that they were not appended.
    refused: Mutex<BTreeSet<u64>>,
    /// The log that every other append goes to.
    favourite: AtomicU64,
    is_over: AtomicBool,
}

impl Told {
    fn highest(&self, log: u64) -> u64 {
        let acks = self.acks.lock();
        acks.get(&log).into_iter().flatten().map(|(_, version)| *version).max().unwrap_or(0)
    }
}

impl Clients {
    pub(crate) fn start(cluster: &Arc<Cluster>, seed: u64) -> Clients {
        let told = Arc::<Told>::default();
        let tasks = (1..=4).map(|client| tokio::spawn(write(client, cluster.clone(), told.clone(), seed))).collect();
        Clients { told, tasks }
    }

    /// Half of all appends go to this log from now on.
    pub(crate) fn prefer(&self, log: u64) {
        self.told.favourite.store(log, SeqCst);
    }

    /// A number that no client has. It was refused: it is to be found nowhere.
    pub(crate) fn refused(&self, number: u64) {
        self.told.refused.lock().insert(number);
    }

    /// A number that no client has was acknowledged.
    pub(crate) fn acked(&self, log: u64, number: u64, version: u64) {
        self.told.acks.lock().entry(log).or_default().push((number, version));
    }

    pub(crate) fn acks(&self) -> usize {
        self.told.acks.lock().values().map(Vec::len).sum()
    }

    /// Ends the clients.
    pub(crate) async fn stop(&mut self) {
        self.told.is_over.store(true, SeqCst);
        for task in self.tasks.drain(..) {
            task.await.unwrap();
        }
    }

    /// Ends the clients, and looks: every node says the same, each acknowledged number is where it was said to be, none is there twice.
    pub(crate) async fn judge(mut self, cluster: &Cluster) {
        self.stop().await;
        let told = self.told.clone();
        let wrong = told.wrong.lock().clone();
        assert!(wrong.is_empty(), "{} times: {:?}", wrong.len(), &wrong[..wrong.len().min(5)]);
        let acks = told.acks.lock().clone();
        let refused = told.refused.lock().clone();
        for (log, acks) in &acks {
            let states = cluster.nodes().len();
            for node in 0..states {
                let answer = cluster.read(node, &id(*log)).await;
                let Some(Answer::State { version, seen }) = answer else { panic!("{answer:?}") };
                assert_eq!(version, seen.len() as u64);
                let once: BTreeSet<u64> = seen.iter().copied().collect();
                assert_eq!(once.len(), seen.len(), "log {log} has a number twice");
                assert!(once.is_disjoint(&refused), "log {log} has what was refused");
                for (number, version) in acks {
                    let found = seen.get(*version as usize - 1);
                    assert_eq!(found, Some(number), "log {log}: {number} was acknowledged as version {version}");
                }
            }
        }
        for node in cluster.nodes() {
            node.done(Ask::Verify).await;
        }
        cluster.end().await;
        println!("{} appends were acknowledged", acks.values().map(Vec::len).sum::<usize>());
    }
}

async fn write(client: u64, cluster: Arc<Cluster>, told: Arc<Told>, seed: u64) {
    let mut random = StdRng::seed_from_u64(seed ^ client << 20);
    let mut any = move |cluster: &Cluster| {
        let away = cluster.is_away.lock().clone();
        let there: Vec<usize> = (0..cluster.nodes().len()).filter(|node| !away.contains(node)).collect();
        (there[random.random_range(0..there.len())], random.random_range(0..LOGS))
    };
    for next in 0.. {
        let (_, log) = any(&cluster);
        let log = if client.is_multiple_of(2) { told.favourite.load(SeqCst) } else { log };
        let number = client << 32 | next;
        let mut is_done = false;
        // The same number again, wherever, until somebody has it.
        while !is_done {
            if told.is_over.load(SeqCst) {
                return;
            }
            let (node, _) = any(&cluster);
            match cluster.append(node, &id(log), number).await {
                Some(Answer::Appended { version }) => {
                    told.acks.lock().entry(log).or_default().push((number, version));
                    is_done = true;
                }
                _ => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
        let ((node, _), highest) = (any(&cluster), told.highest(log));
        if let Some(Answer::State { version, .. }) = cluster.read(node, &id(log)).await
            && version < highest
        {
            let what = format!("{} read version {version} of log {log}, after {highest} was acknowledged", name(node));
            told.wrong.lock().push(what);
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
