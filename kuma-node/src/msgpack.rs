//! MessagePack from outside, read by hand: bytes of an event's data are taken as they are, without a tree in between.
//!
//! Invariants:
//! - Nothing is believed: lengths are compared with the bytes that are there, and depth is bounded, because a stack ends.
//! - What is taken as data is one value that JSON can hold: text keys without duplicates, finite numbers, no binary, no extensions.

use std::collections::HashSet;

use kuma_core::Unfit;
use rmp::Marker;

/// As JSON has it (`kuma_core`).
const DEPTH_MAX: usize = 127;

/// Why bytes are not what was expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Malformed {
    /// They end too early.
    #[error("the MessagePack ends too early")]
    Ends,
    /// Another type stands there.
    #[error("the MessagePack has not {0} where it should")]
    Not(&'static str),
    /// A text is not UTF-8.
    #[error("a text of the MessagePack is not UTF-8")]
    NotUtf8,
    /// A value cannot be kept as data.
    #[error("{0}")]
    Unfit(#[from] Unfit),
    /// A byte means nothing.
    #[error("a byte stands there that means nothing in MessagePack")]
    Reserved,
    /// A value has no JSON form.
    #[error("the data of an event has {0}, which JSON does not have")]
    NotJson(&'static str),
}

/// What is left to be read.
#[derive(Clone, Copy)]
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Reader { rest: bytes }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    fn take(&mut self, bytes: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.rest.split_at_checked(bytes).ok_or(Malformed::Ends)?;
        self.rest = rest;
        Ok(taken)
    }

    fn marker(&mut self) -> Result<Marker, Malformed> {
        self.take(1).map(|byte| Marker::from_u8(byte.first().copied().unwrap_or_default()))
    }

    /// A big-endian number of so many bytes.
    fn number(&mut self, bytes: usize) -> Result<u64, Malformed> {
        Ok(self.take(bytes)?.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }

    fn length(&mut self, bytes: usize) -> Result<usize, Malformed> {
        usize::try_from(self.number(bytes)?).map_err(|_| Malformed::Ends)
    }

    pub(crate) fn map(&mut self) -> Result<usize, Malformed> {
        match self.marker()? {
            Marker::FixMap(fields) => Ok(fields.into()),
            Marker::Map16 => self.length(2),
            Marker::Map32 => self.length(4),
            _ => Err(Malformed::Not("a map")),
        }
    }

    pub(crate) fn array(&mut self) -> Result<usize, Malformed> {
        match self.marker()? {
            Marker::FixArray(items) => Ok(items.into()),
            Marker::Array16 => self.length(2),
            Marker::Array32 => self.length(4),
            _ => Err(Malformed::Not("an array")),
        }
    }

    pub(crate) fn text(&mut self) -> Result<&'a str, Malformed> {
        let bytes = match self.marker()? {
            Marker::FixStr(bytes) => bytes.into(),
            Marker::Str8 => self.length(1)?,
            Marker::Str16 => self.length(2)?,
            Marker::Str32 => self.length(4)?,
            _ => return Err(Malformed::Not("a text")),
        };
        std::str::from_utf8(self.take(bytes)?).map_err(|_| Malformed::NotUtf8)
    }

    pub(crate) fn unsigned(&mut self) -> Result<u64, Malformed> {
        match self.marker()? {
            Marker::FixPos(number) => Ok(number.into()),
            Marker::U8 => self.number(1),
            Marker::U16 => self.number(2),
            Marker::U32 => self.number(4),
            Marker::U64 => self.number(8),
            _ => Err(Malformed::Not("a number from 0")),
        }
    }

    /// Passes over `nil`, if it stands there.
    pub(crate) fn nil(&mut self) -> bool {
        match self.rest.split_first() {
            Some((0xc0, rest)) => {
                self.rest = rest;
                true
            }
            _ => false,
        }
    }

    /// One value that can be the data of an event, as it is.
    pub(crate) fn data(&mut self) -> Result<&'a [u8], Malformed> {
        let before = self.rest;
        self.value(0)?;
        Ok(before.get(..before.len() - self.rest.len()).unwrap_or_default())
    }

    fn value(&mut self, depth: usize) -> Result<(), Malformed> {
        let is_open = |depth| if depth < DEPTH_MAX { Ok(depth + 1) } else { Err(Malformed::Unfit(Unfit::TooDeep)) };
        let text = |reader: &mut Self, bytes| match std::str::from_utf8(reader.take(bytes)?) {
            Ok(_) => Ok(()),
            Err(_) => Err(Malformed::NotUtf8),
        };
        match self.marker()? {
            Marker::Null | Marker::True | Marker::False | Marker::FixPos(_) | Marker::FixNeg(_) => Ok(()),
            Marker::U8 | Marker::I8 => self.take(1).map(drop),
            Marker::U16 | Marker::I16 => self.take(2).map(drop),
            Marker::U32 | Marker::I32 => self.take(4).map(drop),
            Marker::U64 | Marker::I64 => self.take(8).map(drop),
            // At most 32 bits.
            Marker::F32 => finite(f32::from_bits(self.number(4)? as u32).into()),
            Marker::F64 => finite(f64::from_bits(self.number(8)?)),
            Marker::FixStr(bytes) => text(self, bytes.into()),
            Marker::Str8 => self.length(1).and_then(|bytes| text(self, bytes)),
            Marker::Str16 => self.length(2).and_then(|bytes| text(self, bytes)),
            Marker::Str32 => self.length(4).and_then(|bytes| text(self, bytes)),
            Marker::FixArray(items) => self.items(items.into(), is_open(depth)?),
            Marker::Array16 => self.length(2).and_then(|items| self.items(items, is_open(depth)?)),
            Marker::Array32 => self.length(4).and_then(|items| self.items(items, is_open(depth)?)),
            Marker::FixMap(fields) => self.fields(fields.into(), is_open(depth)?),
            Marker::Map16 => self.length(2).and_then(|fields| self.fields(fields, is_open(depth)?)),
            Marker::Map32 => self.length(4).and_then(|fields| self.fields(fields, is_open(depth)?)),
            Marker::Bin8 | Marker::Bin16 | Marker::Bin32 => Err(Malformed::NotJson("binary values")),
            _ => Err(Malformed::NotJson("extension types")),
        }
    }

    fn items(&mut self, items: usize, depth: usize) -> Result<(), Malformed> {
        (0..items).try_for_each(|_| self.value(depth))
    }

    fn fields(&mut self, fields: usize, depth: usize) -> Result<(), Malformed> {
        /// Comparing with so many is faster than hashing.
        const FEW: usize = 16;
        let (mut few, mut many) = ([""; FEW], HashSet::new());
        for at in 0..fields {
            let name = self.text().map_err(|error| match error {
                Malformed::Not(_) => Malformed::NotJson("keys that are not text"),
                other => other,
            })?;
            let is_new = match few.get_mut(at) {
                Some(place) => {
                    *place = name;
                    !few.get(..at).unwrap_or_default().contains(&name)
                }
                None => {
                    if at == FEW {
                        many.extend(few);
                    }
                    many.insert(name)
                }
            };
            if !is_new {
                return Err(Malformed::Unfit(Unfit::DuplicateName));
            }
            self.value(depth)?;
        }
        Ok(())
    }
}

