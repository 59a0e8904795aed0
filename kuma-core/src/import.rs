//! Import: lines of text (see `ndjson.rs`) become commits, each of them once.
//!
//! ```text
//! line ──► commit whole? ──no──► kept until its other lines are read
//!              │ yes
//!              ▼                            full: wait for the oldest
//!          appended without waiting ──► on the way ──settled──► counted
//! ```
//!
//! Invariants:
//! - A commit is one append with an idempotency key that follows from the name of the source and the number of its first line (or
//!   that the line gives). So an import can be cut off at any moment and run again, and nothing is there twice.
//! - An entity's commits are appended in the order of the file, and none after one that failed: they are one [`Sequence`].
//! - Nothing of a commit is applied before all its lines were read.
//! - Memory is bounded, whatever the file: by one line, by the commits on the way, by the commits that are not whole yet, and by the
//!   entities of which a handle is kept.

mod lines;
mod stored;

use std::{
    borrow::Cow,
    collections::{HashMap, HashSet, VecDeque},
    fmt, io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use futures_util::FutureExt;
use kuma_shard::EntityHash;
use tokio::io::AsyncBufRead;

use self::{
    lines::{Lines, LinesError},
    stored::Stored,
};
use crate::{
    AppendError, Kuma, Metadata, NewEvent, Pending, RawHandle, Refused, ReplayError, Sequence, Unavailable, Version,
    identity::check_kind,
    ndjson::{self, CommitSpan, EventLine, LINE_BYTES_MAX, Line, LineProblem, Manifest},
    reply::Written,
};

/// Enough that a group is full while the one before it is being synced.
const IN_FLIGHT_DEFAULT: usize = 4096;
/// Bytes of commits on the way. A store takes more, but then others who write to it would be refused.
const IN_FLIGHT_BYTES_MAX: usize = 16 << 20;
/// What a commit takes on the way beside its data.
const COMMIT_BYTES: usize = 512;
/// Bytes of commits of which not all lines were read yet.
const OPEN_BYTES_MAX: usize = 64 << 20;
/// Entities of which a handle is kept.
const HANDLES_MAX: usize = if cfg!(test) { 64 } else { 16 << 10 };
/// Entities that are told apart, to be counted: 16 bytes each.
const COUNTED_MAX: usize = if cfg!(test) { 400 } else { 1 << 20 };
/// So many commits of an entity that it should be told when they are settled.
const BURST: usize = 4;
/// Commits that were there already and are told of at once.
const PROGRESS_EVERY: u64 = 256;
/// The header that keeps the original time of an event.
const AT: &str = "at";
/// What separates kind and id in a map; a kind has no such character.
const SEPARATOR: char = '\0';

/// An import that is described and not run yet, see [`Kuma::import`].
#[derive(Clone)]
#[must_use = "nothing is read until it is run"]
pub struct Import {
    kuma: Kuma,
    source: String,
    in_flight: usize,
    kinds: Kinds,
}

/// Which kinds are let in.
#[derive(Clone)]
enum Kinds {
    All,
    Registered,
    These(HashSet<String>),
}

/// How far an import has come. What is on the way is not counted yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ImportProgress {
    /// Lines read.
    pub lines: u64,
    /// Bytes read.
    pub bytes: u64,
    /// Commits that are durable.
    pub commits: u64,
    /// Their events.
    pub events: u64,
    /// How many of the commits an earlier run had appended.
    pub repeated: u64,
}

/// What an import did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImportReport {
    /// Lines read.
    pub lines: u64,
    /// Entities that they were about; none if there were more than a million, which are not told apart any more.
    pub entities: Option<u64>,
    /// Commits of the file that are durable.
    pub commits: u64,
    /// Their events.
    pub events: u64,
    /// How many of the commits an earlier run had appended; nothing was written for them.
    pub repeated_commits: u64,
    /// Their events.
    pub repeated_events: u64,
    /// The file's manifest, if it was found and right.
    pub manifest: Option<Manifest>,
    /// Whether the file ends before its end: within a line or a commit, or without the manifest that belongs to it.
    pub truncated: bool,
}

impl ImportReport {
    /// Events that were not in the store before.
    pub fn new_events(&self) -> u64 {
        self.events.saturating_sub(self.repeated_events)
    }
}

