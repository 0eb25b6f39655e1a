//! A netlink socket of netfilter: transactions, questions, dumps.

use std::io;

use rtnetlink::sys::{Socket, SocketAddr};

use super::message::{Attributes, Message, SUBSYSTEM, generation};
use crate::NetError;

/// `NETLINK_NETFILTER`.
const PROTOCOL: isize = 12;
/// `struct nlmsghdr`, and with `struct nfgenmsg`.
const HEADER: usize = 16;
const HEADERS: usize = HEADER + 4;
/// `NFNL_MSG_BATCH_BEGIN`, `NFNL_MSG_BATCH_END`.
const BEGIN: u16 = 16;
const END: u16 = 17;
/// `NFNL_BATCH_GENID`.
const GENERATION: u16 = 1;
/// `NLMSG_ERROR`, `NLMSG_DONE`.
const ERROR: u16 = 2;
const DONE: u16 = 3;
/// `NLM_F_REQUEST`, `NLM_F_ACK`, `NLM_F_DUMP_INTR`, `NLM_F_DUMP`.
const REQUEST: u16 = 1;
const ACK: u16 = 4;
const INTERRUPTED: u16 = 0x10;
const DUMP: u16 = 0x300;
/// A dump that was torn by a change is asked for again, this often at most.
const DUMP_ATTEMPTS: usize = 10;

/// The socket; it stays in the namespace that it was opened in.
pub(super) struct NfTables {
    socket: Socket,
    sequence: u32,
}

/// A message as it came.
struct Received {
    kind: u16,
    flags: u16,
    sequence: u32,
    /// What follows the headers; of an error or an end, what follows the first.
    body: Vec<u8>,
}

impl NfTables {
    pub(super) fn open() -> Result<Self, NetError> {
        let open = || {
            let mut socket = Socket::new(PROTOCOL)?;
            socket.bind_auto()?;
            socket.connect(&SocketAddr::new(0, 0))?;
            Ok(socket)
        };
        Ok(Self {
            socket: open().map_err(|source| request("speak to nf_tables", source))?,
            sequence: 0,
        })
    }

    /// Does all or nothing of it; with a generation only if the ruleset is still of that one
    /// (`ERESTART` otherwise).
    pub(super) fn transaction(
        &mut self,
        what: &str,
        messages: &[Message],
        of: Option<u32>,
    ) -> Result<(), NetError> {
        let mut bytes = Vec::new();
        let first = self.sequence.wrapping_add(1);
        let begin = of.map_or_else(Attributes::default, |generation| {
            Attributes::default().number(GENERATION, generation)
        });
        self.append(&mut bytes, BEGIN, REQUEST, (0, SUBSYSTEM), &begin);
        for message in messages {
            self.append_message(&mut bytes, message, 0);
        }
        self.append(
            &mut bytes,
            END,
            REQUEST,
            (0, SUBSYSTEM),
            &Attributes::default(),
        );
        self.send(&bytes)?;
        // The kernel has done it by now, and speaks only of errors.
        self.socket
            .set_non_blocking(true)
            .map_err(NetError::Socket)?;
        let mut outcome = Ok(());
        loop {
            match self.receive() {
                Ok(answers) => {
                    for answer in answers {
                        let ours = answer.sequence.wrapping_sub(first)
                            <= self.sequence.wrapping_sub(first);
                        if ours && answer.kind == ERROR && outcome.is_ok() {
                            outcome = answer.outcome(what);
                        }
                    }
                }
                Err(NetError::Socket(error)) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => {
                    outcome = outcome.and(Err(error));
                    break;
                }
            }
        }
        self.socket
            .set_non_blocking(false)
            .map_err(NetError::Socket)?;
        outcome
    }

    /// Asks for one object; returns its attributes.
    pub(super) fn ask(&mut self, what: &str, message: &Message) -> Result<Vec<u8>, NetError> {
        let mut bytes = Vec::new();
        self.append_message(&mut bytes, message, ACK);
        self.send(&bytes)?;
        let mut object = Vec::new();
        loop {
            for answer in self.receive()? {
                if answer.sequence != self.sequence {
                    continue;
                }
                if answer.kind == ERROR {
                    return answer.outcome(what).map(|()| object);
                }
                object = answer.body;
            }
        }
    }

