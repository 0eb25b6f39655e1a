//! What an uplink's XDP program decides, before the kernel has made a buffer of a packet: a short way
//! for what needs no more than looking up, and an early end for what must not come in.
//!
//! ```text
//! established, client <-> another node's backend    both ends rewritten, and out again
//! new, to a load balancer that it may not use       dropped
//! anything else                                     left as it is: the stack, `from_net`, `to_net`
//! ```
//! Nothing is written to a table here. What opens, ends or renews a flow, what a policy may have changed
//! since, and the first packet of every second go the long way, which does all of it alone where there
//! is no XDP. So no packet is judged or translated twice, and both ways come to the same.
//!
//! A checksum that its sender has left to hardware (on virtual devices) looks like the sum of the pseudo
//! header, and cannot be corrected here: such packets go the long way, and one in 65 536 others.

use hachi_abi::{ConfigFlags, CtFlags, NatFlags, Reason, Scope, ServiceFlags, proto};

use crate::{
    checksum, conntrack,
    deliver::hop,
    ethernet::at,
    family::Family,
    ip::address,
    nat,
    overlay::{self, Arrival},
    parse::{Kind, Parsed},
    rewrite,
    scratch::Scratch,
    service,
    traits::{Maps, Packet},
};

const SYN: u8 = 2;

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Express {
    /// It goes the long way, as it is.
    Leave,
    /// It ends here.
    Drop(Reason),
    /// It goes out again with the tuple that `scratch.after` says, if there is a route: see
    /// [`depart`].
    Send,
}

/// Decides about a packet of the family that an uplink has received.
#[inline(always)]
pub fn express<const N: usize, F: Family<N>, P: Packet, M: Maps<N>>(
    packet: &P,
    maps: &M,
    scratch: &mut Scratch<N>,
) -> Express {
    if maps.revision() == 0 || !read::<N, F, P>(packet, &mut scratch.parsed) {
        return Express::Leave;
    }
    if overlay::arrival(maps, &scratch.parsed, packet.ifindex()) != Arrival::Other {
        // Whether somebody else speaks for who is behind the tunnel, the long way says.
        return Express::Leave;
    }
    scratch.scope = Scope::EXTERNAL.into();
    match decide::<N, F, M>(maps, scratch) {
        Ok(()) if scratch.translated != 0 && !is_partial::<N, F, P>(packet, &scratch.parsed) => {
            Express::Send
        }
        Ok(()) => Express::Leave,
        Err(reason) => Express::Drop(reason),
    }
}

/// Rewrites a packet that goes out again, to the MAC addresses `macs` (receiver's, then sender's);
/// `false` if that failed, and the packet must be dropped.
#[inline(always)]
pub fn depart<const N: usize, F: Family<N>, P: Packet>(
    packet: &mut P,
    scratch: &Scratch<N>,
    macs: &[u8; 12],
) -> bool {
    rewrite::apply::<N, F, P>(packet, scratch).is_ok()
        && hop::<N, F, P>(packet)
        && packet.store(0, macs, false)
}

/// Reads a whole datagram of TCP or UDP without options or extension headers, which has hops left;
/// `false` if it is anything else.
#[inline(never)]
fn read<const N: usize, F: Family<N>, P: Packet>(packet: &P, parsed: &mut Parsed<N>) -> bool {
    let l4 = at(F::HEADER);
    let (number, length) = if N == 4 {
        let Some(ip) = packet.load::<20>(at(0)) else {
            return false;
        };
        // Neither a fragment nor the first of some.
        if ip[0] != 0x45 || ip[6] & 0x3f != 0 || ip[7] != 0 || ip[8] <= 1 {
            return false;
        }
        parsed.tuple.src = address(&ip, F::SOURCE);
        parsed.tuple.dst = address(&ip, F::DESTINATION);
        (ip[9], usize::from(u16::from_be_bytes([ip[2], ip[3]])))
    } else {
        let Some(ip) = packet.load::<40>(at(0)) else {
            return false;
        };
        if ip[0] >> 4 != 6 || ip[7] <= 1 {
            return false;
        }
        parsed.tuple.src = address(&ip, F::SOURCE);
        parsed.tuple.dst = address(&ip, F::DESTINATION);
        let payload = usize::from(u16::from_be_bytes([ip[4], ip[5]]));
        (ip[6], F::HEADER + payload)
    };
    let end = at(length);
    if end > packet.len() as usize {
        return false;
    }
    parsed.tuple.proto = number;
    parsed.tuple.pad = [0; 3];
    parsed.kind = Kind::Whole;
    parsed.l4 = l4 as u32;
    parsed.end = end as u32;
    parsed.tcp_flags = 0;
    parsed.icmp_type = 0;
    parsed.pad = [0; 2];
    match number {
        proto::TCP => {
            let Some(tcp) = packet.load::<20>(l4) else {
                return false;
            };
            let header = usize::from(tcp[12] >> 4) * 4;
            if header < 20 || l4 + header > end {
                return false;
            }
            parsed.tuple.sport = [tcp[0], tcp[1]];
            parsed.tuple.dport = [tcp[2], tcp[3]];
            parsed.tcp_flags = tcp[13];
            true
        }
        proto::UDP => {
            let Some(udp) = packet.load::<8>(l4) else {
                return false;
            };
            if l4 + 8 > end {
                return false;
            }
            parsed.tuple.sport = [udp[0], udp[1]];
            parsed.tuple.dport = [udp[2], udp[3]];
            true
        }
        _ => false,
    }
}

