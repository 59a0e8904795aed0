//! From flags, environment, file and defaults to one configuration that knows where each value came from.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fmt,
    ops::Range,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::Serialize;
use toml::de::{DeTable, DeValue};

use super::{
    Config, KindConfig, StartArguments, TlsFiles,
    settings::{Definition, Draft, Fallback, IDLE_MAX, OTHER_NAMES, SETTINGS, find},
    text::{bytes, closest, duration, number, printable, word},
};

/// Variables that begin with `KUMA_` and are none of the server's: it does not warn of them.
pub const CLIENT_VARIABLES: &[&str] = &["KUMA_URL", "KUMA_TOKEN", "KUMA_TOKEN_FILE", "KUMA_CA_CERT", "KUMA_BUILD"];

/// The variable that names the file.
const FILE_VARIABLE: &str = "KUMA_CONFIG";

/// What other kinds have, for a kind that sets only one of the two.
const SNAPSHOT_DEFAULT: (u64, u64) = (256, 1 << 20);

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A value that is not allowed.
    #[error("{setting} = \"{value}\" ({origin}) cannot be used; allowed is {allowed}")]
    Value {
        /// Its setting.
        setting: String,
        /// What was given, unless it looks like a secret.
        value: String,
        /// Where it came from.
        origin: Origin,
        /// What can be used.
        allowed: String,
    },
    /// A setting that means nothing without another one.
    #[error("{setting} ({origin}) is set, and {missing} is not; set both, or neither")]
    Incomplete {
        /// The one that is set.
        setting: &'static str,
        /// Where it came from.
        origin: Origin,
        /// The one that is not.
        missing: &'static str,
    },
    /// Two settings that do not fit each other.
    #[error("{first} ({first_origin}) and {second} ({second_origin}) do not fit each other: {reason}")]
    Conflict {
        /// One of them.
        first: &'static str,
        /// Where it came from.
        first_origin: Origin,
        /// The other one.
        second: &'static str,
        /// Where it came from.
        second_origin: Origin,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// A key of the file that is no setting.
    #[error("line {line} of {} sets \"{key}\", which is no setting; {hint}", path.display())]
    UnknownKey {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The key.
        key: String,
        /// What was probably meant.
        hint: String,
    },
    /// The file is not TOML, or a value in it is of a kind that no setting has.
    #[error("line {line} of {} cannot be read: {problem}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong.
        problem: String,
    },
    /// The file cannot be read.
    #[error("the configuration file {} ({origin}) cannot be read", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Who named it.
        origin: Origin,
        /// Why.
        source: std::io::Error,
    },
}

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "from", rename_all = "snake_case")]
pub enum Origin {
    /// Nothing was said.
    Default,
    /// The configuration file.
    File {
        /// Its name.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
    },
    /// A variable of the environment.
    Environment {
        /// Its name.
        variable: String,
    },
    /// A flag of the command line.
    Flag {
        /// The flag.
        flag: String,
    },
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Default => f.write_str("default"),
            Origin::File { path, line } => write!(f, "{}:{line}", path.display()),
            Origin::Environment { variable } => write!(f, "variable {variable}"),
            Origin::Flag { flag } => write!(f, "flag {flag}"),
        }
    }
}

/// A setting as it is in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Setting {
    /// Its name, as in the file; settings of a kind are `kinds.NAME.SETTING`.
    pub name: String,
    /// Its value as it was written, or as it was found out; none if there is none.
    pub value: Option<String>,
    /// Where it came from.
    pub origin: Origin,
    /// What its absence means, or how it was found out; for defaults that are no fixed value.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<&'static str>,
}

/// A configuration, and where it came from. As JSON it has the settings and the warnings.
#[derive(Clone, Debug, Serialize)]
pub struct Loaded {
    /// What is in force.
    #[serde(skip)]
    pub config: Config,
    /// The same, setting by setting, in a fixed order.
    pub settings: Vec<Setting>,
    /// What should be said before the server starts.
    pub warnings: Vec<String>,
}

impl Loaded {
    /// Each setting as a row: name, value, where it came from.
    pub fn rows(&self) -> Vec<[String; 3]> {
        let row = |setting: &Setting| {
            let value = match (&setting.value, setting.note) {
                (Some(value), _) => value.clone(),
                (None, Some(note)) => format!("({note})"),
                (None, None) => String::new(),
            };
            [setting.name.clone(), value, setting.origin.to_string()]
        };
        self.settings.iter().map(row).collect()
    }
}