/// Why an import stopped, where, and what it had done. Its message has the number of a line and a reason, never what stands in the line.
#[derive(Debug)]
pub struct ImportError {
    /// The number of the line, from 1: the lowest one that could not be imported. Of a commit that was refused or is not whole, its
    /// first line. 0 if it is not about a line.
    pub line: u64,
    /// What was wrong with it.
    pub reason: ImportProblem,
    /// What is durable all the same.
    pub report: Box<ImportReport>,
}

impl fmt::Display for ImportError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(f, "{}", self.reason),
            line => write!(f, "line {line}: {}", self.reason),
        }
    }
}

impl std::error::Error for ImportError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        std::error::Error::source(&self.reason)
    }
}

/// What stopped an import.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImportProblem {
    /// The name of the source cannot be used.
    #[error("the name of the source has {bytes} bytes; it has 1 to {bytes_max}")]
    Source {
        /// Its length.
        bytes: usize,
        /// The limit.
        bytes_max: usize,
    },
    /// The reader failed.
    #[error("the file cannot be read: {0}")]
    Read(#[source] io::Error),
    /// The line is not one of the format.
    #[error(transparent)]
    Line(#[from] LineProblem),
    /// The kind is not one of those that are let in.
    #[error("its kind is not one of those that are imported")]
    UnknownKind,
    /// The line is not the one that comes next in its commit.
    #[error("its version is not the next one of its commit")]
    Misplaced,
    /// The line says something else of its commit than the commit's first line.
    #[error("its \"{field}\" is not that of its commit's first line")]
    Disagrees {
        /// The field.
        field: &'static str,
    },
    /// The commit has fewer lines than it says. Nothing of it was applied.
    #[error("the commit that begins here is not whole: {found} of its {count} events are there")]
    IncompleteCommit {
        /// How many there are.
        found: usize,
        /// How many there should be.
        count: u32,
    },
    /// Too many commits are spread over the file.
    #[error("more than {bytes_max} bytes of commits that are not whole yet: keep the lines of a commit together")]
    TooMuchOpen {
        /// The limit.
        bytes_max: usize,
    },
    /// The entity has moved on since the file was written.
    #[error(
        "its entity is at version {actual}, the file expects {expected}; nothing of its commit was written. If these lines were imported before, give the name of the source that they had then"
    )]
    WrongVersion {
        /// The version before the commit's first event.
        expected: Version,
        /// The version that the entity has.
        actual: Version,
    },
    /// The idempotency key was used for other events: the file is not the one that was imported under this name, or a line was added
    /// or removed.
    #[error(
        "its entity has other events under the same idempotency key (version {version}); import another file under another source name"
    )]
    KeyReused {
        /// The version that they made.
        version: Version,
    },
    /// An event cannot be read back from what would be written.
    #[error("an event of its commit is not one that its kind can read")]
    Undecodable,
    /// The store refuses the commit for another reason.
    #[error(transparent)]
    Refused(Refused),
    /// What the store has of the entity cannot be read. Its events are not named here.
    #[error("entity {entity} cannot be read; the store's log says why")]
    Unreadable {
        /// The entity.
        entity: EntityHash,
    },
    /// The store cannot take it now. The import can be run again.
    #[error(transparent)]
    Store(AppendError),
    /// The manifest does not say what was read. All that was read is durable by then: the digest is known only at the end.
    #[error("the manifest's {what} is not that of the lines before it: they were altered, or some are missing")]
    WrongManifest {
        /// What differs.
        what: &'static str,
    },
    /// Something stands behind the manifest.
    #[error("it stands after the manifest, which is the last line; import files one by one")]
    AfterManifest,
    /// The lines are those of an export, and the manifest that ends one is not there: the file was cut between two commits. What is
    /// there was imported.
    #[error("the file ends here without the manifest that belongs to an export: it was cut")]
    MissingManifest,
}

impl From<AppendError> for ImportProblem {
    /// Leaves out whatever could quote an event.
    fn from(error: AppendError) -> Self {
        match error {
            AppendError::Refused(refused) => match refused {
                Refused::WrongVersion { expected, actual, .. } => ImportProblem::WrongVersion { expected, actual },
                Refused::KeyReused { version, .. } => ImportProblem::KeyReused { version },
                Refused::Undecodable { .. } => ImportProblem::Undecodable,
                refused => ImportProblem::Refused(refused),
            },
            AppendError::Unavailable(
                Unavailable::Unreadable { entity, cause: ReplayError::Undecodable { .. } }
                | Unavailable::Quarantined { entity, .. },
            ) => ImportProblem::Unreadable { entity },
            error => ImportProblem::Store(error),
        }
    }
}

