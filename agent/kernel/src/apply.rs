//! The compiler's ordered writes, joined into batches without changing their order.

use std::net::{IpAddr, SocketAddr, SocketAddrV4, SocketAddrV6};

use hachi_abi::{
    Backend, BackendKey, Config, MaglevKey, MaglevPiece, Member, RangeKey, ServiceKey, V4, V6, map,
};
use hachi_compile::{Frontend, Op, SlotsId};
use ipnet::IpNet;

use crate::{Datapath, KernelError, bytes::bytes_of, takeover::following};

/// Writes of one kind to one map that follow each other.
#[derive(Default)]
struct Run {
    map: Option<(&'static str, Kind)>,
    keys: Vec<u8>,
    values: Vec<u8>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Put,
    Delete,
}

impl Datapath {
    /// Carries out the writes in their order. Deleting what is not there is success.
    ///
    /// Afterwards the datapath counts as configured (its revision is not 0), with no write even.
    ///
    /// # Errors
    /// At the first write that fails; those before it are done. [`KernelError::Full`] if a map
    /// has no room.
    pub fn apply(&mut self, ops: &[Op]) -> Result<(), KernelError> {
        let mut run = Run::default();
        for op in ops {
            self.encode(op, &mut run)?;
        }
        self.flush(&mut run)?;
        let config = self.config()?;
        if config.revision == 0 {
            self.set_config(&Config {
                revision: self.first_revision,
                ..config
            })?;
        }
        Ok(())
    }

    fn encode(&self, op: &Op, run: &mut Run) -> Result<(), KernelError> {
        match op {
            Op::PutPolicy(key, entry) => {
                self.put(run, map::POLICY, &[bytes_of(key)], bytes_of(entry))
            }
            Op::DeletePolicy(key) => self.delete(run, map::POLICY, &[bytes_of(key)]),
            Op::PutPeer(address, peer) => self.put(
                run,
                map::PEERS[v(address)],
                &[&octets(address)],
                bytes_of(peer),
            ),
            Op::DeletePeer(address) => {
                self.delete(run, map::PEERS[v(address)], &[&octets(address)])
            }
            Op::PutCidr(net, peer) => {
                let (length, address) = lpm_key(net);
                self.put(
                    run,
                    map::CIDRS[v(&net.addr())],
                    &[&length, &address],
                    bytes_of(peer),
                )
            }
            Op::DeleteCidr(net) => {
                let (length, address) = lpm_key(net);
                self.delete(run, map::CIDRS[v(&net.addr())], &[&length, &address])
            }
            Op::PutEndpoint(address, endpoint) => self.put(
                run,
                map::ENDPOINTS[v(address)],
                &[&octets(address)],
                bytes_of(endpoint),
            ),
            Op::DeleteEndpoint(address) => {
                self.delete(run, map::ENDPOINTS[v(address)], &[&octets(address)])
            }
            Op::PutBackend {
                service,
                slot,
                backend,
            } => {
                let key = BackendKey {
                    service: service.id,
                    slot: *slot,
                };
                let value = backend_value(*backend);
                self.put(run, map::BACKENDS[of(service)], &[bytes_of(&key)], &value)
            }
            Op::DeleteBackend { service, slot } => {
                let key = BackendKey {
                    service: service.id,
                    slot: *slot,
                };
                self.delete(run, map::BACKENDS[of(service)], &[bytes_of(&key)])
            }
            Op::PutMember(service, backend) => {
                let key = member(service, *backend);
                self.put(run, map::MEMBERS[of(service)], &[&key], &PRESENT)
            }
            Op::DeleteMember(service, backend) => {
                let key = member(service, *backend);
                self.delete(run, map::MEMBERS[of(service)], &[&key])
            }
            Op::PutRange(service, range) => {
                let (length, key) = range_key(service, range);
                self.put(run, map::RANGES[of(service)], &[&length, &key], &PRESENT)
            }
            Op::DeleteRange(service, range) => {
                let (length, key) = range_key(service, range);
                self.delete(run, map::RANGES[of(service)], &[&length, &key])
            }
            Op::PutPiece {
                service,
                piece,
                slots,
            } => {
                let key = MaglevKey {
                    service: service.id,
                    piece: *piece,
                };
                let value = MaglevPiece { slots: *slots };
                let value = bytes_of(&value);
                self.put(run, map::MAGLEV[of(service)], &[bytes_of(&key)], value)
            }
            Op::DeletePiece { service, piece } => {
                let key = MaglevKey {
                    service: service.id,
                    piece: *piece,
                };
                self.delete(run, map::MAGLEV[of(service)], &[bytes_of(&key)])
            }
            Op::PutService(frontend, service) => {
                let key = service_key(frontend);
                self.put(
                    run,
                    map::SERVICES[v(&frontend.addr)],
                    &[&key],
                    bytes_of(service),
                )
            }
            Op::DeleteService(frontend) => self.delete(
                run,
                map::SERVICES[v(&frontend.addr)],
                &[&service_key(frontend)],
            ),
            Op::SetFlags(flags) => {
                self.flush(run)?;
                let config = self.config()?;
                self.set_config(&Config {
                    flags: *flags,
                    ..config
                })
            }
            Op::SetPorts(low, high) => {
                self.flush(run)?;
                let config = self.config()?;
                self.set_config(&Config {
                    port_low: *low,
                    port_high: *high,
                    ..config
                })
            }
            Op::PutUplink(index, uplink) => {
                self.put(run, map::UPLINKS, &[bytes_of(index)], bytes_of(uplink))
            }
            Op::SetTunnel(device) => {
                self.flush(run)?;
                let config = self.config()?;
                self.set_config(&Config {
                    tunnel: *device,
                    ..config
                })
            }
            Op::SetHost(device) => {
                self.flush(run)?;
                let config = self.config()?;
                self.set_config(&Config {
                    host: *device,
                    ..config
                })
            }
            Op::PutTunnel(net, tunnel) => {
                let (length, address) = lpm_key(net);
                self.put(
                    run,
                    map::TUNNELS[v(&net.addr())],
                    &[&length, &address],
                    bytes_of(tunnel),
                )
            }
            Op::DeleteTunnel(net) => {
                let (length, address) = lpm_key(net);
                self.delete(run, map::TUNNELS[v(&net.addr())], &[&length, &address])
            }
            Op::DeleteUplink(index) => self.delete(run, map::UPLINKS, &[bytes_of(index)]),
            Op::PutNonMasquerade(net) => {
                let (length, address) = lpm_key(net);
                self.put(
                    run,
                    map::NON_MASQUERADE[v(&net.addr())],
                    &[&length, &address],
                    bytes_of(&0_u32),
                )
            }
            Op::DeleteNonMasquerade(net) => {
                let (length, address) = lpm_key(net);
                self.delete(
                    run,
                    map::NON_MASQUERADE[v(&net.addr())],
                    &[&length, &address],
                )
            }
            Op::RaiseRevision => {
                self.flush(run)?;
                let config = self.config()?;
                let revision = match config.revision {
                    0 => self.first_revision,
                    revision => following(revision),
                };
                self.set_config(&Config { revision, ..config })
            }
        }
    }

