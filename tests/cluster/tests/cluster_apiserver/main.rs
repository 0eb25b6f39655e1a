//! What Hachi counts on in an API server, stated once and held against each: the built-in double
//! everywhere, and the real etcd and kube-apiserver where the machine has them.
//!
//! A statement that only one of them fulfils is a difference, and fails here. The few that are left
//! are listed in the double's own documentation (`hachi_apiserver`).

mod access;
mod custom;
mod objects;
mod patches;
mod services;
mod watches;

use std::sync::{Mutex, OnceLock, PoisonError};

use anyhow::{Context as _, Result, ensure};
use hachi_cluster::{
    Cluster, Family, Options, Server,
    client::{Answer, Client, User},
};
use serde_json::{Value, json};

/// An API server, and a namespace for one test.
struct World {
    cluster: &'static Cluster,
    admin: Client,
    namespace: String,
}

/// The cluster of a server: one node, and nobody who runs on it.
fn cluster(server: Server) -> &'static Cluster {
    static DOUBLE: OnceLock<Cluster> = OnceLock::new();
    static MACHINE: OnceLock<Cluster> = OnceLock::new();
    let cell = match server {
        Server::Double => &DOUBLE,
        Server::Machine => &MACHINE,
    };
    cell.get_or_init(|| {
        let dir = format!("hachi-apiserver-{}-{server:?}", std::process::id());
        let options = Options::new(
            std::env::temp_dir().join(dir),
            hachi_testutil::dist_dir(),
            Family::V4,
        );
        let options = Options {
            nodes: 1,
            agents: false,
            remove_dir: true,
            server,
            ..options
        };
        Cluster::start(options).unwrap_or_else(|error| panic!("no cluster: {error:#}"))
    })
}

/// Runs a test on a server.
fn run(name: &str, server: Server, test: fn(&World) -> Result<()>) {
    hachi_testutil::require_root!();
    hachi_testutil::require_binaries!("hachi-cni");
    // One of them starts the server anew.
    static ONE: Mutex<()> = Mutex::new(());
    let _one_by_one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    if server == Server::Machine && !Options::has_real_server() {
        hachi_testutil::absent!("a real API server: no etcd and kube-apiserver");
    }
    let outcome = World::new(name, cluster(server)).and_then(|world| test(&world));
    if let Err(error) = outcome {
        panic!("{error:#}");
    }
}

impl World {
    fn new(name: &str, cluster: &'static Cluster) -> Result<Self> {
        let world = Self {
            cluster,
            admin: Client::new(cluster, User::Admin)?,
            namespace: name.replace('_', "-"),
        };
        let namespace = json!({"metadata": {"name": world.namespace}});
        world.made("/api/v1/namespaces", &namespace)?;
        Ok(world)
    }

    /// The path of the namespace's ConfigMaps, or of what is below it.
    fn maps(&self, below: &str) -> String {
        let Self { namespace, .. } = self;
        format!("/api/v1/namespaces/{namespace}/configmaps{below}")
    }

    /// Makes an object; returns it as stored.
    fn made(&self, path: &str, object: &Value) -> Result<Value> {
        let answer = self.admin.json(&format!("POST {path}"), object)?;
        ensure!(answer.code == 201, "{path}: {}", answer.text);
        Ok(answer.json())
    }

    /// Makes a ConfigMap; returns its version.
    fn map(&self, name: &str) -> Result<u64> {
        version(&self.made(&self.maps(""), &json!({"metadata": {"name": name}}))?)
    }
}

/// `metadata.resourceVersion` as a number.
fn version(object: &Value) -> Result<u64> {
    let version = object["metadata"]["resourceVersion"].as_str();
    version
        .and_then(|text| text.parse().ok())
        .context("no resourceVersion")
}

/// Expects a refusal: its code, its reason and its whole message.
#[track_caller]
fn refused(answer: &Answer, code: u16, reason: &str, message: &str) -> Result<()> {
    let told = answer.json();
    ensure!(
        answer.code == code && told["reason"].as_str().unwrap_or_default() == reason,
        "not {code} {reason}, but {}",
        answer.text
    );
    ensure!(
        answer.message() == message,
        "not {message:?}, but {}",
        answer.text
    );
    Ok(())
}

/// Expects a refusal whose message has these parts; what is around them is each server's own.
#[track_caller]
fn refused_with(answer: &Answer, code: u16, reason: &str, parts: &[&str]) -> Result<()> {
    let told = answer.json();
    ensure!(
        answer.code == code && told["reason"].as_str().unwrap_or_default() == reason,
        "not {code} {reason}, but {}",
        answer.text
    );
    for part in parts {
        ensure!(
            answer.message().contains(part),
            "no {part:?} in {}",
            answer.text
        );
    }
    Ok(())
}

/// Makes of each statement a test for each server.
macro_rules! on_each {
    ($($module:ident::$name:ident),+ $(,)?) => {
        mod double {
            $(
                #[test]
                fn $name() {
                    super::run(stringify!($name), hachi_cluster::Server::Double, super::$module::$name);
                }
            )+
        }
        mod real {
            $(
                #[test]
                fn $name() {
                    super::run(stringify!($name), hachi_cluster::Server::Machine, super::$module::$name);
                }
            )+
        }
    };
}

on_each!(
    access::a_right_that_is_not_granted_is_named,
    access::tokens_are_known_or_refused,
    access::agents_tell_events_and_statuses,
    custom::a_definition_is_established,
    custom::fields_that_no_schema_has_are_pruned_or_refused,
    custom::values_are_held_to_the_schema,
    custom::rules_are_asked,
    objects::conflicts_are_refused,
    patches::each_patch_does_what_its_type_says,
    patches::fields_have_managers,
    objects::unknown_fields_are_told_or_refused,
    objects::a_dry_run_stores_nothing,
    objects::a_status_is_written_apart,
    objects::lists_come_in_pages_and_parts,
    services::services_fit_their_type,
    objects::deletions_have_preconditions,
    watches::a_watch_goes_on_from_a_version,
    watches::initial_events_end_with_a_bookmark,
    watches::a_selector_sees_objects_come_and_go,
    watches::a_history_that_is_forgotten_is_gone,
);
