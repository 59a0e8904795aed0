//! The cluster, as the node that is asked sees it, and what operators do with it.

use std::{
    collections::BTreeMap,
    io,
    sync::Arc,
    time::{Duration, SystemTime},
};

use axum::{
    body::{Body, Bytes},
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use futures_util::stream;
use kuma_cluster::{ClusterEvent, ClusterEvents, Migrate, NodeId, Standing, Told, slot_of_tag};
use kuma_core::{SLOTS, Slot, Token};
use serde::Deserialize;
use tokio::{sync::OwnedSemaphorePermit, time::timeout};
use utoipa::IntoParams;

use super::{Problems, document::ClusterMessage, json, time_text};
use crate::{
    access::{self, Caller, May},
    body::{JsonBody, Query},
    forward::ask_nodes,
    node::Node,
    problem::Problem,
    tokens::Scope,
    wire,
};

/// How long other nodes are waited for.
const ASK_WITHIN: Duration = Duration::from_secs(2);
/// Between two signs of life.
const HEARTBEAT: Duration = Duration::from_secs(15);

impl Node {
    /// The cluster.
    ///
    /// # Errors
    /// The store is in none.
    fn clustered(&self) -> Result<&kuma_cluster::Node, Problem> {
        let detail = "the node is in no cluster; it owns all slots itself (docs/operations.md says how to found one)";
        self.cluster.as_ref().ok_or_else(|| Problem::new(StatusCode::CONFLICT, "not_clustered", detail))
    }
}

/// The nodes of the cluster.
#[utoipa::path(
    get,
    path = "/v1/cluster/members",
    operation_id = "members",
    tag = "cluster",
    responses((status = 200, description = "As the node that was asked knows them", body = wire::MembersBody), Problems),
)]
pub(crate) async fn members(State(node): State<Arc<Node>>, _may: May<access::Read>) -> Result<Response, Problem> {
    let member = |member: kuma_cluster::MemberStatus| wire::MemberBody {
        name: member.name,
        id: member.node.to_string(),
        disk: member.disk.to_string(),
        address: member.address,
        standing: standing(member.standing).to_owned(),
        is_own: member.is_own,
        is_up: member.is_up,
        owns: member.owns as u64,
        wished: member.wished as u64,
    };
    let mut members: Vec<_> = node.clustered()?.members().into_iter().map(member).collect();
    members.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(json(StatusCode::OK, &wire::MembersBody { members }))
}

fn standing(standing: Standing) -> &'static str {
    match standing {
        Standing::Joining => "joining",
        Standing::Member => "member",
        Standing::Leaving => "leaving",
        Standing::Forgotten => "forgotten",
    }
}

/// Which slots.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct SlotsQuery {
    /// This one alone.
    #[param(maximum = 4095)]
    slot: Option<u16>,
    /// The slot of all entities whose ids have this tag in braces.
    #[param(min_length = 1, max_length = 510, pattern = "^[^{}]+$")]
    tag: Option<String>,
    /// Those that the node of this name owns, as far as is known.
    owner: Option<String>,
    /// Those alone that are not where they should be.
    misplaced: Option<bool>,
}

