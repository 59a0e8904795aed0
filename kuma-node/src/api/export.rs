//! Export and import: entities as lines of text.

use std::{io, sync::Arc};

use axum::{
    body::{Body, Bytes},
    extract::{Request, State},
    response::Response,
};
use futures_util::{StreamExt, stream};
use kuma_core::ExportError;
use serde::Deserialize;
use tokio::io::{BufReader, BufWriter, DuplexStream};
use tokio_util::io::{ReaderStream, StreamReader};
use utoipa::IntoParams;

use super::{
    EntityPath, Problems,
    document::{ExportedLine, ImportLines, ImportedLine},
    history::{CHUNK_BYTES, exists},
    lines, work,
};
use crate::{
    access::{self, May},
    append_body::Encoding,
    body::{Path, Query, encoding, next_frame},
    node::Node,
    problem::Problem,
    wire,
};

/// Which lines.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct ExportQuery {
    /// Everything that is held of the entity, also by read models: for the person who asks.
    #[serde(default)]
    archive: bool,
}

/// The whole history of an entity as lines of text, with a manifest at the end.
///
/// An answer without the manifest was cut off.
#[utoipa::path(
    get,
    path = "/v1/entities/{kind}/{id}/export",
    operation_id = "export",
    tag = "entities",
    params(EntityPath, ExportQuery),
    responses((status = 200, description = "Lines as docs/formats.md has them", body = Vec<ExportedLine>, content_type = "application/x-ndjson"), Problems),
)]
pub(crate) async fn entity(
    State(node): State<Arc<Node>>,
    _may: May<access::Read>,
    Path(path): Path<EntityPath>,
    Query(query): Query<ExportQuery>,
) -> Result<Response, Problem> {
    let permit = node.stream()?;
    let entity = path.entity(&node)?;
    exists(&entity).await?;
    Ok(lines(written(permit, move |mut to| async move {
        match query.archive {
            true => entity.archive(&mut to).await.map(drop),
            false => entity.export(&mut to).await.map(drop),
        }
    })))
}

/// The history of every entity of the store, with a manifest at the end.
#[utoipa::path(
    get,
    path = "/v1/export",
    operation_id = "export_all",
    tag = "streams",
    responses((status = 200, description = "Lines as docs/formats.md has them", body = Vec<ExportedLine>, content_type = "application/x-ndjson"), Problems),
)]
pub(crate) async fn all(State(node): State<Arc<Node>>, _may: May<access::Read>) -> Result<Response, Problem> {
    let permit = node.stream()?;
    let kuma = node.kuma.clone();
    Ok(lines(written(permit, move |mut to| async move { kuma.export_all(&mut to, |_| ()).await.map(drop) })))
}

/// A body that somebody writes. If that fails it is cut off, so that nobody takes it for whole.
fn written<K, W, F>(keep: K, write: W) -> Body
where
    K: Send + 'static,
    W: FnOnce(BufWriter<DuplexStream>) -> F,
    F: Future<Output = Result<(), ExportError>> + Send + 'static,
{
    let (to, from) = tokio::io::duplex(2 * CHUNK_BYTES);
    let writing = tokio::spawn(write(BufWriter::with_capacity(CHUNK_BYTES, to)));
    let end = async move {
        let _keep = keep;
        match writing.await {
            Ok(Ok(())) => None,
            Ok(Err(error)) => {
                let problem = Problem::from(error);
                tracing::warn!(code = problem.code(), "an export was cut off");
                Some(Err(io::Error::other(problem.code())))
            }
            Err(_) => Some(Err(io::Error::other("interrupted"))),
        }
    };
    let end = stream::once(end).filter_map(|end: Option<io::Result<Bytes>>| async { end });
    Body::from_stream(ReaderStream::with_capacity(from, CHUNK_BYTES).chain(end))
}

/// Where lines come from.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct ImportQuery {
    /// Names the file, in 1 to 64 bytes: together with the number of a line it is the idempotency key of its commit. Sent again under the same
    /// name, each line happens once.
    #[param(min_length = 1, max_length = 64)]
    source: String,
}

/// Imports events from lines of text: an export, or your own.
///
/// `{"kind", "id", "type", "data"}` is enough. Answered by lines: progress now and then, and at the end what was done or which line is wrong. An
/// import that was cut off is sent again under the same name. Not in a cluster in which other nodes own slots.
#[utoipa::path(
    post,
    path = "/v1/import",
    operation_id = "import",
    tag = "streams",
    params(ImportQuery),
    request_body(content = Vec<ImportedLine>, content_type = "application/x-ndjson", description = "Lines as docs/formats.md has them"),
    responses(
        (status = 200, description = "`{\"progress\": ...}` now and then, `{\"done\": ...}` or `{\"problem\": ...}` at the end", body = ImportLines, content_type = "application/x-ndjson"),
        Problems,
    ),
)]
pub(crate) async fn import(
    State(node): State<Arc<Node>>,
    _may: May<access::Append>,
    Query(ImportQuery { source }): Query<ImportQuery>,
    request: Request,
) -> Result<Response, Problem> {
    let (parts, body) = request.into_parts();
    encoding(&parts.headers, &[("application/x-ndjson", Encoding::Json)])?;
    if node.cluster.as_ref().is_some_and(|cluster| cluster.owned() < usize::from(kuma_core::SLOTS)) {
        return Err(Problem::new(
            axum::http::StatusCode::CONFLICT,
            "not_in_a_cluster",
            "an import writes to the node's own entities alone, and other nodes own some; send the events through the stream /v1/append, which any node takes",
        ));
    }
    let permit = node.stream()?;
    let stopping = node.stopping.clone();
    let import = node.kuma.import(source);
    let frames = stream::unfold((node, body), |(node, mut body)| async move {
        let frame = next_frame(&node, &mut body).await.transpose()?;
        Some((frame.map_err(|problem| io::Error::other(problem.code())), (node, body)))
    });
    let mut reader = BufReader::with_capacity(CHUNK_BYTES, StreamReader::new(Box::pin(frames)));
    work::answer(permit, wire::ImportProgressBody::default(), move |told| async move {
        let run = import.run(&mut reader, |now| {
            told.send_replace(wire::ImportProgressBody {
                lines: now.lines,
                bytes: now.bytes,
                commits: now.commits,
                events: now.events,
                repeated: now.repeated,
            });
        });
        let report = tokio::select! {
            report = run => report?,
            () = stopping.cancelled() => return Err(Problem::stopping()),
        };
        Ok(wire::ImportReportBody {
            lines: report.lines,
            entities: report.entities,
            commits: report.commits,
            events: report.events,
            new_events: report.new_events(),
        })
    })
    .await
}
