//! Strategic merge patches: a merge patch whose lists are merged by the key of their items.
//!
//! Which lists those are, and by which key, stands in the Go types of the real API; the table here
//! has those of the served kinds. Lists that are not in it are replaced.

use serde_json::{Map, Value};

use crate::failure::Failure;

/// How the items of a list are told apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Identity {
    /// By one field of theirs.
    Key(&'static str),
    /// They are values of a set.
    Value,
}

/// The identity of a list's items, by the names of the list and of the field around it.
pub(super) fn identity(around: &str, name: &str) -> Option<Identity> {
    Some(Identity::Key(match (around, name) {
        ("spec", "containers" | "initContainers" | "ephemeralContainers" | "volumes") => "name",
        ("spec", "imagePullSecrets" | "schedulingGates" | "resourceClaims") => "name",
        ("spec", "hostAliases") => "ip",
        ("spec", "topologySpreadConstraints") => "topologyKey",
        ("spec", "taints") => "key",
        ("spec", "ports") => "port",
        ("containers" | "initContainers" | "ephemeralContainers", "ports") => "containerPort",
        (_, "env") => "name",
        (_, "volumeMounts") => "mountPath",
        (_, "volumeDevices") => "devicePath",
        (_, "conditions") => "type",
        ("status", "addresses") => "type",
        ("status", "podIPs" | "hostIPs") => "ip",
        ("metadata", "ownerReferences") => "uid",
        ("", "secrets" | "imagePullSecrets") => "name",
        ("metadata", "finalizers") | ("spec", "podCIDRs") => return Some(Identity::Value),
        _ => return None,
    }))
}

/// Applies a patch in place.
pub(super) fn apply(target: &mut Value, patch: &Value) -> Result<(), Failure> {
    merge(target, patch, "")
}

fn merge(target: &mut Value, patch: &Value, around: &str) -> Result<(), Failure> {
    let Value::Object(patch) = patch else {
        *target = without_directives(patch);
        return Ok(());
    };
    match patch.get("$patch").and_then(Value::as_str) {
        Some("replace") => {
            *target = without_directives(&Value::Object(patch.clone()));
            return Ok(());
        }
        Some("delete") => {
            *target = Value::Object(Map::new());
            return Ok(());
        }
        Some("merge") | None => {}
        Some(other) => {
            return Err(Failure::bad_request(format!(
                "unknown $patch directive {other:?}"
            )));
        }
    }
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Some(map) = target.as_object_mut() else {
        return Ok(());
    };
    if let Some(kept) = patch.get("$retainKeys").and_then(Value::as_array) {
        map.retain(|key, _| kept.iter().any(|kept| kept == key));
    }
    for (key, value) in patch {
        if let Some(name) = key.strip_prefix("$deleteFromPrimitiveList/") {
            if let (Some(Value::Array(list)), Some(gone)) = (map.get_mut(name), value.as_array()) {
                list.retain(|item| !gone.contains(item));
            }
            continue;
        }
        if key.starts_with('$') {
            continue;
        }
        if value.is_null() {
            map.remove(key);
            continue;
        }
        let slot = map.entry(key).or_insert(Value::Null);
        match (value, identity(around, key)) {
            (Value::Array(items), Some(identity)) => merge_list(slot, items, identity, key)?,
            _ => merge(slot, value, key)?,
        }
    }
    for (key, order) in patch {
        if let (Some(name), Some(order)) = (key.strip_prefix("$setElementOrder/"), order.as_array())
            && let (Some(Value::Array(list)), Some(identity)) =
                (map.get_mut(name), identity(around, name))
        {
            sort(list, order, identity);
        }
    }
    Ok(())
}

fn merge_list(
    slot: &mut Value,
    items: &[Value],
    identity: Identity,
    name: &str,
) -> Result<(), Failure> {
    let replaces = |item: &Value| item["$patch"] == "replace";
    let mut list = match slot.take() {
        Value::Array(list) if !items.iter().any(replaces) => list,
        _ => Vec::new(),
    };
    for item in items.iter().filter(|item| !replaces(item)) {
        let found = list.iter().position(|other| same(other, item, identity));
        let deletes = item["$patch"] == "delete";
        match (found, identity) {
            (Some(place), _) if deletes => drop(list.remove(place)),
            (None, _) if deletes => {}
            (Some(place), Identity::Key(_)) => merge(&mut list[place], item, name)?,
            (Some(_), Identity::Value) => {}
            (None, Identity::Key(key)) if item.get(key).is_none() => {
                let why = format!("an item of {name} in the patch lacks its merge key {key:?}");
                return Err(Failure::bad_request(why));
            }
            (None, _) => {
                let mut new = Value::Null;
                merge(&mut new, item, name)?;
                list.push(new);
            }
        }
    }
    *slot = Value::Array(list);
    Ok(())
}

