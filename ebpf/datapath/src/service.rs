//! Which backend a new flow of a Service goes to.
//!
//! Precedence, first match decides:
//! 1. a source outside the Service's ranges is dropped;
//! 2. without a backend the packet is rejected, or dropped where the Service says so;
//! 3. with affinity, the backend that the client had, if that was recent enough and it still serves;
//! 4. with a table, what the table says: every node has the same one;
//! 5. a slot by the flow's hash.
//!
//! The hash is of the flow, so a SYN that is sent again goes where the first one went as long as the
//! Service's backends stay the same, and never to one that is gone. It is the same on every node: the
//! frontend's address, which is each node's own for a node port, is no part of it.

use hachi_abi::{
    Affinity, AffinityKey, Backend, BackendKey, MAGLEV_PIECE, MaglevKey, Member, PeerFlags,
    RangeKey, Reason, Scope, Service, ServiceFlags, ServiceKey, Tuple,
};

use crate::{
    hash::{address, finish, mix},
    judge::class,
    parse::has_ports,
    scratch::Scratch,
    traits::Maps,
};

/// The Service that owns a destination, for packets of one of [`hachi_abi::Scope`].
#[inline(always)]
pub(crate) fn frontend<const N: usize, M: Maps<N>>(
    maps: &M,
    tuple: &Tuple<N>,
    scope: u8,
) -> Option<Service> {
    let key = ServiceKey {
        addr: tuple.dst,
        port: tuple.dport,
        proto: tuple.proto,
        scope,
    };
    maps.service(&key)
}

/// Looks the packet's destination up; leaves the Service's number of backends (0: it is no
/// Service) and its first choice among them in `scratch`, whose `now` must be set.
///
/// # Errors
/// [`Reason::Rejected`] if the Service has no backend, or not this port, and the client is to be
/// told; [`Reason::NoBackend`] if not; [`Reason::SourceRange`].
#[inline(never)]
pub(crate) fn find<const N: usize, M: Maps<N>>(
    maps: &M,
    scratch: &mut Scratch<N>,
) -> Result<(), Reason> {
    scratch.backends = 0;
    let tuple = &scratch.parsed.tuple;
    if !has_ports(tuple.proto) {
        return Ok(());
    }
    let Some(service) = frontend(maps, tuple, scratch.scope as u8) else {
        return undefined(maps, scratch);
    };
    if service.flags & ServiceFlags::SOURCE_RANGES != 0 && !may_use(maps, &service, &tuple.src) {
        return Err(Reason::SourceRange);
    }
    if service.count == 0 {
        return Err(if service.flags & ServiceFlags::DROP_WHEN_EMPTY == 0 {
            Reason::Rejected
        } else {
            Reason::NoBackend
        });
    }
    scratch.service = service.id;
    scratch.backends = service.count;
    scratch.affinity = service.affinity;
    scratch.had = 0;
    if service.affinity != 0 {
        remembered(maps, scratch);
    }
    scratch.slot = slot(maps, &service, &scratch.parsed.tuple);
    Ok(())
}

/// No Service has this port; the whole address may be one's.
#[inline(always)]
fn undefined<const N: usize, M: Maps<N>>(maps: &M, scratch: &Scratch<N>) -> Result<(), Reason> {
    if scratch.scope != u32::from(Scope::INTERNAL) {
        return Ok(());
    }
    if is_address(maps, &scratch.parsed.tuple.dst) {
        return Err(Reason::Rejected);
    }
    Ok(())
}

/// Whether a whole address is a Service's, whatever the port.
#[inline(always)]
pub(crate) fn is_address<const N: usize, M: Maps<N>>(maps: &M, addr: &[u8; N]) -> bool {
    let key = ServiceKey {
        addr: *addr,
        port: [0; 2],
        proto: 0,
        scope: Scope::INTERNAL,
    };
    maps.service(&key).is_some()
}

/// Whether a source may use a Service with source ranges: the node itself always may.
#[inline(always)]
pub(crate) fn may_use<const N: usize, M: Maps<N>>(
    maps: &M,
    service: &Service,
    source: &[u8; N],
) -> bool {
    let key = RangeKey {
        service: service.id.to_ne_bytes(),
        source: *source,
    };
    maps.is_in_range(&key) || class(maps, source).flags & PeerFlags::LOCAL_NODE != 0
}

