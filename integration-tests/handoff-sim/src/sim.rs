//! One run: events that follow from a seed, and then calm.

use std::{
    collections::VecDeque,
    fmt::{self, Write as _},
    hash::{DefaultHasher, Hasher},
    path::PathBuf,
};

use kuma_cluster::{Disks, Envelope, Input, Message, Phase, Safeguards, Token, TransferId};
use kuma_core::{AppendError, DiskId, Gate, NotWritten, Seat, Slot, Unavailable, slot_of};

use crate::{
    coverage::Coverage,
    disk::{Around, Disk, KIND, event},
    network::{Body, Network, Packet},
    oracle::Oracle,
    rng::Rng,
    template::{DISKS_MAX, SPARE, Templates, scratch},
};

/// Slots that are looked at, and entities in each.
const SLOTS: usize = 3;
const ENTITIES_OF_SLOT: usize = 2;
/// What is on its way at once at most; beyond it something is lost.
const PACKETS_MAX: usize = 96;
/// Rounds of calm within which everything has to settle.
const CALM_ROUNDS: u32 = 300;
/// Lines of a run that are shown with what was broken.
const LINES_SHOWN: usize = 80;

/// What a node does wrong around the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    /// Nothing.
    None,
    /// Somebody puts an older copy of its files in their place, so that the same disk has forgotten what it promised.
    OlderFiles,
}

/// What is run.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Events before the calm.
    pub events: u32,
    /// What the rules have to do without.
    pub safeguards: Safeguards,
    /// What is done wrong around them.
    pub mutant: Mutant,
}

impl Config {
    /// All as in the product.
    pub const PRODUCT: Config = Config { events: 1500, safeguards: Safeguards::ALL, mutant: Mutant::None };
}

/// A run in which everything held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Of everything that happened, in its order.
    pub digest: u64,
    /// Events, those of the calm too.
    pub events: u64,
    /// What it has come by.
    pub coverage: Coverage,
}

/// What did not hold.
#[derive(Clone, Debug)]
pub struct Failure {
    /// Gives the same run again.
    pub seed: u64,
    /// The number of the event.
    pub event: u64,
    /// What.
    pub what: String,
    /// What happened before.
    pub lines: Vec<String>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Failure { seed, event, what, lines } = self;
        writeln!(f, "KUMA_SEED={seed}, event {event}: {what}")?;
        lines.iter().try_for_each(|line| writeln!(f, "  {line}"))
    }
}

/// Runs a seed.
///
/// # Errors
/// Something did not hold.
pub async fn run(config: Config, seed: u64, templates: &Templates) -> Result<Run, Box<Failure>> {
    let mut sim = Sim::new(config, seed, templates).await;
    let outcome = sim.all().await;
    for disk in &mut sim.disks {
        disk.stop().await;
    }
    match outcome {
        Ok(()) => Ok(Run { digest: sim.digest.finish(), events: sim.event, coverage: sim.around.coverage }),
        Err(what) => Err(Box::new(Failure { seed, event: sim.event, what, lines: sim.lines.into() })),
    }
}

/// How often what happens, out of 1000 or of 100: each seed has its own.
struct Rates {
    drop: usize,
    duplicate: usize,
    crash: usize,
    crash_at_commit: usize,
    cut: usize,
    wipe: usize,
    late: usize,
    moves: usize,
    commit: usize,
    remind: usize,
    abort: usize,
    hint: usize,
}

/// Something that may happen next, with its weight.
#[derive(Clone, Copy, Debug)]
enum Event {
    Deliver,
    Commit,
    Copy,
    Seal,
    Move,
    Remind,
    Abort,
    Append,
    Again,
    LateAppend,
    Read,
    Crash,
    Start,
    Cut,
    Heal,
    Wipe,
    Join,
    Collect,
    Hint,
    KeepOlder,
    GoBack,
}

/// An append as a client has it.
struct Request {
    entity: usize,
    key: u64,
    /// The disk that acknowledged it first.
    acked_by: Option<DiskId>,
}

struct Sim<'a> {
    config: Config,
    rng: Rng,
    rates: Rates,
    templates: &'a Templates,
    root: tempfile::TempDir,
    disks: Vec<Disk>,
    /// All disks that a node had.
    ids: Vec<Vec<DiskId>>,
    slots: Vec<Slot>,
    /// The disk with the say was lost.
    lost: Vec<bool>,
    spare: usize,
    around: Around,
    oracle: Oracle,
    requests: Vec<Request>,
    event: u64,
    digest: DefaultHasher,
    lines: VecDeque<String>,
}

fn entity(number: usize) -> String {
    format!("{{slot-{}}}-{number}", number / ENTITIES_OF_SLOT)
}

