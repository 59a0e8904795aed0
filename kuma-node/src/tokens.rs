//! Tokens: who may do what over HTTP. The file has hashes only; a token's text is shown once, when it is made.
//!
//! A text is `kuma_`, 8 letters and digits (the id, no secret), `_`, and 32 random bytes in base64url. Its SHA-256 is kept: the text has
//! 256 bits of chance in it, so that a slow hash would protect nothing and cost each request.
//!
//! Invariants. The file is replaced as a whole, under a lock: a reader sees the old or the new one, and no edit is lost. **Nothing that goes wrong
//! lets anybody in**: a file that is malformed, unreadable or gone leaves the tokens in force that were, and one from which the last token was
//! revoked lets nobody in. Only where there never was a file are requests let in without a token.

mod file;

use std::{
    collections::{BTreeSet, HashMap},
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
};

use arc_swap::ArcSwap;
use jiff::Timestamp;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use file::Stamp;
pub use file::{Content, TokenFile, TokensError};

const PREFIX: &str = "kuma_";
const ID_BYTES: usize = 8;
/// 32 bytes in base64url.
const SECRET_BYTES: usize = 43;
const TEXT_BYTES: usize = PREFIX.len() + ID_BYTES + 1 + SECRET_BYTES;

/// What a token allows. None implies another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// Append events, import.
    Append,
    /// Read entities, events, read models, receipts.
    Read,
    /// Erase entities, begin their next life.
    Erase,
    /// Operate the node: projections, audit log, verification, backups.
    Admin,
}

impl Scope {
    /// All of them.
    pub const ALL: [Scope; 4] = [Scope::Append, Scope::Read, Scope::Erase, Scope::Admin];

    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Scope::Append => "append",
            Scope::Read => "read",
            Scope::Erase => "erase",
            Scope::Admin => "admin",
        }
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A text that names no scope.
#[derive(Debug, thiserror::Error)]
#[error("there is no such scope; scopes are append, read, erase and admin")]
pub struct UnknownScope;

impl FromStr for Scope {
    type Err = UnknownScope;

    fn from_str(text: &str) -> Result<Self, UnknownScope> {
        Scope::ALL.into_iter().find(|scope| scope.as_str() == text).ok_or(UnknownScope)
    }
}

/// A token as it is kept: without its text. Its hash is in neither `Debug` nor JSON.
#[derive(Clone, Serialize)]
pub struct Token {
    /// Names it in logs and for revoking; part of its text, and no secret.
    pub id: String,
    /// Whose it is.
    pub name: String,
    /// What it allows.
    pub scopes: BTreeSet<Scope>,
    /// When it was made.
    #[serde(serialize_with = "as_text")]
    pub created_at: Timestamp,
    /// From when on it is refused.
    #[serde(serialize_with = "as_optional_text", skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Timestamp>,
    #[serde(skip)]
    sha256: [u8; 32],
}

fn as_text<S: serde::Serializer>(at: &Timestamp, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(at)
}

fn as_optional_text<S: serde::Serializer>(at: &Option<Timestamp>, serializer: S) -> Result<S::Ok, S::Error> {
    match at {
        Some(at) => serializer.collect_str(at),
        None => serializer.serialize_none(),
    }
}

impl Token {
    /// Whether it allows `scope`.
    pub fn allows(&self, scope: Scope) -> bool {
        self.scopes.contains(&scope)
    }

    /// Whether it is refused at `now` because of its age.
    pub fn is_expired(&self, now: Timestamp) -> bool {
        self.expires_at.is_some_and(|expires_at| expires_at <= now)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scopes: Vec<&str> = self.scopes.iter().map(|scope| scope.as_str()).collect();
        f.debug_struct("Token")
            .field("id", &self.id)
            .field("name", &self.name)
            .field("scopes", &scopes)
            .finish_non_exhaustive()
    }
}

/// The text of a token. Wiped from memory when it is dropped; not in `Debug`.
pub struct Secret(Zeroizing<String>);

