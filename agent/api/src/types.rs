//! Requests and replies of the agent's socket: one JSON object a line, one reply a request.

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf};

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
}

/// What a client asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "camelCase", deny_unknown_fields)]
pub enum Request {
    /// The node's address pools; answered with [`Reply::Pool`].
    Pool,
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
    /// It could not be done.
    Error {
        /// Why.
        error: ApiError,
    },
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
