//! The statements of a file, tried on an empty database in memory with the rights that they will have.
//!
//! Invariants:
//! - Nothing that is refused here for what it does gets as far as a model; what gets there is watched over by the same [`Guard`].
//! - A statement has its parameters by name, and only such as it will be given.
//! - What depends on anything but the events is refused, also where SQLite does not ask: a default of a column, or a date function that
//!   says what time it is.

use std::{
    ops::Range,
    time::{Duration, Instant},
};

use kuma_shard::{
    Guard, Rights,
    rusqlite::{self, Connection, ErrorCode, OptionalExtension, config::DbConfig, limits::Limit},
};

use super::{
    BYTES_MAX, Parameter, Statement,
    layout::{ERASURE_WAYS, ErasureLine, Layout},
    problem::{Part, Problem, did_you_mean},
    scan::{Token, TokenKind, significant},
};
use crate::ErasureRule;

/// Making tables takes no time. What does is a statement that fills them, and that does not end.
const TIME_MAX: Duration = Duration::from_secs(5);
/// How many of SQLite's instructions are between two looks at the clock.
const INSTRUCTIONS: i32 = 10_000;
/// Pages of the database in memory: 64 MiB.
const PAGES_MAX: u32 = 16_384;

const PURE: &str = "a model has to be the same when it is built again, so nothing in it may depend on the clock or on chance; use `:at` for the time of the event, or give the event what it needs";
const NO_TRANSACTIONS: &str = "Kuma commits the model together with how far it has read, so statements do not begin, end or undo transactions; take it away";
const NO_SETTINGS: &str = "how the model's file is opened and kept is Kuma's matter, so pragmas, ATTACH and VACUUM are not for projections; take it away";
const OWN_TABLES: &str =
    "tables whose names begin with `kuma_` are Kuma's, those with `sqlite_` SQLite's; use another name";
const TABLES_FIRST: &str = "tables are made and changed before the first block; in a block there are only INSERT, REPLACE, UPDATE, DELETE and WITH";
const NO_EFFECT: &str = "this statement has no effect, since nobody is there to see its rows; a block writes, with INSERT, REPLACE, UPDATE, DELETE or WITH";
const NO_ROWS: &str = "nobody is there to see the rows of RETURNING; take it away";
const FIXED_WORDS: &str =
    "the message of RAISE goes into logs, where no data of an event may stand; write one string there";
const NO_VIRTUAL: &str =
    "virtual tables and temporary ones are not for projections; use CREATE TABLE, INDEX, VIEW or TRIGGER";

/// What says what time it is, unless it is given one.
const DATES: [&str; 6] = ["date", "time", "datetime", "julianday", "unixepoch", "strftime"];

/// Where statements stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Section {
    Tables,
    Events,
    Erased,
}

impl Section {
    fn parameters(self) -> &'static [Parameter] {
        match self {
            Section::Tables => &[],
            Section::Events => &Parameter::ALL,
            Section::Erased => &Parameter::OF_ERASED,
        }
    }

    fn verbs(self) -> &'static [&'static str] {
        match self {
            Section::Tables => &["CREATE", "INSERT"],
            Section::Events | Section::Erased => &["INSERT", "REPLACE", "UPDATE", "DELETE", "WITH"],
        }
    }
}

/// An empty model.
pub(super) struct Checker<'a> {
    text: &'a str,
    connection: Connection,
    guard: Guard,
}

impl<'a> Checker<'a> {
    pub(super) fn new(text: &'a str) -> Result<Self, Problem> {
        let open = || {
            let connection = Connection::open_in_memory()?;
            connection.pragma_update(None, "max_page_count", PAGES_MAX)?;
            // As in the file of a model.
            connection.execute_batch("PRAGMA foreign_keys = OFF; PRAGMA trusted_schema = OFF")?;
            // A name that there is not is an error then, and not a string.
            connection.set_db_config(DbConfig::SQLITE_DBCONFIG_DQS_DML, false)?;
            connection.set_db_config(DbConfig::SQLITE_DBCONFIG_DQS_DDL, false)?;
            connection.set_limit(Limit::SQLITE_LIMIT_LENGTH, 4 * BYTES_MAX as i32)?;
            let guard = Guard::over(&connection)?;
            let until = Instant::now() + TIME_MAX;
            connection.progress_handler(INSTRUCTIONS, Some(move || Instant::now() > until))?;
            Ok((connection, guard))
        };
        match open() {
            Ok((connection, guard)) => Ok(Checker { text, connection, guard }),
            Err(error) => Err(Problem::new(Part::Sql, 0, words(&error))),
        }
    }

