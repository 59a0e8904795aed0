//! Whether the cluster serves, as this node sees it, and what is in the way, in words.
//!
//! Invariant: what is found is a pure function of what the node knows. A reason says what to do, or that nothing is to be done.

use std::{collections::BTreeMap, time::Duration};

use crate::members::Standing;

/// What heals by itself in less is not worth a word.
const PATIENCE: Duration = Duration::from_secs(10);
/// A move on which nothing was seen for so long is stuck.
const STUCK: Duration = Duration::from_secs(30);
/// Owners are told by each node when it is ready; what is not known so soon after the start is no news.
const SETTLE: Duration = Duration::from_secs(6);

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum HealthState {
    /// Every slot can be served.
    Ok,
    /// Every slot can be served, and something is to be looked at.
    Degraded,
    /// Some slots cannot be served, or none.
    Unavailable,
}

impl HealthState {
    /// In a word.
    pub fn as_str(self) -> &'static str {
        match self {
            HealthState::Ok => "ok",
            HealthState::Degraded => "degraded",
            HealthState::Unavailable => "unavailable",
        }
    }
}

/// One thing that is in the way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthReason {
    /// Names the reason, for programs: `joining`, `not_ready`, `unreachable`, `without_owner`, `released_untaken`, `staged`, `move_stuck`, `leaving`.
    pub code: &'static str,
    /// How bad it is.
    pub state: HealthState,
    /// The node that it is about.
    pub node: Option<String>,
    /// How many slots it concerns.
    pub slots: usize,
    /// Since when it is so, as far as this run of the node knows.
    pub since: Option<Duration>,
    /// What it is and what to do, in a sentence.
    pub detail: String,
}

/// Whether the cluster serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Health {
    /// The worst of the reasons.
    pub state: HealthState,
    /// Worst first.
    pub reasons: Vec<HealthReason>,
}

