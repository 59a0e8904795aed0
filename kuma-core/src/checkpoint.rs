//! Checkpoints: how far a subscriber has come.
//!
//! Invariants:
//! - A checkpoint names the disk that its positions are of. After a restore they may stand for other events; it is refused then, never guessed.
//! - Whoever goes on from a checkpoint gets every commit behind it, and none before it.

use std::{fmt, str::FromStr};

use kuma_shard::DiskId;
use serde::{Deserialize, Serialize};

/// How far a subscriber has come in each shard, and in the erasures. As text it is short enough for a header of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    pub(crate) disk_id: DiskId,
    /// Everything up to here was handed out, by the numbers of the shards.
    pub(crate) positions: Vec<u64>,
    /// The number of the last tombstone that was told.
    pub(crate) erasures: i64,
    /// Commits that are older are not wanted; behind a position they may still come. Microseconds since 1970, [`EVER`] for all.
    pub(crate) since_us: i64,
}

/// Commits of any time are wanted.
pub(crate) const EVER: i64 = i64::MIN;

/// Why a checkpoint cannot be gone on from.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// It is not the text of one.
    #[error("it is not a checkpoint")]
    NotACheckpoint,
    /// It is of another copy of the store.
    #[error(
        "the checkpoint is of another copy of the store (made before a restore?), in which the same places may hold other events; start from the beginning or from a time"
    )]
    OtherCopy,
    /// The store holds less than that.
    #[error(
        "the checkpoint is at position {position} of shard {shard}, whose log ends at {end}; start from the beginning or from a time"
    )]
    Ahead {
        /// The shard.
        shard: u16,
        /// What it says.
        position: u64,
        /// What there is.
        end: u64,
    },
}

impl fmt::Display for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.disk_id, self.erasures)?;
        self.positions.iter().try_for_each(|position| write!(f, ".{position}"))?;
        match self.since_us {
            EVER => Ok(()),
            since_us => write!(f, "@{since_us}"),
        }
    }
}

impl FromStr for Checkpoint {
    type Err = CheckpointError;

    fn from_str(text: &str) -> Result<Self, CheckpointError> {
        let parse = || {
            let (text, since_us) = match text.split_once('@') {
                Some((text, since_us)) => (text, since_us.parse().ok()?),
                None => (text, EVER),
            };
            let mut parts = text.split('.');
            let disk_id = parts.next()?.parse().ok()?;
            let erasures = parts.next()?.parse().ok()?;
            let positions: Option<Vec<u64>> = parts.map(|part| part.parse().ok()).collect();
            Some(Checkpoint { disk_id, erasures, positions: positions?, since_us })
        };
        parse().ok_or(CheckpointError::NotACheckpoint)
    }
}

impl Serialize for Checkpoint {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Checkpoint {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl Checkpoint {
    /// Whether it is of this disk, and not ahead of what that holds.
    pub(crate) fn check(&self, disk_id: DiskId, ends: &[u64]) -> Result<(), CheckpointError> {
        if self.disk_id != disk_id || self.positions.len() != ends.len() {
            return Err(CheckpointError::OtherCopy);
        }
        let ahead = self.positions.iter().zip(ends).position(|(position, end)| position > end);
        match ahead {
            None => Ok(()),
            Some(shard) => {
                Err(CheckpointError::Ahead { shard: shard as u16, position: self.positions[shard], end: ends[shard] })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_comes_back_from_its_text_and_nothing_else_does() {
        let positions = vec![0, u64::MAX, 3];
        let checkpoint = Checkpoint { disk_id: DiskId([7; 16]), positions, erasures: 5, since_us: EVER };
        let text = checkpoint.to_string();
        assert_eq!(text, "07070707070707070707070707070707.5.0.18446744073709551615.3");
        assert_eq!(text.parse(), Ok(checkpoint.clone()));
        let since = Checkpoint { since_us: -7, ..checkpoint.clone() };
        assert_eq!(since.to_string(), format!("{text}@-7"));
        assert_eq!(since.to_string().parse(), Ok(since));
        assert_eq!(
            serde_json::from_str::<Checkpoint>(&serde_json::to_string(&checkpoint).unwrap()).unwrap(),
            checkpoint
        );
        for odd in [
            "",
            ".",
            "07",
            "07070707070707070707070707070707",
            &format!("{text}."),
            &format!("{text}.-1"),
            &format!("{text}@"),
            "ä.1",
        ] {
            assert_eq!(odd.parse::<Checkpoint>(), Err(CheckpointError::NotACheckpoint), "{odd}");
        }
    }

    #[test]
    fn a_checkpoint_of_another_copy_or_of_the_future_is_refused() {
        let checkpoint = Checkpoint { disk_id: DiskId([7; 16]), positions: vec![4, 9], erasures: 0, since_us: EVER };
        assert_eq!(checkpoint.check(DiskId([7; 16]), &[4, 10]), Ok(()));
        assert_eq!(checkpoint.check(DiskId([8; 16]), &[4, 10]), Err(CheckpointError::OtherCopy));
        assert_eq!(checkpoint.check(DiskId([7; 16]), &[4]), Err(CheckpointError::OtherCopy));
        let ahead = CheckpointError::Ahead { shard: 1, position: 9, end: 8 };
        assert_eq!(checkpoint.check(DiskId([7; 16]), &[4, 8]), Err(ahead));
    }
}