fn same(one: &Value, other: &Value, identity: Identity) -> bool {
    match identity {
        Identity::Key(key) => one.get(key).is_some() && one.get(key) == other.get(key),
        Identity::Value => one == other,
    }
}

/// Puts the listed items in their order; others stay behind them.
fn sort(list: &mut [Value], order: &[Value], identity: Identity) {
    list.sort_by_key(|item| {
        order
            .iter()
            .position(|wanted| same(wanted, item, identity))
            .unwrap_or(order.len())
    });
}

/// A value that replaces takes no directives with it.
fn without_directives(value: &Value) -> Value {
    match value {
        Value::Object(map) => {
            let kept = map
                .iter()
                .filter(|(key, value)| !key.starts_with('$') && !value.is_null());
            Value::Object(
                kept.map(|(k, v)| (k.clone(), without_directives(v)))
                    .collect(),
            )
        }
        Value::Array(list) => Value::Array(list.iter().map(without_directives).collect()),
        other => other.clone(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn lists_merge_by_key() {
        let pod = json!({
            "metadata": {"labels": {"a": "1", "b": "2"}, "finalizers": ["x", "y"]},
            "spec": {
                "containers": [
                    {"name": "one", "image": "i1", "ports": [{"containerPort": 80}]},
                    {"name": "two", "image": "i2", "args": ["-a", "-b"]},
                ],
            },
        });
        for (patch, pointer, expected) in [
            (
                json!({"metadata": {"labels": {"a": null, "c": "3"}}}),
                "/metadata/labels",
                json!({"b": "2", "c": "3"}),
            ),
            (
                json!({"spec": {"containers": [{"name": "two", "image": "new"}]}}),
                "/spec/containers/1",
                json!({"name": "two", "image": "new", "args": ["-a", "-b"]}),
            ),
            (
                json!({"spec": {"containers": [{"name": "two", "args": ["-c"]}]}}),
                "/spec/containers/1/args",
                json!(["-c"]),
            ),
            (
                json!({"spec": {"containers": [{"name": "one", "ports": [
                    {"containerPort": 80, "name": "http"}, {"containerPort": 53}]}]}}),
                "/spec/containers/0/ports",
                json!([{"containerPort": 80, "name": "http"}, {"containerPort": 53}]),
            ),
            (
                json!({"spec": {"containers": [{"name": "one", "$patch": "delete"}]}}),
                "/spec/containers",
                json!([{"name": "two", "image": "i2", "args": ["-a", "-b"]}]),
            ),
            (
                json!({"spec": {"$setElementOrder/containers": [{"name": "two"}, {"name": "one"}],
                    "containers": [{"name": "three", "image": "i3"}]}}),
                "/spec/containers/0/name",
                json!("two"),
            ),
            (
                json!({"spec": {"containers": [{"$patch": "replace"}, {"name": "n"}]}}),
                "/spec/containers",
                json!([{"name": "n"}]),
            ),
            (
                json!({"metadata": {"finalizers": ["z"], "$deleteFromPrimitiveList/finalizers": ["x"]}}),
                "/metadata/finalizers",
                json!(["y", "z"]),
            ),
            (
                json!({"metadata": {"$patch": "replace", "labels": {"c": "3"}}}),
                "/metadata",
                json!({"labels": {"c": "3"}}),
            ),
            (
                json!({"metadata": {"$retainKeys": ["labels"]}}),
                "/metadata",
                json!({"labels": {"a": "1", "b": "2"}}),
            ),
        ] {
            let mut object = pod.clone();
            apply(&mut object, &patch).unwrap();
            assert_eq!(object.pointer(pointer), Some(&expected), "{patch}");
        }
    }

    #[test]
    fn policy_rules_are_replaced_whole() {
        let mut policy = json!({"spec": {"ingress": [{"ports": [{"port": 80}]}, {}]}});
        apply(
            &mut policy,
            &json!({"spec": {"ingress": [{"ports": [{"port": 81}]}]}}),
        )
        .unwrap();
        assert_eq!(
            policy,
            json!({"spec": {"ingress": [{"ports": [{"port": 81}]}]}})
        );
    }

    #[test]
    fn items_without_their_key_are_refused() {
        let mut pod = json!({"spec": {}});
        assert!(apply(&mut pod, &json!({"spec": {"containers": [{"image": "i"}]}})).is_err());
    }
}
