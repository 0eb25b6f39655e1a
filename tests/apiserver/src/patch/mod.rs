//! Patches: JSON patch, merge patch, strategic merge patch and server-side apply.

pub(crate) mod apply;
mod json_patch;
mod merge;
mod strategic;

use serde_json::Value;

use crate::failure::Failure;

/// A parsed patch.
#[derive(Debug)]
pub(crate) enum Patch {
    /// RFC 6902.
    Json(Vec<json_patch::Operation>),
    /// RFC 7396.
    Merge(Value),
    /// A merge patch whose lists are merged by key.
    Strategic(Value),
    /// Server-side apply: all that one manager wants of the object.
    Apply(Value),
}

impl Patch {
    /// Parses a request's body by its content type.
    pub(crate) fn parse(content_type: &str, body: &[u8]) -> Result<Self, Failure> {
        let refuse = |error: serde_json::Error| {
            Failure::bad_request(format!("the patch cannot be read: {error}"))
        };
        let kind = content_type.split(';').next().unwrap_or_default().trim();
        if kind == "application/json-patch+json" {
            return serde_json::from_slice(body).map(Self::Json).map_err(refuse);
        }
        let build = match kind {
            "application/merge-patch+json" => Self::Merge,
            "application/strategic-merge-patch+json" => Self::Strategic,
            "application/apply-patch+yaml" => Self::Apply,
            other => return Err(Failure::unsupported_media_type(other)),
        };
        // kubectl and client libraries send apply patches as JSON, which is YAML.
        let value: Value = serde_json::from_slice(body).map_err(refuse)?;
        if !value.is_object() {
            return Err(Failure::bad_request("the patch must be an object"));
        }
        Ok(build(value))
    }

    /// The object with the patch applied.
    pub(crate) fn apply(&self, current: &Value) -> Result<Value, Failure> {
        let mut object = current.clone();
        match self {
            Self::Json(operations) => json_patch::apply(&mut object, operations)?,
            Self::Merge(patch) => merge::apply(&mut object, patch),
            Self::Strategic(patch) => strategic::apply(&mut object, patch)?,
            Self::Apply(_) => {
                return Err(Failure::bad_request(
                    "an apply needs its manager's earlier state",
                ));
            }
        }
        Ok(object)
    }
}
