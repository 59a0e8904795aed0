//! A proxy in front of a node: it passes bytes on, or stops, or leads elsewhere.
#![allow(dead_code, clippy::unwrap_used)]

use std::{net::SocketAddr, sync::Arc};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::{JoinHandle, JoinSet},
};

/// What it does with connections.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Passage {
    Open(SocketAddr),
    /// Bytes stay where they are, and nobody is told.
    Shut,
    /// New connections are closed.
    Nowhere,
}

/// See the module.
pub(crate) struct Gate {
    pub(crate) address: SocketAddr,
    passage: Arc<watch::Sender<Passage>>,
    task: JoinHandle<()>,
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Gate {
    /// It leads nowhere yet.
    pub(crate) async fn new() -> Gate {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let passage = Arc::new(watch::Sender::new(Passage::Nowhere));
        let state = passage.clone();
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((near, _)) = listener.accept().await {
                connections.spawn(pass(near, state.subscribe()));
                while connections.try_join_next().is_some() {}
            }
        });
        Gate { address, passage, task }
    }

    /// From now on it leads there. Connections that lead elsewhere are closed.
    pub(crate) fn open(&self, to: SocketAddr) {
        self.passage.send_replace(Passage::Open(to));
    }

    /// Nothing passes any more, and no connection is closed.
    pub(crate) fn shut(&self) {
        self.passage.send_replace(Passage::Shut);
    }
}

async fn pass(near: TcpStream, mut passage: watch::Receiver<Passage>) {
    let open = passage.wait_for(|passage| *passage != Passage::Shut).await;
    let Ok(Passage::Open(to)) = open.map(|passage| *passage) else { return };
    let Ok(far) = TcpStream::connect(to).await else { return };
    let ((near_read, near_write), (far_read, far_write)) = (near.into_split(), far.into_split());
    let mut directions = JoinSet::new();
    for (mut from, mut into) in [(near_read, far_write), (far_read, near_write)] {
        let mut passage = passage.clone();
        directions.spawn(async move {
            let mut bytes = vec![0; 65536];
            while let Ok(read @ 1..) = from.read(&mut bytes).await {
                let open = passage.wait_for(|passage| *passage != Passage::Shut).await.map(|passage| *passage);
                if open.ok() != Some(Passage::Open(to)) || into.write_all(&bytes[..read]).await.is_err() {
                    return;
                }
            }
        });
    }
    tokio::select! {
        // One direction that is over takes the other one along.
        _ = directions.join_next() => {}
        _ = passage.wait_for(|passage| !matches!(passage, Passage::Shut) && *passage != Passage::Open(to)) => {}
    }
}
