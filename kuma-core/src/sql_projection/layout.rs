//! The parts of a file: its header, the statements that make its tables, and the blocks of its events. Nothing here knows SQL.
//!
//! ```text
//! header ──first statement──► tables ──-- on ...──► block ──-- on ...──► block ...
//! ```
//!
//! Invariants:
//! - A line comment whose first word is `on`, first in its line, begins a block; inside of a statement it is refused. So no statement
//!   goes to the wrong block because a header was mistaken for a comment, or a semicolon was forgotten.
//! - What looks like a line of the header is one, or is refused: a rule that is not read is a rule that is not kept.

use std::{collections::BTreeMap, ops::Range};

use super::{
    problem::{Part, Problem, did_you_mean, place},
    scan::{StatementEnd, Token, TokenKind, Unended, tokens},
};
use crate::{body::EVENT_NAME_BYTES_MAX, projection::is_name};

/// A file in its parts. Places are byte offsets.
#[derive(Debug, Default)]
pub(super) struct Layout {
    pub(super) name: String,
    pub(super) version: u32,
    /// Where each line about erasure stands, and what it says.
    pub(super) erasure: Vec<(usize, ErasureLine)>,
    /// The statements that make the tables.
    pub(super) tables: Vec<Range<usize>>,
    pub(super) blocks: Vec<Block>,
}

/// A line `-- erasure: ...`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ErasureLine {
    Column { table: String, column: String },
    Block,
    None { reason: String },
}

/// What a block is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Topic {
    /// These events of these kinds; no name for those events of the kind that no block names.
    Events(Vec<(String, Option<String>)>),
    /// An entity that is erased.
    Erased,
}

#[derive(Debug)]
pub(super) struct Block {
    /// Where its header stands.
    pub(super) at: usize,
    pub(super) topic: Topic,
    pub(super) statements: Vec<Range<usize>>,
}

const KEYS: [&str; 3] = ["projection", "version", "erasure"];
const ERASED: &str = "$erased";
const EXAMPLE: &str =
    "`-- on flight.Departed`, `-- on flight.Landed, flight.Diverted`, `-- on flight.*` or `-- on $erased`";
pub(super) const ERASURE_WAYS: &str = "`-- erasure: column TABLE.COLUMN` (rows whose column is the entity's id are deleted), \
    `-- erasure: block` with a block `-- on $erased` (its statements are executed), \
    or `-- erasure: none (WHY)` (the model holds nothing about a person)";

impl Layout {
    /// Takes a file apart.
    pub(super) fn of(text: &str) -> Result<Self, Problem> {
        let mut reader = Reader::default();
        for token in tokens(text) {
            let token = token.map_err(|Unended { at, what }| {
                Problem::new(
                    Part::Layout,
                    at,
                    format!("here begins {what}; everything behind it belongs to it, end it"),
                )
            })?;
            reader.take(text, token)?;
        }
        reader.finish(text)
    }

    /// The statements of the block about erased entities.
    pub(super) fn erased(&self) -> Option<&Block> {
        self.blocks.iter().find(|block| block.topic == Topic::Erased)
    }
}

/// Reads tokens in their order.
#[derive(Default)]
struct Reader {
    layout: Layout,
    name: Option<usize>,
    version: Option<usize>,
    /// Where each event and each star has its block.
    seen: BTreeMap<(String, Option<String>), usize>,
    /// The statement that has begun.
    open: Option<(usize, StatementEnd)>,
}

impl Reader {
    fn take(&mut self, text: &str, token: Token<'_>) -> Result<(), Problem> {
        match token.kind {
            TokenKind::BlockComment => Ok(()),
            TokenKind::LineComment => self.comment(text, token),
            // It ends nothing.
            TokenKind::Semicolon if self.open.is_none() => Ok(()),
            _ => {
                let (start, end) = self.open.get_or_insert_with(|| (token.at, StatementEnd::default()));
                if end.is_last(&token) {
                    let statement = *start..token.end();
                    match self.layout.blocks.last_mut() {
                        Some(block) => block.statements.push(statement),
                        None => self.layout.tables.push(statement),
                    }
                    self.open = None;
                }
                Ok(())
            }
        }
    }

    fn comment(&mut self, text: &str, token: Token<'_>) -> Result<(), Problem> {
        let line_start = text.get(..token.at).and_then(|before| before.rfind('\n')).map_or(0, |newline| newline + 1);
        if !text.get(line_start..token.at).unwrap_or_default().trim().is_empty() {
            return Ok(());
        }
        let said = token.text.trim_start_matches('-').trim();
        let (word, rest) = said.split_once(char::is_whitespace).unwrap_or((said, ""));
        if word.eq_ignore_ascii_case("on") {
            return self.block(text, token.at, rest.trim());
        }
        if self.open.is_some() {
            return Ok(());
        }
        if let Some((key, value)) = said.split_once(':') {
            let (key, is_apart) = (key.trim_end(), value.is_empty() || value.starts_with(char::is_whitespace));
            if self.in_header() && is_key(key) && (is_apart || KEYS.contains(&key)) {
                return self.header(token.at, key, value.trim());
            }
            if KEYS.contains(&key) {
                let reason = format!("`{key}` belongs to the header; write it before the first statement of the file");
                return Err(Problem::new(Part::Header, token.at, reason));
            }
        }
        // `-- version 2`
        if self.in_header() && KEYS.contains(&word) && (word == "erasure" || !rest.trim().contains(char::is_whitespace))
        {
            let reason = format!(
                "a colon is missing behind `{word}`; write `-- {word}: ...`, or begin the comment with another word"
            );
            return Err(Problem::new(Part::Header, token.at, reason));
        }
        Ok(())
    }

