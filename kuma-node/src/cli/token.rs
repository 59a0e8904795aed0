//! `kuma-node token`: make, list and revoke tokens, in the file itself. A running node takes the change within two seconds.

use std::{
    io::{self, IsTerminal, Write},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use jiff::Timestamp;
use serde::Serialize;

use super::table::Table;
use crate::{
    config::{StartArguments, load},
    tokens::{Scope, Secret, Token, TokenFile},
};

/// Makes, lists and revokes tokens. A running node takes the change within two seconds.
#[derive(Debug, clap::Args)]
pub struct TokenArguments {
    #[command(subcommand)]
    command: TokenCommand,
}

#[derive(Debug, clap::Subcommand)]
enum TokenCommand {
    /// Makes a token and prints it, once: only its hash is kept.
    Create(CreateArguments),
    /// Lists the tokens, without their texts.
    List(FileArguments),
    /// Revokes a token.
    Revoke(RevokeArguments),
}

/// Which file.
#[derive(Debug, clap::Args)]
struct FileArguments {
    /// The store's directory [default: ./data] [env: KUMA_DATA].
    #[arg(long, value_name = "DIR")]
    data: Option<String>,
    /// The file with the hashes of tokens [default: tokens.json in the data directory] [env: KUMA_TOKENS_FILE].
    #[arg(long, value_name = "FILE")]
    tokens_file: Option<String>,
    /// A TOML file with settings [env: KUMA_CONFIG].
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
struct CreateArguments {
    /// Whose it is: 1 to 64 letters, digits, '-', '_' or '.'. Two tokens may have the same name, for a rotation.
    #[arg(long)]
    name: String,
    /// What it allows, separated by commas: append, read, erase, admin. None implies another.
    #[arg(long, value_delimiter = ',', required = true)]
    scopes: Vec<Scope>,
    /// After what time it is refused, such as 12h or 90d; never if it is left out.
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    expires: Option<Duration>,
    #[command(flatten)]
    file: FileArguments,
}

#[derive(Debug, clap::Args)]
struct RevokeArguments {
    /// The token's id, or its name.
    #[arg(value_name = "ID|NAME")]
    which: String,
    /// Revokes all tokens with this name.
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    file: FileArguments,
}

impl TokenArguments {
    /// Does it.
    ///
    /// # Errors
    /// The file cannot be read or changed; it is as it was.
    pub fn run(self, json: bool) -> anyhow::Result<ExitCode> {
        let is_terminal = io::stdout().is_terminal();
        let done = self.execute(json, is_terminal)?;
        print(&done.output)?;
        done.notes.iter().for_each(|note| eprintln!("{note}"));
        Ok(ExitCode::SUCCESS)
    }

    fn execute(self, json: bool, is_terminal: bool) -> anyhow::Result<Done> {
        match self.command {
            TokenCommand::Create(arguments) => arguments.execute(json),
            TokenCommand::List(arguments) => list(&arguments.open()?, json, is_terminal),
            TokenCommand::Revoke(arguments) => arguments.execute(json),
        }
    }
}

/// What is printed to standard output, and what beside it.
#[derive(Debug)]
struct Done {
    output: zeroize::Zeroizing<String>,
    notes: Vec<String>,
}

impl FileArguments {
    /// The file that a server would use with the same flags, environment and configuration file.
    fn open(self) -> anyhow::Result<TokenFile> {
        let mut start = StartArguments::default();
        for (setting, value) in [("data", self.data), ("tokens_file", self.tokens_file)] {
            if let Some(value) = value {
                start = start.with(setting, value);
            }
        }
        if let Some(file) = self.config {
            start = start.with_file(file);
        }
        Ok(TokenFile::new(load(&start)?.config.tokens_file()))
    }
}

#[derive(Serialize)]
struct Created<'a> {
    #[serde(flatten)]
    about: &'a Token,
    token: &'a str,
}

impl CreateArguments {
    fn execute(self, json: bool) -> anyhow::Result<Done> {
        let file = self.file.open()?;
        let is_first = !file.load()?.exists;
        let (about, secret) = file.create(&self.name, &self.scopes, self.expires)?;
        let mut notes = Vec::new();
        if !json {
            notes.push(format!("token {} of {}: {}, {}", about.id, about.name, scopes(&about), expiry(&about)));
            notes.push(format!("It is not shown again; its hash is in {}.", file.path().display()));
            if is_first {
                notes.push("It is the first one: from now on every request needs a token.".to_owned());
            }
        }
        Ok(Done { output: created(&about, &secret, json)?, notes })
    }
}

/// The text alone, so that a script can take it; everything about it goes to standard error.
fn created(about: &Token, secret: &Secret, json: bool) -> anyhow::Result<zeroize::Zeroizing<String>> {
    let text = match json {
        true => serde_json::to_string_pretty(&Created { about, token: secret.expose() })? + "\n",
        false => format!("{}\n", secret.expose()),
    };
    Ok(text.into())
}

fn list(file: &TokenFile, json: bool, is_terminal: bool) -> anyhow::Result<Done> {
    let content = file.load()?;
    if json {
        return Ok(Done {
            output: (serde_json::to_string_pretty(&content.tokens)? + "\n").into(),
            notes: content.warnings,
        });
    }
    let mut notes = content.warnings;
    match (content.exists, content.tokens.is_empty()) {
        (false, _) => notes.push(format!(
            "There is no {}: a node needs no token, and takes requests on loopback addresses only.",
            file.path().display()
        )),
        (true, true) => notes.push("There is no token: the node lets nobody in.".to_owned()),
        (true, false) => (),
    }
    let mut table = Table::new(["id", "name", "scopes", "created", "expires"]);
    for token in &content.tokens {
        table.row([token.id.clone(), token.name.clone(), scopes(token), token.created_at.to_string(), expiry(token)]);
    }
    Ok(Done { output: table.render(is_terminal).into(), notes })
}

impl RevokeArguments {
    fn execute(self, json: bool) -> anyhow::Result<Done> {
        let file = self.file.open()?;
        let revoked = file.revoke(&self.which, self.all)?;
        if json {
            return Ok(Done { output: (serde_json::to_string_pretty(&revoked)? + "\n").into(), notes: Vec::new() });
        }
        let lines: Vec<String> =
            revoked.iter().map(|token| format!("revoked {} of {}\n", token.id, token.name)).collect();
        let mut notes = Vec::new();
        if file.load()?.tokens.is_empty() {
            notes.push("No token is left: a node with this file lets nobody in.".to_owned());
        }
        Ok(Done { output: lines.concat().into(), notes })
    }
}

fn scopes(token: &Token) -> String {
    token.scopes.iter().map(|scope| scope.as_str()).collect::<Vec<_>>().join(",")
}

fn expiry(token: &Token) -> String {
    match token.expires_at {
        Some(at) if token.is_expired(Timestamp::now()) => format!("expired {at}"),
        Some(at) => at.to_string(),
        None => "never".to_owned(),
    }
}

/// To standard output, which somebody may have closed.
pub(super) fn print(text: &str) -> io::Result<()> {
    let mut output = anstream::stdout().lock();
    output.write_all(text.as_bytes())?;
    output.flush()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::tokens::{Found, Tokens};

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        token: TokenArguments,
    }

    fn run(dir: &tempfile::TempDir, line: &str, json: bool) -> anyhow::Result<Done> {
        let file = ["--tokens-file", dir.path().join("tokens.json").to_str().unwrap()].map(str::to_owned);
        let words = ["token"].into_iter().chain(line.split(' ')).map(str::to_owned);
        Cli::try_parse_from(words.chain(file))?.token.execute(json, false)
    }

    #[test]
    fn a_token_is_made_shown_once_and_revoked() {
        let dir = tempfile::tempdir().unwrap();
        let made = run(&dir, "create --name app --scopes append,read --expires 90d", false).unwrap();
        let text = made.output.trim_end();
        assert!(made.notes.iter().all(|note| !note.contains(text)));
        assert!(made.notes.last().unwrap().starts_with("It is the first one"));
        let (tokens, _) = Tokens::open(dir.path().join("tokens.json")).unwrap();
        let Found::Token(token) = tokens.find(text) else { panic!("not found") };
        assert!(token.allows(Scope::Append) && token.allows(Scope::Read) && !token.allows(Scope::Erase));
        for json in [false, true] {
            let listed = run(&dir, "list", json).unwrap();
            assert!(listed.output.contains(&token.id) && listed.output.contains("append"));
            assert!(
                !listed.output.contains(text)
                    && !listed.output.contains("sha256")
                    && !listed.output.contains(&text[20..])
            );
        }
        let revoked = run(&dir, "revoke app", false).unwrap();
        assert_eq!(*revoked.output, format!("revoked {} of app\n", token.id));
        assert!(revoked.notes[0].contains("lets nobody in"));
        assert!(run(&dir, "list", false).unwrap().notes[0].contains("lets nobody in"));
    }

    #[test]
    fn json_has_the_text_once_and_all_about_it() {
        let dir = tempfile::tempdir().unwrap();
        let made = run(&dir, "create --name app --scopes erase", true).unwrap();
        let value: serde_json::Value = serde_json::from_str(&made.output).unwrap();
        assert!(made.notes.is_empty());
        assert_eq!((&value["name"], &value["scopes"]), (&"app".into(), &serde_json::json!(["erase"])));
        assert!(crate::tokens::looks_like_token(value["token"].as_str().unwrap()));
        let keys: Vec<&String> = value.as_object().unwrap().keys().collect();
        assert_eq!(keys, ["created_at", "id", "name", "scopes", "token"]);
    }

    #[test]
    fn what_is_wrong_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let failed = |line: &str| run(&dir, line, false).unwrap_err().to_string();
        assert!(failed("create --name app --scopes root").contains("scopes are append, read, erase and admin"));
        assert!(failed("create --name app").contains("--scopes"));
        assert!(failed("create --name a/b --scopes read").contains("1 to 64"));
        assert!(failed("create --name app --scopes read --expires soon").contains("--expires"));
        assert!(failed("revoke app").contains("no token with this id or name"));
        assert!(run(&dir, "list", false).unwrap().notes[0].contains("There is no"));
    }
}
