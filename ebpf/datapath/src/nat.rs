//! Source address translation: what leaves by an uplink under the node's address, and its answers.
//!
//! ```text
//! to_net    P:p -> W:w   ──follow──> N:a -> W:w     the forward entry, or a new one (allocate)
//! from_net  W:w -> N:a   ──follow──> W:w -> P:p     the reply entry, which is the claim to N:a
//! ```
//!
//! No two flows ever have one tuple on the wire: a reply entry is only ever added where there is
//! none (or one that is over), in one step. The node's own connections claim their tuples too, so
//! that no Pod is given one; where the Pod was there first, the node's connection is given another
//! port like anybody's. A claim that was lost is noticed, and made again or given up, by the flow's
//! next packet that is the first of its second.
//!
//! Fragments of a datagram follow its first one. Their identification is left as it is: two Pods
//! that send fragments with one identification to one receiver at once may be mixed up there.

use hachi_abi::{NatEntry, NatFlags, REFRESH_OTHER, Reason, Tuple, nat_lifetime, proto};

use crate::{
    family::Family,
    hash,
    parse::{Kind, Parsed, has_ports},
    scratch::Scratch,
    traits::Maps,
};

/// Ports that are tried for a new flow before it counts as exhausted; a range that is no larger
/// is tried in full.
const ATTEMPTS: u32 = 128;

/// From one port to the next that is tried; a flow's hash chooses. Primes above any range: no step
/// comes back to a port before it was at all others, as one would that shares a divisor with the range.
const STEPS: [u32; 16] = [
    463_549, 1_247_017, 1_642_709, 1_861_913, 2_731_087, 4_091_317, 4_985_993, 5_219_603,
    6_775_829, 6_868_681, 8_165_323, 9_348_517, 12_231_083, 13_560_439, 15_531_811, 16_740_943,
];

/// Whether an entry still means something.
#[inline(always)]
fn alive<const N: usize>(entry: &NatEntry<N>, number: u8, now: u32) -> bool {
    let age = now.wrapping_sub(entry.last_seen);
    // Another CPU may have noted a time that this one has not seen begin.
    age <= nat_lifetime(number, entry.flags) || age == u32::MAX
}

/// What an entry makes of a tuple. Both ports of an ICMP tuple are its identifier.
#[inline(always)]
pub(crate) fn translate<const N: usize, F: Family<N>>(
    tuple: &Tuple<N>,
    entry: &NatEntry<N>,
    after: &mut Tuple<N>,
) {
    *after = *tuple;
    let reply = entry.flags & NatFlags::REPLY != 0;
    if reply {
        after.dst = entry.addr;
    } else {
        after.src = entry.addr;
    }
    if reply || tuple.proto == F::ICMP {
        after.dport = entry.port;
    }
    if !reply || tuple.proto == F::ICMP {
        after.sport = entry.port;
    }
}

/// Makes the other half of the entry of `tuple`.
#[inline(always)]
fn opposite<const N: usize>(tuple: &Tuple<N>, entry: &NatEntry<N>, other: &mut NatEntry<N>) {
    *other = *entry;
    other.flags = entry.flags ^ NatFlags::REPLY;
    if entry.flags & NatFlags::REPLY == 0 {
        other.addr = tuple.src;
        other.port = tuple.sport;
    } else {
        other.addr = tuple.dst;
        other.port = tuple.dport;
    }
}

/// Whether two entries put in the same.
#[inline(always)]
fn alike<const N: usize>(a: &NatEntry<N>, b: &NatEntry<N>) -> bool {
    (a.flags ^ b.flags) & NatFlags::REPLY == 0 && a.addr == b.addr && a.port == b.port
}

/// Whether a packet can be of the direction that an entry is for: what opens a connection, or asks
/// for an echo, is no answer.
#[inline(always)]
fn fits<const N: usize, F: Family<N>>(parsed: &Parsed<N>, flags: u8) -> bool {
    let reply = flags & NatFlags::REPLY != 0;
    if parsed.tuple.proto == F::ICMP && parsed.kind != Kind::LaterFragment {
        parsed.icmp_type
            == if reply {
                F::ECHO_REPLY
            } else {
                F::ECHO_REQUEST
            }
    } else {
        !(reply && parsed.opens())
    }
}