    fn in_header(&self) -> bool {
        self.open.is_none() && self.layout.tables.is_empty() && self.layout.blocks.is_empty()
    }

    fn header(&mut self, at: usize, key: &str, value: &str) -> Result<(), Problem> {
        let problem = |reason: String| Err(Problem::new(Part::Header, at, reason));
        match key {
            "projection" => {
                if self.name.replace(at).is_some() {
                    return problem("the projection has a second name here; keep one of the two".to_owned());
                }
                if !is_name(value) {
                    return problem(
                        "this cannot be the name of a projection; a name has 1 to 64 lower-case letters, digits and `_`, a letter first"
                            .to_owned(),
                    );
                }
                self.layout.name = value.to_owned();
            }
            "version" => {
                if self.version.replace(at).is_some() {
                    return problem("the projection has a second version here; keep one of the two".to_owned());
                }
                let version = value.bytes().all(|byte| byte.is_ascii_digit()).then(|| value.parse().ok()).flatten();
                match version {
                    Some(version @ 1..) => self.layout.version = version,
                    _ => return problem(format!("this cannot be a version; write a number from 1 to {}", u32::MAX)),
                }
            }
            "erasure" => {
                let line = erasure(value).map_err(|reason| Problem::new(Part::Erasure, at, reason))?;
                if self.layout.erasure.iter().any(|(_, other)| *other == line) {
                    return Err(Problem::new(Part::Erasure, at, "this line is there twice; take one of the two away"));
                }
                self.layout.erasure.push((at, line));
            }
            _ => {
                return problem(format!(
                    "the header knows no `{key}`{}; it knows `projection`, `version` and `erasure`, and other comments must not begin with a word and a colon",
                    did_you_mean(key, KEYS)
                ));
            }
        }
        Ok(())
    }

    fn block(&mut self, text: &str, at: usize, topic: &str) -> Result<(), Problem> {
        let problem = |reason: String| Err(Problem::new(Part::Layout, at, reason));
        if let Some((start, end)) = &self.open {
            let ending = if end.is_trigger() { "`END;`" } else { "`;`" };
            let (line, _) = place(text, *start);
            return problem(format!(
                "a comment that begins with `on` begins a block, but the statement of line {line} is not ended by {ending} yet; end it, or begin the comment with another word"
            ));
        }
        if self.layout.tables.is_empty() {
            return problem(
                "a block stands before the tables that it is to write; begin with CREATE TABLE statements".to_owned(),
            );
        }
        self.previous_is_not_empty()?;
        let topic = match topic_of(topic) {
            Ok(topic) => topic,
            Err(reason) => return problem(reason),
        };
        let keys = match &topic {
            Topic::Events(events) => events.clone(),
            Topic::Erased => vec![(ERASED.to_owned(), None)],
        };
        for (kind, name) in keys {
            let called = match (kind.as_str(), &name) {
                (ERASED, _) => ERASED.to_owned(),
                (kind, Some(name)) => format!("{kind}.{name}"),
                (kind, None) => format!("{kind}.*"),
            };
            if let Some(first) = self.seen.insert((kind, name), at) {
                let (line, _) = place(text, first);
                return problem(format!(
                    "`{called}` has a block in line {line} already; write all its statements there, they are executed in their order"
                ));
            }
        }
        self.layout.blocks.push(Block { at, topic, statements: Vec::new() });
        Ok(())
    }

    fn previous_is_not_empty(&self) -> Result<(), Problem> {
        match self.layout.blocks.last() {
            Some(block) if block.statements.is_empty() => Err(Problem::new(
                Part::Layout,
                block.at,
                "this block has no statement; write one behind it, or name its events in the header of another block",
            )),
            _ => Ok(()),
        }
    }

    fn finish(self, text: &str) -> Result<Layout, Problem> {
        if let Some((start, end)) = &self.open {
            let ending = if end.is_trigger() { "`END;`, as a trigger is" } else { "`;`" };
            return Err(Problem::new(
                Part::Layout,
                *start,
                format!("the statement that begins here is not ended by {ending}"),
            ));
        }
        self.previous_is_not_empty()?;
        for (place, key, example) in
            [(self.name, "name", "-- projection: carriers"), (self.version, "version", "-- version: 1")]
        {
            if place.is_none() {
                return Err(Problem::new(
                    Part::Header,
                    0,
                    format!("the file says no {key} of its projection; begin it with a line like `{example}`"),
                ));
            }
        }
        if self.layout.tables.is_empty() {
            return Err(Problem::new(
                Part::Layout,
                text.len(),
                "the file makes no table; write CREATE TABLE statements, and then the blocks of its events",
            ));
        }
        if !self.layout.blocks.iter().any(|block| block.topic != Topic::Erased) {
            return Err(Problem::new(
                Part::Layout,
                text.len(),
                format!(
                    "the file has no block for an event, so that its tables would stay empty; write {EXAMPLE}, and statements behind it"
                ),
            ));
        }
        Ok(self.layout)
    }
}

