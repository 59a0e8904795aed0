//! `kuma-node config`: what is in force, and where it came from.

use std::{io::IsTerminal, process::ExitCode};

use super::{table::Table, token::print};
use crate::config::{Loaded, StartArguments, load};

/// Prints each setting as a server started with the same flags, environment and file would have it, and where it comes from.
#[derive(Debug, clap::Args)]
pub struct ConfigArguments {
    #[command(flatten)]
    start: StartArguments,
}

impl ConfigArguments {
    /// Prints it.
    ///
    /// # Errors
    /// The same as a server would have at its start.
    pub fn run(self, json: bool) -> anyhow::Result<ExitCode> {
        let loaded = load(&self.start)?;
        print(&show(&loaded, json, std::io::stdout().is_terminal())?)?;
        if !json {
            loaded.warnings.iter().for_each(|warning| eprintln!("warning: {warning}"));
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn show(loaded: &Loaded, json: bool, is_terminal: bool) -> anyhow::Result<String> {
    if json {
        return Ok(serde_json::to_string_pretty(loaded)? + "\n");
    }
    let mut table = Table::new(["setting", "value", "from"]);
    loaded.rows().into_iter().for_each(|row| table.row(row));
    Ok(table.render(is_terminal))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::load_from;

    #[test]
    fn what_is_in_force_is_shown_with_its_origin() {
        let environment = [("KUMA_REQUESTS_MAX".into(), "9".into()), ("KUMA_DATTA".into(), "x".into())];
        let loaded = load_from(&StartArguments::default().with("data", "/d"), environment).unwrap();
        insta::assert_snapshot!(show(&loaded, false, false).unwrap());
        let json: serde_json::Value = serde_json::from_str(&show(&loaded, true, false).unwrap()).unwrap();
        let of = |name: &str| {
            json["settings"].as_array().unwrap().iter().find(|setting| setting["name"] == name).unwrap().clone()
        };
        assert_eq!(
            of("data"),
            serde_json::json!({"name": "data", "value": "/d", "origin": {"from": "flag", "flag": "--data"}})
        );
        assert_eq!(
            of("requests_max")["origin"],
            serde_json::json!({"from": "environment", "variable": "KUMA_REQUESTS_MAX"})
        );
        assert_eq!(of("shards")["value"], serde_json::Value::Null);
        assert_eq!(json["warnings"][0], "the variable KUMA_DATTA is not used; did you mean KUMA_DATA?");
    }
}
