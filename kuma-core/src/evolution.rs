//! Evolution: how events of older shapes are read by newer code.
//!
//! What is stored is never changed. An event carries the schema version that it was written with; on every way out (replay, history,
//! export, time travel, the answer to a retry) the upcasters take it, step by step, to the version of the code that reads it.
//!
//! Invariants:
//! - An event of the current schema is never touched, and costs nothing.
//! - A step changes name or data, never the number of events: versions stay what they are.
//! - There is one place that runs upcasters ([`Upcasters::run`]), and everything that reads events goes through it.

use std::{borrow::Cow, fmt, sync::Arc};

use serde::{Serialize, de::DeserializeOwned};

use crate::{
    body::{join, split},
    kind::Undecodable,
    left_out::without_values,
};

type Change = Arc<dyn Fn(&[u8]) -> Result<Vec<u8>, String> + Send + Sync>;

/// The steps that take events of older schema versions to the current one, see [`Entity::upcasters`](crate::Entity::upcasters).
///
/// Each step says which events it takes: those of a schema version with a name, as they are after the steps before it. Steps
/// run in the order of their schema versions, those of one version in the order in which they were added. An event that no step takes
/// is read as it is.
///
/// ```
/// use kuma_core::{Entity, Upcasters};
/// use serde::{Deserialize, Serialize};
/// use serde_json::json;
///
/// #[derive(Default, Clone, Serialize, Deserialize)]
/// struct Account { cents: i64 }
///
/// #[derive(Serialize, Deserialize)]
/// enum AccountEvent { Deposited { cents: i64, currency: String } }
///
/// impl Entity for Account {
///     const KIND: &'static str = "account";
///     const SCHEMA: u32 = 3;
///     type Event = AccountEvent;
///     fn apply(&mut self, event: &AccountEvent) {
///         let AccountEvent::Deposited { cents, .. } = event;
///         self.cents += cents;
///     }
///     fn upcasters() -> Upcasters {
///         #[derive(Deserialize)]
///         struct Put { euros: i64 }
///         #[derive(Serialize)]
///         struct Deposited { cents: i64 }
///         Upcasters::new()
///             // Version 1 had `Put { euros }`.
///             .typed(1, "Put", |old: Put| Deposited { cents: old.euros * 100 })
///             .rename(1, "Put", "Deposited")
///             // Version 2 had no currency.
///             .json(2, "Deposited", |mut data| {
///                 data["currency"] = json!("EUR");
///                 data
///             })
///     }
/// }
/// ```
#[derive(Clone, Default)]
pub struct Upcasters {
    /// In the order in which they run.
    steps: Vec<Step>,
}

#[derive(Clone)]
struct Step {
    schema: u32,
    name: String,
    what: What,
}

#[derive(Clone)]
enum What {
    Rename(String),
    Change(Change),
}

impl Upcasters {
    /// None.
    pub fn new() -> Self {
        Upcasters::default()
    }

    /// Events of version `schema` named `name` are called `new_name` from the next version on.
    pub fn rename(self, schema: u32, name: impl Into<String>, new_name: impl Into<String>) -> Self {
        self.step(schema, name, What::Rename(new_name.into()))
    }

    /// The data of events of version `schema` named `name`, as JSON, becomes what `change` makes of it.
    ///
    /// Data that has no JSON form (binary, maps with keys that are not strings) is an error of the read; use [`Upcasters::typed`]
    /// for such events.
    pub fn json(
        self,
        schema: u32,
        name: impl Into<String>,
        change: impl Fn(serde_json::Value) -> serde_json::Value + Send + Sync + 'static,
    ) -> Self {
        self.typed(schema, name, change)
    }

    /// The data of events of version `schema` named `name`, read as `Old`, becomes what `change` makes of it. Keep `Old` as the
    /// type was in that version.
    pub fn typed<Old: DeserializeOwned, New: Serialize>(
        self,
        schema: u32,
        name: impl Into<String>,
        change: impl Fn(Old) -> New + Send + Sync + 'static,
    ) -> Self {
        let change = move |data: &[u8]| {
            let old = rmp_serde::from_slice(data).map_err(|error| without_values(&error, ""))?;
            rmp_serde::to_vec_named(&change(old)).map_err(|error| error.to_string())
        };
        self.step(schema, name, What::Change(Arc::new(change)))
    }

    fn step(mut self, schema: u32, name: impl Into<String>, what: What) -> Self {
        let after = self.steps.partition_point(|step| step.schema <= schema);
        self.steps.insert(after, Step { schema, name: name.into(), what });
        self
    }

