//! A runtime that keeps books: calls the plugin on a node, kills it or the agent at times, and
//! compares what the node has with what it knows of.

use std::{
    collections::{BTreeMap, BTreeSet},
    os::unix::process::ExitStatusExt as _,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use hachi_api::{Reply, Request, Table};
use hachi_cluster::{Cluster, Netns, bed::LIMIT, cni, eventually};
use serde_json::{Value, json};

const NODE: &str = "node1";

/// Random enough for moments: a linear congruential generator (Knuth's MMIX).
pub(crate) struct Moments(u64);

impl Moments {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit.max(1)
    }

    pub(crate) fn below_usize(&mut self, limit: usize) -> usize {
        usize::try_from(self.below(limit as u64)).unwrap_or(0)
    }

    pub(crate) fn within(&mut self, time: Duration) -> Duration {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        Duration::from_micros(self.below(micros))
    }
}

/// How a call ended.
#[derive(Debug)]
pub(crate) enum Ended {
    Well(Value),
    Failed(u64, String),
    Killed,
}

/// The runtime of the first node.
pub(crate) struct Runtime<'a> {
    cluster: &'a Cluster,
    sandboxes: Vec<Netns>,
    /// The attachments that it knows of, with their results.
    alive: BTreeMap<usize, Value>,
    /// `portMappings` of every attachment from now on.
    pub(crate) ports: Value,
    made: usize,
}

/// What a node has of its Pods.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    links: BTreeSet<String>,
    /// Destinations of our routes, and permanent neighbours.
    routes: Vec<String>,
    neighbours: usize,
    addresses: BTreeSet<String>,
    records: BTreeSet<String>,
    claims: BTreeSet<String>,
    pins: usize,
    endpoints: usize,
    map_entries: u32,
}

impl<'a> Runtime<'a> {
    pub(crate) fn new(cluster: &'a Cluster, sandboxes: usize) -> Result<Self> {
        let mut runtime = Self {
            cluster,
            sandboxes: Vec::new(),
            alive: BTreeMap::new(),
            ports: json!([]),
            made: 0,
        };
        for _ in 0..sandboxes {
            let netns = runtime.sandbox()?;
            runtime.sandboxes.push(netns);
        }
        Ok(runtime)
    }

    fn sandbox(&mut self) -> Result<Netns> {
        self.made += 1;
        Netns::create(&format!("{}-cni{}", self.cluster.id().as_str(), self.made))
    }

    fn conf(&self) -> Value {
        json!({
            "cniVersion": "1.1.0", "name": "hachi", "type": "hachi-cni",
            "runtimeConfig": {"portMappings": self.ports},
        })
    }

    fn start(&self, number: usize, operation: &str, conf: &Value) -> Result<Child> {
        let node = &self.cluster.nodes()[0];
        let mut child = Command::new(program("hachi-pod")?)
            .arg("enter")
            .args(node.place().arguments())
            .args(["--limit", "60", "--", "/opt/cni/bin/hachi-cni"])
            .env("CNI_COMMAND", operation)
            .env("CNI_CONTAINERID", name(number))
            .env("CNI_NETNS", self.sandboxes[number].path())
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", "/opt/cni/bin")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("start the plugin")?;
        let stdin = child.stdin.take().context("a pipe")?;
        serde_json::to_writer(stdin, conf).context("write the configuration")?;
        Ok(child)
    }

    fn finish(child: Child) -> Result<Ended> {
        let output = child.wait_with_output()?;
        if output.status.signal().is_some() {
            return Ok(Ended::Killed);
        }
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        if output.status.success() {
            return Ok(Ended::Well(answer));
        }
        let code = answer["code"].as_u64().unwrap_or(999);
        let stderr = String::from_utf8_lossy(&output.stderr);
        Ok(Ended::Failed(code, format!("{answer} {stderr}")))
    }

    /// Calls the plugin, to be killed after a time if one is given, and keeps the books.
    pub(crate) fn call(
        &mut self,
        number: usize,
        operation: &str,
        kill: Option<Duration>,
    ) -> Result<Ended> {
        let known = self.alive.remove(&number);
        let mut conf = self.conf();
        if operation == "CHECK" {
            conf["prevResult"] = known.clone().context("there is nothing to check")?;
        }
        let begin = Instant::now();
        let mut child = self.start(number, operation, &conf)?;
        if let Some(after) = kill {
            std::thread::sleep(after.saturating_sub(begin.elapsed()));
            // One that was faster has ended by itself.
            let _ = child.kill();
        }
        let ended = Self::finish(child)?;
        match (&ended, operation) {
            (Ended::Well(result), "ADD") => drop(self.alive.insert(number, result.clone())),
            (_, "CHECK") => drop(known.map(|result| self.alive.insert(number, result))),
            _ => {}
        }
        Ok(ended)
    }

