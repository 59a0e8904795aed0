//! The ring: where slots should be. It is a wish; who serves a slot is said by its token.
//!
//! Every node computes the same wish from the same members, on every machine and with every compiler: nodes and slots are hashed as bytes in a
//! fixed order, by XXH3 with a fixed seed. A test pins it. A change of the placement moves everything everywhere.

use std::{
    collections::BTreeMap,
    hash::{BuildHasher, Hash, Hasher},
};

use consistent_hash_ring::RingBuilder;
use kuma_core::{SLOTS, Slot};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::members::NodeId;

/// Places of each node on the ring: with so many, nodes differ by some 2 percent.
const PLACES: usize = 1024;
const SEED: u64 = 0x6b75_6d61_2072_696e;

/// Which node should own each slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ring {
    /// By slot; empty without nodes.
    owners: Vec<NodeId>,
}

/// A slot that should be elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    /// The slot.
    pub slot: Slot,
    /// Where it should have been.
    pub from: NodeId,
    /// Where it should be.
    pub to: NodeId,
}

impl Ring {
    /// The wish for these nodes, in any order. Pins come before the ring: their slots should be at the node that they name, if it is there.
    pub fn new(nodes: impl IntoIterator<Item = NodeId>, pins: &BTreeMap<Slot, NodeId>) -> Self {
        // Sorted and each once: the ring does not depend on the order of its nodes, but for equal hashes.
        let nodes: std::collections::BTreeSet<NodeId> = nodes.into_iter().collect();
        if nodes.is_empty() {
            return Ring { owners: Vec::new() };
        }
        let places = RingBuilder::new(Xxh3).vnodes(PLACES).nodes_iter(nodes.iter().copied().map(Place)).build();
        let owner = |slot: Slot| match pins.get(&slot).filter(|node| nodes.contains(node)) {
            Some(pinned) => *pinned,
            None => places.get(Key(slot)).0,
        };
        Ring { owners: (0..u64::from(SLOTS)).map(|slot| owner(Slot::new(slot))).collect() }
    }

    /// Where a slot should be; none without nodes.
    pub fn owner(&self, slot: Slot) -> Option<NodeId> {
        self.owners.get(usize::from(slot.number())).copied()
    }

    /// How many slots each node should have.
    pub fn counts(&self) -> BTreeMap<NodeId, u16> {
        let mut counts = BTreeMap::new();
        for owner in &self.owners {
            *counts.entry(*owner).or_default() += 1;
        }
        counts
    }

    /// What has to move to get from this ring to the next one.
    pub fn moves_to<'a>(&'a self, next: &'a Ring) -> impl Iterator<Item = Move> + 'a {
        let places = self.owners.iter().zip(&next.owners).enumerate();
        places.filter(|(_, (from, to))| from != to).map(|(slot, (from, to))| Move {
            slot: Slot::new(slot as u64),
            from: *from,
            to: *to,
        })
    }
}

/// A node on the ring.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Place(NodeId);

impl Hash for Place {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write(&self.0.0);
    }
}

/// What is looked for on the ring.
struct Key(Slot);

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write(&self.0.number().to_le_bytes());
    }
}

/// XXH3 of all bytes that were written. Integers are written little-endian, on every machine.
#[derive(Clone, Copy, Debug)]
struct Xxh3;

impl BuildHasher for Xxh3 {
    type Hasher = Bytes;

    fn build_hasher(&self) -> Bytes {
        Bytes(Vec::with_capacity(16))
    }
}

struct Bytes(Vec<u8>);

impl Hasher for Bytes {
    fn finish(&self) -> u64 {
        xxh3_64_with_seed(&self.0, SEED)
    }

    fn write(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    fn write_u64(&mut self, number: u64) {
        self.write(&number.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    fn node(n: u8) -> NodeId {
        NodeId([n; 16])
    }

    fn ring(nodes: impl IntoIterator<Item = u8>) -> Ring {
        Ring::new(nodes.into_iter().map(node), &BTreeMap::new())
    }

    /// If this fails, every slot of every cluster would move with the next start: do not change it.
    #[test]
    fn the_placement_is_the_one_of_the_first_release() {
        let ring = ring(1..=5);
        let first: Vec<u8> = ring.owners.iter().take(16).map(|owner| owner.0[0]).collect();
        let all: Vec<u8> = ring.owners.iter().map(|owner| owner.0[0]).collect();
        insta::assert_debug_snapshot!((
            first,
            xxh3_64_with_seed(&all, 0),
            ring.counts().into_values().collect::<Vec<_>>()
        ));
    }

    #[test]
    fn nodes_get_about_as_many_slots_each() {
        for nodes in [2, 3, 5, 16] {
            let even = f64::from(SLOTS) / f64::from(nodes);
            for (node, count) in ring(1..=nodes).counts() {
                let share = f64::from(count) / even;
                assert!((0.75..1.25).contains(&share), "{node:?} of {nodes} has {share:.2} of an even share");
            }
        }
    }

    #[test]
    fn a_new_node_takes_its_share_and_nothing_else_moves() {
        for nodes in [1, 3, 8] {
            let (before, after) = (ring(1..=nodes), ring(1..=nodes + 1));
            let moves: Vec<Move> = before.moves_to(&after).collect();
            assert!(moves.iter().all(|one| one.to == node(nodes + 1)), "slots moved between nodes that were there");
            assert_eq!(moves.len(), usize::from(after.counts()[&node(nodes + 1)]));
            let share = moves.len() as f64 / f64::from(SLOTS) * f64::from(nodes + 1);
            assert!((0.75..1.25).contains(&share), "{share}");
        }
    }

    #[test]
    fn a_pin_counts_while_its_node_is_there() {
        let slot = Slot::new(7);
        let unpinned = ring(1..=3);
        let other = (1..=3).map(node).find(|node| Some(*node) != unpinned.owner(slot)).unwrap();
        let pinned = Ring::new((1..=3).map(node), &[(slot, other)].into());
        assert_eq!(pinned.owner(slot), Some(other));
        assert_eq!(unpinned.moves_to(&pinned).count(), 1);
        assert_eq!(Ring::new((1..=3).map(node), &[(slot, node(9))].into()), unpinned);
    }

    #[test]
    fn without_nodes_there_is_no_wish() {
        assert_eq!(ring([]).owner(Slot::new(1)), None);
        assert_eq!(ring([]).moves_to(&ring([1])).count(), 0);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]

        #[test]
        fn the_order_of_nodes_does_not_matter(mut nodes in prop::collection::vec(any::<[u8; 16]>(), 1..6)) {
            let one = Ring::new(nodes.iter().copied().map(NodeId), &BTreeMap::new());
            nodes.reverse();
            prop_assert_eq!(one, Ring::new(nodes.into_iter().map(NodeId), &BTreeMap::new()));
        }
    }
}
