//! What the cluster hands out: ClusterIPs, node ports and nodes' podCIDRs.
//!
//! Freed numbers are reused last, so that a new holder is not taken for the old one.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::config::{Config, StartError};

/// The node ports that a real cluster uses by default.
pub(crate) const NODE_PORTS: std::ops::RangeInclusive<u16> = 30_000..=32_767;

/// An address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Family {
    V4,
    V6,
}

impl Family {
    pub(crate) fn of(address: IpAddr) -> Self {
        if address.is_ipv4() {
            Self::V4
        } else {
            Self::V6
        }
    }

    /// As `ipFamilies` and `addressType` say it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }

    pub(crate) fn parse(name: &str) -> Option<Self> {
        match name {
            "IPv4" => Some(Self::V4),
            "IPv6" => Some(Self::V6),
            _ => None,
        }
    }
}

/// Numbers from `0` to `size - 1`, handed out in a circle.
#[derive(Debug)]
struct Pool {
    size: u128,
    used: BTreeSet<u128>,
    next: u128,
    /// What was done since the write began: numbers taken (`true`) and given back.
    log: Vec<(u128, bool)>,
}

impl Pool {
    fn new(size: u128) -> Self {
        Self {
            size,
            used: BTreeSet::new(),
            next: 0,
            log: Vec::new(),
        }
    }

    fn claim(&mut self, number: u128) -> bool {
        let free = number < self.size && self.used.insert(number);
        if free {
            self.log.push((number, true));
        }
        free
    }

    fn release(&mut self, number: u128) {
        if self.used.remove(&number) {
            self.log.push((number, false));
        }
    }

    fn rollback(&mut self) {
        for (number, taken) in self.log.drain(..).rev() {
            if taken {
                self.used.remove(&number);
            } else {
                self.used.insert(number);
            }
        }
    }

    fn take(&mut self) -> Option<u128> {
        if self.used.len() as u128 >= self.size {
            return None;
        }
        let mut number = self.next;
        while !self.claim(number) {
            number = (number + 1) % self.size;
        }
        self.next = (number + 1) % self.size;
        Some(number)
    }
}

/// Subnets or addresses of one range.
#[derive(Debug)]
struct Range {
    net: IpNet,
    /// How many bits of an address lie behind a number of the pool.
    shift: u8,
    pool: Pool,
}

impl Range {
    /// A range of whole addresses, the network's and the last one left out.
    fn of_addresses(net: IpNet) -> Self {
        let bits = net.max_prefix_len() - net.prefix_len();
        // More than 2^20 addresses are never needed here, nor by a real API server.
        let size = 1_u128 << bits.min(20);
        let mut pool = Pool::new(size - 1);
        pool.claim(0);
        Self {
            net,
            shift: 0,
            pool,
        }
    }

    /// A range of subnets of one length.
    fn of_subnets(net: IpNet, length: u8) -> Result<Self, StartError> {
        if net.prefix_len() > length {
            let why = format!("the cluster CIDR {net} has no room for a /{length} a node");
            return Err(StartError::Config(why));
        }
        let pool = Pool::new(1 << (length - net.prefix_len()).min(20));
        Ok(Self {
            net,
            shift: net.max_prefix_len() - length,
            pool,
        })
    }

    fn family(&self) -> Family {
        Family::of(self.net.addr())
    }

    fn address(&self, number: u128) -> IpAddr {
        let offset = number << self.shift;
        match self.net.network() {
            IpAddr::V4(base) => {
                // A pool's numbers lie within its network, so they fit the family.
                let offset = u32::try_from(offset).unwrap_or(0);
                Ipv4Addr::from_bits(base.to_bits() | offset).into()
            }
            IpAddr::V6(base) => Ipv6Addr::from_bits(base.to_bits() | offset).into(),
        }
    }

    fn number(&self, address: IpAddr) -> Option<u128> {
        let offset = match (self.net, address) {
            (IpNet::V4(net), IpAddr::V4(a)) if net.contains(&a) => {
                u128::from(a.to_bits() - net.network().to_bits())
            }
            (IpNet::V6(net), IpAddr::V6(a)) if net.contains(&a) => {
                a.to_bits() - net.network().to_bits()
            }
            _ => return None,
        };
        Some(offset >> self.shift)
    }

    fn take(&mut self) -> Option<IpAddr> {
        self.pool.take().map(|number| self.address(number))
    }
}

/// Why a given address or port cannot be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// It is not one of the range's.
    Outside,
    /// Somebody has it.
    Taken,
}

/// Everything that is handed out.
#[derive(Debug)]
pub(crate) struct Ranges {
    services: Vec<Range>,
    nodes: Vec<Range>,
    ports: Pool,
}

