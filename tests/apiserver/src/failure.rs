//! What goes wrong, as the API says it: a code, a reason and a `Status` object.

use std::fmt;

use serde_json::{Value, json};

use crate::resource::{NAMESPACES, Resource};

/// One thing that is wrong with an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cause {
    /// `FieldValueInvalid`, `FieldValueRequired` and so on.
    pub reason: &'static str,
    /// Path of the field, such as `spec.ingress[0].from[0].ipBlock.cidr`.
    pub field: String,
    /// What is wrong with it.
    pub message: String,
}

impl Cause {
    /// The field's value is not acceptable.
    pub(crate) fn invalid(field: impl Into<String>, value: &Value, why: &str) -> Self {
        let message = format!("Invalid value: {value}: {why}");
        Self {
            reason: "FieldValueInvalid",
            field: field.into(),
            message,
        }
    }

    /// The field is missing.
    pub(crate) fn required(field: impl Into<String>, why: &str) -> Self {
        let mut message = "Required value".to_owned();
        if !why.is_empty() {
            message = format!("{message}: {why}");
        }
        Self {
            reason: "FieldValueRequired",
            field: field.into(),
            message,
        }
    }

    /// The field must not be there.
    pub(crate) fn forbidden(field: impl Into<String>, why: &str) -> Self {
        let message = format!("Forbidden: {why}");
        Self {
            reason: "FieldValueForbidden",
            field: field.into(),
            message,
        }
    }

    /// The field's value is none of those known.
    pub(crate) fn unsupported(field: impl Into<String>, value: &Value, known: &[&str]) -> Self {
        let known: Vec<_> = known.iter().map(|k| format!("{k:?}")).collect();
        let message = format!(
            "Unsupported value: {value}: supported values: {}",
            known.join(", ")
        );
        Self {
            reason: "FieldValueNotSupported",
            field: field.into(),
            message,
        }
    }

    /// The value is of another type than the field.
    pub(crate) fn of_type(field: impl Into<String>, given: &str, why: &str) -> Self {
        Self {
            reason: "FieldValueTypeInvalid",
            ..Self::invalid(field, &given.into(), why)
        }
    }

    /// The text is longer than it may be.
    pub(crate) fn too_long(field: impl Into<String>, most: u64) -> Self {
        Self {
            reason: "FieldValueTooLong",
            field: field.into(),
            message: format!("Too long: may not be more than {most} bytes"),
        }
    }

    /// There are more than there may be.
    pub(crate) fn too_many(field: impl Into<String>, count: u64, most: u64) -> Self {
        let items = if most == 1 { "item" } else { "items" };
        Self {
            reason: "FieldValueTooMany",
            field: field.into(),
            message: format!("Too many: {count}: must have at most {most} {items}"),
        }
    }

    /// The value is there twice where it may be once.
    pub(crate) fn duplicate(field: impl Into<String>, value: &Value) -> Self {
        let message = format!("Duplicate value: {value}");
        Self {
            reason: "FieldValueDuplicate",
            field: field.into(),
            message,
        }
    }
}

/// The object that a failure is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct About {
    /// API group; empty for the core group.
    pub group: String,
    /// Kind, or plural name of the resource.
    pub kind: String,
    /// The object's name, if it has one.
    pub name: String,
}

/// A refused request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// HTTP status code.
    pub code: u16,
    /// Machine-readable reason, such as `NotFound`.
    pub reason: &'static str,
    /// What a person reads.
    pub message: String,
    /// The object that the failure is about.
    pub about: Option<Box<About>>,
    /// What exactly is wrong, for [`Failure::invalid`].
    pub causes: Vec<Cause>,
    /// After how many seconds another try makes sense.
    pub retry_after: Option<u32>,
}

impl std::error::Error for Failure {}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({} {})", self.message, self.code, self.reason)
    }
}

impl Failure {
    fn new(code: u16, reason: &'static str, message: impl Into<String>) -> Self {
        let message = message.into();
        Self {
            code,
            reason,
            message,
            about: None,
            causes: Vec::new(),
            retry_after: None,
        }
    }

    fn about(mut self, resource: &Resource, name: &str) -> Self {
        self.about = Some(Box::new(About {
            group: resource.group.into(),
            kind: resource.plural.into(),
            name: name.into(),
        }));
        self
    }

