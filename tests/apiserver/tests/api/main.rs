//! The API server double as its clients see it: over HTTPS, through kube and through kubectl.
#![forbid(unsafe_code)]

mod controllers;
mod kube_watcher;
mod kubectl;
mod support;
mod validation;
mod watch;