    /// A step that would never run, because it is for the current schema version or a later one.
    pub(crate) fn misplaced(&self, current: u32) -> Option<String> {
        let step = self.steps.iter().find(|step| step.schema >= current)?;
        Some(format!(
            "an upcaster takes {} of schema {}, but the kind's SCHEMA is {current}; raise it",
            step.name, step.schema
        ))
    }

    /// An encoded event of version `schema` as the code of version `current` reads it, with its version then.
    pub(crate) fn run<'a>(
        &self,
        current: u32,
        schema: u32,
        event: &'a [u8],
    ) -> Result<(u32, Cow<'a, [u8]>), Undecodable> {
        if schema >= current || self.steps.is_empty() {
            return Ok((schema, Cow::Borrowed(event)));
        }
        let Some((stored_name, stored_data)) = split(event) else {
            return Err(Undecodable { event: String::new(), detail: "it has no name".to_owned() });
        };
        let (mut name, mut data) = (Cow::Borrowed(stored_name), Cow::Borrowed(stored_data));
        for step in self.steps.iter().filter(|step| step.schema >= schema && step.schema < current) {
            if step.name != name {
                continue;
            }
            match &step.what {
                What::Rename(new_name) => name = Cow::Owned(new_name.clone()),
                What::Change(change) => {
                    let changed = change(&data).map_err(|detail| Undecodable {
                        event: name.to_string(),
                        detail: format!("its upcaster from schema {} failed: {detail}", step.schema),
                    })?;
                    data = Cow::Owned(changed);
                }
            }
        }
        match (&name, &data) {
            (Cow::Borrowed(_), Cow::Borrowed(_)) => Ok((current, Cow::Borrowed(event))),
            _ => Ok((current, Cow::Owned(join(&name, &data)))),
        }
    }
}

impl fmt::Debug for Upcasters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.steps.iter().map(|step| (step.schema, &step.name))).finish()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn event(name: &str, data: &Value) -> Vec<u8> {
        join(name, &rmp_serde::to_vec_named(data).unwrap())
    }

    fn read(upcasters: &Upcasters, current: u32, schema: u32, name: &str, data: &Value) -> (u32, String, Value) {
        let event = event(name, data);
        let (schema, event) = upcasters.run(current, schema, &event).unwrap();
        let (name, data) = split(&event).unwrap();
        (schema, name.to_owned(), rmp_serde::from_slice(data).unwrap())
    }

    fn add(field: &'static str) -> impl Fn(Value) -> Value {
        move |mut data| {
            data[field] = json!(true);
            data
        }
    }

    #[test]
    fn steps_run_from_the_stored_version_to_the_current_one_in_order() {
        // Added out of order on purpose.
        let upcasters = Upcasters::new()
            .json(2, "New", add("two"))
            .rename(1, "Old", "New")
            .json(1, "New", add("one"))
            .json(3, "New", add("three"));
        let all = json!({"one": true, "two": true, "three": true});
        assert_eq!(read(&upcasters, 4, 1, "Old", &json!({})), (4, "New".into(), all));
        assert_eq!(read(&upcasters, 4, 3, "New", &json!({})), (4, "New".into(), json!({"three": true})));
        assert_eq!(read(&upcasters, 3, 2, "New", &json!({})), (3, "New".into(), json!({"two": true})));
        assert_eq!(read(&upcasters, 4, 2, "Other", &json!({})), (4, "Other".into(), json!({})));
    }

    #[test]
    fn an_event_of_the_current_or_a_later_version_is_not_touched() {
        let upcasters = Upcasters::new().json(1, "E", add("one"));
        assert_eq!(read(&upcasters, 2, 2, "E", &json!({})), (2, "E".into(), json!({})));
        assert_eq!(read(&upcasters, 2, 7, "E", &json!({})), (7, "E".into(), json!({})));
    }

    #[test]
    fn a_step_that_cannot_read_its_event_says_which_and_why() {
        let upcasters = Upcasters::new().typed(1, "E", |old: String| old.len());
        let Undecodable { event, detail } = upcasters.run(2, 1, &event("E", &json!({"a": 1}))).unwrap_err();
        assert_eq!(event, "E");
        assert!(detail.contains("upcaster from schema 1 failed"), "{detail}");
    }

    #[test]
    fn a_step_that_could_never_run_is_found() {
        assert!(Upcasters::new().rename(1, "A", "B").misplaced(2).is_none());
        assert!(Upcasters::new().rename(1, "A", "B").misplaced(1).is_some());
    }
}
