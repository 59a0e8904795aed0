//! The table of settings: the only place that knows their names, defaults and bounds.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use kuma_core::Durability;

use super::{
    Config, LogFormat,
    text::{bytes, duration, number, switch, word},
};

/// One setting.
pub(super) struct Definition {
    /// Its key in the file. The flag has dashes, the variable is in capitals behind `KUMA_`.
    pub(super) name: &'static str,
    /// What its value is, as `--help` calls it.
    pub(super) value: &'static str,
    /// What it is for.
    pub(super) help: &'static str,
    /// What holds if nothing is said.
    pub(super) default: Fallback,
    /// Where its value goes; otherwise what is allowed.
    pub(super) set: fn(&mut Draft, &str) -> Result<(), String>,
}

/// What holds if nothing is said.
#[derive(Clone, Copy)]
pub(super) enum Fallback {
    /// This value.
    Value(&'static str),
    /// It is found out, as these words say; with what was found out.
    Found(&'static str, fn(&Config) -> Option<String>),
}

/// A configuration in the making: TLS needs two settings at once.
#[derive(Default)]
pub(super) struct Draft {
    pub(super) config: Config,
    pub(super) tls_cert: Option<PathBuf>,
    pub(super) tls_key: Option<PathBuf>,
}

impl Definition {
    /// The flag, without its dashes in front.
    pub(super) fn flag(&self) -> String {
        self.name.replace('_', "-")
    }

    /// Whether it may be given more than once, or as a list; commas part what is given in one.
    pub(super) fn is_list(&self) -> bool {
        self.value == "HOST:PORT,..."
    }

    /// Whether the flag alone says "true".
    pub(super) fn is_switch(&self) -> bool {
        self.value == "BOOL"
    }

    /// The other name of it.
    pub(super) fn other_name(&self) -> Option<&'static str> {
        OTHER_NAMES.into_iter().find(|(_, name)| *name == self.name).map(|(other, _)| other)
    }

    /// The environment variable.
    pub(super) fn variable(&self) -> String {
        format!("KUMA_{}", self.name.to_uppercase())
    }
}

/// Names under which a setting is known as well: those of the library's options.
pub(super) const OTHER_NAMES: [(&str, &str); 2] = [("data_dir", "data"), ("seed_nodes", "seed")];

/// The setting with this name, or one that has it as well.
pub(super) fn find(name: &str) -> Option<&'static Definition> {
    let name = OTHER_NAMES.into_iter().find(|(other, _)| *other == name).map_or(name, |(_, name)| name);
    SETTINGS.iter().find(|setting| setting.name == name)
}

const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_secs(3600);
/// Timeouts behind which a silent client is let go: beyond this they protect nobody.
const SILENCE_MAX: Duration = Duration::from_secs(300);
/// For entities: beyond it none ever leaves memory.
pub(super) const IDLE_MAX: Duration = Duration::from_secs(30 * 24 * 3600);
/// Of anything that is counted: beyond it there is no limit in effect.
const AT_ONCE_MAX: u64 = 1_000_000;

fn path(text: &str) -> Result<PathBuf, String> {
    if text.is_empty() { Err("the name of a file or directory".to_owned()) } else { Ok(text.into()) }
}

fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| "an IP address and a port, such as 127.0.0.1:4870 or [::]:4870".to_owned())
}

fn name(text: &str) -> Result<String, String> {
    if (1..=128).contains(&text.len()) { Ok(text.to_owned()) } else { Err("a name of 1 to 128 bytes".to_owned()) }
}

fn node_name(text: &str) -> Result<String, String> {
    let is_ok = (1..=64).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'));
    if is_ok { Ok(text.to_owned()) } else { Err("1 to 64 letters, digits, '-', '_' and '.'".to_owned()) }
}

fn seeds(text: &str) -> Result<Vec<String>, String> {
    let seeds: Vec<String> = text.split(',').map(|seed| seed.trim().to_owned()).collect();
    let is_ok =
        |seed: &String| (1..=300).contains(&seed.len()) && !seed.contains(|c: char| c.is_whitespace() || c == '/');
    match seeds.iter().all(is_ok) && seeds.len() <= 64 {
        true => Ok(seeds),
        false => {
            Err("up to 64 addresses, such as 10.0.0.1:4860, db1.example or kuma@10.0.0.1, with commas between them"
                .to_owned())
        }
    }
}

fn host_and_port(text: &str) -> Result<String, String> {
    let is_ok = text.rsplit_once(':').is_some_and(|(host, port)| {
        !host.is_empty()
            && !host.contains(|c: char| c.is_whitespace() || c == '/')
            && port.parse::<u16>().is_ok_and(|port| port > 0)
    });
    if is_ok && text.len() <= 300 {
        Ok(text.to_owned())
    } else {
        Err("a host and a port, such as 10.0.0.1:4860 or db1.example:4860".to_owned())
    }
}

