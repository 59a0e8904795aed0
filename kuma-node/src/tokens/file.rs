//! The file of hashes: read whole, replaced whole.
//!
//! JSON, mode 0600: `{"format": 1, "tokens": [{id, name, scopes, sha256, created_at, expires_at?}]}`. An edit takes the lock of
//! `FILE.lock`, reads, writes a new file beside, syncs it and renames it. The lock is a file of its own, because the other one is replaced; it
//! stays, because removing it would let two in.

use std::{
    collections::BTreeSet,
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, chown, fchown},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::{ID_BYTES, PREFIX, Scope, Secret, Token, is_id, sha256};

const FORMAT: u32 = 1;
/// Some 40,000 tokens.
const FILE_BYTES_MAX: u64 = 8 << 20;
/// Tokens of one name that are in force at once: the old and the new one of a rotation.
const LIVE_MAX: usize = 2;
/// An edit takes milliseconds.
const LOCK_TIMEOUT: Duration = Duration::from_secs(5);

/// Why the file of tokens could not be read or changed. What was in it still is.
#[derive(Debug, thiserror::Error)]
pub enum TokensError {
    /// The file system refused.
    #[error("cannot {what} {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// There is a file, but not one of tokens.
    #[error("{} is no file of tokens: {problem}; mend it, or put back a copy", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        problem: String,
    },
    /// There was a file. Requests still need the tokens that were in it.
    #[error("{} is gone; the tokens that were in it stay in force until the node is stopped", path.display())]
    Vanished {
        /// The file.
        path: PathBuf,
    },
    /// Another process is changing the file, or holds its lock for another reason.
    #[error("another process has locked {}; try again when it is done", path.display())]
    Locked {
        /// The lock.
        path: PathBuf,
    },
    /// The file belongs to another user, who could not read what this one would write.
    #[error("{} belongs to another user; run this as that user, or as root", path.display())]
    NotOwner {
        /// The file.
        path: PathBuf,
    },
    /// A name that is none.
    #[error("a name of a token is 1 to 64 ASCII letters, digits, '-', '_' or '.'")]
    Name,
    /// A token that would allow nothing.
    #[error("a token needs at least one scope: append, read, erase or admin")]
    NoScope,
    /// A token that would never be in force, or for longer than times can be written.
    #[error("a token expires after one second at the earliest, and before the year 9999")]
    Expiry,
    /// For a rotation two are needed; a third one is probably forgotten.
    #[error("there are already two tokens named {name} in force ({ids}); revoke one of them first")]
    TooMany {
        /// The name.
        name: String,
        /// The ids of the tokens that have it.
        ids: String,
    },
    /// There is none to be revoked.
    #[error("there is no token with this id or name in {}", path.display())]
    NotFound {
        /// The file.
        path: PathBuf,
    },
    /// More than one has this name.
    #[error("{count} tokens have this name ({ids}); say which by its id, or revoke all of them")]
    Ambiguous {
        /// How many.
        count: usize,
        /// The ids of the tokens that have it.
        ids: String,
    },
}

/// What is in the file.
#[derive(Clone, Debug, Default)]
pub struct Content {
    /// Whether there is a file.
    pub exists: bool,
    /// The tokens, oldest first.
    pub tokens: Vec<Arc<Token>>,
    /// What should be warned of.
    pub warnings: Vec<String>,
}

