//! A node with a few Pods, and what tests do with it.
//!
//! ```text
//!  client, server, other: Pods of this node, each behind a veth pair
//!  remote: a Pod of another node     node: this node      world: some address out there
//! ```

use std::net::{IpAddr, SocketAddr};

use hachi_abi::{
    Config, ConfigFlags, Counter, Endpoint, Peer, PeerFlags, PolicyEntry, PolicyKey, Reason,
    SHAPE_ANY_PROTO, Service, Verdict,
};
use hachi_compile::{Frontend, Op, SlotsId};
use hachi_kernel::{Datapath, Hook, Origin, Run};

use crate::{
    support::World,
    wire::{ACK, Body, Packet, SYN, TCP, UDP},
};

/// The address family of a test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Net {
    V4,
    V6,
}

/// Verdicts of tc; a program that lets a packet go leaves it to the next one.
pub(crate) const OK: i32 = -1;
pub(crate) const SHOT: i32 = 2;
pub(crate) const REDIRECT: i32 = 7;

/// Classes of the lab's addresses.
pub(crate) const CLASS_CLIENT: u32 = 101;
pub(crate) const CLASS_SERVER: u32 = 102;
pub(crate) const CLASS_REMOTE: u32 = 103;

/// Policy sets.
pub(crate) const SET: u32 = 11;
pub(crate) const OTHER_SET: u32 = 12;

/// The ports that the lab's flows use.
pub(crate) const CLIENT_PORT: u16 = 40_000;
pub(crate) const PORT: u16 = 8080;
pub(crate) const SERVICE_PORT: u16 = 80;

/// A Pod of this node.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pod {
    pub(crate) ip: IpAddr,
    pub(crate) ifindex: u32,
    pub(crate) mac: [u8; 6],
    pub(crate) host_mac: [u8; 6],
}

/// A loaded datapath and its surroundings.
pub(crate) struct Lab {
    pub(crate) net: Net,
    pub(crate) datapath: Datapath,
    pub(crate) client: Pod,
    pub(crate) server: Pod,
    pub(crate) other: Pod,
    pub(crate) remote: IpAddr,
    pub(crate) node: IpAddr,
    pub(crate) world: IpAddr,
    pub(crate) service: IpAddr,
    /// The index of the node's uplink.
    pub(crate) uplink: u32,
}

