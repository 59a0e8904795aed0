//! The server: Kuma over HTTP on one machine, and the command line to operate it.
//!
//! `kuma-node` is a thin binary over this library. The interface is described in docs/http.md, and by the node itself at `/openapi.json`.

pub mod cli;
pub mod client;
pub mod config;
pub mod wire;

pub use config::Config;