/// The configuration by `arguments`, the environment of this process, and the file that one of them names.
///
/// # Errors
/// Each names the setting, where it came from, and what is allowed.
pub fn load(arguments: &StartArguments) -> Result<Loaded, ConfigError> {
    load_from(arguments, std::env::vars_os())
}

/// As [`load`], with another environment.
///
/// # Errors
/// As [`load`].
pub fn load_from(
    arguments: &StartArguments,
    environment: impl IntoIterator<Item = (OsString, OsString)>,
) -> Result<Loaded, ConfigError> {
    let environment = Environment::new(environment);
    let mut given: BTreeMap<&'static str, Given> = BTreeMap::new();
    let mut kinds = Vec::new();
    if let Some((path, origin)) = environment.file(arguments) {
        let text = std::fs::read_to_string(&path).map_err(|source| ConfigError::File {
            path: path.clone(),
            origin,
            source,
        })?;
        File { path: &path, text: &text }.read(&mut given, &mut kinds)?;
    }
    for setting in SETTINGS {
        let variable = setting.variable();
        let other = setting.other_name().map(|name| format!("KUMA_{}", name.to_uppercase()));
        let variable = match other.filter(|other| environment.get(other).is_some()) {
            Some(other) if environment.get(&variable).is_none() => other,
            _ => variable,
        };
        if let Some(text) = environment.get(&variable) {
            given.insert(setting.name, Given { text: text?, origin: Origin::Environment { variable } });
        }
        if let Some(text) = arguments.flags.get(setting.name) {
            let origin = Origin::Flag { flag: format!("--{}", setting.flag()) };
            given.insert(setting.name, Given { text: text.clone(), origin });
        }
    }
    let mut draft = Draft::default();
    for (name, given) in &given {
        if let Some(setting) = find(name) {
            (setting.set)(&mut draft, &given.text).map_err(|allowed| given.refused(*name, allowed))?;
        }
    }
    let kind_settings = set_kinds(&mut draft.config, kinds)?;
    let config = finish(draft, &given)?;
    let mut settings: Vec<Setting> = SETTINGS.iter().map(|setting| in_force(setting, &config, &given)).collect();
    settings.extend(kind_settings);
    Ok(Loaded { config, settings, warnings: environment.warnings() })
}

/// A value that somebody gave.
struct Given {
    text: String,
    origin: Origin,
}

impl Given {
    fn refused(&self, setting: impl Into<String>, allowed: String) -> ConfigError {
        let origin = self.origin.clone();
        ConfigError::Value { setting: setting.into(), value: printable(&self.text), origin, allowed }
    }
}

fn in_force(setting: &Definition, config: &Config, given: &BTreeMap<&'static str, Given>) -> Setting {
    let (value, origin, note) = match (given.get(setting.name), setting.default) {
        (Some(given), _) => (Some(printable(&given.text)), given.origin.clone(), None),
        (None, Fallback::Value(text)) => (Some(text.to_owned()), Origin::Default, None),
        (None, Fallback::Found(note, find_out)) => {
            (find_out(config).map(|text| printable(&text)), Origin::Default, Some(note))
        }
    };
    Setting { name: setting.name.to_owned(), value, origin, note }
}

