//! A service with accounts, as any number of processes: each embeds a node, and serves every account wherever it is.
//!
//! ```sh
//! (umask 077; openssl rand -hex 32 >cookie)
//! cargo run --example ledger -p kuma-cluster -- --data a --cookie cookie --listen 127.0.0.1:4861 --found
//! cargo run --example ledger -p kuma-cluster -- --data b --cookie cookie --listen 127.0.0.1:4862 --seed 127.0.0.1:4861
//! ```
//!
//! Then type into either of them: `deposit alice 100`, `withdraw alice 30`, `show alice`, `nodes`, `leave`. It ends with its input.
#![allow(clippy::print_stdout)]

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::{Context, Result, bail};
use clap::Parser;
use kuma_cluster::{Cookie, Node, NodeOptions};
use kuma_core::{Command, Entity, ExecuteError};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, BufReader};

#[derive(Default, Clone, Serialize, Deserialize)]
struct Account {
    balance: i64,
}

#[derive(Serialize, Deserialize)]
enum AccountEvent {
    Deposited { amount: i64 },
    Withdrawn { amount: i64 },
}

impl Entity for Account {
    const KIND: &'static str = "account";
    type Event = AccountEvent;

    fn apply(&mut self, event: &AccountEvent) {
        match event {
            AccountEvent::Deposited { amount } => self.balance += amount,
            AccountEvent::Withdrawn { amount } => self.balance -= amount,
        }
    }
}

/// Decided by the node that owns the account, on its newest state. It travels there, and so does the answer.
#[derive(Serialize, Deserialize)]
struct Withdraw {
    amount: i64,
}

#[derive(Debug, thiserror::Error, Serialize, Deserialize)]
#[error("short of {missing}")]
struct Overdrawn {
    missing: i64,
}

impl Command<Account> for Withdraw {
    type Rejection = Overdrawn;

    fn decide(self, account: &Account) -> Result<Vec<AccountEvent>, Overdrawn> {
        match account.balance - self.amount {
            left if left < 0 => Err(Overdrawn { missing: -left }),
            _ => Ok(vec![AccountEvent::Withdrawn { amount: self.amount }]),
        }
    }
}

#[derive(Parser)]
struct Arguments {
    /// Where this node keeps what it owns.
    #[arg(long)]
    data: PathBuf,
    /// The file with the cluster's secret.
    #[arg(long)]
    cookie: PathBuf,
    /// Where this node listens for others.
    #[arg(long, default_value = "127.0.0.1:4860")]
    listen: SocketAddr,
    /// A node of the cluster to be joined.
    #[arg(long)]
    seed: Vec<String>,
    /// This is the first node of a new cluster.
    #[arg(long)]
    found: bool,
}

#[tokio::main]
pub(crate) async fn main() -> Result<()> {
    let arguments = Arguments::parse();
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_env_filter("kuma=info").init();

    // As a store that is alone has `Options`, a node has these. The two lines that make it one of several are the last.
    let options = NodeOptions::new(arguments.data, Cookie::load_file(&arguments.cookie)?)
        .context("ledger")
        .entity::<Account>()
        .command::<Account, Withdraw>()
        .listen(arguments.listen)
        .seed_nodes(arguments.seed);
    let node = Node::start(if arguments.found { options.found() } else { options }).await?;
    println!("listening for other nodes at {}", node.address());

    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    while let Some(line) = lines.next_line().await? {
        match answer(&node, line.trim()).await {
            Ok(said) => println!("{said}"),
            Err(error) => println!("{error:#}"),
        }
    }
    node.shutdown().await;
    Ok(())
}

async fn answer(node: &Node, line: &str) -> Result<String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    match words[..] {
        ["deposit", account, amount] => {
            let amount = amount.parse().context("the amount")?;
            let version = node.entity::<Account>(account).append(AccountEvent::Deposited { amount }).await?;
            Ok(format!("version {version}"))
        }
        ["withdraw", account, amount] => {
            let amount = amount.parse().context("the amount")?;
            match node.entity::<Account>(account).execute(Withdraw { amount }).await {
                Ok(done) => Ok(format!("version {}", done.version)),
                Err(ExecuteError::Rejected(rejection)) => Ok(format!("rejected: {rejection}")),
                Err(ExecuteError::Failed(error)) => Err(error.into()),
            }
        }
        ["show", account] => {
            let (state, version) = node.entity::<Account>(account).read().await?;
            Ok(format!("balance {} at version {version}", state.balance))
        }
        ["nodes"] => {
            let members = node.members().into_iter().map(|member| {
                let how = if member.is_up { "up" } else { "down" };
                format!("{} {how}: {} of {} slots", member.name, member.owns, member.wished)
            });
            Ok(members.collect::<Vec<_>>().join("\n"))
        }
        // Before an upgrade, or for good: its slots go to the others, one at a time, while they are in use.
        ["leave"] => {
            node.drain().await?;
            while node.owned() > 0 {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Ok("it owns nothing any more".to_owned())
        }
        _ => bail!("deposit ACCOUNT AMOUNT, withdraw ACCOUNT AMOUNT, show ACCOUNT, nodes, or leave"),
    }
}
