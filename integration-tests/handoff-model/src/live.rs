//! Nothing gets stuck: from every state in which no more goes wrong, the slot can still get to where it should be.
//!
//! Of temporal logic it is AG EF. The checker has no such property, so that all states are gathered here, with the steps between them; then those from
//! which the goal can be reached are found backwards.

use std::{
    collections::{HashMap, VecDeque},
    hash::{DefaultHasher, Hash, Hasher},
};

use kuma_cluster::Token;
use stateright::Model as _;

use crate::world::{Action, Model, World};

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Liveness {
    /// From each of so many states the goal can be reached.
    Live(usize),
    /// From so many it cannot; how the first of them is reached.
    Stuck(usize, Vec<Action>),
    /// There are more states than that.
    TooMany(usize),
}

struct Reached {
    parent: Option<(u32, Action)>,
    is_judged: bool,
    is_good: bool,
}

/// Looks at all states of a model with [`Model::calms_down`], up to so many.
pub fn live(model: Model, states_max: usize) -> Liveness {
    let mut index: HashMap<u64, u32> = HashMap::new();
    let mut reached: Vec<Reached> = Vec::new();
    // From where one gets to a state without anything going wrong.
    let mut before: Vec<Vec<u32>> = Vec::new();
    let mut queue = VecDeque::new();
    for world in model.init_states() {
        index.insert(hash(&world), reached.len() as u32);
        queue.push_back((reached.len() as u32, world.clone()));
        reached.push(Reached { parent: None, is_judged: model.is_judged(&world), is_good: is_home(&model, &world) });
        before.push(Vec::new());
    }
    while let Some((number, world)) = queue.pop_front() {
        let mut actions = Vec::new();
        model.actions(&world, &mut actions);
        for action in actions {
            let Some(next) = model.next_state(&world, action.clone()) else { continue };
            let key = hash(&next);
            let to = match index.get(&key) {
                Some(to) => *to,
                None if reached.len() >= states_max => return Liveness::TooMany(states_max),
                None => {
                    let to = reached.len() as u32;
                    index.insert(key, to);
                    let (is_judged, is_good) = (model.is_judged(&next), is_home(&model, &next));
                    reached.push(Reached { parent: Some((number, action)), is_judged, is_good });
                    before.push(Vec::new());
                    queue.push_back((to, next));
                    to
                }
            };
            if world.is_calm {
                before[to as usize].push(number);
            }
        }
    }
    let mut good: Vec<u32> = (0..).zip(&reached).filter(|(_, state)| state.is_good).map(|(number, _)| number).collect();
    while let Some(number) = good.pop() {
        for from in std::mem::take(&mut before[number as usize]) {
            if !std::mem::replace(&mut reached[from as usize].is_good, true) {
                good.push(from);
            }
        }
    }
    let is_stuck = |state: &Reached| state.is_judged && !state.is_good;
    match reached.iter().position(is_stuck) {
        None => Liveness::Live(reached.iter().filter(|state| state.is_judged).count()),
        Some(mut at) => {
            let stuck = reached.iter().filter(|state| is_stuck(state)).count();
            let mut way = Vec::new();
            while let Some((parent, action)) = reached[at].parent.clone() {
                way.push(action);
                at = parent as usize;
            }
            way.reverse();
            Liveness::Stuck(stuck, way)
        }
    }
}

pub(crate) fn hash(world: &World) -> u64 {
    let mut hasher = DefaultHasher::new();
    world.hash(&mut hasher);
    hasher.finish()
}

/// The last node owns the slot, and nothing is left to be done.
fn is_home(model: &Model, world: &World) -> bool {
    let is_done = world.nodes.iter().all(|node| {
        let record = node.slot.record;
        let is_taken = !matches!(record.token, Token::Released { is_taken: false, .. });
        node.slot.out.is_none() && record.staged.is_none() && node.pending.is_none() && is_taken
    });
    let is_erased = world.is_erasure_acked() || !model.erases;
    world.is_calm && is_done && is_erased && world.nodes.last().is_some_and(|node| node.serves())
}
