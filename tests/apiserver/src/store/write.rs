//! Creating and replacing objects: what any kind shares, around what `admission` knows of each.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::{Object, State};
use crate::{
    Resource,
    admission::{self, custom::schema},
    clock,
    failure::Failure,
    resource::NAMESPACES,
};

/// Which part of an object a write is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Part {
    /// All but the status.
    #[default]
    Object,
    /// The status alone.
    Status,
    /// All but the status, and a Pod's node if it has none yet.
    Binding,
}

/// How to write.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Write {
    pub(crate) part: Part,
    /// Admit the object and say what it would be, but store nothing.
    pub(crate) dry_run: bool,
}

/// The object that a request names.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    pub(crate) resource: &'static Resource,
    pub(crate) namespace: String,
    pub(crate) name: String,
}

impl Target {
    pub(crate) fn new(resource: &'static Resource, namespace: &str, name: &str) -> Self {
        Self {
            resource,
            namespace: namespace.into(),
            name: name.into(),
        }
    }

    /// The target that an object names itself.
    pub(super) fn of(resource: &'static Resource, object: &Value) -> Result<Self, Failure> {
        let field = |key: &str| object["metadata"][key].as_str().unwrap_or_default();
        if field("name").is_empty() {
            return Err(Failure::bad_request("the object has no metadata.name"));
        }
        Ok(Self::new(resource, field("namespace"), field("name")))
    }
}

impl State {
    /// Admits and stores a new object.
    pub(crate) fn create(
        &mut self,
        resource: &'static Resource,
        mut object: Value,
        write: &Write,
    ) -> Result<Arc<Object>, Failure> {
        check_type(resource, &mut object)?;
        self.new_metadata(resource, &mut object)?;
        let name = text(&object, "name").to_owned();
        let namespace = text(&object, "namespace").to_owned();
        if resource.namespaced {
            self.check_namespace(resource, &namespace, &name)?;
        }
        if self.find(resource, &namespace, &name).is_some() {
            return Err(Failure::already_exists(resource, &name));
        }
        let definition = self.definition(resource);
        let schema = definition
            .as_ref()
            .and_then(|of| schema(of, resource.version));
        self.transaction(write.dry_run, |state| {
            admission::create(resource, schema, &mut object, &mut state.ranges)?;
            Ok(if write.dry_run {
                Arc::new(Object::new(object, state.version))
            } else {
                state.put(resource, object)
            })
        })
    }

    /// Admits an object and stores it in place of the one that is there.
    pub(crate) fn update(
        &mut self,
        target: &Target,
        mut object: Value,
        write: &Write,
    ) -> Result<Arc<Object>, Failure> {
        let resource = target.resource;
        check_place(target, &object)?;
        let current = self.get(resource, &target.namespace, &target.name)?;
        check_type(resource, &mut object)?;
        check_identity(target, &current, &object)?;
        match write.part {
            Part::Object | Part::Binding => {
                keep_metadata(&current, &mut object);
                if resource.status {
                    copy(&current, &mut object, "status");
                }
            }
            Part::Status if resource.status => {
                let status = object.get("status").cloned().unwrap_or_else(|| json!({}));
                object = (**current).clone();
                object["status"] = status;
            }
            Part::Status => return Err(Failure::no_such_path()),
        }
        let definition = self.definition(resource);
        let schema = definition
            .as_ref()
            .and_then(|of| schema(of, resource.version));
        self.transaction(write.dry_run, |state| {
            admission::update(
                resource,
                schema,
                &current,
                &mut object,
                write.part,
                &mut state.ranges,
            )?;
            object["metadata"]["resourceVersion"] = current["metadata"]["resourceVersion"].clone();
            if object == **current {
                return Ok(Arc::clone(&current));
            }
            if resource.generation && !intent(&object).eq(intent(&current)) {
                let generation = current["metadata"]["generation"].as_u64().unwrap_or(1);
                object["metadata"]["generation"] = json!(generation + 1);
            }
            if write.dry_run {
                return Ok(Arc::new(Object::new(object, current.version())));
            }
            let stored = state.put(resource, object);
            Ok(if state.is_finished(resource, &stored) {
                state.discard(resource, &stored)
            } else {
                stored
            })
        })
    }

    /// Undoes what a failed or dry write has claimed.
    fn transaction<T>(
        &mut self,
        dry_run: bool,
        run: impl FnOnce(&mut Self) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let result = run(self);
        if dry_run || result.is_err() {
            self.ranges.rollback();
        } else {
            self.ranges.commit();
        }
        result
    }

