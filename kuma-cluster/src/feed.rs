//! What happens in the cluster, as this node sees it, for whoever follows: a monitor, a command line, a log.
//!
//! Invariants:
//! - Nobody who follows slows anything down: whoever does not keep up misses events, and is told how many.
//! - Events are news and no record: what holds now is asked of the node ([`Node::members`](crate::Node::members), [`Node::moves`](crate::Node::moves)).

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::{Duration, SystemTime},
};

use kuma_core::Slot;
use parking_lot::Mutex;
use tokio::sync::broadcast;

use crate::members::{Members, NodeId, Standing};

/// Events that are kept for somebody who is slow.
const KEPT: usize = 4096;

/// What has happened.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum ClusterEvent {
    /// A node is known for the first time.
    MemberJoined {
        /// The node.
        node: NodeId,
        /// What people call it.
        name: String,
    },
    /// A node was forgotten.
    MemberLeft {
        /// The node.
        node: NodeId,
        /// What people call it.
        name: String,
    },
    /// There is a link to a node.
    MemberUp {
        /// What people call it.
        name: String,
    },
    /// There is none any more.
    MemberDown {
        /// What people call it.
        name: String,
        /// Why.
        why: String,
    },
    /// What a node is about to do has changed.
    StandingChanged {
        /// The node.
        node: NodeId,
        /// What people call it.
        name: String,
        /// Before.
        from: Standing,
        /// Now.
        to: Standing,
    },
    /// This node serves what it owns.
    Ready,
    /// A slot of this node is on its way.
    MoveStarted {
        /// The slot.
        slot: Slot,
        /// To whom.
        to: String,
    },
    /// How far it is. Told of moves that take a while.
    MoveProgress {
        /// The slot.
        slot: Slot,
        /// To whom.
        to: String,
        /// "copying", "sealed" or "granted".
        phase: &'static str,
        /// Rows that were sent.
        rows_sent: u64,
        /// Rows that are still to be copied.
        rows_left: u64,
    },
    /// A slot of this node is the other one's now.
    MoveDone {
        /// The slot.
        slot: Slot,
        /// Whose.
        to: String,
        /// Rows that were sent before it was sealed.
        rows_sent: u64,
        /// How long writes to it waited.
        pause: Duration,
    },
    /// A slot of this node stays for now; it is tried again by itself.
    MoveAborted {
        /// The slot.
        slot: Slot,
        /// Whose it would have been.
        to: String,
        /// Why, in a word.
        reason: &'static str,
    },
    /// A slot of another node is this one's now.
    SlotTaken {
        /// The slot.
        slot: Slot,
    },
}

/// An event, with its number and time.
#[derive(Clone, Debug, PartialEq)]
pub struct Happened {
    /// Counts this node's events since it was started, from 1.
    pub number: u64,
    /// When.
    pub at: SystemTime,
    /// What.
    pub event: ClusterEvent,
}

/// What is told next.
#[derive(Clone, Debug, PartialEq)]
pub enum Told {
    /// This has happened.
    Happened(Happened),
    /// So many events were missed, because they were not taken in time.
    Missed(u64),
}

/// The events of a node from now on.
pub struct ClusterEvents(broadcast::Receiver<Happened>);

impl ClusterEvents {
    /// The next one; none when the node has stopped.
    ///
    /// # Cancel safety
    /// Cancel safe: nothing is lost.
    pub async fn next(&mut self) -> Option<Told> {
        match self.0.recv().await {
            Ok(happened) => Some(Told::Happened(happened)),
            Err(broadcast::error::RecvError::Lagged(missed)) => Some(Told::Missed(missed)),
            Err(broadcast::error::RecvError::Closed) => None,
        }
    }
}

/// Where events come together.
pub(crate) struct Feed {
    /// None once the node has stopped.
    sender: Mutex<Option<broadcast::Sender<Happened>>>,
    told: AtomicU64,
}

