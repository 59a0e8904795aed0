//! The rules of the handoff hold in every order of events, and each of them is needed.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{breaks, holds, lives, sticks, without};
use handoff_model::{Model, Mutant};
use kuma_cluster::{Safeguard, Safeguards};

const SMALL: Model = Model { epochs: 2, transfers: 2, ..Model::THREE };
const COPIES: Model = Model { copies: true, ..SMALL };
const HINTS: Model = Model { hints: true, ..Model::THREE };
const JOIN: Model = Model { commands: 0, crashes: 0, joiners: 2, epochs: 2, transfers: 1, ..Model::THREE };
const RESTORE: Model = Model { commands: 0, crashes: 0, restores: 1, epochs: 2, transfers: 2, ..Model::THREE };
const WIPE: Model = Model { is_wiped: true, ..RESTORE };

#[test]
fn one_disk_owns_the_slot_and_nothing_is_lost_or_done_twice() {
    holds("two commands", Model { commands: 2, ..SMALL });
    holds("three epochs", Model::THREE);
}

#[test]
fn it_holds_with_rows_that_come_ahead() {
    holds("copies", COPIES);
}

#[test]
fn it_holds_with_owners_that_tell_of_themselves() {
    holds("hints", Model { hints: true, ..SMALL });
}

#[test]
fn it_holds_with_new_restored_and_wiped_disks() {
    holds("two join at once", JOIN);
    holds("one is restored", Model { transfers: 1, ..RESTORE });
    holds("one is wiped", WIPE);
}

#[test]
fn nothing_gets_stuck_that_nobody_heals() {
    let quiet = Model { commands: 0, crashes: 0, ..SMALL };
    lives("transfers", quiet);
    lives("a command and a crash", Model { commands: 1, crashes: 1, ..quiet });
    lives("three epochs", Model { epochs: 3, transfers: 3, ..quiet });
    lives("two join at once", Model { joiners: 2, transfers: 1, ..quiet });
    // A giver that has crashed does not know any more that it has to say so: a prepared copy is kept for ever, and nobody asks.
    sticks("NeverAsks", Model { mutant: Mutant::NeverAsks, crashes: 1, ..quiet });
}

/// The larger configurations, of some minutes.
#[test]
#[ignore = "takes minutes; run it after a change of the rules"]
fn it_holds_in_larger_configurations() {
    holds("two commands, three epochs", Model { commands: 2, ..Model::THREE });
    holds("four epochs", Model { epochs: 4, transfers: 4, ..Model::THREE });
    holds("two crashes", Model { transfers: 4, crashes: 2, ..Model::THREE });
    holds("four nodes", Model { nodes: 4, crashes: 0, ..Model::THREE });
    holds("copies", Model { copies: true, ..Model::THREE });
    holds("hints", HINTS);
    holds("two join four", Model { nodes: 4, ..JOIN });
    holds("restored", RESTORE);
    holds("restored, one command", Model { commands: 1, transfers: 1, ..RESTORE });
}

#[test]
fn every_safeguard_is_needed() {
    let wide = Model { commands: 2, epochs: 4, transfers: 4, ..Model::THREE };
    for (safeguard, steps) in [
        (Safeguard::ReleaseAfterReady, 2),
        (Safeguard::ReadyOfThisTransfer, 6),
        (Safeguard::NoAbortWhileReleasing, 6),
        (Safeguard::GrantAfterCommit, 4),
        (Safeguard::StatusOfTheToken, 6),
        (Safeguard::NewEpochForEachOwner, 4),
        (Safeguard::ReadsEndWithRelease, 7),
        (Safeguard::FloorRefuses, 6),
        (Safeguard::StagedIsNotReplaced, 7),
        (Safeguard::ReadyAfterCommit, 4),
        (Safeguard::TakenAfterCommit, 8),
    ] {
        breaks(&format!("without {safeguard:?}"), steps, without(wide, safeguard));
    }
    let long_way = Model { crashes: 0, epochs: 4, transfers: 4, ..Model::THREE };
    breaks("without TakenOfThisTransfer", 17, without(long_way, Safeguard::TakenOfThisTransfer));
    let copies = Model { commands: 2, copies: true, crashes: 0, ..Model::THREE };
    breaks("without StagedIsKeptAsItIs", 11, without(copies, Safeguard::StagedIsKeptAsItIs));
    breaks(
        "without HintOfNoLowerEpoch",
        6,
        without(Model { epochs: 4, transfers: 4, ..HINTS }, Safeguard::HintOfNoLowerEpoch),
    );
    for (safeguard, steps) in [(Safeguard::JoinedBeforeReady, 6), (Safeguard::JoinClosure, 6), (Safeguard::JoinAll, 6)]
    {
        breaks(&format!("without {safeguard:?}"), steps, without(Model { epochs: 3, transfers: 3, ..JOIN }, safeguard));
    }
}

