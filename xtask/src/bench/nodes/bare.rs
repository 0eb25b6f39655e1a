//! What is compared with: the same namespaces and links as those of a cluster, joined by the kernel's
//! routing alone.
//!
//! ```text
//! pod1 ─ node1 ┐          ┌ fabric, which forwards ┐
//! pod2 ─ node2 ┴─ br0 ────┴────── br1 ──────────── node3 ─ pod3
//! ```

use std::process::{self, Command};

use anyhow::{Context, Result, bail};

/// The namespaces; gone with this value.
pub(super) struct Bare {
    names: Vec<String>,
}

impl Bare {
    /// Makes them.
    pub(super) fn new() -> Result<Self> {
        let mut bare = Self { names: Vec::new() };
        let fabric = bare.add("fabric")?;
        for (bridge, number) in [("br0", 0), ("br1", 1)] {
            ip(
                &fabric,
                &format!("link add {bridge} type bridge mcast_snooping 0"),
            )?;
            ip(
                &fabric,
                &format!("address add 172.29.{number}.1/24 dev {bridge}"),
            )?;
            ip(&fabric, &format!("link set {bridge} up"))?;
        }
        forward(&fabric)?;
        for number in 1..=3 {
            let segment = u8::from(number == 3);
            let node = bare.add(&format!("node{number}"))?;
            let pod = bare.add(&format!("pod{number}"))?;
            ip(
                &node,
                &format!("link add eth0 type veth peer name n{number} netns {fabric}"),
            )?;
            ip(
                &fabric,
                &format!("link set n{number} master br{segment} up"),
            )?;
            ip(
                &node,
                &format!("address add 172.29.{segment}.1{number}/24 dev eth0"),
            )?;
            ip(&node, "link set eth0 up")?;
            ip(&node, &format!("route add default via 172.29.{segment}.1"))?;
            ip(
                &node,
                &format!("link add pod type veth peer name eth0 netns {pod}"),
            )?;
            ip(&node, &format!("address add 10.243.{number}.1/24 dev pod"))?;
            ip(&node, "link set pod up")?;
            forward(&node)?;
            ip(
                &pod,
                &format!("address add {}/24 dev eth0", Self::address(number)),
            )?;
            ip(&pod, "link set eth0 up")?;
            ip(&pod, &format!("route add default via 10.243.{number}.1"))?;
            let via = format!("172.29.{segment}.1{number}");
            ip(
                &fabric,
                &format!("route add 10.243.{number}.0/24 via {via}"),
            )?;
        }
        for (node, other) in [(1, 2), (2, 1)] {
            let route = format!("route add 10.243.{other}.0/24 via 172.29.0.1{other}");
            ip(&bare.name(&format!("node{node}")), &route)?;
        }
        Ok(bare)
    }

    /// The address of the namespace `podN`.
    pub(super) fn address(number: u8) -> String {
        format!("10.243.{number}.2")
    }

    /// The full name of a namespace.
    pub(super) fn name(&self, short: &str) -> String {
        format!("hachi-bench-{}-{short}", process::id())
    }

    fn add(&mut self, short: &str) -> Result<String> {
        let name = self.name(short);
        run(&["netns", "add", &name])?;
        self.names.push(name.clone());
        ip(&name, "link set lo up")?;
        Ok(name)
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        for name in &self.names {
            if let Err(error) = run(&["netns", "delete", name]) {
                eprintln!("{error:#}");
            }
        }
    }
}

fn forward(name: &str) -> Result<()> {
    run(&[
        "netns",
        "exec",
        name,
        "sysctl",
        "-qw",
        "net.ipv4.ip_forward=1",
    ])?;
    run(&[
        "netns",
        "exec",
        name,
        "sysctl",
        "-qw",
        "net.ipv4.conf.all.send_redirects=0",
    ])
}

fn ip(name: &str, arguments: &str) -> Result<()> {
    let mut all = vec!["-n", name];
    all.extend(arguments.split(' '));
    run(&all)
}

fn run(arguments: &[&str]) -> Result<()> {
    let output = Command::new("ip")
        .args(arguments)
        .output()
        .context("cannot run ip")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("ip {}: {}", arguments.join(" "), said.trim());
    }
    Ok(())
}