    /// 400: the request makes no sense.
    pub(crate) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(400, "BadRequest", message)
    }

    /// 401: no or an unknown token.
    pub(crate) fn unauthorized() -> Self {
        Self::new(401, "Unauthorized", "Unauthorized")
    }

    /// 403: the object may not be made or changed.
    pub(crate) fn forbidden(resource: &Resource, name: &str, why: &str) -> Self {
        let kind = resource.qualified();
        let message = if name.is_empty() {
            format!("{kind} is forbidden: {why}")
        } else {
            format!("{kind} {name:?} is forbidden: {why}")
        };
        Self::new(403, "Forbidden", message).about(resource, name)
    }

    /// 403: a path that names no resource is not for this user.
    pub(crate) fn forbidden_path(user: &str, verb: &str, path: &str) -> Self {
        let message = format!("forbidden: User {user:?} cannot {verb} path {path:?}");
        Self::new(403, "Forbidden", message)
    }

    /// 404: no such object.
    pub(crate) fn not_found(resource: &Resource, name: &str) -> Self {
        let message = format!("{} {name:?} not found", resource.qualified());
        Self::new(404, "NotFound", message).about(resource, name)
    }

    /// 404: no such path.
    pub(crate) fn no_such_path() -> Self {
        Self::new(
            404,
            "NotFound",
            "the server could not find the requested resource",
        )
    }

    /// 405: the path does not take the verb.
    pub(crate) fn method_not_allowed() -> Self {
        let why = "the server does not allow this method on the requested resource";
        Self::new(405, "MethodNotAllowed", why)
    }

    /// 409: the name is taken.
    pub(crate) fn already_exists(resource: &Resource, name: &str) -> Self {
        let message = format!("{} {name:?} already exists", resource.qualified());
        Self::new(409, "AlreadyExists", message).about(resource, name)
    }

    /// 409: the object is not what the writer took it for.
    pub(crate) fn conflict(resource: &Resource, name: &str, why: &str) -> Self {
        let message = format!(
            "Operation cannot be fulfilled on {} {name:?}: {why}",
            resource.qualified()
        );
        Self::new(409, "Conflict", message).about(resource, name)
    }

    /// 409: another manager owns fields that an apply would change.
    pub(crate) fn apply_conflict(causes: Vec<Cause>) -> Self {
        let list: Vec<_> = causes
            .iter()
            .map(|c| format!("{}: {}", c.message, c.field))
            .collect();
        let message = format!(
            "Apply failed with {} conflict{}: {}",
            causes.len(),
            if causes.len() == 1 { "" } else { "s" },
            list.join("; ")
        );
        Self {
            causes,
            ..Self::new(409, "Conflict", message)
        }
    }

    /// 410: the resource version or the continue token is too old.
    pub(crate) fn expired(wanted: u64, oldest: u64) -> Self {
        let message = format!("too old resource version: {wanted} ({oldest})");
        Self::new(410, "Expired", message)
    }

    /// 415: a patch of a kind that is not known.
    pub(crate) fn unsupported_media_type(got: &str) -> Self {
        let message = format!("the body of the request was in an unknown format: {got:?}");
        Self::new(415, "UnsupportedMediaType", message)
    }

    /// 422: the request's own options, such as `ListOptions`, are not valid.
    pub(crate) fn bad_options(kind: &'static str, cause: Cause) -> Self {
        let options = Resource {
            group: "meta.k8s.io",
            kind,
            ..*NAMESPACES
        };
        Self::invalid(&options, "", vec![cause])
    }

    /// 422: what a patch makes of an object has fields that the kind does not have.
    pub(crate) fn bad_patch(patched: &Value, strays: &str) -> Self {
        let nothing = Resource {
            kind: "",
            ..*NAMESPACES
        };
        let why = format!("strict decoding error: {strays}");
        let cause = Cause::invalid("patch", &patched.to_string().into(), &why);
        Self::invalid(&nothing, "", vec![cause])
    }

    /// 500: an apply states fields that the kind does not have.
    pub(crate) fn untyped(resource: &Resource, place: (&str, &str), unknown: &[String]) -> Self {
        let fields = unknown
            .iter()
            .map(|field| format!(".{field}: field not declared in schema"));
        let (namespace, name) = place;
        let message = format!(
            "failed to create typed patch object ({namespace}/{name}; {}, Kind={}): {}",
            match resource.group {
                "" => format!("/{}", resource.version),
                _ => resource.api_version(),
            },
            resource.kind,
            fields.collect::<Vec<_>>().join(", ")
        );
        Self::new(500, "", message)
    }

    /// 422: the object is not valid.
    pub(crate) fn invalid(resource: &Resource, name: &str, causes: Vec<Cause>) -> Self {
        let list: Vec<_> = causes
            .iter()
            .map(|c| format!("{}: {}", c.field, c.message))
            .collect();
        let list = if let [only] = list.as_slice() {
            only.clone()
        } else {
            format!("[{}]", list.join(", "))
        };
        let message = format!("{} {name:?} is invalid: {list}", resource.qualified_kind());
        let about = Some(Box::new(About {
            group: resource.group.into(),
            kind: resource.kind.into(),
            name: name.into(),
        }));
        Self {
            about,
            causes,
            ..Self::new(422, "Invalid", message)
        }
    }

    /// 504: the resource version is one that the server has yet to reach.
    pub(crate) fn too_large(wanted: u64, current: u64) -> Self {
        let message = format!("Too large resource version: {wanted}, current: {current}");
        let causes = vec![Cause {
            reason: "ResourceVersionTooLarge",
            field: String::new(),
            message: "Too large resource version".into(),
        }];
        Self {
            causes,
            retry_after: Some(1),
            ..Self::new(504, "Timeout", message)
        }
    }

    /// Whether the object was not there.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        self.code == 404
    }

    /// The `Status` object that tells a client.
    #[must_use]
    pub fn status(&self) -> Value {
        let mut status = json!({
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "code": self.code,
        });
        let mut details = serde_json::Map::new();
        if let Some(about) = &self.about {
            let About { group, kind, name } = &**about;
            for (key, value) in [("name", name), ("group", group), ("kind", kind)] {
                if !value.is_empty() {
                    details.insert(key.into(), json!(value));
                }
            }
        }
        if !self.causes.is_empty() {
            let causes = self.causes.iter();
            let causes =
                causes.map(|c| json!({"reason": c.reason, "message": c.message, "field": c.field}));
            details.insert("causes".into(), causes.collect());
        }
        if let Some(seconds) = self.retry_after {
            details.insert("retryAfterSeconds".into(), json!(seconds));
        }
        if !details.is_empty() {
            status["details"] = Value::Object(details);
        }
        status
    }
}