impl From<LinesError> for ImportProblem {
    fn from(error: LinesError) -> Self {
        match error {
            LinesError::Io(error) => ImportProblem::Read(error),
            LinesError::TooLong => LineProblem::TooLong { bytes_max: LINE_BYTES_MAX }.into(),
        }
    }
}

impl Kuma {
    /// Imports events from lines of text, one JSON object each:
    ///
    /// ```json
    /// {"kind": "aircraft", "id": "N14228", "type": "Flown", "at": "2013-01-01T10:15:00Z", "data": {"distance": 1400}}
    /// ```
    ///
    /// Needed are `kind`, `id`, `type`, and `data` (any JSON value) or `bytes` (base64 of MessagePack). Optional are `version`, `commit`
    /// (`{"first": N, "count": N}`), `schema` (1 if it is not there), `at` (RFC 3339; kept as the metadata header `at`, the commit itself
    /// has the time of the import), `metadata` (`{"correlation", "causation", "headers": [[name, value], ...]}`) and `key` (the
    /// idempotency key). Other fields are refused. [`RawHandle::export`] and [`Kuma::export_all`] write such lines, and a manifest at
    /// the end with which the import compares what it read.
    ///
    /// **Each line happens once.** `source` names the file (1 to 64 bytes): together with the number of a line it is the idempotency key
    /// of its commit. An import that stopped, for whatever reason, is run again with the same name: what is there is passed over, and the
    /// rest follows. A line that was wrong is mended in its place, so that the others keep their numbers. Another file needs
    /// another name.
    ///
    /// **Commits.** Lines without `commit` are commits of their own. Lines with it are appended together, once all of them were read, in
    /// the order of their versions; lines of other entities may stand between. Where lines carry a version (`version` or `commit`),
    /// an entity that is not at the version before is refused; without, the events follow whatever the entity has.
    ///
    /// **Kinds.** Every kind is let in, and one that no Rust type was made known for ([`Kuma::register`]) folds as a document; see
    /// [`Import::only_registered_kinds`] and [`Import::kinds`].
    ///
    /// ```
    /// # use kuma_core::{Kuma, Options};
    /// # #[tokio::main]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let dir = tempfile::tempdir()?;
    /// # let kuma = Kuma::start(Options::new(dir.path())).await?;
    /// let lines = br#"{"kind":"order","id":"7","type":"Placed","data":{"total":5}}
    /// {"kind":"order","id":"7","type":"Paid","data":{"paid":true}}"#;
    /// let report = kuma.import("orders").run(&lines[..], |_| {}).await?;
    /// assert_eq!((report.events, report.new_events()), (2, 2));
    ///
    /// let again = kuma.import("orders").run(&lines[..], |_| {}).await?;
    /// assert_eq!((again.events, again.new_events()), (2, 0));
    /// # kuma.shutdown().await;
    /// # Ok(())
    /// # }
    /// ```
    pub fn import(&self, source: impl Into<String>) -> Import {
        Import { kuma: self.clone(), source: source.into(), in_flight: IN_FLIGHT_DEFAULT, kinds: Kinds::All }
    }
}

impl Import {
    /// How many commits may be on their way to the disk at once. Default: 4096.
    pub fn in_flight(mut self, commits: usize) -> Self {
        self.in_flight = commits.max(1);
        self
    }

    /// Refuses lines of kinds that no Rust type was made known for, by [`Kuma::register`] or [`Kuma::entity`].
    pub fn only_registered_kinds(mut self) -> Self {
        self.kinds = Kinds::Registered;
        self
    }

    /// Refuses lines of all kinds but these.
    pub fn kinds(mut self, kinds: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.kinds = Kinds::These(kinds.into_iter().map(Into::into).collect());
        self
    }

