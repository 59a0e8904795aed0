//! What would move: from who owns what, as far as is known, to where the ring wants it.
//!
//! A pure function of the members, the pins and the owners that were heard of.

use std::collections::{BTreeMap, BTreeSet};

use kuma_core::{DiskId, Slot};

use crate::{
    members::{Members, NodeId},
    ring::{Move, Ring},
};

/// What would move.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RebalancePlan {
    /// Each node, by name.
    pub nodes: Vec<NodeShare>,
    /// Each slot that is not where it should be, with its owner as where it is.
    pub moves: Vec<Move>,
    /// Slots whose owner is not known here, or was forgotten: they move when it is back.
    pub without_owner: Vec<Slot>,
}

/// What a node would give and get.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeShare {
    /// The node.
    pub node: NodeId,
    /// What people call it.
    pub name: String,
    /// Slots that it owns now.
    pub owns: usize,
    /// Slots that it would own.
    pub wished: usize,
    /// Slots that it would give away.
    pub gives: usize,
    /// Slots that it would get.
    pub takes: usize,
}

/// What would move if the nodes of `without` were not on the ring. `owners` is by slot.
pub(crate) fn plan(members: &Members, owners: &[Option<DiskId>], without: &BTreeSet<NodeId>) -> RebalancePlan {
    let ring = Ring::new(members.on_the_ring().filter(|node| !without.contains(node)), &members.pins());
    let nodes: BTreeMap<DiskId, NodeId> = members.iter().map(|(node, member)| (member.disk, node)).collect();
    let mut plan = RebalancePlan::default();
    let (mut owns, mut gives, mut takes): (Counts, Counts, Counts) = Default::default();
    for (number, owner) in owners.iter().enumerate() {
        let slot = Slot::new(number as u64);
        let Some(from) = owner.and_then(|disk| nodes.get(&disk)).copied() else {
            plan.without_owner.push(slot);
            continue;
        };
        *owns.entry(from).or_default() += 1;
        if let Some(to) = ring.owner(slot).filter(|to| *to != from) {
            *gives.entry(from).or_default() += 1;
            *takes.entry(to).or_default() += 1;
            plan.moves.push(Move { slot, from, to });
        }
    }
    let wished = ring.counts();
    let count = |counts: &Counts, node| counts.get(&node).copied().unwrap_or_default();
    plan.nodes = members
        .iter()
        .map(|(node, member)| NodeShare {
            node,
            name: member.name.clone(),
            owns: count(&owns, node),
            wished: wished.get(&node).copied().unwrap_or_default().into(),
            gives: count(&gives, node),
            takes: count(&takes, node),
        })
        .collect();
    plan.nodes.sort_by(|one, other| one.name.cmp(&other.name));
    plan
}

type Counts = BTreeMap<NodeId, usize>;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use kuma_core::SLOTS;

    use super::*;
    use crate::members::{Member, Standing};

    fn node(n: u8) -> NodeId {
        NodeId([n; 16])
    }

    fn members(nodes: impl IntoIterator<Item = u8>) -> Members {
        let mut members = Members::default();
        for n in nodes {
            let member = Member {
                version: 1,
                standing: Standing::Member,
                incarnation: 1,
                disk: DiskId([n; 16]),
                name: format!("n{n}"),
                address: "x:1".to_owned(),
            };
            members.announce(node(n), member).unwrap();
        }
        members
    }

    fn settled(members: &Members) -> Vec<Option<DiskId>> {
        let ring = Ring::new(members.on_the_ring(), &members.pins());
        let owner = |slot| ring.owner(Slot::new(slot)).map(|node| DiskId(node.0));
        (0..u64::from(SLOTS)).map(owner).collect()
    }

    #[test]
    fn a_new_node_gets_its_share_from_each_other_one() {
        let owners = settled(&members(1..=2));
        let plan = plan(&members(1..=3), &owners, &BTreeSet::new());
        assert!(plan.moves.iter().all(|one| one.to == node(3)) && plan.without_owner.is_empty());
        let [one, two, three] = &plan.nodes[..] else { panic!("{plan:?}") };
        assert_eq!((three.owns, three.takes, three.gives), (0, three.wished, 0));
        assert_eq!(one.gives + two.gives, three.takes);
        assert_eq!(plan.moves.len(), three.takes);
        for share in &plan.nodes {
            assert_eq!(share.owns + share.takes - share.gives, share.wished, "{share:?}");
        }
    }

    #[test]
    fn what_a_node_leaves_goes_to_all_others_and_a_pin_stays_where_it_is() {
        let mut all = members(1..=3);
        all.pin(Slot::new(7), Some(node(2)));
        let owners = settled(&all);
        assert!(plan(&all, &owners, &BTreeSet::new()).moves.is_empty());
        let without = plan(&all, &owners, &[node(1)].into());
        assert!(without.moves.iter().all(|one| one.from == node(1)));
        assert_eq!(without.moves.len(), owners.iter().filter(|owner| **owner == Some(DiskId([1; 16]))).count());
        assert_eq!(without.nodes[0].wished, 0);
    }

    #[test]
    fn slots_of_nobody_that_is_known_move_nowhere() {
        let mut owners = settled(&members(1..=2));
        owners[5] = None;
        owners[6] = Some(DiskId([9; 16]));
        let plan = plan(&members(1..=2), &owners, &BTreeSet::new());
        assert_eq!(plan.without_owner, [Slot::new(5), Slot::new(6)]);
        assert!(plan.moves.is_empty());
    }
}
