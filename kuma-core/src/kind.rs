//! Kinds without their types: one code path for typed entities and for those known by name only.

use std::{
    any::{Any, TypeId},
    borrow::Cow,
    marker::PhantomData,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, OnceLock},
};

use serde_bytes::Bytes;

use crate::{
    Entity, Refused, Upcasters,
    body::{self, split},
    kind_options::Tuning,
    left_out::without_values,
    snapshot,
};

/// A state whose type only its kind knows. Shared with readers; changed in place where nobody else holds it.
pub(crate) type State = Arc<dyn Any + Send + Sync>;
/// The decoded events of one commit.
pub(crate) type Decoded = Box<dyn Any + Send + Sync>;

/// An event that a kind cannot read.
#[derive(Debug)]
pub(crate) struct Undecodable {
    pub(crate) event: String,
    pub(crate) detail: String,
}

/// What can be done with the states and events of one kind.
pub(crate) trait Kind: Send + Sync + 'static {
    fn name(&self) -> &Arc<str>;
    /// What is set for this kind alone.
    fn tuning(&self) -> &Tuning;
    /// The Rust type, if there is one.
    fn rust_type(&self) -> Option<TypeId>;
    fn initial(&self) -> State;
    /// A stored event of a schema version, `{name: data}`, as this kind's code reads it, with its version then. Runs user code.
    fn upcast<'a>(&self, schema: u32, event: &'a [u8]) -> Result<(u32, Cow<'a, [u8]>), Undecodable>;
    /// Decodes stored events, each with its schema version, upcasting them first. Runs user code.
    fn decode(&self, events: &[(u32, &Bytes)]) -> Result<Decoded, Undecodable>;
    /// Runs user code: it may panic, and then `state` is not to be used again.
    fn apply(&self, state: &mut State, events: &Decoded);
    /// A copy that shares nothing with `state`. Runs user code.
    fn copy(&self, state: &State) -> State;
    fn json(&self, state: &State) -> Result<serde_json::Value, serde_json::Error>;
    fn memory_bytes(&self, state: &State) -> usize;
    /// Names the shape of the states that this code saves and restores; none where that cannot be told. Runs user code.
    fn state_schema(&self) -> Option<u64>;
    /// The state as MessagePack. Runs user code.
    fn save(&self, state: &State) -> Result<Vec<u8>, rmp_serde::encode::Error>;
    /// The inverse of [`Kind::save`]. Runs user code.
    fn restore(&self, bytes: &[u8]) -> Result<State, rmp_serde::decode::Error>;
}

/// A kind with a Rust type.
pub(crate) struct TypedKind<E> {
    name: Arc<str>,
    tuning: Tuning,
    upcasters: Upcasters,
    state_schema: OnceLock<Option<u64>>,
    entity: PhantomData<fn() -> E>,
}

impl<E: Entity> TypedKind<E> {
    pub(crate) fn new(tuning: Tuning) -> Result<Self, Refused> {
        let upcasters = E::upcasters();
        if let Some(reason) = upcasters.misplaced(E::SCHEMA) {
            return Err(Refused::Upcasters { kind: E::KIND.to_owned(), reason });
        }
        Ok(TypedKind { name: E::KIND.into(), tuning, upcasters, state_schema: OnceLock::new(), entity: PhantomData })
    }
}

/// States of one kind are only ever made by that kind.
fn known<T: 'static>(state: Option<&T>) -> &T {
    match state {
        Some(state) => state,
        None => unreachable!("a state or event of another kind"),
    }
}

impl<E: Entity> Kind for TypedKind<E> {
    fn name(&self) -> &Arc<str> {
        &self.name
    }

    fn tuning(&self) -> &Tuning {
        &self.tuning
    }

    fn rust_type(&self) -> Option<TypeId> {
        Some(TypeId::of::<E>())
    }

    fn initial(&self) -> State {
        Arc::new(E::default())
    }

    fn upcast<'a>(&self, schema: u32, event: &'a [u8]) -> Result<(u32, Cow<'a, [u8]>), Undecodable> {
        self.upcasters.run(E::SCHEMA, schema, event)
    }

    fn decode(&self, events: &[(u32, &Bytes)]) -> Result<Decoded, Undecodable> {
        let decode = |(schema, event): &(u32, &Bytes)| {
            let (_, event) = self.upcast(*schema, event)?;
            body::decode_typed::<E>(&event).map_err(|error| {
                let event = split(&event).map(|(name, _)| name.to_owned()).unwrap_or_default();
                Undecodable { detail: without_values(&error, &event), event }
            })
        };
        Ok(Box::new(events.iter().map(decode).collect::<Result<Vec<E::Event>, _>>()?))
    }

    fn apply(&self, state: &mut State, events: &Decoded) {
        let events: &Vec<E::Event> = known(events.downcast_ref());
        if Arc::get_mut(state).is_none() {
            *state = self.copy(state);
        }
        if let Some(state) = Arc::get_mut(state).and_then(|state| state.downcast_mut::<E>()) {
            events.iter().for_each(|event| state.apply(event));
        }
    }

    fn copy(&self, state: &State) -> State {
        Arc::new(known::<E>(state.downcast_ref()).clone())
    }

    fn json(&self, state: &State) -> Result<serde_json::Value, serde_json::Error> {
        serde_json::to_value(known::<E>(state.downcast_ref()))
    }

    fn memory_bytes(&self, state: &State) -> usize {
        let state = known::<E>(state.downcast_ref());
        // Only an estimate: nobody's call is worth failing for it.
        catch_unwind(AssertUnwindSafe(|| state.memory_bytes())).unwrap_or(size_of::<E>())
    }

    fn state_schema(&self) -> Option<u64> {
        *self.state_schema.get_or_init(|| snapshot::state_schema::<E>())
    }

    fn save(&self, state: &State) -> Result<Vec<u8>, rmp_serde::encode::Error> {
        rmp_serde::to_vec_named(known::<E>(state.downcast_ref()))
    }

    fn restore(&self, bytes: &[u8]) -> Result<State, rmp_serde::decode::Error> {
        Ok(Arc::new(rmp_serde::from_slice::<E>(bytes)?))
    }
}

