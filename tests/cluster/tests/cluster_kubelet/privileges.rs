//! What the containers of the manifests may do on a node: read from the kernel while they run, from what
//! the runtime was told once they have ended, and compared with what the manifest says.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

use anyhow::{Context as _, Result, bail, ensure};
use k8s_openapi::api::{
    apps::v1::DaemonSet,
    core::v1::{Container, Pod},
};
use serde_json::Value;

use crate::world::World;

/// What the runtime itself mounts into every container, or the kubelet into every Pod.
const RUNTIMES: [&str; 14] = [
    "/",
    "/proc",
    "/dev",
    "/sys",
    "/dev/pts",
    "/dev/shm",
    "/dev/mqueue",
    "/dev/termination-log",
    "/sys/fs/cgroup",
    "/etc/hosts",
    "/etc/hostname",
    "/etc/resolv.conf",
    "/run/secrets/kubernetes.io/serviceaccount",
    "/var/run/secrets/kubernetes.io/serviceaccount",
];

/// What a container may do.
#[derive(Debug, PartialEq, Eq)]
struct Privileges {
    /// Effective and bounding capabilities, without `CAP_`; `None` for all that there are.
    capabilities: Option<BTreeSet<String>>,
    no_new_privileges: bool,
    seccomp: bool,
    read_only_root: bool,
    uid: i64,
    /// Mounts besides the runtime's own, and whether they can be written to.
    mounts: BTreeMap<String, bool>,
}

/// Looks at every container of a DaemonSet's Pods on both nodes.
pub(crate) fn are_those_of_the_manifest(world: &World, manifest: &str) -> Result<()> {
    let set = daemon_set(manifest)?;
    let name = set.metadata.name.context("a name")?;
    let spec = set.spec.and_then(|spec| spec.template.spec);
    let spec = spec.context("a Pod")?;
    ensure!(
        spec.host_pid != Some(true) && spec.host_ipc != Some(true),
        "{name} shares more of the node than its network"
    );
    let pods = world.kubectl(&format!(
        "get pods -n kube-system -l app.kubernetes.io/name={name} -o json"
    ))?;
    let mut pods: Value = serde_json::from_str(&pods)?;
    let pods: Vec<Pod> = serde_json::from_value(pods["items"].take())?;
    ensure!(pods.len() == 2, "{} Pods of {name}", pods.len());
    for pod in &pods {
        for container in spec
            .init_containers
            .iter()
            .flatten()
            .chain(&spec.containers)
        {
            compare(world, pod, container)
                .with_context(|| format!("container {} of {name}", container.name))?;
        }
    }
    Ok(())
}

fn daemon_set(manifest: &str) -> Result<DaemonSet> {
    for document in manifest.split("\n---\n") {
        let object: Value = serde_saphyr::from_str(document)?;
        if object["kind"] == "DaemonSet" {
            return Ok(serde_json::from_value(object)?);
        }
    }
    bail!("no DaemonSet")
}

fn compare(world: &World, pod: &Pod, container: &Container) -> Result<()> {
    let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref());
    let node = node.context("it has no node")?;
    let status = pod.status.as_ref().context("no status")?;
    let statuses = [&status.init_container_statuses, &status.container_statuses];
    let mut statuses = statuses.into_iter().flatten().flatten();
    let status = statuses.find(|status| status.name == container.name);
    let id = status.and_then(|status| status.container_id.as_deref());
    let id = id.context("it was never started")?;

    let wanted = stated(container)?;
    let told = told(&world.container_spec(node, id)?)?;
    ensure!(
        told == wanted,
        "the runtime was told {told:?}, not {wanted:?}"
    );
    if let Ok(pid) = world.container_pid(node, id) {
        let found = found(pid)?;
        ensure!(found == wanted, "it has {found:?}, not {wanted:?}");
        for (kind, shared) in [
            ("net", true),
            ("pid", false),
            ("ipc", false),
            ("mnt", false),
        ] {
            let same = world.shares_namespace(node, pid, kind)?;
            ensure!(same == shared, "the namespace {kind} is the node's: {same}");
        }
    }
    Ok(())
}

