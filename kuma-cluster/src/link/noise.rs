//! The encrypted connection: Noise over TCP, in both directions or not at all.
//!
//! ```text
//! record   length u16 | that many bytes: a message of the handshake first, ciphertext after it; an empty plaintext keeps the link alive
//! ```
//!
//! `Noise_NNpsk0_25519_AESGCM_SHA256`: who does not have the key learns nothing, and gets no further than the first message. Both ends make a key of
//! their own for each connection, so a cookie that leaks later does not open what was recorded.
//!
//! Invariants:
//! - Records are sealed in the order in which they are written: sealing and appending are one step under one lock.
//! - Nothing is taken from the socket after a silence of [`Pace::dead`], not even what waits there: the peer has given this link up by then, and
//!   would not expect that its requests are still carried out.
//! - Once a link is closed, reading and writing fail at once; nobody waits for a peer that does not read.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use futures_util::task::AtomicWaker;
use parking_lot::Mutex;
use ractor_cluster::{BoxRead, BoxWrite, ClusterBidiStream};
use snow::{Builder, StatelessTransportState};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    time::{Instant, Sleep},
};

use super::frame::SessionId;

const SUITE: &str = "Noise_NNpsk0_25519_AESGCM_SHA256";
/// Another one means another way of shaking hands: such nodes do not understand each other at all.
const PROLOGUE: &[u8] = b"kuma link 1";
/// An ephemeral key and a tag: both messages of the handshake have exactly this.
const HANDSHAKE_BYTES: usize = 48;
const RECORD_BYTES: usize = 65_535;
const TAG_BYTES: usize = 16;
const PLAIN_BYTES: usize = RECORD_BYTES - TAG_BYTES;
/// Records that are sealed in one go.
const RECORDS: usize = 4;

/// How often a sign of life is sent, and how long none may come.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    pub(super) keepalive: Duration,
    pub(super) dead: Duration,
}

/// Why a handshake came to nothing.
#[derive(Debug, thiserror::Error)]
pub(super) enum HandshakeError {
    /// Another cookie, another protocol, or the connection ended at once, which is what another cookie looks like from the dialing side.
    #[error("the other node has another cookie, or is no Kuma node")]
    Foreign,
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// An encrypted connection that is not handed over yet.
pub(super) struct Secure {
    stream: TcpStream,
    keys: Arc<StatelessTransportState>,
    sealed: u64,
    opened: u64,
    id: SessionId,
}

/// Shakes hands, as the side that dialed or as the other one. No limit of time of its own.
pub(super) async fn handshake(mut stream: TcpStream, key: &[u8; 32], dialed: bool) -> Result<Secure, HandshakeError> {
    let builder = SUITE.parse().map(Builder::new).map_err(|_| HandshakeError::Foreign)?;
    let builder = builder.prologue(PROLOGUE).and_then(|builder| builder.psk(0, key)).map_err(foreign)?;
    let mut noise = if dialed { builder.build_initiator() } else { builder.build_responder() }.map_err(foreign)?;
    for is_ours in [dialed, !dialed] {
        let mut message = [0; HANDSHAKE_BYTES];
        if is_ours {
            noise.write_message(&[], &mut message).map_err(foreign)?;
            let mut record = (HANDSHAKE_BYTES as u16).to_be_bytes().to_vec();
            record.extend(message);
            stream.write_all(&record).await?;
        } else {
            let length = stream.read_u16().await.map_err(ended)?;
            if usize::from(length) != HANDSHAKE_BYTES {
                return Err(HandshakeError::Foreign);
            }
            stream.read_exact(&mut message).await.map_err(ended)?;
            noise.read_message(&message, &mut []).map_err(foreign)?;
        }
    }
    let id = noise.get_handshake_hash().first_chunk().copied().map(SessionId).ok_or(HandshakeError::Foreign)?;
    let keys = Arc::new(noise.into_stateless_transport_mode().map_err(foreign)?);
    Ok(Secure { stream, keys, sealed: 0, opened: 0, id })
}

fn foreign(_: snow::Error) -> HandshakeError {
    HandshakeError::Foreign
}

fn ended(error: io::Error) -> HandshakeError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
            HandshakeError::Foreign
        }
        _ => HandshakeError::Io(error),
    }
}

fn broken(error: snow::Error) -> io::Error {
    // Not the error itself: what exactly failed is for an attacker only.
    let _ = error;
    io::Error::new(io::ErrorKind::InvalidData, "a record could not be sealed or opened")
}

impl Secure {
    pub(super) fn id(&self) -> SessionId {
        self.id
    }