    /// Reads the lines to their end and appends them, many at a time. Returns when all of them are durable. `progress` is called now and
    /// then, in between; it should be quick.
    ///
    /// At the first line that cannot be imported it stops reading, waits for what is on its way, and returns the lowest line that
    /// failed. By then lines of other entities behind it may be durable, but none of the same entity, and nothing of a commit that is
    /// not whole.
    ///
    /// # Errors
    /// [`ImportError`] with the number of the line, the reason, and what is durable all the same. Mend it and run the import again.
    /// # Cancel safety
    /// If the future is dropped, what was submitted goes on; running the import again finishes it.
    pub async fn run(
        self,
        reader: impl AsyncBufRead + Unpin + Send,
        progress: impl FnMut(&ImportProgress) + Send,
    ) -> Result<ImportReport, ImportError> {
        const SOURCE_BYTES_MAX: usize = 64;
        let bytes = self.source.len();
        if bytes == 0 || bytes > SOURCE_BYTES_MAX {
            let reason = ImportProblem::Source { bytes, bytes_max: SOURCE_BYTES_MAX };
            return Err(ImportError { line: 0, reason, report: Box::default() });
        }
        let mut lines = Lines::new(reader, LINE_BYTES_MAX);
        let mut run = Run::new(self, progress);
        // Why it stopped is in `run`.
        let _ = run.read(&mut lines).await;
        run.finish().await
    }
}

/// The import stops; why is in [`Run::failed`].
struct Stopped;

/// An import that runs.
struct Run<P> {
    import: Import,
    progress: P,
    bytes_max: usize,
    done: ImportProgress,
    repeated_events: u64,
    /// Whole commits that were read, and lines with events.
    read_commits: u64,
    read_events: u64,
    /// Whether the lines are those of an export, so that a manifest has to follow.
    has_spans: bool,
    manifest: Option<Manifest>,
    truncated: bool,
    counted: Option<HashSet<EntityHash>>,
    entities: HashMap<Box<str>, Entity>,
    /// Commits of which not all lines were read, by entity.
    open: HashMap<Box<str>, Commit>,
    open_bytes: usize,
    on_the_way: VecDeque<OnTheWay>,
    on_the_way_bytes: usize,
    /// Entities that had a burst of commits, all of them settled.
    left_alone: Vec<Arc<Target>>,
    /// Whether the commit that was settled last had been appended by an earlier run.
    is_repeating: bool,
    /// The problem with the lowest line.
    failed: Option<(u64, ImportProblem)>,
}

/// An entity of the file.
struct Entity {
    target: Arc<Target>,
    stored: Ahead,
}

/// Whether the entity's stored commits are compared with those of the file.
enum Ahead {
    NotYet,
    Reading(Box<Stored>),
    /// There are no more of the file.
    Over,
}

/// Where an entity's commits go.
struct Target {
    handle: RawHandle,
    sequence: Sequence,
    /// How many of them are on the way.
    on_the_way: AtomicUsize,
    /// How many were sent since none was.
    burst: AtomicUsize,
}

impl Target {
    fn new(handle: RawHandle) -> Arc<Self> {
        let (on_the_way, burst) = (AtomicUsize::new(0), AtomicUsize::new(0));
        Arc::new(Target { handle, sequence: Sequence::new(), on_the_way, burst })
    }

    fn on_the_way(&self) -> usize {
        self.on_the_way.load(Relaxed)
    }

    fn sent(&self) {
        self.on_the_way.fetch_add(1, Relaxed);
        self.burst.fetch_add(1, Relaxed);
    }

    /// Whether the entity is left alone now with many commits that it does not know to be durable.
    fn arrived(&self) -> bool {
        self.on_the_way.fetch_sub(1, Relaxed) == 1 && self.burst.swap(0, Relaxed) >= BURST
    }
}

/// The lines of a commit.
struct Commit {
    /// The number of its first line.
    line: u64,
    /// Kind and id.
    entity: Box<str>,
    span: Option<CommitSpan>,
    expected: Option<Version>,
    key: Option<String>,
    at: Option<String>,
    metadata: Option<Metadata>,
    events: Vec<NewEvent>,
    bytes: usize,
}

/// A commit that was submitted.
struct OnTheWay {
    line: u64,
    events: u64,
    bytes: usize,
    target: Arc<Target>,
    pending: Pending,
}

impl<P: FnMut(&ImportProgress) + Send> Run<P> {
    fn new(import: Import, progress: P) -> Self {
        let limits = import.kuma.open_shards().filter_map(|(_, open)| Some(open.ok()?.shard.budget().limit() / 2));
        let bytes_max = limits.min().unwrap_or(0).min(IN_FLIGHT_BYTES_MAX);
        Run {
            import,
            progress,
            bytes_max,
            done: ImportProgress::default(),
            repeated_events: 0,
            read_commits: 0,
            read_events: 0,
            has_spans: false,
            manifest: None,
            truncated: false,
            counted: Some(HashSet::new()),
            entities: HashMap::new(),
            is_repeating: false,
            open: HashMap::new(),
            open_bytes: 0,
            on_the_way: VecDeque::new(),
            on_the_way_bytes: 0,
            left_alone: Vec::new(),
            failed: None,
        }
    }

