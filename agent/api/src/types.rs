//! Requests and replies of the agent's socket: one JSON object a line, one reply a request.

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// Where the agent listens unless its configuration says otherwise.
pub const DEFAULT_SOCKET: &str = "/run/hachi/agent.sock";

/// Names one attachment: what the CNI specification calls (container id, interface name).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AttachmentId {
    /// `CNI_CONTAINERID`.
    pub container_id: String,
    /// `CNI_IFNAME`.
    pub ifname: String,
}

/// The Pod that an attachment belongs to, from `CNI_ARGS`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PodRef {
    /// `K8S_POD_NAMESPACE`.
    pub namespace: String,
    /// `K8S_POD_NAME`.
    pub name: String,
    /// `K8S_POD_UID`; absent with runtimes that do not pass it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<String>,
}

/// A Pod's interface, as the plugin made it. The same object is the attachment's record on disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Attachment {
    /// Which attachment.
    pub id: AttachmentId,
    /// Path of the network namespace.
    pub netns: PathBuf,
    /// The Pod; absent when the caller was no Kubernetes runtime.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<PodRef>,
    /// Name of the veth's host side.
    pub host_ifname: String,
    /// Index of the veth's host side.
    pub host_ifindex: u32,
    /// MAC address of the Pod's interface, as `aa:bb:cc:dd:ee:ff`.
    pub mac: String,
    /// MAC address of the veth's host side.
    pub host_mac: String,
    /// The Pod's addresses, at most one of each family.
    pub addresses: Vec<IpAddr>,
    /// Ports of the node that lead to the Pod, for the agent to serve.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub port_mappings: Vec<PortMapping>,
    /// Whether the plugin itself masquerades what the Pod sends out of its network, with nftables.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub masquerade: bool,
}

/// A port of the node that leads to a port of a Pod (`hostPort`; the CNI capability
/// `portMappings`).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PortMapping {
    /// The node's address; every address of the node if absent.
    #[serde(rename = "hostIP", default, skip_serializing_if = "Option::is_none")]
    pub host_ip: Option<IpAddr>,
    /// The node's port, 1 to 65535.
    pub host_port: u16,
    /// The Pod's port, 1 to 65535.
    pub container_port: u16,
    /// Protocol.
    pub protocol: PortProtocol,
}

impl PortMapping {
    /// Whether a packet to the node could mean both.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        let every = |ip: Option<IpAddr>, other: IpAddr| match ip {
            None => true,
            Some(ip) => ip == other || (ip.is_unspecified() && ip.is_ipv4() == other.is_ipv4()),
        };
        let meet = match (self.host_ip, other.host_ip) {
            (None, _) | (_, None) => true,
            (Some(a), Some(b)) => every(Some(a), b) || every(Some(b), a),
        };
        meet && self.host_port == other.host_port && self.protocol == other.protocol
    }
}

impl fmt::Display for PortMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = match self.protocol {
            PortProtocol::Tcp => "TCP",
            PortProtocol::Udp => "UDP",
            PortProtocol::Sctp => "SCTP",
        };
        match self.host_ip {
            Some(ip) => write!(f, "{}/{protocol}", SocketAddr::new(ip, self.host_port)),
            None => write!(f, "{}/{protocol}", self.host_port),
        }
    }
}

/// What a mapped port speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PortProtocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

/// What a client asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "camelCase", deny_unknown_fields)]
pub enum Request {
    /// The node's address pools; answered with [`Reply::Pool`].
    Pool,
    /// What a Pod asks for in its annotations; answered with [`Reply::Pod`] as soon as the API has
    /// shown the Pod, and with code 11 if it does not in time.
    Pod {
        /// Which Pod.
        pod: PodRef,
    },
    /// Attach programs to the interface and enforce its policies; answered with [`Reply::Done`]
    /// once the maps are written, so that no packet passes unjudged.
    AddEndpoint {
        /// The interface.
        attachment: Attachment,
    },
    /// Forget the endpoint; not knowing it is success.
    DeleteEndpoint {
        /// Which attachment.
        attachment: AttachmentId,
    },
    /// Compare programs, links and map entries with what they should be.
    CheckEndpoint {
        /// Which attachment.
        attachment: AttachmentId,
    },
    /// Forget every endpoint that is not listed.
    Gc {
        /// The attachments that the runtime knows.
        valid: Vec<AttachmentId>,
    },
    /// Health and sizes; answered with [`Reply::Status`].
    Status,
    /// Why a flow is judged as it is; answered with [`Reply::Trace`].
    TracePolicy {
        /// Who opens it: `NAMESPACE/NAME` of a Pod, or an address.
        from: String,
        /// Who is to answer: likewise, or the address of a Service.
        to: String,
        /// IANA protocol number.
        protocol: u8,
        /// Destination port; 0 for protocols without ports.
        port: u16,
    },
    /// The policies that select a Pod; answered with [`Reply::Table`].
    PodPolicies {
        /// The Pod's namespace.
        namespace: String,
        /// The Pod's name.
        name: String,
    },
    /// One table, as rows; answered with [`Reply::Table`].
    Get {
        /// Which one.
        table: Table,
    },
}

