//! A proxy that cuts connections at random: before a request, within it, behind it, and within the answer.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
};

use parking_lot::Mutex;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    task::{JoinHandle, JoinSet},
};

/// Where a connection is cut: behind so many bytes of what goes up or comes down.
#[derive(Clone, Copy, Debug)]
enum Cut {
    BeforeRequest,
    WithinRequest(u64),
    /// As soon as the server answers: it was done, and nobody hears of it.
    BehindRequest,
    WithinAnswer(u64),
    Never,
}

/// It cuts each connection, or the first few.
pub(crate) struct Proxy {
    pub(crate) address: SocketAddr,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

struct Shared {
    target: Mutex<SocketAddr>,
    random: Mutex<StdRng>,
    bytes_max: u64,
    /// How many connections are still to be cut.
    left: AtomicU64,
    connections: AtomicU64,
    /// By kind, in the order of [`Cut`].
    cuts: [AtomicU64; 4],
}

impl Proxy {
    /// Cuts every connection to `target`, behind `bytes_max` bytes of what comes down at the latest. It is for the clients to get through in
    /// spite of it.
    pub(crate) async fn start(target: SocketAddr, seed: u64, bytes_max: u64) -> Proxy {
        Proxy::cutting(target, seed, bytes_max, u64::MAX).await
    }

    /// Cuts the first so many connections.
    pub(crate) async fn cutting(target: SocketAddr, seed: u64, bytes_max: u64, connections: u64) -> Proxy {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            target: Mutex::new(target),
            random: Mutex::new(StdRng::seed_from_u64(seed)),
            bytes_max,
            left: connections.into(),
            connections: AtomicU64::new(0),
            cuts: Default::default(),
        });
        let task = tokio::spawn(accept(listener, shared.clone()));
        Proxy { address, shared, task }
    }

    /// From now on it connects to another server.
    pub(crate) fn point_to(&self, target: SocketAddr) {
        *self.shared.target.lock() = target;
    }

    pub(crate) fn connections(&self) -> u64 {
        self.shared.connections.load(SeqCst)
    }

    /// How many connections were cut: before a request, within it, behind it, within the answer.
    pub(crate) fn cuts(&self) -> [u64; 4] {
        std::array::from_fn(|kind| self.shared.cuts[kind].load(SeqCst))
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Shared {
    fn choose(&self) -> Cut {
        if self.left.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)).is_err() {
            return Cut::Never;
        }
        let mut random = self.random.lock();
        // As many small numbers as large ones.
        let below = self.bytes_max >> random.random_range(0..8);
        let bytes = random.random_range(1..below.max(2));
        // Most should come some way.
        match random.random_range(0..8) {
            0 => Cut::BeforeRequest,
            1 => Cut::BehindRequest,
            2..5 => Cut::WithinRequest(bytes),
            _ => Cut::WithinAnswer(bytes),
        }
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    // They end with the proxy.
    let mut carried = JoinSet::new();
    loop {
        let Ok((client, _)) = listener.accept().await else { return };
        shared.connections.fetch_add(1, SeqCst);
        carried.spawn(carry(client, shared.clone()));
        while carried.try_join_next().is_some() {}
    }
}

async fn carry(client: TcpStream, shared: Arc<Shared>) {
    let cut = shared.choose();
    let count = |kind: usize| shared.cuts[kind].fetch_add(1, SeqCst);
    let (up, down) = match cut {
        Cut::BeforeRequest => {
            count(0);
            return;
        }
        Cut::WithinRequest(bytes) => (bytes, shared.bytes_max),
        Cut::BehindRequest => (u64::MAX, 0),
        // Of a client that sends everything at once, nothing would get through with a limit here.
        Cut::WithinAnswer(bytes) => (u64::MAX, bytes),
        Cut::Never => (u64::MAX, u64::MAX),
    };
    let target = *shared.target.lock();
    let Ok(server) = TcpStream::connect(target).await else { return };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let ((client_read, client_write), (server_read, server_write)) = (client.into_split(), server.into_split());
    let down = async {
        let end = pump(server_read, client_write, down).await;
        if matches!(end, End::Cut) {
            count(if matches!(cut, Cut::BehindRequest) { 2 } else { 3 });
        }
        // Nothing is of use any more when the server has hung up.
        Err::<(), ()>(())
    };
    let up = async {
        match pump(client_read, server_write, up).await {
            End::Closed => Ok(()),
            End::Cut => {
                count(1);
                Err(())
            }
        }
    };
    // The first that fails drops the other, and with it the connections.
    let _ = tokio::try_join!(up, down);
}

enum End {
    Closed,
    Cut,
}

/// Passes on so many bytes. What comes behind them cuts the connection.
async fn pump(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut left: u64) -> End {
    let mut bytes = vec![0; 16 << 10];
    loop {
        let Ok(read @ 1..) = from.read(&mut bytes).await else { return End::Closed };
        let passed = usize::try_from(left).unwrap_or(usize::MAX).min(read);
        if to.write_all(&bytes[..passed]).await.is_err() {
            return End::Closed;
        }
        left -= passed as u64;
        if passed < read {
            return End::Cut;
        }
    }
}
