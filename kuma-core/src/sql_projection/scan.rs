//! The tokens of SQL, as SQLite sees them, and no more of it than is needed to tell where a statement ends and what is a comment.
//!
//! Invariants:
//! - Whatever is in a string, a quoted name or a comment is one token. So nothing in there ends a statement or begins a block.
//! - The tokens of a text do not overlap, and between them is nothing but white space.
//!
//! Sources: <https://sqlite.org/lang_keywords.html> (quoting), <https://sqlite.org/c3ref/complete.html> (where a trigger ends).

/// What a token is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TokenKind {
    /// A keyword, a name without quotes, or a number.
    Word,
    /// A name in double quotes, back quotes or brackets.
    Name,
    /// A string.
    Text,
    /// `:name` and its unwelcome relatives: `@name`, `$name`, `#name`, `?`, `?1`.
    Parameter,
    /// From `--` to the end of the line.
    LineComment,
    /// From `/*` to `*/`.
    BlockComment,
    /// `;`
    Semicolon,
    /// Any other character.
    Other,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Token<'a> {
    pub(super) kind: TokenKind,
    /// Where it begins, in bytes.
    pub(super) at: usize,
    pub(super) text: &'a str,
}

impl Token<'_> {
    pub(super) fn end(&self) -> usize {
        self.at + self.text.len()
    }

    pub(super) fn is_comment(&self) -> bool {
        matches!(self.kind, TokenKind::LineComment | TokenKind::BlockComment)
    }

    /// Whether it is this keyword.
    pub(super) fn is_word(&self, word: &str) -> bool {
        self.kind == TokenKind::Word && self.text.eq_ignore_ascii_case(word)
    }

    /// What is between the quotes, if there are quotes. Doubled quotes stay doubled.
    pub(super) fn unquoted(&self) -> &str {
        match self.kind {
            TokenKind::Name | TokenKind::Text => self.text.get(1..self.text.len() - 1).unwrap_or_default(),
            _ => self.text,
        }
    }
}

/// A quote or a comment that does not end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Unended {
    /// Where it begins.
    pub(super) at: usize,
    /// What it is, and what would end it.
    pub(super) what: &'static str,
}

/// The tokens of `text`. The last one is an error if it does not end.
pub(super) fn tokens(text: &str) -> Tokens<'_> {
    Tokens { text, at: 0 }
}

pub(super) struct Tokens<'a> {
    text: &'a str,
    at: usize,
}

/// SQLite takes every character beyond ASCII for a letter.
fn is_word_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'$' || byte >= 0x80
}

fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\n' | b'\r' | 0x0c)
}

/// How many bytes at the beginning are such bytes.
fn run(bytes: &[u8], is_one: impl Fn(u8) -> bool) -> usize {
    bytes.iter().position(|byte| !is_one(*byte)).unwrap_or(bytes.len())
}

/// The length of what begins with a quote; inside, the quote is doubled.
fn quoted(bytes: &[u8], quote: u8) -> Option<usize> {
    let mut at = 1;
    loop {
        at += bytes.get(at..)?.iter().position(|byte| *byte == quote)? + 1;
        match bytes.get(at) {
            Some(next) if *next == quote => at += 1,
            _ => return Some(at),
        }
    }
}

impl<'a> Iterator for Tokens<'a> {
    type Item = Result<Token<'a>, Unended>;

    fn next(&mut self) -> Option<Self::Item> {
        use TokenKind::*;

        self.at += run(self.text.as_bytes().get(self.at..)?, is_space);
        let (at, rest) = (self.at, self.text.as_bytes().get(self.at..)?);
        let (first, second) = (*rest.first()?, rest.get(1).copied().unwrap_or_default());
        let sized = |kind, length: Option<usize>, what| length.map(|length| (kind, length)).ok_or(Unended { at, what });
        let found = match (first, second) {
            (b'-', b'-') => Ok((LineComment, run(rest, |byte| byte != b'\n'))),
            (b'/', b'*') => {
                let end = rest.windows(2).skip(2).position(|pair| pair == b"*/").map(|position| position + 4);
                sized(BlockComment, end, "a comment that is not ended by `*/`")
            }
            (b'\'', _) => sized(Text, quoted(rest, b'\''), "a string that is not ended by `'`"),
            (b'"', _) => sized(Name, quoted(rest, b'"'), "a name that is not ended by `\"`"),
            (b'`', _) => sized(Name, quoted(rest, b'`'), "a name that is not ended by a back quote"),
            (b'[', _) => {
                let end = rest.iter().position(|byte| *byte == b']').map(|position| position + 1);
                sized(Name, end, "a name that is not ended by `]`")
            }
            (b';', _) => Ok((Semicolon, 1)),
            (b'?', _) => Ok((Parameter, 1 + run(&rest[1..], |byte| byte.is_ascii_digit()))),
            (b':' | b'@' | b'#' | b'$', next) if is_word_byte(next) => {
                Ok((Parameter, 1 + run(&rest[1..], is_word_byte)))
            }
            (byte, _) if is_word_byte(byte) => Ok((Word, run(rest, is_word_byte))),
            _ => Ok((Other, 1)),
        };
        Some(match found {
            Ok((kind, length)) => {
                self.at += length;
                // Every token ends before an ASCII byte, or after one: the place is between characters.
                Ok(Token { kind, at, text: self.text.get(at..self.at).unwrap_or_default() })
            }
            Err(unended) => {
                self.at = self.text.len();
                Err(unended)
            }
        })
    }
}

