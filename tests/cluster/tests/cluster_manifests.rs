//! The manifests as people get them: every directory that can be applied is built by kustomize and looked
//! at as an API server does, field by field, and then as a kubelet and the programs do.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};
use k8s_openapi::{
    api::{
        apps::v1::DaemonSet,
        core::v1::{ConfigMap, Container, PodSpec, ServiceAccount, Volume},
        rbac::v1::{ClusterRole, ClusterRoleBinding},
    },
    apimachinery::pkg::util::intstr::IntOrString,
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

fn manifests() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../manifests")
}

/// Every directory that somebody applies.
fn directories() -> Result<Vec<PathBuf>> {
    let mut all = vec![manifests().join("base"), manifests().join("uninstall")];
    for overlay in fs::read_dir(manifests().join("overlays"))? {
        all.push(overlay?.path());
    }
    Ok(all)
}

fn documents(text: &str) -> Result<Vec<Value>> {
    text.split("\n---\n")
        .map(|document| serde_saphyr::from_str(document).context("no YAML"))
        .collect()
}

fn built(directory: &Path) -> Result<Vec<Value>> {
    let output = Command::new("kubectl")
        .arg("kustomize")
        .arg(directory)
        .output()
        .context("run kubectl (cargo xtask setup installs it)")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "kubectl kustomize: {said}");
    documents(&String::from_utf8(output.stdout)?)
}

/// An object of a type, none of whose fields the type does not know.
fn typed<K: DeserializeOwned + Serialize>(object: &Value) -> Result<K> {
    let typed = K::deserialize(object).context("not of its kind")?;
    let known = serde_json::to_value(&typed)?;
    lacks(object, &known, "")?;
    Ok(typed)
}

/// Fails if `known` lacks a field of `object`: strict validation refuses it, others forget it.
fn lacks(object: &Value, known: &Value, at: &str) -> Result<()> {
    match (object, known) {
        (Value::Object(fields), Value::Object(known)) => {
            for (name, field) in fields {
                let at = format!("{at}.{name}");
                let Some(found) = known.get(name) else {
                    bail!("no such field: {at}");
                };
                lacks(field, found, &at)?;
            }
        }
        (Value::Array(items), Value::Array(known)) => {
            ensure!(items.len() == known.len(), "{at}");
            for (item, found) in items.iter().zip(known) {
                lacks(item, found, at)?;
            }
        }
        _ => {}
    }
    Ok(())
}

/// What one directory makes.
#[derive(Default)]
struct Installed {
    sets: Vec<DaemonSet>,
    maps: BTreeMap<String, ConfigMap>,
    accounts: BTreeSet<String>,
    roles: BTreeSet<String>,
    bindings: Vec<ClusterRoleBinding>,
}

impl Installed {
    fn read(documents: &[Value]) -> Result<Self> {
        let mut all = Self::default();
        for object in documents {
            let kind = object["kind"].as_str().context("no kind")?;
            let name = object["metadata"]["name"].as_str().context("no name")?;
            let namespaced = object["metadata"]["namespace"] == "kube-system";
            all.take(kind, name, object)
                .with_context(|| format!("{kind} {name}"))?;
            ensure!(
                namespaced || kind.starts_with("Cluster"),
                "{kind} {name} is not in kube-system"
            );
        }
        Ok(all)
    }

    fn take(&mut self, kind: &str, name: &str, object: &Value) -> Result<()> {
        match kind {
            "DaemonSet" => self.sets.push(typed(object)?),
            "ConfigMap" => {
                self.maps.insert(name.to_owned(), typed(object)?);
            }
            "ServiceAccount" => {
                typed::<ServiceAccount>(object)?;
                self.accounts.insert(name.to_owned());
            }
            "ClusterRole" => {
                let role: ClusterRole = typed(object)?;
                for rule in role.rules.unwrap_or_default() {
                    ensure!(!rule.verbs.iter().any(|verb| verb == "*"), "{rule:?}");
                }
                self.roles.insert(name.to_owned());
            }
            "ClusterRoleBinding" => self.bindings.push(typed(object)?),
            // A custom resource of the Prometheus operator.
            "PodMonitor" => {
                ensure!(object["spec"]["podMetricsEndpoints"][0]["port"] == "metrics");
            }
            _ => bail!("nobody has looked at such objects"),
        }
        Ok(())
    }

