//! What operators ask of a node.

use std::{path::Path as FilePath, sync::Arc};

use axum::{
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use futures_util::TryStreamExt;
use kuma_core::{BackupStep, Direction, Durability, Kuma};
use serde::Deserialize;
use utoipa::{IntoParams, ToSchema};

use super::{
    Problems,
    document::{BackupLines, VerifyLines},
    health,
    history::{EventHead, write_event},
    json, json_text, time_text, work,
};
use crate::{
    access::{self, May},
    body::{Path, Query},
    node::Node,
    problem::{Problem, full},
    process, wire,
};

/// Which entries.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct AuditQuery {
    /// The first entry that is wanted, from 1.
    #[param(minimum = 1)]
    from: Option<u64>,
    /// At most so many; 100 by default.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<u64>,
}

/// The audit log: who had what erased, when and why, who was denied what, and what was asked of the cluster here. It is never erased.
#[utoipa::path(
    get,
    path = "/v1/audit",
    operation_id = "audit",
    tag = "operation",
    params(AuditQuery),
    responses((status = 200, description = "Entries, oldest first", body = wire::AuditPage), Problems),
)]
pub(crate) async fn audit(
    State(node): State<Arc<Node>>,
    _may: May<access::Admin>,
    Query(query): Query<AuditQuery>,
) -> Result<Response, Problem> {
    let (from, limit) = (query.from.unwrap_or(1), query.limit.unwrap_or(100));
    if from == 0 || !(1..=1000).contains(&limit) {
        return Err(Problem::bad("invalid_query_string", "`from` is a number from 1, `limit` is 1 to 1000"));
    }
    let mut history = node.kuma.audit_log().raw().history(from.., Direction::Forward);
    let (mut page, mut count, mut next) = (b"{\"events\":[".to_vec(), 0, None);
    while let Some(event) = history.try_next().await? {
        if count == limit {
            next = Some(event.version);
            break;
        }
        if count > 0 {
            page.push(b',');
        }
        write_event(&mut page, &EventHead::of(&event), &event);
        count += 1;
    }
    page.extend_from_slice(b"]");
    if let Some(next) = next {
        page.extend_from_slice(format!(",\"next\":{next}").as_bytes());
    }
    page.push(b'}');
    Ok(json_text(page))
}

/// The node as it is now.
#[utoipa::path(
    get,
    path = "/v1/status",
    operation_id = "status",
    tag = "operation",
    responses((status = 200, description = "The node", body = wire::StatusBody), Problems),
)]
pub(crate) async fn status(State(node): State<Arc<Node>>, _may: May<access::AnyToken>) -> Response {
    let stats = node.kuma.stats();
    let shard = |shard: &kuma_core::ShardStats| wire::ShardBody {
        shard: shard.shard,
        out_of_use: shard.out_of_use.clone(),
        live_entities: shard.live_entities as u64,
        quarantined: shard.quarantined as u64,
        waiting_bytes: shard.waiting_bytes as u64,
        writes: shard.writer.map_or(0, |writer| writer.entries),
        groups: shard.writer.map_or(0, |writer| writer.groups),
        failures: shard.writer.map_or(0, |writer| writer.failures),
        is_closed: shard.writer.is_none_or(|writer| writer.closed),
    };
    let body = wire::StatusBody {
        context: node.kuma.context().to_owned(),
        version: process::build_info().version.to_owned(),
        build: process::build_info().build.to_owned(),
        uptime_ms: u64::try_from(node.started.elapsed().as_millis()).unwrap_or(u64::MAX),
        is_ready: health::readiness(&node).0 == StatusCode::OK,
        durability: match stats.durability {
            Durability::Full => "full",
            Durability::Normal => "normal",
        }
        .to_owned(),
        live_entities: stats.live_entities() as u64,
        erasures_unfinished: stats.erasures_unfinished as u64,
        scrubbed_commits: stats.scrub.commits,
        bad_rows: stats.scrub.bad_rows,
        connections: node.connections.load(std::sync::atomic::Ordering::Relaxed) as u64,
        rss_bytes: process::memory().unwrap_or(0),
        shards: stats.shards.iter().map(shard).collect(),
        cluster: node.cluster.as_ref().map(in_cluster),
    };
    json(StatusCode::OK, &body)
}