/// The slots: who owns each, and who should.
#[utoipa::path(
    get,
    path = "/v1/cluster/slots",
    operation_id = "slots",
    tag = "cluster",
    params(SlotsQuery),
    responses((status = 200, description = "As the node that was asked knows them", body = wire::SlotsBody), Problems),
)]
pub(crate) async fn slots(
    State(node): State<Arc<Node>>,
    _may: May<access::Read>,
    Query(query): Query<SlotsQuery>,
) -> Result<Response, Problem> {
    let SlotsQuery { slot, tag, owner, misplaced } = query;
    let slot = slot.map(slot_of_number).transpose()?;
    let of_tag = tag.as_deref().map(slot_named).transpose()?;
    let cluster = node.clustered()?;
    let names: BTreeMap<NodeId, String> =
        cluster.members().into_iter().map(|member| (member.node, member.name)).collect();
    let (pins, wished) = (cluster.pins(), cluster.wished());
    let name = |node: Option<NodeId>| node.and_then(|node| names.get(&node)).cloned();
    let body = |status: kuma_cluster::SlotStatus| wire::SlotBody {
        slot: status.slot.number(),
        owner: status.owner.map(|(_, disk)| cluster.name_of(disk)),
        epoch: status.owner.map(|(epoch, _)| epoch.to_string()),
        wished: name(wished.get(usize::from(status.slot.number())).copied().flatten()),
        is_pinned: pins.contains_key(&status.slot),
        token: match status.token {
            Token::None => "none",
            Token::Owned { .. } => "owned",
            Token::Released { is_taken: true, .. } => "released",
            Token::Released { is_taken: false, .. } => "released_untaken",
        }
        .to_owned(),
        rows: status.rows,
    };
    let slots = cluster
        .slots()
        .into_iter()
        .filter(|status| slot.is_none_or(|slot| slot == status.slot) && of_tag.is_none_or(|slot| slot == status.slot))
        .map(body)
        .filter(|body| owner.is_none() || body.owner == owner)
        .filter(|body| misplaced != Some(true) || body.owner != body.wished)
        .collect();
    Ok(json(StatusCode::OK, &wire::SlotsBody { slots }))
}

fn slot_of_number(number: u16) -> Result<Slot, Problem> {
    match number < SLOTS {
        true => Ok(Slot::new(number.into())),
        false => Err(Problem::bad("invalid_slot", format!("slots are 0 to {}", SLOTS - 1))),
    }
}

fn slot_named(tag: &str) -> Result<Slot, Problem> {
    let detail = "a tag is 1 to 510 bytes without braces: `7` is the tag of the id `order-{7}`";
    slot_of_tag(tag).ok_or_else(|| Problem::bad("invalid_slot", detail))
}

/// Of which nodes.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct MovesQuery {
    /// Of the node alone that is asked.
    here: Option<bool>,
}

/// Slots on their way, of all nodes that can be reached.
#[utoipa::path(
    get,
    path = "/v1/cluster/moves",
    operation_id = "moves",
    tag = "cluster",
    params(MovesQuery),
    responses((status = 200, description = "Slots on their way, and what moves have come to", body = wire::MovesBody), Problems),
)]
pub(crate) async fn moves(
    State(node): State<Arc<Node>>,
    _may: May<access::Read>,
    Query(MovesQuery { here }): Query<MovesQuery>,
) -> Result<Response, Problem> {
    let cluster = node.clustered()?;
    let own = cluster.name();
    let body = |progress: kuma_cluster::MoveProgress| wire::MoveBody {
        slot: progress.slot.number(),
        from: own.clone(),
        to: cluster.name_of(progress.to),
        phase: progress.phase.to_owned(),
        rows_sent: progress.rows_sent,
        rows_left: progress.rows_left,
        since_ms: millis(progress.since.elapsed()),
    };
    let totals = cluster.move_totals();
    let mut pauses = totals.pauses;
    pauses.sort_unstable();
    let micros = |pause: &Duration| u64::try_from(pause.as_micros()).unwrap_or(u64::MAX);
    let of_own = wire::MoveTotalsBody {
        node: own.clone(),
        given: totals.given,
        taken: totals.taken,
        aborted: totals.aborted,
        pause_p50_us: pauses.get(pauses.len() / 2).map(micros),
        pause_max_us: pauses.last().map(micros),
    };
    let mut all = wire::MovesBody { moves: cluster.moves().into_iter().map(body).collect(), nodes: vec![of_own] };
    if here != Some(true) {
        for (_, answer) in ask_nodes(&node, "/v1/cluster/moves?here=true", Scope::Read, ASK_WITHIN).await {
            // One of another version that says something else.
            let Ok(mut others) = serde_json::from_slice::<wire::MovesBody>(&answer) else { continue };
            all.moves.append(&mut others.moves);
            all.nodes.append(&mut others.nodes);
        }
    }
    all.moves.sort_by_key(|one| one.slot);
    all.nodes.sort_by(|one, other| one.node.cmp(&other.node));
    Ok(json(StatusCode::OK, &all))
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// What if.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct PlanQuery {
    /// As if the node of this name or id were drained.
    without: Option<String>,
}

