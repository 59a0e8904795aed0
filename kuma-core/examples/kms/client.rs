//! The store's side: a [`MasterKey`] that asks a KMS. Copy this for a KMS of your own.
//!
//! Invariants:
//! - Nothing waits longer than the deadline, for a KMS that is down, slow or stuck. After a deadline was missed, calls fail at once
//!   for a moment, so that a thousand waiting appends do not wait for it one after the other. Then it is asked again: the store
//!   heals by itself.
//! - What `wrap` returned was unwrapped once before it is believed: what is sealed with a key that does not come back is lost.
//! - A connection whose answer did not arrive whole is closed, so that no answer is taken for another request's.

use std::{
    borrow::Cow,
    fmt, io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use kuma_core::{MasterKey, MasterKeyError};
use kuma_crypto::{BoxFuture, KekId, Secret32, wrapped_by};
use tokio::{net::UnixStream, sync::Semaphore, time::timeout};
use zeroize::Zeroizing;

use super::protocol::{Answer, FrameError, Kind, Problem, Request, decode, encode, read_frame, write_frame};

/// Requests on their way at once; more of them wait, within their deadline.
const IN_FLIGHT_MAX: usize = 16;
/// For so long a KMS that missed a deadline is not asked again.
const REST: Duration = Duration::from_millis(250);
/// Of what a KMS says about a refusal, so much is repeated.
const MESSAGE_CHARS_MAX: usize = 200;

/// The master key of a store, in a KMS.
pub(crate) struct KmsMasterKey {
    socket: PathBuf,
    deadline: Duration,
    /// The id of the key that wraps now, as the KMS said last.
    current: AtomicU64,
    /// Connections that wait for their next request.
    idle: Mutex<Vec<UnixStream>>,
    in_flight: Semaphore,
    rest_until: Mutex<Option<Instant>>,
}

impl KmsMasterKey {
    /// Asks the KMS at `socket` for its current key, so that a store is not opened on one that is not there.
    ///
    /// # Errors
    /// [`MasterKeyError::Provider`], which says whether trying again can help.
    pub(crate) async fn connect(socket: &Path, deadline: Duration) -> Result<Arc<Self>, MasterKeyError> {
        let kms = KmsMasterKey {
            socket: socket.to_owned(),
            deadline,
            current: AtomicU64::new(0),
            idle: Mutex::default(),
            in_flight: Semaphore::new(IN_FLIGHT_MAX),
            rest_until: Mutex::default(),
        };
        kms.refresh().await?;
        Ok(Arc::new(kms))
    }

    /// Learns which key is the current one. Call it before [`kuma_core::Kuma::rotate_master_key`]: which keys are to be wrapped
    /// anew is decided by it.
    ///
    /// # Errors
    /// [`MasterKeyError::Provider`]; the key that was known before stays.
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn refresh(&self) -> Result<KekId, MasterKeyError> {
        self.ask_current().await.map_err(|error| self.explain(error, None))
    }

    async fn ask_current(&self) -> Result<KekId, KmsError> {
        let frame = self.call(&Request::Current).await?;
        let id = self.text(&frame)?;
        let id = u64::from_str_radix(&id, 16).ok().filter(|_| id.len() == 16).map(u64::to_be_bytes);
        let id = KekId(id.ok_or_else(|| self.nonsense("a key's id is 16 hex digits"))?);
        self.set_current(id);
        Ok(id)
    }

    async fn ask_wrap(&self, secret: &Secret32, aad: &[u8]) -> Result<Vec<u8>, KmsError> {
        let (text, aad_text) = (encode(secret.expose()), encode(aad));
        let request = Request::Wrap { secret: Cow::Borrowed(&text), aad: Cow::Borrowed(&aad_text) };
        let frame = self.call(&request).await?;
        let wrapped = decode(&self.text(&frame)?).ok_or_else(|| self.nonsense("a wrapped key is in base64"))?.to_vec();
        let by = wrapped_by(&wrapped).map_err(|_| self.nonsense("a wrapped key begins with its key's id"))?;
        let again = self.ask_unwrap(&wrapped, aad).await?;
        // Without stopping at the first difference, which would tell the time of it.
        let difference = again.expose().iter().zip(secret.expose()).fold(0, |sum, (a, b)| sum | (a ^ b));
        if difference != 0 {
            return Err(self.nonsense("what it wrapped unwraps to something else"));
        }
        self.set_current(by);
        Ok(wrapped)
    }

    async fn ask_unwrap(&self, wrapped: &[u8], aad: &[u8]) -> Result<Secret32, KmsError> {
        let (wrapped, aad) = (encode(wrapped), encode(aad));
        let request = Request::Unwrap { wrapped: Cow::Borrowed(&wrapped), aad: Cow::Borrowed(&aad) };
        let frame = self.call(&request).await?;
        let secret = decode(&self.text(&frame)?).ok_or_else(|| self.nonsense("a secret is in base64"))?;
        let whole = secret.first_chunk().filter(|chunk| chunk.len() == secret.len());
        whole.map(Secret32::from_bytes).ok_or_else(|| self.nonsense("a secret has 32 bytes"))
    }

    /// Sends a request and waits for its answer, no longer than the deadline.
    async fn call(&self, request: &Request<'_>) -> Result<Zeroizing<Vec<u8>>, KmsError> {
        let no_answer = || KmsError::NoAnswer { socket: self.socket.clone(), deadline: self.deadline };
        let rest_until = *self.rest_until.lock().unwrap_or_else(PoisonError::into_inner);
        if rest_until.is_some_and(|until| Instant::now() < until) {
            return Err(no_answer());
        }
        timeout(self.deadline, self.exchange(request)).await.unwrap_or_else(|_| {
            *self.rest_until.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now() + REST);
            Err(no_answer())
        })
    }

    async fn exchange(&self, request: &Request<'_>) -> Result<Zeroizing<Vec<u8>>, KmsError> {
        // It is never closed; if it were, the call would only not be counted.
        let _permit = self.in_flight.acquire().await.ok();
        let idle = self.idle().pop();
        if let Some(stream) = idle {
            match self.exchange_on(stream, request).await {
                // The KMS was restarted meanwhile, most likely. Every request may be repeated.
                Err(KmsError::Lost { .. }) => self.idle().clear(),
                answered => return answered,
            }
        }
        let unreachable = |cause| KmsError::Unreachable { socket: self.socket.clone(), cause };
        self.exchange_on(UnixStream::connect(&self.socket).await.map_err(unreachable)?, request).await
    }

    async fn exchange_on(&self, mut stream: UnixStream, request: &Request<'_>) -> Result<Zeroizing<Vec<u8>>, KmsError> {
        let lost = |cause| KmsError::Lost { socket: self.socket.clone(), cause };
        write_frame(&mut stream, request).await.map_err(lost)?;
        match read_frame(&mut stream).await {
            Ok(Some(frame)) => {
                self.idle().push(stream);
                Ok(frame)
            }
            Ok(None) => Err(lost(FrameError::CutOff)),
            Err(error @ (FrameError::Io(_) | FrameError::CutOff)) => Err(lost(error)),
            Err(FrameError::TooLong) => Err(self.nonsense("a line is longer than it may be")),
            Err(FrameError::Trailing) => Err(self.nonsense("something follows a line that nobody asked for")),
        }
    }

    /// What an answer says, if it is one.
    fn text<'a>(&self, frame: &'a [u8]) -> Result<Cow<'a, str>, KmsError> {
        // What serde says may repeat what it read.
        match serde_json::from_slice(frame).map_err(|_| self.nonsense("a line is no answer of this protocol"))? {
            Answer::Ok(text) => Ok(text),
            Answer::Error(Problem { kind, message }) => {
                let message = message.chars().filter(|c| !c.is_control()).take(MESSAGE_CHARS_MAX).collect();
                Err(KmsError::Refused { kind, message })
            }
        }
    }

    fn nonsense(&self, why: &'static str) -> KmsError {
        KmsError::Nonsense { socket: self.socket.clone(), why }
    }

    /// As the store knows it. `wrapped` is what was to be unwrapped.
    fn explain(&self, error: KmsError, wrapped: Option<&[u8]>) -> MasterKeyError {
        let by = wrapped.and_then(|wrapped| wrapped_by(wrapped).ok());
        match (&error, by) {
            (KmsError::Refused { kind: Kind::UnknownKey, .. }, Some(wanted)) => {
                MasterKeyError::UnknownKek { wanted, at_hand: vec![self.current()] }
            }
            (KmsError::Refused { kind: Kind::DoesNotAuthenticate, .. }, Some(kek)) => {
                MasterKeyError::DoesNotAuthenticate { kek }
            }
            _ => MasterKeyError::Provider { retry_safe: error.may_pass(), source: error.into() },
        }
    }

    fn set_current(&self, id: KekId) {
        self.current.store(u64::from_be_bytes(id.0), Relaxed);
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<UnixStream>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl MasterKey for KmsMasterKey {
    fn current(&self) -> KekId {
        KekId(self.current.load(Relaxed).to_be_bytes())
    }

    fn wrap<'a>(&'a self, secret: &'a Secret32, aad: &'a [u8]) -> BoxFuture<'a, Result<Vec<u8>, MasterKeyError>> {
        Box::pin(async move { self.ask_wrap(secret, aad).await.map_err(|error| self.explain(error, None)) })
    }

    fn unwrap<'a>(&'a self, wrapped: &'a [u8], aad: &'a [u8]) -> BoxFuture<'a, Result<Secret32, MasterKeyError>> {
        Box::pin(async move { self.ask_unwrap(wrapped, aad).await.map_err(|error| self.explain(error, Some(wrapped))) })
    }
}

