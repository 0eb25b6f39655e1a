//! Pins sizes, offsets and numbers: programs and user space, and agents of two releases, meet in
//! these bytes. After a change raise `ABI_VERSION`, then write the table anew with
//! `HACHI_WRITE_LAYOUT=1 cargo test -p hachi-abi --test layout`.

use std::{env, error::Error, fmt::Write as _, fs, mem::offset_of};

use hachi_abi::{
    ABI_VERSION, Affinity, AffinityKey, Backend, BackendKey, Config, ConfigFlags, Counter, CtEntry,
    CtFlags, Endpoint, FragKey, FragValue, HostDevice, MaglevKey, MaglevPiece, Member, NatEntry,
    NatFlags, Peer, PeerFlags, PolicyEntry, PolicyKey, RangeKey, Reason, SHAPE_ANY_PROTO,
    STATE_VERSION, Scope, Service, ServiceFlags, ServiceKey, SocketEntry, SocketKey, SocketWay,
    Tunnel, TunnelDevice, TunnelFlags, Tuple, Uplink, Verdict, map,
};

const TABLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/layout.txt");

macro_rules! types {
    ($($ty:ident $(<$n:literal>)? { $($field:ident),* $(,)? })*) => {{
        let mut out = String::new();
        $({
            type Pinned = $ty $(<$n>)?;
            // Every field must be named: one that is missing here does not compile.
            let _ = |value: Pinned| {
                let $ty { $($field: _),* } = value;
            };
            let name = concat!(stringify!($ty) $(, "<", $n, ">")?);
            let (size, align) = (size_of::<Pinned>(), align_of::<Pinned>());
            let _ = writeln!(out, "{name}: size {size}, align {align}");
            $({
                let offset = offset_of!(Pinned, $field);
                let _ = writeln!(out, "  {offset} {}", stringify!($field));
            })*
        })*
        out
    }};
}

