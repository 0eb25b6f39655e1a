//! Log records, by aya-log.
//!
//! The level is the global `AYA_LOG_LEVEL` (1: errors, to 5: traces), which the loader sets before
//! it loads the object. The verifier knows its value and removes what it turns off: with 0 a log
//! statement costs one load of a constant. Records go to user space by the map `AYA_LOGS`.
//!
//! | level | records |
//! |---|---|
//! | info | every drop, with its reason |
//! | debug | new flows and drops, with their tuples |
//! | trace | every packet |

use aya_log_ebpf::{debug, info, macro_support::level_enabled, trace};
use hachi_abi::{CtEntry, Reason, Tuple};
use hachi_datapath::Packet as _;

use crate::packet::Skb;

#[inline(always)]
pub(crate) fn passed(skb: &Skb, reason: Reason) {
    trace!(skb, "pass {} on {}", reason.name(), skb.ifindex());
}

#[inline(always)]
pub(crate) fn delivered(skb: &Skb, ifindex: u32) {
    trace!(skb, "deliver from {} to {}", skb.ifindex(), ifindex);
}

#[inline(always)]
pub(crate) fn answered(skb: &Skb) {
    debug!(skb, "reject on {}", skb.ifindex());
}

#[inline(always)]
pub(crate) fn dropped(skb: &Skb, reason: Reason) {
    info!(skb, "drop {} on {}", reason.name(), skb.ifindex());
}

/// Whether records with tuples are wanted.
#[inline(always)]
fn in_detail() -> bool {
    level_enabled(aya_log_ebpf::macro_support::Level::Debug)
}

macro_rules! tuples {
    ($opened:ident, $opened_record:ident, $refused:ident, $refused_record:ident, $n:literal) => {
        #[inline(always)]
        pub(crate) fn $opened(tuple: &Tuple<$n>, entry: &CtEntry<$n>) {
            if in_detail() {
                $opened_record(tuple, entry);
            }
        }

        // Not inlined: a record is built on the stack.
        #[inline(never)]
        fn $opened_record(tuple: &Tuple<$n>, entry: &CtEntry<$n>) {
            debug!(
                (),
                "new flow {:i} {} -> {:i} {} proto {} rules {} {}",
                tuple.src,
                u16::from_be_bytes(tuple.sport),
                tuple.dst,
                u16::from_be_bytes(tuple.dport),
                tuple.proto,
                entry.egress_rule,
                entry.ingress_rule
            );
        }

        #[inline(always)]
        pub(crate) fn $refused(tuple: &Tuple<$n>, reason: Reason) {
            if in_detail() {
                $refused_record(tuple, reason);
            }
        }

        #[inline(never)]
        fn $refused_record(tuple: &Tuple<$n>, reason: Reason) {
            debug!(
                (),
                "refuse {:i} {} -> {:i} {} proto {} reason {}",
                tuple.src,
                u16::from_be_bytes(tuple.sport),
                tuple.dst,
                u16::from_be_bytes(tuple.dport),
                tuple.proto,
                reason as u8
            );
        }
    };
}

tuples!(
    opened_v4,
    opened_record_v4,
    refused_v4,
    refused_record_v4,
    4
);
tuples!(
    opened_v6,
    opened_record_v6,
    refused_v6,
    refused_record_v6,
    16
);
