//! The health endpoints that load balancers and monitors know from kube-proxy.
//!
//! | where | what |
//! |---|---|
//! | `:10256/healthz` | 200 while Services are served and the node is to stay, else 503 |
//! | `:10256/livez` | 200 while Services are served, else 503 |
//! | `:<healthCheckNodePort>` | 200 if the Service has ready endpoints on this node, else 503 |
//!
//! Load balancers in front of `externalTrafficPolicy: Local` ask the last, all others the first
//! (KEP-3836). The main task tells a [`State`] after every change; a task here opens and closes the
//! ports, and tries those again that another program has.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use hachi_compile::HealthChecks;
use http_body_util::Full;
use hyper::{Response, StatusCode, body::Bytes, header::HeaderValue, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use k8s_openapi::jiff::Timestamp;
use serde_json::json;
use tokio::{net::TcpListener, sync::watch, task::JoinHandle};
use tracing::{debug, info, warn};

/// How long a client may take to ask.
const PATIENCE: Duration = Duration::from_secs(5);
/// After how long a port that another program had is tried again.
const RETRY: Duration = Duration::from_secs(5);
/// Without a word of the main task for so long, Services do not count as served.
const SILENCE: Duration = Duration::from_secs(60);

/// What is answered.
#[derive(Clone, Debug)]
pub(crate) struct State {
    /// Whether the kernel holds what the API says.
    pub(crate) served: bool,
    /// Whether the node is not about to go.
    pub(crate) eligible: bool,
    /// When the main task last said so.
    pub(crate) seen: Instant,
    /// The same, for people.
    pub(crate) seen_at: SystemTime,
    /// By port, the Service and its ready endpoints on this node.
    pub(crate) checks: HealthChecks,
}

impl State {
    /// Nothing is known yet.
    pub(crate) fn starting() -> Self {
        Self {
            served: false,
            eligible: true,
            seen: Instant::now(),
            seen_at: SystemTime::now(),
            checks: HealthChecks::new(),
        }
    }

    /// What holds now. `leaving`: the node is about to go.
    pub(crate) fn of(checks: HealthChecks, leaving: bool, served: bool) -> Self {
        Self {
            served,
            eligible: !leaving,
            checks,
            ..Self::starting()
        }
    }

    fn is_served(&self) -> bool {
        self.served && self.seen.elapsed() < SILENCE
    }
}

/// What the ports are told, and what became of them.
#[derive(Debug)]
pub(crate) struct Health {
    state: watch::Sender<State>,
    problems: Arc<Mutex<BTreeMap<u16, String>>>,
}

impl Health {
    /// Starts to serve. `port`: that of `/healthz` and `/livez`, 0 for none.
    pub(crate) fn start(port: u16) -> Self {
        let (state, told) = watch::channel(State::starting());
        let problems = Arc::new(Mutex::new(BTreeMap::new()));
        let keeper = Keeper {
            port,
            told,
            problems: Arc::clone(&problems),
            open: BTreeMap::new(),
        };
        tokio::spawn(keeper.run());
        Self { state, problems }
    }

    /// Tells what holds now.
    pub(crate) fn tell(&self, state: State) {
        self.state.send_replace(state);
    }

    /// Ports that could not be opened, each with the reason and what to do.
    pub(crate) fn problems(&self) -> Vec<String> {
        self.problems
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .cloned()
            .collect()
    }
}

struct Keeper {
    port: u16,
    told: watch::Receiver<State>,
    problems: Arc<Mutex<BTreeMap<u16, String>>>,
    open: BTreeMap<u16, JoinHandle<()>>,
}

impl Keeper {
    /// Opens and closes ports until the main task is gone.
    async fn run(mut self) {
        loop {
            self.adjust().await;
            let failed = !self
                .problems
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .is_empty();
            let told = if failed {
                match tokio::time::timeout(RETRY, self.told.changed()).await {
                    Ok(told) => told,
                    Err(_) => continue,
                }
            } else {
                self.told.changed().await
            };
            if told.is_err() {
                break;
            }
        }
        for task in self.open.into_values() {
            task.abort();
        }
    }

    async fn adjust(&mut self) {
        let wanted: Vec<(u16, String)> = {
            let state = self.told.borrow_and_update();
            let checks = state
                .checks
                .iter()
                .map(|(port, (name, _))| (*port, format!("healthCheckNodePort of Service {name}")));
            let own = (self.port != 0).then(|| (self.port, "--healthz-port".to_owned()));
            checks.chain(own).collect()
        };
        let is_wanted = |port: &u16| wanted.iter().any(|(other, _)| other == port);
        self.open.retain(|port, task| {
            let stays = is_wanted(port);
            if !stays {
                // The listener is closed with its task; connections under way are served.
                task.abort();
            }
            stays
        });
        let mut problems = BTreeMap::new();
        for (port, what) in wanted {
            if self.open.contains_key(&port) {
                continue;
            }
            match listen(port).await {
                Ok(listener) => {
                    info!(port, what, "serving health");
                    let task = tokio::spawn(serve(listener, port == self.port, self.told.clone()));
                    self.open.insert(port, task);
                }
                Err(error) => {
                    problems.insert(
                        port,
                        format!(
                            "port {port} ({what}) cannot be opened: {error}; load balancers will not \
                             find this node; end the program that has the port"
                        ),
                    );
                }
            }
        }
        let mut shown = self.problems.lock().unwrap_or_else(PoisonError::into_inner);
        for (port, problem) in &problems {
            if !shown.contains_key(port) {
                warn!("{problem}");
            }
        }
        *shown = problems;
    }
}

/// On all addresses of both families, or of IPv4 where there is no IPv6.
async fn listen(port: u16) -> io::Result<TcpListener> {
    match TcpListener::bind(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))).await {
        Err(error) if error.kind() != io::ErrorKind::AddrInUse => {
            TcpListener::bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port))).await
        }
        bound => bound,
    }
}

