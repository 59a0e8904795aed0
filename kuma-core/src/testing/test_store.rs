//! A store for one test.

use std::{ops::Deref, path::Path};

use tempfile::TempDir;

use crate::{Kuma, Options};

/// A store in a temporary directory, which is removed with it. It keeps every promise and returns every error that any other store
/// does: it is the same code. Where the machine has memory for files (`/dev/shm`) it lies there, and needs no disk.
///
/// ```
/// # use kuma_core::{NewEvent, testing::TestStore};
/// # use serde_json::json;
/// # #[tokio::main]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let store = TestStore::start().await;
/// store.raw("order", "7").append(NewEvent::json("Placed", &json!({"total": 5}))?).await?;
/// let store = store.reopen().await; // as after a restart of the service
/// assert_eq!(store.raw("order", "7").read().await?.0["total"], 5);
/// # Ok(())
/// # }
/// ```
pub struct TestStore {
    kuma: Kuma,
    options: Box<dyn Fn(Options) -> Options + Send + Sync>,
    // Dropped last: the files go when the store has.
    directory: TempDir,
}

impl TestStore {
    /// A new store with two shards and otherwise default options.
    ///
    /// # Panics
    /// It cannot be made.
    pub async fn start() -> Self {
        TestStore::start_with(|options| options).await
    }

    /// A new store with what `options` makes of the default options.
    ///
    /// # Panics
    /// It cannot be made.
    pub async fn start_with(options: impl Fn(Options) -> Options + Send + Sync + 'static) -> Self {
        let in_memory = Path::new("/dev/shm");
        let in_memory = in_memory.is_dir().then(|| TempDir::with_prefix_in("kuma-test-", in_memory).ok()).flatten();
        let directory = in_memory.map_or_else(|| TempDir::with_prefix("kuma-test-"), Ok);
        let directory = directory.unwrap_or_else(|error| panic!("no temporary directory: {error}"));
        let kuma = open(&options, directory.path()).await;
        TestStore { kuma, options: Box::new(options), directory }
    }

    /// Closes the store and opens it again.
    ///
    /// # Panics
    /// It cannot be opened.
    pub async fn reopen(mut self) -> Self {
        self.kuma.shutdown().await;
        self.kuma = open(&self.options, self.directory.path()).await;
        self
    }

    /// Where its files are.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }
}

async fn open(options: &(impl Fn(Options) -> Options + ?Sized), path: &Path) -> Kuma {
    let opened = Kuma::start(options(Options::new(path).shards(2))).await;
    opened.unwrap_or_else(|error| panic!("the test store cannot be opened: {error}"))
}

impl Deref for TestStore {
    type Target = Kuma;

    fn deref(&self) -> &Kuma {
        &self.kuma
    }
}