    fn judge(&self) -> Result<()> {
        ensure!(self.sets.len() == 1, "one DaemonSet");
        for binding in &self.bindings {
            ensure!(self.roles.contains(&binding.role_ref.name), "{binding:?}");
            for subject in binding.subjects.iter().flatten() {
                ensure!(self.accounts.contains(&subject.name), "{binding:?}");
            }
        }
        let set = self.sets[0].spec.as_ref().context("a spec")?;
        let labels = set.template.metadata.as_ref();
        let labels = labels.and_then(|it| it.labels.clone()).unwrap_or_default();
        let selected = set.selector.match_labels.clone().unwrap_or_default();
        ensure!(!selected.is_empty());
        ensure!(selected.iter().all(|(key, it)| labels.get(key) == Some(it)));
        let pod = set.template.spec.as_ref().context("a Pod")?;
        ensure!(pod.host_network == Some(true));
        ensure!(pod.priority_class_name.as_deref() == Some("system-node-critical"));
        let tolerations = pod.tolerations.iter().flatten();
        let mut all = tolerations.filter(|it| it.operator.as_deref() == Some("Exists"));
        ensure!(all.any(|it| it.key.is_none()), "some taints keep it away");
        if let Some(account) = &pod.service_account_name {
            ensure!(self.accounts.contains(account), "no account {account}");
        }
        let containers = pod.init_containers.iter().flatten().chain(&pod.containers);
        for container in containers {
            self.container(pod, container)
                .with_context(|| format!("container {}", container.name))?;
        }
        Ok(())
    }

    fn container(&self, pod: &PodSpec, container: &Container) -> Result<()> {
        let security = container.security_context.as_ref().context("security")?;
        ensure!(security.read_only_root_filesystem == Some(true));
        let volumes = pod.volumes.iter().flatten();
        let volumes: BTreeMap<_, _> = volumes.map(|it| (it.name.as_str(), it)).collect();
        for mount in container.volume_mounts.iter().flatten() {
            ensure!(volumes.contains_key(mount.name.as_str()), "{mount:?}");
        }
        // Every path that it is told of is below something that is mounted.
        let mounts = container.volume_mounts.iter().flatten();
        let mounted: Vec<_> = mounts.map(|it| it.mount_path.as_str()).collect();
        let arguments = container.args.clone().unwrap_or_default();
        for argument in &arguments {
            let path = argument.split_once('=').map(|(_, value)| value);
            if let Some(path) = path.filter(|it| it.starts_with('/')) {
                let there = mounted.iter().any(|it| Path::new(path).starts_with(it));
                ensure!(there, "{argument} leads to nothing mounted");
            }
        }
        if container.name == "agent" {
            self.agent(&volumes, container, &arguments)
        } else {
            let command = container.command.clone().context("a command")?;
            understands("hachi", &command[1..2], &arguments)
        }
    }

    fn agent(
        &self,
        volumes: &BTreeMap<&str, &Volume>,
        container: &Container,
        arguments: &[String],
    ) -> Result<()> {
        let security = container.security_context.as_ref().context("security")?;
        ensure!(security.privileged != Some(true), "it is privileged");
        ensure!(security.allow_privilege_escalation == Some(false));
        let http = arguments.iter().find_map(|it| it.strip_prefix("--http="));
        let (_, port) = http.and_then(|it| it.rsplit_once(':')).context("--http")?;
        for probe in [
            &container.liveness_probe,
            &container.readiness_probe,
            &container.startup_probe,
        ] {
            let asked = probe.as_ref().and_then(|it| it.http_get.clone());
            let asked = asked.context("a probe")?;
            let same = matches!(&asked.port, IntOrString::Int(it) if it.to_string() == port);
            ensure!(same, "a probe asks another port than {port}");
        }
        let config = volumes["config"].config_map.as_ref();
        let map = &config.context("a ConfigMap")?.name;
        let data = self.maps.get(map).and_then(|map| map.data.clone());
        let data = data.with_context(|| format!("no ConfigMap {map}"))?;
        // The agent itself says whether it takes the flags and the file.
        let dir = tempfile::tempdir()?;
        for (name, content) in &data {
            fs::write(dir.path().join(name), content)?;
        }
        let moved = |argument: &String| {
            argument.replace("/etc/hachi/", &format!("{}/", dir.path().display()))
        };
        let mut command = Command::new(hachi_testutil::dist_dir().join("hachi-agent"));
        command
            .env("NODE_NAME", "node")
            .args(arguments.iter().map(moved));
        for variable in container.env.iter().flatten() {
            if let Some(value) = &variable.value {
                command.env(&variable.name, value);
            }
        }
        let output = command.arg("--check-config").output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{arguments:?}: {said}");
        let named = arguments
            .iter()
            .find_map(|it| it.strip_prefix("--conflist="));
        let named = named.and_then(|it| Path::new(it).file_name()?.to_str());
        ensure!(data.contains_key(named.context("--conflist")?), "{named:?}");
        Ok(())
    }
}

