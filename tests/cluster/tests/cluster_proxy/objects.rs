//! The Pods, Services and slices of the tables.

use std::{fmt::Write as _, net::IpAddr};

use anyhow::{Context as _, Result};
use hachi_cluster::{
    Family,
    bed::{Bed, Spec},
};

use crate::rules::Endpoint;

pub(crate) const PODS: [(&str, &str); 4] = [
    ("p1", "node1"),
    ("p2", "node1"),
    ("q1", "node2"),
    ("q2", "node2"),
];

/// The backends, and a client on each node.
pub(crate) fn pods(bed: &Bed) -> Result<()> {
    let mut pods: Vec<_> = PODS
        .iter()
        .map(|(name, node)| Spec {
            name,
            node,
            ports: "{containerPort: 80, protocol: SCTP}",
            ..Spec::default()
        })
        .collect();
    pods.extend(
        [("client", "node1"), ("far", "node2")].map(|(name, node)| Spec {
            namespace: "b",
            name,
            node,
            ..Spec::default()
        }),
    );
    bed.pods(&pods)
}

pub(crate) fn family(bed: &Bed) -> Family {
    bed.cluster.options().family
}

/// An address for a Service, of a block of the documentation (RFC 5737, RFC 3849).
pub(crate) fn outer(family: Family, block: Block, host: usize) -> Result<IpAddr> {
    let text = match (family, block) {
        (Family::V6, Block::Balanced) => format!("2001:db8:1::{host:x}"),
        (Family::V6, Block::External) => format!("2001:db8:2::{host:x}"),
        (Family::V6, Block::Elsewhere) => format!("2001:db8:3::{host:x}"),
        (_, Block::Balanced) => format!("198.51.100.{host}"),
        (_, Block::External) => format!("203.0.113.{host}"),
        (_, Block::Elsewhere) => format!("192.0.2.{host}"),
    };
    text.parse().with_context(|| text)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Block {
    /// Of load balancers that lead to node1.
    Balanced,
    /// External addresses that lead to node1.
    External,
    /// A load balancer's own.
    Elsewhere,
}

/// Has the host outside send to node1 what is for the Services' outer addresses.
pub(crate) fn route_outside(bed: &Bed) -> Result<()> {
    let node = bed.cluster.node_ip("node1")?;
    let blocks = match family(bed) {
        Family::V6 => ["2001:db8:1::/64", "2001:db8:2::/64"],
        _ => ["198.51.100.0/24", "203.0.113.0/24"],
    };
    for block in blocks {
        outside_ip(bed, &["route", "replace", block, "via", &node.to_string()])?;
    }
    Ok(())
}

/// Runs `ip` on the host outside.
pub(crate) fn outside_ip(bed: &Bed, arguments: &[&str]) -> Result<()> {
    let output = bed.cluster.fabric().enter(|| {
        std::process::Command::new("ip")
            .args(arguments)
            .output()
            .context("run ip")
    })??;
    anyhow::ensure!(
        output.status.success(),
        "ip {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

/// The address of the host outside.
pub(crate) fn outside(bed: &Bed) -> Result<IpAddr> {
    let found = family(bed).fabric().into_iter().next();
    found.context("the host outside has no address")
}

/// A slice by hand: the three protocols of port 80.
pub(crate) fn slice(bed: &Bed, service: &str, endpoints: &[Endpoint]) -> Result<String> {
    let kind = if family(bed) == Family::V6 {
        "IPv6"
    } else {
        "IPv4"
    };
    let mut lines = String::new();
    for endpoint in endpoints {
        let Endpoint {
            pod,
            node,
            ready,
            serving,
            terminating,
            hint,
        } = endpoint;
        let ip = bed.cluster.pod_ip(&bed.full(&format!("a/{pod}")))?;
        let hint = hint
            .map(|node| format!(", hints: {{forNodes: [{{name: {node}}}]}}"))
            .unwrap_or_default();
        let _ = write!(
            lines,
            "\n- {{addresses: ['{ip}'], nodeName: {node}, conditions: {{ready: {ready}, \
             serving: {serving}, terminating: {terminating}}}{hint}}}"
        );
    }
    if lines.is_empty() {
        lines.push_str(" []");
    }
    Ok(format!(
        "---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: {service}-x, namespace: $a, labels: {{kubernetes.io/service-name: {service}}}}}
addressType: {kind}
ports:
- {{name: tcp, port: 80, protocol: TCP}}
- {{name: udp, port: 80, protocol: UDP}}
- {{name: sctp, port: 80, protocol: SCTP}}
endpoints:{lines}
"
    ))
}

/// A Service's ports, as all of the tables have them.
pub(crate) const PORTS: &str = "  ports:
  - {name: tcp, port: 8080, protocol: TCP}
  - {name: udp, port: 8080, protocol: UDP}
  - {name: sctp, port: 8080, protocol: SCTP}
";

/// Services as the API has them.
pub(crate) struct Listed(serde_json::Value);

impl Listed {
    pub(crate) fn get(bed: &Bed) -> Result<Self> {
        let listed = bed.kubectl("get services -n $a -o json")?;
        serde_json::from_str(&listed)
            .map(Self)
            .context("read Services")
    }

    fn service(&self, name: &str) -> Result<&serde_json::Value> {
        let items = self.0["items"].as_array().context("Services")?;
        let service = items.iter().find(|item| item["metadata"]["name"] == *name);
        service.with_context(|| format!("no Service {name}"))
    }

    pub(crate) fn cluster_ip(&self, name: &str) -> Result<IpAddr> {
        let ip = &self.service(name)?["spec"]["clusterIP"];
        Ok(ip.as_str().context("clusterIP")?.parse()?)
    }

    /// The node port of the port of that name.
    pub(crate) fn node_port(&self, name: &str, port: &str) -> Result<u16> {
        let ports = self.service(name)?["spec"]["ports"].as_array();
        let port = ports
            .context("ports")?
            .iter()
            .find(|it| it["name"] == *port);
        let number = port.and_then(|port| port["nodePort"].as_u64());
        Ok(u16::try_from(number.context("nodePort")?)?)
    }
}
