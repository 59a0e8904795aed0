//! Accounts of a bank, on nodes that a hub links, and those who pay into them while the nodes come and go.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

use crate::nodes::{self, soon};
use kuma_cluster::{Node, testing::Hub};
use kuma_core::{NewEvent, Slot, slot_of};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::json;
use tokio::task::JoinHandle;

pub(crate) async fn start(hub: &Hub, path: &Path, name: &str, seeds: &[&Node]) -> Node {
    let is_new = !path.join("store.json").exists();
    nodes::start(hub.node(path).context("bank").name(name).shards(2), is_new, seeds).await
}

pub(crate) fn event(amount: u64) -> NewEvent {
    NewEvent::json("Deposited", &json!({ "amount": amount })).unwrap()
}

pub(crate) fn id(number: u64) -> String {
    format!("acc-{number}")
}

/// An account whose slot this node owns.
pub(crate) fn account_of(node: &Node) -> String {
    let owned: Vec<Slot> = node.store().slots().owned().into_iter().map(|(slot, _)| slot).collect();
    (0..).map(id).find(|id| owned.contains(&slot_of("account", id))).unwrap()
}

/// Those who pay in, each event once.
pub(crate) struct Writers {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    writers: Vec<JoinHandle<()>>,
}

impl Writers {
    /// So many, at `node`, into the first `accounts`.
    pub(crate) fn start(node: &Node, writers: u64, accounts: u64, seed: u64) -> Self {
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let writer = |number: u64| {
            let (stop, done, node) = (stop.clone(), done.clone(), node.clone());
            let mut random = StdRng::seed_from_u64(seed ^ number << 20);
            tokio::spawn(async move {
                while !stop.load(SeqCst) {
                    let key: [u8; 16] = random.random();
                    let account = id(random.random_range(0..accounts));
                    while node.raw("account", &account).append(event(1)).idempotency_key(key).await.is_err() {
                        // That an owner is out of reach is said at once.
                        tokio::time::sleep(Duration::from_millis(5)).await;
                    }
                    done.fetch_add(1, SeqCst);
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
            })
        };
        let writers = (0..writers).map(writer).collect();
        Writers { stop, done, writers }
    }

    /// Waits until so many more events are acknowledged.
    pub(crate) async fn more(&self, count: u64) {
        let wanted = self.done.load(SeqCst) + count;
        soon("more is written", async || self.done.load(SeqCst) >= wanted).await;
    }

    /// Ends them; how many events are acknowledged.
    pub(crate) async fn stop(self) -> u64 {
        self.stop.store(true, SeqCst);
        for writer in self.writers {
            writer.await.unwrap();
        }
        self.done.load(SeqCst)
    }
}
