//! What the maps hold now, as the compiler's own data, so that an agent that starts can tell what
//! is left to do.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

use hachi_abi::{
    Backend, BackendKey, Endpoint, MAGLEV_PIECE, MaglevKey, MaglevPiece, Member, Peer, RangeKey,
    Service, ServiceKey, Tunnel, V4, V6, map,
};
use hachi_compile::{Frontend, Image, Slots, SlotsId};
use ipnet::IpNet;

use crate::{Datapath, KernelError, bytes::read};

impl Datapath {
    /// Reads the maps back.
    ///
    /// A Service whose backends were only half written is returned with those before the gap, so
    /// that the difference to any desired state completes it.
    ///
    /// # Errors
    /// If a map cannot be read.
    pub fn snapshot(&self) -> Result<Image, KernelError> {
        let config = self.config()?;
        let mut image = Image {
            flags: config.flags,
            ports: (config.port_low, config.port_high),
            tunnel: config.tunnel,
            host: config.host,
            ..Image::default()
        };
        self.table(map::POLICY)?.each(|key, value| {
            image.policy.insert(read(key), read(value));
        })?;
        self.table(map::UPLINKS)?.each(|key, value| {
            image.uplinks.insert(read(key), read(value));
        })?;
        for family in 0..2 {
            self.table(map::NON_MASQUERADE[family])?.each(|key, _| {
                image.non_masquerade.extend(block(key));
            })?;
            self.table(map::TUNNELS[family])?.each(|key, value| {
                image
                    .tunnels
                    .extend(block(key).map(|net| (net, read::<Tunnel>(value))));
            })?;
            self.table(map::ENDPOINTS[family])?.each(|key, value| {
                image
                    .endpoints
                    .insert(address(key), read::<Endpoint>(value));
            })?;
            self.table(map::PEERS[family])?.each(|key, value| {
                image.peers.insert(address(key), read::<Peer>(value));
            })?;
            self.table(map::CIDRS[family])?.each(|key, value| {
                image
                    .cidrs
                    .extend(block(key).map(|net| (net, read::<Peer>(value))));
            })?;
            let mut used = HashMap::<u32, Use>::new();
            self.table(map::SERVICES[family])?.each(|key, value| {
                let service = read::<Service>(value);
                used.entry(service.id).or_default().add(&service);
                image.services.insert(frontend(key), service);
            })?;
            for (id, slots) in self.kept(family)?.0 {
                let Some(used) = used.get(&id) else { continue };
                let slots = slots.image(used);
                if !slots.is_empty() {
                    let id = SlotsId {
                        v6: family == 1,
                        id,
                    };
                    image.slots.insert(id, Arc::new(slots));
                }
            }
        }
        Ok(image)
    }

    /// Everything that is kept under Services' ids.
    fn kept(&self, family: usize) -> Result<Kept, KernelError> {
        let mut kept = Kept::default();
        self.table(map::BACKENDS[family])?.each(|key, value| {
            let BackendKey { service, slot } = read(key);
            kept.of(service).backends.insert(slot, backend(value));
        })?;
        self.table(map::MEMBERS[family])?.each(|key, _| {
            let (service, backend) = member(key);
            kept.of(service).members.insert(backend);
        })?;
        self.table(map::RANGES[family])?.each(|key, _| {
            if let Some((service, range)) = range(key) {
                kept.of(service).ranges.insert(range);
            }
        })?;
        self.table(map::MAGLEV[family])?.each(|key, value| {
            let MaglevKey { service, piece } = read(key);
            kept.of(service).table.insert(piece, read(value));
        })?;
        Ok(kept)
    }

