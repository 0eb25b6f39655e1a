//! What the agents of the local cluster may do: exactly what the ClusterRole of the manifests says,
//! so that a right that the agent needs and the manifests lack fails a test.

use anyhow::{Context as _, Result};
use hachi_apiserver::{Grant, Rule};
use k8s_openapi::api::rbac::v1::{ClusterRole, PolicyRule};
use serde::Deserialize as _;
use serde_json::Value;

const MANIFEST: &str = include_str!("../../../../manifests/base/rbac.yaml");

/// The agents' token, with the rules of the manifest.
pub(super) fn agent() -> Result<Grant> {
    let mut rules = Vec::new();
    for object in objects()? {
        if object["kind"] == "ClusterRole" {
            let role = ClusterRole::deserialize(object).context("the ClusterRole is malformed")?;
            rules.extend(role.rules.into_iter().flatten().map(rule));
        }
    }
    anyhow::ensure!(!rules.is_empty(), "rbac.yaml has no ClusterRole with rules");
    Ok(Grant {
        token: format!("agent-{}", std::process::id()),
        user: "system:serviceaccount:kube-system:hachi".into(),
        rules,
    })
}

/// The objects of the manifest.
pub(super) fn objects() -> Result<Vec<Value>> {
    let documents = MANIFEST.split("\n---\n");
    let read = |document| serde_saphyr::from_str(document).context("rbac.yaml is no YAML");
    documents.map(read).collect()
}

fn rule(rule: PolicyRule) -> Rule {
    Rule {
        groups: rule.api_groups.unwrap_or_default(),
        resources: rule.resources.unwrap_or_default(),
        verbs: rule.verbs,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_manifest_grants_watches_and_no_secrets() {
        let rules = agent().unwrap().rules;
        let may = |resource: &str, verb: &str| {
            rules.iter().any(|rule| {
                rule.resources.iter().any(|r| r == resource || r == "*")
                    && rule.verbs.iter().any(|v| v == verb || v == "*")
            })
        };
        for resource in [
            "pods",
            "nodes",
            "services",
            "endpointslices",
            "networkpolicies",
        ] {
            assert!(
                may(resource, "list") && may(resource, "watch"),
                "{resource}"
            );
            assert!(
                !may(resource, "delete") && !may(resource, "update"),
                "{resource}"
            );
        }
        assert!(!may("secrets", "get") && !may("secrets", "list"));
    }
}
