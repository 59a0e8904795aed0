//! A toy KMS: the master key in a process of its own, behind a Unix socket. It shows the interface; it is no vault.
//!
//! Invariants: only the socket's owner can connect (0600, from the first instant it has its name); nobody can hold it up (a frame
//! and its answer have a deadline, connections are bounded); it logs what was asked and how it ended, never a byte of it.

use std::{
    borrow::Cow,
    fs,
    os::unix::fs::{FileTypeExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use kuma_core::{LocalMasterKey, MasterKey, MasterKeyError};
use kuma_crypto::Secret32;
use tokio::{
    net::{UnixListener, UnixStream},
    sync::Semaphore,
    time::timeout,
};
use zeroize::Zeroizing;

use super::protocol::{Answer, Kind, Problem, Request, decode, encode, read_frame, write_frame};

/// A frame that has begun is there within this time, and an answer is taken within it.
const DEADLINE: Duration = Duration::from_secs(2);
/// A connection that asks nothing is closed.
const IDLE: Duration = Duration::from_secs(60);
/// More of them wait.
const CONNECTIONS_MAX: usize = 64;

/// Serves until it is interrupted. Says on its standard output when it is ready.
pub(crate) async fn serve(key_file: &Path, socket: &Path, create: bool) -> anyhow::Result<()> {
    let key = match LocalMasterKey::from_file(key_file) {
        Err(MasterKeyError::FileMissing { .. }) if create => LocalMasterKey::create_file(key_file),
        other => other,
    };
    let key = Arc::new(key.context("no master key")?);
    let listener = listen(socket).await?;
    println!("serving master key {} at {}", key.current(), socket.display());
    let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let permit = connections.clone().acquire_owned().await?;
        let stream = tokio::select! {
            accepted = listener.accept() => accepted.context("the socket failed")?.0,
            interrupted = tokio::signal::ctrl_c() => {
                interrupted?;
                fs::remove_file(socket)?;
                return Ok(());
            }
        };
        let key = key.clone();
        // Ends by itself: with its connection, or at a deadline.
        tokio::spawn(async move {
            converse(&key, stream).await;
            drop(permit);
        });
    }
}

/// Binds under another name and renames: under its own name the socket never is open to others, and one that a killed KMS left
/// behind is replaced.
async fn listen(socket: &Path) -> anyhow::Result<UnixListener> {
    if let Ok(there) = fs::symlink_metadata(socket) {
        ensure!(there.file_type().is_socket(), "{} is there and is no socket; choose another path", socket.display());
        if UnixStream::connect(socket).await.is_ok() {
            bail!("another KMS serves at {}; stop it first", socket.display());
        }
    }
    let mut unfinished = socket.as_os_str().to_owned();
    unfinished.push(format!(".{}", std::process::id()));
    let unfinished = PathBuf::from(unfinished);
    let listener = UnixListener::bind(&unfinished).with_context(|| format!("cannot serve at {}", socket.display()))?;
    fs::set_permissions(&unfinished, fs::Permissions::from_mode(0o600))?;
    fs::rename(&unfinished, socket)?;
    Ok(listener)
}

/// Answers one request after the other, until the other side goes or does not keep to the protocol.
async fn converse(key: &LocalMasterKey, mut stream: UnixStream) {
    while let Ok(Ok(())) = timeout(IDLE, stream.readable()).await {
        let frame = match timeout(DEADLINE, read_frame(&mut stream)).await {
            Ok(Ok(Some(frame))) => frame,
            Ok(Ok(None)) => return,
            Ok(Err(error)) => return refuse(stream, error.to_string()).await,
            Err(_) => return refuse(stream, format!("no whole line within {DEADLINE:?}")).await,
        };
        let since = Instant::now();
        let (op, outcome) = match serde_json::from_slice::<Request<'_>>(&frame) {
            Ok(request) => (request.op(), answer(key, &request).await),
            // What serde says may repeat what it read.
            Err(_) => ("?", Err(problem(Kind::Malformed, "the line is no request of this protocol"))),
        };
        let micros = since.elapsed().as_micros() as u64;
        let answer = match &outcome {
            Ok(text) => Answer::Ok(Cow::Borrowed(text)),
            Err(problem) => Answer::Error(problem.clone()),
        };
        match &outcome {
            Ok(_) => tracing::info!(op, micros, "done"),
            Err(Problem { kind, message }) => tracing::warn!(op, micros, %kind, message, "refused"),
        }
        if !matches!(timeout(DEADLINE, write_frame(&mut stream, &answer)).await, Ok(Ok(()))) {
            return;
        }
    }
}

/// The last thing that is said on a connection of which nobody knows where its next line begins.
async fn refuse(mut stream: UnixStream, why: String) {
    tracing::warn!(why, "a connection is closed");
    let answer = Answer::Error(problem(Kind::Malformed, &why));
    // Who does not read it sees the connection close.
    let _ = timeout(DEADLINE, write_frame(&mut stream, &answer)).await;
}

async fn answer(key: &LocalMasterKey, request: &Request<'_>) -> Result<Zeroizing<String>, Problem> {
    let bytes = |text: &str| decode(text).ok_or_else(|| problem(Kind::Malformed, "a field is not base64"));
    match request {
        Request::Current => Ok(Zeroizing::new(key.current().to_string())),
        Request::Wrap { secret, aad } => {
            let (secret, aad) = (bytes(secret)?, bytes(aad)?);
            let whole = secret.first_chunk().filter(|chunk| chunk.len() == secret.len()).map(Secret32::from_bytes);
            let secret = whole.ok_or_else(|| problem(Kind::Malformed, "a secret has 32 bytes"))?;
            Ok(encode(&key.wrap(&secret, &aad).await.map_err(refusal)?))
        }
        Request::Unwrap { wrapped, aad } => {
            let secret = key.unwrap(&bytes(wrapped)?, &bytes(aad)?).await.map_err(refusal)?;
            Ok(encode(secret.expose()))
        }
    }
}

fn refusal(error: MasterKeyError) -> Problem {
    let kind = match &error {
        MasterKeyError::UnknownKek { .. } => Kind::UnknownKey,
        MasterKeyError::DoesNotAuthenticate { .. } => Kind::DoesNotAuthenticate,
        MasterKeyError::NotWrapped(_) => Kind::Malformed,
        _ => Kind::Unavailable,
    };
    problem(kind, &error.to_string())
}

fn problem(kind: Kind, message: &str) -> Problem {
    Problem { kind, message: message.to_owned() }
}
