//! Cuts a stream of bytes into lines.
//!
//! Invariant: however the bytes are cut on their way, the lines are the same.

/// Lines of a stream whose pieces come as they like. Ends of lines are `\n` or `\r\n`, and are left out; so are empty lines.
#[derive(Debug, Default)]
pub(super) struct Lines {
    bytes: Vec<u8>,
    /// What was handed out already, and what has no end of line in it.
    begin: usize,
    searched: usize,
}

impl Lines {
    /// More of the stream.
    pub(super) fn push(&mut self, piece: &[u8]) {
        self.bytes.drain(..self.begin);
        self.searched -= self.begin;
        self.begin = 0;
        self.bytes.extend_from_slice(piece);
    }

    /// The next whole line.
    pub(super) fn next(&mut self) -> Option<&[u8]> {
        loop {
            let rest = self.bytes.get(self.searched..)?;
            let Some(length) = rest.iter().position(|byte| *byte == b'\n') else {
                self.searched = self.bytes.len();
                return None;
            };
            let (begin, end) = (self.begin, self.searched + length);
            (self.begin, self.searched) = (end + 1, end + 1);
            let line = &self.bytes[begin..end];
            let length = line.strip_suffix(b"\r").unwrap_or(line).len();
            if length > 0 {
                return Some(&self.bytes[begin..begin + length]);
            }
        }
    }

    /// How many bytes wait for the end of their line.
    pub(super) fn waiting(&self) -> usize {
        self.bytes.len() - self.begin
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn lines(pieces: &[&[u8]]) -> (Vec<String>, usize) {
        let (mut lines, mut found) = (Lines::default(), Vec::new());
        for piece in pieces {
            lines.push(piece);
            while let Some(line) = lines.next() {
                found.push(String::from_utf8(line.to_vec()).unwrap());
            }
        }
        (found, lines.waiting())
    }

    #[test]
    fn a_line_is_one_however_it_was_cut() {
        assert_eq!(lines(&[b"one\ntwo\r\n\nthr", b"e", b"e\n"]).0, ["one", "two", "three"]);
        assert_eq!(lines(&[b"one\r", b"\n", b"\n", b"two\n"]).0, ["one", "two"]);
    }

    #[test]
    fn what_has_no_end_is_no_line() {
        assert_eq!(lines(&[b"one\ntw", b"o"]), (vec!["one".to_owned()], 3));
    }

    proptest! {
        #[test]
        fn cuts_do_not_matter(text in "[ab\r\n]{0,40}", cuts in prop::collection::vec(0usize..41, 0..6)) {
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(text.len())).chain([0, text.len()]).collect();
            cuts.sort_unstable();
            let pieces: Vec<&[u8]> = cuts.windows(2).map(|cut| &text.as_bytes()[cut[0]..cut[1]]).collect();
            prop_assert_eq!(lines(&pieces), lines(&[text.as_bytes()]));
        }
    }
}
