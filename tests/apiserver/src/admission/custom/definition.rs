//! Definitions of custom resources: their defaults, their status, and what of them is refused.

use serde_json::{Value, json};

use super::{RULES, parts, rule};
use crate::{
    clock,
    failure::Cause,
    json::{is_empty, list, object_at, set_default, text},
};

const APPROVED: &str = "api-approved.kubernetes.io";

const FORMATS: [&str; 3] = ["date-time", "int32", "int64"];

/// What schemas may say: what is checked, and what needs no check.
const KNOWN: [&str; 24] = [
    "additionalProperties",
    "description",
    "enum",
    "format",
    "items",
    "maxItems",
    "maxLength",
    "maxProperties",
    "maximum",
    "minItems",
    "minLength",
    "minProperties",
    "minimum",
    "nullable",
    "properties",
    "required",
    "title",
    "type",
    "x-kubernetes-int-or-string",
    "x-kubernetes-list-map-keys",
    "x-kubernetes-list-type",
    "x-kubernetes-map-type",
    "x-kubernetes-preserve-unknown-fields",
    "x-kubernetes-validations",
];

/// Sets what the writer left open, and the status: here names are accepted at once.
pub(in super::super) fn complete(definition: &mut Value) {
    let names = &mut definition["spec"]["names"];
    let kind = text(&names["kind"]).to_owned();
    set_default(names, "singular", kind.to_lowercase());
    set_default(names, "listKind", format!("{kind}List"));
    let names = names.clone();
    let versions = list(&definition["spec"]["versions"]).iter();
    let stored = versions.filter(|version| version["storage"] == true);
    let stored: Vec<_> = stored.map(|version| version["name"].clone()).collect();
    set_default(
        &mut definition["spec"],
        "conversion",
        json!({"strategy": "None"}),
    );
    if object_at(definition, "status").is_none_or(|status| !status.is_empty()) {
        return;
    }
    let condition = |kind: &str, reason: &str, message: &str| {
        json!({
            "type": kind, "status": "True", "reason": reason, "message": message,
            "lastTransitionTime": clock::now(),
        })
    };
    definition["status"] = json!({
        "acceptedNames": names,
        "conditions": [
            condition("NamesAccepted", "NoConflicts", "no conflicts found"),
            condition("Established", "InitialNamesAccepted", "the initial names have been accepted"),
        ],
        "storedVersions": stored,
    });
}

/// What is wrong with a definition, or more than this server can check.
pub(in super::super) fn check(definition: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    let spec = &definition["spec"];
    let name = &definition["metadata"]["name"];
    let expected = format!(
        "{}.{}",
        text(&spec["names"]["plural"]),
        text(&spec["group"])
    );
    if *name != expected {
        let why = "must be spec.names.plural+\".\"+spec.group";
        causes.push(Cause::invalid("metadata.name", name, why));
    }
    let group = text(&spec["group"]);
    let protected = [".k8s.io", ".kubernetes.io"]
        .iter()
        .any(|end| group.ends_with(end));
    if protected && is_empty(&definition["metadata"]["annotations"][APPROVED]) {
        let why = format!(
            "protected groups must have approval annotation {APPROVED:?}, see \
             https://github.com/kubernetes/enhancements/pull/1111"
        );
        let path = format!("metadata.annotations[{APPROVED}]");
        causes.push(Cause::required(path, &why));
    }
    let versions = list(&spec["versions"]);
    let stored = versions.iter().filter(|version| version["storage"] == true);
    if stored.count() != 1 {
        let why = "must have exactly one version marked as storage version";
        causes.push(Cause::invalid("spec.versions", &spec["versions"], why));
    }
    for (place, version) in versions.iter().enumerate() {
        let path = format!("spec.versions[{place}].schema.openAPIV3Schema");
        match version["schema"].get("openAPIV3Schema") {
            Some(schema) => {
                if schema["type"] != "object" {
                    let why = "must be object at the root";
                    let path = format!("{path}.type");
                    causes.push(Cause::invalid(path, &schema["type"], why));
                }
                check_schema(schema, &path, &mut causes);
            }
            None => causes.push(Cause::required(path, "schemas are required")),
        }
    }
    causes
}

fn check_schema(schema: &Value, path: &str, causes: &mut Vec<Cause>) {
    for (key, value) in schema.as_object().into_iter().flatten() {
        let format = key == "format" && !FORMATS.contains(&text(value));
        if !KNOWN.contains(&key.as_str()) || format {
            let why = "this server does not check what schemas say so";
            causes.push(Cause::invalid(format!("{path}.{key}"), value, why));
        }
    }
    for (place, given) in list(&schema[RULES]).iter().enumerate() {
        if let Err(why) = rule::parse(text(&given["rule"])) {
            let path = format!("{path}.{RULES}[{place}].rule");
            causes.push(Cause::invalid(path, &given["rule"], &why));
        }
    }
    let typed = schema["x-kubernetes-int-or-string"] == true
        || schema["x-kubernetes-preserve-unknown-fields"] == true;
    if text(&schema["type"]).is_empty() && !typed {
        let why = "must not be empty for specified object fields";
        causes.push(Cause::required(format!("{path}.type"), why));
    }
    for (place, part) in parts(schema) {
        check_schema(part, &format!("{path}.{place}"), causes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn definition(spec: Value) -> Value {
        let schema = json!({"type": "object", "properties": {"spec": spec}});
        json!({
            "metadata": {"name": "stars.example.org"},
            "spec": {
                "group": "example.org",
                "names": {"plural": "stars", "kind": "Star"},
                "versions": [
                    {"name": "v1", "storage": true, "schema": {"openAPIV3Schema": schema}},
                ],
            },
        })
    }

    #[test]
    fn a_definition_is_told_that_it_is_established() {
        let mut made = definition(json!({"type": "object"}));
        complete(&mut made);
        assert_eq!(made["spec"]["names"]["listKind"], "StarList");
        assert_eq!(made["status"]["storedVersions"], json!(["v1"]));
        assert_eq!(made["status"]["acceptedNames"]["singular"], "star");
        let types: Vec<_> = list(&made["status"]["conditions"])
            .iter()
            .map(|condition| text(&condition["type"]))
            .collect();
        assert_eq!(types, ["NamesAccepted", "Established"]);
    }

    #[test]
    fn what_cannot_be_checked_is_refused() {
        let fields = |definition: &Value| -> Vec<String> {
            check(definition)
                .into_iter()
                .map(|cause| cause.field)
                .collect()
        };
        assert!(fields(&definition(json!({"type": "object"}))).is_empty());
        let root = "spec.versions[0].schema.openAPIV3Schema.properties[spec]";
        for (spec, field) in [
            (json!({"type": "string", "pattern": "a+"}), ".pattern"),
            (json!({}), ".type"),
            (
                json!({"type": "array", "items": {"type": "string", "not": {}}}),
                ".items.not",
            ),
            (
                json!({"type": "object", RULES: [{"rule": "self.all(x, x)"}]}),
                ".x-kubernetes-validations[0].rule",
            ),
        ] {
            assert_eq!(fields(&definition(spec)), [format!("{root}{field}")]);
        }
        let mut other = definition(json!({"type": "object"}));
        other["metadata"]["name"] = json!("moons.example.org");
        other["spec"]["versions"][0]["storage"] = json!(false);
        assert_eq!(fields(&other), ["metadata.name", "spec.versions"]);
    }
}
