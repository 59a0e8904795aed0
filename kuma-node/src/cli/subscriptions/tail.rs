//! `subscriptions tail`: events as they come.

use anyhow::Context;
use clap::Args;
use serde::Serialize;
use serde_json::value::RawValue;

use crate::{
    cli::{
        Exit, Session,
        output::{BAD, FAINT, Output, STRONG, WARN, duration, printable},
    },
    client::{Begin, SseMessage, Subscription, SubscriptionStep},
    wire::{SubscribedDamage, SubscribedErasure, SubscribedEvent},
};

/// What `subscriptions tail` takes.
#[derive(Debug, Args)]
pub(in crate::cli) struct TailArguments {
    /// Events of this kind; may be given more than once. Default: every kind
    #[arg(long = "kind", value_name = "KIND")]
    kinds: Vec<String>,
    /// Events of this kind and name; may be given more than once
    #[arg(long = "event", value_name = "KIND.NAME", value_parser = event_name)]
    events: Vec<String>,
    /// Where to begin: beginning, now, a checkpoint, or a time (2026-01-31T12:00:00Z)
    #[arg(long, value_name = "WHERE", default_value = "now", value_parser = begin)]
    from: Begin,
    /// Leave the events' data out
    #[arg(long)]
    no_data: bool,
}

fn event_name(text: &str) -> Result<String, String> {
    match text.rsplit_once('.') {
        Some((kind, name)) if !kind.is_empty() && !name.is_empty() => Ok(text.to_owned()),
        _ => Err("it is KIND.NAME: account.Deposited, say".to_owned()),
    }
}

fn begin(text: &str) -> Result<Begin, String> {
    match text {
        "" => Err("it is beginning, now, a checkpoint, or a time".to_owned()),
        "now" => Ok(Begin::Now),
        "beginning" => Ok(Begin::Beginning),
        // Checkpoints have no colon.
        time if time.contains(':') => crate::cli::input::time(time).map(Begin::Place),
        checkpoint => Ok(Begin::Place(checkpoint.to_owned())),
    }
}

pub(in crate::cli) async fn run(session: &Session, arguments: TailArguments) -> anyhow::Result<Exit> {
    let TailArguments { kinds, events, from, no_data } = arguments;
    let subscription = session.client()?.subscribe(&kinds, &events, from);
    let end = tokio::signal::ctrl_c();
    follow(subscription, &session.output, no_data, async { end.await.context("cannot wait for Ctrl-C") }).await
}

async fn follow(
    mut subscription: Subscription,
    output: &Output,
    no_data: bool,
    end: impl Future<Output = anyhow::Result<()>>,
) -> anyhow::Result<Exit> {
    tokio::pin!(end);
    let (mut is_first, mut was_lost) = (true, false);
    loop {
        let step = tokio::select! {
            ended = &mut end => {
                ended?;
                if let Some(checkpoint) = subscription.checkpoint() {
                    output.note(format_args!("go on from here with: --from {checkpoint}"));
                }
                return Ok(Exit::Done);
            }
            step = subscription.next() => step?,
        };
        match step {
            SubscriptionStep::Message(message) => print(output, &message, no_data)?,
            SubscriptionStep::Connected if std::mem::take(&mut is_first) => {
                if output.is_terminal() {
                    output.note(format_args!("{FAINT}following; Ctrl-C ends it{FAINT:#}"));
                }
            }
            SubscriptionStep::Connected => {
                was_lost = false;
                match subscription.checkpoint() {
                    Some(_) => output.note("connected again; nothing was skipped"),
                    None => output.warn("connected again, but it is not known where the connection was cut: events may be missing, or come twice"),
                }
            }
            SubscriptionStep::Lost { error, retry_in } => {
                let wait = duration(retry_in);
                if was_lost {
                    output.note(format_args!("still no answer; trying again in {wait}"));
                } else {
                    output.warn(format_args!("{error}; connecting again in {wait}"));
                }
                was_lost = true;
            }
        }
    }
}

