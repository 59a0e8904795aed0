//! `projections query`: asks a read model.

use std::time::Duration;

use clap::Args;
use serde_json::{Map, Value};

use crate::{
    cli::{
        Exit, Session, UsageError, input,
        output::{FAINT, duration},
        table::Table,
    },
    wire::QueryBody,
};

/// What `projections query` takes.
#[derive(Debug, Args)]
pub(in crate::cli) struct QueryArguments {
    /// The projection
    name: String,
    /// One SELECT; @FILE for that of a file, - for standard input
    sql: String,
    /// The value of the next `?`; of `:NAME` as :NAME=VALUE. Numbers, true, false and null are themselves, '"1"' is text
    #[arg(long = "param", value_name = "VALUE", allow_hyphen_values = true)]
    parameters: Vec<String>,
    /// At most so many rows, up to 10000
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    rows: Option<u32>,
}

pub(in crate::cli) async fn run(session: &Session, arguments: QueryArguments) -> anyhow::Result<Exit> {
    let QueryArguments { name, sql, parameters, rows: rows_max } = arguments;
    let body = QueryBody { sql: input::text(&sql)?, parameters: values(&parameters)?, rows_max };
    let answer = session.client()?.query(&name, &body).await?;
    let output = &session.output;
    if output.is_json() {
        output.json(&answer)?;
        return Ok(Exit::Done);
    }
    let mut table = Table::new(answer.columns.iter().cloned());
    for row in &answer.rows {
        table.row(answer.columns.iter().map(|column| cell(&row[column])));
    }
    output.table(&table)?;
    if answer.truncated {
        output.warn(format_args!("there are more than {} rows; ask for fewer", answer.rows.len()));
    }
    if output.is_terminal() {
        let lag = duration(Duration::from_millis(answer.lag_ms));
        let (rows, behind) = (answer.rows.len(), answer.commits_behind);
        output.note(format_args!("{FAINT}{rows} rows; {lag} old, {behind} commits behind{FAINT:#}"));
    }
    Ok(Exit::Done)
}

/// Values as a list, or by name; not both.
fn values(texts: &[String]) -> Result<Value, UsageError> {
    let named = |text: &String| {
        let (name, value) = text.strip_prefix(':')?.split_once('=')?;
        Some((name.to_owned(), value_of(value)))
    };
    let by_name: Map<String, Value> = texts.iter().filter_map(named).collect();
    match by_name.len() {
        _ if texts.is_empty() => Ok(Value::Null),
        0 => Ok(texts.iter().map(|text| value_of(text)).collect()),
        count if count == texts.len() => Ok(Value::Object(by_name)),
        _ => Err(UsageError("parameters are all :NAME=VALUE with different names, or none is".to_owned())),
    }
}

fn value_of(text: &str) -> Value {
    match serde_json::from_str(text) {
        Ok(value @ (Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_))) => value,
        _ => Value::String(text.to_owned()),
    }
}

/// Text as it stands, and everything else as JSON.
fn cell(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn parameters_are_a_list_or_named() {
        let values = |texts: &[&str]| values(&texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>());
        assert_eq!(values(&[]).unwrap(), Value::Null);
        assert_eq!(
            values(&["1", "1.5", "null", "\"1\"", "a=b", "{}"]).unwrap(),
            json!([1, 1.5, null, "1", "a=b", "{}"])
        );
        assert_eq!(values(&[":least=-5", ":name=x=y"]).unwrap(), json!({"least": -5, "name": "x=y"}));
        assert!(values(&[":a=1", "2"]).is_err() && values(&[":a=1", ":a=2"]).is_err());
    }
}
