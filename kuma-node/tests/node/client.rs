//! The client keeps its promises when connections do not: against a server that answers as it is told to.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::convert::Infallible;

use crate::fake::{DEADLINE, Fake, cut_behind, json_body, open_behind, problem};
use axum::{body::Bytes, http::StatusCode, response::IntoResponse};
use futures_util::stream;
use kuma_node::{
    client::{At, Begin, Client, ClientError, ClientOptions, NewEvent, Subscription, SubscriptionStep},
    wire::{ImportProgressBody, ReasonBody, VerificationBody, VerifyProgressBody},
};
use serde_json::{json, value::RawValue};

fn client(fake: &Fake) -> Client {
    let options = ClientOptions { url: fake.url.clone(), token: Some("t0ken".to_owned()), ca_cert: None };
    Client::new(&options).unwrap()
}

fn event(data: &str) -> NewEvent {
    NewEvent { name: "Deposited".to_owned(), data: RawValue::from_string(data.to_owned()).unwrap(), schema: 1 }
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future).await.expect("it takes too long")
}

#[tokio::test]
async fn an_append_is_sent_again_with_the_same_key_until_it_is_known() {
    let fake = Fake::start(|n, _| match n {
        0 => problem(503, "overloaded", Some(1)),
        1 => cut_behind("{\"version\":"),
        _ => (StatusCode::CREATED, json_body(&json!({"version": 7, "repeated": true}))).into_response(),
    })
    .await;
    let mut failures = 0;
    let (client, events) = (client(&fake), [event("{\"amount\":123456789012345678901234567890}")]);
    let appended = client.append("account", "a", &events, Some(6), "k1", |_, _| failures += 1);
    let appended = within(appended).await.unwrap();
    assert_eq!((appended.version, appended.repeated, failures), (7, true, 2));
    let seen = fake.seen();
    assert_eq!(seen.len(), 3);
    for request in &seen {
        assert_eq!(request.header("idempotency-key"), Some("k1"));
        assert_eq!(request.header("authorization"), Some("Bearer t0ken"));
        // The number has all its digits.
        let expected = r#"{"events":[{"type":"Deposited","data":{"amount":123456789012345678901234567890},"schema":1}],"expected_version":6}"#;
        assert_eq!(request.body, expected);
    }
}

#[tokio::test]
async fn a_refused_append_is_sent_once() {
    let fake = Fake::start(|_, _| problem(412, "wrong_version", None)).await;
    let (client, events) = (client(&fake), [event("1")]);
    let error =
        client.append("account", "a", &events, None, "k1", |_, _| panic!("it is sent again")).await.unwrap_err();
    assert_eq!(error.problem().unwrap().code, "wrong_version");
    assert_eq!(fake.seen().len(), 1);
}

#[tokio::test]
async fn an_append_is_given_up_after_a_few_tries() {
    let fake = Fake::start(|_, _| problem(503, "overloaded", Some(1))).await;
    let (client, events) = (client(&fake), [event("1")]);
    let error = within(client.append("account", "a", &events, None, "k1", |_, _| ())).await.unwrap_err();
    assert!(error.is_unavailable() && error.is_retry_safe());
    assert_eq!(fake.seen().len(), 6);
}

#[tokio::test]
async fn an_id_arrives_as_it_is() {
    let fake = Fake::start(|_, _| problem(404, "never_written", None)).await;
    for id in ["a/b", "%2F", "a b?c#d&e=f", "Zürich", "a\\b;c:d@e", "...", "\u{7f}\n"] {
        client(&fake).entity("account", id, &At::Version(3)).await.unwrap_err();
        let seen = fake.seen().pop().unwrap();
        let segment = seen.path.strip_prefix("/v1/entities/account/").unwrap().strip_suffix("?version=3").unwrap();
        let uri = format!("http://x/?id={segment}").parse().unwrap();
        let axum::extract::Query(decoded) = axum::extract::Query::<Vec<(String, String)>>::try_from_uri(&uri).unwrap();
        assert_eq!(decoded, [("id".to_owned(), id.to_owned())]);
        assert!(!segment.contains('/'));
    }
    let reason = ReasonBody { reason: "r".to_owned(), by: None };
    assert!(matches!(client(&fake).erase("account", "..", None, &reason).await, Err(ClientError::Name(_))));
}

