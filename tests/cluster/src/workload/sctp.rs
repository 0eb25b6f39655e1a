//! SCTP without the kernel's: a question and its answer as raw packets, for kernels that have no
//! SCTP sockets. To a network both look like the first packets of an association (RFC 9260).
//!
//! ```text
//! probe:  ports, tag 0, INIT chunk      ──>   server: ports reversed, INIT ACK chunk with its name
//! ```

use std::{
    io::{self, ErrorKind},
    net::SocketAddr,
    os::fd::{AsRawFd as _, OwnedFd},
    thread,
    time::{Duration, Instant},
};

use nix::sys::{
    socket::{
        AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, bind, recvfrom,
        sendto, setsockopt, socket, sockopt::ReceiveTimeout,
    },
    time::TimeValLike as _,
};

const INIT: u8 = 1;
const INIT_ACK: u8 = 2;
/// The common header, and a chunk's.
const HEADERS: usize = 12 + 4;

/// Whether the kernel has no SCTP of its own.
pub(crate) fn is_missing(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error().map(nix::Error::from_raw),
        Some(nix::Error::EPROTONOSUPPORT | nix::Error::ESOCKTNOSUPPORT)
    )
}

/// A one-to-one socket of the kernel's own SCTP, of the family of an address.
pub(crate) fn kernel_socket(family: SocketAddr) -> io::Result<OwnedFd> {
    let family = if family.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    };
    let socket = socket(
        family,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::Sctp,
    )?;
    Ok(socket)
}

fn open(family: SocketAddr, wait: Duration) -> io::Result<OwnedFd> {
    let family = if family.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    };
    let socket = socket(
        family,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::Sctp,
    )?;
    limit(&socket, wait)?;
    Ok(socket)
}

fn limit(socket: &OwnedFd, wait: Duration) -> io::Result<()> {
    let micros = i64::try_from(wait.as_micros()).unwrap_or(i64::MAX).max(1);
    let value = nix::sys::time::TimeVal::microseconds(micros);
    Ok(setsockopt(socket, ReceiveTimeout, &value)?)
}

/// Answers on a port, for ever.
pub(crate) fn serve(at: SocketAddr, name: &str) -> io::Result<thread::JoinHandle<()>> {
    let socket = open(at, Duration::from_secs(3600))?;
    if !at.ip().is_unspecified() {
        bind(
            socket.as_raw_fd(),
            &SockaddrStorage::from(SocketAddr::new(at.ip(), 0)),
        )?;
    }
    let name = name.to_owned();
    Ok(thread::spawn(move || {
        loop {
            // Errors here are ICMP answers to earlier replies.
            let Ok((packet, Some(client))) = receive(&socket, at.is_ipv4()) else {
                continue;
            };
            if let Some((from, to, INIT, _)) = parse(&packet)
                && to == at.port()
            {
                let reply = packet_of(to, from, INIT_ACK, name.as_bytes());
                let _ = sendto(
                    socket.as_raw_fd(),
                    &reply,
                    &portless(client),
                    MsgFlags::empty(),
                );
            }
        }
    }))
}

/// Asks a port for its server's name.
pub(crate) fn ask(to: SocketAddr, timeout: Duration) -> io::Result<String> {
    let socket = open(to, timeout)?;
    // A port that no other probe of this namespace has just now; nobody else uses SCTP here.
    let own = reserve(to)?;
    let port = own.local_addr()?.port();
    let question = packet_of(port, to.port(), INIT, &[0; 16]);
    let target = SockaddrStorage::from(SocketAddr::new(to.ip(), 0));
    let deadline = Instant::now() + timeout;
    sendto(socket.as_raw_fd(), &question, &target, MsgFlags::empty())?;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        limit(&socket, left)?;
        let (packet, _) = receive(&socket, to.is_ipv4())?;
        if let Some((from, back, INIT_ACK, name)) = parse(&packet)
            && (from, back) == (to.port(), port)
        {
            return Ok(String::from_utf8_lossy(name).into_owned());
        }
    }
}

/// A number that is nobody else's while the socket lives.
fn reserve(to: SocketAddr) -> io::Result<std::net::UdpSocket> {
    std::net::UdpSocket::bind(super::probe::unspecified(to))
}

/// The next packet without its IPv4 header (which raw sockets leave on, of that family alone).
fn receive(socket: &OwnedFd, v4: bool) -> io::Result<(Vec<u8>, Option<SockaddrStorage>)> {
    let mut buffer = vec![0; 2048];
    let (length, from) = recvfrom::<SockaddrStorage>(socket.as_raw_fd(), &mut buffer)?;
    buffer.truncate(length);
    if v4 {
        let header = usize::from(buffer.first().copied().unwrap_or_default() & 15) * 4;
        buffer.drain(..header.min(length));
    }
    Ok((buffer, from))
}

/// A raw socket's peer has no port, and the kernel insists on that for IPv6.
fn portless(address: SockaddrStorage) -> SockaddrStorage {
    if let Some(v6) = address.as_sockaddr_in6() {
        return SockaddrStorage::from(SocketAddr::new(v6.ip().into(), 0));
    }
    address
}

fn packet_of(from: u16, to: u16, chunk: u8, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + payload.len()).unwrap_or(u16::MAX);
    let mut packet = Vec::with_capacity(HEADERS + payload.len() + 3);
    packet.extend(from.to_be_bytes());
    packet.extend(to.to_be_bytes());
    packet.extend([0; 8]);
    packet.extend([chunk, 0]);
    packet.extend(length.to_be_bytes());
    packet.extend(payload);
    while packet.len() % 4 != 0 {
        packet.push(0);
    }
    let sum = crc32c(&packet).to_le_bytes();
    packet[8..12].copy_from_slice(&sum);
    packet
}

/// Ports, the chunk's type and its value.
fn parse(packet: &[u8]) -> Option<(u16, u16, u8, &[u8])> {
    let port = |at: usize| Some(u16::from_be_bytes([*packet.get(at)?, *packet.get(at + 1)?]));
    let length = usize::from(port(14)?);
    let value = packet.get(HEADERS..12 + length)?;
    Some((port(0)?, port(2)?, *packet.get(12)?, value))
}

/// The checksum of SCTP (RFC 9260, appendix A).
fn crc32c(bytes: &[u8]) -> u32 {
    let step = |crc: u32, byte: &u8| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg())
        })
    };
    !bytes.iter().fold(!0, step)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_that_of_the_standard() {
        // RFC 3720, appendix B.4.
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn a_packet_is_read_as_it_is_written() {
        let packet = packet_of(5000, 80, INIT_ACK, b"a/web");
        assert_eq!(packet.len() % 4, 0);
        assert_eq!(parse(&packet), Some((5000, 80, INIT_ACK, &b"a/web"[..])));
        assert_eq!(parse(&packet[..14]), None);
    }
}