/// Looks up what becomes of a packet of a translated flow, and leaves that in `after`. Of any other
/// packet nothing is known. [`Scratch::translated`] tells which it was.
#[inline(never)]
pub(crate) fn follow<const N: usize, F: Family<N>, M: Maps<N>>(maps: &M, scratch: &mut Scratch<N>) {
    scratch.translated = 0;
    if !maps.nat(&scratch.parsed.tuple, &mut scratch.nat)
        || !fits::<N, F>(&scratch.parsed, scratch.nat.flags)
    {
        return;
    }
    let before = scratch.after;
    {
        let Scratch {
            parsed, nat, after, ..
        } = scratch;
        translate::<N, F>(&parsed.tuple, nat, after);
    }
    scratch.now = maps.now();
    if !is_current(scratch)
        && (!alive(&scratch.nat, scratch.parsed.tuple.proto, scratch.now) || !renew(maps, scratch))
    {
        scratch.after = before;
        return;
    }
    scratch.translated = 1;
}

/// As [`follow`], of an ICMP error about the packet that `scratch.reply` says reversed; what becomes
/// of that is left in `after`.
#[inline(never)]
pub(crate) fn follow_error<const N: usize, F: Family<N>, M: Maps<N>>(
    maps: &M,
    scratch: &mut Scratch<N>,
) {
    scratch.translated = 0;
    scratch.now = maps.now();
    let Scratch {
        reply,
        nat,
        after,
        now,
        translated,
        ..
    } = scratch;
    if maps.nat(reply, nat) && alive(nat, reply.proto, *now) {
        translate::<N, F>(reply, nat, after);
        *translated = 1;
    }
}

/// What a packet says of its flow's end.
#[inline(always)]
fn ends<const N: usize>(parsed: &Parsed<N>, flags: u8) -> u8 {
    if parsed.resets() {
        NatFlags::RESET
    } else if !parsed.closes() {
        0
    } else if flags & NatFlags::REPLY == 0 {
        NatFlags::FIN_OUT
    } else {
        NatFlags::FIN_IN
    }
}

/// Whether the packet's entry needs nothing done. By the true time, not by a clock that turns round:
/// an entry that is over may be another flow's already.
#[inline(always)]
pub(crate) fn is_current<const N: usize>(scratch: &Scratch<N>) -> bool {
    const ANSWERED: u8 = NatFlags::REPLY | NatFlags::OPENING;
    let Scratch {
        nat, parsed, now, ..
    } = scratch;
    nat.last_seen == *now
        && !parsed.opens()
        && nat.flags & ANSWERED != ANSWERED
        && ends(parsed, nat.flags) & !nat.flags == 0
}

/// Notes time and end on both halves of the packet's flow, and restores one that was evicted;
/// `false` if the flow has lost its claim to another since, and must be translated anew.
#[inline(never)]
fn renew<const N: usize, M: Maps<N>>(maps: &M, scratch: &mut Scratch<N>) -> bool {
    const ENDS: u8 = NatFlags::FIN_OUT | NatFlags::FIN_IN | NatFlags::RESET;
    let Scratch {
        parsed,
        after,
        reply,
        nat,
        other_nat,
        known_nat,
        now,
        ..
    } = scratch;
    let forward = nat.flags & NatFlags::REPLY == 0;
    if parsed.opens() {
        // The client uses the port again.
        nat.flags &= !ENDS;
    }
    nat.flags |= ends(parsed, nat.flags);
    if !forward {
        nat.flags &= !NatFlags::OPENING;
    }
    nat.last_seen = *now;
    opposite(&parsed.tuple, nat, other_nat);
    *reply = after.reversed();
    if *after == parsed.tuple {
        // The node's own claim: there is no other half.
    } else if maps.nat(reply, known_nat) {
        if !alike(known_nat, other_nat) {
            // The tuple of the answers is the claim. What leaves may be of a later one.
            if forward {
                maps.drop_nat(&parsed.tuple);
            }
            return !forward;
        }
        if !parsed.opens() {
            other_nat.flags |= known_nat.flags & ENDS;
            nat.flags |= known_nat.flags & ENDS;
        }
        if now.wrapping_sub(known_nat.last_seen) >= REFRESH_OTHER
            || other_nat.flags != known_nat.flags
        {
            maps.put_nat(reply, other_nat);
        }
    } else if !maps.claim_nat(reply, other_nat) && forward {
        maps.drop_nat(&parsed.tuple);
        return false;
    }
    // A write that fails leaves an older entry or none: the next packet tries again.
    maps.put_nat(&parsed.tuple, nat);
    true
}

