//! Sockets that speak to Services: whom they are given.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeSet, HashMap, HashSet},
};

use hachi_abi::{
    Affinity, AffinityKey, Backend, BackendKey, Member, Service, ServiceFlags, ServiceKey,
    SocketEntry, SocketKey, proto,
};
use hachi_datapath::{Answer, Socket, Sockets, to_service};

#[derive(Default)]
struct Tables {
    service: Service,
    backends: RefCell<Vec<Backend<4>>>,
    members: RefCell<HashSet<Backend<4>>>,
    affinity: RefCell<HashMap<AffinityKey<4>, Affinity<4>>>,
    sockets: RefCell<HashMap<SocketKey<4>, SocketEntry<4>>>,
    now: Cell<u32>,
}

const SERVICE: [u8; 4] = [10, 96, 0, 1];

impl Sockets<4> for Tables {
    fn service(&self, key: &ServiceKey<4>) -> Option<Service> {
        (key.addr == SERVICE).then_some(self.service)
    }

    fn backend(&self, key: &BackendKey) -> Option<Backend<4>> {
        self.backends.borrow().get(key.slot as usize).copied()
    }

    fn is_member(&self, member: &Member<4>) -> bool {
        member.service == self.service.id && self.members.borrow().contains(&member.backend)
    }

    fn affinity(&self, key: &AffinityKey<4>) -> Option<Affinity<4>> {
        self.affinity.borrow().get(key).copied()
    }

    fn put_affinity(&self, key: &AffinityKey<4>, value: &Affinity<4>) {
        self.affinity.borrow_mut().insert(*key, *value);
    }

    fn now(&self) -> u32 {
        self.now.get()
    }

    fn socket(&self, key: &SocketKey<4>) -> Option<SocketEntry<4>> {
        self.sockets.borrow().get(key).copied()
    }

    fn put_socket(&self, key: &SocketKey<4>, entry: &SocketEntry<4>) -> bool {
        self.sockets.borrow_mut().insert(*key, *entry);
        true
    }
}

impl Tables {
    fn new(service: Service) -> Self {
        let tables = Self {
            service: Service { id: 7, ..service },
            ..Self::default()
        };
        tables.put(&(1..=service.count as u8).collect::<Vec<_>>());
        tables
    }

    /// Puts these hosts into the slots.
    fn put(&self, hosts: &[u8]) {
        let backends: Vec<_> = hosts.iter().map(|host| backend(*host)).collect();
        *self.members.borrow_mut() = backends.iter().copied().collect();
        *self.backends.borrow_mut() = backends;
    }

    /// The host that a socket is given.
    fn given(&self, socket: &Socket, keep: bool) -> u8 {
        let (mut addr, mut port) = (SERVICE, [0, 80]);
        let answer = to_service(self, socket, &mut addr, &mut port, keep);
        assert_eq!((answer, port), (Answer::Given, [0, 81]));
        addr[3]
    }
}

fn backend(host: u8) -> Backend<4> {
    Backend {
        addr: [10, 0, 0, host],
        port: [0, 81],
        pad: [0; 2],
    }
}

fn socket(cookie: u64, proto: u8) -> Socket {
    Socket {
        cookie,
        netns: 2,
        proto,
        node: true,
        bound: false,
    }
}

/// A Pod's packets have an address, its sockets may not have one yet: where the Service asks for it,
/// packets decide.
#[test]
fn a_service_that_asks_for_the_client_is_left_to_packets() {
    for (affinity, flags, left) in [
        (0, 0, false),
        (60, 0, true),
        (0, ServiceFlags::SOURCE_RANGES, true),
    ] {
        for (node, count) in [(false, 1), (true, 1), (false, 0)] {
            let tables = Tables::new(Service {
                count,
                flags,
                affinity,
                ..Service::default()
            });
            let socket = Socket {
                node,
                ..socket(1, proto::TCP)
            };
            let (mut addr, mut port) = (SERVICE, [0, 80]);
            let answer = to_service(&tables, &socket, &mut addr, &mut port, false);
            let given = (node || !left) && count > 0;
            let expected = if given {
                (Answer::Given, backend(1).addr, [0, 81])
            } else {
                (Answer::Unchanged, SERVICE, [0, 80])
            };
            assert_eq!((answer, addr, port), expected, "{affinity} {flags} {node}");
        }
    }
}

