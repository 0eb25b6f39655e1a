//! The verbs: list, get, create, update, patch, delete and the subresources.

use std::sync::Arc;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use http::Method;
use serde_json::{Value, json};

use super::{Call, Service, duplicates, reply::Reply, selector::Selector, stream};
use crate::{
    Resource,
    admission::{custom::schema, schema},
    failure::{Cause, Failure},
    json::text,
    patch::Patch,
    resource::{NAMESPACES, PODS},
    store::{DeleteOptions, Deletion, Object, Part, State, Target, Write},
};

/// Answers a call that is allowed.
pub(super) fn run(service: &Service, call: &Call) -> Result<Reply, Failure> {
    let path = &call.path;
    let is_defined = |state: &State| state.definition(path.resource).is_some();
    if path.resource.custom && !service.store.read(is_defined) {
        return Err(Failure::no_such_path());
    }
    if !path.subresource.is_empty() {
        return subresource(service, call);
    }
    match (call.method.as_str(), path.name.is_empty()) {
        ("GET", true) => list(service, call),
        ("GET", false) => {
            let object = service
                .store
                .get(path.resource, &path.namespace, &path.name)?;
            Ok(reply(call, 200, &object))
        }
        ("POST", true) => create(service, call),
        ("PUT", false) => update(service, call, Part::Object),
        ("PATCH", false) => patch(service, call, Part::Object),
        ("DELETE", false) => delete(service, call),
        ("DELETE", true) => delete_collection(service, call),
        _ => Err(Failure::method_not_allowed()),
    }
}

fn subresource(service: &Service, call: &Call) -> Result<Reply, Failure> {
    let path = &call.path;
    let resource = path.resource;
    match (path.subresource.as_str(), call.method.as_str()) {
        ("status", "GET") if resource.status => {
            let object = service.store.get(resource, &path.namespace, &path.name)?;
            Ok(reply(call, 200, &object))
        }
        ("status", "PUT") if resource.status => update(service, call, Part::Status),
        ("status", "PATCH") if resource.status => patch(service, call, Part::Status),
        ("binding", "POST") if resource == PODS => {
            let body = call.json()?;
            let node = text(&body["target"]["name"]);
            if node.is_empty() {
                return Err(Failure::bad_request("a binding needs target.name"));
            }
            service.store.bind(&path.namespace, &path.name, node)?;
            Ok(Reply::json(201, success(None).to_string()))
        }
        ("eviction", "POST") if resource == PODS => {
            let body = call.json()?;
            let options = delete_options(&body["deleteOptions"], call)?;
            service
                .store
                .write(resource, |state| state.delete(&target(call), &options))?;
            Ok(Reply::json(201, success(None).to_string()))
        }
        ("finalize", "PUT") if resource == NAMESPACES => {
            // The namespace controller decides when a namespace ends, so there is no more to do.
            let object = service.store.get(resource, "", &path.name)?;
            Ok(reply(call, 200, &object))
        }
        _ => Err(Failure::no_such_path()),
    }
}

fn target(call: &Call) -> Target {
    Target::new(call.path.resource, &call.path.namespace, &call.path.name)
}

fn reply(call: &Call, code: u16, object: &Object) -> Reply {
    Reply::json(code, call.format.object(call.path.resource, object))
}

fn selector(call: &Call) -> Result<Selector, Failure> {
    let (path, query) = (&call.path, &call.query);
    let (labels, fields) = (query.get("labelSelector"), query.get("fieldSelector"));
    Selector::parse(path.resource, &path.namespace, labels, fields)
}

fn list(service: &Service, call: &Call) -> Result<Reply, Failure> {
    let (path, query) = (&call.path, &call.query);
    let selector = selector(call)?;
    if query.flag("watch") {
        return stream::open(service, call, selector);
    }
    let limit = query
        .number("limit")?
        .and_then(|limit| usize::try_from(limit).ok());
    let limit = limit.filter(|limit| *limit > 0).unwrap_or(usize::MAX);
    let token = Continue::parse(query.get("continue"))?;
    let wanted = query.number("resourceVersion")?.unwrap_or(0);
    let (version, mut objects) = service.store.read(|state| {
        if wanted > state.version {
            return Err(Failure::too_large(wanted, state.version));
        }
        let version = token.as_ref().map_or(state.version, |token| token.version);
        state.check_age(path.resource, version)?;
        let start = token.map(|token| (token.namespace, token.name));
        let shelf = &state.shelves[path.resource.index];
        // One more than asked for tells whether there is more.
        let found = shelf.within(&path.namespace, start.as_ref());
        let found = found
            .filter(|object| selector.matches(object))
            .take(limit.saturating_add(1));
        Ok((version, found.cloned().collect::<Vec<Arc<Object>>>()))
    })?;
    let mut about = json!({"resourceVersion": version.to_string()});
    if objects.len() > limit {
        objects.truncate(limit);
        if let Some(last) = objects.last() {
            about["continue"] = json!(Continue::after(last, version).text());
        }
    }
    let items = objects.iter().map(|object| &**object);
    Ok(Reply::json(
        200,
        call.format.list(path.resource, items, &about),
    ))
}

