//! What a server is configured with, and where each setting comes from.
//!
//! One table (`config/settings.rs`) says for each setting its name, help, default and what is allowed; the flags, the variables, the keys of the
//! file and what `kuma-node config` prints all follow from it. Invariants: a flag goes before a variable, a variable before the file, the
//! file before the default; and there is no secret among the settings, only names of files.

mod arguments;
mod load;
mod settings;
mod text;

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, time::Duration};

use kuma_core::{Durability, KindOptions, MasterKeySource, Options};

pub use arguments::StartArguments;
pub use load::{CLIENT_VARIABLES, ConfigError, Loaded, Origin, Setting, load, load_from};

/// What a server is configured with. Every field has a default; [`Config::default`] serves `./data` on the loopback address.
#[derive(Clone, Debug)]
pub struct Config {
    /// The store's directory.
    pub data: PathBuf,
    /// The store's name.
    pub context: String,
    /// How many shard files a new store gets; none for the default.
    pub shards: Option<u16>,
    /// Where requests are taken. Port 0 takes one that is free.
    pub listen: SocketAddr,
    /// What an acknowledgement means.
    pub durability: Durability,
    /// The file with the master key; none for `master.key` in the data directory.
    pub master_key_file: Option<PathBuf>,
    /// About how many bytes live entities may take.
    pub memory_budget: usize,
    /// An entity that was not used for this long leaves memory.
    pub idle_timeout: Duration,
    /// How fast stored commits are verified in the background, in bytes a second.
    pub scrub_bytes_per_second: u64,
    /// The directory with the SQL files of projections; none for no projections.
    pub projections_dir: Option<PathBuf>,
    /// Below it backups are written; none for the data directory's name with `-backups` behind it.
    pub backup_dir: Option<PathBuf>,
    /// The file with the hashes of tokens; none for `tokens.json` in the data directory.
    pub tokens_file: Option<PathBuf>,
    /// Certificate chain and key, PEM; none for plain HTTP.
    pub tls: Option<TlsFiles>,
    /// What is logged: a directive such as `info,kuma_node=debug`.
    pub log: String,
    /// How it is written.
    pub log_format: LogFormat,
    /// Whether each request is logged.
    pub access_log: bool,
    /// The largest body of a request that is read whole.
    pub body_bytes_max: usize,
    /// Bytes of such bodies that are in memory at once.
    pub body_memory_max: usize,
    /// Headers of a request.
    pub headers_max: usize,
    /// Bytes of all headers of a request.
    pub header_bytes_max: usize,
    /// Within this time the headers must have come; also how long an idle connection is kept.
    pub header_timeout: Duration,
    /// Within this time a request must be answered, streams apart.
    pub request_timeout: Duration,
    /// Within this time more of a body must have come.
    pub body_idle_timeout: Duration,
    /// Connections at once.
    pub connections_max: usize,
    /// Requests at once, streams apart.
    pub requests_max: usize,
    /// Appends on their way of one stream.
    pub stream_in_flight_max: usize,
    /// Streams of appends, imports and exports at once.
    pub streams_max: usize,
    /// Subscriptions at once.
    pub subscriptions_max: usize,
    /// How long requests may take to finish when the server stops.
    pub shutdown_timeout: Duration,
    /// The file with the cluster's cookie; none for a store of its own, in no cluster.
    pub cookie_file: Option<PathBuf>,
    /// Nodes of the cluster to be joined; of no use once it is joined.
    pub seeds: Vec<String>,
    /// Whether this is the first node of a new cluster; of no use once it is founded.
    pub found: bool,
    /// Where other nodes are listened for; none for 127.0.0.1:4860, if there is a cluster. Port 0 takes one that is free.
    pub cluster_listen: Option<SocketAddr>,
    /// Where other nodes reach this one, `host:port`; none for where it listens.
    pub cluster_advertise: Option<String>,
    /// What people call the node; none for where it is reached.
    pub node_name: Option<String>,
    /// Settings of single kinds.
    pub kinds: BTreeMap<String, KindConfig>,
}

