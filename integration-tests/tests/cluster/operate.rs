//! What operators see of a cluster and do with it, and requests of an embedder that go to the owner of a slot.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    sync::{
        Arc, Weak,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use crate::common::directory;
use futures_util::future::BoxFuture;
use kuma_cluster::{
    Answer, Answered, AskError, Asked, ClusterEvent, HealthState, Migrate, Node, NodeError, Repeat, Standing, Told,
    slot_of_tag, testing::Hub,
};
use kuma_core::{SLOTS, Slot, Unavailable, slot_of};
use parking_lot::Mutex;

/// Longer than anything takes.
const LONG: Duration = Duration::from_secs(180);

async fn soon(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let wait = async {
        while !is_so().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(LONG, wait).await.unwrap_or_else(|_| panic!("waited in vain: {what}"));
}

/// Says who it is, and counts.
struct Counts {
    name: &'static str,
    asked: AtomicUsize,
}

impl Answer for Counts {
    fn answer(&self, asked: Asked) -> BoxFuture<'static, Answered> {
        self.asked.fetch_add(1, SeqCst);
        let answer = match asked.slot {
            Some(slot) => format!("{} {slot} {}", self.name, asked.body.len()),
            None => self.name.to_owned(),
        };
        Box::pin(async { Answered::Done(answer.into_bytes()) })
    }
}

fn counts(name: &'static str) -> Arc<Counts> {
    Arc::new(Counts { name, asked: AtomicUsize::new(0) })
}

async fn settled(nodes: &[&Node]) {
    soon("all slots are where they should be", async || {
        nodes.iter().all(|node| {
            let plan = node.plan();
            node.members().len() == nodes.len()
                && node.members().iter().all(|member| member.is_up && member.standing == Standing::Member)
                && plan.moves.is_empty()
                && plan.without_owner.is_empty()
                && node.is_settled()
        })
    })
    .await;
}

