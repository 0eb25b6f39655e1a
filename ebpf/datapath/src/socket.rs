//! Socket load balancing: a socket that speaks to a Service is given a backend once, when it
//! connects or sends, instead of every packet being rewritten. What it is told of its peer is
//! translated back.
//!
//! ```text
//! connect, sendto (10.96.0.10:53) ──to_service──> 10.244.1.7:53     BACK, FORTH remembered
//! getpeername, recvfrom <──from_backend── 10.244.1.7:53             looked up in BACK
//! ```
//! The packets carry the backend's address, so policies judge them like any others.
//!
//! What is decided for a destination, the first that applies:
//! 1. it is no Service's, or a protocol that is not served here: left alone;
//! 2. a Pod's socket that has a port already, because its owner bound it or because it is not
//!    connected: left alone. Other flows of that port may go to the same backend, by another Service
//!    or by none, and once all name the backend nobody can tell their answers apart. `from_pod`
//!    gives the later flow another port on the way. A Pod's socket is left to its packets as well
//!    where the Service asks for the client's address (affinity, source ranges), which only they have;
//! 3. a backend that the unconnected socket sends to already, while the Service has it: kept;
//! 4. with affinity, the backend that the node had, if that was recent enough and it still serves;
//! 5. one by a hash of the socket (of its namespace, if the Service has affinity);
//! 6. without any: a Pod's socket is left alone, as its packets are answered by `from_pod`; one of
//!    the node fails at once.
//!
//! All processes of the node are one client: their sockets have no address yet, and would get the
//! node's. It is remembered under the unspecified address.

use hachi_abi::{
    Affinity, AffinityKey, Backend, BackendKey, Member, Service, ServiceFlags, ServiceKey,
    SocketEntry, SocketKey, SocketWay, proto,
};

use crate::service::is_recent;

/// The maps of one family that sockets need. Values are copies.
pub trait Sockets<const N: usize> {
    /// A Service's frontend.
    fn service(&self, key: &ServiceKey<N>) -> Option<Service>;
    /// A Service's backend.
    fn backend(&self, key: &BackendKey) -> Option<Backend<N>>;
    /// Whether a Service has a backend; known of those with affinity and those of UDP.
    fn is_member(&self, member: &Member<N>) -> bool;
    /// Which backend a client had.
    fn affinity(&self, key: &AffinityKey<N>) -> Option<Affinity<N>>;
    /// Remembers a client's backend, if there is room.
    fn put_affinity(&self, key: &AffinityKey<N>, value: &Affinity<N>);
    /// Seconds of the coarse monotonic clock.
    fn now(&self) -> u32;
    /// What a socket was given.
    fn socket(&self, key: &SocketKey<N>) -> Option<SocketEntry<N>>;
    /// Remembers what a socket was given; `false` if the table did not take it.
    fn put_socket(&self, key: &SocketKey<N>, entry: &SocketEntry<N>) -> bool;
}

/// Who connects or sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Socket {
    /// The kernel's number of the socket.
    pub cookie: u64,
    /// The kernel's number of its network namespace.
    pub netns: u64,
    /// IANA protocol number.
    pub proto: u8,
    /// Whether the namespace is the node's own.
    pub node: bool,
    /// Whether it has a port, which it may share with other flows. The kernel chooses one after
    /// `connect` is decided about, and before `sendmsg` is.
    pub bound: bool,
}

/// What becomes of a connection or a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The destination is as it was.
    Unchanged,
    /// The destination is a backend now.
    Given,
    /// No backend: as if the peer had refused (ECONNREFUSED).
    Refused,
    /// No backend that traffic policy lets through (EHOSTUNREACH).
    Unreachable,
}

/// Gives a socket a backend where `addr` and `port` (network order) are a Service's. `keep`: the
/// socket is not connected, so that its next datagram asks again and is to go to the same backend.
#[inline(always)]
pub fn to_service<const N: usize, M: Sockets<N>>(
    maps: &M,
    socket: &Socket,
    addr: &mut [u8; N],
    port: &mut [u8; 2],
    keep: bool,
) -> Answer {
    if !matches!(socket.proto, proto::TCP | proto::UDP) || (socket.bound && !socket.node) {
        return Answer::Unchanged;
    }
    let key = ServiceKey {
        addr: *addr,
        port: *port,
        proto: socket.proto,
        scope: 0,
    };
    let Some(service) = maps.service(&key) else {
        return undefined(maps, socket, key);
    };
    if is_for_packets(socket, &service) {
        return Answer::Unchanged;
    }
    if service.count == 0 {
        return empty(socket, &service);
    }
    let forth = key_of(socket, addr, *port, SocketWay::FORTH);
    if keep && let Some(known) = kept(maps, &forth, &service) {
        *addr = known.addr;
        *port = known.port;
        return Answer::Given;
    }
    let Some(backend) = backend(maps, socket, &service) else {
        return empty(socket, &service);
    };
    remember(maps, socket, &backend, addr, *port);
    if keep {
        let entry = SocketEntry {
            netns: socket.netns.to_ne_bytes(),
            addr: backend.addr,
            port: backend.port,
            pad: [0; 2],
            service: service.id,
        };
        // Where it does not fit, the hash decides again.
        maps.put_socket(&forth, &entry);
    }
    *addr = backend.addr;
    *port = backend.port;
    Answer::Given
}

