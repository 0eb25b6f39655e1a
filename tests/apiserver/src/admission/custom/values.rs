//! Values of custom resources: types, enums, bounds, required fields, items that may be there once.
//!
//! The messages are those of the real server.

use k8s_openapi::jiff::Timestamp;
use serde_json::{Number, Value};

use super::field;
use crate::{
    failure::Cause,
    json::{list, text},
};

const EITHER: &str = "x-kubernetes-int-or-string";
const LIST_TYPE: &str = "x-kubernetes-list-type";
const LIST_KEYS: &str = "x-kubernetes-list-map-keys";

/// Whether rules are not asked of an object with this flaw.
pub(super) fn blocks_rules(cause: &Cause) -> bool {
    // Bounds and duplicates alone leave an object that rules can be asked of.
    !matches!(cause.reason, "FieldValueInvalid" | "FieldValueDuplicate")
}

/// The name of a value's type.
pub(super) fn type_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if is_whole(number) => "integer",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

fn is_whole(number: &Number) -> bool {
    number.is_i64() || number.is_u64() || number.as_f64().is_some_and(|n| n.fract() == 0.0)
}

/// The path of a field.
pub(super) fn below(path: &str, key: &str) -> String {
    if path.is_empty() {
        key.to_owned()
    } else {
        format!("{path}.{key}")
    }
}

/// Collects what of a value is not as its schema says.
pub(super) fn check(schema: &Value, value: &Value, path: &str, causes: &mut Vec<Cause>) {
    if value.is_null() && schema["nullable"] == true {
        return;
    }
    let (wanted, given) = (text(&schema["type"]), type_of(value));
    let fits = wanted == given
        || wanted.is_empty()
        || wanted == "number" && given == "integer"
        || schema[EITHER] == true && matches!(given, "integer" | "string");
    if !fits {
        let why = format!("{path} in body must be of type {wanted}: {given:?}");
        causes.push(Cause::of_type(path, given, &why));
        return;
    }
    let known = list(&schema["enum"]);
    if !known.is_empty() && !known.contains(value) {
        let known: Vec<_> = known.iter().map(text).collect();
        causes.push(Cause::unsupported(path, value, &known));
    }
    match value {
        Value::Null | Value::Bool(_) => {}
        Value::Number(number) => check_number(schema, number, path, causes),
        Value::String(text) => check_text(schema, text, path, causes),
        Value::Array(items) => check_items(schema, items, path, causes),
        Value::Object(map) => {
            let bounds = ("minProperties", "maxProperties", "properties");
            check_count(schema, map.len(), bounds, path, causes);
            for key in list(&schema["required"]).iter().map(text) {
                if !map.contains_key(key) {
                    causes.push(Cause::required(below(path, key), ""));
                }
            }
            for (key, value) in map {
                // The metadata are every object's, and checked as such.
                if path.is_empty() && key == "metadata" {
                    continue;
                }
                if let Some(field) = field(schema, key) {
                    check(field, value, &below(path, key), causes);
                }
            }
        }
    }
}

fn check_number(schema: &Value, number: &Number, path: &str, causes: &mut Vec<Cause>) {
    let value = number.as_f64().unwrap_or_default();
    let mut refuse = |why: &str, bound: &Value| {
        let why = format!("{path} in body should be {why} {bound}");
        causes.push(Cause::invalid(path, &Value::Number(number.clone()), &why));
    };
    let (least, most) = (&schema["minimum"], &schema["maximum"]);
    if least.as_f64().is_some_and(|least| value < least) {
        refuse("greater than or equal to", least);
    }
    if most.as_f64().is_some_and(|most| value > most) {
        refuse("less than or equal to", most);
    }
}

fn check_text(schema: &Value, given: &str, path: &str, causes: &mut Vec<Cause>) {
    check_format(schema, given, path, causes);
    let length = given.chars().count() as u64;
    if let Some(least) = schema["minLength"].as_u64().filter(|least| length < *least) {
        let why = format!("{path} in body should be at least {least} chars long");
        causes.push(Cause::invalid(path, &given.into(), &why));
    }
    if let Some(most) = schema["maxLength"].as_u64().filter(|most| length > *most) {
        causes.push(Cause::too_long(path, most));
    }
}

/// The one format that is checked; those of numbers are told by their bounds.
fn check_format(schema: &Value, given: &str, path: &str, causes: &mut Vec<Cause>) {
    if schema["format"] == "date-time" && given.parse::<Timestamp>().is_err() {
        let why = format!("{path} in body must be of type date-time: {given:?}");
        causes.push(Cause::of_type(path, given, &why));
    }
}