impl<'a> Sim<'a> {
    async fn new(config: Config, seed: u64, templates: &'a Templates) -> Self {
        let mut rng = Rng::new(seed);
        let nodes = 3 + rng.below(DISKS_MAX - 2);
        let rates = Rates {
            drop: rng.below(20),
            duplicate: rng.below(25),
            crash: 1 + rng.below(6),
            crash_at_commit: rng.below(8),
            cut: rng.below(20),
            wipe: if rng.percent(40) { rng.below(8) } else { 0 },
            late: if rng.percent(50) { 10 + rng.below(30) } else { 0 },
            moves: 40 + rng.below(100),
            commit: 100 + rng.below(250),
            remind: 5 + rng.below(80),
            hint: if rng.percent(40) { rng.below(30) } else { 1 },
            abort: if rng.percent(40) { 4 + rng.below(20) } else { 2 },
        };
        let root = scratch();
        let slots: Vec<Slot> = (0..SLOTS).map(|s| slot_of(KIND, &entity(s * ENTITIES_OF_SLOT))).collect();
        let mut disks = Vec::new();
        for node in 0..nodes {
            let path = root.path().join(format!("{node}-0"));
            templates.copy(node, &path.join("0"));
            let seat = if node == 0 { Seat::Founder } else { Seat::Joiner };
            disks.push(Disk::new(node, 0, path, seat, &slots).await);
        }
        let ids: Vec<Vec<DiskId>> = disks.iter().map(|disk| vec![disk.id]).collect();
        for disk in &mut disks {
            let mut known = Disks::founder(disk.id);
            ids.iter().flatten().for_each(|id| known.admit(*id, None, Safeguards::ALL));
            disk.keep_disks(known).await;
        }
        let around = Around {
            network: Network::default(),
            coverage: Coverage::default(),
            safeguards: config.safeguards,
            alarm: None,
        };
        Sim {
            config,
            rng,
            rates,
            templates,
            root,
            disks,
            ids,
            lost: vec![false; slots.len()],
            slots,
            spare: DISKS_MAX,
            around,
            oracle: Oracle::default(),
            requests: Vec::new(),
            event: 0,
            digest: DefaultHasher::new(),
            lines: VecDeque::new(),
        }
    }

    async fn all(&mut self) -> Result<(), String> {
        for _ in 0..self.config.events {
            let event = self.choose();
            self.happen(event).await?;
            self.check()?;
        }
        self.calm().await?;
        self.judge().await
    }

    fn note(&mut self, line: impl Into<String>) {
        let line = format!("{} {}", self.event, line.into());
        self.digest.write(line.as_bytes());
        if self.lines.len() == LINES_SHOWN {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
    }

    fn check(&mut self) -> Result<(), String> {
        if let Some(alarm) = self.around.alarm.take() {
            return Err(alarm);
        }
        for s in 0..SLOTS {
            if !self.lost[s] && self.is_released_to_nobody(s) {
                self.lost[s] = true;
                self.around.coverage.slots_lost += 1;
                self.note(format!("slot {s} was released to a disk that is gone"));
            }
        }
        self.oracle.check(&self.disks, &self.lost)
    }

    /// A giver that has not heard yet that its target is gone may decide for it: what it keeps then is the only copy, and it takes a vote to use it.
    fn is_released_to_nobody(&self, s: usize) -> bool {
        let is_gone = |disk: &Disk| match disk.places[s].handoff.record.token {
            Token::Released { to, is_taken: false, .. } => {
                self.disks.iter().all(|other| other.id != to) && self.ids.iter().flatten().any(|id| *id == to)
            }
            _ => false,
        };
        self.disks.iter().any(is_gone) && !self.disks.iter().any(|disk| self.has_say(disk.id, s))
    }

    fn choose(&mut self) -> Event {
        let is_mutant = self.config.mutant == Mutant::OlderFiles;
        let weights = [
            (Event::Deliver, 400),
            (Event::Commit, self.rates.commit),
            (Event::Copy, 260),
            (Event::Seal, 120),
            (Event::Move, self.rates.moves),
            (Event::Remind, self.rates.remind),
            (Event::Abort, self.rates.abort),
            (Event::Append, 40),
            (Event::Again, 25),
            (Event::LateAppend, self.rates.late),
            (Event::Read, 25),
            (Event::Crash, self.rates.crash),
            (Event::Start, 60),
            (Event::Cut, self.rates.cut),
            (Event::Heal, 30),
            (Event::Wipe, self.rates.wipe),
            (Event::Join, 40),
            (Event::Collect, 10),
            (Event::Hint, self.rates.hint),
            (Event::KeepOlder, if is_mutant { 10 } else { 0 }),
            (Event::GoBack, if is_mutant { 10 } else { 0 }),
        ];
        let mut at = self.rng.below(weights.iter().map(|(_, weight)| weight).sum());
        for (event, weight) in weights {
            match at.checked_sub(weight) {
                Some(rest) => at = rest,
                None => return event,
            }
        }
        Event::Deliver
    }

    /// One of those for which it holds.
    fn one(&mut self, of: impl Fn(&Disk, usize) -> bool) -> Option<(usize, usize)> {
        let places = |disk: &Disk| (0..SLOTS).filter(|s| of(disk, *s)).map(|s| (disk.node, s)).collect::<Vec<_>>();
        let all: Vec<(usize, usize)> = self.disks.iter().filter(|disk| disk.is_up()).flat_map(places).collect();
        (!all.is_empty()).then(|| all[self.rng.below(all.len())])
    }

    fn transfer(&mut self) -> TransferId {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.rng.next().to_le_bytes());
        bytes[8..].copy_from_slice(&self.rng.next().to_le_bytes());
        TransferId(bytes)
    }

