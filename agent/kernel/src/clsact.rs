//! Filters of the clsact qdisc, for kernels without tcx: five requests of rtnetlink.
//!
//! The filter's priority and handle are fixed, so a request for a filter that exists replaces its
//! program in place, and a restarted agent finds its own.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use crate::netlink::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, Request, attributes, read_u32,
};

const RTM_NEWQDISC: u16 = 36;
const RTM_DELQDISC: u16 = 37;
const RTM_NEWTFILTER: u16 = 44;
const RTM_DELTFILTER: u16 = 45;
const RTM_GETTFILTER: u16 = 46;

const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_BPF_FD: u16 = 6;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_FLAGS: u16 = 8;
const TCA_BPF_ID: u16 = 11;
const TCA_BPF_FLAG_ACT_DIRECT: u32 = 1;

const CLSACT_HANDLE: u32 = 0xffff_0000;
const CLSACT_PARENT: u32 = 0xffff_fff1;
/// Before the filters that other tools number by themselves (from 49152 down).
const PRIORITY: u32 = 1;
/// "ha": other tools start at 1.
const HANDLE: u32 = 0x6861;

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
        &tcmsg(ifindex, CLSACT_HANDLE, CLSACT_PARENT, 0),
    );
    request.attribute(TCA_KIND, b"clsact\0");
    unless(&[libc::EEXIST], request.send())
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
        &tcmsg(ifindex, HANDLE, parent.number(), filter_info()),
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
        &tcmsg(ifindex, HANDLE, parent.number(), filter_info()),
    );
    unless(&[libc::ENOENT, libc::ENODEV, libc::EINVAL], request.send())
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
        &tcmsg(ifindex, CLSACT_HANDLE, CLSACT_PARENT, 0),
    );
    unless(&[libc::ENOENT, libc::ENODEV, libc::EINVAL], request.send())
}

/// The filters of a hook, in any order.
pub(crate) fn filters(ifindex: u32, parent: Parent) -> io::Result<Vec<Filter>> {
    let request = Request::new(
        RTM_GETTFILTER,
        NLM_F_DUMP,
        &tcmsg(ifindex, 0, parent.number(), 0),
    );
    let replies = request.send()?;
    // A classifier's own row has handle 0 and no options; its filters follow.
    Ok(replies
        .iter()
        .filter_map(|message| parse_filter(message))
        .collect())
}

/// `struct tcmsg`; the family is AF_UNSPEC.
fn tcmsg(ifindex: u32, handle: u32, parent: u32, info: u32) -> [u32; 5] {
    [0, ifindex, handle, parent, info]
}

fn filter_info() -> u32 {
    (PRIORITY << 16) | u32::from(u16::to_be(libc::ETH_P_ALL.cast_unsigned() as u16))
}

/// The errors that are as good as success.
fn unless(good: &[i32], result: io::Result<Vec<Vec<u8>>>) -> io::Result<()> {
    match result {
        Err(error)
            if error
                .raw_os_error()
                .is_some_and(|number| good.contains(&number)) =>
        {
            Ok(())
        }
        result => result.map(drop),
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_classifiers_own_row_is_no_filter() {
        assert_eq!(parse_filter(&[0; TCMSG]), None);
        let mut row = [0; TCMSG];
        row[8..12].copy_from_slice(&HANDLE.to_ne_bytes());
        assert_eq!(parse_filter(&row), Some(Filter { program: None }));
    }
}
