//! Writes: conflicts, unknown fields, dry runs, statuses, deletions; and lists.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use crate::{World, refused, refused_with, version};

const MERGE: &str = "application/merge-patch+json";
const STRATEGIC: &str = "application/strategic-merge-patch+json";

pub(crate) fn conflicts_are_refused(world: &World) -> Result<()> {
    let old = world.map("a")?;
    let put = format!("PUT {}", world.maps("/a"));
    let map = |version: Option<u64>, data: &str| {
        let version = version.map(|version| version.to_string());
        json!({"metadata": {"name": "a", "resourceVersion": version}, "data": {"k": data}})
    };
    let answer = world.admin.json(&put, &map(Some(old), "1"))?;
    ensure!(answer.code == 200, "{}", answer.text);
    let modified = "Operation cannot be fulfilled on configmaps \"a\": the object has been \
                    modified; please apply your changes to the latest version and try again";
    let answer = world.admin.json(&put, &map(Some(old), "2"))?;
    refused(&answer, 409, "Conflict", modified)?;
    let patch = format!("PATCH {}", world.maps("/a"));
    let answer = world.admin.send(&patch, MERGE, map(Some(old), "2"))?;
    refused(&answer, 409, "Conflict", modified)?;
    // Without a version the last writer wins; what changes nothing is no new version.
    let answer = world.admin.json(&put, &map(None, "2"))?;
    ensure!(answer.code == 200, "{}", answer.text);
    let now = version(&answer.json())?;
    let again = world.admin.json(&put, &map(None, "2"))?;
    ensure!(version(&again.json())? == now, "{}", again.text);

    let answer = world
        .admin
        .json(&format!("POST {}", world.maps("")), &map(None, "3"))?;
    refused(
        &answer,
        409,
        "AlreadyExists",
        "configmaps \"a\" already exists",
    )?;
    let answer = world
        .admin
        .json(&format!("PUT {}", world.maps("/b")), &map(None, "3"))?;
    refused_with(
        &answer,
        400,
        "BadRequest",
        &["does not match the name on the URL (b)"],
    )?;
    let other = json!({"metadata": {"name": "b"}});
    let answer = world
        .admin
        .json(&format!("PUT {}", world.maps("/b")), &other)?;
    refused(&answer, 404, "NotFound", "configmaps \"b\" not found")?;
    let nowhere = "POST /api/v1/namespaces/nowhere/configmaps";
    let answer = world.admin.json(nowhere, &other)?;
    refused(&answer, 404, "NotFound", "namespaces \"nowhere\" not found")
}

