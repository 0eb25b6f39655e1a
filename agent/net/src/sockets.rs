//! Sockets that must be told that their peer is gone (sock_diag(7), `SOCK_DESTROY`).
//!
//! A connected UDP socket never notices that its backend has been replaced: its datagrams go out
//! and nobody answers. Closed by the kernel, its owner's next call fails (a receipt with ECONNABORTED, a sending
//! with EDESTADDRREQ), and the owner connects again, to another backend.

use std::{collections::HashSet, io, net::SocketAddr};

use nix::errno::Errno;
use rtnetlink::sys::{Socket, SocketAddr as NetlinkAddr};

use crate::NetError;

/// `NETLINK_SOCK_DIAG`.
const NETLINK_SOCK_DIAG: isize = 4;
/// `SOCK_DIAG_BY_FAMILY`: also the type of its answers.
const BY_FAMILY: u16 = 20;
/// `SOCK_DESTROY` (Linux 4.5, for UDP 4.10; `CONFIG_INET_DIAG_DESTROY`).
const DESTROY: u16 = 21;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// `NLM_F_REQUEST | NLM_F_DUMP`.
const DUMP: u16 = 0x301;
/// `NLM_F_REQUEST | NLM_F_ACK`.
const ACKNOWLEDGED: u16 = 0x5;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const IPPROTO_UDP: u8 = 17;
/// Length of `struct nlmsghdr`.
const HEADER: usize = 16;
/// Length of `struct inet_diag_sockid`: ports, addresses, interface, cookie.
const ID: usize = 48;
/// Where `id` lies in `struct inet_diag_msg`.
const ID_AT: usize = 4;

/// A connected UDP socket to close.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Connected {
    /// The kernel's number of the socket.
    pub cookie: u64,
    /// Its peer.
    pub peer: SocketAddr,
}

/// Closes those of the calling thread's network namespace; returns how many there were. Unconnected
/// sockets and those with another peer by now are left alone.
///
/// # Errors
/// If the kernel does not list or close sockets. The others of the list are closed all the same.
pub fn close_udp(wanted: &HashSet<Connected>) -> Result<usize, NetError> {
    let mut socket = Socket::new(NETLINK_SOCK_DIAG).map_err(NetError::Socket)?;
    socket.bind_auto().map_err(NetError::Socket)?;
    socket
        .connect(&NetlinkAddr::new(0, 0))
        .map_err(NetError::Socket)?;
    let mut closed = 0;
    let mut result = Ok(());
    for family in [AF_INET, AF_INET6] {
        for id in list(&socket, family)? {
            if !parse(family, &id).is_some_and(|found| wanted.contains(&found)) {
                continue;
            }
            match close(&socket, family, &id) {
                Ok(()) => closed += 1,
                // It has ended by itself meanwhile.
                Err(error) if error.is_not_found() => {}
                Err(error) => result = Err(error),
            }
        }
    }
    result.map(|()| closed)
}

/// The cookie and the peer of an `inet_diag_sockid`.
fn parse(family: u8, id: &[u8; ID]) -> Option<Connected> {
    let port = u16::from_be_bytes([id[2], id[3]]);
    let peer = if family == AF_INET {
        let ip: [u8; 4] = id[20..24].try_into().ok()?;
        SocketAddr::from((ip, port))
    } else {
        let ip: [u8; 16] = id[20..36].try_into().ok()?;
        let ip = std::net::Ipv6Addr::from(ip);
        // A socket for both families has an IPv4 peer as a mapped address.
        match ip.to_ipv4_mapped() {
            Some(v4) => SocketAddr::from((v4, port)),
            None => SocketAddr::from((ip, port)),
        }
    };
    // Two words of the machine's order, the lower one first.
    let word = |at: usize| id[at..at + 4].try_into().map(u32::from_ne_bytes);
    let cookie = u64::from(word(40).ok()?) | u64::from(word(44).ok()?) << 32;
    (port != 0).then_some(Connected { cookie, peer })
}

/// `struct nlmsghdr` and `struct inet_diag_req_v2`.
fn request(kind: u16, flags: u16, family: u8, id: &[u8; ID]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER + 8 + ID);
    bytes.extend_from_slice(&72_u32.to_ne_bytes());
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(&flags.to_ne_bytes());
    // Sequence and sender.
    bytes.extend_from_slice(&[0; 8]);
    bytes.extend_from_slice(&[family, IPPROTO_UDP, 0, 0]);
    // In any state.
    bytes.extend_from_slice(&u32::MAX.to_ne_bytes());
    bytes.extend_from_slice(id);
    bytes
}

fn list(socket: &Socket, family: u8) -> Result<Vec<[u8; ID]>, NetError> {
    let question = request(BY_FAMILY, DUMP, family, &[0; ID]);
    socket.send(&question, 0).map_err(NetError::Socket)?;
    let mut found = Vec::new();
    loop {
        let bytes = receive(socket)?;
        for (kind, body) in messages(&bytes) {
            match kind {
                BY_FAMILY => found.extend(
                    body.get(ID_AT..ID_AT + ID)
                        .and_then(|id| <[u8; ID]>::try_from(id).ok()),
                ),
                NLMSG_DONE => return Ok(found),
                NLMSG_ERROR => return code(body, "list UDP sockets").map(|()| found),
                _ => {}
            }
        }
    }
}

