//! The ranges to allocate from: the configuration's, or the agent's.

use hachi_net::{Range, RangeSet};
use ipnet::IpNet;

use crate::{
    agent::Agent,
    conf::Conf,
    error::{Error, code},
};

/// The ranges, and the MTU that comes with them.
#[derive(Debug)]
pub(crate) struct Pool {
    pub(crate) sets: Vec<RangeSet>,
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
