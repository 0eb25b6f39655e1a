//! Plain requests to the cluster's API, as whoever: what is answered, word for word.

use anyhow::{Context as _, Result};
use http_body_util::BodyExt as _;
use kube::{
    client::Body,
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::Value;
use tokio::runtime::Runtime;

use crate::cluster::Cluster;

/// A client of the API, to be used from where no runtime is.
pub struct Client {
    runtime: Runtime,
    client: kube::Client,
}

/// Whose requests they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum User {
    /// The administrator.
    Admin,
    /// The agents, which may do what the manifest grants.
    Agent,
    /// Somebody with a token that the API does not know.
    Unknown,
    /// Somebody without a token.
    Anonymous,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The HTTP status.
    pub code: u16,
    /// The texts of the `Warning` headers.
    pub warnings: Vec<String>,
    /// The body.
    pub text: String,
}

impl Answer {
    /// The body as JSON; null if it is none.
    #[must_use]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_default()
    }

    /// The body's lines as JSON: the events of a watch that has ended.
    #[must_use]
    pub fn events(&self) -> Vec<Value> {
        let lines = self.text.lines();
        lines
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect()
    }

    /// `message` of a `Status`.
    #[must_use]
    pub fn message(&self) -> String {
        self.json()["message"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    }
}

impl Client {
    /// A client of the cluster's API.
    pub fn new(cluster: &Cluster, user: User) -> Result<Self> {
        let read = |path: &std::path::Path| {
            Kubeconfig::read_from(path).with_context(|| format!("read {}", path.display()))
        };
        let mut admin = read(&cluster.kubeconfig())?;
        let token = match user {
            User::Admin | User::Anonymous => None,
            User::Agent => {
                let node = cluster.nodes().first().context("no node")?;
                let agent = read(&node.dir.join("run/kubeconfig"))?;
                let info = agent.auth_infos.into_iter().next();
                info.and_then(|info| info.auth_info?.token)
            }
            User::Unknown => Some("nobody's".to_owned().into()),
        };
        if user != User::Admin {
            for named in &mut admin.auth_infos {
                named.auth_info = Some(kube::config::AuthInfo {
                    token: token.clone(),
                    ..Default::default()
                });
            }
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("start a runtime")?;
        let client = runtime.block_on(async {
            let options = KubeConfigOptions::default();
            let config = kube::Config::from_custom_kubeconfig(admin, &options).await?;
            anyhow::Ok(kube::Client::try_from(config)?)
        })?;
        Ok(Self { runtime, client })
    }

    /// Sends a request and waits for the whole answer. `what` is a method and a path, as in
    /// `GET /api/v1/nodes`; patches are told from each other by `content_type`.
    pub fn send(&self, what: &str, content_type: &str, body: impl ToString) -> Result<Answer> {
        let (method, path) = what.split_once(' ').context("a method and a path")?;
        let request = http::Request::builder()
            .method(method)
            .uri(path)
            .header("content-type", content_type)
            .body(Body::from(body.to_string().into_bytes()))
            .context("build a request")?;
        self.runtime.block_on(async {
            let response = self.client.send(request).await.context(what.to_owned())?;
            let (parts, body) = response.into_parts();
            let warnings = parts.headers.get_all("warning").into_iter();
            let warnings = warnings.filter_map(|value| value.to_str().ok());
            let body = body.collect().await.context("read the answer")?.to_bytes();
            Ok(Answer {
                code: parts.status.as_u16(),
                warnings: warnings.map(str::to_owned).collect(),
                text: String::from_utf8_lossy(&body).into_owned(),
            })
        })
    }

    /// [`Client::send`] without a body.
    pub fn ask(&self, what: &str) -> Result<Answer> {
        self.send(what, "application/json", "")
    }

    /// [`Client::send`] of a JSON body.
    pub fn json(&self, what: &str, body: &Value) -> Result<Answer> {
        self.send(what, "application/json", body)
    }
}
