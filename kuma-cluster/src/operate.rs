//! What operators do with a cluster, and ask of it.
//!
//! Every act is a change of the membership map, which is merged on all nodes: it can be asked of any of them, and holds also on those that are down
//! now, once they are back. None of them moves a token by itself.

use std::{collections::BTreeMap, sync::atomic::Ordering::SeqCst, time::Instant};

use kuma_core::{DiskId, Slot, slot_of};

use crate::{
    feed::ClusterEvents,
    health::{Facts, Health, PeerFact, judge},
    members::{Member, NodeId, Standing},
    node::{Node, NodeError},
    plan::{self, RebalancePlan},
    registry::RegistryMessage,
    wire::kind,
};

/// What is to move.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Migrate {
    /// All that is not where the ring wants it, now: also what was left alone for a while because it could not be moved.
    Wished,
    /// A slot to a node, and it stays there whatever the ring says, until it is unpinned.
    Pin {
        /// The slot.
        slot: Slot,
        /// Where it is to be: the node's name or id.
        to: String,
    },
    /// A slot goes to where the ring wants it.
    Unpin {
        /// The slot.
        slot: Slot,
    },
}

/// The slot of all entities whose ids have this tag in braces: `order-{7}`. None if it can be no tag.
pub fn slot_of_tag(tag: &str) -> Option<Slot> {
    let is_tag = !tag.is_empty() && tag.len() <= 510 && !tag.contains(['{', '}']);
    is_tag.then(|| slot_of("tag", &format!("{{{tag}}}")))
}

impl Node {
    /// What would move from now on, as far as this node knows who owns what. Nothing is moved.
    pub fn plan(&self) -> RebalancePlan {
        self.plan_without([])
    }

    /// The same, if these nodes were drained.
    pub fn plan_without(&self, nodes: impl IntoIterator<Item = NodeId>) -> RebalancePlan {
        let owners: Vec<Option<DiskId>> =
            self.shared.routes.all().into_iter().map(|owner| owner.map(|(_, disk)| disk)).collect();
        plan::plan(&self.shared.state().members, &owners, &nodes.into_iter().collect())
    }

    /// Has slots moved. Returns at once; [`Node::moves`] and [`Node::events`] tell how it goes.
    ///
    /// # Errors
    /// [`NodeError::Refused`] if the node is not known or takes no slots. Or it could not be kept.
    pub async fn migrate(&self, what: Migrate) -> Result<(), NodeError> {
        match what {
            Migrate::Wished => {
                self.shared.wake(RegistryMessage::Hurry);
                self.shared.cast_all(kind::HURRY, &());
                Ok(())
            }
            Migrate::Pin { slot, to } => {
                check_slot(slot)?;
                let (node, member) = self.find(&to)?;
                if member.standing != Standing::Member {
                    return refuse(format!("node {} takes no slots: it is {}", member.name, standing(member.standing)));
                }
                self.pin(slot, Some(node)).await
            }
            Migrate::Unpin { slot } => {
                check_slot(slot)?;
                self.pin(slot, None).await
            }
        }
    }

    /// Slots that are pinned, and where.
    pub fn pins(&self) -> BTreeMap<Slot, NodeId> {
        self.shared.state().members.pins()
    }

    /// Where the ring and the pins want each slot, by slot.
    pub fn wished(&self) -> Vec<Option<NodeId>> {
        let ring = self.shared.ring();
        (0..u64::from(kuma_core::SLOTS)).map(|slot| ring.owner(Slot::new(slot))).collect()
    }

    /// Has a node, by name or id, give all its slots to the others and take no new ones. Returns at once. It stays drained over restarts, until
    /// [`Node::undrain_node`].
    ///
    /// # Errors
    /// [`NodeError::Refused`] if it is not known, or no other node could take its slots. Or it could not be kept.
    pub async fn drain_node(&self, which: &str) -> Result<NodeId, NodeError> {
        let (node, member) = self.find(which)?;
        if !self.shared.state().members.on_the_ring().any(|other| other != node) {
            return refuse(format!(
                "no other node could take the slots of {}; let another one join first",
                member.name
            ));
        }
        self.set_standing(node, Standing::Leaving).await?;
        Ok(node)
    }

    /// Lets a drained node, by name or id, take slots again.
    ///
    /// # Errors
    /// [`NodeError::Refused`] if it is not known, or was not let in yet. Or it could not be kept.
    pub async fn undrain_node(&self, which: &str) -> Result<NodeId, NodeError> {
        let (node, member) = self.find(which)?;
        if member.standing == Standing::Joining {
            return refuse(format!("node {} is not let in yet", member.name));
        }
        self.set_standing(node, Standing::Member).await?;
        Ok(node)
    }