async fn serve(listener: TcpListener, own: bool, told: watch::Receiver<State>) {
    let port = listener.local_addr().map_or(0, |address| address.port());
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                warn!(%error, port, "cannot accept");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let told = told.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request: hyper::Request<_>| {
                let path = request.uri().path();
                let state = told.borrow();
                let answer = if own {
                    node(&state, path)
                } else {
                    check(&state, port)
                };
                async move { Ok::<_, Infallible>(answer) }
            });
            let served = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(PATIENCE)
                .serve_connection(TokioIo::new(stream), service)
                .await;
            if let Err(error) = served {
                debug!(%error, "connection ended");
            }
        });
    }
}

/// `/healthz` and `/livez`.
fn node(state: &State, path: &str) -> Response<Full<Bytes>> {
    let healthy = match path {
        "/healthz" => state.is_served() && state.eligible,
        "/livez" => state.is_served(),
        _ => return response(StatusCode::NOT_FOUND, "healthz or livez\n".into()),
    };
    let time = |at: SystemTime| {
        Timestamp::try_from(at).map_or_else(|_| String::new(), |time| time.to_string())
    };
    let now = SystemTime::now();
    // While all is well there is nothing newer than now.
    let updated = if state.is_served() {
        now
    } else {
        state.seen_at
    };
    let body = json!({
        "lastUpdated": time(updated),
        "currentTime": time(now),
        "nodeEligible": state.eligible,
    });
    response(code(healthy), body.to_string())
}

/// A Service's health check.
fn check(state: &State, port: u16) -> Response<Full<Bytes>> {
    let Some((name, endpoints)) = state.checks.get(&port) else {
        return response(
            StatusCode::SERVICE_UNAVAILABLE,
            "no Service has this port any more\n".into(),
        );
    };
    let served = state.is_served();
    let body = json!({
        "service": {"namespace": &*name.namespace, "name": &*name.name},
        "localEndpoints": endpoints,
        "serviceProxyHealthy": served,
    });
    let mut response = response(code(served && *endpoints > 0), body.to_string());
    response.headers_mut().insert(
        "x-load-balancing-endpoint-weight",
        HeaderValue::from(*endpoints),
    );
    response
}

