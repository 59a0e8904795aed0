//! Server-sent events: a stream of text becomes messages.
//!
//! As <https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation> has it. Invariants:
//! - However the bytes are cut on their way, the messages are the same; a message that was cut off at the end of the stream is none.
//! - The last id stands until another one comes, also one that came without data.

use super::ClientError;

/// The largest message. An event has at most 1 MiB; escaped as JSON it can take six times of it.
const MESSAGE_BYTES_MAX: usize = 32 << 20;

/// A message of the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SseMessage {
    /// What it is: `message` if the stream does not say.
    pub event: String,
    /// Its data; several lines of it are joined by line breaks.
    pub data: String,
    /// The last id of the stream; empty if there was none.
    pub id: String,
}

/// Makes messages of bytes.
#[derive(Debug, Default)]
pub(super) struct SseParser {
    line: Vec<u8>,
    /// The byte before was `\r`, whose line has ended; a `\n` behind it belongs to it.
    after_return: bool,
    /// A byte order mark may stand at the beginning.
    has_begun: bool,
    event: String,
    data: String,
    has_data: bool,
    id: Option<String>,
    last_id: String,
    messages: std::collections::VecDeque<SseMessage>,
}

impl SseParser {
    /// A parser of a stream that goes on behind `last_id`.
    pub(super) fn behind(last_id: &str) -> Self {
        SseParser { last_id: last_id.to_owned(), ..SseParser::default() }
    }

    /// More of the stream.
    ///
    /// # Errors
    /// A message is larger than any that a node sends.
    pub(super) fn push(&mut self, mut piece: &[u8]) -> Result<(), ClientError> {
        if self.after_return && piece.first() == Some(&b'\n') {
            piece = &piece[1..];
        }
        if !piece.is_empty() {
            self.after_return = false;
        }
        while let Some(end) = piece.iter().position(|byte| matches!(byte, b'\r' | b'\n')) {
            self.line.extend_from_slice(&piece[..end]);
            let is_return = piece[end] == b'\r';
            piece = &piece[end + 1..];
            match piece.first() {
                Some(b'\n') if is_return => piece = &piece[1..],
                None => self.after_return = is_return,
                _ => {}
            }
            let line = std::mem::take(&mut self.line);
            self.take_line(&line);
            // Its memory is used for the next line.
            self.line = line;
            self.line.clear();
            self.check_size(0)?;
        }
        self.check_size(piece.len())?;
        self.line.extend_from_slice(piece);
        Ok(())
    }

    fn check_size(&self, more: usize) -> Result<(), ClientError> {
        let bytes = self.line.len() + self.data.len() + more;
        if bytes > MESSAGE_BYTES_MAX {
            return Err(ClientError::Unexpected(format!(
                "a message of the stream is larger than {MESSAGE_BYTES_MAX} bytes; what answers there is no node of this version"
            )));
        }
        Ok(())
    }

    fn take_line(&mut self, mut line: &[u8]) {
        if !std::mem::replace(&mut self.has_begun, true) {
            line = line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(line);
        }
        if line.is_empty() {
            return self.dispatch();
        }
        let colon = line.iter().position(|byte| *byte == b':');
        let (name, value) = match colon {
            // A comment: a sign of life.
            Some(0) => return,
            Some(colon) => (&line[..colon], &line[colon + 1..]),
            None => (line, &b""[..]),
        };
        let value = String::from_utf8_lossy(value.strip_prefix(b" ").unwrap_or(value));
        match name {
            b"event" => self.event = value.into_owned(),
            b"data" => {
                if std::mem::replace(&mut self.has_data, true) {
                    self.data.push('\n');
                }
                self.data.push_str(&value);
            }
            b"id" if !value.contains('\0') => self.id = Some(value.into_owned()),
            // How long to wait before reconnecting is for this side to know; other fields are for later versions.
            _ => {}
        }
    }

