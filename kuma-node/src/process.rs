//! What the server has to do with its process: limits, signals, log, and whoever supervises it.

use std::{
    fmt, fs,
    future::Future,
    io::{self, IsTerminal},
    time::Duration,
};

use futures_util::{Stream, stream};
use rustix::process::{DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit};
use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

use crate::config::LogFormat;

/// Keeps keys that are in memory out of core dumps, and other processes of this user from reading it. Returns what could not be done.
#[must_use]
pub fn harden() -> Vec<String> {
    let no_core = setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) });
    // Beside the limit: a core that is piped into a program (systemd-coredump) is not bound by it.
    let not_dumpable = set_dumpable_behavior(DumpableBehavior::NotDumpable);
    let failed = |what: &str, error: rustix::io::Errno| {
        format!("{what} ({error}): a core dump would hold keys and events in clear")
    };
    let no_core = no_core.err().map(|error| failed("core dumps cannot be turned off", error));
    let not_dumpable = not_dumpable.err().map(|error| failed("the process cannot be made undumpable", error));
    no_core.into_iter().chain(not_dumpable).collect()
}

/// Raises the limit of open files to what may be had, and returns how many that is. Each connection is one, and each shard has several.
pub fn raise_file_limit() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    let limit = if setrlimit(Resource::Nofile, raised).is_ok() { raised } else { limit };
    limit.current.unwrap_or(u64::MAX)
}

/// Bytes of memory that the process has in use; none where that cannot be told.
pub fn memory() -> Option<u64> {
    // Not `statm`: it counts pages, whose size would have to be asked for.
    resident(&fs::read_to_string("/proc/self/status").ok()?)
}

fn resident(status: &str) -> Option<u64> {
    let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?.trim().strip_suffix("kB")?;
    kib.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// Why there is no log.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The directive is none.
    #[error("the log directive cannot be used; one is a level, or levels of modules, such as info,kuma_node=debug")]
    Directive(#[source] tracing_subscriber::filter::ParseError),
    /// This process has a log already.
    #[error("the log was set up twice")]
    Twice(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Writes what `directive` lets through to standard error; in colours only to a terminal.
///
/// # Errors
/// [`LogError`]
pub fn log_to_stderr(directive: &str, format: LogFormat) -> Result<(), LogError> {
    let filter = EnvFilter::try_new(directive).map_err(LogError::Directive)?;
    let has_colours = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(has_colours);
    match format {
        LogFormat::Text => log.try_init(),
        LogFormat::Json => log.json().flatten_event(true).try_init(),
    }
    .map_err(LogError::Twice)
}

/// What this program is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BuildInfo {
    /// The version of the server.
    pub version: &'static str,
    /// What it was built from: what `KUMA_BUILD` said when it was compiled (a commit), or "unknown".
    pub build: &'static str,
}

impl fmt::Display for BuildInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.version, self.build)
    }
}

/// What this program is. Whoever builds it says from which commit: a build that asked git would say something wrong as soon as the answer
/// is cached, and nothing where there is no git.
pub const fn build_info() -> BuildInfo {
    let build = match option_env!("KUMA_BUILD") {
        Some(build) if !build.is_empty() => build,
        _ => "unknown",
    };
    BuildInfo { version: env!("CARGO_PKG_VERSION"), build }
}

/// Tells the supervisor (systemd) that requests are taken. Nothing happens without one, as with the others.
pub fn notify_ready() {
    notify(&[NotifyState::Ready]);
}

/// Tells it that the server is on its way out.
pub fn notify_stopping() {
    notify(&[NotifyState::Stopping]);
}

/// Tells it that files are being read again; [`notify_ready`] says when that is done.
pub fn notify_reloading() {
    // `Type=notify-reload` wants the time with it, to tell this reload from an earlier one.
    match NotifyState::monotonic_usec_now() {
        Ok(now) => notify(&[NotifyState::Reloading, now]),
        Err(_) => notify(&[NotifyState::Reloading]),
    }
}

/// Tells it in words what the server is doing.
pub fn notify_status(status: &str) {
    notify(&[NotifyState::Status(status)]);
}

/// Tells it that the server is alive. To be called every [`watchdog_interval`], from where a server that hangs would not come by.
pub fn notify_alive() {
    notify(&[NotifyState::Watchdog]);
}