    /// Notes why the import stops. Of several reasons the one with the lowest line counts: the others may follow from it.
    fn fail(&mut self, line: u64, problem: impl Into<ImportProblem>) -> Stopped {
        if self.failed.as_ref().is_none_or(|(lowest, _)| line < *lowest) {
            self.failed = Some((line, problem.into()));
        }
        Stopped
    }

    /// Reads and submits everything.
    async fn read<R: AsyncBufRead + Unpin>(&mut self, lines: &mut Lines<R>) -> Result<(), Stopped> {
        loop {
            let next = lines.next().await;
            let line = lines.number();
            (self.done.lines, self.done.bytes) = (line, lines.bytes());
            match next {
                Ok(true) => self.line(lines).await?,
                Ok(false) => break,
                Err(error) => return Err(self.fail(line, error)),
            }
        }
        if !self.open.is_empty() {
            self.truncated = true;
            return Err(self.fail_incomplete());
        }
        if self.has_spans && self.manifest.is_none() {
            self.truncated = true;
            return Err(self.fail(lines.number(), ImportProblem::MissingManifest));
        }
        Ok(())
    }

    async fn line<R: AsyncBufRead + Unpin>(&mut self, lines: &mut Lines<R>) -> Result<(), Stopped> {
        let number = lines.number();
        if lines.line().trim_ascii().is_empty() {
            return Ok(());
        }
        if self.manifest.is_some() {
            return Err(self.fail(number, ImportProblem::AfterManifest));
        }
        match ndjson::parse(lines.line()) {
            Ok(Line::Event(event)) => {
                let entity = [&*event.kind, "\0", &*event.id].concat().into_boxed_str();
                if let Some(other) = self.open.get(&entity).filter(|open| open.span != event.commit) {
                    let (line, problem) = other.incomplete();
                    return Err(self.fail(line, problem));
                }
                match self.event(lines, entity, event) {
                    Ok(Some(commit)) => self.submit(commit).await,
                    Ok(None) => Ok(()),
                    Err(problem) => Err(self.fail(number, problem)),
                }
            }
            Ok(Line::Archive) => Ok(()),
            Ok(Line::Manifest(_)) if !self.open.is_empty() => Err(self.fail_incomplete()),
            Ok(Line::Manifest(manifest)) => match self.compare(&manifest, &lines.digest_before()) {
                None => {
                    self.manifest = Some(manifest);
                    Ok(())
                }
                Some(what) => Err(self.fail(number, ImportProblem::WrongManifest { what })),
            },
            Err(problem) => {
                self.truncated = problem == LineProblem::Cut && !lines.is_whole();
                Err(self.fail(number, problem))
            }
        }
    }

    /// Which of the commits that are not whole begins first.
    fn fail_incomplete(&mut self) -> Stopped {
        let first = self.open.values().min_by_key(|commit| commit.line).map(Commit::incomplete);
        match first {
            Some((line, problem)) => self.fail(line, problem),
            None => Stopped,
        }
    }

