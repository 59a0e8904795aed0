//! Data between JSON text and MessagePack, value by value, without a tree in between.
//!
//! Invariants:
//! - [`pack`] writes each value in its shortest encoding, which is what rmp-serde writes as well. So the data of nearly every event
//!   is the same bytes again after [`unpack`] and [`pack`]; whoever needs to know compares.
//! - What MessagePack cannot hold is refused: serde_json reads an integer above 64 bits as the float that is next to it.
//! - The depth is bounded both ways: values are walked by recursion, and a stack ends.

use std::{collections::HashSet, fmt};

use base64::{Engine, prelude::BASE64_STANDARD};
use rmp::encode::{self, ValueWriteError};
use serde::{
    Deserializer,
    de::{self, DeserializeSeed, MapAccess, SeqAccess, Visitor},
};

/// The deepest nesting that serde_json reads by default, and that the store takes (`body.rs`).
pub(crate) const DEPTH_MAX: usize = 127;

/// Why the data of an event is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    /// It is nested too deep.
    #[error("it is nested more than {DEPTH_MAX} deep")]
    TooDeep,
    /// An integer above 64 bits, or a number beyond all floats.
    #[error("it has a number that 64 bits do not hold; write it as a text")]
    Number,
    /// An escape that is half a character.
    #[error("it has an escape that is half a character")]
    Text,
    /// An object says two things under one name: which one counts would be a guess.
    #[error("an object in it has the same name twice")]
    DuplicateName,
    /// It is not JSON.
    #[error("it is not JSON")]
    NotJson,
}

/// Appends JSON text, which must be valid, as MessagePack to `out`.
///
/// # Errors
/// It cannot be held; `out` is left with a part of it.
pub(crate) fn pack(json: &str, out: &mut Vec<u8>) -> Result<(), Unfit> {
    let mut packer = Packer { out, has_huge_number: false, has_duplicate: false };
    let mut text = serde_json::Deserializer::from_str(json);
    let packed = packer.deserialize(&mut text).and_then(|()| text.end());
    if packed.is_ok() && !packer.has_huge_number && !packer.has_duplicate {
        return Ok(());
    }
    if packer.has_duplicate {
        return Err(Unfit::DuplicateName);
    }
    // Seldom, so that it may take a second look: serde does not say which of these it was.
    let Shape { depth, has_unfit_number } = Shape::of(json);
    match packed {
        Err(_) if depth > DEPTH_MAX => Err(Unfit::TooDeep),
        _ if has_unfit_number => Err(Unfit::Number),
        Err(_) => Err(Unfit::Text),
        Ok(()) => Ok(()),
    }
}

/// Writes what it visits as MessagePack.
struct Packer<'a> {
    out: &'a mut Vec<u8>,
    /// Whether a float was seen that may have been an integer above 64 bits.
    has_huge_number: bool,
    /// Whether an object had the same name twice.
    has_duplicate: bool,
}

impl Packer<'_> {
    /// Puts the length of what was written since `start` before it. JSON says it only at the end, MessagePack at the beginning, in one
    /// byte nearly always.
    fn close<E: de::Error>(
        &mut self,
        start: usize,
        length: usize,
        write: fn(&mut Vec<u8>, u32) -> Result<rmp::Marker, ValueWriteError>,
    ) -> Result<(), E> {
        let mut head = Vec::with_capacity(5);
        let length = u32::try_from(length).map_err(E::custom)?;
        wrote(write(&mut head, length))?;
        self.out.splice(start..=start, head);
        Ok(())
    }
}

/// A Vec never refuses a byte.
fn wrote<T, E: de::Error>(result: Result<T, ValueWriteError>) -> Result<(), E> {
    result.map(drop).map_err(E::custom)
}