/// An unconnected socket keeps its backend wherever that has moved among the slots, and as long as the
/// Service has it.
#[test]
fn an_unconnected_socket_keeps_a_backend_that_serves() {
    let tables = Tables::new(Service {
        count: 40,
        ..Service::default()
    });
    let all: Vec<u8> = (1..=40).collect();
    let sockets: Vec<_> = (0..30).map(|cookie| socket(cookie, proto::UDP)).collect();
    let given: Vec<u8> = sockets.iter().map(|s| tables.given(s, true)).collect();
    assert!(
        given.iter().collect::<BTreeSet<_>>().len() > 10,
        "{given:?}"
    );
    let mut moved = all.clone();
    moved.rotate_left(17);
    tables.put(&moved);
    for (socket, had) in sockets.iter().zip(&given) {
        assert_eq!(tables.given(socket, true), *had);
    }
    // Those of the backends that went choose again, and the others stay.
    for slot in moved.iter_mut().filter(|host| **host <= 20) {
        *slot += 100;
    }
    tables.put(&moved);
    for (socket, had) in sockets.iter().zip(&given) {
        let has = tables.given(socket, true);
        assert_eq!(has == *had, *had > 20, "{had} -> {has}");
        assert!(has > 20);
    }
}

/// The node is one client: all of its sockets have one backend, until it is gone or nobody has asked
/// for longer than the timeout.
#[test]
fn affinity_of_the_node_is_exact() {
    const TIMEOUT: u32 = 60;
    for (keep, proto) in [(false, proto::TCP), (false, proto::UDP), (true, proto::UDP)] {
        let tables = Tables::new(Service {
            count: 40,
            affinity: TIMEOUT,
            ..Service::default()
        });
        tables.now.set(1000);
        let mut hosts: Vec<u8> = (1..=40).collect();
        let mut cookies = 0..;
        let mut next = || {
            let socket = socket(cookies.next().unwrap_or_default(), proto);
            tables.given(&socket, keep)
        };
        let first = next();
        for _ in 0..20 {
            // Whatever slot it is in by now, and just in time.
            hosts.rotate_left(11);
            tables.put(&hosts);
            tables.now.set(tables.now.get() + TIMEOUT);
            assert_eq!(next(), first);
        }
        // A second too late: as if it had never been.
        let fresh = Tables::new(tables.service);
        fresh.put(&hosts);
        tables.now.set(tables.now.get() + TIMEOUT + 1);
        let second = next();
        assert_eq!(second, fresh.given(&socket(0, proto), keep));
        // Another slot in the same place.
        hosts.retain(|host| *host != second);
        hosts.push(200);
        tables.put(&hosts);
        let third = next();
        assert!(third != second && hosts.contains(&third));
        assert_eq!(next(), third);
    }
}

/// A Pod's socket with a port is left to its packets; one of the node, which has no such way, is not.
#[test]
fn a_pods_socket_with_a_port_is_left_to_its_packets() {
    let tables = Tables::new(Service {
        count: 1,
        ..Service::default()
    });
    for proto in [proto::TCP, proto::UDP] {
        for (node, bound) in [(false, false), (false, true), (true, false), (true, true)] {
            let socket = Socket {
                node,
                bound,
                ..socket(1, proto)
            };
            let (mut addr, mut port) = (SERVICE, [0, 80]);
            let answer = to_service(&tables, &socket, &mut addr, &mut port, false);
            let expected = if bound && !node {
                (Answer::Unchanged, SERVICE)
            } else {
                (Answer::Given, backend(1).addr)
            };
            assert_eq!((answer, addr), expected, "node {node}, bound {bound}");
        }
    }
}
