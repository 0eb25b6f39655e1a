//! A JSON object whose fields are taken out one by one: what is left at the end is unknown, and
//! every error names the field that it is about.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::error::Error;

/// The fields of one object that nobody has asked for yet.
#[derive(Debug)]
pub(crate) struct Fields {
    path: String,
    map: Map<String, Value>,
}

impl Fields {
    /// The fields of `value`, which must be an object. `path` is what leads to it.
    pub(crate) fn new(path: &str, value: Value) -> Result<Self, Error> {
        match value {
            Value::Object(map) => Ok(Self {
                path: path.to_owned(),
                map,
            }),
            other => {
                let shown = if path.is_empty() {
                    "the configuration"
                } else {
                    path
                };
                Err(Error::field(
                    shown,
                    format_args!("{} where an object is due", kind(&other)),
                ))
            }
        }
    }

    /// The full name of a field of this object.
    pub(crate) fn name(&self, key: &str) -> String {
        if self.path.is_empty() {
            key.to_owned()
        } else {
            format!("{}.{key}", self.path)
        }
    }

    /// Takes a field out; `null` is as good as absent.
    pub(crate) fn take<T: DeserializeOwned>(&mut self, key: &str) -> Result<Option<T>, Error> {
        match self.raw(key) {
            None => Ok(None),
            Some(value) => serde_json::from_value(value)
                .map(Some)
                .map_err(|error| Error::field(&self.name(key), error)),
        }
    }

    /// Takes a field out that is an object.
    pub(crate) fn object(&mut self, key: &str) -> Result<Option<Self>, Error> {
        let path = self.name(key);
        self.raw(key)
            .map(|value| Self::new(&path, value))
            .transpose()
    }

    /// Takes a field out that is a list; absent is empty.
    pub(crate) fn list(&mut self, key: &str) -> Result<Vec<(String, Value)>, Error> {
        let path = self.name(key);
        self.raw(key)
            .map_or_else(|| Ok(Vec::new()), |value| elements(&path, value))
    }

    /// Takes a list of objects out; absent is empty.
    pub(crate) fn objects(&mut self, key: &str) -> Result<Vec<Self>, Error> {
        self.list(key)?
            .into_iter()
            .map(|(path, value)| Self::new(&path, value))
            .collect()
    }

    /// Takes a field out as it is.
    pub(crate) fn raw(&mut self, key: &str) -> Option<Value> {
        self.map.remove(key).filter(|value| !value.is_null())
    }

    /// Whether a field is this text; it stays.
    pub(crate) fn is(&self, key: &str, text: &str) -> bool {
        self.map.get(key).is_some_and(|value| value == text)
    }

    /// Every field has to have been taken out by now.
    pub(crate) fn finish(self) -> Result<(), Error> {
        match self.map.keys().next() {
            None => Ok(()),
            Some(key) => Err(Error::field(&self.name(key), "unknown field")),
        }
    }
}

/// The elements of a list, each with its path.
pub(crate) fn elements(path: &str, value: Value) -> Result<Vec<(String, Value)>, Error> {
    match value {
        Value::Array(elements) => Ok(elements
            .into_iter()
            .enumerate()
            .map(|(index, element)| (format!("{path}[{index}]"), element))
            .collect()),
        other => Err(Error::field(
            path,
            format_args!("{} where a list is due", kind(&other)),
        )),
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