    /// Sends a message of any length.
    pub(super) async fn send(&mut self, message: &[u8]) -> io::Result<()> {
        let mut plain = (message.len() as u32).to_be_bytes().to_vec();
        plain.extend(message);
        for chunk in plain.chunks(PLAIN_BYTES) {
            let mut record = vec![0; 2 + chunk.len() + TAG_BYTES];
            let length = self.keys.write_message(self.sealed, chunk, &mut record[2..]).map_err(broken)?;
            record[..2].copy_from_slice(&(length as u16).to_be_bytes());
            self.sealed += 1;
            self.stream.write_all(&record).await?;
        }
        Ok(())
    }

    /// Receives a message of at most `bytes_max`. Takes no byte of what comes after it.
    pub(super) async fn receive(&mut self, bytes_max: usize) -> io::Result<Vec<u8>> {
        let (mut message, mut opened) = (Vec::new(), vec![0; RECORD_BYTES]);
        loop {
            let length = self.stream.read_u16().await?;
            let mut record = vec![0; usize::from(length)];
            self.stream.read_exact(&mut record).await?;
            let length = self.keys.read_message(self.opened, &record, &mut opened).map_err(broken)?;
            self.opened += 1;
            message.extend_from_slice(&opened[..length]);
            let Some((announced, body)) = message.split_first_chunk::<4>() else { continue };
            let announced = u32::from_be_bytes(*announced) as usize;
            if announced > bytes_max || body.len() > announced {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "a message is longer than it may be"));
            }
            if body.len() == announced {
                return Ok(body.to_vec());
            }
        }
    }

    /// Makes it what ractor_cluster reads and writes, and begins to send signs of life.
    pub(super) fn into_stream(self, pace: Pace, life: Arc<Life>) -> NoiseStream {
        let (read, write) = self.stream.into_split();
        let outgoing = Outgoing {
            half: write,
            keys: self.keys.clone(),
            nonce: self.sealed,
            buffer: vec![0; RECORDS * (2 + RECORD_BYTES)].into(),
            start: 0,
            end: 0,
        };
        let outgoing = Arc::new(Mutex::new(outgoing));
        tokio::spawn(keep_alive(Arc::downgrade(&outgoing), pace.keepalive));
        *life.heard.lock() = Some(Instant::now());
        let reader = NoiseReader {
            half: read,
            keys: self.keys,
            nonce: self.opened,
            raw: vec![0; 2 * (2 + RECORD_BYTES)].into(),
            start: 0,
            end: 0,
            plain: vec![0; RECORD_BYTES].into(),
            given: 0,
            opened: 0,
            dead: pace.dead,
            seen: Instant::now(),
            idle: Box::pin(tokio::time::sleep(pace.dead)),
            life: life.clone(),
        };
        NoiseStream { id: self.id, reader, writer: NoiseWriter { outgoing, life } }
    }
}

/// Whether a link is open, and why it is not; shared by all that have a hand on it.
#[derive(Default)]
pub(super) struct Life {
    closed: AtomicBool,
    why: Mutex<Option<String>>,
    heard: Mutex<Option<Instant>>,
    reader: AtomicWaker,
    writer: AtomicWaker,
}

impl Life {
    /// Closes it. The first reason counts.
    pub(super) fn close(&self, why: impl Into<String>) {
        self.why.lock().get_or_insert_with(|| why.into());
        self.closed.store(true, Ordering::Release);
        self.reader.wake();
        self.writer.wake();
    }

    /// When something came from the peer last; none before anything has.
    pub(super) fn heard(&self) -> Option<Instant> {
        *self.heard.lock()
    }

    /// Why it was closed.
    pub(super) fn why(&self) -> Option<String> {
        self.why.lock().clone()
    }

    fn check(&self, waker: &AtomicWaker, context: &Context<'_>) -> io::Result<()> {
        waker.register(context.waker());
        if self.closed.load(Ordering::Acquire) {
            return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the link is closed"));
        }
        Ok(())
    }

    fn fail(&self, error: io::Error, why: &str) -> io::Error {
        self.close(why);
        error
    }
}

/// What ractor_cluster gets.
pub(super) struct NoiseStream {
    id: SessionId,
    reader: NoiseReader,
    writer: NoiseWriter,
}

impl ClusterBidiStream for NoiseStream {
    fn split(self: Box<Self>) -> (BoxRead, BoxWrite) {
        (Box::new(self.reader), Box::new(self.writer))
    }

    /// What the events of ractor_cluster name the session by.
    fn peer_label(&self) -> Option<String> {
        Some(self.id.to_string())
    }
}

struct NoiseReader {
    half: OwnedReadHalf,
    keys: Arc<StatelessTransportState>,
    nonce: u64,
    raw: Box<[u8]>,
    start: usize,
    end: usize,
    /// Of the size of a whole record: ring copies if the room is shorter than the ciphertext.
    plain: Box<[u8]>,
    given: usize,
    opened: usize,
    dead: Duration,
    seen: Instant,
    idle: Pin<Box<Sleep>>,
    life: Arc<Life>,
}

