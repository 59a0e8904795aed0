//! One link's traffic: what waits to be sent, who waits for an answer, and how much may be under way.
//!
//! All that is queued travels in one frame. A sender that takes what is there, as soon as something is, takes one request at a time; so it lets
//! everybody who is ready queue first, which is a single `yield_now`. That alone makes it four to seven times faster than a message per request.
//!
//! Two lanes: small items, and behind them bulk, of which a piece goes into a frame that is not full already. Messages longer than a piece are cut
//! and travel as bulk, one after the other.
//!
//! Invariants:
//! - Nothing here grows without bound: requests that wait for an answer, bytes queued, bytes sent and not acknowledged, requests being served.
//! - Nobody waits for room, except for bulk: a caller is told [`CallError::Overloaded`].
//! - A flow belongs to one connection. When that is down every caller is told so, and nothing is sent again over the next one.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use kuma_core::DiskId;
use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore, oneshot};

use super::{
    CallError, LinkLimits,
    frame::{self, HEADER_BYTES, Header, ITEM_BYTES, Item, Malformed, Op, SessionId, Status},
};

/// A frame is closed when it has this much. ractor_cluster is told to accept four times as much.
pub(super) const FRAME_BYTES: usize = 256 << 10;
/// Of bulk, and of the pieces of long messages.
pub(super) const PIECE_BYTES: usize = 64 << 10;
/// The longest message.
pub(super) const MESSAGE_BYTES_MAX: usize = 16 << 20;
/// Sent and not acknowledged.
const WINDOW_BYTES: u64 = 1 << 20;
/// Bulk under way on a link.
const BULK_BYTES: usize = 256 << 10;
/// What a piece of bulk counts for at least, so that many small ones are bounded too.
const BULK_BYTES_MIN: usize = 4 << 10;
/// Bodies of requests that are being served for one peer.
const SERVED_BYTES_MAX: usize = 64 << 20;
/// A deadline is not further off; what is not answered has this one.
const WITHIN_MAX: Duration = Duration::from_secs(24 * 3600);
/// How often the time to the peer and back is measured.
const PING_EVERY: Duration = Duration::from_secs(1);

type Answer = (Status, Vec<u8>);

/// See the module.
pub(super) struct Flow {
    own: DiskId,
    peer: DiskId,
    session: SessionId,
    began: Instant,
    limits: LinkLimits,
    state: Mutex<State>,
    kick: Notify,
    credits: Semaphore,
    bulk: Semaphore,
    next_id: AtomicU64,
    serving: AtomicUsize,
    serving_bytes: AtomicUsize,
}

#[derive(Default)]
struct State {
    batches: VecDeque<Batch>,
    pieces: VecDeque<Vec<u8>>,
    /// How much of the first of `pieces` has left.
    begun: usize,
    /// Bytes in either lane, by who they are for: requests that fill the queue do not keep answers from being sent.
    requests: usize,
    replies: usize,
    pending: HashMap<u64, oneshot::Sender<Answer>>,
    sent: u64,
    acknowledged: u64,
    received: u64,
    received_told: u64,
    assembling: Vec<u8>,
    ping: Option<(u64, Instant)>,
    round_trip: Option<Duration>,
    is_down: bool,
}

/// A frame that is being filled: room for the header first.
struct Batch {
    bytes: Vec<u8>,
    replies: usize,
}

/// A request of the peer. Without an id nobody waits for an answer.
pub(super) struct Asked {
    pub(super) kind: u8,
    pub(super) id: Option<u64>,
    pub(super) body: Vec<u8>,
    pub(super) deadline: Instant,
}

/// Counters of a link.
#[derive(Clone, Copy, Debug)]
pub(super) struct Counters {
    pub(super) sent: u64,
    pub(super) received: u64,
    pub(super) round_trip: Option<Duration>,
}

impl Flow {
    pub(super) fn new(own: DiskId, peer: DiskId, session: SessionId, limits: LinkLimits) -> Self {
        Flow {
            own,
            peer,
            session,
            began: Instant::now(),
            limits,
            state: Mutex::default(),
            kick: Notify::new(),
            credits: Semaphore::new(limits.calls_max),
            bulk: Semaphore::new(BULK_BYTES),
            next_id: AtomicU64::new(1),
            serving: AtomicUsize::new(0),
            serving_bytes: AtomicUsize::new(0),
        }
    }