fn is_key(key: &str) -> bool {
    !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-'))
}

/// What a line about erasure says.
fn erasure(value: &str) -> Result<ErasureLine, String> {
    let (way, rest) = value.split_once(char::is_whitespace).unwrap_or((value, ""));
    let rest = rest.trim();
    match way {
        "column" => {
            let mut rest = rest;
            let table = take_name(&mut rest, |letter| letter != '.');
            let column = match rest.strip_prefix('.') {
                Some(behind) => {
                    rest = behind;
                    take_name(&mut rest, |letter| !letter.is_whitespace())
                }
                None => None,
            };
            match (table, column) {
                (Some(table), Some(column)) if rest.is_empty() => Ok(ErasureLine::Column { table, column }),
                _ => Err(
                    "this is not a table and a column; write `-- erasure: column TABLE.COLUMN`, one line for each column"
                        .to_owned(),
                ),
            }
        }
        "block" if rest.is_empty() => Ok(ErasureLine::Block),
        "none" => {
            let reason = rest.strip_prefix('(').and_then(|rest| rest.strip_suffix(')')).unwrap_or_default().trim();
            match reason.is_empty() {
                true => Err("the reason is missing; write `-- erasure: none (WHY)`, and say why the model holds nothing about a person".to_owned()),
                false => Ok(ErasureLine::None { reason: reason.to_owned() }),
            }
        }
        way => Err(format!("this is no rule{}; write {ERASURE_WAYS}", did_you_mean(way, ["column", "block", "none"]))),
    }
}

/// The events that a block's header names.
fn topic_of(said: &str) -> Result<Topic, String> {
    if said == ERASED {
        return Ok(Topic::Erased);
    }
    let unclear = |reason: &str| {
        format!(
            "{reason}; a comment that begins with `on` begins a block: {EXAMPLE}; begin any other comment with another word"
        )
    };
    let (mut events, mut rest) = (Vec::new(), said);
    loop {
        let Some(event) = take_event(&mut rest) else {
            return Err(match rest.starts_with('$') {
                true => unclear(&format!("the only block with a `$` is `{ERASED}`, and it stands alone")),
                false => unclear("this is not an event's kind, a dot and the event's name"),
            });
        };
        events.push(event);
        rest = rest.trim_start();
        match rest.strip_prefix(',') {
            Some(behind) => rest = behind.trim_start(),
            None if rest.is_empty() => return Ok(Topic::Events(events)),
            None => return Err(unclear("events are separated by commas, and nothing stands behind them")),
        }
    }
}

/// `kind.Event`, `kind.*` or `kind."any name"`. Kinds may have dots in them, names without quotes have none.
fn take_event(rest: &mut &str) -> Option<(String, Option<String>)> {
    let is_plain = |letter: char| !letter.is_whitespace() && !matches!(letter, ',' | '"');
    let plain_length = rest.find(|letter| !is_plain(letter)).unwrap_or(rest.len());
    let (plain, behind) = rest.split_at_checked(plain_length)?;
    let (kind, name) = plain.rsplit_once('.')?;
    let name = if name.is_empty() {
        let mut behind_name = behind;
        let name = behind.starts_with('"').then(|| take_name(&mut behind_name, is_plain)).flatten()?;
        *rest = behind_name;
        Some(name)
    } else {
        *rest = behind;
        Some(name.to_owned()).filter(|name| name != "*")
    };
    let is_kind = (1..=64).contains(&kind.len())
        && kind.starts_with(|first: char| first.is_ascii_alphabetic())
        && kind.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.'));
    let is_event = name.as_ref().is_none_or(|name| name.len() <= EVENT_NAME_BYTES_MAX);
    (is_kind && is_event).then(|| (kind.to_owned(), name))
}

/// Takes a name off the beginning: one in double quotes, or what `is_plain` lets through.
fn take_name(rest: &mut &str, is_plain: impl Fn(char) -> bool) -> Option<String> {
    if rest.starts_with('"') {
        let token = tokens(rest).next()?.ok()?;
        *rest = rest.get(token.end()..)?;
        return Some(token.unquoted().replace("\"\"", "\"")).filter(|name| !name.is_empty());
    }
    let length = rest.find(|letter| !is_plain(letter)).unwrap_or(rest.len());
    let (name, behind) = rest.split_at_checked(length)?;
    *rest = behind;
    Some(name.trim_end().to_owned()).filter(|name| !name.is_empty() && !name.contains(['"', '\'']))
}
