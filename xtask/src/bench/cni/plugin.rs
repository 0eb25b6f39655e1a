//! One plugin with its configuration, called as a runtime calls it.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::{NAMESPACE, find_plugin};

/// The bridge that `bridge` makes and keeps.
pub(super) const BRIDGE: &str = "benchbr0";

/// A plugin.
pub(super) struct Plugin {
    /// What its errors call it.
    pub(super) name: &'static str,
    program: PathBuf,
    conf: String,
    /// Where it looks for the plugins that it delegates to.
    path: String,
}

/// What is attached.
pub(super) struct Attachment {
    container: String,
    netns: String,
    pod: String,
}

impl Attachment {
    pub(super) fn new(container: String, netns: String, pod: String) -> Self {
        Self {
            container,
            netns,
            pod,
        }
    }
}

impl Plugin {
    /// Hachi as the node has it, with the conflist that is shipped.
    pub(super) fn hachi(conflist: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(conflist)
            .with_context(|| format!("cannot read {}", conflist.display()))?;
        let list: Value = serde_json::from_str(&text).context("the conflist is not JSON")?;
        let mut conf = list["plugins"][0].clone();
        conf["cniVersion"] = list["cniVersion"].clone();
        conf["name"] = list["name"].clone();
        if let Some(conf) = conf.as_object_mut() {
            conf.remove("capabilities");
        }
        Ok(Self {
            name: "hachi-cni",
            program: "/opt/cni/bin/hachi-cni".into(),
            conf: conf.to_string(),
            path: "/opt/cni/bin".into(),
        })
    }

    /// `ptp` or `bridge` with `host-local`, as bare as they go: no masquerade.
    pub(super) fn reference(kind: &'static str, dual: bool) -> Result<Self> {
        let program = find_plugin(kind)?;
        let mut ranges = vec![json!([{ "subnet": "10.77.0.0/16" }])];
        let mut routes = vec![json!({ "dst": "0.0.0.0/0" })];
        if dual {
            ranges.push(json!([{ "subnet": "fd77::/64" }]));
            routes.push(json!({ "dst": "::/0" }));
        }
        let mut conf = json!({
            "cniVersion": "1.0.0", "name": format!("bench-{kind}"), "type": kind,
            // Beside Hachi's own store, on the same file system.
            "ipam": {
                "type": "host-local", "ranges": ranges, "routes": routes,
                "dataDir": "/var/lib/cni/bench",
            },
        });
        if kind == "bridge" {
            conf["bridge"] = json!(BRIDGE);
            conf["isGateway"] = json!(true);
        }
        let path = program.parent().unwrap_or(Path::new("/")).to_owned();
        Ok(Self {
            name: kind,
            program,
            conf: conf.to_string(),
            path: path.display().to_string(),
        })
    }

    /// Calls it from the calling thread's namespaces; returns how long its process took.
    pub(super) fn timed(&self, operation: &str, attachment: &Attachment) -> Result<Duration> {
        let mut command = Command::new(&self.program);
        command
            .env_clear()
            .env("CNI_COMMAND", operation)
            .env("CNI_CONTAINERID", &attachment.container)
            .env("CNI_NETNS", &attachment.netns)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", &self.path)
            .env(
                "CNI_ARGS",
                format!(
                    "IgnoreUnknown=1;K8S_POD_NAMESPACE={NAMESPACE};K8S_POD_NAME={}",
                    attachment.pod
                ),
            )
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let started = Instant::now();
        let mut child = command
            .spawn()
            .with_context(|| format!("cannot run {}", self.program.display()))?;
        if let Some(mut stdin) = child.stdin.take() {
            // One that ends without reading is judged by how it ended.
            let _ = stdin.write_all(self.conf.as_bytes());
        }
        let output = child.wait_with_output()?;
        let took = started.elapsed();
        if !output.status.success() {
            bail!(
                "{operation} failed: {}{}",
                String::from_utf8_lossy(&output.stdout).trim(),
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(took)
    }
}