    fn name(&self, id: DiskId) -> String {
        let of = |(node, ids): (usize, &Vec<DiskId>)| Some((node, ids.iter().position(|other| *other == id)?));
        match self.ids.iter().enumerate().find_map(of) {
            Some((node, generation)) => format!("{node}.{generation}"),
            None => "?".to_owned(),
        }
    }

    async fn happen(&mut self, event: Event) -> Result<(), String> {
        self.event += 1;
        match event {
            Event::Deliver => self.deliver_one().await,
            Event::Commit => {
                if let Some((n, s)) = self.one(|disk, s| disk.places[s].pending.is_some()) {
                    match self.rng.percent(self.rates.crash_at_commit) {
                        true => self.crash(n).await,
                        false => {
                            let is_looked_up = self.rng.percent(6);
                            self.commit(n, s, is_looked_up).await;
                        }
                    }
                }
            }
            Event::Copy => {
                // A piece that was not answered is seldom sent again, so that the others get somewhere.
                let is_again = self.rng.percent(12);
                let is_idle = |disk: &Disk, s: usize| {
                    let copying = disk.places[s].copying.as_ref();
                    copying.is_some_and(|copying| is_again || !copying.is_waiting()) && disk.places[s].pending.is_none()
                };
                if let Some((n, s)) = self.one(is_idle) {
                    self.copy_on(n, s).await;
                }
            }
            Event::Seal => {
                if let Some((n, s)) = self.one(|disk, s| disk.may_seal(s)) {
                    let has_append = self.rng.percent(60);
                    self.seal(n, s, has_append).await?;
                }
            }
            Event::Move => {
                if let Some((n, s)) = self.one(|disk, s| disk.places[s].handoff.record.owned().is_some()) {
                    // Where a copy of an earlier attempt is left, some of the time.
                    let is_left = |disk: &Disk| disk.node != n && disk.places[s].handoff.record.staged.is_some();
                    let left = self.disks.iter().position(is_left).filter(|_| self.rng.percent(40));
                    let to = left.unwrap_or_else(|| self.rng.below(self.disks.len()));
                    self.start_move(n, s, to);
                }
            }
            Event::Remind => {
                let is_idle = |disk: &Disk, s: usize| {
                    let record = disk.places[s].handoff.record;
                    let is_released = matches!(record.token, Token::Released { is_taken: false, .. });
                    let is_waiting = disk.places[s].is_sealed() || record.staged.is_some() || is_released;
                    is_waiting && disk.places[s].pending.is_none()
                };
                if let Some((n, s)) = self.one(is_idle) {
                    self.remind(n, s);
                }
            }
            Event::Abort => {
                let is_out =
                    |disk: &Disk, s: usize| disk.places[s].handoff.out.is_some() && disk.places[s].pending.is_none();
                // One that is prepared already leaves most behind.
                let is_sealed = |disk: &Disk, s: usize| disk.places[s].is_sealed() && disk.places[s].pending.is_none();
                if let Some((n, s)) = self.one(is_sealed).or_else(|| self.one(is_out)) {
                    self.note(format!("abort {n} slot {s}"));
                    self.disks[n].put(&mut self.around, s, Input::Abort);
                }
            }
            Event::Append => {
                let number = self.rng.below(SLOTS * ENTITIES_OF_SLOT);
                let which = self.new_request(number);
                self.request(which, false).await?;
            }
            Event::Again if !self.requests.is_empty() => {
                let which = self.rng.below(self.requests.len());
                self.request(which, false).await?;
            }
            Event::LateAppend if !self.requests.is_empty() => {
                let sealed = self.one(|disk, s| disk.places[s].is_sealed() && disk.places[s].pending.is_none());
                match sealed.filter(|_| self.rng.percent(50)) {
                    Some((n, s)) => {
                        let number = s * ENTITIES_OF_SLOT + self.rng.below(ENTITIES_OF_SLOT);
                        let which = self.new_request(number);
                        self.request_at(which, n, true, true).await?;
                    }
                    None => {
                        let which = self.rng.below(self.requests.len());
                        self.request(which, true).await?;
                    }
                }
            }
            Event::Again | Event::LateAppend => {}
            Event::Read => {
                let n = self.rng.below(self.disks.len());
                let entity = self.rng.below(SLOTS * ENTITIES_OF_SLOT);
                self.read(n, entity).await?;
            }
            Event::Crash => {
                // Where it hurts, mostly.
                let hurts = |disk: &Disk, s: usize| disk.places[s].pending.is_some() || disk.places[s].is_sealed();
                let chosen = if self.rng.percent(70) { self.one(hurts) } else { None };
                if let Some((n, _)) = chosen.or_else(|| self.one(|_, _| true)) {
                    self.crash(n).await;
                }
            }
            Event::Start => {
                if let Some(n) = self.disks.iter().position(|disk| !disk.is_up()) {
                    self.note(format!("start {n}"));
                    self.disks[n].start(&mut self.around).await;
                }
            }
            Event::Cut => {
                let (one, other) = (self.rng.below(self.disks.len()), self.rng.below(self.disks.len()));
                if one != other && self.around.network.cut.insert((one.min(other), one.max(other))) {
                    self.around.coverage.cuts += 1;
                    self.note(format!("cut {one} {other}"));
                }
            }
            Event::Heal => {
                if self.around.network.cut.pop_first().is_some() {
                    self.note("heal");
                }
            }
            Event::Wipe => self.wipe().await,
            Event::Join => {
                let n = self.rng.below(self.disks.len());
                self.ask_to_join(n);
            }
            Event::Collect => {
                let n = self.rng.below(self.disks.len());
                if self.disks[n].is_up() {
                    self.note(format!("collect {n}"));
                    self.collect(n).await?;
                }
            }
            Event::Hint => {
                if let Some((n, s)) = self.one(|disk, s| disk.places[s].handoff.record.owned().is_some()) {
                    self.hint(n, s);
                }
            }
            Event::KeepOlder => {
                let n = self.rng.below(self.disks.len());
                if self.disks[n].is_up() {
                    self.note(format!("keep older files of {n}"));
                    self.disks[n].keep_older();
                }
            }
            Event::GoBack => {
                let n = self.rng.below(self.disks.len());
                if self.disks[n].is_up() && self.disks[n].go_back(&mut self.around).await {
                    self.note(format!("older files in {n}"));
                }
            }
        }
        Ok(())
    }