/// Where the next page of a list starts. Its version is the first page's: a watch from there tells
/// whatever later pages may have seen too early.
struct Continue {
    version: u64,
    namespace: String,
    name: String,
}

impl Continue {
    fn after(object: &Object, version: u64) -> Self {
        Self {
            version,
            namespace: object.namespace().into(),
            name: object.name().into(),
        }
    }

    fn text(&self) -> String {
        URL_SAFE_NO_PAD.encode(format!("{}/{}/{}", self.version, self.namespace, self.name))
    }

    fn parse(text: &str) -> Result<Option<Self>, Failure> {
        if text.is_empty() {
            return Ok(None);
        }
        let parse = || {
            let text = String::from_utf8(URL_SAFE_NO_PAD.decode(text).ok()?).ok()?;
            let mut parts = text.splitn(3, '/');
            let version = parts.next()?.parse().ok()?;
            let (namespace, name) = (parts.next()?.to_owned(), parts.next()?.to_owned());
            Some(Self {
                version,
                namespace,
                name,
            })
        };
        let refuse = || Failure::bad_request("the continue token is not one of this server");
        parse().map(Some).ok_or_else(refuse)
    }
}

/// What becomes of fields that a kind does not have.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Strays {
    Ignored,
    Told,
    Refused,
}

impl Strays {
    fn of(call: &Call) -> Result<Self, Failure> {
        match call.query.get("fieldValidation") {
            "Ignore" => Ok(Self::Ignored),
            "" | "Warn" => Ok(Self::Told),
            "Strict" => Ok(Self::Refused),
            other => {
                let known = ["", "Ignore", "Strict", "Warn"];
                let cause = Cause::unsupported("fieldValidation", &other.into(), &known);
                Err(Failure::bad_options(options_of(call), cause))
            }
        }
    }
}

/// Takes unknown fields away, and refuses them where the client asks for it, as kubectl does;
/// otherwise they are what the client is warned of.
fn check_fields(state: &State, call: &Call, object: &mut Value) -> Result<Vec<String>, Failure> {
    let (resource, strays) = (call.path.resource, Strays::of(call)?);
    let definition = state.definition(resource);
    let of = definition
        .as_ref()
        .and_then(|of| schema(of, resource.version));
    let unknown = schema::take_unknown(resource, of, object);
    let unknown = unknown
        .iter()
        .map(|field| format!("unknown field {field:?}"));
    let is_patch = call.method == Method::PATCH;
    let double = if is_patch {
        Vec::new()
    } else {
        duplicates::find(&call.body)
    };
    let double = double
        .iter()
        .map(|field| format!("duplicate field {field:?}"));
    let list: Vec<_> = double.chain(unknown).collect();
    match strays {
        Strays::Ignored => return Ok(Vec::new()),
        Strays::Refused if !list.is_empty() => {}
        Strays::Told | Strays::Refused => return Ok(list),
    }
    let Resource { kind, version, .. } = resource;
    let why = format!(
        "{kind} in version {version:?} cannot be handled as a {kind}: strict decoding error: {}",
        list.join(", ")
    );
    Err(Failure::bad_request(why))
}

fn create(service: &Service, call: &Call) -> Result<Reply, Failure> {
    let path = &call.path;
    let mut object = call.json()?;
    let warnings = service
        .store
        .read(|state| check_fields(state, call, &mut object))?;
    take_namespace(&mut object, call)?;
    let write = Write {
        dry_run: dry_run(call)?,
        ..Write::default()
    };
    let create = |state: &mut State| state.create(path.resource, object, &write);
    let stored = service.store.write(path.resource, create)?;
    Ok(reply(call, 201, &stored).warn(&warnings))
}

/// The path's namespace counts; an object that names another is refused.
fn take_namespace(object: &mut Value, call: &Call) -> Result<(), Failure> {
    let path = &call.path;
    if !path.resource.namespaced {
        return Ok(());
    }
    let given = text(&object["metadata"]["namespace"]);
    if !given.is_empty() && given != path.namespace {
        let why = format!(
            "the namespace of the provided object does not match the namespace sent on the \
             request: {given:?}, {:?}",
            path.namespace
        );
        return Err(Failure::bad_request(why));
    }
    if object.get("metadata").is_some_and(Value::is_object) {
        object["metadata"]["namespace"] = json!(path.namespace);
    }
    Ok(())
}

fn update(service: &Service, call: &Call, part: Part) -> Result<Reply, Failure> {
    let target = target(call);
    let mut object = call.json()?;
    let write = Write {
        dry_run: dry_run(call)?,
        part,
    };
    let (stored, warnings) = service.store.write(target.resource, |state| {
        let warnings = check_fields(state, call, &mut object)?;
        Ok((state.update(&target, object, &write)?, warnings))
    })?;
    Ok(reply(call, 200, &stored).warn(&warnings))
}

