//! What SQL that is not Kuma's own may do in the file of a read model: the statements of projections and of whoever queries them.
//!
//! Invariants:
//! - Statements of a projection never commit: read model and checkpoint are committed together, by Kuma.
//! - Kuma's own tables, whose names begin with `kuma_`, are written by Kuma alone.
//! - What a statement writes depends on its events alone, so that a rebuilt model is the same: no clock and no random numbers.
//!
//! SQLite asks when a statement is prepared. Source: <https://sqlite.org/c3ref/set_authorizer.html>

use std::sync::{
    Arc,
    atomic::{AtomicU8, Ordering::Relaxed},
};

use rusqlite::{
    Connection,
    hooks::{AuthAction, AuthContext, Authorization},
};

/// On whose behalf statements are prepared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    /// Kuma's: everything.
    Engine,
    /// Of a projection that makes or changes its tables.
    Migrate,
    /// Of a projection that applies an event, or purges an entity.
    Apply,
    /// Of whoever reads.
    Read,
}

/// Sets what statements that are prepared from now on may do.
#[derive(Clone, Debug)]
pub struct Guard(Arc<AtomicU8>);

impl Guard {
    /// Watches over `connection`, with the rights of [`Rights::Engine`] at first.
    ///
    /// # Errors
    /// The connection is not a plain one.
    pub fn over(connection: &Connection) -> rusqlite::Result<Self> {
        let rights = Arc::new(AtomicU8::new(Rights::Engine as u8));
        // `OR ROLLBACK` and `RAISE(ROLLBACK)` end a transaction without asking. What comes behind them is not committed on its own.
        let current = rights.clone();
        connection.commit_hook(Some(move || current.load(Relaxed) == Rights::Apply as u8))?;
        let current = rights.clone();
        connection.authorizer(Some(move |context: AuthContext<'_>| {
            let rights = match current.load(Relaxed) {
                0 => Rights::Engine,
                1 => Rights::Migrate,
                2 => Rights::Apply,
                _ => Rights::Read,
            };
            match may(rights, &context.action) {
                true => Authorization::Allow,
                false => Authorization::Deny,
            }
        }))?;
        Ok(Guard(rights))
    }

    /// Sets the rights.
    pub fn set(&self, rights: Rights) {
        self.0.store(rights as u8, Relaxed);
    }
}

/// What changes from one call to the next.
const IMPURE: [&str; 5] = ["random", "randomblob", "current_time", "current_date", "current_timestamp"];

fn is_ours(table: &str) -> bool {
    table.get(..5).is_some_and(|start| start.eq_ignore_ascii_case("kuma_"))
}

/// SQLite's own tables are written by statements that make tables, and by no others.
fn is_schema(table: &str) -> bool {
    table.get(..7).is_some_and(|start| start.eq_ignore_ascii_case("sqlite_"))
}

fn may(rights: Rights, action: &AuthAction<'_>) -> bool {
    if rights == Rights::Engine {
        return true;
    }
    let (migrates, writes) = (rights == Rights::Migrate, rights != Rights::Read);
    match action {
        AuthAction::Select | AuthAction::Read { .. } | AuthAction::Recursive => true,
        AuthAction::Function { function_name } => {
            !writes || !IMPURE.iter().any(|impure| function_name.eq_ignore_ascii_case(impure))
        }
        AuthAction::Insert { table_name }
        | AuthAction::Update { table_name, .. }
        | AuthAction::Delete { table_name } => {
            !is_ours(table_name) && if is_schema(table_name) { migrates } else { writes }
        }
        AuthAction::CreateTable { table_name }
        | AuthAction::CreateIndex { table_name, .. }
        | AuthAction::CreateTrigger { table_name, .. }
        | AuthAction::DropTable { table_name }
        | AuthAction::DropIndex { table_name, .. }
        | AuthAction::DropTrigger { table_name, .. }
        | AuthAction::AlterTable { table_name, .. } => migrates && !is_ours(table_name),
        AuthAction::CreateView { view_name } | AuthAction::DropView { view_name } => migrates && !is_ours(view_name),
        // SQLite itself asks for it when a column is added.
        AuthAction::Pragma { pragma_name: "quick_check", .. } | AuthAction::Reindex { .. } => migrates,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connection() -> (Connection, Guard) {
        let connection = Connection::open_in_memory().unwrap();
        let guard = Guard::over(&connection).unwrap();
        connection.execute_batch("CREATE TABLE kuma_meta(a); CREATE TABLE t(a, b)").unwrap();
        (connection, guard)
    }

    #[test]
    fn a_projection_writes_its_own_tables_and_nothing_else() {
        let (connection, guard) = connection();
        connection.execute_batch("BEGIN").unwrap();
        guard.set(Rights::Apply);
        for allowed in [
            "INSERT INTO t VALUES (1, json_extract('{\"a\":1}', '$.a')) ON CONFLICT DO NOTHING",
            "UPDATE t SET a = 2",
            "DELETE FROM t WHERE a IN (SELECT b FROM t)",
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION SELECT i + 1 FROM n WHERE i < 3) INSERT INTO t SELECT i, i FROM n",
        ] {
            connection.execute_batch(allowed).unwrap_or_else(|error| panic!("{allowed}: {error}"));
        }
        for denied in [
            "COMMIT",
            "ROLLBACK",
            "SAVEPOINT s",
            "ATTACH ':memory:' AS other",
            "PRAGMA secure_delete = OFF",
            "VACUUM",
            "CREATE TABLE more(a)",
            "CREATE TEMP TABLE more(a)",
            "DROP TABLE t",
            "INSERT INTO kuma_meta VALUES (1)",
            "DELETE FROM KUMA_META",
            "UPDATE sqlite_schema SET sql = ''",
            "INSERT INTO t VALUES (random(), CURRENT_TIMESTAMP)",
        ] {
            assert!(connection.execute_batch(denied).is_err(), "{denied}");
        }
        guard.set(Rights::Engine);
        connection.execute_batch("COMMIT").unwrap();
    }

    #[test]
    fn a_migration_makes_tables_and_does_not_touch_those_of_kuma() {
        let (connection, guard) = connection();
        guard.set(Rights::Migrate);
        connection
            .execute_batch(
                "CREATE TABLE u(a INTEGER PRIMARY KEY, b TEXT UNIQUE) STRICT; CREATE INDEX ub ON u(b); CREATE VIEW v AS SELECT * FROM u;
                 ALTER TABLE u ADD COLUMN c TEXT; DROP VIEW v; INSERT INTO u(b) VALUES ('x'); DROP TABLE u;
                 CREATE TRIGGER g AFTER INSERT ON t BEGIN DELETE FROM t WHERE a = new.a; END",
            )
            .unwrap();
        for denied in [
            "CREATE TABLE kuma_more(a)",
            "DROP TABLE kuma_meta",
            "CREATE VIRTUAL TABLE f USING fts5(a)",
            "PRAGMA user_version = 9",
            "BEGIN",
        ] {
            assert!(connection.execute_batch(denied).is_err(), "{denied}");
        }
    }

    #[test]
    fn whoever_reads_only_reads() {
        let (connection, guard) = connection();
        guard.set(Rights::Read);
        connection.execute_batch("SELECT count(*), datetime('now'), random() FROM t, kuma_meta").unwrap();
        for denied in
            ["INSERT INTO t VALUES (1, 2)", "DELETE FROM t", "CREATE TABLE u(a)", "PRAGMA query_only = OFF", "BEGIN"]
        {
            assert!(connection.execute_batch(denied).is_err(), "{denied}");
        }
    }
}
