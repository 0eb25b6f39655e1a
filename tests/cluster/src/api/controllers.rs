//! What the real API needs besides: a scheduler, EndpointSlices of Services with selectors, and the
//! end of deleted namespaces. Each looks at everything a few times a second, which is simple and, at
//! the size of a local cluster, fast enough. (The double's own controllers follow watches.)

use std::{collections::BTreeMap, future::Future, time::Duration};

use anyhow::{Context as _, Result};
use k8s_openapi::{
    api::{
        core::v1::{ConfigMap, Namespace, Node, Pod, Service},
        discovery::v1::EndpointSlice,
        networking::v1::NetworkPolicy,
    },
    apimachinery::pkg::util::intstr::IntOrString,
};
use kube::{
    Api, Client, Resource, ResourceExt as _,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};

const INTERVAL: Duration = Duration::from_millis(150);

/// The label of slices that these controllers own.
const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
const MANAGER: &str = "hachi-cluster";

/// Starts all of them on the current runtime.
pub(super) fn spawn(client: &Client) {
    tokio::spawn(repeat("scheduler", client.clone(), schedule));
    tokio::spawn(repeat("endpoint slices", client.clone(), slices));
    tokio::spawn(repeat("namespaces", client.clone(), namespaces));
}

async fn repeat<F: Future<Output = Result<()>>>(
    name: &'static str,
    client: Client,
    step: impl Fn(Client) -> F,
) {
    loop {
        if let Err(error) = step(client.clone()).await {
            tracing::warn!(error = format!("{error:#}"), "controller of {name}");
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

/// Binds each Pod without a node to the one with the fewest Pods.
async fn schedule(client: Client) -> Result<()> {
    let nodes: Api<Node> = Api::all(client.clone());
    let mut load: BTreeMap<String, usize> = BTreeMap::new();
    for node in nodes
        .list(&ListParams::default())
        .await
        .context("list nodes")?
    {
        load.insert(node.name_any(), 0);
    }
    let pods: Api<Pod> = Api::all(client.clone());
    let pods = pods
        .list(&ListParams::default())
        .await
        .context("list Pods")?;
    let node_of = |pod: &Pod| pod.spec.as_ref().and_then(|spec| spec.node_name.clone());
    for node in pods.iter().filter_map(node_of) {
        *load.entry(node).or_default() += 1;
    }
    for pod in pods.iter().filter(|pod| node_of(pod).is_none()) {
        let (Some(namespace), None) = (pod.namespace(), &pod.metadata.deletion_timestamp) else {
            continue;
        };
        let Some((node, count)) = load.iter_mut().min_by_key(|(_, count)| **count) else {
            return Ok(());
        };
        *count += 1;
        let binding = json!({
            "apiVersion": "v1", "kind": "Binding",
            "metadata": {"name": pod.name_any(), "namespace": namespace},
            "target": {"apiVersion": "v1", "kind": "Node", "name": node},
        });
        let path = format!(
            "/api/v1/namespaces/{namespace}/pods/{}/binding",
            pod.name_any()
        );
        let request = http::Request::post(path)
            .header("content-type", "application/json")
            .body(binding.to_string().into_bytes())
            .context("build a binding")?;
        // Bound or deleted meanwhile is as good.
        if let Err(error) = client.request::<Value>(request).await {
            tracing::debug!(%error, pod = pod.name_any(), "not bound");
        }
    }
    Ok(())
}

/// Writes one slice for each Service with a selector and each of its families.
async fn slices(client: Client) -> Result<()> {
    let services: Api<Service> = Api::all(client.clone());
    let services = services
        .list(&ListParams::default())
        .await
        .context("list Services")?;
    let pods: Api<Pod> = Api::all(client.clone());
    let pods = pods
        .list(&ListParams::default())
        .await
        .context("list Pods")?
        .items;
    let ours = ListParams::default().labels(&format!("{MANAGED_BY}={MANAGER}"));
    let old: Api<EndpointSlice> = Api::all(client.clone());
    let mut old: BTreeMap<_, _> = old
        .list(&ours)
        .await
        .context("list EndpointSlices")?
        .into_iter()
        .map(|slice| {
            (
                (slice.namespace().unwrap_or_default(), slice.name_any()),
                slice,
            )
        })
        .collect();
    for service in &services {
        for (name, wanted) in wanted(service, &pods) {
            let namespace = service.namespace().unwrap_or_default();
            let known = old.remove(&(namespace.clone(), name.clone()));
            let wanted: EndpointSlice =
                serde_json::from_value(wanted).context("build an EndpointSlice")?;
            let same = known.is_some_and(|known| {
                known.endpoints == wanted.endpoints && known.ports == wanted.ports
            });
            if same {
                continue;
            }
            let api: Api<EndpointSlice> = Api::namespaced(client.clone(), &namespace);
            let params = PatchParams::apply(MANAGER).force();
            if let Err(error) = api.patch(&name, &params, &Patch::Apply(&wanted)).await {
                tracing::debug!(%error, name, "not written");
            }
        }
    }
    for (namespace, name) in old.into_keys() {
        let api: Api<EndpointSlice> = Api::namespaced(client.clone(), &namespace);
        let _ = api.delete(&name, &DeleteParams::default()).await;
    }
    Ok(())
}

fn wanted(service: &Service, pods: &[Pod]) -> Vec<(String, Value)> {
    let Some(spec) = &service.spec else {
        return Vec::new();
    };
    let Some(selector) = spec
        .selector
        .as_ref()
        .filter(|selector| !selector.is_empty())
    else {
        return Vec::new();
    };
    let selected = |pod: &&Pod| {
        pod.namespace() == service.namespace()
            && selector
                .iter()
                .all(|(key, value)| pod.labels().get(key) == Some(value))
    };
    let families = spec.ip_families.clone().unwrap_or_default();
    families
        .into_iter()
        .map(|family| {
            let pods = pods.iter().filter(selected);
            let (mut ports, mut endpoints) = (Vec::new(), Vec::new());
            for pod in pods {
                let Some(endpoint) = endpoint(pod, &family) else {
                    continue;
                };
                ports = resolve(service, pod);
                endpoints.push(endpoint);
            }
            let name = format!("{}-{}", service.name_any(), family.to_lowercase());
            let slice = json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
                "metadata": {
                    "name": name, "namespace": service.namespace(),
                    "labels": {
                        MANAGED_BY: MANAGER, "kubernetes.io/service-name": service.name_any(),
                    },
                    "ownerReferences": [{
                        "apiVersion": "v1", "kind": "Service",
                        "name": service.name_any(), "uid": service.uid(),
                    }],
                },
                "addressType": family, "endpoints": endpoints, "ports": ports,
            });
            (name, slice)
        })
        .collect()
}

fn endpoint(pod: &Pod, family: &str) -> Option<Value> {
    let status = pod.status.as_ref()?;
    if matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")) {
        return None;
    }
    let ips = status.pod_ips.as_ref()?;
    let ip = ips
        .iter()
        .find(|ip| ip.ip.contains(':') == (family == "IPv6"))?;
    let conditions = status.conditions.iter().flatten();
    let serving = conditions
        .into_iter()
        .any(|c| c.type_ == "Ready" && c.status == "True");
    let terminating = pod.metadata.deletion_timestamp.is_some();
    Some(json!({
        "addresses": [ip.ip],
        "conditions": {
            "ready": serving && !terminating, "serving": serving, "terminating": terminating,
        },
        "nodeName": pod.spec.as_ref()?.node_name,
        "targetRef": {
            "kind": "Pod", "namespace": pod.namespace(), "name": pod.name_any(), "uid": pod.uid(),
        },
    }))
}