    async fn deliver_one(&mut self) {
        let network = &mut self.around.network;
        if network.packets.is_empty() {
            return;
        }
        let at = self.rng.below(network.packets.len());
        let is_dropped = self.rng.percent(self.rates.drop) || network.packets.len() > PACKETS_MAX;
        if is_dropped {
            network.packets.remove(at);
            self.around.coverage.drops += 1;
            return;
        }
        let is_duplicated = self.rng.percent(self.rates.duplicate);
        self.deliver(at, is_duplicated).await;
    }

    async fn deliver(&mut self, at: usize, is_duplicated: bool) {
        let packet = self.around.network.packets.remove(at);
        let node_of = |id| self.disks.iter().position(|disk| disk.id == id);
        let reached = node_of(packet.to).filter(|n| {
            // A disk that is gone may have sent it before, over a link of its time.
            let is_cut = node_of(packet.from).is_some_and(|from| self.around.network.is_cut(from, *n));
            self.disks[*n].is_up() && !is_cut
        });
        let Some(n) = reached else {
            self.around.coverage.unreachable += 1;
            return;
        };
        if is_duplicated {
            self.around.coverage.duplicates += 1;
            self.around.network.packets.push(packet.clone());
        }
        let is_ahead =
            |other: &Packet| (other.from, other.to) == (packet.from, packet.to) && other.number < packet.number;
        let is_reordered = self.around.network.packets.iter().any(is_ahead);
        let words = self.words(&packet);
        let questions = self.asks(&packet);
        if !self.disks[n].deliver(&mut self.around, &packet).await {
            // The slot waits for a transaction: it is handed over later.
            if !is_duplicated {
                self.around.network.packets.push(packet);
            }
            return;
        }
        self.around.coverage.questions += u64::from(self.asks(&packet) > questions);
        self.around.coverage.reordered += u64::from(is_reordered);
        self.around.coverage.repeats_delivered += u64::from(!self.around.network.came.insert(packet.number));
        self.note(words);
    }

    /// Questions that are on their way because of such a packet.
    fn asks(&self, packet: &Packet) -> usize {
        let is_prepare = |body: &Body| {
            matches!(body, Body::Message { envelope: Envelope { message: Message::Prepare { .. }, .. }, .. })
        };
        let is_question = |other: &&Packet| {
            let is =
                matches!(other.body, Body::Message { envelope: Envelope { message: Message::Status { .. }, .. }, .. });
            is && other.from == packet.to
        };
        match is_prepare(&packet.body) {
            true => self.around.network.packets.iter().filter(is_question).count(),
            false => 0,
        }
    }

