//! Frontends and the slots behind them.
//!
//! A slot is below its frontend's count only while it holds a backend that the frontend has in the
//! old or in the new image:
//! 1. slots of ids that nobody uses yet are filled;
//! 2. frontends that go, go; those that change to such an id are switched;
//! 3. slots of ids in use are overwritten in place: new slots before the count rises, the others
//!    before it falls;
//! 4. frontends that join an id in use are switched;
//! 5. slots that nobody counts any more are deleted.
//!
//! Ids are hashes, so an id may belong to another Service in the new image. A frontend that would see
//! both in step 3 makes a detour over an id of its own.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
};

use hachi_abi::Service;

use super::merge;
use crate::{Frontend, Image, Op, ServiceImage};

/// An id in the map of a family.
type Id = (bool, u32);

fn id(frontend: &Frontend, service: &ServiceImage) -> Id {
    (frontend.addr.is_ipv6(), service.id)
}

fn value(service: &ServiceImage) -> Service {
    let count = service.backends.len() as u32;
    Service {
        id: service.id,
        count,
        flags: service.flags,
        affinity: service.affinity,
    }
}

/// The slots of the ids in question. Where a write was interrupted, frontends of one id may count
/// differently: then the most.
fn slots<'a>(
    services: &'a BTreeMap<Frontend, ServiceImage>,
    ids: &BTreeSet<Id>,
) -> BTreeMap<Id, &'a [SocketAddr]> {
    let mut slots: BTreeMap<Id, &[SocketAddr]> = BTreeMap::new();
    for (frontend, service) in services {
        let id = id(frontend, service);
        if !ids.contains(&id) {
            continue;
        }
        let known = slots.entry(id).or_default();
        if known.len() < service.backends.len() {
            *known = &service.backends;
        }
    }
    slots
}

/// An id of the family that nobody has.
fn unused(old: &Image, new: &Image, taken: &BTreeMap<Id, &[SocketAddr]>, v6: bool) -> Id {
    let known = old
        .services
        .iter()
        .chain(&new.services)
        .map(|(f, service)| id(f, service));
    let known: BTreeSet<Id> = known.chain(taken.keys().copied()).collect();
    let mut id = (v6, 1);
    while known.contains(&id) {
        id.1 += 1;
    }
    id
}

fn put((_, service): Id, slot: usize, backend: SocketAddr) -> Op {
    Op::PutBackend {
        service,
        slot: slot as u32,
        backend,
    }
}

fn delete((v6, service): Id, slot: usize) -> Op {
    Op::DeleteBackend {
        service,
        slot: slot as u32,
        v6,
    }
}

pub(super) fn diff(old: &Image, new: &Image, ops: &mut Vec<Op>) {
    let mut touched = BTreeSet::new();
    let (mut changed, mut gone) = (Vec::new(), Vec::new());
    for (frontend, before, after) in merge(&old.services, &new.services) {
        match after {
            Some(service) if before != after => changed.push((frontend, service)),
            Some(_) => continue,
            None => gone.push(frontend),
        }
        touched.extend(
            before
                .into_iter()
                .chain(after)
                .map(|service| id(frontend, service)),
        );
    }
    if touched.is_empty() {
        return;
    }
    let (before, after) = (
        slots(&old.services, &touched),
        slots(&new.services, &touched),
    );

    let mut fresh: BTreeMap<Id, &[SocketAddr]> = BTreeMap::new();
    let mut early = Vec::new();
    let mut late = Vec::new();
    let mut in_place = Vec::new();
    for (frontend, service) in &changed {
        let to = id(frontend, service);
        let from = old.services.get(frontend).map(|s| id(frontend, s));
        if !before.contains_key(&to) {
            fresh.insert(to, &service.backends);
            early.push((**frontend, value(service)));
        } else if from == Some(to) {
            in_place.push((**frontend, value(service)));
        } else {
            if from.is_some_and(|from| after.contains_key(&from)) {
                let detour = unused(old, new, &fresh, to.0);
                fresh.insert(detour, &service.backends);
                early.push((
                    **frontend,
                    Service {
                        id: detour.1,
                        ..value(service)
                    },
                ));
            }
            late.push((**frontend, value(service)));
        }
    }

    for (id, backends) in &fresh {
        ops.extend(
            backends
                .iter()
                .enumerate()
                .map(|(slot, b)| put(*id, slot, *b)),
        );
    }
    ops.extend(
        gone.into_iter()
            .map(|frontend| Op::DeleteService(*frontend)),
    );
    ops.extend(
        early
            .into_iter()
            .map(|(frontend, service)| Op::PutService(frontend, service)),
    );

    let mut trailing = Vec::new();
    for (id, backends) in &after {
        let Some(had) = before.get(id) else { continue };
        // Beyond the old count nobody looks yet.
        for (slot, backend) in backends.iter().enumerate().skip(had.len()) {
            ops.push(put(*id, slot, *backend));
        }
        for (slot, (is, was)) in backends.iter().zip(*had).enumerate() {
            if is != was {
                ops.push(put(*id, slot, *is));
            }
        }
        trailing.extend((backends.len()..had.len()).map(|slot| delete(*id, slot)));
    }
    let switched = in_place.into_iter().chain(late);
    ops.extend(switched.map(|(frontend, service)| Op::PutService(frontend, service)));

    ops.append(&mut trailing);
    for (id, backends) in before.iter().chain(&fresh) {
        if !after.contains_key(id) {
            ops.extend((0..backends.len()).map(|slot| delete(*id, slot)));
        }
    }
}
