//! What a container runtime does with a CNI network configuration list: one process for each
//! plugin of the chain, configuration on its standard input, result or error on its standard output
//! (CNI specification 1.1.0, sections 2 to 5).

use std::{path::Path, process::Output};

use anyhow::{Context as _, Result};
use serde_json::{Map, Value, json};

use crate::{
    names::ClusterId,
    run,
    spawn::{Launch, Place},
};

/// The directory of plugins, as the node sees it.
const BIN_DIR: &str = "/opt/cni/bin";

/// A plugin may wait for the agent; longer than this it is stuck.
const LIMIT: &str = "60";

/// A network configuration list.
#[derive(Clone, Debug)]
pub struct Conflist {
    version: Value,
    name: Value,
    plugins: Vec<Map<String, Value>>,
}

/// What a runtime attaches to a network.
#[derive(Clone, Debug)]
pub struct Sandbox {
    /// `CNI_CONTAINERID`.
    pub container: String,
    /// `CNI_NETNS`, as the node sees it.
    pub netns: String,
    /// `CNI_ARGS`.
    pub args: Vec<(&'static str, String)>,
    /// `portMappings` of the capability of that name.
    pub ports: Vec<Value>,
}

/// Where plugins run.
#[derive(Clone, Debug)]
pub struct Host {
    /// The node.
    pub place: Place,
    /// The cluster.
    pub id: ClusterId,
}

/// An error object, or a plugin that failed without one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CniError {
    /// The plugin.
    pub plugin: String,
    /// The specification's error code; 999 where the plugin printed none.
    pub code: u64,
    /// What it says.
    pub message: String,
}

/// The specification's "try again later".
pub const TRY_AGAIN_LATER: u64 = 11;

impl std::error::Error for CniError {}

impl std::fmt::Display for CniError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: code {}: {}", self.plugin, self.code, self.message)
    }
}

impl Conflist {
    /// Reads a list.
    pub fn parse(text: &str) -> Result<Self> {
        let value: Value = serde_json::from_str(text).context("the conflist is not JSON")?;
        let plugins = value
            .get("plugins")
            .and_then(Value::as_array)
            .context("the conflist has no `plugins`")?
            .iter()
            .map(|plugin| {
                plugin
                    .as_object()
                    .cloned()
                    .context("a plugin is not an object")
            })
            .collect::<Result<Vec<_>>>()?;
        let field = |name: &str| {
            value
                .get(name)
                .cloned()
                .with_context(|| format!("the conflist has no `{name}`"))
        };
        Ok(Self {
            version: field("cniVersion")?,
            name: field("name")?,
            plugins,
        })
    }

    /// Reads the first list of a directory by name, the one that a runtime uses.
    pub fn first_in(dir: &Path) -> Result<Self> {
        let mut paths = std::fs::read_dir(dir)
            .with_context(|| format!("list {}", dir.display()))?
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| path.extension().is_some_and(|kind| kind == "conflist"))
            .collect::<Vec<_>>();
        paths.sort();
        let path = paths
            .first()
            .with_context(|| format!("no conflist in {}", dir.display()))?;
        let text =
            std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        Self::parse(&text).with_context(|| format!("in {}", path.display()))
    }

    /// Runs the chain with ADD; returns the last result.
    pub fn add(&self, host: &Host, sandbox: &Sandbox) -> Result<Value> {
        let mut previous = None;
        for plugin in &self.plugins {
            let output = self.call(host, sandbox, "ADD", plugin, previous.as_ref())?;
            let result = serde_json::from_slice(&output.stdout).with_context(|| {
                format!(
                    "the plugin {} printed no JSON result: {}",
                    kind(plugin),
                    String::from_utf8_lossy(&output.stdout)
                )
            })?;
            previous = Some(result);
        }
        previous.context("the conflist names no plugin")
    }

    /// Runs the chain backwards with DEL; goes on past errors and returns the first.
    pub fn del(&self, host: &Host, sandbox: &Sandbox, result: Option<&Value>) -> Result<()> {
        let mut first = Ok(());
        for plugin in self.plugins.iter().rev() {
            if let Err(error) = self.call(host, sandbox, "DEL", plugin, result) {
                first = first.and(Err(error));
            }
        }
        first
    }

    fn call(
        &self,
        host: &Host,
        sandbox: &Sandbox,
        operation: &str,
        plugin: &Map<String, Value>,
        previous: Option<&Value>,
    ) -> Result<Output> {
        let kind = kind(plugin);
        let config = self.config(plugin, sandbox, previous);
        let program = Path::new(BIN_DIR).join(kind);
        let mut launch = Launch::new(&host.place, &host.id, &["--limit", LIMIT], program)?;
        let args: Vec<_> = sandbox
            .args
            .iter()
            .map(|(name, value)| format!("{name}={value}"))
            .collect();
        launch
            .command()
            .env("CNI_COMMAND", operation)
            .env("CNI_CONTAINERID", &sandbox.container)
            .env("CNI_NETNS", &sandbox.netns)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", BIN_DIR)
            .env("CNI_ARGS", args.join(";"));
        let output = run::with_input(&mut launch.into_command(), &config)?;
        if output.status.success() {
            return Ok(output);
        }
        Err(CniError::of(kind, &output).into())
    }

    fn config(
        &self,
        plugin: &Map<String, Value>,
        sandbox: &Sandbox,
        previous: Option<&Value>,
    ) -> Vec<u8> {
        let mut config = plugin.clone();
        config.insert("cniVersion".into(), self.version.clone());
        config.insert("name".into(), self.name.clone());
        if let Some(previous) = previous {
            config.insert("prevResult".into(), previous.clone());
        }
        // `capabilities` is for the runtime alone; what is asked for comes as `runtimeConfig`.
        let capabilities = config.remove("capabilities").unwrap_or_default();
        if capabilities.get("portMappings") == Some(&Value::Bool(true)) {
            config.insert(
                "runtimeConfig".into(),
                json!({"portMappings": sandbox.ports}),
            );
        }
        Value::Object(config).to_string().into_bytes()
    }
}

