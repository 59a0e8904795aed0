//! What travels inside one message of the router: a header and any number of items. Pure: bytes in, items out.
//!
//! ```text
//! frame   "KF" | version u8 | 0 | session 16 | sender's disk 16 | sent u64 | received u64 | clock u64 | item*
//! item    op u8 | code u8 | id u64 | deadline u64 | length u32 | body
//! ```
//!
//! Numbers are big endian. `sent` and `received` count the bytes of items of this session, this frame's included. `clock` and `deadline` are
//! milliseconds of the sender's own clock since the session began: their difference is what is left, wherever the frame has waited on its way out.
//!
//! Invariants:
//! - A frame is taken whole or not at all: one item that is not understood makes all of it malformed.
//! - No input makes the parser panic or allocate more than a constant factor of the input.

use kuma_core::DiskId;

/// Names a connection: of the hash of its handshake, so that both ends know it and nobody chooses it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct SessionId(pub(super) [u8; 16]);

impl std::fmt::Display for SessionId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

pub(super) const HEADER_BYTES: usize = 60;
pub(super) const ITEM_BYTES: usize = 22;
const MAGIC: &[u8; 2] = b"KF";
const VERSION: u8 = 1;

/// What a frame says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) session: SessionId,
    pub(super) from: DiskId,
    pub(super) sent: u64,
    pub(super) received: u64,
    pub(super) clock_ms: u64,
}

impl std::fmt::Debug for SessionId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SessionId({self})")
    }
}

/// What an item is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Op {
    /// Wants a reply. `code` is the kind.
    Request = 1,
    /// Wants none. `code` is the kind.
    Cast = 2,
    /// Answers the request of the same id. `code` is a [`Status`].
    Reply = 3,
    /// A piece of an item that is longer than a piece; the pieces of one follow each other.
    Part = 4,
    /// Wants a `Pong` of the same id.
    Ping = 5,
    /// Answers a ping.
    Pong = 6,
}

/// How a request went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    /// The body is the answer.
    Done = 0,
    /// The peer does not know the kind. It did not run.
    UnknownKind = 1,
    /// The peer has too much to do. It did not run.
    Overloaded = 2,
    /// It came too late. It did not run.
    Expired = 3,
    /// It ran and ended without an answer.
    Failed = 4,
    /// It ran, and there was no room for the answer.
    ReplyDropped = 5,
}

impl Status {
    pub(super) fn from_code(code: u8) -> Option<Self> {
        use Status::*;
        [Done, UnknownKind, Overloaded, Expired, Failed, ReplyDropped].into_iter().find(|status| *status as u8 == code)
    }
}

/// One item, still in its frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Item<'a> {
    pub(super) op: Op,
    pub(super) code: u8,
    pub(super) id: u64,
    pub(super) deadline_ms: u64,
    pub(super) body: &'a [u8],
}

/// What is wrong with a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Malformed {
    #[error("it is not a frame")]
    Magic,
    #[error("it has version {0}")]
    Version(u8),
    #[error("it ends too early")]
    Short,
    #[error("an item of it has the unknown op {0}")]
    Op(u8),
    #[error("a reply of it has the unknown status {0}")]
    Status(u8),
    #[error("it is of another disk than the one of the session")]
    Sender,
    #[error("pieces of a message do not fit together")]
    Pieces,
    #[error("a frame before it is missing")]
    Gap,
}

/// Reads the header and what is behind it.
pub(super) fn header(frame: &[u8]) -> Result<(Header, &[u8]), Malformed> {
    let mut rest = frame;
    if take::<2>(&mut rest)? != *MAGIC {
        return Err(Malformed::Magic);
    }
    let [version, _] = take::<2>(&mut rest)?;
    if version != VERSION {
        return Err(Malformed::Version(version));
    }
    let session = SessionId(take(&mut rest)?);
    let from = DiskId(take(&mut rest)?);
    let [sent, received, clock_ms] = [number(&mut rest)?, number(&mut rest)?, number(&mut rest)?];
    Ok((Header { session, from, sent, received, clock_ms }, rest))
}

/// Reads the items behind a header.
pub(super) fn items(mut rest: &[u8]) -> Result<Vec<Item<'_>>, Malformed> {
    let mut items = Vec::new();
    while !rest.is_empty() {
        let (item, length) = item_header(&mut rest)?;
        let (body, behind) = rest.split_at_checked(length).ok_or(Malformed::Short)?;
        rest = behind;
        items.push(Item { body, ..item });
    }
    Ok(items)
}

/// Reads the header of an item, and the length of its body.
pub(super) fn item_header<'a>(rest: &mut &'a [u8]) -> Result<(Item<'a>, usize), Malformed> {
    let [op, code] = take::<2>(rest)?;
    let op = match op {
        1 => Op::Request,
        2 => Op::Cast,
        3 if Status::from_code(code).is_none() => return Err(Malformed::Status(code)),
        3 => Op::Reply,
        4 => Op::Part,
        5 => Op::Ping,
        6 => Op::Pong,
        other => return Err(Malformed::Op(other)),
    };
    let [id, deadline_ms] = [number(rest)?, number(rest)?];
    let length = u32::from_be_bytes(take(rest)?) as usize;
    Ok((Item { op, code, id, deadline_ms, body: &[] }, length))
}

