//! Names, labels, annotations and selectors: the syntax that all kinds share.

use serde_json::Value;

use crate::{
    Resource,
    failure::Cause,
    json::{entries, is_empty, list, text},
};

/// Checks an object's metadata.
pub(crate) fn check(resource: &Resource, object: &Value) -> Vec<Cause> {
    let metadata = &object["metadata"];
    let mut causes = Vec::new();
    let name = text(&metadata["name"]);
    if name.is_empty() {
        let why = "name or generateName is required";
        causes.push(Cause::required("metadata.name", why));
    } else if let Some(why) = bad_name(resource, name) {
        causes.push(Cause::invalid("metadata.name", &metadata["name"], why));
    }
    causes.extend(check_labels(&metadata["labels"], "metadata.labels"));
    for (key, _) in entries(&metadata["annotations"]) {
        if let Some(why) = bad_qualified_name(&key.to_ascii_lowercase()) {
            causes.push(Cause::invalid(
                "metadata.annotations",
                &key.as_str().into(),
                why,
            ));
        }
    }
    causes
}

fn bad_name(resource: &Resource, name: &str) -> Option<&'static str> {
    match resource.kind {
        "Service" if !is_label(name) || name.starts_with(|c: char| c.is_ascii_digit()) => Some(
            "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start \
             with an alphabetic character, and end with an alphanumeric character",
        ),
        "Namespace" if !is_label(name) => Some(
            "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or \
             '-', and must start and end with an alphanumeric character",
        ),
        _ if !is_subdomain(name) => Some(
            "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, \
             '-' or '.', and must start and end with an alphanumeric character",
        ),
        _ => None,
    }
}

/// Whether a text is an RFC 1123 label: what namespaces, containers and ports are named by.
pub(crate) fn is_label(name: &str) -> bool {
    let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    (1..=63).contains(&name.len())
        && name.chars().all(|c| good(c) || c == '-')
        && name.starts_with(good)
        && name.ends_with(good)
}

/// Whether a text is an RFC 1123 subdomain: labels with dots between them.
pub(crate) fn is_subdomain(name: &str) -> bool {
    let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let part = |part: &str| {
        part.chars().all(|c| good(c) || c == '-') && part.starts_with(good) && part.ends_with(good)
    };
    name.len() <= 253 && name.split('.').all(part)
}

/// Whether a text can name a port: an IANA service name.
pub(crate) fn is_port_name(name: &str) -> bool {
    (1..=15).contains(&name.len())
        && name
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
        && name.chars().any(|c| c.is_ascii_lowercase())
        && !name.contains("--")
        && !name.starts_with('-')
        && !name.ends_with('-')
}

fn bad_qualified_name(key: &str) -> Option<&'static str> {
    let (prefix, name) = match key.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, key),
    };
    if prefix.is_some_and(|prefix| !is_subdomain(prefix)) {
        return Some("prefix part a lowercase RFC 1123 subdomain must be a valid DNS name");
    }
    if name.is_empty() || !is_label_text(name) {
        return Some(
            "name part must consist of alphanumeric characters, '-', '_' or '.', and must start \
             and end with an alphanumeric character, and have at most 63 characters",
        );
    }
    None
}

/// Whether a text can be a label's value (the empty one can).
fn is_label_text(value: &str) -> bool {
    let good = |c: char| c.is_ascii_alphanumeric();
    value.is_empty()
        || value.len() <= 63
            && value
                .chars()
                .all(|c| good(c) || matches!(c, '-' | '_' | '.'))
            && value.starts_with(good)
            && value.ends_with(good)
}

/// Checks a map of labels.
pub(crate) fn check_labels(labels: &Value, path: &str) -> Vec<Cause> {
    let mut causes = Vec::new();
    for (key, value) in entries(labels) {
        if let Some(why) = bad_qualified_name(key) {
            causes.push(Cause::invalid(path, &key.as_str().into(), why));
        }
        if !is_label_text(text(value)) {
            let why = "a valid label must be an empty string or consist of alphanumeric \
                       characters, '-', '_' or '.', and must start and end with an alphanumeric \
                       character, and have at most 63 characters";
            causes.push(Cause::invalid(path, value, why));
        }
    }
    causes
}