pub(crate) fn unknown_fields_are_told_or_refused(world: &World) -> Result<()> {
    let policies = format!(
        "/apis/networking.k8s.io/v1/namespaces/{}/networkpolicies",
        world.namespace
    );
    let post = |query: &str, name: &str| {
        let policy = json!({
            "metadata": {"name": name, "color": "red"},
            "spec": {"podSelector": {}, "ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "mask": 8}}]}]},
        });
        world
            .admin
            .json(&format!("POST {policies}?{query}"), &policy)
    };
    let answer = post("fieldValidation=Strict", "a")?;
    refused(
        &answer,
        400,
        "BadRequest",
        "NetworkPolicy in version \"v1\" cannot be handled as a NetworkPolicy: strict decoding \
         error: unknown field \"metadata.color\", unknown field \
         \"spec.ingress[0].from[0].ipBlock.mask\"",
    )?;
    for (name, query) in [("b", ""), ("c", "fieldValidation=Warn")] {
        let answer = post(query, name)?;
        ensure!(answer.code == 201, "{}", answer.text);
        ensure!(
            answer.warnings
                == [
                    "299 - \"unknown field \\\"metadata.color\\\"\"",
                    "299 - \"unknown field \\\"spec.ingress[0].from[0].ipBlock.mask\\\"\"",
                ],
            "{:?}",
            answer.warnings
        );
        ensure!(!answer.text.contains("mask"), "{}", answer.text);
    }
    let answer = post("fieldValidation=Ignore", "d")?;
    ensure!(
        answer.code == 201 && answer.warnings.is_empty(),
        "{answer:?}"
    );
    // Of a field that is there twice the last one counts.
    let twice = r#"{"metadata": {"name": "twice"}, "data": {"k": "v", "k": "w"}}"#;
    let strict = format!("POST {}", world.maps("?fieldValidation=Strict"));
    let answer = world.admin.send(&strict, "application/json", twice)?;
    refused(
        &answer,
        400,
        "BadRequest",
        "ConfigMap in version \"v1\" cannot be handled as a ConfigMap: strict decoding error: \
         duplicate field \"data.k\"",
    )?;
    let answer = world.admin.send(
        &format!("POST {}", world.maps("")),
        "application/json",
        twice,
    )?;
    ensure!(answer.json()["data"]["k"] == "w", "{}", answer.text);
    ensure!(
        answer.warnings == ["299 - \"duplicate field \\\"data.k\\\"\""],
        "{:?}",
        answer.warnings
    );
    let answer = post("fieldValidation=Loud", "e")?;
    refused(
        &answer,
        422,
        "Invalid",
        "CreateOptions.meta.k8s.io \"\" is invalid: fieldValidation: Unsupported value: \"Loud\": \
         supported values: \"\", \"Ignore\", \"Strict\", \"Warn\"",
    )?;
    // A value of the wrong type is no object of the kind at all.
    let wrong = json!({"metadata": {"name": "f"}, "spec": {"podSelector": []}});
    let answer = world.admin.json(&format!("POST {policies}"), &wrong)?;
    let start = "NetworkPolicy in version \"v1\" cannot be handled as a NetworkPolicy: ";
    refused_with(&answer, 400, "BadRequest", &[start])
}

pub(crate) fn a_dry_run_stores_nothing(world: &World) -> Result<()> {
    let map = json!({"metadata": {"name": "a"}, "data": {"k": "v"}});
    let answer = world
        .admin
        .json(&format!("POST {}", world.maps("?dryRun=All")), &map)?;
    ensure!(answer.code == 201, "{}", answer.text);
    ensure!(
        answer.json()["metadata"]["uid"].is_string(),
        "{}",
        answer.text
    );
    let answer = world.admin.ask(&format!("GET {}", world.maps("/a")))?;
    refused(&answer, 404, "NotFound", "configmaps \"a\" not found")?;
    let before = version(&world.made(&world.maps(""), &map)?)?;
    let change = json!({"data": {"k": "w"}});
    let path = format!("PATCH {}", world.maps("/a?dryRun=All"));
    let answer = world.admin.send(&path, MERGE, change)?;
    ensure!(answer.json()["data"]["k"] == "w", "{}", answer.text);
    let path = world.maps("/a?dryRun=All");
    world.admin.ask(&format!("DELETE {path}"))?;
    let answer = world.admin.ask(&format!("GET {}", world.maps("/a")))?;
    ensure!(version(&answer.json())? == before, "{}", answer.text);
    let answer = world
        .admin
        .json(&format!("POST {}", world.maps("?dryRun=Some")), &map)?;
    refused(
        &answer,
        422,
        "Invalid",
        "CreateOptions.meta.k8s.io \"\" is invalid: dryRun: Unsupported value: [\"Some\"]: \
         supported values: \"All\"",
    )
}

pub(crate) fn a_status_is_written_apart(world: &World) -> Result<()> {
    let path = "/api/v1/nodes/star";
    let node = json!({"metadata": {"name": "star"}, "status": {"nodeInfo": {}}});
    world.made("/api/v1/nodes", &node)?;
    let change = r#"{"metadata": {"labels": {"a": "b"}},
        "status": {"conditions": [{"type": "Shines", "status": "True"}]}}"#;
    let shines = |node: &Value| node["status"]["conditions"].to_string().contains("Shines");
    let node = world
        .admin
        .send(&format!("PATCH {path}"), STRATEGIC, change)?
        .json();
    ensure!(
        node["metadata"]["labels"]["a"] == "b" && !shines(&node),
        "{node}"
    );
    let change = r#"{"spec": {"unschedulable": true},
        "status": {"conditions": [{"type": "Shines", "status": "True"}]}}"#;
    let status = format!("PATCH {path}/status");
    let node = world.admin.send(&status, STRATEGIC, change)?.json();
    ensure!(
        shines(&node) && node["spec"]["unschedulable"].is_null(),
        "{node}"
    );
    // Conditions are merged by their type.
    let change = r#"{"status": {"conditions": [{"type": "Warms", "status": "False"}]}}"#;
    let node = world.admin.send(&status, STRATEGIC, change)?.json();
    ensure!(
        shines(&node) && node.to_string().contains("Warms"),
        "{node}"
    );
    world.admin.ask(&format!("DELETE {path}"))?;
    // Kinds without a status have no such path.
    world.map("a")?;
    let answer = world
        .admin
        .ask(&format!("GET {}", world.maps("/a/status")))?;
    let message = "the server could not find the requested resource";
    refused(&answer, 404, "NotFound", message)
}

