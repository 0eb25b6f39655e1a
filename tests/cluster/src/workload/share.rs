//! One port that asks several servers at once: what a client may do whose sockets are bound, and
//! what nobody can tell apart who gives several of them one name.

use std::{
    io::{self, ErrorKind, Write as _},
    net::{SocketAddr, TcpStream, UdpSocket},
    os::fd::{AsRawFd as _, OwnedFd},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::{
    socket::{
        AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, getsockname, setsockopt,
        socket,
        sockopt::{ReceiveTimeout, ReuseAddr, ReusePort, SendTimeout},
    },
    time::{TimeVal, TimeValLike as _},
};

use super::{
    ask::{Answer, Way},
    probe::{first_line, plain, unspecified},
};

/// Whom to ask from one port.
#[derive(Clone, Debug, clap::Args)]
pub struct Share {
    /// The kind of socket: one for each server, or one unconnected one for all.
    #[arg(value_enum)]
    pub way: Way,
    /// Whom to ask, as ADDRESS:PORT, all of one family.
    #[arg(required = true)]
    pub addresses: Vec<SocketAddr>,
    /// Milliseconds to wait for each answer.
    #[arg(long, default_value_t = 1000)]
    pub timeout: u64,
}

impl Share {
    /// As arguments of `hachi-pod share`.
    #[must_use]
    pub fn arguments(&self) -> Vec<String> {
        let mut arguments = vec!["share".to_owned(), self.way.argument().to_owned()];
        arguments.extend(self.addresses.iter().map(SocketAddr::to_string));
        arguments.extend(["--timeout".to_owned(), self.timeout.to_string()]);
        arguments
    }

    /// Asks them all, then reads all answers; prints one as a line of JSON for each address, in their order.
    pub fn run(self) -> Result<()> {
        let answers = match self.way {
            Way::Tcp => self.streams(),
            Way::Connected => self.connected(),
            Way::Unconnected => self.unconnected()?,
            Way::Http => anyhow::bail!("one port is shared over tcp, connected and unconnected"),
        };
        let mut out = io::stdout().lock();
        for answer in answers {
            let line = serde_json::to_string(&answer).context("write an answer")?;
            writeln!(out, "{line}").context("print an answer")?;
        }
        Ok(())
    }

    fn streams(&self) -> Vec<Answer> {
        let streams = self.sockets(SockType::Stream);
        let ask = |socket: io::Result<OwnedFd>| {
            let mut stream = TcpStream::from(socket?);
            stream.write_all(b"ask\n")?;
            Ok((stream.peer_addr()?, stream))
        };
        let asked: Vec<io::Result<_>> = streams.into_iter().map(ask).collect();
        let read = |asked: io::Result<(SocketAddr, TcpStream)>| {
            let (peer, mut stream) = asked?;
            Ok((first_line(&mut stream)?.trim().to_owned(), peer))
        };
        asked.into_iter().map(|it| answer(read(it))).collect()
    }

    fn connected(&self) -> Vec<Answer> {
        let ask = |(number, socket): (usize, io::Result<OwnedFd>)| {
            let socket = UdpSocket::from(socket?);
            socket.send(question(number).as_bytes())?;
            Ok(socket)
        };
        let sockets = self.sockets(SockType::Datagram);
        let asked: Vec<io::Result<_>> = sockets.into_iter().enumerate().map(ask).collect();
        let read = |(number, asked): (usize, io::Result<UdpSocket>)| {
            let mut buffer = [0; 512];
            let socket = asked?;
            let (length, peer) = socket.recv_from(&mut buffer)?;
            if socket.peer_addr()? != peer {
                return Err(io::Error::new(ErrorKind::InvalidData, "another peer"));
            }
            let reply = String::from_utf8_lossy(&buffer[..length]).into_owned();
            let name = reply.strip_suffix(&format!(" {}", question(number)));
            let other = || io::Error::new(ErrorKind::InvalidData, "another's answer");
            Ok((name.ok_or_else(other)?.to_owned(), peer))
        };
        let numbered = asked.into_iter().enumerate();
        numbered.map(|it| answer(read(it))).collect()
    }

    fn unconnected(&self) -> Result<Vec<Answer>> {
        let socket = UdpSocket::bind(unspecified(self.addresses[0]))?;
        socket.set_read_timeout(Some(Duration::from_millis(self.timeout.max(1))))?;
        for (number, address) in self.addresses.iter().enumerate() {
            socket.send_to(question(number).as_bytes(), address)?;
        }
        let silent = || Answer {
            error: Some(format!("{:?}", ErrorKind::TimedOut)),
            ..Answer::default()
        };
        let mut answers: Vec<_> = self.addresses.iter().map(|_| silent()).collect();
        let mut buffer = [0; 512];
        for _ in 0..self.addresses.len() {
            let Ok((length, peer)) = socket.recv_from(&mut buffer) else {
                break;
            };
            let reply = String::from_utf8_lossy(&buffer[..length]).into_owned();
            let number = (0..self.addresses.len())
                .find(|number| reply.ends_with(&format!(" {}", question(*number))));
            let number = number.with_context(|| format!("{reply:?} answers nothing"))?;
            ensure!(answers[number].name.is_none(), "{reply:?} twice");
            let name = reply.split(' ').next().unwrap_or_default().to_owned();
            answers[number] = answer(Ok((name, peer)));
        }
        Ok(answers)
    }

    /// Sockets of one port, one connected to each address.
    fn sockets(&self, kind: SockType) -> Vec<io::Result<OwnedFd>> {
        let mut port = 0;
        let mut all = Vec::new();
        for address in &self.addresses {
            all.push(self.socket(kind, *address, &mut port));
        }
        all
    }

    fn socket(&self, kind: SockType, to: SocketAddr, port: &mut u16) -> io::Result<OwnedFd> {
        let family = if to.is_ipv4() {
            AddressFamily::Inet
        } else {
            AddressFamily::Inet6
        };
        let new = socket(family, kind, SockFlag::SOCK_CLOEXEC, None)?;
        let millis = i64::try_from(self.timeout.max(1)).unwrap_or(i64::MAX);
        setsockopt(&new, ReceiveTimeout, &TimeVal::milliseconds(millis))?;
        setsockopt(&new, SendTimeout, &TimeVal::milliseconds(millis))?;
        setsockopt(&new, ReuseAddr, &true)?;
        if kind == SockType::Datagram {
            setsockopt(&new, ReusePort, &true)?;
        }
        let own = SocketAddr::new(unspecified(to).ip(), *port);
        bind(new.as_raw_fd(), &SockaddrStorage::from(own))?;
        let bound: SockaddrStorage = getsockname(new.as_raw_fd())?;
        let v4 = bound.as_sockaddr_in().map(|it| it.port());
        let v6 = bound.as_sockaddr_in6().map(|it| it.port());
        *port = v4.or(v6).unwrap_or_default();
        connect(new.as_raw_fd(), &SockaddrStorage::from(to))?;
        Ok(new)
    }
}

/// What tells an answer from the others.
fn question(number: usize) -> String {
    format!("ask-{number}")
}

fn answer(outcome: io::Result<(String, SocketAddr)>) -> Answer {
    match outcome {
        Ok((name, peer)) => Answer {
            name: Some(name),
            peer: Some(plain(peer)),
            ..Answer::default()
        },
        Err(error) => Answer {
            error: Some(error.to_string()),
            ..Answer::default()
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_read_as_they_are_written() {
        #[derive(Debug, clap::Parser)]
        struct Cli {
            #[command(flatten)]
            share: Share,
        }
        let share = Share {
            way: Way::Connected,
            addresses: vec![
                "[fd00::1]:53".parse().unwrap(),
                "[fd00::2]:53".parse().unwrap(),
            ],
            timeout: 400,
        };
        let read = <Cli as clap::Parser>::try_parse_from(share.arguments()).unwrap();
        assert_eq!(format!("{:?}", read.share), format!("{share:?}"));
    }
}
