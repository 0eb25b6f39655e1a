//! What the kubelet says about a Pod.

use std::net::IpAddr;

use anyhow::{Context as _, Result};
use k8s_openapi::api::core::v1::Container;
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};

use super::Worker;

impl Worker {
    /// Reports the phase; ready or not while it runs.
    pub(super) async fn report(
        &self,
        phase: &str,
        ready: Option<bool>,
        ips: &[IpAddr],
    ) -> Result<()> {
        let now = k8s_openapi::jiff::Timestamp::now().to_string();
        let state = match ready {
            Some(_) => json!({"running": {"startedAt": self.started}}),
            None => json!({"terminated": {
                "exitCode": i32::from(phase == "Failed"), "finishedAt": now, "reason": phase,
            }}),
        };
        let ready = ready == Some(true);
        let condition = |kind: &str, status: bool| {
            let status = if status { "True" } else { "False" };
            json!({"type": kind, "status": status, "lastTransitionTime": now})
        };
        let containers: Vec<_> = self
            .containers()
            .iter()
            .map(|container| {
                json!({
                    "name": container.name, "image": container.image, "imageID": "",
                    "ready": ready, "started": ready, "restartCount": self.restarts,
                    "state": state,
                })
            })
            .collect();
        let list = |ips: &[IpAddr]| ips.iter().map(|ip| json!({"ip": ip})).collect::<Vec<_>>();
        let mut status = json!({
            "phase": phase,
            "hostIP": self.node.addresses.first(),
            "hostIPs": list(&self.node.addresses),
            "startTime": self.started,
            "conditions": [
                condition("PodScheduled", true),
                condition("Initialized", true),
                condition("ContainersReady", ready),
                condition("Ready", ready),
            ],
            "containerStatuses": containers,
        });
        if let Some(first) = ips.first() {
            status["podIP"] = json!(first);
            status["podIPs"] = json!(list(ips));
        }
        self.patch_status(&status).await
    }

    /// Shows why the Pod does not start where `kubectl describe` finds it.
    pub(super) async fn complain(&self, error: &str) -> Result<()> {
        let containers: Vec<_> = self
            .containers()
            .iter()
            .map(|container| {
                json!({
                    "name": container.name, "image": container.image, "imageID": "",
                    "ready": false, "started": false, "restartCount": 0,
                    "state": {"waiting": {"reason": "ContainerCreating", "message": error}},
                })
            })
            .collect();
        self.patch_status(&json!({"containerStatuses": containers}))
            .await
    }

    async fn patch_status(&self, status: &Value) -> Result<()> {
        let patch = Patch::Merge(json!({"status": status}));
        match self
            .api()
            .patch_status(&self.name, &PatchParams::default(), &patch)
            .await
        {
            Ok(_) => Ok(()),
            // Deleted by force meanwhile: the watch says so next.
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            Err(error) => Err(error).context("report the Pod's status"),
        }
    }

    fn containers(&self) -> Vec<Container> {
        self.wish(|pod| Some(pod.spec.as_ref()?.containers.clone()))
            .unwrap_or_default()
    }
}