pub(crate) fn lists_come_in_pages_and_parts(world: &World) -> Result<()> {
    for name in ["a", "b", "c"] {
        let map = json!({"metadata": {"name": name, "labels": {"app": name}}});
        world.made(&world.maps(""), &map)?;
    }
    let names = |list: &Value| -> String {
        let items = list["items"].as_array().into_iter().flatten();
        let names = items.map(|item| item["metadata"]["name"].as_str().unwrap_or_default());
        names.collect::<Vec<_>>().join(" ")
    };
    let list = |query: &str| world.admin.ask(&format!("GET {}", world.maps(query)));
    let first = list("?limit=2")?.json();
    let token = first["metadata"]["continue"].as_str().unwrap_or_default();
    ensure!(names(&first) == "a b" && !token.is_empty(), "{first}");
    let rest = list(&format!("?limit=2&continue={token}"))?.json();
    ensure!(
        names(&rest) == "c" && rest["metadata"]["continue"].is_null(),
        "{rest}"
    );
    ensure!(rest["kind"] == "ConfigMapList", "{rest}");
    let found = list("?labelSelector=app+in+(a,c)")?.json();
    ensure!(names(&found) == "a c", "{found}");
    let found = list("?fieldSelector=metadata.name!%3Da")?.json();
    ensure!(names(&found) == "b c", "{found}");
    let answer = list("?fieldSelector=data.k%3Dv")?;
    refused(
        &answer,
        400,
        "BadRequest",
        "\"data.k\" is not a known field selector: only \"metadata.name\", \"metadata.namespace\"",
    )?;
    let answer = world
        .admin
        .ask("GET /api/v1/pods?fieldSelector=spec.moon%3Dx")?;
    refused(
        &answer,
        400,
        "BadRequest",
        "field label not supported: spec.moon",
    )?;
    refused_with(
        &list("?continue=nonsense")?,
        400,
        "BadRequest",
        &["continue"],
    )?;
    refused_with(&list("?labelSelector=a%3D%3D%3Db")?, 400, "BadRequest", &[])
}

pub(crate) fn deletions_have_preconditions(world: &World) -> Result<()> {
    world.map("a")?;
    let path = format!("DELETE {}", world.maps("/a"));
    let wrong = json!({"preconditions": {"uid": "another"}});
    let answer = world.admin.json(&path, &wrong)?;
    let part = "the UID in the precondition (another) does not match the UID in record";
    refused_with(&answer, 409, "Conflict", &[part])?;
    let answer = world.admin.ask(&path)?;
    let told = answer.json();
    ensure!(
        answer.code == 200 && told["kind"] == "Status" && told["status"] == "Success",
        "{}",
        answer.text
    );
    refused(
        &world.admin.ask(&path)?,
        404,
        "NotFound",
        "configmaps \"a\" not found",
    )?;
    // A finalizer keeps an object until it is taken off.
    let map = json!({"metadata": {"name": "b", "finalizers": ["hachi.dev/test"]}});
    world.made(&world.maps(""), &map)?;
    world.admin.ask(&format!("DELETE {}", world.maps("/b")))?;
    let get = format!("GET {}", world.maps("/b"));
    let kept = world.admin.ask(&get)?.json();
    ensure!(kept["metadata"]["deletionTimestamp"].is_string(), "{kept}");
    let free = r#"{"metadata": {"finalizers": null}}"#;
    world
        .admin
        .send(&format!("PATCH {}", world.maps("/b")), MERGE, free)?;
    ensure!(world.admin.ask(&get)?.code == 404);
    Ok(())
}