    /// Makes the tables, and looks whether the views can be read.
    pub(super) fn make_tables(&self, statements: &[Range<usize>]) -> Result<(), Problem> {
        let mut made = Vec::new();
        for statement in statements {
            self.guard.set(Rights::Migrate);
            self.prepare(statement, Section::Tables, |prepared| prepared.raw_execute().map(drop))?;
            let view = self.ask("SELECT name FROM sqlite_schema WHERE type = 'view' ORDER BY rowid DESC LIMIT 1", []);
            if let Some(view) = view.filter(|view| made.last().is_none_or(|(last, _)| last != view)) {
                made.push((view, statement.start));
            }
        }
        // SQLite looks at what a view selects only when the view is used.
        self.guard.set(Rights::Read);
        for (view, at) in made {
            let sql = format!("SELECT * FROM \"{}\"", view.replace('"', "\"\""));
            if let Err(error) = self.connection.prepare(&sql) {
                return Err(Problem::new(Part::Sql, at, format!("the view cannot be read: {}", words(&error))));
            }
        }
        Ok(())
    }

    /// Checks the statements of a block.
    pub(super) fn block(&self, statements: &[Range<usize>], section: Section) -> Result<Vec<Statement>, Problem> {
        self.guard.set(Rights::Apply);
        statements.iter().map(|statement| self.prepare(statement, section, |_| Ok(()))).collect()
    }

    /// Makes the rule out of the lines about erasure.
    pub(super) fn erasure(&self, layout: &Layout) -> Result<ErasureRule, Problem> {
        let refused = |at: usize, reason: &str| Err(Problem::new(Part::Erasure, at, reason));
        let block = layout.erased();
        let mut columns = Vec::new();
        for (at, line) in &layout.erasure {
            match line {
                // Two rules are one too many, whichever they are.
                ErasureLine::None { .. } | ErasureLine::Block if layout.erasure.len() > 1 => {
                    return refused(
                        *at,
                        "there is another rule beside this one; keep one, or have the block do all of it",
                    );
                }
                ErasureLine::None { .. } | ErasureLine::Column { .. } if block.is_some() => {
                    return refused(
                        *at,
                        "there is a block `-- on $erased` as well; have it do all of it, or take it away",
                    );
                }
                ErasureLine::None { reason } => return Ok(ErasureRule::none(reason)),
                ErasureLine::Block if block.is_none() => {
                    return refused(
                        *at,
                        "the block is missing; write `-- on $erased`, and behind it what deletes `:entity`",
                    );
                }
                ErasureLine::Block => {}
                ErasureLine::Column { table, column } => {
                    columns
                        .push(self.column(table, column).map_err(|reason| Problem::new(Part::Erasure, *at, reason))?);
                }
            }
        }
        match (block, columns.is_empty()) {
            (Some(block), _) => Ok(ErasureRule::statements(self.script(&block.statements))),
            (None, false) => Ok(ErasureRule::Columns { columns }),
            (None, true) => Err(Problem::new(
                Part::Erasure,
                0,
                format!("it is not said how what the model holds of an erased entity is found; write {ERASURE_WAYS}"),
            )),
        }
    }

    /// The text from the first statement to the last, as it is in the file.
    pub(super) fn script(&self, statements: &[Range<usize>]) -> String {
        let ends = statements.first().zip(statements.last());
        ends.and_then(|(first, last)| self.text.get(first.start..last.end)).unwrap_or_default().to_owned()
    }

