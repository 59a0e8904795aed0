//! What an entity has of a file already, read in the order in which it was appended.
//!
//! An import that runs again meets its own commits, in the order of its file. Asking the entity's actor for each of them costs two
//! look-ups on the disk; reading its log from the beginning finds them a page at a time.
//!
//! Invariant: a commit is only taken for one that is there if it has its key and was made by the same events, as the actor has it
//! (`retry.rs`). Whatever is not found is sent to the actor, which knows for certain.

use std::{collections::VecDeque, sync::Arc};

use crate::{
    NewEvent, RawHandle,
    body::{Body, EventEncoder, Fingerprint, Limits},
    replay::{self, Opener},
    retry,
    shard_core::ShardCore,
};

const PAGE_ROWS: u32 = 64;
/// Pages that are passed over in search of a commit: before it others may have written to the entity.
const PAGES_MAX: usize = 64;

/// An entity's stored commits, from the one after that which was found last.
pub(super) struct Stored {
    core: Arc<ShardCore>,
    opener: Opener,
    limits: Limits,
    /// The last version that was read.
    at: u64,
    is_over: bool,
    page: VecDeque<StoredCommit>,
}

/// A stored commit that has an idempotency key.
struct StoredCommit {
    append_key: [u8; 16],
    fingerprint: Fingerprint,
}

impl Stored {
    /// None if the entity has no commits, or if they cannot be read, which is for its actor to say.
    pub(super) async fn open(handle: &RawHandle) -> Option<Self> {
        let core = handle.core().ok()?.clone();
        let opener = replay::find(&core, &handle.who().ok()?.identity).await.ok()??;
        Some(Stored { core, opener, limits: handle.limits(), at: 0, is_over: false, page: VecDeque::new() })
    }

    /// Whether the next commits have one with this key and these events. If not, it is not to be asked again.
    pub(super) async fn take(&mut self, key: &[u8], events: &[NewEvent]) -> bool {
        let append_key = self.opener.append_key(key);
        for _ in 0..PAGES_MAX {
            if let Some(place) = self.page.iter().position(|stored| stored.append_key == append_key.0) {
                let found = self.page.drain(..=place).next_back();
                return found.is_some_and(|found| Some(found.fingerprint) == fingerprint(self.limits, events));
            }
            self.page.clear();
            if self.is_over || self.next_page().await.is_none() {
                return false;
            }
        }
        false
    }

    async fn next_page(&mut self) -> Option<()> {
        let (rows, is_last) = self.opener.page(&self.core.shard, self.at, PAGE_ROWS).await.ok()?;
        self.is_over = is_last;
        for row in rows {
            self.at = row.version + u64::from(row.count) - 1;
            let append_key = row.append_key.as_deref().and_then(|key| key.try_into().ok());
            let Some(append_key) = append_key else { continue };
            let plaintext = self.opener.open(&row).ok()?;
            let fingerprint = Body::parse(&plaintext).ok()?.fingerprint.and_then(|stored| (**stored).try_into().ok());
            if let Some(fingerprint) = fingerprint {
                self.page.push_back(StoredCommit { append_key, fingerprint });
            }
        }
        Some(())
    }
}

fn fingerprint(limits: Limits, events: &[NewEvent]) -> Option<Fingerprint> {
    let mut encoder = EventEncoder::expecting(limits, events.len());
    events.iter().try_for_each(|event| encoder.raw(event)).ok()?;
    Some(retry::fingerprint_of_events(encoder.finish().ok()?.items()))
}
