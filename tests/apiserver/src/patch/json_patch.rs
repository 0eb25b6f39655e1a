//! JSON patches (RFC 6902).

use serde::Deserialize;
use serde_json::Value;

use crate::failure::Failure;

/// One operation.
#[derive(Debug, Clone, Deserialize)]
#[serde(tag = "op", rename_all = "lowercase")]
pub(crate) enum Operation {
    /// Sets a field, or inserts into a list (`-`: at its end).
    Add { path: String, value: Value },
    /// Takes away what is there.
    Remove { path: String },
    /// Puts another value in place of what is there.
    Replace { path: String, value: Value },
    /// Takes away from one place and adds at another.
    Move { from: String, path: String },
    /// Adds a copy of what is at another place.
    Copy { from: String, path: String },
    /// Fails unless the value is there.
    Test { path: String, value: Value },
}

/// Applies the operations in order, all or none.
pub(super) fn apply(target: &mut Value, operations: &[Operation]) -> Result<(), Failure> {
    for operation in operations {
        match operation {
            Operation::Add { path, value } => add(target, path, value.clone())?,
            Operation::Remove { path } => drop(remove(target, path)?),
            Operation::Replace { path, value } => *find(target, path)? = value.clone(),
            Operation::Move { from, path } => {
                let value = remove(target, from)?;
                add(target, path, value)?;
            }
            Operation::Copy { from, path } => {
                let value = find(target, from)?.clone();
                add(target, path, value)?;
            }
            Operation::Test { path, value } => {
                if find(target, path)? != value {
                    return Err(refuse(path, "the value is another than the test's"));
                }
            }
        }
    }
    Ok(())
}

fn refuse(path: &str, why: &str) -> Failure {
    let mut failure = Failure::bad_request(format!("the JSON patch fails at {path:?}: {why}"));
    failure.code = 422;
    failure.reason = "Invalid";
    failure
}

fn find<'a>(target: &'a mut Value, path: &str) -> Result<&'a mut Value, Failure> {
    target
        .pointer_mut(path)
        .ok_or_else(|| refuse(path, "there is nothing"))
}

/// The value around a path, and the path's last token.
fn parent<'a>(target: &'a mut Value, path: &str) -> Result<(&'a mut Value, String), Failure> {
    let (above, last) = path
        .rsplit_once('/')
        .ok_or_else(|| refuse(path, "it needs a slash"))?;
    Ok((
        find(target, above)?,
        last.replace("~1", "/").replace("~0", "~"),
    ))
}

fn add(target: &mut Value, path: &str, value: Value) -> Result<(), Failure> {
    if path.is_empty() {
        *target = value;
        return Ok(());
    }
    let (around, last) = parent(target, path)?;
    match around {
        Value::Object(map) => {
            map.insert(last, value);
        }
        Value::Array(list) if last == "-" => list.push(value),
        Value::Array(list) => match last.parse::<usize>() {
            Ok(place) if place <= list.len() => list.insert(place, value),
            _ => return Err(refuse(path, "the list has no such place")),
        },
        _ => {
            return Err(refuse(
                path,
                "there is neither an object nor a list around it",
            ));
        }
    }
    Ok(())
}

fn remove(target: &mut Value, path: &str) -> Result<Value, Failure> {
    let (around, last) = parent(target, path)?;
    let removed = match around {
        Value::Object(map) => map.remove(&last),
        Value::Array(list) => {
            let place = last
                .parse::<usize>()
                .ok()
                .filter(|place| *place < list.len());
            place.map(|place| list.remove(place))
        }
        _ => None,
    };
    removed.ok_or_else(|| refuse(path, "there is nothing"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn run(target: Value, operations: Value) -> Option<Value> {
        let operations: Vec<Operation> = serde_json::from_value(operations).unwrap();
        let mut target = target;
        apply(&mut target, &operations).ok().map(|()| target)
    }

    #[test]
    fn operations_do_what_the_rfc_says() {
        for (operation, expected) in [
            (
                json!({"op": "add", "path": "/b", "value": 2}),
                Some(json!({"a": [1, 3], "b": 2})),
            ),
            (
                json!({"op": "add", "path": "/a/1", "value": 2}),
                Some(json!({"a": [1, 2, 3]})),
            ),
            (
                json!({"op": "add", "path": "/a/-", "value": 4}),
                Some(json!({"a": [1, 3, 4]})),
            ),
            (json!({"op": "add", "path": "/a/3", "value": 4}), None),
            (
                json!({"op": "remove", "path": "/a/0"}),
                Some(json!({"a": [3]})),
            ),
            (json!({"op": "remove", "path": "/c"}), None),
            (
                json!({"op": "replace", "path": "/a", "value": 1}),
                Some(json!({"a": 1})),
            ),
            (json!({"op": "replace", "path": "/c", "value": 1}), None),
            (
                json!({"op": "move", "from": "/a/0", "path": "/b~1c"}),
                Some(json!({"a": [3], "b/c": 1})),
            ),
            (
                json!({"op": "copy", "from": "/a/1", "path": "/b"}),
                Some(json!({"a": [1, 3], "b": 3})),
            ),
            (
                json!({"op": "test", "path": "/a/0", "value": 1}),
                Some(json!({"a": [1, 3]})),
            ),
            (json!({"op": "test", "path": "/a/0", "value": 2}), None),
        ] {
            assert_eq!(
                run(json!({"a": [1, 3]}), json!([operation])),
                expected,
                "{operation}"
            );
        }
    }
}