/// Looks up what becomes of the packet; with `translated` set it goes out again as `after`.
///
/// # Errors
/// [`Reason::SourceRange`].
#[inline(never)]
fn decide<const N: usize, F: Family<N>, M: Maps<N>>(
    maps: &M,
    scratch: &mut Scratch<N>,
) -> Result<(), Reason> {
    scratch.translated = 0;
    let tuple = &scratch.parsed.tuple;
    // Forgeries, and what is for Pods: not known here.
    if maps.endpoint(&tuple.src).is_some() || maps.endpoint(&tuple.dst).is_some() {
        return Ok(());
    }
    if !scratch.parsed.opens() {
        if scratch.parsed.closes() || scratch.parsed.tcp_flags & SYN != 0 {
            return Ok(());
        }
        scratch.now = maps.now();
        if maps.nat(&scratch.parsed.tuple, &mut scratch.nat) {
            back::<N, F, M>(maps, scratch);
            return Ok(());
        }
        if maps.flow(&scratch.parsed.tuple, &mut scratch.entry) {
            forth::<N, F, M>(maps, scratch);
            return Ok(());
        }
    }
    match service::frontend(maps, &scratch.parsed.tuple, Scope::EXTERNAL) {
        Some(found)
            if found.flags & ServiceFlags::SOURCE_RANGES != 0
                && !service::may_use(maps, &found, &scratch.parsed.tuple.src) =>
        {
            Err(Reason::SourceRange)
        }
        _ => Ok(()),
    }
}

/// A client's packet to a backend elsewhere: its flow is in `entry`.
#[inline(always)]
fn forth<const N: usize, F: Family<N>, M: Maps<N>>(maps: &M, scratch: &mut Scratch<N>) {
    const KIND: u8 = CtFlags::NAT | CtFlags::REPLY | CtFlags::HAIRPIN;
    if scratch.entry.flags & KIND != CtFlags::NAT || !conntrack::is_current(maps, scratch) {
        return;
    }
    conntrack::translate(&scratch.parsed.tuple, &scratch.entry, &mut scratch.after);
    if !maps.nat(&scratch.after, &mut scratch.nat)
        || scratch.nat.flags & NatFlags::REPLY != 0
        || !nat::is_current(scratch)
    {
        return;
    }
    nat::translate::<N, F>(&scratch.after, &scratch.nat, &mut scratch.opener);
    send(maps, scratch);
}

/// The answer of a backend elsewhere: the claim that it names is in `nat`.
#[inline(always)]
fn back<const N: usize, F: Family<N>, M: Maps<N>>(maps: &M, scratch: &mut Scratch<N>) {
    const ANSWER: u8 = CtFlags::NAT | CtFlags::REPLY;
    if scratch.nat.flags & NatFlags::REPLY == 0 || !nat::is_current(scratch) {
        return;
    }
    nat::translate::<N, F>(&scratch.parsed.tuple, &scratch.nat, &mut scratch.after);
    if !maps.flow(&scratch.after, &mut scratch.entry)
        || scratch.entry.flags & (ANSWER | CtFlags::HAIRPIN) != ANSWER
        || !conntrack::is_current(maps, scratch)
    {
        return;
    }
    conntrack::translate(&scratch.after, &scratch.entry, &mut scratch.opener);
    send(maps, scratch);
}

/// Has the packet go out as `opener` says, unless that is a Pod of this node.
#[inline(always)]
fn send<const N: usize, M: Maps<N>>(maps: &M, scratch: &mut Scratch<N>) {
    if maps.flags() & ConfigFlags::REDIRECT_NEIGH == 0
        || maps.endpoint(&scratch.opener.dst).is_some()
    {
        return;
    }
    scratch.after = scratch.opener;
    scratch.translated = 1;
}

/// Whether the transport checksum is that of the pseudo header alone, to be completed by hardware.
#[inline(always)]
fn is_partial<const N: usize, F: Family<N>, P: Packet>(packet: &P, parsed: &Parsed<N>) -> bool {
    let l4 = at(F::HEADER);
    let field = match parsed.tuple.proto {
        proto::TCP => packet.load::<2>(l4 + 16),
        _ => packet.load::<2>(l4 + 6),
    };
    let Some(field) = field else { return true };
    if parsed.tuple.proto == proto::UDP && field == [0; 2] {
        // There is none, which IPv4 permits.
        return F::CHECKSUM.is_none();
    }
    let [_, _, high, low] = parsed.end.wrapping_sub(l4 as u32).to_be_bytes();
    let sum = checksum::sum(0, &parsed.tuple.src);
    let sum = checksum::sum(sum, &parsed.tuple.dst);
    let sum = checksum::sum(sum, &[0, parsed.tuple.proto, high, low]);
    let [a, b] = checksum::finish(sum);
    field == [!a, !b]
}
