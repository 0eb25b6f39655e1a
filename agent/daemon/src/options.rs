//! What the agent is told at its start.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::{Parser, ValueEnum};

/// The Hachi node agent: watches Kubernetes and enforces Services and NetworkPolicies in eBPF.
#[derive(Clone, Debug, Parser)]
#[command(
    version,
    about,
    args_override_self = true,
    after_help = "`hachi-agent --print-config` prints a configuration file with every key, its meaning and its default."
)]
pub(crate) struct Options {
    /// Read options from this TOML file; flags and environment variables win over it.
    #[arg(long, env = "HACHI_CONFIG")]
    pub(crate) config: Option<PathBuf>,

    /// Check the options and the configuration file, and end: exit code 0 if they are good.
    #[arg(long)]
    pub(crate) check_config: bool,

    /// Name of this node's Node object.
    #[arg(long, env = "NODE_NAME")]
    pub(crate) node_name: String,

    /// Kubeconfig of the API server; without it the Pod's service account is used.
    #[arg(long, env = "KUBECONFIG")]
    pub(crate) kubeconfig: Option<PathBuf>,

    /// URL of the API server, in place of the one that the kubeconfig or the service account names
    /// (its ClusterIP works only once Hachi does).
    #[arg(long, env = "HACHI_API_SERVER")]
    pub(crate) api_server: Option<String>,

    /// Directory that hachi-cni keeps addresses and attachments in.
    #[arg(long, default_value = "/var/lib/cni/hachi")]
    pub(crate) data_dir: PathBuf,

    /// Unix socket to serve hachi-cni and the CLI on.
    #[arg(long, default_value = hachi_api::DEFAULT_SOCKET)]
    pub(crate) socket: PathBuf,

    /// Directory on a bpffs to pin programs and maps in.
    #[arg(long, default_value = "/sys/fs/bpf/hachi")]
    pub(crate) bpf_root: PathBuf,

    /// How to attach programs to interfaces.
    #[arg(long, value_enum, default_value_t = Attach::Auto)]
    pub(crate) attach: Attach,

    /// Log packets from inside the datapath, for debugging: costs time on every packet.
    #[arg(long, value_enum)]
    pub(crate) datapath_log: Option<DatapathLog>,

    /// Do not deliver between local Pods with bpf_redirect_peer, but through the host's stack.
    #[arg(long)]
    pub(crate) no_redirect_peer: bool,

    /// Do not forward what Pods send to other nodes and to the outside, or answers to it, past the host's
    /// stack with bpf_redirect_neigh: for netfilter rules, IPsec or traffic control that must see it.
    #[arg(long)]
    pub(crate) no_redirect_neigh: bool,

    /// Devices that lead out of the node, by name; `*` stands for any characters. Found by the default
    /// route and the routes to other nodes if absent. May be given several times.
    #[arg(long)]
    pub(crate) uplink: Vec<String>,

    /// How Pods of other nodes are reached.
    #[arg(long, value_enum, default_value_t = Routing::Auto)]
    pub(crate) routing: Routing,

    /// UDP port of tunnel packets, the same on every node.
    #[arg(long, default_value_t = 8_472, value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) vxlan_port: u16,

    /// Network identifier (VNI) of tunnel packets, the same on every node.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=0xff_ffff))]
    pub(crate) vxlan_vni: u32,

    /// XDP on the uplinks, for established traffic of Services from outside to other nodes and for source
    /// ranges of load balancers; without it the tc programs do the same, only later.
    #[arg(long, value_enum, default_value_t = Xdp::Auto)]
    pub(crate) xdp: Xdp,

    /// Let what Pods send out of the cluster leave under their own addresses, where the network
    /// knows the way back to them.
    #[arg(long)]
    pub(crate) no_masquerade: bool,

    /// A block outside of the cluster that Pods reach under their own addresses. May be given several
    /// times; Pods, nodes and link-local addresses need not be named.
    #[arg(long)]
    pub(crate) non_masquerade_cidr: Vec<ipnet::IpNet>,

    /// MTU of Pods in bytes; that of the uplink, less what tunnels add, if absent.
    #[arg(long)]
    pub(crate) mtu: Option<u32>,

    /// How long an ADD waits for its Pod to appear in the API before it is answered; the Pod is
    /// denied all traffic until it does.
    #[arg(long, default_value = "3s", value_parser = parse_duration)]
    pub(crate) pod_wait: Duration,

    /// What becomes of an ADD whose Pod has not appeared by then: `deny` has the Pod start with any
    /// address, denied all traffic until it is known; `refuse` has the runtime try again, which Pods
    /// need that ask for an address.
    #[arg(long, default_value = "deny")]
    pub(crate) unknown_pods: UnknownPods,

    /// CNI configuration (a *.conflist) to install for the runtime once Pods can be served.
    #[arg(long)]
    pub(crate) conflist: Option<PathBuf>,

    /// Directory that the runtime reads CNI configurations from.
    #[arg(long, default_value = "/etc/cni/net.d")]
    pub(crate) cni_conf_dir: PathBuf,

    /// Key of a taint to take off this node's Node object once Pods can be served; may be given several
    /// times. Needs the right to patch Nodes (see manifests/overlays/taint).
    #[arg(long)]
    pub(crate) remove_taint: Vec<String>,

    /// How often to look for kinds of policy that the cluster does not have (yet).
    #[arg(long, default_value = "30s", value_parser = parse_duration)]
    pub(crate) look_for_kinds: Duration,

    /// Entries that the map of policies has room for. Policies may use half of it: the other half
    /// is for what replaces them while it is written. Pinned maps keep the size they have.
    #[arg(long, default_value_t = 524_288, value_parser = clap::value_parser!(u32).range(2..))]
    pub(crate) policy_entries: u32,

