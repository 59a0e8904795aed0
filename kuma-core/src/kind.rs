//! Kinds without their types: one code path for typed entities and for those known by name only.

use std::{
    any::{Any, TypeId},
    marker::PhantomData,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use crate::{
    Entity,
    body::{self, split},
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
    /// The Rust type, if there is one.
    fn rust_type(&self) -> Option<TypeId>;
    fn initial(&self) -> State;
    /// Decodes `events`, each `{name: data}`.
    fn decode(&self, events: &[&[u8]]) -> Result<Decoded, Undecodable>;
    /// Runs user code: it may panic, and then `state` is not to be used again.
    fn apply(&self, state: &mut State, events: &Decoded);
    /// A copy that shares nothing with `state`. Runs user code.
    fn copy(&self, state: &State) -> State;
    fn json(&self, state: &State) -> Result<serde_json::Value, serde_json::Error>;
    fn memory_bytes(&self, state: &State) -> usize;
}

/// A kind with a Rust type.
pub(crate) struct TypedKind<E> {
    name: Arc<str>,
    entity: PhantomData<fn() -> E>,
}

impl<E: Entity> TypedKind<E> {
    pub(crate) fn new() -> Self {
        TypedKind { name: E::KIND.into(), entity: PhantomData }
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

    fn rust_type(&self) -> Option<TypeId> {
        Some(TypeId::of::<E>())
    }

    fn initial(&self) -> State {
        Arc::new(E::default())
    }

    fn decode(&self, events: &[&[u8]]) -> Result<Decoded, Undecodable> {
        let decode = |event: &&[u8]| {
            body::decode_typed::<E>(event).map_err(|error| Undecodable {
                event: split(event).map(|(name, _)| name.to_owned()).unwrap_or_default(),
                detail: error.to_string(),
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
}

/// A kind without Rust code: the state is one JSON document, and each event's data is merged into it (RFC 7396).
pub(crate) struct DocumentKind {
    name: Arc<str>,
}

impl DocumentKind {
    pub(crate) fn new(name: &str) -> Self {
        DocumentKind { name: name.into() }
    }
}

impl Kind for DocumentKind {
    fn name(&self) -> &Arc<str> {
        &self.name
    }

    fn rust_type(&self) -> Option<TypeId> {
        None
    }

    fn initial(&self) -> State {
        Arc::new(serde_json::Value::Object(serde_json::Map::new()))
    }

    fn decode(&self, events: &[&[u8]]) -> Result<Decoded, Undecodable> {
        let decode = |event: &&[u8]| {
            let (name, data) =
                split(event).ok_or_else(|| Undecodable { event: String::new(), detail: "it has no name".into() })?;
            rmp_serde::from_slice(data)
                .map_err(|error| Undecodable { event: name.to_owned(), detail: error.to_string() })
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
