//! The membership map: which nodes there are, where, and what they are about to do.
//!
//! Each node has a copy on its disk, and merges what others know into it. Two nodes with different maps may waste work; who owns a slot does not
//! depend on them.
//!
//! Invariants:
//! - Merging is associative, commutative and idempotent: whoever has heard the same has the same map, in whatever order.
//! - Of two entries of a node the one with the higher version counts; of two with the same version, which two nodes have made at the same time,
//!   the one that is further on its way out, and else the greater one.
//! - A node that is forgotten stays in the map, so that nobody who has not heard of it brings it back. Its tokens stay with it.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, btree_map::Entry},
    fmt,
};

use kuma_core::{DiskId, Slot};
use serde::{Deserialize, Serialize};

/// Names a node for ever: 128 random bits, kept in its data directory, also over a restore.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct NodeId(pub [u8; 16]);

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NodeId({self})")
    }
}

/// What a node is about to do. In the order in which one counts more than the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Standing {
    /// It has asked, and does not take part yet.
    Joining,
    /// It takes part.
    Member,
    /// It gives everything away and goes then.
    Leaving,
    /// It counts no more.
    Forgotten,
}

/// What is known of a node.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Member {
    /// Raised with each change.
    pub version: u64,
    /// What it is about to do.
    pub standing: Standing,
    /// Counts its starts, so that a connection of an earlier one is told from one of now.
    pub incarnation: u64,
    /// Its disk as of now.
    pub disk: DiskId,
    /// What people call it. No two nodes of a cluster have the same.
    pub name: String,
    /// Where it is reached, `host:port`.
    pub address: String,
}

/// All nodes, and slots that somebody wants to be at one of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Members {
    nodes: BTreeMap<NodeId, Member>,
    /// With the version of the pin. None: it was taken away.
    pins: BTreeMap<Slot, (u64, Option<NodeId>)>,
}

/// Why a node cannot be a member.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JoinRefused {
    /// Another node has its name.
    #[error(
        "the name {name:?} is taken by node {by} at {address}; give this one another name, or forget that one if it is gone for ever"
    )]
    NameTaken {
        /// The name.
        name: String,
        /// Who has it.
        by: NodeId,
        /// Where that one is.
        address: String,
    },
    /// It was forgotten.
    #[error("node {node} was forgotten; start it with a new data directory, or keep the one that it has for an export")]
    Forgotten {
        /// The node.
        node: NodeId,
    },
}

impl Members {
    /// A node, also one that is forgotten.
    pub fn get(&self, node: NodeId) -> Option<&Member> {
        self.nodes.get(&node)
    }

    /// All nodes, also those that are forgotten.
    pub fn all(&self) -> impl Iterator<Item = (NodeId, &Member)> {
        self.nodes.iter().map(|(node, member)| (*node, member))
    }

    /// All nodes but those that are forgotten.
    pub fn iter(&self) -> impl Iterator<Item = (NodeId, &Member)> {
        let there = self.nodes.iter().filter(|(_, member)| member.standing != Standing::Forgotten);
        there.map(|(node, member)| (*node, member))
    }

    /// Those on which slots should be.
    pub fn on_the_ring(&self) -> impl Iterator<Item = NodeId> {
        let there = self.nodes.iter().filter(|(_, member)| member.standing == Standing::Member);
        there.map(|(node, _)| *node)
    }

    /// Slots that should be at a node, whatever the ring says.
    pub fn pins(&self) -> BTreeMap<Slot, NodeId> {
        self.pins.iter().filter_map(|(slot, (_, node))| Some((*slot, (*node)?))).collect()
    }

    /// A node says what it is. The version is raised above the one that is known.
    ///
    /// # Errors
    /// It cannot be a member; nothing is changed.
    pub fn announce(&mut self, node: NodeId, mut member: Member) -> Result<(), JoinRefused> {
        if let Some((by, other)) = self.iter().find(|(by, other)| *by != node && other.name == member.name) {
            return Err(JoinRefused::NameTaken { name: member.name, by, address: other.address.clone() });
        }
        match self.nodes.entry(node) {
            Entry::Occupied(known) if known.get().standing == Standing::Forgotten => {
                Err(JoinRefused::Forgotten { node })
            }
            Entry::Occupied(mut known) => {
                member.version = known.get().version + 1;
                known.insert(member);
                Ok(())
            }
            Entry::Vacant(place) => {
                place.insert(member);
                Ok(())
            }
        }
    }

    /// Sets what a node is about to do; whether it is known.
    pub fn set_standing(&mut self, node: NodeId, standing: Standing) -> bool {
        let Some(member) = self.nodes.get_mut(&node) else { return false };
        if member.standing != standing && member.standing != Standing::Forgotten {
            (member.standing, member.version) = (standing, member.version + 1);
        }
        true
    }

    /// Wants a slot to be at a node, or no longer.
    pub fn pin(&mut self, slot: Slot, node: Option<NodeId>) {
        let pin = self.pins.entry(slot).or_insert((0, None));
        *pin = (pin.0 + 1, node);
    }

