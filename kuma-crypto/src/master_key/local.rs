//! A master key whose bytes are in this process.
//!
//! Invariant: there is exactly one current key, which wraps; older ones only unwrap. A rotation is: put a new key in
//! front, restart or reload, [`rewrap`](super::rewrap) every blob, then take the old key away.

use std::fmt;
use std::path::Path;

use super::{BoxFuture, KekId, MasterKey, MasterKeyError, key_file, key_text, wrapped};
use crate::random;
use crate::secret::Secret32;

/// Master keys held in memory: one current, any number of older ones. Wiped on drop, printed as ids only.
#[derive(Clone)]
pub struct LocalMasterKey {
    current: Kek,
    older: Vec<Kek>,
}

/// One master key and its name.
#[derive(Clone)]
struct Kek {
    id: KekId,
    secret: Secret32,
}

impl LocalMasterKey {
    /// A new random key that exists only in memory: whatever it wraps is lost with it. For tests and ephemeral stores.
    pub fn generate() -> Self {
        Self::from_secret(Secret32::generate())
    }

    /// Makes a new random key and writes it to a new file that only its owner can read (0600).
    ///
    /// Never overwrites, and leaves either no file or a whole one, even after a crash. When this returns the file is
    /// durable.
    ///
    /// # Errors
    /// [`MasterKeyError::FileExists`] if something is at `path`; [`MasterKeyError::Io`] if it cannot be written.
    pub fn create_file(path: &Path) -> Result<Self, MasterKeyError> {
        let master = Self::generate();
        key_file::create(path, &key_text::format(master.current.id, &master.current.secret))?;
        Ok(master)
    }

    /// Reads the key file at `path`: the first key in it is the current one, the others are older ones.
    ///
    /// # Errors
    /// [`MasterKeyError::FileMissing`], [`MasterKeyError::PermissionsTooOpen`], [`MasterKeyError::Malformed`],
    /// [`MasterKeyError::NoKey`], [`MasterKeyError::TooLarge`] or [`MasterKeyError::Io`].
    pub fn from_file(path: &Path) -> Result<Self, MasterKeyError> {
        let text = key_file::read(path)?;
        Self::from_text(&text, b"\n", &path.display().to_string())
    }

    /// Reads the keys from the environment variable `var`: the text of a key file, in which `;` ends a line too.
    ///
    /// A process's environment can be read by its user for as long as it runs; prefer a file.
    ///
    /// # Errors
    /// [`MasterKeyError::EnvMissing`], [`MasterKeyError::Malformed`], [`MasterKeyError::NoKey`] or
    /// [`MasterKeyError::TooLarge`].
    pub fn from_env(var: &str) -> Result<Self, MasterKeyError> {
        let value = std::env::var_os(var).ok_or_else(|| MasterKeyError::EnvMissing { var: var.to_owned() })?;
        let text = zeroize::Zeroizing::new(value.into_encoded_bytes());
        Self::from_text(&text, b"\n;", &format!("environment variable {var}"))
    }

    /// Adds the keys of `older`, which from now on only unwrap. Keys already at hand are not added twice.
    pub fn with_older(mut self, older: LocalMasterKey) -> Self {
        for kek in std::iter::once(older.current).chain(older.older) {
            if self.find(kek.id).is_none() {
                self.older.push(kek);
            }
        }
        self
    }

    pub(crate) fn from_secret(secret: Secret32) -> Self {
        Self { current: Kek { id: KekId::of(&secret), secret }, older: Vec::new() }
    }

    fn from_text(text: &[u8], line_ends: &[u8], origin: &str) -> Result<Self, MasterKeyError> {
        let (current, older) = key_text::parse(text, line_ends, origin)?;
        Ok(older.into_iter().map(Self::from_secret).fold(Self::from_secret(current), Self::with_older))
    }

    fn find(&self, id: KekId) -> Option<&Kek> {
        self.keks().find(|kek| kek.id == id)
    }

    fn keks(&self) -> impl Iterator<Item = &Kek> {
        std::iter::once(&self.current).chain(&self.older)
    }

    fn unwrap_now(&self, wrapped: &[u8], aad: &[u8]) -> Result<Secret32, MasterKeyError> {
        let wanted = wrapped::wrapped_by(wrapped)?;
        let unknown = || MasterKeyError::UnknownKek { wanted, at_hand: self.keks().map(|kek| kek.id).collect() };
        let kek = self.find(wanted).ok_or_else(unknown)?;
        wrapped::unwrap((kek.id, &kek.secret), wrapped, aad)
    }
}

impl MasterKey for LocalMasterKey {
    fn current(&self) -> KekId {
        self.current.id
    }

