//! Services: the destination becomes a backend, the reply seems to come from the Service, and
//! policy is judged on the backend.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

use hachi_abi::{ConfigFlags, Reason, Service, ServiceFlags};
use hachi_compile::{Frontend, Op};

use crate::{
    lab::{
        CLASS_CLIENT, CLASS_REMOTE, CLASS_SERVER, CLIENT_PORT, Net, PORT, SERVICE_PORT, SET, ack,
        answer, both_families, opener, udp,
    },
    wire::{self, ACK, Body, FIN, RST, SYN, TCP, UDP},
};

fn backend(ip: IpAddr) -> SocketAddr {
    SocketAddr::new(ip, PORT)
}

both_families! {
    /// To a backend on this node and back, every checksum right.
    fn a_local_backend_and_back(lab) {
        for proto in [TCP, UDP] {
            lab.serve(proto, &[backend(lab.server.ip)]);
            let out = lab.packet(lab.client, lab.service, opener(proto, SERVICE_PORT));
            let seen = lab.send(lab.client, &out.bytes()).delivered();
            assert_eq!((seen.source, seen.destination), (lab.client.ip, lab.server.ip));
            assert_eq!(seen.body.ports(), (CLIENT_PORT, PORT));

            let back = lab.packet(lab.server, lab.client.ip, answer(proto, PORT));
            let seen = lab.send(lab.server, &back.bytes()).delivered();
            assert_eq!((seen.source, seen.destination), (lab.service, lab.client.ip));
            assert_eq!(seen.body.ports(), (SERVICE_PORT, CLIENT_PORT));

            // And once more, by the entries that the first packets made.
            let later = match proto {
                TCP => ack((CLIENT_PORT, SERVICE_PORT)),
                _ => udp((CLIENT_PORT, SERVICE_PORT)),
            };
            let out = lab.packet(lab.client, lab.service, later);
            let seen = lab.send(lab.client, &out.bytes()).delivered();
            assert_eq!((seen.destination, seen.body.ports()), (lab.server.ip, (CLIENT_PORT, PORT)));
        }
    }

    /// To a backend on another node and back through the host's stack.
    fn a_remote_backend_and_back(lab) {
        for proto in [TCP, UDP] {
            lab.serve(proto, &[backend(lab.remote)]);
            let out = lab.packet(lab.client, lab.service, opener(proto, SERVICE_PORT));
            let seen = lab.send(lab.client, &out.bytes()).passed();
            assert_eq!((seen.source, seen.destination), (lab.client.ip, lab.remote));
            assert_eq!(seen.body.ports(), (CLIENT_PORT, PORT));

            let back = lab.packet_to(lab.remote, lab.client, answer(proto, PORT));
            let seen = lab.receive(lab.client, &back.bytes()).received();
            assert_eq!((seen.source, seen.destination), (lab.service, lab.client.ip));
            assert_eq!(seen.body.ports(), (SERVICE_PORT, CLIENT_PORT));
        }
    }

    /// Packets of odd and of large size keep their payload and get a right checksum.
    fn payloads_survive(lab) {
        lab.serve(UDP, &[backend(lab.server.ip)]);
        for size in [0, 1, 2, 63, 1400] {
            let data = (0..size).map(|byte| u8::try_from(byte % 251).expect("a byte")).collect();
            let body = Body::Udp { ports: (CLIENT_PORT, SERVICE_PORT), data };
            let out = lab.packet(lab.client, lab.service, body.clone());
            let seen = lab.send(lab.client, &out.bytes()).delivered();
            let Body::Udp { data: expected, .. } = body else { unreachable!("made above") };
            assert!(matches!(seen.body, Body::Udp { data, .. } if data == expected));
        }
    }

    /// A policy names the backend, and its port, not the Service's.
    fn policy_is_judged_on_the_backend(lab) {
        lab.serve(TCP, &[backend(lab.server.ip)]);
        lab.allow(SET, CLASS_SERVER, TCP, SERVICE_PORT);
        lab.isolate(lab.client, 0, SET);
        let out = lab.packet(lab.client, lab.service, opener(TCP, SERVICE_PORT));
        lab.send(lab.client, &out.bytes()).dropped(Reason::PolicyEgress);
        lab.allow(SET, CLASS_SERVER, TCP, PORT);
        lab.send(lab.client, &out.bytes()).delivered();

        lab.isolate(lab.server, SET, 0);
        lab.send(lab.client, &out.bytes()).dropped(Reason::PolicyIngress);
        lab.allow(SET, CLASS_CLIENT, TCP, PORT);
        let seen = lab.send(lab.client, &out.bytes()).delivered();
        assert_eq!(seen.destination, lab.server.ip);
    }

    /// A revision that rises has a flow through a Service judged again, rewritten as before.
    fn a_service_flow_is_judged_again(lab) {
        lab.serve(TCP, &[backend(lab.remote)]);
        lab.allow(SET, CLASS_REMOTE, TCP, PORT);
        lab.isolate(lab.client, 0, SET);
        let out = lab.packet(lab.client, lab.service, opener(TCP, SERVICE_PORT));
        lab.send(lab.client, &out.bytes()).passed();
        let later = lab.packet(lab.client, lab.service, ack((CLIENT_PORT, SERVICE_PORT)));
        lab.apply(&[Op::RaiseRevision]);
        assert_eq!(lab.send(lab.client, &later.bytes()).passed().destination, lab.remote);
        lab.isolate(lab.client, 0, SET + 100);
        lab.send(lab.client, &later.bytes()).dropped(Reason::PolicyEgress);
    }

    /// Flows spread over all backends; one flow stays with one.
    fn flows_spread_and_stay(lab) {
        let backends = [backend(lab.server.ip), backend(lab.other.ip), backend(lab.remote)];
        lab.serve(TCP, &backends);
        let mut seen = BTreeSet::new();
        for port in 50_000..50_200 {
            let send = |flags| {
                let body = Body::Tcp { ports: (port, SERVICE_PORT), flags, data: Vec::new() };
                let out = lab.packet(lab.client, lab.service, body);
                wire::Packet::parse(&lab.send(lab.client, &out.bytes()).packet).destination
            };
            let chosen = send(SYN);
            for _ in 0..3 {
                assert_eq!(send(ACK), chosen);
            }
            seen.insert(chosen);
        }
        assert_eq!(seen, backends.iter().map(SocketAddr::ip).collect());
    }

    /// No backend: a connection is reset at once; the answer seems to come from the Service.
    fn tcp_to_a_service_without_backends_is_reset(lab) {
        lab.serve(TCP, &[]);
        let send = |flags, data: &[u8]| {
            let body = Body::Tcp { ports: (CLIENT_PORT, SERVICE_PORT), flags, data: data.to_vec() };
            let out = lab.packet(lab.client, lab.service, body);
            lab.send(lab.client, &out.bytes())
        };
        // wire.rs sends the sequence number 1 and the acknowledgement number 2.
        for (flags, data, answer, numbers) in [
            (SYN, &b""[..], RST | ACK, (0, 2)),
            (FIN, &b"abc"[..], RST | ACK, (0, 5)),
            (ACK, &b"abc"[..], RST, (2, 0)),
        ] {
            let outcome = send(flags, data);
            let seen = outcome.answered();
            assert_eq!((seen.source, seen.destination), (lab.service, lab.client.ip));
            assert_eq!((seen.source_mac, seen.destination_mac), (lab.client.host_mac, lab.client.mac));
            let expected =
                Body::Tcp { ports: (SERVICE_PORT, CLIENT_PORT), flags: answer, data: Vec::new() };
            assert_eq!(seen.body, expected);
            assert_eq!(wire::tcp_numbers(&outcome.packet), numbers);
        }
        assert!(send(RST, b"").reason.is_drop(), "a reset has no answer");
        assert!(lab.datapath.conntrack().expect("the flows").is_empty());
    }

    /// No backend: a datagram is answered with "port unreachable", which quotes it.
    fn udp_to_a_service_without_backends_is_answered(lab) {
        lab.serve(UDP, &[]);
        let out = lab.packet(lab.client, lab.service, opener(UDP, SERVICE_PORT));
        let seen = lab.send(lab.client, &out.bytes()).answered();
        assert_eq!((seen.source, seen.destination), (lab.service, lab.client.ip));
        let (code, header) = match lab.net {
            Net::V4 => ((3, 3), 20),
            Net::V6 => ((1, 4), 40),
        };
        let Body::Icmp { kind, code: number, rest, data } = seen.body else { panic!("{seen:?}") };
        assert_eq!((kind, number, rest), (code.0, code.1, [0; 4]));
        assert_eq!(data[..header + 8], out.ip()[..header + 8], "the packet that asked");
    }

    /// Under a traffic policy of Local nothing is answered; unknown ports are the stack's.
    fn a_service_without_local_backends_is_silent(lab) {
        let frontend = Frontend { addr: lab.service, port: SERVICE_PORT, proto: TCP, scope: 0 };
        let flags = ServiceFlags::DROP_WHEN_EMPTY;
        let service = Service { id: 77, count: 0, flags, affinity: 0, table: 0 };
        lab.apply(&[Op::PutService(frontend, service)]);
        let out = lab.packet(lab.client, lab.service, opener(TCP, SERVICE_PORT));
        lab.send(lab.client, &out.bytes()).dropped(Reason::NoBackend);
        let port = lab.packet(lab.client, lab.service, opener(TCP, SERVICE_PORT + 1));
        lab.send(lab.client, &port.bytes()).passed();
        let proto = lab.packet(lab.client, lab.service, opener(UDP, SERVICE_PORT));
        lab.send(lab.client, &proto.bytes()).passed();
    }

    /// A Service that is gone no longer rewrites new flows.
    fn a_deleted_service_rewrites_nothing(lab) {
        lab.serve(TCP, &[backend(lab.server.ip)]);
        let out = lab.packet(lab.client, lab.service, opener(TCP, SERVICE_PORT));
        lab.send(lab.client, &out.bytes()).delivered();
        let frontend = Frontend { addr: lab.service, port: SERVICE_PORT, proto: TCP, scope: 0 };
        lab.apply(&[Op::DeleteService(frontend)]);
        assert_eq!(lab.send(lab.client, &out.bytes()).passed(), out);
    }

    /// A Pod that is its own backend: both addresses are rewritten, so that the replies leave it.
    fn a_pod_reaches_itself_through_a_service(lab) {
        for proto in [TCP, UDP] {
            lab.serve(proto, &[backend(lab.client.ip)]);
            lab.isolate(lab.client, SET, SET);
            let out = lab.packet(lab.client, lab.service, opener(proto, SERVICE_PORT));
            let seen = lab.send(lab.client, &out.bytes()).delivered();
            assert_eq!((seen.source, seen.destination), (lab.service, lab.client.ip));
            assert_eq!(seen.body.ports(), (CLIENT_PORT, PORT));

            let back = lab.packet(lab.client, lab.service, answer(proto, PORT));
            let seen = lab.send(lab.client, &back.bytes()).delivered();
            assert_eq!((seen.source, seen.destination), (lab.service, lab.client.ip));
            assert_eq!(seen.body.ports(), (SERVICE_PORT, CLIENT_PORT));
        }
    }

    /// Two flows whose replies could not be told apart: the second is given another port, and each
    /// gets its own answers, all checksums right.
    fn replies_belong_to_one_flow(lab) {
        lab.serve(TCP, &[backend(lab.server.ip)]);
        let out = lab.packet(lab.client, lab.service, opener(TCP, SERVICE_PORT));
        lab.send(lab.client, &out.bytes()).delivered();
        let direct = lab.packet(lab.client, lab.server.ip, opener(TCP, PORT));
        let seen = lab.send(lab.client, &direct.bytes()).delivered();
        let (port, to) = seen.body.ports();
        assert_eq!((seen.source, seen.destination, to), (lab.client.ip, lab.server.ip, PORT));
        assert!((32_768..=60_999).contains(&port) && port != CLIENT_PORT, "{port}");
        let later = lab.packet(lab.client, lab.server.ip, ack((CLIENT_PORT, PORT)));
        let seen = lab.send(lab.client, &later.bytes()).delivered();
        assert_eq!(seen.body.ports(), (port, PORT));
        for (sent, from, source) in
            [(CLIENT_PORT, lab.service, SERVICE_PORT), (port, lab.server.ip, PORT)]
        {
            let back = lab.packet(lab.server, lab.client.ip, ack((PORT, sent)));
            let seen = lab.send(lab.server, &back.bytes()).delivered();
            assert_eq!((seen.source, seen.destination), (from, lab.client.ip));
            assert_eq!(seen.body.ports(), (source, CLIENT_PORT));
        }
        // With no port to give the second flow is refused by its name.
        lab.apply(&[Op::SetPorts(0, 0)]);
        let other = lab.packet(lab.client, lab.server.ip, udp((CLIENT_PORT, PORT)));
        lab.serve(UDP, &[backend(lab.server.ip)]);
        let out = lab.packet(lab.client, lab.service, opener(UDP, SERVICE_PORT));
        lab.send(lab.client, &out.bytes()).delivered();
        lab.send(lab.client, &other.bytes()).dropped(Reason::TupleInUse);
    }

    /// While a program may be at its hook twice, a packet that passes the first one is through: the
    /// second would take a rewritten packet for another flow's.
    fn nothing_is_judged_twice_while_attachments_change(lab) {
        const THROUGH: i32 = 0; // TC_ACT_OK
        let out = lab.packet(lab.client, lab.service, opener(TCP, SERVICE_PORT));
        lab.send(lab.client, &out.bytes()).passed();
        let flags = ConfigFlags::REDIRECT_PEER;
        lab.apply(&[Op::SetFlags(flags | ConfigFlags::ONCE)]);
        let seen = lab.send(lab.client, &out.bytes());
        assert_eq!((seen.verdict, seen.reason), (THROUGH, Reason::PassedToStack));
        lab.isolate(lab.client, SET, SET);
        lab.send(lab.client, &out.bytes()).dropped(Reason::PolicyEgress);
        lab.apply(&[Op::SetFlags(flags)]);
        lab.isolate(lab.client, 0, 0);
        lab.send(lab.client, &out.bytes()).passed();
    }
}
