//! One socket that asks a server again and again, and tells what it was shown of its peer: what
//! socket load balancing changes, and no packet shows.

use std::{
    io::{self, ErrorKind, Write as _},
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    os::fd::AsRawFd as _,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, connect, socket},
};
use serde::{Deserialize, Serialize};

use super::probe::{exchange, first_line, plain, unspecified};

/// How a socket asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Way {
    /// A TCP connection for every question.
    Tcp,
    /// The same over HTTP; the answer also tells whom the server took for its client.
    Http,
    /// One connected UDP socket.
    Connected,
    /// One UDP socket that is not connected.
    Unconnected,
}

impl Way {
    /// As an argument of `hachi-pod`.
    #[must_use]
    pub(super) fn argument(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Http => "http",
            Self::Connected => "connected",
            Self::Unconnected => "unconnected",
        }
    }
}

/// What to ask, and how.
#[derive(Clone, Debug, clap::Args)]
pub struct Ask {
    /// The kind of socket.
    #[arg(value_enum)]
    pub way: Way,
    /// Whom to ask, as ADDRESS:PORT.
    pub address: SocketAddr,
    /// How often.
    #[arg(long, default_value_t = 1)]
    pub count: u32,
    /// Milliseconds between two questions.
    #[arg(long, default_value_t = 0)]
    pub interval: u64,
    /// Milliseconds to wait for an answer.
    #[arg(long, default_value_t = 500)]
    pub timeout: u64,
    /// Ask an IPv4 address from an IPv6 socket.
    #[arg(long)]
    pub mapped: bool,
    /// A new socket for every question.
    #[arg(long)]
    pub fresh: bool,
}

/// One answer, or why there is none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The server's name.
    #[serde(default)]
    pub name: Option<String>,
    /// The peer, as the system call that received the answer (or `getpeername`) shows it.
    #[serde(default)]
    pub peer: Option<SocketAddr>,
    /// Whom the server took for its client.
    #[serde(default)]
    pub client: Option<SocketAddr>,
    /// The error.
    #[serde(default)]
    pub error: Option<String>,
    /// Milliseconds since the first question.
    pub at: u64,
}

impl Answer {
    /// Reads a line of what [`Ask::run`] prints.
    pub(crate) fn parse(line: &str) -> Result<Self> {
        serde_json::from_str(line).with_context(|| format!("{line:?}"))
    }
}

impl Ask {
    /// As arguments of `hachi-pod ask`.
    #[must_use]
    pub fn arguments(&self) -> Vec<String> {
        let way = self.way.argument().to_owned();
        let mut arguments = vec!["ask".to_owned(), way, self.address.to_string()];
        for (flag, value) in [
            ("--count", u64::from(self.count)),
            ("--interval", self.interval),
            ("--timeout", self.timeout),
        ] {
            arguments.extend([flag.to_owned(), value.to_string()]);
        }
        if self.mapped {
            arguments.push("--mapped".to_owned());
        }
        if self.fresh {
            arguments.push("--fresh".to_owned());
        }
        arguments
    }

    /// Asks, and prints every answer as a line of JSON.
    pub fn run(self) -> Result<()> {
        let begun = Instant::now();
        let to = self.destination();
        let mut socket = None;
        let mut out = io::stdout().lock();
        for _ in 0..self.count {
            if self.fresh {
                socket = None;
            }
            let mut answer = match self.once(to, &mut socket) {
                Ok((name, peer, client)) => Answer {
                    name: Some(name),
                    peer: Some(plain(peer)),
                    client,
                    ..Answer::default()
                },
                Err(error) => {
                    // As a client does that is told that its socket is no good any more.
                    let closed = [Errno::ECONNABORTED, Errno::EDESTADDRREQ].map(|e| Some(e as i32));
                    if closed.contains(&error.raw_os_error()) {
                        socket = None;
                    }
                    Answer {
                        error: Some(format!("{:?}", error.kind())),
                        ..Answer::default()
                    }
                }
            };
            answer.at = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
            let line = serde_json::to_string(&answer).context("write an answer")?;
            writeln!(out, "{line}").context("print an answer")?;
            thread::sleep(Duration::from_millis(self.interval));
        }
        Ok(())
    }

    fn destination(&self) -> SocketAddr {
        match self.address.ip() {
            IpAddr::V4(ip) if self.mapped => {
                SocketAddr::new(ip.to_ipv6_mapped().into(), self.address.port())
            }
            _ => self.address,
        }
    }

    fn once(
        &self,
        to: SocketAddr,
        socket: &mut Option<UdpSocket>,
    ) -> io::Result<(String, SocketAddr, Option<SocketAddr>)> {
        let timeout = Duration::from_millis(self.timeout.max(1));
        if self.way == Way::Http {
            let exchange = exchange(to, timeout)?;
            return Ok((exchange.name, exchange.peer, exchange.client));
        }
        if self.way == Way::Tcp {
            let mut stream = TcpStream::connect_timeout(&to, timeout)?;
            stream.set_read_timeout(Some(timeout))?;
            stream.write_all(b"ask\n")?;
            let name = first_line(&mut stream)?.trim().to_owned();
            return Ok((name, stream.peer_addr()?, None));
        }
        if socket.is_none() {
            let new = if self.way == Way::Connected {
                connected(to)?
            } else {
                UdpSocket::bind(unspecified(to))?
            };
            new.set_read_timeout(Some(timeout))?;
            *socket = Some(new);
        }
        let Some(socket) = socket else {
            return Err(ErrorKind::NotConnected.into());
        };
        let mut buffer = [0; 512];
        let (length, from) = if self.way == Way::Connected {
            socket.send(b"ask")?;
            let (length, from) = socket.recv_from(&mut buffer)?;
            // Both calls must show the same peer.
            if socket.peer_addr()? != from {
                return Err(io::Error::new(ErrorKind::InvalidData, "another peer"));
            }
            (length, from)
        } else {
            socket.send_to(b"ask", to)?;
            socket.recv_from(&mut buffer)?
        };
        let reply = String::from_utf8_lossy(&buffer[..length]);
        let name = reply.strip_suffix(" ask").unwrap_or(&reply);
        Ok((name.to_owned(), from, None))
    }
}

/// A connected socket whose port the kernel has chosen meanwhile, as most programs leave it to; the
/// standard library would bind it before.
fn connected(to: SocketAddr) -> io::Result<UdpSocket> {
    let family = if to.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    };
    let new = socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    connect(new.as_raw_fd(), &SockaddrStorage::from(to))?;
    Ok(new.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_read_as_they_are_written() {
        #[derive(Debug, clap::Parser)]
        struct Cli {
            #[command(flatten)]
            ask: Ask,
        }
        let ask = Ask {
            way: Way::Unconnected,
            address: "[fd00::1]:53".parse().unwrap(),
            count: 3,
            interval: 20,
            timeout: 400,
            mapped: true,
            fresh: true,
        };
        let read = <Cli as clap::Parser>::try_parse_from(ask.arguments()).unwrap();
        assert_eq!(format!("{:?}", read.ask), format!("{ask:?}"));
    }

    #[test]
    fn a_mapped_address_is_shown_as_what_it_stands_for() {
        let mapped: SocketAddr = "[::ffff:10.0.0.1]:53".parse().unwrap();
        assert_eq!(plain(mapped), "10.0.0.1:53".parse().unwrap());
    }
}
