//! The controllers: what a cluster does by itself when its objects change.
//!
//! Each is a task that follows watches and acts through the store. After losing its place in the
//! history (410) it starts over from what there is, which every one of them can.

mod bootstrap;
pub(crate) mod endpoints;
mod namespaces;
mod scheduler;

pub(crate) use self::bootstrap::bootstrap;
use crate::Store;

/// Starts all controllers on the current runtime.
pub(crate) fn spawn(store: &Store) {
    tokio::spawn(namespaces::run(store.clone()));
    tokio::spawn(scheduler::run(store.clone()));
    tokio::spawn(endpoints::run(store.clone()));
}