    /// Single addresses with policies that each family's map has room for, twice as many as may be
    /// used.
    #[arg(long, default_value_t = 131_072, value_parser = clap::value_parser!(u32).range(2..))]
    pub(crate) peer_entries: u32,

    /// Address blocks of policies that each family's map has room for, twice as many as may be used.
    #[arg(long, default_value_t = 32_768, value_parser = clap::value_parser!(u32).range(2..))]
    pub(crate) cidr_entries: u32,

    /// Whose sockets are given a Service's backend when they connect or send, instead of having their
    /// packets translated.
    #[arg(long, value_enum, default_value_t = SocketLb::Auto)]
    pub(crate) socket_lb: SocketLb,

    /// The cgroup whose processes' sockets those are; found where systems mount cgroups of version 2
    /// if absent.
    #[arg(long)]
    pub(crate) cgroup_root: Option<PathBuf>,

    /// Port to serve /healthz and /livez on as kube-proxy does, for load balancers; 0 for none.
    #[arg(long, default_value_t = 10_256)]
    pub(crate) healthz_port: u16,

    /// Do not serve the Services' healthCheckNodePorts: kube-proxy runs on this node too, and does.
    #[arg(long)]
    pub(crate) no_health_check_node_ports: bool,

    /// How often tracked flows are looked through for expired ones.
    #[arg(long, default_value = "30s", value_parser = parse_duration)]
    pub(crate) gc_interval: Duration,

    /// How long a TCP connection is tracked without a packet, and has its port on an uplink; this and
    /// the next six can only be shorter than their defaults.
    #[arg(long, default_value = "24h", value_parser = parse_duration)]
    pub(crate) conntrack_tcp: Duration,

    /// How long a TCP connection is tracked that nobody answers.
    #[arg(long, default_value = "2m", value_parser = parse_duration)]
    pub(crate) conntrack_tcp_opening: Duration,

    /// How long a TCP connection is tracked after its last FIN or RST.
    #[arg(long, default_value = "2m", value_parser = parse_duration)]
    pub(crate) conntrack_tcp_closing: Duration,

    /// How long a UDP flow is tracked without a packet.
    #[arg(long, default_value = "3m", value_parser = parse_duration)]
    pub(crate) conntrack_udp: Duration,

    /// How long an SCTP association is tracked without a packet.
    #[arg(long, default_value = "1h", value_parser = parse_duration)]
    pub(crate) conntrack_sctp: Duration,

    /// How long an ICMP echo is tracked without a packet.
    #[arg(long, default_value = "30s", value_parser = parse_duration)]
    pub(crate) conntrack_icmp: Duration,

    /// How long a flow of another protocol is tracked without a packet.
    #[arg(long, default_value = "10m", value_parser = parse_duration)]
    pub(crate) conntrack_other: Duration,

    /// Address to serve /healthz, /readyz, /livez and /metrics on.
    #[arg(long)]
    pub(crate) http: Option<SocketAddr>,
}

/// `--routing`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Routing {
    /// By routes to nodes on the same link, through VXLAN tunnels to nodes behind a router.
    Auto,
    /// By routes to every node, all on the same link.
    Direct,
    /// By the network, which knows the way to Pods; no routes are written.
    Native,
    /// Through VXLAN tunnels to every node.
    Vxlan,
}

/// `--socket-lb`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum SocketLb {
    /// Those of the node and of Pods, where there is a cgroup to attach to.
    Auto,
    /// Those of the node's own network namespace alone.
    Node,
    /// Nobody's.
    Off,
}

/// `--unknown-pods`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum UnknownPods {
    /// The Pod starts, denied all traffic until it is known, with any address.
    Deny,
    /// It is refused, and the runtime tries again: needed where Pods ask for addresses.
    Refuse,
}

/// `--xdp`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Xdp {
    /// In the driver of real devices that have it, nowhere else.
    Auto,
    /// In the driver of every uplink.
    Native,
    /// Behind the driver: works with every device, and is of little use but for trying.
    Generic,
    /// Nowhere.
    Off,
}

/// `--attach`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Attach {
    /// clsact at first; tcx, where the kernel has it (6.6), once no Pod comes or goes.
    Auto,
    /// tcx or nothing.
    Tcx,
    /// clsact filters.
    Clsact,
}

/// `--datapath-log`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DatapathLog {
    /// Failures of the datapath itself.
    Error,
    /// Drops.
    Info,
    /// Drops and new flows.
    Debug,
    /// Every packet.
    Trace,
}

/// Reads `3s`, `500ms`, `1m` or `24h`.
fn parse_duration(text: &str) -> Result<Duration, String> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let wrong = || format!("{text:?} is no duration: write 500ms, 3s, 1m or 24h");
    let number: u64 = number.parse().map_err(|_| wrong())?;
    match unit {
        "ms" => Ok(Duration::from_millis(number)),
        "s" => Ok(Duration::from_secs(number)),
        "m" => Ok(Duration::from_secs(number.saturating_mul(60))),
        "h" => Ok(Duration::from_secs(number.saturating_mul(3_600))),
        _ => Err(wrong()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_need_a_known_unit() {
        assert_eq!(parse_duration("3s"), Ok(Duration::from_secs(3)));
        assert_eq!(parse_duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(parse_duration("2m"), Ok(Duration::from_secs(120)));
        assert_eq!(parse_duration("24h"), Ok(Duration::from_secs(86_400)));
        for bad in ["", "3", "s", "3d", "-1s", "1.5s"] {
            assert!(parse_duration(bad).is_err(), "{bad:?} was taken");
        }
    }
}
