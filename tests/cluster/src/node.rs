//! The bridge and the nodes on it.
//!
//! ```text
//!  fabric namespace:   br0 (172.30.0.1) ── node1 ── node2 ── ...     ports of the bridge
//!                                            │        │              veth pairs
//!  node namespaces:                        eth0     eth0
//! ```

use std::{
    fmt::Write as _,
    fs,
    net::IpAddr,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, Result, bail};

use crate::{
    cgroup,
    mntns::Mntns,
    names::ClusterId,
    netns::Netns,
    options::{Family, Kubelets, Network, Options, far_fabric, prefix},
    run,
    spawn::Place,
};

/// Makes the namespace with the bridge that joins the nodes.
pub(crate) fn fabric(id: &ClusterId, options: &Options) -> Result<Netns> {
    let family = options.family;
    let netns = Netns::create(&id.fabric())?;
    // Snooping without a querier would in time keep neighbour discovery from some ports.
    let mut script = String::new();
    let mut bridge = |name: &str, addresses: Vec<IpAddr>| {
        let mtu = options.uplink_mtu;
        let _ = writeln!(script, "link add {name} type bridge mcast_snooping 0");
        let _ = writeln!(script, "link set {name} mtu {mtu} up");
        for ip in addresses {
            script += &address(name, ip);
        }
    };
    bridge("br0", family.fabric());
    if options.network == Network::Routed {
        bridge("br1", far_fabric(family));
    }
    let make = || {
        if options.network != Network::Link {
            forward(family)?;
        }
        run::ip_batch(&script)
    };
    netns.enter(make)?.context("make the bridge")?;
    Ok(netns)
}

/// Has the namespace forward packets, and tell nobody of a shorter way.
fn forward(family: Family) -> Result<()> {
    for ip in family.fabric() {
        if ip.is_ipv4() {
            sysctl("ipv4/ip_forward", "1")?;
            sysctl("ipv4/conf/all/send_redirects", "0")?;
            sysctl("ipv4/conf/default/send_redirects", "0")?;
        } else {
            sysctl("ipv6/conf/all/disable_ipv6", "0")?;
            sysctl("ipv6/conf/all/forwarding", "1")?;
        }
    }
    Ok(())
}

/// Tells the router which node's Pods are where.
pub(crate) fn route_pods(fabric: &Netns, nodes: &[Arc<Node>], cidrs: &[Vec<String>]) -> Result<()> {
    let mut script = String::new();
    for (node, cidrs) in nodes.iter().zip(cidrs) {
        for cidr in cidrs {
            let v6 = cidr.contains(':');
            let via = node.addresses.iter().find(|ip| ip.is_ipv6() == v6);
            let via = via.context("a block of a family that the node has not")?;
            let _ = writeln!(script, "route replace {cidr} via {via}");
        }
    }
    fabric.enter(|| run::ip_batch(&script))?
}

fn address(interface: &str, ip: IpAddr) -> String {
    // Nobody else is there to have the address: duplicate detection would only cost a second.
    let nodad = if ip.is_ipv6() { " nodad" } else { "" };
    format!("address add {ip}/{} dev {interface}{nodad}\n", prefix(ip))
}

/// A machine of the cluster.
#[derive(Debug)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// Its addresses, the primary family first.
    pub addresses: Vec<IpAddr>,
    /// Its directory on the machine.
    pub dir: PathBuf,
    /// Its network namespace.
    pub netns: Arc<Netns>,
    /// Its mounts.
    pub mntns: Mntns,
    /// Its cgroup, where the machine has them.
    pub cgroup: Option<PathBuf>,
}