/// Its last line is what makes a work done, and an export whole.
#[tokio::test]
async fn an_answer_that_was_cut_off_is_not_taken_for_whole() {
    const PROGRESS: &str = "{\"progress\":{\"commits\":5}}\n";
    let fake = Fake::start(|n, _| match n {
        0 => cut_behind(PROGRESS),
        1 => PROGRESS.into_response(),
        2 => cut_behind("{\"kind\":\"a\"}\n"),
        _ => "{\"kind\":\"a\"}\n".into_response(),
    })
    .await;
    let client = client(&fake);
    for _ in 0..2 {
        let mut told = Vec::new();
        let ended = client.verify().await.unwrap().finish(|now: VerifyProgressBody| told.push(now.commits)).await;
        assert!(matches!(ended, Err(ClientError::Interrupted(_))), "{ended:?}");
        assert_eq!(told, [5]);
    }
    let mut cut = client.export_all().await.unwrap();
    let error = loop {
        match cut.next().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("the cut was not seen"),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, ClientError::Interrupted(_)));
    let mut short = client.export_all().await.unwrap();
    while short.next().await.unwrap().is_some() {}
    assert!(matches!(short.manifest(), Err(ClientError::Interrupted(_))));
}

#[tokio::test]
async fn a_work_tells_what_it_found_or_why_not() {
    let fake = Fake::start(|n, _| match n {
        0 => "{\"progress\":{\"commits\":1}}\n{\"done\":{\"is_clean\":false,\"entities\":1,\"commits\":2,\"events\":3,\"keys\":4,\"keys_destroyed\":5,\"damage\":[\"x\"]}}\n".into_response(),
        1 => "{\"problem\":{\"type\":\"t\",\"title\":\"t\",\"status\":503,\"code\":\"stopping\",\"detail\":\"d\",\"retry_safe\":true}}\n".into_response(),
        _ => "<html>hello</html>\n".into_response(),
    })
    .await;
    let client = client(&fake);
    let found: VerificationBody = client.verify().await.unwrap().finish(|_| ()).await.unwrap();
    assert!(!found.is_clean && found.damage == ["x"]);
    let stopped = client.verify().await.unwrap().finish(|_| ()).await.unwrap_err();
    assert!(stopped.is_unavailable() && stopped.problem().unwrap().code == "stopping");
    assert!(matches!(client.verify().await.unwrap().finish(|_| ()).await, Err(ClientError::Unexpected(_))));
}

/// A node that refuses a file early does not read the rest of it, and closes the connection. What it said must not be lost over that.
#[tokio::test]
async fn a_refusal_is_heard_while_the_file_is_still_being_sent() {
    let fake = Fake::with(false, |_, _| problem(422, "invalid_line", None)).await;
    for _ in 0..10 {
        let pieces = stream::iter((0..4096).map(|_| Ok::<_, Infallible>(Bytes::from(vec![b'\n'; 64 << 10]))));
        let sent = client(&fake).import("file", reqwest::Body::wrap_stream(pieces)).await;
        let error = sent.unwrap_err();
        assert!(error.problem().is_some_and(|problem| problem.code == "invalid_line"), "{error:?}");
    }
}

#[tokio::test]
async fn progress_is_told_while_the_file_is_still_being_sent() {
    let fake = Fake::with(false, |_, _| {
        open_behind("{\"progress\":{\"lines\":1,\"bytes\":2,\"commits\":3,\"events\":4,\"repeated\":5}}\n")
    })
    .await;
    let (told, mut heard) = tokio::sync::mpsc::unbounded_channel();
    let never_ends = stream::pending::<Result<Bytes, Infallible>>();
    let import = async {
        let work = client(&fake).import("file", reqwest::Body::wrap_stream(never_ends)).await.unwrap();
        work.finish(|now: ImportProgressBody| assert!(told.send(now.events).is_ok())).await
    };
    tokio::select! {
        ended = import => panic!("{ended:?}"),
        events = within(heard.recv()) => assert_eq!(events, Some(4)),
    }
}

async fn message(subscription: &mut Subscription) -> (String, String) {
    loop {
        if let SubscriptionStep::Message(message) = within(subscription.next()).await.unwrap() {
            return (message.data, message.id);
        }
    }
}

#[tokio::test]
async fn a_subscription_goes_on_behind_the_last_whole_message() {
    let fake = Fake::start(|n, _| match n {
        0 => cut_behind(": kuma\nid: c0\n\nid: c1\nevent: event\ndata: 1\n\nid: c2\nevent: event\nda"),
        1 => problem(503, "stopping", Some(1)),
        2 => problem(502, "bad_gateway", None),
        _ => open_behind("id: c1\n\nid: c2\nevent: event\ndata: 2\n\n"),
    })
    .await;
    let mut subscription = client(&fake).subscribe(&["a b".to_owned()], &["k.E".to_owned()], Begin::Beginning);
    assert!(matches!(subscription.next().await.unwrap(), SubscriptionStep::Connected));
    assert_eq!(message(&mut subscription).await, ("1".to_owned(), "c1".to_owned()));
    let step = within(subscription.next()).await.unwrap();
    assert!(matches!(step, SubscriptionStep::Lost { error: ClientError::Interrupted(_), .. }), "{step:?}");
    assert_eq!(subscription.checkpoint(), Some("c1"));
    assert_eq!(message(&mut subscription).await, ("2".to_owned(), "c2".to_owned()));
    let seen = fake.seen();
    assert_eq!(seen.len(), 4);
    assert_eq!(seen[0].path, "/v1/events?kind=a%20b&event=k.E&from=beginning");
    assert_eq!(seen[0].header("last-event-id"), None);
    for request in &seen[1..] {
        assert_eq!(
            (request.path.as_str(), request.header("last-event-id")),
            ("/v1/events?kind=a%20b&event=k.E", Some("c1"))
        );
        assert_eq!(request.method, "GET");
    }
}

