//! Address blocks: which selectors match the addresses of every block in force, by number.

use std::{
    collections::{BTreeMap, BTreeSet},
    mem,
};

use hachi_policy::Peer;
use ipnet::IpNet;

use crate::selectors::Selectors;

/// Every block and every exception in force, with the selectors that match the addresses which are
/// in it and in no smaller one; sorted.
pub(crate) fn matched(selectors: &Selectors) -> BTreeMap<IpNet, Vec<u32>> {
    // What begins and what ends at a prefix. The same block may begin in one peer and be an
    // exception of another, so peers are told apart.
    #[derive(Default)]
    struct At {
        begins: Vec<(u32, usize)>,
        ends: Vec<(u32, usize)>,
    }
    let mut edges: BTreeMap<IpNet, At> = BTreeMap::new();
    for (selector, content) in (0..).zip(&selectors.list) {
        if !content.in_force {
            continue;
        }
        for (peer, block) in content.peers.iter().enumerate() {
            let Peer::Block(block) = block else { continue };
            edges
                .entry(block.cidr())
                .or_default()
                .begins
                .push((selector, peer));
            for hole in block.except() {
                edges.entry(hole).or_default().ends.push((selector, peer));
            }
        }
    }
    // In sorted order a block comes before those inside it, so that the blocks around the current
    // one are a stack.
    let mut around: Vec<(IpNet, BTreeSet<(u32, usize)>)> = Vec::new();
    let mut matched = BTreeMap::new();
    for (net, at) in &mut edges {
        while around.last().is_some_and(|(outer, _)| !outer.contains(net)) {
            around.pop();
        }
        let mut active = around
            .last()
            .map(|(_, active)| active.clone())
            .unwrap_or_default();
        for hole in mem::take(&mut at.ends) {
            active.remove(&hole);
        }
        active.extend(mem::take(&mut at.begins));
        let mut of: Vec<u32> = active.iter().map(|(selector, _)| *selector).collect();
        of.dedup();
        matched.insert(*net, of);
        around.push((*net, active));
    }
    matched
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use hachi_policy::{Action, Direction, IpBlock, Peers, PolicyId, RuleRef, Tier};

    use super::*;
    use crate::sets::{Content, SetRule};

    fn selectors(lists: &[&[(&str, &[&str])]]) -> Selectors {
        let rules = lists.iter().map(|blocks| SetRule {
            rule: RuleRef {
                policy: PolicyId::network("a", "p"),
                direction: Direction::Ingress,
                index: 0,
            },
            tier: Tier::Network,
            action: Action::Accept,
            peers_hash: blocks.len() as u64,
            peers: Peers::Listed(Arc::new(
                blocks
                    .iter()
                    .map(|(cidr, except)| {
                        let except = except.iter().map(|e| e.parse().unwrap());
                        Peer::Block(IpBlock::new(cidr.parse().unwrap(), except).unwrap())
                    })
                    .collect(),
            )),
            ports: BTreeSet::new(),
        });
        let content = Content {
            rules: rules.collect(),
            isolated: true,
            hash: 0,
        };
        let mut selectors = Selectors::default();
        selectors.update([&content]);
        selectors
    }

    #[test]
    fn holes_and_nesting() {
        let all = matched(&selectors(&[
            &[("10.0.0.0/8", &["10.1.0.0/16"])],
            &[("10.1.0.0/16", &["10.1.1.0/24"]), ("10.1.1.0/25", &[])],
            &[("0.0.0.0/0", &["10.0.0.0/8"]), ("::/0", &[])],
        ]));
        let at = |net: &str| all[&net.parse::<IpNet>().unwrap()].clone();
        assert_eq!(at("0.0.0.0/0"), [2]);
        assert_eq!(at("10.0.0.0/8"), [0]);
        assert_eq!(at("10.1.0.0/16"), [1]);
        assert_eq!(at("10.1.1.0/24"), Vec::<u32>::new());
        assert_eq!(at("10.1.1.0/25"), [1]);
        assert_eq!(at("::/0"), [2]);
        assert_eq!(all.len(), 6);
    }

    #[test]
    fn overlapping_peers_of_one_list_do_not_share_holes() {
        let all = matched(&selectors(&[&[
            ("10.0.0.0/8", &["10.1.0.0/16"]),
            ("10.0.0.0/9", &[]),
        ]]));
        assert_eq!(
            all[&"10.1.0.0/16".parse::<IpNet>().unwrap()],
            [0],
            "the second still has it"
        );
    }
}