impl Feed {
    pub(crate) fn new() -> Self {
        Feed { sender: Mutex::new(Some(broadcast::channel(KEPT).0)), told: AtomicU64::new(0) }
    }

    pub(crate) fn tell(&self, event: ClusterEvent) {
        if let Some(sender) = &*self.sender.lock() {
            // Numbered under the lock, so that they come in their order. Nobody may follow.
            let number = self.told.fetch_add(1, Relaxed) + 1;
            let _ = sender.send(Happened { number, at: SystemTime::now(), event });
        }
    }

    pub(crate) fn follow(&self) -> ClusterEvents {
        match &*self.sender.lock() {
            Some(sender) => ClusterEvents(sender.subscribe()),
            None => ClusterEvents(broadcast::channel(1).1),
        }
    }

    /// Nothing more happens.
    pub(crate) fn end(&self) {
        self.sender.lock().take();
    }

    /// Tells what is new in the map of members.
    pub(crate) fn members_changed(&self, before: &Members, now: &Members) {
        for (node, member) in now.all() {
            let name = || member.name.clone();
            let (from, to) = (before.get(node).map(|before| before.standing), member.standing);
            match from {
                None if to == Standing::Forgotten => {}
                None => self.tell(ClusterEvent::MemberJoined { node, name: name() }),
                Some(from) if from == to => {}
                Some(_) if to == Standing::Forgotten => self.tell(ClusterEvent::MemberLeft { node, name: name() }),
                Some(from) => self.tell(ClusterEvent::StandingChanged { node, name: name(), from, to }),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use kuma_core::DiskId;

    use super::*;
    use crate::members::Member;

    fn up(name: &str) -> ClusterEvent {
        ClusterEvent::MemberUp { name: name.to_owned() }
    }

    #[tokio::test]
    async fn whoever_is_slow_is_told_what_it_missed_and_holds_nobody_up() {
        let feed = Feed::new();
        let mut slow = feed.follow();
        for _ in 0..KEPT + 10 {
            feed.tell(up("a"));
        }
        assert_eq!(slow.next().await, Some(Told::Missed(10)));
        let Some(Told::Happened(first)) = slow.next().await else { panic!("nothing is there") };
        assert_eq!((first.number, first.event), (11, up("a")));
        feed.end();
        let mut rest = 1;
        while slow.next().await.is_some() {
            rest += 1;
        }
        assert_eq!(rest, KEPT);
        assert_eq!(feed.follow().next().await, None);
    }

    #[tokio::test]
    async fn what_is_new_in_the_map_is_told_once() {
        let feed = Feed::new();
        let mut told = feed.follow();
        let (node, mut members) = (NodeId([1; 16]), Members::default());
        let member = Member {
            version: 1,
            standing: Standing::Joining,
            incarnation: 1,
            disk: DiskId([1; 16]),
            name: "a".to_owned(),
            address: "x:1".to_owned(),
        };
        let mut expected = Vec::new();
        let change = |members: &mut Members, standing: Standing| {
            let before = members.clone();
            match standing {
                Standing::Joining => members.announce(node, member.clone()).unwrap(),
                other => drop(members.set_standing(node, other)),
            }
            feed.members_changed(&before, members);
            feed.members_changed(members, members);
        };
        for standing in [Standing::Joining, Standing::Member, Standing::Leaving, Standing::Forgotten] {
            change(&mut members, standing);
        }
        let name = "a".to_owned();
        let changed = |from, to| ClusterEvent::StandingChanged { node, name: "a".to_owned(), from, to };
        expected.push(ClusterEvent::MemberJoined { node, name: name.clone() });
        expected.push(changed(Standing::Joining, Standing::Member));
        expected.push(changed(Standing::Member, Standing::Leaving));
        expected.push(ClusterEvent::MemberLeft { node, name });
        feed.end();
        let mut all = Vec::new();
        while let Some(Told::Happened(happened)) = told.next().await {
            all.push(happened.event);
        }
        assert_eq!(all, expected);
    }
}
