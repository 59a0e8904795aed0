//! What a run has come by: a simulator that never gets to the hard places proves nothing.

use std::fmt;

macro_rules! coverage {
    ($($(#[doc = $words:literal])* $name:ident,)*) => {
        /// How often each thing has happened.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Coverage {
            $($(#[doc = $words])* pub $name: u64,)*
        }

        impl Coverage {
            /// Each with its name.
            pub fn counters(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name),)*]
            }

            /// Adds those of another run.
            pub fn add(&mut self, other: &Coverage) {
                $(self.$name += other.$name;)*
            }
        }
    };
}

coverage! {
    /// Slots that were taken.
    handoffs,
    /// Attempts that came to nothing.
    aborts,
    /// Preparations that were answered with a question, because another copy of the same epoch was there.
    questions,
    /// Releases that the writer of the shard refused, because something was appended since the seal.
    releases_refused,
    /// Crashes of a giver whose slot was sealed.
    crashes_while_sealed,
    /// Crashes between the commit of a release and its grant.
    crashes_before_grant,
    /// Crashes of a receiver between the commit of what it promises and the promise.
    crashes_before_promise,
    /// Crashes with a transaction on its way that was not committed.
    crashes_before_commit,
    /// Crashes with a prepared copy.
    crashes_while_staged,
    /// All crashes.
    crashes,
    /// Nodes that were started again.
    starts,
    /// Disks that were lost, with a new one in their place.
    wipes,
    /// New disks that were let in.
    joins,
    /// Slots whose say was on a disk that is gone.
    slots_lost,
    /// Messages that were lost.
    drops,
    /// Messages that were repeated.
    duplicates,
    /// Messages that came to a disk that it was not the first time for.
    repeats_delivered,
    /// Messages that came later than others that were sent after them.
    reordered,
    /// Messages for a disk that was down, or gone, or behind a link that was cut.
    unreachable,
    /// Links that were cut.
    cuts,
    /// Appends that were acknowledged.
    appends,
    /// Acknowledgements that were lost.
    acks_lost,
    /// Appends that were answered from an earlier attempt.
    repeated_appends,
    /// Of these, by another disk than the one that wrote it.
    repeated_after_move,
    /// Appends that were on their way when the slot was sealed, and are part of it.
    appends_in_flight,
    /// Appends that a gate refused.
    appends_refused,
    /// Appends that had passed a gate, and that the writer of the shard refused.
    appends_fenced,
    /// Reads that were answered.
    reads,
    /// Pieces of a slot that were kept.
    pieces,
    /// Pieces of a slot that were not wanted.
    pieces_refused,
    /// Preparations without a whole copy.
    rows_missing,
    /// Prepared copies that were dropped because the giver said so.
    staged_dropped,
    /// Prepared copies that were replaced by one of a higher epoch.
    staged_replaced,
    /// Grants that were confirmed because another owner was heard of.
    confirmed_by_hint,
    /// Transactions whose outcome was looked up.
    looked_up,
}

impl fmt::Display for Coverage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counters: Vec<String> = self.counters().iter().map(|(name, count)| format!("{name} {count}")).collect();
        f.write_str(&counters.join(", "))
    }
}
