//! An ICMP echo (RFC 792, RFC 4443) from a raw socket.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::AsRawFd as _,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use nix::sys::{
    socket::{
        AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, recv, sendto,
        setsockopt, socket, sockopt::ReceiveTimeout,
    },
    time::TimeValLike as _,
};

/// How long one request is waited for before the next one is sent.
const PATIENCE: Duration = Duration::from_millis(100);

/// Whether an address answers within a time, asked from the calling thread's network namespace.
pub fn ping(to: IpAddr, limit: Duration) -> io::Result<bool> {
    // Told from other pings of this namespace by process and time.
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.map_or(0, |now| now.subsec_nanos());
    ping_as(to, std::process::id() as u16 ^ now as u16, limit)
}

/// As [`ping`], with this identifier, which others may have at the same time: the answer must have it
/// too, and bring back what this request said.
pub fn ping_as(to: IpAddr, identifier: u16, limit: Duration) -> io::Result<bool> {
    let (family, protocol, request, reply) = if to.is_ipv4() {
        (AddressFamily::Inet, SockProtocol::Icmp, 8_u8, 0_u8)
    } else {
        (AddressFamily::Inet6, SockProtocol::IcmpV6, 128, 129)
    };
    let socket = socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
    let target = SockaddrStorage::from(SocketAddr::new(to, 0));
    let deadline = Instant::now() + limit;
    let mut message = [0; 16];
    message[0] = request;
    message[4..6].copy_from_slice(&identifier.to_be_bytes());
    message[7] = 1;
    let descriptor = socket.as_raw_fd().to_be_bytes();
    message[8..12].copy_from_slice(&descriptor);
    message[12..].copy_from_slice(&std::process::id().to_be_bytes());
    if to.is_ipv4() {
        let words = message.chunks(2);
        let sum: u32 = words
            .map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])))
            .sum();
        let sum = (sum & 0xffff) + (sum >> 16);
        let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
        message[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    let mut buffer = [0; 512];
    while Instant::now() < deadline {
        // No route, or a policy that a socket is told of: no answer either.
        let _ = sendto(socket.as_raw_fd(), &message, &target, MsgFlags::empty());
        let until = (Instant::now() + PATIENCE).min(deadline);
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let micros = i64::try_from(left.as_micros()).unwrap_or(i64::MAX);
            if micros == 0 {
                break;
            }
            let left = nix::sys::time::TimeVal::microseconds(micros);
            setsockopt(&socket, ReceiveTimeout, &left)?;
            let Ok(length) = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) else {
                continue;
            };
            // A raw socket leaves the IPv4 header on.
            let header = if to.is_ipv4() {
                usize::from(buffer[0] & 15) * 4
            } else {
                0
            };
            let answer = buffer[..length].get(header..header + message.len());
            if answer.is_some_and(|it| it[0] == reply && it[4..] == message[4..]) {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_answers_itself() {
        hachi_testutil::require_root!();
        let limit = Duration::from_secs(5);
        assert!(ping(IpAddr::from([127, 0, 0, 1]), limit).unwrap());
        let nobody = IpAddr::from([127, 0, 0, 1]);
        assert!(!ping(nobody, Duration::ZERO).unwrap());
    }
}