impl Ranges {
    pub(crate) fn new(config: &Config) -> Result<Self, StartError> {
        let services: Vec<_> = config
            .service_cidrs
            .iter()
            .map(|net| Range::of_addresses(net.trunc()))
            .collect();
        let nodes = config.cluster_cidrs.iter().map(|net| {
            let length = if net.addr().is_ipv4() { 24 } else { 64 };
            Range::of_subnets(net.trunc(), length)
        });
        let nodes = nodes.collect::<Result<Vec<_>, _>>()?;
        for (what, ranges) in [("service", &services), ("cluster", &nodes)] {
            let twice = matches!(ranges.as_slice(), [a, b] if a.family() == b.family());
            if ranges.is_empty() || ranges.len() > 2 || twice {
                let why = format!("one {what} CIDR a family is needed, at most two");
                return Err(StartError::Config(why));
            }
        }
        let ports = Pool::new(NODE_PORTS.len() as u128);
        Ok(Self {
            services,
            nodes,
            ports,
        })
    }

    fn pools(&mut self) -> impl Iterator<Item = &mut Pool> {
        let ranges = self.services.iter_mut().chain(&mut self.nodes);
        ranges.map(|range| &mut range.pool).chain([&mut self.ports])
    }

    /// Keeps what was handed out and given back since the last call of this or of `rollback`.
    pub(crate) fn commit(&mut self) {
        self.pools().for_each(|pool| pool.log.clear());
    }

    /// Undoes what was handed out and given back since the last `commit`.
    pub(crate) fn rollback(&mut self) {
        self.pools().for_each(Pool::rollback);
    }

    /// The families of ClusterIPs, the primary one first.
    pub(crate) fn families(&self) -> Vec<Family> {
        self.services.iter().map(Range::family).collect()
    }

    /// Takes a free ClusterIP.
    pub(crate) fn take_ip(&mut self, family: Family) -> Option<IpAddr> {
        self.services
            .iter_mut()
            .find(|range| range.family() == family)?
            .take()
    }

    /// Takes a certain ClusterIP.
    pub(crate) fn claim_ip(&mut self, address: IpAddr) -> Result<(), Refusal> {
        let found = self.services.iter_mut().find_map(|range| {
            let number = range.number(address)?;
            Some((range, number))
        });
        let (range, number) = found.ok_or(Refusal::Outside)?;
        match number {
            0 => Err(Refusal::Outside),
            _ if number >= range.pool.size => Err(Refusal::Outside),
            _ if range.pool.claim(number) => Ok(()),
            _ => Err(Refusal::Taken),
        }
    }

    /// Gives a ClusterIP back.
    pub(crate) fn release_ip(&mut self, address: IpAddr) {
        for range in &mut self.services {
            if let Some(number) = range.number(address) {
                range.pool.release(number);
            }
        }
    }

    /// The first ClusterIP of each range, the `kubernetes` Service's.
    pub(crate) fn first_ips(&self) -> Vec<IpAddr> {
        self.services.iter().map(|range| range.address(1)).collect()
    }

    /// Takes a free node port.
    pub(crate) fn take_port(&mut self) -> Option<u16> {
        let number = self.ports.take()?;
        u16::try_from(number)
            .ok()
            .map(|number| NODE_PORTS.start() + number)
    }

    /// Takes a certain node port.
    pub(crate) fn claim_port(&mut self, port: u16) -> Result<(), Refusal> {
        if !NODE_PORTS.contains(&port) {
            return Err(Refusal::Outside);
        }
        let free = self.ports.claim(u128::from(port - NODE_PORTS.start()));
        if free { Ok(()) } else { Err(Refusal::Taken) }
    }

    /// Gives a node port back.
    pub(crate) fn release_port(&mut self, port: u16) {
        if NODE_PORTS.contains(&port) {
            self.ports.release(u128::from(port - NODE_PORTS.start()));
        }
    }

    /// Takes one podCIDR a family.
    pub(crate) fn take_pod_cidrs(&mut self) -> Option<Vec<IpNet>> {
        let subnet = |range: &mut Range| {
            let length = range.net.max_prefix_len() - range.shift;
            match range.take()? {
                IpAddr::V4(a) => Ipv4Net::new(a, length).ok().map(IpNet::V4),
                IpAddr::V6(a) => Ipv6Net::new(a, length).ok().map(IpNet::V6),
            }
        };
        self.nodes.iter_mut().map(subnet).collect()
    }

    /// Takes certain podCIDRs, those outside the cluster's ranges as they are.
    pub(crate) fn claim_pod_cidrs(&mut self, cidrs: &[IpNet]) {
        for range in &mut self.nodes {
            for cidr in cidrs {
                if let Some(number) = range.number(cidr.network()) {
                    range.pool.claim(number);
                }
            }
        }
    }