/// Gives the flow of a packet that leaves the node a tuple of its own under `scratch.address`, and
/// leaves that in `after`.
///
/// # Errors
/// [`Reason::NatExhausted`] if there is none.
#[inline(never)]
pub(crate) fn allocate<const N: usize, F: Family<N>, M: Maps<N>>(
    maps: &M,
    scratch: &mut Scratch<N>,
) -> Result<(), Reason> {
    if F::is_unspecified(&scratch.address) {
        return Err(Reason::NatExhausted);
    }
    scratch.now = maps.now();
    scratch.after = scratch.parsed.tuple;
    scratch.after.src = scratch.address;
    claim::<N, F, M>(maps, scratch)?;
    let Scratch {
        parsed,
        after,
        nat,
        reply,
        ..
    } = scratch;
    if *after != parsed.tuple {
        // Made of the claim: its own half of the flow.
        nat.flags &= !NatFlags::REPLY;
        nat.addr = after.src;
        nat.port = after.sport;
        if !maps.put_nat(&parsed.tuple, nat) {
            maps.drop_nat(reply);
            return Err(Reason::NatExhausted);
        }
    }
    scratch.translated = 1;
    Ok(())
}

/// Finds a port for `after` whose answers nobody else has; leaves the reply entry in `nat`.
///
/// 1. the flow's own port, where it is the node's, or lies in the range;
/// 2. ports from a hash of the flow on, that nobody has;
/// 3. the first of those whose flow is over.
#[inline(always)]
fn claim<const N: usize, F: Family<N>, M: Maps<N>>(
    maps: &M,
    scratch: &mut Scratch<N>,
) -> Result<(), Reason> {
    let (low, high) = maps.ports();
    let Scratch {
        parsed,
        after,
        nat,
        now,
        ..
    } = scratch;
    let tuple = &parsed.tuple;
    let own = u16::from_be_bytes(tuple.sport);
    nat.addr = tuple.src;
    nat.port = tuple.sport;
    nat.flags = NatFlags::REPLY | ends(parsed, 0);
    if tuple.proto == proto::TCP {
        nat.flags |= NatFlags::OPENING;
    }
    nat.last_seen = *now;
    nat.pad = 0;
    let icmp = tuple.proto == F::ICMP;
    let choice = icmp || has_ports(tuple.proto);
    let first = !choice || icmp || tuple.src == after.src || (low <= own && own <= high);
    scratch.reply = scratch.after.reversed();
    if first && take(maps, scratch) {
        return Ok(());
    }
    if !choice || high < low || high == 0 {
        // Other protocols have no ports that could tell flows apart.
        return Err(Reason::NatExhausted);
    }
    scratch.port = hash::tuple(&scratch.parsed.tuple);
    search::<N, F, M>(maps, scratch, low, high)
}

#[inline(never)]
fn search<const N: usize, F: Family<N>, M: Maps<N>>(
    maps: &M,
    scratch: &mut Scratch<N>,
    low: u16,
    high: u16,
) -> Result<(), Reason> {
    let range = u32::from(high.wrapping_sub(low)) + 1;
    let hash = scratch.port;
    let step = STEPS[(hash >> 16) as usize % STEPS.len()];
    let mut at = hash % range;
    set_port::<N, F>(scratch, low.wrapping_add(at as u16));
    // Where the flow most likely was before half of it was evicted.
    if take(maps, scratch) {
        return Ok(());
    }
    let mut over = range;
    let mut attempt = 1;
    while attempt < ATTEMPTS {
        at = at.wrapping_add(step) % range;
        set_port::<N, F>(scratch, low.wrapping_add(at as u16));
        if maps.claim_nat(&scratch.reply, &scratch.nat) {
            return Ok(());
        }
        if over == range && is_over(maps, scratch) {
            over = at;
        }
        attempt += 1;
    }
    // User space deletes what is over in time; this is for when it has not yet.
    if over < range {
        set_port::<N, F>(scratch, low.wrapping_add(over as u16));
        if take(maps, scratch) {
            return Ok(());
        }
    }
    Err(Reason::NatExhausted)
}

