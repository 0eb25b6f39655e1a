//! Which flows must move: those of connectionless protocols whose backend no longer serves.
//!
//! New flows never choose a removed backend, but a flow that conntrack knows keeps its own. For TCP
//! that is right: the connection ends when the backend does. A UDP client notices nothing, and would
//! talk to nobody for as long as it goes on sending. So its entries are deleted once the writes that
//! remove the backend are in force, and its next packet opens a flow to another one. SCTP is treated
//! alike: the new backend aborts the association, and the client connects again.
//!
//! A backend that still serves while it terminates keeps the flows that it has.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    net::SocketAddr,
};

use hachi_abi::{Scope, Service, proto};

use crate::{Frontend, Image};

/// A flow through a Service, whatever its client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Through {
    /// IANA protocol number.
    pub proto: u8,
    /// The Service's address and port.
    pub frontend: SocketAddr,
    /// The backend.
    pub backend: SocketAddr,
}

/// Whether flows of a protocol do not notice by themselves that their backend is gone.
#[must_use]
pub fn is_moved(proto: u8) -> bool {
    matches!(proto, proto::UDP | proto::SCTP)
}

/// Endpoints that still serve while they terminate, by protocol.
pub type Draining = BTreeSet<(u8, SocketAddr)>;

/// Flows to move after a change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Retired {
    /// Those that go this way.
    These {
        /// Through this frontend to this backend.
        flows: HashSet<Through>,
        /// To this backend of this protocol, whatever the frontend.
        backends: HashSet<(u8, SocketAddr)>,
    },
    /// Those that go no way that is in force: after a time in which changes may have been missed.
    AllBut {
        /// The backends of every frontend, by protocol.
        live: HashMap<(u8, SocketAddr), Vec<SocketAddr>>,
        /// Backends that keep what they have.
        draining: Draining,
    },
}

impl Default for Retired {
    fn default() -> Self {
        Self::These {
            flows: HashSet::new(),
            backends: HashSet::new(),
        }
    }
}

impl Retired {
    /// What a change of images has retired. `touched`: the frontends of these protocols that it may have
    /// changed, or whose backends.
    #[must_use]
    pub fn between<'a>(
        (old, old_draining): (&Image, &Draining),
        (new, new_draining): (&Image, &Draining),
        touched: impl Iterator<Item = &'a Frontend>,
    ) -> Self {
        let mut flows = HashSet::new();
        let known = touched.filter_map(|frontend| Some((frontend, old.services.get(frontend)?)));
        for (frontend, service) in known {
            let is_there = new.services.contains_key(frontend);
            for backend in old.backends_of(frontend, service) {
                let drains = new_draining.contains(&(frontend.proto, *backend));
                // Without its frontend a flow has nowhere to go to, whatever the backend does.
                let is_served = leads_to(new, frontend, backend);
                if !(is_served || drains && is_there) {
                    flows.insert(through(frontend, *backend));
                }
            }
        }
        let backends = old_draining.difference(new_draining).copied().collect();
        Self::These { flows, backends }
    }

    /// Everything that an image does not lead to.
    #[must_use]
    pub fn all_but(image: &Image, draining: Draining) -> Self {
        let mut live: HashMap<_, Vec<SocketAddr>> = HashMap::new();
        for (frontend, service) in moved(image) {
            live.entry((frontend.proto, at(frontend)))
                .or_default()
                .extend(image.backends_of(frontend, service));
        }
        for backends in live.values_mut() {
            backends.sort_unstable();
            backends.dedup();
        }
        Self::AllBut { live, draining }
    }

    /// Whether there is nothing to look for.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        match self {
            Self::These { flows, backends } => flows.is_empty() && backends.is_empty(),
            Self::AllBut { .. } => false,
        }
    }

    /// Whether a flow is to be moved.
    #[must_use]
    pub fn contains(&self, flow: &Through) -> bool {
        if !is_moved(flow.proto) {
            return false;
        }
        match self {
            Self::These { flows, backends } => {
                flows.contains(flow) || backends.contains(&(flow.proto, flow.backend))
            }
            Self::AllBut { live, draining } => match live.get(&(flow.proto, flow.frontend)) {
                None => true,
                Some(backends) => {
                    backends.binary_search(&flow.backend).is_err()
                        && !draining.contains(&(flow.proto, flow.backend))
                }
            },
        }
    }

    /// Looks for what `other`, which came later, is about too.
    pub fn join(&mut self, other: Self) {
        match (&mut *self, other) {
            (
                Self::These { flows, backends },
                Self::These {
                    flows: more_flows,
                    backends: more_backends,
                },
            ) => {
                flows.extend(more_flows);
                backends.extend(more_backends);
            }
            // What is in force is known since: the later of the two says all.
            (_, all @ Self::AllBut { .. }) => *self = all,
            (Self::AllBut { live, draining }, Self::These { flows, backends }) => {
                for flow in flows {
                    if let Some(known) = live.get_mut(&(flow.proto, flow.frontend)) {
                        known.retain(|backend| *backend != flow.backend);
                    }
                }
                draining.retain(|backend| !backends.contains(backend));
            }
        }
    }
}

fn at(frontend: &Frontend) -> SocketAddr {
    SocketAddr::new(frontend.addr, frontend.port)
}

