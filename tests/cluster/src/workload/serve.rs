//! The server that every Pod runs.

use std::{
    io::{self, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::sys::socket::{
    setsockopt,
    sockopt::{RcvBuf, RcvBufForce},
};
use serde_json::json;

use super::sctp;

/// Bytes of a UDP socket's receive buffer: those of seconds.
const ROOM: usize = 16 << 20;

/// What to serve.
#[derive(Debug, clap::Args)]
pub struct Serve {
    /// The name to answer with.
    #[arg(long)]
    pub name: String,
    /// The node's name, told in HTTP answers.
    #[arg(long, default_value = "")]
    pub node: String,
    /// A port for both TCP and UDP; may be repeated.
    #[arg(long = "port", default_value = "80")]
    pub ports: Vec<u16>,
    /// A port for SCTP; may be repeated.
    #[arg(long = "sctp")]
    pub sctp: Vec<u16>,
    /// An address to serve on, instead of all; may be repeated.
    #[arg(long = "bind")]
    pub addresses: Vec<IpAddr>,
    /// A file to create once every port is open.
    #[arg(long)]
    pub ready_file: Option<std::path::PathBuf>,
}

impl Serve {
    /// Serves until killed.
    pub fn run(self) -> Result<()> {
        let mut threads = Vec::new();
        for address in self.bind_addresses() {
            for &port in &self.ports {
                let at = SocketAddr::new(address, port);
                let listener =
                    TcpListener::bind(at).with_context(|| format!("listen on tcp/{at}"))?;
                let socket = UdpSocket::bind(at).with_context(|| format!("listen on udp/{at}"))?;
                make_room(&socket);
                let (name, node) = (self.name.clone(), self.node.clone());
                threads.push(thread::spawn(move || accept(&listener, &name, &node)));
                let name = self.name.clone();
                threads.push(thread::spawn(move || datagrams(&socket, &name)));
            }
            for at in self
                .sctp
                .iter()
                .flat_map(|port| sctp_addresses(address, *port))
            {
                match sctp_listener(at) {
                    Ok(listener) => {
                        let (name, node) = (self.name.clone(), self.node.clone());
                        threads.push(thread::spawn(move || accept(&listener, &name, &node)));
                    }
                    Err(error) if sctp::is_missing(&error) => threads.push(
                        sctp::serve(at, &self.name)
                            .with_context(|| format!("listen on raw sctp/{at}"))?,
                    ),
                    Err(error) => return Err(error).context(format!("listen on sctp/{at}")),
                }
            }
        }
        if let Some(path) = &self.ready_file {
            std::fs::write(path, "").with_context(|| format!("write {}", path.display()))?;
        }
        for thread in threads {
            // Each runs for ever; one that panicked has said why.
            let _ = thread.join();
        }
        Ok(())
    }

    fn bind_addresses(&self) -> Vec<IpAddr> {
        if !self.addresses.is_empty() {
            return self.addresses.clone();
        }
        // One socket for both families where the namespace has IPv6.
        match TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0)) {
            Ok(_) => vec![Ipv6Addr::UNSPECIFIED.into()],
            Err(_) => vec![Ipv4Addr::UNSPECIFIED.into()],
        }
    }
}

fn accept(listener: &TcpListener, name: &str, node: &str) {
    loop {
        match listener.accept() {
            Ok((stream, client)) => {
                let (name, node) = (name.to_owned(), node.to_owned());
                thread::spawn(move || {
                    // A client that goes away in the middle is no news.
                    let _ = converse(stream, client, &name, &node);
                });
            }
            // Out of descriptors, at worst: wait for connections to end.
            Err(_) => thread::sleep(Duration::from_millis(10)),
        }
    }
}

