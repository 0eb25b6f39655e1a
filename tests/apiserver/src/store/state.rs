//! The store's state behind its lock: shelves of objects, and each one's recent history.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use serde_json::Value;

use super::{Change, Event, Object};
use crate::{
    Resource,
    alloc::Ranges,
    failure::Failure,
    resource::{DEFINITIONS, RESOURCES},
};

/// Namespace (empty for cluster-scoped kinds) and name.
pub(crate) type Key = (String, String);

/// All objects of one kind.
#[derive(Debug, Default)]
pub(crate) struct Shelf {
    pub(crate) objects: BTreeMap<Key, Arc<Object>>,
    history: VecDeque<Event>,
    /// Version of the newest event that is no longer in the history.
    forgotten: u64,
}

impl Shelf {
    /// The objects of a namespace (all if it is empty), those up to and with `start` left out.
    pub(crate) fn within(
        &self,
        namespace: &str,
        start: Option<&Key>,
    ) -> impl Iterator<Item = &Arc<Object>> {
        let from = start
            .cloned()
            .unwrap_or_else(|| (namespace.to_owned(), String::new()));
        let skip_first = start.is_some();
        let namespace = namespace.to_owned();
        let rest = self.objects.range(from.clone()..);
        rest.skip_while(move |(key, _)| skip_first && **key == from)
            .take_while(move |(key, _)| namespace.is_empty() || key.0 == namespace)
            .map(|(_, object)| object)
    }

    /// The objects of a namespace whose names start with a prefix.
    pub(crate) fn prefixed<'a>(
        &'a self,
        namespace: &'a str,
        prefix: &'a str,
    ) -> impl Iterator<Item = &'a Arc<Object>> {
        let rest = self
            .objects
            .range((namespace.to_owned(), prefix.to_owned())..);
        rest.take_while(move |(key, _)| key.0 == namespace && key.1.starts_with(prefix))
            .map(|(_, object)| object)
    }

    /// The events after a version, oldest first.
    pub(super) fn after(&self, version: u64) -> impl DoubleEndedIterator<Item = Event> + '_ {
        let start = self
            .history
            .partition_point(|event| event.version <= version);
        self.history.range(start..).cloned()
    }
}

/// Everything that is stored.
#[derive(Debug)]
pub(crate) struct State {
    /// The one counter that every change raises.
    pub(crate) version: u64,
    /// Versions below are expired for every kind.
    compacted: u64,
    pub(crate) shelves: Vec<Shelf>,
    pub(crate) ranges: Ranges,
    /// What each manager applied last (server-side apply), by the object's uid.
    pub(crate) applied: HashMap<String, BTreeMap<String, Value>>,
    /// Whether bound Pods wait for their kubelet when they are deleted.
    pub(super) kubelets: bool,
    history: usize,
}

impl State {
    /// Versions start from the clock, so that those of an earlier server are all older: its
    /// clients are told 410 and list again.
    pub(super) fn new(ranges: Ranges, history: usize, kubelets: bool) -> Self {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let start = u64::try_from(now.as_micros()).unwrap_or(1);
        Self {
            version: start,
            compacted: start,
            shelves: RESOURCES.iter().map(|_| Shelf::default()).collect(),
            ranges,
            applied: HashMap::new(),
            kubelets,
            history,
        }
    }

    /// The object of a name.
    pub(crate) fn find(
        &self,
        resource: &Resource,
        namespace: &str,
        name: &str,
    ) -> Option<&Arc<Object>> {
        self.shelves[resource.index]
            .objects
            .get(&(namespace.to_owned(), name.to_owned()))
    }

    /// The object of a name, or 404.
    pub(crate) fn get(
        &self,
        resource: &Resource,
        namespace: &str,
        name: &str,
    ) -> Result<Arc<Object>, Failure> {
        let found = self.find(resource, namespace, name).cloned();
        found.ok_or_else(|| Failure::not_found(resource, name))
    }

    /// The definition of a custom resource, which has its schema; none of other kinds.
    pub(crate) fn definition(&self, resource: &Resource) -> Option<Arc<Object>> {
        let name = resource.custom.then(|| resource.qualified())?;
        self.find(DEFINITIONS, "", &name).cloned()
    }

    /// Refuses a version whose next events are no longer known.
    pub(crate) fn check_age(&self, resource: &Resource, version: u64) -> Result<(), Failure> {
        let oldest = self.compacted.max(self.shelves[resource.index].forgotten);
        if version < oldest {
            Err(Failure::expired(version, oldest))
        } else {
            Ok(())
        }
    }

    /// Forgets all history: whatever version a client holds, it must list again.
    pub(super) fn expire(&mut self) {
        self.version += 1;
        self.compacted = self.version;
        for shelf in &mut self.shelves {
            shelf.history.clear();
        }
    }

    /// Stores an object, new or changed.
    pub(crate) fn put(&mut self, resource: &'static Resource, value: Value) -> Arc<Object> {
        self.version += 1;
        let object = Arc::new(Object::new(value, self.version));
        let key = (object.namespace().to_owned(), object.name().to_owned());
        let previous = self.shelves[resource.index]
            .objects
            .insert(key, Arc::clone(&object));
        let change = if previous.is_some() {
            Change::Modified
        } else {
            Change::Added
        };
        self.record(
            resource,
            Event {
                change,
                object: Arc::clone(&object),
                previous,
                version: self.version,
            },
        );
        object
    }

    /// Removes an object; the result is its last state, under the version of the removal.
    pub(crate) fn remove(&mut self, resource: &'static Resource, object: &Object) -> Arc<Object> {
        self.version += 1;
        let key = (object.namespace().to_owned(), object.name().to_owned());
        let previous = self.shelves[resource.index].objects.remove(&key);
        self.applied.remove(object.uid());
        let last = Arc::new(Object::new((**object).clone(), self.version));
        self.record(
            resource,
            Event {
                change: Change::Deleted,
                object: Arc::clone(&last),
                previous,
                version: self.version,
            },
        );
        last
    }

    fn record(&mut self, resource: &Resource, event: Event) {
        let shelf = &mut self.shelves[resource.index];
        shelf.history.push_back(event);
        while shelf.history.len() > self.history {
            if let Some(event) = shelf.history.pop_front() {
                shelf.forgotten = event.version;
            }
        }
    }
}