/// Defines tests that run for both families.
macro_rules! both_families {
    ($($(#[$doc:meta])* fn $name:ident($lab:ident) $body:block)*) => {
        $($(#[$doc])* fn $name($lab: &mut $crate::lab::Lab) $body)*

        mod v4 {
            $(#[test]
            fn $name() {
                $crate::support::require_datapath!();
                $crate::pool::run($crate::lab::Net::V4, super::$name);
            })*
        }

        mod v6 {
            $(#[test]
            fn $name() {
                $crate::support::require_datapath!();
                $crate::pool::run($crate::lab::Net::V6, super::$name);
            })*
        }
    };
}
pub(crate) use both_families;

impl Lab {
    /// A lab whose datapath no agent has configured.
    pub(crate) fn bare(world: &World, net: Net) -> Self {
        Self::with(world, net, world.load())
    }

    /// The same around a datapath that was loaded in its own way.
    pub(crate) fn with(world: &World, net: Net, datapath: Datapath) -> Self {
        const NOWHERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED);
        let pod = |last: u8, name: &str| Pod {
            ip: NOWHERE,
            ifindex: world.veth(name),
            mac: [2, 0, 0, 0, 1, last],
            host_mac: [2, 0, 0, 0, 2, last],
        };
        let mut lab = Self {
            net,
            client: pod(1, "client"),
            server: pod(2, "server"),
            other: pod(3, "other"),
            remote: NOWHERE,
            node: NOWHERE,
            world: NOWHERE,
            service: NOWHERE,
            uplink: world.veth("uplink"),
            datapath,
        };
        lab.of(net);
        lab
    }

    /// Gives everything its address of a family.
    pub(crate) fn of(&mut self, net: Net) {
        let address = |last: u8, v4: &str, v6: &str| -> IpAddr {
            let text = match net {
                Net::V4 => format!("{v4}.{last}"),
                Net::V6 => format!("{v6}::{last:x}"),
            };
            text.parse().expect("an address")
        };
        self.net = net;
        self.client.ip = address(1, "10.0.0", "fd00:0");
        self.server.ip = address(2, "10.0.0", "fd00:0");
        self.other.ip = address(3, "10.0.0", "fd00:0");
        self.remote = address(4, "10.0.1", "fd00:1");
        self.node = address(5, "172.18.0", "fd00:18");
        self.world = address(6, "192.0.2", "2001:db8");
        self.service = address(10, "10.96.0", "fd00:96");
    }

    /// The lab's addresses, and no policy.
    pub(crate) fn configure(&mut self) {
        let peer = |class, flags| Peer { class, flags };
        let mut ops = vec![
            Op::SetFlags(ConfigFlags::REDIRECT_PEER),
            Op::SetPorts(32_768, 60_999),
            Op::PutPeer(self.client.ip, peer(CLASS_CLIENT, 0)),
            Op::PutPeer(self.server.ip, peer(CLASS_SERVER, 0)),
            Op::PutPeer(self.remote, peer(CLASS_REMOTE, 0)),
            Op::PutPeer(self.node, peer(0, PeerFlags::LOCAL_NODE)),
        ];
        ops.extend([self.client, self.server, self.other].map(|pod| endpoint(pod, 0, 0)));
        ops.push(Op::RaiseRevision);
        self.apply(&ops);
    }

    pub(crate) fn apply(&mut self, ops: &[Op]) {
        self.datapath.apply(ops).expect("applied");
    }

    /// Makes the policy sets of a Pod's two directions, 0 for not isolated, and judges anew.
    pub(crate) fn isolate(&mut self, pod: Pod, ingress: u32, egress: u32) {
        self.apply(&[endpoint(pod, ingress, egress), Op::RaiseRevision]);
    }

    /// Adds an entry for one port to a set.
    pub(crate) fn allow(&mut self, set: u32, class: u32, proto: u8, port: u16) {
        self.apply(&[entry(set, class, proto, port, 16, Verdict::Allow)]);
    }

    /// Adds a Service with these backends.
    pub(crate) fn serve(&mut self, proto: u8, backends: &[SocketAddr]) {
        let frontend = Frontend {
            addr: self.service,
            port: SERVICE_PORT,
            proto,
            scope: 0,
        };
        self.serve_at(frontend, 77, backends);
    }

    /// As [`Lab::serve`], at any address.
    pub(crate) fn serve_at(&mut self, frontend: Frontend, id: u32, backends: &[SocketAddr]) {
        let mut ops = (0..)
            .zip(backends)
            .map(|(slot, backend)| Op::PutBackend {
                service: SlotsId {
                    v6: backend.is_ipv6(),
                    id,
                },
                slot,
                backend: *backend,
            })
            .collect::<Vec<_>>();
        let count = u32::try_from(backends.len()).expect("few");
        ops.push(Op::PutService(
            frontend,
            Service {
                id,
                count,
                flags: 0,
                affinity: 0,
                table: 0,
            },
        ));
        self.apply(&ops);
    }

    /// Has a Pod send a packet.
    pub(crate) fn send(&self, pod: Pod, packet: &[u8]) -> Outcome {
        self.run(Hook::FromPod, Origin::Received, pod.ifindex, packet)
    }

    /// Has the host's stack send a packet to a Pod.
    pub(crate) fn receive(&self, pod: Pod, packet: &[u8]) -> Outcome {
        self.run(Hook::ToPod, Origin::Received, pod.ifindex, packet)
    }

    /// Runs a program, and sees to it that exactly one counter rises, by this one packet, and
    /// that verdict and counter agree.
    pub(crate) fn run(&self, hook: Hook, origin: Origin, ifindex: u32, packet: &[u8]) -> Outcome {
        let before = self.datapath.counters().expect("counters");
        let Run {
            verdict,
            packet: after,
            duration: _,
        } = self
            .datapath
            .test_run_from(origin, hook, ifindex, packet, 1)
            .expect("the program runs");
        let now = self.datapath.counters().expect("counters");
        let mut risen = Vec::new();
        for ((reason, old), (_, new)) in before.into_iter().zip(now) {
            let Counter { packets, bytes } = new;
            if (packets, bytes) != (old.packets, old.bytes) {
                risen.push((reason, packets - old.packets, bytes - old.bytes));
            }
        }
        let [(reason, 1, bytes)] = risen[..] else {
            panic!("{hook}: verdict {verdict}, counters {risen:?}");
        };
        assert_eq!(
            bytes,
            packet.len() as u64,
            "{reason:?} counts the packet's bytes"
        );
        // What finds no port comes back as its own answer, unless there is none to be given.
        let answered = verdict == REDIRECT && reason == Reason::NatExhausted;
        assert_eq!(
            verdict == SHOT,
            reason.is_drop() && !answered,
            "{hook}: verdict {verdict}, {reason:?}"
        );
        Outcome {
            reason,
            verdict,
            packet: after,
        }
    }

    /// A packet of a Pod to any address.
    pub(crate) fn packet(&self, from: Pod, to: IpAddr, body: Body) -> Packet {
        Packet {
            source_mac: from.mac,
            destination_mac: from.host_mac,
            source: from.ip,
            destination: to,
            body,
        }
    }

    /// A packet of any address to a Pod, as the host's stack sends it.
    pub(crate) fn packet_to(&self, from: IpAddr, to: Pod, body: Body) -> Packet {
        Packet {
            source_mac: to.host_mac,
            destination_mac: to.mac,
            source: from,
            destination: to.ip,
            body,
        }
    }

    /// The datapath's revision and flags.
    pub(crate) fn revision(&self) -> u32 {
        let Config { revision, .. } = Config {
            revision: self.datapath.revision().expect("a revision"),
            ..Config::default()
        };
        revision
    }
}

/// What became of a packet.
#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    pub(crate) reason: Reason,
    pub(crate) verdict: i32,
    pub(crate) packet: Vec<u8>,
}

impl Outcome {
    /// The packet must have been dropped for this reason.
    #[track_caller]
    pub(crate) fn dropped(&self, reason: Reason) {
        assert_eq!((self.verdict, self.reason), (SHOT, reason));
    }

    /// The packet must have become its own answer; returns that.
    #[track_caller]
    pub(crate) fn answered(&self) -> Packet {
        self.told(Reason::Rejected)
    }

    /// As [`Self::answered`], counted as this.
    #[track_caller]
    pub(crate) fn told(&self, reason: Reason) -> Packet {
        assert_eq!((self.verdict, self.reason), (REDIRECT, reason));
        Packet::parse(&self.packet)
    }

    /// The packet must have been redirected to a local Pod; returns it.
    #[track_caller]
    pub(crate) fn delivered(&self) -> Packet {
        assert_eq!(
            (self.verdict, self.reason),
            (REDIRECT, Reason::DeliveredLocal)
        );
        Packet::parse(&self.packet)
    }

    /// The packet must have gone to the host's stack; returns it.
    #[track_caller]
    pub(crate) fn passed(&self) -> Packet {
        assert_eq!((self.verdict, self.reason), (OK, Reason::PassedToStack));
        Packet::parse(&self.packet)
    }

    /// The packet must have come out of the host's stack to the Pod; returns it.
    #[track_caller]
    pub(crate) fn received(&self) -> Packet {
        assert_eq!(
            (self.verdict, self.reason),
            (OK, Reason::DeliveredFromStack)
        );
        Packet::parse(&self.packet)
    }
}

/// An endpoint whose sets have entries of every shape.
pub(crate) fn endpoint(pod: Pod, ingress: u32, egress: u32) -> Op {
    let shapes = (1 << (SHAPE_ANY_PROTO + 1)) - 1;
    Op::PutEndpoint(
        pod.ip,
        Endpoint {
            ifindex: pod.ifindex,
            ingress_set: ingress,
            egress_set: egress,
            ingress_shapes: shapes,
            egress_shapes: shapes,
            mac: pod.mac,
            host_mac: pod.host_mac,
        },
    )
}

/// The key of a policy entry with a port prefix.
pub(crate) fn key(set: u32, class: u32, proto: u8, port: u16, plen: u8) -> PolicyKey {
    PolicyKey {
        set,
        class,
        port: port.to_be_bytes(),
        plen,
        proto,
    }
}

/// A policy entry with a port prefix; its rule is the set's number.
pub(crate) fn entry(set: u32, class: u32, proto: u8, port: u16, plen: u8, verdict: Verdict) -> Op {
    let value = PolicyEntry {
        verdict: verdict as u32,
        rule: set,
    };
    Op::PutPolicy(key(set, class, proto, port, plen), value)
}

/// A TCP segment from the flow's opener.
pub(crate) fn syn(port: u16) -> Body {
    Body::Tcp {
        ports: (CLIENT_PORT, port),
        flags: SYN,
        data: Vec::new(),
    }
}

/// A later TCP segment of either side.
pub(crate) fn ack(ports: (u16, u16)) -> Body {
    Body::Tcp {
        ports,
        flags: ACK,
        data: b"hello".to_vec(),
    }
}

/// The answer to [`syn`].
pub(crate) fn syn_ack(port: u16) -> Body {
    Body::Tcp {
        ports: (port, CLIENT_PORT),
        flags: SYN | ACK,
        data: Vec::new(),
    }
}

/// A UDP datagram.
pub(crate) fn udp(ports: (u16, u16)) -> Body {
    Body::Udp {
        ports,
        data: b"datagram".to_vec(),
    }
}

/// A packet that opens a flow, of either protocol.
pub(crate) fn opener(proto: u8, port: u16) -> Body {
    match proto {
        TCP => syn(port),
        UDP => udp((CLIENT_PORT, port)),
        other => panic!("protocol {other} has no ports here"),
    }
}

/// The first answer to [`opener`].
pub(crate) fn answer(proto: u8, port: u16) -> Body {
    match proto {
        TCP => syn_ack(port),
        UDP => udp((port, CLIENT_PORT)),
        other => panic!("protocol {other} has no ports here"),
    }
}
