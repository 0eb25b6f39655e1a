//! Requests of rtnetlink and their replies: as much as clsact and the probes need.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send,
    socket,
};

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 0x1;
/// Answer with an acknowledgement.
pub(crate) const NLM_F_ACK: u16 = 0x4;
/// Answer with a list.
pub(crate) const NLM_F_DUMP: u16 = 0x300;
/// Fail if it exists.
pub(crate) const NLM_F_EXCL: u16 = 0x200;
/// Make it if it does not exist.
pub(crate) const NLM_F_CREATE: u16 = 0x400;
const NLA_TYPE_MASK: u16 = 0x3fff;

const HEADER: usize = 16;

/// A request under construction: header, the family's own header (`tcmsg`, `ifinfomsg`), attributes.
pub(crate) struct Request {
    bytes: Vec<u8>,
}

impl Request {
    /// A request with the words of the family's own header.
    pub(crate) fn new(kind: u16, flags: u16, words: &[u32]) -> Self {
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&(flags | NLM_F_REQUEST).to_ne_bytes());
        bytes[8..12].copy_from_slice(&1_u32.to_ne_bytes());
        for word in words {
            bytes.extend_from_slice(&word.to_ne_bytes());
        }
        Self { bytes }
    }

    /// Adds an attribute.
    pub(crate) fn attribute(&mut self, kind: u16, value: &[u8]) {
        self.nested(kind, |request| request.bytes.extend_from_slice(value));
    }

    /// Adds an attribute of attributes.
    pub(crate) fn nested(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 4]);
        fill(self);
        #[expect(clippy::cast_possible_truncation, reason = "requests are below 1 KiB")]
        let length = (self.bytes.len() - start) as u16;
        self.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self.bytes[start + 2..start + 4].copy_from_slice(&kind.to_ne_bytes());
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// Sends the request in the calling thread's network namespace; returns the payloads of the
    /// replies that are neither acknowledgement nor end.
    pub(crate) fn send(mut self) -> io::Result<Vec<Vec<u8>>> {
        let length = u32::try_from(self.bytes.len()).map_err(io::Error::other)?;
        self.bytes[..4].copy_from_slice(&length.to_ne_bytes());
        let socket: OwnedFd = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkRoute,
        )?;
        let fd = socket.as_raw_fd();
        bind(fd, &NetlinkAddr::new(0, 0))?;
        send(fd, &self.bytes, MsgFlags::empty())?;

        let mut replies = Vec::new();
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let length = recv(fd, &mut buffer, MsgFlags::empty())?;
            if parse_replies(&buffer[..length], &mut replies)? {
                return Ok(replies);
            }
        }
    }
}

/// Splits a datagram into messages; true at the last one.
fn parse_replies(mut rest: &[u8], replies: &mut Vec<Vec<u8>>) -> io::Result<bool> {
    while let Some(length) = read_u32(rest, 0) {
        let message = rest
            .get(HEADER..length as usize)
            .ok_or_else(|| io::Error::other("a netlink message is cut short"))?;
        match read_u16(rest, 4) {
            Some(NLMSG_ERROR) => {
                return match read_u32(message, 0).map(u32::cast_signed) {
                    Some(0) => Ok(true),
                    Some(code) => Err(io::Error::from_raw_os_error(-code)),
                    None => Err(io::Error::other("a netlink error is cut short")),
                };
            }
            Some(NLMSG_DONE) => return Ok(true),
            Some(_) => replies.push(message.to_vec()),
            None => {}
        }
        rest = rest
            .get((length as usize).next_multiple_of(4)..)
            .unwrap_or_default();
    }
    Ok(false)
}

/// The attributes in a payload; one that lies about its length ends them.
pub(crate) fn attributes(mut rest: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(read_u16(rest, 0)?);
        let kind = read_u16(rest, 2)? & NLA_TYPE_MASK;
        let value = rest.get(4..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// A number in the machine's byte order.
pub(crate) fn read_u16(bytes: &[u8], at: usize) -> Option<u16> {
    bytes
        .get(at..at + 2)?
        .try_into()
        .ok()
        .map(u16::from_ne_bytes)
}

/// A number in the machine's byte order.
pub(crate) fn read_u32(bytes: &[u8], at: usize) -> Option<u32> {
    bytes
        .get(at..at + 4)?
        .try_into()
        .ok()
        .map(u32::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_aligned_and_nested() {
        let mut request = Request::new(44, NLM_F_ACK, &[0, 7, 6, 8, 9]);
        request.attribute(1, b"bpf\0");
        request.nested(2, |options| options.attribute(7, b"abc"));
        let mut found = attributes(&request.bytes[HEADER + 20..]);
        assert_eq!(found.next(), Some((1, &b"bpf\0"[..])));
        let (kind, options) = found.next().expect("options");
        assert_eq!(kind, 2);
        assert_eq!(attributes(options).next(), Some((7, &b"abc"[..])));
        assert_eq!(found.next(), None);
        assert_eq!(request.bytes.len() % 4, 0);
    }

    #[test]
    fn attributes_that_lie_about_their_length_end_the_list() {
        for bytes in [&[][..], &[3, 0, 1, 0], &[200, 0, 1, 0, 1], &[0, 0, 0, 0]] {
            assert_eq!(attributes(bytes).count(), 0, "{bytes:?}");
        }
    }

    #[test]
    fn errors_and_ends_are_told_apart() {
        let reply = |kind: u16, payload: &[u8]| {
            let mut bytes = vec![0; HEADER];
            bytes[..4].copy_from_slice(&((HEADER + payload.len()) as u32).to_ne_bytes());
            bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
            bytes.extend_from_slice(payload);
            bytes
        };
        let mut replies = Vec::new();
        let denied = parse_replies(&reply(NLMSG_ERROR, &(-1_i32).to_ne_bytes()), &mut replies);
        assert_eq!(denied.expect_err("EPERM").raw_os_error(), Some(libc::EPERM));
        assert!(parse_replies(&reply(NLMSG_ERROR, &[0; 4]), &mut replies).expect("ack"));
        assert!(!parse_replies(&reply(44, &[0; 20]), &mut replies).expect("a row"));
        assert_eq!(replies.len(), 1);
        assert!(parse_replies(&reply(NLMSG_DONE, &[0; 4]), &mut replies).expect("the end"));
        assert!(parse_replies(&[40, 0, 0, 0, 0], &mut replies).is_err());
    }
}
