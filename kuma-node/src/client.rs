//! A client of a node: what the command line speaks with, typed as `wire` has it.
//!
//! Invariants:
//! - Nothing is asked twice by itself, but for an append with its key and a subscription with its checkpoint, which are the same then.
//! - A token goes to the node that was named and nowhere else: redirects are not followed.
//! - Every answer that is read whole has a deadline; a stream ends when the node is gone.

mod backoff;
mod download;
mod error;
mod lines;
mod path;
mod sse;
mod subscription;
mod work;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use reqwest::{
    Body, Method, Response, StatusCode, Url,
    header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::value::RawValue;

pub(crate) use self::backoff::{Backoff, chance};
use self::path::{query, segment};
pub use self::{
    download::Download,
    error::ClientError,
    sse::SseMessage,
    subscription::{Begin, Subscription, SubscriptionStep},
    work::Work,
};
use crate::wire::{
    AnswerBody, Appended, AuditPage, BackupProgressBody, BackupReportBody, ClusterHealthBody, DiffBody, DrainBody,
    DrainedBody, EntityState, EventsPage, ForgetBody, HealthBody, ImportProgressBody, ImportReportBody, LifeBody,
    MembersBody, MigrateBody, MigratedBody, MovesBody, PlanBody, Problem, ProjectionBody, ProjectionsBody, QueryBody,
    ReasonBody, ReceiptVerificationBody, RestoreToBody, SkippedBody, SlotsBody, StatusBody, VerificationBody,
    VerifyProgressBody,
};

/// Until a connection stands.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Until an answer that is read whole has come: longer than the time that a node gives itself by default.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(90);
/// After so long without a byte the system asks whether the node is still there, and again, up to [`KEEPALIVE_RETRIES`] times.
const KEEPALIVE: Duration = Duration::from_secs(15);
const KEEPALIVE_RETRIES: u32 = 4;
/// How much is read of what tells why something failed.
const PROBLEM_BYTES_MAX: usize = 64 << 10;
/// How often an append is sent at most.
const APPEND_TRIES: u32 = 6;

/// Which node, and how it is spoken to.
#[derive(Clone, Default)]
pub struct ClientOptions {
    /// Where it is: `http://127.0.0.1:4870`, say. A path is what the node's own paths stand behind.
    pub url: String,
    /// Says who asks.
    pub token: Option<String>,
    /// The certificates that the node's has to lead to, PEM, instead of the system's.
    pub ca_cert: Option<PathBuf>,
}

/// A client of a node. Clones share connections.
#[derive(Clone, Debug)]
pub struct Client {
    http: reqwest::Client,
    /// Without a slash at its end.
    base: String,
    token: Option<HeaderValue>,
}

/// Which version of an entity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum At {
    /// The newest.
    Now,
    /// Its first so many events.
    Version(u64),
    /// As it was at a time, RFC 3339.
    Time(String),
}

/// Which events of an entity.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct History {
    /// The first version.
    pub from: Option<u64>,
    /// The last version.
    pub to: Option<u64>,
    /// At most so many; 1 to 1000.
    pub limit: Option<u64>,
    /// The newest first.
    pub is_reversed: bool,
}

/// An event that is to be appended. Its data is sent as it stands: a number with too many digits is for the node to refuse, not to be rounded here.
#[derive(Clone, Debug, Serialize)]
pub struct NewEvent {
    /// What happened.
    #[serde(rename = "type")]
    pub name: String,
    /// Its data.
    pub data: Box<RawValue>,
    /// The version of the data's shape.
    pub schema: u32,
}

/// What can be done with a projection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProjectionAction {
    /// Builds its model anew, beside the one that is served.
    Rebuild,
    /// Applies no more events.
    Pause,
    /// Goes on.
    Resume,
    /// Tries the event again at which it failed.
    Retry,
    /// Passes over that event.
    Skip,
    /// Serves the model that was served before.
    Rollback,
}

impl ProjectionAction {
    fn as_str(self) -> &'static str {
        match self {
            ProjectionAction::Rebuild => "rebuild",
            ProjectionAction::Pause => "pause",
            ProjectionAction::Resume => "resume",
            ProjectionAction::Retry => "retry",
            ProjectionAction::Skip => "skip",
            ProjectionAction::Rollback => "rollback",
        }
    }
}

