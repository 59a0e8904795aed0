//! How a connection becomes a link: dialed or accepted, secured, introduced, handed over.
//!
//! Invariants:
//! - A stranger costs a socket and a task for [`super::LinkLimits::handshake`] at most, and nobody waits for him.
//! - Both sides of a connection that comes to nothing know why, unless they do not have the same key.

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use kuma_core::DiskId;
use parking_lot::Mutex;
use ractor_cluster::NodeServerMessage;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, watch},
    task::JoinSet,
    time::timeout,
};

use super::{
    Admitted, DialError, DialState, Direction, Shared, Target,
    flow::Flow,
    hello::{Answer, HELLO_BYTES_MAX, Hello, MESSAGE_BYTES_MAX, Verdict},
    noise::{self, HandshakeError, Life, Pace, Secure},
    session::{Installed, Phase, Session},
};

const TCP_USER_TIMEOUT: Duration = Duration::from_secs(5);
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// Accepts connections for ever.
pub(super) async fn listen(shared: Arc<Shared>, listener: TcpListener) {
    let mut welcoming = JoinSet::new();
    loop {
        // With no place left, newcomers wait in the backlog: strangers have to go soon.
        if shared.places.available_permits() == 0 {
            tracing::warn!(target: "kuma::link", "as many connections as there may be; others wait");
        }
        let Ok(place) = shared.places.clone().acquire_owned().await else { return };
        let (stream, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(target: "kuma::link", %error, "a connection could not be accepted");
                tokio::time::sleep(PAUSE_MIN).await;
                continue;
            }
        };
        let shared = shared.clone();
        welcoming.spawn(async move {
            let within = shared.limits.handshake;
            match timeout(within, welcome(&shared, stream, from, place)).await {
                Ok(Ok(())) => {}
                Ok(Err(why)) => tracing::warn!(target: "kuma::link", %from, why, "a connection was refused"),
                Err(_) => tracing::debug!(target: "kuma::link", %from, "a connection said nothing in time"),
            }
        });
        while welcoming.try_join_next().is_some() {}
    }
}

/// Welcomes one connection; the error is a sentence for the log.
async fn welcome(
    shared: &Arc<Shared>,
    stream: TcpStream,
    from: SocketAddr,
    place: OwnedSemaphorePermit,
) -> Result<(), String> {
    prepare(&stream).map_err(|error| error.to_string())?;
    let mut secure = noise::handshake(stream, &shared.key, false).await.map_err(|error| error.to_string())?;
    let broken = |error: io::Error| format!("the connection ended during the introduction: {error}");
    // The first record proves that the other side has the key now.
    let hello = secure.receive(MESSAGE_BYTES_MAX).await.map_err(broken)?;
    let own = shared.hello();
    let introduced = introduce(shared, &own, Hello::decode(&hello), Direction::Accepted(from));
    let (hello, admitted) = match introduced {
        Ok(introduced) => introduced,
        Err(why) => {
            secure.send(&Answer::Refused(why.clone()).encode()).await.map_err(broken)?;
            return Err(why);
        }
    };
    let present = shared.sessions.present(admitted.disk).filter(|session| session.incarnation == admitted.incarnation);
    let answer = Answer::Accepted { hello: own, present: present.map(|session| session.id) };
    secure.send(&answer.encode()).await.map_err(broken)?;
    let verdict = secure.receive(MESSAGE_BYTES_MAX).await.map_err(broken)?;
    match Verdict::decode(&verdict) {
        Some(Verdict::Accepted) => {}
        Some(Verdict::Present) => return Ok(()),
        Some(Verdict::Refused(why)) => return Err(format!("the other node does not want this one: {why}")),
        None => return Err("the other node says what nobody understands".into()),
    }
    let session = session(shared, &secure, &hello, admitted, from.to_string(), false, place);
    match shared.sessions.install(&session, None).await {
        Installed::Yes => hand_over(shared, secure, session),
        Installed::Superfluous => Ok(()),
        Installed::Refused(why) => Err(why),
    }
}