    fn put(
        &self,
        run: &mut Run,
        map: &'static str,
        key: &[&[u8]],
        value: &[u8],
    ) -> Result<(), KernelError> {
        self.turn_to(run, map, Kind::Put)?;
        key.iter().for_each(|part| run.keys.extend_from_slice(part));
        run.values.extend_from_slice(value);
        Ok(())
    }

    fn delete(&self, run: &mut Run, map: &'static str, key: &[&[u8]]) -> Result<(), KernelError> {
        self.turn_to(run, map, Kind::Delete)?;
        key.iter().for_each(|part| run.keys.extend_from_slice(part));
        Ok(())
    }

    fn turn_to(&self, run: &mut Run, map: &'static str, kind: Kind) -> Result<(), KernelError> {
        if run.map != Some((map, kind)) {
            self.flush(run)?;
            run.map = Some((map, kind));
        }
        Ok(())
    }

    fn flush(&self, run: &mut Run) -> Result<(), KernelError> {
        if let Some((map, kind)) = run.map.take() {
            let table = self.table(map)?;
            match kind {
                Kind::Put => table.put(&run.keys, &run.values)?,
                Kind::Delete => table.delete(&run.keys)?,
            }
            run.keys.clear();
            run.values.clear();
        }
        Ok(())
    }
}

/// Which of the two families' maps.
fn v(address: &IpAddr) -> usize {
    usize::from(address.is_ipv6())
}

/// The same of a Service's id.
fn of(service: &SlotsId) -> usize {
    usize::from(service.v6)
}

/// The value of maps in which it is only asked whether a key is there.
const PRESENT: [u8; 4] = 1_u32.to_ne_bytes();

fn backend_value(backend: SocketAddr) -> Vec<u8> {
    match backend {
        SocketAddr::V4(address) => bytes_of(&v4(address)).to_vec(),
        SocketAddr::V6(address) => bytes_of(&v6(address)).to_vec(),
    }
}

fn v4(address: SocketAddrV4) -> Backend<V4> {
    Backend {
        addr: address.ip().octets(),
        port: address.port().to_be_bytes(),
        pad: [0; 2],
    }
}

fn v6(address: SocketAddrV6) -> Backend<V6> {
    Backend {
        addr: address.ip().octets(),
        port: address.port().to_be_bytes(),
        pad: [0; 2],
    }
}

fn member(service: &SlotsId, backend: SocketAddr) -> Vec<u8> {
    let service = service.id;
    match backend {
        SocketAddr::V4(address) => {
            let backend = v4(address);
            bytes_of(&Member { service, backend }).to_vec()
        }
        SocketAddr::V6(address) => {
            let backend = v6(address);
            bytes_of(&Member { service, backend }).to_vec()
        }
    }
}

fn range_key(service: &SlotsId, range: &IpNet) -> ([u8; 4], Vec<u8>) {
    let length = u32::from(range.prefix_len()) + u32::BITS;
    let service = service.id.to_ne_bytes();
    let key = match range.network() {
        IpAddr::V4(source) => bytes_of(&RangeKey {
            service,
            source: source.octets(),
        })
        .to_vec(),
        IpAddr::V6(source) => bytes_of(&RangeKey {
            service,
            source: source.octets(),
        })
        .to_vec(),
    };
    (length.to_ne_bytes(), key)
}

/// The bytes of an address; `as_octets` of the standard library is not stable yet.
fn octets(address: &IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

fn lpm_key(net: &IpNet) -> ([u8; 4], Vec<u8>) {
    (
        u32::from(net.prefix_len()).to_ne_bytes(),
        octets(&net.network()),
    )
}

fn service_key(frontend: &Frontend) -> Vec<u8> {
    let Frontend {
        addr,
        port,
        proto,
        scope,
    } = *frontend;
    let port = port.to_be_bytes();
    match addr {
        IpAddr::V4(addr) => bytes_of(&ServiceKey::<V4> {
            addr: addr.octets(),
            port,
            proto,
            scope,
        })
        .to_vec(),
        IpAddr::V6(addr) => bytes_of(&ServiceKey::<V6> {
            addr: addr.octets(),
            port,
            proto,
            scope,
        })
        .to_vec(),
    }
}