/// What is known.
#[derive(Clone, Debug)]
pub(crate) struct Facts {
    pub(crate) is_active: bool,
    pub(crate) has_passed: bool,
    pub(crate) standing: Standing,
    pub(crate) owns: usize,
    /// Whether somebody else is on the ring.
    pub(crate) has_heirs: bool,
    pub(crate) up_for: Duration,
    pub(crate) peers: Vec<PeerFact>,
    /// Slots that are owned by nobody that is known, and by nodes that were forgotten.
    pub(crate) unknown: usize,
    pub(crate) forgotten: usize,
    /// Each with the name of the other node, and how long it is so.
    pub(crate) untaken: Vec<(String, Duration)>,
    pub(crate) staged: Vec<(String, Duration)>,
    pub(crate) moves: Vec<(String, &'static str, Duration)>,
}

/// What is known of another node.
#[derive(Clone, Debug)]
pub(crate) struct PeerFact {
    pub(crate) name: String,
    pub(crate) is_up: bool,
    /// Since when there is no link, if there was one in this run.
    pub(crate) down_for: Option<Duration>,
    pub(crate) owns: usize,
}

/// What there is to say about it.
pub(crate) fn judge(facts: &Facts) -> Health {
    let mut reasons = Vec::new();
    let away: Vec<&str> = facts.peers.iter().filter(|peer| !peer.is_up).map(|peer| peer.name.as_str()).collect();
    let of_away = match away.is_empty() {
        true => String::new(),
        false => format!("; out of reach: {}", away.join(", ")),
    };
    let mut say = |code, state, node, slots, since, detail: String| {
        reasons.push(HealthReason { code, state, node, slots, since, detail });
    };
    if !facts.is_active {
        let detail = format!(
            "this node is not let in yet: every node of the cluster has to do that{of_away}; start those, or attest that a disk is destroyed"
        );
        say("joining", HealthState::Unavailable, None, 0, None, detail);
    } else if !facts.has_passed {
        let detail = format!(
            "this node serves nothing yet: it waits for a node that serves, or until all nodes are there{of_away}; start them"
        );
        say("not_ready", HealthState::Unavailable, None, facts.owns, None, detail);
    }
    for peer in facts.peers.iter().filter(|peer| !peer.is_up) {
        let since = peer
            .down_for
            .map_or_else(|| "since this node was started".to_owned(), |since| format!("for {}", words(since)));
        let (state, what) = match peer.owns {
            0 => (HealthState::Degraded, "it owns no slots, so that nothing waits for it".to_owned()),
            owns => {
                (HealthState::Unavailable, format!("the {owns} slots that it owns are unavailable until it is back"))
            }
        };
        let detail =
            format!("node {} has not been reached {since}; {what}: start it, or look at the network", peer.name);
        say("unreachable", state, Some(peer.name.clone()), peer.owns, peer.down_for, detail);
    }
    if facts.unknown > 0 && (facts.up_for >= SETTLE || !away.is_empty()) {
        let detail = format!(
            "{} slots have no owner that is known here{of_away}; it is found as soon as the node that has them is there",
            facts.unknown
        );
        say("without_owner", HealthState::Unavailable, None, facts.unknown, None, detail);
    }
    if facts.forgotten > 0 {
        let detail = format!(
            "{} slots are owned by nodes that were forgotten; they are unavailable until such a node is started again",
            facts.forgotten
        );
        say("without_owner", HealthState::Unavailable, None, facts.forgotten, None, detail);
    }
    for (names, code, what) in [
        (
            &facts.untaken,
            "released_untaken",
            "were given to node {}, which has not said yet that it has them; they are unavailable until it does",
        ),
        (
            &facts.staged,
            "staged",
            "came from node {}, which has not granted them yet; it decides, and serves them meanwhile if it can be reached",
        ),
    ] {
        let mut by_node: BTreeMap<&str, (usize, Duration)> = BTreeMap::new();
        for (name, age) in names.iter().filter(|(_, age)| *age >= PATIENCE) {
            let entry = by_node.entry(name).or_default();
            *entry = (entry.0 + 1, entry.1.max(*age));
        }
        for (name, (slots, age)) in by_node {
            let state = if code == "staged" { HealthState::Degraded } else { HealthState::Unavailable };
            let detail = format!("{slots} slots {} (for {})", what.replace("{}", name), words(age));
            say(code, state, Some(name.to_owned()), slots, Some(age), detail);
        }
    }
    let stuck: Vec<_> = facts.moves.iter().filter(|(_, _, age)| *age >= STUCK).collect();
    if let Some((name, phase, age)) = stuck.iter().max_by_key(|(_, _, age)| *age) {
        let detail = format!(
            "{} slots of this node are on their way and get no further, the longest ({phase}, to node {name}) for {}; they are served meanwhile",
            stuck.len(),
            words(*age)
        );
        say("move_stuck", HealthState::Degraded, Some(name.clone()), stuck.len(), Some(*age), detail);
    }
    if facts.standing == Standing::Leaving && facts.owns > 0 && !facts.has_heirs {
        let detail = format!("this node is to give away {} slots, and there is no other node to take them", facts.owns);
        say("leaving", HealthState::Degraded, None, facts.owns, None, detail);
    }
    reasons.sort_by_key(|reason| std::cmp::Reverse(reason.state));
    let state = reasons.first().map_or(HealthState::Ok, |reason| reason.state);
    Health { state, reasons }
}

/// A duration as people say it.
fn words(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0 => format!("{} ms", duration.as_millis()),
        1..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        _ => format!("{} h", seconds / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    fn well() -> Facts {
        Facts {
            is_active: true,
            has_passed: true,
            standing: Standing::Member,
            owns: 2048,
            has_heirs: true,
            up_for: MINUTE,
            peers: vec![PeerFact { name: "b".to_owned(), is_up: true, down_for: None, owns: 2048 }],
            unknown: 0,
            forgotten: 0,
            untaken: Vec::new(),
            staged: Vec::new(),
            moves: Vec::new(),
        }
    }

    fn found(change: impl FnOnce(&mut Facts)) -> Vec<String> {
        let mut facts = well();
        change(&mut facts);
        let health = judge(&facts);
        assert_eq!(health.state, health.reasons.iter().map(|reason| reason.state).max().unwrap_or(HealthState::Ok));
        health
            .reasons
            .into_iter()
            .map(|reason| format!("{} {}: {}", reason.code, reason.state.as_str(), reason.detail))
            .collect()
    }

    /// Each reason, in its words: an operator reads them at night.
    #[test]
    fn each_reason_says_what_is_and_what_to_do() {
        let age = |seconds| Duration::from_secs(seconds);
        let away = |facts: &mut Facts, owns| {
            facts.peers[0] = PeerFact { name: "b".to_owned(), is_up: false, down_for: Some(age(90)), owns };
        };
        let mut all = Vec::new();
        all.extend(found(|facts| (facts.is_active, facts.has_passed) = (false, false)));
        all.extend(found(|facts| {
            facts.has_passed = false;
            away(facts, 2048);
        }));
        all.extend(found(|facts| away(facts, 0)));
        all.extend(found(|facts| {
            facts.peers[0] = PeerFact { name: "b".to_owned(), is_up: false, down_for: None, owns: 1 }
        }));
        all.extend(found(|facts| facts.unknown = 7));
        all.extend(found(|facts| facts.forgotten = 7));
        all.extend(found(|facts| facts.untaken = vec![("b".to_owned(), age(10)), ("b".to_owned(), age(300))]));
        all.extend(found(|facts| facts.staged = vec![("b".to_owned(), age(9000))]));
        all.extend(found(|facts| {
            facts.moves = vec![("b".to_owned(), "copying", age(31)), ("b".to_owned(), "sealed", age(1))]
        }));
        all.extend(found(|facts| (facts.standing, facts.has_heirs) = (Standing::Leaving, false)));
        insta::assert_snapshot!(all.join("\n"));
    }

    #[test]
    fn what_heals_by_itself_in_a_moment_is_not_said() {
        let soon = Duration::from_secs(9);
        assert_eq!(found(|_| {}), Vec::<String>::new());
        let quiet = found(|facts| {
            facts.untaken = vec![("b".to_owned(), soon)];
            facts.staged = vec![("b".to_owned(), soon)];
            facts.moves = vec![("b".to_owned(), "copying", soon)];
            facts.standing = Standing::Leaving;
        });
        assert_eq!(quiet, Vec::<String>::new());
        assert_eq!(found(|facts| (facts.unknown, facts.up_for) = (4096, Duration::from_secs(1))), Vec::<String>::new());
    }
}
