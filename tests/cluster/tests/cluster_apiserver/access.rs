//! Who may do what: the agents with the rights of the manifest, and strangers.

use anyhow::{Result, ensure};
use hachi_cluster::client::{Client, User};
use serde_json::json;

use crate::{World, refused};

const AGENT: &str = "system:serviceaccount:kube-system:hachi";

pub(crate) fn a_right_that_is_not_granted_is_named(world: &World) -> Result<()> {
    let agent = Client::new(world.cluster, User::Agent)?;
    for path in [
        "/api/v1/pods",
        "/api/v1/nodes",
        "/api/v1/services",
        "/apis/discovery.k8s.io/v1/endpointslices",
        "/apis/networking.k8s.io/v1/networkpolicies",
    ] {
        let answer = agent.ask(&format!("GET {path}"))?;
        ensure!(answer.code == 200, "{path}: {}", answer.text);
    }
    let namespace = &world.namespace;
    let here = format!("in the namespace {namespace:?}");
    for (what, message) in [
        (
            "GET /api/v1/configmaps".to_owned(),
            format!(
                "configmaps is forbidden: User {AGENT:?} cannot list resource \"configmaps\" in \
                 API group \"\" at the cluster scope"
            ),
        ),
        (
            format!("GET {}", world.maps("/any")),
            format!(
                "configmaps \"any\" is forbidden: User {AGENT:?} cannot get resource \
                 \"configmaps\" in API group \"\" {here}"
            ),
        ),
        (
            format!("DELETE /apis/networking.k8s.io/v1/namespaces/{namespace}/networkpolicies/any"),
            format!(
                "networkpolicies.networking.k8s.io \"any\" is forbidden: User {AGENT:?} cannot \
                 delete resource \"networkpolicies\" in API group \"networking.k8s.io\" {here}"
            ),
        ),
        (
            format!("GET /api/v1/namespaces/{namespace}/pods/any/status"),
            format!(
                "pods \"any\" is forbidden: User {AGENT:?} cannot get resource \"pods/status\" in \
                 API group \"\" {here}"
            ),
        ),
        (
            "DELETE /api/v1/nodes".to_owned(),
            format!(
                "nodes is forbidden: User {AGENT:?} cannot deletecollection resource \"nodes\" in \
                 API group \"\" at the cluster scope"
            ),
        ),
    ] {
        refused(&agent.ask(&what)?, 403, "Forbidden", &message)?;
    }
    Ok(())
}

pub(crate) fn tokens_are_known_or_refused(world: &World) -> Result<()> {
    let stranger = Client::new(world.cluster, User::Unknown)?;
    for path in [
        "/api/v1/pods",
        "/api/v1/nodes/any",
        "/apis/nothing/v1/things",
        "/version",
    ] {
        let answer = stranger.ask(&format!("GET {path}"))?;
        refused(&answer, 401, "Unauthorized", "Unauthorized")?;
    }
    // Who has no token is somebody who may do next to nothing.
    let anonymous = Client::new(world.cluster, User::Anonymous)?;
    ensure!(anonymous.ask("GET /version")?.code == 200);
    for (path, message) in [
        (
            "/api/v1/pods",
            "pods is forbidden: User \"system:anonymous\" cannot list resource \"pods\" in API \
             group \"\" at the cluster scope",
        ),
        (
            "/api",
            "forbidden: User \"system:anonymous\" cannot get path \"/api\"",
        ),
    ] {
        let answer = anonymous.ask(&format!("GET {path}"))?;
        refused(&answer, 403, "Forbidden", message)?;
    }
    Ok(())
}

pub(crate) fn agents_tell_events_and_statuses(world: &World) -> Result<()> {
    let agent = Client::new(world.cluster, User::Agent)?;
    let post = format!("POST /api/v1/namespaces/{}/events", world.namespace);
    let event = |name: &str, namespace: &str| {
        json!({
            "metadata": {"name": name},
            "involvedObject": {"kind": "Pod", "namespace": namespace, "name": "any"},
            "type": "Warning", "reason": "Closed", "message": "closed",
        })
    };
    let answer = agent.json(&post, &event("one", &world.namespace))?;
    ensure!(answer.code == 201, "{}", answer.text);
    let answer = agent.json(&post, &event("two", "default"))?;
    refused(
        &answer,
        422,
        "Invalid",
        "Event \"two\" is invalid: involvedObject.namespace: Invalid value: \"default\": does not \
         match event.namespace",
    )?;
    // Objects without a namespace have their events in `default`.
    let mut event = event("three", "");
    event["involvedObject"] = json!({"kind": "Node", "name": "node1"});
    let answer = agent.json(&post, &event)?;
    refused(
        &answer,
        422,
        "Invalid",
        "Event \"three\" is invalid: involvedObject.namespace: Invalid value: \"\": does not match \
         event.namespace",
    )?;

    let patch = r#"{"status":{"conditions":[{"type":"NetworkUnavailable","status":"False"}]}}"#;
    let kind = "application/strategic-merge-patch+json";
    let answer = agent.send("PATCH /api/v1/nodes/node1/status", kind, patch)?;
    ensure!(answer.code == 200, "{}", answer.text);
    let conditions = answer.json()["status"]["conditions"].to_string();
    ensure!(
        conditions.contains("NetworkUnavailable") && conditions.contains("Ready"),
        "{conditions}"
    );
    Ok(())
}
