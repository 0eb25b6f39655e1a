//! Server-side apply: a manager states all that it wants of an object.
//!
//! Ownership is what each manager applied last. What it no longer states goes, unless another
//! manager states it too; what another manager states otherwise is a conflict, unless it is forced.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::strategic::{Identity, identity};
use crate::failure::{Cause, Failure};

/// What each manager of an object applied last.
pub(crate) type Managers = BTreeMap<String, Value>;

/// The object after a manager's apply; `managers` is brought up to date.
pub(crate) fn apply(
    current: &Value,
    wanted: &Value,
    manager: &str,
    force: bool,
    managers: &mut Managers,
) -> Result<Value, Failure> {
    let last = managers.remove(manager).unwrap_or(Value::Null);
    let mut object = current.clone();
    for (other, theirs) in managers.iter_mut() {
        let mut found = Vec::new();
        conflicts(current, wanted, theirs, "", "", &mut found);
        if !found.is_empty() && !force {
            let causes = found.into_iter().map(|field| Cause {
                reason: "FieldManagerConflict",
                message: format!("conflict with {other:?}"),
                field,
            });
            return Err(Failure::apply_conflict(causes.collect()));
        }
        if force {
            disown(current, wanted, theirs, "");
        }
    }
    let others: Vec<&Value> = managers.values().collect();
    prune(&mut object, &last, wanted, &others, "");
    merge(&mut object, wanted, "");
    managers.insert(manager.to_owned(), wanted.clone());
    Ok(object)
}

/// The item of a list that is the same as another.
fn twin<'a>(list: &'a Value, item: &Value, identity: Identity) -> Option<&'a Value> {
    let place = place(list, item, identity)?;
    list.get(place)
}

fn place(list: &Value, item: &Value, identity: Identity) -> Option<usize> {
    let same = |other: &Value| match identity {
        // A port's protocol is part of its identity, and TCP where it is left out.
        Identity::Key(key @ ("port" | "containerPort")) => {
            let protocol = |port: &Value| port["protocol"].as_str().unwrap_or("TCP").to_owned();
            other[key] == item[key] && protocol(other) == protocol(item)
        }
        Identity::Key(key) => other[key] == item[key],
        Identity::Value => other == item,
    };
    list.as_array()?.iter().position(same)
}

/// Puts what is wanted into the object.
fn merge(object: &mut Value, wanted: &Value, around: &str) {
    let Value::Object(wanted) = wanted else {
        *object = wanted.clone();
        return;
    };
    if !object.is_object() {
        *object = Value::Object(Map::new());
    }
    let Some(map) = object.as_object_mut() else {
        return;
    };
    for (key, value) in wanted.iter().filter(|(_, value)| !value.is_null()) {
        let slot = map.entry(key).or_insert(Value::Null);
        match (value, identity(around, key)) {
            (Value::Array(items), Some(identity)) => {
                for item in items {
                    let found = place(slot, item, identity);
                    match (found.and_then(|place| slot.get_mut(place)), identity) {
                        (Some(own), Identity::Key(_)) => merge(own, item, key),
                        (Some(_), Identity::Value) => {}
                        (None, _) => match slot {
                            Value::Array(list) => list.push(item.clone()),
                            _ => *slot = Value::Array(vec![item.clone()]),
                        },
                    }
                }
            }
            _ => merge(slot, value, key),
        }
    }
}

/// Takes away what the manager stated before and does not state now.
fn prune(object: &mut Value, last: &Value, wanted: &Value, others: &[&Value], around: &str) {
    let (Some(map), Some(last)) = (object.as_object_mut(), last.as_object()) else {
        return;
    };
    for (key, before) in last {
        let now = wanted.get(key).unwrap_or(&Value::Null);
        let theirs: Vec<&Value> = others.iter().filter_map(|other| other.get(key)).collect();
        let Some(slot) = map.get_mut(key) else {
            continue;
        };
        match (before, identity(around, key)) {
            (Value::Object(_), _) if slot.is_object() => {
                prune(slot, before, now, &theirs, key);
                let empty = slot.as_object().is_some_and(Map::is_empty);
                if now.is_null() && theirs.is_empty() && empty {
                    map.remove(key);
                }
            }
            (Value::Array(items), Some(identity)) => {
                for item in items {
                    let Some(found) = place(slot, item, identity) else {
                        continue;
                    };
                    let stated = twin(now, item, identity);
                    let theirs: Vec<&Value> = theirs
                        .iter()
                        .filter_map(|list| twin(list, item, identity))
                        .collect();
                    if stated.is_none() && theirs.is_empty() {
                        slot.as_array_mut().map(|list| list.remove(found));
                    } else if let Some(own) = slot.get_mut(found) {
                        prune(own, item, stated.unwrap_or(&Value::Null), &theirs, key);
                    }
                }
                let empty = slot.as_array().is_some_and(Vec::is_empty);
                if now.is_null() && theirs.is_empty() && empty {
                    map.remove(key);
                }
            }
            _ if now.is_null() && theirs.is_empty() => {
                map.remove(key);
            }
            _ => {}
        }
    }
}