    /// The metadata that the server gives to a new object.
    fn new_metadata(&self, resource: &Resource, object: &mut Value) -> Result<(), Failure> {
        if !text(object, "resourceVersion").is_empty() {
            let why = "resourceVersion should not be set on objects to be created";
            return Err(Failure::bad_request(why));
        }
        let Some(metadata) = metadata(object) else {
            return Err(Failure::bad_request("metadata must be an object"));
        };
        for key in [
            "selfLink",
            "managedFields",
            "deletionTimestamp",
            "deletionGracePeriodSeconds",
        ] {
            metadata.remove(key);
        }
        if !resource.namespaced {
            metadata.remove("namespace");
        }
        let given = |key: &str| {
            metadata
                .get(key)
                .and_then(Value::as_str)
                .unwrap_or_default()
        };
        let prefix = given("generateName");
        if given("name").is_empty() && !prefix.is_empty() {
            let name = format!("{prefix}{}", clock::suffix());
            metadata.insert("name".into(), json!(name));
        }
        metadata.insert("uid".into(), json!(clock::uid()));
        metadata.insert("creationTimestamp".into(), json!(clock::now()));
        metadata.remove("generation");
        if resource.generation {
            metadata.insert("generation".into(), json!(1));
        }
        Ok(())
    }

    fn check_namespace(
        &self,
        resource: &Resource,
        namespace: &str,
        name: &str,
    ) -> Result<(), Failure> {
        if namespace.is_empty() {
            return Err(Failure::bad_request(
                "an empty namespace may not be set during creation",
            ));
        }
        let found = self.get(NAMESPACES, "", namespace)?;
        if found.is_terminating() {
            let why = format!(
                "unable to create new content in namespace {namespace} because it is being \
                 terminated"
            );
            return Err(Failure::forbidden(resource, name, &why));
        }
        Ok(())
    }
}

/// An object that lacks its type gets it; another type than the path's is refused.
fn check_type(resource: &Resource, object: &mut Value) -> Result<(), Failure> {
    let Some(map) = object.as_object_mut() else {
        return Err(Failure::bad_request("the body must be one JSON object"));
    };
    for (key, expected) in [
        ("apiVersion", resource.api_version()),
        ("kind", resource.kind.into()),
    ] {
        match map.get(key).and_then(Value::as_str) {
            None | Some("") => {
                map.insert(key.into(), json!(expected));
            }
            Some(got) if got == expected => {}
            Some(got) => {
                let why = format!(
                    "the {key} in the data ({got}) does not match the expected {key} ({expected})"
                );
                return Err(Failure::bad_request(why));
            }
        }
    }
    Ok(())
}

fn check_place(target: &Target, object: &Value) -> Result<(), Failure> {
    let Target {
        resource,
        namespace,
        name,
    } = target;
    for (key, expected) in [("name", name), ("namespace", namespace)] {
        let got = text(object, key);
        if !got.is_empty() && got != expected && (key == "name" || resource.namespaced) {
            let why = format!(
                "the {key} of the object ({got}) does not match the {key} on the URL ({expected})"
            );
            return Err(Failure::bad_request(why));
        }
    }
    Ok(())
}

/// Refuses an object that is another one, or another version of it, than is stored.
fn check_identity(target: &Target, current: &Object, object: &Value) -> Result<(), Failure> {
    let Target { resource, name, .. } = target;
    let uid = text(object, "uid");
    if !uid.is_empty() && uid != current.uid() {
        let why = format!(
            "Precondition failed: UID in precondition: {uid}, UID in object meta: {}",
            current.uid()
        );
        return Err(Failure::conflict(resource, name, &why));
    }
    let version = text(object, "resourceVersion");
    if !version.is_empty() && version != current.version().to_string() {
        let why = "the object has been modified; please apply your changes to the latest version \
                   and try again";
        return Err(Failure::conflict(resource, name, why));
    }
    Ok(())
}

/// What of the metadata only the server changes stays as it is.
fn keep_metadata(current: &Object, object: &mut Value) {
    if metadata(object).is_none() {
        object["metadata"] = json!({});
    }
    let (old, new) = (&current["metadata"], &mut object["metadata"]);
    for key in [
        "name",
        "namespace",
        "uid",
        "creationTimestamp",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "generation",
        "generateName",
    ] {
        copy(old, new, key);
    }
    if let Some(new) = new.as_object_mut() {
        new.remove("selfLink");
        new.remove("managedFields");
    }
}

/// Makes a field of one object that of another, absence included.
fn copy(from: &Value, to: &mut Value, key: &str) {
    match (from.get(key), to.as_object_mut()) {
        (Some(value), Some(map)) => {
            map.insert(key.into(), value.clone());
        }
        (None, Some(map)) => {
            map.remove(key);
        }
        (_, None) => {}
    }
}

/// The parts of an object whose change raises its generation.
fn intent(object: &Value) -> impl Iterator<Item = (&String, &Value)> {
    let told = |key: &str| !matches!(key, "metadata" | "status" | "apiVersion" | "kind");
    object
        .as_object()
        .into_iter()
        .flatten()
        .filter(move |(key, _)| told(key))
}

/// The metadata as a map; `None` if it is something else.
fn metadata(object: &mut Value) -> Option<&mut Map<String, Value>> {
    object
        .as_object_mut()?
        .entry("metadata")
        .or_insert_with(|| json!({}))
        .as_object_mut()
}

/// A text field of the metadata; empty if it is not there.
fn text<'a>(object: &'a Value, key: &str) -> &'a str {
    object["metadata"][key].as_str().unwrap_or_default()
}
