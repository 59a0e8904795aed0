//! A node in a process of its own, which `tests/cluster/handoff_crash.rs` kills, and stops for a while.
//!
//! `cluster_child DIRECTORY NAME COOKIE found|again|SEED [PLACE...]`: takes questions from its standard input and answers on its standard output
//! ([`integration_tests::cluster_child`]). It waits at each PLACE when it gets there first. It ends with its standard input. From its environment it
//! takes `CHILD_CONTEXT`, `CHILD_LISTEN` and `CHILD_ADVERTISE`.
// This is test code: a failed unwrap ends the child, which the parent takes for the failure that it is.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

use std::{
    io::Write,
    net::Ipv4Addr,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Duration,
};

use integration_tests::cluster_child::{Answer, Ask, Log, LogEvent, Question, Said, SlotNow, Status};
use kuma_cluster::{Cookie, Node, NodeOptions};
use kuma_core::{AppendError, ReadError, Slot, SlotRecord, SqlProjection, Token, Unavailable, rusqlite::types::Value};
use tokio::io::{AsyncBufReadExt, BufReader};

/// A number that is applied twice is there twice.
const NOTED: &str = "
    -- projection: noted
    -- version: 1
    -- erasure: column noted.log
    CREATE TABLE noted(log TEXT NOT NULL, version INTEGER NOT NULL, number INTEGER NOT NULL) STRICT;

    -- on log.Noted
    INSERT INTO noted(log, version, number) VALUES (:entity, :version, :data ->> 'number');
";

fn say(said: &Said) {
    // Standard output is line-buffered: a line with its end is one write.
    let line = serde_json::to_string(said).unwrap() + "\n";
    std::io::stdout().lock().write_all(line.as_bytes()).unwrap();
}

/// Where the process waits.
#[derive(Default)]
struct Barrier {
    goes_on: Mutex<u64>,
    changed: Condvar,
}

impl Barrier {
    /// Whoever comes to the place first says so, and waits.
    fn arm(self: &Arc<Self>, place: String) {
        let (barrier, is_reached, name) = (self.clone(), AtomicBool::new(false), place.clone());
        fail::cfg_callback(place, move || {
            if !is_reached.swap(true, SeqCst) {
                // What else this thread had to do is done by others meanwhile: the links live on.
                tokio::task::block_in_place(|| barrier.wait(&name));
            }
        })
        .unwrap();
    }

    fn wait(&self, place: &str) {
        let mut goes_on = self.goes_on.lock().unwrap();
        let before = *goes_on;
        say(&Said::At { place: place.to_owned() });
        while *goes_on == before {
            goes_on = self.changed.wait(goes_on).unwrap();
        }
    }

    fn go_on(&self) {
        *self.goes_on.lock().unwrap() += 1;
        self.changed.notify_all();
    }
}

#[tokio::main(flavor = "multi_thread", worker_threads = 4)]
async fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [directory, name, cookie, how, places @ ..] = &arguments[..] else { unreachable!("four arguments") };
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).with_env_filter("kuma=info").init();
    let barrier = Arc::new(Barrier::default());
    places.iter().for_each(|place| barrier.arm(place.clone()));
    let given = |name: &str| std::env::var(name).ok();
    let listen = given("CHILD_LISTEN").map(|address| address.parse().unwrap());
    let options = NodeOptions::new(directory, Cookie::parse(cookie).unwrap())
        .listen(listen.unwrap_or((Ipv4Addr::LOCALHOST, 0).into()))
        .context(given("CHILD_CONTEXT").unwrap_or("crash".to_owned()))
        .name(name)
        .shards(2)
        .entity::<Log>();
    let options = match how.as_str() {
        "found" => options.found(),
        "again" => options,
        seed => options.seed_nodes([seed]),
    };
    let options = match given("CHILD_ADVERTISE") {
        Some(address) => options.advertise(address),
        None => options,
    };
    let node = match Node::start(options).await {
        Ok(node) => node,
        Err(error) => return eprintln!("not started: {error}"),
    };
    say(&Said::Up { address: node.address().to_string() });
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    while let Some(line) = lines.next_line().await.unwrap() {
        let Question { number, ask } = serde_json::from_str(&line).unwrap();
        let (node, barrier) = (node.clone(), barrier.clone());
        tokio::spawn(async move {
            let is_end = matches!(ask, Ask::Stop);
            let answer = answer(&node, &barrier, ask).await;
            say(&Said::Answer { number, answer });
            if is_end {
                std::process::exit(0);
            }
        });
    }
}