fn code(healthy: bool) -> StatusCode {
    if healthy {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    }
}

fn response(code: StatusCode, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = code;
    let headers = response.headers_mut();
    headers.insert(
        hyper::header::CONTENT_TYPE,
        HeaderValue::from_static("application/json"),
    );
    headers.insert(
        hyper::header::X_CONTENT_TYPE_OPTIONS,
        HeaderValue::from_static("nosniff"),
    );
    response
}

#[cfg(test)]
mod tests {
    use hachi_index::Name;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    fn state(served: bool, eligible: bool, checks: &[(u16, u32)]) -> State {
        let checks = checks
            .iter()
            .map(|(port, endpoints)| (*port, (Name::new("a", "web"), *endpoints)));
        State {
            served,
            eligible,
            checks: checks.collect(),
            ..State::starting()
        }
    }

    async fn get(port: u16, path: &str) -> io::Result<String> {
        let mut stream = tokio::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok(answer)
    }

    /// A port that was free a moment ago.
    async fn free_port() -> u16 {
        let listener = listen(0).await.unwrap();
        listener.local_addr().unwrap().port()
    }

    async fn answers(port: u16, path: &str, wanted: &[&str]) -> String {
        let mut last = String::new();
        for _ in 0..200 {
            last = match get(port, path).await {
                Ok(answer) => answer,
                Err(error) => error.to_string(),
            };
            if wanted.iter().all(|part| last.contains(part)) {
                return last;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{path} on {port}: {wanted:?} is not in {last}");
    }

    #[tokio::test]
    async fn a_service_is_healthy_with_ready_endpoints_here() {
        let (port, own) = (free_port().await, free_port().await);
        let health = Health::start(own);
        health.tell(state(true, true, &[(port, 2)]));
        let answer = answers(port, "/", &["200 OK", "\"localEndpoints\":2"]).await;
        assert!(
            answer.contains("x-load-balancing-endpoint-weight: 2"),
            "{answer}"
        );
        assert!(answer.contains("\"namespace\":\"a\""), "{answer}");
        health.tell(state(true, true, &[(port, 0)]));
        answers(port, "/", &["503", "\"localEndpoints\":0"]).await;
        health.tell(state(false, true, &[(port, 1)]));
        answers(port, "/", &["503", "\"serviceProxyHealthy\":false"]).await;
        health.tell(state(true, true, &[]));
        answers(port, "/", &["refused"]).await;
    }

    #[tokio::test]
    async fn a_node_that_leaves_is_alive_but_not_healthy() {
        let port = free_port().await;
        let health = Health::start(port);
        answers(port, "/livez", &["503"]).await;
        health.tell(state(true, true, &[]));
        answers(port, "/healthz", &["200 OK", "\"nodeEligible\":true"]).await;
        health.tell(state(true, false, &[]));
        answers(port, "/healthz", &["503", "\"nodeEligible\":false"]).await;
        answers(port, "/livez", &["200 OK"]).await;
        answers(port, "/", &["404"]).await;
    }

    #[tokio::test]
    async fn a_port_that_is_taken_is_a_problem() {
        let taken = listen(0).await.unwrap();
        let port = taken.local_addr().unwrap().port();
        let health = Health::start(0);
        health.tell(state(true, true, &[(port, 1)]));
        for _ in 0..200 {
            if !health.problems().is_empty() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let problems = health.problems();
        assert!(
            problems.len() == 1
                && problems[0].contains(&port.to_string())
                && problems[0].contains("a/web"),
            "{problems:?}"
        );
        drop(taken);
        // Any word is a reason to try again.
        health.tell(state(true, true, &[(port, 1)]));
        answers(port, "/", &["200 OK"]).await;
        assert!(health.problems().is_empty());
    }

    #[test]
    fn silence_is_not_health() {
        let mut state = state(true, true, &[]);
        assert!(state.is_served());
        if let Some(past) = Instant::now().checked_sub(SILENCE) {
            state.seen = past;
            assert!(!state.is_served());
        }
    }
}
