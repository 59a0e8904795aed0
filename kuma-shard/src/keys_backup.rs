//! Copying the wrapped keys, and making `keys.db` of a copy.
//!
//! Invariants:
//! - A copy is made anew each time, in a file of its own: keys that were destroyed before are not in it.
//! - A key that was destroyed stays destroyed, in the copy and in what is made of it.
//! - Only wrapped keys are here, as in `keys.db`.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
};

use sqlx::{Connection, Row, SqliteConnection};

use crate::{
    CopyError, Destroyed, Digest, DiskId, FileOptions, KeyRow, KeyStore, RestoreFileError,
    book::Progress,
    keys, packed,
    progress::{self, Stored},
    schema::{self, Role},
    sqlite, statements,
};

const PAGE_ROWS: u32 = 1024;

/// What a copy of the keys holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeysContents {
    /// Keys.
    pub keys: u64,
    /// Keys that were destroyed.
    pub destroyed: u64,
    /// The sum of both.
    pub digest: Digest,
}

impl KeysContents {
    fn add(&mut self, row: &KeyRow) {
        self.digest.add(&row.hash());
        match row.is_destroyed() {
            true => self.destroyed += 1,
            false => self.keys += 1,
        }
    }

    fn remove(&mut self, row: &KeyRow) {
        self.digest.subtract(&row.hash());
        match row.is_destroyed() {
            true => self.destroyed -= 1,
            false => self.keys -= 1,
        }
    }

    fn stored(&self) -> Stored {
        let progress = Progress { next_position: 1, mark_position: 0, indexed_position: 0, digest: self.digest };
        Stored { commits: 1, progress }
    }
}

impl KeyStore {
    /// Copies all keys and secrets into a new file at `path`. `progress` is called with the number of keys so far.
    ///
    /// # Errors
    /// See [`CopyError`]. What is at `path` is of no use then.
    /// # Cancel safety
    /// Not cancel safe: what is at `path` is of no use.
    pub async fn back_up(
        &self,
        path: &Path,
        disk_id: DiskId,
        mut progress: impl FnMut(u64) + Send,
    ) -> Result<KeysContents, CopyError> {
        let fail = |error| CopyError::of(path, error);
        let mut connection = sqlite::connect_builder(path).await.map_err(fail)?;
        let begun = async {
            sqlx::query("BEGIN IMMEDIATE").execute(&mut connection).await?;
            schema::create(&mut connection, Role::KeysBackup, disk_id).await
        };
        begun.await.map_err(fail)?;
        let mut contents = KeysContents::default();
        for (name, wrapped) in self.secrets().await? {
            put_secret(&mut connection, &name, &wrapped).await.map_err(fail)?;
        }
        let mut after = 0;
        loop {
            let page = self.page(after, PAGE_ROWS).await?;
            let Some((last, _)) = page.last_key_value() else { break };
            after = *last;
            let rows: Vec<&KeyRow> = page.values().collect();
            match known(&mut connection, &rows).await.map_err(fail)? {
                false => {
                    statements::insert_key_rows(&mut connection, &rows).await.map_err(fail)?;
                    rows.iter().for_each(|row| contents.add(row));
                }
                // A wrapping that became longer meanwhile is met a second time, at the end.
                true => {
                    for row in rows {
                        if let Some(older) = put(&mut connection, row).await.map_err(fail)? {
                            contents.remove(&older);
                        }
                        contents.add(row);
                    }
                }
            }
            progress(contents.keys + contents.destroyed);
        }
        let finished = async {
            progress::insert(&mut connection, &contents.stored()).await?;
            sqlx::query("COMMIT").execute(&mut connection).await?;
            connection.close().await
        };
        finished.await.map_err(fail)?;
        File::open(path).and_then(|file| file.sync_all()).map_err(|source| io_error(path, source))?;
        Ok(contents)
    }
}

/// Whether any of these keys is there.
async fn known(connection: &mut SqliteConnection, rows: &[&KeyRow]) -> sqlx::Result<bool> {
    let names: Vec<[u8; 16]> = rows.iter().map(|row| row.key_id).collect();
    let query =
        sqlx::query("SELECT EXISTS (SELECT 1 FROM data_key WHERE key_id IN (SELECT unhex(value) FROM json_each(?)))");
    query.bind(packed::names(&names)).fetch_one(connection).await?.try_get(0)
}

/// Adds a key, or takes what is newer of one that is there; returns that one.
async fn put(connection: &mut SqliteConnection, row: &KeyRow) -> sqlx::Result<Option<KeyRow>> {
    let found = sqlx::query(keys::FIND).bind(row.key_id.to_vec()).fetch_optional(&mut *connection).await?;
    let Some(found) = found.as_ref().map(KeyRow::from_row).transpose()?.flatten() else {
        statements::insert_key_rows(connection, &[row]).await?;
        return Ok(None);
    };
    let update = sqlx::query("UPDATE data_key SET wrapped = ? WHERE key_id = ?");
    update.bind(row.wrapped.clone()).bind(row.key_id.to_vec()).execute(connection).await?;
    Ok(Some(found))
}

