//! Patches of each type, and what an apply owns.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use crate::{World, refused, refused_with};

const JSON_PATCH: &str = "application/json-patch+json";
const MERGE: &str = "application/merge-patch+json";
const STRATEGIC: &str = "application/strategic-merge-patch+json";
const APPLY: &str = "application/apply-patch+yaml";

pub(crate) fn each_patch_does_what_its_type_says(world: &World) -> Result<()> {
    let services = format!("/api/v1/namespaces/{}/services", world.namespace);
    let port = |name: &str, port: u16| json!({"name": name, "port": port, "protocol": "TCP"});
    let spec = json!({"selector": {"a": "1", "b": "2"}, "ports": [port("x", 80), port("y", 81)]});
    world.made(&services, &json!({"metadata": {"name": "s"}, "spec": spec}))?;
    let patch =
        |kind: &str, body: Value| world.admin.send(&format!("PATCH {services}/s"), kind, body);
    let ports = |service: &Value| -> String {
        let ports = service["spec"]["ports"].as_array().into_iter().flatten();
        let ports = ports.map(|port| format!("{}={}", port["name"], port["port"]));
        ports.collect::<Vec<_>>().join(" ").replace('"', "")
    };
    // Lists with keys are merged by them, with null a key goes.
    let strategic =
        json!({"spec": {"selector": {"a": null}, "ports": [{"port": 81, "name": "z"}]}});
    let answer = patch(STRATEGIC, strategic)?;
    let service = answer.json();
    ensure!(ports(&service) == "x=80 z=81", "{}", answer.text);
    ensure!(
        service["spec"]["selector"] == json!({"b": "2"}),
        "{}",
        answer.text
    );
    // Lists are replaced.
    let answer = patch(MERGE, json!({"spec": {"ports": [port("m", 90)]}}))?;
    ensure!(ports(&answer.json()) == "m=90", "{}", answer.text);
    let operations = json!([
        {"op": "test", "path": "/spec/selector/b", "value": "2"},
        {"op": "replace", "path": "/spec/ports/0/name", "value": "j"},
    ]);
    let answer = patch(JSON_PATCH, operations)?;
    ensure!(ports(&answer.json()) == "j=90", "{}", answer.text);
    let wrong = json!([{"op": "test", "path": "/spec/selector/b", "value": "3"}]);
    let answer = patch(JSON_PATCH, wrong)?;
    ensure!(answer.code == 422, "{}", answer.text);
    let answer = patch("text/plain", json!({}))?;
    ensure!(answer.code == 415, "{}", answer.text);
    // A patch is held to what an object is held to.
    let answer = patch(MERGE, json!({"spec": {"ports": [{"port": 0}]}}))?;
    refused_with(
        &answer,
        422,
        "Invalid",
        &["spec.ports[0].port: Invalid value: 0"],
    )?;
    let missing = world
        .admin
        .send(&format!("PATCH {services}/t"), MERGE, "{}")?;
    refused(&missing, 404, "NotFound", "services \"t\" not found")
}

pub(crate) fn fields_have_managers(world: &World) -> Result<()> {
    let apply = |manager: &str, data: Value| {
        let map = json!({
            "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}, "data": data,
        });
        let path = world.maps(&format!("/a?{manager}"));
        world.admin.send(&format!("PATCH {path}"), APPLY, map)
    };
    let answer = apply("fieldManager=one", json!({"a": "1", "b": "1"}))?;
    ensure!(answer.code == 201, "{}", answer.text);
    let answer = apply("fieldManager=two", json!({"b": "2"}))?;
    refused(
        &answer,
        409,
        "Conflict",
        "Apply failed with 1 conflict: conflict with \"one\": .data.b",
    )?;
    let answer = apply("fieldManager=two&force=true", json!({"b": "2", "c": "2"}))?;
    ensure!(answer.code == 200, "{}", answer.text);
    // What a manager states no longer goes; what is another's stays.
    let answer = apply("fieldManager=one", json!({}))?;
    let data = answer.json()["data"].clone();
    ensure!(data == json!({"b": "2", "c": "2"}), "{}", answer.text);
    let answer = apply("", json!({}))?;
    refused(
        &answer,
        422,
        "Invalid",
        "PatchOptions.meta.k8s.io \"\" is invalid: fieldManager: Required value: is required for \
         apply patch",
    )?;
    // An apply of what no object has is refused whatever validation is asked for.
    let mut map = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}});
    map["color"] = json!("red");
    let path = world.maps("/a?fieldManager=one");
    let answer = world.admin.send(&format!("PATCH {path}"), APPLY, map)?;
    let message = "failed to create typed patch object (/a; /v1, Kind=ConfigMap): .color: field \
                   not declared in schema";
    refused(&answer, 500, "", message)
}
