//! How addresses get from class to class: single addresses in `PEERS`, the others by the blocks
//! around them.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use hachi_abi::{CLASS_WORLD, Peer};
use ipnet::IpNet;

use super::merge;
use crate::{Image, Op, lpm::Lpm};

/// The two maps that give an address its class.
#[derive(Clone, Copy, Debug)]
pub(super) struct View<'a> {
    peers: &'a BTreeMap<IpAddr, Peer>,
    cidrs: &'a BTreeMap<IpNet, Peer>,
}

impl<'a> From<&'a Image> for View<'a> {
    fn from(image: &'a Image) -> Self {
        Self {
            peers: &image.peers,
            cidrs: &image.cidrs,
        }
    }
}

impl<'a> From<&'a Addresses> for View<'a> {
    fn from(Addresses { peers, cidrs }: &'a Addresses) -> Self {
        Self { peers, cidrs }
    }
}

/// The two maps in a state that neither image has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Addresses {
    peers: BTreeMap<IpAddr, Peer>,
    cidrs: BTreeMap<IpNet, Peer>,
}

/// From which class to which.
pub(super) type Move = (u32, u32);

/// Every move that an address makes between the images; those that stay are left out.
pub(super) fn moves(old: &Image, new: &Image) -> BTreeSet<Move> {
    let mut moves = BTreeSet::new();
    if old.peers == new.peers && old.cidrs == new.cidrs {
        return moves;
    }
    each(old, new, |_, from, to| {
        if from != to {
            moves.insert((from, to));
        }
    });
    moves
}

/// The classes that addresses have in the image.
pub(super) fn used(image: &Image) -> BTreeSet<u32> {
    let classes = image
        .peers
        .values()
        .chain(image.cidrs.values())
        .map(|peer| peer.class);
    classes.chain([CLASS_WORLD]).collect()
}

enum Key {
    Net(IpNet),
    Address(IpAddr),
}

fn each(old: &Image, new: &Image, mut visit: impl FnMut(Key, u32, u32)) {
    let class = |peer: Option<&Peer>| peer.map_or(CLASS_WORLD, |p| p.class);
    let (from, to) = (Lpm::new(&old.cidrs), Lpm::new(&new.cidrs));
    let nets: BTreeSet<&IpNet> = old.cidrs.keys().chain(new.cidrs.keys()).collect();
    for net in nets {
        visit(
            Key::Net(*net),
            class(from.get_net(*net)),
            class(to.get_net(*net)),
        );
    }
    for (address, before, after) in merge(&old.peers, &new.peers) {
        let before = before.or_else(|| from.get(*address));
        let after = after.or_else(|| to.get(*address));
        visit(Key::Address(*address), class(before), class(after));
    }
}

/// The state in which every address that makes one of the `detours` is half way.
pub(super) fn half_way(old: &Image, new: &Image, detours: &BTreeMap<Move, u32>) -> Addresses {
    let mut half = Addresses::default();
    let mut around: Vec<(IpNet, u32)> = Vec::new();
    let mut singles = Vec::new();
    each(old, new, |key, from, to| {
        let class = detours.get(&(from, to)).copied().unwrap_or(to);
        match key {
            Key::Net(net) => {
                while around
                    .last()
                    .is_some_and(|(outer, _)| !outer.contains(&net))
                {
                    around.pop();
                }
                let outer = around.last().map_or(CLASS_WORLD, |(_, class)| *class);
                if new.cidrs.contains_key(&net) || outer != class {
                    let flags = new.cidrs.get(&net).map_or(0, |peer| peer.flags);
                    half.cidrs.insert(net, Peer { class, flags });
                    around.push((net, class));
                }
            }
            Key::Address(address) => singles.push((address, class)),
        }
    });
    let lpm = Lpm::new(&half.cidrs);
    for (address, class) in singles {
        let kept = new.peers.get(&address);
        if kept.is_some() || lpm.get(address).map_or(CLASS_WORLD, |p| p.class) != class {
            half.peers.insert(
                address,
                Peer {
                    class,
                    flags: kept.map_or(0, |p| p.flags),
                },
            );
        }
    }
    half
}

/// The writes from one state to another, in which no address has a third class meanwhile:
/// single addresses first, which do not ask for blocks; then the smallest blocks, so that those who
/// are in none of them yet do not follow the larger ones; then what falls back to what is around it.
pub(super) fn write(from: View<'_>, to: View<'_>, ops: &mut Vec<Op>) {
    let mut gone = Vec::new();
    for (address, before, after) in merge(from.peers, to.peers) {
        match after {
            Some(peer) if before != after => ops.push(Op::PutPeer(*address, *peer)),
            Some(_) => {}
            None => gone.push(Op::DeletePeer(*address)),
        }
    }
    let (mut puts, mut deletes) = (Vec::new(), Vec::new());
    for (net, before, after) in merge(from.cidrs, to.cidrs) {
        match after {
            Some(peer) if before != after => puts.push((*net, *peer)),
            Some(_) => {}
            None => deletes.push(*net),
        }
    }
    puts.sort_by_key(|(net, _)| Reverse(net.prefix_len()));
    ops.extend(puts.into_iter().map(|(net, peer)| Op::PutCidr(net, peer)));
    deletes.sort_by_key(IpNet::prefix_len);
    ops.extend(deletes.into_iter().map(Op::DeleteCidr));
    ops.append(&mut gone);
}
