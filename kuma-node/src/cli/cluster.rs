//! `members` and `slots`: the cluster, as the node that is asked knows it.

use clap::Args;
use indicatif::HumanCount;

use super::{
    Exit, Session,
    output::{BAD, FAINT, WARN},
    table::Table,
};
use crate::{client::Slots, wire::MemberBody};

/// Prints the nodes.
pub(super) async fn members(session: &Session) -> anyhow::Result<Exit> {
    let body = session.client()?.members().await?;
    if session.output.is_json() {
        session.output.json(&body)?;
        return Ok(Exit::Done);
    }
    let mut table = Table::new(["node", "link", "standing", "owns", "should own", "address", "id"]);
    for member in &body.members {
        let link = match member {
            MemberBody { is_own: true, .. } => "this one",
            MemberBody { is_up: true, .. } => "up",
            _ => "down",
        };
        let style = match member {
            MemberBody { is_up: false, .. } => BAD,
            MemberBody { standing, .. } if standing != "member" => WARN,
            _ => anstyle::Style::new(),
        };
        let counts = [member.owns, member.wished].map(|count| HumanCount(count).to_string());
        let [owns, wished] = counts;
        let MemberBody { name, standing, address, id, .. } = member;
        table.styled(
            style,
            [name.clone(), link.to_owned(), standing.clone(), owns, wished, address.clone(), id.clone()],
        );
    }
    session.output.table(&table)?;
    Ok(Exit::Done)
}

/// Which slots; all of them by default.
#[derive(Debug, Args)]
pub(super) struct SlotsArguments {
    /// This slot alone
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(0..4096))]
    slot: Option<u16>,
    /// The slot of all entities whose ids have this tag in braces: order-{TAG}
    #[arg(long, value_name = "TAG", conflicts_with = "slot")]
    tag: Option<String>,
    /// Those that this node owns
    #[arg(long, value_name = "NODE")]
    owner: Option<String>,
    /// Those that are not where they should be
    #[arg(long)]
    misplaced: bool,
}

/// Prints slots.
pub(super) async fn slots(session: &Session, arguments: SlotsArguments) -> anyhow::Result<Exit> {
    let SlotsArguments { slot, tag, owner, misplaced } = arguments;
    let body = session.client()?.slots(&Slots { slot, tag, owner, is_misplaced: misplaced }).await?;
    if session.output.is_json() {
        session.output.json(&body)?;
        return Ok(Exit::Done);
    }
    let mut table = Table::new(["slot", "owner", "since epoch", "should be at", "token here", "commits here"]);
    for slot in &body.slots {
        let style = match (&slot.owner, &slot.wished) {
            (None, _) => BAD,
            (owner, wished) if owner != wished => WARN,
            _ if slot.token == "none" => FAINT,
            _ => anstyle::Style::new(),
        };
        let text = |text: &Option<String>| text.clone().unwrap_or_else(|| "unknown".to_owned());
        let wished = if slot.is_pinned { format!("{} (pinned)", text(&slot.wished)) } else { text(&slot.wished) };
        table.styled(
            style,
            [
                slot.slot.to_string(),
                text(&slot.owner),
                text(&slot.epoch),
                wished,
                slot.token.clone(),
                HumanCount(slot.rows).to_string(),
            ],
        );
    }
    session.output.table(&table)?;
    Ok(Exit::Done)
}
