//! Several nodes. One program: linking each file by itself was most of a build.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../common/mod.rs"]
mod common;

mod bank;
mod durable;
mod erase;
mod faults;
mod gate;
mod handoff_crash;
mod ledger;
mod members;
mod nodes;
mod operate;
mod processes;
mod projections;
mod slots;
mod strangers;
mod subscribe;
mod unreachable;