fn directive(text: &str) -> Result<String, String> {
    let is_ok = !text.is_empty() && text.parse::<tracing_subscriber::EnvFilter>().is_ok();
    let allowed = "a level (error, warn, info, debug, trace, off), or levels of modules, such as info,kuma_node=debug";
    if is_ok { Ok(text.to_owned()) } else { Err(allowed.to_owned()) }
}

fn display(path: PathBuf) -> Option<String> {
    Some(path.display().to_string())
}

/// A definition: name, value's name, default, help, and where the value goes.
macro_rules! setting {
    ($name:literal $value:literal = $default:expr, $help:literal, |$draft:ident, $text:ident| $place:expr => $parsed:expr) => {
        Definition {
            name: $name,
            value: $value,
            help: $help,
            default: $default,
            set: |$draft, $text| {
                $place = $parsed;
                Ok(())
            },
        }
    };
}

use Fallback::{Found, Value};

/// All settings, in the order in which they are shown.
#[rustfmt::skip]
pub(super) static SETTINGS: &[Definition] = &[
    setting!("data" "DIR" = Value("./data"), "The store's directory; made if it does not exist",
        |draft, text| draft.config.data => path(text)?),
    setting!("context" "NAME" = Value("kuma"), "The store's name, kept with its data: a directory of another name is refused",
        |draft, text| draft.config.context => name(text)?),
    setting!("shards" "N" = Found("2 a core, from 4 to 16", |_| None), "How many files a new store gets; fixed when it is made",
        |draft, text| draft.config.shards => Some(number(text, 1..=256)? as u16)),
    setting!("master_key_file" "FILE" = Found("master.key in the data directory", |config| display(config.master_key_file())),
        "The file with the master key. Keep a copy elsewhere: nothing can be read without it",
        |draft, text| draft.config.master_key_file => Some(path(text)?)),
    setting!("durability" "MODE" = Value("full"), "\"full\": what was acknowledged survives power loss; \"normal\": only the end of the process",
        |draft, text| draft.config.durability => word(text, &[("full", Durability::Full), ("normal", Durability::Normal)])?),
    setting!("memory_budget" "SIZE" = Value("1GiB"), "About how much memory live entities may take",
        |draft, text| draft.config.memory_budget => bytes(text, 1 << 20..=1 << 50)? as usize),
    setting!("idle_timeout" "DURATION" = Value("5m"), "An entity that was not used for this long leaves memory",
        |draft, text| draft.config.idle_timeout => duration(text, SECOND..=IDLE_MAX)?),
    setting!("scrub_bytes_per_second" "SIZE" = Value("1MiB"), "How fast stored commits are verified in the background, a second; 0 turns it off",
        |draft, text| draft.config.scrub_bytes_per_second => bytes(text, 0..=1 << 40)?),
    setting!("projections_dir" "DIR" = Found("no projections", |_| None), "The directory with the SQL files of projections",
        |draft, text| draft.config.projections_dir => Some(path(text)?)),
    setting!("backup_dir" "DIR" = Found("the data directory's name with -backups behind it", |config| display(config.backup_dir())),
        "Backups that are asked for over HTTP are written below it",
        |draft, text| draft.config.backup_dir => Some(path(text)?)),
    setting!("listen" "ADDRESS" = Value("127.0.0.1:4870"), "Where requests are taken; port 0 takes one that is free. Needs tokens unless it is a loopback address",
        |draft, text| draft.config.listen => address(text)?),
    setting!("tokens_file" "FILE" = Found("tokens.json in the data directory", |config| display(config.tokens_file())),
        "The file with the hashes of tokens",
        |draft, text| draft.config.tokens_file => Some(path(text)?)),
    setting!("tls_cert" "FILE" = Found("plain HTTP", |_| None), "The certificate chain, PEM; needs tls_key",
        |draft, text| draft.tls_cert => Some(path(text)?)),
    setting!("tls_key" "FILE" = Found("plain HTTP", |_| None), "The certificate's private key, PEM; needs tls_cert",
        |draft, text| draft.tls_key => Some(path(text)?)),
    setting!("cookie_file" "FILE" = Found("in no cluster", |_| None), "The file with the cluster's secret, which `kuma-node cookie` makes; with it the node is in a cluster",
        |draft, text| draft.config.cookie_file => Some(path(text)?)),
    setting!("seed" "HOST:PORT,..." = Found("none", |_| None), "A node of the cluster that is joined, any of them; may be given more than once",
        |draft, text| draft.config.seeds => seeds(text)?),
    setting!("found" "BOOL" = Value("false"), "This is the first node of a new cluster; needed once",
        |draft, text| draft.config.found => switch(text)?),
    setting!("cluster_listen" "ADDRESS" = Found("127.0.0.1:4860 in a cluster", |config| config.cluster_listen().map(|address| address.to_string())),
        "Where other nodes are listened for; links are encrypted, and nobody without the cookie gets in",
        |draft, text| draft.config.cluster_listen => Some(address(text)?)),
    setting!("cluster_advertise" "HOST:PORT" = Found("where the node listens for others", |_| None), "Where other nodes reach this one",
        |draft, text| draft.config.cluster_advertise => Some(host_and_port(text)?)),
    setting!("node_name" "NAME" = Found("where other nodes reach it", |_| None), "What people call the node; no two of a cluster have the same",
        |draft, text| draft.config.node_name => Some(node_name(text)?)),
    setting!("log" "DIRECTIVE" = Value("info"), "What is logged: a level, or levels of modules, such as info,kuma_node=debug",
        |draft, text| draft.config.log => directive(text)?),
    setting!("log_format" "FORMAT" = Value("text"), "How log lines are written to standard error: \"text\" or \"json\"",
        |draft, text| draft.config.log_format => word(text, &[("text", LogFormat::Text), ("json", LogFormat::Json)])?),
    setting!("access_log" "BOOL" = Value("true"), "Whether each request is logged",
        |draft, text| draft.config.access_log => switch(text)?),
    setting!("body_bytes_max" "SIZE" = Value("16MiB"), "The largest body of a request, streams apart",
        |draft, text| draft.config.body_bytes_max => bytes(text, 1 << 10..=1 << 30)? as usize),
    setting!("body_memory_max" "SIZE" = Value("256MiB"), "How much of such bodies may be in memory at once",
        |draft, text| draft.config.body_memory_max => bytes(text, 1 << 10..=1 << 40)? as usize),
    setting!("headers_max" "N" = Value("100"), "How many headers a request may have",
        |draft, text| draft.config.headers_max => number(text, 10..=10_000)? as usize),
    // hyper panics below 8 KiB.
    setting!("header_bytes_max" "SIZE" = Value("64KiB"), "How large all of them may be together",
        |draft, text| draft.config.header_bytes_max => bytes(text, 8 << 10..=1 << 20)? as usize),
    setting!("header_timeout" "DURATION" = Value("30s"), "Within this time the headers must have come; also how long an idle connection is kept",
        |draft, text| draft.config.header_timeout => duration(text, SECOND..=SILENCE_MAX)?),
    setting!("request_timeout" "DURATION" = Value("30s"), "Within this time a request must be answered, streams apart",
        |draft, text| draft.config.request_timeout => duration(text, SECOND..=HOUR)?),
    setting!("body_idle_timeout" "DURATION" = Value("30s"), "Within this time more of a body must have come",
        |draft, text| draft.config.body_idle_timeout => duration(text, SECOND..=SILENCE_MAX)?),
    setting!("connections_max" "N" = Value("10000"), "How many connections there may be at once",
        |draft, text| draft.config.connections_max => number(text, 1..=AT_ONCE_MAX)? as usize),
    setting!("requests_max" "N" = Value("4096"), "How many requests there may be at once, streams apart",
        |draft, text| draft.config.requests_max => number(text, 1..=AT_ONCE_MAX)? as usize),
    setting!("stream_in_flight_max" "N" = Value("4096"), "How many appends of one stream may be on their way",
        |draft, text| draft.config.stream_in_flight_max => number(text, 1..=AT_ONCE_MAX)? as usize),
    setting!("streams_max" "N" = Value("256"), "How many streams of appends, imports and exports there may be at once",
        |draft, text| draft.config.streams_max => number(text, 1..=AT_ONCE_MAX)? as usize),
    setting!("subscriptions_max" "N" = Value("256"), "How many subscriptions there may be at once",
        |draft, text| draft.config.subscriptions_max => number(text, 1..=AT_ONCE_MAX)? as usize),
    setting!("shutdown_timeout" "DURATION" = Value("30s"), "How long requests may take to finish when the server stops",
        |draft, text| draft.config.shutdown_timeout => duration(text, Duration::ZERO..=HOUR)?),
];

