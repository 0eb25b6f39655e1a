//! A cluster of three nodes, a Pod on each, and a Service before each Pod.

use std::{
    net::{IpAddr, SocketAddr},
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};
use hachi_cluster::{
    Cluster, Family, Netns, Network, Options,
    Protocol::Tcp,
    Running, Target,
    bed::{Bed, Spec},
};

use crate::{
    changes::ip,
    traffic::{PORT, Path},
};

/// Bytes of a stream, unless `HACHI_STREAM_BYTES` says other.
const STREAM: u64 = 4 << 20;

/// Bytes of a long stream.
const GIBIBYTE: u64 = 1 << 30;

/// What packets of a long stream are longer than, bytes, on average: many times what the uplink takes.
const WHOLE: u64 = 10_000;

pub(crate) const NODES: [&str; 3] = ["node1", "node2", "node3"];

/// The cluster and its Pods: `pod1` on `node1`, and so on.
pub(crate) struct World {
    pub(crate) bed: Bed,
    pods: Vec<Running>,
}

impl Drop for World {
    /// Leaves the machine to the next test.
    fn drop(&mut self) {
        for node in NODES {
            if let Err(error) = self.cluster().kill_agent(node) {
                eprintln!("{node}: {error:#}");
            }
        }
    }
}

impl World {
    /// Starts a cluster on this network.
    pub(crate) fn start(
        name: &str,
        network: Network,
        family: Family,
        agent: &[&str],
    ) -> Result<Self> {
        let dir = std::env::temp_dir().join(format!("hachi-{name}-{}", std::process::id()));
        let options = Options {
            nodes: 3,
            network,
            agent_options: agent.iter().map(|&option| option.to_owned()).collect(),
            remove_dir: true,
            ..Options::new(dir, hachi_testutil::dist_dir(), family)
        };
        // It is there as long as the program.
        let cluster: &'static Cluster = Box::leak(Box::new(Cluster::start(options)?));
        let bed = Bed::new(cluster, name, &["a"])?;
        let labels = NODES.map(|node| format!("on: {node}"));
        let names = ["pod1", "pod2", "pod3"];
        let spec = |i: usize| Spec {
            name: names[i],
            node: NODES[i],
            labels: &labels[i],
            ..Spec::default()
        };
        bed.pods(&[spec(0), spec(1), spec(2)])?;
        for node in NODES {
            bed.apply(&service(node, family))?;
        }
        let pods = names.map(|pod| bed.cluster.pod(&bed.full(&format!("a/{pod}"))));
        let pods = pods.into_iter().collect::<Result<_>>()?;
        let world = Self { bed, pods };
        world.services_are_known()?;
        Ok(world)
    }

    /// Waits until every node and Pod reaches every Service: they are made last, and what is asked of
    /// them later is asked few times.
    fn services_are_known(&self) -> Result<()> {
        let family = self.cluster().options().family;
        let has = |v4: &bool| family == Family::Dual || (family == Family::V4) == *v4;
        for v4 in [true, false].into_iter().filter(has) {
            for (i, service) in NODES.iter().enumerate() {
                let target = Target::new(Tcp, self.service_address(i, v4)?, READY_PORT);
                for (j, node) in NODES.iter().enumerate() {
                    for from in [format!("node/{node}"), format!("a/pod{}", j + 1)] {
                        let about = || format!("{from} to the Service of {service}");
                        self.bed.reaches(&from, target).with_context(about)?;
                    }
                }
            }
        }
        Ok(())
    }

