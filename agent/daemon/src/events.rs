//! Events of the API: what the agent cannot honour, told where `kubectl describe` shows it.
//!
//! Telling never blocks and never fails: a message that finds the queue full is dropped, it is in the
//! log and in `hachi status` anyway. Every node tells of what it sees, so an Event has the node in its
//! name; telling the same again raises its count. At most one request goes out every [`PACE`].

use std::{
    collections::HashMap,
    hash::{BuildHasher as _, BuildHasherDefault, DefaultHasher},
    time::{Duration, Instant},
};

use hachi_api::PodRef;
use hachi_compile::{Claimant, Claimed, Problem as CompileProblem};
use hachi_index::{Kind, Problem};
use hachi_policy::PolicyKind;
use k8s_openapi::{
    api::core::v1::{Event, EventSource, ObjectReference},
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time},
    jiff::Timestamp,
};
use kube::{
    Api, Client,
    api::{
        ApiResource, DynamicObject, GroupVersionKind, ListParams, Patch, PatchParams, PostParams,
    },
};
use serde_json::json;
use tokio::sync::mpsc;
use tracing::debug;

/// Between two requests.
const PACE: Duration = Duration::from_millis(200);
/// How long the same is not told again.
const SILENCE: Duration = Duration::from_secs(600);
/// Messages that wait.
const QUEUE: usize = 256;
/// Longer messages are cut, as the API asks (1 kB).
const LONGEST: usize = 1000;
/// Of how many messages it is remembered that they were told.
const MEMORY: usize = 4096;

/// What is told of which object.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Told {
    pub(crate) kind: Kind,
    pub(crate) namespace: String,
    pub(crate) name: String,
    /// Looked up if empty: `kubectl describe` shows no Event without it.
    pub(crate) uid: String,
    /// One word in `CamelCase`.
    pub(crate) reason: &'static str,
    pub(crate) message: String,
}

impl Told {
    /// Of an object that cannot be honoured as it is.
    pub(crate) fn of(problem: Problem) -> Self {
        let Problem {
            kind,
            namespace,
            name,
            uid,
            message,
        } = problem;
        Self {
            kind,
            namespace,
            name,
            uid,
            reason: "NotUnderstood",
            message,
        }
    }

    /// Of policies that do not fit, and of whoever does not get a port.
    pub(crate) fn of_compiled(problem: &CompileProblem) -> Vec<Self> {
        let policies = match problem {
            CompileProblem::TooLarge { policies, .. } => policies,
            CompileProblem::PortTaken { loser, .. } => {
                return vec![Self::of_port(loser, problem.to_string())];
            }
        };
        let of = |policy: &hachi_policy::PolicyId| Self {
            kind: match policy.kind {
                PolicyKind::NetworkPolicy => Kind::NetworkPolicy,
                PolicyKind::ClusterNetworkPolicy => Kind::ClusterNetworkPolicy,
                PolicyKind::AdminNetworkPolicy => Kind::AdminNetworkPolicy,
                PolicyKind::BaselineAdminNetworkPolicy => Kind::BaselineAdminNetworkPolicy,
            },
            namespace: policy.namespace.to_string(),
            name: policy.name.to_string(),
            uid: String::new(),
            reason: "TooLarge",
            message: problem.to_string(),
        };
        policies.iter().map(of).collect()
    }

    /// Of a port that two want.
    pub(crate) fn of_port(who: &Claimant, message: String) -> Self {
        Self {
            kind: match who.what {
                Claimed::Service | Claimed::HealthCheck => Kind::Service,
                Claimed::HostPort => Kind::Pod,
            },
            namespace: who.name.namespace.to_string(),
            name: who.name.name.to_string(),
            uid: String::new(),
            reason: "PortTaken",
            message,
        }
    }

    /// Of a Pod whose interface is down because nothing would judge its packets.
    pub(crate) fn of_interface(pod: &PodRef, message: String) -> Self {
        Self {
            kind: Kind::Pod,
            namespace: pod.namespace.clone(),
            name: pod.name.clone(),
            uid: pod.uid.clone().unwrap_or_default(),
            reason: "InterfaceClosed",
            message,
        }
    }

    /// Of something about this node.
    pub(crate) fn of_node(node: &str, reason: &'static str, message: String) -> Self {
        Self {
            kind: Kind::Node,
            namespace: String::new(),
            name: node.to_owned(),
            uid: String::new(),
            reason,
            message,
        }
    }

    /// The namespace of its Event: that of the object, `default` for those that have none.
    fn home(&self) -> &str {
        if self.namespace.is_empty() {
            "default"
        } else {
            &self.namespace
        }
    }

    fn hash(&self) -> u64 {
        BuildHasherDefault::<DefaultHasher>::default().hash_one(self)
    }

