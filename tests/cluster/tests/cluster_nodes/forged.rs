//! Packets that claim to be of Pods: from outside by the tunnel and by the uplink, and from a Pod.

use std::{
    net::{IpAddr, Ipv4Addr, UdpSocket},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use hachi_api::{Reply, Request, Table};
use hachi_cluster::{ask, eventually};

use crate::world::World;

const VXLAN: u16 = 8_472;
/// The port of the datagrams inside.
const INSIDE: u16 = 9_999;

/// Packets that a node has counted under a reason.
fn counted(world: &World, node: usize, reason: &str) -> Result<u64> {
    let socket = world.cluster().nodes()[node].agent_socket();
    let request = Request::Get {
        table: Table::Counters,
    };
    match ask(&socket, &request)? {
        Reply::Table { rows, .. } => {
            let row = rows.iter().find(|row| row[0] == reason);
            Ok(row.context("no such counter")?[2].parse()?)
        }
        other => bail!("the agent answered {other:?}"),
    }
}

/// Sends and looks whether the datagram inside is dropped, and counted.
fn refused(world: &World, reason: &str, send: impl Fn() -> Result<()>) -> Result<()> {
    let victim = world.pod(0);
    let server = victim
        .enter(|| UdpSocket::bind((world.pod_address(0, true)?, INSIDE)).context("bind"))??;
    server.set_read_timeout(Some(Duration::from_millis(200)))?;
    let before = counted(world, 0, reason)?;
    send()?;
    eventually(Duration::from_secs(5), || {
        let now = counted(world, 0, reason)?;
        ensure!(now > before, "{reason} stays at {now}");
        Ok(())
    })?;
    ensure!(server.recv(&mut [0; 64]).is_err(), "it was let in");
    Ok(())
}

/// A host that is no node sends to the tunnel's port, in the name of a Pod of another node; a node
/// does, in the name of another node's Pod.
pub(crate) fn by_tunnel(world: &World) -> Result<()> {
    let node1 = world.node_address(0, true)?;
    let (pod1, pod2) = (
        v4(world.pod_address(0, true)?)?,
        v4(world.pod_address(1, true)?)?,
    );
    let pod3 = v4(world.pod_address(2, true)?)?;
    let from_outside = |inner: Ipv4Addr| {
        world.cluster().fabric().enter(|| {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.send_to(&vxlan(1, inner, pod1), (node1, VXLAN))?;
            anyhow::Ok(())
        })?
    };
    for inner in [pod2, pod3, Ipv4Addr::new(192, 0, 2, 1)] {
        refused(world, "tunnel_source", || from_outside(inner))?;
    }
    // A node that speaks for another's Pod; and one of another cluster.
    let from_node3 = |vni: u32, inner: Ipv4Addr| {
        world.cluster().nodes()[2].netns.enter(|| {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.send_to(&vxlan(vni, inner, pod1), (node1, VXLAN))?;
            anyhow::Ok(())
        })?
    };
    refused(world, "tunnel_source", || from_node3(1, pod2))?;
    refused(world, "tunnel_source", || from_node3(2, pod3))?;
    // So it is the right packet: a node may speak for its own.
    let server = world.pod(0).enter(|| UdpSocket::bind((pod1, INSIDE)))??;
    server.set_read_timeout(Some(Duration::from_secs(5)))?;
    from_node3(1, pod3)?;
    let (_, peer) = server
        .recv_from(&mut [0; 64])
        .context("a node's own packet")?;
    ensure!(peer.ip() == IpAddr::from(pod3), "{peer}");
    Ok(())
}

/// A host on the link sends in the name of Pods: of one behind the tunnel, and of the node's own block.
pub(crate) fn by_uplink(world: &World) -> Result<()> {
    let pod1 = v4(world.pod_address(0, true)?)?;
    let pod3 = v4(world.pod_address(2, true)?)?;
    let mut near = pod1.octets();
    near[3] = 250;
    for forged in [pod3, near.into(), pod1] {
        refused(world, "spoofed_source", || {
            let node1 = world.node_address(0, true)?;
            world
                .cluster()
                .fabric()
                .enter(|| raw(world, node1, forged, pod1))?
        })
        .with_context(|| format!("as {forged}"))?;
    }
    Ok(())
}

/// A Pod sends to the tunnel's port of a node: under its own address it is no node.
pub(crate) fn by_pod(world: &World) -> Result<()> {
    let pod1 = v4(world.pod_address(0, true)?)?;
    let pod2 = v4(world.pod_address(1, true)?)?;
    let node1 = world.node_address(0, true)?;
    for sender in [1, 2] {
        refused(world, "tunnel_source", || {
            world.pod(sender).enter(|| {
                let socket = UdpSocket::bind("0.0.0.0:0")?;
                socket.send_to(&vxlan(1, pod2, pod1), (node1, VXLAN))?;
                anyhow::Ok(())
            })?
        })
        .with_context(|| format!("the Pod of node{}", sender + 1))?;
    }
    Ok(())
}

/// Sends an Ethernet frame to a node from the fabric's bridge.
fn raw(world: &World, node: IpAddr, from: Ipv4Addr, to: Ipv4Addr) -> Result<()> {
    let wire = hachi_cluster::workload::wire::Wire::open("br0")?;
    let mac = world.cluster().nodes()[0]
        .netns
        .enter(|| hachi_cluster::workload::wire::Wire::open("eth0").map(|wire| wire.mac()))??;
    let _ = node;
    let mut frame = mac.to_vec();
    frame.extend(wire.mac());
    frame.extend([8, 0]);
    frame.extend(ip(from, to));
    Ok(wire.send(&frame)?)
}

/// A VXLAN packet's payload (RFC 7348): its header, an Ethernet header, a datagram.
fn vxlan(vni: u32, from: Ipv4Addr, to: Ipv4Addr) -> Vec<u8> {
    let mut packet = vec![8, 0, 0, 0];
    packet.extend(&(vni << 8).to_be_bytes());
    packet.extend([2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0]);
    packet.extend(ip(from, to));
    packet
}

/// A datagram in IPv4.
fn ip(from: Ipv4Addr, to: Ipv4Addr) -> Vec<u8> {
    let payload = b"forged";
    let length = 28 + payload.len() as u16;
    let mut packet = vec![0x45, 0];
    packet.extend(length.to_be_bytes());
    packet.extend([0, 1, 0, 0, 64, 17, 0, 0]);
    packet.extend(from.octets());
    packet.extend(to.octets());
    let sum = packet.chunks(2).fold(0_u32, |sum, pair| {
        sum + u32::from(u16::from_be_bytes([pair[0], pair[1]]))
    });
    let sum = (sum & 0xffff) + (sum >> 16);
    let checksum = !((sum & 0xffff) + (sum >> 16)) as u16;
    packet[10..12].copy_from_slice(&checksum.to_be_bytes());
    packet.extend(5_555_u16.to_be_bytes());
    packet.extend(INSIDE.to_be_bytes());
    packet.extend((8 + payload.len() as u16).to_be_bytes());
    packet.extend([0, 0]);
    packet.extend(payload);
    packet
}

fn v4(address: IpAddr) -> Result<Ipv4Addr> {
    match address {
        IpAddr::V4(address) => Ok(address),
        IpAddr::V6(_) => bail!("{address} is IPv6"),
    }
}
