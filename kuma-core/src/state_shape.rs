//! The shape of a type as its `Deserialize` tells it: which fields it asks for, and of what types.
//!
//! A default value shows no more than itself: not the fields of what an empty list would hold, nor those of an enum's other variants.
//! `Deserialize` knows them, because it asks for them. So it is run on made-up input that grants whatever is asked, with one element in
//! each list, and what it asks for is written down; once for each variant that an enum may have. What it makes of the input is dropped.
//!
//! Invariants:
//! - The same code asks for the same things in the same order: the description is the same each time, in each process.
//! - It ends: the depth and the number of answers are bounded. A type that refuses made-up input (because it checks it), or panics on it,
//!   is described as far as it went.
//!
//! Source of the idea: the crate `serde-reflection`, which does this for whole formats.

use std::{
    fmt::{self, Write},
    panic::{AssertUnwindSafe, catch_unwind},
};

use serde::{
    Deserializer,
    de::{
        DeserializeOwned, DeserializeSeed, EnumAccess, IntoDeserializer, MapAccess, SeqAccess, VariantAccess, Visitor,
        value::StrDeserializer,
    },
};

/// Enums with more variants are described by so many.
const PASSES_MAX: usize = 64;
const DEPTH_MAX: usize = 16;
const ANSWERS_MAX: usize = 4096;

/// Describes `T`. Runs its `Deserialize`.
pub(crate) fn describe<T: DeserializeOwned>() -> String {
    let mut shape = String::new();
    let mut pass = 0;
    loop {
        let mut trace = Trace { shape: &mut shape, pass, variants_max: 1, depth: 0, answers: 0 };
        // What it made, or why it would not, does not matter.
        let _ = catch_unwind(AssertUnwindSafe(|| drop(T::deserialize(&mut trace))));
        let variants_max = trace.variants_max;
        pass += 1;
        if pass >= variants_max.min(PASSES_MAX) {
            return shape;
        }
        shape.push('\n');
    }
}

struct Trace<'a> {
    shape: &'a mut String,
    /// Which variant an enum has in this pass.
    pass: usize,
    /// The most variants of any enum that was met.
    variants_max: usize,
    depth: usize,
    answers: usize,
}

/// The type wants no more of this.
#[derive(Debug)]
struct Enough;

impl fmt::Display for Enough {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("enough was seen")
    }
}

impl std::error::Error for Enough {}

impl serde::de::Error for Enough {
    fn custom<T: fmt::Display>(_: T) -> Self {
        Enough
    }
}

impl Trace<'_> {
    fn note(&mut self, what: impl fmt::Display) -> Result<(), Enough> {
        self.answers += 1;
        // A String never refuses a byte.
        let _ = write!(self.shape, "{what} ");
        if self.answers > ANSWERS_MAX { Err(Enough) } else { Ok(()) }
    }

    /// Whether there is to be anything inside.
    fn is_deep(&self) -> bool {
        self.depth >= DEPTH_MAX
    }

    fn inside<T>(&mut self, what: impl FnOnce(&mut Self) -> Result<T, Enough>) -> Result<T, Enough> {
        if self.is_deep() {
            return Err(Enough);
        }
        self.depth += 1;
        let outcome = what(self);
        self.depth -= 1;
        let _ = self.shape.write_str(") ");
        outcome
    }
}

macro_rules! plain {
    ($($deserialize:ident $visit:ident $value:expr;)*) => {
        $(fn $deserialize<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Enough> {
            self.note(stringify!($deserialize).trim_start_matches("deserialize_"))?;
            visitor.$visit($value)
        })*
    };
}