fn patch(service: &Service, call: &Call, part: Part) -> Result<Reply, Failure> {
    let target = target(call);
    let patch = Patch::parse(&call.content_type, &call.body)?;
    let write = Write {
        dry_run: dry_run(call)?,
        part,
    };
    let (manager, force) = (call.query.get("fieldManager"), call.query.flag("force"));
    if let Patch::Apply(object) = &patch {
        let apply = |state: &mut State| state.apply(&target, object, manager, force, &write);
        let (created, stored) = service.store.write(target.resource, apply)?;
        return Ok(reply(call, if created { 201 } else { 200 }, &stored));
    }
    if target.resource.custom && matches!(patch, Patch::Strategic(_)) {
        // What merges the lists of custom resources by key is an apply alone.
        return Err(Failure::unsupported_media_type(&call.content_type));
    }
    let (stored, warnings) = service.store.write(target.resource, |state| {
        let current = state.get(target.resource, &target.namespace, &target.name)?;
        let mut patched = patch.apply(&current)?;
        let whole = patched.clone();
        let warnings = check_fields(state, call, &mut patched).map_err(|failure| {
            // A patch is not decoded: what is refused is what it has made.
            let strays = failure.message.split_once("strict decoding error: ");
            match strays {
                Some((_, strays)) => Failure::bad_patch(&whole, strays),
                None => failure,
            }
        })?;
        Ok((state.update(&target, patched, &write)?, warnings))
    })?;
    Ok(reply(call, 200, &stored).warn(&warnings))
}

fn delete_options(body: &Value, call: &Call) -> Result<DeleteOptions, Failure> {
    let given = |value: &Value| value.as_str().map(str::to_owned);
    let grace = body["gracePeriodSeconds"].as_u64();
    let dry_run = body["dryRun"]
        .as_array()
        .is_some_and(|list| !list.is_empty());
    Ok(DeleteOptions {
        grace: grace.or(call.query.number("gracePeriodSeconds")?),
        uid: given(&body["preconditions"]["uid"]),
        version: given(&body["preconditions"]["resourceVersion"]),
        dry_run: dry_run || self::dry_run(call)?,
    })
}

/// What the options of a write are called.
fn options_of(call: &Call) -> &'static str {
    match call.method.as_str() {
        "POST" => "CreateOptions",
        "PUT" => "UpdateOptions",
        "PATCH" => "PatchOptions",
        _ => "DeleteOptions",
    }
}

/// Whether nothing is to be stored.
fn dry_run(call: &Call) -> Result<bool, Failure> {
    match call.query.get("dryRun") {
        "" => Ok(false),
        "All" => Ok(true),
        other => {
            let cause = Cause::unsupported("dryRun", &json!([other]), &["All"]);
            Err(Failure::bad_options(options_of(call), cause))
        }
    }
}

fn options_of_body(call: &Call) -> Result<DeleteOptions, Failure> {
    let body = if call.body.is_empty() {
        Value::Null
    } else {
        call.json()?
    };
    delete_options(&body, call)
}

fn delete(service: &Service, call: &Call) -> Result<Reply, Failure> {
    let target = target(call);
    let options = options_of_body(call)?;
    let deletion = service
        .store
        .write(target.resource, |state| state.delete(&target, &options))?;
    Ok(match deletion {
        // Pods are answered with themselves, whatever became of them.
        Deletion::Pending(object) => reply(call, 200, &object),
        Deletion::Done(object) if target.resource == PODS => reply(call, 200, &object),
        Deletion::Done(object) => Reply::json(200, success(Some((&target, &object))).to_string()),
    })
}

fn delete_collection(service: &Service, call: &Call) -> Result<Reply, Failure> {
    let resource = call.path.resource;
    let (selector, options) = (selector(call)?, options_of_body(call)?);
    let deleted = service.store.write(resource, |state| {
        let shelf = &state.shelves[resource.index];
        let found = shelf.within(&call.path.namespace, None);
        let found: Vec<_> = found
            .filter(|object| selector.matches(object))
            .cloned()
            .collect();
        let delete = |object: &Arc<Object>| {
            let target = Target::new(resource, object.namespace(), object.name());
            state.delete(&target, &options).map(Deletion::into_object)
        };
        found.iter().map(delete).collect::<Result<Vec<_>, _>>()
    })?;
    let about = json!({"resourceVersion": service.store.version().to_string()});
    let items = deleted.iter().map(|object| &**object);
    Ok(Reply::json(200, call.format.list(resource, items, &about)))
}

/// The `Status` of a request that went well.
fn success(about: Option<(&Target, &Object)>) -> Value {
    let mut status =
        json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"});
    if let Some((target, object)) = about {
        status["details"] = json!({
            "name": target.name,
            "group": target.resource.group,
            "kind": target.resource.plural,
            "uid": object.uid(),
        });
    }
    status
}
