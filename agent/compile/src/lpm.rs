//! Longest prefix match over an ordered map, as the kernel's LPM trie answers.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;

/// Looks up in a map that stays as it is meanwhile.
pub(crate) struct Lpm<'a, V> {
    map: &'a BTreeMap<IpNet, V>,
    /// Prefix lengths that occur, by family, longest first.
    lengths: [Vec<u8>; 2],
}

impl<'a, V> Lpm<'a, V> {
    pub(crate) fn new(map: &'a BTreeMap<IpNet, V>) -> Self {
        let mut lengths = [BTreeSet::new(), BTreeSet::new()];
        for net in map.keys() {
            lengths[usize::from(net.addr().is_ipv6())].insert(net.prefix_len());
        }
        Self {
            map,
            lengths: lengths.map(|l| l.into_iter().rev().collect()),
        }
    }

    /// The value of the longest prefix that covers the address.
    pub(crate) fn get(&self, address: IpAddr) -> Option<&'a V> {
        let bits = if address.is_ipv6() { 128 } else { 32 };
        self.covering(address, bits)
    }

    /// The value of the longest prefix that covers the whole block, be it the block itself.
    pub(crate) fn get_net(&self, block: IpNet) -> Option<&'a V> {
        self.covering(block.network(), block.prefix_len())
    }

    fn covering(&self, address: IpAddr, bits: u8) -> Option<&'a V> {
        self.lengths[usize::from(address.is_ipv6())]
            .iter()
            .filter(|length| **length <= bits)
            .find_map(|length| {
                let net = IpNet::new(address, *length).ok()?.trunc();
                self.map.get(&net)
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_prefix_counts() {
        let map: BTreeMap<IpNet, u8> = [
            ("0.0.0.0/0", 0),
            ("10.0.0.0/8", 8),
            ("10.1.0.0/16", 16),
            ("fd00::/8", 6),
        ]
        .into_iter()
        .map(|(net, v)| (net.parse().unwrap(), v))
        .collect();
        let lpm = Lpm::new(&map);
        for (address, expected) in [
            ("10.1.2.3", Some(16)),
            ("10.2.0.0", Some(8)),
            ("11.0.0.0", Some(0)),
            ("fd00::1", Some(6)),
            ("fe80::1", None),
        ] {
            assert_eq!(
                lpm.get(address.parse().unwrap()).copied(),
                expected,
                "{address}"
            );
        }
        assert_eq!(lpm.get_net("10.0.0.0/7".parse().unwrap()), Some(&0));
        assert_eq!(lpm.get_net("10.1.0.0/17".parse().unwrap()), Some(&16));
    }
}