/// The file of tokens, for those who change it.
#[derive(Clone, Debug)]
pub struct TokenFile {
    path: PathBuf,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    format: u32,
    tokens: Vec<StoredToken>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredToken {
    id: String,
    name: String,
    scopes: Vec<String>,
    sha256: String,
    created_at: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    expires_at: Option<String>,
}

impl TokenFile {
    /// The file at `path`, which need not exist.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        TokenFile { path: path.into() }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads it. Without a file there are no tokens.
    ///
    /// # Errors
    /// [`TokensError::Io`], [`TokensError::Malformed`].
    pub fn load(&self) -> Result<Content, TokensError> {
        let fail = |source| TokensError::Io { what: "read", path: self.path.clone(), source };
        let mut file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Content::default()),
            Err(error) => return Err(fail(error)),
        };
        let metadata = file.metadata().map_err(fail)?;
        let mut bytes = Vec::new();
        Read::by_ref(&mut file).take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(fail)?;
        let tokens = parse(&bytes).map_err(|problem| TokensError::Malformed { path: self.path.clone(), problem })?;
        let mut warnings = Vec::new();
        if metadata.mode() & 0o077 != 0 {
            let mode = metadata.mode() & 0o777;
            warnings
                .push(format!("{} can be used by other users (mode {mode:03o}); make it 0600", self.path.display()));
        }
        Ok(Content { exists: true, tokens: tokens.into_iter().map(Arc::new).collect(), warnings })
    }

    /// Makes a token, and returns its text, which is not kept. The file and its directory are made if they do not exist.
    ///
    /// # Errors
    /// [`TokensError`]; the file is as it was.
    pub fn create(
        &self,
        name: &str,
        scopes: &[Scope],
        expires: Option<Duration>,
    ) -> Result<(Token, Secret), TokensError> {
        if !is_name(name) {
            return Err(TokensError::Name);
        }
        if scopes.is_empty() {
            return Err(TokensError::NoScope);
        }
        let now = Timestamp::from_second(Timestamp::now().as_second()).unwrap_or(Timestamp::UNIX_EPOCH);
        let expires_at = expires.map(|after| expiry(now, after).ok_or(TokensError::Expiry)).transpose()?;
        self.edit(|tokens| {
            let live: Vec<&Token> =
                tokens.iter().filter(|token| token.name == name && !token.is_expired(now)).collect();
            if live.len() >= LIVE_MAX {
                return Err(TokensError::TooMany { name: name.to_owned(), ids: ids(live) });
            }
            let fail = |error: getrandom::Error| TokensError::Io {
                what: "get random bytes for",
                path: self.path.clone(),
                source: error.into(),
            };
            let (id, secret) = loop {
                let (id, secret) = random().map_err(fail)?;
                if tokens.iter().all(|token| token.id != id) {
                    break (id, secret);
                }
            };
            let token = Token {
                id,
                name: name.to_owned(),
                scopes: scopes.iter().copied().collect(),
                created_at: now,
                expires_at,
                sha256: sha256(secret.expose()),
            };
            tokens.push(token.clone());
            Ok((token, secret))
        })
    }

    /// Revokes the token with this id, or else the one with this name; with `all`, all with this name. Returns what was revoked.
    ///
    /// # Errors
    /// [`TokensError`]; the file is as it was.
    pub fn revoke(&self, id_or_name: &str, all: bool) -> Result<Vec<Token>, TokensError> {
        self.edit(|tokens| {
            let by_id = tokens.iter().any(|token| token.id == id_or_name);
            let is_meant = |token: &Token| if by_id { token.id == id_or_name } else { token.name == id_or_name };
            let meant: Vec<&Token> = tokens.iter().filter(|token| is_meant(token)).collect();
            match meant.len() {
                0 => return Err(TokensError::NotFound { path: self.path.clone() }),
                count if count > 1 && !all => return Err(TokensError::Ambiguous { count, ids: ids(meant) }),
                _ => (),
            }
            Ok(tokens.extract_if(.., |token| is_meant(token)).collect())
        })
    }

    /// Changes the tokens under the lock, and writes them if `change` succeeds.
    fn edit<T>(&self, change: impl FnOnce(&mut Vec<Token>) -> Result<T, TokensError>) -> Result<T, TokensError> {
        let _lock = self.lock()?;
        let mut tokens: Vec<Token> = self.load()?.tokens.iter().map(|token| Token::clone(token)).collect();
        let done = change(&mut tokens)?;
        self.write(&tokens)?;
        Ok(done)
    }

    fn lock(&self) -> Result<File, TokensError> {
        let directory = self.directory();
        make_directory(directory).map_err(|source| TokensError::Io {
            what: "make",
            path: directory.to_owned(),
            source,
        })?;
        let path = beside(&self.path, ".lock");
        let fail = |source| TokensError::Io { what: "lock", path: path.clone(), source };
        let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path).map_err(fail)?;
        self.belong(&file).map_err(|_| TokensError::NotOwner { path: self.path.clone() })?;
        let begun = Instant::now();
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::WouldBlock) if begun.elapsed() < LOCK_TIMEOUT => {
                    std::thread::sleep(Duration::from_millis(10))
                }
                Err(TryLockError::WouldBlock) => return Err(TokensError::Locked { path }),
                Err(TryLockError::Error(error)) => return Err(fail(error)),
            }
        }
    }

    fn write(&self, tokens: &[Token]) -> Result<(), TokensError> {
        let stored = Stored { format: FORMAT, tokens: tokens.iter().map(StoredToken::from).collect() };
        let path = beside(&self.path, ".new");
        let fail = |source| TokensError::Io { what: "write", path: path.clone(), source };
        let mut bytes = serde_json::to_vec_pretty(&stored).map_err(|error| fail(error.into()))?;
        bytes.push(b'\n');
        // Left by an edit that was killed: it may have another mode or owner. Whoever holds the lock may remove it.
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(fail(error)),
            _ => (),
        }
        let mut file = OpenOptions::new().create_new(true).write(true).mode(0o600).open(&path).map_err(fail)?;
        let written = self.belong(&file).and_then(|()| file.write_all(&bytes)).and_then(|()| file.sync_all());
        if let Err(error) = written {
            // Best effort: the next edit removes it as well.
            let _ = fs::remove_file(&path);
            return Err(match error.kind() {
                io::ErrorKind::PermissionDenied => TokensError::NotOwner { path: self.path.clone() },
                _ => fail(error),
            });
        }
        fs::rename(&path, &self.path).map_err(fail)?;
        let directory = self.directory();
        File::open(directory).and_then(|directory| directory.sync_all()).map_err(|source| TokensError::Io {
            what: "sync",
            path: directory.to_owned(),
            source,
        })
    }

    /// Gives `file` to whoever the file of tokens belongs to. An administrator who makes a token as root must not lock the server out.
    fn belong(&self, file: &File) -> io::Result<()> {
        let mine = file.metadata()?;
        let owner = match fs::metadata(&self.path) {
            Ok(existing) => existing,
            // Root follows the directory; for others a directory of another owner (/tmp, say) means nothing.
            Err(_) if mine.uid() == 0 => fs::metadata(self.directory())?,
            Err(_) => return Ok(()),
        };
        match (owner.uid() == mine.uid(), owner.gid() == mine.gid()) {
            (true, true) => Ok(()),
            // The group may do nothing with it.
            (true, false) => fchown(file, None, Some(owner.gid())).or(Ok(())),
            (false, _) => fchown(file, Some(owner.uid()), Some(owner.gid())),
        }
    }

    fn directory(&self) -> &Path {
        match self.path.parent() {
            Some(directory) if directory != Path::new("") => directory,
            _ => Path::new("."),
        }
    }
}

