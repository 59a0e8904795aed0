//! What every command prints: a table on stdout, and a JSON frame in a file.
//!
//! ```json
//! {"command", "version", "durability", "machine": {..}, "params": {..}, "runs": [{figure: number, ..}, ..], "figures": {..}}
//! ```
//! `figures` holds the median over the runs, flat, with the unit in each name; the spread stays in `runs`.

use std::{fs, path::Path};

use anyhow::{Context, Result};
use comfy_table::{Cell, CellAlignment, Table, presets};
use serde::{Serialize, Serializer};

use crate::{Common, progress::Progress, usage::Machine};

/// Named numbers, in the order in which they are shown.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Figures(Vec<(&'static str, f64)>);

impl Figures {
    pub(crate) fn push(&mut self, name: &'static str, value: f64) {
        self.0.push((name, value));
    }

    /// Leaves the figure out where there is no value.
    pub(crate) fn push_some(&mut self, name: &'static str, value: Option<f64>) {
        self.0.extend(value.map(|value| (name, value)));
    }

    fn get(&self, name: &str) -> Option<f64> {
        self.0.iter().find(|(other, _)| *other == name).map(|(_, value)| *value)
    }
}

impl Serialize for Figures {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, value)| (name, six_digits(*value))))
    }
}

/// A finished command.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Frame {
    pub(crate) command: &'static str,
    pub(crate) version: &'static str,
    pub(crate) durability: String,
    pub(crate) machine: Machine,
    pub(crate) params: serde_json::Value,
    pub(crate) runs: Vec<Figures>,
    pub(crate) figures: Figures,
}

impl Frame {
    pub(crate) fn new(
        command: &'static str,
        durability: String,
        machine: Machine,
        params: serde_json::Value,
        runs: Vec<Figures>,
    ) -> Self {
        let figures = medians(&runs);
        Frame { command, version: env!("CARGO_PKG_VERSION"), durability, machine, params, runs, figures }
    }

    /// The line above the table: what the figures hold for.
    fn headline(&self) -> String {
        let Frame { command, version, durability, machine, runs, .. } = self;
        let Machine { cpu, cores, filesystem, sqlite, .. } = machine;
        let runs = match runs.len() {
            1 => "1 run".to_owned(),
            runs => format!("median of {runs} runs"),
        };
        format!(
            "{command}: durability {durability}, sealed; Kuma {version}, SQLite {sqlite}; {cores} x {cpu}, {filesystem}; {runs}"
        )
    }

    /// The table with its headline.
    pub(crate) fn table(&self) -> String {
        let mut table = Table::new();
        table.load_style(presets::UTF8_FULL_CONDENSED).set_header(["figure", "median", "min .. max"]);
        for (name, median) in &self.figures.0 {
            let values = || self.runs.iter().filter_map(|run| run.get(name));
            let (min, max) = (values().fold(f64::INFINITY, f64::min), values().fold(f64::NEG_INFINITY, f64::max));
            let spread = format!("{} .. {}", readable(min), readable(max));
            let right = |text: String| Cell::new(text).set_alignment(CellAlignment::Right);
            table.add_row([Cell::new(name), right(readable(*median)), right(spread)]);
        }
        format!("{}\n{table}", self.headline())
    }

    /// Prints the table, and writes the JSON frame if a file is given.
    pub(crate) fn publish(&self, json: Option<&Path>) -> Result<()> {
        println!("{}", self.table());
        let Some(path) = json else { return Ok(()) };
        let mut text = serde_json::to_string_pretty(self)?;
        text.push('\n');
        fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    }
}

/// Measures as often as is wanted, and publishes the figures of all runs. `one_run` also says what an acknowledgement means.
pub(crate) async fn publish_runs(
    command: &'static str,
    common: &Common,
    base: &Path,
    params: serde_json::Value,
    mut one_run: impl AsyncFnMut(&Progress) -> Result<(Figures, String)>,
) -> Result<()> {
    let (mut runs, mut durability) = (Vec::new(), String::new());
    for run in 1..=common.runs {
        let progress = Progress::of_run(run, common.runs);
        let (figures, lasts) = one_run(&progress).await.with_context(|| format!("run {run}"))?;
        durability = lasts;
        runs.push(figures);
    }
    Frame::new(command, durability, Machine::this(base), params, runs).publish(common.json.as_deref())
}

