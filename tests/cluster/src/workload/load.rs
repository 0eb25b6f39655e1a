//! All that a network may lose at once: long streams, datagrams and new connections of one client.

use std::{
    fs,
    net::SocketAddr,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    bed::{LIMIT, TIMEOUT},
    eventually,
    netns::Netns,
    workload::{
        arrivals::Arrivals,
        probe::{Protocol, Target, probe},
        pulse::{Beat, Pulse},
        stream::Stream,
    },
};

/// Streams to each Service.
const STREAMS: usize = 4;

/// New connections a second to each Service.
const RATE: u32 = 100;

/// What runs until it is finished.
#[derive(Debug)]
pub struct Load {
    streams: Vec<Stream>,
    arrivals: Vec<Arrivals>,
    pulses: Vec<(SocketAddr, Pulse)>,
}

impl Load {
    /// Starts it from a client's network namespace: streams, datagrams and new connections to Services,
    /// streams and datagrams to Pods.
    pub fn start(
        client: &Arc<Netns>,
        services: &[SocketAddr],
        pods: &[SocketAddr],
    ) -> Result<Self> {
        // Every node has to know the client before any of it counts.
        for &address in services.iter().chain(pods) {
            let target = Target {
                protocol: Protocol::Tcp,
                address,
            };
            eventually(LIMIT, || {
                let outcome = client.enter(|| probe(target, TIMEOUT))?;
                ensure!(outcome.answered(), "{target} before the load: {outcome}");
                Ok(())
            })?;
        }
        let mut load = Self {
            streams: Vec::new(),
            arrivals: Vec::new(),
            pulses: Vec::new(),
        };
        for &to in services {
            for _ in 0..STREAMS {
                load.streams.push(Stream::start(client, to)?);
            }
            load.arrivals
                .push(Arrivals::start(Arc::clone(client), to, RATE));
            load.pulses.push((to, Pulse::start(client, to)?));
        }
        for &to in pods {
            load.streams.push(Stream::start(client, to)?);
            load.pulses.push((to, Pulse::start(client, to)?));
        }
        Ok(load)
    }

    /// Ends it; fails if anything was lost, refused or reset. Datagrams that sockets in `places` had no
    /// room for, because their process got no CPU time for long, are not the network's to lose; without
    /// places every one counts.
    pub fn finish(self, places: &[Arc<Netns>]) -> Result<String> {
        // What was under way.
        thread::sleep(Duration::from_millis(300));
        let mut said = String::new();
        for stream in self.streams {
            let report = stream.stop()?;
            ensure!(report.error.is_none(), "a stream broke: {report:?}");
        }
        for arrivals in self.arrivals {
            let report = arrivals.stop()?;
            ensure!(
                report.failed.is_empty() && report.syns_again == 0 && report.answered > 100,
                "new connections: {report:?}"
            );
            said += &format!("{} connections, ", report.answered);
        }
        let (mut lost, mut losses) = (0, String::new());
        for (to, pulse) in self.pulses {
            let end = Instant::now();
            let beats = pulse.settle()?;
            said += &format!("{} datagrams, ", beats.len());
            let without: Vec<&Beat> = beats.iter().filter(|beat| !beat.answered).collect();
            if let (Some(first), Some(last)) = (without.first(), without.last()) {
                losses += &format!(
                    "{} of {} datagrams to {to}, the first {:?} before the end, the last {:?}\n",
                    without.len(),
                    beats.len(),
                    end.duration_since(first.sent),
                    end.duration_since(last.sent),
                );
            }
            lost += without.len();
        }
        let mut overflown = 0;
        for place in places {
            overflown += place.enter(overflows)??;
        }
        ensure!(
            lost <= overflown,
            "{losses}lost, {overflown} of them for want of room in sockets"
        );
        Ok(format!("{said}{lost} lost, {overflown} for want of room"))
    }
}

/// Datagrams that sockets of this thread's network namespace had no room for (`RcvbufErrors` of RFC 4113's
/// counters, as proc(5) has them).
fn overflows() -> Result<usize> {
    let read = |name: &str| {
        let path = format!("/proc/thread-self/net/{name}");
        fs::read_to_string(&path).with_context(|| format!("read {path}"))
    };
    let found = counted(&read("snmp")?, &read("snmp6")?);
    found.context("the kernel does not count RcvbufErrors")
}

/// The counter in `snmp`, whose names and values are lines, and in `snmp6`, where each has its line.
fn counted(snmp: &str, snmp6: &str) -> Option<usize> {
    let mut rows = snmp.lines().filter_map(|line| line.strip_prefix("Udp: "));
    let (names, values) = (rows.next()?, rows.next()?);
    let mut pairs = names.split_whitespace().zip(values.split_whitespace());
    let (_, v4) = pairs.find(|(name, _)| *name == "RcvbufErrors")?;
    let mut lines = snmp6.lines();
    let v6 = lines.find_map(|line| line.strip_prefix("Udp6RcvbufErrors"))?;
    Some(v4.parse::<usize>().ok()? + v6.trim().parse::<usize>().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_counters_of_both_families_are_found() {
        let snmp = "Tcp: InErrs\nTcp: 9\nUdp: InDatagrams NoPorts RcvbufErrors\nUdp: 7 0 3\nUdpLite: RcvbufErrors\nUdpLite: 8\n";
        let snmp6 = "Udp6InErrors                    \t6\nUdp6RcvbufErrors                \t4\n";
        assert_eq!(counted(snmp, snmp6), Some(7));
        assert_eq!(counted("Udp: InDatagrams\nUdp: 7\n", snmp6), None);
    }
}
