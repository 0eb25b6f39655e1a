//! The index, fed with objects as the API serves them.

mod cluster_policies;
mod objects;
mod pods;
mod policies;
mod services;