    fn event(&self, node: &str, name: &str, uid: &str) -> Event {
        let now = Time(Timestamp::now());
        let message = self.message.chars().take(LONGEST).collect();
        let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        Event {
            metadata: ObjectMeta {
                name: Some(name.to_owned()),
                namespace: Some(self.home().to_owned()),
                ..ObjectMeta::default()
            },
            involved_object: ObjectReference {
                api_version: Some(api_version(self.kind).to_owned()),
                kind: Some(self.kind.to_string()),
                namespace: some(&self.namespace),
                name: some(&self.name),
                uid: some(uid),
                ..ObjectReference::default()
            },
            type_: Some("Warning".to_owned()),
            reason: Some(self.reason.to_owned()),
            message: Some(message),
            count: Some(1),
            first_timestamp: Some(now.clone()),
            last_timestamp: Some(now),
            source: Some(EventSource {
                component: Some("hachi-agent".to_owned()),
                host: Some(node.to_owned()),
            }),
            reporting_component: Some("hachi-agent".to_owned()),
            reporting_instance: Some(node.to_owned()),
            ..Event::default()
        }
    }
}

fn api_version(kind: Kind) -> &'static str {
    match kind {
        Kind::Pod | Kind::Namespace | Kind::Node | Kind::Service => "v1",
        Kind::EndpointSlice => "discovery.k8s.io/v1",
        Kind::NetworkPolicy => "networking.k8s.io/v1",
        Kind::ClusterNetworkPolicy => "policy.networking.k8s.io/v1alpha2",
        Kind::AdminNetworkPolicy | Kind::BaselineAdminNetworkPolicy => {
            "policy.networking.k8s.io/v1alpha1"
        }
    }
}

/// Where Events are handed in.
#[derive(Clone, Debug)]
pub(crate) struct Events(mpsc::Sender<Told>);

impl Events {
    /// Starts the task that writes them.
    pub(crate) fn start(client: Client, node: String) -> Self {
        let (sender, mut waiting) = mpsc::channel::<Told>(QUEUE);
        tokio::spawn(async move {
            let mut told: HashMap<u64, (Instant, i32)> = HashMap::new();
            while let Some(message) = waiting.recv().await {
                if told.len() > MEMORY {
                    told.retain(|_, (when, _)| when.elapsed() < SILENCE);
                }
                let known = told.entry(message.hash()).or_insert((Instant::now(), 0));
                if known.1 > 0 && known.0.elapsed() < SILENCE {
                    continue;
                }
                *known = (Instant::now(), known.1 + 1);
                write(&client, &node, &message, known.1).await;
                tokio::time::sleep(PACE).await;
            }
        });
        Self(sender)
    }

    /// Hands one in; dropped if too many wait.
    pub(crate) fn tell(&self, told: Told) {
        if self.0.try_send(told).is_err() {
            debug!("too many Events wait: one is dropped");
        }
    }
}

async fn write(client: &Client, node: &str, told: &Told, count: i32) {
    let api: Api<Event> = Api::namespaced(client.clone(), told.home());
    let short: String = told.name.chars().take(180).collect();
    let suffix = BuildHasherDefault::<DefaultHasher>::default().hash_one((node, told.hash()));
    let name = format!("{short}.{suffix:016x}");
    let uid = if told.uid.is_empty() {
        uid(client, told).await.unwrap_or_default()
    } else {
        told.uid.clone()
    };
    let event = told.event(node, &name, &uid);
    match api.create(&PostParams::default(), &event).await {
        Ok(_) => {}
        // An agent before this one told it too.
        Err(kube::Error::Api(status)) if status.code == 409 => {
            let again = json!({"count": count + 1, "lastTimestamp": event.last_timestamp});
            let patch = Patch::Merge(&again);
            if let Err(error) = api.patch(&name, &PatchParams::default(), &patch).await {
                debug!(%error, "an Event could not be counted again");
            }
        }
        Err(error) => debug!(%error, "an Event could not be written"),
    }
}

/// The UID of what is told of, by a list of one: the agent may list, and needs no further right.
async fn uid(client: &Client, told: &Told) -> Option<String> {
    let kind = told.kind.to_string();
    let (group, version) = match api_version(told.kind).split_once('/') {
        Some((group, version)) => (group, version),
        None => ("", api_version(told.kind)),
    };
    let plural = match kind.to_lowercase() {
        word if word.ends_with('y') => format!("{}ies", &word[..word.len() - 1]),
        word => format!("{word}s"),
    };
    let gvk = GroupVersionKind::gvk(group, version, &kind);
    let resource = ApiResource::from_gvk_with_plural(&gvk, &plural);
    let api: Api<DynamicObject> = if told.namespace.is_empty() {
        Api::all_with(client.clone(), &resource)
    } else {
        Api::namespaced_with(client.clone(), &told.namespace, &resource)
    };
    let only = ListParams::default().fields(&format!("metadata.name={}", told.name));
    match api.list(&only).await {
        Ok(found) => found.items.into_iter().find_map(|one| one.metadata.uid),
        Err(error) => {
            debug!(%error, ?told, "an Event is told without a UID");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_about_their_object_and_not_too_long() {
        let told = Told {
            kind: Kind::ClusterNetworkPolicy,
            namespace: String::new(),
            name: "p".to_owned(),
            uid: "u".to_owned(),
            reason: "NotUnderstood",
            message: "x".repeat(3000),
        };
        let event = told.event("n1", "p.1", &told.uid);
        assert_eq!(event.metadata.namespace.as_deref(), Some("default"));
        assert_eq!(event.message.map(|m| m.len()), Some(LONGEST));
        let about = event.involved_object;
        assert_eq!(about.kind.as_deref(), Some("ClusterNetworkPolicy"));
        assert_eq!((about.namespace, about.uid.as_deref()), (None, Some("u")));
    }
}
