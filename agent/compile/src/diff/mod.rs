//! The writes that turn one image into another, in an order in which no packet meets a half-written
//! state: at every moment each flow is judged as the old image says or as the new one does, and each
//! Service leads to backends that it had or will have.

mod classes;
mod merge;
mod network;
mod policy;
mod services;

pub(crate) use merge::merge;

use crate::{Image, Op};

/// The ordered writes from `old` to `new`. Applied one by one they give exactly `new`, also when `old`
/// holds what an interrupted agent left behind.
#[must_use]
pub fn diff(old: &Image, new: &Image) -> Vec<Op> {
    let mut ops = Vec::new();
    if old.flags != new.flags {
        ops.push(Op::SetFlags(new.flags));
    }
    network::diff(old, new, &mut ops);
    policy::diff(old, new, &mut ops);
    services::diff(old, new, &mut ops);
    ops
}