/// Tables that `hachi get` prints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Table {
    /// Pods of this node.
    Endpoints,
    /// Service frontends and their backends.
    Services,
    /// Policy sets and what they allow.
    Policies,
    /// Addresses and blocks with their class.
    Peers,
    /// Packets and bytes by reason.
    Counters,
    /// Tracked flows.
    Conntrack,
}

/// What the agent answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "camelCase", deny_unknown_fields)]
pub enum Reply {
    /// It is done.
    Done,
    /// The node's address pools, from the Node object's podCIDRs.
    Pool {
        /// Blocks to allocate from, in order, at most one family twice.
        cidrs: Vec<IpNet>,
        /// MTU for Pods, bytes.
        mtu: u32,
    },
    /// What a Pod asks for.
    Pod {
        /// The addresses that it wants (annotation `hachi.dev/ip-addresses`); mostly none.
        addresses: Vec<IpAddr>,
    },
    /// Health and sizes.
    Status {
        /// What it says.
        status: Box<Status>,
    },
    /// A table.
    Table {
        /// Column names.
        columns: Vec<String>,
        /// Rows, each as long as `columns`.
        rows: Vec<Vec<String>>,
    },
    /// Why a flow is judged as it is.
    Trace {
        /// What is known of it.
        trace: Box<PolicyTrace>,
    },
    /// It could not be done.
    Error {
        /// Why.
        error: ApiError,
    },
}

/// Why the flows from one end to another are judged as they are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PolicyTrace {
    /// Who opens them, as it was asked.
    pub from: String,
    /// Who is to answer, as it was asked.
    pub to: String,
    /// One for each family that both have, and for each backend of a Service.
    pub flows: Vec<FlowTrace>,
}

/// Why one flow is judged as it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct FlowTrace {
    /// Who opens it.
    pub source: IpAddr,
    /// Who is to answer: of a Service, the backend.
    pub destination: SocketAddr,
    /// The Service's address, if it is reached through one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<SocketAddr>,
    /// Whether both sides let it pass. A Service without a backend lets nothing pass.
    pub allowed: bool,
    /// Whether the kernel's maps disagree with the policies.
    pub drift: bool,
    /// Egress of the source, then ingress of the destination.
    pub sides: Vec<SideTrace>,
}

/// What one side says of a flow, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SideTrace {
    /// `egress` or `ingress`.
    pub direction: String,
    /// Whether the policies let it pass.
    pub allowed: bool,
    /// Every policy and rule that decided or nearly did, one a sentence.
    pub reasons: Vec<String>,
    /// What the kernel's maps say.
    pub live: String,
    /// Whether that is something else.
    pub drift: bool,
}

/// Health and sizes of the agent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// Version of the agent.
    pub version: String,
    /// Version of the map layouts.
    pub abi: u32,
    /// The node's name.
    pub node: String,
    /// Whether an ADD can be served now.
    pub ready: bool,
    /// Why not, and what to do; empty when ready and healthy.
    pub problems: Vec<String>,
    /// How programs are attached: `tcx` or `clsact`.
    pub attach_mode: String,
    /// Optional kernel features that are missing, in a fixed order.
    #[serde(default)]
    pub missing: Vec<MissingFeature>,
    /// Entries of every map by its name.
    pub maps: BTreeMap<String, MapUse>,
    /// How sockets are balanced: `all`, `node`, or `off` and why.
    #[serde(default)]
    pub socket_lb: String,
    /// XDP by uplink: `native`, `generic`, or `off` and why.
    #[serde(default)]
    pub xdp: BTreeMap<String, String>,
    /// Tracked flows, and what was done to them.
    #[serde(default)]
    pub conntrack: ConntrackStatus,
    /// Endpoints of this node.
    pub endpoints: u32,
    /// The policy revision in the kernel.
    pub revision: u32,
    /// Process id.
    pub pid: u32,
}

