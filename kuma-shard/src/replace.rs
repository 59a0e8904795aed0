//! Replacing an entity by its next life, which begins with commits of its own: how it is restored to an earlier version.
//!
//! Invariants:
//! - One transaction ends the former life and writes the next one whole: there is always exactly one.
//! - The former life ends only at the version that the next one was made from. What is left of it is for its erasure, see `erase.rs`.

use std::sync::Arc;

use tokio::sync::oneshot;

use crate::{Commit, CommitError, EntityRow, NotWritten, Shard, log_entry::LogEntry};

/// A life and the one before.
pub(crate) struct Replacement {
    /// As its row is to be: erased.
    pub(crate) former: EntityRow,
    /// The version that the former one has.
    pub(crate) version: u64,
    /// Of the next one: at least one.
    pub(crate) commits: Vec<Commit>,
}

impl Replacement {
    pub(crate) fn row(&self) -> Option<&EntityRow> {
        self.commits.first().map(|commit| &*commit.entity)
    }

    /// What it adds to its group.
    pub(crate) fn bytes(&self) -> usize {
        self.commits.iter().map(|commit| commit.body.len() + 128).sum()
    }
}

impl Shard {
    /// Ends the life `former`, which has `version` events, and writes `next` with `commits` in its place, in one transaction. The entities of
    /// the commits are put in here, and so is the number of the next life's row. What the former life has in the log is erased with
    /// [`Shard::erase`] then.
    ///
    /// # Errors
    /// Nothing was written, or that is unknown: a conflict says that the former life has another version, or has ended.
    pub async fn replace(
        &self,
        former: &EntityRow,
        version: u64,
        next: EntityRow,
        commits: impl FnOnce(&Arc<EntityRow>) -> Vec<Commit>,
        at_us: i64,
    ) -> Result<(), CommitError> {
        let (told, settled) = oneshot::channel();
        self.number_next(|eid| {
            let row = Arc::new(EntityRow { eid, ..next });
            let replacement = Replacement { former: former.erased(at_us), version, commits: commits(&row) };
            // A caller that is gone does not want to know.
            self.hand_in(LogEntry::replace(replacement, Box::new(move |result| drop(told.send(result)))));
        });
        settled.await.map_err(|_| NotWritten::Stopping)?
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Activation, CopyId, LogRow,
        test_shard::{TestShard, commit},
        verify::CommitCheck,
    };

    struct Trusting;

    impl CommitCheck for Trusting {
        async fn check(&mut self, _: &EntityRow, _: &LogRow) -> Result<(), String> {
            Ok(())
        }
    }

    #[tokio::test]
    async fn the_next_life_takes_the_place_of_the_former_one_whole() {
        let mut shard = TestShard::new().await;
        let former = shard.entity(1, 0);
        shard.append(&former, 1..=300).await;
        let next = || EntityRow { life: 2, key_id: [9; 16], ..(*former).clone() };
        let commits = |row: &Arc<EntityRow>| (1..=200).map(|version| commit(row, version)).collect();
        // It was made from another version than the newest one.
        let refused = shard.replace(&former, 299, next(), commits, 7).await;
        assert!(matches!(refused, Err(CommitError::NotWritten(NotWritten::Conflict { .. }))), "{refused:?}");
        assert_eq!(shard.find_entity(CopyId::LIVE, former.id_hash).await.unwrap().unwrap().eid, former.eid);

        shard.replace(&former, 300, next(), commits, 7).await.unwrap();
        for _ in 0..2 {
            let found = shard.find_entity(CopyId::LIVE, former.id_hash).await.unwrap().unwrap();
            assert_eq!((found.life, found.erased_at_us), (2, None));
            assert_eq!(shard.read_log(&found, 0, 999).await.unwrap().len(), 200);
            let late = shard.submit(&Arc::new(Activation::at(300)), commit(&former, 301)).await.unwrap();
            assert_eq!(late, Err(NotWritten::Erased.into()));
            let again = shard.replace(&former, 300, next(), commits, 7).await;
            assert!(matches!(again, Err(CommitError::NotWritten(NotWritten::Conflict { .. }))), "{again:?}");
            shard.reopen().await;
        }
        assert_eq!(shard.erase(&former, 7).await.unwrap().commits, 300);
        let found = shard.find_entity(CopyId::LIVE, former.id_hash).await.unwrap().unwrap();
        let activation = Arc::new(Activation::at(200));
        shard.submit(&activation, commit(&found.into(), 201)).await.unwrap().unwrap();
        let report = shard.verify(&mut Trusting).await.unwrap();
        assert!(report.is_clean() && (report.commits, report.stubs) == (201, 300), "{report:?}");
        shard.stop().await;
    }
}
