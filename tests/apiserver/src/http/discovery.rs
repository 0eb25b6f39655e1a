//! What clients learn the API from: health, version, discovery and OpenAPI documents.
//!
//! The OpenAPI documents describe no fields. They say that the server validates fields by itself,
//! so kubectl leaves it to the server; an older kubectl finds no schema and skips its own check.

use http::{HeaderMap, header::ACCEPT};
use serde_json::{Value, json};

use super::reply::Reply;
use crate::{
    Resource,
    resource::{PODS, RESOURCES},
};

const VERBS: [&str; 8] = [
    "create",
    "delete",
    "deletecollection",
    "get",
    "list",
    "patch",
    "update",
    "watch",
];

const AGGREGATED: &str = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList";

/// Clients ask for `...v2@v1.0...`, which is no media type; those of kubectl 1.20 refuse it back.
const OPENAPI_V2: &str = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf";

/// `swagger: "2.0"` and an empty `info`, in protobuf: a schema that knows no type.
const EMPTY_OPENAPI_V2: &[u8] = b"\x0a\x032.0\x12\x00";

/// What is answered to anybody.
pub(super) fn open(path: &str) -> Option<Reply> {
    match path {
        "/healthz" | "/livez" | "/readyz" => Some(Reply::text("ok")),
        "/version" => {
            let version = json!({
                "major": "1",
                "minor": "32",
                "gitVersion": concat!("v1.32.0+hachi-", env!("CARGO_PKG_VERSION")),
                "gitCommit": "",
                "gitTreeState": "clean",
                "buildDate": "1970-01-01T00:00:00Z",
                "goVersion": "none",
                "compiler": "rustc",
                "platform": "linux/amd64",
            });
            Some(Reply::json(200, version.to_string()))
        }
        _ => None,
    }
}

/// What is answered to users whatever they may do.
pub(super) fn document(path: &str, headers: &HeaderMap) -> Option<Reply> {
    let accept = headers
        .get(ACCEPT)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let wants_all = accept.split(',').any(|choice| {
        choice.contains("as=APIGroupDiscoveryList") && choice.split(';').any(|part| part == "v=v2")
    });
    let segments: Vec<&str> = path
        .split('/')
        .filter(|segment| !segment.is_empty())
        .collect();
    let document = match segments.as_slice() {
        ["api"] if wants_all => return Some(aggregated(|group| group.is_empty())),
        ["apis"] if wants_all => return Some(aggregated(|group| !group.is_empty())),
        ["api"] => json!({"kind": "APIVersions", "versions": ["v1"]}),
        ["apis"] => {
            let groups: Vec<_> = groups()
                .into_iter()
                .filter(|group| !group.0.is_empty())
                .collect();
            let groups: Vec<_> = groups
                .iter()
                .map(|(group, version)| about(group, version))
                .collect();
            json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
        }
        ["apis", group] => {
            let (group, version) = groups().into_iter().find(|(name, _)| name == group)?;
            let mut document = about(group, version);
            document["kind"] = json!("APIGroup");
            document["apiVersion"] = json!("v1");
            document
        }
        ["api", version] => resources("", version)?,
        ["apis", group, version] => resources(group, version)?,
        ["openapi", "v2"] => return Some(Reply::new(200, OPENAPI_V2, EMPTY_OPENAPI_V2)),
        ["openapi", "v3"] => {
            let paths = groups().into_iter().map(|(group, version)| {
                let root = root(group, version);
                let url = json!({"serverRelativeURL": format!("/openapi/v3{root}")});
                (root.trim_start_matches('/').to_owned(), url)
            });
            json!({"paths": Value::Object(paths.collect())})
        }
        ["openapi", "v3", "api", version] => openapi("", version)?,
        ["openapi", "v3", "apis", group, version] => openapi(group, version)?,
        _ => return None,
    };
    Some(Reply::json(200, document.to_string()))
}

/// Every group with its version, in the table's order.
fn groups() -> Vec<(&'static str, &'static str)> {
    let mut groups: Vec<_> = RESOURCES.iter().map(|r| (r.group, r.version)).collect();
    groups.sort_unstable();
    groups.dedup();
    groups
}

fn of(group: &str, version: &str) -> Vec<&'static Resource> {
    RESOURCES
        .iter()
        .filter(|r| r.group == group && r.version == version)
        .collect()
}