/// By the manifest.
fn stated(container: &Container) -> Result<Privileges> {
    let security = container.security_context.clone().unwrap_or_default();
    let privileged = security.privileged == Some(true);
    let capabilities = security.capabilities.unwrap_or_default();
    let profile = security.seccomp_profile.map(|profile| profile.type_);
    ensure!(
        privileged || capabilities.drop == Some(vec!["ALL".into()]),
        "it keeps the capabilities that the runtime gives everybody"
    );
    let mounts = container.volume_mounts.iter().flatten();
    let mounts = mounts.map(|it| (it.mount_path.clone(), it.read_only != Some(true)));
    Ok(Privileges {
        capabilities: (!privileged)
            .then(|| capabilities.add.unwrap_or_default().into_iter().collect()),
        no_new_privileges: security.allow_privilege_escalation == Some(false),
        seccomp: !privileged && profile.as_deref() == Some("RuntimeDefault"),
        read_only_root: security.read_only_root_filesystem == Some(true),
        uid: security.run_as_user.unwrap_or(0),
        mounts: mounts.collect(),
    })
}

/// By the configuration that the runtime was started with.
fn told(spec: &Value) -> Result<Privileges> {
    let set = |kind: &str| -> BTreeSet<String> {
        let names = spec["process"]["capabilities"][kind].as_array();
        let names = names.into_iter().flatten().filter_map(Value::as_str);
        names.map(short).collect()
    };
    let capabilities = set("bounding");
    let of_a_user = spec["process"]["user"]["uid"].as_i64().unwrap_or(0);
    ensure!(set("effective") == capabilities || of_a_user != 0, "{spec}");
    let mounts = spec["mounts"].as_array().into_iter().flatten();
    let mounts = mounts.filter_map(|mount| {
        let options = mount["options"].as_array()?;
        let writable = !options.iter().any(|option| option == "ro");
        Some((mount["destination"].as_str()?.to_owned(), writable))
    });
    Ok(Privileges {
        capabilities: every(capabilities)?,
        no_new_privileges: spec["process"]["noNewPrivileges"] == true,
        seccomp: spec["linux"]["seccomp"].is_object(),
        read_only_root: spec["root"]["readonly"] == true,
        uid: of_a_user,
        mounts: own(mounts),
    })
}

/// By the kernel.
fn found(pid: u32) -> Result<Privileges> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let field = |name: &str| -> Result<&str> {
        let mut lines = status.lines();
        let line = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.map(str::trim).with_context(|| format!("no {name}"))
    };
    let set = |name: &str| -> Result<BTreeSet<String>> {
        let bits = u64::from_str_radix(field(name)?, 16)?;
        let all = caps::runtime::thread_all_supported().into_iter();
        let held = all.filter(|capability| bits & capability.bitmask() != 0);
        Ok(held
            .map(|capability| short(&capability.to_string()))
            .collect())
    };
    let (bounding, effective) = (set("CapBnd")?, set("CapEff")?);
    let uid: i64 = field("Uid")?
        .split_whitespace()
        .next()
        .context("a uid")?
        .parse()?;
    ensure!(
        effective == bounding,
        "{effective:?} of {bounding:?} in force"
    );
    let table = fs::read_to_string(format!("/proc/{pid}/mountinfo"))?;
    let mut mounts = BTreeMap::new();
    for line in table.lines() {
        let mut fields = line.split(' ').skip(4);
        let (path, options) = fields.next().zip(fields.next()).context("a mount")?;
        let writable = !options.split(',').any(|option| option == "ro");
        mounts.insert(path.to_owned(), writable);
    }
    Ok(Privileges {
        capabilities: every(bounding)?,
        no_new_privileges: field("NoNewPrivs")? == "1",
        seccomp: field("Seccomp")? == "2",
        read_only_root: mounts.get("/") == Some(&false),
        uid,
        mounts: own(mounts),
    })
}

fn short(name: &str) -> String {
    name.trim_start_matches("CAP_").to_owned()
}

/// `None` if these are all that the machine lets anybody have.
fn every(capabilities: BTreeSet<String>) -> Result<Option<BTreeSet<String>>> {
    let all = caps::read(None, caps::CapSet::Bounding).context("read what this process has")?;
    Ok((capabilities.len() < all.len()).then_some(capabilities))
}

/// Without what is the runtime's, and what is mounted below a volume on the node.
fn own(mounts: impl IntoIterator<Item = (String, bool)>) -> BTreeMap<String, bool> {
    let mut kept: BTreeMap<String, bool> = BTreeMap::new();
    let runtimes = |path: &str| {
        let masked = path.starts_with("/proc/")
            || path.starts_with("/sys/firmware")
            || path.starts_with("/sys/devices");
        masked || RUNTIMES.contains(&path) || path.starts_with("/sys/fs/cgroup/")
    };
    for (path, writable) in mounts {
        if !runtimes(&path)
            && !kept
                .keys()
                .any(|above| path.starts_with(&format!("{above}/")))
        {
            kept.insert(path, writable);
        }
    }
    kept
}
