//! The crates know each other only as docs/architecture.md draws it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use cargo_metadata::{Metadata, MetadataCommand, Package};

/// Which crates of the workspace each crate may use. What is not here may use none.
const ARROWS: [(&str, &[&str]); 8] = [
    ("kuma-core", &["kuma-crypto", "kuma-shard"]),
    ("kuma-cluster", &["kuma-core"]),
    ("kuma-node", &["kuma-cluster", "kuma-core"]),
    ("kuma-bench", &["kuma-crypto", "kuma-shard", "kuma-core", "kuma-cluster", "kuma-node"]),
    ("integration-tests", &["kuma-crypto", "kuma-shard", "kuma-core", "kuma-cluster", "kuma-node", "power-loss"]),
    ("power-loss", &[]),
    ("handoff-model", &["kuma-core", "kuma-cluster"]),
    ("handoff-sim", &["kuma-core", "kuma-cluster"]),
];

/// Crates from outside that belong to certain crates alone.
const RESERVED: [(&str, &[&str]); 5] = [
    // The only crate with SQL; the VFS is tested on the very connections that Kuma uses.
    ("sqlx", &["kuma-shard", "power-loss"]),
    // Read models; the raw reference of the benchmarks, and what damages a file for a test.
    ("rusqlite", &["kuma-shard", "kuma-bench", "integration-tests"]),
    ("libsqlite3-sys", &["power-loss"]),
    ("chacha20poly1305", &["kuma-crypto"]),
    ("snow", &["kuma-cluster"]),
];

/// The leaf that knows no actor.
const WITHOUT: [(&str, &[&str]); 2] = [("kuma-crypto", &["ractor", "sqlx", "tokio-rt"]), ("kuma-cluster", &["sqlx"])];

fn metadata() -> Metadata {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("Cargo.toml");
    MetadataCommand::new().manifest_path(manifest).no_deps().other_options(vec!["--offline".into()]).exec().unwrap()
}

/// Whatever a crate asks for: to run, to build or to be tested.
fn asked_for(package: &Package) -> BTreeSet<&str> {
    package.dependencies.iter().map(|dependency| dependency.name.as_str()).collect()
}

#[test]
fn crates_use_each_other_only_as_drawn() {
    let metadata = metadata();
    let members: BTreeSet<&str> = metadata.packages.iter().map(|package| package.name.as_str()).collect();
    assert!(members.is_superset(&["kuma-crypto", "kuma-shard", "kuma-core"].into()), "{members:?}");
    let drawn: BTreeMap<&str, &[&str]> = ARROWS.into();
    for package in &metadata.packages {
        let allowed = drawn.get(package.name.as_str()).copied().unwrap_or_default();
        for used in asked_for(package).intersection(&members) {
            assert!(allowed.contains(used), "{} -> {used} is not drawn in docs/architecture.md", package.name);
        }
    }
}

#[test]
fn sql_and_ciphers_stay_in_their_crates() {
    for package in &metadata().packages {
        let asked = asked_for(package);
        for (reserved, owners) in RESERVED {
            let name = package.name.as_str();
            assert!(
                owners.contains(&name) || !asked.contains(reserved),
                "{name} uses {reserved}, which belongs to {owners:?}"
            );
        }
        for (_, without) in WITHOUT.iter().filter(|(name, _)| *name == package.name.as_str()) {
            assert!(without.iter().all(|other| !asked.contains(other)), "{} must do without {without:?}", package.name);
        }
    }
}

fn sources(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            sources(&path, found);
        } else if name.ends_with(".rs") {
            found.push(path);
        }
    }
}

/// Whether `word` stands in `line` as a word of its own, outside of a comment.
fn has_word(line: &str, word: &str) -> bool {
    let code = line.split("//").next().unwrap_or_default();
    let is_name = |character: char| character.is_alphanumeric() || character == '_';
    code.match_indices(word)
        .any(|(start, _)| !code[..start].ends_with(is_name) && !code[start + word.len()..].starts_with(is_name))
}

#[test]
fn memory_is_touched_by_hand_in_one_crate_only() {
    // Put together, so that this file does not find itself.
    let (keyword, permission) = (concat!("un", "safe"), concat!("un", "safe_code"));
    let metadata = metadata();
    let root = metadata.workspace_root.as_std_path();
    let mut files = Vec::new();
    sources(root, &mut files);
    let exempt = root.join("integration-tests/power-loss/src/vfs");
    let (mut seen, mut found) = (0, Vec::new());
    for file in files {
        let text = fs::read_to_string(&file).unwrap();
        let bad = text.lines().filter(|line| has_word(line, keyword) || has_word(line, permission)).count();
        if file.starts_with(&exempt) || file == exempt.with_extension("rs") {
            seen += bad;
        } else if bad > 0 {
            found.push(file);
        }
    }
    assert!(seen > 0, "the scan finds nothing even where there is something");
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn every_crate_is_under_the_lints_of_the_workspace() {
    for package in &metadata().packages {
        let manifest = fs::read_to_string(&package.manifest_path).unwrap();
        assert!(manifest.contains("[lints]\nworkspace = true"), "{} does not inherit the lints", package.name);
    }
}

/// Such a statement would be compiled each time that it is run: see `kuma-shard/src/statements.rs`.
#[test]
fn no_statement_has_a_limit_that_sqlite_plans_by() {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("kuma-shard/src");
    let mut files = 0;
    for file in fs::read_dir(sources).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_file()) {
        let text = fs::read_to_string(&file).unwrap();
        let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
        assert_eq!(code.filter(|line| line.contains("LIMIT ?")).count(), 0, "{}: say LIMIT 0 + ?", file.display());
        files += 1;
    }
    assert!(files > 40, "{files}");
}
