//! `drain` and `forget`: a node goes, for a while or for ever.

use clap::Args;
use indicatif::HumanCount;

use super::{
    Exit, Session,
    ask::confirm,
    moves::EVERY,
    output::{GOOD, printable},
};
use crate::wire::{DrainBody, DrainedBody, ForgetBody};

/// What `drain` takes.
#[derive(Debug, Args)]
pub(super) struct DrainArguments {
    /// The node, by name or id; without it, the one that is asked
    node: Option<String>,
    /// Wait until it owns nothing any more
    #[arg(long, conflicts_with = "cancel")]
    wait: bool,
    /// Let it take slots again
    #[arg(long)]
    cancel: bool,
}

/// Has a node give its slots away.
pub(super) async fn drain(session: &Session, arguments: DrainArguments) -> anyhow::Result<Exit> {
    let DrainArguments { node, wait, cancel } = arguments;
    let (client, output) = (session.client()?, &session.output);
    let mut drained = client.drain(&DrainBody { node, cancel }).await?;
    if wait {
        let bar = output.bar("{bar:32} {human_pos}/{human_len} slots given away  {msg}");
        bar.set_length(drained.owns);
        let most = drained.owns;
        // What was given away and not taken yet would wait for this node.
        let mut on_the_way = true;
        while drained.owns > 0 || on_the_way {
            tokio::time::sleep(EVERY).await;
            let members = client.members().await?.members;
            let Some(member) = members.into_iter().find(|member| member.name == drained.node) else { break };
            // What is not known to be somebody else's is still its own: others may be told a little later.
            drained.owns = member.owns;
            bar.set_position(most.saturating_sub(drained.owns));
            let moves = client.moves().await?.moves;
            on_the_way = moves.iter().any(|one| one.from == drained.node);
            bar.set_message(format!("{} on their way", moves.len()));
        }
        bar.finish_and_clear();
    }
    if output.is_json() {
        output.json(&drained)?;
        return Ok(Exit::Done);
    }
    let DrainedBody { node, owns } = drained;
    let node = printable(&node).into_owned();
    match (cancel, owns) {
        (true, _) => output.line(format_args!("node {node} takes slots again"))?,
        (false, 0) => output.line(format_args!("{GOOD}node {node} owns nothing{GOOD:#}; it can be stopped"))?,
        (false, owns) => {
            output.line(format_args!("node {node} is to give away {} slots", HumanCount(owns)))?;
            output.note("`kuma-node moves --follow` shows how it goes");
        }
    }
    Ok(Exit::Done)
}

/// What `forget` takes.
#[derive(Debug, Args)]
pub(super) struct ForgetArguments {
    /// The node, by name or id
    node: String,
    /// Swear that its disk is destroyed and will never run again: erasures and joins go on without it
    #[arg(long)]
    destroyed: bool,
    /// Do not ask
    #[arg(long)]
    yes: bool,
}

/// Takes a node out of the cluster.
pub(super) async fn forget(session: &Session, arguments: ForgetArguments) -> anyhow::Result<Exit> {
    let ForgetArguments { node, destroyed, yes } = arguments;
    if !yes {
        let what = match destroyed {
            true => format!("attest that the disk of node {node} is destroyed, and forget it with all that it owns"),
            false => format!("forget node {node}, with what it owns"),
        };
        confirm(&what, &node)?;
    }
    let forgotten = session.client()?.forget(&ForgetBody { node, destroyed }).await?;
    if session.output.is_json() {
        session.output.json(&forgotten)?;
        return Ok(Exit::Done);
    }
    session.output.line(format_args!("node {} is forgotten", printable(&forgotten.node)))?;
    if forgotten.owns > 0 {
        session.output.warn(format_args!("{} slots stay with it, out of reach", HumanCount(forgotten.owns)));
    }
    Ok(Exit::Done)
}
