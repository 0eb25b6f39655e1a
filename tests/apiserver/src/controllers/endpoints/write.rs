//! From the slices that are there to those that should be, with as few writes as possible.

use std::{collections::BTreeMap, sync::Arc};

use serde_json::{Value, json};
use tracing::debug;

use super::{
    MANAGED_BY, SERVICE_NAME,
    desired::{Group, groups},
    index::Index,
};
use crate::{
    Failure, Store,
    json::{is_empty, list, text},
    resource::{ENDPOINT_SLICES, NODES, PODS, SERVICES},
    store::Object,
};

/// As many endpoints as the real controller puts into one slice.
const SLICE: usize = 100;

/// Brings the slices of a Service up to date.
pub(super) fn reconcile(store: &Store, index: &Index, namespace: &str, name: &str) {
    let (service, existing, pods) = store.read(|state| {
        let service = state.find(SERVICES, namespace, name).cloned();
        let prefix = format!("{name}-");
        let shelf = &state.shelves[ENDPOINT_SLICES.index];
        let existing = shelf
            .prefixed(namespace, &prefix)
            .filter(|slice| is_ours(slice, name));
        let existing: Vec<Arc<Object>> = existing.cloned().collect();
        let names = service
            .as_ref()
            .map(|service| index.pods_of(service))
            .unwrap_or_default();
        let pods = names
            .iter()
            .filter_map(|pod| state.find(PODS, namespace, pod).cloned());
        (service, existing, pods.collect::<Vec<_>>())
    });
    let selects = |service: &Arc<Object>| {
        !is_empty(&service["spec"]["selector"]) && text(&service["spec"]["type"]) != "ExternalName"
    };
    let Some(service) = service else {
        existing.iter().for_each(|slice| delete(store, slice));
        return;
    };
    if !selects(&service) {
        // A Service without a selector leaves its slices to whoever writes them.
        return;
    }
    let zone = |node: &str| {
        let node = store.get(NODES, "", node).ok()?;
        node["metadata"]["labels"]["topology.kubernetes.io/zone"]
            .as_str()
            .map(str::to_owned)
    };
    let mut existing = existing;
    for group in groups(&service, pods.iter().map(|pod| &**pod), zone) {
        place(store, &service, group, &mut existing);
    }
    // What no group has claimed is of ports or families that are no more.
    existing.iter().for_each(|slice| delete(store, slice));
}

fn is_ours(slice: &Object, service: &str) -> bool {
    let labels = &slice["metadata"]["labels"];
    labels[SERVICE_NAME] == service && labels[MANAGED_BY.0] == MANAGED_BY.1
}

/// Puts a group's endpoints into slices, each into the one that it is in already where it can.
fn place(store: &Store, service: &Object, mut group: Group, existing: &mut Vec<Arc<Object>>) {
    let family = group.family.name();
    let fits =
        |slice: &Arc<Object>| slice["addressType"] == family && ports_of(slice) == group.ports;
    let (own, others): (Vec<_>, Vec<_>) = existing.drain(..).partition(fits);
    *existing = others;
    let empty = group.endpoints.is_empty();
    let mut slices: Vec<(Option<Arc<Object>>, Vec<Value>)> = Vec::new();
    for slice in own {
        let kept = list(&slice["endpoints"])
            .iter()
            .filter_map(|endpoint| group.endpoints.remove(text(&endpoint["targetRef"]["name"])));
        let kept = kept.collect();
        slices.push((Some(slice), kept));
    }
    let mut rest = group.endpoints.into_values();
    for (_, endpoints) in &mut slices {
        let room = SLICE.saturating_sub(endpoints.len());
        endpoints.extend(rest.by_ref().take(room));
    }
    loop {
        let chunk: Vec<Value> = rest.by_ref().take(SLICE).collect();
        if chunk.is_empty() {
            break;
        }
        slices.push((None, chunk));
    }
    if empty && slices.is_empty() {
        slices.push((None, Vec::new()));
    }
    for (place, (old, endpoints)) in slices.into_iter().enumerate() {
        // A Service without endpoints keeps one slice that says so.
        if endpoints.is_empty() && !(empty && place == 0) {
            if let Some(old) = old {
                delete(store, &old);
            }
            continue;
        }
        let content = json!({
            "addressType": family,
            "endpoints": endpoints,
            "ports": group.ports,
        });
        let written = match old {
            Some(old) => change(store, service, &old, content),
            None => make(store, service, content),
        };
        if let Err(error) = written {
            debug!(service = service.name(), %error, "a slice was not written");
        }
    }
}

fn ports_of(slice: &Object) -> Value {
    slice.get("ports").cloned().unwrap_or_else(|| json!([]))
}

fn labels(service: &Object) -> Value {
    let own = service["metadata"]["labels"]
        .as_object()
        .into_iter()
        .flatten();
    let own = own.map(|(key, value)| (key.clone(), value.clone()));
    let mut labels: BTreeMap<String, Value> = own.collect();
    labels.insert(SERVICE_NAME.into(), json!(service.name()));
    labels.insert(MANAGED_BY.0.into(), json!(MANAGED_BY.1));
    if text(&service["spec"]["clusterIP"]) == "None" {
        labels.insert("service.kubernetes.io/headless".into(), json!(""));
    }
    json!(labels)
}

fn make(store: &Store, service: &Object, mut slice: Value) -> Result<(), Failure> {
    slice["metadata"] = json!({
        "generateName": format!("{}-", service.name()),
        "namespace": service.namespace(),
        "labels": labels(service),
        "ownerReferences": [{
            "apiVersion": "v1",
            "kind": "Service",
            "name": service.name(),
            "uid": service.uid(),
            "controller": true,
            "blockOwnerDeletion": true,
        }],
    });
    store.create(ENDPOINT_SLICES, slice)?;
    Ok(())
}

fn change(store: &Store, service: &Object, old: &Object, content: Value) -> Result<(), Failure> {
    store.modify(ENDPOINT_SLICES, old.namespace(), old.name(), |slice| {
        slice["metadata"]["labels"] = labels(service);
        slice["endpoints"] = content["endpoints"].clone();
        slice["ports"] = content["ports"].clone();
    })?;
    Ok(())
}

fn delete(store: &Store, slice: &Object) {
    // It may be gone already, which is all the same.
    let _ = store.delete(ENDPOINT_SLICES, slice.namespace(), slice.name(), None);
}