impl Secret {
    /// The text, to be shown once.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// The id within the text of a token, if it has the form of one.
fn id_of(text: &str) -> Option<&str> {
    let rest = text.strip_prefix(PREFIX).filter(|_| text.len() == TEXT_BYTES)?;
    let (id, secret) = (rest.get(..ID_BYTES)?, rest.get(ID_BYTES + 1..)?);
    let is_base64url = secret.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte));
    (is_id(id) && rest.as_bytes()[ID_BYTES] == b'_' && is_base64url).then_some(id)
}

fn is_id(id: &str) -> bool {
    id.len() == ID_BYTES && id.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
}

/// Whether `text` is a token, or has one in it: such a text is not to be printed.
pub fn looks_like_token(text: &str) -> bool {
    text.match_indices(PREFIX).any(|(at, _)| text.get(at..at + TEXT_BYTES).is_some_and(|part| id_of(part).is_some()))
}

/// What a text turned out to be.
#[derive(Debug)]
pub enum Found {
    /// A token that is in force.
    Token(Arc<Token>),
    /// A token that was in force.
    Expired {
        /// Whose it was.
        name: String,
    },
    /// No token, or one that was revoked.
    Unknown,
}

/// The tokens in force, as a server uses them. Readers take no lock.
pub struct Tokens {
    path: PathBuf,
    current: ArcSwap<Current>,
    /// The file that was looked at last, whether or not it could be used: a broken one is reported once.
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Current {
    /// There is a file, or was one when it was last read.
    is_required: bool,
    by_id: HashMap<String, Arc<Token>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Seen {
    Absent,
    /// Its directory, say, may not be searched.
    Unreadable,
    File(Stamp),
}

impl Tokens {
    /// Reads the file at `path`. Without one every request is let in, see [`Tokens::is_open`]. Also returns what should be warned of.
    ///
    /// # Errors
    /// [`TokensError`] if there is a file that cannot be used.
    pub fn open(path: impl Into<PathBuf>) -> Result<(Self, Vec<String>), TokensError> {
        let path = path.into();
        // The stamp before the content: a file that is replaced in between is read again.
        let stamp = Stamp::of(&path)?;
        let content = TokenFile::new(&path).load()?;
        let seen = stamp.map_or(Seen::Absent, Seen::File);
        let current = Current::new(&content);
        Ok((Tokens { path, current: ArcSwap::from_pointee(current), seen: Mutex::new(seen) }, content.warnings))
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether requests need no token, because there is no file. A file in which no token is left lets nobody in.
    pub fn is_open(&self) -> bool {
        !self.current.load().is_required
    }

    /// How many tokens there are, expired ones too.
    pub fn len(&self) -> usize {
        self.current.load().by_id.len()
    }

    /// Whether there is none. Not the same as [`Tokens::is_open`].
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The token whose text is `text`.
    ///
    /// One hash and one comparison in constant time, whether or not there is a token with this id: how long it takes says nothing about the
    /// hashes, nor about which ids there are.
    pub fn find(&self, text: &str) -> Found {
        self.find_at(text, Timestamp::now())
    }

    fn find_at(&self, text: &str, now: Timestamp) -> Found {
        // Any hash will do that no text is known for.
        const NOBODY: [u8; 32] = [0; 32];
        let current = self.current.load();
        let token = id_of(text).and_then(|id| current.by_id.get(id));
        let wanted = token.map_or(&NOBODY, |token| &token.sha256);
        let is_same = bool::from(sha256(text).ct_eq(wanted));
        match token {
            Some(token) if is_same && token.is_expired(now) => Found::Expired { name: token.name.clone() },
            Some(token) if is_same => Found::Token(token.clone()),
            _ => Found::Unknown,
        }
    }

    /// Takes the file as it is now, and says whether anything was new. Cheap if it is the same file: to be called every two seconds.
    ///
    /// # Errors
    /// The file cannot be used, or it is gone. The tokens that were in force stay in force. Said once: the next call looks at the next file.
    pub fn reload(&self) -> Result<bool, TokensError> {
        let mut seen = self.seen.lock();
        let stamp = Stamp::of(&self.path);
        let now = match &stamp {
            Ok(Some(stamp)) => Seen::File(*stamp),
            Ok(None) => Seen::Absent,
            Err(_) => Seen::Unreadable,
        };
        if std::mem::replace(&mut *seen, now) == now {
            return Ok(false);
        }
        stamp?;
        let content = TokenFile::new(&self.path).load()?;
        if !content.exists {
            *seen = Seen::Absent;
            return if self.is_open() { Ok(false) } else { Err(TokensError::Vanished { path: self.path.clone() }) };
        }
        self.current.store(Arc::new(Current::new(&content)));
        Ok(true)
    }
}

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokens").field("path", &self.path).field("tokens", &self.len()).finish_non_exhaustive()
    }
}

impl Current {
    fn new(content: &Content) -> Self {
        let by_id = content.tokens.iter().map(|token| (token.id.clone(), token.clone())).collect();
        Current { is_required: content.exists, by_id }
    }
}

fn sha256(text: &str) -> [u8; 32] {
    Sha256::digest(text.as_bytes()).into()
}

#[cfg(test)]
mod tests {
    use std::{fs, time::Duration};

