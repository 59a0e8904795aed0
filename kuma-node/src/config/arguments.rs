//! The flags of `kuma-node start`, one for each setting.
//!
//! Written by hand, not derived: names, help and defaults come from the one table. Values are checked where those of variables and files
//! are, so that one sentence says what is wrong with them.

use std::{collections::BTreeMap, path::PathBuf};

use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches, ValueHint};

use super::settings::{Fallback, SETTINGS};

/// The flags of `kuma-node start`: one for each setting, and `--config FILE`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StartArguments {
    pub(super) file: Option<PathBuf>,
    pub(super) flags: BTreeMap<&'static str, String>,
}

impl StartArguments {
    /// As if the flag of `setting` had been given. Nothing happens if there is no such setting.
    #[must_use]
    pub fn with(mut self, setting: &str, value: impl Into<String>) -> Self {
        if let Some(found) = super::settings::find(setting) {
            self.flags.insert(found.name, value.into());
        }
        self
    }

    /// As if `--config FILE` had been given.
    #[must_use]
    pub fn with_file(mut self, file: impl Into<PathBuf>) -> Self {
        self.file = Some(file.into());
        self
    }
}

impl Args for StartArguments {
    fn augment_args(command: Command) -> Command {
        let file = Arg::new("config")
            .long("config")
            .value_name("FILE")
            .value_hint(ValueHint::FilePath)
            .value_parser(clap::value_parser!(PathBuf))
            .help("A TOML file with settings: the names below with underscores, and [kinds.NAME] [env: KUMA_CONFIG]");
        SETTINGS.iter().fold(command.arg(file), |command, setting| {
            let default = match setting.default {
                Fallback::Value(text) | Fallback::Found(text, _) => text,
            };
            let hint = match setting.value {
                "DIR" => ValueHint::DirPath,
                "FILE" => ValueHint::FilePath,
                _ => ValueHint::Other,
            };
            let value = setting.value.trim_end_matches(",...");
            let mut arg = Arg::new(setting.name).long(setting.flag()).value_name(value).value_hint(hint).help(format!(
                "{} [default: {default}] [env: {}]",
                setting.help,
                setting.variable()
            ));
            if setting.is_list() {
                arg = arg.action(ArgAction::Append);
            }
            if setting.is_switch() {
                arg = arg.num_args(0..=1).default_missing_value("true");
            }
            if let Some(other) = setting.other_name() {
                arg = arg.alias(other.replace('_', "-"));
            }
            command.arg(arg)
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for StartArguments {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut arguments = StartArguments::default();
        arguments.update_from_arg_matches(matches)?;
        Ok(arguments)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        if let Some(file) = matches.get_one::<PathBuf>("config") {
            self.file = Some(file.clone());
        }
        for setting in SETTINGS {
            let values: Vec<&str> =
                matches.get_many::<String>(setting.name).into_iter().flatten().map(String::as_str).collect();
            if !values.is_empty() {
                self.flags.insert(setting.name, values.join(","));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        start: StartArguments,
    }

    #[test]
    fn each_setting_has_a_flag() {
        let cli =
            Cli::try_parse_from(["kuma-node", "--data", "/d", "--header-timeout=3s", "--config", "k.toml"]).unwrap();
        assert_eq!(
            cli.start,
            StartArguments::default().with("data", "/d").with("header_timeout", "3s").with_file("k.toml")
        );
        for setting in SETTINGS {
            let cli =
                Cli::try_parse_from(["kuma-node".to_owned(), format!("--{}", setting.flag()), "x".to_owned()]).unwrap();
            assert_eq!(cli.start.flags[setting.name], "x");
        }
        assert!(Cli::try_parse_from(["kuma-node", "--colour", "x"]).is_err());
        let cli = Cli::try_parse_from([
            "kuma-node",
            "--found",
            "--seed",
            "a",
            "--seed-nodes",
            "b",
            "--data-dir",
            "/d",
            "--access-log",
            "false",
        ])
        .unwrap();
        let expected = StartArguments::default().with("found", "true").with("seed", "a,b").with("data", "/d");
        assert_eq!(cli.start, expected.with("access_log", "false"));
    }

    #[test]
    fn help_says_the_default_and_the_variable() {
        use clap::CommandFactory;
        let help = Cli::command().term_width(0).render_help().to_string();
        for setting in SETTINGS {
            assert!(help.contains(&format!("[env: {}]", setting.variable())), "{}", setting.name);
        }
        assert!(help.contains("--listen <ADDRESS>"), "{help}");
        assert!(help.contains("[default: 127.0.0.1:4870]"), "{help}");
    }
}