    pub(crate) fn cluster(&self) -> &'static Cluster {
        self.bed.cluster
    }

    /// The namespace of the Pod on a node, counted from 0.
    pub(crate) fn pod(&self, i: usize) -> &Netns {
        &self.pods[i].netns
    }

    pub(crate) fn pod_address(&self, i: usize, v4: bool) -> Result<IpAddr> {
        family(&self.pods[i].addresses, v4)
    }

    pub(crate) fn node_address(&self, i: usize, v4: bool) -> Result<IpAddr> {
        family(&self.cluster().nodes()[i].addresses, v4)
    }

    pub(crate) fn service_address(&self, i: usize, v4: bool) -> Result<IpAddr> {
        let ips = self.bed.kubectl(&format!(
            "get service {} -n $a -o=jsonpath={{.spec.clusterIPs[*]}}",
            NODES[i]
        ))?;
        let ips = ips.split_whitespace().map(str::parse);
        family(&ips.collect::<Result<Vec<_>, _>>()?, v4)
    }

    /// [`Self::matrix`] of both families.
    pub(crate) fn matrices(&self) -> Result<()> {
        let family = self.cluster().options().family;
        if family != Family::V6 {
            self.matrix(true).context("IPv4")?;
        }
        self.matrix(false).context("IPv6")
    }

    /// Every way that matters between all three nodes and the outside, in one family.
    pub(crate) fn matrix(&self, v4: bool) -> Result<()> {
        let bytes = std::env::var("HACHI_STREAM_BYTES").ok();
        let bytes = bytes
            .map_or(Ok(STREAM), |text| text.parse())
            .context("HACHI_STREAM_BYTES")?;
        self.matrix_of(v4, bytes)
    }

    /// As [`Self::matrix`], with streams of so many bytes.
    pub(crate) fn matrix_of(&self, v4: bool, bytes: u64) -> Result<()> {
        let outside = self.cluster().netns("outside")?;
        let fabric = family(&self.cluster().options().family.fabric(), v4)?;
        for (i, from_name) in NODES.iter().enumerate() {
            let node_i = &self.cluster().nodes()[i];
            let (pod_i, pod_ip) = (&self.pods[i].netns, self.pod_address(i, v4)?);
            let node_ip = self.node_address(i, v4)?;
            for (j, to_name) in NODES.iter().enumerate() {
                let node_j = &self.cluster().nodes()[j];
                let to_pod = |from, seen| Path {
                    from,
                    to: &self.pods[j].netns,
                    server: self.pod_ip(j, v4),
                    asked: None,
                    seen,
                };
                let about = |what: &str| format!("{what}, {from_name} to {to_name}");
                if i != j {
                    let path = to_pod(pod_i, Some(pod_ip));
                    run(&path, bytes).with_context(|| about("Pod to Pod"))?;
                }
                let to_node = Path {
                    from: pod_i,
                    to: &node_j.netns,
                    server: self.node_address(j, v4)?,
                    asked: None,
                    seen: Some(pod_ip),
                };
                run(&to_node, bytes / 16).with_context(|| about("Pod to node"))?;
                let from_node = to_pod(&node_i.netns, Some(node_ip).filter(|_| i != j));
                run(&from_node, bytes / 16).with_context(|| about("node to Pod"))?;
                let asked = SocketAddr::new(self.service_address(j, v4)?, 80);
                // No socket program serves this process: its packets are translated.
                let from_node = Path {
                    asked: Some(asked),
                    ..from_node
                };
                run(&from_node, bytes / 16).with_context(|| about("node to Service"))?;
                let seen = Some(pod_ip).filter(|_| i != j);
                let service = Path {
                    asked: Some(asked),
                    ..to_pod(pod_i, seen)
                };
                run(&service, bytes / 16).with_context(|| about("Pod to Service"))?;
            }
            let out = Path {
                from: pod_i,
                to: outside.get(),
                server: fabric,
                asked: None,
                seen: Some(node_ip),
            };
            run(&out, bytes / 16).with_context(|| format!("{from_name} to the outside"))?;
        }
        Ok(())
    }

    /// A GiB from Pod to Pod, through Services: on the link and through the tunnel, in both families. What
    /// TCP sends at once leaves the node in one piece.
    pub(crate) fn long_streams(&self) -> Result<()> {
        for (far, v4) in [(1, true), (2, true), (1, false), (2, false)] {
            let begin = Instant::now();
            let path = Path {
                from: self.pod(0),
                to: self.pod(far),
                server: self.pod_address(far, v4)?,
                asked: Some(SocketAddr::new(self.service_address(far, v4)?, 80)),
                seen: Some(self.pod_address(0, v4)?),
            };
            let before = self.packets_sent(0)?;
            path.stream(GIBIBYTE).with_context(|| NODES[far])?;
            let each = GIBIBYTE / (self.packets_sent(0)? - before).max(1);
            println!(
                "{}: a GiB in {:?}, {each} bytes a packet",
                path.server,
                begin.elapsed()
            );
            ensure!(each > WHOLE, "packets of {each} bytes to {}", NODES[far]);
        }
        Ok(())
    }

    /// Packets that a node has sent by its uplink, as they were handed to the device.
    fn packets_sent(&self, i: usize) -> Result<u64> {
        let shown = self.cluster().nodes()[i]
            .netns
            .enter(|| ip("-s -j link show dev eth0"))??;
        let shown: serde_json::Value = serde_json::from_str(&shown)?;
        shown[0]["stats64"]["tx"]["packets"]
            .as_u64()
            .context("no count of packets")
    }

    /// Makes a Service with a port on every node before each Pod.
    pub(crate) fn open_node_ports(&self) -> Result<()> {
        let policy = family_policy(self.cluster().options().family);
        for (i, node) in NODES.iter().enumerate() {
            let (port, ready) = (node_port(i), node_port(i) + READY);
            self.bed.apply(&format!(
                "---
apiVersion: v1
kind: Service
metadata: {{name: port-{node}, namespace: $a}}
spec:
  type: NodePort
  ipFamilyPolicy: {policy}
  selector: {{on: {node}}}
  ports:
  - {{name: udp, port: 80, targetPort: {PORT}, nodePort: {port}, protocol: UDP}}
  - {{name: tcp, port: 80, targetPort: {PORT}, nodePort: {port}, protocol: TCP}}
  - {{name: ready, port: {READY_PORT}, targetPort: 80, nodePort: {ready}}}
"
            ))?;
        }
        for node in self.cluster().nodes() {
            for (address, port) in node
                .addresses
                .iter()
                .flat_map(|it| (0..3).map(move |i| (*it, i)))
            {
                let target = Target::new(Tcp, address, node_port(port) + READY);
                self.bed
                    .reaches("outside", target)
                    .context("a node's port")?;
            }
        }
        Ok(())
    }

    /// From outside to every Pod by every node's port.
    pub(crate) fn node_ports(&self, v4: bool, bytes: u64) -> Result<()> {
        let outside = self.cluster().netns("outside")?;
        for (i, at) in NODES.iter().enumerate() {
            for (j, to) in NODES.iter().enumerate() {
                let path = Path {
                    from: outside.get(),
                    to: &self.pods[j].netns,
                    server: self.pod_address(j, v4)?,
                    asked: Some(SocketAddr::new(self.node_address(i, v4)?, node_port(j))),
                    seen: None,
                };
                // A sender outside has fragments that are too long for the tunnel, which the node cuts
                // up (IPv4) or tells it of (IPv6).
                path.datagrams()
                    .and_then(|()| path.stream(bytes))
                    .with_context(|| format!("the port of {at} for {to}"))?;
            }
        }
        Ok(())
    }

    fn pod_ip(&self, i: usize, v4: bool) -> IpAddr {
        self.pod_address(i, v4).expect("both families")
    }
}

