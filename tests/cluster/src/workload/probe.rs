//! Probes: one question to a server, and how it went.

use std::{
    fmt,
    io::{self, ErrorKind, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket},
    str::FromStr,
    time::{Duration, Instant},
};

/// How to ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Protocol {
    /// A connection, and the first line that comes back.
    Tcp,
    /// A datagram, repeated until something comes back.
    Udp,
    /// `GET /`.
    Http,
    /// As TCP, over SCTP.
    Sctp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Http => "http",
            Self::Sctp => "sctp",
        })
    }
}

/// Whom to ask, and how: `tcp/10.0.0.1:80`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Target {
    /// How.
    pub protocol: Protocol,
    /// Whom.
    pub address: SocketAddr,
}

impl Target {
    /// A target.
    #[must_use]
    pub fn new(protocol: Protocol, ip: IpAddr, port: u16) -> Self {
        Self {
            protocol,
            address: SocketAddr::new(ip, port),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.protocol, self.address)
    }
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (protocol, address) = text
            .split_once('/')
            .ok_or("say it as PROTOCOL/ADDRESS:PORT, as in tcp/10.0.0.1:80")?;
        let protocol = clap::ValueEnum::from_str(protocol, false)?;
        let address = address
            .parse()
            .map_err(|error| format!("{address}: {error}"))?;
        Ok(Self { protocol, address })
    }
}

/// How a probe went.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// The server of this name answered.
    Answered(String),
    /// A RST or an ICMP error came back.
    Refused,
    /// Nothing came back in time.
    Silent,
    /// It could not even be sent, or the connection broke.
    Failed(String),
}

impl Outcome {
    /// Whether a server answered.
    #[must_use]
    pub fn answered(&self) -> bool {
        matches!(self, Self::Answered(_))
    }

    /// Who answered.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        match self {
            Self::Answered(name) => Some(name),
            Self::Refused | Self::Silent | Self::Failed(_) => None,
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Answered(name) => write!(f, "answered by {name}"),
            Self::Refused => f.write_str("refused"),
            Self::Silent => f.write_str("no answer"),
            Self::Failed(why) => write!(f, "failed: {why}"),
        }
    }
}

/// Asks once, in the calling thread's network namespace.
#[must_use]
pub fn probe(target: Target, timeout: Duration) -> Outcome {
    let asked = match target.protocol {
        Protocol::Tcp => tcp(target.address, timeout),
        Protocol::Udp => udp(target.address, timeout),
        Protocol::Http => http(target.address, timeout),
        Protocol::Sctp => sctp(target.address, timeout),
    };
    match asked {
        Ok(name) => Outcome::Answered(name),
        Err(error) => outcome(&error),
    }
}

fn outcome(error: &io::Error) -> Outcome {
    match error.kind() {
        ErrorKind::ConnectionRefused => Outcome::Refused,
        // An ICMP "unreachable" or "prohibited" is an answer too: somebody said no.
        ErrorKind::HostUnreachable | ErrorKind::PermissionDenied => Outcome::Refused,
        ErrorKind::TimedOut | ErrorKind::WouldBlock => Outcome::Silent,
        _ => Outcome::Failed(error.to_string()),
    }
}

fn tcp(address: SocketAddr, timeout: Duration) -> io::Result<String> {
    let mut stream = connect(address, timeout)?;
    stream.write_all(b"probe\n")?;
    Ok(first_line(&mut stream)?.trim().to_owned())
}

fn http(address: SocketAddr, timeout: Duration) -> io::Result<String> {
    exchange(address, timeout).map(|exchange| exchange.name)
}

/// What an HTTP question brought.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exchange {
    /// The server's name.
    pub name: String,
    /// Whom the server took for its client.
    pub client: Option<SocketAddr>,
    /// Whom the client takes for its server.
    pub peer: SocketAddr,
}