impl Node {
    /// Makes the node with that index, counted from 1, and joins it to the bridge.
    pub(crate) fn create(
        id: &ClusterId,
        options: &Options,
        fabric: &Netns,
        index: u8,
    ) -> Result<Self> {
        let name = format!("node{index}");
        let dir = options.dir.join("nodes").join(&name);
        let addresses = options.node(index);
        let netns = Netns::create(&id.node(&name))?;
        netns
            .enter(|| connect(&name, &addresses, options, options.is_far(index), fabric))?
            .with_context(|| format!("connect {name} to the bridge"))?;
        let cgroup = cgroup::create(id, &name);
        let mntns = Mntns::create(&netns, &dir, options.kubelets, cgroup.as_deref())
            .with_context(|| format!("make the mounts of {name}"))?;
        let node = Self {
            addresses,
            netns: Arc::new(netns),
            mntns,
            cgroup,
            name,
            dir,
        };
        if options.kubelets == Kubelets::Played {
            node.install(options)?;
        }
        Ok(node)
    }

    /// Where programs of the node run.
    #[must_use]
    pub fn place(&self) -> Place {
        self.place_in(&self.netns)
    }

    /// Where programs of a Pod on the node run.
    #[must_use]
    pub fn place_in(&self, netns: &Netns) -> Place {
        Place {
            netns: netns.path(),
            mntns: Some(self.mntns.path()),
            cgroup: self.cgroup.clone(),
        }
    }

    /// The agent's socket, as this machine sees it.
    #[must_use]
    pub fn agent_socket(&self) -> PathBuf {
        self.dir.join("run/agent.sock")
    }

    /// The agent's log.
    #[must_use]
    pub fn agent_log(&self) -> PathBuf {
        self.dir.join("agent.log")
    }

    /// Puts the plugins and the conflist where a runtime looks for them.
    fn install(&self, options: &Options) -> Result<()> {
        let bin = self.dir.join("bin");
        let own = options.dist.join("hachi-cni");
        let own = own.is_file().then_some(own);
        for source in own.iter().chain(&options.plugins) {
            let name = source.file_name().context("a plugin's path has no name")?;
            copy_executable(source, &bin.join(name))?;
        }
        let conflist = self.dir.join("net.d/10-hachi.conflist");
        fs::write(&conflist, &options.conflist)
            .with_context(|| format!("write {}", conflist.display()))
    }
}

fn copy_executable(source: &Path, target: &Path) -> Result<()> {
    // A copy of an earlier run may be executing still: it is replaced, not written to.
    let _ = fs::remove_file(target);
    fs::copy(source, target)
        .and_then(|_| fs::set_permissions(target, fs::Permissions::from_mode(0o755)))
        .with_context(|| format!("install {} as {}", source.display(), target.display()))
}

/// Runs in the node's network namespace.
fn connect(
    name: &str,
    addresses: &[IpAddr],
    options: &Options,
    far: bool,
    fabric: &Netns,
) -> Result<()> {
    let mtu = options.uplink_mtu;
    let mut script = format!(
        "link add eth0 mtu {mtu} type veth peer name {name} mtu {mtu} netns {}\n",
        fabric.name()
    );
    run::ip_batch(&script)?;
    // What every Kubernetes node has to have set; both are the namespace's own.
    let on = |ip: fn(&IpAddr) -> bool| addresses.iter().any(ip);
    if on(IpAddr::is_ipv4) {
        sysctl("ipv4/ip_forward", "1")?;
    }
    if on(IpAddr::is_ipv6) {
        sysctl("ipv6/conf/all/disable_ipv6", "0")?;
        sysctl("ipv6/conf/all/forwarding", "1")?;
        sysctl("ipv6/conf/eth0/accept_dad", "0")?;
    }
    script = "link set eth0 up\n".into();
    for &ip in addresses {
        script += &address("eth0", ip);
    }
    let (bridge, gateways) = if far {
        ("br1", far_fabric(options.family))
    } else {
        ("br0", options.family.fabric())
    };
    for gateway in gateways {
        let _ = writeln!(script, "route add default via {gateway} dev eth0");
    }
    run::ip_batch(&script)?;
    let port = format!("link set {name} master {bridge}\nlink set {name} up\n");
    fabric.enter(|| run::ip_batch(&port))?
}

fn sysctl(name: &str, value: &str) -> Result<()> {
    let path = Path::new("/proc/sys/net").join(name);
    if !path.exists() {
        bail!("the kernel has no {} (is IPv6 disabled?)", path.display());
    }
    fs::write(&path, value).with_context(|| format!("write {}", path.display()))
}