/// Whether a field says what kind of object it is rather than what it should be.
fn is_identity(around: &str, key: &str) -> bool {
    around.is_empty() && matches!(key, "apiVersion" | "kind")
        || around == "metadata" && matches!(key, "name" | "namespace")
}

/// Collects the fields that would change and that another manager states.
fn conflicts(
    current: &Value,
    wanted: &Value,
    theirs: &Value,
    around: &str,
    path: &str,
    found: &mut Vec<String>,
) {
    let (Some(wanted), Some(theirs)) = (wanted.as_object(), theirs.as_object()) else {
        return;
    };
    for (key, value) in wanted.iter().filter(|(key, _)| !is_identity(around, key)) {
        let (Some(theirs), now) = (theirs.get(key), &current[key]) else {
            continue;
        };
        let path = format!("{path}.{key}");
        match (value, identity(around, key)) {
            (Value::Object(_), _) => conflicts(now, value, theirs, key, &path, found),
            (Value::Array(items), Some(identity)) => {
                for item in items {
                    let pair = (twin(now, item, identity), twin(theirs, item, identity));
                    if let (Some(now), Some(theirs)) = pair {
                        conflicts(now, item, theirs, key, &format!("{path}[]"), found);
                    }
                }
            }
            _ if value != now => found.push(path),
            _ => {}
        }
    }
}

/// Takes from another manager the fields that a forced apply changes.
fn disown(current: &Value, wanted: &Value, theirs: &mut Value, around: &str) {
    let (Some(wanted), Some(map)) = (wanted.as_object(), theirs.as_object_mut()) else {
        return;
    };
    for (key, value) in wanted.iter().filter(|(key, _)| !is_identity(around, key)) {
        let now = &current[key];
        let Some(slot) = map.get_mut(key) else {
            continue;
        };
        match (value, identity(around, key)) {
            (Value::Object(_), _) => disown(now, value, slot, key),
            (Value::Array(items), Some(identity)) => {
                for item in items {
                    let now = twin(now, item, identity).unwrap_or(&Value::Null);
                    let found = place(slot, item, identity);
                    if let Some(theirs) = found.and_then(|place| slot.get_mut(place)) {
                        let key_field = match identity {
                            Identity::Key(field) => theirs.get(field).cloned().map(|v| (field, v)),
                            Identity::Value => None,
                        };
                        disown(now, item, theirs, key);
                        if let Some((field, value)) = key_field {
                            theirs[field] = value;
                        }
                    }
                }
            }
            _ if value != now => {
                map.remove(key);
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_no_longer_stated_goes() {
        let mut managers = Managers::new();
        let first = json!({"metadata": {"labels": {"a": "1", "b": "2"}},
            "spec": {"ports": [{"port": 80}, {"port": 443}], "selector": {"x": "y"}}});
        let object = apply(&json!({}), &first, "me", false, &mut managers).unwrap();
        let object = {
            let mut object = object;
            object["metadata"]["labels"]["server"] = json!("own");
            object["spec"]["ports"][0]["protocol"] = json!("TCP");
            object
        };
        let second = json!({"metadata": {"labels": {"a": "1"}}, "spec": {"ports": [{"port": 80}]}});
        let object = apply(&object, &second, "me", false, &mut managers).unwrap();
        assert_eq!(
            object,
            json!({"metadata": {"labels": {"a": "1", "server": "own"}},
                "spec": {"ports": [{"port": 80, "protocol": "TCP"}]}})
        );
    }

    #[test]
    fn what_another_manager_states_stays_or_conflicts() {
        let mut managers = Managers::new();
        let label = |value: &str| json!({"metadata": {"labels": {"a": value}}});
        let object = apply(&json!({}), &label("1"), "one", false, &mut managers).unwrap();
        let object = apply(&object, &label("1"), "two", false, &mut managers).unwrap();
        // Both state it: it stays when one lets go.
        let object = apply(&object, &json!({}), "one", false, &mut managers).unwrap();
        assert_eq!(object, label("1"));
        let failure = apply(&object, &label("2"), "one", false, &mut managers.clone()).unwrap_err();
        assert_eq!(
            (failure.code, failure.causes[0].field.as_str()),
            (409, ".metadata.labels.a")
        );
        let object = apply(&object, &label("2"), "one", true, &mut managers).unwrap();
        assert_eq!(object, label("2"));
        // Forced away from the other manager, it goes with its owner.
        let object = apply(&object, &json!({}), "one", false, &mut managers).unwrap();
        assert_eq!(object["metadata"]["labels"].get("a"), None);
    }

    #[test]
    fn lists_without_keys_are_replaced() {
        let mut managers = Managers::new();
        let rules = |n: u16| json!({"spec": {"ingress": [{"ports": [{"port": n}]}]}});
        let object = apply(&json!({}), &rules(1), "me", false, &mut managers).unwrap();
        assert_eq!(
            apply(&object, &rules(2), "me", false, &mut managers).unwrap(),
            rules(2)
        );
    }
}