    /// Asks for all objects; returns the attributes of each.
    pub(super) fn dump(&mut self, what: &str, message: &Message) -> Result<Vec<Vec<u8>>, NetError> {
        for _ in 0..DUMP_ATTEMPTS {
            if let Some(objects) = self.try_dump(what, message)? {
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
        message: &Message,
    ) -> Result<Option<Vec<Vec<u8>>>, NetError> {
        let mut bytes = Vec::new();
        self.append_message(&mut bytes, message, DUMP);
        self.send(&bytes)?;
        let mut objects = Vec::new();
        let mut torn = false;
        loop {
            for answer in self.receive()? {
                if answer.sequence != self.sequence {
                    continue;
                }
                torn |= answer.flags & INTERRUPTED != 0;
                match answer.kind {
                    DONE | ERROR => {
                        answer.outcome(what)?;
                        return Ok((!torn).then_some(objects));
                    }
                    _ => objects.push(answer.body),
                }
            }
        }
    }

    /// The generation of the ruleset, which every transaction raises.
    pub(super) fn generation(&mut self) -> Result<u32, NetError> {
        let what = "ask for the ruleset's generation";
        let answer = self.ask(what, &Message::get_generation())?;
        generation(&answer).ok_or_else(|| NetError::Garbled(format!("cannot {what}: no answer")))
    }

    fn append_message(&mut self, bytes: &mut Vec<u8>, message: &Message, flags: u16) {
        let kind = u16::from(SUBSYSTEM) << 8 | u16::from(message.kind);
        let flags = REQUEST | message.flags | flags;
        self.append(bytes, kind, flags, (message.family, 0), &message.attributes);
    }

    /// `addressed`: the family, and the low byte of `res_id`.
    fn append(
        &mut self,
        bytes: &mut Vec<u8>,
        kind: u16,
        flags: u16,
        addressed: (u8, u8),
        attributes: &Attributes,
    ) {
        self.sequence = self.sequence.wrapping_add(1);
        let length = u32::try_from(HEADERS + attributes.0.len()).unwrap_or(u32::MAX);
        bytes.extend(length.to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend(self.sequence.to_ne_bytes());
        // The port id, which the kernel knows.
        bytes.extend([0; 4]);
        // Family, version, res_id in network order.
        bytes.extend([addressed.0, 0, 0, addressed.1]);
        bytes.extend(&attributes.0);
    }

    fn send(&self, bytes: &[u8]) -> Result<(), NetError> {
        self.socket
            .send(bytes, 0)
            .map(drop)
            .map_err(NetError::Socket)
    }

    fn receive(&self) -> Result<Vec<Received>, NetError> {
        let (bytes, _) = loop {
            match self.socket.recv_from_full() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                received => break received.map_err(NetError::Socket)?,
            }
        };
        let mut messages = Vec::new();
        let mut rest = bytes.as_slice();
        while let Some((message, length)) = Received::parse(rest) {
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            messages.push(message);
        }
        Ok(messages)
    }
}

impl Received {
    /// The first of the messages in `bytes`, and its length.
    fn parse(bytes: &[u8]) -> Option<(Self, usize)> {
        let length = number(bytes, 0)? as usize;
        let whole = bytes.get(HEADER..length)?;
        let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
        // Errors and the end of a dump carry a number where others have `struct nfgenmsg`.
        let body = match kind {
            ERROR | DONE => whole,
            _ => whole.get(HEADERS - HEADER..)?,
        };
        let message = Self {
            kind,
            flags: u16::from_ne_bytes(bytes.get(6..8)?.try_into().ok()?),
            sequence: number(bytes, 8)?,
            body: body.to_vec(),
        };
        Some((message, length))
    }

    /// What an error or the end of a dump says.
    fn outcome(&self, what: &str) -> Result<(), NetError> {
        match number(&self.body, 0).map(u32::cast_signed) {
            // The end of a dump may count upwards.
            Some(code) if code >= 0 => Ok(()),
            Some(code) => Err(request(what, io::Error::from_raw_os_error(-code))),
            None => Err(NetError::Garbled(format!("cannot {what}: a short answer"))),
        }
    }
}

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at + 4)?;
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

fn request(what: &str, source: io::Error) -> NetError {
    NetError::Request {
        what: what.to_owned(),
        source,
        hint: String::new(),
    }
}
