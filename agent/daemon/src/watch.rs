//! Kubernetes watches: every kind's list and changes, as one stream of index events.
//!
//! A list (at the start, after 410 Gone, after a long absence of the API server) arrives object by
//! object between [`Change::ListBegins`] and [`Change::ListEnds`], so that no list is ever held as a
//! whole, and the index prunes only what a complete one lacks.
//!
//! Policies are read as they came, not through types that forget the fields they do not know. Those of
//! the cluster are custom resources, which a cluster may lack: that is said once and counts as an empty
//! list, and it is looked for them again and again.

use std::{
    fmt::Debug,
    time::{Duration, Instant},
};

use futures::StreamExt as _;
use hachi_index::{Kind, Object};
use k8s_openapi::api::{
    core::v1::{Namespace, Node, Pod, Service},
    discovery::v1::EndpointSlice,
};
use kube::{
    Api, Client, Resource, ResourceExt as _,
    api::{ApiResource, DynamicObject, ListParams},
    runtime::{
        WatchStreamExt as _,
        watcher::{self, Event},
    },
};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tracing::{debug, info, warn};

use crate::backoff::WatchBackoff;

/// Every kind that the agent watches; it is ready once each has synced.
pub(crate) const KINDS: [Kind; 9] = [
    Kind::Namespace,
    Kind::Node,
    Kind::Pod,
    Kind::Service,
    Kind::EndpointSlice,
    Kind::NetworkPolicy,
    Kind::ClusterNetworkPolicy,
    Kind::AdminNetworkPolicy,
    Kind::BaselineAdminNetworkPolicy,
];

/// What a watch saw.
pub(crate) enum Change {
    /// An object was made or changed.
    Apply(Object),
    /// An object is gone.
    Delete(Kind, String, String),
    /// A complete list of a kind begins; its objects follow as [`Self::Apply`].
    ListBegins(Kind),
    /// The list is complete.
    ListEnds(Kind),
    /// A watch is failing (`Some`) or works again (`None`).
    Health(Kind, Option<String>),
}

/// What a watch saw, and when.
pub(crate) struct Seen {
    pub(crate) at: Instant,
    pub(crate) change: Change,
}

impl Seen {
    fn now(change: Change) -> Self {
        Self {
            at: Instant::now(),
            change,
        }
    }
}

impl Change {
    /// Which kind it is about.
    pub(crate) fn kind(&self) -> Kind {
        match self {
            Self::Apply(object) => object.kind(),
            Self::Delete(kind, ..)
            | Self::ListBegins(kind)
            | Self::ListEnds(kind)
            | Self::Health(kind, _) => *kind,
        }
    }
}

/// Starts one watch a kind; they end when the receiver is dropped. Kinds that the cluster may lack are
/// looked for every `look`.
pub(crate) fn start(client: &Client, changes: &mpsc::Sender<Seen>, look: Duration) {
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
    let policies = Raw::new(client, changes, Kind::NetworkPolicy, Object::NetworkPolicy);
    tokio::spawn(policies.run(None));
    for (kind, wrap) in [
        (
            Kind::ClusterNetworkPolicy,
            Object::ClusterNetworkPolicy as fn(_) -> _,
        ),
        (Kind::AdminNetworkPolicy, Object::AdminNetworkPolicy),
        (
            Kind::BaselineAdminNetworkPolicy,
            Object::BaselineAdminNetworkPolicy,
        ),
    ] {
        tokio::spawn(Raw::new(client, changes, kind, wrap).run(Some(look)));
    }
}

fn spawn<K>(
    client: &Client,
    changes: &mpsc::Sender<Seen>,
    kind: Kind,
    wrap: impl Fn(K) -> Object + Send + 'static,
) where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
{
    let api: Api<K> = Api::all(client.clone());
    let changes = changes.clone();
    tokio::spawn(async move {
        if follow(api, &changes, kind, wrap, false).await.is_err() {
            debug!(?kind, "the agent has stopped listening; the watch ends");
        }
    });
}

/// A watch of policies as they came.
struct Raw {
    api: Api<DynamicObject>,
    changes: mpsc::Sender<Seen>,
    kind: Kind,
    wrap: fn(Box<Value>) -> Object,
}

