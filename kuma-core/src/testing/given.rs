//! Commands against a history: `given(events).when(command).then(events)`.

use std::fmt::Debug;

use serde::Serialize;
use serde_bytes::Bytes;

use crate::{
    Command, Entity, NewEvent,
    body::{EncodedEvents, EventEncoder},
    kind::{Decoded, Kind, State, TypedKind},
    kind_options::Tuning,
    options::Options,
};

/// An entity with these events behind it.
///
/// ```
/// # use kuma_core::{Command, Entity};
/// # use serde::{Deserialize, Serialize};
/// # #[derive(Default, Clone, Serialize, Deserialize)]
/// # struct Account { balance: i64 }
/// # #[derive(Serialize, Deserialize)]
/// # enum AccountEvent { Deposited { amount: i64 }, Withdrawn { amount: i64 } }
/// # impl Entity for Account {
/// #     const KIND: &'static str = "account";
/// #     type Event = AccountEvent;
/// #     fn apply(&mut self, event: &AccountEvent) {
/// #         match event {
/// #             AccountEvent::Deposited { amount } => self.balance += amount,
/// #             AccountEvent::Withdrawn { amount } => self.balance -= amount,
/// #         }
/// #     }
/// # }
/// # struct Withdraw { amount: i64 }
/// # #[derive(Debug, PartialEq, thiserror::Error)]
/// # #[error("short of {missing}")]
/// # struct Overdrawn { missing: i64 }
/// # impl Command<Account> for Withdraw {
/// #     type Rejection = Overdrawn;
/// #     fn decide(self, account: &Account) -> Result<Vec<AccountEvent>, Overdrawn> {
/// #         match account.balance - self.amount {
/// #             left if left < 0 => Err(Overdrawn { missing: -left }),
/// #             _ => Ok(vec![AccountEvent::Withdrawn { amount: self.amount }]),
/// #         }
/// #     }
/// # }
/// use kuma_core::testing::given;
///
/// given::<Account>([AccountEvent::Deposited { amount: 5 }])
///     .when(Withdraw { amount: 3 })
///     .then([AccountEvent::Withdrawn { amount: 3 }]);
/// given::<Account>([AccountEvent::Deposited { amount: 5 }])
///     .when(Withdraw { amount: 8 })
///     .then_rejected(&Overdrawn { missing: 3 });
/// ```
///
/// # Panics
/// An event does not survive being stored.
#[track_caller]
pub fn given<E: Entity>(events: impl IntoIterator<Item = E::Event>) -> Given<E> {
    let kind = TypedKind::<E>::new(Tuning::default()).unwrap_or_else(|refused| panic!("{refused}"));
    let state = kind.initial();
    Given { kind, state }.and(events)
}

/// See [`given`].
pub struct Given<E: Entity> {
    kind: TypedKind<E>,
    state: State,
}

impl<E: Entity> Given<E> {
    /// More events.
    ///
    /// # Panics
    /// An event does not survive being stored.
    #[track_caller]
    pub fn and(mut self, events: impl IntoIterator<Item = E::Event>) -> Self {
        for event in events {
            let mut encoder = encoder();
            encoder.typed::<E>(&event).unwrap_or_else(|refused| panic!("given {}: {refused}", show(&event)));
            self.apply(encoder);
        }
        self
    }

    /// Events as they were stored by an older version of the code, which the upcasters have to read.
    ///
    /// # Panics
    /// An event cannot be read.
    #[track_caller]
    pub fn and_stored(mut self, events: impl IntoIterator<Item = NewEvent>) -> Self {
        for event in events {
            let mut encoder = encoder();
            encoder.raw(&event).unwrap_or_else(|refused| panic!("given {}: {refused}", event.name));
            self.apply(encoder);
        }
        self
    }

    #[track_caller]
    fn apply(&mut self, encoder: EventEncoder) {
        let encoded = finish(encoder);
        let decoded = decode(&self.kind, &encoded);
        self.kind.apply(&mut self.state, &decoded);
    }

    /// The state that the events lead to.
    pub fn state(&self) -> &E {
        self.state.downcast_ref().unwrap_or_else(|| panic!("a state of another kind"))
    }

    /// Lets a command decide on it.
    pub fn when<C: Command<E>>(self, command: C) -> When<E, C::Rejection> {
        let decided = command.decide(self.state());
        When { given: self, decided }
    }
}

/// What a command decided, to be looked at.
#[must_use = "nothing is compared yet"]
pub struct When<E: Entity, R> {
    given: Given<E>,
    decided: Result<Vec<E::Event>, R>,
}

