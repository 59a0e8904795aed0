//! `status`: how a node is.

use std::time::Duration;

use indicatif::{HumanBytes, HumanCount};
use serde_json::json;

use super::{
    Exit, Session,
    output::{BAD, GOOD, WARN, duration},
    table::{Table, pairs},
};
use crate::wire::{ClusterHealthBody, HealthBody, ShardBody, StatusBody, StatusClusterBody};

/// Prints how the node is, and fails if it takes no requests: a container's health check.
pub(super) async fn run(session: &Session) -> anyhow::Result<Exit> {
    let client = session.client()?;
    // Without a token that is all there is, and all that a health check needs.
    let (is_ready, health) = client.ready().await?;
    let exit = if is_ready { Exit::Done } else { Exit::Unavailable };
    // A denial is kept in the audit log for ever, and health checks come often.
    let status = match client.has_token() || !health.needs_token {
        true => client.status().await.map_err(Some),
        false => Err(None),
    };
    let status = match status {
        Ok(status) => status,
        Err(error) => {
            let is_denied = error
                .as_ref()
                .is_none_or(|error| error.problem().is_some_and(|problem| matches!(problem.status, 401 | 403)));
            // A node that starts or stops may say no more than that.
            if let Some(error) = error.filter(|_| is_ready && !is_denied) {
                return Err(error.into());
            }
            if session.output.is_json() {
                session.output.json(&json!({ "health": health }))?;
            } else {
                session.output.line(readiness(&health, is_ready))?;
                if is_denied {
                    session.output.note("more is told to those who have a token (KUMA_TOKEN)");
                }
            }
            return Ok(exit);
        }
    };
    if session.output.is_json() {
        session.output.json(&json!({ "health": health, "node": status }))?;
        return Ok(exit);
    }
    session.output.line(readiness(&health, is_ready))?;
    let mut rows = told(&status);
    if let Some(cluster) = &status.cluster {
        rows.extend(in_cluster(cluster));
    }
    session.output.line(pairs(rows))?;
    if status.cluster.as_ref().is_some_and(|cluster| cluster.health != "ok") {
        reasons(session, &client.cluster_health().await?)?;
    }
    session.output.table(&shards(&status.shards))?;
    Ok(exit)
}

fn in_cluster(cluster: &StatusClusterBody) -> Vec<(&'static str, String)> {
    let StatusClusterBody { node, address, members, members_up, owns, wished, moving, health } = cluster;
    vec![
        ("node", format!("{node}, other nodes at {address}")),
        ("nodes", format!("{members_up} of {members} within reach")),
        ("slots", format!("{owns} owned, {wished} wished, {moving} on their way")),
        ("cluster", health.clone()),
    ]
}

/// What is in the way of the cluster.
fn reasons(session: &Session, health: &ClusterHealthBody) -> anyhow::Result<()> {
    for reason in &health.reasons {
        let style = if reason.status == "unavailable" { BAD } else { WARN };
        let detail = super::output::printable(&reason.detail);
        session.output.line(format_args!("{style}{}{style:#}  {detail}", reason.code))?;
    }
    Ok(())
}

fn readiness(health: &HealthBody, is_ready: bool) -> String {
    let style = match health.status.as_str() {
        "ok" => GOOD,
        _ if is_ready => WARN,
        _ => BAD,
    };
    let reasons = health.reasons.iter().map(|reason| format!("\n  {reason}")).collect::<String>();
    format!("{style}{}{style:#}{reasons}", health.status)
}

fn told(status: &StatusBody) -> Vec<(&'static str, String)> {
    let durability = match status.durability.as_str() {
        "full" => "full: what was acknowledged survives power loss".to_owned(),
        "normal" => "normal: what was acknowledged survives the process, and not power loss".to_owned(),
        other => other.to_owned(),
    };
    let memory = if status.rss_bytes == 0 { "unknown".to_owned() } else { HumanBytes(status.rss_bytes).to_string() };
    let scrub = format!("{} commits, {} damaged", HumanCount(status.scrubbed_commits), HumanCount(status.bad_rows));
    vec![
        ("store", status.context.clone()),
        ("version", format!("{} ({})", status.version, status.build)),
        ("uptime", duration(Duration::from_millis(status.uptime_ms)).to_string()),
        ("durability", durability),
        ("live entities", HumanCount(status.live_entities).to_string()),
        ("memory", memory),
        ("connections", HumanCount(status.connections).to_string()),
        ("erasures unfinished", HumanCount(status.erasures_unfinished).to_string()),
        ("scrubbed", scrub),
    ]
}

fn shards(shards: &[ShardBody]) -> Table {
    let mut table = Table::new(["shard", "state", "entities", "quarantined", "waiting", "writes", "syncs", "failures"]);
    for shard in shards {
        let (style, state) = match &shard.out_of_use {
            Some(why) => (BAD, format!("out of use: {why}")),
            None if shard.is_closed => (WARN, "closed after a failure".to_owned()),
            None => (anstyle::Style::new(), "ok".to_owned()),
        };
        let counts = [shard.live_entities, shard.quarantined].map(|count| HumanCount(count).to_string());
        let [live, quarantined] = counts;
        let waiting = HumanBytes(shard.waiting_bytes).to_string();
        let [writes, groups, failures] =
            [shard.writes, shard.groups, shard.failures].map(|count| HumanCount(count).to_string());
        table.styled(style, [shard.shard.to_string(), state, live, quarantined, waiting, writes, groups, failures]);
    }
    table
}