/// Makes a directory that only its owner can use. One that root makes belongs to whoever its parent belongs to, as its files do.
fn make_directory(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    let parent = path.parent().filter(|parent| *parent != Path::new("")).unwrap_or(Path::new("."));
    make_directory(parent)?;
    match fs::DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
        made => made?,
    }
    let (made, parent) = (fs::metadata(path)?, fs::metadata(parent)?);
    if made.uid() == 0 && parent.uid() != 0 {
        chown(path, Some(parent.uid()), Some(parent.gid()))?;
    }
    Ok(())
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn ids(tokens: Vec<&Token>) -> String {
    tokens.iter().map(|token| token.id.as_str()).collect::<Vec<_>>().join(", ")
}

fn is_name(name: &str) -> bool {
    (1..=64).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
}

fn expiry(now: Timestamp, after: Duration) -> Option<Timestamp> {
    let after = SignedDuration::try_from(after).ok().filter(|after| *after >= SignedDuration::from_secs(1))?;
    now.checked_add(after).ok()
}

/// A new id, and the text of its token.
fn random() -> Result<(String, Secret), getrandom::Error> {
    const LETTERS: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
    let mut bytes = Zeroizing::new([0; ID_BYTES + 32]);
    getrandom::fill(&mut *bytes)?;
    let (id, secret) = bytes.split_at(ID_BYTES);
    let id: String = id.iter().map(|byte| char::from(LETTERS[usize::from(byte % 32)])).collect();
    let secret = Zeroizing::new(BASE64_URL_SAFE_NO_PAD.encode(secret));
    // With room for all of it: a string that grows leaves copies behind.
    let mut text = Zeroizing::new(String::with_capacity(super::TEXT_BYTES));
    for part in [PREFIX, &id, "_", &secret] {
        text.push_str(part);
    }
    Ok((id, Secret(text)))
}

