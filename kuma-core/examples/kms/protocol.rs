//! What a store and a KMS say to each other: a line of JSON there, a line of JSON back (docs/kms.md).
//!
//! Invariants: a connection carries one request at a time; a frame has at most [`FRAME_BYTES_MAX`] bytes, its end included; a
//! buffer that held a secret is wiped, and never grows, because growing leaves a copy behind. Nothing here has a `Debug` form
//! that holds a secret.

use std::{borrow::Cow, fmt, io};

use base64::{Engine, engine::general_purpose::STANDARD};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};
use zeroize::Zeroizing;

/// A request holds 32 secret bytes, or a wrapped key, and some 200 bytes that say where it belongs.
pub(crate) const FRAME_BYTES_MAX: usize = 8 * 1024;

/// What a store asks for. Bytes are in base64. Each may be repeated: none changes anything in the KMS.
#[derive(Deserialize, Serialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub(crate) enum Request<'a> {
    /// Which key wraps now? The answer is its id, 16 hex digits.
    Current,
    /// Wrap 32 bytes. The answer is the wrapped key.
    Wrap {
        #[serde(borrow)]
        secret: Cow<'a, str>,
        #[serde(borrow)]
        aad: Cow<'a, str>,
    },
    /// Unwrap them again. The answer is the 32 bytes.
    Unwrap {
        #[serde(borrow)]
        wrapped: Cow<'a, str>,
        #[serde(borrow)]
        aad: Cow<'a, str>,
    },
}

impl Request<'_> {
    /// For a log.
    pub(crate) fn op(&self) -> &'static str {
        match self {
            Request::Current => "current",
            Request::Wrap { .. } => "wrap",
            Request::Unwrap { .. } => "unwrap",
        }
    }
}

/// What a KMS answers.
#[derive(Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Answer<'a> {
    #[serde(borrow)]
    Ok(Cow<'a, str>),
    Error(Problem),
}

/// Why not.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Problem {
    pub(crate) kind: Kind,
    pub(crate) message: String,
}

/// One for each thing that a store can make of it.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Kind {
    /// It does not have the key that wrapped this.
    UnknownKey,
    /// It has the key, and the bytes are damaged or belong elsewhere.
    DoesNotAuthenticate,
    /// The caller may not.
    Denied,
    /// Later, perhaps.
    Unavailable,
    /// That is no request.
    Malformed,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::UnknownKey => "unknown_key",
            Kind::DoesNotAuthenticate => "does_not_authenticate",
            Kind::Denied => "denied",
            Kind::Unavailable => "unavailable",
            Kind::Malformed => "malformed",
        })
    }
}

/// Why a frame did not arrive.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FrameError {
    #[error("the connection failed")]
    Io(#[from] io::Error),
    #[error("the connection ended in the middle of a line")]
    CutOff,
    #[error("a line is longer than {FRAME_BYTES_MAX} bytes")]
    TooLong,
    #[error("something follows the line that nobody asked for")]
    Trailing,
}

/// Reads a frame; None if the other side closed the connection before it began one.
pub(crate) async fn read_frame(stream: &mut UnixStream) -> Result<Option<Zeroizing<Vec<u8>>>, FrameError> {
    let mut frame = Zeroizing::new(vec![0; FRAME_BYTES_MAX]);
    let mut filled = 0;
    while filled < frame.len() {
        let read = stream.read(&mut frame[filled..]).await?;
        if read == 0 {
            return if filled == 0 { Ok(None) } else { Err(FrameError::CutOff) };
        }
        let end = frame[filled..filled + read].iter().position(|byte| *byte == b'\n').map(|at| filled + at);
        filled += read;
        match end {
            Some(end) if end + 1 == filled => {
                frame.truncate(end);
                return Ok(Some(frame));
            }
            Some(_) => return Err(FrameError::Trailing),
            None => {}
        }
    }
    Err(FrameError::TooLong)
}

/// Writes a frame.
pub(crate) async fn write_frame(stream: &mut UnixStream, content: &impl Serialize) -> Result<(), FrameError> {
    let mut frame = Zeroizing::new(vec![0; FRAME_BYTES_MAX]);
    let mut room = &mut frame[..FRAME_BYTES_MAX - 1];
    // Only for want of room: a slice never grows.
    serde_json::to_writer(&mut room, content).map_err(|_| FrameError::TooLong)?;
    let end = FRAME_BYTES_MAX - 1 - room.len();
    frame[end] = b'\n';
    Ok(stream.write_all(&frame[..=end]).await?)
}

/// Base64, wiped on drop.
pub(crate) fn encode(bytes: &[u8]) -> Zeroizing<String> {
    Zeroizing::new(STANDARD.encode(bytes))
}

/// None if it is not base64. The cause would repeat a character of it.
pub(crate) fn decode(text: &str) -> Option<Zeroizing<Vec<u8>>> {
    let mut bytes = Zeroizing::new(vec![0; text.len()]);
    let length = STANDARD.decode_slice(text, &mut bytes).ok()?;
    bytes.truncate(length);
    Some(bytes)
}