impl NoiseReader {
    /// Opens the next record if all of it is there. True also for an empty one.
    fn open_next(&mut self) -> io::Result<bool> {
        let there = &self.raw[self.start..self.end];
        let Some((length, rest)) = there.split_first_chunk::<2>() else { return Ok(false) };
        let length = usize::from(u16::from_be_bytes(*length));
        let Some(record) = rest.get(..length) else { return Ok(false) };
        self.opened = self.keys.read_message(self.nonce, record, &mut self.plain).map_err(broken)?;
        self.given = 0;
        self.nonce += 1;
        self.start += 2 + length;
        Ok(true)
    }

    fn fill(&mut self, context: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if self.raw.len() - self.start < 2 + RECORD_BYTES || self.start == self.end {
            self.raw.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let mut room = ReadBuf::new(&mut self.raw[self.end..]);
        ready!(Pin::new(&mut self.half).poll_read(context, &mut room))?;
        let filled = room.filled().len();
        self.end += filled;
        Poll::Ready(Ok(filled))
    }

    fn silence(&self) -> io::Error {
        let why = format!("nothing was heard for {} ms", self.dead.as_millis());
        self.life.fail(io::ErrorKind::TimedOut.into(), &why)
    }
}

impl AsyncRead for NoiseReader {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        this.life.check(&this.life.reader, context)?;
        loop {
            if this.given < this.opened {
                let bytes = out.remaining().min(this.opened - this.given);
                out.put_slice(&this.plain[this.given..this.given + bytes]);
                this.given += bytes;
                return Poll::Ready(Ok(()));
            }
            match this.open_next() {
                Ok(true) => continue,
                Ok(false) => {}
                Err(error) => return Poll::Ready(Err(this.life.fail(error, "a record could not be decrypted"))),
            }
            // The socket first, the timer second: a busy process is not a dead peer.
            match this.fill(context) {
                Poll::Ready(Ok(0)) => {
                    this.life.close("the peer closed the connection");
                    return Poll::Ready(Ok(()));
                }
                Poll::Ready(Ok(_)) => {
                    let now = Instant::now();
                    if now - this.seen >= this.dead {
                        return Poll::Ready(Err(this.silence()));
                    }
                    this.seen = now;
                    *this.life.heard.lock() = Some(now);
                }
                Poll::Ready(Err(error)) => {
                    let why = format!("the connection broke: {error}");
                    return Poll::Ready(Err(this.life.fail(error, &why)));
                }
                Poll::Pending => {
                    ready!(this.idle.as_mut().poll(context));
                    let due = this.seen + this.dead;
                    if Instant::now() >= due {
                        return Poll::Ready(Err(this.silence()));
                    }
                    this.idle.as_mut().reset(due);
                }
            }
        }
    }
}

struct NoiseWriter {
    outgoing: Arc<Mutex<Outgoing>>,
    life: Arc<Life>,
}