/// How often the supervisor wants to hear that the server is alive: twice as often as it gives up. None if it does not.
pub fn watchdog_interval() -> Option<Duration> {
    sd_notify::watchdog_enabled().map(|timeout| timeout / 2).filter(|interval| !interval.is_zero())
}

fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::debug!(%error, "the supervisor could not be told");
    }
}

/// Waits for SIGTERM or SIGINT, and says which it was. Both are caught from now on, not only once the future is polled: to be called
/// before anything that takes long. Call it again for a second signal.
///
/// # Errors
/// The signals cannot be caught.
pub fn shutdown_signal() -> io::Result<impl Future<Output = &'static str> + Send + 'static> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        }
    })
}

/// An item for each SIGHUP from now on; those that come close together may be one.
///
/// # Errors
/// The signal cannot be caught.
pub fn hangups() -> io::Result<impl Stream<Item = ()> + Send + Unpin + 'static> {
    let mut hangup = signal(SignalKind::hangup())?;
    Ok(stream::poll_fn(move |context| hangup.poll_recv(context)))
}

#[cfg(test)]
mod tests {
    use std::{os::unix::net::UnixDatagram, process::Command};

    use futures_util::StreamExt;
    use rustix::process::{Signal, getpid, kill_process};

    use super::*;

    #[test]
    fn a_hardened_process_leaves_no_core() {
        assert_eq!(harden(), Vec::<String>::new());
        assert_eq!(getrlimit(Resource::Core), Rlimit { current: Some(0), maximum: Some(0) });
        assert_eq!(rustix::process::dumpable_behavior().unwrap(), DumpableBehavior::NotDumpable);
        // And can still be measured.
        assert!(memory().unwrap() > 1 << 20);
    }

    #[test]
    fn as_many_files_as_may_be_had_can_be_opened() {
        let files = raise_file_limit();
        assert_eq!(Some(files), getrlimit(Resource::Nofile).maximum.or(Some(u64::MAX)));
    }

    #[test]
    fn memory_is_read_in_bytes() {
        assert_eq!(resident("Name:\tx\nVmRSS:\t    2048 kB\nVmData:\t 1 kB\n"), Some(2048 * 1024));
        assert_eq!(resident("Name:\tx\n"), None);
        assert_eq!(resident("VmRSS: much\n"), None);
    }

    #[test]
    fn a_build_always_says_something() {
        let info = build_info();
        assert_eq!(info.version, env!("CARGO_PKG_VERSION"));
        assert!(!info.build.is_empty() && info.to_string().starts_with(info.version));
    }

    #[test]
    fn a_bad_directive_is_refused() {
        assert!(matches!(log_to_stderr("kuma=loud", LogFormat::Text), Err(LogError::Directive(_))));
    }

    #[tokio::test]
    async fn signals_that_come_before_anybody_waits_are_not_lost() {
        let mut hangups = hangups().unwrap();
        let shutdown = shutdown_signal().unwrap();
        kill_process(getpid(), Signal::HUP).unwrap();
        kill_process(getpid(), Signal::TERM).unwrap();
        assert_eq!(hangups.next().await, Some(()));
        assert_eq!(shutdown.await, "SIGTERM");
    }

    /// In a process of its own, because the supervisor is known by variables: the test starts itself.
    #[test]
    fn the_supervisor_is_told() {
        if std::env::var_os("NOTIFY_SOCKET").is_some() {
            assert_eq!(watchdog_interval(), Some(Duration::from_secs(5)));
            notify_ready();
            notify_reloading();
            notify_status("well");
            notify_alive();
            notify_stopping();
            return;
        }
        assert_eq!(watchdog_interval(), None);
        notify_ready();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "process::tests::the_supervisor_is_told"])
            .envs([("NOTIFY_SOCKET", path.as_os_str()), ("WATCHDOG_USEC", "10000000".as_ref())])
            .output()
            .unwrap();
        assert!(child.status.success(), "{child:?}");
        let told = || {
            let mut buffer = [0; 256];
            let length = socket.recv(&mut buffer).unwrap();
            String::from_utf8(buffer[..length].to_vec()).unwrap()
        };
        assert_eq!(told(), "READY=1\n");
        assert!(told().starts_with("RELOADING=1\nMONOTONIC_USEC="));
        assert_eq!([told(), told(), told()], ["STATUS=well\n", "WATCHDOG=1\n", "STOPPING=1\n"]);
    }
}