/// A kind without Rust code: the state is one JSON document, and each event's data is merged into it (RFC 7396).
pub(crate) struct DocumentKind {
    name: Arc<str>,
    tuning: Tuning,
}

impl DocumentKind {
    pub(crate) fn new(name: &str, tuning: Tuning) -> Self {
        DocumentKind { name: name.into(), tuning }
    }
}

impl Kind for DocumentKind {
    fn name(&self) -> &Arc<str> {
        &self.name
    }

    fn tuning(&self) -> &Tuning {
        &self.tuning
    }

    fn rust_type(&self) -> Option<TypeId> {
        None
    }

    fn initial(&self) -> State {
        Arc::new(serde_json::Value::Object(serde_json::Map::new()))
    }

    fn upcast<'a>(&self, schema: u32, event: &'a [u8]) -> Result<(u32, Cow<'a, [u8]>), Undecodable> {
        Ok((schema, Cow::Borrowed(event)))
    }

    fn decode(&self, events: &[(u32, &Bytes)]) -> Result<Decoded, Undecodable> {
        let decode = |(_, event): &(u32, &Bytes)| {
            let (name, data) =
                split(event).ok_or_else(|| Undecodable { event: String::new(), detail: "it has no name".into() })?;
            rmp_serde::from_slice(data)
                .map_err(|error| Undecodable { event: name.to_owned(), detail: without_values(&error, name) })
        };
        Ok(Box::new(events.iter().map(decode).collect::<Result<Vec<serde_json::Value>, _>>()?))
    }

    fn apply(&self, state: &mut State, events: &Decoded) {
        let events: &Vec<serde_json::Value> = known(events.downcast_ref());
        if Arc::get_mut(state).is_none() {
            *state = self.copy(state);
        }
        if let Some(document) = Arc::get_mut(state).and_then(|state| state.downcast_mut::<serde_json::Value>()) {
            events.iter().for_each(|patch| json_patch::merge(document, patch));
        }
    }

    fn copy(&self, state: &State) -> State {
        Arc::new(known::<serde_json::Value>(state.downcast_ref()).clone())
    }

    fn json(&self, state: &State) -> Result<serde_json::Value, serde_json::Error> {
        Ok(known::<serde_json::Value>(state.downcast_ref()).clone())
    }

    fn memory_bytes(&self, state: &State) -> usize {
        document_bytes(known(state.downcast_ref()))
    }

    fn state_schema(&self) -> Option<u64> {
        Some(snapshot::DOCUMENT_SCHEMA)
    }

    fn save(&self, state: &State) -> Result<Vec<u8>, rmp_serde::encode::Error> {
        rmp_serde::to_vec_named(known::<serde_json::Value>(state.downcast_ref()))
    }

    fn restore(&self, bytes: &[u8]) -> Result<State, rmp_serde::decode::Error> {
        Ok(Arc::new(rmp_serde::from_slice::<serde_json::Value>(bytes)?))
    }
}

/// A kind without Rust code whose events are a log: nothing is folded from them.
pub(crate) struct LogKind {
    name: Arc<str>,
    tuning: Tuning,
}

impl LogKind {
    pub(crate) fn new(name: &str, tuning: Tuning) -> Self {
        LogKind { name: name.into(), tuning }
    }
}

impl Kind for LogKind {
    fn name(&self) -> &Arc<str> {
        &self.name
    }

    fn tuning(&self) -> &Tuning {
        &self.tuning
    }

    fn rust_type(&self) -> Option<TypeId> {
        None
    }

    fn initial(&self) -> State {
        Arc::new(())
    }

    fn upcast<'a>(&self, schema: u32, event: &'a [u8]) -> Result<(u32, Cow<'a, [u8]>), Undecodable> {
        Ok((schema, Cow::Borrowed(event)))
    }

    fn decode(&self, _events: &[(u32, &Bytes)]) -> Result<Decoded, Undecodable> {
        Ok(Box::new(()))
    }

    fn apply(&self, _state: &mut State, _events: &Decoded) {}

    fn copy(&self, state: &State) -> State {
        state.clone()
    }

    fn json(&self, _state: &State) -> Result<serde_json::Value, serde_json::Error> {
        Ok(serde_json::Value::Null)
    }

    fn memory_bytes(&self, _state: &State) -> usize {
        0
    }

    fn state_schema(&self) -> Option<u64> {
        Some(snapshot::LOG_SCHEMA)
    }

    fn save(&self, _state: &State) -> Result<Vec<u8>, rmp_serde::encode::Error> {
        rmp_serde::to_vec(&())
    }

    fn restore(&self, bytes: &[u8]) -> Result<State, rmp_serde::decode::Error> {
        rmp_serde::from_slice::<()>(bytes).map(|()| self.initial())
    }
}

/// About what a document takes in memory.
fn document_bytes(value: &serde_json::Value) -> usize {
    let own = size_of::<serde_json::Value>();
    own + match value {
        serde_json::Value::String(text) => text.len(),
        serde_json::Value::Array(items) => items.iter().map(document_bytes).sum(),
        serde_json::Value::Object(map) => map.iter().map(|(key, value)| 24 + key.len() + document_bytes(value)).sum(),
        _ => 0,
    }
}
