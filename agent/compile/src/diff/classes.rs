//! How addresses get from class to class: single addresses in `PEERS`, the others by the blocks
//! around them.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use hachi_abi::{CLASS_WORLD, Peer};
use ipnet::IpNet;

use crate::{Image, Op, lpm::Lpm};

/// The two maps that give an address its class.
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
    let addresses: BTreeSet<&IpAddr> = old.peers.keys().chain(new.peers.keys()).collect();
    for address in addresses {
        let before = old.peers.get(address).or_else(|| from.get(*address));
        let after = new.peers.get(address).or_else(|| to.get(*address));
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

impl From<&Image> for Addresses {
    fn from(image: &Image) -> Self {
        Self {
            peers: image.peers.clone(),
            cidrs: image.cidrs.clone(),
        }
    }
}

/// The writes from one state to another, in which no address has a third class meanwhile:
/// single addresses first, which do not ask for blocks; then the smallest blocks, so that those who
/// are in none of them yet do not follow the larger ones; then what falls back to what is around it.
pub(super) fn write(from: &Addresses, to: &Addresses, ops: &mut Vec<Op>) {
    for (address, peer) in &to.peers {
        if from.peers.get(address) != Some(peer) {
            ops.push(Op::PutPeer(*address, *peer));
        }
    }
    let mut puts: Vec<(&IpNet, &Peer)> = to
        .cidrs
        .iter()
        .filter(|(net, peer)| from.cidrs.get(net) != Some(peer))
        .collect();
    puts.sort_by_key(|(net, _)| Reverse(net.prefix_len()));
    ops.extend(puts.into_iter().map(|(net, peer)| Op::PutCidr(*net, *peer)));
    let mut gone: Vec<&IpNet> = from
        .cidrs
        .keys()
        .filter(|net| !to.cidrs.contains_key(net))
        .collect();
    gone.sort_by_key(|net| net.prefix_len());
    ops.extend(gone.into_iter().map(|net| Op::DeleteCidr(*net)));
    let gone = from
        .peers
        .keys()
        .filter(|address| !to.peers.contains_key(address));
    ops.extend(gone.map(|address| Op::DeletePeer(*address)));
}
