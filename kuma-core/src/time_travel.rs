//! What changed between two states, told field by field.

use std::fmt;

use json_patch::{PatchOperation, jsonptr::Pointer};
use serde::Serialize;
use serde_json::Value;

use crate::Version;

/// What differs between an entity's states at two versions, see [`Handle::diff`](crate::Handle::diff).
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Diff {
    /// The version that it starts from.
    pub from: Version,
    /// The version that it leads to.
    pub to: Version,
    /// Each change, in an order in which they can be made one after the other.
    pub changes: Vec<Change>,
}

/// One value that differs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Change {
    /// Where it stands, as a JSON pointer (RFC 6901). In an array it is the place at the time of this change.
    pub path: String,
    /// What was there; none if it is new.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub before: Option<Value>,
    /// What is there then; none if it is gone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub after: Option<Value>,
}

impl Diff {
    /// Whether the two states are equal.
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }
}

/// A line for each change: `~ /balance: 5 -> 7`, `+ /owner: "x"`, `- /limit: 3`.
impl fmt::Display for Diff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Change { path, before, after } in &self.changes {
            match (before, after) {
                (Some(before), Some(after)) => writeln!(f, "~ {path}: {before} -> {after}")?,
                (None, Some(after)) => writeln!(f, "+ {path}: {after}")?,
                (Some(before), None) => writeln!(f, "- {path}: {before}")?,
                (None, None) => {}
            }
        }
        Ok(())
    }
}

/// What has to be changed in `before` to make it `after`.
pub(crate) fn changes(mut before: Value, after: &Value) -> Vec<Change> {
    let mut changes = Vec::new();
    for operation in json_patch::diff(&before, after).0 {
        let path = operation.path().to_string();
        let old = lookup(&before, operation.path());
        let change = match &operation {
            PatchOperation::Add(add) => Change { path, before: None, after: Some(add.value.clone()) },
            PatchOperation::Replace(replace) => Change { path, before: old, after: Some(replace.value.clone()) },
            _ => Change { path, before: old, after: None },
        };
        // Each operation is relative to what those before it left.
        if json_patch::patch(&mut before, std::slice::from_ref(&operation)).is_err() {
            break;
        }
        changes.push(change);
    }
    changes
}

fn lookup(value: &Value, path: &Pointer) -> Option<Value> {
    value.pointer(path.as_str()).cloned()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn diff(before: Value, after: &Value) -> Diff {
        Diff { from: Version(1), to: Version(2), changes: changes(before, after) }
    }

    #[test]
    fn a_diff_names_what_is_new_gone_and_changed() {
        let before = json!({"balance": 5, "limit": 3, "tags": ["a", "b", "c"], "deep": {"same": 1, "x": null}});
        let after = json!({"balance": 7, "owner": "x", "tags": ["a", "c"], "deep": {"same": 1, "x": false}});
        let diff = diff(before, &after).to_string();
        let lines: std::collections::BTreeSet<&str> = diff.lines().collect();
        let expected = [
            "+ /owner: \"x\"",
            "- /limit: 3",
            "~ /balance: 5 -> 7",
            "~ /deep/x: null -> false",
            "- /tags/2: \"c\"",
            "~ /tags/1: \"b\" -> \"c\"",
        ];
        assert_eq!(lines, expected.into_iter().collect());
        assert!(super::tests::diff(after.clone(), &after).is_empty());
    }

    fn value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![any::<bool>().prop_map(Value::from), (0..9i64).prop_map(Value::from), Just(Value::Null)];
        leaf.prop_recursive(3, 24, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map("[a-c~/]", inner, 0..4)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn changes_made_in_order_lead_from_one_state_to_the_other(before in value(), after in value()) {
            let mut state = before.clone();
            for Change { path, before, after } in changes(before, &after) {
                let path = json_patch::jsonptr::PointerBuf::parse(path).unwrap();
                let operation = match (before, after) {
                    (Some(_), None) => PatchOperation::Remove(json_patch::RemoveOperation { path }),
                    (None, Some(value)) => PatchOperation::Add(json_patch::AddOperation { path, value }),
                    (_, value) => PatchOperation::Replace(json_patch::ReplaceOperation { path, value: value.unwrap_or_default() }),
                };
                json_patch::patch(&mut state, &[operation]).unwrap();
            }
            prop_assert_eq!(state, after);
        }
    }
}
