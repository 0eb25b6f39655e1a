//! A TCP stream that runs for long and notices every stall.

use std::{
    io::{self, ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use serde::Serialize;

use crate::{netns::Netns, workload::probe::first_line};

/// The time between two messages.
const INTERVAL: Duration = Duration::from_millis(5);

/// After so long without an echo the stream counts as dead.
const DEAD: Duration = Duration::from_secs(15);

/// How a stream went.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// The server's name.
    pub server: String,
    /// Messages that came back unharmed.
    pub echoed: u64,
    /// The longest wait for an echo.
    pub longest_stall_ms: u128,
    /// Why the stream ended by itself, if it did.
    pub error: Option<String>,
}

/// A stream on a thread of its own, which ends with it.
#[derive(Debug)]
pub struct Stream {
    stop: Stop,
    echoed: Arc<AtomicU64>,
    thread: JoinHandle<Report>,
}

/// Tells the thread to end, at the latest when nobody can ask any more how it went.
#[derive(Debug)]
struct Stop(Arc<AtomicBool>);

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Stream {
    /// Connects from a network namespace.
    pub fn start(from: &Netns, to: SocketAddr) -> Result<Self> {
        let socket = from
            .enter(|| TcpStream::connect_timeout(&to, Duration::from_secs(5)))?
            .with_context(|| format!("connect to {to}"))?;
        Ok(Self::over(socket))
    }

    /// Runs over a connection.
    #[must_use]
    pub fn over(socket: TcpStream) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let echoed = Arc::new(AtomicU64::new(0));
        let (stopped, count) = (Arc::clone(&stop), Arc::clone(&echoed));
        let thread = thread::spawn(move || {
            let mut report = Report::default();
            if let Err(error) = exchange(socket, &stopped, &count, &mut report) {
                report.error = Some(match error.kind() {
                    ErrorKind::WouldBlock => format!("no echo for {} s", DEAD.as_secs()),
                    _ => error.to_string(),
                });
            }
            report
        });
        Self {
            stop: Stop(stop),
            echoed,
            thread,
        }
    }

    /// Messages that have come back so far.
    #[must_use]
    pub fn echoed(&self) -> u64 {
        self.echoed.load(Ordering::Relaxed)
    }

    /// Whether the stream has ended by itself.
    #[must_use]
    pub fn ended(&self) -> bool {
        self.thread.is_finished()
    }

    /// Ends it.
    pub fn stop(self) -> Result<Report> {
        drop(self.stop);
        self.thread
            .join()
            .map_err(|_| anyhow::anyhow!("the stream's thread panicked"))
    }
}

fn exchange(
    mut socket: TcpStream,
    stop: &AtomicBool,
    echoed: &AtomicU64,
    report: &mut Report,
) -> io::Result<()> {
    socket.set_nodelay(true)?;
    socket.set_read_timeout(Some(DEAD))?;
    let mut back = [0; 16];
    let mut sequence = 0_u64;
    while !stop.load(Ordering::Relaxed) {
        let message = format!("{sequence:015}\n");
        let sent = Instant::now();
        socket.write_all(message.as_bytes())?;
        if sequence == 0 {
            first_line(&mut socket)?
                .trim()
                .clone_into(&mut report.server);
        }
        socket.read_exact(&mut back)?;
        if back != message.as_bytes() {
            return Err(io::Error::new(
                ErrorKind::InvalidData,
                "the echo is not what was sent",
            ));
        }
        report.longest_stall_ms = report.longest_stall_ms.max(sent.elapsed().as_millis());
        sequence += 1;
        report.echoed = sequence;
        echoed.store(sequence, Ordering::Relaxed);
        thread::sleep(INTERVAL);
    }
    Ok(())
}
