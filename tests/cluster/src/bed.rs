//! What the suites share: a cluster for all tests of a program, and namespaces of its own for each.
//!
//! Tests of one program share a cluster of each family, because making one costs more than most
//! tests do. It ends with the program, by its reaper.

use std::{
    fmt::Write as _,
    path::PathBuf,
    sync::{Mutex, OnceLock, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

use crate::{
    cluster::{Cluster, eventually},
    matrix::{Column, Matrix},
    options::{Family, Options},
    workload::probe::{Outcome, Protocol, Target},
};

/// How long one probe waits.
pub const TIMEOUT: Duration = Duration::from_millis(500);

/// How long a change may take to show; far more than it does, for machines that are busy.
pub const LIMIT: Duration = Duration::from_secs(15);

/// The cluster of this program and family, started at its first use.
pub fn shared(family: Family) -> &'static Cluster {
    static V4: OnceLock<Cluster> = OnceLock::new();
    static V6: OnceLock<Cluster> = OnceLock::new();
    static DUAL: OnceLock<Cluster> = OnceLock::new();
    // A start that panicked may be tried again by the next test.
    static STARTING: Mutex<()> = Mutex::new(());
    let cell = match family {
        Family::V4 => &V4,
        Family::V6 => &V6,
        Family::Dual => &DUAL,
    };
    let _one_by_one = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
    cell.get_or_init(|| {
        let options = Options {
            remove_dir: true,
            ..Options::new(directory(family), hachi_testutil::dist_dir(), family)
        };
        Cluster::start(options).unwrap_or_else(|error| panic!("no cluster: {error:#}"))
    })
}

/// A directory for the cluster of this program; it goes with the cluster.
fn directory(family: Family) -> PathBuf {
    let name = format!("hachi-cluster-{}-{family:?}", std::process::id());
    std::env::temp_dir().join(name)
}

/// A test's own namespaces on a shared cluster, removed at its end.
#[derive(Debug)]
pub struct Bed {
    /// The cluster.
    pub cluster: &'static Cluster,
    name: String,
    namespaces: Vec<String>,
}

/// A Pod to be made.
#[derive(Clone, Copy, Debug)]
pub struct Spec<'a> {
    /// Its namespace, by the short name.
    pub namespace: &'a str,
    /// Its name.
    pub name: &'a str,
    /// Its labels, as in `app: web, tier: front`.
    pub labels: &'a str,
    /// Its node; any if empty.
    pub node: &'a str,
    /// Further lines of its container's ports, as in `{name: http, containerPort: 80}`.
    pub ports: &'a str,
}

impl Default for Spec<'_> {
    fn default() -> Self {
        Self {
            namespace: "a",
            name: "pod",
            labels: "",
            node: "",
            ports: "",
        }
    }
}

impl Bed {
    /// Makes namespaces of these short names, each labelled `ns: SHORT`.
    pub fn new(cluster: &'static Cluster, name: &str, namespaces: &[&str]) -> Result<Self> {
        let name = name.replace('_', "-");
        let mut bed = Self {
            cluster,
            name,
            namespaces: Vec::new(),
        };
        let mut manifest = String::new();
        for short in namespaces {
            let full = bed.namespace(short);
            let _ = write!(
                manifest,
                "---\napiVersion: v1\nkind: Namespace\n\
                 metadata: {{name: {full}, labels: {{ns: '{short}'}}}}\n"
            );
            bed.namespaces.push(full);
        }
        cluster.apply(&manifest)?;
        Ok(bed)
    }

    /// The full name of a namespace.
    #[must_use]
    pub fn namespace(&self, short: &str) -> String {
        format!("{}-{short}", self.name)
    }

    /// `SHORT/POD` with the namespace's full name; anything else as it is.
    #[must_use]
    pub fn full(&self, pod: &str) -> String {
        match pod.split_once('/') {
            Some((short, name)) if self.namespaces.contains(&self.namespace(short)) => {
                format!("{}/{name}", self.namespace(short))
            }
            _ => pod.to_owned(),
        }
    }

