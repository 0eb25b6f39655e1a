//! Hops that take less than both ends do: TCP and datagrams that must not be fragmented find out and
//! go on, whoever translates or carries them in between (RFC 1191, RFC 8201).
//!
//! ```text
//!   host ──narrow── router ──wide or narrow── node1, node2, node3
//! ```
//! The narrow hops are routes of the router with an MTU of their own.

use std::{
    io,
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use hachi_cluster::{Family, Netns, Network, eventually, workload::probe::unspecified};
use nix::errno::Errno;
use rustix::net::sockopt::{
    Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery, ip_mtu, ipv6_mtu, set_ip_mtu_discover,
    set_ipv6_mtu_discover,
};

use crate::{
    changes::ip,
    traffic::{Path, exchange, pattern},
    world::{NODES, World, node_port},
};

/// What narrow hops take, bytes.
const NARROW: u32 = 1_300;

/// How long a step may take.
const WAIT: Duration = Duration::from_secs(5);

/// Bytes of a stream.
const STREAM: u64 = 2 << 20;

/// The addresses of the router and of the host on their link.
const HOST_LINK: [(&str, &str, u8); 2] = [
    ("198.51.100.1", "198.51.100.2", 24),
    ("2001:db8:51::1", "2001:db8:51::2", 64),
];

/// The path MTU from the client to the server, and back.
#[derive(Clone, Copy)]
struct Both(u32, u32);

/// A host that a router and a narrow hop are before, as they are before much of the world.
struct Host {
    netns: Netns,
}

impl Host {
    fn join(world: &World) -> Result<Self> {
        let cluster = world.cluster();
        let netns = Netns::create(&format!("{}-distant", cluster.id().stem()))?;
        let name = netns.name().to_owned();
        cluster.fabric().enter(|| -> Result<()> {
            ip(&format!(
                "link add distant type veth peer name eth0 netns {name}"
            ))?;
            ip("link set distant up")?;
            // One router is both here, the one that reports to a node and the one on the way back to
            // the host. It would take nothing that comes by again with its own address.
            for (router, host, length) in HOST_LINK {
                ip(&format!("address add {router}/{length} dev distant nodad"))?;
                ip(&format!("route add {host} dev distant mtu {NARROW}"))?;
            }
            Ok(())
        })??;
        netns.enter(|| -> Result<()> {
            std::fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "0")?;
            ip("link set eth0 up")?;
            for (router, host, length) in HOST_LINK {
                ip(&format!("address add {host}/{length} dev eth0 nodad"))?;
                ip(&format!("route add default via {router}"))?;
            }
            Ok(())
        })??;
        Ok(Self { netns })
    }

    fn address(v4: bool) -> Result<IpAddr> {
        let (_, host, _) = HOST_LINK[usize::from(!v4)];
        Ok(host.parse()?)
    }
}

/// Makes hops narrow: to Pods where the router knows them, else to the nodes, between which the
/// tunnel is. `mtu`: what they take.
fn narrow(world: &World, mtu: u32) -> Result<()> {
    let options = world.cluster().options();
    let mut routes = Vec::new();
    for (i, name) in NODES.iter().enumerate() {
        for node in &world.cluster().nodes()[i].addresses {
            if options.network == Network::Routed {
                let bridge = if i == 2 { "br1" } else { "br0" };
                routes.push(format!("route add {node} dev {bridge} mtu {mtu}"));
                continue;
            }
            let blocks = "-o=jsonpath={.spec.podCIDRs[*]}";
            let blocks = world.cluster().kubectl(&["get", "node", name, blocks])?;
            for block in blocks.split_whitespace() {
                if block.contains(':') == node.is_ipv6() {
                    routes.push(format!("route replace {block} via {node} mtu {mtu}"));
                }
            }
        }
    }
    let change = || routes.iter().try_for_each(|route| ip(route).map(drop));
    world.cluster().fabric().enter(change)?
}

/// Forgets what was found out of paths.
fn forget(netns: &Netns) -> Result<()> {
    netns.enter(|| -> Result<()> {
        ip("-4 route flush cache")?;
        ip("-6 route flush cache").map(drop)
    })?
}

/// The path MTU of a connected socket, as far as it is known.
fn path_mtu(socket: &UdpSocket) -> Result<u32> {
    let mtu = if socket.peer_addr()?.is_ipv4() {
        ip_mtu(socket)
    } else {
        ipv6_mtu(socket)
    };
    Ok(mtu?)
}

/// Lets nothing of a socket be fragmented.
fn keep_whole(socket: &UdpSocket) -> Result<()> {
    if socket.local_addr()?.is_ipv4() {
        set_ip_mtu_discover(socket, Ipv4PathMtuDiscovery::DO)?;
    } else {
        set_ipv6_mtu_discover(socket, Ipv6PathMtuDiscovery::DO)?;
    }
    Ok(())
}

/// Bytes of the datagram that fills a packet.
fn payload(mtu: u32, socket: &UdpSocket) -> Result<usize> {
    let headers = if socket.local_addr()?.is_ipv4() {
        28
    } else {
        48
    };
    Ok(mtu as usize - headers)
}

/// Sends what is too long until that is told, and then the longest datagram that passes.
fn finds(socket: &UdpSocket, expected: u32) -> Result<Vec<u8>> {
    let first = path_mtu(socket)?;
    ensure!(first >= expected, "{first} is known already");
    let too_long = pattern(3, payload(first, socket)?);
    if first > expected {
        eventually(WAIT, || match socket.send(&too_long) {
            Err(error) if error.raw_os_error() == Some(Errno::EMSGSIZE as i32) => Ok(()),
            Err(error) => Err(error.into()),
            Ok(_) => bail!("nobody tells that {first} bytes are too many"),
        })?;
    }
    let found = path_mtu(socket)?;
    ensure!(found == expected, "the path MTU is {found}, not {expected}");
    // It was told to the call; it need not be told again.
    let _: Option<io::Error> = socket.take_error()?;
    let fits = pattern(5, payload(found, socket)?);
    socket.send(&fits)?;
    Ok(fits)
}

