//! Watches: every event of a kind after a version, in order, none twice and none left out.

use std::sync::Arc;

use tokio::sync::watch;

use super::{Inner, Object, state::Shelf};
use crate::{Resource, failure::Failure};

/// What happened to an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// It was made.
    Added,
    /// It was changed.
    Modified,
    /// It is gone; the event holds its last state.
    Deleted,
}

/// One change of one object.
#[derive(Debug, Clone)]
pub struct Event {
    /// What happened.
    pub change: Change,
    /// The object afterwards, or at last.
    pub object: Arc<Object>,
    /// The object before.
    pub previous: Option<Arc<Object>>,
    /// The store's version of the change.
    pub version: u64,
}

/// Where a watch starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Since {
    /// With every existing object as [`Change::Added`], then the changes.
    Start,
    /// With the next change.
    Now,
    /// With the first change after this version.
    Version(u64),
}

/// A running watch of one kind.
#[derive(Debug)]
pub struct Watch {
    inner: Arc<Inner>,
    resource: &'static Resource,
    position: u64,
    /// In reverse, so that the next one is popped off the end.
    pending: Vec<Event>,
    wake: watch::Receiver<u64>,
}

impl Watch {
    pub(super) fn open(
        inner: &Arc<Inner>,
        resource: &'static Resource,
        since: Since,
    ) -> Result<Self, Failure> {
        let wake = inner.wake[resource.index].subscribe();
        let state = inner.state();
        let mut watch = Self {
            inner: Arc::clone(inner),
            resource,
            position: state.version,
            pending: Vec::new(),
            wake,
        };
        match since {
            Since::Now => {}
            Since::Start => {
                watch.pending = existing(&state.shelves[resource.index]);
            }
            Since::Version(wanted) if wanted > state.version => {
                return Err(Failure::too_large(wanted, state.version));
            }
            Since::Version(wanted) => {
                state.check_age(resource, wanted)?;
                watch.position = wanted;
            }
        }
        drop(state);
        Ok(watch)
    }

    /// The version up to which every change has been handed out; meaningful only while
    /// [`Watch::ready`] has nothing more.
    #[must_use]
    pub fn position(&self) -> u64 {
        self.position
    }

    /// The next event if there is one already.
    ///
    /// # Errors
    /// 410 if the changes that come next are no longer in the history.
    pub fn ready(&mut self) -> Result<Option<Event>, Failure> {
        if self.pending.is_empty() {
            let state = self.inner.state();
            state.check_age(self.resource, self.position)?;
            self.pending.extend(
                state.shelves[self.resource.index]
                    .after(self.position)
                    .rev(),
            );
            self.position = state.version;
        }
        Ok(self.pending.pop())
    }

    /// Waits for the next event.
    ///
    /// # Errors
    /// 410 if the changes that come next are no longer in the history.
    pub async fn next(&mut self) -> Result<Event, Failure> {
        loop {
            self.wake.mark_unchanged();
            if let Some(event) = self.ready()? {
                return Ok(event);
            }
            // The sender lives in `inner`, which this watch keeps alive.
            if self.wake.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }
}

fn existing(shelf: &Shelf) -> Vec<Event> {
    let added = |object: &Arc<Object>| Event {
        change: Change::Added,
        object: Arc::clone(object),
        previous: None,
        version: object.version(),
    };
    shelf.objects.values().rev().map(added).collect()
}