    /// Gives podCIDRs back.
    pub(crate) fn release_pod_cidrs(&mut self, cidrs: &[IpNet]) {
        for range in &mut self.nodes {
            for cidr in cidrs {
                if let Some(number) = range.number(cidr.network()) {
                    range.pool.release(number);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(services: &[&str], nodes: &[&str]) -> Result<Ranges, StartError> {
        let nets = |list: &[&str]| list.iter().map(|net| net.parse().unwrap()).collect();
        let config = Config {
            service_cidrs: nets(services),
            cluster_cidrs: nets(nodes),
            ..Config::default()
        };
        Ranges::new(&config)
    }

    #[test]
    fn addresses_are_handed_out_once_and_reused_last() {
        let mut ranges = ranges(&["10.96.0.0/29"], &["10.244.0.0/16"]).unwrap();
        let mut taken = Vec::new();
        while let Some(address) = ranges.take_ip(Family::V4) {
            taken.push(address.to_string());
        }
        // Neither the network's address nor the last one.
        let expected: Vec<_> = (1..=6).map(|n| format!("10.96.0.{n}")).collect();
        assert_eq!(taken, expected);
        ranges.release_ip("10.96.0.2".parse().unwrap());
        ranges.release_ip("10.96.0.5".parse().unwrap());
        assert_eq!(
            ranges.take_ip(Family::V4),
            Some("10.96.0.2".parse().unwrap())
        );
        ranges.release_ip("10.96.0.2".parse().unwrap());
        assert_eq!(
            ranges.take_ip(Family::V4),
            Some("10.96.0.5".parse().unwrap())
        );
        assert_eq!(ranges.take_ip(Family::V6), None);
    }

    #[test]
    fn given_addresses_and_ports_are_checked() {
        let mut ranges = ranges(&["10.96.0.0/16", "fd00:96::/112"], &["10.244.0.0/16"]).unwrap();
        assert_eq!(ranges.claim_ip("10.96.1.2".parse().unwrap()), Ok(()));
        assert_eq!(
            ranges.claim_ip("10.96.1.2".parse().unwrap()),
            Err(Refusal::Taken)
        );
        assert_eq!(
            ranges.claim_ip("10.97.0.1".parse().unwrap()),
            Err(Refusal::Outside)
        );
        assert_eq!(
            ranges.claim_ip("10.96.0.0".parse().unwrap()),
            Err(Refusal::Outside)
        );
        assert_eq!(ranges.claim_ip("fd00:96::7".parse().unwrap()), Ok(()));
        assert_eq!(ranges.claim_port(30_000), Ok(()));
        assert_eq!(ranges.claim_port(30_000), Err(Refusal::Taken));
        assert_eq!(ranges.claim_port(80), Err(Refusal::Outside));
        assert_eq!(ranges.take_port(), Some(30_001));
        ranges.release_port(30_000);
        assert_eq!(ranges.claim_port(30_000), Ok(()));
    }

    #[test]
    fn nodes_get_one_subnet_a_family() {
        let mut ranges = ranges(&["10.96.0.0/16"], &["10.244.0.0/16", "fd00:244::/48"]).unwrap();
        let text = |cidrs: Option<Vec<IpNet>>| {
            cidrs
                .unwrap()
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
                .join(" ")
        };
        assert_eq!(text(ranges.take_pod_cidrs()), "10.244.0.0/24 fd00:244::/64");
        assert_eq!(
            text(ranges.take_pod_cidrs()),
            "10.244.1.0/24 fd00:244:0:1::/64"
        );
        ranges.claim_pod_cidrs(&["10.244.2.0/24".parse().unwrap()]);
        assert_eq!(
            text(ranges.take_pod_cidrs()),
            "10.244.3.0/24 fd00:244:0:2::/64"
        );
    }

    #[test]
    fn a_rollback_undoes_what_was_not_committed() {
        let mut ranges = ranges(&["10.96.0.0/16"], &["10.244.0.0/16"]).unwrap();
        let kept = ranges.take_ip(Family::V4).unwrap();
        ranges.commit();
        let dropped = ranges.take_ip(Family::V4).unwrap();
        ranges.release_ip(kept);
        ranges.claim_port(30_007).unwrap();
        ranges.rollback();
        assert_eq!(ranges.claim_ip(kept), Err(Refusal::Taken));
        assert_eq!(ranges.claim_ip(dropped), Ok(()));
        assert_eq!(ranges.claim_port(30_007), Ok(()));
    }

    #[test]
    fn contradicting_ranges_are_refused() {
        assert!(ranges(&[], &["10.244.0.0/16"]).is_err());
        assert!(ranges(&["10.96.0.0/16", "10.97.0.0/16"], &["10.244.0.0/16"]).is_err());
        assert!(ranges(&["10.96.0.0/16"], &["10.244.0.0/25"]).is_err());
    }
}
