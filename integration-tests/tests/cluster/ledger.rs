//! The example `ledger`, as two processes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{os::unix::fs::OpenOptionsExt, path::Path, process::Stdio, time::Duration};

use crate::common::directory;
use kuma_cluster::Cookie;
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
};

/// Longer than anything takes.
const LONG: Duration = Duration::from_secs(120);

struct Ledger {
    child: Child,
    questions: Option<ChildStdin>,
    answers: Lines<BufReader<ChildStdout>>,
    address: String,
}

impl Ledger {
    async fn start(data: &Path, cookie: &Path, how: &[&str]) -> Ledger {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ledger"));
        command.arg("--data").arg(data).arg("--cookie").arg(cookie).args(["--listen", "127.0.0.1:0"]).args(how);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
        let mut child = command.spawn().unwrap();
        let mut answers = BufReader::new(child.stdout.take().unwrap()).lines();
        let first = tokio::time::timeout(LONG, answers.next_line()).await.unwrap().unwrap().unwrap();
        let address = first.rsplit(' ').next().unwrap().to_owned();
        Ledger { questions: child.stdin.take(), child, answers, address }
    }

    async fn ask(&mut self, line: &str) -> String {
        self.questions.as_mut().unwrap().write_all(format!("{line}\n").as_bytes()).await.unwrap();
        tokio::time::timeout(LONG, self.answers.next_line()).await.unwrap().unwrap().unwrap()
    }

    async fn stop(mut self) {
        drop(self.questions.take());
        let status = tokio::time::timeout(LONG, self.child.wait()).await.unwrap().unwrap();
        assert!(status.success(), "{status}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_of_two_processes_serves_every_account_at_both() {
    let dir = directory();
    let cookie = dir.path().join("cookie");
    let mut options = std::fs::File::options();
    let file = options.write(true).create_new(true).mode(0o600).open(&cookie).unwrap();
    std::io::Write::write_all(&mut &file, Cookie::generate().unwrap().to_text().as_bytes()).unwrap();
    let mut one = Ledger::start(&dir.path().join("a"), &cookie, &["--found"]).await;
    let seed = one.address.clone();
    let mut two = Ledger::start(&dir.path().join("b"), &cookie, &["--seed", &seed]).await;
    for number in 0..10 {
        let account = format!("account-{number}");
        assert_eq!(one.ask(&format!("deposit {account} 100")).await, "version 1");
        assert_eq!(two.ask(&format!("withdraw {account} 30")).await, "version 2");
        assert_eq!(one.ask(&format!("withdraw {account} 100")).await, "rejected: short of 30");
        assert_eq!(two.ask(&format!("show {account}")).await, "balance 70 at version 2");
    }
    assert_eq!(two.ask("leave").await, "it owns nothing any more");
    two.stop().await;
    for number in 0..10 {
        assert_eq!(one.ask(&format!("show account-{number}")).await, "balance 70 at version 2");
    }
    one.stop().await;
}