    /// Sends a request and waits for its answer.
    pub(super) async fn call(&self, kind: u8, body: &[u8], within: Duration) -> Result<Vec<u8>, CallError> {
        let _credit = self.credits.try_acquire().map_err(|_| CallError::Overloaded)?;
        self.ask(kind, body, Instant::now() + within, false).await
    }

    /// Waits for its turn, sends a piece of bulk and waits for its answer.
    pub(super) async fn call_bulk(&self, kind: u8, body: &[u8], within: Duration) -> Result<Vec<u8>, CallError> {
        let deadline = Instant::now() + within;
        let turn = self.bulk.acquire_many(body.len().max(BULK_BYTES_MIN) as u32);
        // It has not been sent yet: that it was too much is all there is to say.
        let _turn = tokio::time::timeout_at(deadline.into(), turn)
            .await
            .map_err(|_| CallError::Overloaded)?
            .map_err(|_| CallError::NotConnected)?;
        self.ask(kind, body, deadline, true).await
    }

    async fn ask(&self, kind: u8, body: &[u8], deadline: Instant, is_bulk: bool) -> Result<Vec<u8>, CallError> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (answer, answered) = oneshot::channel();
        let item = Item { op: Op::Request, code: kind, id, deadline_ms: self.clock_ms(deadline), body };
        {
            let mut state = self.state.lock();
            state.admit(self.limits.queued_bytes_max)?;
            state.pending.insert(id, answer);
            state.put(item, is_bulk);
        }
        // From here on: whoever drops the call takes its entry along.
        let _entry = Entry { flow: self, id };
        self.kick.notify_one();
        let (status, body) = tokio::time::timeout_at(deadline.into(), answered)
            .await
            .map_err(|_| CallError::Deadline)?
            .map_err(|_| CallError::Down)?;
        match status {
            Status::Done => Ok(body),
            Status::UnknownKind => Err(CallError::UnknownKind { kind }),
            Status::Overloaded => Err(CallError::Overloaded),
            Status::Expired => Err(CallError::Expired),
            Status::Failed => Err(CallError::Failed),
            Status::ReplyDropped => Err(CallError::ReplyDropped),
        }
    }

    /// Sends something that is not answered.
    pub(super) fn cast(&self, kind: u8, body: &[u8]) -> Result<(), CallError> {
        let mut state = self.state.lock();
        state.admit(self.limits.queued_bytes_max)?;
        state.put(Item { op: Op::Cast, code: kind, id: 0, deadline_ms: u64::MAX, body }, false);
        drop(state);
        self.kick.notify_one();
        Ok(())
    }

    /// Answers a request of the peer.
    pub(super) fn reply(&self, id: u64, status: Status, body: &[u8]) {
        let mut state = self.state.lock();
        let fits = body.len() <= MESSAGE_BYTES_MAX && state.replies < self.limits.queued_bytes_max;
        let (status, body) = if fits || body.is_empty() { (status, body) } else { (Status::ReplyDropped, &[][..]) };
        if !state.is_down {
            state.put(Item { op: Op::Reply, code: status as u8, id, deadline_ms: 0, body }, false);
        }
        drop(state);
        self.kick.notify_one();
    }

    /// The next frame to send. None: the link is down.
    pub(super) async fn next_frame(&self) -> Option<Vec<u8>> {
        loop {
            // Everybody who is ready queues first.
            tokio::task::yield_now().await;
            {
                let mut state = self.state.lock();
                if state.is_down {
                    return None;
                }
                if let Some(frame) = self.take(&mut state) {
                    return Some(frame);
                }
            }
            // The timer is for the ping alone.
            let _ = tokio::time::timeout(PING_EVERY, self.kick.notified()).await;
        }
    }

    fn take(&self, state: &mut State) -> Option<Vec<u8>> {
        self.ping(state);
        let is_open = state.sent - state.acknowledged < WINDOW_BYTES;
        let has_some = !state.batches.is_empty() || !state.pieces.is_empty();
        let owes = state.received - state.received_told >= WINDOW_BYTES / 4;
        if !(is_open && has_some || owes) {
            return None;
        }
        // A frame without items is not counted, so it may pass a window that is shut.
        let mut frame = if is_open { state.next_batch() } else { vec![0; HEADER_BYTES] };
        state.sent += (frame.len() - HEADER_BYTES) as u64;
        state.received_told = state.received;
        let header = Header {
            session: self.session,
            from: self.own,
            sent: state.sent,
            received: state.received,
            clock_ms: self.clock_ms(Instant::now()),
        };
        frame::put_header(&mut frame, &header);
        Some(frame)
    }

    fn ping(&self, state: &mut State) {
        let now = Instant::now();
        if state.ping.is_none_or(|(_, at)| now - at >= PING_EVERY) {
            let id = self.next_id.fetch_add(1, Ordering::Relaxed);
            state.ping = Some((id, now));
            state.put(Item { op: Op::Ping, code: 0, id, deadline_ms: 0, body: &[] }, false);
        }
    }

    /// Takes a frame of this session: answers go to their callers, the rest is handed back.
    pub(super) fn take_frame(&self, header: &Header, rest: &[u8]) -> Result<Vec<Asked>, Malformed> {
        if header.from != self.peer {
            return Err(Malformed::Sender);
        }
        let (items, now) = (frame::items(rest)?, Instant::now());
        let mut asked = Vec::new();
        let mut state = self.state.lock();
        let state = &mut *state;
        if state.is_down {
            return Ok(asked);
        }
        // Frames of a session come in order or not at all: a sum that does not fit means that one is missing.
        if header.sent != state.received.saturating_add(rest.len() as u64) || header.received > state.sent {
            return Err(Malformed::Gap);
        }
        state.received = header.sent;
        state.acknowledged = state.acknowledged.max(header.received);
        for item in items {
            if item.op != Op::Part {
                state.take_item(item, header.clock_ms, now, &mut asked);
                continue;
            }
            state.assembling.extend_from_slice(item.body);
            let mut assembled = state.assembling.as_slice();
            let (whole, length) = frame::item_header(&mut assembled).map_err(|_| Malformed::Pieces)?;
            if length > MESSAGE_BYTES_MAX || assembled.len() > length || whole.op == Op::Part {
                return Err(Malformed::Pieces);
            }
            if assembled.len() == length {
                let whole = std::mem::take(&mut state.assembling);
                for item in frame::items(&whole)? {
                    state.take_item(item, header.clock_ms, now, &mut asked);
                }
            }
        }
        // Acknowledgements may have opened the window, or be owed, or a pong waits.
        self.kick.notify_one();
        Ok(asked)
    }

    /// A request is about to be served. None: there are too many already.
    pub(super) fn serve(self: &Arc<Self>, id: Option<u64>, bytes: usize) -> Option<Serving> {
        let (count, sum) = (self.serving.fetch_add(1, Ordering::Relaxed), &self.serving_bytes);
        let sum = sum.fetch_add(bytes, Ordering::Relaxed);
        let is_room = count < self.limits.served_max && (sum == 0 || sum + bytes <= SERVED_BYTES_MAX);
        let mut serving = Serving { flow: self.clone(), id, bytes, status: Status::Failed, body: Vec::new() };
        if !is_room {
            serving.status = Status::Overloaded; // which is said as it is dropped
            return None;
        }
        Some(serving)
    }

    /// The link is down: everybody is told, and what was queued is discarded.
    pub(super) fn down(&self) {
        let taken = {
            let mut state = self.state.lock();
            let (sent, received) = (state.sent, state.received);
            std::mem::replace(&mut *state, State { is_down: true, sent, received, ..State::default() })
        };
        self.bulk.close();
        self.kick.notify_one();
        drop(taken);
    }

    pub(super) fn counters(&self) -> Counters {
        let state = self.state.lock();
        Counters { sent: state.sent, received: state.received, round_trip: state.round_trip }
    }

    /// Bytes that wait to be sent, and callers that wait for an answer.
    #[cfg(test)]
    pub(super) fn load(&self) -> (usize, usize) {
        let state = self.state.lock();
        (state.requests + state.replies, state.pending.len())
    }

    fn clock_ms(&self, at: Instant) -> u64 {
        at.saturating_duration_since(self.began).as_millis() as u64
    }
}

