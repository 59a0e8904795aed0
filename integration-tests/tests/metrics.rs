//! What is counted, under the names that docs/observability.md gives.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    path::Path,
    time::Duration,
};

use common::{
    directory,
    observed::{CANARY, work},
};
use kuma_cluster::{Cookie, Node, NodeOptions};
use metrics_util::debugging::{DebugValue, DebuggingRecorder, Snapshotter};

fn snapshot(snapshotter: &Snapshotter) -> BTreeMap<String, u64> {
    let mut all = BTreeMap::new();
    for (key, _, _, value) in snapshotter.snapshot().into_vec() {
        assert!(!format!("{key:?}").contains(CANARY), "an id, a key or a payload in a label");
        let (name, labels) = (key.key().name().to_owned(), key.key().labels());
        let label =
            labels.filter(|label| matches!(label.key(), "result" | "from" | "reason")).map(|label| label.value());
        let name = label.fold(name, |name, value| format!("{name}/{value}"));
        let count = match value {
            DebugValue::Counter(count) => count,
            DebugValue::Gauge(gauge) => gauge.into_inner() as u64,
            DebugValue::Histogram(values) => values.len() as u64,
        };
        *all.entry(name).or_default() += count;
    }
    all
}

/// The runtime has one thread, on which the recorder is installed.
#[test]
fn everything_that_is_counted_is_documented_under_its_name() {
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    let dir = directory();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    metrics::with_local_recorder(&recorder, || runtime.block_on(work(dir.path(), false)));
    runtime.shutdown_timeout(Duration::from_secs(5));

    let counted = snapshot(&snapshotter);
    let expected = [
        ("kuma_writes_total/committed", 3),
        ("kuma_writes_total/repeated", 1),
        ("kuma_writes_total/rejected", 1),
        ("kuma_writes_total/refused", 1),
        ("kuma_writes_total/unknown", 0),
        ("kuma_write_seconds", 6),
        ("kuma_events_total", 3),
        ("kuma_activations_total/log", 1),
        ("kuma_activations_total/snapshot", 1),
        ("kuma_activation_seconds", 2),
        ("kuma_live_entities", 0),
        ("kuma_passivations_total", 2),
        ("kuma_scrub_passes_total", 1),
        ("kuma_scrub_bad_rows_total", 0),
        ("kuma_snapshots_ignored_total/schema", 0),
        ("kuma_commit_failures_total", 0),
        ("kuma_file_closed", 0),
    ];
    for (name, value) in expected {
        assert_eq!(counted.get(name), Some(&value), "{name}");
    }
    assert!(counted["kuma_commit_groups_total"] > 0 && counted["kuma_commit_seconds"] > 0);

    let name = |name: &String| name.split('/').next().unwrap().to_owned();
    let counted: BTreeSet<String> = counted.keys().map(name).collect();
    let documented: BTreeSet<String> = include_str!("../../docs/observability.md")
        .split(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_')
        // Those of the server are looked at by its own tests.
        .filter(|word| word.starts_with("kuma_") && !word.starts_with("kuma_http_") && !is_of_cluster(word))
        .map(str::to_owned)
        .collect();
    assert_eq!(counted, documented);
}

fn is_of_cluster(name: &str) -> bool {
    ["kuma_cluster_", "kuma_handoff", "kuma_peer_"].iter().any(|prefix| name.starts_with(prefix))
}

/// The same of a cluster: two nodes, of which one joins.
#[test]
fn everything_that_is_counted_of_a_cluster_is_documented_under_its_name() {
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    let (one, two) = (directory(), directory());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut counted = BTreeMap::new();
    metrics::with_local_recorder(&recorder, || {
        runtime.block_on(async {
            let cookie = Cookie::generate().unwrap();
            let options = |path: &Path, name: &str| {
                let options = NodeOptions::new(path, cookie.clone()).name(name).shards(1);
                options.listen((Ipv4Addr::LOCALHOST, 0).into())
            };
            let first = Node::start(options(one.path(), "one").found()).await.unwrap();
            let joins = options(two.path(), "two").seed_nodes([first.address().to_string()]);
            let second = Node::start(joins).await.unwrap();
            // A snapshot takes what histograms have had.
            let is_there = |counted: &BTreeMap<String, u64>| {
                let has = |name: &str| counted.get(name).is_some_and(|count| *count > 0);
                has("kuma_peer_up") && has("kuma_peer_sent_bytes_total") && has("kuma_handoffs_total/given")
            };
            let wait = async {
                while !is_there(&counted) {
                    for (name, count) in snapshot(&snapshotter) {
                        *counted.entry(name).or_default() += count;
                    }
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            };
            tokio::time::timeout(Duration::from_secs(120), wait).await.expect("no slot has moved");
            second.shutdown().await;
            first.shutdown().await;
        });
    });
    runtime.shutdown_timeout(Duration::from_secs(5));
    let name = |name: &String| name.split('/').next().unwrap().to_owned();
    let counted: BTreeSet<String> = counted.keys().map(name).filter(|name| is_of_cluster(name)).collect();
    let documented: BTreeSet<String> = include_str!("../../docs/observability.md")
        .split(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_')
        .filter(|word| is_of_cluster(word))
        .map(str::to_owned)
        .collect();
    assert_eq!(counted, documented);
}