/// The tokens of SQL that is known to be whole, without its comments.
pub(super) fn significant(sql: &str) -> impl Iterator<Item = Token<'_>> {
    tokens(sql).filter_map(Result::ok).filter(|token| !token.is_comment())
}

/// Tells, fed with the tokens of a statement, whether a semicolon ends it. Within a trigger only that one does which follows `; END`.
#[derive(Debug, Default)]
pub(super) struct StatementEnd {
    words: usize,
    is_create: bool,
    is_trigger: bool,
    within: Within,
}

/// Where in a trigger.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Within {
    #[default]
    Step,
    AfterSemicolon,
    AfterEnd,
}

impl StatementEnd {
    /// Whether this token, not a comment, is the statement's last one.
    pub(super) fn is_last(&mut self, token: &Token<'_>) -> bool {
        if token.kind == TokenKind::Semicolon {
            if !self.is_trigger || self.within == Within::AfterEnd {
                return true;
            }
            self.within = Within::AfterSemicolon;
            return false;
        }
        match self.words {
            0 => self.is_create = token.is_word("CREATE"),
            1 => self.is_trigger = self.is_create && token.is_word("TRIGGER"),
            2 => self.is_trigger |= self.is_create && token.is_word("TRIGGER"),
            _ => {}
        }
        // `CREATE TEMP TRIGGER`; of `CREATE TABLE trigger` it is not to be thought.
        if self.words == 1 && !token.is_word("TEMP") && !token.is_word("TEMPORARY") {
            self.is_create = false;
        }
        self.words += 1;
        let is_end = self.within == Within::AfterSemicolon && token.is_word("END");
        self.within = if is_end { Within::AfterEnd } else { Within::Step };
        false
    }

    pub(super) fn is_trigger(&self) -> bool {
        self.is_trigger
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn kinds(text: &str) -> Vec<(TokenKind, &str)> {
        tokens(text).map(|token| token.unwrap()).map(|token| (token.kind, token.text)).collect()
    }

    #[test]
    fn nothing_in_quotes_or_comments_is_a_token_of_its_own() {
        use TokenKind::*;
        assert_eq!(
            kinds("a 'it''s; --' \"x;\"\"y\" `p``;` [q;'] -- ;' é\n/* ; ' */;/**/:größe-1->>?2"),
            [
                (Word, "a"),
                (Text, "'it''s; --'"),
                (Name, "\"x;\"\"y\""),
                (Name, "`p``;`"),
                (Name, "[q;']"),
                (LineComment, "-- ;' é"),
                (BlockComment, "/* ; ' */"),
                (Semicolon, ";"),
                (BlockComment, "/**/"),
                (Parameter, ":größe"),
                (Other, "-"),
                (Word, "1"),
                (Other, "-"),
                (Other, ">"),
                (Other, ">"),
                (Parameter, "?2"),
            ]
        );
    }

    #[test]
    fn what_does_not_end_is_found_where_it_begins() {
        for text in ["ab 'x''", "ab \"x", "ab `x", "ab [x", "ab /* x *", "ab /*/"] {
            let last = tokens(text).last().unwrap();
            assert_eq!(last.unwrap_err().at, 3, "{text}");
        }
    }

    fn statements(sql: &str) -> Vec<&str> {
        let (mut found, mut start, mut end) = (Vec::new(), None, StatementEnd::default());
        for token in significant(sql) {
            let from = *start.get_or_insert(token.at);
            if end.is_last(&token) {
                found.push(&sql[from..token.end()]);
                (start, end) = (None, StatementEnd::default());
            }
        }
        found
    }

    #[test]
    fn a_trigger_ends_at_its_own_end() {
        for statement in [
            "CREATE TRIGGER g AFTER INSERT ON t BEGIN UPDATE t SET a = CASE b WHEN 1 THEN 2 END; DELETE FROM u; END;",
            "create temp trigger g after insert on t begin delete from u; /* ; */ end -- ;\n;",
            "CREATE TABLE trigger(a);",
            "CREATE TABLE TEMP TRIGGER;",
            "SELECT ';END;';",
        ] {
            assert_eq!(statements(&format!("{statement} SELECT 1;")), [statement, "SELECT 1;"], "{statement}");
        }
    }

    proptest! {
        /// In order, within the text, and with nothing but white space between them.
        #[test]
        fn the_tokens_of_any_text_make_up_the_text(text in "([ -~\n\r\t]|é|'|\"|/\\*|\\*/|--|;|\\PC){0,60}") {
            let mut at = 0;
            for token in tokens(&text) {
                let Ok(token) = token else { return Ok(()) };
                prop_assert!(!token.text.is_empty());
                prop_assert_eq!(&text[token.at..token.end()], token.text);
                prop_assert!(text[at..token.at].bytes().all(is_space));
                at = token.end();
            }
            prop_assert!(text[at..].bytes().all(is_space));
        }
    }
}
