//! Custom resources against the structural schema of their definition: fields that it lacks are
//! pruned, and the rest has to be what it says.
//!
//! ```text
//!  definition ── openAPIV3Schema ──> prune ──> values (types, bounds, enums) ──> rules (CEL)
//! ```
//!
//! What of a schema this server does not check is refused with the definition that says it: nothing
//! is checked by half. Schemas: <https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/>.

mod definition;
mod rule;
mod values;

pub(super) use definition::{check as check_definition, complete as complete_definition};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Deserialize as _;
use serde_json::Value;

use crate::{failure::Cause, json::list};

const PRESERVE: &str = "x-kubernetes-preserve-unknown-fields";
const RULES: &str = "x-kubernetes-validations";

/// The schema that a definition has for a version.
pub(crate) fn schema<'a>(definition: &'a Value, version: &str) -> Option<&'a Value> {
    let mut versions = list(&definition["spec"]["versions"]).iter();
    let version = versions.find(|known| known["name"] == version)?;
    version["schema"].get("openAPIV3Schema")
}

/// Takes away what neither the schema nor every object has; `unknown` gets the paths of that.
pub(super) fn prune(schema: &Value, object: &mut Value, unknown: &mut Vec<String>) {
    let Some(map) = object.as_object_mut() else {
        return;
    };
    if let Some(metadata) = map.get_mut("metadata")
        && let Ok(known) = ObjectMeta::deserialize(&*metadata)
        && let Ok(known) = serde_json::to_value(known)
    {
        super::schema::prune(metadata, &known, "metadata", unknown);
    }
    map.retain(|key, value| {
        if matches!(key.as_str(), "apiVersion" | "kind" | "metadata") {
            return true;
        }
        prune_field(schema, key, value, key.clone(), unknown)
    });
}

/// Prunes a field of an object of that schema; returns whether it stays itself.
fn prune_field(
    schema: &Value,
    key: &str,
    value: &mut Value,
    path: String,
    unknown: &mut Vec<String>,
) -> bool {
    if let Some(field) = field(schema, key) {
        prune_value(field, value, &path, unknown);
        return true;
    }
    if schema[PRESERVE] == true {
        return true;
    }
    unknown.push(path);
    false
}

fn prune_value(schema: &Value, value: &mut Value, path: &str, unknown: &mut Vec<String>) {
    match value {
        Value::Object(map) => {
            map.retain(|key, value| {
                prune_field(schema, key, value, format!("{path}.{key}"), unknown)
            });
        }
        Value::Array(items) => {
            for (place, item) in items.iter_mut().enumerate() {
                prune_value(&schema["items"], item, &format!("{path}[{place}]"), unknown);
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// The schema of a field of an object.
fn field<'a>(schema: &'a Value, key: &str) -> Option<&'a Value> {
    let named = schema["properties"].get(key);
    named.or_else(|| {
        schema
            .get("additionalProperties")
            .filter(|of| of.is_object())
    })
}

/// What of the object is not as the schema says.
pub(super) fn check(schema: &Value, object: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    values::check(schema, object, "", &mut causes);
    // Rules may count on the types of what they are about.
    if !causes.iter().any(values::blocks_rules) {
        check_rules(schema, object, "", &mut causes);
    } else if has_rules(schema) {
        let why = "some validation rules were not checked because the object was invalid; correct \
                   the existing errors to complete validation";
        causes.push(Cause::invalid("<nil>", &Value::Null, why));
    }
    causes
}

fn has_rules(schema: &Value) -> bool {
    schema.get(RULES).is_some() || parts(schema).any(|(_, part)| has_rules(part))
}

/// The schemas within a schema, with their places in it.
fn parts(schema: &Value) -> impl Iterator<Item = (String, &Value)> {
    let properties = schema["properties"].as_object().into_iter().flatten();
    let properties = properties.map(|(key, part)| (format!("properties[{key}]"), part));
    let others = ["items", "additionalProperties"]
        .into_iter()
        .filter_map(|key| Some((key.to_owned(), schema.get(key)?)));
    properties
        .chain(others)
        .filter(|(_, part)| part.is_object())
}

fn check_rules(schema: &Value, value: &Value, path: &str, causes: &mut Vec<Cause>) {
    for given in list(&schema[RULES]) {
        let text = given["rule"].as_str().unwrap_or_default();
        let holds = rule::parse(text).and_then(|rule| rule.holds(value));
        let why = match holds {
            Ok(true) => continue,
            Ok(false) => match given["message"].as_str() {
                Some(message) => message.to_owned(),
                None => format!("failed rule: {text}"),
            },
            Err(why) => why,
        };
        causes.push(Cause::invalid(path, &values::type_of(value).into(), &why));
    }
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                if let Some(field) = field(schema, key) {
                    check_rules(field, value, &values::below(path, key), causes);
                }
            }
        }
        Value::Array(items) => {
            for (place, item) in items.iter().enumerate() {
                check_rules(&schema["items"], item, &format!("{path}[{place}]"), causes);
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn schema() -> Value {
        json!({"type": "object", "required": ["spec"], "properties": {"spec": {
            "type": "object",
            "required": ["tier"],
            "properties": {
                "tier": {"type": "string", "enum": ["Admin", "Baseline"]},
                "labels": {"type": "object", "additionalProperties": {"type": "string"}},
                "free": {"type": "object", PRESERVE: true},
                "range": {
                    "type": "object",
                    "properties": {"start": {"type": "integer"}, "end": {"type": "integer"}},
                    RULES: [{"rule": "self.start < self.end", "message": "upside down"}],
                },
                "list": {"type": "array", "items": {
                    "type": "object", "properties": {"a": {"type": "string"}},
                }},
            },
        }}})
    }

    #[test]
    fn what_no_schema_has_is_pruned_and_told() {
        let mut object = json!({
            "metadata": {"name": "p", "color": "red", "labels": {"any": "key"}},
            "spec": {
                "labels": {"any": "key"},
                "free": {"any": {"thing": 1}},
                "list": [{"a": "x"}, {"a": "x", "b": "y"}],
                "moon": null,
            },
            "stray": 1,
        });
        let mut unknown = Vec::new();
        prune(&schema(), &mut object, &mut unknown);
        unknown.sort_unstable();
        assert_eq!(
            unknown,
            ["metadata.color", "spec.list[1].b", "spec.moon", "stray"]
        );
        assert_eq!(
            object["spec"],
            json!({
                "labels": {"any": "key"},
                "free": {"any": {"thing": 1}},
                "list": [{"a": "x"}, {"a": "x"}],
            })
        );
    }

    #[test]
    fn rules_are_asked_once_the_values_are_right() {
        let causes = |spec: Value| -> Vec<String> {
            let causes = check(&schema(), &json!({"spec": spec}));
            causes
                .into_iter()
                .map(|c| format!("{}: {}", c.field, c.message))
                .collect()
        };
        let range = json!({"start": 5, "end": 3});
        assert_eq!(
            causes(json!({"tier": "Admin", "range": range})),
            ["spec.range: Invalid value: \"object\": upside down"]
        );
        let blocked = causes(json!({"tier": "Up", "range": range}));
        assert_eq!(
            blocked[0],
            "spec.tier: Unsupported value: \"Up\": supported values: \"Admin\", \"Baseline\""
        );
        assert!(blocked[1].starts_with("<nil>: Invalid value: null: some validation rules"));
        assert!(causes(json!({"tier": "Admin", "range": {"start": 3, "end": 5}})).is_empty());
    }
}
