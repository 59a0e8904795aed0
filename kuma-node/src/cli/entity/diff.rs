//! `entity diff`: what differs between two versions of an entity.

use clap::Args;
use serde_json::Value;

use super::Name;
use crate::{
    cli::{
        Exit, Session,
        output::{BAD, FAINT, GOOD, WARN, printable},
    },
    wire::ChangeBody,
};

/// What `entity diff` takes.
#[derive(Debug, Args)]
pub(in crate::cli) struct DiffArguments {
    #[command(flatten)]
    name: Name,
    /// The version before
    from: u64,
    /// The version after
    to: u64,
}

pub(in crate::cli) async fn run(session: &Session, arguments: DiffArguments) -> anyhow::Result<Exit> {
    let DiffArguments { name, from, to } = arguments;
    let diff = session.client()?.diff(&name.kind, &name.id, from, to).await?;
    if session.output.is_json() {
        session.output.json(&diff)?;
    } else if diff.changes.is_empty() {
        session.output.line(format_args!("{FAINT}versions {from} and {to} are the same{FAINT:#}"))?;
    } else {
        diff.changes.iter().try_for_each(|change| session.output.line(told(change)))?;
    }
    Ok(Exit::Done)
}

/// `+ path: value` for what is new, `-` for what is gone, `~` for what is another.
fn told(change: &ChangeBody) -> String {
    // The pointer of the whole document is empty.
    let path = if change.path.is_empty() { "/" } else { &change.path };
    let path = printable(path);
    let json = |value: &Value| printable(&value.to_string()).into_owned();
    match (&change.before, &change.after) {
        (Some(before), Some(after)) => format!("{WARN}~ {path}: {} → {}{WARN:#}", json(before), json(after)),
        (None, Some(after)) => format!("{GOOD}+ {path}: {}{GOOD:#}", json(after)),
        (Some(before), None) => format!("{BAD}- {path}: {}{BAD:#}", json(before)),
        (None, None) => format!("{FAINT}  {path}{FAINT:#}"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn changes_have_signs_and_colours() {
        let text = |before, after| {
            let line = told(&ChangeBody { path: "/a".to_owned(), before, after });
            assert!(line.starts_with('\u{1b}') && line.ends_with("\u{1b}[0m"));
            anstream::adapter::strip_str(&line).to_string()
        };
        assert_eq!(text(None, Some(json!(1))), "+ /a: 1");
        assert_eq!(text(Some(json!({"b": null})), None), "- /a: {\"b\":null}");
        assert_eq!(text(Some(json!(1)), Some(json!("x"))), "~ /a: 1 → \"x\"");
    }
}
