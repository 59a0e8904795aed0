//! The server: Kuma over HTTP, alone or as a node of a cluster, and the command line to operate it.
//!
//! `kuma-node` is a thin binary over this library. The interface is described in docs/http.md, and by the node itself at `/openapi.json`.
//!
//! ```
//! # #[tokio::main]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let dir = tempfile::tempdir()?;
//! # let data = dir.path();
//! use kuma_node::{Config, Server};
//! let config = Config { listen: ([127, 0, 0, 1], 0).into(), ..Config::new(data) };
//! let server = Server::start(config).await?; // it answers at `server.url()`
//! server.stop().await;
//! # Ok(())
//! # }
//! ```

mod access;
mod api;
mod append_body;
mod body;
pub mod cli;
pub mod client;
pub mod config;
mod denials;
mod forward;
mod guard;
mod listen;
pub mod load;
mod msgpack;
mod named;
mod node;
mod problem;
pub mod process;
mod projection_files;
mod server;
pub mod tls;
pub mod tokens;
mod whole_number;
pub mod wire;

pub use client::{Client, ClientError, ClientOptions};
pub use config::Config;
pub use server::{Server, ServerError};
