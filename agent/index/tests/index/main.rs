//! The index, fed with objects as the API serves them.

mod objects;
mod pods;
mod policies;
mod services;