    fn well(&mut self, number: usize, operation: &str) -> Result<Duration> {
        let begin = Instant::now();
        match self.call(number, operation, None)? {
            Ended::Well(_) => Ok(begin.elapsed()),
            other => bail!("{operation} of {}: {other:?}", name(number)),
        }
    }

    pub(crate) fn add(&mut self, number: usize) -> Result<Duration> {
        self.well(number, "ADD")
    }

    pub(crate) fn del(&mut self, number: usize) -> Result<Duration> {
        self.well(number, "DEL")
    }

    pub(crate) fn check(&mut self, number: usize) -> Result<Duration> {
        self.well(number, "CHECK")
    }

    pub(crate) fn has(&self, number: usize) -> bool {
        self.alive.contains_key(&number)
    }

    /// Calls it for every sandbox at the same time.
    pub(crate) fn all_at_once(&mut self, operation: &str) -> Result<Vec<Value>> {
        let conf = self.conf();
        let children: Vec<_> = (0..self.sandboxes.len())
            .map(|number| self.start(number, operation, &conf))
            .collect();
        let mut results = Vec::new();
        for (number, child) in children.into_iter().enumerate() {
            let Ended::Well(result) = Self::finish(child?)? else {
                bail!("{operation} of {} failed", name(number));
            };
            match operation {
                "ADD" => drop(self.alive.insert(number, result.clone())),
                _ => drop(self.alive.remove(&number)),
            }
            results.push(result);
        }
        Ok(results)
    }

    /// Calls it and kills it after a while; tells whether it died of that.
    pub(crate) fn killed(
        &mut self,
        number: usize,
        operation: &str,
        after: Duration,
    ) -> Result<bool> {
        if operation == "ADD" {
            // What an earlier death has left in the namespace goes with it.
            self.sandboxes[number] = self.sandbox()?;
        }
        match self.call(number, operation, Some(after))? {
            Ended::Well(_) => Ok(false),
            Ended::Killed => Ok(true),
            other => bail!("{operation} of {}: {other:?}", name(number)),
        }
    }

    /// Kills the agent in the middle of an ADD or DEL, and starts it again.
    pub(crate) fn agent_killed(&mut self, number: usize, after: Duration) -> Result<()> {
        let operation = if self.has(number) { "DEL" } else { "ADD" };
        if operation == "ADD" {
            self.sandboxes[number] = self.sandbox()?;
        }
        self.alive.remove(&number);
        let child = self.start(number, operation, &self.conf())?;
        std::thread::sleep(after);
        self.cluster.kill_agent(NODE)?;
        match Self::finish(child)? {
            Ended::Well(result) if operation == "ADD" => {
                self.alive.insert(number, result);
            }
            // "Try again later" is the answer to an ADD whose agent has died.
            Ended::Well(_) | Ended::Failed(11, _) => {}
            other => bail!("{operation} without an agent: {other:?}"),
        }
        self.cluster.start_agent(NODE)?;
        self.cluster.wait_agent(NODE).map(drop)
    }

    fn gc_conf(&self) -> Value {
        let list: Vec<_> = self
            .alive
            .keys()
            .map(|number| json!({"containerID": name(*number), "ifname": "eth0"}))
            .collect();
        let mut conf = self.conf();
        conf["cni.dev/valid-attachments"] = json!(list);
        conf
    }

    pub(crate) fn gc_killed(&mut self, after: Duration) -> Result<bool> {
        let mut child = self.start(0, "GC", &self.gc_conf())?;
        std::thread::sleep(after);
        let _ = child.kill();
        Ok(matches!(Self::finish(child)?, Ended::Killed))
    }

    pub(crate) fn gc(&mut self) -> Result<()> {
        match Self::finish(self.start(0, "GC", &self.gc_conf())?)? {
            Ended::Well(_) => Ok(()),
            other => bail!("GC: {other:?}"),
        }
    }

