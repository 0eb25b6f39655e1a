//! The store against a model, in pieces and cut off at every step.

use std::sync::{
    Arc,
    atomic::{AtomicI64, Ordering},
};

use super::*;

/// Lets a number of steps succeed, and none after that: the process has been killed.
#[derive(Clone, Debug)]
pub(super) struct Steps(Arc<AtomicI64>);

impl Default for Steps {
    fn default() -> Self {
        Self(Arc::new(AtomicI64::new(i64::MAX)))
    }
}

impl Store {
    pub(super) fn step(&self) -> Result<(), StoreError> {
        if self.steps.0.fetch_sub(1, Ordering::Relaxed) > 0 {
            return Ok(());
        }
        self.steps.0.store(0, Ordering::Relaxed);
        Err(StoreError::io("survive in", &self.dir)(
            std::io::Error::other("killed"),
        ))
    }
}
