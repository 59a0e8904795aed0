//! A proxy that cuts connections at random places: before a request, within it, behind it, within its answer.
#![allow(dead_code, clippy::unwrap_used)]

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
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

/// What may be cut off of a connection.
#[derive(Clone, Copy, Debug)]
enum Cut {
    /// It is passed on as it is.
    Nowhere,
    /// Closed as soon as it is open.
    AtOnce,
    /// After so many bytes of what the client sends. The server may have more than one whole request by then.
    Up(usize),
    /// After so many bytes of what the server answers.
    Down(usize),
}

/// Ends, with all of its connections, when it is dropped.
pub(crate) struct Proxy {
    pub(crate) address: SocketAddr,
    server: Arc<Mutex<SocketAddr>>,
    cuts: Arc<AtomicU64>,
    _connections: JoinSet<()>,
}

impl Proxy {
    /// Cuts connections within their first `bytes_max` bytes of either direction, four of five.
    pub(crate) async fn start(server: SocketAddr, seed: u64, bytes_max: usize) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (server, cuts) = (Arc::new(Mutex::new(server)), Arc::<AtomicU64>::default());
        let mut connections = JoinSet::new();
        let (to, counted) = (server.clone(), cuts.clone());
        connections.spawn(async move {
            let mut random = StdRng::seed_from_u64(seed);
            let mut passing = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                let cut = match random.random_range(0..10) {
                    0..2 => Cut::Nowhere,
                    2 => Cut::AtOnce,
                    3..6 => Cut::Up(random.random_range(0..bytes_max)),
                    _ => Cut::Down(random.random_range(0..bytes_max)),
                };
                let (server, counted) = (*to.lock(), counted.clone());
                passing.spawn(async move {
                    if pass(client, server, cut).await {
                        counted.fetch_add(1, SeqCst);
                    }
                });
                while passing.try_join_next().is_some() {}
            }
        });
        Proxy { address, server, cuts, _connections: connections }
    }

    /// The server is elsewhere from now on.
    pub(crate) fn moved(&self, server: SocketAddr) {
        *self.server.lock() = server;
    }

    /// Connections that were cut so far.
    pub(crate) fn cuts(&self) -> u64 {
        self.cuts.load(SeqCst)
    }
}

/// Whether it was cut.
async fn pass(mut client: TcpStream, server: SocketAddr, cut: Cut) -> bool {
    if let Cut::AtOnce = cut {
        return true;
    }
    let Ok(mut server) = TcpStream::connect(server).await else { return false };
    let (mut from_client, mut to_client) = client.split();
    let (mut from_server, mut to_server) = server.split();
    let (up, down) = match cut {
        Cut::Up(bytes) => (bytes as u64, u64::MAX),
        Cut::Down(bytes) => (u64::MAX, bytes as u64),
        Cut::Nowhere | Cut::AtOnce => (u64::MAX, u64::MAX),
    };
    // With the first that ends both are closed. What the server took of a request that was cut off, it has.
    tokio::select! {
        was_cut = copy(&mut from_client, &mut to_server, up) => was_cut,
        was_cut = copy(&mut from_server, &mut to_client, down) => was_cut,
    }
}

/// Copies so many bytes; whether there were so many.
async fn copy(from: &mut (impl AsyncReadExt + Unpin), to: &mut (impl AsyncWriteExt + Unpin), mut bytes: u64) -> bool {
    let mut buffer = [0; 4096];
    loop {
        if bytes == 0 {
            return true;
        }
        let room = usize::try_from(bytes).unwrap_or(usize::MAX).min(buffer.len());
        match from.read(&mut buffer[..room]).await {
            Ok(read @ 1..) if to.write_all(&buffer[..read]).await.is_ok() => bytes -= read as u64,
            _ => return false,
        }
    }
}