/// How log lines are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// An object a line.
    Json,
}

/// Files of TLS, PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The certificate and those that lead to its root.
    pub cert: PathBuf,
    /// The private key.
    pub key: PathBuf,
}

/// Settings of one kind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KindConfig {
    /// Whether its events are a log of which no state is folded.
    pub append_only: bool,
    /// Commits and bytes after which a snapshot is made; none for what other kinds have.
    pub snapshot: Option<(u64, u64)>,
    /// An entity that was not used for this long leaves memory; none for what other kinds have.
    pub idle_timeout: Option<Duration>,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            data: "./data".into(),
            context: "kuma".to_owned(),
            shards: None,
            listen: SocketAddr::from(([127, 0, 0, 1], 4870)),
            durability: Durability::Full,
            master_key_file: None,
            memory_budget: 1 << 30,
            idle_timeout: Duration::from_secs(300),
            scrub_bytes_per_second: 1 << 20,
            projections_dir: None,
            backup_dir: None,
            tokens_file: None,
            tls: None,
            log: "info".to_owned(),
            log_format: LogFormat::Text,
            access_log: true,
            body_bytes_max: 16 << 20,
            body_memory_max: 256 << 20,
            headers_max: 100,
            header_bytes_max: 64 << 10,
            header_timeout: Duration::from_secs(30),
            request_timeout: Duration::from_secs(30),
            body_idle_timeout: Duration::from_secs(30),
            connections_max: 10_000,
            requests_max: 4096,
            stream_in_flight_max: 4096,
            streams_max: 256,
            subscriptions_max: 256,
            shutdown_timeout: Duration::from_secs(30),
            cookie_file: None,
            seeds: Vec::new(),
            found: false,
            cluster_listen: None,
            cluster_advertise: None,
            node_name: None,
            kinds: BTreeMap::new(),
        }
    }
}

impl Config {
    /// The default, with another directory.
    pub fn new(data: impl Into<PathBuf>) -> Self {
        Config { data: data.into(), ..Config::default() }
    }

    /// Where backups are written.
    pub fn backup_dir(&self) -> PathBuf {
        self.backup_dir.clone().unwrap_or_else(|| {
            let mut path = self.data.clone().into_os_string();
            path.push("-backups");
            path.into()
        })
    }

    /// Where the master key is.
    pub fn master_key_file(&self) -> PathBuf {
        self.master_key_file.clone().unwrap_or_else(|| self.data.join("master.key"))
    }

    /// Where the hashes of tokens are.
    pub fn tokens_file(&self) -> PathBuf {
        self.tokens_file.clone().unwrap_or_else(|| self.data.join("tokens.json"))
    }

    /// Where other nodes are listened for, if there is a cluster.
    pub fn cluster_listen(&self) -> Option<SocketAddr> {
        let default = SocketAddr::from(([127, 0, 0, 1], kuma_cluster::node::PORT));
        self.cookie_file.as_ref().map(|_| self.cluster_listen.unwrap_or(default))
    }

    /// How the store is opened.
    pub fn options(&self) -> Options {
        let mut options = Options::new(&self.data)
            .context(&self.context)
            .durability(self.durability)
            .memory_budget(self.memory_budget)
            .idle_timeout(self.idle_timeout)
            .scrub_bytes_per_second(self.scrub_bytes_per_second);
        if let Some(shards) = self.shards {
            options = options.shards(shards);
        }
        if let Some(path) = &self.master_key_file {
            options = options.master_key(MasterKeySource::File(path.clone()));
        }
        for (kind, config) in &self.kinds {
            let mut settings = KindOptions::new();
            if config.append_only {
                settings = settings.append_only();
            }
            if let Some((commits, bytes)) = config.snapshot {
                settings = settings.snapshot_every(commits, bytes);
            }
            if let Some(timeout) = config.idle_timeout {
                settings = settings.idle_timeout(timeout);
            }
            options = options.kind(kind, settings);
        }
        options
    }
}
