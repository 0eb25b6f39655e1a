//! Kubernetes watches: every kind's list and changes, as one stream of index events.
//!
//! A relist (at the start, after 410 Gone, after a long absence of the API server) arrives as one
//! [`Change::Reset`], so the index prunes only what a complete list lacks.

use std::{fmt::Debug, path::Path};

use anyhow::{Context as _, Result};
use futures::{StreamExt as _, pin_mut};
use hachi_index::{Kind, Object};
use k8s_openapi::api::{
    core::v1::{Namespace, Node, Pod, Service},
    discovery::v1::EndpointSlice,
    networking::v1::NetworkPolicy,
};
use kube::{
    Api, Client, Config, Resource, ResourceExt as _,
    config::{KubeConfigOptions, Kubeconfig},
    runtime::{
        WatchStreamExt as _,
        watcher::{self, Event},
    },
};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tracing::{debug, info, warn};

use crate::backoff::WatchBackoff;

/// Every kind that the agent watches; it is ready once each has synced.
pub(crate) const KINDS: [Kind; 6] = [
    Kind::Namespace,
    Kind::Node,
    Kind::Pod,
    Kind::Service,
    Kind::EndpointSlice,
    Kind::NetworkPolicy,
];

/// What a watch saw.
pub(crate) enum Change {
    /// An object was made or changed.
    Apply(Object),
    /// An object is gone.
    Delete(Kind, String, String),
    /// The complete list of a kind.
    Reset(Kind, Vec<Object>),
    /// A watch is failing (`Some`) or works again (`None`).
    Health(Kind, Option<String>),
}

impl Change {
    /// Which kind it is about.
    pub(crate) fn kind(&self) -> Kind {
        match self {
            Self::Apply(object) => object.kind(),
            Self::Delete(kind, ..) | Self::Reset(kind, _) | Self::Health(kind, _) => *kind,
        }
    }
}

/// Builds the client: a kubeconfig if one is given, else the service account of the agent's Pod.
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
    Ok(Client::try_from(config)?)
}

/// Starts one watch a kind; they end when the receiver is dropped.
pub(crate) fn start(client: &Client, changes: &mpsc::Sender<Change>) {
    spawn::<Namespace>(client, changes, Kind::Namespace, |o| {
        Object::Namespace(Box::new(o))
    });
    spawn::<Node>(client, changes, Kind::Node, |o| Object::Node(Box::new(o)));
    spawn::<Pod>(client, changes, Kind::Pod, |o| Object::Pod(Box::new(o)));
    spawn::<Service>(client, changes, Kind::Service, |o| {
        Object::Service(Box::new(o))
    });
    spawn::<EndpointSlice>(client, changes, Kind::EndpointSlice, |o| {
        Object::EndpointSlice(Box::new(o))
    });
    spawn::<NetworkPolicy>(client, changes, Kind::NetworkPolicy, |o| {
        Object::NetworkPolicy(Box::new(o))
    });
}

fn spawn<K>(
    client: &Client,
    changes: &mpsc::Sender<Change>,
    kind: Kind,
    wrap: impl Fn(K) -> Object + Send + 'static,
) where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
{
    let api: Api<K> = Api::all(client.clone());
    let changes = changes.clone();
    tokio::spawn(async move {
        if follow(api, &changes, kind, wrap).await.is_err() {
            debug!(?kind, "the agent has stopped listening; the watch ends");
        }
    });
}

/// Follows one kind until the receiver is gone.
async fn follow<K>(
    api: Api<K>,
    changes: &mpsc::Sender<Change>,
    kind: Kind,
    wrap: impl Fn(K) -> Object,
) -> Result<(), mpsc::error::SendError<Change>>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
{
    let stream = watcher::watcher(api, watcher::Config::default()).backoff(WatchBackoff::new());
    pin_mut!(stream);
    let mut list = Vec::new();
    let mut failing = false;
    while let Some(event) = stream.next().await {
        let event = match event {
            Ok(event) => event,
            Err(error) => {
                // The stream backs off and goes on by itself, with a relist where it must.
                warn!(?kind, %error, "the watch failed; it is tried again");
                failing = true;
                changes
                    .send(Change::Health(kind, Some(error.to_string())))
                    .await?;
                continue;
            }
        };
        if failing {
            failing = false;
            changes.send(Change::Health(kind, None)).await?;
        }
        match event {
            Event::Init => list.clear(),
            Event::InitApply(object) => list.push(wrap(object)),
            Event::InitDone => {
                info!(?kind, objects = list.len(), "listed");
                changes
                    .send(Change::Reset(kind, std::mem::take(&mut list)))
                    .await?;
            }
            Event::Apply(object) => changes.send(Change::Apply(wrap(object))).await?,
            Event::Delete(object) => {
                let namespace = object.namespace().unwrap_or_default();
                changes
                    .send(Change::Delete(kind, namespace, object.name_any()))
                    .await?;
            }
        }
    }
    Ok(())
}
