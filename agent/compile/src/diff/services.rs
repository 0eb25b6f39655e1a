//! Frontends, and what is kept under their ids: slots, members, tables, ranges.
//!
//! A slot is below its frontend's count only while it holds a backend that the frontend has in the
//! old or in the new image:
//! 1. what ids that nobody uses yet need is written;
//! 2. frontends that go, go; those that change to an id whose slots do not change are switched;
//! 3. slots of ids in use are overwritten in place: new slots before the count rises, the others
//!    before it falls;
//! 4. frontends that keep their id are given their new count, and what is under it and no longer theirs
//!    is deleted;
//! 5. frontends that come to such an id are switched;
//! 6. ids that nobody has any more are deleted.
//!
//! Members, tables and ranges follow in the same order: what is new before anybody asks for it, what
//! is old when nobody does any more. A table that is half written leads to slots that are there.
//!
//! Ids are hashes, so an id may belong to another Service in the new image. A frontend that would see
//! both in step 3 makes a detour over an id of its own.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use hachi_abi::Service;
use hachi_index::Shards;

use crate::{Frontend, Image, Op, Slots, SlotsId};

const NONE: &Slots = &Slots {
    backends: Vec::new(),
    members: Vec::new(),
    table: Vec::new(),
    ranges: Vec::new(),
};

/// What happens to the ids.
struct Changes<'a> {
    /// In the new image alone, detours included.
    fresh: BTreeMap<SlotsId, &'a Slots>,
    /// In both, with other content.
    changed: BTreeMap<SlotsId, (&'a Slots, &'a Slots)>,
    /// In the old image alone.
    gone: BTreeMap<SlotsId, &'a Slots>,
}

impl<'a> Changes<'a> {
    fn new(old: &'a Image, new: &'a Image) -> Self {
        let mut changes = Self {
            fresh: BTreeMap::new(),
            changed: BTreeMap::new(),
            gone: BTreeMap::new(),
        };
        for (id, before, after) in old.slots.changes(&new.slots) {
            match (before, after) {
                (None, Some(after)) => {
                    changes.fresh.insert(*id, after);
                }
                (Some(before), Some(after)) => {
                    changes.changed.insert(*id, (before, after));
                }
                (Some(before), None) => {
                    changes.gone.insert(*id, before);
                }
                (None, None) => {}
            }
        }
        changes
    }

    /// An id of the family that nobody has, with this content.
    fn detour(&mut self, old: &Image, new: &Image, v6: bool, slots: &'a Slots) -> SlotsId {
        let of = |slots: &Shards<SlotsId, Arc<Slots>>, id: &SlotsId| slots.contains_key(id);
        let free = (1..=u32::MAX)
            .map(|id| SlotsId { v6, id })
            .find(|id| !of(&old.slots, id) && !of(&new.slots, id) && !self.fresh.contains_key(id));
        let free = free.unwrap_or(SlotsId { v6, id: 0 });
        self.fresh.insert(free, slots);
        free
    }
}

/// Frontends in the order in which they are switched.
#[derive(Default)]
struct Switches {
    gone: Vec<Frontend>,
    early: Vec<(Frontend, Service)>,
    in_place: Vec<(Frontend, Service)>,
    late: Vec<(Frontend, Service)>,
}

fn switches<'a>(old: &'a Image, new: &'a Image, changes: &mut Changes<'a>) -> Switches {
    let mut switches = Switches::default();
    let mut frontends: Vec<_> = old.services.changes(&new.services).collect();
    frontends.sort_unstable_by_key(|(frontend, ..)| **frontend);
    for (frontend, before, after) in frontends {
        let Some(service) = after else {
            switches.gone.push(*frontend);
            continue;
        };
        let to = SlotsId::of(frontend, service);
        let from = before.map(|service| SlotsId::of(frontend, service));
        if !changes.changed.contains_key(&to) {
            switches.early.push((*frontend, *service));
            continue;
        }
        if from == Some(to) {
            switches.in_place.push((*frontend, *service));
            continue;
        }
        if from.is_some_and(|from| changes.changed.contains_key(&from)) {
            let slots = new.slots.get(&to).map_or(NONE, |slots| slots);
            let id = changes.detour(old, new, to.v6, slots).id;
            switches.early.push((*frontend, Service { id, ..*service }));
        }
        switches.late.push((*frontend, *service));
    }
    switches
}

pub(super) fn diff(old: &Image, new: &Image, ops: &mut Vec<Op>) {
    let mut changes = Changes::new(old, new);
    let Switches {
        gone,
        early,
        in_place,
        late,
    } = switches(old, new, &mut changes);
    let put = |(frontend, service)| Op::PutService(frontend, service);

    for (id, slots) in &changes.fresh {
        write(*id, NONE, slots, ops);
    }
    ops.extend(gone.into_iter().map(Op::DeleteService));
    ops.extend(early.into_iter().map(put));
    for (id, (before, after)) in &changes.changed {
        write(*id, before, after, ops);
    }
    ops.extend(in_place.into_iter().map(put));
    for (id, (before, after)) in &changes.changed {
        clear(*id, before, after, ops);
    }
    ops.extend(late.into_iter().map(put));
    for (id, slots) in &changes.gone {
        clear(*id, slots, NONE, ops);
    }
    for (id, slots) in &changes.fresh {
        if !new.slots.contains_key(id) {
            clear(*id, slots, NONE, ops);
        }
    }
}

/// Writes what is new under an id.
fn write(service: SlotsId, before: &Slots, after: &Slots, ops: &mut Vec<Op>) {
    for member in added(&before.members, &after.members) {
        ops.push(Op::PutMember(service, member));
    }
    for range in added(&before.ranges, &after.ranges) {
        ops.push(Op::PutRange(service, range));
    }
    let had = before.backends.len();
    let slots = (0..).zip(&after.backends);
    // Beyond the old count nobody looks yet.
    let (inside, beyond): (Vec<_>, Vec<_>) = slots.partition(|(slot, _)| (*slot as usize) < had);
    let overwritten = inside
        .into_iter()
        .filter(|(slot, backend)| before.backends[*slot as usize] != **backend);
    for (slot, backend) in beyond.into_iter().chain(overwritten) {
        ops.push(Op::PutBackend {
            service,
            slot,
            backend: *backend,
        });
    }
    let mut known = before.pieces();
    for (piece, slots) in (0..).zip(after.pieces()) {
        if known.next() != Some(slots) {
            ops.push(Op::PutPiece {
                service,
                piece,
                slots,
            });
        }
    }
}

/// Deletes what is no longer under an id.
fn clear(service: SlotsId, before: &Slots, after: &Slots, ops: &mut Vec<Op>) {
    for slot in after.backends.len()..before.backends.len() {
        let slot = slot as u32;
        ops.push(Op::DeleteBackend { service, slot });
    }
    for member in added(&after.members, &before.members) {
        ops.push(Op::DeleteMember(service, member));
    }
    for range in added(&after.ranges, &before.ranges) {
        ops.push(Op::DeleteRange(service, range));
    }
    for piece in after.pieces().count()..before.pieces().count() {
        let piece = piece as u32;
        ops.push(Op::DeletePiece { service, piece });
    }
}

/// What `after` has and `before` has not.
fn added<T: Ord + Copy>(before: &[T], after: &[T]) -> Vec<T> {
    let before: BTreeSet<T> = before.iter().copied().collect();
    let after = after.iter().copied();
    after.filter(|item| !before.contains(item)).collect()
}
