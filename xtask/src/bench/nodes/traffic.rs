//! Clients and servers in two namespaces, on one core: then the time that an exchange takes is the work
//! that it makes.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use nix::sched::{CloneFlags, CpuSet, sched_setaffinity, setns};
use nix::sys::socket::{setsockopt, sockopt::Linger};
use nix::unistd::Pid;

/// How long a measurement runs.
const RUN: Duration = Duration::from_millis(400);
/// How long one step may take.
const WAIT: Duration = Duration::from_secs(5);
/// What a client says last.
const LAST: u8 = b'q';
const BLOCK: usize = 128 << 10;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A byte there and one back, over one connection.
    TcpRr,
    /// The same with a connection for each, ended by a reset.
    TcpCrr,
    /// A byte there and one back.
    UdpRr,
    /// As much as goes.
    Stream,
}

impl Kind {
    pub(super) const ALL: [Self; 4] = [Self::TcpRr, Self::TcpCrr, Self::UdpRr, Self::Stream];

    /// Its name, with the unit.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::TcpRr => "TCP_RR, us",
            Self::TcpCrr => "TCP_CRR, us",
            Self::UdpRr => "UDP_RR, us",
            Self::Stream => "TCP_STREAM, us/MiB",
        }
    }
}

/// Two namespaces, and the server's address.
#[derive(Clone, Debug)]
pub(super) struct Pair {
    pub(super) client: PathBuf,
    pub(super) server: PathBuf,
    pub(super) address: IpAddr,
}

/// Measures once; returns microseconds for one exchange, or for a MiB.
pub(super) fn measure(pair: &Pair, kind: Kind) -> Result<f64> {
    let (told, at) = mpsc::channel();
    std::thread::scope(|scope| {
        let server = scope.spawn(|| {
            enter(&pair.server)?;
            serve(pair.address, kind, &told)
        });
        let client = scope.spawn(move || {
            enter(&pair.client)?;
            let at = at.recv_timeout(WAIT).context("the server did not start")?;
            ask(at, kind)
        });
        let asked = client.join().map_err(|_| anyhow!("the client panicked"))?;
        let served = server.join().map_err(|_| anyhow!("the server panicked"))?;
        let result = asked?;
        served?;
        Ok(result)
    })
}

fn enter(namespace: &PathBuf) -> Result<()> {
    let file = File::open(namespace).with_context(|| format!("{}", namespace.display()))?;
    setns(file.as_fd(), CloneFlags::CLONE_NEWNET).context("cannot enter a namespace")?;
    let mut cpu = CpuSet::new();
    cpu.set(0)?;
    sched_setaffinity(Pid::from_raw(0), &cpu).context("cannot stay on one core")
}

fn serve(address: IpAddr, kind: Kind, told: &mpsc::Sender<SocketAddr>) -> Result<()> {
    if kind == Kind::UdpRr {
        let socket = UdpSocket::bind((address, 0))?;
        socket.set_read_timeout(Some(WAIT))?;
        told.send(socket.local_addr()?)?;
        let mut byte = [0];
        loop {
            let (_, peer) = socket.recv_from(&mut byte)?;
            socket.send_to(&byte, peer)?;
            if byte[0] == LAST {
                return Ok(());
            }
        }
    }
    let listener = TcpListener::bind((address, 0))?;
    told.send(listener.local_addr()?)?;
    loop {
        let (mut stream, _) = listener.accept()?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(WAIT))?;
        if kind == Kind::Stream {
            let mut buffer = vec![0; BLOCK];
            while stream.read(&mut buffer)? > 0 {}
            // The client waits until all is there.
            stream.write_all(&[LAST])?;
            return Ok(());
        }
        let mut byte = [0];
        // In CRR the client's reset ends the connection.
        while let Ok(1) = stream.read(&mut byte) {
            stream.write_all(&byte)?;
            if byte[0] == LAST {
                return Ok(());
            }
        }
    }
}

fn ask(at: SocketAddr, kind: Kind) -> Result<f64> {
    let started;
    let mut done = 0_u64;
    match kind {
        Kind::UdpRr => {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.set_read_timeout(Some(WAIT))?;
            socket.connect(at)?;
            let exchange = |byte: u8| -> Result<()> {
                socket.send(&[byte])?;
                socket.recv(&mut [0])?;
                Ok(())
            };
            exchange(0)?;
            started = Instant::now();
            while started.elapsed() < RUN {
                exchange(0)?;
                done += 1;
            }
            let took = started.elapsed();
            exchange(LAST)?;
            Ok(micros(took, done as f64))
        }
        Kind::TcpRr => {
            let mut stream = connect(at)?;
            exchange(&mut stream, 0)?;
            started = Instant::now();
            while started.elapsed() < RUN {
                exchange(&mut stream, 0)?;
                done += 1;
            }
            let took = started.elapsed();
            exchange(&mut stream, LAST)?;
            Ok(micros(took, done as f64))
        }
        Kind::TcpCrr => {
            let once = |byte: u8| -> Result<()> {
                let mut stream = connect(at)?;
                exchange(&mut stream, byte)?;
                let linger = nix::libc::linger {
                    l_onoff: 1,
                    l_linger: 0,
                };
                Ok(setsockopt(&stream, Linger, &linger)?)
            };
            once(0)?;
            started = Instant::now();
            while started.elapsed() < RUN {
                once(0)?;
                done += 1;
            }
            let took = started.elapsed();
            once(LAST)?;
            Ok(micros(took, done as f64))
        }
        Kind::Stream => {
            let mut stream = connect(at)?;
            let block = vec![7; BLOCK];
            started = Instant::now();
            while started.elapsed() < RUN {
                stream.write_all(&block)?;
                done += 1;
            }
            stream.shutdown(std::net::Shutdown::Write)?;
            stream.read_exact(&mut [0])?;
            let mebibytes = done as f64 * BLOCK as f64 / f64::from(1 << 20);
            Ok(micros(started.elapsed(), mebibytes))
        }
    }
}

fn micros(took: Duration, count: f64) -> f64 {
    took.as_secs_f64() * 1e6 / count
}

fn connect(at: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&at, WAIT)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(WAIT))?;
    Ok(stream)
}

fn exchange(stream: &mut TcpStream, byte: u8) -> Result<()> {
    stream.write_all(&[byte])?;
    Ok(stream.read_exact(&mut [0])?)
}