fn print(output: &Output, message: &SseMessage, no_data: bool) -> anyhow::Result<()> {
    if !output.is_json() {
        return Ok(output.line(told(message, no_data)?)?);
    }
    #[derive(Serialize)]
    struct Line<'a> {
        event: &'a str,
        checkpoint: &'a str,
        #[serde(flatten)]
        body: Body<'a>,
    }
    #[derive(Serialize)]
    #[serde(rename_all = "snake_case")]
    enum Body<'a> {
        Data(&'a RawValue),
        #[serde(rename = "data")]
        WithoutData(serde_json::Value),
    }
    let body = if no_data && message.event == "event" {
        let mut body: serde_json::Value = read(message)?;
        if let Some(fields) = body.as_object_mut() {
            fields.remove("data");
            fields.remove("bytes");
        }
        Body::WithoutData(body)
    } else {
        Body::Data(read(message)?)
    };
    Ok(output.json_line(&Line { event: &message.event, checkpoint: &message.id, body })?)
}

fn read<'a, T: serde::Deserialize<'a>>(message: &'a SseMessage) -> anyhow::Result<T> {
    serde_json::from_str(&message.data).context("a message of the stream is none that a node of this version sends")
}

/// A message as a line.
fn told(message: &SseMessage, no_data: bool) -> anyhow::Result<String> {
    Ok(match message.event.as_str() {
        "event" => {
            let SubscribedEvent { kind, id, event, .. } = read(message)?;
            let data = if no_data { String::new() } else { format!(" {}", event.data) };
            let (at, version) = (event.at, event.version);
            let (name, entity) = (printable(&event.name).into_owned(), format!("{kind}/{id}"));
            let (entity, data) = (printable(&entity), printable(&data));
            // A line is an event.
            let entity = entity.replace('\n', "\\n");
            format!("{FAINT}{at}{FAINT:#} {entity} {FAINT}#{version}{FAINT:#} {STRONG}{name}{STRONG:#}{data}")
        }
        "erased" => {
            let SubscribedErasure { entity, kind, receipt, .. } = read(message)?;
            let kind = kind.map(|kind| format!(" of kind {kind}")).unwrap_or_default();
            format!("{WARN}erased{WARN:#} entity {entity}{}; receipt {receipt}", printable(&kind))
        }
        "unreadable" => {
            let SubscribedDamage { shard, position, why } = read(message)?;
            format!("{BAD}unreadable{BAD:#} commit at position {position} of shard {shard}: {}", printable(&why))
        }
        other => format!("{FAINT}{}{FAINT:#} {}", printable(other), printable(&message.data)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(event: &str, data: &str) -> SseMessage {
        SseMessage { event: event.to_owned(), data: data.to_owned(), id: "c1".to_owned() }
    }

    fn text(event: &str, data: &str, no_data: bool) -> String {
        anstream::adapter::strip_str(&told(&message(event, data), no_data).unwrap()).to_string()
    }

    #[test]
    fn each_message_is_a_line() {
        let event = r#"{"kind":"account","id":"a\n1","entity":"ff","life":1,"slot":7,"seq":3,"version":2,"type":"Deposited","schema":1,"at":"2026-01-31T12:00:00Z","data":{"amount":5}}"#;
        assert_eq!(text("event", event, false), r#"2026-01-31T12:00:00Z account/a\n1 #2 Deposited {"amount":5}"#);
        assert_eq!(text("event", event, true), r#"2026-01-31T12:00:00Z account/a\n1 #2 Deposited"#);
        let erased = r#"{"entity":"ff","kind":"account","life":1,"receipt":"00"}"#;
        assert_eq!(text("erased", erased, false), "erased entity ff of kind account; receipt 00");
        let damage = r#"{"shard":1,"position":2,"why":"the log says why"}"#;
        assert_eq!(text("unreadable", damage, false), "unreadable commit at position 2 of shard 1: the log says why");
        assert_eq!(text("later", "{}", false), "later {}");
        assert!(told(&message("event", "{}"), false).is_err());
    }

    #[test]
    fn where_to_begin() {
        assert_eq!(begin("now"), Ok(Begin::Now));
        assert_eq!(begin("2026-01-31T12:00:00Z"), Ok(Begin::Place("2026-01-31T12:00:00Z".to_owned())));
        assert_eq!(begin("0a1b"), Ok(Begin::Place("0a1b".to_owned())));
        assert!(begin("12:00").is_err() && begin("").is_err());
    }
}