impl fmt::Debug for KmsMasterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KmsMasterKey").field("socket", &self.socket).field("current", &self.current()).finish()
    }
}

/// Why the KMS did not do it. Nothing was changed anywhere; the variants differ in what helps.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KmsError {
    #[error("no KMS is at {}; start it, a retry is safe", socket.display())]
    Unreachable {
        socket: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("the KMS at {} did not answer within {deadline:?}; see whether it is stuck, a retry is safe", socket.display())]
    NoAnswer { socket: PathBuf, deadline: Duration },
    #[error("the KMS at {} was lost before its answer was there; see that it runs, a retry is safe", socket.display())]
    Lost {
        socket: PathBuf,
        #[source]
        cause: FrameError,
    },
    #[error("what is at {} does not speak this protocol ({why}); see that it is the KMS, and of this version", socket.display())]
    Nonsense { socket: PathBuf, why: &'static str },
    #[error("the KMS refused ({kind}): {message}")]
    Refused { kind: Kind, message: String },
}

impl KmsError {
    /// Whether the same call may succeed later without anybody mending anything but the KMS's health.
    fn may_pass(&self) -> bool {
        match self {
            KmsError::Unreachable { .. } | KmsError::NoAnswer { .. } | KmsError::Lost { .. } => true,
            KmsError::Nonsense { .. } => false,
            KmsError::Refused { kind, .. } => *kind == Kind::Unavailable,
        }
    }
}