/// Turns a peer's address and port (network order) into those that the socket knows it by; `false`
/// if they are the same.
#[inline(always)]
pub fn from_backend<const N: usize, M: Sockets<N>>(
    maps: &M,
    socket: &Socket,
    addr: &mut [u8; N],
    port: &mut [u8; 2],
) -> bool {
    let Some(entry) = maps.socket(&key_of(socket, addr, *port, SocketWay::BACK)) else {
        return false;
    };
    *addr = entry.addr;
    *port = entry.port;
    true
}

#[inline(always)]
fn key_of<const N: usize>(socket: &Socket, addr: &[u8; N], port: [u8; 2], way: u8) -> SocketKey<N> {
    SocketKey {
        cookie: socket.cookie.to_ne_bytes(),
        addr: *addr,
        port,
        proto: socket.proto,
        way,
    }
}

/// Remembers what the socket calls a backend.
#[inline(always)]
fn remember<const N: usize, M: Sockets<N>>(
    maps: &M,
    socket: &Socket,
    backend: &Backend<N>,
    addr: &[u8; N],
    port: [u8; 2],
) {
    let entry = SocketEntry {
        netns: socket.netns.to_ne_bytes(),
        addr: *addr,
        port,
        pad: [0; 2],
        service: 0,
    };
    // Where it does not fit, the socket is shown the backend itself.
    maps.put_socket(
        &key_of(socket, &backend.addr, backend.port, SocketWay::BACK),
        &entry,
    );
}

/// The backend that the socket's datagrams to a frontend go to, if the Service still has it.
#[inline(always)]
fn kept<const N: usize, M: Sockets<N>>(
    maps: &M,
    forth: &SocketKey<N>,
    service: &Service,
) -> Option<SocketEntry<N>> {
    let known = maps.socket(forth)?;
    let member = Member {
        service: service.id,
        backend: Backend {
            addr: known.addr,
            port: known.port,
            pad: [0; 2],
        },
    };
    (known.service == service.id && maps.is_member(&member)).then_some(known)
}

/// The backend of a new connection: with affinity that of the node's last one.
#[inline(always)]
fn backend<const N: usize, M: Sockets<N>>(
    maps: &M,
    socket: &Socket,
    service: &Service,
) -> Option<Backend<N>> {
    if service.affinity == 0 {
        return chosen(maps, socket, service);
    }
    let key = AffinityKey {
        service: service.id,
        client: [0; N],
    };
    let now = maps.now();
    let had = maps.affinity(&key).filter(|known| {
        let member = Member {
            service: service.id,
            backend: known.backend,
        };
        is_recent(known.last_used, now, service.affinity) && maps.is_member(&member)
    });
    let backend = match had {
        Some(known) => known.backend,
        None => chosen(maps, socket, service)?,
    };
    let value = Affinity {
        backend,
        last_used: now,
    };
    maps.put_affinity(&key, &value);
    Some(backend)
}

/// The backend that a hash of the socket chooses.
#[inline(always)]
fn chosen<const N: usize, M: Sockets<N>>(
    maps: &M,
    socket: &Socket,
    service: &Service,
) -> Option<Backend<N>> {
    maps.backend(&BackendKey {
        service: service.id,
        slot: choose(socket, service),
    })
}

/// The slot of a socket.
#[inline(always)]
fn choose(socket: &Socket, service: &Service) -> u32 {
    let who = if service.affinity == 0 {
        socket.cookie
    } else {
        socket.netns
    };
    let hash = mix(who ^ (u64::from(service.id) << 32));
    // The upper half of the product is as even as the hash is.
    (((hash >> 32) * u64::from(service.count)) >> 32) as u32
}

/// The finalizer of SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number
/// generators"), which spreads every bit over all of them.
#[inline(always)]
const fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Whether a Service asks for the client's address, which a Pod's socket may not have yet.
#[inline(always)]
fn is_for_packets(socket: &Socket, service: &Service) -> bool {
    !socket.node && (service.affinity != 0 || service.flags & ServiceFlags::SOURCE_RANGES != 0)
}

/// The Service has no backend.
#[inline(always)]
fn empty(socket: &Socket, service: &Service) -> Answer {
    if !socket.node {
        Answer::Unchanged
    } else if service.flags & ServiceFlags::DROP_WHEN_EMPTY == 0 {
        Answer::Refused
    } else {
        Answer::Unreachable
    }
}

/// No Service has this port: the whole address may be a Service's.
#[inline(always)]
fn undefined<const N: usize, M: Sockets<N>>(
    maps: &M,
    socket: &Socket,
    mut key: ServiceKey<N>,
) -> Answer {
    if !socket.node {
        return Answer::Unchanged;
    }
    key.port = [0; 2];
    key.proto = 0;
    match maps.service(&key) {
        Some(service) => empty(socket, &service),
        None => Answer::Unchanged,
    }
}
