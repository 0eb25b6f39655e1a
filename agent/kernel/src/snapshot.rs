//! What the maps hold now, as the compiler's own data, so that an agent that starts can tell what
//! is left to do.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use hachi_abi::{Backend, BackendKey, Endpoint, Peer, Service, ServiceKey, V4, V6, map};
use hachi_compile::{Frontend, Image, ServiceImage};
use ipnet::IpNet;

use crate::{
    Datapath, KernelError,
    bytes::{bytes_of, read},
};

impl Datapath {
    /// Reads the maps back.
    ///
    /// A Service whose backends were only half written is returned with those before the gap, so
    /// that the difference to any desired state completes it.
    ///
    /// # Errors
    /// If a map cannot be read.
    pub fn snapshot(&self) -> Result<Image, KernelError> {
        let mut image = Image {
            flags: self.config()?.flags,
            ..Image::default()
        };
        self.table(map::POLICY)?.each(|key, value| {
            image.policy.insert(read(key), read(value));
        })?;
        for family in 0..2 {
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
            let backends = self.backends(family)?;
            self.table(map::SERVICES[family])?.each(|key, value| {
                let service = read::<Service>(value);
                image
                    .services
                    .insert(frontend(key), service_image(&service, &backends));
            })?;
        }
        Ok(image)
    }

    fn backends(&self, family: usize) -> Result<HashMap<BackendKey, SocketAddr>, KernelError> {
        let mut backends = HashMap::new();
        self.table(map::BACKENDS[family])?.each(|key, value| {
            backends.insert(read(key), backend(value));
        })?;
        Ok(backends)
    }

    /// Removes backends that no Service refers to, which an agent that died between two writes
    /// may have left: an [`Image`] has no place for them.
    pub(crate) fn remove_orphans(&self) -> Result<usize, KernelError> {
        let mut removed = 0;
        for family in 0..2 {
            let mut counts = HashMap::<u32, u32>::new();
            self.table(map::SERVICES[family])?.each(|_, value| {
                let Service {
                    id,
                    count,
                    flags: _,
                    affinity: _,
                } = read(value);
                // Frontends of one Service may be half way from one count to the next.
                let known = counts.entry(id).or_default();
                *known = count.max(*known);
            })?;
            let mut orphans = Vec::new();
            self.table(map::BACKENDS[family])?.each(|key, _| {
                let key = read::<BackendKey>(key);
                if counts
                    .get(&key.service)
                    .is_none_or(|count| key.slot >= *count)
                {
                    orphans.extend_from_slice(bytes_of(&key));
                    removed += 1;
                }
            })?;
            self.table(map::BACKENDS[family])?.delete(&orphans)?;
        }
        Ok(removed)
    }
}

fn service_image(service: &Service, backends: &HashMap<BackendKey, SocketAddr>) -> ServiceImage {
    let Service {
        id,
        count,
        flags,
        affinity,
    } = *service;
    let backends = (0..count)
        .map_while(|slot| backends.get(&BackendKey { service: id, slot }).copied())
        .collect();
    ServiceImage {
        id,
        flags,
        affinity,
        backends,
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
        let Backend { addr, port, pad: _ } = read::<Backend<V4>>(value);
        SocketAddr::from((Ipv4Addr::from(addr), u16::from_be_bytes(port)))
    } else {
        let Backend { addr, port, pad: _ } = read::<Backend<V6>>(value);
        SocketAddr::from((Ipv6Addr::from(addr), u16::from_be_bytes(port)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_ends_at_the_first_slot_that_is_missing() {
        let one: SocketAddr = "10.0.0.1:80".parse().expect("an address");
        let backends = HashMap::from([
            (
                BackendKey {
                    service: 7,
                    slot: 0,
                },
                one,
            ),
            (
                BackendKey {
                    service: 7,
                    slot: 2,
                },
                one,
            ),
            (
                BackendKey {
                    service: 8,
                    slot: 1,
                },
                one,
            ),
        ]);
        let service = Service {
            id: 7,
            count: 3,
            flags: 1,
            affinity: 9,
        };
        let expected = ServiceImage {
            id: 7,
            flags: 1,
            affinity: 9,
            backends: vec![one],
        };
        assert_eq!(service_image(&service, &backends), expected);
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