/// Which file it is, in which state; a file that is replaced or rewritten has another stamp.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    inode: (u64, u64),
    bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    /// None if there is no file.
    pub(super) fn of(path: &Path) -> Result<Option<Self>, TokensError> {
        match fs::metadata(path) {
            Ok(metadata) => Ok(Some(Stamp {
                inode: (metadata.dev(), metadata.ino()),
                bytes: metadata.size(),
                modified: (metadata.mtime(), metadata.mtime_nsec()),
                changed: (metadata.ctime(), metadata.ctime_nsec()),
            })),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(TokensError::Io { what: "read", path: path.to_owned(), source }),
        }
    }
}

impl From<&Token> for StoredToken {
    fn from(token: &Token) -> Self {
        StoredToken {
            id: token.id.clone(),
            name: token.name.clone(),
            scopes: token.scopes.iter().map(Scope::to_string).collect(),
            sha256: hex::encode(token.sha256),
            created_at: token.created_at.to_string(),
            expires_at: token.expires_at.map(|at| at.to_string()),
        }
    }
}

/// The tokens in `bytes`; otherwise what is wrong with it. Repeats nothing of it but names of fields: whoever edits it by hand may have put
/// a token's text there.
fn parse(bytes: &[u8]) -> Result<Vec<Token>, String> {
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(format!("it has more than {FILE_BYTES_MAX} bytes"));
    }
    let stored: Stored = serde_json::from_slice(bytes).map_err(|error| {
        let what = match error.classify() {
            serde_json::error::Category::Eof => "it ends too early".to_owned(),
            serde_json::error::Category::Data => {
                let text = error.to_string();
                let named = text.starts_with("missing field") || text.starts_with("duplicate field");
                let field = text.split(" at line ").next().filter(|_| named);
                field.unwrap_or("a field that is unknown, or has a value of another type").to_owned()
            }
            _ => "not JSON".to_owned(),
        };
        format!("{what}, at line {} column {}", error.line(), error.column())
    })?;
    if stored.format != FORMAT {
        return Err(format!("it has format {}, and this version reads format {FORMAT}", stored.format));
    }
    let mut seen = BTreeSet::new();
    let tokens = stored.tokens.into_iter().enumerate().map(|(n, token)| {
        let problem = |what: &str| format!("token {} of the list {what}", n + 1);
        let token = Token::try_from(token).map_err(problem)?;
        if seen.insert(token.id.clone()) { Ok(token) } else { Err(problem("has the id of another one")) }
    });
    tokens.collect()
}