impl CniError {
    fn of(plugin: &str, output: &Output) -> Self {
        let stderr = String::from_utf8_lossy(&output.stderr);
        let error: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let text = |name: &str| error.get(name).and_then(Value::as_str).unwrap_or_default();
        let parts = [text("msg"), text("details"), stderr.trim()];
        let message = parts
            .iter()
            .filter(|part| !part.is_empty())
            .copied()
            .collect::<Vec<_>>();
        Self {
            plugin: plugin.to_owned(),
            code: error.get("code").and_then(Value::as_u64).unwrap_or(999),
            message: if message.is_empty() {
                format!("failed without an error object ({})", output.status)
            } else {
                message.join("; ")
            },
        }
    }
}

fn kind(plugin: &Map<String, Value>) -> &str {
    plugin.get("type").and_then(Value::as_str).unwrap_or("")
}

/// The addresses in a result.
#[must_use]
pub fn addresses(result: &Value) -> Vec<std::net::IpAddr> {
    let ips = result.get("ips").and_then(Value::as_array);
    ips.into_iter()
        .flatten()
        .filter_map(|ip| ip.get("address")?.as_str()?.split('/').next()?.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = r#"{"cniVersion": "1.0.0", "name": "net", "plugins": [
        {"type": "one", "mtu": 1400},
        {"type": "two", "capabilities": {"portMappings": true}}
    ]}"#;

    fn sandbox() -> Sandbox {
        Sandbox {
            container: "c".into(),
            netns: "/run/netns/x".into(),
            args: vec![],
            ports: vec![json!({"hostPort": 80})],
        }
    }

    fn config(plugin: usize, previous: Option<&Value>) -> Value {
        let list = Conflist::parse(LIST).unwrap();
        serde_json::from_slice(&list.config(&list.plugins[plugin], &sandbox(), previous)).unwrap()
    }

    #[test]
    fn a_plugin_gets_the_version_the_name_and_the_previous_result() {
        assert_eq!(
            config(0, Some(&json!({"ips": []}))),
            json!({"cniVersion": "1.0.0", "name": "net", "type": "one", "mtu": 1400,
                   "prevResult": {"ips": []}})
        );
    }

    #[test]
    fn a_capability_becomes_runtime_config() {
        assert_eq!(
            config(1, None),
            json!({"cniVersion": "1.0.0", "name": "net", "type": "two",
                   "runtimeConfig": {"portMappings": [{"hostPort": 80}]}})
        );
    }

    #[test]
    fn addresses_of_a_result() {
        let result = json!({"ips": [{"address": "10.1.2.3/32"}, {"address": "fd00::5/128"}]});
        let expected: [std::net::IpAddr; 2] =
            ["10.1.2.3".parse().unwrap(), "fd00::5".parse().unwrap()];
        assert_eq!(addresses(&result), expected);
    }

    #[test]
    fn a_list_without_plugins_is_refused() {
        let error = Conflist::parse(r#"{"cniVersion": "1.0.0", "name": "x"}"#).unwrap_err();
        assert!(error.to_string().contains("plugins"), "{error}");
    }
}