    fn words(&self, packet: &Packet) -> String {
        let short = |transfer: &TransferId| format!("{:02x}{:02x}", transfer.0[0], transfer.0[1]);
        let mut words = format!("{} > {}: ", self.name(packet.from), self.name(packet.to));
        let _ = match &packet.body {
            Body::Chunk { slot, transfer, piece, chunk } => {
                write!(words, "slot {slot} {} piece {piece}, {} rows", short(transfer), chunk.rows.rows.len())
            }
            Body::Kept { slot, transfer, piece, is_kept } => {
                write!(words, "slot {slot} {} piece {piece} kept {is_kept}", short(transfer))
            }
            Body::Message { slot, envelope } => {
                let _ = write!(words, "slot {slot} ");
                match envelope.message {
                    Message::Prepare { transfer, epoch, content } => {
                        write!(words, "{} Prepare {} with {} rows", short(&transfer), epoch.counter, content.len)
                    }
                    Message::NeedRows { transfer } => write!(words, "{} NeedRows", short(&transfer)),
                    Message::Ready { transfer, .. } => write!(words, "{} Ready", short(&transfer)),
                    Message::Behind { transfer, floor } => {
                        write!(words, "{} Behind {}", short(&transfer), floor.counter)
                    }
                    Message::Abort { transfer } => write!(words, "{} Abort", short(&transfer)),
                    Message::Status { transfer } => write!(words, "{} Status", short(&transfer)),
                    Message::Grant { transfer, epoch } => {
                        write!(words, "{} Grant {}", short(&transfer), epoch.counter)
                    }
                    Message::Taken { transfer } => write!(words, "{} Taken", short(&transfer)),
                    Message::NeedData { transfer } => write!(words, "{} NeedData", short(&transfer)),
                    Message::OwnerIs { epoch } => write!(words, "OwnerIs {}", epoch.counter),
                }
            }
            Body::Join { .. } => write!(words, "Join"),
            Body::Joined { .. } => write!(words, "Joined"),
        };
        words
    }

    async fn commit(&mut self, n: usize, s: usize, is_looked_up: bool) {
        let txn = self.disks[n].places[s].pending.as_ref().map(|pending| pending.txn);
        self.disks[n].commit(&mut self.around, s, is_looked_up).await;
        let token = match self.disks[n].places[s].handoff.record.token {
            Token::None => "none".to_owned(),
            Token::Owned(epoch) => format!("owned {}", epoch.counter),
            Token::Released { epoch, to, is_taken, .. } => {
                format!("released {} to {}, taken {is_taken}", epoch.counter, self.name(to))
            }
        };
        let name = txn.map(|txn| format!("{txn:?}")).unwrap_or_default();
        let name = name.split([' ', '(']).next().unwrap_or_default().to_owned();
        self.note(format!("commit {n} slot {s} {name}: {token}"));
    }

    async fn copy_on(&mut self, n: usize, s: usize) {
        if let Some(what) = self.disks[n].copy_on(&mut self.around, s).await {
            self.note(format!("copy {n} slot {s}: {what}"));
        }
    }

    async fn seal(&mut self, n: usize, s: usize, has_append: bool) -> Result<(), String> {
        let in_flight = has_append.then(|| {
            let number = s * ENTITIES_OF_SLOT + self.rng.below(ENTITIES_OF_SLOT);
            (entity(number), self.new_request(number) as u64)
        });
        let is_told = self.rng.percent(70);
        let key = in_flight.as_ref().map(|(_, key)| *key);
        let outcome = self.disks[n].seal(&mut self.around, s, in_flight).await;
        self.note(format!("seal {n} slot {s}: {:?}", outcome.as_ref().map(|outcome| outcome.as_ref().ok())));
        if let (Some(Ok(version)), Some(key)) = (&outcome, key) {
            self.around.coverage.appends_in_flight += 1;
            if is_told {
                self.acked(key as usize, n, *version)?;
            }
        }
        Ok(())
    }

    fn start_move(&mut self, n: usize, s: usize, to: usize) {
        let (to, transfer) = (self.disks[to].id, self.transfer());
        self.note(format!("move {n} slot {s} to {}", self.name(to)));
        self.disks[n].start_move(&mut self.around, s, to, transfer);
    }

    fn remind(&mut self, n: usize, s: usize) {
        self.note(format!("remind {n} slot {s}"));
        self.disks[n].put(&mut self.around, s, Input::Remind);
    }

