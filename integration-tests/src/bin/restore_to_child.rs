//! The process that `tests/store/restore_to.rs` kills: restores an entity to an earlier version, and dies at a named place in that. Called as
//! `restore_to_child DIRECTORY PLACE`.
// This is test code: a failed unwrap ends the child, which the parent takes for the failure that it is.
#![allow(clippy::unwrap_used, clippy::panic)]

use integration_tests::{Probe, TestAppend, options};
use kuma_core::{Kuma, Reason, Version};
use rustix::process::{Signal, getpid, kill_process};

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    let mut arguments = std::env::args().skip(1);
    let (directory, place) = (arguments.next().unwrap(), arguments.next().unwrap());
    let kuma = Kuma::start(options(directory.as_ref()).snapshot_every(2, 1 << 20)).await.unwrap();
    let ann = kuma.entity::<Probe>("ann");
    while ann.read().await.unwrap().version() < Version(8) {
        let append = TestAppend { id: ann.read().await.unwrap().version().0, events: 2, bytes: 300 };
        ann.append_all(append.events()).await.unwrap();
    }
    fail::cfg_callback(place, || {
        kill_process(getpid(), Signal::KILL).unwrap();
        // It takes a moment; nothing is done any more.
        std::thread::park();
    })
    .unwrap();
    ann.restore_to(Version(4), Reason::new("a test")).await.unwrap();
    panic!("it was to die before");
}