/// Dials an address once. Returns the disk that is there, with a link to it that is up.
pub(super) async fn dial(shared: &Arc<Shared>, address: &str, expected: Option<DiskId>) -> Result<DiskId, DialError> {
    let late = |doing| move |_| DialError::Timeout { address: address.into(), doing };
    let within = shared.limits.handshake;
    if shared.sessions.is_stopped() {
        return Err(DialError::Stopped);
    }
    let full = |_| DialError::Connect { address: address.into(), source: io::Error::other("too many connections") };
    let place = shared.places.clone().try_acquire_owned().map_err(full)?;
    let stream = timeout(within, connect(address)).await.map_err(late("connecting"))??;
    let disk = timeout(within, greet(shared, stream, address, expected, place))
        .await
        .map_err(late("introducing itself"))??;
    let mut changed = shared.sessions.changed.subscribe();
    let mut why = "another connection took its place".to_owned();
    let coming_up = changed.wait_for(|()| match shared.sessions.present(disk) {
        Some(session) => *session.phase.lock() == Phase::Up,
        None => {
            // The one that takes its place may still be on its way.
            why = "it was closed".into();
            shared.sessions.is_stopped()
        }
    });
    match timeout(within, coming_up).await {
        Ok(_) if shared.sessions.up(disk).is_some() => Ok(disk),
        Ok(_) => Err(DialError::Stopped),
        Err(_) => Err(DialError::Lost { reason: why }),
    }
}

async fn connect(address: &str) -> Result<TcpStream, DialError> {
    let address = || address.to_owned();
    let resolved =
        tokio::net::lookup_host(address()).await.map_err(|source| DialError::Resolve { address: address(), source })?;
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for resolved in resolved {
        match TcpStream::connect(resolved).await.and_then(|stream| prepare(&stream).map(|()| stream)) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(DialError::Connect { address: address(), source: last })
}

async fn greet(
    shared: &Arc<Shared>,
    stream: TcpStream,
    address: &str,
    expected: Option<DiskId>,
    place: OwnedSemaphorePermit,
) -> Result<DiskId, DialError> {
    let lost = |error: io::Error| DialError::Lost { reason: error.to_string() };
    let mut secure = noise::handshake(stream, &shared.key, true).await.map_err(|error| match error {
        HandshakeError::Foreign => DialError::WrongCookie,
        HandshakeError::Io(error) => lost(error),
    })?;
    let own = shared.hello();
    secure.send(&own.encode()).await.map_err(lost)?;
    let answer = secure.receive(MESSAGE_BYTES_MAX).await.map_err(lost)?;
    let (hello, present) = match Answer::decode(&answer) {
        Some(Answer::Accepted { hello, present }) => (Some(hello), present),
        Some(Answer::Refused(by_peer)) => return Err(DialError::Refused { by_peer }),
        None => (None, None),
    };
    let introduced = introduce(shared, &own, hello, Direction::Dialed(address));
    let unexpected = |found| expected.filter(|expected| *expected != found);
    let (hello, admitted) = match introduced {
        Ok((_, Admitted { disk, .. })) if unexpected(disk).is_some() => {
            let expected = unexpected(disk).unwrap_or(disk);
            let error = DialError::Unexpected { expected, found: disk };
            secure.send(&Verdict::Refused(error.to_string()).encode()).await.map_err(lost)?;
            return Err(error);
        }
        Ok(introduced) => introduced,
        Err(reason) => {
            tracing::warn!(target: "kuma::link", address, reason, "a node that was dialed was refused");
            secure.send(&Verdict::Refused(reason.clone()).encode()).await.map_err(lost)?;
            return Err(DialError::RefusedPeer { reason });
        }
    };
    let session = session(shared, &secure, &hello, admitted, address.to_owned(), true, place);
    match shared.sessions.install(&session, present).await {
        Installed::Yes => {}
        Installed::Superfluous => {
            secure.send(&Verdict::Present.encode()).await.map_err(lost)?;
            return Ok(session.disk);
        }
        Installed::Refused(reason) => {
            secure.send(&Verdict::Refused(reason.clone()).encode()).await.map_err(lost)?;
            return Err(DialError::RefusedPeer { reason });
        }
    }
    shared.sessions.watch(session.clone(), shared.limits.handshake);
    let disk = session.disk;
    let sent = secure.send(&Verdict::Accepted.encode()).await;
    match sent.map_err(|error| error.to_string()).and_then(|()| hand_over(shared, secure, session.clone())) {
        Ok(()) => Ok(disk),
        Err(reason) => {
            shared.sessions.remove(&session);
            Err(DialError::Lost { reason })
        }
    }
}

/// Asks the user of the link about a peer.
fn introduce(
    shared: &Shared,
    own: &Hello,
    hello: Option<Hello>,
    direction: Direction<'_>,
) -> Result<(Hello, Admitted), String> {
    let hello = hello.ok_or("the other node does not introduce itself as a Kuma node does")?;
    own.check(&hello)?;
    let admitted = shared.peers.admit(&hello.body, direction)?;
    shared.sessions.check(&admitted)?;
    Ok((hello, admitted))
}

fn session(
    shared: &Shared,
    secure: &Secure,
    hello: &Hello,
    admitted: Admitted,
    address: String,
    is_dialed: bool,
    place: OwnedSemaphorePermit,
) -> Arc<Session> {
    let Admitted { disk, incarnation } = admitted;
    Arc::new(Session {
        id: secure.id(),
        disk,
        incarnation,
        address,
        is_dialed,
        router: hello.router,
        since: SystemTime::now(),
        flow: Arc::new(Flow::new(shared.sessions.own, disk, secure.id(), shared.limits)),
        life: Arc::default(),
        phase: Mutex::new(Phase::Opening),
        gone: watch::Sender::new(false),
        _place: place,
    })
}

/// Gives the connection to ractor_cluster.
fn hand_over(shared: &Shared, secure: Secure, session: Arc<Session>) -> Result<(), String> {
    if !session.is_dialed {
        shared.sessions.watch(session.clone(), shared.limits.handshake);
    }
    let pace = Pace { keepalive: shared.limits.keepalive, dead: shared.limits.dead };
    let stream = Box::new(secure.into_stream(pace, Arc::<Life>::clone(&session.life)));
    let opened = NodeServerMessage::ConnectionOpenedExternal { stream, is_server: !session.is_dialed };
    if shared.node_server.cast(opened).is_err() {
        shared.sessions.remove(&session);
        return Err("the node server is stopped".into());
    }
    Ok(())
}

/// Small messages leave at once, and a peer that acknowledges nothing is given up by the kernel too.
fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    #[cfg(target_os = "linux")]
    socket2::SockRef::from(stream).set_tcp_user_timeout(Some(TCP_USER_TIMEOUT))?;
    Ok(())
}

