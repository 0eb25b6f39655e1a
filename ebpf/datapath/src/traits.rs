//! What the datapath needs of its surroundings.

use hachi_abi::{
    Affinity, AffinityKey, Backend, BackendKey, CtEntry, Endpoint, FragKey, FragValue, HostDevice,
    MaglevKey, Member, NatEntry, Peer, PolicyEntry, PolicyKey, RangeKey, Service, ServiceKey,
    Tunnel, TunnelDevice, Tuple,
};

/// What an adjustment of a transport checksum stands for; they differ where the sender left the
/// checksum to hardware, and its field holds the sum of the pseudo header alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// A change of an address, that is, of the pseudo header.
    Pseudo,
    /// A change of the segment itself, such as a port.
    Segment,
}

/// A packet that starts with its Ethernet header. Offsets and lengths are in bytes.
pub trait Packet {
    /// Length of the whole packet.
    fn len(&self) -> u32;
    /// Whether the packet is empty.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Bytes of payload of each segment that the packet will be cut into on its way out; 0 if it is
    /// one by itself.
    fn segment(&self) -> u32;
    /// Index of the interface whose hook this is.
    fn ifindex(&self) -> u32;
    /// Whether the node's own stack made the packet, and no device has received it.
    fn is_own(&self) -> bool;
    /// Whether a VLAN tag was taken off the packet and is carried beside it.
    fn vlan_present(&self) -> bool;
    /// Copies `L` bytes out; `None` if the packet ends before.
    fn load<const L: usize>(&self, offset: usize) -> Option<[u8; L]>;
    /// Overwrites `L` bytes; `false` if that failed. Checksums in the packet are the caller's
    /// business. `resum`: the sum that a device took over the whole packet must follow the write,
    /// which it need not where a checksum within the packet makes up for it.
    fn store<const L: usize>(&mut self, offset: usize, bytes: &[u8; L], resum: bool) -> bool;
    /// Adjusts the header checksum at `offset` by a difference of `checksum`; RFC 1624.
    fn adjust_l3_checksum(&mut self, offset: usize, difference: u32) -> bool;
    /// Adjusts the transport checksum at `offset`. `udp`: zero means that there is none, and is
    /// never written.
    fn adjust_l4_checksum(&mut self, offset: usize, difference: u32, part: Part, udp: bool)
    -> bool;
    /// Cuts the packet short, or lengthens it with zeros.
    fn resize(&mut self, len: u32) -> bool;
}

/// The maps of one family, and the clock. Values are copies.
pub trait Maps<const N: usize> {
    /// The revision under which flows are judged; 0: not configured.
    fn revision(&self) -> u32;
    /// Bits of [`hachi_abi::ConfigFlags`].
    fn flags(&self) -> u32;
    /// A Pod of this node.
    fn endpoint(&self, addr: &[u8; N]) -> Option<Endpoint>;
    /// The class of a single address.
    fn peer(&self, addr: &[u8; N]) -> Option<Peer>;
    /// The class of the smallest block around an address.
    fn block(&self, addr: &[u8; N]) -> Option<Peer>;
    /// An entry of a policy set.
    fn policy(&self, key: &PolicyKey) -> Option<PolicyEntry>;
    /// A Service's frontend.
    fn service(&self, key: &ServiceKey<N>) -> Option<Service>;
    /// A Service's backend.
    fn backend(&self, key: &BackendKey) -> Option<Backend<N>>;
    /// An entry of a Service's table, by its place in the piece.
    fn maglev(&self, key: &MaglevKey, entry: usize) -> Option<u16>;
    /// Whether a Service with affinity has a backend.
    fn is_member(&self, member: &Member<N>) -> bool;
    /// Which backend a client had.
    fn affinity(&self, key: &AffinityKey<N>) -> Option<Affinity<N>>;
    /// Remembers which backend a client has.
    fn put_affinity(&self, key: &AffinityKey<N>, value: &Affinity<N>);
    /// Whether a source may use a Service with source ranges.
    fn is_in_range(&self, key: &RangeKey<N>) -> bool;
    /// Copies one direction of a flow out; `false` if it is not tracked.
    fn flow(&self, tuple: &Tuple<N>, into: &mut CtEntry<N>) -> bool;
    /// Writes one direction of a flow; `false` if the table did not take it.
    fn put_flow(&self, tuple: &Tuple<N>, entry: &CtEntry<N>) -> bool;
    /// Writes one direction of a flow only if there is none under this tuple, in one step; `false`
    /// if there is, or the table did not take it.
    fn claim_flow(&self, tuple: &Tuple<N>, entry: &CtEntry<N>) -> bool;
    /// Forgets one direction of a flow.
    fn drop_flow(&self, tuple: &Tuple<N>);
    /// The ports of a fragmented datagram.
    fn fragment(&self, key: &FragKey<N>) -> Option<FragValue>;
    /// Remembers the ports of a fragmented datagram.
    fn put_fragment(&self, key: &FragKey<N>, value: &FragValue) -> bool;
    /// The node's address on an uplink, by the device's index; zeros: none of this family.
    fn uplink(&self, ifindex: u32) -> Option<[u8; N]>;
    /// Whether Pods reach an address under their own.
    fn is_exempt(&self, addr: &[u8; N]) -> bool;
    /// Behind which node's tunnel address an address is.
    fn tunnel(&self, addr: &[u8; N]) -> Option<Tunnel>;
    /// The node's own end of its tunnels.
    fn tunnel_device(&self) -> TunnelDevice;
    /// The way of the node's own packets to Services.
    fn host(&self) -> HostDevice;
    /// The first and the last port that translated flows are given.
    fn ports(&self) -> (u16, u16);
    /// Copies one direction of a translated flow out; `false` if there is none.
    fn nat(&self, tuple: &Tuple<N>, into: &mut NatEntry<N>) -> bool;
    /// Writes one direction of a translated flow, whatever there is.
    fn put_nat(&self, tuple: &Tuple<N>, entry: &NatEntry<N>) -> bool;
    /// Writes one direction of a translated flow only if there is none under this tuple, in one
    /// step; `false` if there is, or the table did not take it.
    fn claim_nat(&self, tuple: &Tuple<N>, entry: &NatEntry<N>) -> bool;
    /// Forgets one direction of a translated flow.
    fn drop_nat(&self, tuple: &Tuple<N>);
    /// Seconds of the coarse monotonic clock.
    fn now(&self) -> u32;
    /// Low bits of a clock that costs nothing to read and changes about once a second.
    fn tick(&self) -> u8;
}