    /// The table and the column as they are called where they were made.
    fn column(&self, table: &str, column: &str) -> Result<(String, String), String> {
        self.guard.set(Rights::Engine);
        let found = "SELECT name FROM sqlite_schema WHERE type = ?1 AND name = ?2 COLLATE NOCASE";
        let Some(name) = self.ask(found, ["table", table]) else {
            return Err(match self.ask(found, ["view", table]) {
                Some(_) => format!("`{table}` is a view; name the table that the rows are in"),
                None => format!(
                    "there is no table `{table}`{}; name one that the file makes",
                    self.like(table, "SELECT name FROM sqlite_schema WHERE type = 'table'", [])
                ),
            });
        };
        let found = "SELECT name FROM pragma_table_xinfo(?1) WHERE name = ?2 COLLATE NOCASE";
        let Some(column) = self.ask(found, [&name, column]) else {
            let hint = self.like(column, "SELECT name FROM pragma_table_xinfo(?1)", [&name]);
            return Err(format!(
                "the table `{name}` has no column `{column}`{hint}; name one that holds ids of entities"
            ));
        };
        let generated = "SELECT name FROM pragma_table_xinfo(?1) WHERE name = ?2 AND hidden <> 0";
        if self.ask(generated, [&name, &column]).is_some() {
            return Err(format!(
                "the column `{column}` is computed from others; name one that `:entity` is written to"
            ));
        }
        let rule = ErasureRule::column(&name, &column);
        self.guard.set(Rights::Apply);
        match self.connection.prepare(&rule.sql()) {
            Ok(_) => Ok((name, column)),
            Err(error) => Err(format!("rows of `{name}` cannot be deleted by it: {}", words(&error))),
        }
    }

    /// The first value of the first row.
    fn ask(&self, sql: &str, parameters: impl rusqlite::Params) -> Option<String> {
        self.guard.set(Rights::Engine);
        self.connection.query_row(sql, parameters, |row| row.get(0)).optional().ok().flatten()
    }

    fn like(&self, name: &str, sql: &str, parameters: impl rusqlite::Params) -> String {
        let names = self.connection.prepare(sql).and_then(|mut statement| {
            statement.query_map(parameters, |row| row.get(0))?.collect::<rusqlite::Result<Vec<String>>>()
        });
        did_you_mean(name, names.unwrap_or_default().iter().map(String::as_str))
    }

