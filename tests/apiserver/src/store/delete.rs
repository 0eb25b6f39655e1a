//! Deletion: at once, or first a mark and the end once everybody has let go.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use ipnet::IpNet;
use serde_json::{Value, json};

use super::{Object, State, Target};
use crate::{
    Resource, admission, clock,
    failure::Failure,
    resource::{NAMESPACES, NODES, PODS, SERVICES},
};

/// Namespaces that may not be deleted.
const IMMORTAL: [&str; 2] = ["default", "kube-system"];

/// How to delete.
#[derive(Debug, Clone, Default)]
pub(crate) struct DeleteOptions {
    /// Seconds that a Pod has to end; its own if absent.
    pub(crate) grace: Option<u64>,
    /// The uid that the object must have.
    pub(crate) uid: Option<String>,
    /// The version that the object must have.
    pub(crate) version: Option<String>,
    pub(crate) dry_run: bool,
}

/// How a deletion went.
#[derive(Debug)]
pub(crate) enum Deletion {
    /// The object is gone.
    Done(Arc<Object>),
    /// The object is marked, and goes later.
    Pending(Arc<Object>),
}

impl Deletion {
    pub(crate) fn into_object(self) -> Arc<Object> {
        match self {
            Self::Done(object) | Self::Pending(object) => object,
        }
    }
}

impl State {
    /// Deletes an object, or marks it where somebody must first let go of it.
    pub(crate) fn delete(
        &mut self,
        target: &Target,
        options: &DeleteOptions,
    ) -> Result<Deletion, Failure> {
        let Target {
            resource,
            namespace,
            name,
        } = target;
        let current = self.get(resource, namespace, name)?;
        check_preconditions(resource, &current, options)?;
        if *resource == NAMESPACES && IMMORTAL.contains(&name.as_str()) {
            let why = "this namespace may not be deleted";
            return Err(Failure::forbidden(resource, name, why));
        }
        let grace = self.grace(resource, &current, options);
        let held = grace > 0 || *resource == NAMESPACES || has_finalizers(&current);
        if options.dry_run {
            return Ok(if held {
                Deletion::Pending(current)
            } else {
                Deletion::Done(current)
            });
        }
        if !held {
            return Ok(Deletion::Done(self.discard(resource, &current)));
        }
        let shortened = current["metadata"]["deletionGracePeriodSeconds"].as_u64();
        if current.is_terminating() && shortened.is_none_or(|before| before <= grace) {
            return Ok(Deletion::Pending(current));
        }
        let mut object = (**current).clone();
        let metadata = &mut object["metadata"];
        let end = SystemTime::now() + Duration::from_secs(grace);
        metadata["deletionTimestamp"] = json!(clock::timestamp(end));
        metadata["deletionGracePeriodSeconds"] = json!(grace);
        if resource.generation {
            metadata["generation"] = json!(metadata["generation"].as_u64().unwrap_or(1) + 1);
        }
        if *resource == NAMESPACES {
            object["status"]["phase"] = json!("Terminating");
        }
        Ok(Deletion::Pending(self.put(resource, object)))
    }

    /// How many seconds a Pod is left to its kubelet; zero for everything else.
    fn grace(&self, resource: &Resource, current: &Object, options: &DeleteOptions) -> u64 {
        let node = current["spec"]["nodeName"].as_str().unwrap_or_default();
        let phase = current["status"]["phase"].as_str().unwrap_or_default();
        let runs = resource == PODS
            && self.kubelets
            && self.find(NODES, "", node).is_some()
            && !matches!(phase, "Succeeded" | "Failed");
        if !runs {
            return 0;
        }
        let own = current["spec"]["terminationGracePeriodSeconds"]
            .as_u64()
            .unwrap_or(30);
        options.grace.unwrap_or(own)
    }

    /// Whether an update has let go of the last thing that held a deleted object.
    pub(super) fn is_finished(&self, resource: &Resource, object: &Object) -> bool {
        let grace = object["metadata"]["deletionGracePeriodSeconds"].as_u64();
        object.is_terminating()
            && resource != NAMESPACES
            && grace.unwrap_or(0) == 0
            && !has_finalizers(object)
    }

    /// Removes an object and gives back what was handed out to it.
    pub(crate) fn discard(&mut self, resource: &'static Resource, object: &Object) -> Arc<Object> {
        if resource == SERVICES {
            admission::service::release(object, &mut self.ranges);
        } else if resource == NODES {
            self.ranges.release_pod_cidrs(&pod_cidrs(object));
        }
        self.remove(resource, object)
    }
}

/// The podCIDRs of a node.
pub(crate) fn pod_cidrs(node: &Value) -> Vec<IpNet> {
    let list = node["spec"]["podCIDRs"].as_array();
    let list = list
        .into_iter()
        .flatten()
        .chain(node["spec"].get("podCIDR"));
    list.filter_map(|cidr| cidr.as_str()?.parse().ok())
        .collect()
}

fn has_finalizers(object: &Value) -> bool {
    object["metadata"]["finalizers"]
        .as_array()
        .is_some_and(|list| !list.is_empty())
}

fn check_preconditions(
    resource: &Resource,
    current: &Object,
    options: &DeleteOptions,
) -> Result<(), Failure> {
    let version = current.version().to_string();
    for (what, wanted, got) in [
        ("UID", &options.uid, current.uid()),
        ("ResourceVersion", &options.version, version.as_str()),
    ] {
        if let Some(wanted) = wanted.as_deref().filter(|wanted| *wanted != got) {
            let why = format!(
                "the {what} in the precondition ({wanted}) does not match the {what} in record \
                 ({got}). The object might have been deleted and then recreated"
            );
            return Err(Failure::conflict(resource, current.name(), &why));
        }
    }
    Ok(())
}
