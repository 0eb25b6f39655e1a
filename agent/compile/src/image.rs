//! What the maps of one node hold, as ordered plain data, and the writes that change it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use hachi_abi::{
    Endpoint, HostDevice, MAGLEV_PIECE, Peer, PolicyEntry, PolicyKey, Service, Tunnel,
    TunnelDevice, Uplink,
};
use hachi_index::Shards;
use ipnet::IpNet;

use crate::Policies;

/// The whole content of a node's maps, conntrack and counters apart.
///
/// Read back from pinned maps by `hachi-kernel`, or compiled from the desired state: two images
/// that are equal mean that the kernel does what it should.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Image {
    /// Bits of [`hachi_abi::ConfigFlags`].
    pub flags: u32,
    /// The first and the last port that translated flows are given, inclusive.
    pub ports: (u16, u16),
    /// Devices that lead out of the node, by index.
    pub uplinks: BTreeMap<u32, Uplink>,
    /// Where Pods go under their own addresses.
    pub non_masquerade: BTreeSet<IpNet>,
    /// The node's end of its tunnels.
    pub tunnel: TunnelDevice,
    /// The way of the node's own packets to Services.
    pub host: HostDevice,
    /// Pods' blocks and nodes' addresses, by the node's tunnel address.
    pub tunnels: BTreeMap<IpNet, Tunnel>,
    /// Pods of this node by address.
    pub endpoints: BTreeMap<IpAddr, Endpoint>,
    /// Classes of single addresses.
    pub peers: BTreeMap<IpAddr, Peer>,
    /// Classes of address blocks; the longest prefix counts.
    pub cidrs: BTreeMap<IpNet, Peer>,
    /// Entries of all policy sets.
    pub policy: Policies,
    /// Services by frontend.
    pub services: Shards<Frontend, Service>,
    /// What is kept under the Services' ids. An id is of one family.
    pub slots: Shards<SlotsId, Arc<Slots>>,
}

impl Image {
    /// The backends of a frontend.
    #[must_use]
    pub fn backends(&self, frontend: &Frontend) -> &[SocketAddr] {
        let service = self.services.get(frontend);
        service.map_or(&[], |service| self.backends_of(frontend, service))
    }

    /// The backends of a Service that a frontend has.
    #[must_use]
    pub fn backends_of(&self, frontend: &Frontend, service: &Service) -> &[SocketAddr] {
        let slots = self.slots.get(&SlotsId::of(frontend, service));
        let slots = slots.map_or(&[][..], |slots| &slots.backends);
        &slots[..slots.len().min(service.count as usize)]
    }
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

/// Names what is kept under a Service's id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotsId {
    /// Whether it is in the maps of IPv6.
    pub v6: bool,
    /// As in [`hachi_abi::Service::id`].
    pub id: u32,
}

impl SlotsId {
    /// Of a frontend's Service.
    #[must_use]
    pub const fn of(frontend: &Frontend, service: &Service) -> Self {
        Self {
            v6: frontend.addr.is_ipv6(),
            id: service.id,
        }
    }
}

/// What is kept under a Service's id, for one or more frontends.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Slots {
    /// The backend of every slot; all of one family.
    pub backends: Vec<SocketAddr>,
    /// The backends once more, sorted, if clients have an affinity to them.
    pub members: Vec<SocketAddr>,
    /// For consistent hashing: the slot at every place of the table; empty without.
    pub table: Vec<u16>,
    /// Who may use frontends that ask.
    pub ranges: Vec<IpNet>,
}

impl Slots {
    /// Whether there is nothing to be kept.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.backends.is_empty()
            && self.members.is_empty()
            && self.table.is_empty()
            && self.ranges.is_empty()
    }

    /// The table as it is written.
    pub fn pieces(&self) -> impl Iterator<Item = [u16; MAGLEV_PIECE]> {
        self.table.chunks(MAGLEV_PIECE).map(|part| {
            let mut piece = [0; MAGLEV_PIECE];
            piece[..part.len()].copy_from_slice(part);
            piece
        })
    }
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
        /// Whose slot.
        service: SlotsId,
        /// Slot.
        slot: u32,
        /// Address and port.
        backend: SocketAddr,
    },
    /// Remove the backend of a slot.
    DeleteBackend {
        /// Whose slot.
        service: SlotsId,
        /// Slot.
        slot: u32,
    },
    /// Write that a backend is a Service's.
    PutMember(SlotsId, SocketAddr),
    /// Write that a backend is no longer a Service's.
    DeleteMember(SlotsId, SocketAddr),
    /// Let a block use a Service.
    PutRange(SlotsId, IpNet),
    /// Let a block use a Service no longer.
    DeleteRange(SlotsId, IpNet),
    /// Write a piece of a table.
    PutPiece {
        /// Whose table.
        service: SlotsId,
        /// As in [`hachi_abi::MaglevKey::piece`].
        piece: u32,
        /// Slots.
        slots: [u16; MAGLEV_PIECE],
    },
    /// Remove a piece of a table.
    DeletePiece {
        /// Whose table.
        service: SlotsId,
        /// As in [`hachi_abi::MaglevKey::piece`].
        piece: u32,
    },
    /// Write a Service's frontend.
    PutService(Frontend, Service),
    /// Remove a Service's frontend.
    DeleteService(Frontend),
    /// Write the configuration's flags.
    SetFlags(u32),
    /// Write the range of ports of translated flows.
    SetPorts(u16, u16),
    /// Write an uplink.
    PutUplink(u32, Uplink),
    /// Write the node's end of its tunnels.
    SetTunnel(TunnelDevice),
    /// Write the way of the node's own packets to Services.
    SetHost(HostDevice),
    /// Write behind which node's tunnel address a block is.
    PutTunnel(IpNet, Tunnel),
    /// Remove such a block.
    DeleteTunnel(IpNet),
    /// Remove an uplink.
    DeleteUplink(u32),
    /// Add a block that Pods reach under their own addresses.
    PutNonMasquerade(IpNet),
    /// Remove such a block.
    DeleteNonMasquerade(IpNet),
    /// Have every live flow judged again at its next packet.
    RaiseRevision,
}
