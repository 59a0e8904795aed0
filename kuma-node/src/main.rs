//! The server's binary: [`kuma_node::cli`] on a runtime.

use std::process::ExitCode;

/// glibc keeps what was freed, and is slow at passing memory between threads, which is what an append does.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: the process cannot start its threads: {error}");
            return ExitCode::FAILURE;
        }
    };
    let code = runtime.block_on(kuma_node::cli::main());
    // A thread that waits for standard input would be waited for.
    runtime.shutdown_background();
    code
}