    use proptest::prelude::*;

    use super::*;

    fn setup() -> (tempfile::TempDir, TokenFile) {
        let dir = tempfile::tempdir().unwrap();
        let file = TokenFile::new(dir.path().join("tokens.json"));
        (dir, file)
    }

    fn tokens(file: &TokenFile) -> Tokens {
        Tokens::open(file.path()).unwrap().0
    }

    fn is_token(found: &Found, wanted: &Token) -> bool {
        matches!(found, Found::Token(token) if token.id == wanted.id)
    }

    #[test]
    fn a_token_is_found_by_its_text_alone() {
        let (_dir, file) = setup();
        let (app, secret) = file.create("app", &[Scope::Append], None).unwrap();
        let (_, other) = file.create("other", &[Scope::Read], None).unwrap();
        let tokens = tokens(&file);
        let found = tokens.find(secret.expose());
        assert!(is_token(&found, &app));
        let Found::Token(token) = found else { panic!("not found") };
        assert!(token.allows(Scope::Append) && !token.allows(Scope::Read) && !token.allows(Scope::Admin));
        // The id of one with the secret of another.
        let mixed =
            format!("{}{}", &secret.expose()[..PREFIX.len() + ID_BYTES], &other.expose()[PREFIX.len() + ID_BYTES..]);
        let unknown = format!("kuma_zzzzzzzz_{}", &secret.expose()[PREFIX.len() + ID_BYTES + 1..]);
        let changed = format!("{}!", &secret.expose()[..TEXT_BYTES - 1]);
        for bad in ["", "kuma_", &mixed, &unknown, &changed, &app.id, &format!("{} ", secret.expose())] {
            assert!(matches!(tokens.find(bad), Found::Unknown));
        }
    }

    #[test]
    fn an_expired_token_is_told_apart_but_only_by_its_holder() {
        let (_dir, file) = setup();
        let (_, secret) = file.create("app", &[Scope::Read], Some(Duration::from_secs(60))).unwrap();
        let tokens = tokens(&file);
        assert!(matches!(tokens.find(secret.expose()), Found::Token(_)));
        let later = Timestamp::now() + jiff::SignedDuration::from_secs(61);
        assert!(matches!(tokens.find_at(secret.expose(), later), Found::Expired { name } if name == "app"));
        let guessed = format!("{}{}", &secret.expose()[..PREFIX.len() + ID_BYTES + 1], "A".repeat(SECRET_BYTES));
        assert!(matches!(tokens.find_at(&guessed, later), Found::Unknown));
    }

    #[test]
    fn two_tokens_of_a_name_are_both_in_force_until_one_is_revoked() {
        let (_dir, file) = setup();
        let (old, old_secret) = file.create("app", &[Scope::Append], None).unwrap();
        let tokens = tokens(&file);
        let (new, new_secret) = file.create("app", &[Scope::Append], None).unwrap();
        assert!(matches!(tokens.find(new_secret.expose()), Found::Unknown));
        assert!(tokens.reload().unwrap());
        assert!(!tokens.reload().unwrap(), "nothing new");
        assert!(is_token(&tokens.find(old_secret.expose()), &old));
        assert!(is_token(&tokens.find(new_secret.expose()), &new));
        file.revoke(&old.id, false).unwrap();
        assert!(tokens.reload().unwrap());
        assert!(matches!(tokens.find(old_secret.expose()), Found::Unknown));
        assert!(is_token(&tokens.find(new_secret.expose()), &new));
    }