/// Which slots; all of them by default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Slots {
    /// This one.
    pub slot: Option<u16>,
    /// The one of this tag.
    pub tag: Option<String>,
    /// Those of this node.
    pub owner: Option<String>,
    /// Those that are not where they should be.
    pub is_misplaced: bool,
}

/// What a request carries.
enum Content {
    Nothing,
    Json(Vec<u8>),
    Lines(Body),
}

impl Content {
    fn json(value: &(impl Serialize + ?Sized)) -> Result<Self, ClientError> {
        let json = serde_json::to_vec(value);
        json.map(Content::Json)
            .map_err(|error| ClientError::Settings(format!("the request cannot be written: {error}")))
    }
}

impl Client {
    /// A client. It connects when something is asked.
    ///
    /// # Errors
    /// [`ClientError::Settings`] and [`ClientError::File`], if something in the options cannot be used.
    pub fn new(options: &ClientOptions) -> Result<Self, ClientError> {
        // Whoever was first is right: the process has one.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let url = Url::parse(&options.url).map_err(|error| {
            ClientError::Settings(format!(
                "the node's address is no URL ({error}); it looks like http://127.0.0.1:4870"
            ))
        })?;
        if !matches!(url.scheme(), "http" | "https") || url.query().is_some() || url.fragment().is_some() {
            return Err(ClientError::Settings(
                "the node's address begins with http:// or https:// and ends with the host, port or path".to_owned(),
            ));
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(ClientError::Settings(
                "the node's address has no name or password in it; give a token".to_owned(),
            ));
        }
        let mut http = reqwest::Client::builder()
            .user_agent(concat!("kuma-node/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_keepalive(KEEPALIVE)
            .tcp_keepalive_interval(KEEPALIVE)
            .tcp_keepalive_retries(KEEPALIVE_RETRIES);
        if is_loopback(&url) {
            // A proxy is another machine, whose loopback address is its own.
            http = http.no_proxy();
        }
        http = match &options.ca_cert {
            Some(path) => http.tls_certs_only(certificates(path)?),
            // A small container has no certificates, and needs none for this.
            None if url.scheme() == "http" => http.tls_certs_only([]),
            None => http,
        };
        let http = http.build().map_err(|error| {
            let why = error::full(&error.without_url());
            ClientError::Settings(format!("TLS cannot be set up: {why}; name the certificates to trust by --ca-cert"))
        })?;
        let token = options.token.as_deref().map(bearer).transpose()?;
        Ok(Client { http, base: url.as_str().trim_end_matches('/').to_owned(), token })
    }

    /// The connections, with the token on each request.
    pub(crate) fn http(&self) -> (reqwest::Client, Option<HeaderValue>) {
        (self.http.clone(), self.token.clone())
    }

    /// Whether requests carry a token.
    pub fn has_token(&self) -> bool {
        self.token.is_some()
    }

    /// Where the node is.
    pub fn url(&self) -> &str {
        &self.base
    }

    /// Whether it takes requests, and why not. Needs no token.
    ///
    /// # Errors
    /// See [`ClientError`]; that it takes none is an answer.
    pub async fn ready(&self) -> Result<(bool, HealthBody), ClientError> {
        let request = self.request(Method::GET, "/health/ready").timeout(ANSWER_TIMEOUT);
        let response = request.send().await.map_err(|error| self.error(error))?;
        let status = response.status();
        if !status.is_success() && status != StatusCode::SERVICE_UNAVAILABLE {
            return Err(self.problem(response).await);
        }
        Ok((status.is_success(), self.read(response).await?))
    }

    /// The node as it is now.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn status(&self) -> Result<StatusBody, ClientError> {
        self.get("/v1/status").await
    }

    /// An entity at some version.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn entity(&self, kind: &str, id: &str, at: &At) -> Result<EntityState, ClientError> {
        let query = match at {
            At::Now => String::new(),
            At::Version(version) => query([("version", version.to_string())]),
            At::Time(time) => query([("at", time.clone())]),
        };
        self.get(&entity_path(kind, id, &query)?).await
    }

    /// A page of an entity's events.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn events(&self, kind: &str, id: &str, which: &History) -> Result<EventsPage, ClientError> {
        let order = which.is_reversed.then(|| ("order", "desc".to_owned()));
        let numbers = [("from", which.from), ("to", which.to), ("limit", which.limit)];
        let numbers = numbers.into_iter().filter_map(|(name, value)| Some((name, value?.to_string())));
        self.get(&entity_path(kind, id, &format!("/events{}", query(numbers.chain(order))))?).await
    }

    /// What differs between two versions of an entity.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn diff(&self, kind: &str, id: &str, from: u64, to: u64) -> Result<DiffBody, ClientError> {
        let query = query([("from", from.to_string()), ("to", to.to_string())]);
        self.get(&entity_path(kind, id, &format!("/diff{query}"))?).await
    }

    /// Appends events as one, under an idempotency key. What can be sent again is sent again with the same key, a few times; `failed` is told before.
    ///
    /// # Errors
    /// See [`ClientError`]. With the same key it can be sent once more, and happens once.
    pub async fn append(
        &self,
        kind: &str,
        id: &str,
        events: &[NewEvent],
        expected_version: Option<u64>,
        key: &str,
        mut failed: impl FnMut(&ClientError, Duration),
    ) -> Result<Appended, ClientError> {
        #[derive(Serialize)]
        struct Append<'a> {
            events: &'a [NewEvent],
            #[serde(skip_serializing_if = "Option::is_none")]
            expected_version: Option<u64>,
        }
        let path = entity_path(kind, id, "/events")?;
        let key = header("the idempotency key", key)?;
        let body = serde_json::to_vec(&Append { events, expected_version })
            .map_err(|error| ClientError::Settings(format!("the request cannot be written: {error}")))?;
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(10));
        loop {
            let request = self.request(Method::POST, &path).header(IDEMPOTENCY_KEY, key.clone());
            let request = with(request, Content::Json(body.clone())).timeout(ANSWER_TIMEOUT);
            let error = match self.answer(request).await {
                Ok(response) => match self.read(response).await {
                    Ok(appended) => return Ok(appended),
                    Err(error) => error,
                },
                Err(error) => error,
            };
            if !error.is_retry_safe() || backoff.failures() + 1 >= APPEND_TRIES {
                return Err(error);
            }
            let wait = backoff.wait(error.retry_after(), chance());
            failed(&error, wait);
            tokio::time::sleep(wait).await;
        }
    }

    /// The history of an entity as lines; with `archive`, everything that is held of it.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn export(&self, kind: &str, id: &str, archive: bool) -> Result<Download, ClientError> {
        let query = query(archive.then(|| ("archive", "true".to_owned())));
        self.download(&entity_path(kind, id, &format!("/export{query}"))?).await
    }

    /// The history of every entity as lines.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn export_all(&self) -> Result<Download, ClientError> {
        self.download("/v1/export").await
    }

    /// Erases an entity, or only this life of it, and returns the receipt. Asked again, it is the same one.
    ///
    /// # Errors
    /// See [`ClientError`]. `erasure_unfinished`: it goes on by itself; ask again for the receipt.
    pub async fn erase(
        &self,
        kind: &str,
        id: &str,
        life: Option<u32>,
        reason: &ReasonBody,
    ) -> Result<Box<RawValue>, ClientError> {
        let by = reason.by.clone().map(|by| ("by", by));
        let life = life.map(|life| ("life", life.to_string()));
        let query = query([("reason", reason.reason.clone())].into_iter().chain(by).chain(life));
        self.call(Method::DELETE, &entity_path(kind, id, &query)?, Content::Nothing).await
    }

    /// Begins a new life of an erased entity.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn recreate(&self, kind: &str, id: &str, reason: &ReasonBody) -> Result<LifeBody, ClientError> {
        self.call(Method::POST, &entity_path(kind, id, "/recreate")?, Content::json(reason)?).await
    }

    /// Restores an entity to an earlier version as a new life. What came after it is erased.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn restore_to(&self, kind: &str, id: &str, to: &RestoreToBody) -> Result<LifeBody, ClientError> {
        self.call(Method::POST, &entity_path(kind, id, "/restore-to")?, Content::json(to)?).await
    }

    /// The receipt of an erasure, as the node wrote it.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn receipt(&self, id: &str) -> Result<Box<RawValue>, ClientError> {
        self.get(&format!("/v1/receipts/{}", segment(id)?)).await
    }

    /// Looks again at what a receipt is about.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn verify_receipt(&self, receipt: &RawValue) -> Result<ReceiptVerificationBody, ClientError> {
        // It reads the live files, which takes as long as it takes.
        let request = with(self.request(Method::POST, "/v1/receipts/verify"), Content::json(receipt)?);
        let response = self.answer(request).await?;
        self.read(response).await
    }

    /// All projections.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn projections(&self) -> Result<ProjectionsBody, ClientError> {
        self.get("/v1/projections").await
    }

    /// A projection.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn projection(&self, name: &str) -> Result<ProjectionBody, ClientError> {
        self.get(&projection_path(name, "")?).await
    }

    /// Events that a projection was told to skip.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn skipped(&self, name: &str) -> Result<Vec<SkippedBody>, ClientError> {
        self.get(&projection_path(name, "/skipped")?).await
    }

    /// Asks a read model.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn query(&self, name: &str, query: &QueryBody) -> Result<AnswerBody, ClientError> {
        self.call(Method::POST, &projection_path(name, "/query")?, Content::json(query)?).await
    }

    /// Does something with a projection, and returns how it is then.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn change_projection(&self, name: &str, action: ProjectionAction) -> Result<ProjectionBody, ClientError> {
        let path = projection_path(name, &format!("/{}", action.as_str()))?;
        self.call(Method::POST, &path, Content::Nothing).await
    }

    /// Drops a projection and its models.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn drop_projection(&self, name: &str) -> Result<(), ClientError> {
        let request = self.request(Method::DELETE, &projection_path(name, "")?).timeout(ANSWER_TIMEOUT);
        self.answer(request).await.map(drop)
    }

    /// A page of the audit log.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn audit(&self, from: u64, limit: u64) -> Result<AuditPage, ClientError> {
        self.get(&format!("/v1/audit{}", query([("from", from.to_string()), ("limit", limit.to_string())]))).await
    }

    /// Has everything read and checked.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn verify(&self) -> Result<Work<VerifyProgressBody, VerificationBody>, ClientError> {
        self.work("/v1/verify", Content::Nothing).await
    }

    /// Has a backup made on the node's machine. `part` is `events`, `keys` or `ledger`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn backup(
        &self,
        name: &str,
        part: &str,
    ) -> Result<Work<BackupProgressBody, BackupReportBody>, ClientError> {
        let query = query([("part", part.to_owned())]);
        self.work(&format!("/v1/backups/{}{query}", segment(name)?), Content::Nothing).await
    }

    /// The nodes of the cluster.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn members(&self) -> Result<MembersBody, ClientError> {
        self.get("/v1/cluster/members").await
    }

    /// The slots of the cluster, those that are asked for.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn slots(&self, which: &Slots) -> Result<SlotsBody, ClientError> {
        let slot = which.slot.map(|slot| ("slot", slot.to_string()));
        let texts = [("tag", &which.tag), ("owner", &which.owner)];
        let texts = texts.into_iter().filter_map(|(name, value)| Some((name, value.clone()?)));
        let misplaced = which.is_misplaced.then(|| ("misplaced", "true".to_owned()));
        self.get(&format!("/v1/cluster/slots{}", query(slot.into_iter().chain(texts).chain(misplaced)))).await
    }

    /// Slots on their way, of all nodes that can be reached.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn moves(&self) -> Result<MovesBody, ClientError> {
        self.get("/v1/cluster/moves").await
    }

    /// What would move, or if this node were drained.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn plan(&self, without: Option<&str>) -> Result<PlanBody, ClientError> {
        let query = query(without.map(|node| ("without", node.to_owned())));
        self.get(&format!("/v1/cluster/plan{query}")).await
    }

    /// Has slots moved.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn migrate(&self, what: &MigrateBody) -> Result<MigratedBody, ClientError> {
        self.call(Method::POST, "/v1/cluster/migrate", Content::json(what)?).await
    }

    /// Has a node give all its slots away, or take some again.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn drain(&self, which: &DrainBody) -> Result<DrainedBody, ClientError> {
        self.call(Method::POST, "/v1/cluster/drain", Content::json(which)?).await
    }

    /// Takes a node out of the cluster for ever.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn forget(&self, which: &ForgetBody) -> Result<DrainedBody, ClientError> {
        self.call(Method::POST, "/v1/cluster/forget", Content::json(which)?).await
    }

    /// Whether the cluster serves every entity, as the node sees it. Needs no token.
    ///
    /// # Errors
    /// See [`ClientError`]; that it does not is an answer.
    pub async fn cluster_health(&self) -> Result<ClusterHealthBody, ClientError> {
        let request = self.request(Method::GET, "/health/cluster").timeout(ANSWER_TIMEOUT);
        let response = request.send().await.map_err(|error| self.error(error))?;
        let status = response.status();
        if !status.is_success() && status != StatusCode::SERVICE_UNAVAILABLE {
            return Err(self.problem(response).await);
        }
        self.read(response).await
    }

    /// Imports lines. Sent again under the same name, each line happens once.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn import(
        &self,
        source: &str,
        lines: Body,
    ) -> Result<Work<ImportProgressBody, ImportReportBody>, ClientError> {
        let query = query([("source", source.to_owned())]);
        self.work(&format!("/v1/import{query}"), Content::Lines(lines)).await
    }

    /// Subscribes to events of these kinds and `KIND.NAME`s; of all if there are none.
    pub fn subscribe(&self, kinds: &[String], events: &[String], from: Begin) -> Subscription {
        let kinds = kinds.iter().map(|kind| ("kind", kind.clone()));
        let events = events.iter().map(|event| ("event", event.clone()));
        Subscription::new(self.clone(), kinds.chain(events).collect(), from)
    }

    fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        let request = self.http.request(method, format!("{}{path}", self.base));
        match &self.token {
            Some(token) => request.header(AUTHORIZATION, token.clone()),
            None => request,
        }
    }

    /// Sends it; what is no success is an error.
    async fn answer(&self, request: reqwest::RequestBuilder) -> Result<Response, ClientError> {
        let response = request.send().await.map_err(|error| self.error(error))?;
        if response.status().is_success() { Ok(response) } else { Err(self.problem(response).await) }
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.call(Method::GET, path, Content::Nothing).await
    }

    async fn call<T: DeserializeOwned>(&self, method: Method, path: &str, content: Content) -> Result<T, ClientError> {
        let request = with(self.request(method, path), content).timeout(ANSWER_TIMEOUT);
        let response = self.answer(request).await?;
        self.read(response).await
    }

    async fn read<T: DeserializeOwned>(&self, response: Response) -> Result<T, ClientError> {
        let status = response.status();
        let bytes = response.bytes().await.map_err(|error| self.error(error))?;
        serde_json::from_slice(&bytes).map_err(|error| self.no_node(status, &error.to_string()))
    }

    async fn work<P, D>(&self, path: &str, content: Content) -> Result<Work<P, D>, ClientError> {
        let response = self.answer(with(self.request(Method::POST, path), content)).await?;
        Ok(Work::new(response, self.base.clone()))
    }

    async fn download(&self, path: &str) -> Result<Download, ClientError> {
        let response = self.answer(self.request(Method::GET, path)).await?;
        Ok(Download::new(response, self.base.clone()))
    }

    fn error(&self, error: reqwest::Error) -> ClientError {
        ClientError::of(error, &self.base)
    }

    /// Why an answer is no success.
    async fn problem(&self, mut response: Response) -> ClientError {
        let status = response.status();
        let mut body = Vec::new();
        let read = async {
            while body.len() < PROBLEM_BYTES_MAX
                && let Ok(Some(piece)) = response.chunk().await
            {
                body.extend_from_slice(&piece);
            }
        };
        // The status says something also when no more comes.
        let _ = tokio::time::timeout(CONNECT_TIMEOUT, read).await;
        match serde_json::from_slice::<Problem>(&body) {
            Ok(problem) => ClientError::Problem(Box::new(problem)),
            Err(_) if status.is_redirection() => {
                self.no_node(status, "it points to another address, which is not followed")
            }
            // A proxy before the node says it in its own way.
            Err(_) if matches!(status.as_u16(), 429 | 502 | 503 | 504) => ClientError::Interrupted(None),
            Err(_) => self.no_node(status, "its body is no problem document"),
        }
    }

    fn no_node(&self, status: StatusCode, why: &str) -> ClientError {
        ClientError::Unexpected(format!(
            "{} answered {status}, and not as a node of this version does ({why}); look at --url",
            self.base
        ))
    }
}

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");