async fn put_secret(connection: &mut SqliteConnection, name: &str, wrapped: &[u8]) -> sqlx::Result<()> {
    let insert = sqlx::query("INSERT INTO secret(name, wrapped) VALUES (?, ?)");
    insert.bind(name.to_owned()).bind(wrapped.to_vec()).execute(connection).await.map(|_| ())
}

/// A copy of the keys, open to be read.
pub struct KeysBackup {
    path: PathBuf,
    connection: SqliteConnection,
    contents: KeysContents,
}

impl KeysBackup {
    /// Opens the copy at `path`, and checks that it is of the store `disk_id` and that its keys are those that were copied.
    ///
    /// # Errors
    /// See [`CopyError`].
    pub async fn open(path: &Path, disk_id: DiskId) -> Result<Self, CopyError> {
        let path = path.to_owned();
        if !path.try_exists().map_err(|source| io_error(&path, source))? {
            return Err(CopyError::Missing { path });
        }
        let mut connection = sqlite::connect_backup(&path, false).await.map_err(|error| CopyError::of(&path, error))?;
        let checked = schema::check(&mut connection, Role::KeysBackup, disk_id).await;
        checked.map_err(|misfit| CopyError::misfit(&path, misfit))?;
        let stored = progress::read(&mut connection).await.map_err(|error| CopyError::of(&path, error))?;
        let mut backup = KeysBackup { path, connection, contents: KeysContents::default() };
        let mut contents = KeysContents::default();
        backup.each(|row| contents.add(row)).await?;
        if stored != Some(contents.stored()) {
            return Err(CopyError::damaged(&backup.path, "its keys are not those that were copied"));
        }
        backup.contents = contents;
        Ok(backup)
    }

    /// What it holds.
    pub fn contents(&self) -> &KeysContents {
        &self.contents
    }

    /// A wrapped secret of the store.
    ///
    /// # Errors
    /// The file cannot be read.
    pub async fn secret(&mut self, name: &str) -> Result<Option<Vec<u8>>, CopyError> {
        let query = sqlx::query("SELECT wrapped FROM secret WHERE name = ?").bind(name.to_owned());
        let row = query.fetch_optional(&mut self.connection).await;
        let found = row.and_then(|row| row.map(|row| row.try_get(0)).transpose());
        found.map_err(|error| CopyError::of(&self.path, error))
    }

    /// Calls `see` with every key, destroyed ones too.
    ///
    /// # Errors
    /// The file cannot be read.
    pub async fn each(&mut self, mut see: impl FnMut(&KeyRow) + Send) -> Result<(), CopyError> {
        let mut after = 0;
        loop {
            let page = self.page(after).await?;
            let Some((last, _)) = page.last() else { return Ok(()) };
            after = *last;
            page.iter().for_each(|(_, row)| see(row));
        }
    }

    async fn page(&mut self, after: i64) -> Result<Vec<(i64, KeyRow)>, CopyError> {
        let query = sqlx::query(
            "SELECT number, key_id, id_hash, wrapped, created_at FROM data_key WHERE number > ? ORDER BY number LIMIT 0 + ?",
        );
        let rows = query.bind(after).bind(PAGE_ROWS).fetch_all(&mut self.connection).await;
        let rows = rows.map_err(|error| CopyError::of(&self.path, error))?;
        let mut page = Vec::with_capacity(rows.len());
        for row in &rows {
            let number: i64 = row.try_get("number").map_err(|error| CopyError::of(&self.path, error))?;
            let key = KeyRow::from_row(row).map_err(|error| CopyError::of(&self.path, error))?;
            let damaged = || CopyError::damaged(&self.path, format!("key number {number} is damaged"));
            page.push((number, key.ok_or_else(damaged)?));
        }
        Ok(page)
    }

    /// Makes the `keys.db` of a store in `directory` of it, which must not be there yet. Keys in `destroyed` are destroyed in it. Returns
    /// what it holds.
    ///
    /// # Errors
    /// See [`RestoreFileError`]. The new file is of no use then.
    pub async fn restore(
        &mut self,
        directory: &Path,
        disk_id: DiskId,
        options: &FileOptions,
        destroyed: &Destroyed,
    ) -> Result<KeysContents, RestoreFileError> {
        let spec = keys::spec(directory.to_owned(), disk_id, options);
        let mut connection = spec.begin_build().await?;
        let secrets =
            sqlx::query("SELECT name, wrapped FROM secret ORDER BY name").fetch_all(&mut self.connection).await;
        for row in secrets.map_err(|error| CopyError::of(&self.path, error))? {
            let read = (|| Ok((row.try_get(0)?, row.try_get(1)?)))();
            let (name, wrapped): (String, Vec<u8>) = read.map_err(|error| CopyError::of(&self.path, error))?;
            put_secret(&mut connection, &name, &wrapped).await.map_err(|error| spec.read_failed(error))?;
        }
        let mut contents = KeysContents::default();
        let mut after = 0;
        loop {
            let page = self.page(after).await?;
            let Some((last, _)) = page.last() else { break };
            after = *last;
            let mut rows: Vec<KeyRow> = page.into_iter().map(|(_, row)| row).collect();
            for row in &mut rows {
                if destroyed.contains_key(&row.key_id) {
                    row.wrapped.clear();
                }
                contents.add(row);
            }
            let rows: Vec<&KeyRow> = rows.iter().collect();
            statements::insert_key_rows(&mut connection, &rows).await.map_err(|error| spec.read_failed(error))?;
        }
        spec.finish_build(connection, &contents.stored()).await?;
        Ok(contents)
    }