    #[test]
    fn without_a_file_it_is_open_and_with_one_it_is_not() {
        let (_dir, file) = setup();
        let tokens = tokens(&file);
        assert!(tokens.is_open() && tokens.is_empty());
        assert!(!tokens.reload().unwrap());
        let (token, secret) = file.create("first", &[Scope::Admin], None).unwrap();
        assert!(tokens.reload().unwrap());
        assert!(!tokens.is_open());
        assert!(is_token(&tokens.find(secret.expose()), &token));
    }

    /// Revoking the last token must not open the door to everybody, neither at once nor after a restart.
    #[test]
    fn a_file_without_tokens_lets_nobody_in() {
        let (_dir, file) = setup();
        let (token, secret) = file.create("only", &[Scope::Admin], None).unwrap();
        let running = tokens(&file);
        file.revoke(&token.id, false).unwrap();
        assert!(running.reload().unwrap());
        for tokens in [running, tokens(&file)] {
            assert!(!tokens.is_open() && tokens.is_empty());
            assert!(matches!(tokens.find(secret.expose()), Found::Unknown));
        }
    }

    #[test]
    fn a_file_that_vanishes_leaves_the_tokens_in_force_and_is_said_once() {
        let (_dir, file) = setup();
        let (token, secret) = file.create("app", &[Scope::Read], None).unwrap();
        let tokens = tokens(&file);
        let content = fs::read(file.path()).unwrap();
        fs::remove_file(file.path()).unwrap();
        assert!(matches!(tokens.reload(), Err(TokensError::Vanished { .. })));
        assert!(!tokens.reload().unwrap());
        assert!(!tokens.is_open() && is_token(&tokens.find(secret.expose()), &token));
        fs::write(file.path(), content).unwrap();
        assert!(tokens.reload().unwrap());
    }

    #[test]
    fn a_malformed_file_leaves_the_tokens_in_force_and_is_said_once() {
        let (_dir, file) = setup();
        let (token, secret) = file.create("app", &[Scope::Read], None).unwrap();
        let tokens = tokens(&file);
        for broken in ["", "{", "{\"format\":1,\"tokens\":[{}]}", "{\"format\":2,\"tokens\":[]}"] {
            fs::write(file.path(), broken).unwrap();
            assert!(matches!(tokens.reload(), Err(TokensError::Malformed { .. })), "{broken}");
            assert!(!tokens.reload().unwrap());
            assert!(!tokens.is_open() && is_token(&tokens.find(secret.expose()), &token));
        }
        assert!(Tokens::open(file.path()).is_err(), "a node does not start with it");
    }

    #[test]
    fn neither_hash_nor_text_is_printed() {
        let (_dir, file) = setup();
        let (token, secret) = file.create("app", &[Scope::Read], None).unwrap();
        let tokens = tokens(&file);
        let found = tokens.find(secret.expose());
        let json = serde_json::to_string(&token).unwrap();
        let hash = hex::encode(token.sha256);
        for text in [format!("{token:?} {secret:?} {tokens:?} {found:?}"), json] {
            assert!(!text.contains(&secret.expose()[TEXT_BYTES - 20..]) && !text.contains(&hash[..8]), "{text}");
            assert!(!text.contains(&format!("{:?}", token.sha256)), "{text}");
        }
        assert!(fs::read_to_string(file.path()).unwrap().contains(&hash), "the hash is what is kept");
        assert!(looks_like_token(&format!("Bearer {}", secret.expose())));
    }

    #[test]
    fn scopes_are_read_as_they_are_written() {
        for scope in Scope::ALL {
            assert_eq!(scope.to_string().parse::<Scope>().unwrap(), scope);
            assert_eq!(serde_json::to_value(scope).unwrap(), scope.as_str());
        }
        assert!("Append".parse::<Scope>().is_err() && "".parse::<Scope>().is_err());
    }

    proptest! {
        #[test]
        fn no_text_is_let_in_by_chance(text in "(kuma_)?[a-z0-9]{0,9}_?.{0,45}") {
            let (_dir, file) = setup();
            file.create("app", &[Scope::Read], None).unwrap();
            prop_assert!(matches!(tokens(&file).find(&text), Found::Unknown));
            let _ = looks_like_token(&text);
        }
    }
}