/// What would move from now on, or if a node were drained. Nothing is moved.
#[utoipa::path(
    get,
    path = "/v1/cluster/plan",
    operation_id = "plan",
    tag = "cluster",
    params(PlanQuery),
    responses((status = 200, description = "What would move", body = wire::PlanBody), Problems),
)]
pub(crate) async fn plan(
    State(node): State<Arc<Node>>,
    _may: May<access::Read>,
    Query(PlanQuery { without }): Query<PlanQuery>,
) -> Result<Response, Problem> {
    let cluster = node.clustered()?;
    let without = without.map(|which| cluster.find(&which)).transpose()?.map(|(node, _)| node);
    let plan = cluster.plan_without(without);
    let names: BTreeMap<NodeId, String> = plan.nodes.iter().map(|share| (share.node, share.name.clone())).collect();
    let name = |node: &NodeId| names.get(node).cloned().unwrap_or_else(|| node.to_string());
    let mut flows: BTreeMap<(String, String), Vec<u16>> = BTreeMap::new();
    for one in &plan.moves {
        flows.entry((name(&one.from), name(&one.to))).or_default().push(one.slot.number());
    }
    let flow = |((from, to), slots): ((String, String), Vec<u16>)| {
        let count = slots.len() as u64;
        wire::PlanFlowBody { from, to, count, slots }
    };
    let share = |share: &kuma_cluster::NodeShare| wire::PlanNodeBody {
        node: share.name.clone(),
        owns: share.owns as u64,
        wished: share.wished as u64,
        gives: share.gives as u64,
        takes: share.takes as u64,
    };
    let body = wire::PlanBody {
        moves: plan.moves.len() as u64,
        without_owner: plan.without_owner.len() as u64,
        nodes: plan.nodes.iter().map(share).collect(),
        flows: flows.into_iter().map(flow).collect(),
    };
    Ok(json(StatusCode::OK, &body))
}

/// Has slots moved: all that are not where they should be, or one to a node, where it stays.
///
/// Answered at once; `/v1/cluster/moves` tells how it goes.
#[utoipa::path(
    post,
    path = "/v1/cluster/migrate",
    operation_id = "migrate",
    tag = "cluster",
    request_body = wire::MigrateBody,
    responses((status = 202, description = "It is asked for", body = wire::MigratedBody), Problems),
)]
pub(crate) async fn migrate(
    State(node): State<Arc<Node>>,
    May { caller, .. }: May<access::Admin>,
    JsonBody(body): JsonBody<wire::MigrateBody>,
) -> Result<Response, Problem> {
    let wire::MigrateBody { slot, tag, to, unpin } = body;
    let refuse =
        |detail: &str| Err(Problem::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid_migration", detail.to_owned()));
    let slot = match (slot, tag) {
        (Some(_), Some(_)) => return refuse("`slot` and `tag` exclude each other"),
        (Some(slot), None) => Some(slot_of_number(slot)?),
        (None, Some(tag)) => Some(slot_named(&tag)?),
        (None, None) => None,
    };
    let what = match (slot, to, unpin) {
        (None, None, false) => Migrate::Wished,
        (Some(slot), Some(to), false) => Migrate::Pin { slot, to },
        (Some(slot), None, true) => Migrate::Unpin { slot },
        _ => return refuse("say `slot` or `tag` with `to` or `unpin`, or nothing: all that is not where it should be"),
    };
    let cluster = node.clustered()?;
    let to = match &what {
        Migrate::Pin { to, .. } => Some(cluster.find(to)?.1.name),
        Migrate::Wished | Migrate::Unpin { .. } => None,
    };
    note(&node, &caller, "migrate", to, slot).await;
    cluster.migrate(what).await?;
    let to_move = cluster.plan().moves.len() as u64;
    Ok(json(StatusCode::ACCEPTED, &wire::MigratedBody { slot: slot.map(|slot| slot.number()), to_move }))
}

/// Has a node give all its slots to the others, and take no new ones; or take slots again.
///
/// Answered at once; the node's `owns` in `/v1/cluster/members` is 0 when it is done. Then it can be stopped without anybody noticing.
#[utoipa::path(
    post,
    path = "/v1/cluster/drain",
    operation_id = "drain",
    tag = "cluster",
    request_body = wire::DrainBody,
    responses((status = 202, description = "It is asked for", body = wire::DrainedBody), Problems),
)]
pub(crate) async fn drain(
    State(node): State<Arc<Node>>,
    May { caller, .. }: May<access::Admin>,
    JsonBody(wire::DrainBody { node: which, cancel }): JsonBody<wire::DrainBody>,
) -> Result<Response, Problem> {
    let cluster = node.clustered()?;
    let which = which.unwrap_or_else(|| cluster.id().to_string());
    let name = cluster.find(&which)?.1.name;
    note(&node, &caller, if cancel { "undrain" } else { "drain" }, Some(name), None).await;
    let drained = match cancel {
        false => cluster.drain_node(&which).await?,
        true => cluster.undrain_node(&which).await?,
    };
    let member = cluster.members().into_iter().find(|member| member.node == drained);
    let (node, owns) = member.map_or_else(|| (drained.to_string(), 0), |member| (member.name, member.owns as u64));
    Ok(json(StatusCode::ACCEPTED, &wire::DrainedBody { node, owns }))
}