/// Whether a command knows all of these flags.
fn understands(program: &str, command: &[String], arguments: &[String]) -> Result<()> {
    let output = Command::new(hachi_testutil::dist_dir().join(program))
        .args(command)
        .arg("--help")
        .output()?;
    let help = String::from_utf8(output.stdout)?;
    ensure!(output.status.success(), "{command:?}: {help}");
    for argument in arguments {
        let flag = argument.split('=').next().unwrap_or_default();
        let known = help.split_whitespace().any(|word| word == flag);
        ensure!(known, "{program} {command:?} knows no {flag}");
    }
    Ok(())
}

#[test]
fn every_overlay_is_what_a_cluster_takes() {
    hachi_testutil::require_binaries!("hachi-agent", "hachi");
    let directories = directories().expect("the manifests");
    assert!(directories.len() >= 9, "{directories:?}");
    for directory in directories {
        let judged = built(&directory)
            .and_then(|documents| Installed::read(&documents))
            .and_then(|installed| installed.judge());
        if let Err(error) = judged {
            panic!("{}: {error:#}", directory.display());
        }
    }
}

/// What people apply without kustomize, the examples, and the configurations of kind.
#[test]
fn files_that_are_applied_are_whole() {
    hachi_testutil::require_binaries!("hachi-agent", "hachi");
    if let Err(error) = files() {
        panic!("{error:#}");
    }
}

fn files() -> Result<()> {
    for name in ["install.yaml", "uninstall.yaml"] {
        let text = fs::read_to_string(manifests().join(name))?;
        let installed = Installed::read(&documents(&text)?)?;
        installed.judge().with_context(|| name.to_owned())?;
    }
    for name in ["kind.yaml", "kind-dual.yaml"] {
        let text = fs::read_to_string(manifests().join(name))?;
        let config: Value = serde_saphyr::from_str(&text)?;
        ensure!(config["networking"]["disableDefaultCNI"] == true, "{name}");
        ensure!(config["networking"]["kubeProxyMode"] == "none", "{name}");
    }
    Ok(())
}

#[test]
fn a_key_that_nobody_knows_is_refused_with_a_hint() {
    hachi_testutil::require_binaries!("hachi-agent");
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("agent.toml");
    let check = |text: &str| {
        fs::write(&file, text).expect("written");
        let output = Command::new(hachi_testutil::dist_dir().join("hachi-agent"))
            .args(["--node-name=n", "--check-config", "--config"])
            .arg(&file)
            .output()
            .expect("it runs");
        (
            output.status.success(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    };
    assert!(check("pod-wait = \"5s\"\n").0);
    let (good, said) = check("pod_wait = \"5s\"\n");
    assert!(
        !good && said.contains("did you mean \"pod-wait\"?"),
        "{said}"
    );
    let (good, said) = check("pod-wait = \"five\"\n");
    assert!(!good && said.contains("pod-wait"), "{said}");
}

#[test]
fn a_field_that_nobody_knows_is_found() {
    let object = serde_json::json!({
        "apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "a", "lables": {}},
    });
    let error = typed::<ServiceAccount>(&object).expect_err("a misspelt field");
    assert!(
        format!("{error:#}").contains(".metadata.lables"),
        "{error:#}"
    );
}
