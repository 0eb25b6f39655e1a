//! The ranges to allocate from: the configuration's, or the agent's.

use hachi_net::{Netlink, Range, RangeSet, uplink};
use ipnet::IpNet;

use crate::{
    agent::Agent,
    conf::{Conf, MTU, MTU_V6},
    error::{Error, code},
};

/// The ranges, and the MTU that comes with them.
#[derive(Debug)]
pub(crate) struct Pool {
    pub(crate) sets: Vec<RangeSet>,
    /// Absent: nobody has said.
    pub(crate) mtu: Option<u32>,
}

impl Pool {
    /// Finds the pool. Without ranges of its own, a configuration insists on the agent.
    pub(crate) fn find(conf: &Conf, agent: Option<&mut Agent>) -> Result<Self, Error> {
        match agent {
            Some(agent) if conf.ipam.sets.is_empty() => {
                let (cidrs, mtu) = agent.pool()?;
                let sets = sets_of(&cidrs, &conf.ipam.exclude)?;
                Ok(Self {
                    sets,
                    mtu: conf.mtu.or(Some(mtu).filter(|mtu| *mtu > 0)),
                })
            }
            _ => Ok(Self {
                sets: conf.ipam.sets.clone(),
                mtu: conf.mtu,
            }),
        }
    }

    /// The MTU; where nobody has said, that of the interface that the default route leaves by, so
    /// that what a Pod sends fits through without fragments. `None`, the kernel's choice, on a node
    /// without a default route. An MTU that a family of the Pod cannot have does not count.
    pub(crate) fn mtu(&self, host: &mut Netlink) -> Result<Option<u32>, Error> {
        if self.mtu.is_some() {
            return Ok(self.mtu);
        }
        let v6 = |range: &Range| range.subnet().addr().is_ipv6();
        let ipv6 = self.sets.iter().flat_map(|set| &set.ranges).any(v6);
        let least = if ipv6 { MTU_V6 } else { *MTU.start() };
        let link = uplink(host)?;
        Ok(link
            .map(|link| link.mtu)
            .filter(|mtu| (least..=*MTU.end()).contains(mtu)))
    }
}

/// One set a family, in the order of the blocks.
fn sets_of(cidrs: &[IpNet], exclude: &[IpNet]) -> Result<Vec<RangeSet>, Error> {
    let mut sets: Vec<RangeSet> = Vec::new();
    for cidr in cidrs {
        let range = Range::new(cidr.trunc(), None, None, None).map_err(|error| {
            Error::new(
                code::TRY_AGAIN_LATER,
                format!("the agent's pool is unusable: {error}"),
            )
        })?;
        let same = |set: &&mut RangeSet| {
            set.ranges
                .iter()
                .all(|r| r.subnet().addr().is_ipv4() == cidr.addr().is_ipv4())
        };
        match sets.iter_mut().find(same) {
            Some(set) => set.ranges.push(range),
            None => sets.push(RangeSet {
                ranges: vec![range],
                exclude: exclude.to_vec(),
            }),
        }
    }
    if sets.is_empty() {
        let why = "the agent has no pool of addresses yet: the Node has no podCIDR";
        return Err(Error::new(code::TRY_AGAIN_LATER, why));
    }
    Ok(sets)
}