impl Raw {
    fn new(
        client: &Client,
        changes: &mpsc::Sender<Seen>,
        kind: Kind,
        wrap: fn(Box<Value>) -> Object,
    ) -> Self {
        let (group, version, plural) = match kind {
            Kind::ClusterNetworkPolicy => (
                "policy.networking.k8s.io",
                "v1alpha2",
                "clusternetworkpolicies",
            ),
            Kind::AdminNetworkPolicy => (
                "policy.networking.k8s.io",
                "v1alpha1",
                "adminnetworkpolicies",
            ),
            Kind::BaselineAdminNetworkPolicy => (
                "policy.networking.k8s.io",
                "v1alpha1",
                "baselineadminnetworkpolicies",
            ),
            _ => ("networking.k8s.io", "v1", "networkpolicies"),
        };
        let resource = ApiResource {
            group: group.to_owned(),
            version: version.to_owned(),
            api_version: format!("{group}/{version}"),
            kind: kind.to_string(),
            plural: plural.to_owned(),
        };
        Self {
            api: Api::all_with(client.clone(), &resource),
            changes: changes.clone(),
            kind,
            wrap,
        }
    }

    /// Follows the kind until nobody listens. With `look` the cluster may lack it.
    async fn run(self, look: Option<Duration>) {
        let mut told = false;
        loop {
            match self.round(look.is_some(), &mut told).await {
                Err(_) => {
                    debug!(kind = ?self.kind, "the agent has stopped listening; the watch ends");
                    return;
                }
                Ok(()) => tokio::time::sleep(look.unwrap_or(LOOK)).await,
            }
        }
    }

    async fn round(
        &self,
        optional: bool,
        told: &mut bool,
    ) -> Result<(), mpsc::error::SendError<Seen>> {
        let kind = self.kind;
        if optional && self.is_missing().await {
            if !*told {
                *told = true;
                info!(
                    ?kind,
                    "the cluster does not have this kind of policy; it is looked for now and then"
                );
                self.changes
                    .send(Seen::now(Change::ListBegins(kind)))
                    .await?;
                self.changes.send(Seen::now(Change::ListEnds(kind))).await?;
            }
            return Ok(());
        }
        *told = false;
        let wrap = |object| (self.wrap)(Box::new(raw(object)));
        follow(self.api.clone(), &self.changes, kind, wrap, optional).await
    }

    async fn is_missing(&self) -> bool {
        let one = ListParams::default().limit(1);
        let listed = self.api.list_metadata(&one).await;
        listed.is_err_and(|error| not_found(&error))
    }
}

/// How long to wait before a list that has aged before its watch began is asked for again.
const RELIST: Duration = Duration::from_millis(100);
/// How long to wait where nothing else is asked for.
const LOOK: Duration = Duration::from_secs(30);

fn not_found(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 404)
}

/// What the index reads of a policy.
fn raw(object: DynamicObject) -> Value {
    let DynamicObject {
        metadata, mut data, ..
    } = object;
    json!({
        "metadata": {"namespace": metadata.namespace, "name": metadata.name, "uid": metadata.uid},
        "spec": data.get_mut("spec").map(Value::take),
    })
}

/// An error with what is behind it: that a server does not answer is said by the last of several.
fn whole(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let said = cause.to_string();
        // Some say what is behind them themselves.
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        next = cause.source();
    }
    text
}