    fn lines(&self, program: &str, arguments: &[&str]) -> Result<Vec<String>> {
        let target = format!("node/{NODE}");
        let text = self.cluster.exec(&target, program, arguments)?;
        Ok(text.lines().map(|line| line.trim().to_owned()).collect())
    }

    fn files(&self, below: &str) -> Result<BTreeSet<String>> {
        let dir = format!("/var/lib/cni/hachi/{below}");
        Ok(self.lines("ls", &[&dir])?.into_iter().collect())
    }

    /// What the node has.
    pub(crate) fn seen(&self) -> Result<Seen> {
        let links = self.lines("ip", &["-o", "link", "show", "type", "veth"])?;
        let link = |line: &String| Some(line.split([':', '@']).nth(1)?.trim().to_owned());
        let mut routes = Vec::new();
        for family in ["-4", "-6"] {
            let ours = [family, "route", "show", "proto", "72"];
            routes.extend(self.lines("ip", &ours)?);
        }
        let neighbours = self.lines("ip", &["neigh", "show", "nud", "permanent"])?;
        let pods = |line: &&String| line.contains("dev hachi");
        let pins = self.lines(
            "find",
            &["/sys/fs/bpf/hachi", "-path", "*/links/hachi[!_]*"],
        )?;
        let socket = self.cluster.nodes()[0].agent_socket();
        let Reply::Table { rows, .. } = hachi_cluster::ask(
            &socket,
            &Request::Get {
                table: Table::Endpoints,
            },
        )?
        else {
            bail!("the agent gives no table");
        };
        let status = hachi_cluster::status(&socket)?;
        let entries = |(name, used): (&String, &hachi_api::MapUse)| {
            let ours = name.to_ascii_uppercase().starts_with("ENDPOINTS");
            ours.then_some(used.entries)
        };
        Ok(Seen {
            links: links
                .iter()
                .filter_map(link)
                .filter(|name| name.starts_with("hachi") && !name.starts_with("hachi_"))
                .collect(),
            routes,
            neighbours: neighbours.iter().filter(pods).count(),
            addresses: self.files("addresses")?,
            records: self.files("attachments")?,
            claims: self.files("claims")?,
            pins: pins.len(),
            endpoints: rows.len(),
            map_entries: status.maps.iter().filter_map(entries).sum(),
        })
    }

    /// The node has what the runtime knows of, and nothing else.
    pub(crate) fn agrees(&self) -> Result<()> {
        let addresses: BTreeSet<_> = self
            .alive
            .values()
            .flat_map(cni::addresses)
            .map(|address| address.to_string())
            .collect();
        let names: BTreeSet<_> = self
            .alive
            .keys()
            .map(|number| format!("{}:eth0", name(*number)))
            .collect();
        let host = |result: &Value| {
            let name = result["interfaces"][0]["name"].as_str();
            name.unwrap_or_default().to_owned()
        };
        let links: BTreeSet<_> = self.alive.values().map(host).collect();
        // Deleted interfaces and what hangs on them go in their own time.
        eventually(LIMIT, || {
            let seen = self.seen()?;
            let count = addresses.len();
            ensure!(seen.links == links, "links: {seen:?}, and not {links:?}");
            ensure!(seen.addresses == addresses, "{seen:?}, not {addresses:?}");
            ensure!(seen.records == names, "records: {seen:?}, not {names:?}");
            ensure!(seen.claims == names, "claims: {seen:?}, not {names:?}");
            ensure!(seen.routes.len() == count, "routes: {seen:?}");
            ensure!(seen.neighbours == count, "neighbours: {seen:?}");
            ensure!(seen.endpoints == names.len(), "endpoints: {seen:?}");
            ensure!(seen.pins == 2 * names.len(), "pins: {seen:?}");
            ensure!(
                seen.map_entries as usize == count,
                "map entries: {} and not {count}",
                seen.map_entries
            );
            Ok(())
        })
    }
}

fn name(number: usize) -> String {
    format!("c{number}")
}

/// A program of the cluster, beside this one.
fn program(name: &str) -> Result<PathBuf> {
    let here = std::env::current_exe()?;
    let found = here.ancestors().skip(1).take(2).map(|dir| dir.join(name));
    found
        .chain([hachi_testutil::dist_dir().join(name)])
        .find(|path| path.is_file())
        .with_context(|| format!("no {name} beside {}", here.display()))
}
