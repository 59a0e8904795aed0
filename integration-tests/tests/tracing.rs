//! What is traced: where and how, and nothing of what. (A file of its own: `tracing` keeps what a process listens to.)
#![allow(clippy::unwrap_used)]

mod common;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
};

use common::{
    directory,
    observed::{CANARY, work},
};
use parking_lot::Mutex;
use tracing::{
    Subscriber,
    field::{Field, Visit},
    span,
};
use tracing_subscriber::{Layer, layer::Context, prelude::*, registry::LookupSpan};

/// What a span said: target, name, and its fields by name.
type Said = (String, String, BTreeMap<String, String>);

/// Keeps all spans and events.
#[derive(Clone, Default)]
struct Ear {
    spans: Arc<Mutex<BTreeMap<u64, Said>>>,
    closed: Arc<Mutex<Vec<Said>>>,
    text: Arc<Mutex<String>>,
}

struct Fields<'a>(&'a mut BTreeMap<String, String>);

impl Visit for Fields<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0.insert(field.name().to_owned(), format!("{value:?}"));
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Ear {
    fn on_new_span(&self, attributes: &span::Attributes<'_>, id: &span::Id, _: Context<'_, S>) {
        let metadata = attributes.metadata();
        let mut fields = BTreeMap::new();
        attributes.record(&mut Fields(&mut fields));
        let said = (metadata.target().to_owned(), metadata.name().to_owned(), fields);
        self.spans.lock().insert(id.into_u64(), said);
    }

    fn on_record(&self, id: &span::Id, values: &span::Record<'_>, _: Context<'_, S>) {
        if let Some((.., fields)) = self.spans.lock().get_mut(&id.into_u64()) {
            values.record(&mut Fields(fields));
        }
    }

    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        let mut fields = BTreeMap::new();
        event.record(&mut Fields(&mut fields));
        self.text.lock().push_str(&format!("{fields:?}\n"));
    }

    fn on_close(&self, id: span::Id, _: Context<'_, S>) {
        if let Some(said) = self.spans.lock().remove(&id.into_u64()) {
            self.text.lock().push_str(&format!("{said:?}\n"));
            self.closed.lock().push(said);
        }
    }
}

#[tokio::test]
async fn the_spans_say_where_and_how_it_ended_and_nothing_of_what() {
    let ear = Ear::default();
    let _listening = tracing::subscriber::set_default(tracing_subscriber::registry().with(ear.clone()));
    let dir = directory();
    work(dir.path(), true).await;
    let closed = ear.closed.lock();
    let spans = |name: &str| -> Vec<&Said> { closed.iter().filter(|(_, span, _)| span == name).collect() };
    let results: BTreeSet<&str> =
        spans("append").iter().filter_map(|said| said.2.get("result")).map(String::as_str).collect();
    assert_eq!(results, ["\"committed\"", "\"refused\"", "\"rejected\"", "\"repeated\""].into_iter().collect());
    let expected: [(&str, &str, &[&str]); 4] = [
        ("append", "kuma::append", &["entity", "slot", "shard", "bytes", "result"]),
        ("activate", "kuma::activate", &["entity", "slot", "shard", "version", "commits", "from_snapshot"]),
        ("commit", "kuma::commit", &["file", "entries", "events", "bytes", "commits"]),
        ("checkpoint", "kuma::checkpoint", &["file", "pages"]),
    ];
    for (name, target, fields) in expected {
        let found = spans(name);
        assert!(!found.is_empty(), "no span {name}");
        for (found_target, _, found_fields) in found {
            assert_eq!(found_target, target);
            let missing: Vec<_> = fields.iter().filter(|field| !found_fields.contains_key(**field)).collect();
            assert!(missing.is_empty(), "{name} without {missing:?}: {found_fields:?}");
        }
    }
    assert!(spans("activate").iter().any(|said| said.2["from_snapshot"] == "true"));
    let text = ear.text.lock();
    assert!(!text.contains(CANARY), "an id, a key or a payload in what was traced");
}
