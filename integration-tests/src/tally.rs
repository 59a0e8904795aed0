//! A read model of probes that shows any event that was applied twice, not at all, or out of its order; and the same computed from the log.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::{BTreeMap, BTreeSet};

use kuma_core::{
    ApplyError, Delivery, Entity, ErasureRule, Filter, Kuma, Projection, ProjectionError, ProjectionHandle,
    StoredEvent,
    rusqlite::{Transaction, types::Value},
};

use crate::{Note, Probe};

/// The projection, of any version: each makes other hashes.
pub struct Tally {
    /// The version.
    pub version: u32,
}

/// What it makes of one event.
fn digest(before: i64, version: u32, event: u64, note: &Note) -> i64 {
    let salt = (u64::from(version) << 48) ^ (event << 20) ^ note.append.rotate_left(7) ^ u64::from(note.index);
    before.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(salt as i64).rotate_left(11)
}

fn note(stored: &StoredEvent) -> Result<Note, ApplyError> {
    Ok(rmp_serde::from_slice(&stored.event.data)?)
}

impl Projection for Tally {
    fn name(&self) -> &str {
        "tally"
    }

    fn version(&self) -> u32 {
        self.version
    }

    fn filter(&self) -> Filter {
        Filter::kind(Probe::KIND)
    }

    fn erasure(&self) -> ErasureRule {
        ErasureRule::Columns {
            columns: vec![("tally".to_owned(), "entity".to_owned()), ("seen".to_owned(), "entity".to_owned())],
        }
    }

    fn migrations(&self) -> Vec<String> {
        vec![
            "CREATE TABLE tally(entity TEXT PRIMARY KEY, events INTEGER NOT NULL, sum INTEGER NOT NULL, digest INTEGER NOT NULL) STRICT;
             CREATE TABLE seen(slot INTEGER, seq INTEGER, version INTEGER, entity TEXT, PRIMARY KEY(slot, seq, version)) STRICT, WITHOUT ROWID;
             CREATE TABLE total(one INTEGER PRIMARY KEY CHECK(one = 1), events INTEGER NOT NULL) STRICT;
             INSERT INTO total VALUES (1, 0);"
                .to_owned(),
        ]
    }

    fn apply(&self, model: &Transaction<'_>, stored: &StoredEvent) -> Result<(), ApplyError> {
        let note = note(stored)?;
        let version = stored.event.version.0 as i64;
        let before = model
            .prepare_cached("SELECT events, digest FROM tally WHERE entity = ?")?
            .query_map([&*stored.id], |row| Ok((row.get::<_, i64>(0)?, row.get::<_, i64>(1)?)))?
            .next()
            .transpose()?
            .unwrap_or_default();
        if before.0 + 1 != version {
            return Err(format!("version {version} comes after {} events", before.0).into());
        }
        let seen = (stored.slot.number(), stored.seq as i64, version, &*stored.id);
        model.prepare_cached("INSERT INTO seen VALUES (?, ?, ?, ?)")?.execute(seen)?;
        let digest = digest(before.1, self.version, stored.event.version.0, &note);
        model
            .prepare_cached(
                "INSERT INTO tally VALUES (?1, 1, ?2, ?3)
                 ON CONFLICT(entity) DO UPDATE SET events = events + 1, sum = sum + excluded.sum, digest = excluded.digest",
            )?
            .execute((&*stored.id, i64::from(note.of), digest))?;
        model.prepare_cached("UPDATE total SET events = events + 1")?.execute([])?;
        Ok(())
    }
}

/// What the model is, or should be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tallied {
    /// By entity: events, sum and digest.
    pub tally: BTreeMap<String, (i64, i64, i64)>,
    /// Slot, seq and version of each event.
    pub seen: BTreeSet<(i64, i64, i64)>,
    /// Events.
    pub total: i64,
}

impl Tallied {
    /// In short.
    pub fn hash(&self) -> String {
        use std::hash::{DefaultHasher, Hash, Hasher};
        let mut hasher = DefaultHasher::new();
        (&self.tally, &self.seen, self.total).hash(&mut hasher);
        format!("{:016x}", hasher.finish())
    }

    /// Computed from the whole log, by way of a subscription.
    pub async fn of_log(kuma: &Kuma, version: u32) -> Tallied {
        let mut tallied = Tallied::default();
        let mut events = kuma.subscribe(Filter::kind(Probe::KIND)).open().await.unwrap();
        while let Some(delivery) = events.next_of_now().await.unwrap() {
            match delivery {
                Delivery::Event(stored) => tallied.add(&stored, version),
                // Those before the beginning are not told.
                Delivery::Erased(_) => {}
                Delivery::Unreadable(commit) => panic!("{commit:?}"),
            }
        }
        tallied
    }

    fn add(&mut self, stored: &StoredEvent, version: u32) {
        let note = note(stored).unwrap();
        let at = stored.event.version.0;
        let entry = self.tally.entry(stored.id.to_string()).or_default();
        assert_eq!(entry.0 as u64 + 1, at, "{stored:?}");
        *entry = (entry.0 + 1, entry.1 + i64::from(note.of), digest(entry.2, version, at, &note));
        assert!(self.seen.insert((stored.slot.number().into(), stored.seq as i64, at as i64)), "{stored:?}");
        self.total += 1;
    }

    /// What the model that is served says.
    pub async fn of_model(tally: &ProjectionHandle) -> Tallied {
        let rows = async |select: &str| {
            let answer = tally.query(select).rows_max(usize::MAX).bytes_max(usize::MAX).run().await.unwrap();
            assert!(!answer.truncated);
            answer.rows
        };
        let number = |value: &Value| match value {
            Value::Integer(integer) => *integer,
            other => panic!("{other:?}"),
        };
        let mut tallied = Tallied::default();
        for row in rows("SELECT events, sum, digest, entity FROM tally").await {
            let [events, sum, digest, Value::Text(entity)] = &row[..] else { panic!("{row:?}") };
            tallied.tally.insert(entity.clone(), (number(events), number(sum), number(digest)));
        }
        for row in rows("SELECT slot, seq, version FROM seen").await {
            tallied.seen.insert((number(&row[0]), number(&row[1]), number(&row[2])));
        }
        tallied.total = count(tally).await.unwrap();
        tallied
    }
}

/// How many events the model that is served says there are.
///
/// # Errors
/// None is served, say.
pub async fn count(tally: &ProjectionHandle) -> Result<i64, ProjectionError> {
    let answer = tally.query("SELECT events FROM total").run().await?;
    match answer.rows[0][0] {
        Value::Integer(count) => Ok(count),
        ref other => panic!("{other:?}"),
    }
}
