//! Which backend a new flow of a Service goes to.

use hachi_abi::{BackendKey, CtEntry, CtFlags, Reason, ServiceKey, Tuple, proto};

use crate::{scratch::Scratch, traits::Maps};

/// For how long a repeated SYN keeps the backend of the first one, in seconds: a client's kernel
/// repeats after 1 s, and its answer may be under way. Later repeats choose anew, for the backend
/// may be dead.
const SYN_KEEPS_BACKEND: u32 = 3;

/// Chooses the backend for a new flow into the entry's `nat_addr` and `nat_port`; `false` if its
/// destination is no Service.
///
/// # Errors
/// [`Reason::NoBackend`] if the Service has none.
#[inline(always)]
pub(crate) fn choose<const N: usize, M: Maps<N>>(
    maps: &M,
    scratch: &mut Scratch<N>,
) -> Result<bool, Reason> {
    let tuple = &scratch.parsed.tuple;
    if !matches!(tuple.proto, proto::TCP | proto::UDP | proto::SCTP) {
        return Ok(false);
    }
    let key = ServiceKey {
        addr: tuple.dst,
        port: tuple.dport,
        proto: tuple.proto,
        scope: 0,
    };
    let Some(service) = maps.service(&key) else {
        return Ok(false);
    };
    if service.count == 0 {
        return Err(Reason::NoBackend);
    }
    if scratch.parsed.opens() && kept(maps, tuple, &mut scratch.entry) {
        return Ok(true);
    }
    let slot = maps.random() % service.count;
    let backend = maps
        .backend(&BackendKey {
            service: service.id,
            slot,
        })
        .ok_or(Reason::NoBackend)?;
    scratch.entry.nat_addr = backend.addr;
    scratch.entry.nat_port = backend.port;
    Ok(true)
}

/// The backend that this connection's first SYN was sent to a moment ago.
#[inline(always)]
fn kept<const N: usize, M: Maps<N>>(maps: &M, tuple: &Tuple<N>, entry: &mut CtEntry<N>) -> bool {
    if !maps.flow(tuple, entry) {
        return false;
    }
    let young = maps.now().wrapping_sub(entry.last_seen) < SYN_KEEPS_BACKEND;
    let ours = entry.flags & (CtFlags::NAT | CtFlags::REPLY | CtFlags::CLOSING) == CtFlags::NAT;
    young && ours
}