/// The checks that look at more than one setting.
fn finish(draft: Draft, given: &BTreeMap<&'static str, Given>) -> Result<Config, ConfigError> {
    let Draft { mut config, tls_cert, tls_key } = draft;
    let origin = |name| given.get(name).map_or(Origin::Default, |given| given.origin.clone());
    let incomplete = |setting, missing| ConfigError::Incomplete { setting, origin: origin(setting), missing };
    let conflict = |first: &'static str, second: &'static str, reason: &str| {
        let (first_origin, second_origin) = (origin(first), origin(second));
        ConfigError::Conflict { first, first_origin, second, second_origin, reason: reason.to_owned() }
    };
    config.tls = match (tls_cert, tls_key) {
        (Some(cert), Some(key)) => Some(TlsFiles { cert, key }),
        (None, None) => None,
        (Some(_), None) => return Err(incomplete("tls_cert", "tls_key")),
        (None, Some(_)) => return Err(incomplete("tls_key", "tls_cert")),
    };
    if config.body_bytes_max > config.body_memory_max {
        let reason = "the largest body must fit into the memory for bodies; lower the first or raise the second";
        return Err(conflict("body_bytes_max", "body_memory_max", reason));
    }
    // Each means something in a cluster alone.
    for name in ["seed", "cluster_listen", "cluster_advertise", "node_name"] {
        if config.cookie_file.is_none() && given.contains_key(name) {
            return Err(incomplete(name, "cookie_file"));
        }
    }
    if config.found && config.cookie_file.is_none() {
        return Err(incomplete("found", "cookie_file"));
    }
    if config.found && !config.seeds.is_empty() {
        let reason = "a node with seeds joins their cluster and founds none; leave one of them out";
        return Err(conflict("found", "seed", reason));
    }
    let data = plain(&config.data);
    if plain(&config.backup_dir()).starts_with(&data) {
        return Err(conflict(
            "backup_dir",
            "data",
            "a backup cannot lie in what it is a backup of; take another directory",
        ));
    }
    if config.projections_dir.as_ref().is_some_and(|directory| plain(directory).starts_with(&data)) {
        let reason = "the store keeps its own files there, read models among them; take a directory outside of it";
        return Err(conflict("projections_dir", "data", reason));
    }
    Ok(config)
}

/// `path` from the root, without `.` and `..`. By its text alone: it need not exist.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for component in std::path::absolute(path).unwrap_or_else(|_| path.to_owned()).components() {
        match component {
            std::path::Component::ParentDir => drop(plain.pop()),
            std::path::Component::CurDir => (),
            other => plain.push(other),
        }
    }
    plain
}

/// Variables that begin with `KUMA_`.
struct Environment(BTreeMap<String, Option<String>>);

impl Environment {
    /// One that is empty counts as absent: that is how files of compose and units of systemd take a variable away.
    fn new(variables: impl IntoIterator<Item = (OsString, OsString)>) -> Self {
        let ours = variables.into_iter().filter_map(|(name, value)| {
            let name = name.into_string().ok().filter(|name| name.starts_with("KUMA_"))?;
            (!value.is_empty()).then(|| (name, value.into_string().ok()))
        });
        Environment(ours.collect())
    }

    fn get(&self, variable: &str) -> Option<Result<String, ConfigError>> {
        let value = self.0.get(variable)?;
        Some(value.clone().ok_or_else(|| ConfigError::Value {
            setting: variable.to_owned(),
            value: "(not UTF-8)".to_owned(),
            origin: Origin::Environment { variable: variable.to_owned() },
            allowed: "text in UTF-8".to_owned(),
        }))
    }

    /// The file that is named, and by whom.
    fn file(&self, arguments: &StartArguments) -> Option<(PathBuf, Origin)> {
        if let Some(path) = &arguments.file {
            return Some((path.clone(), Origin::Flag { flag: "--config".to_owned() }));
        }
        let path = self.0.get(FILE_VARIABLE)?.clone().unwrap_or_default();
        Some((path.into(), Origin::Environment { variable: FILE_VARIABLE.to_owned() }))
    }

    /// A misspelt variable would go unnoticed. No error: an orchestrator may set some of its own, and the client has others.
    fn warnings(&self) -> Vec<String> {
        let others = OTHER_NAMES.into_iter().map(|(name, _)| format!("KUMA_{}", name.to_uppercase()));
        let names: Vec<String> = SETTINGS.iter().map(Definition::variable).chain(others).collect();
        let known = |name: &str| {
            names.iter().any(|known| known == name) || name == FILE_VARIABLE || CLIENT_VARIABLES.contains(&name)
        };
        let warning = |name: &String| match closest(name, names.iter().map(String::as_str)) {
            Some(meant) => format!("the variable {name} is not used; did you mean {meant}?"),
            None => format!("the variable {name} is not used"),
        };
        self.0.keys().filter(|name| !known(name)).map(warning).collect()
    }
}

