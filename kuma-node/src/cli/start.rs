//! `start`: runs a node until it is told to stop.

use std::{process, time::Duration};

use futures_util::StreamExt;

use super::Exit;
use crate::{
    Server,
    config::{StartArguments, load},
    problem::full,
    process as own,
};

/// Files and sockets of the process beside its connections: shards with their logs, models and their readers.
const FILES_APART: u64 = 512;

pub(super) async fn run(arguments: &StartArguments) -> anyhow::Result<Exit> {
    let loaded = load(arguments)?;
    let mut config = loaded.config;
    own::log_to_stderr(&config.log, config.log_format)?;
    loaded.warnings.iter().chain(&own::harden()).for_each(|warning| tracing::warn!("{warning}"));
    let files = own::raise_file_limit();
    let connections_max = usize::try_from(files.saturating_sub(FILES_APART)).unwrap_or(usize::MAX).max(64);
    if config.connections_max > connections_max {
        tracing::warn!(
            files,
            connections_max,
            "the process may open too few files for `connections_max`; fewer connections are taken (ulimit -n, LimitNOFILE)"
        );
        config.connections_max = connections_max;
    }
    // Caught from here on: a store that is being opened is closed in order, too.
    let (stop, mut hangups) = (own::shutdown_signal()?, own::hangups()?);
    let data = config.data.display().to_string();
    tracing::info!(version = %own::build_info(), "kuma-node starts");
    tokio::pin!(stop);
    // A node that waits for its seeds may do so for ever. Whatever it is at, what is on the disk is whole.
    let is_clustered = config.cookie_file.is_some();
    let server = tokio::select! {
        biased;
        server = Server::start(config) => server?,
        signal = &mut stop, if is_clustered => {
            tracing::info!(signal, "kuma-node ends while it starts");
            return Ok(Exit::Done);
        }
    };
    tracing::info!(url = server.url(), data, "kuma-node is ready");
    own::notify_ready();
    let mut alive = own::watchdog_interval().map(tokio::time::interval);
    let signal = loop {
        tokio::select! {
            signal = &mut stop => break signal,
            Some(()) = hangups.next() => {
                own::notify_reloading();
                match server.reload().await {
                    Ok(()) => tracing::info!("tokens, certificate and projections were read again"),
                    Err(error) => tracing::error!(error = full(&error), "not everything could be read again; what was there stays in force"),
                }
                own::notify_ready();
            }
            () = tick(&mut alive) => own::notify_alive(),
        }
    };
    tracing::info!(
        signal,
        "kuma-node stops: requests that are there finish, new ones are refused; a second signal ends it at once"
    );
    own::notify_stopping();
    let again = own::shutdown_signal()?;
    tokio::select! {
        () = server.stop() => tracing::info!("kuma-node has stopped"),
        signal = again => {
            // What was acknowledged is on the disk.
            tracing::warn!(signal, "kuma-node ends at once");
            process::exit(Exit::Failed as i32);
        }
    }
    Ok(Exit::Done)
}

async fn tick(alive: &mut Option<tokio::time::Interval>) {
    match alive {
        Some(alive) => drop(alive.tick().await),
        None => tokio::time::sleep(Duration::MAX).await,
    }
}