/// Waits for one datagram among others.
fn receives(socket: &UdpSocket, expected: &[u8]) -> Result<SocketAddr> {
    let mut buffer = [0; 2_048];
    loop {
        let (length, peer) = socket.recv_from(&mut buffer).context("nothing came")?;
        if &buffer[..length] == expected {
            return Ok(peer);
        }
    }
}

/// Datagrams that may not be fragmented, there and back.
fn datagrams(path: &Path<'_>, mtu: Both) -> Result<()> {
    let server = path
        .to
        .enter(|| UdpSocket::bind((path.server, path.port())))??;
    let target = path.target(server.local_addr()?);
    let client = path.from.enter(|| UdpSocket::bind(unspecified(target)))??;
    for socket in [&client, &server] {
        keep_whole(socket)?;
        socket.set_read_timeout(Some(WAIT))?;
    }
    client.connect(target)?;
    let sent = finds(&client, mtu.0).with_context(|| format!("datagrams to {target}"))?;
    let peer = receives(&server, &sent).with_context(|| format!("datagrams to {target}"))?;
    path.check(peer)?;
    server.connect(peer)?;
    let sent = finds(&server, mtu.1).with_context(|| format!("datagrams from {target}"))?;
    receives(&client, &sent)
        .with_context(|| format!("datagrams from {target}"))
        .map(drop)
}

/// Streams in which the client, and then the server, has much to say.
fn streams(path: &Path<'_>) -> Result<()> {
    let listener = path
        .to
        .enter(|| TcpListener::bind((path.server, path.port())))??;
    let target = path.target(listener.local_addr()?);
    for there in [true, false] {
        let about = || format!("a stream {} {target}", if there { "to" } else { "from" });
        let client = path
            .from
            .enter(|| TcpStream::connect_timeout(&target, WAIT))?
            .with_context(about)?;
        let (server, peer) = listener.accept()?;
        path.check(peer)?;
        let (sender, receiver) = if there {
            (client, server)
        } else {
            (server, client)
        };
        exchange(sender, receiver, STREAM).with_context(about)?;
    }
    Ok(())
}

/// Datagrams, and with everything forgotten streams, and datagrams of all sizes.
fn discovers(path: &Path<'_>, mtu: Both) -> Result<()> {
    for netns in [path.from, path.to] {
        forget(netns)?;
    }
    datagrams(path, mtu)?;
    for netns in [path.from, path.to] {
        forget(netns)?;
    }
    streams(path)?;
    for netns in [path.from, path.to] {
        forget(netns)?;
    }
    // Routers tell of fragments that are too long (IPv6), or cut them up again.
    path.datagrams()
}

/// All ways with a narrow hop on them: between two Pods, to a Service, out of the cluster, and in by a
/// node's port whose backend is here or there.
pub(crate) fn narrow_hops(world: &World) -> Result<()> {
    let options = world.cluster().options();
    narrow(world, NARROW)?;
    world.open_node_ports()?;
    let host = Host::join(world)?;
    // The Pod of the other node, which tunnels or the router lead to.
    let far = if options.network == Network::Routed {
        2
    } else {
        1
    };
    for v4 in [true, false] {
        if v4 && options.family == Family::V6 {
            continue;
        }
        let family = if v4 { "IPv4" } else { "IPv6" };
        ways(world, &host, far, v4).context(family)?;
    }
    Ok(())
}

fn ways(world: &World, host: &Host, far: usize, v4: bool) -> Result<()> {
    let tunnel = world.cluster().options().network == Network::Routed;
    let wide = world.cluster().options().uplink_mtu;
    // Tunnel packets are cut up by whom they are too long for, which no Pod need know.
    let between = if tunnel { wide - 50 } else { NARROW };
    let node1 = world.node_address(0, v4)?;
    let pod = |i: usize| -> Result<Path<'_>> {
        Ok(Path {
            from: world.pod(0),
            to: world.pod(i),
            server: world.pod_address(i, v4)?,
            asked: None,
            seen: Some(world.pod_address(0, v4)?),
        })
    };
    let direct = pod(far)?;
    discovers(&direct, Both(between, between)).context("Pod to Pod")?;
    let service = Path {
        asked: Some(SocketAddr::new(world.service_address(far, v4)?, 80)),
        ..direct
    };
    discovers(&service, Both(between, between)).context("Pod to Service")?;
    // The nodes are behind narrow hops of their own where there are tunnels.
    let to_node = if tunnel { NARROW } else { wide };
    let out = Path {
        from: world.pod(0),
        to: &host.netns,
        server: Host::address(v4)?,
        asked: None,
        seen: Some(node1),
    };
    discovers(&out, Both(NARROW, to_node)).context("Pod to a host outside")?;
    let by_port = |i: usize| -> Result<Path<'_>> {
        Ok(Path {
            from: &host.netns,
            asked: Some(SocketAddr::new(node1, node_port(i))),
            seen: None,
            ..pod(i)?
        })
    };
    discovers(&by_port(0)?, Both(to_node, NARROW)).context("a node's port, the backend here")?;
    discovers(&by_port(far)?, Both(NARROW, NARROW)).context("a node's port, the backend there")
}
