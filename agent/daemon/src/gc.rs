//! Keeps the tables that flows fill clean, on a thread of its own that never holds up the agent.
//!
//! ```text
//! Agent ── Retired: after the writes that retire backends ──> walk at once ──> entries deleted,
//!                                                                              sockets closed
//!  every --gc-interval ──> walk in parts, at most 1% of a CPU ──> expired entries deleted
//! ```
//! Timeouts. The programs ignore an entry after [`hachi_abi::lifetime`]; the collector deletes it
//! then, or earlier if the options say so. When a family's table is nearly full, flows that cost
//! nothing to lose (closing TCP, UDP, ICMP, others) go after a tenth of their time, so that what is
//! left has room: the kernel would otherwise evict whatever was idle longest, live connections
//! included.

use std::{
    collections::HashSet,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use hachi_abi::{CtFlags, lifetime, proto};
use hachi_api::ConntrackStatus;
use hachi_compile::{Retired, Through, is_moved};
use hachi_kernel::{Flow, Flows, Given, KernelError, Walk};
use hachi_net::{Connected, NetNs, close_udp};
use tracing::{debug, info, warn};

/// A walk at the side rests this many times as long as it works: 1% of a CPU.
const REST: u32 = 99;
/// A packet that was under way while a backend was removed may have noted its flow after the walk;
/// so it is repeated once.
const AGAIN: Duration = Duration::from_millis(200);
/// A family's table counts as nearly full from here, in percent.
const PRESSURE: u64 = 80;
/// By how much times shrink then, and the least that they shrink to.
const HURRY: (u32, Duration) = (10, Duration::from_secs(5));

/// After how long without a packet entries are deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Timeouts {
    pub(crate) tcp: Duration,
    pub(crate) tcp_closing: Duration,
    pub(crate) udp: Duration,
    pub(crate) sctp: Duration,
    pub(crate) icmp: Duration,
    pub(crate) other: Duration,
}

impl Timeouts {
    /// The limit of a flow. Options never lengthen what the programs know.
    fn of(&self, flow: &Flow, pressed: bool) -> Duration {
        let (limit, flags) = match (flow.proto, flow.closing) {
            (proto::TCP, true) => (self.tcp_closing, CtFlags::CLOSING),
            (proto::TCP, false) => (self.tcp, 0),
            (proto::UDP, _) => (self.udp, 0),
            (proto::SCTP, _) => (self.sctp, 0),
            (proto::ICMP | proto::ICMPV6, _) => (self.icmp, 0),
            _ => (self.other, 0),
        };
        let limit = limit.min(Duration::from_secs(lifetime(flow.proto, flags).into()));
        let lasting = matches!(
            (flow.proto, flow.closing),
            (proto::TCP, false) | (proto::SCTP, _)
        );
        if pressed && !lasting {
            (limit / HURRY.0).max(HURRY.1.min(limit))
        } else {
            limit
        }
    }
}

/// What a change has retired, and where its sockets may be.
struct Job {
    retired: Retired,
    namespaces: Vec<PathBuf>,
}

/// The way to the thread; it ends with this value.
#[derive(Debug)]
pub(crate) struct Collector {
    jobs: Sender<Job>,
    report: Arc<Mutex<ConntrackStatus>>,
}

impl Collector {
    /// Starts the thread.
    pub(crate) fn start(flows: Flows, timeouts: Timeouts, interval: Duration) -> Result<Self> {
        let (jobs, todo) = channel();
        let report = Arc::new(Mutex::new(ConntrackStatus {
            capacity: flows.capacity(),
            ..ConntrackStatus::default()
        }));
        let worker = Worker {
            flows,
            timeouts,
            interval,
            report: Arc::clone(&report),
            pressed: [false; 2],
        };
        thread::Builder::new()
            .name("collector".into())
            .spawn(move || worker.run(&todo))
            .context("cannot start the collector's thread")?;
        Ok(Self { jobs, report })
    }

    /// Has flows moved that go to backends which are retired; the writes that retire them must be in
    /// force. `namespaces`: paths of the Pods' network namespaces, whose sockets may be closed.
    pub(crate) fn retire(&self, retired: Retired, namespaces: Vec<PathBuf>) {
        if self
            .jobs
            .send(Job {
                retired,
                namespaces,
            })
            .is_err()
        {
            warn!("the collector has ended: flows to removed backends stay until they expire");
        }
    }

