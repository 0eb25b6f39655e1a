//! Nodes: their podCIDRs.

use serde_json::{Value, json};

use crate::{
    alloc::Ranges,
    failure::Cause,
    json::{is_empty, object_at},
    store::pod_cidrs,
};

/// Gives a new node its podCIDRs, or notes those that it came with.
pub(crate) fn allocate(object: &mut Value, ranges: &mut Ranges) -> Vec<Cause> {
    if object_at(object, "spec").is_none() {
        return Vec::new();
    }
    let mut cidrs = pod_cidrs(object);
    if cidrs.is_empty() {
        match ranges.take_pod_cidrs() {
            Some(taken) => cidrs = taken,
            None => {
                return vec![Cause::required(
                    "spec.podCIDRs",
                    "the cluster CIDR is used up",
                )];
            }
        }
    } else {
        cidrs.dedup();
        ranges.claim_pod_cidrs(&cidrs);
    }
    let text: Vec<_> = cidrs.iter().map(ToString::to_string).collect();
    object["spec"]["podCIDR"] = json!(text[0]);
    object["spec"]["podCIDRs"] = json!(text);
    Vec::new()
}

/// podCIDRs stay once they are given.
pub(crate) fn check_update(old: &Value, object: &mut Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    for key in ["podCIDR", "podCIDRs"] {
        let (old, new) = (&old["spec"][key], &object["spec"][key]);
        if is_empty(new) {
            let kept = old.clone();
            if let Some(spec) = object_at(object, "spec") {
                spec.insert(key.into(), kept);
            }
        } else if new != old {
            let why = "node updates may not change podCIDR except from \"\" to valid";
            causes.push(Cause::forbidden(format!("spec.{key}"), why));
        }
    }
    causes
}