/// Checks a label selector object.
pub(crate) fn check_selector(selector: &Value, path: &str) -> Vec<Cause> {
    let mut causes = check_labels(&selector["matchLabels"], &format!("{path}.matchLabels"));
    for (place, expression) in list(&selector["matchExpressions"]).iter().enumerate() {
        let path = format!("{path}.matchExpressions[{place}]");
        let key = &expression["key"];
        if let Some(why) = bad_qualified_name(text(key)) {
            causes.push(Cause::invalid(format!("{path}.key"), key, why));
        }
        let values = &expression["values"];
        let operator = &expression["operator"];
        match text(operator) {
            "In" | "NotIn" if is_empty(values) => {
                let why = "must be specified when `operator` is 'In' or 'NotIn'";
                causes.push(Cause::required(format!("{path}.values"), why));
            }
            "Exists" | "DoesNotExist" if !is_empty(values) => {
                let why = "may not be specified when `operator` is 'Exists' or 'DoesNotExist'";
                causes.push(Cause::forbidden(format!("{path}.values"), why));
            }
            "In" | "NotIn" | "Exists" | "DoesNotExist" => {}
            _ => {
                let why = "not a valid selector operator";
                causes.push(Cause::invalid(format!("{path}.operator"), operator, why));
            }
        }
        for value in list(values) {
            if !is_label_text(text(value)) {
                let why = "must be a valid label value";
                causes.push(Cause::invalid(format!("{path}.values"), value, why));
            }
        }
    }
    causes
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::resource::{NAMESPACES, PODS, SERVICES};

    #[test]
    fn names_follow_their_kind() {
        for (resource, name, good) in [
            (PODS, "a.b-c.1", true),
            (PODS, "1", true),
            (PODS, "a..b", false),
            (PODS, "A", false),
            (PODS, "a_b", false),
            (PODS, "-a", false),
            (NAMESPACES, "a.b", false),
            (NAMESPACES, "team-1", true),
            (SERVICES, "1web", false),
            (SERVICES, "web-1", true),
        ] {
            let object = json!({"metadata": {"name": name}});
            assert_eq!(check(resource, &object).is_empty(), good, "{name}");
        }
        assert_eq!(
            check(PODS, &json!({"metadata": {}}))[0].reason,
            "FieldValueRequired"
        );
        assert!(!is_label(&"a".repeat(64)));
    }

    #[test]
    fn labels_have_a_syntax() {
        for (labels, good) in [
            (json!({"app": "web"}), true),
            (json!({"example.com/Role_1": "Front.End"}), true),
            (json!({"app": ""}), true),
            (json!({"": "x"}), false),
            (json!({"a b": "x"}), false),
            (json!({"Example.com/a": "x"}), false),
            (json!({"app": "-web"}), false),
            (json!({"app": "x".repeat(64)}), false),
        ] {
            assert_eq!(
                check_labels(&labels, "metadata.labels").is_empty(),
                good,
                "{labels}"
            );
        }
    }

    #[test]
    fn selectors_have_operators() {
        for (expression, good) in [
            (json!({"key": "a", "operator": "In", "values": ["b"]}), true),
            (json!({"key": "a", "operator": "In"}), false),
            (json!({"key": "a", "operator": "Exists"}), true),
            (
                json!({"key": "a", "operator": "DoesNotExist", "values": ["b"]}),
                false,
            ),
            (
                json!({"key": "a", "operator": "Equals", "values": ["b"]}),
                false,
            ),
            (json!({"key": "-", "operator": "Exists"}), false),
            (
                json!({"key": "a", "operator": "NotIn", "values": ["b c"]}),
                false,
            ),
        ] {
            let selector = json!({"matchExpressions": [expression]});
            assert_eq!(
                check_selector(&selector, "spec.podSelector").is_empty(),
                good,
                "{selector}"
            );
        }
    }

    #[test]
    fn port_names_are_service_names() {
        for (name, good) in [
            ("http", true),
            ("a-1", true),
            ("80", false),
            ("a--b", false),
            ("toolongforaport1", false),
        ] {
            assert_eq!(is_port_name(name), good, "{name}");
        }
    }
}
