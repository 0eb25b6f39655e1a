//! Ranges of addresses, as host-local's configuration has them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

/// A range that makes no sense.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RangeError {
    /// The subnet has bits set behind its prefix.
    #[error("{subnet} has host bits set; write {}", subnet.trunc())]
    HostBits {
        /// The subnet.
        subnet: IpNet,
    },
    /// An address outside the subnet.
    #[error("{what} {address} is not in {subnet}")]
    Outside {
        /// Which field.
        what: &'static str,
        /// The address.
        address: IpAddr,
        /// The subnet.
        subnet: IpNet,
    },
    /// The end comes before the start.
    #[error("rangeEnd {end} comes before rangeStart {start}")]
    Reversed {
        /// The first address.
        start: IpAddr,
        /// The last address.
        end: IpAddr,
    },
    /// Nothing is left to give out.
    #[error("{0} has no address that can be given out")]
    Empty(IpNet),
}

/// A range of addresses in one subnet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Range {
    subnet: IpNet,
    start: IpAddr,
    end: IpAddr,
    gateway: Option<IpAddr>,
}

impl Range {
    /// A range of `subnet`: all of it, or from `start` to `end`. The network address, IPv4's
    /// broadcast address and the gateway (the first address if none is named) are never given out;
    /// a subnet of one or two addresses has none of them.
    pub fn new(
        subnet: IpNet,
        start: Option<IpAddr>,
        end: Option<IpAddr>,
        gateway: Option<IpAddr>,
    ) -> Result<Self, RangeError> {
        if subnet != subnet.trunc() {
            return Err(RangeError::HostBits { subnet });
        }
        let fields = [
            ("rangeStart", start),
            ("rangeEnd", end),
            ("gateway", gateway),
        ];
        for (what, address) in fields {
            if let Some(address) = address
                && !subnet.contains(&address)
            {
                return Err(RangeError::Outside {
                    what,
                    address,
                    subnet,
                });
            }
        }
        let tiny = subnet.max_prefix_len() - subnet.prefix_len() < 2;
        let gateway = match gateway {
            None if tiny => None,
            None => Some(from_number(number(subnet.network()) + 1, subnet.network())),
            named => named,
        };
        let range = Self {
            subnet,
            start: start.unwrap_or(subnet.network()),
            end: end.unwrap_or(subnet.broadcast()),
            gateway,
        };
        if number(range.start) > number(range.end) {
            return Err(RangeError::Reversed {
                start: range.start,
                end: range.end,
            });
        }
        // At most three addresses in it are reserved.
        if range
            .iter_from(range.start)
            .take(4)
            .all(|address| range.reserves(address))
        {
            return Err(RangeError::Empty(subnet));
        }
        Ok(range)
    }

    /// The subnet.
    #[must_use]
    pub fn subnet(&self) -> IpNet {
        self.subnet
    }

    /// Whether the address lies between start and end.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        address.is_ipv4() == self.start.is_ipv4()
            && (number(self.start)..=number(self.end)).contains(&number(address))
    }

    /// Whether two ranges share an address.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        self.contains(other.start) || other.contains(self.start)
    }

    pub(super) fn start(&self) -> IpAddr {
        self.start
    }

    pub(super) fn bounds(&self) -> Bounds {
        Bounds {
            start: self.start,
            end: self.end,
        }
    }

    /// Whether the address has a meaning of its own in the subnet.
    pub(super) fn reserves(&self, address: IpAddr) -> bool {
        let tiny = self.subnet.max_prefix_len() - self.subnet.prefix_len() < 2;
        self.gateway == Some(address)
            || !tiny
                && (address == self.subnet.network()
                    || address.is_ipv4() && address == self.subnet.broadcast())
    }

    fn iter_from(&self, address: IpAddr) -> impl Iterator<Item = IpAddr> + use<> {
        let (first, last, like) = (number(address), number(self.end), self.start);
        (first..=last).map(move |number| from_number(number, like))
    }
}

/// Ranges of one family, of which an attachment gets one address.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct RangeSet {
    /// The ranges, in the order in which they are used up.
    pub ranges: Vec<Range>,
    /// Blocks in them that are not to be given out.
    pub exclude: Vec<IpNet>,
}

impl RangeSet {
    /// The range that the address could be given out of.
    pub(super) fn range_of(&self, address: IpAddr) -> Option<&Range> {
        let range = self.ranges.iter().find(|range| range.contains(address))?;
        (!range.reserves(address) && self.excluded(address).is_none()).then_some(range)
    }

    /// The excluded block that the address lies in.
    pub(super) fn excluded(&self, address: IpAddr) -> Option<&IpNet> {
        self.exclude.iter().find(|block| block.contains(&address))
    }