fn with(request: reqwest::RequestBuilder, content: Content) -> reqwest::RequestBuilder {
    let typed = |name| HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static(name))]);
    match content {
        Content::Nothing => request,
        Content::Json(json) => request.headers(typed("application/json")).body(json),
        Content::Lines(lines) => request.headers(typed("application/x-ndjson")).body(lines),
    }
}

fn entity_path(kind: &str, id: &str, rest: &str) -> Result<String, ClientError> {
    Ok(format!("/v1/entities/{}/{}{rest}", segment(kind)?, segment(id)?))
}

fn projection_path(name: &str, rest: &str) -> Result<String, ClientError> {
    Ok(format!("/v1/projections/{}{rest}", segment(name)?))
}

fn header(what: &str, text: &str) -> Result<HeaderValue, ClientError> {
    let refuse = || ClientError::Settings(format!("{what} has characters that a header cannot have; use ASCII"));
    if !text.is_ascii() {
        return Err(refuse());
    }
    HeaderValue::from_str(text).map_err(|_| refuse())
}

fn bearer(token: &str) -> Result<HeaderValue, ClientError> {
    let mut value = header("the token", &format!("Bearer {token}"))?;
    value.set_sensitive(true);
    Ok(value)
}

fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default();
    let address = host.trim_start_matches('[').trim_end_matches(']').parse::<std::net::IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

