//! `verify`: has everything read and checked.

use indicatif::HumanCount;

use super::{
    Exit, Session,
    output::{BAD, GOOD, printable},
};

pub(super) async fn run(session: &Session) -> anyhow::Result<Exit> {
    let output = &session.output;
    let work = session.client()?.verify().await?;
    let progress = output.spinner();
    let found = work.finish(|now| progress.set_message(format!("verified {} commits", HumanCount(now.commits)))).await;
    progress.finish_and_clear();
    let found = found?;
    if output.is_json() {
        output.json(&found)?;
    } else {
        let [entities, commits, events, keys, destroyed] =
            [found.entities, found.commits, found.events, found.keys, found.keys_destroyed].map(HumanCount);
        output.line(format_args!("{events} events in {commits} commits of {entities} entities"))?;
        output.line(format_args!("{keys} keys, and {destroyed} that are destroyed"))?;
        for damage in &found.damage {
            output.line(format_args!("{BAD}damaged:{BAD:#} {}", printable(damage)))?;
        }
        if found.is_clean {
            output.line(format_args!("{GOOD}everything is as it was committed{GOOD:#}"))?;
        } else {
            let what = "what is damaged cannot be read; restore it from a backup, or erase it (docs/operations.md)";
            output.line(format_args!("{BAD}the store is damaged:{BAD:#} {what}"))?;
        }
    }
    Ok(if found.is_clean { Exit::Done } else { Exit::Damage })
}
