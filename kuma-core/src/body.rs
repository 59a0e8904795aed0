//! What is sealed: the events of one append and what came with them.
//!
//! ```text
//! [ metadata or nil, fingerprint or nil, [ [schema, bin {name: data}], ... ] ]      MessagePack
//! ```
//! Each event is a binary of its own, so that a reader can pass over what it does not know, and keeps the name that it was written
//! with. `{name: data}` is what serde makes of an externally tagged enum, so that a typed event is decoded without copying.

use serde::Deserialize;
use serde_bytes::Bytes;

use crate::{Entity, Metadata, NewEvent, Refused, left_out::without_values};

/// The events of one append, encoded once, where they were made.
pub(crate) struct EncodedEvents {
    /// The array's items.
    items: Vec<u8>,
    pub(crate) count: u32,
    /// Of all events, without what surrounds them.
    pub(crate) bytes: usize,
}

/// What a request asked for, in short; see [`crate::retry`].
pub(crate) type Fingerprint = [u8; 16];

/// How much one append may hold.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) event_bytes_max: usize,
    pub(crate) append_bytes_max: usize,
    pub(crate) append_events_max: usize,
}

impl Limits {
    /// Unless an option lowers them.
    pub(crate) const DEFAULT: Limits =
        Limits { event_bytes_max: 1 << 20, append_bytes_max: 4 << 20, append_events_max: 4096 };
}

/// Collects events into an [`EncodedEvents`].
pub(crate) struct EventEncoder {
    limits: Limits,
    expected: usize,
    scratch: Vec<u8>,
    events: EncodedEvents,
}

impl EventEncoder {
    pub(crate) fn new(limits: Limits) -> Self {
        EventEncoder::expecting(limits, 1)
    }

    /// For about this many events of one size.
    pub(crate) fn expecting(limits: Limits, events: usize) -> Self {
        let encoded = EncodedEvents { items: Vec::new(), count: 0, bytes: 0 };
        EventEncoder { limits, expected: events.min(limits.append_events_max), scratch: Vec::new(), events: encoded }
    }

    /// Adds a typed event and returns what it decodes to: what cannot be read back is never written.
    pub(crate) fn typed<E: Entity>(&mut self, event: &E::Event) -> Result<E::Event, Refused> {
        self.scratch.clear();
        let undecodable = |detail: String| Refused::Undecodable { event: E::KIND.to_owned(), detail };
        write_typed::<E>(&mut self.scratch, event)?;
        self.push(E::SCHEMA)?;
        let name = split(&self.scratch).map_or("", |(name, _)| name);
        decode_typed::<E>(&self.scratch).map_err(|error| undecodable(without_values(&error, name)))
    }

    /// Adds an event whose type is not known here.
    pub(crate) fn raw(&mut self, event: &NewEvent) -> Result<(), Refused> {
        let undecodable = |detail: &str| Refused::Undecodable { event: event.name.clone(), detail: detail.to_owned() };
        if event.name.is_empty() || event.name.len() > EVENT_NAME_BYTES_MAX {
            return Err(undecodable("an event name has 1 to 128 bytes"));
        }
        self.scratch.clear();
        self.scratch.push(MAP_OF_ONE);
        rmp::encode::write_str(&mut self.scratch, &event.name)
            .map_err(|_| undecodable("its name cannot be written"))?;
        self.scratch.extend_from_slice(&event.data);
        // One whole value, nothing before or behind it.
        let mut rest = event.data.as_slice();
        let mut deserializer = rmp_serde::Deserializer::new(&mut rest);
        deserializer.set_max_depth(DEPTH_MAX);
        match serde::de::IgnoredAny::deserialize(&mut deserializer) {
            Ok(_) if rest.is_empty() => {}
            Err(rmp_serde::decode::Error::DepthLimitExceeded) => {
                return Err(undecodable("its data is nested more than 128 deep"));
            }
            _ => return Err(undecodable("its data is not one MessagePack value")),
        }
        self.push(event.schema)
    }

