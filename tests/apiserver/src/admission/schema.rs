//! Objects against their types: values of the wrong type, and fields that no type has.
//!
//! A field that does not come back out of the typed object is one that the type does not know.

use k8s_openapi::api::{
    coordination::v1::Lease,
    core::v1::{ConfigMap, Endpoints, Event, Namespace, Node, Pod, Service, ServiceAccount},
    discovery::v1::EndpointSlice,
    networking::v1::NetworkPolicy,
};
use k8s_openapi::{
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use super::custom;
use crate::{Resource, failure::Failure};

/// Refuses an object whose values are of the wrong type.
pub(crate) fn decode(resource: &Resource, object: &Value) -> Result<(), Failure> {
    let result = match resource.kind {
        "Namespace" => typed::<Namespace>(object).map(drop),
        "Node" => typed::<Node>(object).map(drop),
        "Pod" => typed::<Pod>(object).map(drop),
        "Service" => typed::<Service>(object).map(drop),
        "EndpointSlice" => typed::<EndpointSlice>(object).map(drop),
        "NetworkPolicy" => typed::<NetworkPolicy>(object).map(drop),
        "ConfigMap" => typed::<ConfigMap>(object).map(drop),
        "ServiceAccount" => typed::<ServiceAccount>(object).map(drop),
        "Event" => typed::<Event>(object).map(drop),
        "Lease" => typed::<Lease>(object).map(drop),
        "CustomResourceDefinition" => typed::<CustomResourceDefinition>(object).map(drop),
        // Of custom resources the metadata have a type; the rest is checked by their schema.
        _ if resource.custom => typed::<Custom>(object).map(drop),
        _ => typed::<Endpoints>(object).map(drop),
    };
    result.map_err(|error| {
        let Resource { kind, version, .. } = resource;
        let why = format!("{kind} in version {version:?} cannot be handled as a {kind}: {error}");
        Failure::bad_request(why)
    })
}

/// What every custom resource has.
#[derive(serde::Deserialize)]
struct Custom {
    #[serde(default, rename = "metadata")]
    _metadata: ObjectMeta,
}

/// Takes away the fields that the kind, or a custom resource's schema, does not have; the result is
/// their paths. An object that cannot be decoded keeps them, and [`decode`] says what is wrong with
/// it.
pub(crate) fn take_unknown(
    resource: &Resource,
    schema: Option<&Value>,
    object: &mut Value,
) -> Vec<String> {
    let mut unknown = Vec::new();
    if resource.custom {
        if let Some(schema) = schema {
            custom::prune(schema, object, &mut unknown);
        }
        return unknown;
    }
    quantities(object);
    let known = match resource.kind {
        "Namespace" => back::<Namespace>(object),
        "Node" => back::<Node>(object),
        "Pod" => back::<Pod>(object),
        "Service" => back::<Service>(object),
        "EndpointSlice" => back::<EndpointSlice>(object),
        "NetworkPolicy" => back::<NetworkPolicy>(object),
        "ConfigMap" => back::<ConfigMap>(object),
        "ServiceAccount" => back::<ServiceAccount>(object),
        "Event" => back::<Event>(object),
        "Lease" => back::<Lease>(object),
        "CustomResourceDefinition" => back::<CustomResourceDefinition>(object),
        _ => back::<Endpoints>(object),
    };
    if let Some(known) = known {
        prune(object, &known, "", &mut unknown);
    }
    unknown
}

fn typed<T: DeserializeOwned>(object: &Value) -> Result<T, serde_json::Error> {
    T::deserialize(object)
}

fn back<T: DeserializeOwned + Serialize>(object: &Value) -> Option<Value> {
    serde_json::to_value(typed::<T>(object).ok()?).ok()
}

pub(super) fn prune(given: &mut Value, known: &Value, path: &str, unknown: &mut Vec<String>) {
    match (given, known) {
        (Value::Object(given), Value::Object(known)) => {
            given.retain(|key, value| {
                let path = if path.is_empty() {
                    key.clone()
                } else {
                    format!("{path}.{key}")
                };
                match known.get(key) {
                    Some(known) => prune(value, known, &path, unknown),
                    // Decoding drops nulls, and so does storing.
                    None if value.is_null() => {}
                    None => {
                        unknown.push(path);
                        return false;
                    }
                }
                true
            });
        }
        (Value::Array(given), Value::Array(known)) => {
            for (place, (given, known)) in given.iter_mut().zip(known).enumerate() {
                prune(given, known, &format!("{path}[{place}]"), unknown);
            }
        }
        _ => {}
    }
}

/// Writes quantities as text, which is how they are stored; YAML authors write `cpu: 1`.
pub(crate) fn quantities(value: &mut Value) {
    match value {
        Value::Object(map) => {
            for (key, value) in map.iter_mut() {
                let is_quantities = matches!(
                    key.as_str(),
                    "limits" | "requests" | "capacity" | "allocatable" | "overhead"
                );
                match value.as_object_mut() {
                    Some(amounts) if is_quantities => {
                        for amount in amounts.values_mut().filter(|amount| amount.is_number()) {
                            *amount = Value::String(amount.to_string());
                        }
                    }
                    _ => quantities(value),
                }
            }
        }
        Value::Array(list) => list.iter_mut().for_each(quantities),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::resource::{NETWORK_POLICIES, PODS};

    #[test]
    fn unknown_fields_are_found_and_taken_away() {
        let mut policy = json!({
            "metadata": {"name": "p", "color": "red", "creationTimestamp": null},
            "spec": {
                "podSelector": {"matchLabels": {"any": "key"}},
                "ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "mask": 8}}]}],
            },
        });
        let unknown = take_unknown(NETWORK_POLICIES, None, &mut policy);
        assert_eq!(
            unknown,
            ["metadata.color", "spec.ingress[0].from[0].ipBlock.mask"]
        );
        assert!(take_unknown(NETWORK_POLICIES, None, &mut policy).is_empty());
        assert_eq!(
            policy["spec"]["ingress"][0]["from"][0]["ipBlock"]["cidr"],
            "10.0.0.0/8"
        );
    }

    #[test]
    fn amounts_may_be_numbers() {
        let limits = json!({"cpu": 1, "memory": "64Mi"});
        let container = json!({"name": "c", "image": "i", "resources": {"limits": limits}});
        let mut pod = json!({"metadata": {"name": "p"}, "spec": {"containers": [container]}});
        quantities(&mut pod);
        assert!(decode(PODS, &pod).is_ok());
        let limits = &pod["spec"]["containers"][0]["resources"]["limits"];
        assert_eq!(*limits, json!({"cpu": "1", "memory": "64Mi"}));
    }
}
