//! The tables that the datapath fills, walked in parts by who keeps them clean.
//!
//! ```text
//! Flows::next ── a batch of some thousand entries ──> doomed? ──> deleted in one batch
//! ```
//! A walk is never atomic: an entry may have been renewed between its reading and its deletion. The
//! flow's next packet makes it anew.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use hachi_abi::{CtEntry, NatEntry, SocketEntry, SocketKey, SocketWay, Tuple, V4, V6, map};

use crate::{
    Datapath, Flow, KernelError, Translation,
    bytes::{bytes_of, read},
    conntrack::{coarse_seconds, flow},
    nat::{forward_key, translation},
    table::{Place, Table},
};

/// Conntrack, translations and the sockets' table, usable beside the [`Datapath`] and on another thread.
#[derive(Debug)]
pub struct Flows {
    conntrack: [Table; 2],
    nat: [Table; 2],
    sockets: [Table; 2],
}

/// Where a walk over both families of a table is; the default is its beginning.
#[derive(Debug, Default)]
pub struct Walk {
    family: usize,
    place: Place,
}

/// What a step of a walk did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Part {
    /// Entries that were looked at.
    pub seen: u32,
    /// Entries that were deleted.
    pub deleted: u32,
    /// Whether the walk is at its end.
    pub last: bool,
}

/// What a socket was given in place of a Service's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Given {
    /// The kernel's number of the socket.
    pub cookie: u64,
    /// The kernel's number of its network namespace.
    pub netns: u64,
    /// IANA protocol number.
    pub proto: u8,
    /// The Service's address.
    pub frontend: SocketAddr,
    /// The backend.
    pub backend: SocketAddr,
}

impl Datapath {
    /// The tables that the datapath fills.
    ///
    /// # Errors
    /// If their descriptors cannot be duplicated.
    pub fn flows(&self) -> Result<Flows, KernelError> {
        let of = |names: [&'static str; 2]| -> Result<[Table; 2], KernelError> {
            let [v4, v6] = names;
            Ok([self.table(v4)?.duplicate()?, self.table(v6)?.duplicate()?])
        };
        Ok(Flows {
            conntrack: of(map::CONNTRACK)?,
            nat: of(map::NAT)?,
            sockets: of(map::SOCKETS)?,
        })
    }
}

impl Flows {
    /// Entries that conntrack has room for, of both families.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        sum_of(&self.conntrack)
    }

    /// Entries of translations that there is room for, of both families.
    #[must_use]
    pub fn translations(&self) -> u32 {
        sum_of(&self.nat)
    }

    /// Goes on with a walk over conntrack by some thousand entries, and deletes those that are
    /// `doomed`; each direction of a flow is asked about on its own.
    ///
    /// # Errors
    /// If a table cannot be read or written; the walk can be begun again.
    pub fn next(
        &self,
        walk: &mut Walk,
        mut doomed: impl FnMut(&Flow) -> bool,
    ) -> Result<Part, KernelError> {
        let now = coarse_seconds();
        walk.step(&self.conntrack, |key, value, keys| {
            let flow = if key.len() == size_of::<Tuple<V4>>() {
                flow(
                    &read::<Tuple<V4>>(key),
                    &read::<CtEntry<V4>>(value),
                    now,
                    v4,
                )
            } else {
                flow(
                    &read::<Tuple<V6>>(key),
                    &read::<CtEntry<V6>>(value),
                    now,
                    v6,
                )
            };
            let doomed = doomed(&flow);
            if doomed {
                keys.extend_from_slice(key);
            }
            doomed
        })
    }

    /// As [`Self::next`], over translations. With the entry of a flow's answers, which is its claim to
    /// a tuple, the other half goes first: never does a flow go on whose tuple may be another's.
    ///
    /// # Errors
    /// As [`Self::next`].
    pub fn next_translations(
        &self,
        walk: &mut Walk,
        mut doomed: impl FnMut(&Translation) -> bool,
    ) -> Result<Part, KernelError> {
        let now = coarse_seconds();
        walk.step(&self.nat, |key, value, keys| {
            let doomed = if key.len() == size_of::<Tuple<V4>>() {
                let (tuple, entry) = (read::<Tuple<V4>>(key), read::<NatEntry<V4>>(value));
                let doomed = doomed(&translation(&tuple, &entry, now, v4));
                if doomed && let Some(forward) = forward_key(&tuple, &entry) {
                    keys.extend_from_slice(bytes_of(&forward));
                }
                doomed
            } else {
                let (tuple, entry) = (read::<Tuple<V6>>(key), read::<NatEntry<V6>>(value));
                let doomed = doomed(&translation(&tuple, &entry, now, v6));
                if doomed && let Some(forward) = forward_key(&tuple, &entry) {
                    keys.extend_from_slice(bytes_of(&forward));
                }
                doomed
            };
            if doomed {
                keys.extend_from_slice(key);
            }
            doomed
        })
    }

    /// Walks over conntrack from the beginning to the end.
    ///
    /// # Errors
    /// As [`Self::next`].
    pub fn all(&self, mut doomed: impl FnMut(&Flow) -> bool) -> Result<Part, KernelError> {
        let mut walk = Walk::default();
        let mut sum = Part::default();
        while !sum.last {
            let part = self.next(&mut walk, &mut doomed)?;
            sum.seen = sum.seen.saturating_add(part.seen);
            sum.deleted = sum.deleted.saturating_add(part.deleted);
            sum.last = part.last;
        }
        Ok(sum)
    }

    /// Takes from sockets what is `doomed`; returns what they had, once for each socket and backend
    /// that it knows by a Service's address.
    ///
    /// # Errors
    /// If a table cannot be read or written.
    pub fn take_sockets(
        &self,
        mut doomed: impl FnMut(&Given) -> bool,
    ) -> Result<Vec<Given>, KernelError> {
        let mut taken = Vec::new();
        for table in &self.sockets {
            let mut keys = Vec::new();
            table.each(|key, value| {
                let (given, way) = if key.len() == size_of::<SocketKey<V4>>() {
                    given(&read::<SocketKey<V4>>(key), &read(value), v4)
                } else {
                    given(&read::<SocketKey<V6>>(key), &read(value), v6)
                };
                if doomed(&given) {
                    keys.extend_from_slice(key);
                    if way == SocketWay::BACK {
                        taken.push(given);
                    }
                }
            })?;
            table.delete(&keys)?;
        }
        Ok(taken)
    }
}

