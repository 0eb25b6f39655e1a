//! The uplinks' programs: what they rewrite there and back, and what they must not touch. Every
//! packet that is read back has its checksums verified from scratch (see [`crate::wire`]).

use std::net::{IpAddr, SocketAddr};

use hachi_abi::{ConfigFlags, Reason, Uplink};
use hachi_compile::{Frontend, Op};
use hachi_kernel::{Hook, Origin};

use crate::{
    lab::{CLIENT_PORT, Lab, Net, OK, Outcome, PORT, Pod, SERVICE_PORT, both_families},
    wire::{self, ACK, Body, ETHERNET, Packet, RST, SCTP, SYN, TCP, UDP},
};

/// The external scope (`hachi_abi::Scope`).
const EXTERNAL: u8 = 1;
const MAC: [u8; 6] = [2, 0, 0, 0, 3, 1];
const PROTOS: [u8; 3] = [TCP, UDP, SCTP];

pub(crate) fn body(proto: u8, ports: (u16, u16), flags: u8) -> Body {
    match proto {
        TCP => Body::Tcp {
            ports,
            flags,
            data: b"odd".to_vec(),
        },
        UDP => Body::Udp {
            ports,
            data: b"odd".to_vec(),
        },
        _ => Body::Sctp {
            ports,
            // A chunk of DATA with four bytes.
            chunks: vec![0, 3, 0, 20, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4],
        },
    }
}

impl Lab {
    /// Makes the uplink one, with masquerade and forwarding on.
    pub(crate) fn connect(&mut self) {
        let mut uplink = Uplink::default();
        match self.node {
            IpAddr::V4(address) => uplink.v4 = address.octets(),
            IpAddr::V6(address) => uplink.v6 = address.octets(),
        }
        let flags =
            ConfigFlags::REDIRECT_PEER | ConfigFlags::REDIRECT_NEIGH | ConfigFlags::MASQUERADE;
        let length = if self.net == Net::V4 { 32 } else { 128 };
        let exempt = |address: IpAddr| {
            let net = format!("{address}/{length}").parse().expect("a block");
            Op::PutNonMasquerade(net)
        };
        self.apply(&[
            Op::SetFlags(flags),
            exempt(self.remote),
            exempt(self.node),
            Op::PutUplink(self.uplink, uplink),
        ]);
    }

    /// A packet on the wire.
    pub(crate) fn wire(&self, from: IpAddr, to: IpAddr, body: Body) -> Packet {
        Packet {
            source_mac: MAC,
            destination_mac: [2, 0, 0, 0, 3, 2],
            source: from,
            destination: to,
            body,
        }
    }

    pub(crate) fn arrive(&self, packet: &[u8]) -> Outcome {
        self.run(Hook::FromNet, Origin::Received, self.uplink, packet)
    }

    pub(crate) fn leave(&self, packet: &[u8]) -> Outcome {
        self.run(Hook::ToNet, Origin::Received, self.uplink, packet)
    }

    /// Makes a port of the node a Service's, for the network.
    pub(crate) fn publish(&mut self, port: u16, proto: u8, backends: &[IpAddr]) {
        let frontend = Frontend {
            addr: self.node,
            port,
            proto,
            scope: EXTERNAL,
        };
        let backends: Vec<_> = backends
            .iter()
            .map(|ip| SocketAddr::new(*ip, PORT))
            .collect();
        self.serve_at(frontend, u32::from(port) << 8 | u32::from(proto), &backends);
    }

    /// What the uplink has received and goes on by the stack (there is no route to forward by here),
    /// and what that leaves as.
    #[track_caller]
    fn through(&self, packet: &Packet) -> (Packet, Packet) {
        let outcome = self.arrive(&packet.bytes());
        let half = outcome.passed();
        let whole = self.leave(&outcome.packet).translated();
        (half, whole)
    }
}

impl Outcome {
    #[track_caller]
    pub(crate) fn translated(&self) -> Packet {
        assert_eq!((self.verdict, self.reason), (OK, Reason::Translated));
        Packet::parse(&self.packet)
    }

    /// It must have been left as it was.
    #[track_caller]
    fn untouched(&self, packet: &[u8]) {
        let left = matches!(self.reason, Reason::PassedToStack | Reason::PassedToNetwork);
        assert!(left && self.verdict == OK, "{self:?}");
        assert_eq!(self.packet, packet);
    }
}