fn finite(number: f64) -> Result<(), Malformed> {
    if number.is_finite() { Ok(()) } else { Err(Malformed::NotJson("a number that is not finite")) }
}

/// Whether a map begins with this byte.
pub(crate) fn begins_map(byte: u8) -> bool {
    matches!(Marker::from_u8(byte), Marker::FixMap(_) | Marker::Map16 | Marker::Map32)
}

/// Finds where one value of a stream ends, however it is cut into pieces; no byte is looked at twice.
#[derive(Debug)]
pub(crate) struct Boundary {
    /// How far it was looked.
    at: usize,
    /// Values that are still to come.
    left: u64,
}

impl Default for Boundary {
    fn default() -> Self {
        Boundary { at: 0, left: 1 }
    }
}

impl Boundary {
    /// How many bytes at the beginning of `bytes` are the value; none if more of it has to come. It is asked again with the same bytes and
    /// more behind them.
    ///
    /// # Errors
    /// They are no MessagePack: where the next value begins is not known.
    pub(crate) fn find(&mut self, bytes: &[u8]) -> Result<Option<usize>, Malformed> {
        while self.left > 0 {
            let Some(marker) = bytes.get(self.at).map(|byte| Marker::from_u8(*byte)) else { return Ok(None) };
            if marker == Marker::Reserved {
                return Err(Malformed::Reserved);
            }
            let Some((end, within)) = self.step(marker, bytes).filter(|(end, _)| *end <= bytes.len()) else {
                return Ok(None);
            };
            self.at = end;
            self.left = (self.left - 1).saturating_add(within);
        }
        let found = self.at;
        *self = Boundary::default();
        Ok(Some(found))
    }

