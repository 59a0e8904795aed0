//! `audit`: who had what erased, when and why.

use clap::Args;

use super::{Exit, Session, entity::print_events};

/// As many as a node gives at once.
const PAGE_MAX: u64 = 1000;

/// What `audit` takes.
#[derive(Debug, Args)]
pub(super) struct AuditArguments {
    /// The first entry, from 1
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    from: u64,
    /// At most so many entries; 0 for all of them
    #[arg(long, value_name = "N", default_value_t = 0)]
    limit: u64,
}

pub(super) async fn run(session: &Session, arguments: AuditArguments) -> anyhow::Result<Exit> {
    let client = session.client()?;
    let mut left = if arguments.limit == 0 { u64::MAX } else { arguments.limit };
    let mut from = Some(arguments.from);
    while let Some(first) = from.filter(|_| left > 0) {
        let page = client.audit(first, left.min(PAGE_MAX)).await?;
        left = left.saturating_sub(page.events.len() as u64);
        print_events(&session.output, &page.events)?;
        from = page.next;
    }
    Ok(Exit::Done)
}