fn ends(packet: &Packet) -> (SocketAddr, SocketAddr) {
    let (source, destination) = packet.body.ports();
    (
        SocketAddr::new(packet.source, source),
        SocketAddr::new(packet.destination, destination),
    )
}

fn at(ip: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(ip, port)
}

/// An ICMP error that quotes a packet up to eight bytes of what it carries.
fn quote(net: Net, too_big: bool, packet: &Packet) -> Body {
    let header = if net == Net::V4 { 20 } else { 40 };
    quote_of(net, too_big, &packet.ip()[..header + 8])
}

/// As [`quote`], of what begins with these bytes.
fn quote_of(net: Net, too_big: bool, ip: &[u8]) -> Body {
    let (kind, code) = match (net, too_big) {
        (Net::V4, true) => (3, 4),
        (Net::V4, false) => (3, 3),
        (Net::V6, true) => (2, 0),
        (Net::V6, false) => (1, 4),
    };
    Body::Icmp {
        kind,
        code,
        // An MTU of 1400, where either family has it.
        rest: [0, 0, 0x05, 0x78],
        data: ip.to_vec(),
    }
}

/// The ends of the packet that an error quotes; the quoted IPv4 header must be whole.
fn quoted(packet: &Packet) -> (SocketAddr, SocketAddr) {
    let Body::Icmp { rest, data, .. } = &packet.body else {
        panic!("{packet:?}")
    };
    assert_eq!(*rest, [0, 0, 0x05, 0x78], "what it tells is as it was");
    let (header, source, length) = if packet.source.is_ipv4() {
        assert!(wire::is_header_sum_right(&data[..20]), "the quoted header");
        (20, 12, 4)
    } else {
        // With a fragment header, if there is one.
        (if data[6] == 44 { 48 } else { 40 }, 8, 16)
    };
    let end = |address: usize, port: usize| {
        let ip = wire::address(&data[address..address + length]);
        let port = u16::from_be_bytes([data[header + port], data[header + port + 1]]);
        SocketAddr::new(ip, port)
    };
    (end(source, 0), end(source + length, 2))
}

/// Fragments of a packet: the first with 16 bytes of the body, the second with the rest.
fn fragments(packet: &Packet, id: u16) -> [Vec<u8>; 2] {
    let mut first = packet.body_bytes();
    let second = first.split_off(16);
    [(0, true, first), (2_u16, false, second)].map(|(offset, more, body)| {
        let ip = if packet.source.is_ipv4() {
            let word = offset | if more { 0x2000 } else { 0 };
            let ([a, b], [c, d]) = (id.to_be_bytes(), word.to_be_bytes());
            wire::ipv4(
                packet.source,
                packet.destination,
                packet.proto(),
                [a, b, c, d],
                &[],
                &body,
            )
        } else {
            let mut header = vec![packet.proto(), 0];
            header.extend_from_slice(&((offset << 3) | u16::from(more)).to_be_bytes());
            header.extend_from_slice(&u32::from(id).to_be_bytes());
            header.extend_from_slice(&body);
            wire::ip(packet.source, packet.destination, 44, &header)
        };
        [packet.ethernet(), ip].concat()
    })
}

/// Puts fragments together again, and reads what they were.
fn joined(template: &Packet, parts: [&[u8]; 2]) -> Packet {
    let v4 = template.source.is_ipv4();
    let header = ETHERNET + if v4 { 20 } else { 48 };
    let body = [&parts[0][header..], &parts[1][header..]].concat();
    let (from, length) = if v4 { (12, 4) } else { (8, 16) };
    let address = |part: &[u8], at: usize| {
        let at = ETHERNET + from + at;
        wire::address(&part[at..at + length])
    };
    let (source, destination) = (address(parts[0], 0), address(parts[0], length));
    assert_eq!(
        (address(parts[1], 0), address(parts[1], length)),
        (source, destination)
    );
    let ip = wire::ip(source, destination, template.proto(), &body);
    Packet::parse(&[template.ethernet(), ip].concat())
}

