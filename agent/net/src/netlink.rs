//! The one place that speaks netlink: batches of requests, and dumps.
//!
//! Several requests go to the kernel in one message, which it works off in order and acknowledges
//! one by one: wiring a Pod costs three system calls that matter, not fifteen.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, BorrowedFd},
};

use nix::errno::Errno;
use rtnetlink::{
    packet_core::{
        DefaultNla, ErrorMessage, NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_EXCL,
        NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload, Nla as _, NlasIterator,
        Parseable as _,
    },
    packet_route::RouteNetlinkMessage,
    sys::{Socket, SocketAddr, constants::NETLINK_ROUTE},
};

use crate::{Link, NetError, NetNs};

/// A dump that the kernel says was torn by a change is asked for again, this often at most.
const DUMP_ATTEMPTS: usize = 5;
/// Length of the header that the kernel repeats in an acknowledgement.
const HEADER: usize = 16;
/// `NLMSGERR_ATTR_MSG`: the kernel's explanation as text.
const ATTR_MSG: u16 = 1;

/// A request of a batch.
pub(crate) struct Request {
    /// For errors: "cannot {what}".
    pub(crate) what: String,
    pub(crate) message: RouteNetlinkMessage,
    pub(crate) flags: u16,
}

/// What happens if the object exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum IfExists {
    Fail,
    Replace,
}

impl Request {
    pub(crate) fn create(what: String, message: RouteNetlinkMessage, if_exists: IfExists) -> Self {
        let flags = match if_exists {
            IfExists::Fail => NLM_F_CREATE | NLM_F_EXCL,
            IfExists::Replace => NLM_F_CREATE | NLM_F_REPLACE,
        };
        Self {
            what,
            message,
            flags,
        }
    }

    /// A change of something that exists, a deletion, or a question with one answer.
    pub(crate) fn plain(what: String, message: RouteNetlinkMessage) -> Self {
        Self {
            what,
            message,
            flags: 0,
        }
    }
}

/// The kernel's answer to one request: the objects that it sent, if any.
pub(crate) type Answer = Result<Vec<RouteNetlinkMessage>, NetError>;