/// Takes a node out of the cluster for ever. **What it owns stays with it**, out of reach: drain it before, if it can be.
#[utoipa::path(
    post,
    path = "/v1/cluster/forget",
    operation_id = "forget",
    tag = "cluster",
    request_body = wire::ForgetBody,
    responses((status = 200, description = "It is forgotten", body = wire::DrainedBody), Problems),
)]
pub(crate) async fn forget(
    State(node): State<Arc<Node>>,
    May { caller, .. }: May<access::Admin>,
    JsonBody(wire::ForgetBody { node: which, destroyed }): JsonBody<wire::ForgetBody>,
) -> Result<Response, Problem> {
    let cluster = node.clustered()?;
    let (forgotten, member) = cluster.find(&which)?;
    let owns = cluster.members().into_iter().find(|member| member.node == forgotten).map_or(0, |member| member.owns);
    note(&node, &caller, if destroyed { "attest_destroyed" } else { "forget" }, Some(member.name.clone()), None).await;
    match destroyed {
        true => cluster.attest_destroyed(forgotten).await?,
        false => drop(cluster.forget(&which).await?),
    }
    Ok(json(StatusCode::OK, &wire::DrainedBody { node: member.name, owns: owns as u64 }))
}

/// Who asks for it, in the log and in the audit log. What heals a cluster is not held up by a full disk: it is done without an entry then.
async fn note(node: &Node, caller: &Caller, act: &str, about: Option<String>, slot: Option<Slot>) {
    let token = caller.token.as_deref().map(str::to_owned);
    tracing::info!(target: "kuma::cluster", token = token.as_deref().unwrap_or("none"), act, node = about.as_deref(), "an operator asks");
    let slot = slot.map(|slot| slot.number());
    let operation = kuma_core::Operation { token, act: act.to_owned(), node: about, slot };
    if let Err(error) = node.kuma.audit_operation(operation).await {
        tracing::error!(target: "kuma::cluster", %error, act, "what an operator asks for could not be noted in the audit log; it is done all the same");
    }
}

/// What happens in the cluster from now on, as this node sees it, for a monitor.
///
/// As server-sent events, each with a `ClusterEventBody`: `member_joined`, `member_left`, `member_up`, `member_down`, `standing_changed`, `ready`, `move_started`,
/// `move_progress`, `move_done`, `move_aborted`, `slot_taken`, and `missed` for whoever does not keep up. What is missed is not told again: ask for the members
/// and moves then.
#[utoipa::path(
    get,
    path = "/v1/cluster/events",
    operation_id = "cluster_events",
    tag = "cluster",
    responses((status = 200, description = "Each event of the stream", body = ClusterMessage, content_type = "text/event-stream"), Problems),
)]
pub(crate) async fn events(State(node): State<Arc<Node>>, _may: May<access::Read>) -> Result<Response, Problem> {
    let events = node.clustered()?.events();
    let permit = node.subscription()?;
    let own = node.clustered()?.name();
    let feed = Feed { events, node, own, has_begun: false, _permit: permit };
    let chunks = stream::unfold(feed, |mut feed| async move {
        let chunk = feed.chunk().await?;
        Some((Ok::<_, io::Error>(Bytes::from(chunk)), feed))
    });
    let heads = [(header::CONTENT_TYPE, "text/event-stream"), (header::CACHE_CONTROL, "no-store")];
    Ok((heads, Body::from_stream(chunks)).into_response())
}