    pub(super) fn describe(&self) -> String {
        let ranges = self.ranges.iter().map(|range| range.bounds().file_name());
        ranges.collect::<Vec<_>>().join(", ")
    }
}

/// First and last address of a range: what its state on disk is named by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bounds {
    pub(super) start: IpAddr,
    pub(super) end: IpAddr,
}

impl Bounds {
    pub(super) fn file_name(self) -> String {
        format!("{}-{}", self.start, self.end)
    }

    pub(super) fn from_file_name(name: &str) -> Option<Self> {
        let (start, end) = name.split_once('-')?;
        Some(Self {
            start: start.parse().ok()?,
            end: end.parse().ok()?,
        })
    }

    pub(super) fn contains(self, address: IpAddr) -> bool {
        address.is_ipv4() == self.start.is_ipv4()
            && (number(self.start)..=number(self.end)).contains(&number(address))
    }

    /// The address after this one, if it is still in the range.
    pub(super) fn after(self, address: IpAddr) -> Option<IpAddr> {
        let next = number(address).checked_add(1)?;
        (next <= number(self.end)).then(|| from_number(next, self.start))
    }
}

/// An address as a number, so that ranges of both families are arithmetic.
pub(super) fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u32::from(address).into(),
        IpAddr::V6(address) => address.into(),
    }
}

/// The address of this number in the family of `like`.
fn from_number(number: u128, like: IpAddr) -> IpAddr {
    match like {
        IpAddr::V4(_) => Ipv4Addr::from(u32::try_from(number).unwrap_or(u32::MAX)).into(),
        IpAddr::V6(_) => Ipv6Addr::from(number).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn range(subnet: &str) -> Result<Range, RangeError> {
        Range::new(subnet.parse().unwrap(), None, None, None)
    }

    fn free(range: &Range) -> Vec<String> {
        let all = range
            .iter_from(range.start)
            .filter(|address| !range.reserves(*address));
        all.map(|address| address.to_string()).collect()
    }

    #[test]
    fn reserved_addresses() {
        assert_eq!(
            free(&range("10.1.2.0/29").unwrap()).join(" "),
            "10.1.2.2 10.1.2.3 10.1.2.4 10.1.2.5 10.1.2.6"
        );
        assert_eq!(
            free(&range("10.1.2.0/31").unwrap()),
            ["10.1.2.0", "10.1.2.1"]
        );
        assert_eq!(free(&range("10.1.2.3/32").unwrap()), ["10.1.2.3"]);
        assert_eq!(free(&range("fd00::/126").unwrap()), ["fd00::2", "fd00::3"]);
        let gateway = Some(ip("10.0.0.2"));
        let named = Range::new("10.0.0.0/30".parse().unwrap(), None, None, gateway).unwrap();
        assert_eq!(free(&named), ["10.0.0.1"]);
    }

    #[test]
    fn whole_families() {
        assert!(range("0.0.0.0/0").unwrap().contains(ip("255.255.255.255")));
        let all = range("::/0").unwrap();
        assert!(all.contains(ip("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff")));
        assert_eq!(
            all.bounds()
                .after(ip("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff")),
            None
        );
        assert!(!all.contains(ip("1.2.3.4")), "another family");
    }

    #[test]
    fn what_makes_no_sense() {
        assert!(matches!(
            range("10.1.2.3/24"),
            Err(RangeError::HostBits { .. })
        ));
        let subnet: IpNet = "10.1.2.0/24".parse().unwrap();
        let case = |start: &str, end: &str| {
            Range::new(subnet, Some(ip(start)), Some(ip(end)), None).unwrap_err()
        };
        assert!(matches!(
            case("10.1.3.1", "10.1.3.2"),
            RangeError::Outside {
                what: "rangeStart",
                ..
            }
        ));
        assert!(matches!(
            case("10.1.2.9", "10.1.2.3"),
            RangeError::Reversed { .. }
        ));
        assert!(matches!(case("10.1.2.0", "10.1.2.1"), RangeError::Empty(_)));
        assert!(matches!(
            case("fd00::1", "10.1.2.3"),
            RangeError::Outside { .. }
        ));
    }

    #[test]
    fn names_of_state_files() {
        for text in ["10.0.0.0/24", "fd00:1:2:3::/64"] {
            let bounds = range(text).unwrap().bounds();
            assert_eq!(Bounds::from_file_name(&bounds.file_name()), Some(bounds));
        }
        assert_eq!(Bounds::from_file_name("nonsense"), None);
    }

    #[test]
    fn overlaps() {
        let (a, b) = (
            range("10.0.0.0/24").unwrap(),
            range("10.0.0.128/25").unwrap(),
        );
        assert!(a.overlaps(&b) && b.overlaps(&a));
        assert!(!a.overlaps(&range("10.0.1.0/24").unwrap()));
        assert!(!a.overlaps(&range("fd00::/64").unwrap()));
    }
}
