//! Links without a network, for tests: nodes of one process that reach each other through a [`Hub`], which can cut them apart.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU16, Ordering::SeqCst},
    },
    time::Duration,
};

use futures_util::future::BoxFuture;
use kuma_core::DiskId;
use parking_lot::Mutex;

use crate::{
    node::NodeOptions,
    transport::{CallError, Serve, Target, Transport},
};

/// What links the nodes of a test.
#[derive(Clone, Default)]
pub struct Hub(Arc<Inner>);

#[derive(Default)]
struct Inner {
    ports: AtomicU16,
    /// A node that is started again has the address that it had.
    addresses: Mutex<HashMap<PathBuf, SocketAddr>>,
    nodes: Mutex<HashMap<String, Attached>>,
    cut: Mutex<HashSet<BTreeSet<String>>>,
}

#[derive(Clone)]
struct Attached {
    serve: Arc<dyn Serve>,
    links: Arc<Mutex<HashMap<DiskId, Link>>>,
}

#[derive(Clone)]
struct Link {
    address: String,
    serve: Arc<dyn Serve>,
    /// Another one for each link: who waits for an answer notices that it was broken, and made again.
    made: Arc<()>,
}

impl Attached {
    /// Keeps a link, unless there is one to that very node already; says whether there was one to that disk.
    fn keep(&self, disk: DiskId, link: Link) -> bool {
        let mut links = self.links.lock();
        let is_same = |before: &Link| std::ptr::addr_eq(Arc::as_ptr(&before.serve), Arc::as_ptr(&link.serve));
        match links.get(&disk) {
            Some(before) if is_same(before) => true,
            _ => links.insert(disk, link).is_some(),
        }
    }
}

impl Hub {
    /// A new hub.
    pub fn new() -> Self {
        Self::default()
    }

    /// Options of a node that is linked by this hub.
    pub fn node(&self, data_dir: impl Into<PathBuf>) -> NodeOptions {
        let (hub, data_dir) = (self.clone(), data_dir.into());
        let address = *self.0.addresses.lock().entry(data_dir.clone()).or_insert_with(|| {
            let port = self.0.ports.fetch_add(1, SeqCst) + 1;
            SocketAddr::from(([127, 0, 0, 1], port))
        });
        NodeOptions::with_transport(
            data_dir,
            Arc::new(move |serve| {
                let hub = hub.clone();
                Box::pin(async move { Ok((hub.attach(serve, address), address)) })
            }),
        )
    }

    /// Cuts two nodes apart, or links them again.
    pub fn cut(&self, one: SocketAddr, other: SocketAddr, is_cut: bool) {
        let pair = BTreeSet::from([one.to_string(), other.to_string()]);
        match is_cut {
            true => {
                self.0.cut.lock().insert(pair);
                self.unlink(&one.to_string(), &other.to_string());
            }
            false => {
                self.0.cut.lock().remove(&pair);
            }
        }
    }