impl TryFrom<StoredToken> for Token {
    type Error = &'static str;

    fn try_from(stored: StoredToken) -> Result<Self, &'static str> {
        let time = |text: String| text.parse::<Timestamp>().map_err(|_| "has a time that is not RFC 3339");
        if !is_id(&stored.id) {
            return Err("has an id that is not 8 lower case letters and digits");
        }
        if !is_name(&stored.name) {
            return Err("has a name that is none");
        }
        let scopes: Result<BTreeSet<Scope>, _> = stored.scopes.iter().map(|scope| scope.parse()).collect();
        let scopes = scopes.map_err(|_| "has a scope that there is not; scopes are append, read, erase and admin")?;
        if scopes.is_empty() {
            return Err("has no scope");
        }
        let mut sha256 = [0; 32];
        hex::decode_to_slice(&stored.sha256, &mut sha256).map_err(|_| "has a sha256 that is not 64 hex digits")?;
        Ok(Token {
            id: stored.id,
            name: stored.name,
            scopes,
            created_at: time(stored.created_at)?,
            expires_at: stored.expires_at.map(time).transpose()?,
            sha256,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use proptest::prelude::*;

    use super::*;

    fn setup() -> (tempfile::TempDir, TokenFile) {
        let dir = tempfile::tempdir().unwrap();
        let file = TokenFile::new(dir.path().join("data").join("tokens.json"));
        (dir, file)
    }

    fn names(file: &TokenFile) -> Vec<String> {
        file.load().unwrap().tokens.iter().map(|token| token.name.clone()).collect()
    }

    #[test]
    fn without_a_file_there_are_no_tokens() {
        let (_dir, file) = setup();
        let content = file.load().unwrap();
        assert!(!content.exists && content.tokens.is_empty() && content.warnings.is_empty());
    }

    #[test]
    fn a_token_is_kept_for_its_owner_alone_and_read_back() {
        let (_dir, file) = setup();
        let (made, _) =
            file.create("app", &[Scope::Read, Scope::Append, Scope::Read], Some(Duration::from_secs(3600))).unwrap();
        let content = file.load().unwrap();
        assert!(content.exists && content.warnings.is_empty());
        let read = &content.tokens[0];
        assert_eq!(
            (&read.id, &read.name, &read.scopes, read.sha256),
            (&made.id, &made.name, &made.scopes, made.sha256)
        );
        assert_eq!((read.created_at, read.expires_at), (made.created_at, made.expires_at));
        assert_eq!(made.expires_at.unwrap().as_second() - made.created_at.as_second(), 3600);
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
        assert_eq!((mode(file.path()), mode(file.directory())), (0o600, 0o700));
        let left: BTreeSet<_> =
            fs::read_dir(file.directory()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, BTreeSet::from(["tokens.json".into(), "tokens.json.lock".into()]));
    }

    #[test]
    fn a_third_token_of_a_name_is_refused_until_one_is_revoked() {
        let (_dir, file) = setup();
        let (first, _) = file.create("app", &[Scope::Read], None).unwrap();
        let (second, _) = file.create("app", &[Scope::Read], None).unwrap();
        let error = file.create("app", &[Scope::Read], None).unwrap_err();
        let expected = format!(
            "there are already two tokens named app in force ({}, {}); revoke one of them first",
            first.id, second.id
        );
        assert_eq!(error.to_string(), expected);
        file.create("other", &[Scope::Read], None).unwrap();
        assert!(matches!(file.revoke("app", false), Err(TokensError::Ambiguous { count: 2, .. })));
        assert_eq!(file.revoke(&first.id, false).unwrap()[0].id, first.id);
        file.create("app", &[Scope::Read], None).unwrap();
        assert_eq!(names(&file), ["app", "other", "app"]);
        assert_eq!(file.revoke("app", true).unwrap().len(), 2);
        assert!(matches!(file.revoke("app", false), Err(TokensError::NotFound { .. })));
        assert_eq!(names(&file), ["other"]);
    }

    #[test]
    fn expired_tokens_do_not_count() {
        let (_dir, file) = setup();
        for _ in 0..2 {
            file.create("app", &[Scope::Read], None).unwrap();
        }
        let expired = fs::read_to_string(file.path())
            .unwrap()
            .replace("\"created_at\"", "\"expires_at\": \"2020-01-01T00:00:00Z\", \"created_at\"");
        fs::write(file.path(), expired).unwrap();
        file.create("app", &[Scope::Read], None).unwrap();
        assert_eq!(names(&file).len(), 3);
    }

    #[test]
    fn what_is_no_name_scope_or_time_is_refused_and_makes_no_file() {
        let (_dir, file) = setup();
        let long = "x".repeat(65);
        for name in ["", "a b", "a/b", "ä", "a\n", &long] {
            assert!(matches!(file.create(name, &[Scope::Read], None), Err(TokensError::Name)), "{name:?}");
        }
        assert!(matches!(file.create("a", &[], None), Err(TokensError::NoScope)));
        for expires in [Duration::ZERO, Duration::from_millis(999), Duration::MAX, Duration::from_secs(1 << 40)] {
            assert!(matches!(file.create("a", &[Scope::Read], Some(expires)), Err(TokensError::Expiry)), "{expires:?}");
        }
        assert!(!file.path().exists());
    }

    #[test]
    fn a_file_that_others_can_use_is_warned_of_and_private_again_after_an_edit() {
        let (_dir, file) = setup();
        file.create("app", &[Scope::Read], None).unwrap();
        fs::set_permissions(file.path(), fs::Permissions::from_mode(0o644)).unwrap();
        assert!(file.load().unwrap().warnings[0].contains("mode 644"));
        file.create("app", &[Scope::Read], None).unwrap();
        assert!(file.load().unwrap().warnings.is_empty());
    }

    #[test]
    fn a_malformed_file_is_refused_with_the_place_and_left_as_it_is() {
        let (_dir, file) = setup();
        let (_, secret) = file.create("app", &[Scope::Read], None).unwrap();
        let good = fs::read_to_string(file.path()).unwrap();
        let refused = |content: String| {
            fs::write(file.path(), &content).unwrap();
            let error = file.create("app", &[Scope::Read], None).unwrap_err();
            assert_eq!(fs::read_to_string(file.path()).unwrap(), content);
            let TokensError::Malformed { problem, .. } = error else { panic!("{error}") };
            problem
        };
        insta::assert_snapshot!(refused(String::new()), @"it ends too early, at line 1 column 0");
        insta::assert_snapshot!(refused(good[..good.len() / 2].to_owned()), @"it ends too early, at line 10 column 7");
        insta::assert_snapshot!(refused("tokens".to_owned()), @"not JSON, at line 1 column 2");
        insta::assert_snapshot!(refused(good.replace("\"name\"", "\"nam\"")), @"a field that is unknown, or has a value of another type, at line 6 column 11");
        insta::assert_snapshot!(refused(good.replace("  \"format\": 1,\n", "")), @"missing field `format`, at line 13 column 1");
        insta::assert_snapshot!(refused(good.replace("\"read\"", "\"root\"")), @"token 1 of the list has a scope that there is not; scopes are append, read, erase and admin");
        insta::assert_snapshot!(refused(good.replace("\"app\"", "\"a b\"")), @"token 1 of the list has a name that is none");
        insta::assert_snapshot!(refused(good.replace("\"format\": 1", "\"format\": 7")), @"it has format 7, and this version reads format 1");
        insta::assert_snapshot!(refused(good.replace("\"sha256\": \"", "\"sha256\": \"0")), @"token 1 of the list has a sha256 that is not 64 hex digits");
        // A text where its hash belongs is not repeated.
        let with_text =
            refused(good.replace("\"name\": \"app\"", &format!("\"name\": {{\"{}\": 1}}", secret.expose())));
        assert!(!with_text.contains(secret.expose()));
        let with_text = refused(good.replace("\"name\"", &format!("\"{}\": 1, \"name\"", secret.expose())));
        assert!(!with_text.contains(secret.expose()));
    }

    #[test]
    fn two_tokens_with_one_id_are_refused() {
        let entry = |name| {
            format!(
                "{{\"id\":\"abcdefgh\",\"name\":\"{name}\",\"scopes\":[\"read\"],\"sha256\":\"{}\",\"created_at\":\"2026-01-01T00:00:00Z\"}}",
                "0".repeat(64)
            )
        };
        let text = |second| format!("{{\"format\":1,\"tokens\":[{},{second}]}}", entry("a"));
        assert_eq!(parse(text(entry("b")).as_bytes()).unwrap_err(), "token 2 of the list has the id of another one");
        assert_eq!(parse(text(entry("b").replace("gh\"", "gi\"")).as_bytes()).unwrap().len(), 2);
    }

    #[test]
    fn edits_at_once_lose_no_token() {
        let (_dir, file) = setup();
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let file = &file;
                scope.spawn(move || {
                    for n in 0..8 {
                        file.create(&format!("t{thread}-{n}"), &[Scope::Read], None).unwrap();
                    }
                });
            }
        });
        let names: BTreeSet<String> = names(&file).into_iter().collect();
        assert_eq!(names.len(), 32);
    }

    /// The edit was killed before the rename: the old file is whole, and the next edit goes through.
    #[test]
    fn what_a_killed_edit_left_is_in_nobodys_way() {
        let (_dir, file) = setup();
        file.create("app", &[Scope::Read], None).unwrap();
        fs::write(beside(file.path(), ".new"), "{\"format\":1,\"tok").unwrap();
        assert_eq!(names(&file), ["app"]);
        file.create("other", &[Scope::Read], None).unwrap();
        assert_eq!(names(&file), ["app", "other"]);
    }

    /// As root, which the test may not be: otherwise there is nothing to be seen.
    #[test]
    fn what_root_makes_belongs_to_the_owner_of_the_directory() {
        let (dir, file) = setup();
        if !rustix::process::geteuid().is_root() {
            return;
        }
        chown(dir.path(), Some(4711), Some(4712)).unwrap();
        for _ in 0..2 {
            file.create("app", &[Scope::Read], None).unwrap();
            let lock = beside(file.path(), ".lock");
            for (path, mode) in [(file.directory(), 0o700), (file.path(), 0o600), (&*lock, 0o600)] {
                let metadata = fs::metadata(path).unwrap();
                assert_eq!((metadata.uid(), metadata.gid(), metadata.mode() & 0o777), (4711, 4712, mode));
            }
        }
    }

    #[test]
    fn texts_are_of_their_form_and_all_different() {
        let texts: BTreeSet<String> = (0..1000).map(|_| random().unwrap().1.expose().to_owned()).collect();
        assert_eq!(texts.len(), 1000);
        assert!(texts.iter().all(|text| super::super::id_of(text).is_some()));
    }

    proptest! {
        #[test]
        fn no_content_makes_the_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes);
        }

        #[test]
        fn no_json_of_the_right_shape_makes_the_parser_panic(id in ".{0,9}", name in ".{0,66}", hash in ".{0,66}", at in ".{0,30}") {
            let token = serde_json::json!({"id": id, "name": name, "scopes": ["read"], "sha256": hash, "created_at": at, "expires_at": at});
            let file = serde_json::json!({"format": 1, "tokens": [token]});
            if let Ok(tokens) = parse(file.to_string().as_bytes()) {
                prop_assert!(tokens.iter().all(|token| is_name(&token.name) && is_id(&token.id)));
            }
        }
    }
}