/// Appends an item. Its body is shorter than 4 GiB, which the callers see to.
pub(super) fn put(to: &mut Vec<u8>, item: Item<'_>) {
    to.reserve(ITEM_BYTES + item.body.len());
    to.extend([item.op as u8, item.code]);
    to.extend(item.id.to_be_bytes());
    to.extend(item.deadline_ms.to_be_bytes());
    to.extend((item.body.len() as u32).to_be_bytes());
    to.extend(item.body);
}

/// Writes the header into the room that was left for it: the first [`HEADER_BYTES`] of `frame`, which has them.
pub(super) fn put_header(frame: &mut [u8], header: &Header) {
    let mut bytes = Vec::with_capacity(HEADER_BYTES);
    bytes.extend(MAGIC);
    bytes.extend([VERSION, 0]);
    bytes.extend(header.session.0);
    bytes.extend(header.from.0);
    for number in [header.sent, header.received, header.clock_ms] {
        bytes.extend(number.to_be_bytes());
    }
    if let Some(room) = frame.first_chunk_mut::<HEADER_BYTES>() {
        room.copy_from_slice(&bytes);
    }
}

fn take<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], Malformed> {
    let (taken, behind) = rest.split_first_chunk::<N>().ok_or(Malformed::Short)?;
    *rest = behind;
    Ok(*taken)
}

fn number(rest: &mut &[u8]) -> Result<u64, Malformed> {
    take(rest).map(u64::from_be_bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ops() -> impl Strategy<Value = (Op, u8)> {
        prop_oneof![
            any::<u8>().prop_map(|kind| (Op::Request, kind)),
            any::<u8>().prop_map(|kind| (Op::Cast, kind)),
            (0u8..=5).prop_map(|status| (Op::Reply, status)),
            Just((Op::Part, 0)),
            Just((Op::Ping, 0)),
            Just((Op::Pong, 0)),
        ]
    }

    type Drawn = Vec<((Op, u8), u64, u64, Vec<u8>)>;

    fn drawn() -> impl Strategy<Value = Drawn> {
        prop::collection::vec((ops(), any::<u64>(), any::<u64>(), prop::collection::vec(any::<u8>(), 0..99)), 0..9)
    }

    fn frame(head: &Header, drawn: &Drawn) -> Vec<u8> {
        let mut frame = vec![0; HEADER_BYTES];
        for ((op, code), id, deadline_ms, body) in drawn {
            put(&mut frame, Item { op: *op, code: *code, id: *id, deadline_ms: *deadline_ms, body });
        }
        put_header(&mut frame, head);
        frame
    }

    proptest! {
        #[test]
        fn what_was_put_is_read(session: [u8; 16], disk: [u8; 16], sent: u64, received: u64, clock_ms: u64, drawn in drawn()) {
            let head = Header { session: SessionId(session), from: DiskId(disk), sent, received, clock_ms };
            let frame = frame(&head, &drawn);
            let (read, rest) = header(&frame).unwrap();
            prop_assert_eq!(read, head);
            let items = items(rest).unwrap();
            prop_assert_eq!(items.len(), drawn.len());
            for (item, ((op, code), id, deadline_ms, body)) in items.iter().zip(&drawn) {
                prop_assert_eq!(*item, Item { op: *op, code: *code, id: *id, deadline_ms: *deadline_ms, body });
            }
        }

        #[test]
        fn no_bytes_make_the_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = header(&bytes);
            let _ = items(&bytes);
        }

        #[test]
        fn a_frame_that_was_damaged_is_read_or_refused_but_does_no_harm(drawn in drawn(), at: prop::sample::Index, with: u8, cut: prop::sample::Index) {
            let head = Header { session: SessionId([1; 16]), from: DiskId([2; 16]), sent: 3, received: 4, clock_ms: 5 };
            let mut frame = frame(&head, &drawn);
            let at = at.index(frame.len());
            frame[at] = with;
            frame.truncate(cut.index(frame.len() + 1));
            if let Ok((_, rest)) = header(&frame) {
                let _ = items(rest);
            }
        }
    }

    #[test]
    fn a_length_that_lies_is_refused_before_anything_is_allocated() {
        let mut frame = vec![0; HEADER_BYTES];
        put(&mut frame, Item { op: Op::Cast, code: 1, id: 0, deadline_ms: 0, body: b"abc" });
        let at = HEADER_BYTES + ITEM_BYTES - 4;
        frame[at..at + 4].copy_from_slice(&u32::MAX.to_be_bytes());
        assert_eq!(items(&frame[HEADER_BYTES..]), Err(Malformed::Short));
    }
}