impl<'de> DeserializeSeed<'de> for &mut Packer<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for &mut Packer<'_> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a JSON value")
    }

    fn visit_unit<E: de::Error>(self) -> Result<(), E> {
        encode::write_nil(self.out).map_err(E::custom)
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<(), E> {
        encode::write_bool(self.out, value).map_err(E::custom)
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<(), E> {
        wrote(encode::write_uint(self.out, value))
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<(), E> {
        wrote(encode::write_sint(self.out, value))
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<(), E> {
        // i64::MIN is the smallest integer that is read as one.
        self.has_huge_number |= value.abs() >= i64::MAX as f64;
        wrote(encode::write_f64(self.out, value))
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<(), E> {
        wrote(encode::write_str(self.out, value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        let (start, mut length) = (self.out.len(), 0);
        self.out.push(0);
        while items.next_element_seed(&mut *self)?.is_some() {
            length += 1;
        }
        self.close(start, length, encode::write_array_len)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<(), A::Error> {
        let (start, mut length) = (self.out.len(), 0);
        self.out.push(0);
        let mut names = Names::default();
        loop {
            let name = self.out.len();
            if fields.next_key_seed(&mut *self)?.is_none() {
                break;
            }
            self.has_duplicate |= !names.add(self.out, name);
            fields.next_value_seed(&mut *self)?;
            length += 1;
        }
        self.close(start, length, encode::write_map_len)
    }
}

/// The names of an object, by where they stand in what was written.
#[derive(Default)]
struct Names {
    few: Vec<(u32, u32)>,
    many: HashSet<Box<[u8]>>,
}

impl Names {
    /// Comparing with so many is faster than hashing.
    const FEW: usize = 16;

    /// Whether the name that was written last, from `start` on, is new. Nothing before `start` may have moved since the names before it, so
    /// it is asked for within one object: the length of that object is put before it at the end.
    fn add(&mut self, out: &[u8], start: usize) -> bool {
        let name = out.get(start..).unwrap_or_default();
        let at = |(start, end): &(u32, u32)| out.get(*start as usize..*end as usize).unwrap_or_default();
        if self.many.is_empty() && self.few.len() < Self::FEW {
            let is_new = self.few.iter().all(|few| at(few) != name);
            // A line has at most some megabytes.
            self.few.push((start as u32, out.len() as u32));
            return is_new;
        }
        if self.many.is_empty() {
            self.many.extend(self.few.iter().map(|few| at(few).into()));
        }
        self.many.insert(name.into())
    }
}

/// What a JSON text looks like from afar.
#[derive(Debug, Default, PartialEq, Eq)]
struct Shape {
    depth: usize,
    has_unfit_number: bool,
}

impl Shape {
    /// Of a text that is valid.
    fn of(json: &str) -> Self {
        let (mut shape, mut depth) = (Shape::default(), 0_usize);
        let mut bytes = json.bytes().enumerate();
        let mut number_start = None;
        let (mut in_text, mut is_escaped) = (false, false);
        // The blank ends a number that ends the text.
        while let Some((at, byte)) = bytes.next().or_else(|| number_start.map(|_| (json.len(), b' '))) {
            if in_text {
                in_text = is_escaped || byte != b'"';
                is_escaped = !is_escaped && byte == b'\\';
                continue;
            }
            if let Some(start) = number_start
                && !matches!(byte, b'0'..=b'9' | b'.' | b'e' | b'E' | b'+' | b'-')
            {
                shape.has_unfit_number |= !fits(json.get(start..at).unwrap_or_default());
                number_start = None;
            }
            match byte {
                b'"' => in_text = true,
                b'0'..=b'9' | b'-' => number_start = number_start.or(Some(at)),
                b'[' | b'{' => {
                    depth += 1;
                    shape.depth = shape.depth.max(depth);
                }
                b']' | b'}' => depth = depth.saturating_sub(1),
                _ => {}
            }
        }
        shape
    }
}

/// Whether a number of JSON is one of MessagePack.
fn fits(number: &str) -> bool {
    if number.bytes().all(|byte| byte.is_ascii_digit() || byte == b'-') {
        number.parse::<u64>().is_ok() || number.parse::<i64>().is_ok()
    } else {
        number.parse().is_ok_and(f64::is_finite)
    }
}

/// Appends MessagePack as JSON text to `out`, fit to be looked at: binary as base64, and a float that is no number as `null`. Whether
/// [`pack`] gives the same bytes again is for the caller to see.
///
/// # Errors
/// It has no such form: keys that are not text, extension types, or too many levels. `out` is left with a part of it.
pub(crate) fn unpack(data: &[u8], out: &mut Vec<u8>) -> Result<(), rmp_serde::decode::Error> {
    let mut deserializer = rmp_serde::Deserializer::from_read_ref(data);
    deserializer.set_max_depth(DEPTH_MAX + 1);
    Unpacker { out }.deserialize(&mut deserializer)
}

/// Writes what it visits as JSON.
struct Unpacker<'a> {
    out: &'a mut Vec<u8>,
}

impl Unpacker<'_> {
    fn write<E: de::Error>(&mut self, value: impl serde::Serialize) -> Result<(), E> {
        serde_json::to_writer(&mut *self.out, &value).map_err(E::custom)
    }
}

impl<'de> DeserializeSeed<'de> for &mut Unpacker<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for &mut Unpacker<'_> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a value that JSON has")
    }

    fn visit_unit<E: de::Error>(self) -> Result<(), E> {
        self.write(())
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<(), E> {
        self.write(value)
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<(), E> {
        self.write(value)
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<(), E> {
        self.write(value)
    }

    /// Not as the float of twice the size, which has more digits than were ever meant.
    fn visit_f32<E: de::Error>(self, value: f32) -> Result<(), E> {
        self.write(value)
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<(), E> {
        self.write(value)
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<(), E> {
        self.write(value)
    }

    fn visit_bytes<E: de::Error>(self, value: &[u8]) -> Result<(), E> {
        self.write(BASE64_STANDARD.encode(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        self.out.push(b'[');
        let start = self.out.len();
        while items.next_element_seed(&mut *self)?.is_some() {
            self.out.push(b',');
        }
        close(self.out, start, b']');
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<(), A::Error> {
        self.out.push(b'{');
        let start = self.out.len();
        while fields.next_key_seed(Key(&mut *self.out))?.is_some() {
            self.out.push(b':');
            fields.next_value_seed(&mut *self)?;
            self.out.push(b',');
        }
        close(self.out, start, b'}');
        Ok(())
    }
}

/// Puts the end in the place of the last comma, if there is one.
fn close(out: &mut Vec<u8>, start: usize, end: u8) {
    if out.len() > start {
        out.pop();
    }
    out.push(end);
}

/// Writes a field's name, which has to be text.
struct Key<'a>(&'a mut Vec<u8>);

impl<'de> DeserializeSeed<'de> for Key<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl Visitor<'_> for Key<'_> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("text")
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<(), E> {
        Unpacker { out: self.0 }.write(value)
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    /// MessagePack values, as rmp-serde writes them.
    #[derive(Clone, Debug)]
    enum Value {
        Nil,
        Bool(bool),
        Unsigned(u64),
        Signed(i64),
        Float(f64),
        Text(String),
        Array(Vec<Value>),
        Map(Vec<(String, Value)>),
    }

    impl serde::Serialize for Value {
        fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            match self {
                Value::Nil => serializer.serialize_unit(),
                Value::Bool(value) => serializer.serialize_bool(*value),
                Value::Unsigned(value) => serializer.serialize_u64(*value),
                Value::Signed(value) => serializer.serialize_i64(*value),
                Value::Float(value) => serializer.serialize_f64(*value),
                Value::Text(value) => serializer.serialize_str(value),
                Value::Array(items) => serializer.collect_seq(items),
                Value::Map(fields) => serializer.collect_map(fields.iter().map(|(name, value)| (name, value))),
            }
        }
    }

    fn values() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Nil),
            any::<bool>().prop_map(Value::Bool),
            any::<u64>().prop_map(Value::Unsigned),
            any::<i64>().prop_map(Value::Signed),
            // All bit patterns but those that are no numbers.
            any::<u64>()
                .prop_map(|bits| Value::Float(Some(f64::from_bits(bits)).filter(|f| f.is_finite()).unwrap_or(-0.0))),
            any::<String>().prop_map(Value::Text),
        ];
        leaf.prop_recursive(6, 300, 40, |inner| {
            prop_oneof![
                vec(inner.clone(), 0..40).prop_map(Value::Array),
                vec((any::<String>(), inner), 0..40).prop_map(|mut fields| {
                    // A name that comes twice is refused.
                    let mut names = HashSet::new();
                    fields.retain(|(name, _)| names.insert(name.clone()));
                    Value::Map(fields)
                }),
            ]
        })
    }

    fn packed(json: &str) -> Result<Vec<u8>, Unfit> {
        let mut out = Vec::new();
        pack(json, &mut out).map(|()| out)
    }

    fn unpacked(data: &[u8]) -> Option<String> {
        let mut out = Vec::new();
        unpack(data, &mut out).ok().map(|()| String::from_utf8(out).unwrap())
    }

    proptest! {
        #[test]
        fn what_rmp_serde_writes_comes_back_to_the_byte(value in values()) {
            let data = rmp_serde::to_vec_named(&value).unwrap();
            let json = unpacked(&data).unwrap();
            prop_assert_eq!(packed(&json).unwrap(), data);
        }

        /// Also of bytes that are no MessagePack, or not all of it.
        #[test]
        fn arbitrary_bytes_do_not_panic(data in vec(any::<u8>(), 0..200)) {
            let _ = unpacked(&data);
        }
    }

    #[test]
    fn numbers_survive_to_the_bit() {
        for json in [
            "0",
            "-1",
            "18446744073709551615",
            "-9223372036854775808",
            "9007199254740993",
            "-0.0",
            "0.1",
            "1e+308",
            "5e-324",
            "1.7976931348623157e+308",
            "2.2250738585072014e-308",
            "1.8446744073709552e+19",
            "10.357019999999999",
        ] {
            assert_eq!(unpacked(&packed(json).unwrap()).unwrap(), json);
        }
        // Read best-effort, as serde_json does without `float_roundtrip`, it would be the float next to it.
        let data = packed("31.245270191439438").unwrap();
        assert_eq!(data[1..], 31.245270191439438_f64.to_be_bytes());
        assert_eq!(packed("-0").unwrap(), packed("-0.0").unwrap());
    }

    #[test]
    fn a_number_that_would_be_rounded_out_of_all_recognition_is_refused() {
        for json in
            ["18446744073709551616", "-9223372036854775809", "[1, {\"a\": 99999999999999999999}]", "1e400", "-1e999"]
        {
            assert_eq!(packed(json), Err(Unfit::Number), "{json}");
        }
        // As a float it says itself that it is one; as text it is whole.
        for json in
            ["1e19", "18446744073709551616.0", "\"18446744073709551616\"", "[\"\\\"99999999999999999999\", 1e300]"]
        {
            assert!(packed(json).is_ok(), "{json}");
        }
    }

    #[test]
    fn nesting_is_bounded_both_ways() {
        let nested = |depth: usize| "[".repeat(depth) + &"]".repeat(depth);
        assert_eq!(unpacked(&packed(&nested(DEPTH_MAX)).unwrap()).unwrap(), nested(DEPTH_MAX));
        for depth in [DEPTH_MAX + 1, 100_000] {
            assert_eq!(packed(&nested(depth)), Err(Unfit::TooDeep));
        }
        assert_eq!(unpacked(&[&[0x91].repeat(DEPTH_MAX + 1)[..], &[0xc0]].concat()), None);
    }

    #[test]
    fn half_a_character_is_refused() {
        assert_eq!(packed(r#"{"a":"\ud800"}"#), Err(Unfit::Text));
    }

    /// Which of the two counts would be a guess, and another reader may guess differently.
    #[test]
    fn a_name_that_comes_twice_is_refused_however_many_there_are() {
        let object = |names: &[u32]| {
            let fields: Vec<String> = names.iter().map(|name| format!("\"n{name}\":[{{}}, {name}]")).collect();
            format!("[{{{}}}]", fields.join(","))
        };
        let mut names: Vec<u32> = (0..40).collect();
        assert!(packed(&object(&names)).is_ok());
        for (first, second) in [(0, 1), (3, 15), (3, 16), (3, 39), (20, 39)] {
            let kept = std::mem::replace(&mut names[second], first);
            assert_eq!(packed(&object(&names)), Err(Unfit::DuplicateName), "{first} {second}");
            names[second] = kept;
        }
        assert!(packed(r#"{"a":{"a":1},"b":{"a":2}}"#).is_ok(), "another object has names of its own");
    }

    #[test]
    fn fields_keep_their_order() {
        let json = r#"{"z":1,"a":{"y":[],"b":{}},"c":2}"#;
        assert_eq!(unpacked(&packed(json).unwrap()).unwrap(), json);
    }

    #[test]
    fn what_json_does_not_have_is_shown_or_left_out() {
        // Binary, and a float that is no number.
        assert_eq!(unpacked(&[0x92, 0xc4, 2, 1, 2, 0xcb, 0x7f, 0xf8, 0, 0, 0, 0, 0, 0]).unwrap(), "[\"AQI=\",null]");
        // A number as a key, and an extension.
        assert_eq!(unpacked(&[0x81, 1, 2]), None);
        assert_eq!(unpacked(&[0xd4, 1, 2]), None);
    }

    #[test]
    fn lengths_around_the_marks_are_written_as_rmp_writes_them() {
        for length in [0, 15, 16, 65_535, 65_536] {
            let items = vec![1_u8; length];
            let json = serde_json::to_string(&items).unwrap();
            assert_eq!(packed(&json).unwrap(), rmp_serde::to_vec(&items).unwrap(), "{length}");
        }
    }
}