/// The Service's ports as they are on a Pod.
fn resolve(service: &Service, pod: &Pod) -> Vec<Value> {
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    let named: Vec<_> = containers
        .flat_map(|container| container.ports.iter().flatten())
        .collect();
    let ports = service
        .spec
        .iter()
        .flat_map(|spec| spec.ports.iter().flatten());
    ports
        .filter_map(|port| {
            let number = match &port.target_port {
                None => port.port,
                Some(IntOrString::Int(number)) => *number,
                Some(IntOrString::String(name)) => {
                    let found = named.iter().find(|port| port.name.as_ref() == Some(name));
                    found?.container_port
                }
            };
            let protocol = port.protocol.as_deref().unwrap_or("TCP");
            Some(json!({
                "name": port.name.as_deref().unwrap_or(""), "port": number, "protocol": protocol,
            }))
        })
        .collect()
}

/// Empties and ends namespaces that are being deleted.
async fn namespaces(client: Client) -> Result<()> {
    let api: Api<Namespace> = Api::all(client.clone());
    for namespace in api
        .list(&ListParams::default())
        .await
        .context("list namespaces")?
    {
        if namespace.metadata.deletion_timestamp.is_none() {
            continue;
        }
        let name = namespace.name_any();
        let left = empty::<Pod>(&client, &name).await?
            + empty::<Service>(&client, &name).await?
            + empty::<EndpointSlice>(&client, &name).await?
            + empty::<NetworkPolicy>(&client, &name).await?
            + empty::<ConfigMap>(&client, &name).await?;
        if left == 0 {
            let mut done = namespace.clone();
            done.spec = Some(Default::default());
            // Changed meanwhile: the next round tries again.
            let _ = api
                .replace_subresource("finalize", &name, &PostParams::default(), &done)
                .await;
        }
    }
    Ok(())
}

