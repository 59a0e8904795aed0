//! What a user writes: an entity's state and events.

use std::{fmt, time::SystemTime};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    Refused, Unfit, Upcasters,
    ndjson::transcode::{pack, unpack},
};

/// A thing with a kind and an id, and a history of events that its state is folded from.
///
/// ```
/// use kuma_core::Entity;
/// use serde::{Deserialize, Serialize};
///
/// #[derive(Default, Clone, Serialize, Deserialize)]
/// struct Account { balance: i64 }
///
/// #[derive(Serialize, Deserialize)]
/// enum AccountEvent { Deposited { amount: i64 }, Closed }
///
/// impl Entity for Account {
///     const KIND: &'static str = "account";
///     type Event = AccountEvent;
///     fn apply(&mut self, event: &AccountEvent) {
///         match event {
///             AccountEvent::Deposited { amount } => self.balance += amount,
///             AccountEvent::Closed => self.balance = 0,
///         }
///     }
/// }
/// ```
pub trait Entity: Default + Clone + Serialize + DeserializeOwned + Send + Sync + 'static {
    /// The name of the kind: 1 to 64 ASCII letters, digits, `_`, `-` or `.`, starting with a letter. It is stored; never change it.
    const KIND: &'static str;

    /// The version of the events' shape. Stored with each event; raise it when the shape changes, and say in
    /// [`Entity::upcasters`] how older events are to be read.
    const SCHEMA: u32 = 1;

    /// The version of what [`Entity::apply`] makes of events. Raise it when the same events give another state than before: snapshots
    /// of states that older code made are then ignored and made anew. A change of the state's type, at any depth, or of
    /// [`Entity::SCHEMA`] does that by itself; what a hand-written `Deserialize` hides does not.
    const STATE_SCHEMA: u32 = 1;

    /// The facts. An enum in serde's default (externally tagged) form: a variant's name is the event's stored name.
    type Event: Serialize + DeserializeOwned + Send + Sync + 'static;

    /// Changes the state by one event. Pure and infallible: the same events always give the same state, on every node, for ever.
    ///
    /// Each event is applied twice: to the state that the next append is decided on, and to the durable state once it is on the
    /// disk. A panic refuses the append; what cannot be replayed is never stored.
    fn apply(&mut self, event: &Self::Event);

    /// How events of older schema versions are read. Runs wherever events are read: replay, history, export, time travel. Default: none.
    fn upcasters() -> Upcasters {
        Upcasters::new()
    }

    /// About how many bytes the state takes in memory. The default does not count what the state points to (strings, vectors, maps). Counts against [`Options::memory_budget`](crate::Options::memory_budget).
    fn memory_bytes(&self) -> usize {
        size_of::<Self>()
    }
}

/// How many events an entity has. The first event makes version 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Version(pub u64);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// An event that is not stored yet, for handles that do not know its Rust type.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NewEvent {
    pub(crate) name: String,
    pub(crate) schema: u32,
    /// MessagePack.
    #[serde(with = "serde_bytes")]
    pub(crate) data: Vec<u8>,
}

impl NewEvent {
    /// An event with a JSON value as its data.
    ///
    /// # Errors
    /// The value cannot be written as MessagePack.
    pub fn json(name: impl Into<String>, data: &serde_json::Value) -> Result<Self, Refused> {
        let name = name.into();
        match rmp_serde::to_vec_named(data) {
            Ok(data) => Ok(NewEvent { name, schema: 1, data }),
            Err(error) => Err(Refused::Undecodable { event: name, detail: error.to_string() }),
        }
    }

    /// An event with JSON text as its data: numbers stay as exact as 64 bits hold them, and nothing is read twice.
    ///
    /// # Errors
    /// It is not JSON, or it cannot be kept as it is: see [`Unfit`].
    pub fn json_text(name: impl Into<String>, data: &str) -> Result<Self, Unfit> {
        let mut packed = Vec::with_capacity(data.len());
        match pack(data, &mut packed) {
            Ok(()) => Ok(NewEvent { name: name.into(), schema: 1, data: packed }),
            Err(unfit) => match serde_json::from_str::<serde::de::IgnoredAny>(data) {
                Ok(_) => Err(unfit),
                Err(_) => Err(Unfit::NotJson),
            },
        }
    }

