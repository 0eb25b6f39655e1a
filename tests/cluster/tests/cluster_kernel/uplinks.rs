//! Uplinks of every kind that this kernel has, which come while the agent runs and go again: found by
//! the default route on one node, by the pattern of their name on the other.
//!
//! ```text
//!   host ── br0 ──┬── node1: eth0, lan0       lan0: a veth pair's end, a bridge or a bond over one,
//!                 └── node2: eth0, lan0             a VLAN or a macvlan of eth0, a VLAN of a bond
//! ```

use std::{
    fs,
    net::{IpAddr, SocketAddr, UdpSocket},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use hachi_cluster::{
    Netns, Outcome,
    Protocol::{Tcp, Udp},
    Target, eventually,
    workload::probe::{probe, unspecified},
};
use k8s_openapi::api::core::v1::Service;
use serde_json::json;

use crate::{LIMIT, Lab, TIMEOUT, progress};

const NODE_PORT: u16 = 30_190;

/// The options by which the second node's agent finds its uplinks.
const PATTERNS: [&str; 2] = ["--uplink=eth0", "--uplink=lan*"];

/// A kind of device.
struct Kind {
    name: &'static str,
    /// What makes `lan0` of the node, of `port0` that a cable is in, or of nothing.
    make: &'static [&'static str],
    /// Whether the host sends with the VLAN's tag.
    tagged: bool,
}

const KINDS: [Kind; 6] = [
    Kind {
        name: "veth",
        make: &["link set port0 name lan0"],
        tagged: false,
    },
    Kind {
        name: "bridge",
        make: &["link add lan0 type bridge", "link set port0 master lan0 up"],
        tagged: false,
    },
    Kind {
        name: "macvlan",
        make: &["link add lan0 link eth0 type macvlan mode bridge"],
        tagged: false,
    },
    Kind {
        name: "vlan",
        make: &["link add link eth0 name lan0 type vlan id 7"],
        tagged: true,
    },
    Kind {
        name: "bond",
        make: &[
            "link add lan0 type bond mode active-backup miimon 20",
            "link set port0 master lan0",
        ],
        tagged: false,
    },
    Kind {
        name: "vlan of a bond",
        make: &[
            "link add bond0 type bond mode active-backup miimon 20",
            "link set port0 master bond0",
            "link set bond0 up",
            "link add link bond0 name lan0 type vlan id 7",
        ],
        tagged: true,
    },
];

/// What the kernel says of a kind of device that it has not.
const UNKNOWN: &str = "Unknown device type";

/// The host's addresses, and with their last number changed those of the nodes' `lan0`.
const HOST: [(&str, u8); 2] = [("172.30.7.", 24), ("fd68:6163:6869:7::", 64)];

