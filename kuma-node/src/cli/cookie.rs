//! `cookie`: makes the secret that the nodes of a cluster share.

use std::{
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use anyhow::Context;
use clap::Args;
use kuma_cluster::Cookie;

use super::{Exit, Session};

/// What `cookie` takes.
#[derive(Debug, Args)]
pub(super) struct CookieArguments {
    /// Where it is written; what is there is not replaced
    #[arg(value_name = "FILE", default_value = "kuma.cookie")]
    file: PathBuf,
}

/// Makes a cookie.
pub(super) fn run(session: &Session, arguments: &CookieArguments) -> anyhow::Result<Exit> {
    make(&arguments.file)?;
    if session.output.is_json() {
        session.output.json(&serde_json::json!({ "file": arguments.file }))?;
        return Ok(Exit::Done);
    }
    session.output.line(format_args!("made {}", arguments.file.display()))?;
    session.output.note("whoever has it can join the cluster and read everything: copy it to each node by a safe way, as a file of its owner alone");
    Ok(Exit::Done)
}

fn make(path: &Path) -> anyhow::Result<()> {
    let cookie = Cookie::generate()?;
    let mut options = std::fs::OpenOptions::new();
    // The rights from the beginning, and never another one's file.
    let file = options.write(true).create_new(true).mode(0o600).open(path);
    let mut file = file.with_context(|| {
        format!(
            "cannot make {}; if it is there already, it is the secret of a cluster: use that, or name another file",
            path.display()
        )
    })?;
    let written = file.write_all(cookie.to_text().as_bytes()).and_then(|()| file.write_all(b"\n"));
    written.and_then(|()| file.sync_all()).with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_cookie_is_its_owners_alone_and_is_never_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kuma.cookie");
        make(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let text = std::fs::read_to_string(&path).unwrap();
        Cookie::load_file(&path).unwrap();
        let refused = make(&path).unwrap_err();
        assert!(refused.to_string().contains("use that, or name another file"), "{refused}");
        assert!(!format!("{refused:?}").contains(text.trim()));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
    }
}
