//! The embedded store on one machine. One program: linking each file by itself was most of a build.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/inside.rs"]
mod inside;
#[path = "../common/traces.rs"]
mod traces;

mod backup;
mod bad_input;
mod commands;
mod crash;
mod durable;
mod erase_crash;
mod erase_faults;
mod erasure;
mod evolution;
mod export;
mod faults_in_user_code;
mod flights;
mod guide;
mod import;
mod index;
mod kind_options;
mod kms;
mod master_key;
mod model;
mod passivation;
mod pinned;
mod projection_crash;
mod projection_faults;
mod projections;
mod restore_to;
mod retries;
mod scrub;
mod single_writer;
mod snapshots;
mod speculation;
mod subscriptions;
mod time_travel;