    /// Takes over what another node knows; whether that was news.
    pub fn merge(&mut self, other: &Members) -> bool {
        let before = self.clone();
        for (node, theirs) in &other.nodes {
            match self.nodes.entry(*node) {
                Entry::Occupied(mut mine) if order(theirs, mine.get()) == Ordering::Greater => {
                    mine.insert(theirs.clone());
                }
                Entry::Occupied(_) => {}
                Entry::Vacant(place) => {
                    place.insert(theirs.clone());
                }
            }
        }
        for (slot, theirs) in &other.pins {
            let mine = self.pins.entry(*slot).or_insert(*theirs);
            *mine = (*mine).max(*theirs);
        }
        *self != before
    }
}

/// Which of two entries of a node counts. Forgotten is for ever, whatever the versions say.
fn order(one: &Member, other: &Member) -> Ordering {
    let is_forgotten = |member: &Member| member.standing == Standing::Forgotten;
    is_forgotten(one).cmp(&is_forgotten(other)).then_with(|| one.cmp(other))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    fn node(n: u8) -> NodeId {
        NodeId([n; 16])
    }

    fn member(name: &str) -> Member {
        Member {
            version: 1,
            standing: Standing::Joining,
            incarnation: 1,
            disk: DiskId([1; 16]),
            name: name.to_owned(),
            address: "10.0.0.1:4860".to_owned(),
        }
    }

    #[test]
    fn a_name_is_taken_once() {
        let mut members = Members::default();
        members.announce(node(1), member("a")).unwrap();
        let refused = members.announce(node(2), member("a")).unwrap_err();
        assert!(refused.to_string().contains("\"a\" is taken by node 0101"), "{refused}");
        assert_eq!(members.get(node(2)), None);
        members.announce(node(1), member("a")).unwrap();
        assert_eq!(members.get(node(1)).unwrap().version, 2, "it may say so again");
    }

    #[test]
    fn whoever_is_forgotten_does_not_come_back() {
        let mut members = Members::default();
        members.announce(node(1), member("a")).unwrap();
        let before = members.clone();
        assert!(
            members.set_standing(node(1), Standing::Forgotten) && !members.set_standing(node(2), Standing::Leaving)
        );
        assert_eq!(members.announce(node(1), member("a")), Err(JoinRefused::Forgotten { node: node(1) }));
        let mut later = before;
        (0..5).for_each(|_| later.announce(node(1), member("a")).unwrap());
        assert!(!members.merge(&later), "somebody who has not heard of it says it more often");
        assert_eq!(members.iter().count(), 0);
        members.announce(node(2), member("a")).unwrap();
    }

    #[test]
    fn only_members_are_on_the_ring_and_a_pin_can_be_taken_away() {
        let mut members = Members::default();
        for n in 1..=3 {
            members.announce(node(n), member(&n.to_string())).unwrap();
        }
        members.set_standing(node(1), Standing::Member);
        members.set_standing(node(2), Standing::Leaving);
        assert_eq!(members.on_the_ring().collect::<Vec<_>>(), [node(1)]);
        members.pin(Slot::new(3), Some(node(1)));
        let pinned = members.clone();
        members.pin(Slot::new(3), None);
        assert!(members.pins().is_empty() && !members.merge(&pinned));
    }

    fn any_members() -> impl Strategy<Value = Members> {
        let standing = prop_oneof![
            Just(Standing::Joining),
            Just(Standing::Member),
            Just(Standing::Leaving),
            Just(Standing::Forgotten)
        ];
        let one = (0_u8..4, 1_u64..4, standing, 1_u64..3).prop_map(|(n, version, standing, incarnation)| {
            (node(n), Member { version, standing, incarnation, ..member(&n.to_string()) })
        });
        let pin = (0_u64..3, 1_u64..4, prop::option::of(0_u8..4));
        let pin = pin.prop_map(|(slot, version, n)| (Slot::new(slot), (version, n.map(node))));
        (prop::collection::btree_map(any::<u8>(), one, 0..5), prop::collection::btree_map(any::<u8>(), pin, 0..4))
            .prop_map(|(nodes, pins)| Members {
                nodes: nodes.into_values().collect(),
                pins: pins.into_values().collect(),
            })
    }

    fn merged(one: &Members, other: &Members) -> Members {
        let mut both = one.clone();
        both.merge(other);
        both
    }

    proptest! {
        #[test]
        fn whoever_has_heard_the_same_knows_the_same(a in any_members(), b in any_members(), c in any_members()) {
            prop_assert_eq!(merged(&a, &b), merged(&b, &a));
            prop_assert_eq!(merged(&merged(&a, &b), &c), merged(&a, &merged(&b, &c)));
            let mut once = merged(&a, &b);
            prop_assert!(!once.merge(&b) && !once.merge(&a));
        }
    }
}
