//! Projections from a directory of SQL files, taken over while the node runs.
//!
//! Invariants:
//! - A file that cannot be used changes nothing: its projection goes on as it was, and the list says what is wrong with it.
//! - A file that is gone does not drop a projection: somebody may be moving it. Dropping is asked for.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use kuma_core::{Kuma, SqlProjection};
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use crate::problem::full;

/// Between two looks at the directory.
const EVERY: Duration = Duration::from_secs(2);

/// What is known of the directory.
pub(crate) struct ProjectionFiles {
    directory: Option<PathBuf>,
    kuma: Kuma,
    known: Mutex<Known>,
    /// One look at a time.
    looking: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct Known {
    /// When the files were last looked at: names, sizes and times.
    seen: Option<Vec<(PathBuf, u64, Option<SystemTime>)>>,
    /// The file of each projection.
    files: BTreeMap<String, String>,
    /// Files that cannot be used, with the projection that they define, if that can be told.
    refused: BTreeMap<String, (Option<String>, String)>,
}

impl ProjectionFiles {
    pub(crate) fn new(directory: Option<PathBuf>, kuma: Kuma) -> Arc<Self> {
        Arc::new(ProjectionFiles { directory, kuma, known: Mutex::default(), looking: tokio::sync::Mutex::default() })
    }

    /// Looks at the directory now and then, until it is told to stop.
    pub(crate) async fn watch(self: Arc<Self>, stopping: CancellationToken) {
        if self.directory.is_none() {
            return;
        }
        while stopping.run_until_cancelled(tokio::time::sleep(EVERY)).await.is_some() {
            self.look(false).await;
        }
    }

    /// Takes over what has changed; everything if `is_forced`.
    pub(crate) async fn look(&self, is_forced: bool) {
        let Some(directory) = self.directory.clone() else { return };
        let _turn = self.looking.lock().await;
        let listed = {
            let directory = directory.clone();
            tokio::task::spawn_blocking(move || list(&directory)).await
        };
        let seen = match listed {
            Ok(Ok(seen)) => seen,
            Ok(Err(error)) => {
                let problem = format!("the directory cannot be read: {error}");
                let before = self.known.lock().refused.insert(".".to_owned(), (None, problem.clone()));
                if before.is_none() {
                    tracing::error!(%error, "the directory of projections cannot be read; projections go on as they were");
                }
                // Looked at again when it can be read.
                self.known.lock().seen = None;
                return;
            }
            Err(_) => return,
        };
        if !is_forced && self.known.lock().seen.as_ref() == Some(&seen) {
            return;
        }
        let loaded = tokio::task::spawn_blocking(move || SqlProjection::load_directory(directory)).await;
        let Ok(Ok(loaded)) = loaded else { return };
        let (mut files, mut refused) = (BTreeMap::new(), BTreeMap::new());
        for (path, projection) in loaded {
            let file = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            let (name, problem) = match projection {
                Err(error) => (None, Some(full(&error))),
                Ok(projection) => {
                    let name = kuma_core::Projection::name(&projection).to_owned();
                    match self.kuma.projection(projection).await {
                        Ok(_) => (Some(name), None),
                        Err(error) => (Some(name), Some(full(&error))),
                    }
                }
            };
            if let Some(problem) = problem {
                // The text of the file is the operator's; it holds no events.
                tracing::error!(file, problem, "a projection's file cannot be used; what is served goes on as it was");
                refused.insert(file.clone(), (name.clone(), problem));
            }
            if let Some(name) = name {
                files.insert(name, file);
            }
        }
        let mut known = self.known.lock();
        *known = Known { seen: Some(seen), files, refused };
    }

    /// The file of a projection, and what is wrong with it.
    pub(crate) fn of(&self, projection: &str) -> (Option<String>, Option<String>) {
        let known = self.known.lock();
        let file = known.files.get(projection).cloned();
        let problem = file.as_ref().and_then(|file| known.refused.get(file)).map(|(_, problem)| problem.clone());
        (file, problem)
    }

    /// Files that cannot be used, and why.
    pub(crate) fn refused(&self) -> Vec<(String, String)> {
        self.known.lock().refused.iter().map(|(file, (_, problem))| (file.clone(), problem.clone())).collect()
    }
}

/// Names, sizes and times of the SQL files.
fn list(directory: &Path) -> std::io::Result<Vec<(PathBuf, u64, Option<SystemTime>)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "sql")
            && let Ok(metadata) = std::fs::metadata(&path)
        {
            found.push((path, metadata.len(), metadata.modified().ok()));
        }
    }
    found.sort();
    Ok(found)
}
