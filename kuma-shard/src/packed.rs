//! Rows that come as one value. sqlx hands each row of an answer over on its own, and each wakes a task: of a page that is most of its cost.
//!
//! A query packs its rows with `json_group_array`, and bytes in them with `hex`. Pages are bounded by whoever asks.

use serde::{Deserialize, de::DeserializeOwned};
use sqlx::{Row, SqliteExecutor, sqlite::SqliteRow};

use crate::statements::Bound;

/// Bytes, as `hex` of SQLite writes them.
#[derive(Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct Hex(pub(crate) Vec<u8>);

impl TryFrom<String> for Hex {
    type Error = hex::FromHexError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let mut bytes = vec![0; text.len() / 2];
        hex::decode_to_slice(text, &mut bytes).map(|()| Hex(bytes))
    }
}

/// The rows of a query whose only value is an array of them.
pub(crate) async fn rows<T: DeserializeOwned>(executor: impl SqliteExecutor<'_>, query: Bound) -> sqlx::Result<Vec<T>> {
    column(&query.fetch_one(executor).await?, 0)
}

/// The rows that a column of an answer is an array of.
pub(crate) fn column<T: DeserializeOwned>(answer: &SqliteRow, index: usize) -> sqlx::Result<Vec<T>> {
    // Without the words of the error: they may hold some of what is in the rows.
    serde_json::from_str(answer.try_get(index)?).map_err(|_| damaged("a row is not of the form that it was written in"))
}

/// A row that cannot be read for what it is.
pub(crate) fn damaged(why: &'static str) -> sqlx::Error {
    sqlx::Error::Decode(why.into())
}

/// Numbers for `json_each`.
pub(crate) fn numbers<N: ToString>(numbers: impl IntoIterator<Item = N>) -> String {
    let numbers: Vec<String> = numbers.into_iter().map(|number| number.to_string()).collect();
    format!("[{}]", numbers.join(","))
}

/// Names for `unhex` of `json_each`.
pub(crate) fn names(names: &[[u8; 16]]) -> String {
    let names: Vec<String> = names.iter().map(|name| format!("\"{}\"", hex::encode(name))).collect();
    format!("[{}]", names.join(","))
}