    /// Makes Pods and waits until they are ready.
    pub fn pods(&self, specs: &[Spec<'_>]) -> Result<()> {
        let manifest: String = specs.iter().map(|spec| self.manifest(spec)).collect();
        self.cluster.apply(&manifest)?;
        let mut namespaces: Vec<_> = specs
            .iter()
            .map(|spec| self.namespace(spec.namespace))
            .collect();
        namespaces.sort_unstable();
        namespaces.dedup();
        namespaces
            .iter()
            .try_for_each(|namespace| self.cluster.wait_ready(namespace))
    }

    /// A Pod's manifest.
    #[must_use]
    pub fn manifest(&self, spec: &Spec<'_>) -> String {
        let Spec {
            namespace,
            name,
            labels,
            node,
            ports,
        } = *spec;
        let namespace = self.namespace(namespace);
        let node = if node.is_empty() {
            String::new()
        } else {
            format!("nodeName: {node}, ")
        };
        format!(
            "---\napiVersion: v1\nkind: Pod\n\
             metadata: {{name: {name}, namespace: {namespace}, labels: {{{labels}}}}}\n\
             spec: {{{node}containers: [{{name: main, image: server, ports: [{ports}]}}]}}\n"
        )
    }

    /// Applies manifests in which `$SHORT` stands for a namespace's full name.
    pub fn apply(&self, manifest: &str) -> Result<String> {
        self.cluster.apply(&self.expand(manifest))
    }

    /// Runs kubectl on arguments in which `$SHORT` stands for a namespace's full name.
    pub fn kubectl(&self, arguments: &str) -> Result<String> {
        let arguments = self.expand(arguments);
        self.cluster
            .kubectl(&arguments.split_whitespace().collect::<Vec<_>>())
    }

    fn expand(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for full in &self.namespaces {
            let short = full.rsplit('-').next().unwrap_or(full);
            text = text.replace(&format!("${short}"), full);
        }
        text
    }

    /// A Pod's address and a port.
    pub fn target(&self, protocol: Protocol, pod: &str, port: u16) -> Result<Target> {
        Ok(Target::new(
            protocol,
            self.cluster.pod_ip(&self.full(pod))?,
            port,
        ))
    }

    /// Asks once.
    pub fn probe(&self, from: &str, to: Target) -> Result<Outcome> {
        self.cluster.probe(&self.full(from), to, TIMEOUT)
    }

    /// Waits until a probe is answered.
    pub fn reaches(&self, from: &str, to: Target) -> Result<()> {
        eventually(LIMIT, || match self.probe(from, to)? {
            Outcome::Answered(_) => Ok(()),
            other => bail!("{from} does not reach {to}: {other}"),
        })
    }

    /// Waits until a probe is not answered.
    pub fn loses(&self, from: &str, to: Target) -> Result<()> {
        eventually(LIMIT, || match self.probe(from, to)? {
            Outcome::Answered(name) => bail!("{from} still reaches {to}, which is {name}"),
            _ => Ok(()),
        })
    }

    /// Waits until exactly those Pods (`SHORT/POD`) reach each other that should, on every one of
    /// these ports.
    pub fn matrix(
        &self,
        pods: &[&str],
        ports: &[(Protocol, u16)],
        expected: impl Fn(&str, &str, (Protocol, u16)) -> bool,
    ) -> Result<()> {
        let rows: Vec<_> = pods.iter().map(|pod| self.full(pod)).collect();
        let mut columns = Vec::new();
        for pod in pods {
            for (protocol, port) in ports {
                let target = self.target(*protocol, pod, *port)?;
                columns.push(Column {
                    label: format!("{}:{protocol}/{port}", self.full(pod)),
                    target,
                    skip: Vec::new(),
                });
            }
        }
        let short = |full: &str| -> String {
            pods.iter()
                .find(|pod| self.full(pod) == full)
                .map_or(full, |pod| *pod)
                .to_owned()
        };
        eventually(LIMIT, || {
            let matrix = Matrix::measure(self.cluster, &rows, &columns, TIMEOUT)?;
            let differences = matrix.differences(|row, column| {
                let (to, port) = column.rsplit_once(':').unwrap_or((column, ""));
                let port = ports
                    .iter()
                    .find(|(kind, number)| format!("{kind}/{number}") == port);
                // A Pod always reaches itself.
                row == to || port.is_some_and(|port| expected(&short(row), &short(to), *port))
            });
            if differences.is_empty() {
                return Ok(());
            }
            bail!("{}\n{}", matrix.render(false), differences.join("\n"))
        })
    }

    /// Asks a Service often; returns who answered, and fails if anything was not answered.
    pub fn backends(&self, from: &str, to: Target, times: usize) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for _ in 0..times {
            match self.probe(from, to)? {
                Outcome::Answered(name) => names.push(name),
                other => bail!("{from} does not reach {to}: {other}"),
            }
        }
        names.sort_unstable();
        names.dedup();
        Ok(names)
    }

    /// The ClusterIP of a Service of the namespace `short`.
    pub fn service(&self, short: &str, name: &str) -> Result<std::net::IpAddr> {
        self.cluster.service_ip(&self.namespace(short), name)
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.cluster.agent_logs(30));
        }
        let mut arguments = vec!["delete", "namespace", "--wait=false"];
        arguments.extend(self.namespaces.iter().map(String::as_str));
        if let Err(error) = self
            .cluster
            .kubectl(&arguments)
            .context("remove a test's namespaces")
        {
            eprintln!("{error:#}");
        }
    }
}

/// Runs one test with a bed of the namespaces `a` and `b`.
///
/// # Panics
/// If the test fails; the agents' last words are shown then.
pub fn run(name: &str, family: Family, test: fn(&Bed) -> Result<()>) {
    run_in(name, family, &["a", "b"], test);
}

/// Runs one test with a bed of these namespaces.
///
/// # Panics
/// If the test fails; the agents' last words are shown then.
pub fn run_in(name: &str, family: Family, namespaces: &[&str], test: fn(&Bed) -> Result<()>) {
    // They share agents and nodes, and some of them end those.
    static ONE: Mutex<()> = Mutex::new(());
    let _one_by_one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let bed = Bed::new(shared(family), name, namespaces)
        .unwrap_or_else(|error| panic!("no namespaces for the test: {error:#}"));
    if let Err(error) = test(&bed) {
        panic!("{error:#}");
    }
}

/// Makes one test for each family out of functions that take a [`Bed`].
#[macro_export]
macro_rules! both_families {
    ($($name:ident),+ $(,)?) => {
        $crate::both_families!(@ v4, $crate::Family::V4, $($name),+);
        $crate::both_families!(@ v6, $crate::Family::V6, $($name),+);
    };
    (@ $module:ident, $family:expr, $($name:ident),+) => {
        mod $module {
            $(
                #[test]
                fn $name() {
                    hachi_testutil::require_root!();
                    hachi_testutil::require_binaries!("hachi-cni", "hachi-agent");
                    $crate::bed::run(stringify!($name), $family, super::$name);
                }
            )+
        }
    };
}