fn ip(arguments: &str) -> Result<()> {
    let mut command = Command::new("ip");
    let output = command.args(arguments.split_whitespace()).output()?;
    if !output.status.success() {
        bail!(
            "ip {arguments}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}

/// Whether the calling thread's namespace has an interface.
fn is_there(name: &str) -> Result<bool> {
    Ok(fs::exists(format!("/proc/sys/net/ipv4/conf/{name}"))?)
}

/// A host on the nodes' link.
struct Host(Netns);

impl Host {
    fn join(lab: &Lab) -> Result<Self> {
        let netns = Netns::create(&format!("{}-host", lab.cluster.id().stem()))?;
        let name = netns.name().to_owned();
        lab.cluster.fabric().enter(|| -> Result<()> {
            ip(&format!(
                "link add host type veth peer name eth0 netns {name}"
            ))?;
            ip("link set host master br0 up")
        })??;
        netns.enter(|| -> Result<()> {
            fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "0")?;
            ip("link set eth0 up")
        })??;
        Ok(Self(netns))
    }

    /// Has the host speak with or without a tag.
    fn speak(&self, tagged: bool) -> Result<()> {
        let device = if tagged { "eth0.7" } else { "eth0" };
        self.0.enter(|| -> Result<()> {
            ip("address flush dev eth0 scope global")?;
            // The addresses of the nodes are another device's now.
            ip("-4 neighbour flush all")?;
            ip("-6 neighbour flush all")?;
            if tagged {
                ip("link add link eth0 name eth0.7 type vlan id 7")?;
                ip("link set eth0.7 up")?;
            }
            for (prefix, length) in HOST {
                ip(&format!(
                    "address add {prefix}1/{length} dev {device} nodad"
                ))?;
            }
            Ok(())
        })?
    }

    fn hush(&self, tagged: bool) -> Result<()> {
        if tagged {
            self.0.enter(|| ip("link del eth0.7"))??;
        }
        Ok(())
    }
}

/// A node, by its index.
struct Side<'a> {
    lab: &'a Lab,
    index: usize,
}

impl Side<'_> {
    fn netns(&self) -> &Netns {
        &self.lab.cluster.nodes()[self.index].netns
    }

    /// The address of `lan0`, of a family.
    fn address(&self, prefix: &str) -> Result<IpAddr> {
        Ok(format!("{prefix}{}", 11 + self.index).parse()?)
    }

    /// Makes the uplink; `false` if the kernel has no such devices.
    fn plug(&self, kind: &Kind) -> Result<bool> {
        let fabric = self.lab.cluster.fabric();
        let cable = format!("side{}", self.index);
        let name = fabric.name();
        self.netns().enter(|| {
            ip(&format!(
                "link add port0 type veth peer name {cable} netns {name}"
            ))
        })??;
        fabric.enter(|| ip(&format!("link set {cable} master br0 up")))??;
        self.netns().enter(|| -> Result<bool> {
            for step in kind.make {
                match ip(step) {
                    Err(error) if error.to_string().contains(UNKNOWN) => return Ok(false),
                    other => other?,
                }
            }
            if is_there("port0")? {
                ip("link set port0 up")?;
            }
            ip("link set lan0 up")?;
            for (prefix, length) in HOST {
                let address = self.address(prefix)?;
                ip(&format!("address add {address}/{length} dev lan0 nodad"))?;
                if self.index == 0 {
                    // Behind the one that there is, so that the others' way stays.
                    ip(&format!(
                        "route add default via {prefix}1 dev lan0 metric 5000"
                    ))?;
                }
            }
            Ok(true)
        })?
    }

    fn unplug(&self) -> Result<()> {
        self.netns().enter(|| -> Result<()> {
            for name in ["lan0", "bond0", "port0"] {
                if is_there(name)? {
                    ip(&format!("link del {name}"))?;
                }
            }
            Ok(())
        })?
    }

    /// What a Pod of the node sends to the host comes from the uplink's address, and is answered.
    fn masquerades(&self, host: &Host, prefix: &str) -> Result<()> {
        let at: IpAddr = format!("{prefix}1").parse()?;
        let server = host.0.enter(|| UdpSocket::bind((at, 0)))??;
        let to = server.local_addr()?;
        let pod = self.lab.cluster.pod(["u/web", "u/far"][self.index])?;
        let client = pod.netns.enter(|| UdpSocket::bind(unspecified(to)))??;
        for socket in [&server, &client] {
            socket.set_read_timeout(Some(TIMEOUT / 2))?;
        }
        client.send_to(b"question", to)?;
        let mut buffer = [0; 16];
        let (length, peer) = server.recv_from(&mut buffer).context("to the host")?;
        let own = self.address(prefix)?;
        ensure!(
            &buffer[..length] == b"question" && peer.ip() == own,
            "it came from {peer}, not {own}"
        );
        server.send_to(b"answer", peer)?;
        let (length, by) = client.recv_from(&mut buffer).context("the host's answer")?;
        ensure!(&buffer[..length] == b"answer" && by == to, "from {by}");
        Ok(())
    }

    /// The node's port answers the host, under the uplink's address.
    fn serves(&self, host: &Host, prefix: &str) -> Result<()> {
        for protocol in [Tcp, Udp] {
            let target = Target::new(protocol, self.address(prefix)?, NODE_PORT);
            match host.0.enter(|| probe(target, TIMEOUT))? {
                Outcome::Answered(name) if name.ends_with("web") => {}
                other => bail!("{target}: {other}"),
            }
        }
        Ok(())
    }
}

