//! The server's binary: [`kuma_node::cli`] on a runtime.

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let mut config = kuma_node::Config::new(std::env::args().nth(1).unwrap_or("./data".into()));
    config.access_log = false;
    if let Some(dir) = std::env::args().nth(2) {
        config.projections_dir = Some(dir.into());
    }
    let server = kuma_node::Server::start(config).await?;
    eprintln!("{}", server.url());
    tokio::signal::ctrl_c().await?;
    server.stop().await;
    Ok(())
}
