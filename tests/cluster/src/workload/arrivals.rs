//! New connections at a steady pace, each of which has to succeed.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::Result;

use crate::{
    netns::Netns,
    workload::probe::{Outcome, Protocol, Target, probe},
};

/// How long one connection may take; far more than a lost packet costs.
const TIMEOUT: Duration = Duration::from_secs(5);

/// How it went.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Connections that were made and answered.
    pub answered: usize,
    /// What became of the others.
    pub failed: Vec<String>,
    /// SYNs of the whole namespace that had to be sent again: the first or its answer was lost.
    pub syns_again: u64,
    /// How long the slowest took.
    pub slowest: Duration,
}

/// Connections from a thread of its own.
#[derive(Debug)]
pub struct Arrivals {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Report>>,
}

impl Arrivals {
    /// Connects from a network namespace, `rate` times a second or as often as it can.
    #[must_use]
    pub fn start(from: Arc<Netns>, to: SocketAddr, rate: u32) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || from.enter(|| arrive(to, rate, &stopped)));
        Self { stop, thread }
    }

    /// Ends it, and says how it went.
    pub fn stop(self) -> Result<Report> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread
            .join()
            .map_err(|_| anyhow::anyhow!("the thread of the connections panicked"))?
    }
}

fn arrive(to: SocketAddr, rate: u32, stop: &AtomicBool) -> Report {
    let target = Target {
        protocol: Protocol::Tcp,
        address: to,
    };
    let mut report = Report::default();
    let before = syns_again();
    let mut next = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        let started = Instant::now();
        match probe(target, TIMEOUT) {
            Outcome::Answered(_) => report.answered += 1,
            other => report
                .failed
                .push(format!("{other:?} after {:?}", started.elapsed())),
        }
        report.slowest = report.slowest.max(started.elapsed());
        next += Duration::from_secs(1) / rate;
        thread::sleep(next.saturating_duration_since(Instant::now()));
        next = next.max(Instant::now());
    }
    report.syns_again = syns_again().saturating_sub(before);
    report
}

/// `TCPSynRetrans` of this thread's network namespace.
fn syns_again() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/net/netstat").unwrap_or_default();
    let rows: Vec<Vec<&str>> = text
        .lines()
        .filter_map(|line| line.strip_prefix("TcpExt:"))
        .map(|line| line.split_whitespace().collect())
        .collect();
    let [names, values] = rows.as_slice() else {
        return 0;
    };
    let at = names.iter().position(|name| *name == "TCPSynRetrans");
    at.and_then(|at| values.get(at)?.parse().ok()).unwrap_or(0)
}