fn certificates(path: &Path) -> Result<Vec<reqwest::Certificate>, ClientError> {
    let pem = std::fs::read(path).map_err(|source| ClientError::File { path: path.to_owned(), source })?;
    let certificates = reqwest::Certificate::from_pem_bundle(&pem).unwrap_or_default();
    if certificates.is_empty() {
        return Err(ClientError::Settings(format!("there is no certificate in {}; it has to be PEM", path.display())));
    }
    Ok(certificates)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(url: &str) -> Result<Client, ClientError> {
        Client::new(&ClientOptions { url: url.to_owned(), ..ClientOptions::default() })
    }

    #[test]
    fn an_address_is_an_http_url() {
        assert_eq!(client("http://127.0.0.1:4870/").unwrap().url(), "http://127.0.0.1:4870");
        assert_eq!(client("http://proxy/kuma/").unwrap().url(), "http://proxy/kuma");
        for url in ["127.0.0.1:4870", "ftp://x", "http://x/?a=b", "http://me:secret@x", ""] {
            assert!(matches!(client(url), Err(ClientError::Settings(_))), "{url}");
        }
    }

    #[test]
    fn a_token_is_not_seen_in_what_is_logged() {
        let options = ClientOptions { url: "http://x".to_owned(), token: Some("secret".to_owned()), ca_cert: None };
        assert!(!format!("{:?}", Client::new(&options).unwrap()).contains("secret"));
        let broken = ClientOptions { token: Some("secret\n2".to_owned()), ..options };
        assert!(!Client::new(&broken).unwrap_err().to_string().contains("secret"));
    }

    #[test]
    fn loopback_addresses_are_known() {
        for url in ["http://localhost:1", "http://127.0.0.2", "http://[::1]:4870"] {
            assert!(is_loopback(&Url::parse(url).unwrap()), "{url}");
        }
        assert!(!is_loopback(&Url::parse("http://localhost.example").unwrap()));
    }
}
