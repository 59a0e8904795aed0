//! Commands: decisions made inside the entity's actor, against its newest state.

use std::{error::Error, fmt, sync::Arc};

use parking_lot::Mutex;

use crate::{
    AppendError, Entity, Refused, Version,
    body::{EncodedEvents, EventEncoder, Limits},
    kind::{Decoded, State},
};

/// A request that is decided on the newest state of an entity: it becomes events, or is rejected.
///
/// ```
/// use kuma_core::{Command, Entity};
/// use serde::{Deserialize, Serialize};
///
/// #[derive(Default, Clone, Serialize, Deserialize)]
/// struct Account { balance: i64 }
///
/// #[derive(Serialize, Deserialize)]
/// enum AccountEvent { Withdrawn { amount: i64 } }
///
/// impl Entity for Account {
///     const KIND: &'static str = "account";
///     type Event = AccountEvent;
///     fn apply(&mut self, AccountEvent::Withdrawn { amount }: &AccountEvent) {
///         self.balance -= amount;
///     }
/// }
///
/// #[derive(Serialize)] // only needed for idempotency keys
/// struct Withdraw { amount: i64 }
///
/// #[derive(Debug, PartialEq, thiserror::Error)]
/// #[error("short of {missing}")]
/// struct Overdrawn { missing: i64 }
///
/// impl Command<Account> for Withdraw {
///     type Rejection = Overdrawn;
///     fn decide(self, account: &Account) -> Result<Vec<AccountEvent>, Overdrawn> {
///         match account.balance - self.amount {
///             left if left < 0 => Err(Overdrawn { missing: -left }),
///             _ => Ok(vec![AccountEvent::Withdrawn { amount: self.amount }]),
///         }
///     }
/// }
/// ```
pub trait Command<E: Entity>: Send + 'static {
    /// Why it can be rejected.
    type Rejection: Error + Send + Sync + 'static;

    /// The events that follow from the command, given the state; none if there is nothing to do. Pure: no I/O, no clock, no waiting
    /// (everything else that is asked of the entity waits meanwhile). What it needs to know comes in with the command.
    ///
    /// # Errors
    /// The command is rejected, and nothing is written.
    fn decide(self, state: &E) -> Result<Vec<E::Event>, Self::Rejection>;

    /// The name under which retries with an idempotency key are compared. Default: the type's name without its path. Set it, if the
    /// type is to be renamed while retries of older requests may still come.
    fn name() -> &'static str {
        let path = std::any::type_name::<Self>();
        let end = path.find('<').unwrap_or(path.len());
        path[..end].rsplit("::").next().unwrap_or(path)
    }
}

/// What a command brought about.
pub struct Executed<E: Entity> {
    pub(crate) version: Version,
    pub(crate) events: Vec<E::Event>,
    pub(crate) repeated: bool,
}

impl<E: Entity> Executed<E> {
    /// The version that its last event made; of a command that had nothing to do, the version that it was decided on.
    pub fn version(&self) -> Version {
        self.version
    }

    /// The events, which are on the disk.
    pub fn events(&self) -> &[E::Event] {
        &self.events
    }

    /// The events.
    pub fn into_events(self) -> Vec<E::Event> {
        self.events
    }

    /// Whether this is the outcome of an earlier request with the same idempotency key.
    pub fn is_repeated(&self) -> bool {
        self.repeated
    }
}

impl<E: Entity> fmt::Debug for Executed<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Executed { version, events, repeated } = self;
        f.debug_struct("Executed")
            .field("version", version)
            .field("events", &events.len())
            .field("repeated", repeated)
            .finish()
    }
}

/// Why a command brought nothing about.
#[derive(Debug)]
pub enum ExecuteError<R> {
    /// The command's own answer, decided on a state that is durable. Nothing was written.
    Rejected(R),
    /// Anything else, as for an append.
    Failed(AppendError),
}

impl<R> ExecuteError<R> {
    /// Whether the same command can be repeated without any risk of doubling it, and with a chance.
    pub fn is_retry_safe(&self) -> bool {
        matches!(self, ExecuteError::Failed(error) if error.is_retry_safe())
    }
}

impl<R> From<AppendError> for ExecuteError<R> {
    fn from(error: AppendError) -> Self {
        ExecuteError::Failed(error)
    }
}

impl<R: fmt::Display> fmt::Display for ExecuteError<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ExecuteError::Rejected(rejection) => write!(f, "the command was rejected: {rejection}"),
            ExecuteError::Failed(error) => error.fmt(f),
        }
    }
}

impl<R: Error + 'static> Error for ExecuteError<R> {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            ExecuteError::Rejected(rejection) => rejection.source(),
            ExecuteError::Failed(error) => error.source(),
        }
    }
}

/// What a command decided, without its types.
pub(crate) enum Decision {
    Events(EncodedEvents, Decoded),
    Nothing,
    /// The reason waits in the command's [`Slot`].
    Rejected,
    /// Its events cannot be stored.
    Refused(Refused),
}

/// A command without its types.
pub(crate) trait Decide: Send {
    /// Runs user code, which may panic.
    fn decide(self: Box<Self>, state: &State) -> Decision;
}

/// Where the decision waits for the caller: its events or its rejection, which only the caller can name.
pub(crate) type Slot<E, R> = Arc<Mutex<Option<Result<Vec<<E as Entity>::Event>, R>>>>;

pub(crate) struct TypedCommand<E: Entity, C: Command<E>> {
    pub(crate) command: C,
    pub(crate) limits: Limits,
    pub(crate) slot: Slot<E, C::Rejection>,
}

impl<E: Entity, C: Command<E>> Decide for TypedCommand<E, C> {
    fn decide(self: Box<Self>, state: &State) -> Decision {
        let TypedCommand { command, limits, slot } = *self;
        let Some(state) = state.downcast_ref::<E>() else {
            return Decision::Refused(Refused::KindMismatch { kind: E::KIND.to_owned() });
        };
        let events = match command.decide(state) {
            Ok(events) if events.is_empty() => {
                *slot.lock() = Some(Ok(events));
                return Decision::Nothing;
            }
            Ok(events) => events,
            Err(rejection) => {
                *slot.lock() = Some(Err(rejection));
                return Decision::Rejected;
            }
        };
        let mut encoder = EventEncoder::expecting(limits, events.len());
        let decoded = events.iter().map(|event| encoder.typed::<E>(event)).collect::<Result<Vec<E::Event>, _>>();
        match decoded.and_then(|decoded| Ok((encoder.finish()?, decoded))) {
            Ok((encoded, decoded)) => {
                *slot.lock() = Some(Ok(events));
                Decision::Events(encoded, Box::new(decoded))
            }
            Err(refused) => Decision::Refused(refused),
        }
    }
}
