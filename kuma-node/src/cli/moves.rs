//! `moves`, `migrate` and `rebalance`: slots on their way to another node.

use std::time::Duration;

use clap::Args;
use indicatif::HumanCount;

use super::{
    Exit, Session, UsageError,
    output::{FAINT, GOOD, WARN, duration},
    table::Table,
};
use crate::{
    client::Client,
    wire::{MigrateBody, MoveBody, MovesBody, PlanBody},
};

/// Between two looks.
pub(super) const EVERY: Duration = Duration::from_millis(500);

/// What `moves` takes.
#[derive(Debug, Args)]
pub(super) struct MovesArguments {
    /// Follow them until every slot is where it should be
    #[arg(long)]
    follow: bool,
}

/// Prints slots on their way.
pub(super) async fn run(session: &Session, arguments: MovesArguments) -> anyhow::Result<Exit> {
    let client = session.client()?;
    if arguments.follow {
        return follow(session, &client).await;
    }
    let body = client.moves().await?;
    if session.output.is_json() {
        session.output.json(&body)?;
        return Ok(Exit::Done);
    }
    let mut table = Table::new(["slot", "from", "to", "phase", "commits sent", "left", "for"]);
    for one in &body.moves {
        let style = if one.phase == "sealed" { WARN } else { anstyle::Style::new() };
        table.styled(style, row(one));
    }
    session.output.table(&table)?;
    for node in &body.nodes {
        let micros = |micros: Option<u64>| {
            micros.map_or_else(|| "-".to_owned(), |micros| format!("{:.1} ms", micros as f64 / 1e3))
        };
        session.output.note(format_args!(
            "{FAINT}{}: {} slots given, {} taken, {} tries came to nothing; writes to a slot waited {} (p50), {} at most{FAINT:#}",
            super::output::printable(&node.node),
            HumanCount(node.given),
            HumanCount(node.taken),
            HumanCount(node.aborted),
            micros(node.pause_p50_us),
            micros(node.pause_max_us),
        ));
    }
    Ok(Exit::Done)
}

fn row(one: &MoveBody) -> [String; 7] {
    let MoveBody { slot, from, to, phase, rows_sent, rows_left, since_ms } = one;
    [
        slot.to_string(),
        from.clone(),
        to.clone(),
        phase.clone(),
        HumanCount(*rows_sent).to_string(),
        HumanCount(*rows_left).to_string(),
        duration(Duration::from_millis(*since_ms)).to_string(),
    ]
}

/// Shows how it goes until every slot is where it should be.
pub(super) async fn follow(session: &Session, client: &Client) -> anyhow::Result<Exit> {
    let output = &session.output;
    let bar = output.bar("{bar:32} {human_pos}/{human_len} slots  {msg}");
    let (mut most, mut last) = (0, None);
    loop {
        let (moves, plan) = (client.moves().await?, client.plan(None).await?);
        if output.is_json() {
            let now = serde_json::json!({ "to_move": plan.moves, "without_owner": plan.without_owner, "moves": &moves.moves });
            // What is the same is not said again.
            if last.as_ref() != Some(&now) {
                output.json_line(&now)?;
            }
            last = Some(now);
        }
        most = most.max(plan.moves);
        bar.set_length(most);
        bar.set_position(most - plan.moves);
        bar.set_message(told(&moves));
        if plan.moves == 0 && moves.moves.is_empty() {
            break;
        }
        tokio::time::sleep(EVERY).await;
    }
    bar.finish_and_clear();
    if !output.is_json() {
        output.line(format_args!("{GOOD}every slot is where it should be{GOOD:#}"))?;
    }
    Ok(Exit::Done)
}

/// How it goes, in a line.
fn told(moves: &MovesBody) -> String {
    let left: u64 = moves.moves.iter().map(|one| one.rows_left).sum();
    format!("{} on their way, {} commits left", moves.moves.len(), HumanCount(left))
}

/// What `migrate` takes.
#[derive(Debug, Args)]
pub(super) struct MigrateArguments {
    /// The slot, 0 to 4095
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(0..4096))]
    slot: Option<u16>,
    /// Or the slot of all entities whose ids have this tag in braces: order-{TAG}
    #[arg(long, value_name = "TAG", conflicts_with = "slot")]
    tag: Option<String>,
    /// The node, by name or id, that is to own it; it stays there until it is unpinned
    #[arg(long, value_name = "NODE", conflicts_with = "unpin")]
    to: Option<String>,
    /// Let it go to where the ring wants it
    #[arg(long)]
    unpin: bool,
    /// Follow until every slot is where it should be
    #[arg(long)]
    wait: bool,
}

/// Has a slot moved.
pub(super) async fn migrate(session: &Session, arguments: MigrateArguments) -> anyhow::Result<Exit> {
    let MigrateArguments { slot, tag, to, unpin, wait } = arguments;
    let names_slot = slot.is_some() || tag.is_some();
    if names_slot != (to.is_some() || unpin) {
        let usage = "say --slot or --tag with --to or --unpin; or nothing: all slots that are not where they should be";
        return Err(UsageError(usage.to_owned()).into());
    }
    let client = session.client()?;
    let asked = client.migrate(&MigrateBody { slot, tag, to, unpin }).await?;
    if wait {
        return follow(session, &client).await;
    }
    if session.output.is_json() {
        session.output.json(&asked)?;
        return Ok(Exit::Done);
    }
    match asked.slot {
        Some(slot) => session
            .output
            .line(format_args!("slot {slot} is to move; {} in all are on their way or to move", asked.to_move))?,
        None => session.output.line(format_args!("{} slots are to move", asked.to_move))?,
    }
    session.output.note("`kuma-node moves --follow` shows how it goes");
    Ok(Exit::Done)
}

/// What `rebalance` takes.
#[derive(Debug, Args)]
pub(super) struct RebalanceArguments {
    /// Show what would move, and move nothing
    #[arg(long)]
    dry_run: bool,
    /// With --dry-run: as if this node were drained
    #[arg(long, value_name = "NODE", requires = "dry_run")]
    without: Option<String>,
    /// Follow until every slot is where it should be
    #[arg(long, conflicts_with = "dry_run")]
    wait: bool,
}

/// Has slots moved to where they should be, or shows which.
pub(super) async fn rebalance(session: &Session, arguments: RebalanceArguments) -> anyhow::Result<Exit> {
    let RebalanceArguments { dry_run, without, wait } = arguments;
    if !dry_run {
        let all = MigrateArguments { slot: None, tag: None, to: None, unpin: false, wait };
        return migrate(session, all).await;
    }
    let plan = session.client()?.plan(without.as_deref()).await?;
    if session.output.is_json() {
        session.output.json(&plan)?;
        return Ok(Exit::Done);
    }
    session.output.table(&shares(&plan))?;
    for flow in &plan.flows {
        let [from, to] = [&flow.from, &flow.to].map(|name| super::output::printable(name).into_owned());
        session.output.note(format_args!("{} slots from {from} to {to}", HumanCount(flow.count)));
    }
    if plan.without_owner > 0 {
        session.output.warn(format_args!(
            "{} slots have no owner that is known; they move when it is back",
            HumanCount(plan.without_owner)
        ));
    }
    Ok(Exit::Done)
}

fn shares(plan: &PlanBody) -> Table {
    let mut table = Table::new(["node", "owns", "would own", "gives", "takes"]);
    for node in &plan.nodes {
        let counts = [node.owns, node.wished, node.gives, node.takes].map(|count| HumanCount(count).to_string());
        table.row([node.node.clone()].into_iter().chain(counts));
    }
    table
}
