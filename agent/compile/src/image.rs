//! What the maps of one node hold, as ordered plain data, and the writes that change it.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use hachi_abi::{Endpoint, Peer, PolicyEntry, PolicyKey, Service};
use ipnet::IpNet;

/// The whole content of a node's maps, conntrack and counters apart.
///
/// Read back from pinned maps by `hachi-kernel`, or compiled from the desired state: two images
/// that are equal mean that the kernel does what it should.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Image {
    /// Bits of [`hachi_abi::ConfigFlags`].
    pub flags: u32,
    /// Pods of this node by address.
    pub endpoints: BTreeMap<IpAddr, Endpoint>,
    /// Classes of single addresses.
    pub peers: BTreeMap<IpAddr, Peer>,
    /// Classes of address blocks; the longest prefix counts.
    pub cidrs: BTreeMap<IpNet, Peer>,
    /// Entries of all policy sets.
    pub policy: BTreeMap<PolicyKey, PolicyEntry>,
    /// Services by frontend.
    pub services: BTreeMap<Frontend, ServiceImage>,
}

/// An address that a Service answers on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Frontend {
    /// Address.
    pub addr: IpAddr,
    /// Port, host order.
    pub port: u16,
    /// IANA protocol number.
    pub proto: u8,
    /// As in [`hachi_abi::ServiceKey::scope`].
    pub scope: u8,
}

/// A Service behind one or more frontends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceImage {
    /// As in [`hachi_abi::Service::id`]; the same id means the same backends.
    pub id: u32,
    /// Bits of [`hachi_abi::ServiceFlags`].
    pub flags: u32,
    /// Session affinity in seconds, 0 for none.
    pub affinity: u32,
    /// The backend of every slot; all of the frontend's family.
    pub backends: Vec<SocketAddr>,
}

/// One write. A list of them is applied in order; `hachi-kernel` joins neighbours of one map into
/// batches. Deleting what is not there is success.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Write a policy entry.
    PutPolicy(PolicyKey, PolicyEntry),
    /// Remove a policy entry.
    DeletePolicy(PolicyKey),
    /// Write the class of an address.
    PutPeer(IpAddr, Peer),
    /// Remove the class of an address.
    DeletePeer(IpAddr),
    /// Write the class of a block.
    PutCidr(IpNet, Peer),
    /// Remove the class of a block.
    DeleteCidr(IpNet),
    /// Write an endpoint.
    PutEndpoint(IpAddr, Endpoint),
    /// Remove an endpoint.
    DeleteEndpoint(IpAddr),
    /// Write the backend of a slot; the map is that of the address's family.
    PutBackend {
        /// [`Service::id`].
        service: u32,
        /// Slot.
        slot: u32,
        /// Address and port.
        backend: SocketAddr,
    },
    /// Remove the backend of a slot.
    DeleteBackend {
        /// [`Service::id`].
        service: u32,
        /// Slot.
        slot: u32,
        /// Whether the slot is in the IPv6 map.
        v6: bool,
    },
    /// Write a Service's frontend.
    PutService(Frontend, Service),
    /// Remove a Service's frontend.
    DeleteService(Frontend),
    /// Write the configuration's flags.
    SetFlags(u32),
    /// Have every live flow judged again at its next packet.
    RaiseRevision,
}
