//! Uplinks, and what is translated on them.
//!
//! A block is exempted before the uplink that would translate it is there, and a new uplink comes
//! before an old one goes: a connection that leaves by both has a way at every moment.

use crate::{Image, Op};

pub(super) fn diff(old: &Image, new: &Image, ops: &mut Vec<Op>) {
    if old.ports != new.ports {
        ops.push(Op::SetPorts(new.ports.0, new.ports.1));
    }
    let added = new.non_masquerade.difference(&old.non_masquerade);
    ops.extend(added.map(|net| Op::PutNonMasquerade(*net)));
    let changed = new
        .uplinks
        .iter()
        .filter(|(index, uplink)| old.uplinks.get(index) != Some(uplink));
    ops.extend(changed.map(|(index, uplink)| Op::PutUplink(*index, *uplink)));
    let gone = old
        .uplinks
        .keys()
        .filter(|index| !new.uplinks.contains_key(index));
    ops.extend(gone.map(|index| Op::DeleteUplink(*index)));
    let removed = old.non_masquerade.difference(&new.non_masquerade);
    ops.extend(removed.map(|net| Op::DeleteNonMasquerade(*net)));
}
