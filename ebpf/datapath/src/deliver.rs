//! The last step of a packet that a Pod has sent and that may go on.

use hachi_abi::{ConfigFlags, Reason};

use crate::{
    Outcome,
    rewrite::done,
    traits::{Maps, Packet},
};

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
    let Some(receiver) = maps.endpoint(destination) else {
        return Ok(Outcome::Pass(Reason::PassedToStack));
    };
    let mut macs = [0; 12];
    macs[..6].copy_from_slice(&receiver.mac);
    macs[6..].copy_from_slice(&receiver.host_mac);
    done(packet.store(0, &macs, false))?;
    Ok(Outcome::RedirectPeer {
        ifindex: receiver.ifindex,
    })
}
