//! Purging models, and finding what they hold, by what their files say: no code of a projection is needed.

use std::sync::Arc;

use kuma_shard::{FileOptions, ModelError, ModelFile, Purged};

use super::blocking;
use crate::{
    ErasureRule, Filter,
    model_dir::{ModelBuild, ModelDir, PROJECTIONS},
    model_query::json,
    projection::is_passing,
    projector::{PurgeRule, PurgedLife},
};

/// A model that was purged.
#[derive(Clone, Debug)]
pub(crate) struct PurgedModel {
    /// Its file, from the data directory on.
    pub(crate) file: String,
    /// Of which entities it may have held something.
    pub(crate) filter: Arc<Filter>,
    pub(crate) outcome: &'static str,
}

/// What one read model holds of an entity, for an archive.
#[derive(serde::Serialize)]
pub(crate) struct HeldRows {
    projection: String,
    /// Which model.
    model: ModelBuild,
    /// The table; none where the model is purged by statements, which do not say where they find the entity.
    table: Option<String>,
    rows: Vec<serde_json::Map<String, serde_json::Value>>,
}

/// What the models of all projections hold of an entity, as far as their erasure rules say where.
pub(crate) fn held_rows(
    data_dir: &std::path::Path,
    options: &FileOptions,
    kind: &str,
    id: &str,
) -> std::io::Result<Vec<HeldRows>> {
    let mut held = Vec::new();
    for (projection, dir) in ModelDir::all(data_dir)? {
        for model in dir.builds()? {
            let file = ModelFile::open(&dir.file(model), options).map_err(std::io::Error::other)?;
            let meta = |name| file.meta(name).map(Option::unwrap_or_default).map_err(std::io::Error::other);
            let filter: Filter = serde_json::from_str(&meta("filter")?)?;
            let erasure: ErasureRule = serde_json::from_str(&meta("erasure")?)?;
            let projection = projection.clone();
            match erasure {
                _ if !filter.matches_kind(kind) => {}
                ErasureRule::None { .. } => {}
                ErasureRule::Statements { .. } => {
                    held.push(HeldRows { projection, model, table: None, rows: Vec::new() });
                }
                ErasureRule::Columns { columns } => {
                    for (table, column) in columns {
                        let rows = file.rows_where(&table, &column, id);
                        let rows = rows.map_err(std::io::Error::other)?.into_iter();
                        let row = |row: Vec<_>| row.into_iter().map(|(name, value)| (name, json(value))).collect();
                        let (rows, table) = (rows.map(row).collect(), Some(table));
                        held.push(HeldRows { projection: projection.clone(), model, table, rows });
                    }
                }
            }
        }
    }
    Ok(held)
}
pub(super) fn file_name(name: &str, build: ModelBuild) -> String {
    format!("{}/{name}/{build}.db", PROJECTIONS)
}

/// What a receipt says of a model that was concerned.
pub(super) fn told(file: String, concerned: Option<Arc<Filter>>) -> Option<PurgedModel> {
    Some(PurgedModel { file, filter: concerned?, outcome: "rows deleted; file written anew; log cut" })
}

pub(super) fn deleted(file: String) -> PurgedModel {
    PurgedModel { file, filter: Arc::default(), outcome: "deleted, because it could not be purged" }
}

/// Whether trying again is of no use: the rule fails, or the file is damaged.
pub(super) fn is_hopeless(error: &ModelError) -> bool {
    use kuma_shard::rusqlite::ErrorCode::{DatabaseCorrupt, NotADatabase};
    match error {
        ModelError::Foreign { .. } => true,
        ModelError::Purge { cause, .. } => !is_passing(cause),
        ModelError::Sqlite { source, .. } => {
            matches!(source.sqlite_error_code(), Some(DatabaseCorrupt | NotADatabase))
        }
        _ => false,
    }
}

/// Purges a model that nobody feeds, by what its file says.
pub(super) async fn purge_file(
    dir: &ModelDir,
    build: ModelBuild,
    options: &FileOptions,
    lives: Arc<[PurgedLife]>,
) -> Result<Option<Arc<Filter>>, ModelError> {
    let (path, options) = (dir.file(build), options.clone());
    blocking(move || {
        let mut file = ModelFile::open(&path, &options)?;
        let foreign = |detail: &str| ModelError::Foreign { path: path.clone(), detail: detail.to_owned() };
        let filter = file.meta("filter")?.and_then(|text| serde_json::from_str::<Filter>(&text).ok());
        let erasure = file.meta("erasure")?.and_then(|text| serde_json::from_str::<ErasureRule>(&text).ok());
        let (Some(filter), Some(erasure)) = (filter, erasure) else {
            return Err(foreign("it does not say how it is purged"));
        };
        let rule = PurgeRule { filter: Arc::new(filter), sql: erasure.sql().into() };
        let concerned: Vec<Purged> = rule.concerned(&lives);
        let purged = match concerned.is_empty() {
            true => None,
            false => {
                file.purge(&rule.sql, &concerned)?;
                Some(rule.filter)
            }
        };
        file.close()?;
        Ok(purged)
    })
    .await
}

/// Purges the models of a projection that nobody registered.
pub(super) async fn purge_unknown(
    name: &str,
    dir: &ModelDir,
    options: &FileOptions,
    lives: &Arc<[PurgedLife]>,
) -> Result<Vec<PurgedModel>, String> {
    let mut purged = Vec::new();
    for build in dir.builds().map_err(|error| error.to_string())? {
        let file = file_name(name, build);
        match purge_file(dir, build, options, lives.clone()).await {
            Ok(concerned) => purged.extend(told(file, concerned)),
            Err(error) if is_hopeless(&error) => {
                tracing::error!(projection = name, model = %build, %error, "a read model cannot be purged; it is deleted, and built again when it is registered");
                dir.remove(build).map_err(|error| error.to_string())?;
                purged.push(deleted(file));
            }
            Err(error) => return Err(error.to_string()),
        }
    }
    Ok(purged)
}
