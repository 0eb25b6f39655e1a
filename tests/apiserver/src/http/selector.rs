//! Label and field selectors as text, the way lists and watches ask for a part of the objects.

use serde_json::Value;

use crate::{Resource, failure::Failure, store::Object};

/// Which objects a request is about.
#[derive(Debug, Clone, Default)]
pub(super) struct Selector {
    /// Empty: all namespaces.
    pub(super) namespace: String,
    labels: Vec<Requirement>,
    fields: Vec<Field>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Requirement {
    key: String,
    operator: Operator,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Operator {
    In(Vec<String>),
    NotIn(Vec<String>),
    Exists,
    Absent,
    Above(i64),
    Below(i64),
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Field {
    path: String,
    equal: bool,
    value: String,
}

impl Selector {
    pub(super) fn parse(
        resource: &Resource,
        namespace: &str,
        labels: &str,
        fields: &str,
    ) -> Result<Self, Failure> {
        let labels = split(labels)
            .into_iter()
            .map(requirement)
            .collect::<Result<_, _>>()?;
        let fields = fields.split(',').filter(|part| !part.is_empty());
        let fields = fields
            .map(|part| field(resource, part))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            namespace: namespace.into(),
            labels,
            fields,
        })
    }

    pub(super) fn matches(&self, object: &Object) -> bool {
        let labels = &object["metadata"]["labels"];
        (self.namespace.is_empty() || self.namespace == object.namespace())
            && self
                .labels
                .iter()
                .all(|requirement| requirement.matches(labels))
            && self.fields.iter().all(|field| field.matches(object))
    }
}

impl Requirement {
    fn matches(&self, labels: &Value) -> bool {
        let value = labels.get(&self.key).and_then(Value::as_str);
        let number = value.and_then(|value| value.parse::<i64>().ok());
        match &self.operator {
            Operator::In(values) => value.is_some_and(|value| values.iter().any(|v| v == value)),
            Operator::NotIn(values) => value.is_none_or(|value| values.iter().all(|v| v != value)),
            Operator::Exists => value.is_some(),
            Operator::Absent => value.is_none(),
            Operator::Above(bound) => number.is_some_and(|number| number > *bound),
            Operator::Below(bound) => number.is_some_and(|number| number < *bound),
        }
    }
}

impl Field {
    fn matches(&self, object: &Value) -> bool {
        let found = self.path.split('.').try_fold(object, |at, key| at.get(key));
        let text = match (self.path.as_str(), found) {
            // An event's source is its component.
            ("source", Some(Value::Object(source))) => source
                .get("component")
                .and_then(Value::as_str)
                .unwrap_or_default()
                .to_owned(),
            (_, Some(Value::String(text))) => text.clone(),
            // A flag that is not there is off.
            ("spec.unschedulable" | "spec.hostNetwork", None) => "false".to_owned(),
            (_, Some(other)) => other.to_string(),
            (_, None) => String::new(),
        };
        (text == self.value) == self.equal
    }
}

/// Splits at the commas that are not within parentheses.
fn split(text: &str) -> Vec<&str> {
    let (mut parts, mut depth, mut start) = (Vec::new(), 0_i32, 0);
    for (place, letter) in text.char_indices() {
        match letter {
            '(' => depth += 1,
            ')' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&text[start..place]);
                start = place + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    parts
        .into_iter()
        .map(str::trim)
        .filter(|part| !part.is_empty())
        .collect()
}

fn requirement(text: &str) -> Result<Requirement, Failure> {
    let refuse = || Failure::bad_request(format!("unable to parse the label selector {text:?}"));
    let build = |key: &str, operator: Operator| {
        let key = key.trim();
        let odd = [' ', '(', ')', '=', '!'];
        let values: &[String] = match &operator {
            Operator::In(values) | Operator::NotIn(values) => values,
            Operator::Exists | Operator::Absent | Operator::Above(_) | Operator::Below(_) => &[],
        };
        let good = !key.is_empty() && !key.contains(odd);
        if good && !values.iter().any(|value| value.contains(odd)) {
            Ok(Requirement {
                key: key.into(),
                operator,
            })
        } else {
            Err(refuse())
        }
    };
    if let Some((left, values)) = text.split_once('(') {
        let values = values.strip_suffix(')').ok_or_else(refuse)?;
        let values = values
            .split(',')
            .map(|value| value.trim().to_owned())
            .collect();
        let left = left.trim_end();
        return if let Some(key) = left.strip_suffix(" notin") {
            build(key, Operator::NotIn(values))
        } else if let Some(key) = left.strip_suffix(" in") {
            build(key, Operator::In(values))
        } else {
            Err(refuse())
        };
    }
    if let Some((key, value)) = text.split_once("!=") {
        return build(key, Operator::NotIn(vec![value.trim().into()]));
    }
    if let Some((key, value)) = text.split_once("==").or_else(|| text.split_once('=')) {
        return build(key, Operator::In(vec![value.trim().into()]));
    }
    if let Some(key) = text.strip_prefix('!') {
        return build(key, Operator::Absent);
    }
    for (sign, operator) in [
        ('>', Operator::Above as fn(i64) -> _),
        ('<', Operator::Below),
    ] {
        if let Some((key, bound)) = text.split_once(sign) {
            return build(key, operator(bound.trim().parse().map_err(|_| refuse())?));
        }
    }
    build(text, Operator::Exists)
}

fn field(resource: &Resource, text: &str) -> Result<Field, Failure> {
    let (path, equal, value) = if let Some((path, value)) = text.split_once("!=") {
        (path, false, value)
    } else if let Some((path, value)) = text.split_once("==").or_else(|| text.split_once('=')) {
        (path, true, value)
    } else {
        let why = format!("invalid field selector {text:?}: a field needs a value");
        return Err(Failure::bad_request(why));
    };
    let path = path.trim();
    let known = path == "metadata.name"
        || path == "metadata.namespace" && resource.namespaced
        || resource.fields.contains(&path);
    if !known {
        // Kinds with selectable fields of their own say it in their own way.
        let why = if resource.fields.is_empty() && !resource.custom {
            let known = "only \"metadata.name\", \"metadata.namespace\"";
            format!("{path:?} is not a known field selector: {known}")
        } else {
            format!("field label not supported: {path}")
        };
        return Err(Failure::bad_request(why));
    }
    Ok(Field {
        path: path.into(),
        equal,
        value: value.trim().into(),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::resource::PODS;

    fn matches(labels: &str, fields: &str, object: Value) -> bool {
        let selector = Selector::parse(PODS, "", labels, fields).unwrap();
        selector.matches(&Object::new(object, 1))
    }

    #[test]
    fn labels_select() {
        let object = json!({"metadata": {"labels": {"app": "web", "tier": "front", "n": "5"}}});
        for (labels, expected) in [
            ("", true),
            ("app=web", true),
            ("app==web,tier=front", true),
            ("app=db", false),
            ("app!=db", true),
            ("missing!=db", true),
            ("app in (db, web)", true),
            ("app in (db,cache),tier=front", false),
            ("app notin (db,web)", false),
            ("missing notin (db)", true),
            ("app", true),
            ("!app", false),
            ("!missing", true),
            ("n>4,n<6", true),
            ("n>5", false),
        ] {
            assert_eq!(matches(labels, "", object.clone()), expected, "{labels}");
        }
        assert!(Selector::parse(PODS, "", "app in db", "").is_err());
        assert!(Selector::parse(PODS, "", "app in (db", "").is_err());
    }

    #[test]
    fn fields_select() {
        let object = json!({
            "metadata": {"name": "a", "namespace": "n"},
            "spec": {"nodeName": "one"},
            "status": {"phase": "Running"},
        });
        for (fields, expected) in [
            ("metadata.name=a,metadata.namespace=n", true),
            ("metadata.name!=a", false),
            ("spec.nodeName=one,status.phase!=Failed", true),
            ("spec.nodeName=", false),
            ("status.podIP=", true),
            ("spec.hostNetwork=false", true),
        ] {
            assert_eq!(matches("", fields, object.clone()), expected, "{fields}");
        }
        assert!(Selector::parse(PODS, "", "", "spec.color=red").is_err());
        assert!(Selector::parse(PODS, "", "", "metadata.name").is_err());
    }
}
