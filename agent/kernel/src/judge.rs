//! What the maps say of a flow, read entry by entry as the datapath reads them, so that it can be
//! compared with what they should say.

use std::net::IpAddr;

use hachi_abi::{
    CLASS_WORLD, Endpoint, Peer, PeerFlags, PolicyEntry, PolicyKey, RULE_NONE, SET_ALLOW_ALL,
    SHAPE_ANY_PROTO, Verdict, map,
};
use hachi_policy::Direction;

use crate::{
    Datapath, KernelError,
    bytes::{bytes_of, read},
};

/// What the maps say of one side of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Live {
    /// Whether the side lets the flow pass.
    pub allowed: bool,
    /// The rule that decided, [`RULE_NONE`] if none did.
    pub rule: u32,
    /// The policy set of the side's Pod.
    pub set: u32,
    /// The class of the other side.
    pub class: u32,
}

impl Datapath {
    /// One side's verdict on the first packet of a flow from `source` to `destination`; `None` if the
    /// side's address is not that of a Pod of this node. `port` is the destination's, 0 for protocols
    /// without ports.
    ///
    /// # Errors
    /// If a map cannot be read.
    pub fn judge(
        &self,
        direction: Direction,
        source: IpAddr,
        destination: IpAddr,
        protocol: u8,
        port: u16,
    ) -> Result<Option<Live>, KernelError> {
        let (own, other) = match direction {
            Direction::Ingress => (destination, source),
            Direction::Egress => (source, destination),
        };
        let v = usize::from(own.is_ipv6());
        let Some(endpoint) = self.table(map::ENDPOINTS[v])?.get(&octets(own))? else {
            return Ok(None);
        };
        let endpoint = read::<Endpoint>(&endpoint);
        let (set, shapes) = match direction {
            Direction::Ingress => (endpoint.ingress_set, endpoint.ingress_shapes),
            Direction::Egress => (endpoint.egress_set, endpoint.egress_shapes),
        };
        let Peer { class, flags } = self.class(other)?;
        let said = |allowed, rule| {
            Ok(Some(Live {
                allowed,
                rule,
                set,
                class,
            }))
        };
        let from_node = direction == Direction::Ingress && flags & PeerFlags::LOCAL_NODE != 0;
        if source == destination || set == SET_ALLOW_ALL || from_node {
            return said(true, RULE_NONE);
        }
        let prefixes = (0..=16_u8).rev().map(|plen| PolicyKey {
            set,
            class,
            port: (port & !0xffff_u16.checked_shr(plen.into()).unwrap_or(0)).to_be_bytes(),
            plen,
            proto: protocol,
        });
        let any = PolicyKey {
            set,
            class,
            ..PolicyKey::default()
        };
        let keys = prefixes.map(|key| (u32::from(key.plen), key));
        for (shape, key) in keys.chain([(SHAPE_ANY_PROTO, any)]) {
            if shapes & (1 << shape) == 0 {
                continue;
            }
            if let Some(entry) = self.table(map::POLICY)?.get(bytes_of(&key))? {
                let entry = read::<PolicyEntry>(&entry);
                return said(entry.verdict() == Verdict::Allow, entry.rule);
            }
        }
        said(false, RULE_NONE)
    }

    fn class(&self, address: IpAddr) -> Result<Peer, KernelError> {
        let v = usize::from(address.is_ipv6());
        let octets = octets(address);
        if let Some(peer) = self.table(map::PEERS[v])?.get(&octets)? {
            return Ok(read(&peer));
        }
        let mut key = (octets.len() as u32 * 8).to_ne_bytes().to_vec();
        key.extend_from_slice(&octets);
        let block = self.table(map::CIDRS[v])?.get(&key)?;
        Ok(block.map_or(
            Peer {
                class: CLASS_WORLD,
                flags: 0,
            },
            |peer| read(&peer),
        ))
    }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}