async fn answer(node: &Node, barrier: &Arc<Barrier>, ask: Ask) -> Answer {
    match ask {
        Ask::Append { id, number, within_ms } => {
            let handle = node.entity::<Log>(&id).within(Duration::from_millis(within_ms));
            match handle.append(LogEvent::Noted { number }).idempotency_key(number.to_be_bytes()).await {
                Ok(version) => Answer::Appended { version: version.0 },
                Err(AppendError::Unavailable(unavailable)) => unreachable_or(unavailable),
                Err(error) => Answer::Failed(error.to_string()),
            }
        }
        Ask::Read { id, within_ms } => {
            let handle = node.entity::<Log>(&id).within(Duration::from_millis(within_ms));
            match handle.read().await {
                Ok((state, version)) => Answer::State { version: version.0, seen: state.seen },
                Err(ReadError::Unavailable(unavailable)) => unreachable_or(unavailable),
                Err(error) => Answer::Failed(error.to_string()),
            }
        }
        Ask::Pin { slot, node: name } => {
            let to = node.members().into_iter().find(|member| member.name == name).map(|member| member.node);
            node.pin(Slot::new(slot), to).await.unwrap();
            Answer::Done
        }
        Ask::Attest { node: name } => {
            let gone = node.members().into_iter().find(|member| member.name == name).unwrap();
            match node.attest_destroyed(gone.node).await {
                Ok(()) => Answer::Done,
                Err(error) => Answer::Failed(error.to_string()),
            }
        }
        Ask::Arm { place } => {
            barrier.arm(place);
            Answer::Done
        }
        Ask::GoOn => {
            barrier.go_on();
            Answer::Done
        }
        Ask::Status => Answer::Status(status(node)),
        Ask::Slot { slot } => Answer::Slot(slot_now(node.store().slots().record(Slot::new(slot)).unwrap())),
        Ask::Verify => match node.store().verify(|_| {}).await {
            Ok(report) if report.is_clean() => Answer::Done,
            Ok(report) => Answer::Failed(format!("{report:?}")),
            Err(error) => Answer::Failed(error.to_string()),
        },
        Ask::Project => match node.store().projection(SqlProjection::parse(NOTED).unwrap()).await {
            Ok(_) => Answer::Done,
            Err(error) => Answer::Failed(error.to_string()),
        },
        Ask::Model => {
            let projection = node.store().find_projection("noted").unwrap();
            match projection.caught_up(Duration::from_secs(60)).await {
                Ok(()) => {}
                Err(error) => return Answer::Failed(error.to_string()),
            }
            let rows = "SELECT log, json_group_array(number ORDER BY version) FROM noted GROUP BY log";
            let answer = projection.query(rows).run().await.unwrap();
            let text = |value: &Value| if let Value::Text(text) = value { text.clone() } else { String::new() };
            let row = |row: &Vec<Value>| (text(&row[0]), serde_json::from_str(&text(&row[1])).unwrap());
            Answer::Model(answer.rows.iter().map(row).collect())
        }
        Ask::Stop => {
            node.shutdown().await;
            Answer::Done
        }
    }
}

fn unreachable_or(unavailable: Unavailable) -> Answer {
    match unavailable {
        Unavailable::OwnerUnreachable { node, .. } => Answer::Unreachable { node },
        other => Answer::Failed(other.to_string()),
    }
}

fn slot_now(record: SlotRecord) -> SlotNow {
    match record.token {
        Token::Owned(_) => SlotNow::Owned,
        _ if record.staged.is_some() => SlotNow::Staged,
        Token::None => SlotNow::None,
        Token::Released { is_taken: false, .. } => SlotNow::Released,
        Token::Released { is_taken: true, .. } => SlotNow::Taken,
    }
}

fn status(node: &Node) -> Status {
    let members = node.members();
    let records = node.store().slots().records();
    let number_of = |now: fn(&SlotRecord) -> bool| records.iter().filter(|(_, record)| now(record)).count();
    Status {
        is_ready: node.is_ready(),
        is_settled: node.is_settled(),
        up: members.iter().filter(|member| member.is_up).map(|member| member.name.clone()).collect(),
        owned: node.store().slots().owned().into_iter().map(|(slot, _)| slot.number().into()).collect(),
        wished: members.iter().find(|member| member.is_own).map_or(0, |own| own.wished),
        staged: number_of(|record| record.staged.is_some()),
        granted: number_of(|record| matches!(record.token, Token::Released { is_taken: false, .. })),
        aborted: node.move_totals().aborted,
    }
}