#[cfg(test)]
mod tests {
    use super::*;

    /// The table and `Config::default` must not drift apart.
    #[test]
    fn the_defaults_of_the_table_are_those_of_the_configuration() {
        let mut draft = Draft::default();
        for setting in SETTINGS {
            if let Value(text) = setting.default {
                (setting.set)(&mut draft, text).unwrap();
            }
        }
        assert_eq!(format!("{:?}", draft.config), format!("{:?}", Config::default()));
        assert!(draft.tls_cert.is_none() && draft.tls_key.is_none());
    }

    #[test]
    fn every_setting_has_a_name_of_its_own_and_refuses_nonsense() {
        for (n, setting) in SETTINGS.iter().enumerate() {
            assert!(SETTINGS[n + 1..].iter().all(|other| other.name != setting.name), "{}", setting.name);
            let refused = (setting.set)(&mut Draft::default(), "").unwrap_err();
            assert!(!refused.is_empty(), "{}", setting.name);
        }
    }

    #[test]
    fn limits_that_would_stop_everything_are_refused() {
        for setting in
            SETTINGS.iter().filter(|setting| setting.name.ends_with("_max") || setting.name.ends_with("_timeout"))
        {
            let zero = if setting.name.ends_with("_timeout") { "0s" } else { "0" };
            let may_be_zero = setting.name == "shutdown_timeout";
            assert_eq!((setting.set)(&mut Draft::default(), zero).is_ok(), may_be_zero, "{}", setting.name);
        }
    }
}