impl<'de> Deserializer<'de> for &mut Trace<'_> {
    type Error = Enough;

    plain! {
        deserialize_bool visit_bool false;
        deserialize_i8 visit_i8 0;
        deserialize_i16 visit_i16 0;
        deserialize_i32 visit_i32 0;
        deserialize_i64 visit_i64 0;
        deserialize_i128 visit_i128 0;
        deserialize_u8 visit_u8 0;
        deserialize_u16 visit_u16 0;
        deserialize_u32 visit_u32 0;
        deserialize_u64 visit_u64 0;
        deserialize_u128 visit_u128 0;
        deserialize_f32 visit_f32 0.0;
        deserialize_f64 visit_f64 0.0;
        deserialize_char visit_char 'a';
        deserialize_str visit_str "";
        deserialize_string visit_str "";
        deserialize_bytes visit_bytes b"";
        deserialize_byte_buf visit_bytes b"";
        deserialize_identifier visit_str "";
    }

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Enough> {
        self.note("any")?;
        visitor.visit_unit()
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Enough> {
        visitor.visit_unit()
    }

    fn deserialize_unit<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Enough> {
        self.note("unit")?;
        visitor.visit_unit()
    }

    fn deserialize_unit_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Enough> {
        self.deserialize_unit(visitor)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Enough> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Enough> {
        self.note("option(")?;
        if self.is_deep() {
            return visitor.visit_none();
        }
        self.inside(|trace| visitor.visit_some(trace))
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Enough> {
        self.note("seq(")?;
        let left = usize::from(!self.is_deep());
        self.inside(|trace| visitor.visit_seq(Elements { trace, left }))
    }

    fn deserialize_tuple<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value, Enough> {
        self.note(format_args!("tuple{len}("))?;
        self.inside(|trace| visitor.visit_seq(Elements { trace, left: len }))
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        len: usize,
        visitor: V,
    ) -> Result<V::Value, Enough> {
        self.deserialize_tuple(len, visitor)
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Enough> {
        self.note("map(")?;
        let left = usize::from(!self.is_deep());
        self.inside(|trace| visitor.visit_map(Elements { trace, left }))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Enough> {
        // All names first: should the type of one of them refuse made-up input, the others are known all the same.
        self.note(format_args!("struct{fields:?}("))?;
        self.inside(|trace| visitor.visit_map(Fields { trace, fields: fields.iter() }))
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Enough> {
        self.note(format_args!("enum{variants:?}("))?;
        self.variants_max = self.variants_max.max(variants.len());
        let variant = variants.get(self.pass.min(variants.len().saturating_sub(1))).ok_or(Enough)?;
        self.inside(|trace| visitor.visit_enum(Variant { trace, variant }))
    }
}

/// As many elements, or entries, as there are left.
struct Elements<'a, 'b> {
    trace: &'a mut Trace<'b>,
    left: usize,
}

impl<'de> SeqAccess<'de> for Elements<'_, '_> {
    type Error = Enough;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Enough> {
        match self.left.checked_sub(1) {
            None => Ok(None),
            Some(left) => {
                self.left = left;
                seed.deserialize(&mut *self.trace).map(Some)
            }
        }
    }
}

impl<'de> MapAccess<'de> for Elements<'_, '_> {
    type Error = Enough;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Enough> {
        SeqAccess::next_element_seed(self, seed)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Enough> {
        seed.deserialize(&mut *self.trace)
    }
}

/// Each field of a struct once.
struct Fields<'a, 'b> {
    trace: &'a mut Trace<'b>,
    fields: std::slice::Iter<'static, &'static str>,
}

impl<'de> MapAccess<'de> for Fields<'_, '_> {
    type Error = Enough;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Enough> {
        let Some(field) = self.fields.next() else { return Ok(None) };
        let field: StrDeserializer<'_, Enough> = (*field).into_deserializer();
        seed.deserialize(field).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Enough> {
        seed.deserialize(&mut *self.trace)
    }
}

struct Variant<'a, 'b> {
    trace: &'a mut Trace<'b>,
    variant: &'static str,
}

impl<'de> EnumAccess<'de> for Variant<'_, '_> {
    type Error = Enough;
    type Variant = Self;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Self), Enough> {
        let variant: StrDeserializer<'_, Enough> = self.variant.into_deserializer();
        seed.deserialize(variant).map(|value| (value, self))
    }
}

impl<'de> VariantAccess<'de> for Variant<'_, '_> {
    type Error = Enough;

    fn unit_variant(self) -> Result<(), Enough> {
        self.trace.note("unit")
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value, Enough> {
        seed.deserialize(self.trace)
    }

    fn tuple_variant<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value, Enough> {
        self.trace.deserialize_tuple(len, visitor)
    }

    fn struct_variant<V: Visitor<'de>>(self, fields: &'static [&'static str], visitor: V) -> Result<V::Value, Enough> {
        self.trace.deserialize_struct("", fields, visitor)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashMap};

    use serde::Deserialize;

    use super::*;

    #[derive(Deserialize)]
    #[allow(dead_code)]
    struct Line {
        count: u32,
        #[serde(default)]
        price: Option<i64>,
    }

    #[derive(Deserialize)]
    #[allow(dead_code)]
    enum Step {
        Idle,
        Counted(u8),
        Moved { x: f64, tags: Vec<String> },
    }

    #[derive(Deserialize)]
    #[allow(dead_code)]
    struct Tree {
        value: i8,
        left: Option<Box<Tree>>,
        right: Option<Box<Tree>>,
        more: Vec<Tree>,
    }

    #[test]
    fn what_an_empty_list_would_hold_is_described() {
        let shape = describe::<BTreeMap<String, Line>>();
        assert_eq!(shape, "map( string struct[\"count\", \"price\"]( u32 option( i64 ) ) ) ");
        assert_eq!(describe::<Vec<(u8, bool)>>(), "seq( tuple2( u8 bool ) ) ");
    }

    #[test]
    fn every_variant_is_described() {
        let shape = describe::<Option<Step>>();
        let expected = ["( unit ) ", "( u8 ) ", "( struct[\"x\", \"tags\"]( f64 seq( string ) ) ) "];
        for (line, expected) in shape.lines().zip(expected) {
            assert_eq!(line, format!("option( enum[\"Idle\", \"Counted\", \"Moved\"]{expected}) "));
        }
        assert_eq!(shape.lines().count(), 3);
    }

    #[test]
    fn a_type_within_itself_ends_and_is_the_same_each_time() {
        let shape = describe::<Tree>();
        assert_eq!(shape, describe::<Tree>());
        assert!(shape.len() < 100 * ANSWERS_MAX);
        assert!(shape.starts_with("struct[\"value\", \"left\", \"right\", \"more\"]( i8 option( struct["));
    }

    struct Picky;

    impl<'de> Deserialize<'de> for Picky {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            let text = String::deserialize(deserializer)?;
            assert!(!text.is_empty(), "it has to say something");
            Ok(Picky)
        }
    }

    #[test]
    fn a_type_that_panics_on_made_up_input_is_described_as_far_as_it_goes() {
        assert_eq!(describe::<(u8, Picky, u8)>(), "tuple3( u8 string ");
    }

    #[test]
    fn a_type_that_refuses_made_up_input_is_described_as_far_as_it_goes() {
        #[derive(Deserialize)]
        #[allow(dead_code)]
        struct Checked {
            address: std::net::Ipv4Addr,
            seen: HashMap<String, u8>,
        }
        assert!(describe::<Checked>().starts_with("struct[\"address\", \"seen\"]("));
    }
}