fn close(socket: &Socket, family: u8, id: &[u8; ID]) -> Result<(), NetError> {
    let order = request(DESTROY, ACKNOWLEDGED, family, id);
    socket.send(&order, 0).map_err(NetError::Socket)?;
    let bytes = receive(socket)?;
    match messages(&bytes).next() {
        Some((NLMSG_ERROR, body)) => code(body, "close a UDP socket"),
        _ => Err(NetError::Garbled("no answer to SOCK_DESTROY".into())),
    }
}

/// The result in a `struct nlmsgerr`.
fn code(body: &[u8], what: &str) -> Result<(), NetError> {
    let code = body
        .get(..4)
        .and_then(|code| code.try_into().ok())
        .map_or(0, i32::from_ne_bytes);
    if code == 0 {
        return Ok(());
    }
    let source = io::Error::from_raw_os_error(-code);
    let lacking = source.raw_os_error() == Some(Errno::EOPNOTSUPP as i32);
    Err(NetError::Request {
        what: what.to_owned(),
        source,
        hint: if lacking {
            "the kernel needs CONFIG_INET_DIAG_DESTROY".into()
        } else {
            String::new()
        },
    })
}

fn receive(socket: &Socket) -> Result<Vec<u8>, NetError> {
    loop {
        match socket.recv_from_full() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            received => return received.map(|(bytes, _)| bytes).map_err(NetError::Socket),
        }
    }
}

/// Type and body of every message.
fn messages(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let length = usize::try_from(u32::from_ne_bytes(rest.get(..4)?.try_into().ok()?)).ok()?;
        let kind = u16::from_ne_bytes(rest.get(4..6)?.try_into().ok()?);
        let body = rest.get(HEADER..length.max(HEADER))?;
        rest = rest
            .get(length.max(HEADER).next_multiple_of(4)..)
            .unwrap_or_default();
        Some((kind, body))
    })
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, UdpSocket};

    use super::*;
    use crate::NetNs;

    fn connected(socket: &UdpSocket) -> Connected {
        let (port, peer) = (
            socket.local_addr().unwrap().port(),
            socket.peer_addr().unwrap(),
        );
        let listing = Socket::new(NETLINK_SOCK_DIAG).unwrap();
        let family = if peer.is_ipv4() { AF_INET } else { AF_INET6 };
        let ids = list(&listing, family).unwrap();
        let own = ids
            .iter()
            .find(|id| id[..2] == port.to_be_bytes())
            .expect("the kernel lists the socket");
        parse(family, own).expect("it has a peer")
    }

    #[test]
    fn connected_sockets_are_closed_and_others_not() {
        hachi_testutil::require_root!();
        let mine = |port: u16| {
            let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            socket.connect((Ipv4Addr::LOCALHOST, port)).unwrap();
            socket
        };
        let work = || {
            let (first, second) = (mine(9), mine(9));
            let wanted = connected(&first);
            assert_eq!(wanted.peer, "127.0.0.1:9".parse().unwrap());
            let other_peer = Connected {
                peer: "127.0.0.1:10".parse().unwrap(),
                ..wanted
            };
            assert_eq!(close_udp(&HashSet::from([other_peer])).unwrap(), 0);
            let closed = match close_udp(&HashSet::from([wanted])) {
                Err(error) if error.errno() == Some(Errno::EOPNOTSUPP as i32) => {
                    assert!(error.to_string().contains("CONFIG_INET_DIAG_DESTROY"));
                    return;
                }
                closed => closed.unwrap(),
            };
            assert_eq!(closed, 1);
            // Who waits for an answer is told so; who sends, that the socket has no peer any more.
            let told = first.take_error().unwrap().and_then(|e| e.raw_os_error());
            assert_eq!(told, Some(Errno::ECONNABORTED as i32));
            let error = first.send(b"?").unwrap_err();
            assert_eq!(error.raw_os_error(), Some(Errno::EDESTADDRREQ as i32));
            second.send(b"?").unwrap();
            assert_eq!(close_udp(&HashSet::from([wanted])).unwrap(), 0);
        };
        NetNs::current().unwrap().run(work).unwrap();
    }

    #[test]
    fn mapped_peers_are_of_their_own_family() {
        let mut id = [0; ID];
        id[2..4].copy_from_slice(&53_u16.to_be_bytes());
        id[20..36].copy_from_slice(&Ipv4Addr::new(10, 0, 0, 1).to_ipv6_mapped().octets());
        id[40..44].copy_from_slice(&7_u32.to_ne_bytes());
        id[44..48].copy_from_slice(&1_u32.to_ne_bytes());
        let found = parse(AF_INET6, &id).unwrap();
        assert_eq!(found.peer, "10.0.0.1:53".parse().unwrap());
        assert_eq!(found.cookie, 7 | 1 << 32);
        // Not connected.
        assert_eq!(parse(AF_INET, &[0; ID]), None);
    }

    #[test]
    fn garbage_ends_the_list() {
        assert_eq!(messages(&[]).count(), 0);
        assert_eq!(messages(&[1, 2, 3]).count(), 0);
        let mut bytes = vec![0; HEADER];
        bytes[..4].copy_from_slice(&200_u32.to_ne_bytes());
        assert_eq!(messages(&bytes).count(), 0);
    }
}
