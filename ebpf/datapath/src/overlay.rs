//! What comes from other nodes by the tunnel, and goes to them: the hooks of the VXLAN device.
//!
//! ```text
//! from_overlay   of a known node, and from an address of that node?  then as from the network
//! to_overlay     as to the network, and the node's tunnel address into the packet's key
//! ```
//!
//! The outer source is what the network lets pass, so the inner one is only taken from the node that
//! it belongs to. A Pod's own address is no node's: what a Pod sends to the tunnel's port is never
//! taken for a tunnel packet, and does not leave under the node's address (`to_net`).

use hachi_abi::{Reason, Tunnel, TunnelFlags, proto};

use crate::{
    Outcome,
    begin::{begin, read},
    family::Family,
    from_net,
    parse::{Kind, Parsed},
    scratch::Scratch,
    to_net,
    traits::{Maps, Packet},
};

/// Decides about a packet of the family that has come out of the tunnel. `outer`: what `TUNNELS`
/// says of the address that the tunnel packet came from.
#[inline(always)]
pub fn from_overlay<const N: usize, F: Family<N>, P: Packet, M: Maps<N>>(
    packet: &mut P,
    maps: &M,
    scratch: &mut Scratch<N>,
    outer: Option<&Tunnel>,
) -> Outcome {
    if let Err(reason) = begin::<N, F, P, M>(packet, maps, scratch) {
        return Outcome::Drop(reason);
    }
    if !speaks(maps, &scratch.parsed, outer) {
        return Outcome::Drop(Reason::TunnelSource);
    }
    from_net::decided::<N, F, P, M>(packet, maps, scratch)
}

/// Whether a packet's source belongs to the node that sent the tunnel packet, from its own address.
#[inline(never)]
fn speaks<const N: usize, M: Maps<N>>(
    maps: &M,
    parsed: &Parsed<N>,
    outer: Option<&Tunnel>,
) -> bool {
    let Some(node) = outer else {
        return false;
    };
    let Some(address) = maps.tunnel(&parsed.tuple.src) else {
        return false;
    };
    node.flags & TunnelFlags::NODE != 0
        && address.flags & TunnelFlags::LOCAL == 0
        && (node.flags ^ address.flags) & TunnelFlags::V6 == 0
        && node.remote == address.remote
}

/// Decides about a packet of the family on its way into the tunnel, and leaves in `tunnel` where to.
#[inline(always)]
pub fn to_overlay<const N: usize, F: Family<N>, P: Packet, M: Maps<N>>(
    packet: &mut P,
    maps: &M,
    scratch: &mut Scratch<N>,
    tunnel: &mut Tunnel,
) -> Outcome {
    if let Err(reason) = read::<N, F, P, M>(packet, maps, scratch) {
        return Outcome::Drop(reason);
    }
    let dst = &scratch.parsed.tuple.dst;
    if scratch.parsed.kind == Kind::Link || F::is_multicast(dst) || F::is_link_scope(dst) {
        // The device has no neighbours and no groups; without a key it sends nothing.
        return Outcome::Pass(Reason::PassedToNetwork);
    }
    match maps.tunnel(dst) {
        Some(found) if found.flags & TunnelFlags::LOCAL == 0 => *tunnel = found,
        _ => return Outcome::Drop(Reason::UnknownEndpoint),
    }
    match maps.uplink(packet.ifindex()) {
        Some(address) => scratch.address = address,
        None => return Outcome::Pass(Reason::PassedToNetwork),
    }
    to_net::decided::<N, F, P, M>(packet, maps, scratch)
}

/// Whether a packet is one that carries others.
#[inline(never)]
pub(crate) fn carries<const N: usize, M: Maps<N>>(maps: &M, parsed: &Parsed<N>) -> bool {
    let device = maps.tunnel_device();
    device.ifindex != 0 && parsed.tuple.proto == proto::UDP && parsed.tuple.dport == device.port
}

/// What the tunnel has to do with a packet that an uplink has received.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Arrival {
    /// Nothing.
    Other,
    /// It is for the VXLAN device; `from_overlay` looks at where it comes from.
    Carrier,
    /// It claims to be of a Pod that only the tunnel leads to, or that is behind its veth pair.
    Forged,
}

/// Looks at a packet that an uplink has received, as `ifindex` says.
#[inline(never)]
pub(crate) fn arrival<const N: usize, M: Maps<N>>(
    maps: &M,
    parsed: &Parsed<N>,
    ifindex: u32,
) -> Arrival {
    const INSIDE: u32 = TunnelFlags::SEND | TunnelFlags::LOCAL;
    let device = maps.tunnel_device();
    if device.ifindex == 0 {
        return Arrival::Other;
    }
    if carries(maps, parsed) && maps.uplink(ifindex) == Some(parsed.tuple.dst) {
        return Arrival::Carrier;
    }
    match maps.tunnel(&parsed.tuple.src) {
        Some(source) if source.flags & TunnelFlags::NODE == 0 && source.flags & INSIDE != 0 => {
            Arrival::Forged
        }
        _ => Arrival::Other,
    }
}
