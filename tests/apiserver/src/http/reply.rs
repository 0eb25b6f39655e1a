//! Answers: their format as the client accepts it, and their bytes.

use std::convert::Infallible;

use http::{
    HeaderValue, Response, StatusCode,
    header::{CONTENT_TYPE, WARNING},
};
use http_body_util::{BodyExt as _, Full, combinators::UnsyncBoxBody};
use hyper::body::Bytes;
use serde_json::{Value, json};

use super::{request::Query, table};
use crate::{
    Resource,
    failure::Failure,
    store::{Change, Object},
};

/// The body of every response.
pub(crate) type Body = UnsyncBoxBody<Bytes, Infallible>;

const JSON: &str = "application/json";

/// An answer.
pub(super) struct Reply {
    code: u16,
    content_type: &'static str,
    warnings: Vec<HeaderValue>,
    body: Body,
}

impl Reply {
    pub(super) fn new(code: u16, content_type: &'static str, body: impl Into<Bytes>) -> Self {
        Self {
            code,
            content_type,
            warnings: Vec::new(),
            body: Full::new(body.into()).boxed_unsync(),
        }
    }

    pub(super) fn json(code: u16, body: impl Into<Bytes>) -> Self {
        Self::new(code, JSON, body)
    }

    pub(super) fn text(body: &'static str) -> Self {
        Self::new(200, "text/plain; charset=utf-8", body)
    }

    pub(super) fn stream(body: Body) -> Self {
        Self {
            code: 200,
            content_type: JSON,
            warnings: Vec::new(),
            body,
        }
    }

    pub(super) fn status(failure: &Failure) -> Self {
        Self::json(failure.code, failure.status().to_string())
    }

    /// Adds what the client is warned of, as `Warning` headers (RFC 7234, section 5.5).
    pub(super) fn warn(mut self, warnings: &[String]) -> Self {
        let header = |text: &String| HeaderValue::try_from(format!("299 - {text:?}")).ok();
        self.warnings.extend(warnings.iter().filter_map(header));
        self
    }

    pub(super) fn into_response(self) -> Response<Body> {
        let mut response = Response::new(self.body);
        *response.status_mut() =
            StatusCode::from_u16(self.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let content_type = HeaderValue::from_static(self.content_type);
        response.headers_mut().insert(CONTENT_TYPE, content_type);
        for warning in self.warnings {
            response.headers_mut().append(WARNING, warning);
        }
        response
    }
}

/// How a client wants objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    /// As they are.
    Plain,
    /// Their metadata alone.
    Metadata,
    /// As rows for people, with this much of each object beside its row.
    Table(Include),
}

/// What a table's rows hold of their objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Include {
    Nothing,
    Metadata,
    Object,
}

impl Format {
    /// The first format of an Accept header that is served.
    pub(super) fn of(accept: &str, query: &Query) -> Self {
        for choice in accept.split(',') {
            let mut parts = choice.split(';').map(str::trim);
            if !matches!(parts.next(), Some(JSON | "application/*" | "*/*")) {
                continue;
            }
            let value = |key: &str| parts.clone().find_map(|part| part.strip_prefix(key));
            match (value("as="), value("v=")) {
                (Some("Table"), Some("v1")) => {
                    return Self::Table(match query.get("includeObject") {
                        "None" => Include::Nothing,
                        "Object" => Include::Object,
                        _ => Include::Metadata,
                    });
                }
                (Some("PartialObjectMetadata" | "PartialObjectMetadataList"), Some("v1")) => {
                    return Self::Metadata;
                }
                (None, _) => return Self::Plain,
                (Some(_), _) => {}
            }
        }
        Self::Plain
    }

    /// One object.
    pub(super) fn object(self, resource: &Resource, object: &Object) -> Bytes {
        match self {
            Self::Plain => object.json(),
            Self::Metadata => metadata(object).to_string().into(),
            Self::Table(include) => {
                let rows = json!([table::row(resource, object, include)]);
                table(
                    resource,
                    rows,
                    &json!({"resourceVersion": object.version().to_string()}),
                )
                .to_string()
                .into()
            }
        }
    }