struct Feed {
    events: ClusterEvents,
    node: Arc<Node>,
    own: String,
    has_begun: bool,
    _permit: OwnedSemaphorePermit,
}

impl Feed {
    /// What comes next, or a sign of life. None when the server stops.
    async fn chunk(&mut self) -> Option<String> {
        if !std::mem::replace(&mut self.has_begun, true) {
            // So that the head of the answer goes out.
            return Some("retry: 1000\n: kuma\n\n".to_owned());
        }
        let told = tokio::select! {
            biased;
            () = self.node.stopping.cancelled() => return None,
            told = timeout(HEARTBEAT, self.events.next()) => told,
        };
        match told {
            Err(_) => Some(": still here\n\n".to_owned()),
            Ok(told) => {
                let (name, body) = body(told?, &self.own);
                // Numbers and texts: it is JSON, in one line.
                let data = serde_json::to_string(&body).unwrap_or_default();
                Some(format!("event: {name}\ndata: {data}\n\n"))
            }
        }
    }
}

/// An event as it is told.
fn body(told: Told, own: &str) -> (&'static str, wire::ClusterEventBody) {
    let none = wire::ClusterEventBody::default();
    let happened = match told {
        Told::Happened(happened) => happened,
        Told::Missed(missed) => {
            let at = time_text(SystemTime::now());
            return ("missed", wire::ClusterEventBody { at, missed: Some(missed), ..none });
        }
    };
    let none = wire::ClusterEventBody { at: time_text(happened.at), ..none };
    let of = |node: String| wire::ClusterEventBody { node: Some(node), ..none.clone() };
    let of_slot = |slot: Slot, to: String| wire::ClusterEventBody {
        node: Some(own.to_owned()),
        slot: Some(slot.number()),
        to: Some(to),
        ..none.clone()
    };
    match happened.event {
        ClusterEvent::MemberJoined { name, .. } => ("member_joined", of(name)),
        ClusterEvent::MemberLeft { name, .. } => ("member_left", of(name)),
        ClusterEvent::MemberUp { name } => ("member_up", of(name)),
        ClusterEvent::MemberDown { name, why } => {
            ("member_down", wire::ClusterEventBody { reason: Some(why), ..of(name) })
        }
        ClusterEvent::StandingChanged { name, from, to, .. } => {
            let (from, to) = (Some(standing(from).to_owned()), Some(standing(to).to_owned()));
            ("standing_changed", wire::ClusterEventBody { from, to, ..of(name) })
        }
        ClusterEvent::Ready => ("ready", of(own.to_owned())),
        ClusterEvent::MoveStarted { slot, to } => ("move_started", of_slot(slot, to)),
        ClusterEvent::MoveProgress { slot, to, phase, rows_sent, rows_left } => {
            let (phase, rows_sent, rows_left) = (Some(phase.to_owned()), Some(rows_sent), Some(rows_left));
            ("move_progress", wire::ClusterEventBody { phase, rows_sent, rows_left, ..of_slot(slot, to) })
        }
        ClusterEvent::MoveDone { slot, to, rows_sent, pause } => {
            let pause_us = Some(u64::try_from(pause.as_micros()).unwrap_or(u64::MAX));
            ("move_done", wire::ClusterEventBody { rows_sent: Some(rows_sent), pause_us, ..of_slot(slot, to) })
        }
        ClusterEvent::MoveAborted { slot, to, reason } => {
            ("move_aborted", wire::ClusterEventBody { reason: Some(reason.to_owned()), ..of_slot(slot, to) })
        }
        ClusterEvent::SlotTaken { slot } => {
            ("slot_taken", wire::ClusterEventBody { slot: Some(slot.number()), ..of(own.to_owned()) })
        }
        _ => ("other", none),
    }
}