    /// Closes the file.
    pub async fn close(self) {
        // It only read.
        let _ = self.connection.close().await;
    }
}

fn io_error(path: &Path, source: io::Error) -> CopyError {
    let path = path.to_owned();
    match source.kind() {
        io::ErrorKind::StorageFull => CopyError::DiskFull { path },
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => CopyError::ReadOnly { path },
        _ => CopyError::Io { path, source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{EntityHash, test_shard::TestShard};

    const DISK: DiskId = DiskId([7; 16]);

    fn key(name: u8, wrapped: &[u8]) -> KeyRow {
        KeyRow {
            key_id: [name; 16],
            id_hash: EntityHash([name; 16]),
            wrapped: wrapped.to_vec(),
            created_at_us: name.into(),
        }
    }

    #[tokio::test]
    async fn keys_are_copied_and_restored_and_those_that_were_destroyed_stay_so() {
        let (shard, from, to) = (TestShard::new().await, tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let options = FileOptions::default();
        KeyStore::create(from.path().to_owned(), DISK, &options).await.unwrap();
        let keys = KeyStore::open(from.path().to_owned(), DISK, &options, shard.root()).await.unwrap();
        for (name, wrapped) in [(1, &b"first"[..]), (2, b"second"), (3, b"the third"), (4, b"fourth")] {
            keys.add(key(name, wrapped)).await.unwrap();
        }
        keys.put_secret("id_secret", b"secret".to_vec()).await.unwrap();
        keys.destroy(vec![[1; 16]]).await.unwrap();
        // It moves to the end.
        keys.rewrap([2; 16], b"wrapped anew".to_vec()).await.unwrap();
        let path = to.path().join("copy.db");
        let contents = keys.back_up(&path, DISK, |_| ()).await.unwrap();
        assert_eq!((contents.keys, contents.destroyed), (3, 1));
        keys.stop().await;

        assert!(matches!(KeysBackup::open(&path, DiskId([8; 16])).await, Err(CopyError::Foreign { .. })));
        let mut backup = KeysBackup::open(&path, DISK).await.unwrap();
        assert_eq!(*backup.contents(), contents);
        assert_eq!(backup.secret("id_secret").await.unwrap().as_deref(), Some(&b"secret"[..]));
        let restored = DiskId([9; 16]);
        let destroyed = Destroyed::from([([3; 16], 5), ([77; 16], 5)]);
        let made = backup.restore(to.path(), restored, &options, &destroyed).await.unwrap();
        assert_eq!((made.keys, made.destroyed), (2, 2));
        backup.close().await;

        let keys = KeyStore::open(to.path().to_owned(), restored, &options, shard.root()).await.unwrap();
        assert!(keys.verify(|_| ()).await.unwrap().damage.is_empty());
        for (name, wrapped) in [(1, &b""[..]), (2, b"wrapped anew"), (3, b""), (4, b"fourth")] {
            assert_eq!(keys.get([name; 16]).await.unwrap(), Some(key(name, wrapped)));
        }
        assert_eq!(keys.secret("id_secret").await.unwrap().as_deref(), Some(&b"secret"[..]));
        keys.stop().await;
        shard.stop().await;
        for (file, is_there) in [("keys.db", false), ("copy.db", true)] {
            let found = std::fs::read(to.path().join(file)).unwrap();
            assert_eq!(found.windows(9).any(|window| window == b"the third"), is_there, "{file}");
        }
    }

    /// A key whose wrapping becomes longer while the keys are copied is met twice.
    #[tokio::test]
    async fn a_key_that_is_met_twice_is_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("copy.db");
        let mut connection = sqlite::connect_builder(&path).await.unwrap();
        schema::create(&mut connection, Role::KeysBackup, DISK).await.unwrap();
        let (first, again) = (key(1, b"wrapped"), key(1, b"wrapped anew"));
        assert!(!known(&mut connection, &[&first]).await.unwrap());
        statements::insert_key_rows(&mut connection, &[&first]).await.unwrap();
        assert!(known(&mut connection, &[&key(2, b""), &again]).await.unwrap());
        assert_eq!(put(&mut connection, &again).await.unwrap(), Some(first));
        assert_eq!(put(&mut connection, &key(2, b"")).await.unwrap(), None);
        let rows =
            sqlx::query("SELECT wrapped FROM data_key ORDER BY number").fetch_all(&mut connection).await.unwrap();
        let rows: Vec<Vec<u8>> = rows.iter().map(|row| row.get(0)).collect();
        assert_eq!(rows, [b"wrapped anew".to_vec(), Vec::new()]);
    }
}