/// From a node's port for a Pod to the one that the Pod always answers at.
const READY: u16 = 10;

/// The port of a Service that its Pod always answers at.
const READY_PORT: u16 = 81;

/// The port of every node for the Pod of a node, counted from 0.
pub(crate) fn node_port(i: usize) -> u16 {
    30_110 + i as u16
}

fn run(path: &Path<'_>, bytes: u64) -> Result<()> {
    path.datagrams()?;
    path.stream(bytes)
}

fn family(addresses: &[IpAddr], v4: bool) -> Result<IpAddr> {
    let found = addresses.iter().find(|ip| ip.is_ipv4() == v4);
    found.copied().context("no address of the family")
}

fn family_policy(family: Family) -> &'static str {
    if family == Family::Dual {
        "RequireDualStack"
    } else {
        "SingleStack"
    }
}

fn service(node: &str, family: Family) -> String {
    let policy = family_policy(family);
    format!(
        "---
apiVersion: v1
kind: Service
metadata: {{name: {node}, namespace: $a}}
spec:
  ipFamilyPolicy: {policy}
  selector: {{on: {node}}}
  ports:
  - {{name: udp, port: 80, targetPort: {PORT}, protocol: UDP}}
  - {{name: tcp, port: 80, targetPort: {PORT}, protocol: TCP}}
  - {{name: ready, port: {READY_PORT}, targetPort: 80}}
"
    )
}