impl State {
    fn admit(&self, queued_bytes_max: usize) -> Result<(), CallError> {
        if self.is_down {
            return Err(CallError::NotConnected);
        }
        // What is there already counts, so that the longest message fits into an empty queue.
        if self.requests >= queued_bytes_max { Err(CallError::Overloaded) } else { Ok(()) }
    }

    fn put(&mut self, item: Item<'_>, is_bulk: bool) {
        let bytes = ITEM_BYTES + item.body.len();
        let is_reply = item.op == Op::Reply;
        *if is_reply { &mut self.replies } else { &mut self.requests } += bytes;
        if is_bulk || item.body.len() > PIECE_BYTES {
            let mut whole = Vec::with_capacity(bytes);
            frame::put(&mut whole, item);
            self.pieces.push_back(whole);
            return;
        }
        if self.batches.back().is_none_or(|last| last.bytes.len() + bytes > FRAME_BYTES) {
            self.batches.push_back(Batch { bytes: vec![0; HEADER_BYTES], replies: 0 });
        }
        if let Some(last) = self.batches.back_mut() {
            frame::put(&mut last.bytes, item);
            last.replies += if is_reply { bytes } else { 0 };
        }
    }

    /// What the next frame has in it, behind the room for its header.
    fn next_batch(&mut self) -> Vec<u8> {
        let Batch { bytes: mut frame, replies } =
            self.batches.pop_front().unwrap_or_else(|| Batch { bytes: vec![0; HEADER_BYTES], replies: 0 });
        self.replies -= replies;
        self.requests -= frame.len() - HEADER_BYTES - replies;
        if frame.len() >= PIECE_BYTES {
            return frame;
        }
        let Some(whole) = self.pieces.front() else { return frame };
        let taken = if whole.len() <= ITEM_BYTES + PIECE_BYTES {
            frame.extend_from_slice(whole);
            whole.len()
        } else {
            let piece = &whole[self.begun..whole.len().min(self.begun + PIECE_BYTES)];
            frame::put(&mut frame, Item { op: Op::Part, code: 0, id: 0, deadline_ms: 0, body: piece });
            piece.len()
        };
        *if whole[0] == Op::Reply as u8 { &mut self.replies } else { &mut self.requests } -= taken;
        self.begun += taken;
        if self.begun == whole.len() {
            self.pieces.pop_front();
            self.begun = 0;
        }
        frame
    }