/// Follows one kind until the receiver is gone, or an `optional` kind is.
async fn follow<K>(
    api: Api<K>,
    changes: &mpsc::Sender<Seen>,
    kind: Kind,
    wrap: impl Fn(K) -> Object,
    optional: bool,
) -> Result<(), mpsc::error::SendError<Seen>>
where
    K: Resource + Clone + Debug + DeserializeOwned + Send + 'static,
{
    let start = || {
        let events = watcher::watcher(api.clone(), watcher::Config::default());
        Box::pin(events.backoff(WatchBackoff::new()))
    };
    let mut stream = start();
    let mut listed = 0_usize;
    let mut failing = None::<String>;
    while let Some(event) = stream.next().await {
        let event = match event {
            Ok(event) => event,
            Err(
                watcher::Error::InitialListFailed(error)
                | watcher::Error::WatchStartFailed(error)
                | watcher::Error::WatchFailed(error),
            ) if optional && not_found(&error) => {
                if failing.is_some() {
                    changes.send(Seen::now(Change::Health(kind, None))).await?;
                }
                return Ok(());
            }
            Err(error) => {
                let why = whole(&error);
                // A server may be away for hours.
                if failing.as_ref() == Some(&why) {
                    debug!(?kind, why, "the watch fails still");
                } else {
                    warn!(?kind, why, "the watch failed; it is tried again");
                }
                failing = Some(why.clone());
                changes
                    .send(Seen::now(Change::Health(kind, Some(why))))
                    .await?;
                // The stream backs off and goes on by itself, with a relist where it must; but a watch
                // that is too old before it starts it would start at the same version for ever.
                if matches!(&error, watcher::Error::WatchStartFailed(kube::Error::Api(status)) if status.code == 410)
                {
                    tokio::time::sleep(RELIST).await;
                    stream = start();
                }
                continue;
            }
        };
        if failing.take().is_some() {
            info!(?kind, "the watch works again");
            changes.send(Seen::now(Change::Health(kind, None))).await?;
        }
        match event {
            Event::Init => {
                listed = 0;
                changes.send(Seen::now(Change::ListBegins(kind))).await?;
            }
            Event::InitApply(object) => {
                listed += 1;
                changes.send(Seen::now(Change::Apply(wrap(object)))).await?;
            }
            Event::InitDone => {
                info!(?kind, objects = listed, "listed");
                changes.send(Seen::now(Change::ListEnds(kind))).await?;
            }
            Event::Apply(object) => changes.send(Seen::now(Change::Apply(wrap(object)))).await?,
            Event::Delete(object) => {
                let namespace = object.namespace().unwrap_or_default();
                changes
                    .send(Seen::now(Change::Delete(
                        kind,
                        namespace,
                        object.name_any(),
                    )))
                    .await?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A busy API server may have forgotten the list's version when the watch begins, and says so with
    /// 410 Gone at once (HTTP status and all) instead of as the watch's first event.
    #[tokio::test]
    async fn a_watch_that_is_too_old_before_it_starts_lists_again() {
        use std::sync::{
            Arc,
            atomic::{AtomicUsize, Ordering},
        };

        let lists = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&lists);
        let server = tower::service_fn(move |request: http::Request<kube::client::Body>| {
            let watch = request
                .uri()
                .query()
                .is_some_and(|query| query.contains("watch="));
            let (code, body) = if watch {
                let gone = json!({
                    "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                    "message": "too old resource version: 1 (2)", "reason": "Expired", "code": 410,
                });
                (410, gone)
            } else {
                counted.fetch_add(1, Ordering::Relaxed);
                let list = json!({
                    "kind": "NamespaceList", "apiVersion": "v1",
                    "metadata": {"resourceVersion": "1"}, "items": [],
                });
                (200, list)
            };
            async move {
                http::Response::builder()
                    .status(code)
                    .header("content-type", "application/json")
                    .body(kube::client::Body::from(body.to_string().into_bytes()))
            }
        });
        let (changes, mut changed) = mpsc::channel(64);
        let client = Client::new(server, "default");
        spawn::<Namespace>(&client, &changes, Kind::Namespace, |o| {
            Object::Namespace(Box::new(o))
        });
        let limit = Duration::from_secs(10);
        let mut ends = 0;
        while ends < 3 {
            let change = tokio::time::timeout(limit, changed.recv()).await;
            match change
                .expect("another list")
                .expect("the watch goes on")
                .change
            {
                Change::ListEnds(Kind::Namespace) => ends += 1,
                Change::Health(_, Some(error)) => assert!(error.contains("too old"), "{error}"),
                _ => {}
            }
        }
        assert!(lists.load(Ordering::Relaxed) >= 3);
    }

    #[tokio::test]
    async fn a_failure_names_what_is_behind_it() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        // A port that was free a moment ago.
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        drop(listener);
        let config = kube::Config::new(format!("http://{address}").parse().expect("a URL"));
        let client = crate::client::build(config).expect("a client");
        let api: Api<Namespace> = Api::all(client);
        let error = api
            .list(&ListParams::default())
            .await
            .expect_err("nobody is there");
        let why = whole(&error);
        assert!(why.contains("refused"), "{why}");
    }

    #[test]
    fn a_policy_keeps_fields_that_no_type_knows() {
        let object: DynamicObject = serde_json::from_value(json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"namespace": "a", "name": "p", "managedFields": []},
            "spec": {"podSelector": {}, "ingress": [{"from": [{"unheardOf": 1}]}]},
        }))
        .expect("an object");
        let value = raw(object);
        assert_eq!(value["spec"]["ingress"][0]["from"][0]["unheardOf"], 1);
        assert_eq!(value["metadata"]["name"], "p");
    }
}
