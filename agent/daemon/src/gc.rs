//! Keeps the tables that flows fill clean, on a thread of its own that never holds up the agent.
//!
//! ```text
//! Agent ── Retired: after the writes that retire backends ──> walk at once ──> entries deleted,
//!                                                                              sockets closed
//!  every --gc-interval ──> walk in parts, at most 1% of a CPU ──> expired entries deleted
//! ```
//! The walk at once also ends the flows of addresses whose Pods are gone: the next Pod there is to
//! get nothing that the last one asked for.
//!
//! A pass goes over conntrack, then over translations. Times are in [`crate::timeouts`]; they shrink
//! while a family's table is nearly full, and passes follow each other at once then: a full table
//! refuses new flows.

use std::{
    collections::{BTreeSet, HashSet, VecDeque},
    net::IpAddr,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use hachi_abi::proto;
use hachi_api::ConntrackStatus;
use hachi_compile::{Retired, Through, is_moved};
use hachi_kernel::{Flow, Flows, Given, KernelError, Walk};
use hachi_net::{Connected, NetNs, close_udp};
use tracing::{debug, info, warn};

use crate::timeouts::Timeouts;

/// A walk at the side rests this many times as long as it works: 1% of a CPU.
const REST: u32 = 99;
/// A packet that was under way while a backend was removed may have noted its flow after the walk;
/// so it is repeated once.
const AGAIN: Duration = Duration::from_millis(200);
/// A family's table counts as nearly full from here, in percent.
const PRESSURE: u64 = 80;
/// The longest interval between passes then.
const PRESSED_INTERVAL: Duration = Duration::from_secs(1);

/// What flows are counted by.
const PROTOCOLS: [&str; 5] = ["tcp", "udp", "sctp", "icmp", "other"];

/// The place of a protocol in [`PROTOCOLS`].
const fn counted_as(protocol: u8) -> usize {
    match protocol {
        proto::TCP => 0,
        proto::UDP => 1,
        proto::SCTP => 2,
        proto::ICMP | proto::ICMPV6 => 3,
        _ => 4,
    }
}

/// What a change has retired, and where its sockets may be.
struct Job {
    retired: Retired,
    /// Addresses whose Pods are gone: whoever has them next inherits no flow.
    vacated: BTreeSet<IpAddr>,
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
            translation_capacity: flows.translations(),
            ..ConntrackStatus::default()
        }));
        let worker = Worker {
            flows,
            timeouts,
            interval,
            report: Arc::clone(&report),
            pressed: [[false; 2]; 2],
        };
        thread::Builder::new()
            .name("collector".into())
            .spawn(move || worker.run(&todo))
            .context("cannot start the collector's thread")?;
        Ok(Self { jobs, report })
    }

    /// Has flows moved that go to backends which are retired, and those forgotten whose address is
    /// vacated; the writes that do so must be in force. `namespaces`: paths of the Pods' network
    /// namespaces, whose sockets may be closed.
    pub(crate) fn retire(
        &self,
        retired: Retired,
        vacated: BTreeSet<IpAddr>,
        namespaces: Vec<PathBuf>,
    ) {
        if self
            .jobs
            .send(Job {
                retired,
                vacated,
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
    /// By table ([`CONNTRACK`], [`NAT`]) and family.
    pressed: [[bool; 2]; 2],
}

/// The tables of a pass.
const CONNTRACK: usize = 0;
const NAT: usize = 1;

/// A pass over everything, in parts.
#[derive(Default)]
struct Pass {
    walk: Walk,
    /// Where it is: [`CONNTRACK`] or [`NAT`].
    table: usize,
    /// Entries that stay, by table and family.
    kept: [[u32; 2]; 2],
    /// Flows that stay, by protocol as [`PROTOCOLS`] has them.
    flows: [u32; PROTOCOLS.len()],
    worked: Duration,
}

impl Worker {
    fn run(mut self, todo: &Receiver<Job>) {
        // In the order of their times, each as long after its walk.
        let mut again: VecDeque<(Instant, Job)> = VecDeque::new();
        let mut pass: Option<Pass> = None;
        let mut next = Instant::now() + self.interval;
        loop {
            let wake = again.front().map_or(next, |(when, _)| next.min(*when));
            match todo.recv_timeout(wake.saturating_duration_since(Instant::now())) {
                Ok(mut job) => {
                    while let Ok(more) = todo.try_recv() {
                        job.retired.join(more.retired);
                        job.vacated.extend(more.vacated);
                        job.namespaces = more.namespaces;
                    }
                    self.retire(&job);
                    // By then a vacated address may have flows of its next Pod.
                    job.vacated.clear();
                    if !job.retired.is_empty() {
                        again.push_back((Instant::now() + AGAIN, job));
                    }
                    continue;
                }
                Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => {}
            }
            while let Some((_, job)) = again.pop_front_if(|(when, _)| *when <= Instant::now()) {
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
                    if self.pressed.as_flattened().contains(&true) {
                        self.interval.min(PRESSED_INTERVAL)
                    } else {
                        self.interval
                    }
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
        let Self {
            timeouts, pressed, ..
        } = self;
        let Pass {
            walk, kept, flows, ..
        } = pass;
        let table = pass.table;
        let mut judge = |v6: bool, idle: Duration, limit: Duration| {
            let expired = idle > limit;
            kept[table][usize::from(v6)] += u32::from(!expired);
            expired
        };
        let hurry = |v6: bool| pressed[table][usize::from(v6)];
        let part = if table == CONNTRACK {
            self.flows.next(walk, |flow| {
                let v6 = flow.source.is_ipv6();
                let expired = judge(v6, flow.idle, timeouts.of(flow, hurry(v6)));
                // Its other entry is the replies'.
                flows[counted_as(flow.proto)] += u32::from(!expired && !flow.reply);
                expired
            })?
        } else {
            self.flows.next_translations(walk, |one| {
                let v6 = one.source.is_ipv6();
                judge(v6, one.idle, timeouts.of_translation(one, hurry(v6)))
            })?
        };
        self.note(|report| {
            let expired = if table == CONNTRACK {
                &mut report.expired
            } else {
                &mut report.translations_expired
            };
            *expired += u64::from(part.deleted);
        });
        if part.last {
            pass.table += 1;
            pass.walk = Walk::default();
        }
        Ok(pass.table > NAT)
    }

    fn finish(&mut self, pass: &Pass) {
        let capacities = [self.flows.capacity(), self.flows.translations()];
        let names = ["conntrack", "the table of translations"];
        for table in [CONNTRACK, NAT] {
            let each = u64::from(capacities[table] / 2).max(1);
            for (pressed, kept) in self.pressed[table].iter_mut().zip(pass.kept[table]) {
                let now = u64::from(kept) * 100 >= PRESSURE * each;
                if now && !*pressed {
                    warn!(
                        kept,
                        capacity = each,
                        "{} is nearly full: short-lived flows go early",
                        names[table]
                    );
                }
                *pressed = now;
            }
        }
        let entries = pass.kept[CONNTRACK].iter().sum();
        let translations = pass.kept[NAT].iter().sum();
        debug!(entries, translations, worked = ?pass.worked, "flows cleaned");
        self.note(|report| {
            report.entries = entries;
            let named = PROTOCOLS.iter().map(|name| (*name).to_owned());
            report.flows = named.zip(pass.flows).collect();
            report.pressed = self.pressed[CONNTRACK].contains(&true);
            report.translations = translations;
            report.translations_pressed = self.pressed[NAT].contains(&true);
            report.passes += 1;
            report.pass_us = u64::try_from(pass.worked.as_micros()).unwrap_or(u64::MAX);
        });
    }

    fn note(&self, change: impl FnOnce(&mut ConntrackStatus)) {
        change(&mut self.report.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Moves flows of conntrack and sockets off retired backends, and ends those of vacated addresses.
    fn retire(&self, job: &Job) {
        let begun = Instant::now();
        let mut ended = 0;
        let moved = self.flows.all(|flow| {
            let ends = [flow.source.ip(), flow.destination.ip()];
            if ends.iter().any(|end| job.vacated.contains(end)) {
                ended += 1;
                return true;
            }
            through(flow).is_some_and(|flow| job.retired.contains(&flow))
        });
        let moved = match moved {
            Ok(part) => part.deleted.saturating_sub(ended),
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
        if ended > 0 {
            debug!(ended, addresses = ?job.vacated, "flows of Pods that are gone are forgotten");
        }
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

    fn flow(proto: u8) -> Flow {
        Flow {
            source: "10.0.0.1:4000".parse().unwrap(),
            destination: "10.96.0.10:53".parse().unwrap(),
            proto,
            reply: false,
            rewrite: "10.0.0.2:5353".parse().ok(),
            closing: false,
            opening: false,
            idle: Duration::ZERO,
            revision: 1,
            egress_rule: 0,
            ingress_rule: 0,
        }
    }

    #[test]
    fn both_directions_of_a_flow_go_the_same_way() {
        let opener = flow(proto::UDP);
        let reply = Flow {
            source: "10.0.0.2:5353".parse().unwrap(),
            destination: "10.0.0.1:4000".parse().unwrap(),
            reply: true,
            rewrite: "10.96.0.10:53".parse().ok(),
            ..opener.clone()
        };
        assert!(through(&opener).is_some());
        assert_eq!(through(&opener), through(&reply));
        assert_eq!(through(&flow(proto::TCP)), None);
        let direct = Flow {
            rewrite: None,
            ..opener
        };
        assert_eq!(through(&direct), None);
    }
}