    fn take_item(&mut self, item: Item<'_>, clock_ms: u64, now: Instant, asked: &mut Vec<Asked>) {
        let Item { op, code, id, deadline_ms, body } = item;
        let left = Duration::from_millis(deadline_ms.saturating_sub(clock_ms)).min(WITHIN_MAX);
        let ask = |id| Asked { kind: code, id, body: body.to_vec(), deadline: now + left };
        let answer = |op, code| Item { op, code, id, deadline_ms: 0, body: &[] };
        match op {
            Op::Request if left.is_zero() => self.put(answer(Op::Reply, Status::Expired as u8), false),
            Op::Request => asked.push(ask(Some(id))),
            Op::Cast => asked.push(ask(None)),
            Op::Reply => {
                // Nobody there: the caller has given up.
                let caller = self.pending.remove(&id).zip(Status::from_code(code));
                if let Some((caller, status)) = caller {
                    let _ = caller.send((status, body.to_vec()));
                }
            }
            Op::Ping => self.put(answer(Op::Pong, 0), false),
            Op::Pong => {
                self.round_trip = self.ping.filter(|ping| ping.0 == id).map(|ping| now - ping.1).or(self.round_trip);
            }
            Op::Part => {}
        }
    }
}

/// The entry of a caller; it goes with the caller, whatever made him go.
struct Entry<'a> {
    flow: &'a Flow,
    id: u64,
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        self.flow.state.lock().pending.remove(&self.id);
    }
}

/// A request of the peer that is being served. It is answered when this is dropped, also by a panic.
pub(super) struct Serving {
    flow: Arc<Flow>,
    id: Option<u64>,
    bytes: usize,
    status: Status,
    body: Vec<u8>,
}

impl Serving {
    /// Answers it.
    pub(super) fn end(mut self, status: Status, body: Vec<u8>) {
        (self.status, self.body) = (status, body);
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.flow.serving.fetch_sub(1, Ordering::Relaxed);
        self.flow.serving_bytes.fetch_sub(self.bytes, Ordering::Relaxed);
        if let Some(id) = self.id {
            self.flow.reply(id, self.status, &self.body);
        }
    }
}