/// Cut off before the first event, it would begin with what is new then, and miss what came in between.
#[tokio::test]
async fn a_subscription_from_now_goes_on_from_where_it_began() {
    let fake = Fake::start(|n, _| match n {
        0 => cut_behind("retry: 1000\n: kuma\nid: c0\n\n"),
        _ => open_behind("id: c1\ndata: 1\n\n"),
    })
    .await;
    let mut subscription = client(&fake).subscribe(&[], &[], Begin::Now);
    assert_eq!(message(&mut subscription).await.0, "1");
    assert_eq!(fake.seen()[0].path, "/v1/events?from=now");
    assert_eq!((fake.seen()[1].path.as_str(), fake.seen()[1].header("last-event-id")), ("/v1/events", Some("c0")));
}

#[tokio::test]
async fn a_subscription_that_is_refused_ends() {
    let fake = Fake::start(|n, _| match n {
        0 => cut_behind("id: c1\ndata: 1\n\n"),
        _ => problem(409, "invalid_checkpoint", None),
    })
    .await;
    let mut subscription = client(&fake).subscribe(&[], &[], Begin::Place("c0".to_owned()));
    assert_eq!(message(&mut subscription).await.0, "1");
    assert!(matches!(within(subscription.next()).await.unwrap(), SubscriptionStep::Lost { .. }));
    let error = within(subscription.next()).await.unwrap_err();
    assert_eq!(error.problem().unwrap().code, "invalid_checkpoint");
}

#[tokio::test]
async fn nobody_there_is_told_at_once() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let client = Client::new(&ClientOptions { url: url.clone(), ..ClientOptions::default() }).unwrap();
    let error = client.status().await.unwrap_err();
    assert!(matches!(error, ClientError::Connect { .. }) && error.is_unavailable());
    assert!(error.to_string().contains(&url));
    let error = client.subscribe(&[], &[], Begin::Now).next().await.unwrap_err();
    assert!(matches!(error, ClientError::Connect { .. }));
}

/// A token must not go to where an answer points to.
#[tokio::test]
async fn redirects_are_not_followed() {
    let fake = Fake::start(|_, _| (StatusCode::TEMPORARY_REDIRECT, [("location", "/elsewhere")]).into_response()).await;
    assert!(matches!(client(&fake).status().await, Err(ClientError::Unexpected(_))));
    assert_eq!(fake.seen().len(), 1);
}

#[tokio::test]
async fn a_node_that_is_not_ready_says_why() {
    let fake = Fake::start(|_, _| {
        let body = json!({"status": "stopping", "reasons": ["the node is shutting down"]});
        (StatusCode::SERVICE_UNAVAILABLE, json_body(&body)).into_response()
    })
    .await;
    let (is_ready, health) = client(&fake).ready().await.unwrap();
    assert!(!is_ready && health.reasons == ["the node is shutting down"]);
}

/// With a certificate that only the given file knows. HTTP/2 is agreed on by itself.
#[tokio::test]
async fn a_node_is_trusted_by_the_certificates_that_are_named() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let certified = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let (cert, key) = (certified.cert.pem(), certified.signing_key.serialize_pem());
    let config = axum_server::tls_rustls::RustlsConfig::from_pem(cert.clone().into(), key.into()).await.unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let url = format!("https://localhost:{}", listener.local_addr().unwrap().port());
    let router = axum::Router::new().fallback(|| async { json_body(&json!({"status": "ok", "reasons": []})) });
    tokio::spawn(axum_server::from_tcp_rustls(listener, config).unwrap().serve(router.into_make_service()));

    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), cert).unwrap();
    let named = ClientOptions { url, token: None, ca_cert: Some(file.path().to_owned()) };
    assert!(within(Client::new(&named).unwrap().ready()).await.unwrap().0);
    let other = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    std::fs::write(file.path(), other.cert.pem()).unwrap();
    let error = within(Client::new(&named).unwrap().ready()).await.unwrap_err();
    assert!(matches!(error, ClientError::Connect { .. }), "{error:?}");
    std::fs::write(file.path(), "no certificate").unwrap();
    assert!(matches!(Client::new(&named), Err(ClientError::Settings(_))));
}
