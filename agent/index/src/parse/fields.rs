//! Reading raw objects field by field, so that nothing in them goes unnoticed: a field that this
//! version does not know may narrow what the others mean.

use serde_json::{Map, Value};

/// An object whose every field is known by name.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a>(Option<&'a Map<String, Value>>);

impl<'a> Fields<'a> {
    /// Reads an object; `null` is one without fields.
    pub(super) fn of(value: &'a Value, known: &[&str]) -> Result<Self, String> {
        let map = match value {
            Value::Null => return Ok(Self(None)),
            Value::Object(map) => map,
            _ => return Err("is not an object".to_owned()),
        };
        match map.keys().find(|key| !known.contains(&key.as_str())) {
            Some(key) => Err(format!(
                "unknown field {key:?}: this version of the agent cannot tell what it means"
            )),
            None => Ok(Self(Some(map))),
        }
    }

    /// A field that is there and not `null`.
    pub(super) fn get(self, key: &str) -> Option<&'a Value> {
        self.0?.get(key).filter(|value| !value.is_null())
    }

    /// How many fields are there.
    pub(super) fn count(self) -> usize {
        let values = self.0.into_iter().flat_map(Map::values);
        values.filter(|value| !value.is_null()).count()
    }

    /// A list; `None` if it is not there.
    pub(super) fn list(self, key: &str) -> Result<Option<&'a [Value]>, String> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(list)) => Ok(Some(list)),
            Some(_) => Err(format!("{key} is not a list")),
        }
    }

    /// A text; `None` if it is not there.
    pub(super) fn text(self, key: &str) -> Result<Option<&'a str>, String> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => text(value, key).map(Some),
        }
    }

    /// A whole number; `None` if it is not there.
    pub(super) fn number(self, key: &str) -> Result<Option<i64>, String> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => match value.as_i64() {
                Some(number) => Ok(Some(number)),
                None => Err(format!("{key} is not a whole number")),
            },
        }
    }
}

/// A value that has to be a text.
pub(super) fn text<'a>(value: &'a Value, what: &str) -> Result<&'a str, String> {
    value
        .as_str()
        .ok_or_else(|| format!("{what} is not a text"))
}