fn in_cluster(cluster: &kuma_cluster::Node) -> wire::StatusClusterBody {
    let members = cluster.members();
    wire::StatusClusterBody {
        node: cluster.name(),
        address: cluster.address().to_string(),
        members: members.len() as u64,
        members_up: members.iter().filter(|member| member.is_up).count() as u64,
        owns: cluster.owned() as u64,
        wished: members.iter().find(|member| member.is_own).map_or(0, |member| member.wished as u64),
        moving: cluster.moves().len() as u64,
        health: cluster.health().state.as_str().to_owned(),
    }
}

/// Reads everything and checks it, beside appends.
///
/// Answered by lines: progress now and then, and at the end what was found.
#[utoipa::path(
    post,
    path = "/v1/verify",
    operation_id = "verify",
    tag = "operation",
    responses(
        (status = 200, description = "`{\"progress\": ...}` now and then, `{\"done\": ...}` or `{\"problem\": ...}` at the end", body = VerifyLines, content_type = "application/x-ndjson"),
        Problems,
    ),
)]
pub(crate) async fn verify(State(node): State<Arc<Node>>, _may: May<access::Admin>) -> Result<Response, Problem> {
    let permit = node.stream()?;
    let (kuma, stopping) = (node.kuma.clone(), node.stopping.clone());
    work::answer(permit, wire::VerifyProgressBody { commits: 0 }, move |told| async move {
        let verify = kuma.verify(|commits| {
            told.send_replace(wire::VerifyProgressBody { commits });
        });
        let found = tokio::select! {
            found = verify => found?,
            () = stopping.cancelled() => return Err(Problem::stopping()),
        };
        let (entities, commits, events) = found.totals();
        let shards = found.shards.iter().filter_map(|shard| match &shard.outcome {
            Err(why) => Some(format!("shard {}: {why}", shard.shard)),
            Ok(report) if report.is_clean() => None,
            Ok(report) => Some(format!("shard {}: {report:?}", shard.shard)),
        });
        let damage = shards.chain(found.keys_damage.iter().chain(&found.node_damage).cloned()).collect();
        Ok(wire::VerificationBody {
            is_clean: found.is_clean(),
            entities,
            commits,
            events,
            keys: found.keys,
            keys_destroyed: found.keys_destroyed,
            damage,
        })
    })
    .await
}

/// What is backed up. Each belongs in a place of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum BackupPart {
    /// Events, without keys: only what is new is copied.
    #[default]
    Events,
    /// Wrapped keys, in place of those that are there.
    Keys,
    /// Who was erased, by hash.
    Ledger,
}

/// Which part.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct BackupQuery {
    /// Which part.
    #[serde(default)]
    #[param(inline)]
    part: Option<BackupPart>,
}

/// Makes a backup on the node's machine, below its `backup_dir`, or brings the one of this name up to date.
///
/// Answered by lines: progress now and then, and at the end what was done. The parts belong in different places: docs/operations.md.
#[utoipa::path(
    post,
    path = "/v1/backups/{name}",
    operation_id = "backup",
    tag = "operation",
    params(
        ("name" = String, Path, description = "Names the backup", pattern = "^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"),
        BackupQuery,
    ),
    responses(
        (status = 200, description = "`{\"progress\": ...}` now and then, `{\"done\": ...}` or `{\"problem\": ...}` at the end", body = BackupLines, content_type = "application/x-ndjson"),
        Problems,
    ),
)]
pub(crate) async fn backup(
    State(node): State<Arc<Node>>,
    _may: May<access::Admin>,
    Path(name): Path<String>,
    Query(query): Query<BackupQuery>,
) -> Result<Response, Problem> {
    let is_plain = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'));
    if !is_plain || !name.starts_with(|first: char| first.is_ascii_alphanumeric()) || name.len() > 64 {
        let detail = "a backup's name is 1 to 64 letters, digits, '-', '_' and '.', a letter or digit first";
        return Err(Problem::bad("invalid_path", detail));
    }
    let permit = node.stream()?;
    let (kuma, stopping) = (node.kuma.clone(), node.stopping.clone());
    let part = query.part.unwrap_or_default();
    let directory = node.config.backup_dir().join(name);
    let begin = wire::BackupProgressBody {
        step: "copy".to_owned(),
        shard: 1,
        shards: 1,
        commits: 0,
        commits_total: 0,
        bytes: 0,
    };
    work::answer(permit, begin, move |told| async move {
        let work = async {
            tokio::fs::create_dir_all(&directory).await.map_err(|error| {
                Problem::new(StatusCode::CONFLICT, "backup_failed", format!("{}: {error}", directory.display()))
            })?;
            match part {
                BackupPart::Events => events(&kuma, &directory.join("events"), &told).await,
                BackupPart::Keys => keys(&kuma, &directory.join("keys")).await,
                BackupPart::Ledger => ledger(&kuma, &directory.join("ledger")).await,
            }
        };
        tokio::select! {
            report = work => report,
            () = stopping.cancelled() => Err(Problem::stopping()),
        }
    })
    .await
}