impl Walk {
    /// Shows the entries of the next part to `visit`, which says whether one is doomed and adds to the
    /// keys that are deleted then.
    fn step(
        &mut self,
        tables: &[Table; 2],
        mut visit: impl FnMut(&[u8], &[u8], &mut Vec<u8>) -> bool,
    ) -> Result<Part, KernelError> {
        let Some(table) = tables.get(self.family) else {
            return Ok(Part {
                last: true,
                ..Part::default()
            });
        };
        let mut keys = Vec::new();
        let mut part = Part::default();
        let ended = table.next_part(&mut self.place, |key, value| {
            part.seen += 1;
            part.deleted += u32::from(visit(key, value, &mut keys));
        })?;
        table.delete(&keys)?;
        if ended {
            self.family += 1;
            self.place = Place::default();
            part.last = self.family == tables.len();
        }
        Ok(part)
    }
}

fn sum_of(tables: &[Table]) -> u32 {
    tables
        .iter()
        .map(Table::capacity)
        .fold(0, u32::saturating_add)
}

fn v4(address: [u8; V4]) -> IpAddr {
    Ipv4Addr::from(address).into()
}

fn v6(address: [u8; V6]) -> IpAddr {
    Ipv6Addr::from(address).into()
}

fn given<const N: usize>(
    key: &SocketKey<N>,
    entry: &SocketEntry<N>,
    address: impl Fn([u8; N]) -> IpAddr,
) -> (Given, u8) {
    let socket = |addr, port| SocketAddr::new(address(addr), u16::from_be_bytes(port));
    let (of_key, of_entry) = (socket(key.addr, key.port), socket(entry.addr, entry.port));
    let (frontend, backend) = if key.way == SocketWay::FORTH {
        (of_key, of_entry)
    } else {
        (of_entry, of_key)
    };
    let given = Given {
        cookie: u64::from_ne_bytes(key.cookie),
        netns: u64::from_ne_bytes(entry.netns),
        proto: key.proto,
        frontend,
        backend,
    };
    (given, key.way)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_say_the_same() {
        let (service, pod) = ([10, 96, 0, 10], [10, 0, 0, 1]);
        let key = |addr, port: u16, way| SocketKey {
            cookie: 7_u64.to_ne_bytes(),
            addr,
            port: port.to_be_bytes(),
            proto: 17,
            way,
        };
        let entry = |addr, port: u16| SocketEntry {
            netns: 9_u64.to_ne_bytes(),
            addr,
            port: port.to_be_bytes(),
            pad: [0; 2],
            service: 0,
        };
        let (back, _) = given(&key(pod, 53, SocketWay::BACK), &entry(service, 5353), v4);
        let (forth, _) = given(&key(service, 5353, SocketWay::FORTH), &entry(pod, 53), v4);
        assert_eq!(back, forth);
        assert_eq!(back.frontend.to_string(), "10.96.0.10:5353");
        assert_eq!(back.backend.to_string(), "10.0.0.1:53");
        assert_eq!((back.cookie, back.netns), (7, 9));
    }
}