    fn hint(&mut self, n: usize, s: usize) {
        let Some(epoch) = self.disks[n].places[s].handoff.record.owned() else { return };
        let from = self.disks[n].id;
        let others: Vec<DiskId> = self.disks[n].disks.members().filter(|disk| *disk != from).collect();
        let mut others: Vec<(String, DiskId)> = others.into_iter().map(|disk| (self.name(disk), disk)).collect();
        others.sort();
        for (_, to) in others {
            let envelope = Envelope { from, to, message: Message::OwnerIs { epoch } };
            self.around.network.send(from, to, Body::Message { slot: s, envelope });
        }
        self.note(format!("hint {n} slot {s}"));
    }

    fn acked(&mut self, which: usize, n: usize, version: u64) -> Result<(), String> {
        let id = self.disks[n].id;
        let request = &mut self.requests[which];
        self.around.coverage.appends += u64::from(request.acked_by.is_none());
        request.acked_by.get_or_insert(id);
        if self.lost[request.entity / ENTITIES_OF_SLOT] {
            return Ok(());
        }
        self.oracle.told(request.entity, request.key, version)
    }

    /// A client has something to append. Its key is its number.
    fn new_request(&mut self, entity: usize) -> usize {
        let number = self.requests.len();
        self.requests.push(Request { entity, key: number as u64, acked_by: None });
        number
    }

    /// A client sends a request to some node; `is_late`: it has passed the gate already.
    async fn request(&mut self, which: usize, is_late: bool) -> Result<(), String> {
        let n = self.rng.below(self.disks.len());
        let is_told = self.rng.percent(80);
        self.request_at(which, n, is_late, is_told).await.map(|_| ())
    }

    async fn request_at(&mut self, which: usize, n: usize, is_late: bool, is_told: bool) -> Result<bool, String> {
        let Request { entity: number, key, acked_by } = self.requests[which];
        let s = number / ENTITIES_OF_SLOT;
        if !self.disks[n].is_up() || (is_late && self.disks[n].places[s].pending.is_some()) {
            return Ok(false);
        }
        let (slots, slot, id) = (self.disks[n].slots(), self.slots[s], self.disks[n].id);
        let gate = slots.gate(slot);
        if is_late {
            slots.set_gate(slot, Gate::Open);
        }
        let handle = self.disks[n].kuma().raw(KIND, entity(number));
        let append = handle.append(event(key)).idempotency_key(key.to_le_bytes());
        let outcome = match append.submit().await {
            Ok(pending) => pending.appended().await,
            Err(error) => Err(error),
        };
        if is_late && gate != Gate::Open {
            // Whoever came late is gone when the gate is shut.
            slots.seal(slot).await.map_err(|error| error.to_string())?;
            slots.set_gate(slot, gate);
        }
        match outcome {
            Ok(appended) => {
                let version = appended.version.0;
                self.note(format!("append {key} to {number} at {n}: {version}, repeated {}", appended.repeated));
                // That it was done before is true whoever says so; a gate keeps such a request out.
                let is_owned = self.disks[n].places[s].handoff.record.owned().is_some();
                if !is_owned && (!appended.repeated || !is_late) {
                    return Err(format!("node {n} acknowledged an append to slot {s}, which it does not own (I1)"));
                }
                let coverage = &mut self.around.coverage;
                coverage.repeated_appends += u64::from(appended.repeated);
                coverage.repeated_after_move += u64::from(appended.repeated && acked_by.is_some_and(|by| by != id));
                let before = self.oracle.version_of(number, key);
                if before.is_some() && !appended.repeated && !self.lost[s] {
                    return Err(format!("append {key} to entity {number} was done again (I4)"));
                }
                match is_told {
                    true => self.acked(which, n, version)?,
                    false => self.around.coverage.acks_lost += 1,
                }
                Ok(true)
            }
            Err(error) => {
                let is_fenced = matches!(
                    error,
                    AppendError::Unavailable(Unavailable::NotWritten { cause: NotWritten::NotOwner { .. }, .. })
                );
                let is_moving = matches!(
                    error,
                    AppendError::Unavailable(
                        Unavailable::SlotMoves { .. }
                            | Unavailable::SlotElsewhere { .. }
                            | Unavailable::Interrupted { .. }
                    )
                );
                self.around.coverage.appends_fenced += u64::from(is_fenced);
                self.around.coverage.appends_refused += u64::from(is_moving);
                self.note(format!("append {key} to {number} at {n} refused: fenced {is_fenced}"));
                match is_fenced || is_moving {
                    true => Ok(false),
                    false => Err(format!("append {key} to entity {number} at node {n}: {error}")),
                }
            }
        }
    }

