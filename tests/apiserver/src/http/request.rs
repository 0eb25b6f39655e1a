//! A request's path and query, taken apart.

use std::{borrow::Cow, collections::BTreeMap};

use http::Method;

use crate::{
    Resource,
    failure::Failure,
    resource::{self, NAMESPACES},
};

/// What a path names.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Path {
    pub(super) resource: &'static Resource,
    /// Empty: all namespaces, or none at all.
    pub(super) namespace: String,
    /// Empty: the collection.
    pub(super) name: String,
    /// Empty: the object itself.
    pub(super) subresource: String,
}

impl Path {
    /// Parses `/api/v1/...` and `/apis/GROUP/VERSION/...` below the discovery documents.
    pub(super) fn parse(path: &str) -> Result<Self, Failure> {
        let segments: Vec<String> = path
            .split('/')
            .filter(|segment| !segment.is_empty())
            .map(|segment| decode(segment, false).into_owned())
            .collect();
        let segments: Vec<&str> = segments.iter().map(String::as_str).collect();
        let (group, version, rest) = match segments.as_slice() {
            ["api", version, rest @ ..] => ("", *version, rest),
            ["apis", group, version, rest @ ..] => (*group, *version, rest),
            _ => return Err(Failure::no_such_path()),
        };
        let find =
            |plural: &str| resource::find(group, version, plural).ok_or_else(Failure::no_such_path);
        let (resource, namespace, rest) = match rest {
            ["namespaces", namespace, plural, rest @ ..]
                if !matches!(*plural, "status" | "finalize") =>
            {
                let resource = find(plural)?;
                if !resource.namespaced {
                    return Err(Failure::no_such_path());
                }
                (resource, *namespace, rest)
            }
            [plural, rest @ ..] => (find(plural)?, "", rest),
            [] => return Err(Failure::no_such_path()),
        };
        let (name, subresource) = match rest {
            [] => ("", ""),
            [name] => (*name, ""),
            [name, subresource] => (*name, *subresource),
            _ => return Err(Failure::no_such_path()),
        };
        if !name.is_empty() && resource.namespaced && namespace.is_empty() {
            return Err(Failure::no_such_path());
        }
        Ok(Self {
            resource,
            namespace: namespace.into(),
            name: name.into(),
            subresource: subresource.into(),
        })
    }

    /// The verb as authorization calls it.
    pub(super) fn verb(&self, method: &Method, query: &Query) -> Result<&'static str, Failure> {
        let collection = self.name.is_empty();
        Ok(match (method.as_str(), collection) {
            ("GET", true) if query.flag("watch") => "watch",
            ("GET", true) => "list",
            ("GET", false) => "get",
            ("POST", true) => "create",
            ("POST", false) if !self.subresource.is_empty() => "create",
            ("PUT", false) => "update",
            ("PATCH", false) => "patch",
            ("DELETE", false) => "delete",
            ("DELETE", true) if *self.resource != *NAMESPACES => "deletecollection",
            _ => return Err(Failure::method_not_allowed()),
        })
    }
}

/// A request's query; the last of several values counts.
#[derive(Debug, Default)]
pub(super) struct Query(BTreeMap<String, String>);

impl Query {
    pub(super) fn parse(text: &str) -> Self {
        let pairs = text.split('&').filter(|pair| !pair.is_empty()).map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            (
                decode(key, true).into_owned(),
                decode(value, true).into_owned(),
            )
        });
        Self(pairs.collect())
    }

    /// A value; empty if it is not there.
    pub(super) fn get(&self, key: &str) -> &str {
        self.0.get(key).map_or("", String::as_str)
    }

    /// Whether a flag is set.
    pub(super) fn flag(&self, key: &str) -> bool {
        matches!(self.get(key), "true" | "1")
    }

    /// A number; `None` if it is not there.
    pub(super) fn number(&self, key: &str) -> Result<Option<u64>, Failure> {
        match self.get(key) {
            "" => Ok(None),
            text => text.parse().map(Some).map_err(|_| {
                Failure::bad_request(format!("invalid value {text:?} of {key}: not a number"))
            }),
        }
    }
}

/// Undoes percent-encoding; what is none is left as it is.
fn decode(text: &str, plus_is_space: bool) -> Cow<'_, str> {
    if !text.contains(['%', '+']) {
        return Cow::Borrowed(text);
    }
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        rest = tail;
        let hex = |byte: &u8| char::from(*byte).to_digit(16);
        match (first, tail) {
            (b'%', [high, low, after @ ..]) if hex(high).is_some() && hex(low).is_some() => {
                let value = hex(high).unwrap_or(0) * 16 + hex(low).unwrap_or(0);
                bytes.push(u8::try_from(value).unwrap_or(b'?'));
                rest = after;
            }
            (b'+', _) if plus_is_space => bytes.push(b' '),
            _ => bytes.push(first),
        }
    }
    Cow::Owned(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_name_objects() {
        let path = |text: &str| {
            Path::parse(text).map(|p| (p.resource.plural, p.namespace, p.name, p.subresource))
        };
        let found = |a, b: &str, c: &str, d: &str| Ok((a, b.into(), c.into(), d.into()));
        for (text, expected) in [
            ("/api/v1/pods", found("pods", "", "", "")),
            ("/api/v1/namespaces/a/pods/b", found("pods", "a", "b", "")),
            (
                "/api/v1/namespaces/a/pods/b/status",
                found("pods", "a", "b", "status"),
            ),
            ("/api/v1/namespaces/a", found("namespaces", "", "a", "")),
            (
                "/api/v1/namespaces/a/status",
                found("namespaces", "", "a", "status"),
            ),
            ("/api/v1/namespaces", found("namespaces", "", "", "")),
            ("/api/v1/nodes/n%31", found("nodes", "", "n1", "")),
            (
                "/apis/networking.k8s.io/v1/namespaces/a/networkpolicies",
                found("networkpolicies", "a", "", ""),
            ),
            ("/api/v1/namespaces/a/nodes", Err(Failure::no_such_path())),
            ("/api/v1/pods/b", Err(Failure::no_such_path())),
            ("/api/v1/widgets", Err(Failure::no_such_path())),
            ("/apis/apps/v1/deployments", Err(Failure::no_such_path())),
            ("/metrics", Err(Failure::no_such_path())),
        ] {
            assert_eq!(path(text), expected, "{text}");
        }
    }

    #[test]
    fn queries_are_decoded() {
        let query = Query::parse("labelSelector=app+in+%28a%2Cb%29&watch=true&limit=500&x");
        assert_eq!(query.get("labelSelector"), "app in (a,b)");
        assert!(query.flag("watch"));
        assert!(!query.flag("x"));
        assert_eq!(query.number("limit"), Ok(Some(500)));
        assert_eq!(query.number("continue"), Ok(None));
        assert!(query.number("labelSelector").is_err());
    }
}
