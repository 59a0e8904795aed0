//! The links of a node as its transport.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use futures_util::future::BoxFuture;
use kuma_core::DiskId;

use crate::{
    link::{self, Admitted, CallError, Cookie, Direction, LinkLimits, LinkOptions, Links, Peers, Served},
    transport::{Serve, Target, Transport},
};

/// Listens, and answers by `serve`.
pub(crate) async fn start(
    listen: SocketAddr,
    cookie: Cookie,
    serve: Arc<dyn Serve>,
) -> Result<(Arc<dyn Transport>, SocketAddr), String> {
    let options = LinkOptions { listen, cookie, limits: LinkLimits::default() };
    let links = Links::start(options, Arc::new(Answers(serve))).await.map_err(|error| words(&error))?;
    let address = links.local_addr();
    Ok((Arc::new(Linked(links)), address))
}

/// An error with its causes, in one line.
fn words(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
}

struct Linked(Links);

impl Transport for Linked {
    fn call(&self, to: DiskId, kind: u8, body: Vec<u8>, within: Duration) -> BoxFuture<'_, Result<Vec<u8>, CallError>> {
        Box::pin(self.0.call(to, kind, body, within))
    }

    fn call_bulk(
        &self,
        to: DiskId,
        kind: u8,
        body: Vec<u8>,
        within: Duration,
    ) -> BoxFuture<'_, Result<Vec<u8>, CallError>> {
        Box::pin(self.0.call_bulk(to, kind, body, within))
    }

    fn cast(&self, to: DiskId, kind: u8, body: Vec<u8>) {
        // It may be lost anyway; what matters is said again.
        let _ = self.0.cast(to, kind, body);
    }

    fn keep_connected(&self, targets: Vec<Target>) {
        let target = |Target { address, disk }| link::Target { address, expect: disk };
        self.0.keep_connected(targets.into_iter().map(target).collect());
    }

    fn dial(&self, address: String) -> BoxFuture<'_, Result<DiskId, String>> {
        Box::pin(async move { self.0.dial(&address).await.map_err(|error| words(&error)) })
    }

    fn is_up(&self, disk: DiskId) -> bool {
        self.0.is_up(disk)
    }

    fn silence(&self, disk: DiskId) -> Option<Duration> {
        self.0.silence(disk)
    }

    fn peers(&self) -> Vec<link::PeerState> {
        self.0.peers()
    }

    fn stop(&self) -> BoxFuture<'_, ()> {
        Box::pin(self.0.stop())
    }
}

struct Answers(Arc<dyn Serve>);

impl Peers for Answers {
    fn own(&self) -> DiskId {
        self.0.own()
    }

    fn hello(&self) -> Vec<u8> {
        self.0.hello()
    }

    fn admit(&self, hello: &[u8], _: Direction<'_>) -> Result<Admitted, String> {
        self.0.admit(hello).map(|(disk, incarnation)| Admitted { disk, incarnation })
    }

    fn up(&self, disk: DiskId) {
        self.0.up(disk);
    }

    fn down(&self, disk: DiskId, why: &str) {
        self.0.down(disk, why);
    }

    fn serve(
        self: Arc<Self>,
        from: DiskId,
        kind: u8,
        body: Vec<u8>,
        _: std::time::Instant,
    ) -> BoxFuture<'static, Served> {
        let served = self.0.clone().serve(from, kind, body);
        Box::pin(async move {
            match served.await {
                Some(reply) => Served::Reply(reply),
                None => Served::Unknown,
            }
        })
    }
}
