//! What is said of a model.

use std::time::{Duration, Instant};

use handoff_model::{Liveness, Model, Verdict, check, counterexample, live};
use kuma_cluster::Safeguard;

/// Longer than any of them takes.
const LONG: Duration = Duration::from_secs(600);

/// It holds in all states.
#[track_caller]
pub(crate) fn holds(name: &str, model: Model) {
    let begin = Instant::now();
    match check(model, LONG) {
        Verdict::Holds(states) => println!("{name}: holds in {states} states, {:?}", begin.elapsed()),
        Verdict::Broken(..) => panic!("{name}: {:?}", counterexample(model)),
        other => panic!("{name}: {other:?}"),
    }
}

/// It does not, and the shortest way to there has so many steps. Another number is no mistake by itself: look at the way, and write the number down.
#[track_caller]
pub(crate) fn breaks(name: &str, steps: usize, model: Model) {
    let begin = Instant::now();
    match counterexample(model) {
        Some((what, way)) => {
            println!("{name}: after {} steps not \"{what}\", {:?}", way.len(), begin.elapsed());
            let way: Vec<String> = way.iter().map(|action| format!("{action:?}")).collect();
            assert_eq!(way.len(), steps, "{name}: not \"{what}\"\n{}", way.join("\n"));
        }
        None => panic!("{name}: nothing breaks"),
    }
}

/// From every state in which no more goes wrong, all gets to where it should be.
#[track_caller]
pub(crate) fn lives(name: &str, model: Model) {
    let begin = Instant::now();
    match live(Model { calms_down: true, ..model }, 3_000_000) {
        Liveness::Live(states) => println!("{name}: from {states} states, {:?}", begin.elapsed()),
        other => panic!("{name}: {other:#?}"),
    }
}

/// From some it does not.
#[track_caller]
pub(crate) fn sticks(name: &str, model: Model) {
    let liveness = live(Model { calms_down: true, ..model }, 3_000_000);
    assert!(matches!(liveness, Liveness::Stuck(..)), "{name}: {liveness:?}");
}

/// The same, without a safeguard.
pub(crate) fn without(model: Model, safeguard: Safeguard) -> Model {
    Model { safeguards: model.safeguards.without(safeguard), ..model }
}