/// Something optional that this node's kernel lacks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MissingFeature {
    /// A name of one word, as in `docs/KERNELS.md`.
    pub name: String,
    /// What it is.
    pub feature: String,
    /// The kernel's answer when it was tried, or why it could not be tried.
    pub why: String,
    /// What follows for the user.
    pub without: String,
}

/// Tracked flows, and what was done to them since the agent started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ConntrackStatus {
    /// Entries of both families that the last pass left; two a flow.
    pub entries: u32,
    /// Entries at most, of both families.
    pub capacity: u32,
    /// Flows that the last pass left, by protocol: `tcp`, `udp`, `sctp`, `icmp`, `other`.
    #[serde(default)]
    pub flows: BTreeMap<String, u32>,
    /// Whether a family's table is nearly full, so that short-lived flows go early.
    pub pressed: bool,
    /// Entries of translations on uplinks that the last pass left, both families; two a flow.
    #[serde(default)]
    pub translations: u32,
    /// Such entries at most.
    #[serde(default)]
    pub translation_capacity: u32,
    /// As `pressed`, of translations.
    #[serde(default)]
    pub translations_pressed: bool,
    /// Expired translations that were deleted.
    #[serde(default)]
    pub translations_expired: u64,
    /// Expired entries that were deleted.
    pub expired: u64,
    /// Entries that were deleted because their backend was removed.
    pub moved: u64,
    /// Connected UDP sockets that were closed because their backend was removed.
    pub sockets_closed: u64,
    /// Passes over the tables.
    pub passes: u64,
    /// CPU time of the last pass, microseconds.
    pub pass_us: u64,
}

/// How full a map is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MapUse {
    /// Entries now.
    pub entries: u32,
    /// Entries at most.
    pub capacity: u32,
}

/// An error with the code that the plugin passes to the runtime (CNI specification, "Error").
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ApiError {
    /// CNI error code; 11 asks the runtime to try again later.
    pub code: u32,
    /// What failed.
    pub message: String,
    /// What to do about it; may be empty.
    #[serde(default)]
    pub details: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(host_ip: &str, protocol: PortProtocol) -> PortMapping {
        PortMapping {
            host_ip: (!host_ip.is_empty()).then(|| host_ip.parse().unwrap()),
            host_port: 80,
            container_port: 8080,
            protocol,
        }
    }

    #[test]
    fn ports_meet_on_the_addresses_they_share() {
        use PortProtocol::{Tcp, Udp};
        let meet = |a: &str, b: &str| mapping(a, Tcp).overlaps(&mapping(b, Tcp));
        assert!(meet("", "") && meet("", "10.0.0.1") && meet("10.0.0.1", ""));
        assert!(meet("10.0.0.1", "10.0.0.1") && !meet("10.0.0.1", "10.0.0.2"));
        assert!(meet("0.0.0.0", "10.0.0.1") && meet("::", "fd00::1"));
        assert!(!meet("0.0.0.0", "fd00::1") && !meet("0.0.0.0", "::"));
        assert!(!mapping("", Tcp).overlaps(&mapping("", Udp)));
        let other = PortMapping {
            host_port: 81,
            ..mapping("", Tcp)
        };
        assert!(!other.overlaps(&mapping("", Tcp)));
    }

    #[test]
    fn a_record_of_an_earlier_version_is_read() {
        let text = r#"{"id": {"containerId": "c", "ifname": "eth0"}, "netns": "/run/netns/x",
            "hostIfname": "h", "hostIfindex": 3, "mac": "02:00:00:00:00:01",
            "hostMac": "02:00:00:00:00:02", "addresses": ["10.0.0.2"]}"#;
        let attachment: Attachment = serde_json::from_str(text).unwrap();
        assert!(attachment.port_mappings.is_empty() && !attachment.masquerade);
        let text = serde_json::to_string(&attachment).unwrap();
        assert!(!text.contains("portMappings") && !text.contains("masquerade"));
    }
}
