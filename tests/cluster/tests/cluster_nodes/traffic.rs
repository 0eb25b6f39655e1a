//! Payloads between two namespaces, in the calling process: what was sent is what arrives.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use hachi_cluster::Netns;
use nix::errno::Errno;

/// How long one step may take.
const WAIT: Duration = Duration::from_secs(5);
/// Datagrams may be lost without anybody's doing.
const TRIES: usize = 3;

/// Bytes of the datagrams: little, about an Ethernet frame, a jumbo frame, the most.
pub(crate) const DATAGRAMS: [usize; 4] = [1, 1_400, 9_000, 65_507];

/// Who speaks to whom.
#[derive(Clone, Copy)]
pub(crate) struct Path<'a> {
    /// Where the client is.
    pub(crate) from: &'a Netns,
    /// Where the server is.
    pub(crate) to: &'a Netns,
    /// The address that the server has.
    pub(crate) server: IpAddr,
    /// The address and port that the client asks; the server's own if absent.
    pub(crate) asked: Option<SocketAddr>,
    /// The address that the server must see; not checked if absent.
    pub(crate) seen: Option<IpAddr>,
}

/// The port of a server behind a Service; any port if absent.
pub(crate) const PORT: u16 = 7_777;

impl Path<'_> {
    /// The port that the server binds; 0 is any.
    pub(crate) fn port(&self) -> u16 {
        if self.asked.is_some() { PORT } else { 0 }
    }

    /// Whom the client asks.
    pub(crate) fn target(&self, server: SocketAddr) -> SocketAddr {
        self.asked.unwrap_or(server)
    }

    /// Checks whom the server sees.
    pub(crate) fn check(&self, peer: SocketAddr) -> Result<()> {
        if let Some(seen) = self.seen {
            ensure!(peer.ip() == seen, "the server sees {peer}, not {seen}");
        }
        Ok(())
    }

    /// Datagrams of all sizes, and back.
    pub(crate) fn datagrams(&self) -> Result<()> {
        let at = (self.server, self.port());
        let server = self.to.enter(|| UdpSocket::bind(at))??;
        let any = if self.server.is_ipv4() {
            "0.0.0.0:0"
        } else {
            "[::]:0"
        };
        let client = self.from.enter(|| UdpSocket::bind(any))??;
        let target = self.target(server.local_addr()?);
        client.connect(target)?;
        for socket in [&server, &client] {
            socket.set_read_timeout(Some(WAIT / 10))?;
        }
        for size in DATAGRAMS {
            let sent = pattern(size as u64, size);
            let mut last = Ok(());
            for _ in 0..TRIES {
                last = self.datagram(&client, &server, &sent);
                if last.is_ok() {
                    break;
                }
            }
            last.with_context(|| format!("{size} bytes to {target}"))?;
        }
        Ok(())
    }

    fn datagram(&self, client: &UdpSocket, server: &UdpSocket, sent: &[u8]) -> Result<()> {
        let mut buffer = vec![0; 70_000];
        if let Err(error) = client.send(sent) {
            // The call after a packet that was too long for a hop tells of that, and does nothing else.
            ensure!(error.raw_os_error() == Some(Errno::EMSGSIZE as i32), error);
            client.send(sent)?;
        }
        let peer = loop {
            let (length, peer) = server.recv_from(&mut buffer).context("there")?;
            // Of an earlier try, at worst.
            if length == sent.len() {
                ensure!(&buffer[..length] == sent, "it is changed");
                break peer;
            }
        };
        self.check(peer)?;
        server.send_to(sent, peer)?;
        loop {
            let length = client.recv(&mut buffer).context("back")?;
            if length == sent.len() {
                ensure!(&buffer[..length] == sent, "the answer is changed");
                return Ok(());
            }
        }
    }

    /// A stream of so many bytes, and a word back.
    pub(crate) fn stream(&self, bytes: u64) -> Result<()> {
        let at = (self.server, self.port());
        let listener = self.to.enter(|| TcpListener::bind(at))??;
        let target = self.target(listener.local_addr()?);
        let client = self
            .from
            .enter(|| TcpStream::connect_timeout(&target, WAIT))?
            .with_context(|| format!("connect to {target}"))?;
        let (server, peer) = listener.accept()?;
        self.check(peer)?;
        exchange(client, server, bytes).with_context(|| format!("to {target}"))
    }
}

const BLOCK: usize = 1 << 18;

/// So many bytes from one end of a connection to the other, and a word back.
pub(crate) fn exchange(mut sender: TcpStream, mut receiver: TcpStream, bytes: u64) -> Result<()> {
    for socket in [&sender, &receiver] {
        socket.set_read_timeout(Some(WAIT))?;
        socket.set_write_timeout(Some(WAIT))?;
    }
    thread::scope(|scope| {
        let sender = scope.spawn(move || -> Result<()> {
            let block = pattern(1, BLOCK);
            let mut left = bytes;
            while left > 0 {
                let part = left.min(BLOCK as u64) as usize;
                sender.write_all(&block[..part])?;
                left -= part as u64;
            }
            let mut word = [0; 4];
            sender.read_exact(&mut word).context("the word back")?;
            ensure!(&word == b"done");
            Ok(())
        });
        let received = receive(&mut receiver, bytes);
        let sent = sender
            .join()
            .map_err(|_| anyhow::anyhow!("the sender panicked"))?;
        received.and(sent)
    })
}

fn receive(server: &mut TcpStream, bytes: u64) -> Result<()> {
    let block = pattern(1, BLOCK);
    let mut buffer = vec![0; BLOCK];
    let mut left = bytes;
    while left > 0 {
        let part = left.min(BLOCK as u64) as usize;
        match server.read_exact(&mut buffer[..part]) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                anyhow::bail!("it stalled with {left} bytes left")
            }
            Err(error) => return Err(error.into()),
        }
        ensure!(buffer[..part] == block[..part], "it is changed");
        left -= part as u64;
    }
    Ok(server.write_all(b"done")?)
}

/// Bytes that repeat nowhere near.
pub(crate) fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let next = |state: &mut u64| {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        *state as u8
    };
    (0..length).map(|_| next(&mut state)).collect()
}