fn converse(mut stream: TcpStream, client: SocketAddr, name: &str, node: &str) -> io::Result<()> {
    // Over SCTP there is no such option, and no need of it.
    let _ = stream.set_nodelay(true);
    let mut buffer = vec![0; 64 * 1024];
    let length = stream.read(&mut buffer)?;
    if let Some(request) = http_request(&buffer[..length]) {
        // What is left unread when a connection is closed becomes a RST.
        let mut read = buffer[..length].to_vec();
        while !read.windows(4).any(|end| end == b"\r\n\r\n") && read.len() < buffer.len() {
            let length = stream.read(&mut buffer)?;
            if length == 0 {
                return Ok(());
            }
            read.extend_from_slice(&buffer[..length]);
        }
        let body = json!({
            "pod": name, "node": node, "client": client.to_string(), "request": request,
        });
        let body = format!("{body}\n");
        write!(
            stream,
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\
             Connection: close\r\n\r\n{body}",
            body.len()
        )?;
        return Ok(());
    }
    writeln!(stream, "{name}")?;
    let mut length = length;
    while length > 0 {
        stream.write_all(&buffer[..length])?;
        length = stream.read(&mut buffer)?;
    }
    Ok(())
}

/// The request line, if the bytes begin an HTTP request.
fn http_request(bytes: &[u8]) -> Option<String> {
    let line = bytes.split(|&byte| byte == b'\r').next()?;
    let line = std::str::from_utf8(line).ok()?;
    let mut words = line.split(' ');
    let method = words.next()?;
    let known = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"].contains(&method);
    let version = words.nth(1)?;
    (known && version.starts_with("HTTP/1.")).then(|| line.to_owned())
}

/// Room for what comes while the process gets no CPU time: what a socket has no room for looks as if
/// the network had lost it. Without the right to more than others, as much as there is for everybody.
pub(super) fn make_room(socket: &UdpSocket) {
    if setsockopt(socket, RcvBufForce, &ROOM).is_err() {
        let _ = setsockopt(socket, RcvBuf, &ROOM);
    }
}

fn datagrams(socket: &UdpSocket, name: &str) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        // Errors here are ICMP answers to earlier replies.
        let Ok((length, client)) = socket.recv_from(&mut buffer) else {
            continue;
        };
        let mut reply = format!("{name} ").into_bytes();
        reply.extend_from_slice(&buffer[..length]);
        let _ = socket.send_to(&reply, client);
    }
}

/// A raw socket is of one family, and an association's takes both.
fn sctp_addresses(address: IpAddr, port: u16) -> Vec<SocketAddr> {
    let at = SocketAddr::new(address, port);
    let any: SocketAddr = (Ipv4Addr::UNSPECIFIED, port).into();
    if address == IpAddr::V6(Ipv6Addr::UNSPECIFIED)
        && sctp_listener(at).is_err_and(|error| sctp::is_missing(&error))
    {
        return vec![any, at];
    }
    vec![at]
}

/// A one-to-one SCTP socket takes the calls of a TCP listener.
fn sctp_listener(at: SocketAddr) -> io::Result<TcpListener> {
    use nix::sys::socket::{Backlog, SockaddrStorage, bind, listen};
    let socket = sctp::kernel_socket(at)?;
    bind(
        std::os::fd::AsRawFd::as_raw_fd(&socket),
        &SockaddrStorage::from(at),
    )?;
    listen(&socket, Backlog::MAXCONN)?;
    Ok(TcpListener::from(socket))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload::probe::{Outcome, Protocol, Target, probe};

    #[test]
    fn http_is_told_from_other_bytes() {
        assert_eq!(
            http_request(b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n").as_deref(),
            Some("GET /x HTTP/1.1")
        );
        for other in [
            &b"probe\n"[..],
            b"GET\r\n",
            b"GET / FTP\r\n",
            b"\xff\xfe",
            b"",
        ] {
            assert_eq!(http_request(other), None);
        }
    }

    #[test]
    fn every_probe_gets_the_name() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let tcp = listener.local_addr().unwrap();
        thread::spawn(move || accept(&listener, "ns/one", "node1"));
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let udp = socket.local_addr().unwrap();
        thread::spawn(move || datagrams(&socket, "ns/one"));

        let targets = [
            (Protocol::Tcp, tcp),
            (Protocol::Http, tcp),
            (Protocol::Udp, udp),
        ];
        for (protocol, address) in targets {
            let outcome = probe(Target { protocol, address }, Duration::from_secs(5));
            assert_eq!(outcome, Outcome::Answered("ns/one".into()), "{protocol}");
        }
    }

    #[test]
    fn a_closed_port_is_refused() {
        let address = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let outcome = probe(Target { protocol, address }, Duration::from_secs(5));
            assert_eq!(outcome, Outcome::Refused, "{protocol}");
        }
    }
}