    /// Checks a statement, prepares it and does something with it.
    fn prepare(
        &self,
        range: &Range<usize>,
        section: Section,
        then: impl FnOnce(&mut rusqlite::Statement<'_>) -> rusqlite::Result<()>,
    ) -> Result<Statement, Problem> {
        let sql = self.text.get(range.clone()).unwrap_or_default();
        let in_file = |mut problem: Problem| {
            problem.at += range.start;
            problem
        };
        may_stand_in(sql, section).and_then(|()| is_pure(sql)).map_err(in_file)?;
        has_known_parameters(sql, section).map_err(in_file)?;
        let mut prepared = self.connection.prepare(sql).map_err(|error| in_file(Self::refusal(sql, &error)))?;
        if section != Section::Tables && (prepared.readonly() || prepared.is_explain() != 0) {
            return Err(Problem::new(Part::Forbidden, range.start, NO_EFFECT));
        }
        if prepared.column_count() > 0 {
            return Err(in_file(Problem::new(Part::Forbidden, word_at(sql, "RETURNING"), NO_ROWS)));
        }
        then(&mut prepared).map_err(|error| in_file(Self::refusal(sql, &error)))?;
        let parameters = (1..=prepared.parameter_count()).map(|index| {
            let name = prepared.parameter_name(index).and_then(|name| name.strip_prefix(':'));
            name.and_then(|name| section.parameters().iter().find(|parameter| parameter.name() == name)).copied()
        });
        match parameters.collect() {
            Some(parameters) => Ok(Statement { sql: sql.to_owned(), parameters }),
            // Not reachable as long as SQLite and the scanner see the same tokens.
            None => Err(Problem::new(Part::Parameter, range.start, "a parameter of this statement has no known name")),
        }
    }

    /// What SQLite has against a statement, in words that help, at the place that they are about.
    fn refusal(sql: &str, error: &rusqlite::Error) -> Problem {
        let said = words(error);
        if error.sqlite_error_code() == Some(ErrorCode::OperationInterrupted) {
            let reason = format!(
                "trying the statements takes longer than {} s; a new model begins empty, or with a few rows",
                TIME_MAX.as_secs()
            );
            return Problem::new(Part::Forbidden, 0, reason);
        }
        if let Some(token) = significant(sql)
            .find(|token| is_ours(token) && (said.contains(token.unquoted()) || said.contains("sqlite_")))
        {
            return Problem::new(Part::Forbidden, token.at, OWN_TABLES);
        }
        if error.sqlite_error_code() == Some(ErrorCode::AuthorizationForStatementDenied)
            || said.starts_with("not authorized")
        {
            return denied(sql, &said);
        }
        match place(sql, error) {
            Some(at) => Problem::new(Part::Sql, at, said),
            None => {
                Problem::new(Part::Sql, 0, format!("{said}, in a trigger that it sets off or a view that it reads"))
            }
        }
    }
}

/// SQLite's words.
fn words(error: &rusqlite::Error) -> String {
    match error {
        rusqlite::Error::SqliteFailure(_, Some(said)) => said.clone(),
        rusqlite::Error::SqlInputError { msg, .. } => msg.clone(),
        rusqlite::Error::MultipleStatement => "it is more than one statement".to_owned(),
        other => other.to_string(),
    }
}

/// Where in a statement the thing is that SQLite's words are about: the beginning, if that cannot be told; none, if it is not in there.
fn place(sql: &str, error: &rusqlite::Error) -> Option<usize> {
    if let rusqlite::Error::SqlInputError { offset, .. } = error {
        return usize::try_from(*offset).ok().filter(|offset| *offset <= sql.len());
    }
    // SQLite gives no place for those, but a name.
    const BEFORE_NAMES: [&str; 5] = [
        "no such table: ",
        "no such column: ",
        "no such function: ",
        "has no column named ",
        "duplicate column name: ",
    ];
    let said = words(error);
    let Some((_, named)) = BEFORE_NAMES.iter().find_map(|before| said.split_once(before)) else { return Some(0) };
    let name = named.rsplit('.').next().unwrap_or_default();
    let is_name = |token: &Token<'_>| matches!(token.kind, TokenKind::Word | TokenKind::Name);
    let found = significant(sql).filter(is_name).find(|token| token.unquoted().eq_ignore_ascii_case(name));
    found.map(|token| token.at)
}

/// Where this keyword is in a statement; the beginning, if it is not in there.
fn word_at(sql: &str, word: &str) -> usize {
    significant(sql).find(|token| token.is_word(word)).map_or(0, |token| token.at)
}

fn is_ours(token: &Token<'_>) -> bool {
    let begins = |start: &str| token.unquoted().get(..start.len()).is_some_and(|name| name.eq_ignore_ascii_case(start));
    matches!(token.kind, TokenKind::Word | TokenKind::Name) && (begins("kuma_") || begins("sqlite_"))
}

/// Whether a statement that begins like this belongs where it stands.
fn may_stand_in(sql: &str, section: Section) -> Result<(), Problem> {
    let Some(first) = significant(sql).next() else { return Ok(()) };
    if section.verbs().iter().any(|verb| first.is_word(verb)) {
        return Ok(());
    }
    let forbidden = |reason: &str| Err(Problem::new(Part::Forbidden, first.at, reason));
    let verb = first.text.to_ascii_uppercase();
    match (verb.as_str(), section) {
        ("BEGIN" | "COMMIT" | "END" | "ROLLBACK" | "SAVEPOINT" | "RELEASE", _) => forbidden(NO_TRANSACTIONS),
        ("PRAGMA" | "ATTACH" | "DETACH" | "VACUUM" | "REINDEX" | "ANALYZE", _) => forbidden(NO_SETTINGS),
        ("CREATE" | "DROP" | "ALTER", Section::Events | Section::Erased) => forbidden(TABLES_FIRST),
        ("SELECT" | "VALUES" | "EXPLAIN", Section::Events | Section::Erased) => forbidden(NO_EFFECT),
        (_, Section::Tables) => Err(Problem::new(
            Part::Layout,
            first.at,
            "before the first block there are only CREATE statements, and INSERT for rows that a new model begins with; what an event does goes behind `-- on kind.Event`",
        )),
        // Not SQL, most likely; SQLite says what is wrong.
        _ => Ok(()),
    }
}

/// Refuses what depends on the clock or on chance, and what ends the transaction when a row is refused.
fn is_pure(sql: &str) -> Result<(), Problem> {
    let tokens: Vec<Token<'_>> = significant(sql).collect();
    let is = |at: usize, text: &str| tokens.get(at).is_some_and(|token| token.text == text);
    // A view is evaluated when somebody reads it.
    let is_view = matches!(tokens.as_slice(), [create, rest @ ..] if create.is_word("CREATE")
        && rest.iter().take(2).any(|token| token.is_word("VIEW")));
    let forbidden = |token: &Token<'_>, reason: &str| Err(Problem::new(Part::Forbidden, token.at, reason));
    let is_date = |at: usize, token: &Token<'_>| DATES.iter().any(|name| token.is_word(name)) && is(at + 1, "(");
    let has_dates = tokens.iter().enumerate().any(|(at, token)| is_date(at, token));
    for (at, token) in tokens.iter().enumerate() {
        if token.is_word("ROLLBACK") {
            return forbidden(token, NO_TRANSACTIONS);
        }
        if token.is_word("RAISE") && is(at + 1, "(") && !has_fixed_words(tokens.get(at + 2..).unwrap_or_default()) {
            return forbidden(token, FIXED_WORDS);
        }
        if is_view {
            continue;
        }
        let is_clock = ["CURRENT_TIME", "CURRENT_DATE", "CURRENT_TIMESTAMP"].iter().any(|word| token.is_word(word));
        let is_chance = (token.is_word("random") || token.is_word("randomblob")) && is(at + 1, "(");
        // Without a time they take the present one; `strftime` has its format first.
        let format = 2 * usize::from(token.is_word("strftime"));
        let is_now = is_date(at, token) && (is(at + 2, ")") || is(at + 1 + format, ")"));
        let says_now =
            has_dates && token.kind == TokenKind::Text && token.unquoted().trim().eq_ignore_ascii_case("now");
        if is_clock || is_chance || is_now || says_now {
            return forbidden(token, PURE);
        }
    }
    Ok(())
}

/// Whether the arguments of RAISE, up to the parenthesis, have no value of a row in them.
fn has_fixed_words(arguments: &[Token<'_>]) -> bool {
    match arguments {
        [what, end, ..] if end.text == ")" => what.is_word("IGNORE"),
        [_, comma, words, end, ..] => comma.text == "," && words.kind == TokenKind::Text && end.text == ")",
        _ => false,
    }
}

/// Refuses parameters that would be given nothing.
fn has_known_parameters(sql: &str, section: Section) -> Result<(), Problem> {
    let known = section.parameters();
    for token in significant(sql).filter(|token| token.kind == TokenKind::Parameter) {
        let problem = |reason: String| Err(Problem::new(Part::Parameter, token.at, reason));
        let list = || known.iter().map(|parameter| format!("`:{}`", parameter.name())).collect::<Vec<_>>().join(", ");
        let Some(name) = token.text.strip_prefix(':') else {
            return problem(match known.is_empty() {
                true => "there are no parameters before the first block; write what is meant".to_owned(),
                false => format!("parameters are named, with a colon; there are {}", list()),
            });
        };
        if known.iter().any(|parameter| parameter.name() == name) {
            continue;
        }
        return problem(match section {
            Section::Tables => "there are no parameters before the first block; write what is meant".to_owned(),
            Section::Erased if Parameter::ALL.iter().any(|parameter| parameter.name() == name) => {
                format!("an erasure is no event and has no `:{name}`; it has {}", list())
            }
            _ => {
                let hint = did_you_mean(name, known.iter().map(|parameter| parameter.name()));
                format!("there is no parameter `:{name}`{hint}; there are {}", list())
            }
        });
    }
    Ok(())
}

/// Which rule a statement broke that SQLite was told to refuse.
fn denied(sql: &str, said: &str) -> Problem {
    let forbidden = |at: usize, reason: &str| Problem::new(Part::Forbidden, at, reason);
    if let Some(function) = said.strip_prefix("not authorized to use function: ") {
        return forbidden(word_at(sql, function), PURE);
    }
    if let Some(token) = significant(sql).find(is_ours) {
        return forbidden(token.at, OWN_TABLES);
    }
    let unwanted = ["TEMP", "TEMPORARY", "VIRTUAL"];
    match significant(sql).take(3).find(|token| unwanted.iter().any(|word| token.is_word(word))) {
        Some(token) => forbidden(token.at, NO_VIRTUAL),
        None => forbidden(
            0,
            "a projection may not do this; it makes tables, indexes, views and triggers, and writes to its own tables",
        ),
    }
}