fn root(group: &str, version: &str) -> String {
    if group.is_empty() {
        format!("/api/{version}")
    } else {
        format!("/apis/{group}/{version}")
    }
}

fn about(group: &str, version: &str) -> Value {
    let version = json!({"groupVersion": format!("{group}/{version}"), "version": version});
    json!({"name": group, "versions": [version], "preferredVersion": version})
}

/// Name, kind and verbs of a resource's subresources.
fn subresources(
    resource: &'static Resource,
) -> Vec<(&'static str, &'static str, Vec<&'static str>)> {
    let mut list = Vec::new();
    if resource.status {
        list.push(("status", resource.kind, vec!["get", "patch", "update"]));
    }
    if resource == PODS {
        list.push(("binding", "Binding", vec!["create"]));
        list.push(("eviction", "Eviction", vec!["create"]));
    }
    list
}

fn resources(group: &str, version: &str) -> Option<Value> {
    let found = of(group, version);
    if found.is_empty() {
        return None;
    }
    let mut list = Vec::new();
    for resource in &found {
        list.push(json!({
            "name": resource.plural,
            "singularName": resource.singular,
            "namespaced": resource.namespaced,
            "kind": resource.kind,
            "verbs": VERBS,
            "shortNames": resource.short,
            "categories": resource.categories,
        }));
        for (name, kind, verbs) in subresources(resource) {
            list.push(json!({
                "name": format!("{}/{name}", resource.plural),
                "singularName": "",
                "namespaced": resource.namespaced,
                "kind": kind,
                "verbs": verbs,
            }));
        }
    }
    Some(json!({
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": found[0].api_version(),
        "resources": list,
    }))
}

fn aggregated(wanted: impl Fn(&str) -> bool) -> Reply {
    let response_kind = |resource: &Resource, kind: &str| json!({"group": resource.group, "version": resource.version, "kind": kind});
    let entry = |resource: &&'static Resource| {
        let below = subresources(resource)
            .into_iter()
            .map(|(name, kind, verbs)| {
                json!({
                    "subresource": name,
                    "responseKind": response_kind(resource, kind),
                    "verbs": verbs,
                })
            });
        json!({
            "resource": resource.plural,
            "responseKind": response_kind(resource, resource.kind),
            "scope": if resource.namespaced { "Namespaced" } else { "Cluster" },
            "singularResource": resource.singular,
            "verbs": VERBS,
            "shortNames": resource.short,
            "categories": resource.categories,
            "subresources": below.collect::<Vec<_>>(),
        })
    };
    let items = groups()
        .into_iter()
        .filter(|(group, _)| wanted(group))
        .map(|(group, version)| {
            let resources: Vec<_> = of(group, version).iter().map(entry).collect();
            json!({
                "metadata": {"name": group, "creationTimestamp": null},
                "versions": [{"version": version, "freshness": "Current", "resources": resources}],
            })
        });
    let document = json!({
        "kind": "APIGroupDiscoveryList",
        "apiVersion": "apidiscovery.k8s.io/v2",
        "metadata": {},
        "items": items.collect::<Vec<_>>(),
    });
    Reply::new(200, AGGREGATED, document.to_string())
}

fn openapi(group: &str, version: &str) -> Option<Value> {
    let found = of(group, version);
    if found.is_empty() {
        return None;
    }
    let parameters: Vec<_> = ["dryRun", "fieldManager", "fieldValidation", "force"]
        .iter()
        .map(|name| json!({"name": name, "in": "query", "schema": {"type": "string"}}))
        .collect();
    let paths = found.iter().map(|resource| {
        let namespace = if resource.namespaced {
            "/namespaces/{namespace}"
        } else {
            ""
        };
        let path = format!(
            "{}{namespace}/{}/{{name}}",
            root(group, version),
            resource.plural
        );
        let patch = json!({
            "parameters": parameters,
            "responses": {"200": {"description": "OK"}},
            "x-kubernetes-action": "patch",
            "x-kubernetes-group-version-kind": {
                "group": group,
                "version": version,
                "kind": resource.kind,
            },
        });
        (path, json!({"patch": patch}))
    });
    Some(json!({
        "openapi": "3.0.0",
        "info": {"title": "Kubernetes", "version": "v1.32.0"},
        "paths": Value::Object(paths.collect()),
        "components": {"schemas": {}},
    }))
}
