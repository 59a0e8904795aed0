//! The server and its command line. One program: linking each file by itself was most of a build.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod fake;

mod access;
mod cli;
mod client;
mod command_line;
mod http_docs;
mod tls;
