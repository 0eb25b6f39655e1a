//! Whether policy lets a flow be.
//!
//! Precedence, first match decides:
//! 1. a Pod always reaches itself;
//! 2. the sender, if it is a Pod of this node isolated on egress, must allow the receiver's class;
//! 3. the receiver, if it is a Pod of this node isolated on ingress, must allow the sender's
//!    class, unless the sender is this node;
//! 4. what is left is allowed.

use hachi_abi::{
    CLASS_WORLD, Peer, PeerFlags, PolicyKey, RULE_NONE, Reason, SET_ALLOW_ALL, SHAPE_ANY_PROTO,
    Shapes, Tuple, Verdict,
};

use crate::{parse::has_ports, scratch::Scratch, traits::Maps};

/// What is asked of one policy set.
struct Question {
    set: u32,
    shapes: Shapes,
    /// The other side's class.
    class: u32,
}

/// Judges the flow whose opener's tuple, behind a Service, is in `scratch`; leaves the rules that
/// allowed it there.
///
/// # Errors
/// Which side denied it.
#[inline(never)]
pub(crate) fn judge<const N: usize, M: Maps<N>>(
    maps: &M,
    scratch: &mut Scratch<N>,
) -> Result<(), Reason> {
    scratch.egress_rule = RULE_NONE;
    scratch.ingress_rule = RULE_NONE;
    let Scratch {
        opener,
        egress_rule,
        ingress_rule,
        ..
    } = scratch;
    if opener.src == opener.dst {
        return Ok(());
    }
    if let Some(sender) = maps.endpoint(&opener.src)
        && sender.egress_set != SET_ALLOW_ALL
    {
        let class = class(maps, &opener.dst).class;
        let question = Question {
            set: sender.egress_set,
            shapes: sender.egress_shapes,
            class,
        };
        if !allowed(maps, &question, opener, egress_rule) {
            return Err(Reason::PolicyEgress);
        }
    }
    if let Some(receiver) = maps.endpoint(&opener.dst)
        && receiver.ingress_set != SET_ALLOW_ALL
    {
        let Peer { class, flags } = class(maps, &opener.src);
        let question = Question {
            set: receiver.ingress_set,
            shapes: receiver.ingress_shapes,
            class,
        };
        if flags & PeerFlags::LOCAL_NODE == 0 && !allowed(maps, &question, opener, ingress_rule) {
            return Err(Reason::PolicyIngress);
        }
    }
    Ok(())
}

/// The class of an address: its own, or that of the block around it, or the world's.
#[inline(always)]
pub(crate) fn class<const N: usize, M: Maps<N>>(maps: &M, addr: &[u8; N]) -> Peer {
    match maps.peer(addr) {
        Some(peer) => peer,
        None => maps.block(addr).unwrap_or(Peer {
            class: CLASS_WORLD,
            flags: 0,
        }),
    }
}

/// Looks for the entry that decides: the protocol with the longest port prefix, then any protocol.
/// Kinds of entry that the set does not have are not looked up.
#[inline(always)]
fn allowed<const N: usize, M: Maps<N>>(
    maps: &M,
    question: &Question,
    opener: &Tuple<N>,
    rule: &mut u32,
) -> bool {
    // What stands in place of ICMP's ports is no port.
    let port = if has_ports(opener.proto) {
        u16::from_be_bytes(opener.dport)
    } else {
        0
    };
    let mut plen = 17;
    while plen > 0 {
        plen -= 1;
        if question.shapes & (1 << plen) != 0 {
            let prefix = (u32::from(port) & !(0xffff_u32 >> plen)) as u16;
            let key = PolicyKey {
                set: question.set,
                class: question.class,
                port: prefix.to_be_bytes(),
                plen: plen as u8,
                proto: opener.proto,
            };
            if let Some(entry) = maps.policy(&key) {
                *rule = entry.rule;
                return entry.verdict() == Verdict::Allow;
            }
        }
    }
    if question.shapes & (1 << SHAPE_ANY_PROTO) != 0 {
        let key = PolicyKey {
            set: question.set,
            class: question.class,
            port: [0; 2],
            plen: 0,
            proto: 0,
        };
        if let Some(entry) = maps.policy(&key) {
            *rule = entry.rule;
            return entry.verdict() == Verdict::Allow;
        }
    }
    false
}
