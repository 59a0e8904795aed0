//! Disks that fail: full, damaged, without power. One program: linking each file by itself was most of a build.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../common/mod.rs"]
mod common;

mod bit_rot;
mod disk_full;
mod nth_failure;
mod power_loss;