/// Every kind in turn: made, used by Pods and for a Service, and taken away.
pub(crate) fn come_and_go(lab: &Lab) -> Result<()> {
    lab.namespace("u")?;
    let none = json!([]);
    lab.pod("u", "web", "node1", &none)?;
    lab.pod("u", "far", "node2", &none)?;
    let spec = json!({
        "type": "NodePort", "selector": {"app": "web"}, "ipFamilyPolicy": "RequireDualStack",
        "ports": [
            {"name": "tcp", "port": 80, "nodePort": NODE_PORT},
            {"name": "udp", "port": 80, "nodePort": NODE_PORT, "protocol": "UDP"},
        ],
    });
    let _: Service = lab.create("u", "web", &spec, &json!({}))?;
    lab.ready("u", "web")?;
    lab.ready("u", "far")?;
    let host = Host::join(lab)?;
    let sides = [0, 1].map(|index| Side { lab, index });
    for side in &sides {
        // Two interfaces on one link: each answers for itself.
        side.netns()
            .enter(|| fs::write("/proc/sys/net/ipv4/conf/all/arp_ignore", "1"))??;
    }
    lab.cluster.kill_agent("node2")?;
    lab.cluster.start_agent_with("node2", &PATTERNS)?;
    lab.cluster.wait_agent("node2")?;
    for kind in &KINDS {
        if let Err(error) = comes_and_goes(&sides, &host, kind) {
            return Err(error.context(kind.name));
        }
    }
    // What was there before is as it was.
    for at in lab.cluster.options().family.fabric() {
        let socket = lab.cluster.fabric().enter(|| UdpSocket::bind((at, 0)))??;
        socket.set_read_timeout(Some(TIMEOUT))?;
        eventually(LIMIT, || reaches(lab, &socket))?;
    }
    Ok(())
}

/// A Pod reaches a socket outside as its node.
fn reaches(lab: &Lab, socket: &UdpSocket) -> Result<()> {
    let to: SocketAddr = socket.local_addr()?;
    let pod = lab.cluster.pod("u/web")?;
    let client = pod.netns.enter(|| UdpSocket::bind(unspecified(to)))??;
    client.send_to(b"question", to)?;
    let (_, peer) = socket.recv_from(&mut [0; 16])?;
    let node = &lab.cluster.nodes()[0].addresses;
    ensure!(node.contains(&peer.ip()), "it came from {peer}");
    Ok(())
}

fn comes_and_goes(sides: &[Side<'_>], host: &Host, kind: &Kind) -> Result<()> {
    let mut there = true;
    for side in sides {
        there &= side.plug(kind)?;
    }
    if there {
        host.speak(kind.tagged)?;
        let begin = Instant::now();
        for side in sides {
            for (prefix, _) in HOST {
                let about = || format!("node{}, {prefix}", side.index + 1);
                eventually(LIMIT, || side.masquerades(host, prefix))
                    .with_context(|| format!("masquerade, {}", about()))?;
                eventually(LIMIT, || side.serves(host, prefix))
                    .with_context(|| format!("node port, {}", about()))?;
            }
        }
        let took: Duration = begin.elapsed();
        progress(&format!("{}: in force and used after {took:?}", kind.name))?;
        host.hush(kind.tagged)?;
    } else {
        progress(&format!("{}: this kernel has none", kind.name))?;
    }
    sides.iter().try_for_each(Side::unplug)
}