/// Asks once over HTTP, in the calling thread's network namespace.
pub fn exchange(address: SocketAddr, timeout: Duration) -> io::Result<Exchange> {
    let mut stream = connect(address, timeout)?;
    let request = format!("GET / HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let bad = || io::Error::new(ErrorKind::InvalidData, "not the answer of a Pod's server");
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(bad)?;
    let body: serde_json::Value = serde_json::from_str(body).map_err(|_| bad())?;
    let text = |key: &str| body.get(key).and_then(serde_json::Value::as_str);
    let name = text("pod").filter(|_| head.starts_with("HTTP/1.1 200"));
    let client: Option<SocketAddr> = text("client").and_then(|text| text.parse().ok());
    Ok(Exchange {
        name: name.ok_or_else(bad)?.to_owned(),
        client: client.map(plain),
        peer: plain(stream.peer_addr()?),
    })
}

/// An address as IPv4 where that is what it stands for.
pub(crate) fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

fn connect(address: SocketAddr, timeout: Duration) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, timeout)?;
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    Ok(stream)
}

/// Reads up to the first line's end.
pub(crate) fn first_line(stream: &mut impl io::Read) -> io::Result<String> {
    let mut line = Vec::new();
    let mut byte = [0];
    while byte != *b"\n" {
        if stream.read(&mut byte)? == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        line.push(byte[0]);
        if line.len() > 256 {
            return Err(io::Error::new(
                ErrorKind::InvalidData,
                "a line that does not end",
            ));
        }
    }
    Ok(String::from_utf8_lossy(&line).into_owned())
}

/// An unspecified address of the family of `of`.
#[must_use]
pub fn unspecified(of: SocketAddr) -> SocketAddr {
    match of {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    }
}

fn udp(address: SocketAddr, timeout: Duration) -> io::Result<String> {
    let socket = UdpSocket::bind(unspecified(address))?;
    socket.connect(address)?;
    let deadline = Instant::now() + timeout;
    let mut buffer = [0; 512];
    loop {
        socket.send(b"probe")?;
        let left = deadline.saturating_duration_since(Instant::now());
        // Sent again now and then: datagrams may be lost without anybody having denied them.
        let wait = left.min(timeout / 4).max(Duration::from_millis(1));
        socket.set_read_timeout(Some(wait))?;
        match socket.recv(&mut buffer) {
            Ok(length) => {
                let reply = String::from_utf8_lossy(&buffer[..length]);
                return match reply.strip_suffix(" probe") {
                    Some(name) => Ok(name.to_owned()),
                    None => Err(io::Error::new(ErrorKind::InvalidData, "not a Pod's reply")),
                };
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock && !left.is_zero() => {}
            Err(error) => return Err(error),
        }
    }
}

/// By the kernel's SCTP, or by raw packets where it has none.
fn sctp(address: SocketAddr, timeout: Duration) -> io::Result<String> {
    match sctp_socket(address, timeout) {
        Err(error) if super::sctp::is_missing(&error) => super::sctp::ask(address, timeout),
        outcome => outcome,
    }
}

/// A one-to-one SCTP socket behaves as a TCP socket does.
fn sctp_socket(address: SocketAddr, timeout: Duration) -> io::Result<String> {
    use nix::sys::socket::{
        SockaddrStorage, connect, setsockopt,
        sockopt::{ReceiveTimeout, SendTimeout},
    };
    let socket = super::sctp::kernel_socket(address)?;
    let micros = i64::try_from(timeout.as_micros()).unwrap_or(i64::MAX);
    let limit = nix::sys::time::TimeValLike::microseconds(micros);
    // Connecting honours the send timeout.
    setsockopt(&socket, SendTimeout, &limit)?;
    setsockopt(&socket, ReceiveTimeout, &limit)?;
    connect(
        std::os::fd::AsRawFd::as_raw_fd(&socket),
        &SockaddrStorage::from(address),
    )
    .map_err(|error| match error {
        nix::Error::EINPROGRESS => ErrorKind::TimedOut.into(),
        other => io::Error::from(other),
    })?;
    let mut stream = std::fs::File::from(socket);
    stream.write_all(b"probe\n")?;
    Ok(first_line(&mut stream)?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_read_as_they_are_shown() {
        for text in ["tcp/10.0.0.1:80", "udp/[fd00::1]:53", "http/10.96.0.7:8080"] {
            assert_eq!(text.parse::<Target>().unwrap().to_string(), text);
        }
        for text in [
            "10.0.0.1:80",
            "icmp/10.0.0.1:80",
            "tcp/10.0.0.1",
            "tcp/name:80",
        ] {
            assert!(text.parse::<Target>().is_err(), "{text}");
        }
    }
}