    /// An event with data that is MessagePack already. It is checked when it is appended.
    pub fn message_pack(name: impl Into<String>, data: Vec<u8>) -> Self {
        NewEvent { name: name.into(), schema: 1, data }
    }

    /// The event as a kind's type has it.
    ///
    /// # Errors
    /// The type does not know the event, or reads its data differently.
    pub fn decode<E: Entity>(&self) -> Result<E::Event, rmp_serde::decode::Error> {
        crate::body::decode_typed::<E>(&crate::body::join(&self.name, &self.data))
    }

    /// An event of a type, as a handle that knows the type would store it.
    ///
    /// # Errors
    /// It cannot be stored.
    pub fn typed<E: Entity>(event: &E::Event) -> Result<Self, Refused> {
        let encoded = crate::body::encode_typed::<E>(event)?;
        let undecodable = || Refused::Undecodable { event: E::KIND.to_owned(), detail: "it has no name".to_owned() };
        let (name, data) = crate::body::split(&encoded).ok_or_else(undecodable)?;
        Ok(NewEvent { name: name.to_owned(), schema: E::SCHEMA, data: data.to_vec() })
    }

    /// The version of the data's shape; 1 if not set.
    pub fn schema(mut self, schema: u32) -> Self {
        self.schema = schema;
        self
    }
}

/// A stored event, as it is read back: in the shape of the current schema version where its kind has upcasters.
#[derive(Clone, Debug, PartialEq)]
pub struct RecordedEvent {
    /// The entity's version that this event made.
    pub version: Version,
    /// The stored name.
    pub name: String,
    /// The version of the data's shape.
    pub schema: u32,
    /// When it was committed; the same for all events of one append, never less than that of the event before.
    pub at: SystemTime,
    /// What came with the append.
    pub metadata: Option<Metadata>,
    /// MessagePack.
    pub data: Vec<u8>,
}

impl RecordedEvent {
    /// The data as JSON.
    ///
    /// # Errors
    /// The data has no JSON form (a map whose keys are not strings, say).
    pub fn json(&self) -> Result<serde_json::Value, rmp_serde::decode::Error> {
        rmp_serde::from_slice(&self.data)
    }

    /// The data as JSON text, without a tree in between. Binary values become base64, a float that is no number becomes `null`. None if the data
    /// has no such form (a map whose keys are not strings, say).
    pub fn json_text(&self) -> Option<String> {
        let mut text = Vec::with_capacity(self.data.len() * 2);
        unpack(&self.data, &mut text).ok()?;
        String::from_utf8(text).ok()
    }

    /// The event as it could be appended again.
    pub fn to_new(&self) -> NewEvent {
        NewEvent { name: self.name.clone(), schema: self.schema, data: self.data.clone() }
    }

    /// The event as a kind's type has it.
    ///
    /// # Errors
    /// The type does not know the event, or reads its data differently.
    pub fn decode<E: Entity>(&self) -> Result<E::Event, rmp_serde::decode::Error> {
        crate::body::decode_typed::<E>(&crate::body::join(&self.name, &self.data))
    }
}

/// What a caller wants to be kept beside the events of an append, at most 64 KiB. Sealed with them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metadata {
    /// Names the business transaction that the append is part of.
    #[serde(rename = "c", default, skip_serializing_if = "Option::is_none")]
    pub correlation: Option<String>,
    /// Names what caused the append.
    #[serde(rename = "a", default, skip_serializing_if = "Option::is_none")]
    pub causation: Option<String>,
    /// Anything else.
    #[serde(rename = "h", default, skip_serializing_if = "Vec::is_empty")]
    pub headers: Vec<(String, String)>,
}

impl Metadata {
    /// About how many bytes it takes, in memory and stored.
    pub(crate) fn bytes(&self) -> usize {
        let text = |text: &Option<String>| text.as_ref().map_or(0, String::len);
        let headers: usize = self.headers.iter().map(|(name, value)| name.len() + value.len() + 8).sum();
        text(&self.correlation) + text(&self.causation) + headers
    }
}
