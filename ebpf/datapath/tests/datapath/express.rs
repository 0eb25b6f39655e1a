//! The short way of an uplink's packets: it does what the long way does, or nothing.

use hachi_abi::{
    ConfigFlags, Reason, Scope, ServiceFlags, ServiceKey, Tunnel, TunnelDevice, TunnelFlags,
};
use hachi_datapath::{Express, Outcome, V4, V6};
use proptest::prelude::*;

use crate::{
    lab::{
        CLIENT, CLIENT_PORT, Lab, NODE, Net, OVERLAY, PORT, REMOTE, SERVER, SERVICE_PORT, TCP, UDP,
        WORLD, both_families,
    },
    wire::{self, ACK, FIN, Frame, RST, SYN, View},
};

const OUT: (u16, u16) = (CLIENT_PORT, SERVICE_PORT);
const BACK: (u16, u16) = (PORT, CLIENT_PORT);

fn ends(view: &View) -> (u8, u16, u8, u16) {
    let (source, destination) = view.ports();
    let last = |addr: &[u8]| addr[addr.len() - 1];
    (last(&view.src), source, last(&view.dst), destination)
}

fn body(number: u8, ports: (u16, u16), flags: u8) -> Vec<u8> {
    match number {
        TCP => wire::tcp(ports, flags, b"odd"),
        _ => wire::udp(ports, b"odd"),
    }
}

fn client<const N: usize, F: Net<N>>(lab: &Lab<N, F>, number: u8, flags: u8) -> Frame {
    lab.wire(WORLD, NODE, number, &body(number, OUT, flags))
}

fn backend<const N: usize, F: Net<N>>(lab: &Lab<N, F>, number: u8, flags: u8) -> Frame {
    lab.wire(REMOTE, NODE, number, &body(number, BACK, flags))
}

/// The long way.
fn long<const N: usize, F: Net<N>>(lab: &mut Lab<N, F>, frame: &Frame) -> View {
    let (_, after) = lab.forwarded(frame);
    lab.translated(&after)
}

/// Has the flow between client and backend established, all noted in this second.
fn open<const N: usize, F: Net<N>>(lab: &mut Lab<N, F>, number: u8) {
    lab.serve_in(Scope::EXTERNAL, NODE, number, &[REMOTE]);
    long(lab, &client(lab, number, SYN));
    long(lab, &backend(lab, number, SYN | ACK));
    long(lab, &client(lab, number, ACK));
}