/// What is sealed and not written yet lies in `buffer[start..end]`.
struct Outgoing {
    half: OwnedWriteHalf,
    keys: Arc<StatelessTransportState>,
    nonce: u64,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Outgoing {
    fn seal(&mut self, plain: &[u8]) -> io::Result<()> {
        let room = &mut self.buffer[self.end..];
        let (length, record) = room.split_first_chunk_mut::<2>().ok_or(io::ErrorKind::WriteZero)?;
        let sealed = self.keys.write_message(self.nonce, plain, record).map_err(broken)?;
        *length = (sealed as u16).to_be_bytes();
        self.nonce += 1;
        self.end += 2 + sealed;
        Ok(())
    }

    fn written(&mut self, bytes: usize) {
        self.start += bytes;
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    fn poll_drain(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.start < self.end {
            let pending = &self.buffer[self.start..self.end];
            match ready!(Pin::new(&mut self.half).poll_write(context, pending))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                bytes => self.written(bytes),
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for NoiseWriter {
    /// What it has taken may still lie in the buffer when it returns: its only user flushes after each batch.
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        self.life.check(&self.life.writer, context)?;
        let mut outgoing = self.outgoing.lock();
        ready!(outgoing.poll_drain(context))?;
        let mut taken = 0;
        for chunk in data.chunks(PLAIN_BYTES).take(RECORDS) {
            outgoing.seal(chunk)?;
            taken += chunk.len();
        }
        match outgoing.poll_drain(context) {
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            _ => Poll::Ready(Ok(taken)),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.life.check(&self.life.writer, context)?;
        self.outgoing.lock().poll_drain(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.life.check(&self.life.writer, context)?;
        let mut outgoing = self.outgoing.lock();
        ready!(outgoing.poll_drain(context))?;
        Pin::new(&mut outgoing.half).poll_shutdown(context)
    }
}

/// Sends an empty record now and then, unless something is on its way anyway. Ends with the writer.
///
/// It only tries: to wait for the socket would take the writer's place in its list of wakers.
async fn keep_alive(outgoing: Weak<Mutex<Outgoing>>, every: Duration) {
    let mut ticks = tokio::time::interval(every);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Some(outgoing) = outgoing.upgrade() else { return };
        let mut outgoing = outgoing.lock();
        if outgoing.start == outgoing.end && outgoing.seal(&[]).is_err() {
            return;
        }
        // An error is found by whoever reads.
        if let Ok(bytes) = outgoing.half.try_write(&outgoing.buffer[outgoing.start..outgoing.end]) {
            outgoing.written(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    const PACE: Pace = Pace { keepalive: Duration::from_millis(300), dead: Duration::from_millis(1500) };

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let dialed = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (dialed, listener.accept().await.unwrap().0)
    }

    async fn secured() -> (Secure, Secure) {
        let (dialed, accepted) = pair().await;
        let both = tokio::join!(handshake(dialed, &[7; 32], true), handshake(accepted, &[7; 32], false));
        (both.0.unwrap(), both.1.unwrap())
    }

    #[tokio::test]
    async fn both_ends_name_the_connection_alike_and_read_what_the_other_wrote() {
        let (mut dialed, mut accepted) = secured().await;
        assert_eq!(dialed.id(), accepted.id());
        let long = vec![9; 150_000];
        let (sent, received) = tokio::join!(dialed.send(&long), accepted.receive(200_000));
        sent.unwrap();
        assert_eq!(received.unwrap(), long);
        accepted.send(b"").await.unwrap();
        assert!(dialed.receive(10).await.unwrap().is_empty());
        dialed.send(&[1; 11]).await.unwrap();
        assert!(accepted.receive(10).await.is_err(), "longer than it may be");
    }

    #[tokio::test]
    async fn without_the_key_nobody_gets_past_the_first_message() {
        let (dialed, accepted) = pair().await;
        let dialed = tokio::spawn(async move { handshake(dialed, &[8; 32], true).await.err() });
        assert!(matches!(handshake(accepted, &[7; 32], false).await.err(), Some(HandshakeError::Foreign)));
        assert!(matches!(dialed.await.unwrap(), Some(HandshakeError::Foreign)));
    }

    #[tokio::test]
    async fn a_stream_carries_any_amount_in_order() {
        let (dialed, accepted) = secured().await;
        let (_, mut write) = Box::new(dialed.into_stream(PACE, Arc::default())).split();
        let (mut read, _keep) = Box::new(accepted.into_stream(PACE, Arc::default())).split();
        let sent: Vec<u8> = (0..3_000_000u32).map(|n| (n % 251) as u8).collect();
        let expected = sent.clone();
        let writing = tokio::spawn(async move {
            write.write_all(&sent).await.unwrap();
            write.flush().await.unwrap();
            write
        });
        let mut received = vec![0; expected.len()];
        read.read_exact(&mut received).await.unwrap();
        assert!(received == expected);
        drop(writing.await.unwrap());
    }

    /// What lies in the socket after a pause would be carried out although the peer has long given up.
    #[tokio::test]
    async fn after_a_silence_not_even_what_waits_is_read() {
        let pace = Pace { keepalive: Duration::from_secs(9), dead: Duration::from_millis(100) };
        let (mut dialed, accepted) = secured().await;
        let life = Arc::<Life>::default();
        let (mut read, _write) = Box::new(accepted.into_stream(pace, life.clone())).split();
        dialed.send(b"stale").await.unwrap();
        std::thread::sleep(Duration::from_millis(200));
        assert_eq!(read.read_u8().await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert!(life.why().unwrap().contains("nothing was heard"));
    }

    #[tokio::test]
    async fn closing_ends_a_read_and_a_write_that_wait() {
        let (_dialed, accepted) = secured().await;
        let life = Arc::<Life>::default();
        let (mut read, mut write) = Box::new(accepted.into_stream(PACE, life.clone())).split();
        let reading = tokio::spawn(async move { read.read_u8().await.map(drop) });
        let writing = tokio::spawn(async move {
            loop {
                write.write_all(&[0; 100_000]).await?;
            }
            #[allow(unreachable_code)]
            io::Result::Ok(())
        });
        tokio::time::sleep(Duration::from_millis(50)).await;
        life.close("enough");
        for task in [reading, writing] {
            let ended = tokio::time::timeout(Duration::from_secs(5), task).await.unwrap().unwrap();
            assert_eq!(ended.unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
        }
    }
}
