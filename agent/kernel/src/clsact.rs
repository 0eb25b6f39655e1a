//! Filters of the clsact qdisc, for kernels without tcx: five requests of rtnetlink.
//!
//! The filter's priority and handle are fixed, so a request for a filter that exists replaces its
//! program in place, and a restarted agent finds its own.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send,
    socket,
};

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const RTM_NEWQDISC: u16 = 36;
const RTM_DELQDISC: u16 = 37;
const RTM_NEWTFILTER: u16 = 44;
const RTM_DELTFILTER: u16 = 45;
const RTM_GETTFILTER: u16 = 46;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;

const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_BPF_FD: u16 = 6;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_FLAGS: u16 = 8;
const TCA_BPF_ID: u16 = 11;
const TCA_BPF_FLAG_ACT_DIRECT: u32 = 1;
const NLA_TYPE_MASK: u16 = 0x3fff;

const CLSACT_HANDLE: u32 = 0xffff_0000;
const CLSACT_PARENT: u32 = 0xffff_fff1;
/// Before the filters that other tools number by themselves (from 49152 down).
const PRIORITY: u32 = 1;
/// "ha": other tools start at 1.
const HANDLE: u32 = 0x6861;

const HEADER: usize = 16;
const TCMSG: usize = 20;

/// The two hooks of clsact.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Parent {
    /// What the interface receives.
    Ingress,
    /// What is sent through the interface.
    Egress,
}

impl Parent {
    const fn number(self) -> u32 {
        match self {
            Self::Ingress => 0xffff_fff2,
            Self::Egress => 0xffff_fff3,
        }
    }
}

/// A BPF filter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Filter {
    /// The program's id; none if it is no BPF filter.
    pub(crate) program: Option<u32>,
}

/// Adds the qdisc; one that exists is success.
pub(crate) fn add_qdisc(ifindex: u32) -> io::Result<()> {
    let mut request = Request::new(
        RTM_NEWQDISC,
        NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL,
        [ifindex, CLSACT_HANDLE, CLSACT_PARENT, 0],
    );
    request.attribute(TCA_KIND, b"clsact\0");
    unless(libc::EEXIST, request.send())
}

/// Adds our filter or replaces its program, atomically.
pub(crate) fn put_filter(
    ifindex: u32,
    parent: Parent,
    program: BorrowedFd<'_>,
    name: &str,
) -> io::Result<()> {
    let mut request = Request::new(
        RTM_NEWTFILTER,
        NLM_F_ACK | NLM_F_CREATE,
        [ifindex, HANDLE, parent.number(), filter_info()],
    );
    request.attribute(TCA_KIND, b"bpf\0");
    request.nested(TCA_OPTIONS, |options| {
        options.attribute(TCA_BPF_FD, &program.as_raw_fd().to_ne_bytes());
        options.attribute(TCA_BPF_NAME, format!("hachi_{name}\0").as_bytes());
        options.attribute(TCA_BPF_FLAGS, &TCA_BPF_FLAG_ACT_DIRECT.to_ne_bytes());
    });
    request.send().map(drop)
}

/// Removes our filter; one that is gone, with its interface or qdisc even, is success.
pub(crate) fn remove_filter(ifindex: u32, parent: Parent) -> io::Result<()> {
    let request = Request::new(
        RTM_DELTFILTER,
        NLM_F_ACK,
        [ifindex, HANDLE, parent.number(), filter_info()],
    );
    match request.send() {
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::ENOENT | libc::ENODEV | libc::EINVAL)
            ) =>
        {
            Ok(())
        }
        result => result.map(drop),
    }
}

/// Removes the qdisc if it has no filter left, ours or another's.
pub(crate) fn remove_qdisc_if_unused(ifindex: u32) -> io::Result<()> {
    for parent in [Parent::Ingress, Parent::Egress] {
        if !filters(ifindex, parent)?.is_empty() {
            return Ok(());
        }
    }
    let request = Request::new(
        RTM_DELQDISC,
        NLM_F_ACK,
        [ifindex, CLSACT_HANDLE, CLSACT_PARENT, 0],
    );
    match request.send() {
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::ENOENT | libc::ENODEV | libc::EINVAL)
            ) =>
        {
            Ok(())
        }
        result => result.map(drop),
    }
}

