//! The server: from a configuration to answered requests, and back to a closed store.
//!
//! ```text
//! bind ──► tokens ──► open the store ──► projections ──► answer ──► (stop) ──► finish requests ──► note denials ──► close the store
//! ```

use std::{
    io,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, OnceLock},
    time::Duration,
};

use axum::{Router, middleware};
use axum_server::{Handle, tls_rustls::RustlsConfig};
use kuma_cluster::{Cookie, CookieError, NodeError, NodeOptions};
use kuma_core::Kuma;
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tokio::{net::TcpSocket, task::JoinHandle};

use crate::{
    Config, api,
    denials::Denials,
    forward::{self, Answerer},
    guard::guard,
    listen::Gate,
    node::Node,
    problem::full,
    projection_files::ProjectionFiles,
    tls::{self, TlsError},
    tokens::{Tokens, TokensError},
};

/// Connections that wait to be accepted.
const BACKLOG: u32 = 1024;
/// Between two looks at files that may have changed.
const RELOAD_EVERY: Duration = Duration::from_secs(2);
/// How often histograms are tidied up.
const UPKEEP_EVERY: Duration = Duration::from_secs(5);

/// Why a server did not start. Nothing that is stored was changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServerError {
    /// The address cannot be used.
    #[error("cannot listen on {address}; is another node running there?")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Others could do everything.
    #[error(
        "there are no tokens in {tokens_file}, and {address} can be reached from other machines: make one with `kuma-node token create`, or listen on 127.0.0.1"
    )]
    NoTokens {
        /// The address.
        address: SocketAddr,
        /// The file.
        tokens_file: PathBuf,
    },
    /// The file of tokens cannot be used.
    #[error(transparent)]
    Tokens(#[from] TokensError),
    /// Certificate or key cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The store did not open.
    #[error("the store did not open")]
    Store(#[from] kuma_core::StartError),
    /// The cluster's cookie cannot be used.
    #[error("{} cannot be used as the cluster's cookie", path.display())]
    Cookie {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: CookieError,
    },
    /// Nothing says which cluster the node is of.
    #[error(
        "{} is of no cluster yet: name a node of the cluster to be joined (--seed HOST:PORT), or say --found if this is the first node of a new one",
        data.display()
    )]
    NoCluster {
        /// The directory.
        data: PathBuf,
    },
    /// The node of the cluster did not start.
    #[error(transparent)]
    Cluster(NodeError),
    /// Metrics cannot be collected.
    #[error("metrics cannot be collected: {0}")]
    Metrics(String),
}

/// A running server. It stops when it is told to ([`Server::stop`]); dropped, it goes on until the process ends.
pub struct Server {
    node: Arc<Node>,
    address: SocketAddr,
    handle: Handle<SocketAddr>,
    serving: JoinHandle<io::Result<()>>,
    tls: Option<RustlsConfig>,
    answerer: Arc<Answerer>,
}

impl Server {
    /// Opens the store and answers requests. Returns when it does.
    ///
    /// # Errors
    /// See [`ServerError`].
    pub async fn start(config: Config) -> Result<Server, ServerError> {
        let refused = |source| ServerError::Listen { address: config.listen, source };
        let listener = bind(config.listen).map_err(refused)?;
        let address = listener.local_addr().map_err(refused)?;
        let tls = match &config.tls {
            None => None,
            Some(files) => {
                let (tls, warnings) = tls::load(files)?;
                warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
                Some(tls)
            }
        };
        let metrics = recorder()?;
        let tokens_file = config.tokens_file();
        let (tokens, warnings) = Tokens::open(&tokens_file)?;
        warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
        if tokens.is_open() && !config.listen.ip().is_loopback() {
            return Err(ServerError::NoTokens { address, tokens_file });
        }
        let answerer = Arc::new(Answerer::default());
        let cluster = join(&config, &answerer).await?;
        let kuma = match &cluster {
            Some(node) => node.store().clone(),
            None => Kuma::start(config.options()).await?,
        };
        let projections = ProjectionFiles::new(config.projections_dir.clone(), kuma.clone());
        projections.look(true).await;
        let node = Arc::new(Node::new(
            config,
            kuma.clone(),
            cluster,
            tokens,
            projections.clone(),
            metrics,
            Denials::start(kuma),
        ));
        if node.is_open() {
            tracing::warn!(
                "there are no tokens: everybody on this machine may do everything; `kuma-node token create` makes one"
            );
        }
        tokio::spawn(projections.watch(node.stopping.clone()));
        tokio::spawn(look_after(node.clone()));
        let handle = Handle::new();
        let router: Router = api::router()
            .layer(middleware::from_fn_with_state(node.clone(), forward::forward))
            .layer(middleware::from_fn_with_state(node.clone(), guard))
            .with_state(node.clone());
        answerer.begin(router.clone(), node.clone());
        let serving = tokio::spawn(serve(node.clone(), router, listener, tls.clone(), handle.clone()));
        handle.listening().await;
        Ok(Server { node, address, handle, serving, tls, answerer })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// How it is reached from this machine.
    pub fn url(&self) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.address)
    }

    /// The node of the cluster that it is, if it is in one.
    pub fn cluster(&self) -> Option<&kuma_cluster::Node> {
        self.node.cluster.as_ref()
    }

    /// Its store, for services that want both. Types of kinds are to be registered before requests ask for them.
    pub fn kuma(&self) -> &Kuma {
        &self.node.kuma
    }

    /// Whether everybody on this machine may do everything, because there are no tokens.
    pub fn is_open(&self) -> bool {
        self.node.is_open()
    }

    /// Looks at tokens, certificate and projections again.
    ///
    /// # Errors
    /// One of them cannot be used as it is now; what was there before stays in force.
    pub async fn reload(&self) -> Result<(), ServerError> {
        self.node.projections.look(true).await;
        self.node.tokens.reload()?;
        if let (Some(config), Some(files)) = (&self.tls, &self.node.config.tls) {
            tls::reload(config, files)?.iter().for_each(|warning| tracing::warn!("{warning}"));
        }
        Ok(())
    }

    /// Stops taking requests, lets those that are there finish within `shutdown_timeout`, and closes the store. What was acknowledged is on the
    /// disk; what was not answered is like any request whose answer was lost.
    pub async fn stop(self) {
        self.node.stopping.cancel();
        self.handle.graceful_shutdown(Some(self.node.config.shutdown_timeout));
        match self.serving.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!(%error, "the server ended with an error"),
            Err(error) => tracing::error!(%error, "the server ended with a panic"),
        }
        self.node.denials.stop().await;
        match &self.node.cluster {
            Some(node) => node.shutdown().await,
            None => self.node.kuma.shutdown().await,
        }
        self.answerer.end();
    }
}