    async fn read(&mut self, n: usize, number: usize) -> Result<bool, String> {
        if !self.disks[n].is_up() {
            return Ok(false);
        }
        let handle = self.disks[n].kuma().raw(KIND, entity(number));
        let current = match handle.read().await {
            Ok((_, version)) => version.0,
            Err(kuma_core::ReadError::Unavailable(
                Unavailable::SlotElsewhere { .. } | Unavailable::SlotMoves { .. },
            )) => {
                return Ok(false);
            }
            Err(error) => return Err(format!("entity {number} cannot be read at node {n}: {error}")),
        };
        let events = handle.events(.., usize::MAX).await;
        let events = events.map_err(|error| format!("entity {number} cannot be read at node {n}: {error}"))?;
        let key = |data: serde_json::Value| data["key"].as_u64().unwrap_or(u64::MAX);
        let mut found = Vec::new();
        for event in &events {
            found.push((event.version.0, key(event.json().map_err(|error| error.to_string())?)));
        }
        self.around.coverage.reads += 1;
        self.note(format!("read {number} at {n}: {current} {found:?}"));
        if current != found.len() as u64 {
            return Err(format!(
                "entity {number} at node {n} is at {current} in memory, and has {} events",
                found.len()
            ));
        }
        match self.lost[number / ENTITIES_OF_SLOT] {
            true => Ok(true),
            false => self.oracle.read(number, &found).map(|()| true),
        }
    }

    async fn crash(&mut self, n: usize) {
        let rng = &mut self.rng;
        self.disks[n].crash(&mut self.around, || rng.percent(50)).await;
        self.note(format!("crash {n}"));
    }

    async fn wipe(&mut self) {
        let n = self.rng.below(self.disks.len());
        let is_joined = self.disks.iter().all(|disk| disk.disks.is_active());
        if self.spare == DISKS_MAX + SPARE || !is_joined || !self.disks[n].is_up() {
            return;
        }
        let id = self.disks[n].id;
        let has_say: Vec<bool> = (0..SLOTS).map(|s| self.has_say(id, s)).collect();
        if has_say.contains(&true) && !self.rng.percent(25) {
            return;
        }
        for (s, has_say) in has_say.into_iter().enumerate() {
            self.around.coverage.slots_lost += u64::from(has_say && !self.lost[s]);
            self.lost[s] |= has_say;
        }
        let generation = self.disks[n].generation + 1;
        let path: PathBuf = self.root.path().join(format!("{n}-{generation}"));
        self.templates.copy(self.spare, &path.join("0"));
        self.spare += 1;
        let mut new = Disk::new(n, generation, path, Seat::Joiner, &self.slots).await;
        // It is told of the nodes by whoever starts it.
        let others: Vec<DiskId> = self.disks.iter().filter(|disk| disk.node != n).map(|disk| disk.id).collect();
        new.keep_disks(Disks::joiner(new.id, others)).await;
        self.ids[n].push(new.id);
        std::mem::replace(&mut self.disks[n], new).destroy().await;
        self.around.coverage.wipes += 1;
        self.note(format!("wipe {n}, lost {:?}", self.lost));
        self.ask_to_join(n);
    }

    /// Whether a slot is lost with this disk: it has the say, or has been given it and may have taken it.
    fn has_say(&self, id: DiskId, s: usize) -> bool {
        self.disks.iter().any(|disk| match disk.places[s].handoff.record.token {
            Token::Owned(_) => disk.id == id,
            Token::Released { epoch, to, .. } => {
                let target = self.disks.iter().find(|other| other.id == to);
                let is_open = target.is_some_and(|target| target.places[s].handoff.record.floor < epoch);
                is_open && (disk.id == id || to == id)
            }
            Token::None => false,
        })
    }

    /// A new disk asks all that it knows.
    fn ask_to_join(&mut self, n: usize) {
        let disk = &self.disks[n];
        if !disk.is_up() || disk.disks.is_active() {
            return;
        }
        let replaces: Vec<DiskId> = self.ids[n].iter().copied().filter(|id| *id != disk.id).collect();
        let asked: Vec<DiskId> =
            disk.disks.members().filter(|other| *other != disk.id && !disk.join.has_answered(*other)).collect();
        let mut asked: Vec<(String, DiskId)> = asked.into_iter().map(|other| (self.name(other), other)).collect();
        asked.sort();
        let id = disk.id;
        for (_, to) in asked {
            self.around.network.send(id, to, Body::Join { replaces: replaces.clone() });
        }
        self.note(format!("ask to join {n}"));
    }

    async fn collect(&mut self, n: usize) -> Result<(), String> {
        let collected = self.disks[n].slots().collect_departed().await;
        collected.map_err(|error| format!("what was given away could not be collected: {error}"))
    }