    fn wrap<'a>(&'a self, secret: &'a Secret32, aad: &'a [u8]) -> BoxFuture<'a, Result<Vec<u8>, MasterKeyError>> {
        let kek = (self.current.id, &self.current.secret);
        Box::pin(async move { Ok(wrapped::wrap_with_nonce(kek, &random::nonce(), secret, aad)) })
    }

    fn unwrap<'a>(&'a self, wrapped: &'a [u8], aad: &'a [u8]) -> BoxFuture<'a, Result<Secret32, MasterKeyError>> {
        Box::pin(async move { self.unwrap_now(wrapped, aad) })
    }

    fn is_local(&self) -> bool {
        true
    }
}

impl fmt::Debug for LocalMasterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let older: Vec<KekId> = self.older.iter().map(|kek| kek.id).collect();
        let mut shown = f.debug_struct("LocalMasterKey");
        shown.field("current", &self.current.id).field("older", &older);
        shown.field("keys", &self.current.secret).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_wrapped_secret_unwraps_to_itself() {
        let (master, secret) = (LocalMasterKey::generate(), Secret32::generate());
        let wrapped = master.wrap(&secret, b"place").await.unwrap();
        assert_eq!(wrapped.len(), 81);
        assert_eq!(master.unwrap(&wrapped, b"place").await.unwrap().expose(), secret.expose());
    }

    #[tokio::test]
    async fn two_wraps_of_one_secret_differ() {
        let (master, secret) = (LocalMasterKey::generate(), Secret32::generate());
        assert_ne!(master.wrap(&secret, b"").await.unwrap(), master.wrap(&secret, b"").await.unwrap());
    }

    #[tokio::test]
    async fn an_older_key_unwraps_and_the_current_one_wraps() {
        let (old, secret) = (LocalMasterKey::generate(), Secret32::generate());
        let by_old = old.wrap(&secret, b"").await.unwrap();
        let old_id = old.current();
        let master = LocalMasterKey::generate().with_older(LocalMasterKey::generate().with_older(old));
        assert_eq!(master.unwrap(&by_old, b"").await.unwrap().expose(), secret.expose());
        let by_new = master.wrap(&secret, b"").await.unwrap();
        assert_eq!(wrapped::wrapped_by(&by_new).unwrap(), master.current());
        assert_ne!(master.current(), old_id);
    }

    /// The rotation was called finished too early: the message has to name what is missing and what is there.
    #[tokio::test]
    async fn without_the_older_key_unwrapping_names_both_master_keys() {
        let (old, new) = (LocalMasterKey::generate(), LocalMasterKey::generate());
        let wrapped = old.wrap(&Secret32::generate(), b"").await.unwrap();
        let error = new.unwrap(&wrapped, b"").await.unwrap_err();
        assert!(matches!(&error, MasterKeyError::UnknownKek { wanted, at_hand }
            if *wanted == old.current() && *at_hand == [new.current()]));
        let text = error.to_string();
        assert!(text.contains(&old.current().to_string()) && text.contains(&new.current().to_string()), "{text}");
    }

    #[test]
    fn a_key_that_is_at_hand_is_not_added_twice() {
        let master = LocalMasterKey::generate();
        let again = master.clone().with_older(master.clone()).with_older(master);
        assert_eq!(again.keks().count(), 1);
    }

    #[test]
    fn several_lines_are_the_current_key_and_older_ones() {
        let (a, b) = ("aa".repeat(32), "bb".repeat(32));
        let both = LocalMasterKey::from_text(format!("{a}\n{b}\n").as_bytes(), b"\n", "test").unwrap();
        let old = LocalMasterKey::from_text(b.as_bytes(), b"\n", "test").unwrap();
        assert_eq!(both.keks().count(), 2);
        assert_ne!(both.current(), old.current());
        assert!(both.find(old.current()).is_some());
    }

    #[test]
    fn a_missing_environment_variable_is_named() {
        let error = LocalMasterKey::from_env("KUMA_TEST_NO_SUCH_KEY").unwrap_err();
        assert!(matches!(&error, MasterKeyError::EnvMissing { var } if var == "KUMA_TEST_NO_SUCH_KEY"));
    }

    /// Cargo sets this variable for tests, and it is no key: reading it shows that the value is parsed and not
    /// repeated.
    #[test]
    fn an_environment_variable_that_is_no_key_is_refused_without_its_content() {
        let error = LocalMasterKey::from_env("CARGO_PKG_NAME").unwrap_err();
        assert!(matches!(&error, MasterKeyError::Malformed { line: 1, .. }), "{error:?}");
        assert!(!format!("{error} {error:?}").contains("kuma-crypto"));
    }
}
