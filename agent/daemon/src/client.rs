//! The client of the API server, made for an agent that has to outlive it.
//!
//! ```text
//! request ─> address ─> retry ─> token ─> time limit ─> TLS ─> TCP with keepalive ─> API server
//! ```
//! kube's own client waits for ever for a server that has gone without a word (a machine without power, a
//! firewall that forgot the connection), a watch for five minutes; and it looks at the wall clock to tell
//! when a service account's token is to be read again, so that a clock that is set back leaves it with one
//! that has expired. Hence the limits here, and [`token`].

mod token;

use std::{path::Path, time::Duration};

use anyhow::{Context as _, Result, ensure};
use hyper::header::{HeaderValue, USER_AGENT};
use hyper_util::{
    client::legacy::{Client as Http, connect::HttpConnector},
    rt::TokioExecutor,
};
use kube::{
    Client, Config,
    client::{Body, ConfigExt as _, retry::RetryPolicy},
    config::{KubeConfigOptions, Kubeconfig},
};
use tower::{BoxError, ServiceBuilder, retry::RetryLayer, timeout::TimeoutLayer};

use token::TokenLayer;

/// How long a connection may be silent before the other side is asked whether it is there.
const SILENCE: Duration = Duration::from_secs(10);
/// How long it may take to answer that, or to acknowledge what was sent; it is asked [`ASKED`] times.
const UNANSWERED: Duration = Duration::from_secs(15);
const ASKED: u32 = 3;
/// How long the head of an answer may take. API servers give up after 60 s themselves
/// (`--request-timeout`), and say so.
const ANSWER: Duration = Duration::from_secs(75);

/// Builds the client: a kubeconfig if one is given, else the service account of the agent's Pod.
///
/// # Errors
/// If the kubeconfig, the service account or `server` is not usable. Nothing is asked of the server.
pub(crate) async fn client(kubeconfig: Option<&Path>, server: Option<&str>) -> Result<Client> {
    let mut config = match kubeconfig {
        Some(path) => {
            let file = Kubeconfig::read_from(path)
                .with_context(|| format!("cannot read the kubeconfig {}", path.display()))?;
            Config::from_custom_kubeconfig(file, &KubeConfigOptions::default())
                .await
                .with_context(|| format!("the kubeconfig {} is not usable", path.display()))?
        }
        None => Config::incluster()
            .context("no --kubeconfig given, and no service account of a Pod found")?,
    };
    if let Some(server) = server {
        config.cluster_url = server
            .parse()
            .with_context(|| format!("--api-server {server:?} is no URL"))?;
    }
    build(config)
}

/// The client of a configuration.
///
/// # Errors
/// As [`client`].
pub(crate) fn build(mut config: Config) -> Result<Client> {
    ensure!(
        config.proxy_url.is_none(),
        "the kubeconfig has a proxy-url, which is not supported: remove it, or name the API server's own \
         address with --api-server in a kubeconfig without"
    );
    let name = concat!("hachi-agent/", env!("CARGO_PKG_VERSION"));
    config
        .headers
        .push((USER_AGENT, HeaderValue::from_static(name)));
    let token = token_file(&mut config).map(TokenLayer::new).transpose()?;
    let auth = match token {
        Some(_) => None,
        None => config.auth_layer()?,
    };
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_connect_timeout(config.connect_timeout);
    tcp.set_keepalive(Some(SILENCE));
    tcp.set_keepalive_interval(Some(UNANSWERED / ASKED));
    tcp.set_keepalive_retries(Some(ASKED));
    tcp.set_tcp_user_timeout(Some(UNANSWERED));
    let tls = config.rustls_https_connector_with_connector(tcp)?;
    let http: Http<_, Body> = Http::builder(TokioExecutor::new()).build(tls);
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .layer(RetryLayer::new(RetryPolicy::server_retry()))
        .option_layer(auth)
        .option_layer(token)
        .layer(config.extra_headers_layer()?)
        .map_err(BoxError::from)
        .layer(TimeoutLayer::new(ANSWER))
        .service(http);
    Ok(Client::new(service, config.default_namespace))
}

/// Takes the file of a token out of the configuration, if nothing there comes before it.
fn token_file(config: &mut Config) -> Option<std::path::PathBuf> {
    let auth = &mut config.auth_info;
    let other = auth.auth_provider.is_some() || auth.username.is_some() || auth.token.is_some();
    if other {
        return None;
    }
    auth.token_file.take().map(Into::into)
}
