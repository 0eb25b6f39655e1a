//! What the real API needs besides: a scheduler, EndpointSlices of Services with selectors, and the
//! end of deleted namespaces. Each looks at everything a few times a second, which is simple and, at
//! the size of a local cluster, fast enough. (The double's own controllers follow watches.)

use std::{collections::BTreeMap, future::Future, time::Duration};

use anyhow::{Context as _, Result};
use k8s_openapi::api::{
    core::v1::{ConfigMap, Namespace, Node, Pod, Service},
    discovery::v1::EndpointSlice,
    networking::v1::NetworkPolicy,
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

/// Writes the slices of every Service with a selector.
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
    let nodes: Api<Node> = Api::all(client.clone());
    let zone = |node: Node| {
        let zone = node.labels().get("topology.kubernetes.io/zone")?.clone();
        Some((node.name_any(), zone))
    };
    let zones: BTreeMap<_, _> = nodes
        .list(&ListParams::default())
        .await
        .context("list nodes")?
        .into_iter()
        .filter_map(zone)
        .collect();
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
        for (name, wanted) in wanted(service, &pods, &zones)? {
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

/// The slices of a Service, with their names: what the double's own controller would write.
fn wanted(
    service: &Service,
    pods: &[Pod],
    zones: &BTreeMap<String, String>,
) -> Result<Vec<(String, Value)>> {
    let Some(spec) = &service.spec else {
        return Ok(Vec::new());
    };
    let selector = spec.selector.as_ref();
    let Some(selector) = selector.filter(|selector| !selector.is_empty()) else {
        return Ok(Vec::new());
    };
    if spec.type_.as_deref() == Some("ExternalName") {
        return Ok(Vec::new());
    }
    let selected = |pod: &&Pod| {
        pod.namespace() == service.namespace()
            && selector
                .iter()
                .all(|(key, value)| pod.labels().get(key) == Some(value))
    };
    let pods = pods.iter().filter(selected).map(serde_json::to_value);
    let pods: Vec<_> = pods.collect::<Result<_, _>>().context("write a Pod")?;
    let value = serde_json::to_value(service).context("write a Service")?;
    let slices = hachi_apiserver::slices(&value, &pods, |node| zones.get(node).cloned());
    let named = slices.into_iter().enumerate().map(|(place, slice)| {
        let name = format!(
            "{}-{}-{place}",
            service.name_any(),
            slice.family.to_lowercase()
        );
        let object = json!({
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
            "addressType": slice.family, "endpoints": slice.endpoints, "ports": slice.ports,
        });
        (name, object)
    });
    Ok(named.collect())
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
                    {"name": "http", "port": 80, "targetPort": "http", "protocol": "TCP"},
                    {"name": "dns", "port": 53, "targetPort": 53, "protocol": "UDP"},
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
                    "name": "main", "ports": [{"name": "http", "containerPort": 8080, "protocol": "TCP"}],
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
        let slices = wanted(&service(), &pods, &BTreeMap::new()).unwrap();
        let addresses = |slice: &Value| -> Vec<(Value, Value)> {
            let endpoints = slice["endpoints"].as_array().unwrap().iter();
            endpoints
                .map(|e| (e["addresses"][0].clone(), e["conditions"]["ready"].clone()))
                .collect()
        };
        assert_eq!(slices[0].0, "web-ipv4-0");
        assert_eq!(
            addresses(&slices[0].1),
            [
                (json!("10.0.0.1"), json!(true)),
                (json!("10.0.0.2"), json!(false))
            ]
        );
        assert_eq!(slices[1].0, "web-ipv6-1");
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
    fn endpoints_that_are_published_early_are_ready() {
        let mut service = service();
        let spec = service.spec.as_mut().unwrap();
        spec.publish_not_ready_addresses = Some(true);
        let pods = [pod("two", "a", "web", "False", &["10.0.0.2"])];
        let zones = BTreeMap::from([("node1".to_owned(), "east".to_owned())]);
        let slices = wanted(&service, &pods, &zones).unwrap();
        let endpoint = &slices[0].1["endpoints"][0];
        assert_eq!(endpoint["conditions"]["ready"], true);
        assert_eq!(endpoint["conditions"]["serving"], false);
        assert_eq!(endpoint["zone"], "east");
    }

    #[test]
    fn a_service_without_a_selector_is_left_alone() {
        let mut service = service();
        service.spec.as_mut().unwrap().selector = None;
        assert!(wanted(&service, &[], &BTreeMap::new()).unwrap().is_empty());
    }
}