fn through(frontend: &Frontend, backend: SocketAddr) -> Through {
    Through {
        proto: frontend.proto,
        frontend: at(frontend),
        backend,
    }
}

fn moved(image: &Image) -> impl Iterator<Item = (&Frontend, &Service)> {
    image
        .services
        .iter()
        .filter(|(frontend, _)| is_moved(frontend.proto))
}

/// Whether a frontend, in whatever scope, leads to a backend.
fn leads_to(image: &Image, frontend: &Frontend, backend: &SocketAddr) -> bool {
    [Scope::INTERNAL, Scope::EXTERNAL].into_iter().any(|scope| {
        let frontend = Frontend { scope, ..*frontend };
        image.backends(&frontend).contains(backend)
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{Slots, SlotsId};

    const FRONTEND: &str = "10.96.0.10:53";

    fn image(services: &[(u8, u8, &[&str])]) -> Image {
        let frontend: SocketAddr = FRONTEND.parse().unwrap();
        let mut image = Image::default();
        for (proto, scope, backends) in services {
            let key = Frontend {
                addr: frontend.ip(),
                port: frontend.port(),
                proto: *proto,
                scope: *scope,
            };
            let slots = Slots {
                backends: backends.iter().map(|b| b.parse().unwrap()).collect(),
                ..Slots::default()
            };
            let service = Service {
                id: u32::from(*scope) + 1,
                count: slots.backends.len() as u32,
                ..Service::default()
            };
            let id = SlotsId::of(&key, &service);
            image.slots.insert(id, Arc::new(slots));
            image.services.insert(key, service);
        }
        image
    }

    fn flow(proto: u8, backend: &str) -> Through {
        Through {
            proto,
            frontend: FRONTEND.parse().unwrap(),
            backend: backend.parse().unwrap(),
        }
    }

    fn none() -> Draining {
        Draining::new()
    }

    fn between(old: (&Image, &Draining), new: (&Image, &Draining)) -> Retired {
        Retired::between(old, new, moved(old.0).map(|(frontend, _)| frontend))
    }

    const A: &str = "10.0.0.1:53";
    const B: &str = "10.0.0.2:53";

    #[test]
    fn only_removed_backends_of_udp_and_sctp_are_retired() {
        for (proto, expected) in [(proto::UDP, true), (proto::SCTP, true), (proto::TCP, false)] {
            let (old, new) = (image(&[(proto, 0, &[A, B])]), image(&[(proto, 0, &[B])]));
            let retired = between((&old, &none()), (&new, &none()));
            assert_eq!(retired.contains(&flow(proto, A)), expected, "{proto}");
            assert!(!retired.contains(&flow(proto, B)));
            assert_eq!(retired.is_empty(), !expected);
            let all = Retired::all_but(&new, none());
            assert_eq!(all.contains(&flow(proto, A)), expected, "{proto}");
            assert!(!all.contains(&flow(proto, B)));
        }
    }

    #[test]
    fn a_frontend_that_goes_retires_all_of_its_flows() {
        let (old, new) = (image(&[(proto::UDP, 0, &[A])]), image(&[]));
        let draining = Draining::from([(proto::UDP, A.parse().unwrap())]);
        let retired = between((&old, &none()), (&new, &draining));
        assert!(retired.contains(&flow(proto::UDP, A)));
        assert!(Retired::all_but(&new, draining).contains(&flow(proto::UDP, A)));
    }

    #[test]
    fn a_draining_backend_keeps_its_flows_until_it_serves_no_more() {
        let (old, new) = (
            image(&[(proto::UDP, 0, &[A, B])]),
            image(&[(proto::UDP, 0, &[B])]),
        );
        let draining = Draining::from([(proto::UDP, A.parse().unwrap())]);
        assert!(between((&old, &none()), (&new, &draining)).is_empty());
        assert!(!Retired::all_but(&new, draining.clone()).contains(&flow(proto::UDP, A)));
        let retired = between((&new, &draining), (&new, &none()));
        assert!(retired.contains(&flow(proto::UDP, A)));
        assert!(!retired.contains(&flow(proto::UDP, B)));
    }

    #[test]
    fn what_another_scope_still_leads_to_stays() {
        let old = image(&[(proto::UDP, 0, &[A, B]), (proto::UDP, 1, &[A])]);
        let new = image(&[(proto::UDP, 0, &[A, B]), (proto::UDP, 1, &[B])]);
        assert!(between((&old, &none()), (&new, &none())).is_empty());
    }

    #[test]
    fn later_changes_join_earlier_ones() {
        let both = image(&[(proto::UDP, 0, &[A, B])]);
        let (only_a, only_b) = (
            image(&[(proto::UDP, 0, &[A])]),
            image(&[(proto::UDP, 0, &[B])]),
        );
        let mut retired = between((&both, &none()), (&only_b, &none()));
        retired.join(between((&both, &none()), (&only_a, &none())));
        assert!(retired.contains(&flow(proto::UDP, A)) && retired.contains(&flow(proto::UDP, B)));
        let mut all = Retired::all_but(&both, none());
        all.join(between((&both, &none()), (&only_b, &none())));
        assert!(all.contains(&flow(proto::UDP, A)) && !all.contains(&flow(proto::UDP, B)));
        retired.join(Retired::all_but(&both, none()));
        assert!(!retired.contains(&flow(proto::UDP, A)));
    }
}
