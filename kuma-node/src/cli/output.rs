//! Where results and remarks go.
//!
//! Invariants:
//! - A failing standard output is an error and never a panic; that its reader went away is told apart.
//! - What came from events and ids cannot steer a terminal: control characters are shown as what they are.

use std::{
    borrow::Cow,
    fmt::{self, Display, Write as _},
    io::{self, IsTerminal, Write},
    time::Duration,
};

use anstyle::{AnsiColor, Style};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::{Exit, table::Table};
use crate::wire::Problem;

/// What is of less interest.
pub(super) const FAINT: Style = Style::new().dimmed();
/// What stands out.
pub(super) const STRONG: Style = Style::new().bold();
/// What is new or well.
pub(super) const GOOD: Style = AnsiColor::Green.on_default();
/// What is changed or to be looked at.
pub(super) const WARN: Style = AnsiColor::Yellow.on_default();
/// What is gone or wrong.
pub(super) const BAD: Style = AnsiColor::Red.on_default();

/// Standard output cannot be written to.
#[derive(Debug, thiserror::Error)]
#[error("cannot write to standard output")]
pub(crate) struct OutputError(#[source] pub(crate) io::Error);

impl OutputError {
    /// Whether it is because nobody reads it any more.
    pub(crate) fn is_reader_gone(&self) -> bool {
        self.0.kind() == io::ErrorKind::BrokenPipe
    }
}

/// Standard output and standard error, and what they are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output {
    is_json: bool,
    is_terminal: bool,
}

impl Output {
    pub(crate) fn of_process(is_json: bool) -> Self {
        Output { is_json, is_terminal: io::stdout().is_terminal() }
    }

    /// Whether JSON was asked for.
    pub(crate) fn is_json(&self) -> bool {
        self.is_json
    }

    /// Whether somebody looks at it.
    pub(crate) fn is_terminal(&self) -> bool {
        self.is_terminal && !self.is_json
    }

    /// A line of text. Colours in it are kept on terminals only.
    pub(crate) fn line(&self, line: impl Display) -> Result<(), OutputError> {
        writeln!(anstream::stdout(), "{line}").map_err(OutputError)
    }

    /// A document.
    pub(crate) fn json(&self, value: &(impl Serialize + ?Sized)) -> Result<(), OutputError> {
        let json = serde_json::to_string_pretty(value).map_err(|error| OutputError(error.into()))?;
        self.line(printable(&json))
    }

    /// A document in a line, of several.
    pub(crate) fn json_line(&self, value: &(impl Serialize + ?Sized)) -> Result<(), OutputError> {
        let json = serde_json::to_string(value).map_err(|error| OutputError(error.into()))?;
        self.line(printable(&json))
    }

    /// Bytes as they are.
    pub(crate) fn bytes(&self, bytes: &[u8]) -> Result<(), OutputError> {
        io::stdout().write_all(bytes).map_err(OutputError)
    }

    pub(crate) fn flush(&self) -> Result<(), OutputError> {
        io::stdout().flush().map_err(OutputError)
    }

    /// A table: aligned for a terminal, otherwise with tabs and without its heads.
    pub(crate) fn table(&self, table: &Table) -> Result<(), OutputError> {
        write!(anstream::stdout(), "{}", table.render(self.is_terminal)).map_err(OutputError)
    }

    /// A remark beside the results.
    pub(crate) fn note(&self, text: impl Display) {
        // There is nobody who could be told.
        let _ = writeln!(anstream::stderr(), "{text}");
    }

    /// Something to look at.
    pub(crate) fn warn(&self, text: impl Display) {
        self.note(format_args!("{WARN}warning:{WARN:#} {text}"));
    }

    /// Why it failed. As JSON it is one line.
    pub(crate) fn error(&self, error: &anyhow::Error, exit: Exit, problem: Option<&Problem>) {
        let text = told(error);
        if self.is_json {
            let document = serde_json::json!({ "error": text, "exit": exit as u8, "problem": problem });
            return self.note(document);
        }
        self.note(format_args!("{BAD}error:{BAD:#} {}", printable(&text)));
    }

    /// Progress of something whose end is known. Drawn on a terminal only, as is everything that indicatif draws.
    pub(crate) fn bar(&self, template: &str) -> ProgressBar {
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        ProgressBar::new(0).with_style(style)
    }

    /// Progress of something whose end is not known.
    pub(crate) fn spinner(&self) -> ProgressBar {
        let bar = ProgressBar::new_spinner();
        bar.enable_steady_tick(Duration::from_millis(120));
        bar
    }
}

/// An error with its causes, without what is said twice.
fn told(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.contains(&cause) {
            continue;
        }
        if !text.is_empty() {
            text.push_str(": ");
        }
        text.push_str(&cause);
    }
    text
}

/// Text from elsewhere, for a terminal: line breaks stay, other control characters and those that turn the direction are shown by their number.
pub(super) fn printable(text: &str) -> Cow<'_, str> {
    let steers = |char: char| {
        (char.is_control() && char != '\n') || matches!(char, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    if !text.contains(steers) {
        return text.into();
    }
    let mut out = String::with_capacity(text.len() + 8);
    for char in text.chars() {
        if steers(char) {
            // A String takes everything. JSON reads it as the same character.
            let _ = write!(out, "\\u{:04x}", u32::from(char));
        } else {
            out.push(char);
        }
    }
    out.into()
}

/// A duration in two words: `3h 12m`.
pub(super) fn duration(duration: Duration) -> impl Display {
    struct Human(Duration);
    impl Display for Human {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            let (millis, seconds) = (self.0.as_millis(), self.0.as_secs());
            match seconds {
                0 if millis == 0 => f.write_str("0s"),
                0 => write!(f, "{millis}ms"),
                1..60 => write!(f, "{seconds}s"),
                60..3600 => write!(f, "{}m {}s", seconds / 60, seconds % 60),
                3600..86400 => write!(f, "{}h {}m", seconds / 3600, seconds % 3600 / 60),
                _ => write!(f, "{}d {}h", seconds / 86400, seconds % 86400 / 3600),
            }
        }
    }
    Human(duration)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An id with escape sequences in it must not clear the screen of whoever looks at it.
    #[test]
    fn text_from_elsewhere_does_not_steer_the_terminal() {
        assert_eq!(printable("Zürich\n{}"), "Zürich\n{}");
        assert_eq!(printable("a\u{1b}[2Jb\u{9b}c\rd\u{202e}"), "a\\u001b[2Jb\\u009bc\\u000dd\\u202e");
        let json = serde_json::to_string("\u{9b}\u{7f}").unwrap();
        assert_eq!(serde_json::from_str::<String>(&printable(&json)).unwrap(), "\u{9b}\u{7f}");
    }

    #[test]
    fn causes_are_told_once() {
        let error = anyhow::anyhow!("no space").context("cannot write: no space").context("the export failed");
        assert_eq!(told(&error), "the export failed: cannot write: no space");
    }

    #[test]
    fn durations_have_two_words() {
        let text = |millis| duration(Duration::from_millis(millis)).to_string();
        assert_eq!([text(0), text(12), text(59_999), text(61_000)], ["0s", "12ms", "59s", "1m 1s"]);
        assert_eq!([text(3_600_000 * 25), text(3_660_000)], ["1d 1h", "1h 1m"]);
    }
}
