//! The index, fed with objects as the API serves them.

mod cluster_policies;
mod news;
mod objects;
mod pods;
mod policies;
mod services;
