//! Whether policy lets a flow be.
//!
//! Precedence, first match decides:
//! 1. a Pod always reaches itself;
//! 2. the sender, if it is a Pod of this node isolated on egress, must allow the receiver's class;
//! 3. the receiver, if it is a Pod of this node isolated on ingress, must allow the sender's
//!    class, unless the sender is this node;
//! 4. what is left is allowed.

use hachi_abi::{
    CLASS_WORLD, Endpoint, Peer, PeerFlags, PolicyEntry, PolicyKey, RULE_NONE, Reason,
    SET_ALLOW_ALL, SHAPE_ANY_PROTO, Shapes, Tuple, Verdict,
};

use crate::traits::Maps;

/// The rules that allowed a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allowed {
    /// Of the sender's egress, or [`RULE_NONE`].
    pub egress_rule: u32,
    /// Of the receiver's ingress, or [`RULE_NONE`].
    pub ingress_rule: u32,
}

/// What denied a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Denied {
    /// [`Reason::PolicyEgress`] or [`Reason::PolicyIngress`].
    pub reason: Reason,
    /// The rule that denied, or [`RULE_NONE`] when none allowed.
    pub rule: u32,
}

/// What is asked of one policy set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Question {
    /// The set.
    pub set: u32,
    /// The kinds of entry that it has.
    pub shapes: Shapes,
    /// The other side's class.
    pub class: u32,
    /// Destination port, network order.
    pub port: [u8; 2],
    /// IANA protocol number.
    pub proto: u8,
}

/// Judges a flow by its opener's tuple, after translation of a Service's address.
///
/// # Errors
/// Who denied it.
#[inline(always)]
pub fn judge<const N: usize, M: Maps<N>>(maps: &M, opener: &Tuple<N>) -> Result<Allowed, Denied> {
    let mut allowed = Allowed {
        egress_rule: RULE_NONE,
        ingress_rule: RULE_NONE,
    };
    if opener.src == opener.dst {
        return Ok(allowed);
    }
    if let Some(sender) = maps.endpoint(&opener.src)
        && sender.egress_set != SET_ALLOW_ALL
    {
        let peer = class(maps, &opener.dst);
        allowed.egress_rule =
            side(maps, &egress(&sender, peer.class, opener)).map_err(|rule| Denied {
                reason: Reason::PolicyEgress,
                rule,
            })?;
    }
    if let Some(receiver) = maps.endpoint(&opener.dst)
        && receiver.ingress_set != SET_ALLOW_ALL
    {
        let peer = class(maps, &opener.src);
        if peer.flags & PeerFlags::LOCAL_NODE == 0 {
            allowed.ingress_rule =
                side(maps, &ingress(&receiver, peer.class, opener)).map_err(|rule| Denied {
                    reason: Reason::PolicyIngress,
                    rule,
                })?;
        }
    }
    Ok(allowed)
}

#[inline(always)]
fn egress<const N: usize>(sender: &Endpoint, class: u32, opener: &Tuple<N>) -> Question {
    Question {
        set: sender.egress_set,
        shapes: sender.egress_shapes,
        class,
        port: opener.dport,
        proto: opener.proto,
    }
}

#[inline(always)]
fn ingress<const N: usize>(receiver: &Endpoint, class: u32, opener: &Tuple<N>) -> Question {
    Question {
        set: receiver.ingress_set,
        shapes: receiver.ingress_shapes,
        class,
        port: opener.dport,
        proto: opener.proto,
    }
}

/// The class of an address: its own, or that of the block around it, or the world's.
#[inline(always)]
fn class<const N: usize, M: Maps<N>>(maps: &M, addr: &[u8; N]) -> Peer {
    match maps.peer(addr) {
        Some(peer) => peer,
        None => maps.block(addr).unwrap_or(Peer {
            class: CLASS_WORLD,
            flags: 0,
        }),
    }
}

/// The rule that allows, or the rule that denies.
#[inline(always)]
fn side<const N: usize, M: Maps<N>>(maps: &M, question: &Question) -> Result<u32, u32> {
    match verdict(question, |key| maps.policy(key)) {
        Some(entry) => match entry.verdict() {
            Verdict::Allow => Ok(entry.rule),
            Verdict::Deny => Err(entry.rule),
        },
        None => Err(RULE_NONE),
    }
}

/// The entry that decides: the protocol with the longest port prefix, then any protocol. Kinds of
/// entry that the set does not have are not looked up.
#[inline(always)]
pub fn verdict(
    question: &Question,
    lookup: impl Fn(&PolicyKey) -> Option<PolicyEntry>,
) -> Option<PolicyEntry> {
    let port = u16::from_be_bytes(question.port);
    let mut key = PolicyKey {
        set: question.set,
        class: question.class,
        port: question.port,
        plen: 16,
        proto: question.proto,
    };
    let mut plen = 17;
    while plen > 0 {
        plen -= 1;
        if question.shapes & (1 << plen) != 0 {
            key.plen = plen as u8;
            key.port = ((u32::from(port) & !(0xffff_u32 >> plen)) as u16).to_be_bytes();
            if let Some(entry) = lookup(&key) {
                return Some(entry);
            }
        }
    }
    if question.shapes & (1 << SHAPE_ANY_PROTO) != 0 {
        key.plen = 0;
        key.port = [0; 2];
        key.proto = 0;
        return lookup(&key);
    }
    None
}
