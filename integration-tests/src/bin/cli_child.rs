//! The command line in a process of its own, as `kuma-node` is it.

use std::process::ExitCode;

#[tokio::main]
async fn main() -> ExitCode {
    kuma_node::cli::main().await
}