    /// How full conntrack is, and what was done.
    pub(crate) fn status(&self) -> ConntrackStatus {
        self.report
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

struct Worker {
    flows: Flows,
    timeouts: Timeouts,
    interval: Duration,
    report: Arc<Mutex<ConntrackStatus>>,
    /// By family.
    pressed: [bool; 2],
}

/// A pass over everything, in parts.
#[derive(Default)]
struct Pass {
    walk: Walk,
    /// Entries that stay, by family.
    kept: [u32; 2],
    worked: Duration,
}

impl Worker {
    fn run(mut self, todo: &Receiver<Job>) {
        let mut again: Option<(Instant, Job)> = None;
        let mut pass: Option<Pass> = None;
        let mut next = Instant::now() + self.interval;
        loop {
            let wake = again.as_ref().map_or(next, |(when, _)| next.min(*when));
            match todo.recv_timeout(wake.saturating_duration_since(Instant::now())) {
                Ok(mut job) => {
                    while let Ok(more) = todo.try_recv() {
                        job.retired.join(more.retired);
                        job.namespaces = more.namespaces;
                    }
                    self.retire(&job);
                    again = Some((Instant::now() + AGAIN, job));
                    continue;
                }
                Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => {}
            }
            if let Some((_, job)) = again.take_if(|(when, _)| *when <= Instant::now()) {
                self.retire(&job);
            }
            if next > Instant::now() {
                continue;
            }
            let begun = Instant::now();
            let mut current = pass.take().unwrap_or_default();
            let rest = match self.step(&mut current) {
                Ok(true) => {
                    self.finish(&current);
                    self.interval
                }
                Ok(false) => {
                    let worked = begun.elapsed();
                    current.worked += worked;
                    pass = Some(current);
                    worked * REST
                }
                Err(error) => {
                    warn!(%error, "conntrack is not cleaned; it is tried again");
                    self.interval
                }
            };
            next = Instant::now() + rest;
        }
    }

    /// Deletes what is expired of the next part; true at the end.
    fn step(&self, pass: &mut Pass) -> Result<bool, KernelError> {
        let Pass { walk, kept, .. } = pass;
        let part = self.flows.next(walk, |flow| {
            let family = usize::from(flow.source.is_ipv6());
            let expired = flow.idle > self.timeouts.of(flow, self.pressed[family]);
            kept[family] += u32::from(!expired);
            expired
        })?;
        self.note(|report| report.expired += u64::from(part.deleted));
        Ok(part.last)
    }

    fn finish(&mut self, pass: &Pass) {
        let each = u64::from(self.flows.capacity() / 2).max(1);
        for (pressed, kept) in self.pressed.iter_mut().zip(pass.kept) {
            let now = u64::from(kept) * 100 >= PRESSURE * each;
            if now && !*pressed {
                warn!(
                    kept,
                    capacity = each,
                    "conntrack is nearly full: short-lived flows go early"
                );
            }
            *pressed = now;
        }
        let entries = pass.kept.iter().sum();
        let pressed = self.pressed.contains(&true);
        debug!(entries, worked = ?pass.worked, "conntrack cleaned");
        self.note(|report| {
            report.entries = entries;
            report.pressed = pressed;
            report.passes += 1;
            report.pass_us = u64::try_from(pass.worked.as_micros()).unwrap_or(u64::MAX);
        });
    }

    fn note(&self, change: impl FnOnce(&mut ConntrackStatus)) {
        change(&mut self.report.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Moves flows of conntrack and sockets off retired backends.
    fn retire(&self, job: &Job) {
        let begun = Instant::now();
        let moved = self
            .flows
            .all(|flow| through(flow).is_some_and(|flow| job.retired.contains(&flow)));
        let moved = match moved {
            Ok(part) => part.deleted,
            Err(error) => {
                warn!(%error, "flows to removed backends stay until they expire");
                0
            }
        };
        let closed = match self.flows.take_sockets(|given| {
            job.retired.contains(&Through {
                proto: given.proto,
                frontend: given.frontend,
                backend: given.backend,
            })
        }) {
            Ok(taken) => close(&taken, &job.namespaces),
            Err(error) => {
                warn!(%error, "sockets of removed backends stay as they are");
                0
            }
        };
        if moved > 0 || closed > 0 {
            info!(moved, closed, took = ?begun.elapsed(), "flows moved off removed backends");
        }
        self.note(|report| {
            report.moved += u64::from(moved);
            report.sockets_closed += closed;
        });
    }
}

/// How a flow's entry goes through a Service, if it does.
fn through(flow: &Flow) -> Option<Through> {
    if !is_moved(flow.proto) {
        return None;
    }
    let rewrite = flow.rewrite?;
    let (frontend, backend) = if flow.reply {
        (rewrite, flow.source)
    } else {
        (flow.destination, rewrite)
    };
    Some(Through {
        proto: flow.proto,
        frontend,
        backend,
    })
}

/// Closes connected UDP sockets, in the node's namespace and in the Pods'.
fn close(taken: &[Given], namespaces: &[PathBuf]) -> u64 {
    let wanted: HashSet<Connected> = taken
        .iter()
        .filter(|given| given.proto == proto::UDP)
        .map(|given| Connected {
            cookie: given.cookie,
            peer: given.backend,
        })
        .collect();
    if wanted.is_empty() {
        return 0;
    }
    let mut sum = 0;
    let mut note = |place: &str, closed: Result<usize, hachi_net::NetError>| match closed {
        Ok(closed) => sum += u64::try_from(closed).unwrap_or_default(),
        Err(error) => warn!(%error, place, "connected sockets keep a backend that is gone"),
    };
    note("the node", close_udp(&wanted));
    for path in namespaces {
        let closed = NetNs::open(path).and_then(|netns| netns.run(|| close_udp(&wanted))?);
        match closed {
            // The Pod is on its way out.
            Err(hachi_net::NetError::NetNs { .. }) => {}
            closed => note(&path.to_string_lossy(), closed),
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHIPPED: Timeouts = Timeouts {
        tcp: Duration::from_secs(86_400),
        tcp_closing: Duration::from_secs(120),
        udp: Duration::from_secs(180),
        sctp: Duration::from_secs(3_600),
        icmp: Duration::from_secs(30),
        other: Duration::from_secs(600),
    };

    fn flow(proto: u8, closing: bool) -> Flow {
        Flow {
            source: "10.0.0.1:4000".parse().unwrap(),
            destination: "10.96.0.10:53".parse().unwrap(),
            proto,
            reply: false,
            rewrite: "10.0.0.2:5353".parse().ok(),
            closing,
            idle: Duration::ZERO,
            revision: 1,
            egress_rule: 0,
            ingress_rule: 0,
        }
    }

    #[test]
    fn options_shorten_times_and_never_lengthen_them() {
        let seconds = |timeouts: &Timeouts, proto, closing| {
            timeouts.of(&flow(proto, closing), false).as_secs()
        };
        assert_eq!(seconds(&SHIPPED, proto::TCP, false), 86_400);
        assert_eq!(seconds(&SHIPPED, proto::TCP, true), 120);
        assert_eq!(seconds(&SHIPPED, proto::UDP, false), 180);
        assert_eq!(seconds(&SHIPPED, proto::SCTP, false), 3_600);
        assert_eq!(seconds(&SHIPPED, proto::ICMPV6, false), 30);
        assert_eq!(seconds(&SHIPPED, 47, false), 600);
        let other = Timeouts {
            udp: Duration::from_secs(30),
            icmp: Duration::from_secs(900),
            ..SHIPPED
        };
        assert_eq!(seconds(&other, proto::UDP, false), 30);
        assert_eq!(seconds(&other, proto::ICMP, false), 30);
    }

    #[test]
    fn under_pressure_connections_stay_and_the_rest_hurries() {
        let seconds = |proto, closing| SHIPPED.of(&flow(proto, closing), true).as_secs();
        assert_eq!(seconds(proto::TCP, false), 86_400);
        assert_eq!(seconds(proto::SCTP, false), 3_600);
        assert_eq!(seconds(proto::TCP, true), 12);
        assert_eq!(seconds(proto::UDP, false), 18);
        assert_eq!(seconds(proto::ICMP, false), 5);
    }

    #[test]
    fn both_directions_of_a_flow_go_the_same_way() {
        let opener = flow(proto::UDP, false);
        let reply = Flow {
            source: "10.0.0.2:5353".parse().unwrap(),
            destination: "10.0.0.1:4000".parse().unwrap(),
            reply: true,
            rewrite: "10.96.0.10:53".parse().ok(),
            ..opener.clone()
        };
        assert!(through(&opener).is_some());
        assert_eq!(through(&opener), through(&reply));
        assert_eq!(through(&flow(proto::TCP, false)), None);
        let direct = Flow {
            rewrite: None,
            ..opener
        };
        assert_eq!(through(&direct), None);
    }
}
