//! The example `ledger` of kuma-cluster, as a program that tests can start.

#[path = "../../../kuma-cluster/examples/ledger.rs"]
mod example;

fn main() -> anyhow::Result<()> {
    example::main()
}