both_families! {
    /// Established: as by the long way, one hop less, to the MAC addresses that the route names.
    fn established_flows_are_sent_on(lab) {
        for number in [TCP, UDP] {
            open(lab, number);
            for frame in [client(lab, number, ACK), backend(lab, number, ACK)] {
                let (decided, after) = lab.early(&frame);
                assert_eq!(decided, Express::Send);
                let seen = after.check();
                let expected = long(lab, &frame);
                assert_eq!(ends(&seen), ends(&expected));
                assert_eq!(seen.macs, crate::lab::ROUTE);
                let hops = 14 + F::HOPS;
                assert_eq!(after.bytes[hops], frame.bytes[hops] - 1);
            }
        }
    }

    /// What opens or ends a flow, and a flow that is not current, goes the long way.
    fn the_rest_is_left(lab) {
        open(lab, TCP);
        let mut left = vec![];
        for flags in [SYN, SYN | ACK, FIN | ACK, RST] {
            left.extend([client(lab, TCP, flags), backend(lab, TCP, flags)]);
        }
        left.push(client(lab, TCP, ACK).partial());
        left.push(client(lab, UDP, 0));
        left.push(lab.wire(WORLD, NODE, TCP, &wire::tcp((1, SERVICE_PORT), ACK, b"")));
        left.push(lab.wire(CLIENT, NODE, TCP, &wire::tcp(OUT, ACK, b"")));
        left.push(lab.wire(WORLD, SERVER, TCP, &wire::tcp(OUT, ACK, b"")));
        left.push(lab.wire(WORLD, NODE, F::ICMP, &wire::icmp(F::ECHO[0], 0, [0; 4], b"x")));
        for frame in &left {
            lab.left_early(frame);
        }
        let current = client(lab, TCP, ACK);
        assert_eq!(lab.early(&current).0, Express::Send);
        let mut last_hop = current.clone();
        last_hop.bytes[14 + F::HOPS] = 1;
        lab.left_early(&last_hop);
        for length in 14..current.bytes.len() {
            let mut cut = current.clone();
            cut.bytes.truncate(length);
            lab.left_early(&cut);
        }
        lab.tables.flags &= !ConfigFlags::REDIRECT_NEIGH;
        lab.left_early(&current);
        lab.tables.flags |= ConfigFlags::REDIRECT_NEIGH;
        lab.wait(1);
        lab.left_early(&current);
        // The long way notes it, and the next goes the short one again.
        long(lab, &current);
        assert_eq!(lab.early(&current).0, Express::Send);
        lab.tables.revision += 1;
        lab.left_early(&current);
        lab.tables.revision = 0;
        lab.left_early(&current);
    }

    /// With a backend here, and for Pods' own flows to the world, the long way delivers.
    fn what_is_for_pods_is_left(lab) {
        lab.serve_in(Scope::EXTERNAL, NODE, TCP, &[SERVER]);
        let there = client(lab, TCP, SYN);
        lab.arrived(&there, SERVER);
        lab.left_early(&client(lab, TCP, ACK));
        let out = lab.wire(CLIENT, WORLD, UDP, &wire::udp(BACK, b""));
        lab.translated(&out);
        lab.left_early(&lab.wire(WORLD, NODE, UDP, &wire::udp(OUT, b"")));
        lab.left_early(&lab.wire(WORLD, NODE, UDP, &wire::udp((CLIENT_PORT, PORT), b"")));
    }

    /// Fragments, options and extension headers are read by the long way alone.
    fn headers_of_other_lengths_are_left(lab) {
        open(lab, UDP);
        let frame = client(lab, UDP, 0);
        for (at, bits) in if N == 4 { [(0, 0x01), (6, 0x20), (7, 0x01)] } else { [(0, 0x10), (6, 44), (6, 60)] } {
            let mut other = frame.clone();
            other.bytes[14 + at] ^= bits;
            lab.left_early(&other);
        }
        assert_eq!(lab.early(&frame).0, Express::Send);
    }

    /// A backend behind the tunnel answers through it: what comes by the uplink in its name is forged, and
    /// the long way drops it.
    fn nobody_speaks_for_who_is_behind_the_tunnel(lab) {
        open(lab, TCP);
        let answer = backend(lab, TCP, ACK);
        assert_eq!(lab.early(&answer).0, Express::Send);
        lab.tables.tunnel_device = TunnelDevice {
            ifindex: OVERLAY,
            ..TunnelDevice::default()
        };
        let behind = Tunnel {
            remote: [7; 16],
            flags: TunnelFlags::SEND,
        };
        lab.tables.tunnels.push((F::addr(REMOTE), N * 8, behind));
        lab.left_early(&answer);
        assert_eq!(lab.arrive(&answer).0, Outcome::Drop(Reason::SpoofedSource));
    }

    /// Who may not use a load balancer ends here, by the reason that the long way has.
    fn source_ranges_are_kept(lab) {
        open(lab, TCP);
        let key = ServiceKey {
            addr: F::addr(NODE),
            port: SERVICE_PORT.to_be_bytes(),
            proto: TCP,
            scope: Scope::EXTERNAL,
        };
        let service = lab.tables.services.get_mut(&key).expect("a Service");
        service.flags |= ServiceFlags::SOURCE_RANGES;
        let id = service.id;
        let syn = lab.wire(71, NODE, TCP, &wire::tcp(OUT, SYN, b""));
        let ack = lab.wire(71, NODE, TCP, &wire::tcp(OUT, ACK, b""));
        for frame in [&syn, &ack] {
            assert_eq!(lab.early(frame).0, Express::Drop(Reason::SourceRange));
            assert_eq!(lab.arrive(frame).0, Outcome::Drop(Reason::SourceRange));
        }
        // A live flow goes on, as the long way lets it.
        assert_eq!(lab.early(&client(lab, TCP, ACK)).0, Express::Send);
        lab.tables.ranges.push((id, F::addr(71), N * 8));
        lab.left_early(&syn);
        // The node itself always may.
        lab.left_early(&lab.wire(NODE, NODE, TCP, &wire::tcp(OUT, SYN, b"")));
    }
}

