//! A master key in another process: a toy key management service (KMS), and a store that uses it.
//!
//! ```sh
//! cargo run --release --example kms -p kuma-core -- serve --key-file ./kms.key --create --socket ./kms.sock
//! cargo run --release --example kms -p kuma-core -- demo --socket ./kms.sock --data ./kms-data
//! ```
//!
//! Rotate: put a new key in front of the old one (`openssl rand -hex 32`, then the old line), restart `serve`, run `demo` again.
//! The interface between the two, and what to know of an external KMS: docs/kms.md.

#[path = "kms/client.rs"]
mod client;
#[path = "kms/protocol.rs"]
mod protocol;
#[path = "kms/server.rs"]
mod server;

use std::{
    io::IsTerminal,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::Context;
use clap::{Parser, Subcommand};
pub(crate) use client::KmsMasterKey;
use kuma_core::{Entity, Kuma, MasterKeySource, Options};
use serde::{Deserialize, Serialize};
use tracing_subscriber::EnvFilter;

/// A master key in another process.
#[derive(Parser)]
#[command(name = "kms")]
struct Arguments {
    #[command(subcommand)]
    role: Role,
}

#[derive(Subcommand)]
enum Role {
    /// Serves the keys of a file. Whoever has the file has them too: a toy.
    Serve {
        /// A key a line, the current one first.
        #[arg(long, value_name = "FILE")]
        key_file: PathBuf,
        /// Where to listen. Put it into a directory that only you can write to.
        #[arg(long, value_name = "PATH")]
        socket: PathBuf,
        /// Makes the key file if it is missing.
        #[arg(long)]
        create: bool,
    },
    /// Appends, reads and rotates with the keys of a KMS.
    Demo {
        /// Where the KMS listens.
        #[arg(long, value_name = "PATH")]
        socket: PathBuf,
        /// The store's directory.
        #[arg(long, value_name = "DIR", default_value = "./kms-data")]
        data: PathBuf,
    },
}

/// How often a door was opened.
#[derive(Clone, Default, Deserialize, Serialize)]
struct Door {
    opened: u64,
}

#[derive(Deserialize, Serialize)]
enum DoorEvent {
    Opened,
}

impl Entity for Door {
    const KIND: &'static str = "door";
    type Event = DoorEvent;
    fn apply(&mut self, DoorEvent::Opened: &DoorEvent) {
        self.opened += 1;
    }
}

#[tokio::main]
pub(crate) async fn main() -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    let outcome = match Arguments::parse().role {
        Role::Serve { key_file, socket, create } => server::serve(&key_file, &socket, create).await,
        Role::Demo { socket, data } => demo(&socket, &data).await,
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn demo(socket: &Path, data: &Path) -> anyhow::Result<()> {
    let master = KmsMasterKey::connect(socket, Duration::from_secs(2)).await.context("the KMS cannot be used")?;
    let options = Options::new(data).master_key(MasterKeySource::Provider(master.clone()));
    let kuma = Kuma::start(options).await.context("the store did not open")?;
    for name in ["front", "back"] {
        let door = kuma.entity::<Door>(name);
        // The KMS is asked for an entity's first event, and when it comes back into memory; never for an event.
        door.append(DoorEvent::Opened).await?;
        println!("{name}: opened {} times", door.read().await?.opened);
    }
    println!("current master key: {}", master.refresh().await?);
    println!("wrapped anew: {}", kuma.rotate_master_key().await?);
    // Whatever was on its way while the KMS changed its key is found by a second look.
    println!("and again: {}; at 0 the KMS may forget its older keys", kuma.rotate_master_key().await?);
    kuma.shutdown().await;
    Ok(())
}
