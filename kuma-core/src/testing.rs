//! For the tests of services that embed Kuma. Behind the feature `testing`.
//!
//! - [`given`]: a command against a history, without a store. Events go through the same encoding, upcasters and `apply` as in one.
//! - [`TestStore`]: a store of its own for each test, gone afterwards. It is the same code as any other, on a temporary directory.
//! - [`Corpus`]: every event that was ever released still decodes.
//!
//! Everything here panics where a test has to fail.

// The panic is how a test learns of it.
#![allow(clippy::panic)]

mod corpus;
mod given;
mod test_store;

pub use corpus::Corpus;
pub use given::{Given, When, given};
pub use test_store::TestStore;