/// A packet of a random history.
#[derive(Clone, Copy, Debug)]
struct Step {
    from: u8,
    ports: (u16, u16),
    number: u8,
    flags: u8,
    wait: bool,
    raise: bool,
}

fn step() -> impl Strategy<Value = Step> {
    (
        prop::sample::select(vec![WORLD, 71, REMOTE, CLIENT]),
        prop::sample::select(vec![OUT, BACK, (CLIENT_PORT, 81), (41_000, SERVICE_PORT)]),
        prop::sample::select(vec![TCP, UDP]),
        prop::sample::select(vec![SYN, SYN | ACK, ACK, ACK, ACK, FIN | ACK, RST]),
        prop::bool::weighted(0.1),
        prop::bool::weighted(0.05),
    )
        .prop_map(|(from, ports, number, flags, wait, raise)| Step {
            from,
            ports,
            number,
            flags,
            wait,
            raise,
        })
}

/// Whatever has happened: what goes the short way comes out as by the long one.
fn agree<const N: usize, F: Net<N>>(steps: &[Step]) -> usize {
    let mut lab = Lab::<N, F>::new();
    for number in [TCP, UDP] {
        lab.serve_in(Scope::EXTERNAL, NODE, number, &[REMOTE, SERVER]);
    }
    let mut sent = 0;
    for step in steps {
        if step.wait {
            lab.wait(1);
        }
        lab.tables.revision += u32::from(step.raise);
        let frame = lab.wire(
            step.from,
            NODE,
            step.number,
            &body(step.number, step.ports, step.flags),
        );
        let (decided, early) = lab.early(&frame);
        let (outcome, after) = lab.arrive(&frame);
        let left = (outcome == Outcome::Forward).then(|| lab.leave(&after));
        match decided {
            Express::Leave => assert_eq!(early.bytes, frame.bytes),
            Express::Drop(reason) => assert_eq!(outcome, Outcome::Drop(reason)),
            Express::Send => {
                let (outcome, after) = left.expect("the long way forwards it");
                assert_eq!(outcome, Outcome::Pass(Reason::Translated));
                assert_eq!(ends(&early.check()), ends(&after.check()));
                sent += 1;
            }
        }
    }
    sent
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    #[test]
    fn both_ways_agree(steps in prop::collection::vec(step(), 1..80)) {
        agree::<4, V4>(&steps);
        agree::<16, V6>(&steps);
    }
}

/// The histories above are of use: some packets do go the short way.
#[test]
fn the_short_way_is_taken() {
    let step = |from, ports, flags| Step {
        from,
        ports,
        number: TCP,
        flags,
        wait: false,
        raise: false,
    };
    let mut steps = Vec::new();
    for port in [CLIENT_PORT, 41_000, 42_000, 43_000, 44_000, 45_000] {
        let out = (port, SERVICE_PORT);
        steps.extend([step(WORLD, out, SYN), step(REMOTE, (PORT, port), SYN | ACK)]);
        steps.extend([step(WORLD, out, ACK); 2]);
    }
    assert!(agree::<4, V4>(&steps) > 0);
    assert!(agree::<16, V6>(&steps) > 0);
}
