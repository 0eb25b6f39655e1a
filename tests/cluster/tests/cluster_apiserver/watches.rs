//! Lists and watches: from where they go on, and when they may not.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use crate::{World, version};

/// The events of a watch of the namespace's ConfigMaps, which ends after a second. The real server
/// puts one into every namespace by itself in some clusters; it is not told of here.
fn events(world: &World, query: &str) -> Result<Vec<Value>> {
    let path = world.maps(&format!("?watch=true&timeoutSeconds=1&{query}"));
    let answer = world.admin.ask(&format!("GET {path}"))?;
    ensure!(answer.code == 200, "{path}: {}", answer.text);
    let mut events = answer.events();
    events.retain(|event| event["object"]["metadata"]["name"] != "kube-root-ca.crt");
    Ok(events)
}

/// Types and names of events.
fn brief(events: &[Value]) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let brief = events.iter().map(|event| {
        let name = text(&event["object"]["metadata"]["name"]);
        format!("{} {name}", text(&event["type"]))
            .trim_end()
            .to_owned()
    });
    brief.collect::<Vec<_>>().join(", ")
}

pub(crate) fn a_watch_goes_on_from_a_version(world: &World) -> Result<()> {
    let first = world.map("a")?;
    world.map("b")?;
    let change = json!({"metadata": {"name": "b"}, "data": {"k": "v"}});
    world
        .admin
        .json(&format!("PUT {}", world.maps("/b")), &change)?;
    world.admin.ask(&format!("DELETE {}", world.maps("/a")))?;
    let seen = events(world, &format!("resourceVersion={first}"))?;
    ensure!(
        brief(&seen) == "ADDED b, MODIFIED b, DELETED a",
        "{}",
        brief(&seen)
    );
    let versions = seen.iter().map(|event| version(&event["object"]));
    let versions = versions.collect::<Result<Vec<_>>>()?;
    ensure!(versions.is_sorted() && versions[0] > first, "{versions:?}");
    // A deleted object is told of as it was last, under the version of its end.
    let whole = json!({"kind": "ConfigMap", "apiVersion": "v1"});
    for (key, value) in whole.as_object().into_iter().flatten() {
        ensure!(seen[2]["object"][key] == *value, "{}", seen[2]);
    }
    // Without a version, or with 0, what is there comes first.
    for query in ["", "resourceVersion=0"] {
        let seen = brief(&events(world, query)?);
        ensure!(seen == "ADDED b", "{query}: {seen}");
    }
    Ok(())
}

pub(crate) fn initial_events_end_with_a_bookmark(world: &World) -> Result<()> {
    world.map("a")?;
    let query = "sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true";
    let seen = events(world, query)?;
    ensure!(brief(&seen[..2]) == "ADDED a, BOOKMARK", "{}", brief(&seen));
    let mark = &seen[1]["object"];
    let annotations = &mark["metadata"]["annotations"];
    ensure!(annotations["k8s.io/initial-events-end"] == "true", "{mark}");
    ensure!(mark["kind"] == "ConfigMap" && version(mark)? > 0, "{mark}");
    // From the bookmark on there is nothing that was told already.
    let next = world.map("b")?;
    let seen = events(world, &format!("resourceVersion={}", version(mark)?))?;
    ensure!(brief(&seen) == "ADDED b", "{}", brief(&seen));
    ensure!(version(&seen[0]["object"])? == next);
    let path = world.maps("?watch=true&timeoutSeconds=1&sendInitialEvents=true");
    let answer = world.admin.ask(&format!("GET {path}"))?;
    crate::refused(
        &answer,
        422,
        "Invalid",
        "ListOptions.meta.k8s.io \"\" is invalid: resourceVersionMatch: Forbidden: \
         sendInitialEvents requires setting resourceVersionMatch to NotOlderThan",
    )
}

pub(crate) fn a_selector_sees_objects_come_and_go(world: &World) -> Result<()> {
    let start = world.map("other")?;
    let map = |app: &str| json!({"metadata": {"name": "a", "labels": {"app": app}}});
    world.made(&world.maps(""), &map("db"))?;
    for app in ["web", "db"] {
        let answer = world
            .admin
            .json(&format!("PUT {}", world.maps("/a")), &map(app))?;
        ensure!(answer.code == 200, "{}", answer.text);
    }
    let query = format!("labelSelector=app%3Dweb&resourceVersion={start}");
    let seen = events(world, &query)?;
    ensure!(brief(&seen) == "ADDED a, DELETED a", "{}", brief(&seen));
    let query = format!(
        "fieldSelector=metadata.name%3Dother&resourceVersion={}",
        start - 1
    );
    let seen = events(world, &query)?;
    ensure!(brief(&seen) == "ADDED other", "{}", brief(&seen));
    Ok(())
}

/// The last of its server's tests to matter: it starts the real one anew.
pub(crate) fn a_history_that_is_forgotten_is_gone(world: &World) -> Result<()> {
    let old = world.map("a")?;
    world.map("b")?;
    world.cluster.forget_history()?;
    // Not as the answer's status, but as an event.
    let seen = events(world, &format!("resourceVersion={old}"))?;
    let [event] = seen.as_slice() else {
        anyhow::bail!("not one event, but {seen:?}");
    };
    let status = &event["object"];
    ensure!(
        event["type"] == "ERROR"
            && status["kind"] == "Status"
            && status["code"] == 410
            && status["reason"] == "Expired",
        "{event}"
    );
    let message = status["message"].as_str().context("a message")?;
    let start = format!("too old resource version: {old} (");
    ensure!(message.starts_with(&start), "{message}");
    // A new list has a version to go on from.
    let list = world.admin.ask(&format!("GET {}", world.maps("")))?.json();
    let next = world.map("c")?;
    let seen = events(world, &format!("resourceVersion={}", version(&list)?))?;
    ensure!(brief(&seen) == "ADDED c", "{}", brief(&seen));
    ensure!(version(&seen[0]["object"])? == next);
    Ok(())
}