/// Dials a target whenever there is no link to it, for ever.
pub(super) async fn keep(shared: Arc<Shared>, target: Target, state: Arc<Mutex<DialState>>) {
    let (mut known, mut pause) = (target.expect, PAUSE_MIN);
    let mut changed = shared.sessions.changed.subscribe();
    loop {
        let since = tokio::time::Instant::now();
        let is_up = |disk: Option<DiskId>| disk.filter(|disk| shared.sessions.up(*disk).is_some());
        let outcome = match is_up(known) {
            Some(disk) => Ok(disk),
            None => dial(&shared, &target.address, target.expect).await,
        };
        match outcome {
            Ok(disk) => {
                known = Some(disk);
                tell(&target, &state, DialState::Up(disk));
                let _ = changed.wait_for(|()| is_up(known).is_none()).await;
                if since.elapsed() >= PAUSE_MAX {
                    pause = PAUSE_MIN;
                }
            }
            Err(error) => tell(&target, &state, DialState::Failed(error.to_string())),
        }
        // Unless the other side has dialed in the meantime.
        let pausing = tokio::time::sleep(pause.mul_f64(rand::random_range(0.5..1.0)));
        let _ = timeout(PAUSE_MAX, async {
            tokio::select! {
                () = pausing => {}
                _ = changed.wait_for(|()| is_up(known).is_some()) => {}
            }
        })
        .await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// Remembers how it went. Only what is new is logged: a node that is away for a day is one line.
fn tell(target: &Target, state: &Mutex<DialState>, new: DialState) {
    let mut state = state.lock();
    if *state == new {
        return;
    }
    let address = &target.address;
    match &new {
        DialState::Up(disk) => tracing::debug!(target: "kuma::link", address, %disk, "reached a node"),
        DialState::Failed(why) => tracing::warn!(target: "kuma::link", address, why, "a node cannot be reached"),
        DialState::Pending => {}
    }
    *state = new;
}

/// Of what [`super::Peers::hello`] gives, so much is sent.
pub(super) fn cut(mut hello: Vec<u8>) -> Vec<u8> {
    if hello.len() > HELLO_BYTES_MAX {
        tracing::warn!(target: "kuma::link", bytes = hello.len(), "the hello of this node is too long and is cut");
        hello.truncate(HELLO_BYTES_MAX);
    }
    hello
}
