//! The last step of a packet that a Pod has sent and that may go on.

use hachi_abi::{ConfigFlags, Endpoint, Reason, TunnelFlags, proto};

use crate::{
    Outcome, checksum,
    ethernet::{ETH_LEN, at},
    family::Family,
    rewrite::done,
    scratch::Scratch,
    traits::{Maps, Packet},
};

/// Counts down the hops that a packet has left before it is forwarded; `false` if it has none, and
/// is as it was.
#[inline(always)]
pub fn hop<const N: usize, F: Family<N>, P: Packet>(packet: &mut P) -> bool {
    let Some([hops, next]) = packet.load::<2>(at(F::HOPS)) else {
        return false;
    };
    if hops <= 1 {
        return false;
    }
    let Some(offset) = F::CHECKSUM else {
        // With the byte before it: a sum is of pairs of bytes.
        return packet
            .load::<1>(at(F::HOPS) - 1)
            .is_some_and(|[kind]| packet.store(at(F::HOPS) - 1, &[kind, hops - 1], true));
    };
    let difference = checksum::replace(0, &[hops, next], &[hops - 1, next]);
    packet.store(at(F::HOPS), &[hops - 1], false)
        && packet.adjust_l3_checksum(at(offset), difference)
}

/// A way out of the node.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Stack,
    Network,
    Tunnel,
}

/// Out of the node to `dst`: into the tunnel where one leads there, else by the network. `pod`: the
/// sender is a Pod.
#[inline(always)]
pub(crate) fn outward<const N: usize, F: Family<N>, P: Packet, M: Maps<N>>(
    packet: &mut P,
    maps: &M,
    scratch: &mut Scratch<N>,
    dst: [u8; N],
    pod: bool,
) -> Outcome {
    scratch.target = dst;
    match way::<N, F, P, M>(packet, maps, scratch, pod) {
        Way::Stack => Outcome::Pass(Reason::PassedToStack),
        Way::Network => Outcome::Forward,
        Way::Tunnel => Outcome::Out {
            ifindex: maps.tunnel_device().ifindex,
        },
    }
}

/// Other nodes' own addresses are reached through the tunnel as well, but by Pods alone, whose
/// addresses the network between does not know.
#[inline(never)]
fn way<const N: usize, F: Family<N>, P: Packet, M: Maps<N>>(
    packet: &mut P,
    maps: &M,
    scratch: &Scratch<N>,
    pod: bool,
) -> Way {
    let redirects = maps.flags() & ConfigFlags::REDIRECT_NEIGH != 0;
    if F::is_multicast(&scratch.target) || F::is_link_scope(&scratch.target) {
        return Way::Stack;
    }
    let device = maps.tunnel_device();
    if device.ifindex != 0
        && let Some(tunnel) = maps.tunnel(&scratch.target)
        && tunnel.flags & TunnelFlags::SEND != 0
    {
        let node = tunnel.flags & TunnelFlags::NODE != 0;
        if !node || pod {
            let may = node || (redirects && longest(packet, scratch) <= device.mtu);
            return if may && hop::<N, F, P>(packet) {
                Way::Tunnel
            } else {
                // It knows what to answer: the packet is too long, or has no hop left.
                Way::Stack
            };
        }
    }
    if redirects { Way::Network } else { Way::Stack }
}

/// Length of the longest packet, from the IP header on, that a packet leaves as.
#[inline(always)]
pub fn longest<const N: usize, P: Packet>(packet: &P, scratch: &Scratch<N>) -> u32 {
    let payload = packet.segment();
    let l4 = scratch.parsed.l4;
    if payload == 0 {
        return packet.len().saturating_sub(ETH_LEN as u32);
    }
    let header = if scratch.parsed.tuple.proto == proto::TCP {
        let offset = packet.load::<1>(scratch.parsed.l4() + 12);
        offset.map_or(20, |[offset]| u32::from(offset >> 4) * 4)
    } else {
        8
    };
    l4.saturating_sub(ETH_LEN as u32) + header + payload
}

/// To a Pod of this node directly, to anything else by the host's stack.
#[inline(always)]
pub(crate) fn deliver<const N: usize, P: Packet, M: Maps<N>>(
    packet: &mut P,
    maps: &M,
    destination: &[u8; N],
) -> Result<Outcome, Reason> {
    if maps.flags() & ConfigFlags::REDIRECT_PEER == 0 {
        return Ok(Outcome::Pass(Reason::PassedToStack));
    }
    match maps.endpoint(destination) {
        Some(receiver) => into(packet, &receiver),
        None => Ok(Outcome::Pass(Reason::PassedToStack)),
    }
}

/// Straight into a Pod of this node.
#[inline(always)]
pub(crate) fn into<P: Packet>(packet: &mut P, receiver: &Endpoint) -> Result<Outcome, Reason> {
    let mut macs = [0; 12];
    macs[..6].copy_from_slice(&receiver.mac);
    macs[6..].copy_from_slice(&receiver.host_mac);
    done(packet.store(0, &macs, false))?;
    Ok(Outcome::RedirectPeer {
        ifindex: receiver.ifindex,
    })
}
