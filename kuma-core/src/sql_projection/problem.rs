//! What is wrong with a file, and where.

use std::{io, path::PathBuf};

use super::BYTES_MAX;

/// Why a file is not a projection. One variant per part of the file that is to be mended; the words say how.
///
/// Lines and columns count from 1, columns in characters. What a file holds is the operator's own text, so words may quote it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SqlProjectionError {
    /// The file cannot be read.
    #[error("the file cannot be read")]
    Read(#[source] io::Error),
    /// The file is larger than any projection needs to be.
    #[error(
        "the file has more than {bytes_max} bytes; a projection is the text of its tables and statements, and no data"
    )]
    TooLarge {
        /// The limit.
        bytes_max: usize,
    },
    /// The file is not text.
    #[error("line {line}, column {column}: {reason}")]
    NotText {
        /// The line.
        line: usize,
        /// The character in the line.
        column: usize,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// The header is not as it has to be: name and version.
    #[error("line {line}, column {column}: {reason}")]
    Header {
        /// The line.
        line: usize,
        /// The character in the line.
        column: usize,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// It is not said, or not correctly, how what the model holds of an erased entity is found.
    #[error("line {line}, column {column}: {reason}")]
    Erasure {
        /// The line.
        line: usize,
        /// The character in the line.
        column: usize,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// The parts are not in their order, or not whole: blocks and the ends of statements.
    #[error("line {line}, column {column}: {reason}")]
    Layout {
        /// The line.
        line: usize,
        /// The character in the line.
        column: usize,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// A parameter that there is not.
    #[error("line {line}, column {column}: {reason}")]
    Parameter {
        /// The line.
        line: usize,
        /// The character in the line.
        column: usize,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// A statement does what a projection may not do.
    #[error("line {line}, column {column}: {reason}")]
    Forbidden {
        /// The line.
        line: usize,
        /// The character in the line.
        column: usize,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// SQLite does not take a statement.
    #[error("line {line}, column {column}: SQLite refuses the statement: {message}")]
    Sql {
        /// The line.
        line: usize,
        /// The character in the line.
        column: usize,
        /// SQLite's words.
        message: String,
    },
    /// Another file of the directory has a projection of this name.
    #[error("the projection {name} is in {} already; give one of the two another name, or take it away", first.display())]
    SameName {
        /// The name.
        name: String,
        /// The other file.
        first: PathBuf,
    },
}

impl SqlProjectionError {
    /// The line and the column in it, from 1, if the file has such a place.
    pub fn place(&self) -> Option<(usize, usize)> {
        match self {
            SqlProjectionError::NotText { line, column, .. }
            | SqlProjectionError::Header { line, column, .. }
            | SqlProjectionError::Erasure { line, column, .. }
            | SqlProjectionError::Layout { line, column, .. }
            | SqlProjectionError::Parameter { line, column, .. }
            | SqlProjectionError::Forbidden { line, column, .. }
            | SqlProjectionError::Sql { line, column, .. } => Some((*line, *column)),
            SqlProjectionError::Read(_) | SqlProjectionError::TooLarge { .. } | SqlProjectionError::SameName { .. } => {
                None
            }
        }
    }

    pub(super) fn too_large() -> Self {
        SqlProjectionError::TooLarge { bytes_max: BYTES_MAX }
    }
}

/// Which part of the file is to be mended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    NotText,
    Header,
    Erasure,
    Layout,
    Parameter,
    Forbidden,
    Sql,
}

/// A [`SqlProjectionError`] that has a place in a text.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Problem {
    /// In bytes.
    pub(super) at: usize,
    pub(super) part: Part,
    pub(super) reason: String,
}

impl Problem {
    pub(super) fn new(part: Part, at: usize, reason: impl Into<String>) -> Self {
        Problem { at, part, reason: reason.into() }
    }

    pub(super) fn in_text(self, text: &str) -> SqlProjectionError {
        let Problem { at, part, reason } = self;
        let (line, column) = place(text, at);
        match part {
            Part::NotText => SqlProjectionError::NotText { line, column, reason },
            Part::Header => SqlProjectionError::Header { line, column, reason },
            Part::Erasure => SqlProjectionError::Erasure { line, column, reason },
            Part::Layout => SqlProjectionError::Layout { line, column, reason },
            Part::Parameter => SqlProjectionError::Parameter { line, column, reason },
            Part::Forbidden => SqlProjectionError::Forbidden { line, column, reason },
            Part::Sql => SqlProjectionError::Sql { line, column, message: reason },
        }
    }
}

/// The line and the column of a byte, from 1. A byte within a character stands for the character.
pub(super) fn place(text: &str, at: usize) -> (usize, usize) {
    let before = text.get(..text.floor_char_boundary(at)).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    let column = before.get(line_start..).unwrap_or_default().chars().count() + 1;
    (before.bytes().filter(|byte| *byte == b'\n').count() + 1, column)
}

/// ", did you mean ...?" if one of `words` is much like `word`.
pub(super) fn did_you_mean<'a>(word: &str, words: impl IntoIterator<Item = &'a str>) -> String {
    // Longer ones are nobody's slip, and comparing takes the product of the lengths.
    if word.len() > 32 {
        return String::new();
    }
    let word = word.to_ascii_lowercase();
    let near = words
        .into_iter()
        .map(|known| (distance(&word, &known.to_ascii_lowercase()), known))
        .min_by_key(|(distance, _)| *distance);
    match near {
        Some((distance, known)) if distance <= 2.max(known.len() / 3) && distance < known.len() => {
            format!(", did you mean `{known}`?")
        }
        _ => String::new(),
    }
}

/// How many characters to add, take away or change (Levenshtein).
fn distance(one: &str, other: &str) -> usize {
    let mut row: Vec<usize> = (0..=other.chars().count()).collect();
    for (i, a) in one.chars().enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        for (b, above) in other.chars().zip(row.iter_mut().skip(1)) {
            left = (left + 1).min(*above + 1).min(diagonal + usize::from(a != b));
            diagonal = std::mem::replace(above, left);
        }
    }
    row.last().copied().filter(|_| !one.is_empty()).unwrap_or(other.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_count_lines_and_characters_from_one() {
        let text = "aé\r\nü;x";
        let places: Vec<_> = [0, 1, 2, 3, 5, 7, 8, 99].into_iter().map(|at| place(text, at)).collect();
        assert_eq!(places, [(1, 1), (1, 2), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3), (2, 4)]);
    }

    #[test]
    fn a_slip_is_told_from_another_word() {
        let known = ["projection", "version", "erasure"];
        for (word, hint) in [
            ("projektion", ", did you mean `projection`?"),
            ("Version", ", did you mean `version`?"),
            ("erase", ", did you mean `erasure`?"),
            ("author", ""),
            ("", ""),
        ] {
            assert_eq!(did_you_mean(word, known), hint, "{word}");
        }
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(distance("", "abc"), 3);
    }
}
