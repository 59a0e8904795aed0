//! Tables: aligned for people, with tabs for programs.
//!
//! Invariant: a row is one line, whatever its cells hold.

use std::fmt::Write;

use anstyle::Style;
use comfy_table::presets::NOTHING;

use super::output::{FAINT, printable};

/// A table with heads.
pub(crate) struct Table {
    heads: Vec<String>,
    rows: Vec<(Style, Vec<String>)>,
}

impl Table {
    pub(super) fn new<T: Into<String>>(heads: impl IntoIterator<Item = T>) -> Self {
        Table { heads: heads.into_iter().map(Into::into).collect(), rows: Vec::new() }
    }

    pub(super) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.styled(Style::new(), cells);
    }

    pub(super) fn styled(&mut self, style: Style, cells: impl IntoIterator<Item = String>) {
        self.rows.push((style, cells.into_iter().collect()));
    }

    /// As text with an end of line behind each row.
    pub(super) fn render(&self, for_people: bool) -> String {
        if for_people { self.aligned() } else { self.tabbed() }
    }

    fn aligned(&self) -> String {
        let mut table = comfy_table::Table::new();
        let cell = |cell: &String| printable(&cell.replace('\n', " ")).into_owned();
        table.load_style(NOTHING).set_header(self.heads.iter().map(|head| head.to_uppercase()));
        table.add_rows(self.rows.iter().map(|(_, cells)| cells.iter().map(cell).collect::<Vec<_>>()));
        for column in table.column_iter_mut() {
            column.set_padding((0, 2));
        }
        let styles = [FAINT].into_iter().chain(self.rows.iter().map(|(style, _)| *style));
        let mut text = String::new();
        for (style, line) in styles.zip(table.lines()) {
            // A String takes everything.
            let _ = writeln!(text, "{style}{}{style:#}", line.trim_end());
        }
        text
    }

    fn tabbed(&self) -> String {
        let cell =
            |cell: &String| cell.replace('\\', "\\\\").replace('\t', "\\t").replace('\n', "\\n").replace('\r', "\\r");
        let line = |(_, cells): &(Style, Vec<String>)| cells.iter().map(cell).collect::<Vec<_>>().join("\t") + "\n";
        self.rows.iter().map(line).collect()
    }
}

/// Pairs of name and value.
pub(super) fn pairs(rows: impl IntoIterator<Item = (&'static str, String)>) -> String {
    let rows: Vec<_> = rows.into_iter().collect();
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    rows.iter().fold(String::new(), |mut text, (name, value)| {
        let _ = writeln!(text, "{FAINT}{name:width$}{FAINT:#}  {}", printable(value));
        text
    })
}

#[cfg(test)]
mod tests {
    use anstream::adapter::strip_str;

    use super::*;

    fn table() -> Table {
        let mut table = Table::new(["name", "what"]);
        table.row(["a".to_owned(), "one\ntwo".to_owned()]);
        table.row(["longer".to_owned(), "x\ty\u{1b}[2J".to_owned()]);
        table
    }

    #[test]
    fn a_row_is_a_line_for_people() {
        let text = strip_str(&table().render(true)).to_string();
        assert_eq!(text, "NAME    WHAT\na       one two\nlonger  x\\u0009y\\u001b[2J\n");
    }

    #[test]
    fn a_row_is_a_line_for_programs() {
        assert_eq!(table().render(false), "a\tone\\ntwo\nlonger\tx\\ty\u{1b}[2J\n");
        assert_eq!(Table::new(["name"]).render(false), "");
    }
}