both_families! {
    /// Masquerade: there under the node's address and back to the Pod; two Pods' equal ports apart.
    fn masquerade_there_and_back(lab) {
        lab.connect();
        for proto in PROTOS {
            let mut seen = Vec::new();
            for pod in [lab.client, lab.other] {
                let out = lab.packet(pod, lab.world, body(proto, (CLIENT_PORT, PORT), SYN));
                let left = lab.leave(&lab.send(pod, &out.bytes()).packet).translated();
                let (source, destination) = ends(&left);
                assert_eq!((source.ip(), destination), (lab.node, at(lab.world, PORT)));
                seen.push(source.port());
                let back = lab.wire(lab.world, lab.node, body(proto, (PORT, source.port()), ACK));
                let got = lab.arrive(&back.bytes()).delivered();
                assert_eq!(ends(&got), (at(lab.world, PORT), at(pod.ip, CLIENT_PORT)));
            }
            assert_eq!(seen[0], CLIENT_PORT);
            assert_ne!(seen[1], CLIENT_PORT);
            let stranger = lab.wire(lab.world, lab.node, body(proto, (PORT + 1, seen[0]), ACK));
            lab.arrive(&stranger.bytes()).untouched(&stranger.bytes());
        }
    }

    /// Echo through masquerade: the identifier tells two Pods apart.
    fn pings_there_and_back(lab) {
        lab.connect();
        let kinds = if lab.net == Net::V4 { (8, 0) } else { (128, 129) };
        let echo = |kind, id: [u8; 2]| Body::Icmp {
            kind,
            code: 0,
            rest: [id[0], id[1], 0, 1],
            data: b"ping!".to_vec(),
        };
        let mut ids = Vec::new();
        for pod in [lab.client, lab.other] {
            let out = lab.packet(pod, lab.world, echo(kinds.0, [0x12, 0x34]));
            let left = lab.leave(&lab.send(pod, &out.bytes()).packet).translated();
            let Body::Icmp { rest, .. } = &left.body else { panic!("{left:?}") };
            assert_eq!(left.source, lab.node);
            ids.push([rest[0], rest[1]]);
            let back = lab.wire(lab.world, lab.node, echo(kinds.1, [rest[0], rest[1]]));
            let got = lab.arrive(&back.bytes()).delivered();
            assert_eq!((got.destination, got.body), (pod.ip, echo(kinds.1, [0x12, 0x34])));
        }
        assert_ne!(ids[0], ids[1]);
    }

    /// A node port with a backend here: the client is seen as it is, and sees the node.
    fn a_node_port_of_a_local_backend(lab) {
        lab.connect();
        for proto in PROTOS {
            lab.publish(SERVICE_PORT, proto, &[lab.server.ip]);
            let out = lab.wire(lab.world, lab.node, body(proto, (CLIENT_PORT, SERVICE_PORT), SYN));
            let got = lab.arrive(&out.bytes()).delivered();
            assert_eq!(ends(&got), (at(lab.world, CLIENT_PORT), at(lab.server.ip, PORT)));
            let back = lab.packet(lab.server, lab.world, body(proto, (PORT, CLIENT_PORT), ACK));
            let left = lab.leave(&lab.send(lab.server, &back.bytes()).packet).translated();
            assert_eq!(ends(&left), (at(lab.node, SERVICE_PORT), at(lab.world, CLIENT_PORT)));
        }
    }

    /// With a backend elsewhere both ends change, on both ways.
    fn a_node_port_of_a_remote_backend(lab) {
        lab.connect();
        for proto in PROTOS {
            lab.publish(SERVICE_PORT, proto, &[lab.remote]);
            for flags in [SYN, ACK] {
                let ports = (CLIENT_PORT, SERVICE_PORT);
                let out = lab.wire(lab.world, lab.node, body(proto, ports, flags));
                let (half, whole) = lab.through(&out);
                assert_eq!(ends(&half), (at(lab.world, CLIENT_PORT), at(lab.remote, PORT)));
                assert_eq!(ends(&whole), (at(lab.node, CLIENT_PORT), at(lab.remote, PORT)));
                let back = lab.wire(lab.remote, lab.node, body(proto, (PORT, CLIENT_PORT), ACK));
                let (half, whole) = lab.through(&back);
                assert_eq!(ends(&half), (at(lab.remote, PORT), at(lab.world, CLIENT_PORT)));
                assert_eq!(ends(&whole), (at(lab.node, SERVICE_PORT), at(lab.world, CLIENT_PORT)));
            }
        }
    }

    /// One client port to two node ports over one backend, here or elsewhere.
    fn two_node_ports_over_one_backend(lab) {
        lab.connect();
        for proto in PROTOS {
            for port in [SERVICE_PORT, 81] {
                lab.publish(port, proto, &[lab.server.ip]);
                let out = lab.wire(lab.world, lab.node, body(proto, (CLIENT_PORT, port), SYN));
                let (client, _) = ends(&lab.arrive(&out.bytes()).delivered());
                assert_eq!(client.port() == CLIENT_PORT, port == SERVICE_PORT, "{client}");
                let back = body(proto, (PORT, client.port()), ACK);
                let back = lab.packet(lab.server, lab.world, back);
                let left = lab.leave(&lab.send(lab.server, &back.bytes()).packet).translated();
                assert_eq!(ends(&left), (at(lab.node, port), at(lab.world, CLIENT_PORT)));
            }
            // And to the backend itself.
            let out = lab.wire(lab.world, lab.server.ip, body(proto, (CLIENT_PORT, PORT), SYN));
            let (client, _) = ends(&lab.arrive(&out.bytes()).delivered());
            assert_ne!(client.port(), CLIENT_PORT);
            let back = lab.packet(lab.server, lab.world, body(proto, (PORT, client.port()), ACK));
            let left = lab.leave(&lab.send(lab.server, &back.bytes()).packet).translated();
            assert_eq!(ends(&left), (at(lab.server.ip, PORT), at(lab.world, CLIENT_PORT)));
            for port in [82, 83] {
                lab.publish(port, proto, &[lab.remote]);
                let out = lab.wire(lab.world, lab.node, body(proto, (CLIENT_PORT, port), SYN));
                let (node, _) = ends(&lab.through(&out).1);
                let back = body(proto, (PORT, node.port()), ACK);
                let (_, whole) = lab.through(&lab.wire(lab.remote, lab.node, back));
                assert_eq!(ends(&whole), (at(lab.node, port), at(lab.world, CLIENT_PORT)));
            }
        }
    }

    /// "Too big" from a router outside, and "unreachable" from a Pod, both through masquerade.
    fn errors_through_masquerade(lab) {
        lab.connect();
        let router = lab.remote;
        for proto in PROTOS {
            let out = lab.packet(lab.client, lab.world, body(proto, (CLIENT_PORT, PORT), SYN));
            let sent = lab.leave(&lab.send(lab.client, &out.bytes()).packet).translated();
            let error = lab.wire(router, lab.node, quote(lab.net, true, &sent));
            let got = lab.arrive(&error.bytes()).delivered();
            assert_eq!((got.source, got.destination), (router, lab.client.ip));
            assert_eq!(quoted(&got), ends(&out));

            let back = lab.wire(lab.world, lab.node, body(proto, (PORT, CLIENT_PORT), ACK));
            let got = lab.arrive(&back.bytes()).delivered();
            let error = lab.packet(lab.client, lab.world, quote(lab.net, false, &got));
            let left = lab.leave(&lab.send(lab.client, &error.bytes()).packet).translated();
            assert_eq!((left.source, left.destination), (lab.node, lab.world));
            assert_eq!(quoted(&left), ends(&back));
        }
        // About what nobody sent: the node's own business.
        let out = lab.wire(lab.node, lab.world, body(TCP, (5, 6), ACK));
        let error = lab.wire(router, lab.node, quote(lab.net, true, &out)).bytes();
        lab.arrive(&error).untouched(&error);
    }

    /// Errors on either way of a node port's flow, with a backend here and elsewhere.
    fn errors_through_a_node_port(lab) {
        lab.connect();
        let router: IpAddr = if lab.net == Net::V4 { "203.0.113.9" } else { "2001:db8:9::9" }
            .parse()
            .expect("an address");
        for proto in PROTOS {
            lab.publish(SERVICE_PORT, proto, &[lab.server.ip]);
            let out = lab.wire(lab.world, lab.node, body(proto, (CLIENT_PORT, SERVICE_PORT), SYN));
            lab.arrive(&out.bytes()).delivered();
            let back = lab.packet(lab.server, lab.world, body(proto, (PORT, CLIENT_PORT), ACK));
            let sent = lab.leave(&lab.send(lab.server, &back.bytes()).packet).translated();
            let error = lab.wire(router, lab.node, quote(lab.net, true, &sent));
            let got = lab.arrive(&error.bytes()).delivered();
            assert_eq!((got.source, got.destination), (router, lab.server.ip));
            assert_eq!(quoted(&got), ends(&back));

            lab.publish(82, proto, &[lab.remote]);
            let out = lab.wire(lab.world, lab.node, body(proto, (CLIENT_PORT + 1, 82), SYN));
            let (_, there) = lab.through(&out);
            let error = lab.wire(router, lab.node, quote(lab.net, true, &there));
            let (half, whole) = lab.through(&error);
            assert_eq!((half.source, half.destination), (router, lab.world));
            // The router may be the next hop to the client, and takes nothing in its own name.
            assert_eq!((whole.source, whole.destination), (lab.node, lab.world));
            assert_eq!(quoted(&whole), ends(&out));

            // The answer is too long for the router.
            let back = lab.wire(lab.remote, lab.node, body(proto, (PORT, CLIENT_PORT + 1), ACK));
            let (_, sent) = lab.through(&back);
            let error = lab.wire(router, lab.node, quote(lab.net, true, &sent));
            let (_, whole) = lab.through(&error);
            assert_eq!((whole.source, whole.destination), (lab.node, lab.remote));
            assert_eq!(quoted(&whole), ends(&back));
        }
    }

    /// Errors about fragments, which fill packets more than others do: of the first, which has the
    /// ports, they are translated like any.
    fn errors_about_fragments(lab) {
        lab.connect();
        let router: IpAddr = if lab.net == Net::V4 { "203.0.113.9" } else { "2001:db8:9::9" }
            .parse()
            .expect("an address");
        let first = |packet: &Packet| fragments(packet, 7)[0].clone();
        let net = lab.net;
        let about = |bytes: &[u8]| quote_of(net, true, &bytes[ETHERNET..]);
        let datagram = |ports| Body::Udp { ports, data: vec![7; 64] };

        let out = lab.packet(lab.client, lab.world, datagram((CLIENT_PORT, PORT)));
        let sent = lab.leave(&lab.send(lab.client, &first(&out)).packet);
        assert_eq!(sent.reason, Reason::Translated);
        let error = lab.wire(router, lab.node, about(&sent.packet));
        let got = lab.arrive(&error.bytes()).delivered();
        assert_eq!((got.source, got.destination), (router, lab.client.ip));
        assert_eq!(quoted(&got), ends(&out));
        // A later one has no ports: the node's own business.
        let later = lab.wire(lab.node, lab.world, datagram((CLIENT_PORT, PORT)));
        let later = about(&fragments(&later, 7)[1]);
        let error = lab.wire(router, lab.node, later).bytes();
        lab.arrive(&error).untouched(&error);

        lab.publish(SERVICE_PORT, UDP, &[lab.remote]);
        let out = lab.wire(lab.world, lab.node, datagram((CLIENT_PORT + 1, SERVICE_PORT)));
        let half = lab.arrive(&first(&out)).packet;
        // This node itself has no way on that is wide enough, and tells the client.
        let error = lab.wire(lab.node, lab.world, about(&half));
        let got = lab.leave(&error.bytes()).translated();
        assert_eq!((got.source, got.destination), (lab.node, lab.world));
        assert_eq!(quoted(&got), ends(&out));
        // A router behind it has none.
        let sent = lab.leave(&half);
        assert_eq!(sent.reason, Reason::Translated);
        let (_, whole) = lab.through(&lab.wire(router, lab.node, about(&sent.packet)));
        assert_eq!((whole.source, whole.destination), (lab.node, lab.world));
        assert_eq!(quoted(&whole), ends(&out));
    }

    /// Fragments follow their first one, both ways; a later one of nothing known is left alone, and
    /// one that a Pod sends does not come as far as the uplink.
    fn fragments_through_translation(lab) {
        lab.connect();
        let data = vec![7; 64];
        let datagram = |ports| Body::Udp { ports, data: data.clone() };
        let out = lab.packet(lab.client, lab.world, datagram((CLIENT_PORT, PORT)));
        let sent = fragments(&out, 7).map(|part| {
            let outcome = lab.leave(&lab.send(lab.client, &part).packet);
            assert_eq!(outcome.reason, Reason::Translated);
            outcome.packet
        });
        let seen = joined(&out, [&sent[0], &sent[1]]);
        assert_eq!(ends(&seen), (at(lab.node, CLIENT_PORT), at(lab.world, PORT)));

        let back = lab.wire(lab.world, lab.node, datagram((PORT, CLIENT_PORT)));
        let [first, later] = fragments(&back, 8);
        lab.arrive(&later).untouched(&later);
        let got = [first, later].map(|part| {
            let outcome = lab.arrive(&part);
            assert_eq!(outcome.reason, Reason::DeliveredLocal);
            outcome.packet
        });
        let seen = joined(&back, [&got[0], &got[1]]);
        assert_eq!(ends(&seen), (at(lab.world, PORT), at(lab.client.ip, CLIENT_PORT)));

        lab.publish(SERVICE_PORT, UDP, &[lab.remote]);
        let out = lab.wire(lab.world, lab.node, datagram((CLIENT_PORT + 1, SERVICE_PORT)));
        let sent = fragments(&out, 9).map(|part| {
            let half = lab.arrive(&part);
            let outcome = lab.leave(&half.packet);
            assert_eq!(outcome.reason, Reason::Translated);
            outcome.packet
        });
        let seen = joined(&out, [&sent[0], &sent[1]]);
        assert_eq!(ends(&seen), (at(lab.node, CLIENT_PORT + 1), at(lab.remote, PORT)));
        let later = &fragments(&lab.packet(lab.client, lab.world, datagram((1, 2))), 10)[1];
        lab.send(lab.client, later).dropped(Reason::FragmentUnknown);
    }

    /// Options and extension headers are stepped over, and stay.
    fn options_are_stepped_over(lab) {
        lab.connect();
        lab.publish(SERVICE_PORT, TCP, &[lab.server.ip]);
        let syn = lab.wire(lab.world, lab.node, body(TCP, (CLIENT_PORT, SERVICE_PORT), SYN));
        let (to, segment) = (syn.destination, syn.body_bytes());
        let (ip, header) = if lab.net == Net::V4 {
            (wire::ipv4(syn.source, to, TCP, [0; 4], &[1; 12], &segment), 32)
        } else {
            let chain = [&[TCP, 0, 1, 4, 0, 0, 0, 0], &segment[..]].concat();
            (wire::ip(syn.source, to, 60, &chain), 48)
        };
        let outcome = lab.arrive(&[syn.ethernet(), ip.clone()].concat());
        assert_eq!(outcome.reason, Reason::DeliveredLocal);
        let got = &outcome.packet[ETHERNET..];
        let fixed = if lab.net == Net::V4 { 20 } else { 40 };
        assert_eq!(got[fixed..header], ip[fixed..header], "what extends the header");
        if lab.net == Net::V4 {
            assert!(wire::is_header_sum_right(&got[..header]));
        }
        // What follows is the segment that is wanted, checksum and all.
        let expected = Packet { destination: lab.server.ip, body: body(TCP, (CLIENT_PORT, PORT), SYN), ..syn };
        assert_eq!(got[header..], expected.body_bytes()[..]);
    }

    /// Wherever a packet is cut it is translated by neither program, delivered to nobody, and
    /// leaves no trace: the stack and `to_pod`, which drops it, get it as it was.
    fn a_packet_cut_short_is_left_alone(lab) {
        lab.connect();
        let header = if lab.net == Net::V4 { 20 } else { 40 };
        for proto in PROTOS {
            lab.publish(SERVICE_PORT, proto, &[lab.server.ip]);
            let ports = (CLIENT_PORT, SERVICE_PORT);
            let whole = lab.wire(lab.world, lab.node, body(proto, ports, SYN)).bytes();
            let direct = lab.wire(lab.world, lab.server.ip, body(proto, (1, PORT), SYN)).bytes();
            let out = lab.wire(lab.client.ip, lab.world, body(proto, ports, SYN)).bytes();
            for length in ETHERNET + header..whole.len() {
                lab.arrive(&whole[..length]).untouched(&whole[..length]);
                lab.arrive(&direct[..length]).untouched(&direct[..length]);
                lab.receive(lab.server, &direct[..length]).dropped(Reason::Malformed);
                lab.leave(&out[..length]).dropped(Reason::Malformed);
            }
        }
        assert!(lab.datapath.conntrack().expect("the flows").is_empty());
        assert_eq!(lab.datapath.map_use().expect("maps")[hachi_abi::map::NAT[usize::from(lab.net == Net::V6)]].0, 0);
    }

    /// A Pod's address on the wire is a forgery, whatever it claims to answer.
    fn forgeries_are_dropped(lab) {
        lab.connect();
        lab.publish(SERVICE_PORT, TCP, &[lab.server.ip]);
        for to in [lab.node, lab.server.ip, lab.remote] {
            let forged = lab.wire(lab.client.ip, to, body(TCP, (CLIENT_PORT, SERVICE_PORT), SYN));
            lab.arrive(&forged.bytes()).dropped(Reason::SpoofedSource);
        }
    }

    /// With every port taken a new flow is refused and counted; those that have one keep it.
    fn exhaustion_refuses_new_flows_only(lab) {
        lab.connect();
        lab.apply(&[Op::SetPorts(50_000, 50_007)]);
        let out = |lab: &Lab, pod: Pod, port, flags| {
            let packet = lab.packet(pod, lab.world, body(TCP, (port, PORT), flags)).bytes();
            lab.leave(&lab.send(pod, &packet).packet)
        };
        let mut ports: Vec<_> = (1_000..1_008)
            .map(|port| out(lab, lab.client, port, SYN).translated().body.ports().0)
            .collect();
        for port in 2_000..2_010 {
            // And told so.
            let answer = out(lab, lab.other, port, SYN).told(Reason::NatExhausted);
            assert_eq!(ends(&answer), (at(lab.world, PORT), at(lab.other.ip, port)));
            let Body::Tcp { flags, .. } = answer.body else { panic!("{answer:?}") };
            assert_eq!(flags, RST | ACK);
        }
        let again: Vec<_> = (1_000..1_008)
            .map(|port| out(lab, lab.client, port, ACK).translated().body.ports().0)
            .collect();
        assert_eq!(ports, again);
        ports.sort_unstable();
        assert_eq!(ports, (50_000..50_008).collect::<Vec<_>>());
        // A reset keeps its port for a moment, in which what is still under way finds its receiver.
        out(lab, lab.client, 1_003, RST).translated();
        out(lab, lab.other, 2_000, SYN).told(Reason::NatExhausted);
    }

    /// A client outside, whose backend is on another node, is told by the Service.
    fn exhaustion_finds_its_client(lab) {
        lab.connect();
        lab.publish(SERVICE_PORT, TCP, &[lab.remote]);
        lab.apply(&[Op::SetPorts(0, 0)]);
        let asked = lab.wire(lab.world, lab.node, body(TCP, (CLIENT_PORT, SERVICE_PORT), SYN));
        let half = lab.arrive(&asked.bytes());
        half.passed();
        let answer = lab.leave(&half.packet).told(Reason::NatExhausted);
        assert_eq!(
            ends(&answer),
            (at(lab.node, SERVICE_PORT), at(lab.world, CLIENT_PORT))
        );
    }

    /// Whatever the bytes are: one counter rises, and the verdict fits it (see `Lab::run`).
    fn noise_is_judged_like_anything_else(lab) {
        lab.connect();
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = || {
            // xorshift64*, by Vigna (2016).
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            u8::try_from(state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 56).expect("eight bits")
        };
        lab.publish(SERVICE_PORT, TCP, &[lab.server.ip]);
        lab.publish(SERVICE_PORT, UDP, &[lab.remote]);
        let open = lab.packet(lab.client, lab.world, body(UDP, (CLIENT_PORT, PORT), 0));
        lab.leave(&lab.send(lab.client, &open.bytes()).packet).translated();
        let into = [
            lab.wire(lab.world, lab.node, body(TCP, (CLIENT_PORT, SERVICE_PORT), SYN)),
            lab.wire(lab.world, lab.node, body(UDP, (CLIENT_PORT, SERVICE_PORT), 0)),
            lab.wire(lab.world, lab.node, body(UDP, (PORT, CLIENT_PORT), 0)),
            lab.wire(lab.remote, lab.node, quote(lab.net, true, &open)),
        ];
        let rounds = if hachi_testutil::in_guest() { 200_usize } else { 2000 };
        for round in 0..rounds {
            let mut packet = into[round % 4].bytes();
            for _ in 0..=random() % 4 {
                let at = ETHERNET + usize::from(random()) % (packet.len() - ETHERNET);
                packet[at] = random();
            }
            packet.truncate(packet.len() - usize::from(random() % 8));
            let outcome = lab.arrive(&packet);
            assert!(outcome.packet.len() >= packet.len() || outcome.reason == Reason::Rejected);
            lab.leave(&outcome.packet);
            lab.run(Hook::ToNet, Origin::Own, lab.uplink, &packet);
        }
    }
}
