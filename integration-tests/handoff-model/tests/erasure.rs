//! What is said to be erased has its key nowhere, in every order of events, and each of the rules for it is needed.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{breaks, holds, lives, sticks, without};
use handoff_model::{Model, Mutant};
use kuma_cluster::Safeguard;

const THREE: Model = Model { commands: 0, crashes: 0, epochs: 2, transfers: 2, erases: true, ..Model::THREE };
const CRASH: Model = Model { crashes: 1, ..THREE };
const COPIES: Model = Model { copies: true, ..THREE };
const TWO: Model = Model { nodes: 2, ..THREE };
const RESTORE: Model = Model { restores: 1, transfers: 1, ..TWO };

#[test]
fn what_is_erased_has_a_key_nowhere() {
    holds("handoffs", THREE);
    holds("a command", Model { commands: 1, ..THREE });
    holds("a crash", CRASH);
    holds("rows that come ahead", COPIES);
}

#[test]
fn nor_on_a_disk_that_is_new_restored_or_wiped() {
    holds("one joins", Model { joiners: 1, transfers: 1, ..THREE });
    holds("two join at once", Model { joiners: 2, transfers: 0, ..THREE });
    holds("one joins, one crash", Model { joiners: 1, transfers: 1, crashes: 1, ..TWO });
    holds("one is restored", RESTORE);
    holds("one is restored, one crash", Model { crashes: 1, ..RESTORE });
    holds("one is wiped", Model { is_wiped: true, ..RESTORE });
}

/// The larger configurations, of some minutes.
#[test]
#[ignore = "takes minutes; run it after a change of the rules"]
fn it_holds_in_larger_configurations() {
    holds("three epochs", Model { epochs: 3, transfers: 3, ..THREE });
    holds("two crashes", Model { crashes: 2, ..THREE });
    holds("rows that come ahead, one crash", Model { crashes: 1, ..COPIES });
    holds("hints", Model { hints: true, ..THREE });
    holds("four nodes", Model { nodes: 4, ..THREE });
    holds("two join at once, one crash", Model { joiners: 2, transfers: 0, crashes: 1, ..THREE });
    holds("two join at once, a transfer", Model { joiners: 2, transfers: 1, ..THREE });
    holds("three, one is restored", Model { nodes: 3, ..RESTORE });
    holds("three, one is wiped", Model { nodes: 3, is_wiped: true, ..RESTORE });
    holds("restored, rows that come ahead", Model { copies: true, ..RESTORE });
    holds("three, one is wiped, one crash", Model { nodes: 3, is_wiped: true, crashes: 1, ..RESTORE });
    holds("restored, two transfers, one crash", Model { transfers: 2, crashes: 1, ..RESTORE });
}

#[test]
fn an_erasure_gets_done() {
    lives("handoffs", TWO);
    lives("a crash", Model { crashes: 1, ..TWO });
    lives("three nodes", Model { transfers: 1, ..THREE });
    lives("one joins", Model { joiners: 1, ..TWO });
    // Nothing is released to a disk that is gone: that takes a vote to heal.
    let wiped = Model { is_wiped: true, transfers: 0, ..RESTORE };
    lives("one is wiped", wiped);
    // Answers are forgotten in a crash, and the next owner has none.
    sticks("ErasureLeft", Model { mutant: Mutant::ErasureLeft, ..TWO });
    // The disk that was replaced will never answer.
    sticks("without JoinRetires", without(wiped, Safeguard::JoinRetires));
}

#[test]
fn every_safeguard_of_an_erasure_is_needed() {
    for (safeguard, steps, model) in [
        (Safeguard::TombstoneKeepsKeyOut, 9, COPIES),
        (Safeguard::ErasedOnEveryDisk, 5, THREE),
        (Safeguard::ShreddedAfterCommit, 9, CRASH),
        (Safeguard::ShredReachesStaged, 9, THREE),
        (Safeguard::ShredReachesReleased, 11, THREE),
        (Safeguard::EachShredIsCarriedOut, 10, CRASH),
        (Safeguard::TombstoneBeforeKey, 2, CRASH),
        (Safeguard::JoinTombstones, 9, RESTORE),
    ] {
        breaks(&format!("without {safeguard:?}"), steps, without(model, safeguard));
    }
}

#[test]
fn a_node_that_breaks_the_rules_around_them_is_caught() {
    // The entity cannot be read any more, and nothing says why.
    breaks("ErasureLeft", 2, Model { mutant: Mutant::ErasureLeft, ..CRASH });
    breaks("SealIgnoresErasure", 6, Model { mutant: Mutant::SealIgnoresErasure, ..THREE });
    breaks("JoinKeepsKeys", 9, Model { mutant: Mutant::JoinKeepsKeys, ..RESTORE });
    // The disk in its place has the tombstone from its joining.
    holds("AnswerOfTheNode", Model { mutant: Mutant::AnswerOfTheNode, ..RESTORE });
}

/// A new owner has the tombstones of what is erased in its copy for two reasons: it has kept them with the copy, and it keeps each once more when it goes
/// on with the erasure. One of them is enough.
#[test]
fn the_new_owner_has_the_tombstone_for_one_of_two_reasons() {
    holds("without CopyBringsTombstones", without(RESTORE, Safeguard::CopyBringsTombstones));
    let not_entombed = Model { mutant: Mutant::FoundNotEntombed, ..RESTORE };
    holds("FoundNotEntombed", not_entombed);
    breaks("neither", 14, without(not_entombed, Safeguard::CopyBringsTombstones));
}

/// An append may come after the seal if the release looks at the tail. So may an erasure: it is not begun while the slot is sealed.
#[test]
fn an_erasure_does_not_begin_while_the_slot_is_sealed() {
    holds("no drain", Model { mutant: Mutant::NoDrain, ..THREE });
}