/// Deletes all objects of a kind; returns how many there were.
async fn empty<K>(client: &Client, namespace: &str) -> Result<usize>
where
    K: Resource<Scope = k8s_openapi::NamespaceResourceScope>
        + Clone
        + std::fmt::Debug
        + serde::de::DeserializeOwned,
    K::DynamicType: Default,
{
    let api: Api<K> = Api::namespaced(client.clone(), namespace);
    let objects = api
        .list(&ListParams::default())
        .await
        .context("list a namespace's objects")?;
    for object in &objects {
        if object.meta().deletion_timestamp.is_none() {
            let _ = api
                .delete(&object.name_any(), &DeleteParams::default())
                .await;
        }
    }
    Ok(objects.items.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service() -> Service {
        serde_json::from_value(json!({
            "metadata": {"name": "web", "namespace": "a"},
            "spec": {
                "selector": {"app": "web"},
                "ipFamilies": ["IPv4", "IPv6"],
                "ports": [
                    {"name": "http", "port": 80, "targetPort": "http"},
                    {"name": "dns", "port": 53, "protocol": "UDP"},
                ],
            },
        }))
        .unwrap()
    }

    fn pod(name: &str, namespace: &str, app: &str, ready: &str, ips: &[&str]) -> Pod {
        let ips: Vec<_> = ips.iter().map(|ip| json!({"ip": ip})).collect();
        serde_json::from_value(json!({
            "metadata": {"name": name, "namespace": namespace, "labels": {"app": app}},
            "spec": {
                "nodeName": "node1",
                "containers": [{
                    "name": "main", "ports": [{"name": "http", "containerPort": 8080}],
                }],
            },
            "status": {"podIPs": ips, "conditions": [{"type": "Ready", "status": ready}]},
        }))
        .unwrap()
    }

    #[test]
    fn slices_hold_the_selected_pods_of_their_family() {
        let pods = [
            pod("one", "a", "web", "True", &["10.0.0.1", "fd00::1"]),
            pod("two", "a", "web", "False", &["10.0.0.2"]),
            pod("other-app", "a", "db", "True", &["10.0.0.3"]),
            pod("other-namespace", "b", "web", "True", &["10.0.0.4"]),
            pod("no-address", "a", "web", "True", &[]),
        ];
        let slices = wanted(&service(), &pods);
        let addresses = |slice: &Value| -> Vec<(Value, Value)> {
            let endpoints = slice["endpoints"].as_array().unwrap().iter();
            endpoints
                .map(|e| (e["addresses"][0].clone(), e["conditions"]["ready"].clone()))
                .collect()
        };
        assert_eq!(slices[0].0, "web-ipv4");
        assert_eq!(
            addresses(&slices[0].1),
            [
                (json!("10.0.0.1"), json!(true)),
                (json!("10.0.0.2"), json!(false))
            ]
        );
        assert_eq!(slices[1].0, "web-ipv6");
        assert_eq!(addresses(&slices[1].1), [(json!("fd00::1"), json!(true))]);
        assert_eq!(
            slices[0].1["ports"],
            json!([
                {"name": "http", "port": 8080, "protocol": "TCP"},
                {"name": "dns", "port": 53, "protocol": "UDP"},
            ])
        );
    }

    #[test]
    fn a_service_without_a_selector_is_left_alone() {
        let mut service = service();
        service.spec.as_mut().unwrap().selector = None;
        assert!(wanted(&service, &[]).is_empty());
    }
}