impl<E: Entity, R: Debug> When<E, R> {
    /// The command must lead to these events (none: it must have had nothing to do). They are compared as they are stored. Returns
    /// the entity with them, to go on.
    ///
    /// # Panics
    /// It was rejected, led to other events, or to some that do not survive being stored.
    #[track_caller]
    pub fn then(self, expected: impl IntoIterator<Item = E::Event>) -> Given<E> {
        let decided = match self.decided {
            Ok(decided) => decided,
            Err(rejection) => panic!("the command was rejected: {rejection:?}"),
        };
        let stored = |events: &[E::Event]| -> Vec<Vec<u8>> { events.iter().map(encode).collect() };
        let expected: Vec<E::Event> = expected.into_iter().collect();
        if stored(&decided) != stored(&expected) {
            let list =
                |events: &[E::Event]| events.iter().map(|event| format!("\n  {}", show(event))).collect::<String>();
            panic!("the command led to{}\nexpected{}", list(&decided), list(&expected));
        }
        self.given.and(decided)
    }

    /// The command must be rejected like this.
    ///
    /// # Panics
    /// It was not, or otherwise.
    #[track_caller]
    pub fn then_rejected(self, expected: &R)
    where
        R: PartialEq,
    {
        match self.decided {
            Err(rejection) => assert_eq!(rejection, *expected, "the command was rejected for another reason"),
            Ok(events) => panic!("the command was not rejected: it led to {} events", events.len()),
        }
    }

    /// What the command decided, for anything else.
    ///
    /// # Errors
    /// Its rejection.
    pub fn decided(self) -> Result<Vec<E::Event>, R> {
        self.decided
    }
}

fn encoder() -> EventEncoder {
    EventEncoder::new(Options::new("").limits)
}

#[track_caller]
fn finish(encoder: EventEncoder) -> EncodedEvents {
    encoder.finish().unwrap_or_else(|refused| panic!("{refused}"))
}

/// The events as they are read back from where they are stored.
#[track_caller]
fn decode<E: Entity>(kind: &TypedKind<E>, encoded: &EncodedEvents) -> Decoded {
    let read = || -> Result<Decoded, String> {
        let body = encoded.body(None).map_err(|error| error.to_string())?;
        let body = crate::body::Body::parse(&body).map_err(|error| error.to_string())?;
        let events: Vec<(u32, &Bytes)> = body.events;
        kind.decode(&events).map_err(|error| format!("{}: {}", error.event, error.detail))
    };
    read().unwrap_or_else(|detail| panic!("an event cannot be read back: {detail}"))
}

fn encode<T: Serialize>(event: &T) -> Vec<u8> {
    rmp_serde::to_vec_named(event).unwrap_or_else(|error| panic!("an event cannot be encoded: {error}"))
}

fn show<T: Serialize>(event: &T) -> String {
    match serde_json::to_string(event) {
        Ok(json) => json,
        Err(_) => format!("MessagePack {}", hex::encode(encode(event))),
    }
}

impl<E: Entity> Debug for Given<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Given").field("kind", &E::KIND).field("state", &show(self.state())).finish()
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;
    use serde_json::json;

    use super::*;
    use crate::Upcasters;

    #[derive(Default, Clone, Serialize, Deserialize)]
    struct Lamp {
        on: bool,
    }

    #[derive(Serialize, Deserialize)]
    enum LampEvent {
        Switched { on: bool },
    }

    impl Entity for Lamp {
        const KIND: &'static str = "lamp";
        const SCHEMA: u32 = 2;
        type Event = LampEvent;
        fn apply(&mut self, LampEvent::Switched { on }: &LampEvent) {
            self.on = *on;
        }
        fn upcasters() -> Upcasters {
            Upcasters::new().json(1, "On", |_| json!({"on": true})).rename(1, "On", "Switched")
        }
    }

    struct Switch {
        on: bool,
    }

    #[derive(Debug, PartialEq, thiserror::Error)]
    #[error("it is broken")]
    struct Broken;

    impl Command<Lamp> for Switch {
        type Rejection = Broken;
        fn decide(self, lamp: &Lamp) -> Result<Vec<LampEvent>, Broken> {
            match (lamp.on, self.on) {
                (true, true) => Ok(vec![]),
                (false, false) => Err(Broken),
                (_, on) => Ok(vec![LampEvent::Switched { on }]),
            }
        }
    }

    #[test]
    fn a_command_is_compared_with_what_was_expected() {
        let lamp = given::<Lamp>([]).when(Switch { on: true }).then([LampEvent::Switched { on: true }]);
        assert!(lamp.state().on);
        lamp.when(Switch { on: true }).then([]);
        given::<Lamp>([]).when(Switch { on: false }).then_rejected(&Broken);
    }

    #[test]
    fn stored_events_of_an_older_schema_are_upcast() {
        let old = NewEvent::json("On", &json!(null)).unwrap().schema(1);
        assert!(given::<Lamp>([]).and_stored([old]).state().on);
    }

    #[test]
    #[should_panic(expected = "expected\n  {\"Switched\":{\"on\":false}}")]
    fn other_events_fail_the_test_and_are_shown() {
        given::<Lamp>([]).when(Switch { on: true }).then([LampEvent::Switched { on: false }]);
    }

    #[test]
    #[should_panic(expected = "was not rejected")]
    fn a_missing_rejection_fails_the_test() {
        given::<Lamp>([]).when(Switch { on: true }).then_rejected(&Broken);
    }
}
