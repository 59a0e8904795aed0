//! HTTPS: with the client, with files that are replaced, and with peers that speak something else.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};

use kuma_node::{Client, ClientOptions, Config, Server, ServerError, config::TlsFiles, tls::TlsError};
use rcgen::{CertifiedKey, generate_simple_self_signed};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// Long enough for a busy machine: nothing waits for it that goes well.
const DEADLINE: Duration = Duration::from_secs(30);

struct Files {
    dir: tempfile::TempDir,
}

impl Files {
    fn new() -> Files {
        let files = Files { dir: tempfile::tempdir().unwrap() };
        files.renew();
        files
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A new pair in place of the one that is there. Returns the certificate.
    fn renew(&self) -> String {
        let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
        let CertifiedKey { cert, signing_key } = generate_simple_self_signed(names).unwrap();
        fs::write(self.path("cert.pem"), cert.pem()).unwrap();
        fs::write(self.path("key.pem"), signing_key.serialize_pem()).unwrap();
        cert.pem()
    }

    fn config(&self) -> Config {
        let tls = TlsFiles { cert: self.path("cert.pem"), key: self.path("key.pem") };
        Config { listen: ([127, 0, 0, 1], 0).into(), tls: Some(tls), shards: Some(1), ..Config::new(self.path("data")) }
    }

    /// A client that trusts this certificate, and has no connection yet.
    fn client(&self, url: &str, trusted: &str) -> Client {
        let ca_cert = self.path("trusted.pem");
        fs::write(&ca_cert, trusted).unwrap();
        Client::new(&ClientOptions { url: url.to_owned(), token: None, ca_cert: Some(ca_cert) }).unwrap()
    }
}

fn kuma(url: &str, ca_cert: Option<&Path>, verb: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kuma-node"));
    command.args(verb).args(["--url", url]);
    if let Some(path) = ca_cert {
        command.arg("--ca-cert").arg(path);
    }
    command.env_remove("KUMA_URL").env_remove("KUMA_TOKEN").output().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_trusts_the_certificate_is_served() {
    let files = Files::new();
    let server = Server::start(files.config()).await.unwrap();
    let url = server.url();
    assert!(url.starts_with("https://"));
    let cert = files.path("cert.pem");
    let appended = kuma(&url, Some(&cert), &["entity", "append", "account", "a", "Deposited", "{\"amount\":1}"]);
    assert!(appended.status.success(), "{appended:?}");
    assert_eq!(String::from_utf8(appended.stdout).unwrap(), "appended: version 1\n");
    let by_name = url.replace("127.0.0.1", "localhost");
    assert!(kuma(&by_name, Some(&cert), &["status"]).status.success());
    // Nobody has to trust it.
    let refused = kuma(&url, None, &["status"]);
    assert_eq!(refused.status.code(), Some(3), "{refused:?}");
    assert!(refused.stdout.is_empty() && String::from_utf8(refused.stderr).unwrap().contains("certificate"));

    // Another test may have chosen it.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let trusted = reqwest::Certificate::from_pem(&fs::read(&cert).unwrap()).unwrap();
    let http = reqwest::Client::builder().no_proxy().tls_certs_only([trusted]).build().unwrap();
    let response = http.get(format!("{url}/v1/entities/account/a")).send().await.unwrap();
    assert_eq!(response.version(), reqwest::Version::HTTP_2);
    assert_eq!(response.json::<serde_json::Value>().await.unwrap()["state"]["amount"], 1);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_http_gets_no_answer_and_does_no_harm() {
    let files = Files::new();
    let server = Server::start(files.config()).await.unwrap();
    let plain = server.url().replace("https:", "http:");
    let client = Client::new(&ClientOptions { url: plain.clone(), ..ClientOptions::default() }).unwrap();
    tokio::time::timeout(DEADLINE, client.status()).await.unwrap().unwrap_err();
    assert_eq!(kuma(&plain, None, &["status"]).status.code(), Some(3));
    for spoken in
        [&b"GET /v1/status HTTP/1.1\r\nhost: localhost\r\n\r\n"[..], b"\0\0\0\0", b"\x16\x03\x01\xff\xff", b""]
    {
        let mut stream = TcpStream::connect(server.address()).await.unwrap();
        stream.write_all(spoken).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = Vec::new();
        // Cut off or closed: both will do.
        let _ = tokio::time::timeout(DEADLINE, stream.read_to_end(&mut answer)).await.unwrap();
        // An alert of TLS at the most.
        assert!(answer.first().is_none_or(|first| *first == 0x15), "{:?}", String::from_utf8_lossy(&answer));
    }
    let trusted = fs::read_to_string(files.path("cert.pem")).unwrap();
    // Whoever says nothing holds up nobody.
    let _silent = TcpStream::connect(server.address()).await.unwrap();
    files.client(&server.url(), &trusted).status().await.unwrap();
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn new_connections_use_the_certificate_that_was_read_again() {
    let files = Files::new();
    let server = Server::start(files.config()).await.unwrap();
    let url = server.url();
    let old = fs::read_to_string(files.path("cert.pem")).unwrap();
    let connected = files.client(&url, &old);
    connected.status().await.unwrap();
    let new = files.renew();
    server.reload().await.unwrap();
    files.client(&url, &new).status().await.unwrap();
    files.client(&url, &old).status().await.unwrap_err();
    connected.status().await.unwrap();
    // Half of it is new: what was in force stays.
    let key = fs::read(files.path("key.pem")).unwrap();
    files.renew();
    fs::write(files.path("key.pem"), &key).unwrap();
    let error = server.reload().await.unwrap_err();
    assert!(matches!(error, ServerError::Tls(TlsError::Mismatch { .. })), "{error:?}");
    files.client(&url, &new).status().await.unwrap();
    server.stop().await;
}

#[tokio::test]
async fn a_key_of_another_certificate_is_refused_with_a_sentence() {
    let files = Files::new();
    let key = fs::read(files.path("key.pem")).unwrap();
    files.renew();
    fs::write(files.path("key.pem"), &key).unwrap();
    let config = files.config();
    let error = Server::start(config).await.map(|_| ()).unwrap_err();
    assert!(matches!(error, ServerError::Tls(TlsError::Mismatch { .. })), "{error:?}");
    let path = |name: &str| files.path(name).display().to_string();
    let started = Command::new(env!("CARGO_BIN_EXE_kuma-node"))
        .args(["start", "--listen", "127.0.0.1:0", "--data", &path("data")])
        .args(["--tls-cert", &path("cert.pem"), "--tls-key", &path("key.pem")])
        .output()
        .unwrap();
    assert_eq!(started.status.code(), Some(1));
    let told = String::from_utf8(started.stderr).unwrap();
    assert!(told.contains("is not the one of the first certificate"), "{told}");
    let own = String::from_utf8(key).unwrap();
    assert!(!told.contains(own.lines().nth(1).unwrap()), "nothing of the key is in it");
    assert!(!files.path("data").exists(), "nothing was made");
}