    fn push(&mut self, schema: u32) -> Result<(), Refused> {
        let Limits { event_bytes_max, append_bytes_max, append_events_max } = self.limits;
        let (bytes, events) = (self.scratch.len(), &mut self.events);
        if bytes > event_bytes_max {
            return Err(Refused::EventTooLarge { index: events.count, bytes, bytes_max: event_bytes_max });
        }
        if events.count == 0 {
            events.items.reserve_exact((self.expected * (bytes + 8)).min(append_bytes_max));
        }
        events.count += 1;
        events.bytes += bytes;
        if events.bytes > append_bytes_max {
            return Err(Refused::AppendTooLarge { bytes: events.bytes, bytes_max: append_bytes_max });
        }
        if events.count as usize > append_events_max {
            return Err(Refused::TooManyEvents { events_max: append_events_max });
        }
        let write = |items: &mut Vec<u8>| {
            rmp::encode::write_array_len(items, 2)?;
            rmp::encode::write_uint(items, u64::from(schema))?;
            rmp::encode::write_bin(items, &self.scratch)
        };
        // A Vec never refuses a byte.
        write(&mut events.items)
            .map_err(|_| Refused::AppendTooLarge { bytes: events.bytes, bytes_max: append_bytes_max })
    }

    pub(crate) fn finish(self) -> Result<EncodedEvents, Refused> {
        if self.events.count == 0 { Err(Refused::Empty) } else { Ok(self.events) }
    }
}

pub(crate) const EVENT_NAME_BYTES_MAX: usize = 128;
/// As JSON has it in serde: values are read and dropped by recursion, and a stack ends.
const DEPTH_MAX: usize = 128;
const MAP_OF_ONE: u8 = 0x81;
const NIL: u8 = 0xc0;

impl EncodedEvents {
    /// What stands before the events in a commit's plaintext.
    pub(crate) fn head(
        &self,
        metadata: Option<&Metadata>,
        fingerprint: Option<&Fingerprint>,
    ) -> Result<Vec<u8>, rmp_serde::encode::Error> {
        let mut head = Vec::with_capacity(32);
        head.push(0x93);
        match metadata {
            Some(metadata) => rmp_serde::encode::write_named(&mut head, metadata)?,
            None => head.push(NIL),
        }
        match fingerprint {
            Some(fingerprint) => rmp::encode::write_bin(&mut head, fingerprint)?,
            None => head.push(NIL),
        }
        rmp::encode::write_array_len(&mut head, self.count)?;
        Ok(head)
    }

    /// The events in a commit's plaintext.
    pub(crate) fn items(&self) -> &[u8] {
        &self.items
    }

    /// The whole plaintext of a commit that has no fingerprint.
    pub(crate) fn body(&self, metadata: Option<&Metadata>) -> Result<Vec<u8>, rmp_serde::encode::Error> {
        Ok([self.head(metadata, None)?.as_slice(), self.items()].concat())
    }
}

/// A commit's plaintext, borrowed.
#[derive(Deserialize)]
pub(crate) struct Body<'a> {
    pub(crate) metadata: Option<Metadata>,
    /// What the request asked for, to tell a retry from a different request under the same key.
    #[serde(borrow)]
    pub(crate) fingerprint: Option<&'a Bytes>,
    #[serde(borrow)]
    pub(crate) events: Vec<(u32, &'a Bytes)>,
}

impl<'a> Body<'a> {
    pub(crate) fn parse(bytes: &'a [u8]) -> Result<Self, rmp_serde::decode::Error> {
        rmp_serde::from_slice(bytes)
    }
}

fn write_typed<E: Entity>(bytes: &mut Vec<u8>, event: &E::Event) -> Result<(), Refused> {
    let undecodable = |detail: String| Refused::Undecodable { event: E::KIND.to_owned(), detail };
    rmp_serde::encode::write_named(bytes, event).map_err(|error| undecodable(error.to_string()))?;
    // A variant without data is a bare string; it becomes a map like the others.
    if bytes.first().is_some_and(|marker| matches!(marker, 0xa0..=0xbf | 0xd9..=0xdb)) {
        bytes.insert(0, MAP_OF_ONE);
        bytes.push(NIL);
    }
    split(bytes).ok_or_else(|| undecodable("events must be an externally tagged enum".to_owned()))?;
    Ok(())
}

/// An event as it stands in a body.
pub(crate) fn encode_typed<E: Entity>(event: &E::Event) -> Result<Vec<u8>, Refused> {
    let mut bytes = Vec::new();
    write_typed::<E>(&mut bytes, event)?;
    Ok(bytes)
}

/// An encoded event's name and data.
pub(crate) fn split(event: &[u8]) -> Option<(&str, &[u8])> {
    let rest = event.strip_prefix(&[MAP_OF_ONE])?;
    rmp::decode::read_str_from_slice(rest).ok()
}