/// The tables `[kinds.NAME]`: of each kind its settings.
type Kinds = Vec<(String, Vec<(&'static str, Given)>)>;

const KIND_SETTINGS: [&str; 4] = ["state", "snapshot_commits", "snapshot_bytes", "idle_timeout"];

struct File<'a> {
    path: &'a Path,
    text: &'a str,
}

impl File<'_> {
    fn read(&self, given: &mut BTreeMap<&'static str, Given>, kinds: &mut Kinds) -> Result<(), ConfigError> {
        let table = DeTable::parse(self.text)
            .map_err(|error| self.malformed(error.span().unwrap_or_default(), error.message().trim().to_owned()))?;
        for (key, value) in table.get_ref() {
            let name: &str = key.get_ref();
            if name == "kinds" {
                self.read_kinds(value, kinds)?;
            } else if let Some(setting) = find(name) {
                given.insert(setting.name, self.value(name, value)?);
            } else {
                let names = SETTINGS.iter().map(|setting| setting.name).chain(["kinds"]);
                return Err(self.unknown(key.span(), name, names, "kuma-node config lists all settings"));
            }
        }
        Ok(())
    }

    fn read_kinds(&self, value: &toml::Spanned<DeValue<'_>>, kinds: &mut Kinds) -> Result<(), ConfigError> {
        let wanted = "kinds are tables: [kinds.NAME], and below it the settings of that kind";
        let Some(tables) = value.get_ref().as_table() else {
            return Err(self.malformed(value.span(), wanted.to_owned()));
        };
        for (kind, settings) in tables {
            let name: &str = kind.get_ref();
            let Some(settings) = settings.get_ref().as_table() else {
                return Err(self.malformed(kind.span(), wanted.to_owned()));
            };
            if !is_kind(name) {
                let allowed = "a kind is 1 to 64 ASCII letters, digits, '_', '-' or '.', begins with a letter, and not with 'kuma.'";
                return Err(self.malformed(kind.span(), allowed.to_owned()));
            }
            let mut of_kind = Vec::new();
            for (key, value) in settings {
                let setting: &str = key.get_ref();
                match KIND_SETTINGS.into_iter().find(|known| *known == setting) {
                    Some(known) => of_kind.push((known, self.value(&format!("kinds.{name}.{setting}"), value)?)),
                    None => {
                        let all = "a kind has state, snapshot_commits, snapshot_bytes and idle_timeout";
                        return Err(self.unknown(key.span(), setting, KIND_SETTINGS, all));
                    }
                }
            }
            kinds.push((name.to_owned(), of_kind));
        }
        Ok(())
    }

    fn value(&self, name: &str, value: &toml::Spanned<DeValue<'_>>) -> Result<Given, ConfigError> {
        let text = match value.get_ref() {
            DeValue::String(text) => text.to_string(),
            DeValue::Integer(number) => number.to_string(),
            DeValue::Boolean(switch) => switch.to_string(),
            DeValue::Array(list) if find(name).is_some_and(Definition::is_list) => {
                let texts: Option<Vec<&str>> = list.iter().map(|value| value.get_ref().as_str()).collect();
                match texts {
                    Some(texts) => texts.join(","),
                    None => return Err(self.malformed(value.span(), format!("{name} is a list of texts"))),
                }
            }
            other => {
                let problem = format!("{name} is text, a number, or true or false; here it is {}", other.type_str());
                return Err(self.malformed(value.span(), problem));
            }
        };
        Ok(Given { text, origin: Origin::File { path: self.path.to_owned(), line: self.line(value.span()) } })
    }

    fn unknown<'n>(
        &self,
        span: Range<usize>,
        key: &str,
        names: impl IntoIterator<Item = &'n str> + Clone,
        otherwise: &str,
    ) -> ConfigError {
        let hint = match closest(&key.replace('-', "_"), names) {
            Some(meant) => format!("did you mean \"{meant}\"?"),
            None => otherwise.to_owned(),
        };
        ConfigError::UnknownKey { path: self.path.to_owned(), line: self.line(span), key: printable(key), hint }
    }

    fn malformed(&self, span: Range<usize>, problem: String) -> ConfigError {
        ConfigError::Malformed { path: self.path.to_owned(), line: self.line(span), problem }
    }

    fn line(&self, span: Range<usize>) -> usize {
        1 + self.text.bytes().take(span.start).filter(|byte| *byte == b'\n').count()
    }
}

/// The store's own rule, here so that the line can be named.
fn is_kind(name: &str) -> bool {
    let goes_on = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte));
    name.starts_with(|c: char| c.is_ascii_alphabetic()) && goes_on && name.len() <= 64 && !name.starts_with("kuma.")
}

