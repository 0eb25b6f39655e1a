//! Why a packet went where it went. The same name stands in the counter, the metric and the CLI.

macro_rules! reasons {
    ($($(#[doc = $doc:literal])* $name:ident = $value:literal => $text:literal, $drop:literal;)*) => {
        /// The outcome of one packet, with its index in the `COUNTERS` map.
        #[repr(u8)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Reason {
            $($(#[doc = $doc])* $name = $value,)*
        }

        impl Reason {
            /// Every reason, in the order of its number.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];
            /// The number of reasons.
            pub const COUNT: u32 = Self::ALL.len() as u32;

            /// The stable name in snake case, as metrics and the CLI print it.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            /// Whether the packet was dropped.
            #[must_use]
            pub const fn is_drop(self) -> bool {
                match self { $(Self::$name => $drop,)* }
            }
        }
    };
}

reasons! {
    /// Delivered to a Pod of this node.
    DeliveredLocal = 0 => "delivered_local", false;
    /// Handed to the host's stack, which routes it or takes it in.
    PassedToStack = 1 => "passed_to_stack", false;
    /// Let through to the Pod on the way out of the host's stack.
    DeliveredFromStack = 2 => "delivered_from_stack", false;
    /// Not IP (ARP): left to the host's stack.
    NotIp = 3 => "not_ip", false;
    /// A header is cut short or contradicts itself.
    Malformed = 4 => "malformed", true;
    /// A Pod sent from an address or a MAC address that is not its own.
    SpoofedSource = 5 => "spoofed_source", true;
    /// A VLAN tag, or another link protocol that a Pod has no business with.
    UnsupportedLink = 6 => "unsupported_link", true;
    /// An extension header chain that is too long or not understood.
    UnsupportedHeader = 7 => "unsupported_header", true;
    /// The sender's egress policy does not allow the flow.
    PolicyEgress = 8 => "policy_egress", true;
    /// The receiver's ingress policy does not allow the flow.
    PolicyIngress = 9 => "policy_ingress", true;
    /// A Service without a usable endpoint.
    NoBackend = 10 => "no_backend", true;
    /// A later fragment whose first fragment was not seen.
    FragmentUnknown = 11 => "fragment_unknown", true;
    /// The conntrack table did not take the flow.
    ConntrackFull = 12 => "conntrack_full", true;
    /// An ICMP error that belongs to no known flow.
    IcmpUnrelated = 13 => "icmp_unrelated", true;
    /// A rewrite of the packet failed.
    RewriteFailed = 14 => "rewrite_failed", true;
    /// The agent has not configured the datapath.
    NotConfigured = 15 => "not_configured", true;
    /// From the host's stack to an address that is no Pod behind this interface.
    UnknownEndpoint = 16 => "unknown_endpoint", true;
    /// Replies could not be told from those of another live flow of the same client port, with
    /// any other port that was tried.
    TupleInUse = 17 => "tuple_in_use", true;
    /// A rewrite that the packet's protocol or headers do not permit.
    UnsupportedRewrite = 18 => "unsupported_rewrite", true;
    /// To a Service without a usable endpoint, answered with a TCP reset or an ICMP error.
    Rejected = 19 => "rejected", false;
    /// Forwarded to another node or to the outside, past the host's stack.
    Forwarded = 20 => "forwarded", false;
    /// Left the node by an uplink as it was.
    PassedToNetwork = 21 => "passed_to_network", false;
    /// Left the node by an uplink, translated.
    Translated = 22 => "translated", false;
    /// No port is left under which the flow could leave the node.
    NatExhausted = 23 => "nat_exhausted", true;
    /// The client is outside the source ranges of a load balancer's address.
    SourceRange = 24 => "source_range", true;
    /// A tunnel packet that does not come from a node of the cluster.
    TunnelSource = 25 => "tunnel_source", true;
}
