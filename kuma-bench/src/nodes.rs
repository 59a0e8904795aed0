//! Nodes of a cluster, in this process, linked over loopback.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use kuma_cluster::{Cookie, Node, NodeOptions, Ring};
use tempfile::TempDir;

use crate::store;

/// How long a move may take before the run is given up.
pub(crate) const PATIENCE: Duration = Duration::from_secs(300);

/// Of each node: five of them share the machine.
pub(crate) const SHARDS: u16 = 2;

/// Nodes in this process, each with a directory that goes with it.
pub(crate) struct Cluster {
    cookie: Cookie,
    shards: u16,
    base: PathBuf,
    /// Tells a node which kinds and commands there are.
    kinds: fn(NodeOptions) -> NodeOptions,
    pub(crate) nodes: Vec<(Node, TempDir)>,
}

impl Cluster {
    /// The first node of a new cluster.
    pub(crate) async fn found(base: &Path, shards: u16, kinds: fn(NodeOptions) -> NodeOptions) -> Result<Cluster> {
        let cookie = Cookie::generate()?;
        let mut cluster = Cluster { cookie, shards, base: base.to_owned(), kinds, nodes: Vec::new() };
        let founder = cluster.start("n1").await?;
        cluster.nodes.push(founder);
        cluster.settled().await?;
        Ok(cluster)
    }

    fn options(&self, directory: &Path, name: &str) -> NodeOptions {
        let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let options = NodeOptions::new(directory, self.cookie.clone())
            .listen(listen)
            .context("bench")
            .name(name)
            .shards(self.shards);
        (self.kinds)(options)
    }

    pub(crate) async fn start(&self, name: &str) -> Result<(Node, TempDir)> {
        let directory = store::temporary(&self.base)?;
        let options = self.options(directory.path(), name);
        let options = match self.nodes.first() {
            None => options.found(),
            Some((seed, _)) => options.seed_nodes([seed.address().to_string()]),
        };
        let node = Node::start(options).await.context("a node cannot be started")?;
        Ok((node, directory))
    }

    pub(crate) fn nodes(&self) -> Vec<Node> {
        self.nodes.iter().map(|(node, _)| node.clone()).collect()
    }

    /// Returns when every slot is where it should be.
    pub(crate) async fn settled(&self) -> Result<()> {
        let begun = Instant::now();
        let is_settled = || {
            let view = |node: &Node| {
                let of = |member: kuma_cluster::MemberStatus| (member.name, member.standing, member.wished);
                node.members().into_iter().map(of).collect::<Vec<_>>()
            };
            let first = view(&self.nodes[0].0);
            self.nodes.iter().all(|(node, _)| {
                let wished = node.members().iter().find(|member| member.is_own).map(|own| own.wished);
                view(node) == first && wished == Some(node.owned()) && node.is_settled()
            })
        };
        while !is_settled() {
            ensure!(begun.elapsed() < PATIENCE, "slots are not where they should be after {PATIENCE:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    pub(crate) fn ring(&self, of: &[usize]) -> Ring {
        let own = |index: &usize| {
            let members = self.nodes[*index].0.members();
            members.into_iter().find(|member| member.is_own).map(|member| member.node)
        };
        Ring::new(of.iter().filter_map(own), &Default::default())
    }
}
