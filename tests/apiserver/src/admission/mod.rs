//! What happens to an object between a request and storage: defaults, validation, addresses.

pub(crate) mod custom;
pub(crate) mod endpoint_slice;
pub(crate) mod meta;
pub(crate) mod network_policy;
pub(crate) mod node;
pub(crate) mod pod;
pub(crate) mod schema;
pub(crate) mod service;

use serde_json::{Value, json};

use crate::{
    Resource,
    alloc::Ranges,
    failure::{Cause, Failure},
    json::{drop_nulls, is_empty, object_at, remove, set_default},
    resource::{
        DEFINITIONS, ENDPOINT_SLICES, EVENTS, NAMESPACES, NETWORK_POLICIES, NODES, PODS, SERVICES,
    },
    store::Part,
};

/// Completes and checks a new object, and takes what the cluster hands out to it. A custom resource
/// comes with the schema of its definition.
pub(crate) fn create(
    resource: &Resource,
    schema: Option<&Value>,
    object: &mut Value,
    ranges: &mut Ranges,
) -> Result<(), Failure> {
    // A Node comes with the status that its kubelet knows; all others start without one.
    if resource.status && resource != NODES {
        remove(object, "status");
    }
    complete(resource, object, None, ranges)?;
    let mut causes = meta::check(resource, object);
    causes.extend(check(resource, schema, object));
    refuse(resource, object, causes)?;
    let causes = if resource == SERVICES {
        service::allocate(object, None, ranges)
    } else if resource == NODES {
        node::allocate(object, ranges)
    } else {
        Vec::new()
    };
    refuse(resource, object, causes)
}

/// Completes and checks a changed object against the stored one.
pub(crate) fn update(
    resource: &Resource,
    schema: Option<&Value>,
    old: &Value,
    object: &mut Value,
    part: Part,
    ranges: &mut Ranges,
) -> Result<(), Failure> {
    complete(resource, object, Some(old), ranges)?;
    if part == Part::Status && schema.is_none() {
        return Ok(());
    }
    let mut causes = meta::check(resource, object);
    causes.extend(check(resource, schema, object));
    if resource == PODS {
        causes.extend(pod::check_update(old, object, part));
    } else if resource == ENDPOINT_SLICES {
        causes.extend(endpoint_slice::check_update(old, object));
    } else if resource == NODES {
        causes.extend(node::check_update(old, object));
    }
    refuse(resource, object, causes)?;
    let causes = if resource == SERVICES {
        service::allocate(object, Some(old), ranges)
    } else {
        Vec::new()
    };
    refuse(resource, object, causes)
}

/// Sets what the writer left open.
fn complete(
    resource: &Resource,
    object: &mut Value,
    old: Option<&Value>,
    ranges: &Ranges,
) -> Result<(), Failure> {
    drop_nulls(object);
    for key in ["labels", "annotations", "finalizers", "ownerReferences"] {
        // As the real server stores them: nothing rather than an empty list or map.
        if is_empty(&object["metadata"][key]) {
            remove(&mut object["metadata"], key);
        }
    }
    if resource == PODS || resource == NODES {
        schema::quantities(object);
    }
    schema::decode(resource, object)?;
    if resource == PODS {
        pod::complete(object);
    } else if resource == SERVICES {
        service::complete(object, old, &ranges.families());
    } else if resource == NETWORK_POLICIES {
        network_policy::complete(object);
    } else if resource == ENDPOINT_SLICES {
        endpoint_slice::complete(object);
    } else if resource == NAMESPACES {
        namespace(object);
    } else if resource == DEFINITIONS {
        custom::complete_definition(object);
    }
    Ok(())
}

fn namespace(object: &mut Value) {
    let name = object["metadata"]["name"].clone();
    if let Some(labels) = object_at(&mut object["metadata"], "labels") {
        labels.insert("kubernetes.io/metadata.name".into(), name);
    }
    if object_at(object, "spec").is_some() {
        set_default(&mut object["spec"], "finalizers", json!(["kubernetes"]));
    }
    if object_at(object, "status").is_some() {
        set_default(&mut object["status"], "phase", "Active");
    }
}

fn check(resource: &Resource, schema: Option<&Value>, object: &Value) -> Vec<Cause> {
    if let Some(schema) = schema {
        custom::check(schema, object)
    } else if resource == PODS {
        pod::check(object)
    } else if resource == SERVICES {
        service::check(object)
    } else if resource == NETWORK_POLICIES {
        network_policy::check(object)
    } else if resource == ENDPOINT_SLICES {
        endpoint_slice::check(object)
    } else if resource == DEFINITIONS {
        custom::check_definition(object)
    } else if resource == EVENTS {
        check_event(object)
    } else {
        Vec::new()
    }
}

/// An event is where its object is; those of objects without a namespace are in two of them.
fn check_event(event: &Value) -> Vec<Cause> {
    let about = event["involvedObject"].get("namespace");
    let about = about.cloned().unwrap_or_else(|| "".into());
    let own = &event["metadata"]["namespace"];
    let fits = if is_empty(&about) {
        *own == "default" || *own == "kube-system"
    } else {
        *own == about
    };
    if fits {
        return Vec::new();
    }
    let why = "does not match event.namespace";
    vec![Cause::invalid("involvedObject.namespace", &about, why)]
}

fn refuse(resource: &Resource, object: &Value, causes: Vec<Cause>) -> Result<(), Failure> {
    if causes.is_empty() {
        return Ok(());
    }
    let name = object["metadata"]["name"].as_str().unwrap_or_default();
    Err(Failure::invalid(resource, name, causes))
}