fn set_kinds(config: &mut Config, kinds: Kinds) -> Result<Vec<Setting>, ConfigError> {
    let mut shown = Vec::new();
    for (kind, settings) in kinds {
        let mut of_kind = KindConfig::default();
        for (setting, given) in settings {
            let name = format!("kinds.{kind}.{setting}");
            set_kind(&mut of_kind, setting, &given.text).map_err(|allowed| given.refused(&name, allowed))?;
            shown.push(Setting { name, value: Some(printable(&given.text)), origin: given.origin, note: None });
        }
        config.kinds.insert(kind, of_kind);
    }
    Ok(shown)
}

fn set_kind(kind: &mut KindConfig, setting: &str, text: &str) -> Result<(), String> {
    match setting {
        "state" => kind.append_only = word(text, &[("merge", false), ("append_only", true)])?,
        "snapshot_commits" => kind.snapshot.get_or_insert(SNAPSHOT_DEFAULT).0 = number(text, 1..=1_000_000_000)?,
        "snapshot_bytes" => kind.snapshot.get_or_insert(SNAPSHOT_DEFAULT).1 = bytes(text, 1..=1 << 40)?,
        _ => kind.idle_timeout = Some(duration(text, Duration::from_secs(1)..=IDLE_MAX)?),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(pairs: &[(&str, &str)]) -> Vec<(OsString, OsString)> {
        pairs.iter().map(|(name, value)| (name.into(), value.into())).collect()
    }

    fn file(content: &str) -> (tempfile::TempDir, StartArguments) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kuma-node.toml");
        std::fs::write(&path, content).unwrap();
        (dir, StartArguments::default().with_file(path))
    }

    fn refused(content: &str) -> String {
        let (dir, arguments) = file(content);
        let error = load_from(&arguments, []).unwrap_err().to_string();
        error.replace(&dir.path().display().to_string(), "DIR")
    }

    fn origin<'a>(loaded: &'a Loaded, name: &str) -> &'a Origin {
        &loaded.settings.iter().find(|setting| setting.name == name).unwrap().origin
    }

    #[test]
    fn with_nothing_said_everything_is_default() {
        let loaded =
            load_from(&StartArguments::default(), environment(&[("PATH", "/bin"), ("KUMA_LISTEN", "")])).unwrap();
        assert_eq!(format!("{:?}", loaded.config), format!("{:?}", Config::default()));
        assert!(loaded.settings.iter().all(|setting| setting.origin == Origin::Default));
        assert_eq!(loaded.settings.len(), SETTINGS.len());
        assert!(loaded.warnings.is_empty());
    }

    #[test]
    fn a_flag_goes_before_a_variable_before_the_file_before_the_default() {
        let (_dir, arguments) = file("context = \"file\"\nshards = 3\nrequests_max = 7\nmemory_budget = \"2GiB\"\n");
        let arguments = arguments.with("context", "flag");
        let set = environment(&[("KUMA_CONTEXT", "variable"), ("KUMA_SHARDS", "5")]);
        let loaded = load_from(&arguments, set).unwrap();
        let config = &loaded.config;
        assert_eq!((config.context.as_str(), config.shards, config.requests_max), ("flag", Some(5), 7));
        assert_eq!((config.memory_budget, config.headers_max), (2 << 30, 100));
        assert_eq!(origin(&loaded, "context"), &Origin::Flag { flag: "--context".to_owned() });
        assert_eq!(origin(&loaded, "shards"), &Origin::Environment { variable: "KUMA_SHARDS".to_owned() });
        assert!(matches!(origin(&loaded, "requests_max"), Origin::File { line: 3, .. }));
        assert_eq!(origin(&loaded, "headers_max"), &Origin::Default);
    }

    #[test]
    fn the_variable_names_the_file_and_the_flag_another_one() {
        let (dir, arguments) = file("context = \"by-flag\"\n");
        let other = dir.path().join("other.toml");
        std::fs::write(&other, "context = \"by-variable\"\n").unwrap();
        let set = environment(&[("KUMA_CONFIG", other.to_str().unwrap())]);
        assert_eq!(load_from(&arguments, set.clone()).unwrap().config.context, "by-flag");
        assert_eq!(load_from(&StartArguments::default(), set).unwrap().config.context, "by-variable");
        let gone = load_from(&StartArguments::default().with_file("/nowhere/k.toml"), []).unwrap_err();
        assert_eq!(gone.to_string(), "the configuration file /nowhere/k.toml (flag --config) cannot be read");
    }

    #[test]
    fn a_bad_value_is_refused_with_its_setting_its_origin_and_what_is_allowed() {
        let flag = load_from(&StartArguments::default().with("header_timeout", "1h"), []).unwrap_err();
        insta::assert_snapshot!(flag, @r#"header_timeout = "1h" (flag --header-timeout) cannot be used; allowed is a duration with its unit from 1s to 5m, such as 500ms, 10s, 5m or 1h"#);
        let variable =
            load_from(&StartArguments::default(), environment(&[("KUMA_CONNECTIONS_MAX", "0")])).unwrap_err();
        insta::assert_snapshot!(variable, @r#"connections_max = "0" (variable KUMA_CONNECTIONS_MAX) cannot be used; allowed is a number from 1 to 1000000"#);
        insta::assert_snapshot!(refused("data = \"d\"\ndurability = \"fast\"\n"), @r#"durability = "fast" (DIR/kuma-node.toml:2) cannot be used; allowed is "full" or "normal""#);
        insta::assert_snapshot!(refused("listen = \"localhost\"\n"), @r#"listen = "localhost" (DIR/kuma-node.toml:1) cannot be used; allowed is an IP address and a port, such as 127.0.0.1:4870 or [::]:4870"#);
        insta::assert_snapshot!(refused("access_log = 1\n"), @r#"access_log = "1" (DIR/kuma-node.toml:1) cannot be used; allowed is "true" or "false""#);
        insta::assert_snapshot!(refused("body_bytes_max = \"2GiB\"\n"), @r#"body_bytes_max = "2GiB" (DIR/kuma-node.toml:1) cannot be used; allowed is a size from 1KiB to 1GiB, such as 512KiB, 16MiB, 1GiB or a number of bytes"#);
        insta::assert_snapshot!(refused("log = \"kuma=loud\"\n"), @r#"log = "kuma=loud" (DIR/kuma-node.toml:1) cannot be used; allowed is a level (error, warn, info, debug, trace, off), or levels of modules, such as info,kuma_node=debug"#);
        insta::assert_snapshot!(refused("log = [\"info\"]\n"), @"line 1 of DIR/kuma-node.toml cannot be read: log is text, a number, or true or false; here it is array");
        insta::assert_snapshot!(refused("header_bytes_max = \"4KiB\"\n"), @r#"header_bytes_max = "4KiB" (DIR/kuma-node.toml:1) cannot be used; allowed is a size from 8KiB to 1MiB, such as 512KiB, 16MiB, 1GiB or a number of bytes"#);
    }

    #[test]
    fn an_unknown_key_is_refused_with_its_line_and_what_was_meant() {
        insta::assert_snapshot!(refused("# comment\nlissten = \"127.0.0.1:1\"\n"), @r#"line 2 of DIR/kuma-node.toml sets "lissten", which is no setting; did you mean "listen"?"#);
        insta::assert_snapshot!(refused("header-timeout = \"1s\"\n"), @r#"line 1 of DIR/kuma-node.toml sets "header-timeout", which is no setting; did you mean "header_timeout"?"#);
        insta::assert_snapshot!(refused("colour = 3\n"), @r#"line 1 of DIR/kuma-node.toml sets "colour", which is no setting; kuma-node config lists all settings"#);
        insta::assert_snapshot!(refused("[tls]\ncert = \"a\"\n"), @r#"line 1 of DIR/kuma-node.toml sets "tls", which is no setting; did you mean "tls_cert"?"#);
        insta::assert_snapshot!(refused("[kinds.account]\nsnapshot_commit = 3\n"), @r#"line 2 of DIR/kuma-node.toml sets "snapshot_commit", which is no setting; did you mean "snapshot_commits"?"#);
        insta::assert_snapshot!(refused("data = \n"), @"line 1 of DIR/kuma-node.toml cannot be read: string values must be quoted, expected literal string");
        insta::assert_snapshot!(refused("data = \"a\"\ndata = \"b\"\n"), @"line 2 of DIR/kuma-node.toml cannot be read: duplicate key");
    }

    #[test]
    fn an_unknown_variable_is_a_warning_without_its_value() {
        let set = environment(&[
            ("KUMA_LISTENN", "secret"),
            ("KUMA_TOKEN", "secret"),
            ("KUMA_URL", "x"),
            ("KUMA_PORT_4870_TCP", "tcp://10.0.0.1"),
        ]);
        let warnings = load_from(&StartArguments::default(), set).unwrap().warnings;
        let expected = [
            "the variable KUMA_LISTENN is not used; did you mean KUMA_LISTEN?",
            "the variable KUMA_PORT_4870_TCP is not used",
        ];
        assert_eq!(warnings, expected);
    }

    #[test]
    fn kinds_have_settings_of_their_own() {
        let content = "[kinds.log]\nstate = \"append_only\"\nidle_timeout = \"10s\"\n[kinds.\"a.b\"]\nsnapshot_bytes = \"64KiB\"\n[kinds.plain]\nstate = \"merge\"\n";
        let (_dir, arguments) = file(content);
        let loaded = load_from(&arguments, []).unwrap();
        let kinds = &loaded.config.kinds;
        let log = KindConfig { append_only: true, snapshot: None, idle_timeout: Some(Duration::from_secs(10)) };
        assert_eq!(kinds["log"], log);
        assert_eq!(kinds["a.b"].snapshot, Some((256, 64 << 10)));
        assert_eq!(kinds["plain"], KindConfig::default());
        assert!(matches!(origin(&loaded, "kinds.log.idle_timeout"), Origin::File { line: 3, .. }));
        insta::assert_snapshot!(refused("[kinds.a]\nstate = \"log\"\n"), @r#"kinds.a.state = "log" (DIR/kuma-node.toml:2) cannot be used; allowed is "merge" or "append_only""#);
        insta::assert_snapshot!(refused("[kinds.a]\nsnapshot_commits = 0\n"), @r#"kinds.a.snapshot_commits = "0" (DIR/kuma-node.toml:2) cannot be used; allowed is a number from 1 to 1000000000"#);
        insta::assert_snapshot!(refused("[kinds.\"kuma.audit\"]\n"), @"line 1 of DIR/kuma-node.toml cannot be read: a kind is 1 to 64 ASCII letters, digits, '_', '-' or '.', begins with a letter, and not with 'kuma.'");
        insta::assert_snapshot!(refused("kinds = 3\n"), @"line 1 of DIR/kuma-node.toml cannot be read: kinds are tables: [kinds.NAME], and below it the settings of that kind");
    }

    #[test]
    fn settings_that_do_not_fit_each_other_are_refused() {
        let refused = |pairs: &[(&str, &str)]| {
            let arguments = pairs.iter().fold(StartArguments::default(), |all, (name, value)| all.with(name, *value));
            load_from(&arguments, []).unwrap_err().to_string()
        };
        insta::assert_snapshot!(refused(&[("tls_cert", "c.pem")]), @"tls_cert (flag --tls-cert) is set, and tls_key is not; set both, or neither");
        insta::assert_snapshot!(refused(&[("tls_key", "k.pem")]), @"tls_key (flag --tls-key) is set, and tls_cert is not; set both, or neither");
        insta::assert_snapshot!(refused(&[("body_memory_max", "1MiB")]), @"body_bytes_max (default) and body_memory_max (flag --body-memory-max) do not fit each other: the largest body must fit into the memory for bodies; lower the first or raise the second");
        insta::assert_snapshot!(refused(&[("data", "d"), ("backup_dir", "./x/../d/backups")]), @"backup_dir (flag --backup-dir) and data (flag --data) do not fit each other: a backup cannot lie in what it is a backup of; take another directory");
        insta::assert_snapshot!(refused(&[("data", "/d"), ("projections_dir", "/d/projections")]), @"projections_dir (flag --projections-dir) and data (flag --data) do not fit each other: the store keeps its own files there, read models among them; take a directory outside of it");
        let both = StartArguments::default().with("tls_cert", "c.pem").with("tls_key", "k.pem");
        let files = TlsFiles { cert: "c.pem".into(), key: "k.pem".into() };
        assert_eq!(load_from(&both, []).unwrap().config.tls, Some(files));
    }

    /// Somebody puts the key where its file should be named.
    #[test]
    fn a_cluster_is_configured_by_any_of_the_names_and_seeds_may_be_several() {
        let (_dir, arguments) =
            file("data_dir = \"d\"\ncookie_file = \"c\"\nseed_nodes = [\"10.0.0.1:4860\", \"kuma@db\"]\n");
        let loaded = load_from(&arguments, environment(&[])).unwrap();
        assert_eq!(loaded.config.seeds, ["10.0.0.1:4860", "kuma@db"]);
        assert_eq!((loaded.config.data, loaded.config.cookie_file), ("d".into(), Some("c".into())));
        let set = environment(&[("KUMA_SEED_NODES", "one, two"), ("KUMA_DATA_DIR", "e"), ("KUMA_COOKIE_FILE", "c")]);
        let loaded = load_from(&StartArguments::default(), set).unwrap();
        assert_eq!((loaded.config.seeds, loaded.config.data), (vec!["one".to_owned(), "two".to_owned()], "e".into()));
        assert!(loaded.warnings.is_empty());
        let listen = loaded.settings.iter().find(|setting| setting.name == "cluster_listen").unwrap();
        assert_eq!(listen.value.as_deref(), Some("127.0.0.1:4860"));
        let alone = load_from(&StartArguments::default(), environment(&[])).unwrap();
        assert!(alone.config.cookie_file.is_none() && alone.config.cluster_listen().is_none());
        for (text, why) in [
            ("seed = \"db\"\n", "cookie_file is not"),
            ("found = true\n", "cookie_file is not"),
            ("node_name = \"a\"\n", "cookie_file is not"),
            ("cookie_file = \"c\"\nfound = true\nseed = \"db\"\n", "founds none"),
            ("cookie_file = \"c\"\nseed = \"a b\"\n", "up to 64 addresses"),
            ("cookie_file = \"c\"\nseed = [1]\n", "list of texts"),
            ("cookie_file = \"c\"\ncluster_advertise = \"db\"\n", "a host and a port"),
            ("cookie_file = \"c\"\nnode_name = \"a b\"\n", "1 to 64 letters"),
        ] {
            let refused = refused(text);
            assert!(refused.contains(why), "{refused}");
        }
    }

    #[test]
    fn a_secret_in_the_wrong_place_is_not_printed() {
        let key = "8f".repeat(32);
        let loaded = load_from(&StartArguments::default().with("master_key_file", &key), []).unwrap();
        assert!(!serde_json::to_string(&loaded).unwrap().contains(&key));
        assert!(!format!("{:?}", loaded.rows()).contains(&key));
        let error = load_from(&StartArguments::default().with("listen", &key), []).unwrap_err();
        assert!(!error.to_string().contains(&key) && !format!("{error:?}").contains(&key));
    }

    #[test]
    fn what_is_found_out_is_shown_as_it_is_in_force() {
        let loaded = load_from(&StartArguments::default().with("data", "/d"), []).unwrap();
        let shown = |name: &str| loaded.rows().into_iter().find(|row| row[0] == name).unwrap();
        assert_eq!(shown("tokens_file"), ["tokens_file", "/d/tokens.json", "default"]);
        assert_eq!(shown("backup_dir")[1], "/d-backups");
        assert_eq!(shown("shards")[1], "(2 a core, from 4 to 16)");
        assert_eq!(shown("data"), ["data", "/d", "flag --data"]);
    }

    /// docs/operations/kuma-node.toml is what people begin with.
    #[test]
    fn the_example_file_has_each_setting_with_its_default() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/operations/kuma-node.toml");
        let content = std::fs::read_to_string(path).unwrap();
        assert!(load_from(&StartArguments::default().with_file(path), []).is_ok());
        let before_kinds = content.split("#[kinds").next().unwrap();
        for setting in SETTINGS {
            let lines: Vec<&str> =
                before_kinds.lines().filter(|line| line.starts_with(&format!("#{} = ", setting.name))).collect();
            assert_eq!(lines.len(), 1, "{}", setting.name);
            if let Fallback::Value(default) = setting.default {
                let value = lines[0].split_once(" = ").unwrap().1.trim_matches('"');
                assert_eq!(value, default, "{}", setting.name);
            }
        }
        // With each line in use it is a configuration too.
        let is_setting = |line: &&str| line.starts_with('#') && !line.starts_with("# ") && line.len() > 1;
        let used: Vec<&str> = content.lines().filter(is_setting).map(|line| &line[1..]).collect();
        let (_dir, arguments) = file(&used.join("\n"));
        let loaded = load_from(&arguments, []).unwrap();
        assert!(loaded.settings.len() > SETTINGS.len(), "a kind is shown too");
    }
}
