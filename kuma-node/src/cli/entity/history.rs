//! `entity history`: an entity's events.

use anstyle::Style;
use clap::Args;

use super::Name;
use crate::{
    cli::{Exit, Session, output::Output, table::Table},
    client::History,
    wire::EventBody,
};

/// As many as a node gives at once.
const PAGE_MAX: u64 = 1000;
/// Of an event's data, so many characters are shown on a terminal.
const DATA_SHOWN: usize = 100;

/// What `entity history` takes.
#[derive(Debug, Args)]
pub(in crate::cli) struct HistoryArguments {
    #[command(flatten)]
    name: Name,
    /// The first version
    #[arg(long, value_name = "N")]
    from: Option<u64>,
    /// The last version
    #[arg(long, value_name = "N")]
    to: Option<u64>,
    /// At most so many events; 0 for all of them
    #[arg(long, value_name = "N", default_value_t = 100)]
    limit: u64,
    /// The newest first
    #[arg(long)]
    reverse: bool,
}

pub(in crate::cli) async fn run(session: &Session, arguments: HistoryArguments) -> anyhow::Result<Exit> {
    let client = session.client()?;
    let HistoryArguments { name, from, to, limit, reverse: is_reversed } = arguments;
    let mut left = if limit == 0 { u64::MAX } else { limit };
    let mut which = History { from, to, limit: None, is_reversed };
    while left > 0 {
        which.limit = Some(left.min(PAGE_MAX));
        let page = client.events(&name.kind, &name.id, &which).await?;
        left = left.saturating_sub(page.events.len() as u64);
        print(&session.output, &page.events)?;
        match page.next {
            None => return Ok(Exit::Done),
            Some(next) if is_reversed => which.to = Some(next),
            Some(next) => which.from = Some(next),
        }
    }
    let (option, next) = if is_reversed { ("--to", which.to) } else { ("--from", which.from) };
    if let Some(next) = next.filter(|_| session.output.is_terminal()) {
        session.output.note(format_args!("there are more: {option} {next}, or --limit 0 for all of them"));
    }
    Ok(Exit::Done)
}

/// Prints events as a table, or one document a line.
pub(in crate::cli) fn print(output: &Output, events: &[EventBody]) -> anyhow::Result<()> {
    if output.is_json() {
        return Ok(events.iter().try_for_each(|event| output.json_line(event))?);
    }
    let mut table = Table::new(["version", "at", "type", "data"]);
    for event in events {
        let data = event.data.to_string();
        let data = if output.is_terminal() { shortened(data) } else { data };
        table.styled(Style::new(), [event.version.to_string(), event.at.clone(), event.name.clone(), data]);
    }
    Ok(output.table(&table)?)
}

fn shortened(text: String) -> String {
    match text.char_indices().nth(DATA_SHOWN) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_data_is_cut_between_characters() {
        assert_eq!(shortened("ü".repeat(DATA_SHOWN)), "ü".repeat(DATA_SHOWN));
        assert_eq!(shortened("ü".repeat(DATA_SHOWN + 1)), "ü".repeat(DATA_SHOWN) + "…");
    }
}