/// The median of each figure that every run has.
fn medians(runs: &[Figures]) -> Figures {
    let Some(first) = runs.first() else { return Figures::default() };
    let median_of = |name: &'static str| {
        let values: Option<Vec<f64>> = runs.iter().map(|run| run.get(name)).collect();
        values.map(|values| (name, median(values)))
    };
    Figures(first.0.iter().filter_map(|(name, _)| median_of(name)).collect())
}

/// The middle value; the mean of the two in the middle of an even number; 0 of none.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match (values.len() % 2, values.get(middle), middle.checked_sub(1).and_then(|below| values.get(below))) {
        (1, Some(value), _) => *value,
        (_, Some(above), Some(below)) => (above + below) / 2.0,
        _ => 0.0,
    }
}

/// No figure is known to more than six digits.
fn six_digits(value: f64) -> f64 {
    format!("{value:.5e}").parse().unwrap_or(value)
}

/// `1,234,567`, `123`, `12.3`, `1.23`, `0.0123`.
fn readable(value: f64) -> String {
    if !value.is_finite() {
        return value.to_string();
    }
    if value.abs() < 100.0 {
        let digits = if value.abs() >= 10.0 {
            1
        } else if value.abs() >= 0.1 || value == 0.0 {
            2
        } else {
            4
        };
        return format!("{value:.digits$}");
    }
    let digits = format!("{:.0}", value.abs());
    let groups: Vec<&str> =
        digits.as_bytes().rchunks(3).rev().map(|group| std::str::from_utf8(group).unwrap_or_default()).collect();
    format!("{}{}", if value < 0.0 { "-" } else { "" }, groups.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame() -> Frame {
        let run = |events_per_second: f64, ack_p50_ms: f64| {
            let mut figures = Figures::default();
            figures.push("events_per_second", events_per_second);
            figures.push("ack_p50_ms", ack_p50_ms);
            figures.push_some("io_bytes_per_event", None);
            figures
        };
        let machine = Machine {
            cpu: "a processor".to_owned(),
            cores: 2,
            memory_mib: 7952,
            kernel: "6.1.0".to_owned(),
            filesystem: "ext4".to_owned(),
            sqlite: "3.51.3".to_owned(),
        };
        let runs = vec![run(512_345.678_9, 12.25), run(401_000.0, 0.034), run(1_234_567.0, 7.5)];
        let mut frame =
            Frame::new("write", "full".to_owned(), machine, serde_json::json!({"events": 1000, "batch": 100}), runs);
        frame.version = "0.1.0";
        frame
    }

    #[test]
    fn the_json_frame_is_as_promised() {
        insta::assert_json_snapshot!(frame());
    }

    #[test]
    fn the_table_says_what_its_figures_hold_for() {
        insta::assert_snapshot!(frame().table());
    }

    #[test]
    fn the_median_is_the_middle_of_what_was_measured() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(vec![7.0]), 7.0);
        assert_eq!(median(Vec::new()), 0.0);
    }

    #[test]
    fn numbers_are_readable() {
        let numbers = [1_234_567.4, 999.6, 100.0, 12.34, 1.234, 0.0123, 0.0, -1234.0];
        assert_eq!(numbers.map(readable), ["1,234,567", "1,000", "100", "12.3", "1.23", "0.0123", "0.00", "-1,234"]);
    }

    /// A figure that the system did not tell in one run has no median.
    #[test]
    fn a_figure_that_a_run_lacks_is_left_out() {
        let mut with = Figures::default();
        with.push("a", 1.0);
        let mut both = with.clone();
        both.push("b", 2.0);
        assert_eq!(medians(&[both, with.clone()]), with);
    }
}
