//! Connections that dawdle: each sends the head of a request, a byte now and then, and never its end.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context, Result};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
    time::{Instant, sleep_until},
};

const HEAD: &[u8] = b"GET /v1/status HTTP/1.1\r\nHost: localhost\r\nX-Slow: ";
/// Between two bytes of a connection.
const PACE: Duration = Duration::from_millis(250);

/// Connections until it is dropped. One that the server closes is opened again.
pub(crate) struct Dawdlers(#[expect(dead_code, reason = "they end with it")] JoinSet<()>);

impl Dawdlers {
    pub(crate) async fn start(url: &str, connections: u32) -> Result<Self> {
        let address: SocketAddr = url.trim_start_matches("http://").parse().context("the address of the server")?;
        let mut dawdlers = JoinSet::new();
        let begin = Instant::now();
        for n in 0..connections {
            let mut stream = TcpStream::connect(address).await.context("connections that dawdle (ulimit -n?)")?;
            // Not all at once.
            let first = begin + PACE * n / connections.max(1);
            dawdlers.spawn(async move {
                loop {
                    dawdle(&mut stream, first).await;
                    match TcpStream::connect(address).await {
                        Ok(next) => stream = next,
                        Err(_) => return,
                    }
                }
            });
        }
        Ok(Dawdlers(dawdlers))
    }
}

/// Until the server has enough of it.
async fn dawdle(stream: &mut TcpStream, mut next: Instant) {
    for byte in HEAD.iter().chain(std::iter::repeat(&b'x')) {
        let mut answer = [0; 256];
        tokio::select! {
            () = sleep_until(next) => {}
            // The server says nothing to such a client but that it was too slow.
            _ = stream.read(&mut answer) => return,
        }
        next = Instant::now() + PACE;
        if stream.write_all(&[*byte]).await.is_err() {
            return;
        }
    }
}