    /// No more goes wrong, and everybody wants each slot to be at some node: it gets there, and nothing is left to be done.
    async fn calm(&mut self) -> Result<(), String> {
        self.note("calm");
        self.around.network.cut.clear();
        let targets: Vec<usize> = (0..SLOTS).map(|_| self.rng.below(self.disks.len())).collect();
        for n in 0..self.disks.len() {
            if !self.disks[n].is_up() {
                self.disks[n].start(&mut self.around).await;
                self.check()?;
            }
        }
        for round in 0..CALM_ROUNDS {
            if self.is_settled(&targets) {
                return Ok(());
            }
            for n in 0..self.disks.len() {
                if round % 4 == 0 {
                    self.ask_to_join(n);
                }
                for (s, target) in targets.iter().enumerate() {
                    self.calm_slot(round, n, s, *target).await?;
                    self.check()?;
                }
            }
            for _ in 0..self.around.network.packets.len() {
                self.event += 1;
                self.deliver(0, false).await;
                self.check()?;
            }
        }
        let mut stuck = String::new();
        for disk in &self.disks {
            for (s, place) in disk.places.iter().enumerate() {
                let record = place.handoff.record;
                let token = match record.token {
                    Token::None => "none",
                    Token::Owned(_) => "owned",
                    Token::Released { is_taken: true, .. } => "taken",
                    Token::Released { .. } => "released",
                };
                let _ = write!(
                    stuck,
                    "\n    node {} slot {s}: {token}, staged {}, out {:?}, active {}",
                    disk.node,
                    record.staged.is_some(),
                    place.handoff.out.map(|out| out.phase),
                    disk.disks.is_active()
                );
            }
        }
        Err(format!(
            "nothing goes wrong any more, and it does not settle (targets {targets:?}, lost {:?}){stuck}",
            self.lost
        ))
    }

    async fn calm_slot(&mut self, round: u32, n: usize, s: usize, target: usize) -> Result<(), String> {
        self.event += 1;
        if self.disks[n].places[s].pending.is_some() {
            self.commit(n, s, false).await;
        }
        if self.disks[n].places[s].pending.is_some() {
            return Ok(());
        }
        let place = &self.disks[n].places[s];
        let (out, record) = (place.handoff.out, place.handoff.record);
        match out.map(|out| out.phase) {
            // What lasts that long has lost something.
            Some(Phase::Copying | Phase::Sealing | Phase::Sealed(_)) if round % 40 == 39 => {
                self.note(format!("abort {n} slot {s}"));
                self.disks[n].put(&mut self.around, s, Input::Abort);
            }
            Some(Phase::Copying) if self.disks[n].may_seal(s) && round % 3 == 2 => self.seal(n, s, false).await?,
            Some(Phase::Copying | Phase::Sealing) => self.copy_on(n, s).await,
            Some(Phase::Sealed(_) | Phase::Releasing(_)) => {}
            None if record.owned().is_some() && n != target && self.disks[target].disks.is_active() => {
                self.start_move(n, s, target);
            }
            None => {}
        }
        if round % 4 == 3 && self.disks[n].places[s].pending.is_none() {
            self.remind(n, s);
        }
        if round % 16 == 15 {
            self.hint(n, s);
        }
        Ok(())
    }

    fn is_settled(&self, targets: &[usize]) -> bool {
        let is_quiet = |disk: &Disk, s: usize| {
            let place = &disk.places[s];
            let record = place.handoff.record;
            let is_home = record.owned().is_none() || disk.node == targets[s];
            let is_taken = !matches!(record.token, Token::Released { is_taken: false, .. });
            let is_idle = place.handoff.out.is_none() && place.pending.is_none() && record.staged.is_none();
            is_home && is_taken && is_idle
        };
        let is_home = |s: usize| self.lost[s] || self.disks.iter().all(|disk| is_quiet(disk, s));
        self.disks.iter().all(|disk| disk.disks.is_active()) && (0..SLOTS).all(is_home)
    }

    /// Everything that was asked is there once, in its order, at one node; and all files are as they should be.
    async fn judge(&mut self) -> Result<(), String> {
        let owner =
            |disks: &[Disk], s: usize| disks.iter().position(|disk| disk.places[s].handoff.record.owned().is_some());
        for which in 0..self.requests.len() {
            let s = self.requests[which].entity / ENTITIES_OF_SLOT;
            let Some(n) = owner(&self.disks, s).filter(|_| !self.lost[s]) else { continue };
            self.event += 1;
            if !self.request_at(which, n, false, true).await? {
                return Err(format!("the owner of slot {s} refuses an append though all is calm"));
            }
        }
        for number in 0..SLOTS * ENTITIES_OF_SLOT {
            let s = number / ENTITIES_OF_SLOT;
            for n in 0..self.disks.len() {
                self.event += 1;
                let is_read = self.read(n, number).await?;
                if !self.lost[s] && is_read != (owner(&self.disks, s) == Some(n)) {
                    return Err(format!("node {n} reads entity {number}: {is_read}, though it is not so by its token"));
                }
            }
        }
        for n in 0..self.disks.len() {
            self.collect(n).await?;
            let verification = self.disks[n].kuma().verify(|_| ()).await.map_err(|error| error.to_string())?;
            if !verification.is_clean() {
                return Err(format!("the store of node {n} is damaged: {verification:?}"));
            }
        }
        self.check()
    }
}
