//! Sockets that speak to Services: whom they are given.

use std::{cell::RefCell, collections::HashMap};

use hachi_abi::{
    Backend, BackendKey, Service, ServiceFlags, ServiceKey, SocketEntry, SocketKey, proto,
};
use hachi_datapath::{Answer, Socket, Sockets, to_service};

#[derive(Default)]
struct Tables {
    service: Service,
    sockets: RefCell<HashMap<SocketKey<4>, SocketEntry<4>>>,
}

const SERVICE: [u8; 4] = [10, 96, 0, 1];
const BACKEND: [u8; 4] = [10, 0, 0, 1];

impl Sockets<4> for Tables {
    fn service(&self, key: &ServiceKey<4>) -> Option<Service> {
        (key.addr == SERVICE).then_some(self.service)
    }

    fn backend(&self, key: &BackendKey) -> Option<Backend<4>> {
        (key.slot == 0).then_some(Backend {
            addr: BACKEND,
            port: [0, 81],
            pad: [0; 2],
        })
    }

    fn socket(&self, key: &SocketKey<4>) -> Option<SocketEntry<4>> {
        self.sockets.borrow().get(key).copied()
    }

    fn put_socket(&self, key: &SocketKey<4>, entry: &SocketEntry<4>) -> bool {
        self.sockets.borrow_mut().insert(*key, *entry);
        true
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
            let service = Service {
                id: 7,
                count,
                flags,
                affinity,
                table: 0,
            };
            let tables = Tables {
                service,
                ..Tables::default()
            };
            let socket = Socket {
                cookie: 1,
                netns: 2,
                proto: proto::TCP,
                node,
            };
            let (mut addr, mut port) = (SERVICE, [0, 80]);
            let answer = to_service(&tables, &socket, &mut addr, &mut port, false);
            let given = (node || !left) && count > 0;
            let expected = if given {
                (Answer::Given, BACKEND, [0, 81])
            } else {
                (Answer::Unchanged, SERVICE, [0, 80])
            };
            assert_eq!((answer, addr, port), expected, "{affinity} {flags} {node}");
        }
    }
}