    /// What the manifest says that is not so.
    fn compare(&self, manifest: &Manifest, digest: &str) -> Option<&'static str> {
        let entities = self.counted.as_ref().map(|counted| counted.len() as u64);
        let differs = [
            ("number of entities", entities.is_some_and(|entities| entities != manifest.entities)),
            ("number of commits", self.read_commits != manifest.commits),
            ("number of events", self.read_events != manifest.events),
            ("digest", digest != manifest.sha256),
        ];
        differs.iter().find(|(_, differs)| *differs).map(|(what, _)| *what)
    }

    /// Adds an event to its entity's commit, and returns the commit if it is whole by that.
    fn event<R: AsyncBufRead + Unpin>(
        &mut self,
        lines: &Lines<R>,
        entity: Box<str>,
        event: EventLine<'_>,
    ) -> Result<Option<Commit>, ImportProblem> {
        let EventLine { kind, version, commit: span, name, schema, at, metadata, key, data, .. } = event;
        self.check(&kind)?;
        // Numbers can be longer in MessagePack.
        let bytes = lines.line().len().max(data.len());
        let event = NewEvent::message_pack(name, data).schema(schema);
        let (at, key) = (at.map(Cow::into_owned), key.map(Cow::into_owned));
        self.read_events += 1;
        self.has_spans |= span.is_some();
        if let Some(open) = self.open.get_mut(&entity) {
            open.go_on(version, key, at, metadata, event)?;
            open.bytes += bytes;
            if !open.is_whole() {
                return self.keep(bytes);
            }
            let whole = self.open.remove(&entity);
            // The last line was not added.
            self.open_bytes -= whole.as_ref().map_or(0, |commit| commit.bytes - bytes);
            self.read_commits += 1;
            return Ok(whole);
        }
        let events_max = self.import.kuma.inner.limits.append_events_max;
        if span.is_some_and(|span| span.count as usize > events_max) {
            return Err(ImportProblem::Refused(Refused::TooManyEvents { events_max }));
        }
        if span.zip(version).is_some_and(|(span, version)| span.first != version) {
            return Err(ImportProblem::Misplaced);
        }
        let commit = Commit {
            line: lines.number(),
            entity,
            span,
            // Versions are counted from 1: the format has no other.
            expected: span.map(|span| span.first).or(version).map(|first| Version(first.saturating_sub(1))),
            key,
            at,
            metadata,
            events: vec![event],
            bytes: bytes + COMMIT_BYTES,
        };
        if commit.is_whole() {
            self.read_commits += 1;
            return Ok(Some(commit));
        }
        let bytes = commit.bytes;
        self.open.insert(commit.entity.clone(), commit);
        self.keep(bytes)
    }

    /// Whether there is room for so much more of commits that are not whole.
    fn keep(&mut self, bytes: usize) -> Result<Option<Commit>, ImportProblem> {
        self.open_bytes += bytes;
        match self.open_bytes > OPEN_BYTES_MAX {
            true => Err(ImportProblem::TooMuchOpen { bytes_max: OPEN_BYTES_MAX }),
            false => Ok(None),
        }
    }

    /// Whether lines of this kind are let in. Not by asking for a handle: a kind that was asked for cannot be given its Rust type
    /// any more.
    fn check(&self, kind: &str) -> Result<(), ImportProblem> {
        check_kind(kind).map_err(ImportProblem::Refused)?;
        let is_let_in = match &self.import.kinds {
            Kinds::All => true,
            Kinds::These(kinds) => kinds.contains(kind),
            Kinds::Registered => {
                let kinds = self.import.kuma.inner.kinds.read();
                kinds.get(kind).is_some_and(|kind| kind.rust_type().is_some())
            }
        };
        if is_let_in { Ok(()) } else { Err(ImportProblem::UnknownKind) }
    }

    /// Sends a commit on its way, when there is room for it, unless it is there.
    async fn submit(&mut self, mut commit: Commit) -> Result<(), Stopped> {
        let (line, events) = (commit.line, commit.events.len() as u64);
        let key = commit.key.take().unwrap_or_else(|| format!("import/{}/{line}", self.import.source));
        if self.is_there(&commit, &key).await {
            self.repeated(events);
            // As often as other commits are settled.
            return if self.done.commits.is_multiple_of(PROGRESS_EVERY) { self.go_on() } else { Ok(()) };
        }
        while self.on_the_way.len() >= self.import.in_flight
            || (!self.on_the_way.is_empty() && self.on_the_way_bytes + commit.bytes > self.bytes_max)
        {
            self.settle().await?;
        }
        let mut target = self.entity(&commit.entity).target.clone();
        // Half of what an entity takes: others may want to write to it as well.
        let appends_max = target.handle.core().map_or(1, |core| (core.settings.entity_appends_max / 2).max(1));
        while target.on_the_way() >= appends_max {
            self.settle().await?;
        }
        loop {
            match commit.append(&target, &key).await {
                Ok(pending) => {
                    let bytes = commit.bytes;
                    self.on_the_way_bytes += bytes;
                    target.sent();
                    self.on_the_way.push_back(OnTheWay { line, events, bytes, target, pending });
                    return Ok(());
                }
                Err(AppendError::Unavailable(Unavailable::Overloaded { retry_after, .. })) => {
                    target = self.wait_for_room(target, &commit.entity, retry_after).await?;
                }
                Err(error) => return Err(self.fail(line, error)),
            }
        }
    }

    /// Others write to the store as well and have filled it. The refusal broke the entity's sequence: a new one begins when nothing of
    /// the old one can fail any more.
    async fn wait_for_room(
        &mut self,
        target: Arc<Target>,
        entity: &str,
        retry_after: Duration,
    ) -> Result<Arc<Target>, Stopped> {
        match self.on_the_way.is_empty() {
            true => tokio::time::sleep(retry_after).await,
            false => self.settle().await?,
        }
        while target.on_the_way() > 0 {
            self.settle().await?;
        }
        let fresh = Target::new(target.handle.clone());
        self.entity(entity).target = fresh.clone();
        Ok(fresh)
    }

    /// Whether the commit is known to be durable already, without asking its entity.
    async fn is_there(&mut self, commit: &Commit, key: &str) -> bool {
        let is_repeating = self.is_repeating;
        let entity = self.entity(&commit.entity);
        if is_repeating && matches!(entity.stored, Ahead::NotYet) {
            entity.stored = match Stored::open(&entity.target.handle).await {
                Some(stored) => Ahead::Reading(Box::new(stored)),
                None => Ahead::Over,
            };
        }
        let Ahead::Reading(stored) = &mut entity.stored else { return false };
        let is_there = stored.take(key.as_bytes(), &commit.events).await;
        if !is_there {
            entity.stored = Ahead::Over;
        }
        is_there
    }

    /// The entity, with a handle that is kept.
    fn entity(&mut self, name: &str) -> &mut Entity {
        // More than can be on the way, so that this is not done for each new entity.
        if self.entities.len() >= HANDLES_MAX.max(2 * self.import.in_flight) && !self.entities.contains_key(name) {
            self.entities.retain(|_, entity| entity.target.on_the_way() > 0);
        }
        self.entities.entry(name.into()).or_insert_with(|| {
            let (kind, id) = name.split_once(SEPARATOR).unwrap_or((name, ""));
            let handle = self.import.kuma.raw(kind, id);
            if let (Some(counted), Some(hash)) = (&mut self.counted, handle.hash()) {
                counted.insert(hash);
                if counted.len() > COUNTED_MAX {
                    self.counted = None;
                }
            }
            Entity { target: Target::new(handle), stored: Ahead::NotYet }
        })
    }

    /// Waits for the oldest commit on the way, and takes all others that are settled by then.
    async fn settle(&mut self) -> Result<(), Stopped> {
        if let Some(mut oldest) = self.on_the_way.pop_front() {
            let outcome = (&mut oldest.pending.0).await;
            self.arrived(oldest, outcome);
        }
        while let Some(outcome) = self.on_the_way.front_mut().and_then(|next| (&mut next.pending.0).now_or_never()) {
            if let Some(next) = self.on_the_way.pop_front() {
                self.arrived(next, outcome);
            }
        }
        for target in std::mem::take(&mut self.left_alone) {
            // An entity learns with its next message which commits are durable, and keeps their decoded events until then. In the order
            // of an export there is none for long: half a gigabyte for a third of a million events.
            let _ = target.handle.opener().await;
        }
        self.go_on()
    }

    /// Tells of the progress.
    fn go_on(&mut self) -> Result<(), Stopped> {
        (self.progress)(&self.done);
        if self.failed.is_some() { Err(Stopped) } else { Ok(()) }
    }

    fn arrived(&mut self, commit: OnTheWay, outcome: Result<Written, AppendError>) {
        let OnTheWay { line, events, bytes, target, .. } = commit;
        self.on_the_way_bytes -= bytes;
        if target.arrived() {
            self.left_alone.push(target);
        }
        match outcome {
            Ok(Written::Repeated(..)) => self.repeated(events),
            Ok(Written::Committed(_) | Written::Rejected) => {
                self.is_repeating = false;
                self.done.commits += 1;
                self.done.events += events;
            }
            Err(error) => drop(self.fail(line, error)),
        }
    }

    fn repeated(&mut self, events: u64) {
        self.is_repeating = true;
        self.done.commits += 1;
        self.done.events += events;
        self.done.repeated += 1;
        self.repeated_events += events;
    }

    /// Waits for everything that is on its way.
    async fn finish(mut self) -> Result<ImportReport, ImportError> {
        while !self.on_the_way.is_empty() {
            // Also after one that failed.
            let _ = self.settle().await;
        }
        (self.progress)(&self.done);
        let report = ImportReport {
            lines: self.done.lines,
            entities: self.counted.map(|counted| counted.len() as u64),
            commits: self.done.commits,
            events: self.done.events,
            repeated_commits: self.done.repeated,
            repeated_events: self.repeated_events,
            manifest: self.manifest,
            truncated: self.truncated,
        };
        match self.failed {
            Some((line, reason)) => Err(ImportError { line, reason, report: Box::new(report) }),
            None => Ok(report),
        }
    }
}

