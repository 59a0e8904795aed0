//! The server over HTTP. One program: linking each file by itself was most of a build.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/http.rs"]
mod http;
#[path = "../common/proxy.rs"]
mod proxy;

mod cluster;
mod hostile;
mod retry;
mod schema;
mod streams;