/// Takes the backend that the client had, if it is to have it again.
#[inline(never)]
fn remembered<const N: usize, M: Maps<N>>(maps: &M, scratch: &mut Scratch<N>) {
    let Some(known) = maps.affinity(&affinity_key(scratch)) else {
        return;
    };
    if !is_recent(known.last_used, scratch.now, scratch.affinity) {
        return;
    }
    let member = Member {
        service: scratch.service,
        backend: known.backend,
    };
    if maps.is_member(&member) {
        scratch.had = 1;
        scratch.entry.nat_addr = known.backend.addr;
        scratch.entry.nat_port = known.backend.port;
    }
}

/// Whether a client's last flow was so short a time ago, in seconds, that it is to have its backend
/// again.
#[inline(always)]
pub(crate) const fn is_recent(last_used: u32, now: u32, timeout: u32) -> bool {
    let age = now.wrapping_sub(last_used);
    // Another CPU may have noted a time that this one has not seen begin.
    age <= timeout || age == u32::MAX
}

#[inline(always)]
fn affinity_key<const N: usize>(scratch: &Scratch<N>) -> AffinityKey<N> {
    AffinityKey {
        service: scratch.service,
        // As of the node's sockets, which have no address yet when they are given a backend.
        client: if scratch.node == 0 {
            scratch.parsed.tuple.src
        } else {
            [0; N]
        },
    }
}

/// Remembers the backend of a flow that is tracked, for the client's next one.
#[inline(always)]
pub(crate) fn remember<const N: usize, M: Maps<N>>(maps: &M, scratch: &Scratch<N>) {
    if scratch.backends == 0 || scratch.affinity == 0 {
        return;
    }
    let backend = Backend {
        addr: scratch.entry.nat_addr,
        port: scratch.entry.nat_port,
        pad: [0; 2],
    };
    let value = Affinity {
        backend,
        last_used: scratch.now,
    };
    maps.put_affinity(&affinity_key(scratch), &value);
}

/// The slot that comes first for a flow.
#[inline(always)]
fn slot<const N: usize, M: Maps<N>>(maps: &M, service: &Service, tuple: &Tuple<N>) -> u32 {
    let of_client = address(service.id, &tuple.src);
    let ports = u32::from_ne_bytes([
        tuple.sport[0],
        tuple.sport[1],
        tuple.dport[0],
        tuple.dport[1],
    ]);
    if service.table != 0 {
        // With affinity the node that a packet happens to arrive at must not matter.
        let ports = if service.affinity == 0 { ports } else { 0 };
        let place = share(finish(mix(of_client, ports)), service.table);
        let key = MaglevKey {
            service: service.id,
            piece: place / MAGLEV_PIECE as u32,
        };
        if let Some(slot) = maps.maglev(&key, place as usize % MAGLEV_PIECE)
            && u32::from(slot) < service.count
        {
            return u32::from(slot);
        }
        // The table is half written.
    }
    share(finish(mix(of_client, ports)), service.count)
}

/// Puts the backend into the entry's `nat_addr` and `nat_port`.
///
/// # Errors
/// [`Reason::NoBackend`] if it is not in its slot.
#[inline(always)]
pub(crate) fn choose<const N: usize, M: Maps<N>>(
    maps: &M,
    scratch: &mut Scratch<N>,
) -> Result<(), Reason> {
    if scratch.had != 0 {
        return Ok(());
    }
    let slot = scratch.slot;
    let backend = maps
        .backend(&BackendKey {
            service: scratch.service,
            slot,
        })
        .ok_or(Reason::NoBackend)?;
    scratch.entry.nat_addr = backend.addr;
    scratch.entry.nat_port = backend.port;
    Ok(())
}

/// A number below `of`, as even as the hash is.
#[inline(always)]
const fn share(hash: u32, of: u32) -> u32 {
    ((hash as u64 * of as u64) >> 32) as u32
}
