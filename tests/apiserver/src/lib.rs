//! Placeholder until its owner fills it.
#![forbid(unsafe_code)]