fn layout() -> String {
    let mut out = format!("ABI_VERSION {ABI_VERSION}\nSTATE_VERSION {STATE_VERSION}\n");
    out += &types! {
        Config { revision, flags, port_low, port_high, tunnel, host, reserved }
        Endpoint { ifindex, ingress_set, egress_set, ingress_shapes, egress_shapes, mac, host_mac }
        Peer { class, flags }
        Counter { packets, bytes }
        PolicyKey { set, class, port, plen, proto }
        PolicyEntry { verdict, rule }
        ServiceKey<4> { addr, port, proto, scope }
        ServiceKey<16> { addr, port, proto, scope }
        Service { id, count, flags, affinity, table }
        MaglevKey { service, piece }
        MaglevPiece { slots }
        Member<4> { service, backend }
        Member<16> { service, backend }
        AffinityKey<4> { service, client }
        AffinityKey<16> { service, client }
        Affinity<4> { backend, last_used }
        Affinity<16> { backend, last_used }
        RangeKey<4> { service, source }
        RangeKey<16> { service, source }
        BackendKey { service, slot }
        Backend<4> { addr, port, pad }
        Backend<16> { addr, port, pad }
        Tuple<4> { src, dst, sport, dport, proto, pad }
        Tuple<16> { src, dst, sport, dport, proto, pad }
        CtEntry<4> {
            last_seen, revision, egress_rule, ingress_rule, nat_addr, nat_port, flags, tick, port, pad,
        }
        CtEntry<16> {
            last_seen, revision, egress_rule, ingress_rule, nat_addr, nat_port, flags, tick, port, pad,
        }
        FragKey<4> { src, dst, id, proto, pad }
        FragKey<16> { src, dst, id, proto, pad }
        FragValue { sport, dport }
        NatEntry<4> { last_seen, addr, port, flags, pad }
        NatEntry<16> { last_seen, addr, port, flags, pad }
        Uplink { v4, v6, flags }
        Tunnel { remote, flags }
        TunnelDevice { ifindex, vni, mtu, port, pad }
        HostDevice { near, far, mac, pad }
        SocketKey<4> { cookie, addr, port, proto, way }
        SocketKey<16> { cookie, addr, port, proto, way }
        SocketEntry<4> { netns, addr, port, pad, service }
        SocketEntry<16> { netns, addr, port, pad, service }
    };
    let numbers = [
        ("ConfigFlags::REDIRECT_PEER", ConfigFlags::REDIRECT_PEER),
        ("ConfigFlags::MASQUERADE", ConfigFlags::MASQUERADE),
        ("ConfigFlags::REDIRECT_NEIGH", ConfigFlags::REDIRECT_NEIGH),
        ("PeerFlags::LOCAL_NODE", PeerFlags::LOCAL_NODE),
        ("TunnelFlags::V6", TunnelFlags::V6),
        ("TunnelFlags::SEND", TunnelFlags::SEND),
        ("TunnelFlags::NODE", TunnelFlags::NODE),
        ("TunnelFlags::LOCAL", TunnelFlags::LOCAL),
        (
            "ServiceFlags::DROP_WHEN_EMPTY",
            ServiceFlags::DROP_WHEN_EMPTY,
        ),
        ("ServiceFlags::SOURCE_RANGES", ServiceFlags::SOURCE_RANGES),
        ("Scope::INTERNAL", Scope::INTERNAL.into()),
        ("Scope::EXTERNAL", Scope::EXTERNAL.into()),
        ("NatFlags::REPLY", NatFlags::REPLY.into()),
        ("NatFlags::FIN_OUT", NatFlags::FIN_OUT.into()),
        ("NatFlags::FIN_IN", NatFlags::FIN_IN.into()),
        ("NatFlags::RESET", NatFlags::RESET.into()),
        ("CtFlags::REPLY", CtFlags::REPLY.into()),
        ("CtFlags::NAT", CtFlags::NAT.into()),
        ("CtFlags::CLOSING", CtFlags::CLOSING.into()),
        ("CtFlags::HAIRPIN", CtFlags::HAIRPIN.into()),
        ("Verdict::Deny", Verdict::Deny as u32),
        ("Verdict::Allow", Verdict::Allow as u32),
        ("SHAPE_ANY_PROTO", SHAPE_ANY_PROTO),
        ("SocketWay::BACK", SocketWay::BACK.into()),
        ("SocketWay::FORTH", SocketWay::FORTH.into()),
    ];
    for (name, number) in numbers {
        let _ = writeln!(out, "{name} = {number}");
    }
    for reason in Reason::ALL {
        let _ = writeln!(
            out,
            "Reason::{reason:?} = {} {}",
            *reason as u8,
            reason.name()
        );
    }
    let maps = [
        map::CONFIG,
        map::POLICY,
        map::COUNTERS,
        map::ABI,
        map::UPLINKS,
    ]
    .into_iter()
    .chain(
        [
            map::ENDPOINTS,
            map::PEERS,
            map::CIDRS,
            map::SERVICES,
            map::BACKENDS,
            map::MAGLEV,
            map::MEMBERS,
            map::AFFINITY,
            map::RANGES,
            map::CONNTRACK,
            map::FRAGMENTS,
            map::SOCKETS,
            map::NAT,
            map::NON_MASQUERADE,
            map::TUNNELS,
        ]
        .into_iter()
        .flatten(),
    );
    for name in maps {
        let _ = writeln!(out, "map {name}");
    }
    out
}

#[test]
fn the_layout_is_the_committed_one() -> Result<(), Box<dyn Error>> {
    let layout = layout();
    if env::var_os("HACHI_WRITE_LAYOUT").is_some() {
        fs::write(TABLE, &layout)?;
    }
    let committed = fs::read_to_string(TABLE)?;
    assert!(
        layout == committed,
        "the map layout differs from tests/layout.txt: raise ABI_VERSION, then write the table \
         anew with HACHI_WRITE_LAYOUT=1 cargo test -p hachi-abi --test layout\n\
         committed:\n{committed}\nnow:\n{layout}"
    );
    Ok(())
}

/// Numbers index the counters, so they must have no gap.
#[test]
fn reasons_are_numbered_in_order() {
    for (number, reason) in Reason::ALL.iter().enumerate() {
        assert_eq!(*reason as usize, number, "{reason:?}");
    }
    assert_eq!(Reason::COUNT as usize, Reason::ALL.len());
}

/// Names are metrics' labels, so no two may be the same.
#[test]
fn names_of_reasons_are_unique() {
    let names: std::collections::BTreeSet<_> = Reason::ALL.iter().map(|r| r.name()).collect();
    assert_eq!(names.len(), Reason::ALL.len());
}