    /// Removes what is under ids and beyond counts that no Service has, which an agent that died
    /// between two writes may have left: an [`Image`] has no place for it.
    pub(crate) fn remove_orphans(&self) -> Result<usize, KernelError> {
        let mut removed = 0;
        for family in 0..2 {
            let mut used = HashMap::<u32, Use>::new();
            self.table(map::SERVICES[family])?.each(|_, value| {
                let service = read::<Service>(value);
                // Frontends of one Service may be half way from one count to the next.
                used.entry(service.id).or_default().add(&service);
            })?;
            let has = |id: u32| used.contains_key(&id);
            let wanted: [(&str, Wanted<'_>); 4] = [
                (map::BACKENDS[family], &|key| {
                    let BackendKey { service, slot } = read(key);
                    used.get(&service).is_some_and(|used| slot < used.count)
                }),
                (map::MEMBERS[family], &|key| has(member(key).0)),
                (map::RANGES[family], &|key| {
                    range(key).is_some_and(|(id, _)| has(id))
                }),
                (map::MAGLEV[family], &|key| {
                    let MaglevKey { service, piece } = read(key);
                    used.get(&service)
                        .is_some_and(|used| piece as usize * MAGLEV_PIECE < used.table as usize)
                }),
            ];
            for (name, wanted) in wanted {
                let mut orphans = Vec::new();
                self.table(name)?.each(|key, _| {
                    if !wanted(key) {
                        orphans.extend_from_slice(key);
                        removed += 1;
                    }
                })?;
                self.table(name)?.delete(&orphans)?;
            }
        }
        Ok(removed)
    }
}

/// Whether somebody asks for a key.
type Wanted<'a> = &'a dyn Fn(&[u8]) -> bool;

/// How much of what is under an id its frontends ask for.
#[derive(Clone, Copy, Debug, Default)]
struct Use {
    count: u32,
    table: u32,
}

impl Use {
    fn add(&mut self, service: &Service) {
        self.count = self.count.max(service.count);
        self.table = self.table.max(service.table);
    }
}

/// What is kept under ids, as it was found.
#[derive(Debug, Default)]
struct Kept(HashMap<u32, Found>);

impl Kept {
    fn of(&mut self, id: u32) -> &mut Found {
        self.0.entry(id).or_default()
    }
}

#[derive(Debug, Default)]
struct Found {
    backends: BTreeMap<u32, SocketAddr>,
    members: BTreeSet<SocketAddr>,
    ranges: BTreeSet<IpNet>,
    table: BTreeMap<u32, MaglevPiece>,
}

impl Found {
    /// Slots and pieces count up to the first gap.
    fn image(self, used: &Use) -> Slots {
        let Self {
            backends,
            members,
            ranges,
            table,
        } = self;
        let places = (0..)
            .map_while(|piece| table.get(&piece))
            .flat_map(|piece| piece.slots);
        Slots {
            backends: (0..used.count)
                .map_while(|slot| backends.get(&slot).copied())
                .collect(),
            members: members.into_iter().collect(),
            table: places.take(used.table as usize).collect(),
            ranges: ranges.into_iter().collect(),
        }
    }
}

pub(crate) fn address(bytes: &[u8]) -> IpAddr {
    match bytes.len() {
        V4 => IpAddr::V4(Ipv4Addr::from(read::<[u8; V4]>(bytes))),
        _ => IpAddr::V6(Ipv6Addr::from(read::<[u8; V6]>(bytes))),
    }
}

fn block(key: &[u8]) -> Option<IpNet> {
    let (length, bytes) = key.split_at(size_of::<u32>());
    let length = u8::try_from(read::<u32>(length)).ok()?;
    IpNet::new(address(bytes), length).ok()
}

fn member(key: &[u8]) -> (u32, SocketAddr) {
    if key.len() == size_of::<Member<V4>>() {
        let Member { service, backend } = read::<Member<V4>>(key);
        (service, v4(&backend))
    } else {
        let Member { service, backend } = read::<Member<V6>>(key);
        (service, v6(&backend))
    }
}

fn range(key: &[u8]) -> Option<(u32, IpNet)> {
    let (length, key) = key.split_at(size_of::<u32>());
    let length = read::<u32>(length).checked_sub(u32::BITS)?;
    let (service, source): (_, IpAddr) = if key.len() == size_of::<RangeKey<V4>>() {
        let RangeKey { service, source } = read::<RangeKey<V4>>(key);
        (service, Ipv4Addr::from(source).into())
    } else {
        let RangeKey { service, source } = read::<RangeKey<V6>>(key);
        (service, Ipv6Addr::from(source).into())
    };
    let range = IpNet::new(source, u8::try_from(length).ok()?).ok()?;
    Some((u32::from_ne_bytes(service), range))
}

fn frontend(key: &[u8]) -> Frontend {
    if key.len() == size_of::<ServiceKey<V4>>() {
        let ServiceKey {
            addr,
            port,
            proto,
            scope,
        } = read::<ServiceKey<V4>>(key);
        Frontend {
            addr: Ipv4Addr::from(addr).into(),
            port: u16::from_be_bytes(port),
            proto,
            scope,
        }
    } else {
        let ServiceKey {
            addr,
            port,
            proto,
            scope,
        } = read::<ServiceKey<V6>>(key);
        Frontend {
            addr: Ipv6Addr::from(addr).into(),
            port: u16::from_be_bytes(port),
            proto,
            scope,
        }
    }
}

fn backend(value: &[u8]) -> SocketAddr {
    if value.len() == size_of::<Backend<V4>>() {
        v4(&read(value))
    } else {
        v6(&read(value))
    }
}

fn v4(backend: &Backend<V4>) -> SocketAddr {
    let Backend { addr, port, pad: _ } = *backend;
    SocketAddr::from((Ipv4Addr::from(addr), u16::from_be_bytes(port)))
}

fn v6(backend: &Backend<V6>) -> SocketAddr {
    let Backend { addr, port, pad: _ } = *backend;
    SocketAddr::from((Ipv6Addr::from(addr), u16::from_be_bytes(port)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_and_pieces_end_at_the_first_that_is_missing() {
        let one: SocketAddr = "10.0.0.1:80".parse().expect("an address");
        let piece = MaglevPiece {
            slots: [3; MAGLEV_PIECE],
        };
        let found = || Found {
            backends: BTreeMap::from([(0, one), (2, one)]),
            table: BTreeMap::from([(0, piece), (2, piece)]),
            ..Found::default()
        };
        let used = |count, table| Use { count, table };
        let expected = |slots: usize, places: usize| Slots {
            backends: vec![one; slots],
            table: vec![3; places],
            ..Slots::default()
        };
        assert_eq!(found().image(&used(3, 130)), expected(1, 64));
        assert_eq!(found().image(&used(1, 60)), expected(1, 60));
        assert_eq!(found().image(&used(0, 0)), expected(0, 0));
    }

    #[test]
    fn a_block_longer_than_its_family_is_no_block() {
        let mut key = 24_u32.to_ne_bytes().to_vec();
        key.extend_from_slice(&[10, 1, 2, 0]);
        assert_eq!(block(&key), "10.1.2.0/24".parse().ok());
        key[..4].copy_from_slice(&33_u32.to_ne_bytes());
        assert_eq!(block(&key), None);
    }
}
