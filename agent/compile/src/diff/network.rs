//! Uplinks, what is translated on them, and tunnels.
//!
//! What is known of a tunnel is written before the device that uses it, and goes after it. A block is exempted before the uplink that would translate it is there, and a new uplink comes
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
    let moved = new
        .tunnels
        .iter()
        .filter(|(net, tunnel)| old.tunnels.get(net) != Some(tunnel));
    ops.extend(moved.map(|(net, tunnel)| Op::PutTunnel(*net, *tunnel)));
    if old.tunnel != new.tunnel {
        ops.push(Op::SetTunnel(new.tunnel));
    }
    if old.host != new.host {
        ops.push(Op::SetHost(new.host));
    }
    let left = old
        .tunnels
        .keys()
        .filter(|net| !new.tunnels.contains_key(net));
    ops.extend(left.map(|net| Op::DeleteTunnel(*net)));
    let gone = old
        .uplinks
        .keys()
        .filter(|index| !new.uplinks.contains_key(index));
    ops.extend(gone.map(|index| Op::DeleteUplink(*index)));
    let removed = old.non_masquerade.difference(&new.non_masquerade);
    ops.extend(removed.map(|net| Op::DeleteNonMasquerade(*net)));
}
