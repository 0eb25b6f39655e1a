//! Tells the cluster that this node has a network: clears the condition `NetworkUnavailable`, which a
//! cloud's controller sets on new nodes and which keeps Pods away, and takes off the taints that this
//! agent is asked to take off.
//!
//! Nothing is written that is so already. It is looked at again from time to time: a controller that
//! comes later may set the condition late.

use std::time::Duration;

use hachi_api::{Reply, Request};
use k8s_openapi::{
    api::core::v1::{Node, Taint},
    jiff::Timestamp,
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tracing::{info, warn};

use crate::agent::Ask;

/// How often to look whether the agent is ready, before it has been.
const SOON: Duration = Duration::from_millis(200);
/// How soon to try again what failed.
const AGAIN: Duration = Duration::from_secs(5);
/// How often to look at the Node afterwards.
const LATER: Duration = Duration::from_secs(60);

const CONDITION: &str = "NetworkUnavailable";

/// Keeps the Node announced from the moment on at which the agent is ready.
pub(crate) async fn keep(
    client: Client,
    name: String,
    taints: Vec<String>,
    asks: mpsc::Sender<Ask>,
) {
    let api: Api<Node> = Api::all(client);
    while !is_ready(&asks).await {
        tokio::time::sleep(SOON).await;
        if asks.is_closed() {
            return;
        }
    }
    let mut failed = false;
    while !asks.is_closed() {
        let pause = match announce(&api, &name, &taints).await {
            Ok(()) => {
                failed = false;
                LATER
            }
            Err(error) => {
                if !failed {
                    warn!(%error, "the Node cannot be told that its network is there; trying again");
                }
                failed = true;
                AGAIN
            }
        };
        tokio::time::sleep(pause).await;
    }
}

async fn is_ready(asks: &mpsc::Sender<Ask>) -> bool {
    matches!(
        crate::ask(asks.clone(), Request::Status).await,
        Reply::Status { status } if status.ready
    )
}

async fn announce(api: &Api<Node>, name: &str, taints: &[String]) -> Result<(), kube::Error> {
    let node = api.get(name).await?;
    let parameters = PatchParams::default();
    if let Some(status) = condition(&node) {
        let patch = Patch::Strategic(status);
        api.patch_status(name, &parameters, &patch).await?;
        info!("the Node's condition {CONDITION} is cleared");
    }
    if let Some(spec) = without(&node, taints) {
        // Only if nobody has changed the Node meanwhile: otherwise a 409, and it is tried again.
        api.patch(name, &parameters, &Patch::Merge(spec)).await?;
        info!(?taints, "taints are taken off the Node");
    }
    Ok(())
}

/// The status that clears the condition; none if that is so.
fn condition(node: &Node) -> Option<Value> {
    let conditions = node
        .status
        .as_ref()
        .and_then(|status| status.conditions.as_ref());
    let mut found = conditions.into_iter().flatten();
    if found.any(|condition| condition.type_ == CONDITION && condition.status == "False") {
        return None;
    }
    let now = Timestamp::now().to_string();
    Some(json!({"status": {"conditions": [{
        "type": CONDITION,
        "status": "False",
        "reason": "HachiIsReady",
        "message": "Hachi serves Pods on this node",
        "lastHeartbeatTime": now,
        "lastTransitionTime": now,
    }]}}))
}

/// The taints that stay, as a patch of this very version of the Node; none if all do.
fn without(node: &Node, keys: &[String]) -> Option<Value> {
    let taints = node.spec.as_ref()?.taints.as_ref()?;
    let stay: Vec<&Taint> = taints
        .iter()
        .filter(|taint| !keys.contains(&taint.key))
        .collect();
    (stay.len() < taints.len()).then(|| {
        json!({
            "metadata": {"resourceVersion": node.metadata.resource_version},
            "spec": {"taints": stay},
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(value: Value) -> Node {
        serde_json::from_value(value).expect("a Node")
    }

    #[test]
    fn the_condition_is_written_unless_it_is_false_already() {
        for (conditions, writes) in [
            (json!([]), true),
            (json!([{"type": "Ready", "status": "False"}]), true),
            (json!([{"type": CONDITION, "status": "True"}]), true),
            (json!([{"type": CONDITION, "status": "Unknown"}]), true),
            (json!([{"type": CONDITION, "status": "False"}]), false),
        ] {
            let node = node(json!({"status": {"conditions": conditions}}));
            assert_eq!(condition(&node).is_some(), writes, "{conditions}");
        }
    }

    #[test]
    fn only_the_named_taints_go() {
        let keys = ["node.example/no-network".to_owned()];
        let of = |taints: Value| {
            node(json!({"metadata": {"resourceVersion": "7"}, "spec": {"taints": taints}}))
        };
        let other = json!({"key": "other", "effect": "NoSchedule"});
        let both = json!([other, {"key": keys[0], "effect": "NoExecute"}]);
        let patch = without(&of(both), &keys).expect("a change");
        assert_eq!(patch["metadata"]["resourceVersion"], "7");
        assert_eq!(patch["spec"]["taints"], json!([other]));
        assert_eq!(without(&of(json!([other])), &keys), None);
        assert_eq!(without(&of(json!([other])), &[]), None);
        assert_eq!(without(&node(json!({})), &keys), None);
    }
}
