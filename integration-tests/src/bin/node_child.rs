//! A server in a process of its own, so that its memory can be measured and it can be killed.
//!
//! `node_child DATA FIELD=NUMBER...`: prints its address, and stops when its standard input ends.
#![allow(clippy::print_stdout)]

use std::{io::Write, time::Duration};

use anyhow::{Context, bail};
use kuma_node::{Config, Server};
use tokio::io::AsyncReadExt;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let mut config = Config::new(arguments.next().context("no directory")?);
    config.listen = ([127, 0, 0, 1], 0).into();
    config.access_log = false;
    for argument in arguments {
        let (name, value) = argument.split_once('=').context("FIELD=NUMBER")?;
        let number: usize = value.parse()?;
        match name {
            "header_timeout_ms" => config.header_timeout = Duration::from_millis(number as u64),
            "connections_max" => config.connections_max = number,
            "shards" => config.shards = Some(u16::try_from(number)?),
            "streams_max" => config.streams_max = number,
            "subscriptions_max" => config.subscriptions_max = number,
            "memory_budget" => config.memory_budget = number,
            _ => bail!("{name} is not known"),
        }
    }
    let server = Server::start(config).await?;
    println!("{}", server.address());
    std::io::stdout().flush()?;
    // Whoever started it has gone, or wants it to go.
    let _ = tokio::io::stdin().read_to_end(&mut Vec::new()).await;
    server.stop().await;
    Ok(())
}
