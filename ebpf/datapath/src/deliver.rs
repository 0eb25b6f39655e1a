//! The last step of a packet that a Pod has sent and that may go on.

use hachi_abi::{ConfigFlags, Endpoint, Reason};

use crate::{
    Outcome, checksum,
    family::{Family, at},
    rewrite::done,
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
        return packet.store(at(F::HOPS), &[hops - 1], true);
    };
    let difference = checksum::replace(0, &[hops, next], &[hops - 1, next]);
    packet.store(at(F::HOPS), &[hops - 1], false)
        && packet.adjust_l3_checksum(at(offset), difference)
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