async fn events(
    kuma: &Kuma,
    directory: &FilePath,
    told: &tokio::sync::watch::Sender<wire::BackupProgressBody>,
) -> Result<wire::BackupReportBody, Problem> {
    let progress = |now: &kuma_core::BackupProgress| {
        let step = match now.step {
            BackupStep::Copy => "copy",
            BackupStep::Verify => "verify",
        };
        told.send_replace(wire::BackupProgressBody {
            step: step.to_owned(),
            shard: now.shard,
            shards: now.shards,
            commits: now.commits,
            commits_total: now.commits_total,
            bytes: now.bytes,
        });
    };
    let report = kuma.backup(directory).run(progress).await?;
    let mut warnings = Vec::new();
    if !report.bad_slots.is_empty() {
        warnings
            .push(format!("{} slots of the store are not as they were committed: run verify", report.bad_slots.len()));
    }
    Ok(wire::BackupReportBody {
        directory: directory.display().to_string(),
        part: "events".to_owned(),
        taken_at: time_text(report.taken_at),
        rows: report.commits,
        bytes: report.bytes,
        is_verified: report.verified.is_some(),
        warnings,
    })
}

async fn keys(kuma: &Kuma, directory: &FilePath) -> Result<wire::BackupReportBody, Problem> {
    let report = kuma.backup_keys(directory).await?;
    Ok(wire::BackupReportBody {
        directory: directory.display().to_string(),
        part: "keys".to_owned(),
        taken_at: time_text(report.taken_at),
        rows: report.keys,
        bytes: 0,
        is_verified: true,
        warnings: vec!["the master key is not in it: keep a copy of that apart from both".to_owned()],
    })
}

async fn ledger(kuma: &Kuma, file: &FilePath) -> Result<wire::BackupReportBody, Problem> {
    let failed = |error: &dyn std::error::Error| {
        Problem::new(StatusCode::CONFLICT, "backup_failed", format!("{}: {}", file.display(), full(error)))
            .retry_safe(true)
    };
    // It is there when it is complete.
    let part = file.with_extension("part");
    let mut to = tokio::fs::File::create(&part).await.map_err(|error| failed(&error))?;
    let summary = kuma.export_ledger(&mut to).await?;
    to.sync_all().await.map_err(|error| failed(&error))?;
    tokio::fs::rename(&part, file).await.map_err(|error| failed(&error))?;
    let directory = tokio::fs::File::open(file.parent().unwrap_or(file)).await.map_err(|error| failed(&error))?;
    directory.sync_all().await.map_err(|error| failed(&error))?;
    Ok(wire::BackupReportBody {
        directory: file.display().to_string(),
        part: "ledger".to_owned(),
        taken_at: time_text(summary.as_of),
        rows: summary.tombstones,
        bytes: 0,
        is_verified: false,
        warnings: Vec::new(),
    })
}

/// Metrics as Prometheus reads them.
#[utoipa::path(
    get,
    path = "/metrics",
    operation_id = "metrics",
    tag = "operation",
    responses((status = 200, description = "Prometheus' text format", body = String, content_type = "text/plain"), Problems),
)]
pub(crate) async fn metrics(State(node): State<Arc<Node>>, _may: May<access::AnyToken>) -> Response {
    metrics::gauge!("kuma_http_connections").set(node.connections.load(std::sync::atomic::Ordering::Relaxed) as f64);
    if let Some(bytes) = process::memory() {
        metrics::gauge!("kuma_http_resident_bytes").set(bytes as f64);
    }
    let text = tokio::task::spawn_blocking({
        let metrics = node.metrics.clone();
        move || metrics.render()
    })
    .await;
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text.unwrap_or_default()).into_response()
}
