//! What keeps the protocol safe, each by its name, so that a test can do without one and show what it is for.

/// The safeguards that are on. In the product: [`Safeguards::ALL`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Safeguards(u64);

impl Safeguards {
    /// All of them.
    pub const ALL: Safeguards = Safeguards(u64::MAX);

    /// All but this one, and those that are off already.
    #[must_use]
    pub fn without(self, safeguard: Safeguard) -> Self {
        Safeguards(self.0 & !(1 << safeguard as u64))
    }

    /// Whether it is on.
    pub fn has(self, safeguard: Safeguard) -> bool {
        self.0 & (1 << safeguard as u64) != 0
    }
}

/// A rule that somebody could take for needless.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Safeguard {
    /// A slot is released after its target has said that it is ready.
    ReleaseAfterReady,
    /// `Ready` counts of the attempt that is worked at.
    ReadyOfThisTransfer,
    /// `Ready` counts with the digest that was sealed.
    ReadyWithEqualDigest,
    /// The release checks in its own transaction that nothing was appended since the seal.
    ReleaseOfWhatWasSealed,
    /// A decision that is with the writer of the shard is not called back.
    NoAbortWhileReleasing,
    /// A grant leaves after the commit of the release.
    GrantAfterCommit,
    /// An attempt that the token names was not aborted, whatever memory says.
    StatusOfTheToken,
    /// `Taken` counts of the attempt that the token names.
    TakenOfThisTransfer,
    /// Every owner has an epoch of its own.
    NewEpochForEachOwner,
    /// An owner that meets a higher epoch of a vote raises its own.
    OwnerRaisesItsEpoch,
    /// Strong reads end with the release.
    ReadsEndWithRelease,
    /// What is owned, released or promised once is not prepared or taken again.
    FloorRefuses,
    /// A prepared copy is not replaced by another one of the same epoch.
    StagedIsNotReplaced,
    /// No row is added to a prepared copy.
    StagedIsKeptAsItIs,
    /// A copy is read back from the disk and compared before it is called prepared.
    CopyIsReadBack,
    /// `Ready` says what was read back, and not what was asked for.
    DigestOfTheCopy,
    /// `Ready` leaves after the commit of the prepared copy.
    ReadyAfterCommit,
    /// `Taken` leaves after the commit of the take.
    TakenAfterCommit,
    /// A grant counts of the attempt that is prepared.
    GrantOfThisTransfer,
    /// `OwnerIs` counts of the same epoch or a higher one.
    HintOfNoLowerEpoch,
    /// A disk promises nothing before it has joined.
    JoinedBeforeReady,
    /// A new disk takes the place of the old one, which counts no more.
    JoinRetires,
    /// A new disk waits for those, too, that only the answers name.
    JoinClosure,
    /// A new disk waits for all members.
    JoinAll,
    /// A new disk takes over the floors of the others.
    JoinFloors,
    /// A key whose tombstone is here does not come in with a copy.
    TombstoneKeepsKeyOut,
    /// An erasure is done when every disk has answered.
    ErasedOnEveryDisk,
    /// `Shredded` leaves after the tombstone is durable and the key destroyed.
    ShreddedAfterCommit,
    /// A key is destroyed in prepared copies, and in what came ahead of them.
    ShredReachesStaged,
    /// A key is destroyed in a copy that was given away.
    ShredReachesReleased,
    /// A disk that has the tombstone already destroys the key all the same.
    EachShredIsCarriedOut,
    /// A tombstone is durable before its key ends.
    TombstoneBeforeKey,
    /// A new disk takes over the tombstones of the others.
    JoinTombstones,
    /// Whoever prepares a copy takes over the tombstones of what is erased in it.
    CopyBringsTombstones,
}
