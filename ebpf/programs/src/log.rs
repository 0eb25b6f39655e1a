//! Log records, by aya-log.
//!
//! The level is the global `AYA_LOG_LEVEL` (1: errors, to 5: traces), which the loader sets before
//! it loads the object. The verifier knows its value and removes what it turns off: with 0 a log
//! statement costs one load of a constant. Records go to user space by the map `AYA_LOGS`.
//!
//! Reasons are written as numbers: a name of any length costs the verifier of Linux 6.1 hundreds of
//! thousands of instructions. The agent puts the name in their place (`agent/kernel/src/logs.rs`).
//!
//! | level | records |
//! |---|---|
//! | info | every drop, with its reason |
//! | debug | new flows and drops, with their tuples |
//! | trace | every packet |

use aya_log_ebpf::{
    debug, info,
    macro_support::{Level, level_enabled},
    trace,
};
use hachi_abi::Tuple;
use hachi_datapath::{Event, Packet as _, Scratch};

use crate::{
    action::{Action, Kind},
    packet::Skb,
};

/// The record of any packet.
#[inline(always)]
pub(crate) fn record(skb: &Skb, action: &Action) {
    match action.kind() {
        Kind::Pass => trace!((), "pass reason={} on {}", action.reason(), skb.ifindex()),
        Kind::Redirect => trace!((), "deliver from {} to {}", skb.ifindex(), action.ifindex()),
        Kind::Forward => trace!((), "forward from {} by {}", skb.ifindex(), action.ifindex()),
        Kind::Answer => debug!((), "reject on {}", skb.ifindex()),
        Kind::Out => trace!(
            (),
            "reason={} from {} by {}",
            action.reason(),
            skb.ifindex(),
            action.ifindex()
        ),
        Kind::Drop => info!((), "drop reason={} on {}", action.reason(), skb.ifindex()),
    }
}

macro_rules! detail {
    ($name:ident, $record:ident, $n:literal) => {
        /// The record of a packet whose tuple is known.
        #[inline(always)]
        pub(crate) fn $name(scratch: &Scratch<$n>, action: &Action) {
            if !level_enabled(Level::Debug) {
                return;
            }
            match (scratch.event, action.kind()) {
                (Event::Opened, _) => $record(&scratch.parsed.tuple, "opened"),
                (Event::Parsed, Kind::Drop) => $record(&scratch.parsed.tuple, "refused"),
                (Event::Parsed | Event::Unknown, _) => {}
            }
        }

        // Not inlined: a record is built on the stack.
        #[inline(never)]
        fn $record(tuple: &Tuple<$n>, what: &'static str) {
            debug!(
                (),
                "{} {:i} {} -> {:i} {} protocol {}",
                what,
                tuple.src,
                u16::from_be_bytes(tuple.sport),
                tuple.dst,
                u16::from_be_bytes(tuple.dport),
                tuple.proto
            );
        }
    };
}

detail!(detail_v4, record_v4, 4);
detail!(detail_v6, record_v6, 16);