/// The node of a cluster, if the configuration is one's.
async fn join(config: &Config, answerer: &Arc<Answerer>) -> Result<Option<kuma_cluster::Node>, ServerError> {
    let (Some(path), Some(listen)) = (&config.cookie_file, config.cluster_listen()) else { return Ok(None) };
    let cookie = Cookie::load_file(path).map_err(|source| ServerError::Cookie { path: path.clone(), source })?;
    let mut options = NodeOptions::new(&config.data, cookie)
        .context(&config.context)
        .store(|_| config.options())
        .listen(listen)
        .seed_nodes(config.seeds.clone())
        .answer(answerer.clone());
    if config.found {
        options = options.found();
    }
    if let Some(name) = &config.node_name {
        options = options.name(name);
    }
    if let Some(address) = &config.cluster_advertise {
        options = options.advertise(address);
    }
    let started = kuma_cluster::Node::start(options).await.map_err(|error| match error {
        NodeError::NoCluster { data_dir } => ServerError::NoCluster { data: data_dir },
        NodeError::Store(error) => ServerError::Store(error),
        other => ServerError::Cluster(other),
    });
    started.map(Some)
}

fn bind(address: SocketAddr) -> io::Result<tokio::net::TcpListener> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// The recorder is the process's: it is installed once, however many servers there are.
fn recorder() -> Result<PrometheusHandle, ServerError> {
    static RECORDER: OnceLock<Result<PrometheusHandle, String>> = OnceLock::new();
    let install = || {
        // From 10 us to 30 s.
        let seconds: Vec<f64> =
            (0..40).map(|step| 1e-5 * 1.5_f64.powi(step)).take_while(|bound| *bound < 30.0).collect();
        let builder = PrometheusBuilder::new().set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &seconds);
        builder.and_then(PrometheusBuilder::install_recorder).map_err(|error| error.to_string())
    };
    RECORDER.get_or_init(install).clone().map_err(ServerError::Metrics)
}

async fn serve(
    node: Arc<Node>,
    router: Router,
    listener: tokio::net::TcpListener,
    tls: Option<RustlsConfig>,
    handle: Handle<SocketAddr>,
) -> io::Result<()> {
    let config = &node.config;
    let gate = Gate { connections: node.connections.clone(), connections_max: config.connections_max };
    let mut server =
        axum_server::Server::from_listener(listener).handle(handle).first_request_timeout(config.header_timeout);
    let builder = server.http_builder();
    builder
        .http1()
        .header_read_timeout(config.header_timeout)
        // Hyper takes no less.
        .max_buf_size(config.header_bytes_max.max(8192))
        .max_headers(config.headers_max);
    builder
        .http2()
        .max_concurrent_streams(256)
        .max_header_list_size(u32::try_from(config.header_bytes_max).unwrap_or(u32::MAX))
        .keep_alive_interval(Some(Duration::from_secs(20)))
        .keep_alive_timeout(Duration::from_secs(20));
    let service = router.into_make_service();
    match tls {
        None => server.acceptor(gate).serve(service).await,
        Some(tls) => {
            let acceptor = axum_server::tls_rustls::RustlsAcceptor::new(tls)
                .handshake_timeout(config.header_timeout)
                .acceptor(gate);
            server.acceptor(acceptor).serve(service).await
        }
    }
}

/// Takes over what changes in files, and tidies up.
async fn look_after(node: Arc<Node>) {
    let mut upkeep = std::time::Instant::now();
    while node.stopping.run_until_cancelled(tokio::time::sleep(RELOAD_EVERY)).await.is_some() {
        match node.tokens.reload() {
            Ok(true) => tracing::info!("the tokens have changed"),
            Ok(false) => {}
            // Said once, until the file changes again.
            Err(error) => {
                tracing::error!(error = full(&error), "the tokens cannot be read; those that were known stay in force")
            }
        }
        node.held.sweep();
        if upkeep.elapsed() >= UPKEEP_EVERY {
            upkeep = std::time::Instant::now();
            node.metrics.run_upkeep();
        }
    }
}
