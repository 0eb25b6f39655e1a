//! The scheduler: a Pod without a node goes to the ready one that has the fewest.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};
use tracing::debug;

use crate::{
    Store, clock,
    json::{entries, is_empty, list, text},
    resource::{NODES, PODS},
    store::{Object, Since, Watch},
};

/// Follows Pods and nodes.
pub(super) async fn run(store: Store) {
    loop {
        let (Ok(mut nodes), Ok(mut pods)) = (
            store.watch(NODES, Since::Start),
            store.watch(PODS, Since::Start),
        ) else {
            return;
        };
        let mut counts = Counts::default();
        while follow(&store, &mut nodes, &mut pods, &mut counts).await {
            // A long backlog must not keep the connections waiting.
            tokio::task::yield_now().await;
        }
    }
}

/// How many Pods each node has.
#[derive(Debug, Default)]
struct Counts {
    pods: BTreeMap<String, usize>,
    /// Pods that were bound here and counted at once; their event is yet to come.
    bound: BTreeSet<String>,
}

impl Counts {
    fn add(&mut self, node: &str) {
        *self.pods.entry(node.to_owned()).or_default() += 1;
    }

    fn of(&self, node: &str) -> usize {
        self.pods.get(node).copied().unwrap_or(0)
    }

    /// Notes what an event tells of a Pod's node, before and after.
    fn note(&mut self, uid: &str, before: &str, now: &str) {
        if before == now {
            return;
        }
        if let Some(count) = self.pods.get_mut(before) {
            *count = count.saturating_sub(1);
        }
        if !now.is_empty() && !self.bound.remove(uid) {
            self.add(now);
        }
    }
}

/// Handles one event; `false` asks for a fresh start.
async fn follow(store: &Store, nodes: &mut Watch, pods: &mut Watch, counts: &mut Counts) -> bool {
    tokio::select! {
        event = nodes.next() => {
            if event.is_err() {
                return false;
            }
            // A node may have become ready: whoever waits is tried again.
            for pod in store.list(PODS, "") {
                place(store, &pod, counts);
            }
        }
        event = pods.next() => {
            let Ok(event) = event else { return false };
            let node = |pod: &Object| text(&pod["spec"]["nodeName"]).to_owned();
            let before = event.previous.as_deref().map(node).unwrap_or_default();
            let gone = event.change == crate::Change::Deleted;
            let now = if gone { String::new() } else { node(&event.object) };
            counts.note(event.object.uid(), &before, &now);
            if !gone {
                // The event may be old; what counts is what the Pod is now.
                if let Ok(pod) = store.get(PODS, event.object.namespace(), event.object.name()) {
                    place(store, &pod, counts);
                }
            }
        }
    }
    true
}

fn place(store: &Store, pod: &Object, counts: &mut Counts) {
    let spec = &pod["spec"];
    let ours = text(&spec["schedulerName"]) == "default-scheduler"
        && is_empty(&spec["nodeName"])
        && is_empty(&spec["schedulingGates"])
        && !pod.is_terminating();
    if !ours {
        return;
    }
    let (namespace, name) = (pod.namespace(), pod.name());
    let nodes = store.list(NODES, "");
    let fitting = nodes.iter().filter(|node| fits(node, spec));
    let chosen = fitting.min_by_key(|node| counts.of(node.name()));
    let done = match chosen {
        Some(node) => store.bind(namespace, name, node.name()).and_then(|_| {
            counts.add(node.name());
            counts.bound.insert(pod.uid().to_owned());
            condition(store, pod, json!({"status": "True"}))
        }),
        None => condition(
            store,
            pod,
            json!({
                "status": "False",
                "reason": "Unschedulable",
                "message": format!("0/{} nodes are available.", nodes.len()),
            }),
        ),
    };
    if let Err(error) = done {
        debug!(namespace, name, %error, "the Pod was not scheduled");
    }
}

/// Writes the Pod's PodScheduled condition.
fn condition(store: &Store, pod: &Object, state: Value) -> Result<(), crate::Failure> {
    store.modify_status(PODS, pod.namespace(), pod.name(), |pod| {
        let mut conditions = list(&pod["status"]["conditions"]).to_vec();
        let old = conditions
            .iter()
            .position(|c| text(&c["type"]) == "PodScheduled");
        if old.is_some_and(|old| conditions[old]["status"] == state["status"]) {
            return;
        }
        let mut condition = state;
        condition["type"] = json!("PodScheduled");
        condition["lastTransitionTime"] = json!(clock::now());
        match old {
            Some(old) => conditions[old] = condition,
            None => conditions.push(condition),
        }
        pod["status"]["conditions"] = json!(conditions);
    })?;
    Ok(())
}

/// Whether a node takes Pods, and this one.
fn fits(node: &Object, spec: &Value) -> bool {
    let conditions = list(&node["status"]["conditions"]);
    let ready = conditions
        .iter()
        .any(|c| text(&c["type"]) == "Ready" && text(&c["status"]) == "True");
    let labels = &node["metadata"]["labels"];
    ready
        && !node.is_terminating()
        && node["spec"]["unschedulable"] != json!(true)
        && entries(&spec["nodeSelector"]).all(|(key, value)| labels.get(key) == Some(value))
        && list(&node["spec"]["taints"])
            .iter()
            .all(|taint| tolerated(taint, spec))
}

/// Whether a taint keeps no Pod away, or not this one.
fn tolerated(taint: &Value, spec: &Value) -> bool {
    if text(&taint["effect"]) == "PreferNoSchedule" {
        return true;
    }
    list(&spec["tolerations"]).iter().any(|toleration| {
        let (key, effect) = (&toleration["key"], &toleration["effect"]);
        let value = match text(&toleration["operator"]) {
            "Exists" => true,
            _ => text(&toleration["value"]) == text(&taint["value"]),
        };
        (is_empty(key) || *key == taint["key"])
            && (is_empty(effect) || *effect == taint["effect"])
            && value
    })
}
