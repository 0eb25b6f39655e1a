//! Endpoints that still serve while they terminate, kept up to date by what changes.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    net::SocketAddr,
};

use hachi_index::Service;

use crate::retired::{Draining, is_moved};

/// How many ports of Services have each.
#[derive(Debug, Default)]
pub(super) struct Counted(BTreeMap<(u8, SocketAddr), usize>);

impl Counted {
    /// A Service has changed, come or gone.
    pub(super) fn change(&mut self, old: Option<&Service>, new: Option<&Service>) {
        for backend in new.into_iter().flat_map(of) {
            *self.0.entry(backend).or_default() += 1;
        }
        for backend in old.into_iter().flat_map(of) {
            if let Entry::Occupied(mut count) = self.0.entry(backend) {
                *count.get_mut() -= 1;
                if *count.get() == 0 {
                    count.remove();
                }
            }
        }
    }

    pub(super) fn all(&self) -> Draining {
        self.0.keys().copied().collect()
    }
}

/// Those of connectionless protocols: for the others nobody asks.
fn of(service: &Service) -> impl Iterator<Item = (u8, SocketAddr)> {
    let ports = service.ports.iter();
    ports
        .filter(|port| is_moved(port.protocol.number()))
        .flat_map(|port| {
            let proto = port.protocol.number();
            port.draining.iter().map(move |backend| (proto, *backend))
        })
}