/// The inverse of [`split`].
pub(crate) fn join(name: &str, data: &[u8]) -> Vec<u8> {
    let mut event = Vec::with_capacity(6 + name.len() + data.len());
    event.push(MAP_OF_ONE);
    // A Vec never refuses a byte.
    let _ = rmp::encode::write_str(&mut event, name);
    event.extend_from_slice(data);
    event
}

/// A typed event from its encoded form.
pub(crate) fn decode_typed<E: Entity>(event: &[u8]) -> Result<E::Event, rmp_serde::decode::Error> {
    rmp_serde::from_slice(event)
}

#[cfg(test)]
mod tests {
    use serde::Serialize;

    use super::*;

    const LIMITS: Limits = Limits { event_bytes_max: 100, append_bytes_max: 250, append_events_max: 4 };

    #[derive(Default, Clone, Serialize, Deserialize)]
    struct Thing;

    #[derive(Debug, PartialEq, Clone, Serialize, Deserialize)]
    enum ThingEvent {
        Unit,
        Nothing(Option<u8>),
        Pair(u8, String),
        Named { text: String, more: Option<Vec<i64>> },
    }

    impl Entity for Thing {
        const KIND: &'static str = "thing";
        type Event = ThingEvent;
        fn apply(&mut self, _event: &ThingEvent) {}
    }

    #[test]
    fn every_shape_of_variant_comes_back() {
        let events = [
            ThingEvent::Unit,
            ThingEvent::Nothing(None),
            ThingEvent::Nothing(Some(3)),
            ThingEvent::Pair(1, "ä".into()),
            ThingEvent::Named { text: "x".into(), more: Some(vec![-1, 1 << 40]) },
        ];
        for event in events {
            let mut encoder = EventEncoder::new(LIMITS);
            assert_eq!(encoder.typed::<Thing>(&event).unwrap(), event);
            let metadata = Metadata { correlation: Some("c".into()), ..Metadata::default() };
            let bytes = encoder.finish().unwrap().body(Some(&metadata)).unwrap();
            let body = Body::parse(&bytes).unwrap();
            assert_eq!(body.metadata, Some(metadata));
            assert_eq!(decode_typed::<Thing>(body.events[0].1).unwrap(), event);
            assert!(split(body.events[0].1).is_some());
        }
    }

    /// Every stored event has this form.
    #[test]
    fn a_body_is_pinned_to_the_byte() {
        let mut encoder = EventEncoder::new(LIMITS);
        encoder.typed::<Thing>(&ThingEvent::Named { text: "x".into(), more: None }).unwrap();
        encoder.typed::<Thing>(&ThingEvent::Unit).unwrap();
        let body = encoder.finish().unwrap().body(None).unwrap();
        assert_eq!(
            hex::encode(body),
            "93c0c0929201c41581a54e616d656482a474657874a178a46d6f7265c09201c40781a4556e6974c0"
        );
    }

    #[test]
    fn limits_are_kept_and_named() {
        let event = |bytes| ThingEvent::Named { text: "x".repeat(bytes), more: None };
        let mut encoder = EventEncoder::new(LIMITS);
        assert!(matches!(encoder.typed::<Thing>(&event(100)), Err(Refused::EventTooLarge { index: 0, .. })));
        let mut encoder = EventEncoder::new(LIMITS);
        let error = (0..4).find_map(|_| encoder.typed::<Thing>(&event(75)).err());
        assert!(matches!(error, Some(Refused::AppendTooLarge { bytes_max: 250, .. })));
        let mut encoder = EventEncoder::new(LIMITS);
        let error = (0..5).find_map(|_| encoder.typed::<Thing>(&ThingEvent::Unit).err());
        assert!(matches!(error, Some(Refused::TooManyEvents { events_max: 4 })));
        assert!(matches!(EventEncoder::new(LIMITS).finish(), Err(Refused::Empty)));
    }

    #[test]
    fn data_that_is_not_one_value_is_refused() {
        for data in [&[][..], &[0x92, 1][..], &[1, 2][..], &[0xc1][..]] {
            let event = NewEvent::message_pack("Odd", data.to_vec());
            assert!(EventEncoder::new(LIMITS).raw(&event).is_err(), "{data:?}");
        }
    }
}