impl Commit {
    /// Takes its next line.
    fn go_on(
        &mut self,
        version: Option<u64>,
        key: Option<String>,
        at: Option<String>,
        metadata: Option<Metadata>,
        event: NewEvent,
    ) -> Result<(), ImportProblem> {
        let next = self.span.map(|span| span.first.saturating_add(self.events.len() as u64));
        if version.is_some() && version != next {
            return Err(ImportProblem::Misplaced);
        }
        // A commit has one of each.
        let disagrees = [
            ("key", key.is_some() && key != self.key),
            ("at", at.is_some() && at != self.at),
            ("metadata", metadata.is_some() && metadata != self.metadata),
        ];
        if let Some((field, _)) = disagrees.iter().find(|(_, disagrees)| *disagrees) {
            return Err(ImportProblem::Disagrees { field });
        }
        self.events.push(event);
        Ok(())
    }

    async fn append(&self, target: &Target, key: &str) -> Result<Pending, AppendError> {
        // Cloned: it may have to be sent again.
        let append = target.handle.append_all(self.events.iter().cloned());
        let mut append = append.idempotency_key(key).in_sequence(&target.sequence);
        if let Some(metadata) = self.metadata() {
            append = append.metadata(metadata);
        }
        if let Some(expected) = self.expected {
            append = append.expecting(expected);
        }
        append.submit().await
    }

