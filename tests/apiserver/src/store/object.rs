//! A stored object: the JSON value, and its text once somebody asked for it.

use std::{ops::Deref, sync::OnceLock};

use hyper::body::Bytes;
use serde_json::Value;

/// An object as stored: immutable, shared, and written out as JSON at most once for all readers.
#[derive(Debug)]
pub struct Object {
    value: Value,
    version: u64,
    json: OnceLock<Bytes>,
}

impl Object {
    pub(crate) fn new(mut value: Value, version: u64) -> Self {
        value["metadata"]["resourceVersion"] = Value::String(version.to_string());
        Self {
            value,
            version,
            json: OnceLock::new(),
        }
    }

    /// The store's version of the object's last change.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.version
    }

    /// `metadata.name`.
    #[must_use]
    pub fn name(&self) -> &str {
        self.metadata("name")
    }

    /// `metadata.namespace`; empty if there is none.
    #[must_use]
    pub fn namespace(&self) -> &str {
        self.metadata("namespace")
    }

    /// `metadata.uid`.
    #[must_use]
    pub fn uid(&self) -> &str {
        self.metadata("uid")
    }

    /// Whether the object waits for its deletion.
    #[must_use]
    pub fn is_terminating(&self) -> bool {
        self.value["metadata"].get("deletionTimestamp").is_some()
    }

    /// The object as JSON text.
    #[must_use]
    pub fn json(&self) -> Bytes {
        let text = || Bytes::from(self.value.to_string());
        self.json.get_or_init(text).clone()
    }

    fn metadata(&self, key: &str) -> &str {
        self.value["metadata"][key].as_str().unwrap_or_default()
    }
}

impl Deref for Object {
    type Target = Value;

    fn deref(&self) -> &Value {
        &self.value
    }
}
