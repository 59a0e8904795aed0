//! The process that `tests/store/backup.rs` kills in the middle of a backup or a restore.
//!
//! ```text
//! backup_child backup DATA BACKUP          opens the store, says R, makes the backup, says D
//! backup_child restore BACKUP KEYS DATA    says R, restores, says D
//! ```
// This is test code: a failed unwrap ends the child, which the parent takes for the failure that it is.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::io::Write;

use integration_tests::options;
use kuma_core::{Kuma, MasterKeySource, Restore};

fn say(line: &str) {
    // Standard output is line-buffered: a line with its end is one write.
    std::io::stdout().lock().write_all(format!("{line}\n").as_bytes()).unwrap();
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["backup", data, backup] => {
            let kuma = Kuma::start(options(data.as_ref())).await.unwrap();
            say("R");
            kuma.backup(backup).run(|_| ()).await.unwrap();
            say("D");
            kuma.shutdown().await;
        }
        ["restore", backup, keys, data, master] => {
            say("R");
            let options = options(data.as_ref()).master_key(MasterKeySource::File(master.into()));
            Restore::new(backup).keys(keys).run(options, |_| ()).await.unwrap();
            say("D");
        }
        _ => panic!("{arguments:?}"),
    }
}