fn check_items(schema: &Value, items: &[Value], path: &str, causes: &mut Vec<Cause>) {
    check_count(
        schema,
        items.len(),
        ("minItems", "maxItems", "items"),
        path,
        causes,
    );
    for (place, item) in items.iter().enumerate() {
        let path = format!("{path}[{place}]");
        check(&schema["items"], item, &path, causes);
        let keys = list(&schema[LIST_KEYS]);
        let same = |other: &&Value| match text(&schema[LIST_TYPE]) {
            "set" => *other == item,
            "map" => keys.iter().all(|key| other[text(key)] == item[text(key)]),
            _ => false,
        };
        if items.iter().take(place).find(same).is_some() {
            let keys = keys
                .iter()
                .map(|key| (text(key).to_owned(), item[text(key)].clone()));
            let twin = match text(&schema[LIST_TYPE]) {
                "map" => keys.collect(),
                _ => item.clone(),
            };
            causes.push(Cause::duplicate(path, &twin));
        }
    }
}

/// Checks how many there are of something.
fn check_count(
    schema: &Value,
    count: usize,
    (least, most, what): (&str, &str, &str),
    path: &str,
    causes: &mut Vec<Cause>,
) {
    let count = count as u64;
    if let Some(least) = schema[least].as_u64().filter(|least| count < *least) {
        let why = format!("{path} in body should have at least {least} {what}");
        causes.push(Cause::invalid(path, &count.into(), &why));
    }
    if let Some(most) = schema[most].as_u64().filter(|most| count > *most) {
        causes.push(Cause::too_many(path, count, most));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// The messages, as recorded from kube-apiserver 1.34.
    #[test]
    fn values_are_held_to_their_schema() {
        for (schema, value, message) in [
            (json!({"type": "integer"}), json!(1), ""),
            (json!({"type": "integer"}), json!(1.0), ""),
            (json!({"type": "number"}), json!(1), ""),
            (
                json!({"type": "integer"}),
                json!(1.5),
                "Invalid value: \"number\": p in body must be of type integer: \"number\"",
            ),
            (
                json!({"type": "integer", "minimum": 0}),
                json!(-1),
                "Invalid value: -1: p in body should be greater than or equal to 0",
            ),
            (
                json!({"type": "integer", "maximum": 1000}),
                json!(1001),
                "Invalid value: 1001: p in body should be less than or equal to 1000",
            ),
            (json!({"type": "string", "minLength": 1}), json!("é"), ""),
            (
                json!({"type": "string", "minLength": 1}),
                json!(""),
                "Invalid value: \"\": p in body should be at least 1 chars long",
            ),
            (
                json!({"type": "string", "maxLength": 2}),
                json!("abc"),
                "Too long: may not be more than 2 bytes",
            ),
            (
                json!({"type": "array", "minItems": 1}),
                json!([]),
                "Invalid value: 0: p in body should have at least 1 items",
            ),
            (
                json!({"type": "array", "maxItems": 2}),
                json!([1, 2, 3]),
                "Too many: 3: must have at most 2 items",
            ),
            (
                json!({"type": "object", "minProperties": 1}),
                json!({}),
                "Invalid value: 0: p in body should have at least 1 properties",
            ),
            (
                json!({"type": "object", "maxProperties": 1}),
                json!({"a": 1, "b": 2}),
                "Too many: 2: must have at most 1 item",
            ),
            (
                json!({"type": "object"}),
                Value::Null,
                "Invalid value: \"null\": p in body must be of type object: \"null\"",
            ),
            (json!({"type": "object", "nullable": true}), Value::Null, ""),
            (
                json!({"type": "string", "format": "date-time"}),
                json!("2026-01-02T03:04:05Z"),
                "",
            ),
            (
                json!({"type": "string", "format": "date-time"}),
                json!("yesterday"),
                "Invalid value: \"yesterday\": p in body must be of type date-time: \"yesterday\"",
            ),
            (json!({EITHER: true}), json!("x"), ""),
        ] {
            let mut causes = Vec::new();
            check(&schema, &value, "p", &mut causes);
            let told: Vec<_> = causes.iter().map(|c| c.message.as_str()).collect();
            assert_eq!(told.join("; "), message, "{schema} {value}");
        }
    }

    #[test]
    fn what_may_be_there_once_is_there_once() {
        let told = |schema: Value, value: Value| -> String {
            let mut causes = Vec::new();
            check(&schema, &value, "p", &mut causes);
            let told = causes.iter().map(|c| format!("{}: {}", c.field, c.message));
            told.collect::<Vec<_>>().join("; ")
        };
        let set = json!({"type": "array", LIST_TYPE: "set", "items": {"type": "string"}});
        assert_eq!(told(set.clone(), json!(["a", "b"])), "");
        assert_eq!(told(set, json!(["a", "a"])), "p[1]: Duplicate value: \"a\"");
        let map = json!({"type": "array", LIST_TYPE: "map", LIST_KEYS: ["k"], "items": {}});
        assert_eq!(told(map.clone(), json!([{"k": 1}, {"k": 2}])), "");
        assert_eq!(
            told(map, json!([{"k": 1, "v": 1}, {"k": 1, "v": 2}])),
            "p[1]: Duplicate value: {\"k\":1}"
        );
    }
}