    /// Takes a node, by name or id, out of the cluster's map for ever: nobody waits for a link to it, and its name is free. **Its tokens stay with it**:
    /// what it owns is unavailable, unless it is drained before. If its disk is destroyed, [`Node::attest_destroyed`] says so as well.
    ///
    /// # Errors
    /// [`NodeError::Refused`] if it is not known, is up, or is this one. Or it could not be kept.
    pub async fn forget(&self, which: &str) -> Result<NodeId, NodeError> {
        let (node, member) = self.find(which)?;
        if node == self.shared.state().node {
            return refuse(format!("node {} is the one that was asked; ask another one", member.name));
        }
        if self.shared.transport().is_some_and(|transport| transport.is_up(member.disk)) {
            return refuse(format!("node {} is up; drain it, stop it, and forget it then", member.name));
        }
        self.set_standing(node, Standing::Forgotten).await?;
        tracing::warn!(target: "kuma::cluster", %node, name = member.name, "a node was forgotten; what it owns stays with it");
        Ok(node)
    }

    /// A node by its name, or by its id or the beginning of that, 8 digits at least.
    ///
    /// # Errors
    /// [`NodeError::Refused`]: there is no such one, or more than one.
    pub fn find(&self, which: &str) -> Result<(NodeId, Member), NodeError> {
        let state = self.shared.state();
        let named = state.members.iter().find(|(_, member)| member.name == which);
        if let Some((node, member)) = named {
            return Ok((node, member.clone()));
        }
        let is_id = which.len() >= 8 && which.bytes().all(|byte| byte.is_ascii_hexdigit());
        let which = which.to_ascii_lowercase();
        let mut found = state.members.iter().filter(|(node, _)| is_id && node.to_string().starts_with(&which));
        match (found.next(), found.next()) {
            (Some((node, member)), None) => Ok((node, member.clone())),
            (None, _) => refuse("no node of this name or id is known; `members` lists them".to_owned()),
            (Some(_), Some(_)) => refuse("more than one node has an id that begins so; say more of it".to_owned()),
        }
    }

    /// This node's id.
    pub fn id(&self) -> NodeId {
        self.shared.state().node
    }

    /// What people call this node.
    pub fn name(&self) -> String {
        self.shared.name_of(self.shared.own)
    }

    /// Whether every slot can be served, as this node sees it, and what is in the way.
    pub fn health(&self) -> Health {
        let shared = &self.shared;
        let state = shared.state();
        let routes = shared.routes.all();
        let owns = |disk: DiskId| routes.iter().flatten().filter(|(_, owner)| *owner == disk).count();
        let known: std::collections::BTreeSet<DiskId> = state.members.iter().map(|(_, member)| member.disk).collect();
        let is_up = |disk| shared.transport().is_some_and(|transport| transport.is_up(disk));
        let down = shared.down.lock().clone();
        let others = state.members.iter().filter(|(node, _)| *node != state.node);
        let peers = others
            .map(|(_, member)| PeerFact {
                name: member.name.clone(),
                is_up: is_up(member.disk),
                down_for: down.get(&member.disk).map(Instant::elapsed),
                owns: owns(member.disk),
            })
            .collect();
        let mut ages = shared.ages.lock();
        ages.look(shared, Instant::now());
        let named = |(disk, since): &(DiskId, Instant)| (shared.name_of(*disk), since.elapsed());
        judge(&Facts {
            is_active: state.disks.is_active(),
            has_passed: shared.has_passed.load(SeqCst),
            standing: state.members.get(state.node).map_or(Standing::Joining, |member| member.standing),
            owns: shared.owns().len(),
            has_heirs: state.members.on_the_ring().any(|node| node != state.node),
            up_for: shared.started.elapsed(),
            peers,
            unknown: routes.iter().filter(|owner| owner.is_none()).count(),
            forgotten: routes.iter().flatten().filter(|(_, disk)| !known.contains(disk)).count(),
            untaken: ages.untaken.values().map(named).collect(),
            staged: ages.staged.values().map(named).collect(),
            moves: ages
                .moves
                .values()
                .map(|(to, (phase, _), since)| (shared.name_of(*to), *phase, since.elapsed()))
                .collect(),
        })
    }

    /// What happens in the cluster from now on, as this node sees it. Bounded: whoever is slow misses events, and is told how many.
    pub fn events(&self) -> ClusterEvents {
        self.shared.feed.follow()
    }

    async fn set_standing(&self, node: NodeId, standing: Standing) -> Result<(), NodeError> {
        self.shared.change(|state| state.members.set_standing(node, standing)).await?;
        Ok(())
    }
}

fn check_slot(slot: Slot) -> Result<(), NodeError> {
    match slot.number() < kuma_core::SLOTS {
        true => Ok(()),
        false => refuse(format!("slots are 0 to {}", kuma_core::SLOTS - 1)),
    }
}

fn standing(standing: Standing) -> &'static str {
    match standing {
        Standing::Joining => "joining",
        Standing::Member => "a member",
        Standing::Leaving => "drained",
        Standing::Forgotten => "forgotten",
    }
}

fn refuse<T>(reason: String) -> Result<T, NodeError> {
    Err(NodeError::Refused { reason })
}
