//! The example `kms`, as a program that tests can start: `tests/store/kms.rs` runs its `serve`.
#![allow(unused)] // the tests use the client, the program all the rest

#[path = "../../../kuma-core/examples/kms.rs"]
mod example;

fn main() -> std::process::ExitCode {
    example::main()
}