/// The filters of a hook, in any order.
pub(crate) fn filters(ifindex: u32, parent: Parent) -> io::Result<Vec<Filter>> {
    let request = Request::new(RTM_GETTFILTER, NLM_F_DUMP, [ifindex, 0, parent.number(), 0]);
    let replies = request.send()?;
    // A classifier's own row has handle 0 and no options; its filters follow.
    Ok(replies
        .iter()
        .filter_map(|message| parse_filter(message))
        .collect())
}

fn filter_info() -> u32 {
    (PRIORITY << 16) | u32::from(u16::to_be(libc::ETH_P_ALL.cast_unsigned() as u16))
}

fn unless(expected: i32, result: io::Result<Vec<Vec<u8>>>) -> io::Result<()> {
    match result {
        Err(error) if error.raw_os_error() == Some(expected) => Ok(()),
        result => result.map(drop),
    }
}

/// A request under construction: header, `tcmsg`, attributes.
struct Request {
    bytes: Vec<u8>,
}

impl Request {
    fn new(kind: u16, flags: u16, [ifindex, handle, parent, info]: [u32; 4]) -> Self {
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&(flags | NLM_F_REQUEST).to_ne_bytes());
        bytes[8..12].copy_from_slice(&1_u32.to_ne_bytes());
        // The family is AF_UNSPEC.
        for word in [0, ifindex, handle, parent, info] {
            bytes.extend_from_slice(&word.to_ne_bytes());
        }
        Self { bytes }
    }

    fn attribute(&mut self, kind: u16, value: &[u8]) {
        self.nested(kind, |request| request.bytes.extend_from_slice(value));
    }

    fn nested(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) {
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
    fn send(mut self) -> io::Result<Vec<Vec<u8>>> {
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
            Some(RTM_NEWTFILTER) => replies.push(message.to_vec()),
            _ => {}
        }
        rest = rest
            .get((length as usize).next_multiple_of(4)..)
            .unwrap_or_default();
    }
    Ok(false)
}

/// The filter in a message; none in a classifier's own row.
fn parse_filter(message: &[u8]) -> Option<Filter> {
    let handle = read_u32(message, 8)?;
    if handle == 0 {
        return None;
    }
    let options = attributes(message.get(TCMSG..)?).find(|(kind, _)| *kind == TCA_OPTIONS);
    let program = options.and_then(|(_, options)| {
        attributes(options)
            .find(|(kind, _)| *kind == TCA_BPF_ID)
            .and_then(|(_, value)| read_u32(value, 0))
    });
    Some(Filter { program })
}

fn attributes(mut rest: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(read_u16(rest, 0)?);
        let kind = read_u16(rest, 2)? & NLA_TYPE_MASK;
        let value = rest.get(4..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

fn read_u16(bytes: &[u8], at: usize) -> Option<u16> {
    bytes
        .get(at..at + 2)?
        .try_into()
        .ok()
        .map(u16::from_ne_bytes)
}

fn read_u32(bytes: &[u8], at: usize) -> Option<u32> {
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
        let mut request = Request::new(RTM_NEWTFILTER, NLM_F_ACK, [7, HANDLE, 8, 9]);
        request.attribute(TCA_KIND, b"bpf\0");
        request.nested(TCA_OPTIONS, |options| {
            options.attribute(TCA_BPF_NAME, b"abc")
        });
        let mut found = attributes(&request.bytes[HEADER + TCMSG..]);
        assert_eq!(found.next(), Some((TCA_KIND, &b"bpf\0"[..])));
        let (kind, options) = found.next().expect("options");
        assert_eq!(kind, TCA_OPTIONS);
        assert_eq!(
            attributes(options).next(),
            Some((TCA_BPF_NAME, &b"abc"[..]))
        );
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
        assert!(!parse_replies(&reply(RTM_NEWTFILTER, &[0; 20]), &mut replies).expect("a row"));
        assert_eq!(replies.len(), 1);
        assert_eq!(parse_filter(&replies[0]), None);
        assert!(parse_replies(&reply(NLMSG_DONE, &[0; 4]), &mut replies).expect("the end"));
        assert!(parse_replies(&[40, 0, 0, 0, 0], &mut replies).is_err());
    }
}