    fn attach(&self, serve: Arc<dyn Serve>, address: SocketAddr) -> Arc<dyn Transport> {
        let attached = Attached { serve, links: Arc::default() };
        self.0.nodes.lock().insert(address.to_string(), attached.clone());
        let wanted = Arc::new(Mutex::new(Vec::new()));
        let end = Arc::new(End { hub: self.clone(), address: address.to_string(), attached, wanted });
        let weak = Arc::downgrade(&end);
        tokio::spawn(async move {
            while let Some(end) = weak.upgrade() {
                let targets: Vec<Target> = end.wanted.lock().clone();
                for target in targets {
                    if target.disk.is_none_or(|disk| !end.is_up(disk)) {
                        let _ = end.dial(target.address).await;
                    }
                }
                drop(end);
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
        end
    }

    fn unlink(&self, one: &str, other: &str) {
        let nodes = self.0.nodes.lock().clone();
        for (here, there) in [(one, other), (other, one)] {
            let Some(attached) = nodes.get(here) else { continue };
            let gone: Vec<DiskId> = {
                let mut links = attached.links.lock();
                let gone = links.iter().filter(|(_, link)| link.address == there).map(|(disk, _)| *disk).collect();
                links.retain(|_, link| link.address != there);
                gone
            };
            gone.into_iter().for_each(|disk| attached.serve.down(disk, "cut"));
        }
    }
}

struct End {
    hub: Hub,
    address: String,
    attached: Attached,
    wanted: Arc<Mutex<Vec<Target>>>,
}

impl End {
    fn link(&self, to: DiskId) -> Option<Link> {
        self.attached.links.lock().get(&to).cloned()
    }

    /// The disk of this end, as the other one knows it.
    fn own(&self, link: &Link) -> Option<DiskId> {
        link.serve.admit(&self.attached.serve.hello()).ok().map(|(disk, _)| disk)
    }
}

impl Transport for End {
    fn call(&self, to: DiskId, kind: u8, body: Vec<u8>, within: Duration) -> BoxFuture<'_, Result<Vec<u8>, CallError>> {
        Box::pin(async move {
            let link = self.link(to).ok_or(CallError::NotConnected)?;
            let own = self.own(&link).ok_or(CallError::NotConnected)?;
            let served = tokio::spawn(link.serve.serve(own, kind, body));
            let reply = tokio::time::timeout(within, served).await.map_err(|_| CallError::Deadline)?;
            match self.link(to) {
                Some(now) if Arc::ptr_eq(&now.made, &link.made) => {
                    reply.map_err(|_| CallError::Down)?.ok_or(CallError::UnknownKind { kind })
                }
                _ => Err(CallError::Down),
            }
        })
    }

    fn call_bulk(
        &self,
        to: DiskId,
        kind: u8,
        body: Vec<u8>,
        within: Duration,
    ) -> BoxFuture<'_, Result<Vec<u8>, CallError>> {
        self.call(to, kind, body, within)
    }

    fn cast(&self, to: DiskId, kind: u8, body: Vec<u8>) {
        if let Some(link) = self.link(to)
            && let Some(own) = self.own(&link)
        {
            tokio::spawn(link.serve.serve(own, kind, body));
        }
    }

    fn keep_connected(&self, targets: Vec<Target>) {
        *self.wanted.lock() = targets;
    }

    fn dial(&self, address: String) -> BoxFuture<'_, Result<DiskId, String>> {
        Box::pin(async move {
            let there = self.hub.0.nodes.lock().get(&address).cloned().ok_or("nobody listens there")?;
            let pair = BTreeSet::from([self.address.clone(), address.clone()]);
            if self.hub.0.cut.lock().contains(&pair) {
                return Err("it does not answer".to_owned());
            }
            let (disk, _) = self.attached.serve.admit(&there.serve.hello())?;
            let (own, _) = there.serve.admit(&self.attached.serve.hello()).map_err(|why| format!("refused: {why}"))?;
            let made = Arc::new(());
            let link = |address: &str, serve: &Arc<dyn Serve>| Link {
                address: address.to_owned(),
                serve: serve.clone(),
                made: made.clone(),
            };
            let was_up = self.attached.keep(disk, link(&address, &there.serve));
            there.keep(own, link(&self.address, &self.attached.serve));
            if !was_up {
                self.attached.serve.up(disk);
                there.serve.up(own);
            }
            Ok(disk)
        })
    }

    fn is_up(&self, disk: DiskId) -> bool {
        self.attached.links.lock().contains_key(&disk)
    }

    fn stop(&self) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            self.wanted.lock().clear();
            self.hub.0.nodes.lock().remove(&self.address);
            let linked: Vec<String> = self.attached.links.lock().values().map(|link| link.address.clone()).collect();
            for other in linked {
                let nodes = self.hub.0.nodes.lock().clone();
                if let Some(there) = nodes.get(&other) {
                    let mut gone = Vec::new();
                    there.links.lock().retain(|disk, link| {
                        let stays = link.address != self.address;
                        if !stays {
                            gone.push(*disk);
                        }
                        stays
                    });
                    gone.into_iter().for_each(|disk| there.serve.down(disk, "the node has stopped"));
                }
            }
            self.attached.links.lock().clear();
        })
    }
}