    fn is_whole(&self) -> bool {
        self.span.is_none_or(|span| self.events.len() >= span.count as usize)
    }

    fn incomplete(&self) -> (u64, ImportProblem) {
        let count = self.span.map_or(1, |span| span.count);
        (self.line, ImportProblem::IncompleteCommit { found: self.events.len(), count })
    }

    /// With the original time.
    fn metadata(&self) -> Option<Metadata> {
        let Some(at) = &self.at else { return self.metadata.clone() };
        let mut metadata = self.metadata.clone().unwrap_or_default();
        if metadata.headers.iter().all(|(name, _)| name != AT) {
            metadata.headers.push((AT.to_owned(), at.clone()));
        }
        Some(metadata)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Options;

    /// More entities than handles are kept of and than are told apart, in a store that can keep few of them in memory.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn memory_is_bounded_by_the_handles_that_are_kept() {
        const ENTITIES: usize = COUNTED_MAX + 100;
        let dir = tempfile::tempdir().unwrap();
        let kuma = Kuma::start(Options::new(dir.path()).shards(1).memory_budget(1 << 20)).await.unwrap();
        let line = |n: usize| {
            format!("{{\"kind\":\"k\",\"id\":\"{}\",\"type\":\"T\",\"data\":{{\"n\":{n}}}}}\n", n % ENTITIES)
        };
        let file: String = (0..3 * ENTITIES).map(line).collect();
        for repeated in [0, 3 * ENTITIES] {
            let mut run = Run::new(kuma.import("f").in_flight(20), |_| {});
            let mut lines = Lines::new(file.as_bytes(), LINE_BYTES_MAX);
            assert!(run.read(&mut lines).await.is_ok());
            assert!(run.entities.len() <= HANDLES_MAX && run.counted.is_none());
            let report = run.finish().await.unwrap();
            assert_eq!((report.events, report.repeated_events), (3 * ENTITIES as u64, repeated as u64));
            assert_eq!(report.entities, None, "too many to be counted");
        }
        for id in [0, ENTITIES - 1] {
            let events = kuma.raw("k", format!("{id}")).events(.., 9).await.unwrap();
            let numbers: Vec<_> =
                events.iter().map(|event| event.json().unwrap()["n"].as_u64().unwrap() as usize).collect();
            assert_eq!(numbers, [id, id + ENTITIES, id + 2 * ENTITIES]);
        }
        kuma.shutdown().await;
    }
}
