//! Storage: every kind's objects, one version counter, and watches.
//!
//! A write is admitted (defaults, validation, addresses) and stored under one lock, so versions,
//! histories and what readers see are in one order.

mod apply;
mod delete;
mod object;
mod state;
mod watch;
mod write;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::Value;

pub(crate) use self::{
    delete::{DeleteOptions, Deletion, pod_cidrs},
    state::State,
    write::{Part, Target, Write},
};
pub use self::{
    object::Object,
    watch::{Change, Event, Since, Watch},
};
use crate::{
    Resource,
    alloc::Ranges,
    failure::Failure,
    resource::{PODS, RESOURCES},
};

/// The objects of the cluster. Clones share them.
#[derive(Debug, Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    state: Mutex<State>,
    /// One a kind: wakes its watches after a change.
    wake: Vec<tokio::sync::watch::Sender<u64>>,
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store {
    pub(crate) fn new(ranges: Ranges, history: usize, kubelets: bool) -> Self {
        let wake = RESOURCES
            .iter()
            .map(|_| tokio::sync::watch::Sender::new(0))
            .collect();
        let state = Mutex::new(State::new(ranges, history, kubelets));
        Self {
            inner: Arc::new(Inner { state, wake }),
        }
    }

    /// Runs a write under the lock, and wakes the watches of the kinds that it may have changed.
    pub(crate) fn write<T>(
        &self,
        resource: &Resource,
        change: impl FnOnce(&mut State) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let mut state = self.inner.state();
        let before = state.version;
        let result = change(&mut state);
        let version = state.version;
        drop(state);
        if version != before {
            self.inner.wake[resource.index].send_replace(version);
        }
        result
    }

    /// Makes an object.
    ///
    /// # Errors
    /// The API's: the name is taken, the namespace is not there, the object is invalid.
    pub fn create(
        &self,
        resource: &'static Resource,
        object: Value,
    ) -> Result<Arc<Object>, Failure> {
        self.write(resource, |state| {
            state.create(resource, object, &Write::default())
        })
    }

    /// Reads an object; the namespace of cluster-scoped kinds is empty.
    ///
    /// # Errors
    /// 404 if there is none.
    pub fn get(
        &self,
        resource: &Resource,
        namespace: &str,
        name: &str,
    ) -> Result<Arc<Object>, Failure> {
        self.inner.state().get(resource, namespace, name)
    }

    /// All objects of a kind, or those of one namespace if that is not empty, sorted by name.
    #[must_use]
    pub fn list(&self, resource: &Resource, namespace: &str) -> Vec<Arc<Object>> {
        self.list_at(resource, namespace).1
    }

    /// [`Store::list`] with the version that it is of.
    #[must_use]
    pub fn list_at(&self, resource: &Resource, namespace: &str) -> (u64, Vec<Arc<Object>>) {
        let state = self.inner.state();
        let objects = state.shelves[resource.index]
            .within(namespace, None)
            .cloned();
        (state.version, objects.collect())
    }

    /// Looks at the state under the lock.
    pub(crate) fn read<T>(&self, look: impl FnOnce(&State) -> T) -> T {
        look(&self.inner.state())
    }

    /// The version of the newest change.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.inner.state().version
    }

    /// Replaces an object, its status apart; with a resourceVersion in it, only if that is the
    /// stored one's.
    ///
    /// # Errors
    /// The API's: not found, conflict, invalid.
    pub fn update(
        &self,
        resource: &'static Resource,
        object: Value,
    ) -> Result<Arc<Object>, Failure> {
        let target = Target::of(resource, &object)?;
        self.write(resource, |state| {
            state.update(&target, object, &Write::default())
        })
    }

    /// Replaces an object's status and nothing else.
    ///
    /// # Errors
    /// The API's: not found, conflict, invalid.
    pub fn update_status(
        &self,
        resource: &'static Resource,
        object: Value,
    ) -> Result<Arc<Object>, Failure> {
        let target = Target::of(resource, &object)?;
        let write = Write {
            part: Part::Status,
            ..Write::default()
        };
        self.write(resource, |state| state.update(&target, object, &write))
    }

    /// Changes an object in one step, its status apart.
    ///
    /// # Errors
    /// The API's: not found, invalid.
    pub fn modify(
        &self,
        resource: &'static Resource,
        namespace: &str,
        name: &str,
        change: impl FnOnce(&mut Value),
    ) -> Result<Arc<Object>, Failure> {
        self.change(Target::new(resource, namespace, name), Part::Object, change)
    }

    /// Changes an object's status in one step.
    ///
    /// # Errors
    /// The API's: not found, invalid.
    pub fn modify_status(
        &self,
        resource: &'static Resource,
        namespace: &str,
        name: &str,
        change: impl FnOnce(&mut Value),
    ) -> Result<Arc<Object>, Failure> {
        self.change(Target::new(resource, namespace, name), Part::Status, change)
    }

    /// Puts a Pod on a node.
    ///
    /// # Errors
    /// 404 if there is no such Pod, 422 if it is on a node already.
    pub fn bind(&self, namespace: &str, name: &str, node: &str) -> Result<Arc<Object>, Failure> {
        self.change(Target::new(PODS, namespace, name), Part::Binding, |pod| {
            pod["spec"]["nodeName"] = node.into();
        })
    }

    fn change(
        &self,
        target: Target,
        part: Part,
        change: impl FnOnce(&mut Value),
    ) -> Result<Arc<Object>, Failure> {
        self.write(target.resource, |state| {
            let current = state.get(target.resource, &target.namespace, &target.name)?;
            let mut object = (**current).clone();
            change(&mut object);
            state.update(
                &target,
                object,
                &Write {
                    part,
                    ..Write::default()
                },
            )
        })
    }

    /// Deletes an object as a client does. A Pod that runs on a node stays, terminating, until it
    /// is deleted with a grace of zero seconds (by its kubelet); `None` is the Pod's own grace.
    ///
    /// # Errors
    /// 404 if there is none; 403 for namespaces that may not go.
    pub fn delete(
        &self,
        resource: &'static Resource,
        namespace: &str,
        name: &str,
        grace: Option<u64>,
    ) -> Result<Arc<Object>, Failure> {
        let target = Target::new(resource, namespace, name);
        let options = DeleteOptions {
            grace,
            ..DeleteOptions::default()
        };
        self.write(resource, |state| state.delete(&target, &options))
            .map(Deletion::into_object)
    }

    /// Starts a watch of a kind in all namespaces.
    ///
    /// # Errors
    /// 410 if the version is no longer in the history, 504 if it is yet to come.
    pub fn watch(&self, resource: &'static Resource, since: Since) -> Result<Watch, Failure> {
        Watch::open(&self.inner, resource, since)
    }

    /// Forgets all history: every running watch ends with 410 Gone, and every version that a
    /// client holds is too old to watch from.
    pub fn expire(&self) {
        let mut state = self.inner.state();
        state.expire();
        let version = state.version;
        drop(state);
        for wake in &self.inner.wake {
            wake.send_replace(version);
        }
    }
}