    /// Where the value that begins with `marker` ends, but for the values within, and how many these are; none if more has to come to tell.
    fn step(&self, marker: Marker, bytes: &[u8]) -> Option<(usize, u64)> {
        let number = |width: usize| -> Option<u64> {
            let bytes = bytes.get(self.at + 1..self.at + 1 + width)?;
            Some(bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
        };
        // Bytes behind the marker, and values within.
        let (width, within): (u64, u64) = match marker {
            Marker::Null | Marker::True | Marker::False | Marker::FixPos(_) | Marker::FixNeg(_) | Marker::Reserved => {
                (0, 0)
            }
            Marker::U8 | Marker::I8 => (1, 0),
            Marker::U16 | Marker::I16 | Marker::FixExt1 => (2, 0),
            Marker::FixExt2 => (3, 0),
            Marker::U32 | Marker::I32 | Marker::F32 => (4, 0),
            Marker::FixExt4 => (5, 0),
            Marker::U64 | Marker::I64 | Marker::F64 => (8, 0),
            Marker::FixExt8 => (9, 0),
            Marker::FixExt16 => (17, 0),
            Marker::FixStr(bytes) => (bytes.into(), 0),
            Marker::Str8 | Marker::Bin8 => (1 + number(1)?, 0),
            Marker::Str16 | Marker::Bin16 => (2 + number(2)?, 0),
            Marker::Str32 | Marker::Bin32 => (4 + number(4)?, 0),
            Marker::Ext8 => (2 + number(1)?, 0),
            Marker::Ext16 => (3 + number(2)?, 0),
            Marker::Ext32 => (5 + number(4)?, 0),
            Marker::FixArray(items) => (0, items.into()),
            Marker::Array16 => (2, number(2)?),
            Marker::Array32 => (4, number(4)?),
            Marker::FixMap(fields) => (0, 2 * u64::from(fields)),
            Marker::Map16 => (2, 2 * number(2)?),
            Marker::Map32 => (4, 2 * number(4)?),
        };
        let end = self.at.checked_add(1)?.checked_add(usize::try_from(width).ok()?)?;
        Some((end, within))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn packed(value: &Value) -> Vec<u8> {
        rmp_serde::to_vec_named(value).unwrap()
    }

    fn data(bytes: &[u8]) -> Result<usize, Malformed> {
        Reader::new(bytes).data().map(<[u8]>::len)
    }

    #[test]
    fn data_is_what_json_can_hold() {
        for value in [json!(null), json!({"a": [1, -5, 2.5, "x", true], "b": {}}), json!(u64::MAX), json!(i64::MIN)] {
            let bytes = packed(&value);
            assert_eq!(data(&bytes), Ok(bytes.len()), "{value}");
        }
        assert!(matches!(data(&rmp_serde::to_vec(&f64::NAN).unwrap()), Err(Malformed::NotJson(_))));
        assert!(matches!(data(&[0xc4, 1, 0]), Err(Malformed::NotJson(_))), "binary");
        assert!(matches!(data(&[0xd4, 1, 0]), Err(Malformed::NotJson(_))), "extension");
        assert!(matches!(data(&[0x81, 1, 1]), Err(Malformed::NotJson(_))), "a number as a key");
        assert_eq!(data(&[0x82, 0xa1, b'a', 1, 0xa1, b'a', 2]), Err(Malformed::Unfit(Unfit::DuplicateName)));
        assert_eq!(data(&[0xa1, 0xff]), Err(Malformed::NotUtf8));
    }

    #[test]
    fn a_name_that_comes_twice_is_found_however_many_there_are() {
        let fields = |names: &[String]| {
            let mut bytes = vec![0xde, 0, names.len() as u8];
            for name in names {
                bytes.extend(rmp_serde::to_vec(name).unwrap());
                bytes.push(0xc0);
            }
            bytes
        };
        let mut names: Vec<String> = (0..40).map(|name| name.to_string()).collect();
        assert!(data(&fields(&names)).is_ok());
        for (first, second) in [(0, 1), (3, 16), (3, 39), (20, 39)] {
            let kept = std::mem::replace(&mut names[second], first.to_string());
            assert_eq!(data(&fields(&names)), Err(Malformed::Unfit(Unfit::DuplicateName)), "{first} {second}");
            names[second] = kept;
        }
    }

    #[test]
    fn what_is_nested_deep_is_refused_and_the_stack_survives() {
        let nested = |depth: usize| [vec![0x91; depth], vec![0xc0]].concat();
        assert!(data(&nested(127)).is_ok());
        assert_eq!(data(&nested(128)), Err(Malformed::Unfit(Unfit::TooDeep)));
        assert_eq!(data(&nested(1_000_000)), Err(Malformed::Unfit(Unfit::TooDeep)));
        assert_eq!(Boundary::default().find(&nested(1_000_000)), Ok(Some(1_000_001)));
    }

    #[test]
    fn a_length_that_is_not_there_is_not_believed() {
        for bytes in
            [&[0xdd, 0xff, 0xff, 0xff, 0xff][..], &[0xdf, 0xff, 0xff, 0xff, 0xff], &[0xdb, 0xff, 0xff, 0xff, 0xff]]
        {
            assert_eq!(data(bytes), Err(Malformed::Ends));
            assert_eq!(Boundary::default().find(bytes), Ok(None));
        }
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            ".{0,40}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 64, 20, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..20).prop_map(Value::from),
                proptest::collection::btree_map(".{0,8}", inner, 0..20).prop_map(|map| map.into_iter().collect()),
            ]
        })
    }

    proptest! {
        #[test]
        fn values_of_a_stream_are_found_wherever_it_is_cut(values in proptest::collection::vec(any_json(), 1..6), step in 1..40usize) {
            let whole: Vec<Vec<u8>> = values.iter().map(packed).collect();
            let stream = whole.concat();
            let (mut begin, mut end, mut boundary, mut found) = (0, 0, Boundary::default(), Vec::new());
            while end < stream.len() {
                end = (end + step).min(stream.len());
                while let Some(bytes) = boundary.find(&stream[begin..end]).unwrap() {
                    found.push(stream[begin..begin + bytes].to_vec());
                    begin += bytes;
                }
            }
            prop_assert_eq!(&found, &whole);
            for value in &whole {
                prop_assert_eq!(data(value), Ok(value.len()));
            }
        }

        #[test]
        fn arbitrary_bytes_do_no_harm(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let end = Boundary::default().find(&bytes);
            if let Ok(length) = data(&bytes) {
                prop_assert_eq!(end, Ok(Some(length)));
            }
        }
    }
}
