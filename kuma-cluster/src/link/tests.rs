//! What the links promise, between nodes of one process over real sockets.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
    time::timeout,
};

use super::*;

const LONG: Duration = Duration::from_secs(30);
const ECHO: u8 = 1;
const HANG: u8 = 2;
const LENGTH: u8 = 3;
const BREAK: u8 = 4;
const LONG_ANSWER: u8 = 5;

/// A user of the links.
struct Node {
    disk: DiskId,
    incarnation: u64,
    dislikes: Mutex<Option<DiskId>>,
    told: Mutex<Vec<(DiskId, Option<String>)>>,
    served: AtomicUsize,
}

impl Node {
    fn new(n: u8, incarnation: u64) -> Arc<Self> {
        let (disk, told) = (DiskId([n; 16]), Mutex::default());
        Arc::new(Node { disk, incarnation, dislikes: Mutex::default(), told, served: AtomicUsize::new(0) })
    }
}

impl Peers for Node {
    fn own(&self) -> DiskId {
        self.disk
    }

    fn hello(&self) -> Vec<u8> {
        [&self.disk.0[..], &self.incarnation.to_be_bytes()].concat()
    }

    fn admit(&self, hello: &[u8], _: Direction<'_>) -> Result<Admitted, String> {
        let (disk, rest) = hello.split_first_chunk().ok_or("no disk")?;
        let incarnation = u64::from_be_bytes(rest.try_into().map_err(|_| "no incarnation")?);
        let disk = DiskId(*disk);
        if disk == self.disk {
            return Err("a node cannot be its own peer".into());
        }
        if *self.dislikes.lock() == Some(disk) {
            return Err(format!("disk {disk} was removed from the cluster"));
        }
        Ok(Admitted { disk, incarnation })
    }

    fn up(&self, disk: DiskId) {
        self.told.lock().push((disk, None));
    }

    fn down(&self, disk: DiskId, why: &str) {
        self.told.lock().push((disk, Some(why.to_owned())));
    }

    fn serve(self: Arc<Self>, _: DiskId, kind: u8, body: Vec<u8>, _: Instant) -> BoxFuture<'static, Served> {
        self.served.fetch_add(1, Ordering::Relaxed);
        Box::pin(async move {
            match kind {
                ECHO => Served::Reply(body),
                HANG => std::future::pending().await,
                LENGTH => Served::Reply(body.len().to_string().into_bytes()),
                BREAK => panic!("on purpose"),
                LONG_ANSWER => Served::Reply(vec![5; 17 << 20]),
                _ => Served::Unknown,
            }
        })
    }
}

fn cookie() -> Cookie {
    Cookie::parse(&"5a".repeat(32)).unwrap()
}

/// A busy machine may stop a test for a while: silence is not what most of them are about.
fn patient() -> LinkLimits {
    LinkLimits { dead: LONG, handshake: Duration::from_secs(5), ..LinkLimits::default() }
}

fn options(limits: LinkLimits) -> LinkOptions {
    LinkOptions { listen: (Ipv4Addr::LOCALHOST, 0).into(), cookie: cookie(), limits }
}

async fn start(node: &Arc<Node>) -> Links {
    Links::start(options(patient()), node.clone()).await.unwrap()
}

async fn two() -> ([Arc<Node>; 2], [Links; 2]) {
    let nodes = [Node::new(1, 1), Node::new(2, 1)];
    let links = [start(&nodes[0]).await, start(&nodes[1]).await];
    links[0].dial(&links[1].local_addr().to_string()).await.unwrap();
    until(|| links[1].is_up(nodes[0].disk)).await;
    (nodes, links)
}