/// A netlink socket; it stays in the namespace that it was opened in.
#[derive(Debug)]
pub struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    /// Opens a socket in the calling thread's namespace.
    pub fn open() -> Result<Self, NetError> {
        let open = || {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind_auto()?;
            socket.connect(&SocketAddr::new(0, 0))?;
            // Errors without a copy of the request, with an explanation, and filtered dumps. Each is
            // a convenience that old kernels lack.
            for option in [
                socket.set_cap_ack(true),
                socket.set_ext_ack(true),
                socket.set_netlink_get_strict_chk(true),
            ] {
                match option {
                    Err(error) if error.raw_os_error() != Some(Errno::ENOPROTOOPT as i32) => {
                        return Err(error);
                    }
                    _ => {}
                }
            }
            Ok(socket)
        };
        Ok(Self {
            socket: open().map_err(NetError::Socket)?,
            sequence: 0,
        })
    }

    /// Opens a socket in another namespace.
    pub fn open_in(namespace: &NetNs) -> Result<Self, NetError> {
        namespace.run(Self::open)?
    }

    /// Hears of changes from now on; the socket is for nothing else then.
    pub(crate) fn subscribe(&mut self, group: u32) -> Result<(), NetError> {
        self.socket.add_membership(group).map_err(NetError::Socket)
    }

    /// The names of the links that the next message of a subscription is about.
    pub(crate) fn changed_links(&mut self) -> Result<Vec<String>, NetError> {
        let name = |message: NetlinkMessage<RouteNetlinkMessage>| match message.payload {
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) => {
                Some(Link::parse(&link).name)
            }
            _ => None,
        };
        Ok(self.receive()?.into_iter().filter_map(name).collect())
    }

    /// What the next message of a subscription is about.
    pub(crate) fn changes(&mut self) -> Result<Vec<RouteNetlinkMessage>, NetError> {
        let object = |message: NetlinkMessage<RouteNetlinkMessage>| match message.payload {
            NetlinkPayload::InnerMessage(object) => Some(object),
            _ => None,
        };
        Ok(self.receive()?.into_iter().filter_map(object).collect())
    }

    /// Sends all requests at once. The kernel works off every one of them, also after one has
    /// failed; the answers are in the order of the requests.
    pub(crate) fn batch(&mut self, requests: Vec<Request>) -> Result<Vec<Answer>, NetError> {
        let first = self.sequence.wrapping_add(1);
        let mut bytes = Vec::new();
        let mut pending = Vec::with_capacity(requests.len());
        for Request {
            what,
            message,
            flags,
        } in requests
        {
            self.append(&mut bytes, message, flags | NLM_F_ACK);
            pending.push((what, Vec::new()));
        }
        self.socket.send(&bytes, 0).map_err(NetError::Socket)?;

        let mut answers = Vec::with_capacity(pending.len());
        let mut inbox = VecDeque::new();
        let mut expected = first;
        for (what, mut objects) in pending {
            let answer = loop {
                let Some(message) = inbox.pop_front() else {
                    inbox.extend(self.receive()?);
                    continue;
                };
                let message: NetlinkMessage<RouteNetlinkMessage> = message;
                if message.header.sequence_number != expected {
                    // Left over from a batch that was given up.
                    continue;
                }
                match message.payload {
                    NetlinkPayload::InnerMessage(object) => objects.push(object),
                    NetlinkPayload::Error(error) if error.code.is_none() => break Ok(objects),
                    NetlinkPayload::Error(error) => break Err(refused(what, &error)),
                    NetlinkPayload::Done(_) | NetlinkPayload::Noop => {}
                    _ => return Err(NetError::Garbled(format!("cannot {what}: overrun"))),
                }
            };
            answers.push(answer);
            expected = expected.wrapping_add(1);
        }
        Ok(answers)
    }

    /// Sends all requests at once; the first error counts.
    pub(crate) fn all(&mut self, requests: Vec<Request>) -> Result<(), NetError> {
        self.batch(requests)?
            .into_iter()
            .try_for_each(|answer| answer.map(drop))
    }

    /// Sends one request.
    pub(crate) fn one(&mut self, request: Request) -> Answer {
        let mut answers = self.batch(vec![request])?;
        answers
            .pop()
            .unwrap_or_else(|| Err(NetError::Garbled("no answer".into())))
    }

    /// All objects that a question asks for.
    pub(crate) fn dump(
        &mut self,
        what: &str,
        message: &RouteNetlinkMessage,
    ) -> Result<Vec<RouteNetlinkMessage>, NetError> {
        for _ in 0..DUMP_ATTEMPTS {
            if let Some(objects) = self.try_dump(what, message.clone())? {
                return Ok(objects);
            }
        }
        Err(NetError::Garbled(format!(
            "cannot {what}: it changes faster than it can be read"
        )))
    }

    fn try_dump(
        &mut self,
        what: &str,
        message: RouteNetlinkMessage,
    ) -> Result<Option<Vec<RouteNetlinkMessage>>, NetError> {
        let mut bytes = Vec::new();
        self.append(&mut bytes, message, NLM_F_DUMP);
        self.socket.send(&bytes, 0).map_err(NetError::Socket)?;
        let mut objects = Vec::new();
        let mut torn = false;
        loop {
            for message in self.receive()? {
                if message.header.sequence_number != self.sequence {
                    continue;
                }
                torn |= message.header.flags & NLM_F_DUMP_INTR != 0;
                match message.payload {
                    NetlinkPayload::InnerMessage(object) => objects.push(object),
                    NetlinkPayload::Done(done) if done.code < 0 => {
                        let source = io::Error::from_raw_os_error(-done.code);
                        let what = what.to_owned();
                        return Err(NetError::Request {
                            what,
                            source,
                            hint: String::new(),
                        });
                    }
                    NetlinkPayload::Done(_) => return Ok((!torn).then_some(objects)),
                    NetlinkPayload::Error(error) => return Err(refused(what.to_owned(), &error)),
                    NetlinkPayload::Noop => {}
                    _ => return Err(NetError::Garbled(format!("cannot {what}: overrun"))),
                }
            }
        }
    }

    fn append(&mut self, bytes: &mut Vec<u8>, message: RouteNetlinkMessage, flags: u16) {
        self.sequence = self.sequence.wrapping_add(1);
        let mut message = NetlinkMessage::from(message);
        message.header.flags = NLM_F_REQUEST | flags;
        message.header.sequence_number = self.sequence;
        message.finalize();
        let begin = bytes.len();
        bytes.resize(begin + message.buffer_len().next_multiple_of(4), 0);
        message.serialize(&mut bytes[begin..]);
    }

    fn receive(&self) -> Result<Vec<NetlinkMessage<RouteNetlinkMessage>>, NetError> {
        let (bytes, _) = loop {
            match self.socket.recv_from_full() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                received => break received.map_err(NetError::Socket)?,
            }
        };
        let mut messages = Vec::new();
        let mut rest = bytes.as_slice();
        while rest.len() >= HEADER {
            let message = NetlinkMessage::deserialize(rest)
                .map_err(|error| NetError::Garbled(error.to_string()))?;
            let length = usize::try_from(message.header.length)
                .unwrap_or(usize::MAX)
                .max(HEADER);
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            messages.push(message);
        }
        Ok(messages)
    }
}

impl AsFd for Netlink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn refused(what: String, error: &ErrorMessage) -> NetError {
    NetError::Request {
        what,
        source: error.to_io(),
        hint: explanation(error).unwrap_or_default(),
    }
}

fn explanation(error: &ErrorMessage) -> Option<String> {
    NlasIterator::new(error.header.get(HEADER..)?)
        .flatten()
        .find_map(|attribute| {
            let attribute = DefaultNla::parse(&attribute).ok()?;
            if attribute.kind() != ATTR_MSG {
                return None;
            }
            let mut text = vec![0; attribute.value_len()];
            attribute.emit_value(&mut text);
            Some(
                String::from_utf8_lossy(&text)
                    .trim_end_matches('\0')
                    .to_owned(),
            )
        })
}
