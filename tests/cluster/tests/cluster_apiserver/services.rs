//! Services: fields that their type does not have.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use crate::{World, refused};

const HEALTH: &str = "healthCheckNodePort";
const MERGE: &str = "application/merge-patch+json";

pub(crate) fn services_fit_their_type(world: &World) -> Result<()> {
    let path = format!("/api/v1/namespaces/{}/services", world.namespace);
    let service = |spec: Value| {
        let mut service = json!({"metadata": {"name": "s"}, "spec": spec});
        if service["spec"]["type"] != "ExternalName" {
            service["spec"]["ports"] = json!([{"port": 1, "protocol": "TCP"}]);
        }
        service
    };
    let balanced = "Forbidden: may only be used when `type` is 'LoadBalancer'";
    for (spec, told) in [
        (
            json!({"type": "NodePort", "loadBalancerSourceRanges": ["10.0.0.0/8"]}),
            format!("spec.LoadBalancerSourceRanges: {balanced}"),
        ),
        (
            json!({"type": "LoadBalancer", "loadBalancerSourceRanges": [" 10.0.0.0/8 ", "x"]}),
            "spec.LoadBalancerSourceRanges[1]: Invalid value: \"x\": must be a valid CIDR value, \
             (e.g. 10.9.8.0/24 or 2001:db8::/64)"
                .to_owned(),
        ),
        (
            json!({"loadBalancerClass": "a.b/c"}),
            format!("spec.loadBalancerClass: {balanced}"),
        ),
        (
            json!({"allocateLoadBalancerNodePorts": true}),
            format!("spec.allocateLoadBalancerNodePorts: {balanced}"),
        ),
        (
            json!({"healthCheckNodePort": 30_000}),
            "spec.healthCheckNodePort: Invalid value: 30000: may only be set when `type` is \
             'LoadBalancer' and `externalTrafficPolicy` is 'Local'"
                .to_owned(),
        ),
        (
            json!({"externalTrafficPolicy": "Local"}),
            "spec.externalTrafficPolicy: Invalid value: \"Local\": may only be set for \
             externally-accessible services"
                .to_owned(),
        ),
        (
            json!({"externalIPs": ["127.0.0.1"]}),
            "spec.externalIPs[0]: Invalid value: \"127.0.0.1\": may not be in the loopback range \
             (127.0.0.0/8, ::1/128)"
                .to_owned(),
        ),
        (
            json!({"externalIPs": ["x"]}),
            "spec.externalIPs[0]: Invalid value: \"x\": must be a valid IP address, (e.g. 10.9.8.7 \
             or 2001:db8::ffff)"
                .to_owned(),
        ),
        (
            json!({"type": "NodePort", "clusterIP": "None"}),
            "spec.clusterIPs[0]: Invalid value: \"None\": may not be set to 'None' for NodePort \
             services"
                .to_owned(),
        ),
        (
            json!({"type": "ExternalName", "externalName": "a.b", "clusterIP": "10.96.0.77"}),
            "spec.clusterIPs: Forbidden: may not be set for ExternalName services".to_owned(),
        ),
        (
            json!({"clusterIP": "10.96.0.1"}),
            "spec.clusterIPs: Invalid value: [\"10.96.0.1\"]: failed to allocate IP 10.96.0.1: \
             provided IP is already allocated"
                .to_owned(),
        ),
        (
            json!({"ipFamilies": ["IPv6"]}),
            "spec.ipFamilies[0]: Invalid value: \"IPv6\": not configured on this cluster".to_owned(),
        ),
        (
            json!({"ipFamilyPolicy": "RequireDualStack"}),
            "spec.ipFamilyPolicy: Invalid value: \"RequireDualStack\": this cluster is not \
             configured for dual-stack services"
                .to_owned(),
        ),
    ] {
        let answer = world.admin.json(&format!("POST {path}"), &service(spec))?;
        let message = format!("Service \"s\" is invalid: {told}");
        refused(&answer, 422, "Invalid", &message)?;
    }
    // Load balancers are told where to ask about a node's endpoints, and that stays.
    let local = json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local"});
    let made = world.made(&path, &service(local.clone()))?;
    let number = made["spec"][HEALTH].as_u64().unwrap_or_default();
    ensure!((30_000..=32_767).contains(&number), "{made}");
    let patched = |patch: Value| {
        let patch = patch.to_string();
        world.admin.send(&format!("PATCH {path}/s"), MERGE, &patch)
    };
    let answer = patched(json!({"spec": {HEALTH: null}}))?;
    ensure!(answer.json()["spec"][HEALTH] == number, "{}", answer.text);
    let other = if number == 32_000 { 32_001 } else { 32_000 };
    let answer = patched(json!({"spec": {HEALTH: other}}))?;
    let told = format!("Service \"s\" is invalid: spec.{HEALTH}: Forbidden: field is immutable");
    refused(&answer, 422, "Invalid", &told)?;
    let mut second = service(local.clone());
    second["metadata"]["name"] = json!("t");
    second["spec"][HEALTH] = json!(number);
    let answer = world.admin.json(&format!("POST {path}"), &second)?;
    ensure!(
        answer.code >= 400
            && answer
                .message()
                .contains("provided port is already allocated"),
        "{}",
        answer.text
    );
    // It is given back with the policy that needs it.
    let answer = patched(json!({"spec": {"externalTrafficPolicy": "Cluster"}}))?;
    ensure!(
        answer.code == 200 && answer.json()["spec"][HEALTH].is_null(),
        "{}",
        answer.text
    );
    let taken = world.made(&path, &second)?;
    ensure!(taken["spec"][HEALTH] == number, "{taken}");
    world.admin.send(&format!("DELETE {path}/s"), MERGE, "")?;
    // What another type had goes with that type.
    let made = world.made(&path, &service(local))?;
    ensure!(
        made["spec"]["allocateLoadBalancerNodePorts"] == true,
        "{made}"
    );
    let patch = r#"{"spec": {"type": "ClusterIP"}}"#;
    let answer = world.admin.send(&format!("PATCH {path}/s"), MERGE, patch)?;
    let spec = &answer.json()["spec"];
    for gone in [
        "allocateLoadBalancerNodePorts",
        "externalTrafficPolicy",
        HEALTH,
    ] {
        ensure!(
            answer.code == 200 && spec[gone].is_null(),
            "{}",
            answer.text
        );
    }
    ensure!(spec["ports"][0]["nodePort"].is_null(), "{}", answer.text);
    Ok(())
}