/// Two of them stand for each other: either can go, and not both.
#[test]
fn safeguards_that_stand_for_each_other_are_needed_together() {
    let two = |one, other| Safeguards::ALL.without(one).without(other);
    let digest = two(Safeguard::CopyIsReadBack, Safeguard::ReadyWithEqualDigest).without(Safeguard::DigestOfTheCopy);
    breaks("no digest at all", 7, Model { copies: true, safeguards: digest, ..Model::THREE });
    for safeguard in
        [Safeguard::ReadyWithEqualDigest, Safeguard::GrantOfThisTransfer, Safeguard::ReleaseOfWhatWasSealed]
    {
        holds(&format!("without {safeguard:?}"), without(SMALL, safeguard));
    }
    // A restored disk has another id, so that no message of its former life counts. Votes will need the floors.
    for safeguard in [Safeguard::JoinFloors, Safeguard::JoinRetires] {
        holds(&format!("restored, without {safeguard:?}"), without(RESTORE, safeguard));
    }
    let no_drain = Model { mutant: Mutant::NoDrain, ..SMALL };
    holds("no drain", no_drain);
    breaks(
        "no drain, and no look at the tail",
        6,
        without(Model { commands: 2, ..no_drain }, Safeguard::ReleaseOfWhatWasSealed),
    );
}

#[test]
fn a_node_that_breaks_the_rules_around_them_is_caught() {
    let wide = Model { commands: 2, epochs: 4, transfers: 4, ..Model::THREE };
    for (mutant, steps) in [
        (Mutant::ClaimOnAbsent, 1),
        (Mutant::TransferDerived, 7),
        (Mutant::NoDrainNoTokenInAppend, 6),
        (Mutant::KeysNotMoved, 9),
        (Mutant::KeysInMemory, 5),
        (Mutant::StagedDropped, 5),
        (Mutant::GrantPresumed, 3),
        (Mutant::ServesAfterRelease, 6),
        (Mutant::RowsDeletedAtRelease, 6),
    ] {
        breaks(&format!("{mutant:?}"), steps, Model { mutant, ..wide });
    }
    let long_way = Model { commands: 0, crashes: 0, epochs: 4, transfers: 4, ..Model::THREE };
    breaks("PointerDeleted", 13, Model { mutant: Mutant::PointerDeleted, ..long_way });
    let copies = without(Model { mutant: Mutant::UncommittedCopied, ..COPIES }, Safeguard::CopyIsReadBack);
    breaks("UncommittedCopied", 7, copies);
    breaks("RestoreOwns", 12, Model { mutant: Mutant::RestoreOwns, ..RESTORE });
    breaks("SameDisk, restored", 7, Model { mutant: Mutant::SameDisk, ..RESTORE });
    breaks("SameDisk, wiped", 13, Model { mutant: Mutant::SameDisk, epochs: 3, transfers: 3, ..WIPE });
    holds("NoTokenInAppend", Model { mutant: Mutant::NoTokenInAppend, ..SMALL });
}
