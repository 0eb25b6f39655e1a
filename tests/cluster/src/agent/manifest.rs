//! What the DaemonSet of the manifests gives an agent, so that the local cluster's have no more.

use anyhow::{Context as _, Result};
use k8s_openapi::api::{apps::v1::DaemonSet, core::v1::Container};

const MANIFEST: &str = include_str!("../../../../manifests/base/daemonset.yaml");

/// The capabilities that the manifests give an agent, without `CAP_`.
pub fn capabilities() -> Result<Vec<String>> {
    let security = agent()?.security_context.unwrap_or_default();
    let capabilities = security.capabilities.unwrap_or_default();
    anyhow::ensure!(
        security.privileged != Some(true) && capabilities.drop == Some(vec!["ALL".into()]),
        "the agent's container has more capabilities than its manifest lists"
    );
    capabilities.add.context("the agent has no capabilities")
}

fn agent() -> Result<Container> {
    let set: DaemonSet =
        serde_saphyr::from_str(MANIFEST).context("daemonset.yaml is no DaemonSet")?;
    let pod = set.spec.and_then(|spec| spec.template.spec);
    let mut containers = pod.context("daemonset.yaml has no Pod")?.containers;
    containers.retain(|container| container.name == "agent");
    containers.pop().context("there is no container \"agent\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agent_is_not_all_powerful() {
        let capabilities = capabilities().unwrap();
        assert!(
            capabilities.contains(&"NET_ADMIN".into()),
            "{capabilities:?}"
        );
        for never in ["SYS_MODULE", "SYS_RAWIO", "DAC_OVERRIDE", "SYS_PTRACE"] {
            assert!(!capabilities.contains(&never.into()), "{never}");
        }
    }
}
