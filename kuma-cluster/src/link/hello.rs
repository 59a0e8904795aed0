//! What two nodes say to each other before anything else, inside the encrypted connection.
//!
//! ```text
//! dialer                                       listener
//!   "KUMA" min max | router | its hello  ────▶   is this a node that I want?
//!   is this one that I want?             ◀────   accepted, its own "KUMA" … hello, the link that it has with the dialer already
//!   accepted, or not                     ────▶
//! ```
//!
//! Instead of any answer there may be a refusal: a sentence, so that both sides know. The one that dialed speaks last, since it then knows all that
//! both know; and its first message proves that it has the key now, while a recording of somebody else's first message of the handshake gets nowhere.

use std::ops::RangeInclusive;

use super::frame::SessionId;

const MAGIC: &[u8; 4] = b"KUMA";
/// Of what the user of the link has to say.
pub(super) const HELLO_BYTES_MAX: usize = 64 << 10;
/// Of any message of this exchange.
pub(super) const MESSAGE_BYTES_MAX: usize = HELLO_BYTES_MAX + 256;
/// A refusal that is longer is cut.
const SENTENCE_BYTES_MAX: usize = 1024;

/// What a node says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Hello {
    /// The protocols that it speaks.
    pub(super) protocols: RangeInclusive<u16>,
    /// The actor that takes frames, as it is called on its own node.
    pub(super) router: u64,
    /// Of the user of the link.
    pub(super) body: Vec<u8>,
}

impl Hello {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(self.protocols.start().to_be_bytes());
        bytes.extend(self.protocols.end().to_be_bytes());
        bytes.extend(self.router.to_be_bytes());
        bytes.extend(&self.body);
        bytes
    }

    /// Reads a hello. None: it is none.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let (magic, rest) = bytes.split_first_chunk::<4>()?;
        let (min, rest) = rest.split_first_chunk()?;
        let (max, rest) = rest.split_first_chunk()?;
        let (router, body) = rest.split_first_chunk()?;
        let (min, max) = (u16::from_be_bytes(*min), u16::from_be_bytes(*max));
        let is_one = magic == MAGIC && min <= max && body.len() <= HELLO_BYTES_MAX;
        is_one.then(|| Hello { protocols: min..=max, router: u64::from_be_bytes(*router), body: body.to_vec() })
    }

    /// Whether this node and a peer have a protocol in common; a sentence for both sides if they have not.
    pub(super) fn check(&self, peer: &Hello) -> Result<(), String> {
        let (own, other) = (&self.protocols, &peer.protocols);
        if own.start().max(other.start()) <= own.end().min(other.end()) {
            return Ok(());
        }
        let (a, b, c, d) = (own.start(), own.end(), other.start(), other.end());
        Err(format!("one node speaks the link protocols {a} to {b}, the other one {c} to {d}; update the older one"))
    }
}

/// The answer of the listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// It wants the connection, if the dialer does. With the link that the two have already.
    Accepted { hello: Hello, present: Option<SessionId> },
    /// It does not want this peer, and why.
    Refused(String),
}

impl Answer {
    pub(super) fn encode(&self) -> Vec<u8> {
        match self {
            Answer::Accepted { hello, present } => {
                let mut bytes = vec![1, u8::from(present.is_some())];
                bytes.extend(present.map(|id| id.0).unwrap_or_default());
                bytes.extend(hello.encode());
                bytes
            }
            Answer::Refused(sentence) => refusal(sentence),
        }
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let (tag, rest) = bytes.split_first()?;
        match tag {
            0 => Some(Answer::Refused(sentence(rest))),
            1 => {
                let (is_present, rest) = rest.split_first()?;
                let (id, rest) = rest.split_first_chunk()?;
                let present = (*is_present == 1).then_some(SessionId(*id));
                Some(Answer::Accepted { hello: Hello::decode(rest)?, present })
            }
            _ => None,
        }
    }
}

/// The last word, which the dialer has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The connection is a link from now on.
    Accepted,
    /// It does not want this peer, and why.
    Refused(String),
    /// The two have a link already.
    Present,
}

impl Verdict {
    pub(super) fn encode(&self) -> Vec<u8> {
        match self {
            Verdict::Refused(sentence) => refusal(sentence),
            Verdict::Accepted => vec![1],
            Verdict::Present => vec![2],
        }
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        match bytes.split_first()? {
            (0, rest) => Some(Verdict::Refused(sentence(rest))),
            (1, []) => Some(Verdict::Accepted),
            (2, []) => Some(Verdict::Present),
            _ => None,
        }
    }
}

fn refusal(sentence: &str) -> Vec<u8> {
    let mut bytes = vec![0];
    bytes.extend(sentence.as_bytes().iter().take(SENTENCE_BYTES_MAX));
    bytes
}

/// Goes into a log: without control characters, and not longer than a sentence.
fn sentence(bytes: &[u8]) -> String {
    let bytes = bytes.get(..SENTENCE_BYTES_MAX).unwrap_or(bytes);
    String::from_utf8_lossy(bytes).chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hello(protocols: RangeInclusive<u16>) -> Hello {
        Hello { protocols, router: 7, body: b"me".to_vec() }
    }

    #[test]
    fn two_nodes_without_a_common_protocol_are_told_both_ranges() {
        assert_eq!(hello(1..=3).check(&hello(3..=4)), Ok(()));
        let sentence = hello(2..=3).check(&hello(4..=5)).unwrap_err();
        assert!(sentence.contains("2 to 3") && sentence.contains("4 to 5"), "{sentence}");
    }

    #[test]
    fn a_refusal_is_a_sentence_that_does_no_harm_to_a_log() {
        let Some(Answer::Refused(text)) = Answer::decode(b"\0no\nroot: fine\x1b[2J") else { panic!() };
        assert_eq!(text, "no root: fine [2J");
        let long = Answer::Refused("n".repeat(5000)).encode();
        assert!(long.len() <= 1 + SENTENCE_BYTES_MAX);
    }

    proptest! {
        #[test]
        fn what_was_said_is_heard(min in 0u16..9, more in 0u16..9, router: u64, body: Vec<u8>, present: Option<[u8; 16]>) {
            let hello = Hello { protocols: min..=min + more, router, body };
            prop_assert_eq!(Hello::decode(&hello.encode()), Some(hello.clone()));
            let answer = Answer::Accepted { hello, present: present.map(SessionId) };
            prop_assert_eq!(Answer::decode(&answer.encode()), Some(answer));
            for verdict in [Verdict::Accepted, Verdict::Present, Verdict::Refused("no".into())] {
                prop_assert_eq!(Verdict::decode(&verdict.encode()), Some(verdict));
            }
        }

        #[test]
        fn no_bytes_make_it_panic(bytes: Vec<u8>) {
            let _ = (Hello::decode(&bytes), Answer::decode(&bytes), Verdict::decode(&bytes));
        }
    }
}