async fn until(mut is_true: impl FnMut() -> bool) {
    let due = Instant::now() + LONG;
    while !is_true() {
        assert!(Instant::now() < due, "it did not come true in time");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

async fn echo(links: &Links, to: &Node) {
    assert_eq!(links.call(to.disk, ECHO, b"hello".to_vec(), LONG).await.unwrap(), b"hello");
}

/// Passes bytes on between two sockets until it is told to swallow them.
async fn proxy(to: SocketAddr, is_hole: Arc<AtomicBool>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((near, _)) = listener.accept().await {
            let far = TcpStream::connect(to).await.unwrap();
            let ((near_read, near_write), (far_read, far_write)) = (near.into_split(), far.into_split());
            for (mut from, mut to) in [(near_read, far_write), (far_read, near_write)] {
                let is_hole = is_hole.clone();
                tokio::spawn(async move {
                    let mut bytes = vec![0; 65536];
                    while let Ok(read @ 1..) = from.read(&mut bytes).await {
                        if !is_hole.load(Ordering::Relaxed) && to.write_all(&bytes[..read]).await.is_err() {
                            return;
                        }
                    }
                    if is_hole.load(Ordering::Relaxed) {
                        std::future::pending::<()>().await;
                    }
                });
            }
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_are_answered_in_both_directions() {
    let (nodes, links) = two().await;
    echo(&links[0], &nodes[1]).await;
    echo(&links[1], &nodes[0]).await;
    assert_eq!(links[0].call_bulk(nodes[1].disk, LENGTH, vec![1; PIECE_BYTES], LONG).await.unwrap(), b"65536");
    links[0].cast(nodes[1].disk, ECHO, b"no answer".to_vec()).unwrap();
    until(|| nodes[1].served.load(Ordering::Relaxed) == 3).await;
    let peers = links[1].peers();
    assert!(peers.len() == 1 && peers[0].disk == nodes[0].disk && !peers[0].is_dialed && peers[0].bytes_received > 0);
    until(|| links[0].peers()[0].round_trip.is_some()).await;
    assert_eq!(links[0].call(DiskId([9; 16]), ECHO, vec![], LONG).await, Err(CallError::NotConnected));
}

#[allow(clippy::needless_range_loop)] // Each with each.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_nodes_of_one_process_reach_each_other_and_nobody_else() {
    let nodes = [Node::new(1, 1), Node::new(2, 1), Node::new(3, 1)];
    let links = [start(&nodes[0]).await, start(&nodes[1]).await, start(&nodes[2]).await];
    for (from, to) in [(0, 1), (1, 2), (2, 0)] {
        assert_eq!(links[from].dial(&links[to].local_addr().to_string()).await.unwrap(), nodes[to].disk);
    }
    for from in 0..3 {
        for to in (0..3).filter(|to| *to != from) {
            until(|| links[from].is_up(nodes[to].disk)).await;
            let before = nodes[to].served.load(Ordering::Relaxed);
            echo(&links[from], &nodes[to]).await;
            assert_eq!(nodes[to].served.load(Ordering::Relaxed), before + 1);
        }
    }
    links[1].stop().await;
    until(|| !links[0].is_up(nodes[1].disk) && !links[2].is_up(nodes[1].disk)).await;
    echo(&links[0], &nodes[2]).await;
    echo(&links[2], &nodes[0]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_cookie_is_refused_with_a_sentence_and_leaves_nothing_behind() {
    let (one, other) = (Node::new(1, 1), Node::new(2, 1));
    let links = start(&one).await;
    let cookie = Cookie::generate().unwrap();
    let stranger = Links::start(LinkOptions { cookie, ..options(patient()) }, other.clone()).await.unwrap();
    let places = || (links.0.shared.places.available_permits(), stranger.0.shared.places.available_permits());
    until(|| places() == (255, 255)).await; // each listens with one of them
    let before = places();
    for _ in 0..20 {
        let error = stranger.dial(&links.local_addr().to_string()).await.unwrap_err();
        assert!(matches!(error, DialError::WrongCookie), "{error}");
        assert!(error.to_string().contains("another cookie, or is no Kuma node"));
    }
    assert!(one.told.lock().is_empty() && links.0.shared.sessions.all().is_empty());
    until(|| places() == before).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_is_not_wanted_gets_the_sentence() {
    let (one, other) = (Node::new(1, 1), Node::new(2, 1));
    let (links, others) = (start(&one).await, start(&other).await);
    *one.dislikes.lock() = Some(other.disk);
    let DialError::Refused { by_peer } = others.dial(&links.local_addr().to_string()).await.unwrap_err() else {
        panic!("refused")
    };
    assert_eq!(by_peer, format!("disk {} was removed from the cluster", other.disk));
    let error = links.dial(&others.local_addr().to_string()).await.unwrap_err();
    assert!(matches!(&error, DialError::RefusedPeer { reason } if *reason == by_peer), "{error}");
    assert!(!links.is_up(other.disk) && !others.is_up(one.disk));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_dials_itself_is_told() {
    let one = Node::new(1, 1);
    let links = start(&one).await;
    let error = links.dial(&links.local_addr().to_string()).await.unwrap_err();
    assert!(matches!(&error, DialError::Refused { by_peer } if by_peer.contains("its own peer")), "{error}");
    assert!(links.peers().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_without_a_common_protocol_are_told_both_ranges() {
    let (old, new) = (Node::new(1, 1), Node::new(2, 1));
    let olds = start(&old).await;
    let news = Links::start_speaking(2..=3, options(patient()), new.clone()).await.unwrap();
    for (from, to) in [(&olds, &news), (&news, &olds)] {
        let error = from.dial(&to.local_addr().to_string()).await.unwrap_err().to_string();
        assert!(error.contains("1 to 1") && error.contains("2 to 3"), "{error}");
    }
    let between = Links::start_speaking(1..=2, options(patient()), Node::new(3, 1)).await.unwrap();
    between.dial(&olds.local_addr().to_string()).await.unwrap();
    between.dial(&news.local_addr().to_string()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_disk_than_the_expected_one_is_not_connected() {
    let (one, other) = (Node::new(1, 1), Node::new(2, 1));
    let (links, others) = (start(&one).await, start(&other).await);
    let address = others.local_addr().to_string();
    links.keep_connected(vec![Target { address: address.clone(), expect: Some(DiskId([7; 16])) }]);
    let failed = || links.dial_states().into_iter().find(|(at, _)| *at == address).map(|(_, state)| state);
    until(|| matches!(failed(), Some(DialState::Failed(why)) if why.contains("was expected"))).await;
    assert!(!links.is_up(other.disk));
    links.keep_connected(vec![Target { address: address.clone(), expect: Some(other.disk) }]);
    until(|| links.is_up(other.disk)).await;
    until(|| failed() == Some(DialState::Up(other.disk))).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn callers_of_a_peer_that_dies_are_told_and_it_is_back_when_it_restarts() {
    let (one, other) = (Node::new(1, 1), Node::new(2, 1));
    let (links, others) = (start(&one).await, start(&other).await);
    let address = others.local_addr();
    links.keep_connected(vec![Target { address: address.to_string(), expect: None }]);
    until(|| links.is_up(other.disk)).await;
    let calling = tokio::spawn({
        let (links, disk) = (links.clone(), other.disk);
        async move { links.call(disk, HANG, vec![], LONG).await }
    });
    until(|| other.served.load(Ordering::Relaxed) == 1).await;
    let killed = Instant::now();
    drop(others);
    let error = calling.await.unwrap().unwrap_err();
    assert!(error == CallError::Down && error.is_outcome_unknown());
    assert!(killed.elapsed() < Duration::from_secs(5), "{:?}", killed.elapsed());
    let again = Node::new(2, 2);
    let mut restarted = None;
    for _ in 0..1000 {
        let options = LinkOptions { listen: address, ..options(patient()) };
        match Links::start(options, again.clone()).await {
            Ok(started) => restarted = Some(started),
            Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
        }
        if restarted.is_some() {
            break;
        }
    }
    let restarted = restarted.unwrap();
    until(|| links.peers().first().is_some_and(|peer| peer.incarnation == 2)).await;
    echo(&links, &again).await;
    echo(&restarted, &one).await;
    until(|| matches!(&one.told.lock()[..], [(_, None), (_, Some(_)), (_, None)])).await;
}

/// The former process is stopped, or cut off: its connection is open, as far as anybody knows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_start_of_a_node_takes_over_from_the_former_one_and_that_one_is_refused() {
    let (one, former, newer) = (Node::new(5, 1), Node::new(2, 1), Node::new(2, 2));
    let links = start(&one).await;
    let (formers, newers) = (start(&former).await, start(&newer).await);
    let address = links.local_addr().to_string();
    formers.dial(&address).await.unwrap();
    newers.dial(&address).await.unwrap();
    until(|| links.peers().first().is_some_and(|peer| peer.incarnation == 2)).await;
    until(|| !formers.is_up(one.disk)).await;
    let error = formers.dial(&address).await.unwrap_err();
    assert!(matches!(&error, DialError::Refused { by_peer } if by_peer.contains("earlier start")), "{error}");
    echo(&newers, &one).await;
    echo(&links, &newer).await;
    // And the other way round: this node dials.
    let error = links.dial(&formers.local_addr().to_string()).await.unwrap_err();
    assert!(matches!(error, DialError::RefusedPeer { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silence_is_noticed() {
    let (one, other) = (Node::new(1, 1), Node::new(2, 1));
    let (links, others) = (
        Links::start(options(LinkLimits::default()), one.clone()).await.unwrap(),
        Links::start(options(LinkLimits::default()), other.clone()).await.unwrap(),
    );
    let is_hole = Arc::new(AtomicBool::new(false));
    let address = proxy(others.local_addr(), is_hole.clone()).await;
    links.dial(&address.to_string()).await.unwrap();
    until(|| others.is_up(one.disk)).await;
    is_hole.store(true, Ordering::Relaxed);
    let since = Instant::now();
    assert_eq!(links.call(other.disk, ECHO, vec![], LONG).await, Err(CallError::Down));
    println!("silence noticed after {:?}", since.elapsed());
    until(|| !others.is_up(one.disk)).await;
    assert!(since.elapsed() < Duration::from_secs(10));
    let heard_of = |(_, why): &(_, Option<String>)| why.as_ref().is_some_and(|why| why.contains("nothing was heard"));
    until(|| one.told.lock().last().is_some_and(heard_of)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sockets_that_say_nothing_block_nobody_and_are_closed() {
    let one = Node::new(1, 1);
    let limits = LinkLimits { handshake: Duration::from_secs(2), ..patient() };
    let links = Links::start(options(limits), one.clone()).await.unwrap();
    let mut silent = Vec::new();
    for _ in 0..100 {
        silent.push(TcpStream::connect(links.local_addr()).await.unwrap());
    }
    let others = start(&Node::new(2, 1)).await;
    let since = Instant::now();
    others.dial(&links.local_addr().to_string()).await.unwrap();
    assert!(since.elapsed() < Duration::from_secs(2), "it did not wait for them");
    for mut stream in silent {
        let ended = timeout(LONG, stream.read(&mut [0; 1])).await.unwrap();
        assert!(matches!(ended, Ok(0) | Err(_)));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_is_closed_at_once_and_hurts_nobody() {
    let (nodes, links) = two().await;
    let before = links[0].0.shared.places.available_permits();
    let garbage =
        [b"GET / HTTP/1.1\r\n\r\n".to_vec(), vec![0; 4], vec![255; 100_000], [&[0, 48][..], &[7; 48]].concat()];
    for bytes in garbage {
        let mut stream = TcpStream::connect(links[0].local_addr()).await.unwrap();
        let _ = stream.write_all(&bytes).await;
        let ended = timeout(LONG, stream.read(&mut [0; 1])).await.unwrap();
        assert!(matches!(ended, Ok(0) | Err(_)));
    }
    until(|| links[0].0.shared.places.available_permits() == before).await;
    echo(&links[1], &nodes[0]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_nodes_that_dial_each_other_at_once_end_with_one_link() {
    for round in 0..20 {
        let nodes = [Node::new(1, round), Node::new(2, round)];
        let links = [start(&nodes[0]).await, start(&nodes[1]).await];
        let addresses = [links[0].local_addr().to_string(), links[1].local_addr().to_string()];
        let dialed = tokio::join!(links[0].dial(&addresses[1]), links[1].dial(&addresses[0]));
        assert_eq!((dialed.0.unwrap(), dialed.1.unwrap()), (nodes[1].disk, nodes[0].disk));
        let ids = |at: usize| links[at].0.shared.sessions.all().iter().map(|session| session.id).collect::<Vec<_>>();
        until(|| {
            ids(0).len() == 1 && ids(0) == ids(1) && links[0].is_up(nodes[1].disk) && links[1].is_up(nodes[0].disk)
        })
        .await;
        echo(&links[0], &nodes[1]).await;
        echo(&links[1], &nodes[0]).await;
        for at in [0, 1] {
            assert_eq!(links[at].dial(&addresses[1 - at]).await.unwrap(), nodes[1 - at].disk, "it is there already");
        }
        let once = (ids(0), ids(1));
        echo(&links[0], &nodes[1]).await;
        assert_eq!((ids(0), ids(1)), once, "and stays");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn too_much_is_refused_and_what_is_queued_is_bounded() {
    let (one, other) = (Node::new(1, 1), Node::new(2, 1));
    let limits = LinkLimits { calls_max: 50, served_max: 20, queued_bytes_max: 1 << 20, ..patient() };
    let links = Links::start(options(limits), one.clone()).await.unwrap();
    let others = Links::start(options(limits), other.clone()).await.unwrap();
    let is_hole = Arc::new(AtomicBool::new(false));
    let address = proxy(others.local_addr(), is_hole.clone()).await;
    links.dial(&address.to_string()).await.unwrap();
    // More than the peer serves at a time.
    let mut calls = JoinSet::new();
    for _ in 0..40 {
        let (links, disk) = (links.clone(), other.disk);
        calls.spawn(async move { links.call(disk, HANG, vec![0; 100], Duration::from_secs(2)).await });
    }
    let outcomes = calls.join_all().await;
    assert_eq!(outcomes.iter().filter(|outcome| **outcome == Err(CallError::Overloaded)).count(), 20);
    assert_eq!(outcomes.iter().filter(|outcome| **outcome == Err(CallError::Deadline)).count(), 20);
    // More than there may wait for an answer, and more than may be queued while nothing is acknowledged.
    is_hole.store(true, Ordering::Relaxed);
    let mut calls = JoinSet::new();
    for _ in 0..1000 {
        let (links, disk) = (links.clone(), other.disk);
        calls.spawn(async move { links.call(disk, ECHO, vec![0; 100], Duration::from_secs(1)).await });
    }
    let overloaded =
        calls.join_all().await.into_iter().filter(|outcome| *outcome == Err(CallError::Overloaded)).count();
    assert_eq!(overloaded, 950);
    let mut refused = 0;
    for _ in 0..1000 {
        match links.cast(other.disk, ECHO, vec![0; 20_000]) {
            Ok(()) => tokio::task::yield_now().await,
            Err(error) => {
                assert_eq!(error, CallError::Overloaded);
                refused += 1;
            }
        }
    }
    // 20 MB were offered: the window and the queue take 1 MiB each, and one frame more.
    assert!(refused > 850, "{refused}");
    let session = links.0.shared.sessions.present(other.disk).unwrap();
    assert!(session.flow.load().0 <= (1 << 20) + 20_100, "{:?}", session.flow.load());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_message_arrives_whole_and_one_that_is_too_long_is_refused() {
    let (nodes, links) = two().await;
    let long: Vec<u8> = (0..5u32 << 20).map(|n| (n % 251) as u8).collect();
    assert!(links[0].call(nodes[1].disk, ECHO, long.clone(), LONG).await.unwrap() == long);
    let longest = vec![1; 16 << 20];
    assert_eq!(links[0].call(nodes[1].disk, LENGTH, longest, LONG).await.unwrap(), b"16777216");
    let error = links[0].call(nodes[1].disk, LENGTH, vec![1; 17 << 20], LONG).await.unwrap_err();
    assert!(matches!(error, CallError::TooLarge { bytes: 17825792, bytes_max: 16777216 }), "{error}");
    let error = links[0].call_bulk(nodes[1].disk, LENGTH, vec![1; PIECE_BYTES + 1], LONG).await.unwrap_err();
    assert!(matches!(error, CallError::TooLarge { .. }), "{error}");
    let error = links[0].call(nodes[1].disk, LONG_ANSWER, vec![], LONG).await.unwrap_err();
    assert!(error == CallError::ReplyDropped && error.is_outcome_unknown());
    echo(&links[0], &nodes[1]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_messages_and_small_ones_travel_beside_each_other() {
    let (nodes, links) = two().await;
    let mut calls = JoinSet::new();
    for n in 0..60usize {
        let (links, disk) = (links.clone(), nodes[1].disk);
        calls.spawn(async move {
            let body = vec![n as u8; n * 4_001];
            assert!(links[0].call(disk, ECHO, body.clone(), LONG).await.unwrap() == body);
            let chunk = vec![n as u8; n * 1000];
            assert!(links[0].call_bulk(disk, ECHO, chunk.clone(), LONG).await.unwrap() == chunk);
        });
    }
    calls.join_all().await;
    let session = links[0].0.shared.sessions.present(nodes[1].disk).unwrap();
    assert_eq!(session.flow.load(), (0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kind_that_the_peer_does_not_know_is_told() {
    let (nodes, links) = two().await;
    let error = links[0].call(nodes[1].disk, 99, vec![], LONG).await.unwrap_err();
    assert!(error == CallError::UnknownKind { kind: 99 } && !error.is_outcome_unknown());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_breaks_is_told_and_breaks_nothing_else() {
    let (nodes, links) = two().await;
    let error = links[0].call(nodes[1].disk, BREAK, vec![], LONG).await.unwrap_err();
    assert!(error == CallError::Failed && error.is_outcome_unknown());
    echo(&links[0], &nodes[1]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_drops_a_call_takes_its_entry_along() {
    let (nodes, links) = two().await;
    let error = links[0].call(nodes[1].disk, HANG, vec![], Duration::from_millis(50)).await.unwrap_err();
    assert_eq!(error, CallError::Deadline);
    let dropped = timeout(Duration::from_millis(50), links[0].call(nodes[1].disk, HANG, vec![], LONG)).await;
    assert!(dropped.is_err());
    let session = links[0].0.shared.sessions.present(nodes[1].disk).unwrap();
    assert_eq!(session.flow.load().1, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_stop_returns_the_port_is_free_and_peers_know() {
    let (nodes, links) = two().await;
    let address = links[0].local_addr();
    tokio::join!(links[0].stop(), links[0].stop());
    std::net::TcpListener::bind(address).unwrap();
    until(|| !links[1].is_up(nodes[0].disk)).await;
    assert!(matches!(links[0].dial(&links[1].local_addr().to_string()).await, Err(DialError::Stopped)));
    assert_eq!(links[0].call(nodes[1].disk, ECHO, vec![], LONG).await, Err(CallError::NotConnected));
    links[0].stop().await;
    assert!(matches!(&nodes[0].told.lock()[..], [(_, None), (_, Some(why))] if why.contains("stopping")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_that_is_taken_is_named() {
    let links = start(&Node::new(1, 1)).await;
    let taken = LinkOptions { listen: links.local_addr(), ..options(patient()) };
    let error = Links::start(taken, Node::new(2, 1)).await.err().unwrap().to_string();
    assert!(error.contains(&links.local_addr().to_string()), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_that_does_not_resolve_and_a_port_where_nobody_is_are_told() {
    let links = start(&Node::new(1, 1)).await;
    assert!(matches!(links.dial("no port").await, Err(DialError::Resolve { .. })));
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    assert!(matches!(links.dial(&format!("localhost:{}", free.port())).await, Err(DialError::Connect { .. })));
}

mod frames {
    //! Frames that no honest node sends at that moment, given to the router as they would come.

    use super::*;
    use crate::link::frame::{self, HEADER_BYTES, Header, Item, Op, SessionId};

    async fn given(change: impl FnOnce(&mut Header), items: &[Item<'_>]) -> (Arc<Node>, Links, Links) {
        let ([one, _], [links, others]) = two().await;
        let session = links.0.shared.sessions.all().remove(0);
        let mut bytes = vec![0; HEADER_BYTES];
        items.iter().for_each(|item| frame::put(&mut bytes, *item));
        // Behind what the session has sent by itself.
        until(|| session.flow.counters().round_trip.is_some()).await;
        let counters = session.flow.counters();
        let sent = counters.received + (bytes.len() - HEADER_BYTES) as u64;
        let mut header = Header { session: session.id, from: session.disk, sent, received: 0, clock_ms: 1000 };
        change(&mut header);
        frame::put_header(&mut bytes, &header);
        links.0.shared.router.cast(RouterMessage::Frame(bytes)).unwrap();
        (one, links, others)
    }

    fn request(deadline_ms: u64) -> Item<'static> {
        Item { op: Op::Request, code: ECHO, id: 1, deadline_ms, body: b"x" }
    }

    #[tokio::test]
    async fn a_request_in_time_is_served() {
        let (one, _links, _others) = given(|_| {}, &[request(9000)]).await;
        until(|| one.served.load(Ordering::Relaxed) == 1).await;
    }

    #[tokio::test]
    async fn a_request_after_its_deadline_is_not_served() {
        let (one, _links, _others) = given(|_| {}, &[request(1000), request(10), request(9000)]).await;
        until(|| one.served.load(Ordering::Relaxed) == 1).await;
        tokio::task::yield_now().await;
        assert_eq!(one.served.load(Ordering::Relaxed), 1, "the last one alone");
    }

    #[tokio::test]
    async fn a_frame_of_a_former_session_is_ignored() {
        let (one, links, others) = given(|header| header.session = SessionId([7; 16]), &[request(9000)]).await;
        // A request behind it is served, and the only one: the session of now was done no harm.
        let asked = others.call(one.disk, ECHO, vec![], LONG).await;
        assert_eq!((asked, one.served.load(Ordering::Relaxed)), (Ok(vec![]), 1));
        assert_eq!(links.peers().len(), 1);
    }

    #[allow(clippy::type_complexity)]
    #[tokio::test]
    async fn a_frame_that_does_not_fit_closes_the_session() {
        let part = Item { op: Op::Part, code: 0, id: 0, deadline_ms: 0, body: b"not the beginning of an item" };
        let changes: [(&dyn Fn(&mut Header), Item<'_>); 4] = [
            (&|header| header.sent += 1, request(9000)),
            (&|header| header.received = u64::MAX, request(9000)),
            (&|header| header.from = DiskId([9; 16]), request(9000)),
            (&|_| {}, part),
        ];
        for (change, item) in changes {
            let (one, links, _others) = given(change, &[item]).await;
            until(|| links.peers().is_empty()).await;
            let is_told = |(_, why): &(_, Option<String>)| why.as_ref().is_some_and(|why| why.contains("malformed"));
            until(|| one.told.lock().last().is_some_and(is_told)).await;
            assert_eq!(one.served.load(Ordering::Relaxed), 0);
        }
    }
}

/// Prints how many calls a second two nodes of one process make: `cargo test --release -p kuma-cluster -- --ignored --nocapture calls_per_second`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn calls_per_second() {
    let (nodes, links) = two().await;
    for callers in [1usize, 64, 256, 1024, 64, 256, 1024] {
        let before = links[0].peers()[0].bytes_sent;
        let (until, mut calls) = (Instant::now() + Duration::from_secs(2), JoinSet::new());
        for _ in 0..callers {
            let (links, disk) = (links[0].clone(), nodes[1].disk);
            calls.spawn(async move {
                let mut latencies = Vec::new();
                while Instant::now() < until {
                    let begun = Instant::now();
                    links.call(disk, LENGTH, vec![0; 200], LONG).await.unwrap();
                    latencies.push(begun.elapsed());
                }
                latencies
            });
        }
        let mut latencies = calls.join_all().await.concat();
        latencies.sort();
        let (n, at) = (latencies.len(), |q: usize| latencies[latencies.len() * q / 100]);
        let bytes = links[0].peers()[0].bytes_sent - before;
        println!("{callers} callers: {} calls/s, p50 {:?}, p99 {:?}, {bytes} bytes", n / 2, at(50), at(99));
    }
}