    /// A list of objects; `about` is the list's metadata.
    pub(super) fn list<'a>(
        self,
        resource: &Resource,
        objects: impl Iterator<Item = &'a Object>,
        about: &Value,
    ) -> Bytes {
        if let Self::Table(include) = self {
            let rows = objects
                .map(|object| table::row(resource, object, include))
                .collect();
            return table(resource, rows, about).to_string().into();
        }
        let (kind, version) = match self {
            Self::Metadata => ("PartialObjectMetadata", "meta.k8s.io/v1".to_owned()),
            _ => (resource.kind, resource.api_version()),
        };
        // Written by hand so that the objects' texts are used as they are.
        let head = format!(
            "{{\"kind\":\"{kind}List\",\"apiVersion\":\"{version}\",\"metadata\":{about},\"items\":["
        );
        let mut text = head.into_bytes();
        for (place, object) in objects.enumerate() {
            if place > 0 {
                text.push(b',');
            }
            text.extend_from_slice(&self.object(resource, object));
        }
        text.extend_from_slice(b"]}");
        text.into()
    }

    /// One event of a watch. The first event of a table's watch names the columns.
    pub(super) fn event(
        self,
        resource: &Resource,
        change: Change,
        object: &Object,
        first: bool,
    ) -> Bytes {
        let kind = match change {
            Change::Added => "ADDED",
            Change::Modified => "MODIFIED",
            Change::Deleted => "DELETED",
        };
        let object = match self {
            Self::Table(include) if !first => {
                let rows = json!([table::row(resource, object, include)]);
                let version = json!({"resourceVersion": object.version().to_string()});
                let mut table = table(resource, rows, &version);
                table["columnDefinitions"] = Value::Null;
                table.to_string().into()
            }
            _ => self.object(resource, object),
        };
        let mut text = format!("{{\"type\":\"{kind}\",\"object\":").into_bytes();
        text.extend_from_slice(&object);
        text.extend_from_slice(b"}\n");
        text.into()
    }

    /// A bookmark: every change up to the version has been told.
    pub(super) fn bookmark(self, resource: &Resource, version: u64, initial_end: bool) -> Bytes {
        let mut metadata =
            json!({"resourceVersion": version.to_string(), "creationTimestamp": null});
        if initial_end {
            metadata["annotations"] = json!({"k8s.io/initial-events-end": "true"});
        }
        let object = match self {
            Self::Plain => json!({
                "kind": resource.kind,
                "apiVersion": resource.api_version(),
                "metadata": metadata,
            }),
            Self::Metadata => json!({
                "kind": "PartialObjectMetadata",
                "apiVersion": "meta.k8s.io/v1",
                "metadata": metadata,
            }),
            Self::Table(_) => table(resource, json!([]), &metadata),
        };
        format!("{}\n", json!({"type": "BOOKMARK", "object": object})).into()
    }
}

/// The event that ends a watch.
pub(super) fn error(failure: &Failure) -> Bytes {
    format!("{}\n", json!({"type": "ERROR", "object": failure.status()})).into()
}

/// An object's metadata alone.
pub(super) fn metadata(object: &Value) -> Value {
    json!({
        "kind": "PartialObjectMetadata",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": object["metadata"],
    })
}

fn table(resource: &Resource, rows: Value, about: &Value) -> Value {
    json!({
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": about,
        "columnDefinitions": table::columns(resource),
        "rows": rows,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_served_format_is_taken() {
        let query = Query::default();
        for (accept, format) in [
            ("", Format::Plain),
            ("application/json", Format::Plain),
            (
                "application/vnd.kubernetes.protobuf,application/json",
                Format::Plain,
            ),
            (
                "application/json;as=Table;v=v1;g=meta.k8s.io,application/json",
                Format::Table(Include::Metadata),
            ),
            (
                "application/json;as=Table;v=v2;g=meta.k8s.io,application/json",
                Format::Plain,
            ),
            (
                "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1",
                Format::Metadata,
            ),
        ] {
            assert_eq!(Format::of(accept, &query), format, "{accept}");
        }
        let query = Query::parse("includeObject=Object");
        let accept = "application/json;as=Table;g=meta.k8s.io;v=v1";
        assert_eq!(Format::of(accept, &query), Format::Table(Include::Object));
    }
}