/// Whether the flow whose answers have the tuple in `reply` is over.
#[inline(always)]
fn is_over<const N: usize, M: Maps<N>>(maps: &M, scratch: &mut Scratch<N>) -> bool {
    let Scratch {
        reply,
        nat,
        known_nat,
        ..
    } = scratch;
    maps.nat(reply, known_nat) && !alive(known_nat, reply.proto, nat.last_seen)
}

/// Makes a port that of `after`, and of its answers.
#[inline(always)]
fn set_port<const N: usize, F: Family<N>>(scratch: &mut Scratch<N>, port: u16) {
    let Scratch {
        parsed,
        after,
        reply,
        ..
    } = scratch;
    after.sport = port.to_be_bytes();
    reply.dport = after.sport;
    if parsed.tuple.proto == F::ICMP {
        after.dport = after.sport;
        reply.sport = after.sport;
    }
}

/// Adds the reply entry in `nat` where there is none, or one that is over, or one of this very
/// flow.
#[inline(never)]
fn take<const N: usize, M: Maps<N>>(maps: &M, scratch: &mut Scratch<N>) -> bool {
    let Scratch {
        reply,
        nat,
        known_nat,
        ..
    } = scratch;
    if maps.claim_nat(reply, nat) {
        return true;
    }
    if !maps.nat(reply, known_nat) {
        return false;
    }
    if alike(known_nat, nat) {
        return maps.put_nat(reply, nat);
    }
    if alive(known_nat, reply.proto, nat.last_seen) {
        return false;
    }
    maps.drop_nat(reply);
    maps.claim_nat(reply, nat)
}

/// Sees to it that a packet of the node's own has its tuple to itself: claims it, or has the packet
/// translated as the flow's first one was.
///
/// # Errors
/// As [`allocate`].
#[inline(never)]
pub(crate) fn own<const N: usize, F: Family<N>, M: Maps<N>>(
    maps: &M,
    scratch: &mut Scratch<N>,
) -> Result<(), Reason> {
    scratch.translated = 0;
    {
        let Scratch {
            parsed, reply, nat, ..
        } = scratch;
        let (low, high) = maps.ports();
        let port = u16::from_be_bytes(parsed.tuple.sport);
        if has_ports(parsed.tuple.proto) && !(low <= port && port <= high) {
            // No other flow is given a port that is not in the range.
            return Ok(());
        }
        if parsed.tuple.proto == F::ICMP && parsed.icmp_type != F::ECHO_REQUEST {
            return Ok(());
        }
        *reply = parsed.tuple.reversed();
        if maps.nat(reply, nat)
            && nat.flags & NatFlags::REPLY != 0
            && nat.addr == parsed.tuple.src
            && nat.port == parsed.tuple.sport
        {
            let news = match ends(parsed, 0) {
                _ if parsed.opens() => NatFlags::REPLY | (nat.flags & NatFlags::OPENING),
                ends => nat.flags | ends,
            };
            let now = maps.now();
            if nat.last_seen != now || news != nat.flags {
                nat.flags = news;
                nat.last_seen = now;
                maps.put_nat(reply, nat);
            }
            return Ok(());
        }
    }
    follow::<N, F, M>(maps, scratch);
    // A reset of what nobody asked for opens nothing.
    if scratch.translated != 0 || scratch.parsed.resets() {
        return Ok(());
    }
    allocate::<N, F, M>(maps, scratch)?;
    scratch.translated = u32::from(scratch.nat.flags & NatFlags::REPLY == 0);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_step_shares_a_divisor_with_a_range() {
        for step in STEPS {
            for divisor in 2..=1 << 16 {
                assert!(
                    step % divisor != 0,
                    "{step} = {divisor} * {}",
                    step / divisor
                );
            }
            // The next port is told in 32 bits.
            assert!(step.checked_add(1 << 16).is_some());
        }
    }
}
