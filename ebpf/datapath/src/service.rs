//! Which backend a new flow of a Service goes to.
//!
//! The choice is a hash of the flow, so a SYN that is sent again goes where the first one went as
//! long as the Service's backends stay the same, and never to one that is gone. A Service with
//! affinity hashes the client's address alone.

use hachi_abi::{BackendKey, Reason, Service, ServiceFlags, ServiceKey, Tuple};

use crate::{parse::has_ports, scratch::Scratch, traits::Maps};

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
/// Service) and the hash that chooses among them in `scratch`.
///
/// # Errors
/// [`Reason::Rejected`] if the Service has no backend and the client is to be told;
/// [`Reason::NoBackend`] if not.
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
        return Ok(());
    };
    if service.count == 0 {
        return Err(if service.flags & ServiceFlags::DROP_WHEN_EMPTY == 0 {
            Reason::Rejected
        } else {
            Reason::NoBackend
        });
    }
    scratch.service = service.id;
    scratch.backends = service.count;
    let ports = if service.affinity == 0 {
        u32::from_ne_bytes([
            tuple.sport[0],
            tuple.sport[1],
            tuple.dport[0],
            tuple.dport[1],
        ])
    } else {
        0
    };
    scratch.hash = finish(mix(address(service.id, &tuple.src), ports));
    Ok(())
}

/// Puts the backend of the `attempt`th try into the entry's `nat_addr` and `nat_port`.
///
/// # Errors
/// [`Reason::NoBackend`] if it is not in its slot.
#[inline(always)]
pub(crate) fn choose<const N: usize, M: Maps<N>>(
    maps: &M,
    scratch: &mut Scratch<N>,
    attempt: u32,
) -> Result<(), Reason> {
    let Scratch {
        service,
        backends,
        hash,
        entry,
        ..
    } = scratch;
    // The upper half of the product is as even as the hash is.
    let first = ((u64::from(*hash) * u64::from(*backends)) >> 32) as u32;
    let mut slot = first + attempt;
    if slot >= *backends {
        slot -= *backends;
    }
    let backend = maps
        .backend(&BackendKey {
            service: *service,
            slot,
        })
        .ok_or(Reason::NoBackend)?;
    entry.nat_addr = backend.addr;
    entry.nat_port = backend.port;
    Ok(())
}

/// One round of MurmurHash3 (32 bits, by Appleby).
#[inline(always)]
const fn mix(hash: u32, word: u32) -> u32 {
    let word = word
        .wrapping_mul(0xcc9e_2d51)
        .rotate_left(15)
        .wrapping_mul(0x1b87_3593);
    (hash ^ word)
        .rotate_left(13)
        .wrapping_mul(5)
        .wrapping_add(0xe654_6b64)
}

/// MurmurHash3's last step, which spreads every bit over all of them.
#[inline(always)]
const fn finish(mut hash: u32) -> u32 {
    hash ^= hash >> 16;
    hash = hash.wrapping_mul(0x85eb_ca6b);
    hash ^= hash >> 13;
    hash = hash.wrapping_mul(0xc2b2_ae35);
    hash ^ (hash >> 16)
}

#[inline(always)]
fn address<const N: usize>(mut hash: u32, addr: &[u8; N]) -> u32 {
    let mut i = 0;
    while i + 3 < N {
        hash = mix(
            hash,
            u32::from_ne_bytes([addr[i], addr[i + 1], addr[i + 2], addr[i + 3]]),
        );
        i += 4;
    }
    hash
}
