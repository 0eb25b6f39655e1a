//! Working memory of one packet, kept off the 512 bytes of stack that a BPF program has.

use hachi_abi::{CtEntry, NatEntry, Tuple};

use crate::parse::Parsed;

/// What happened to a packet beyond its outcome.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// It did not get as far as a tuple.
    Unknown = 0,
    /// Its tuple is in [`Scratch::parsed`].
    Parsed = 1,
    /// And it opened a flow, whose entry is in [`Scratch::entry`].
    Opened = 2,
}

/// What is known of the packet under decision. All zeros is a valid value; what an earlier packet
/// left behind is never read.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Scratch<const N: usize> {
    /// The packet.
    pub parsed: Parsed<N>,
    /// Its tuple once it is rewritten.
    pub after: Tuple<N>,
    /// The tuple of its answer, under which the other half is tracked.
    pub reply: Tuple<N>,
    /// The tuple to judge: the opener's, behind the Service.
    pub opener: Tuple<N>,
    /// Its half of the flow.
    pub entry: CtEntry<N>,
    /// The other half.
    pub other: CtEntry<N>,
    /// An entry that is in the table already.
    pub known: CtEntry<N>,
    /// Its half of a translation.
    pub nat: NatEntry<N>,
    /// The other half.
    pub other_nat: NatEntry<N>,
    /// A half that is in the table already.
    pub known_nat: NatEntry<N>,
    /// The node's address on the uplink.
    pub address: [u8; N],
    /// Where the packet goes, of what leaves the node.
    pub target: [u8; N],
    /// 1 if the packet belongs to a translation.
    pub translated: u32,
    /// What decides which port a translated flow is given.
    pub port: u32,
    /// The port that an earlier packet of the flow was given, network order; zeros: none.
    pub wanted: [u8; 2],
    /// Zero.
    pub pad: [u8; 2],
    /// The time, in seconds.
    pub now: u32,
    /// The rule of the sender's egress that allowed the opener.
    pub egress_rule: u32,
    /// The rule of the receiver's ingress that allowed the opener.
    pub ingress_rule: u32,
    /// The Service's id.
    pub service: u32,
    /// Its number of backends; 0 if the packet goes to no Service.
    pub backends: u32,
    /// The slot that is tried first.
    pub slot: u32,
    /// The Service's session affinity in seconds; 0 for none.
    pub affinity: u32,
    /// 1: the backend that the client had is in [`Scratch::entry`] and comes before any slot.
    pub had: u32,
    /// 1: no program of this node has met the packet before it came to where it is judged.
    pub fresh: u32,
    /// Where the packet comes from, as far as Services go: a value of [`hachi_abi::Scope`].
    pub scope: u32,
    /// 1: it comes from the node itself, whose processes are one client.
    pub node: u32,
    /// What this packet's record in a log could say.
    pub event: Event,
}
