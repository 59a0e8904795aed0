//! Nodes of one process, and waiting for them.

use std::time::Duration;

use kuma_cluster::{Node, NodeOptions};

/// Longer than anything takes.
pub(crate) const LONG: Duration = Duration::from_secs(180);

/// Waits until something is so.
pub(crate) async fn soon(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let wait = async {
        while !is_so().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(LONG, wait).await.unwrap_or_else(|_| panic!("waited in vain: {what}"));
}

/// Starts a node that joins by these, or founds if there are none and its directory is new, and waits until it serves.
pub(crate) async fn start(options: NodeOptions, is_new: bool, seeds: &[&Node]) -> Node {
    let options = match seeds.is_empty() {
        true if is_new => options.found(),
        true => options,
        false => options.seed_nodes(seeds.iter().map(|node| node.address().to_string())),
    };
    let node = Node::start(options).await.unwrap();
    soon("the node is ready", async || node.is_ready()).await;
    node
}

/// Waits until every slot is where it should be, and every node has heard of it.
pub(crate) async fn settled(nodes: &[&Node]) {
    soon("all slots are where they should be", async || {
        let view = |node: &Node| {
            let of = |member: kuma_cluster::MemberStatus| (member.name, member.standing, member.wished);
            node.members().into_iter().map(of).collect::<Vec<_>>()
        };
        let wished = |node: &Node| node.members().iter().find(|member| member.is_own).map(|own| own.wished);
        nodes.iter().all(|node| {
            view(node) == view(nodes[0])
                && node.members().iter().all(|member| member.is_up)
                && wished(node) == Some(node.owned())
                && node.is_settled()
        })
    })
    .await;
}