    fn dispatch(&mut self) {
        if let Some(id) = self.id.take() {
            self.last_id = id;
        }
        let (event, data) = (std::mem::take(&mut self.event), std::mem::take(&mut self.data));
        if std::mem::take(&mut self.has_data) {
            let event = if event.is_empty() { "message".to_owned() } else { event };
            self.messages.push_back(SseMessage { event, data, id: self.last_id.clone() });
        }
    }

    /// The next whole message.
    pub(super) fn next(&mut self) -> Option<SseMessage> {
        self.messages.pop_front()
    }

    /// The last id that a whole block had, also one without data.
    pub(super) fn last_id(&self) -> &str {
        &self.last_id
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(pieces: &[&[u8]]) -> (Vec<SseMessage>, String) {
        let mut parser = SseParser::default();
        let mut messages = Vec::new();
        for piece in pieces {
            parser.push(piece).unwrap();
            messages.extend(std::iter::from_fn(|| parser.next()));
        }
        (messages, parser.last_id().to_owned())
    }

    fn message(event: &str, data: &str, id: &str) -> SseMessage {
        SseMessage { event: event.to_owned(), data: data.to_owned(), id: id.to_owned() }
    }

    #[test]
    fn what_a_node_sends_is_understood() {
        let text = b"retry: 1000\n: kuma\nid: c0\n\nid: c1\nevent: event\ndata: {\"n\":1}\n\n: still here\n\nid: c2\nevent: erased\ndata: {}\n\n";
        let (messages, id) = parse(&[text]);
        assert_eq!(messages, [message("event", "{\"n\":1}", "c1"), message("erased", "{}", "c2")]);
        assert_eq!(id, "c2");
    }

    #[test]
    fn lines_of_data_are_joined_and_ends_of_lines_may_differ() {
        for end in ["\n", "\r\n", "\r"] {
            let text = ["data: one", "data:two", "data", "event: e", "", "data: x", "", ""].join(end);
            let expected = [message("e", "one\ntwo\n", ""), message("message", "x", "")];
            assert_eq!(parse(&[text.as_bytes()]).0, expected, "{end:?}");
        }
    }

    #[test]
    fn an_id_without_data_counts_and_one_stands_until_the_next() {
        let (messages, id) = parse(&[b"id: c0\n\ndata: 1\n\nid: c7\ndata: 2\n\n"]);
        assert_eq!(messages, [message("message", "1", "c0"), message("message", "2", "c7")]);
        assert_eq!(id, "c7");
    }

    /// Its id must not count either: what was cut off has to come again.
    #[test]
    fn a_message_that_was_cut_off_is_none() {
        let (messages, id) = parse(&[b"id: c1\ndata: 1\n\nid: c2\ndata: 2\n"]);
        assert_eq!(messages, [message("message", "1", "c1")]);
        assert_eq!(id, "c1");
    }

    #[test]
    fn marks_comments_and_unknown_fields_are_passed_over() {
        let (messages, _) = parse(&[b"\xef\xbb\xbfdata: 1\n: data: no\nother: x\nid: a\0b\n\n"]);
        assert_eq!(messages, [message("message", "1", "")]);
    }

    #[test]
    fn a_stream_without_ends_of_messages_is_refused() {
        let mut parser = SseParser::default();
        let piece = vec![b'x'; 1 << 20];
        let refused = (0..64).any(|_| parser.push(&piece).is_err());
        assert!(refused && parser.line.len() <= MESSAGE_BYTES_MAX);
    }

    proptest! {
        #[test]
        fn cuts_do_not_matter(text in "(data: [a-c]{0,3}|id: [0-9]|event: e|: c|\r\n|\n|\r){0,20}", cuts in prop::collection::vec(0usize..120, 0..8)) {
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(text.len())).chain([0, text.len()]).collect();
            cuts.sort_unstable();
            let pieces: Vec<&[u8]> = cuts.windows(2).map(|cut| &text.as_bytes()[cut[0]..cut[1]]).collect();
            prop_assert_eq!(parse(&pieces), parse(&[text.as_bytes()]));
        }
    }
}
