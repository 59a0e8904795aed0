//! What must hold in every state, and how all of them are looked at.

use std::{
    collections::{HashSet, VecDeque},
    time::{Duration, Instant},
};

use kuma_cluster::Token;
use stateright::{Checker, Expectation, HasDiscoveries, Property};

use crate::{
    live::hash,
    world::{Action, Model, Node, World},
};

impl stateright::Model for Model {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![self.begin()]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        self.possible(world, actions);
    }

    fn next_state(&self, world: &World, action: Action) -> Option<World> {
        self.next(world, action)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties: Vec<Property<Self>> = vec![
            Property::always("one disk serves at most", |_, world: &World| {
                world.nodes.iter().filter(|node| node.serves()).count() <= 1
            }),
            Property::always("one disk has the say at most", |_, world: &World| world.authorities().count() <= 1),
            Property::always("nothing is appended twice", |_, world: &World| {
                world.nodes.iter().all(|node| !node.log().has_duplicates())
            }),
            Property::always("what was acknowledged is there, unless its disk is gone", |_, world: &World| {
                world.is_lossy || world.nodes.iter().filter(|node| node.serves()).all(|node| world.is_whole(node.log()))
            }),
            Property::always("a strong read sees what was acknowledged", |model: &Model, world: &World| {
                let mut readers = world.nodes.iter().filter(|node| node.reads(model.safeguards));
                world.is_lossy || readers.all(|node| world.is_whole(node.log()))
            }),
            Property::sometimes("a handoff is completed", |model: &Model, world: &World| {
                let none_begins = model.transfers == 0;
                none_begins
                    || world
                        .nodes
                        .iter()
                        .any(|node| matches!(node.slot.record.token, Token::Released { is_taken: true, .. }))
            }),
        ];
        if self.restores == 0 {
            properties.extend([
                Property::always("one disk has the say", |_, world: &World| world.authorities().count() == 1),
                Property::always("the order is that of the first answer", |_, world: &World| !world.is_reordered),
                Property::always("whoever has the say has what was acknowledged", |_, world: &World| {
                    world.authorities().all(|node| world.is_whole(node.log()))
                }),
                Property::always("what is released is prepared at its target", |_, world: &World| {
                    world.nodes.iter().all(|node| match node.slot.record.token {
                        Token::Released { transfer, to, epoch, .. } if world.taken >> transfer.0[0] & 1 == 0 => {
                            world.node(to).is_some_and(|target| {
                                let staged = target.slot.record.staged;
                                let is_it = staged.is_some_and(|s| (s.transfer, s.epoch) == (transfer, epoch));
                                is_it && world.is_whole(target.staged_log())
                            })
                        }
                        _ => true,
                    })
                }),
                Property::always("a grant meets what it grants", |_, world: &World| !world.is_alarmed),
            ]);
        }
        if self.erases {
            properties.extend([
                Property::always("what is erased has a key nowhere", |_, world: &World| {
                    let mut active = world.nodes.iter().filter(|node| node.is_active());
                    !world.is_erasure_acked() || !active.any(|node| node.has_any_key())
                }),
                Property::always("what is not erased can be read", |_, world: &World| {
                    world.is_lossy || world.authorities().all(Node::knows_the_entity)
                }),
                Property::sometimes("an erasure is done", |_, world: &World| world.is_erasure_acked()),
            ]);
        }
        if self.joiners > 0 {
            properties.push(Property::always("those that take part know each other", |_, world: &World| {
                let active: Vec<_> = world.nodes.iter().filter(|node| node.is_active()).collect();
                active.iter().all(|node| active.iter().all(|other| node.knows(other)))
            }));
        }
        properties
    }
}

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It holds in all states, of which there are so many.
    Holds(usize),
    /// It held in so many states, and then the time was over.
    OutOfTime(usize),
    /// It does not hold: what does not, and in how many steps it came to be. Not the fewest: [`counterexample`].
    Broken(&'static str, usize),
    /// Nothing was broken, but what should be reached was not.
    Unreached(&'static str),
}

/// Looks at all states, breadth first.
pub fn check(model: Model, time: Duration) -> Verdict {
    let begin = Instant::now();
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    let checker = stateright::Model::checker(model).threads(threads).timeout(time);
    let checker = checker.finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
    let mut broken = Vec::new();
    let mut unreached = None;
    for property in stateright::Model::properties(&model) {
        match (property.expectation, checker.discovery(property.name)) {
            (Expectation::Always, Some(path)) => broken.push((path.into_actions().len(), property.name)),
            (Expectation::Sometimes, None) => unreached = Some(property.name),
            _ => {}
        }
    }
    let states = checker.unique_state_count();
    match (broken.into_iter().min(), unreached) {
        (Some((steps, name)), _) => Verdict::Broken(name, steps),
        (None, _) if !checker.is_done() || begin.elapsed() >= time => Verdict::OutOfTime(states),
        (None, Some(name)) => Verdict::Unreached(name),
        (None, None) => Verdict::Holds(states),
    }
}

/// What does not hold, and the shortest way to there; none if all holds. The checker looks at states a thousand at a time, and keeps the last way that
/// it finds: so this looks at one after the other.
pub fn counterexample(model: Model) -> Option<(&'static str, Vec<Action>)> {
    let properties = stateright::Model::properties(&model);
    let always: Vec<_> = properties.iter().filter(|p| matches!(p.expectation, Expectation::Always)).collect();
    let broken = |world: &World| always.iter().find(|property| !(property.condition)(&model, world));
    let mut known = HashSet::new();
    // How each state was reached, as far as it has to be known.
    let mut ways: Vec<(usize, Option<Action>)> = Vec::new();
    let mut queue = VecDeque::new();
    for world in stateright::Model::init_states(&model) {
        known.insert(hash(&world));
        queue.push_back((ways.len(), world));
        ways.push((0, None));
    }
    let mut actions = Vec::new();
    while let Some((number, world)) = queue.pop_front() {
        if let Some(property) = broken(&world) {
            let mut way = Vec::new();
            let mut at = number;
            while let (before, Some(action)) = &ways[at] {
                way.push(action.clone());
                at = *before;
            }
            way.reverse();
            return Some((property.name, way));
        }
        stateright::Model::actions(&model, &world, &mut actions);
        for action in actions.drain(..) {
            let Some(next) = stateright::Model::next_state(&model, &world, action.clone()) else { continue };
            if known.insert(hash(&next)) {
                queue.push_back((ways.len(), next));
                ways.push((number, Some(action)));
            }
        }
    }
    None
}