fn refusal<T: std::fmt::Debug>(result: Result<T, NodeError>) -> String {
    match result.unwrap_err() {
        NodeError::Refused { reason } => reason,
        other => panic!("{other}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_is_drained_and_forgotten_and_whoever_follows_is_told() {
    let (hub, directories) = (Hub::new(), [directory(), directory()]);
    let [one, two] = [counts("one"), counts("two")];
    let options = |n: usize, answer: &Arc<Counts>| {
        hub.node(directories[n].path()).context("bank").shards(2).name(answer.name).answer(answer.clone())
    };
    let first = Node::start(options(0, &one).found()).await.unwrap();
    soon("the founder is ready", async || first.is_ready()).await;
    assert_eq!(first.health().state, HealthState::Ok, "{:?}", first.health());
    assert!(first.plan().moves.is_empty() && first.plan().without_owner.is_empty());
    assert!(refusal(first.drain_node("one").await).contains("no other node could take the slots"));
    assert!(refusal(first.drain_node("nobody").await).contains("no node of this name"));
    assert!(refusal(first.forget("one").await).contains("ask another one"));

    let mut events = first.events();
    let told = Arc::new(Mutex::new(Vec::new()));
    let following = tokio::spawn({
        let told = told.clone();
        async move {
            while let Some(next) = events.next().await {
                match next {
                    Told::Happened(happened) => told.lock().push(happened.event),
                    other => panic!("{other:?}"),
                }
            }
        }
    });
    let has = |is: &dyn Fn(&ClusterEvent) -> bool| told.lock().iter().any(is);
    let second = Node::start(options(1, &two).seed_nodes([first.address().to_string()])).await.unwrap();
    soon("the second node is ready", async || second.is_ready()).await;
    settled(&[&first, &second]).await;
    let share = second.owned();
    let given = || told.lock().iter().filter(|event| matches!(event, ClusterEvent::MoveDone { .. })).count();
    soon("each move was told", async || given() == share).await;
    assert!(has(&|event| matches!(event, ClusterEvent::MemberJoined { name, .. } if name == "two")));
    assert!(has(
        &|event| matches!(event, ClusterEvent::StandingChanged { name, to: Standing::Member, .. } if name == "two")
    ));

    // Whoever is asked, the owner answers; also while the slot goes back and forth.
    let slot = slot_of_tag("t-1").unwrap();
    assert_eq!(slot, slot_of("any", "x{t-1}"));
    let within = Duration::from_secs(30);
    for to in ["one", "two", "one"] {
        first.migrate(Migrate::Pin { slot, to: to.to_owned() }).await.unwrap();
        let owner = if to == "one" { &first } else { &second };
        while !owner.is_here(slot) {
            for node in [&first, &second] {
                let answer = node.ask_owner(slot, vec![0; 7], within, Repeat::Never).await.unwrap();
                let name = node.name_of(answer.disk);
                assert_eq!(String::from_utf8(answer.body).unwrap(), format!("{name} {slot} 7"));
            }
        }
        let answer = second.ask_owner(slot, Vec::new(), within, Repeat::Safe).await.unwrap();
        assert_eq!(answer.body, format!("{to} {slot} 0").into_bytes());
    }
    first.migrate(Migrate::Unpin { slot }).await.unwrap();
    let asked = |node: &Node, name: &str| node.members().into_iter().find(|member| member.name == name).unwrap();
    let disk = asked(&first, "two").disk;
    assert_eq!(first.ask_node(disk, Vec::new(), within).await.unwrap(), b"two");
    let large = first.ask_owner(slot, vec![0; 3 << 20], within, Repeat::Safe).await.unwrap();
    assert!(large.body.ends_with(b" 3145728"));

    // Drained by whoever is asked, it owns nothing; and something again when that is taken back.
    settled(&[&first, &second]).await;
    let plan = first.plan_without([second.id()]);
    assert_eq!((plan.moves.len(), plan.nodes[1].gives), (share, share));
    first.drain_node("two").await.unwrap();
    soon("the drained node owns nothing", async || second.owned() == 0 && second.moves().is_empty()).await;
    assert_eq!(first.owned(), usize::from(SLOTS));
    assert!(refusal(first.migrate(Migrate::Pin { slot, to: "two".to_owned() }).await).contains("it is drained"));
    assert!(refusal(first.forget("two").await).contains("is up"));
    first.undrain_node(&second.id().to_string()).await.unwrap();
    settled(&[&first, &second]).await;
    assert_eq!(second.owned(), share);

    // It goes without being drained: what it owns waits for it, and it is said.
    let its_slot = (0..u64::from(SLOTS)).map(Slot::new).find(|slot| second.is_here(*slot)).unwrap();
    second.shutdown().await;
    let unreachable = first.ask_owner(its_slot, Vec::new(), within, Repeat::Never).await;
    assert!(
        matches!(&unreachable, Err(AskError::Unavailable(Unavailable::OwnerUnreachable { node, .. })) if node == "two"),
        "{unreachable:?}"
    );
    let health = first.health();
    assert_eq!((health.state, health.reasons[0].code), (HealthState::Unavailable, "unreachable"));
    assert_eq!((health.reasons[0].slots, health.reasons[0].node.as_deref()), (share, Some("two")));
    assert!(has(&|event| matches!(event, ClusterEvent::MemberDown { name, .. } if name == "two")));
    first.forget("two").await.unwrap();
    assert_eq!(first.members().len(), 1);
    assert!(first.health().reasons.iter().any(|reason| reason.code == "without_owner" && reason.slots == share));
    assert!(first.plan().moves.is_empty(), "what it owns stays with it");
    assert!(has(&|event| matches!(event, ClusterEvent::MemberLeft { name, .. } if name == "two")));
    first.shutdown().await;
    following.await.unwrap();
}

/// Loses the link to whoever asks, when it has done what it was asked.
struct Cuts {
    hub: Hub,
    pair: Mutex<Option<(std::net::SocketAddr, std::net::SocketAddr)>>,
    asked: AtomicUsize,
    me: Weak<Cuts>,
}

impl Answer for Cuts {
    fn answer(&self, _: Asked) -> BoxFuture<'static, Answered> {
        self.asked.fetch_add(1, SeqCst);
        let me = self.me.upgrade();
        Box::pin(async move {
            if let Some(me) = me
                && let Some((one, other)) = me.pair.lock().take()
            {
                me.hub.cut(one, other, true);
                me.hub.cut(one, other, false);
            }
            Answered::Done(b"done".to_vec())
        })
    }
}

/// What may not happen twice is sent once, and its outcome is unknown if the answer does not come; what may is asked again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_may_not_happen_twice_is_asked_once_when_the_link_breaks() {
    let (hub, directories) = (Hub::new(), [directory(), directory()]);
    let cuts = Arc::new_cyclic(|me| Cuts {
        hub: hub.clone(),
        pair: Mutex::new(None),
        asked: AtomicUsize::new(0),
        me: me.clone(),
    });
    let options = |n: usize, name: &str| hub.node(directories[n].path()).context("bank").shards(2).name(name);
    let first = Node::start(options(0, "one").answer(cuts.clone()).found()).await.unwrap();
    let seeds = [first.address().to_string()];
    let second = Node::start(options(1, "two").answer(counts("two")).seed_nodes(seeds)).await.unwrap();
    soon("the second node is ready", async || second.is_ready()).await;
    settled(&[&first, &second]).await;
    let slot = (0..u64::from(SLOTS)).map(Slot::new).find(|slot| first.is_here(*slot)).unwrap();
    for (repeat, times) in [(Repeat::Never, 1), (Repeat::Safe, 2), (Repeat::Read, 2)] {
        soon("they are linked", async || second.members().iter().all(|member| member.is_up)).await;
        *cuts.pair.lock() = Some((first.address(), second.address()));
        cuts.asked.store(0, SeqCst);
        let answer = second.ask_owner(slot, Vec::new(), Duration::from_secs(30), repeat).await;
        match repeat {
            Repeat::Never => assert!(matches!(answer, Err(AskError::Unknown { .. })), "{answer:?}"),
            Repeat::Safe | Repeat::Read => assert_eq!(answer.unwrap().body, b"done"),
        }
        assert_eq!(cuts.asked.load(SeqCst), times);
    }
    second.shutdown().await;
    first.shutdown().await;
}
