//! Policy sets: `(set, class, protocol, port) -> verdict`, in one flat hash.
//!
//! A *set* is the content of all rules that select a Pod in one direction; Pods selected alike
//! share one. A *class* is a set of addresses that no rule in force can tell apart. Both ids are
//! derived from their content, so an entry never changes its meaning: a change of policy adds
//! entries, then switches the endpoint to another set with a single write, and only then deletes.
//!
//! Match precedence of one packet in one set, first hit wins:
//! 1. its protocol, the longest matching port prefix (16 bits: exactly this port) down to 0 bits
//!    (every port),
//! 2. any protocol (`proto` 0, `port` 0, `plen` 0),
//! 3. nothing found: deny.

/// The set id that stands for "not isolated": no lookup, allowed.
pub const SET_ALLOW_ALL: u32 = 0;

/// The class of every address that matches no selector and no block in force.
pub const CLASS_WORLD: u32 = 0;

/// No rule: the verdict needed none.
pub const RULE_NONE: u32 = 0;

/// Which of the kinds of entry a policy set has, so that a lookup skips those it lacks: bit `p`
/// (0 to 16) for entries with a protocol and a port prefix of `p` bits, bit 17 for any protocol.
pub type Shapes = u32;

/// The [`Shapes`] bit of entries for any protocol.
pub const SHAPE_ANY_PROTO: u32 = 17;

/// Key of the `POLICY` map.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PolicyKey {
    /// The policy set.
    pub set: u32,
    /// The peer's class: the source's on ingress, the destination's on egress.
    pub class: u32,
    /// Destination port, network order, bits after the prefix zero.
    pub port: [u8; 2],
    /// Length of the port prefix in bits, 0 to 16.
    pub plen: u8,
    /// IANA protocol number, 0 for any.
    pub proto: u8,
}

/// Value of the `POLICY` map.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PolicyEntry {
    /// A [`Verdict`] as a number; anything unknown denies.
    pub verdict: u32,
    /// The rule that decided, for flow records and `hachi policy trace`.
    pub rule: u32,
}

/// What a policy entry says.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Verdict {
    /// Drop the packet.
    Deny = 0,
    /// Let the flow pass, and its replies.
    Allow = 1,
}

impl PolicyEntry {
    /// The verdict; an unknown number denies.
    #[must_use]
    pub const fn verdict(&self) -> Verdict {
        if self.verdict == Verdict::Allow as u32 {
            Verdict::Allow
        } else {
            Verdict::Deny
        }
    }
}

const _: () = assert!(size_of::<PolicyKey>() == 12);
const _: () = assert!(size_of::<PolicyEntry>() == 8);
