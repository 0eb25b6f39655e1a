//! Metrics in Prometheus' text format 0.0.4. [`FAMILIES`] is the list of them all: names stay what they
//! are, and `docs/OPERATIONS.md` has the same list, which a test compares.
//!
//! ```text
//! Agent, the main task ── Sample: what it knows, and has counted in Measured ──┐
//! Meter, a thread ─────── entries and capacity of the maps ────────────────────┼─> text
//! /proc/self ───────────────────────────────────────────────────────────────────┘
//! ```

mod histogram;

use std::{
    collections::BTreeMap,
    fmt::{Display, Write as _},
    fs,
    time::{Duration, Instant},
};

use hachi_abi::{ABI_VERSION, Counter, Reason};
use hachi_api::{ConntrackStatus, Reply, Request};
use hachi_index::Kind;

use histogram::Histogram;

/// A metric.
pub(crate) struct Family {
    pub(crate) name: &'static str,
    kind: &'static str,
    help: &'static str,
}

const fn family(name: &'static str, kind: &'static str, help: &'static str) -> Family {
    Family { name, kind, help }
}

/// Every metric, in the order in which they are written.
pub(crate) const FAMILIES: [Family; 33] = [
    family(
        "hachi_build_info",
        "gauge",
        "Version and ABI of the agent; always 1.",
    ),
    family("hachi_ready", "gauge", "Whether an ADD can be served."),
    family(
        "hachi_problems",
        "gauge",
        "Problems that hachi status lists.",
    ),
    family(
        "hachi_endpoints",
        "gauge",
        "Interfaces of Pods of this node.",
    ),
    family(
        "hachi_endpoints_closed",
        "gauge",
        "Interfaces that are down because no programs are attached.",
    ),
    family(
        "hachi_endpoints_refused",
        "gauge",
        "Pods that are denied everything because their policies do not fit the maps.",
    ),
    family(
        "hachi_programs_attached",
        "gauge",
        "Places that a program is attached to: interfaces, or the node's cgroups.",
    ),
    family(
        "hachi_policy_revision",
        "gauge",
        "Policy revision in the kernel.",
    ),
    family(
        "hachi_watch_synced",
        "gauge",
        "Whether a kind's first list is complete.",
    ),
    family(
        "hachi_watch_failing",
        "gauge",
        "Whether a kind's watch fails at present.",
    ),
    family(
        "hachi_watch_events_total",
        "counter",
        "Objects and deletions that the API told of.",
    ),
    family(
        "hachi_watch_lists_total",
        "counter",
        "Complete lists of a kind; more than one where a watch had to begin anew.",
    ),
    family(
        "hachi_policy_programming_seconds",
        "histogram",
        "From an event of a policy, a Pod or a namespace to the kernel's maps.",
    ),
    family(
        "hachi_service_programming_seconds",
        "histogram",
        "From an event of a Service or an EndpointSlice to the kernel's maps.",
    ),
    family(
        "hachi_kernel_writes_total",
        "counter",
        "Writes to the kernel's maps, endpoints and configuration.",
    ),
    family(
        "hachi_kernel_failures_total",
        "counter",
        "Changes that the kernel did not take at once.",
    ),
    family(
        "hachi_cni_operations_total",
        "counter",
        "Requests of the plugin, by outcome.",
    ),
    family(
        "hachi_cni_operation_seconds",
        "histogram",
        "Time until the plugin was answered.",
    ),
    family("hachi_map_entries", "gauge", "Entries of a map."),
    family("hachi_map_capacity", "gauge", "Entries of a map at most."),
    family("hachi_packets_total", "counter", "Packets by outcome."),
    family("hachi_bytes_total", "counter", "Bytes by outcome."),
    family("hachi_drops_total", "counter", "Dropped packets by reason."),
    family(
        "hachi_flows",
        "gauge",
        "Tracked flows after the last pass, by protocol.",
    ),
    family(
        "hachi_conntrack_entries",
        "gauge",
        "Entries of tracked flows after the last pass; two a flow.",
    ),
    family(
        "hachi_conntrack_expired_total",
        "counter",
        "Entries of conntrack that were deleted because no packet came.",
    ),
    family(
        "hachi_conntrack_moved_total",
        "counter",
        "Entries of conntrack that were deleted because their backend was removed.",
    ),
    family(
        "hachi_nat_entries",
        "gauge",
        "Entries of translations on uplinks after the last pass; two a flow.",
    ),
    family(
        "hachi_nat_expired_total",
        "counter",
        "Translations on uplinks that were deleted because no packet came.",
    ),
    family(
        "hachi_sockets_closed_total",
        "counter",
        "Connected UDP sockets that were closed because their backend was removed.",
    ),
    family(
        "process_resident_memory_bytes",
        "gauge",
        "Memory of the agent.",
    ),
    family(
        "process_cpu_seconds_total",
        "counter",
        "CPU time of the agent.",
    ),
    family("process_open_fds", "gauge", "Open files of the agent."),
];

/// What the agent counts as it goes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Measured {
    policy: Histogram,
    service: Histogram,
    /// Events that are not in the kernel yet, and whether they are of Services.
    pending: Vec<(Instant, bool)>,
    events: BTreeMap<Kind, u64>,
    lists: BTreeMap<Kind, u64>,
    writes: u64,
    failures: u64,
    /// By operation.
    cni: BTreeMap<&'static str, Histogram>,
    /// By operation and outcome.
    outcomes: BTreeMap<(&'static str, &'static str), u64>,
}

/// Events that wait for the kernel; what comes beyond is not timed.
const PENDING: usize = 65_536;

impl Measured {
    /// The API told of an object; it is timed if the agent was synced.
    pub(crate) fn event(&mut self, kind: Kind, at: Instant, timed: bool) {
        *self.events.entry(kind).or_default() += 1;
        let of_services = match kind {
            Kind::Service | Kind::EndpointSlice => true,
            Kind::Node => return,
            Kind::Pod
            | Kind::Namespace
            | Kind::NetworkPolicy
            | Kind::ClusterNetworkPolicy
            | Kind::AdminNetworkPolicy
            | Kind::BaselineAdminNetworkPolicy => false,
        };
        if timed && self.pending.len() < PENDING {
            self.pending.push((at, of_services));
        }
    }

    /// A list of a kind is complete.
    pub(crate) fn listed(&mut self, kind: Kind) {
        *self.lists.entry(kind).or_default() += 1;
    }

    /// The kernel has all of it.
    pub(crate) fn written(&mut self, writes: usize) {
        self.writes += writes as u64;
        for (at, of_services) in self.pending.drain(..) {
            let histogram = match of_services {
                true => &mut self.service,
                false => &mut self.policy,
            };
            histogram.observe(at.elapsed());
        }
    }

    /// The kernel did not take a change.
    pub(crate) fn failed(&mut self) {
        self.failures += 1;
    }

    /// A request was answered; those of the command line do not count.
    pub(crate) fn answered(
        &mut self,
        operation: Option<&'static str>,
        took: Duration,
        reply: &Reply,
    ) {
        let Some(operation) = operation else { return };
        let outcome = match reply {
            Reply::Error { .. } => "error",
            _ => "ok",
        };
        self.cni.entry(operation).or_default().observe(took);
        *self.outcomes.entry((operation, outcome)).or_default() += 1;
    }
}

/// What the plugin calls a request; `None` if it is the command line's.
pub(crate) fn operation(request: &Request) -> Option<&'static str> {
    match request {
        Request::AddEndpoint { .. } => Some("add"),
        Request::DeleteEndpoint { .. } => Some("del"),
        Request::CheckEndpoint { .. } => Some("check"),
        Request::Gc { .. } => Some("gc"),
        Request::Pool => Some("pool"),
        Request::Pod { .. } => Some("pod"),
        Request::Status
        | Request::TracePolicy { .. }
        | Request::PodPolicies { .. }
        | Request::Get { .. } => None,
    }
}

/// What the main task knows.
#[derive(Debug)]
pub(crate) struct Sample {
    pub(crate) ready: bool,
    pub(crate) problems: usize,
    pub(crate) endpoints: usize,
    pub(crate) closed: usize,
    pub(crate) refused: usize,
    pub(crate) revision: u32,
    /// Kinds, whether they are synced, and whether their watch fails.
    pub(crate) watches: Vec<(Kind, bool, bool)>,
    pub(crate) counters: Vec<(Reason, Counter)>,
    pub(crate) conntrack: ConntrackStatus,
    pub(crate) measured: Measured,
}

/// Entries and capacity by map.
pub(crate) type Maps = BTreeMap<String, (u32, u32)>;

/// Places that each program is attached to.
pub(crate) type Programs = BTreeMap<&'static str, usize>;

/// Everything as text.
pub(crate) fn text(sample: &Sample, maps: &Maps, programs: &Programs) -> String {
    let mut out = String::new();
    for Family { name, kind, help } in &FAMILIES {
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
        write(name, sample, maps, programs, &mut out);
    }
    out
}

fn write(name: &str, sample: &Sample, maps: &Maps, programs: &Programs, out: &mut String) {
    let Sample {
        ready,
        problems,
        endpoints,
        closed,
        refused,
        revision,
        watches,
        counters,
        conntrack,
        measured,
    } = sample;
    let mut line = |labels: &[(&str, &dyn Display)], value: &dyn Display| {
        let labels: Vec<String> = (labels.iter())
            .map(|(label, value)| format!("{label}=\"{value}\""))
            .collect();
        let _ = match labels.is_empty() {
            true => writeln!(out, "{name} {value}"),
            false => writeln!(out, "{name}{{{}}} {value}", labels.join(",")),
        };
    };
    let verdict = |reason: &Reason| match reason.is_drop() {
        true => "dropped",
        false => "forwarded",
    };
    match name {
        "hachi_build_info" => {
            let version: &dyn Display = &env!("CARGO_PKG_VERSION");
            line(&[("version", version), ("abi", &ABI_VERSION)], &1);
        }
        "hachi_ready" => line(&[], &u8::from(*ready)),
        "hachi_problems" => line(&[], problems),
        "hachi_endpoints" => line(&[], endpoints),
        "hachi_endpoints_closed" => line(&[], closed),
        "hachi_endpoints_refused" => line(&[], refused),
        "hachi_programs_attached" => {
            (programs.iter()).for_each(|(hook, places)| line(&[("hook", hook)], places));
        }
        "hachi_policy_revision" => line(&[], revision),
        "hachi_watch_synced" => {
            (watches.iter())
                .for_each(|(kind, synced, _)| line(&[("kind", kind)], &u8::from(*synced)));
        }
        "hachi_watch_failing" => {
            (watches.iter())
                .for_each(|(kind, _, failing)| line(&[("kind", kind)], &u8::from(*failing)));
        }
        "hachi_watch_events_total" => {
            for (kind, ..) in watches {
                let events = measured.events.get(kind).copied();
                line(&[("kind", kind)], &events.unwrap_or_default());
            }
        }
        "hachi_watch_lists_total" => {
            for (kind, ..) in watches {
                let lists = measured.lists.get(kind).copied();
                line(&[("kind", kind)], &lists.unwrap_or_default());
            }
        }
        "hachi_policy_programming_seconds" => measured.policy.write(name, "", out),
        "hachi_service_programming_seconds" => measured.service.write(name, "", out),
        "hachi_kernel_writes_total" => line(&[], &measured.writes),
        "hachi_kernel_failures_total" => line(&[], &measured.failures),
        "hachi_cni_operations_total" => {
            for ((operation, outcome), count) in &measured.outcomes {
                line(&[("operation", operation), ("outcome", outcome)], count);
            }
        }
        "hachi_cni_operation_seconds" => {
            for (operation, histogram) in &measured.cni {
                histogram.write(name, &format!("operation=\"{operation}\","), out);
            }
        }
        "hachi_map_entries" => {
            (maps.iter()).for_each(|(map, (entries, _))| line(&[("map", map)], entries));
        }
        "hachi_map_capacity" => {
            (maps.iter()).for_each(|(map, (_, capacity))| line(&[("map", map)], capacity));
        }
        "hachi_packets_total" => {
            for (reason, counter) in counters {
                let labels: [(&str, &dyn Display); 2] =
                    [("reason", &reason.name()), ("verdict", &verdict(reason))];
                line(&labels, &counter.packets);
            }
        }
        "hachi_bytes_total" => {
            for (reason, counter) in counters {
                let labels: [(&str, &dyn Display); 2] =
                    [("reason", &reason.name()), ("verdict", &verdict(reason))];
                line(&labels, &counter.bytes);
            }
        }
        "hachi_drops_total" => {
            for (reason, counter) in counters.iter().filter(|(reason, _)| reason.is_drop()) {
                line(&[("reason", &reason.name())], &counter.packets);
            }
        }
        "hachi_flows" => {
            for (protocol, flows) in &conntrack.flows {
                line(&[("protocol", protocol)], flows);
            }
        }
        "hachi_conntrack_entries" => {
            line(&[], &conntrack.entries);
        }
        "hachi_conntrack_expired_total" => line(&[], &conntrack.expired),
        "hachi_conntrack_moved_total" => line(&[], &conntrack.moved),
        "hachi_nat_entries" => line(&[], &conntrack.translations),
        "hachi_nat_expired_total" => line(&[], &conntrack.translations_expired),
        "hachi_sockets_closed_total" => line(&[], &conntrack.sockets_closed),
        "process_resident_memory_bytes" => {
            resident().iter().for_each(|bytes| line(&[], bytes));
        }
        "process_cpu_seconds_total" => cpu().iter().for_each(|seconds| line(&[], seconds)),
        "process_open_fds" => {
            let open = fs::read_dir("/proc/self/fd").map(Iterator::count);
            open.iter().for_each(|count| line(&[], count));
        }
        _ => {}
    }
}

/// The resident memory in bytes.
fn resident() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
    let kilobytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kilobytes * 1024)
}

/// The CPU time in seconds; `/proc` counts in hundredths (`proc_pid_stat(5)`, `USER_HZ`).
fn cpu() -> Option<f64> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    // The name of the process, in parentheses, may have spaces.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let mut ticks = || fields.next()?.parse::<u32>().ok();
    Some((f64::from(ticks()?) + f64::from(ticks()?)) / 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Sample {
        let mut measured = Measured::default();
        measured.event(Kind::Pod, Instant::now(), true);
        measured.event(Kind::Service, Instant::now(), true);
        measured.event(Kind::Service, Instant::now(), false);
        measured.listed(Kind::Service);
        measured.written(7);
        measured.answered(Some("add"), Duration::from_millis(3), &Reply::Done);
        measured.answered(None, Duration::from_millis(3), &Reply::Done);
        let counter = Counter {
            packets: 3,
            bytes: 180,
        };
        Sample {
            ready: true,
            problems: 0,
            endpoints: 2,
            closed: 0,
            refused: 0,
            revision: 9,
            watches: vec![(Kind::Pod, true, false), (Kind::Service, true, true)],
            counters: vec![(Reason::PolicyIngress, counter)],
            conntrack: ConntrackStatus {
                flows: BTreeMap::from([("udp".to_owned(), 4)]),
                ..ConntrackStatus::default()
            },
            measured,
        }
    }

    #[test]
    fn every_family_has_a_sample() {
        let maps = Maps::from([("POLICY".to_owned(), (5, 100))]);
        let programs = Programs::from([("from_pod", 2), ("xdp_net", 0)]);
        let text = text(&sample(), &maps, &programs);
        for Family { name, kind, .. } in &FAMILIES {
            assert!(text.contains(&format!("# TYPE {name} {kind}\n")), "{name}");
            let of = |line: &&str| line.starts_with(name) && !line.starts_with('#');
            assert!(
                text.lines().any(|line| of(&line)),
                "{name} has none\n{text}"
            );
        }
        for line in [
            "hachi_policy_programming_seconds_count 1",
            "hachi_service_programming_seconds_count 1",
            "hachi_watch_events_total{kind=\"Service\"} 2",
            "hachi_watch_failing{kind=\"Service\"} 1",
            "hachi_cni_operations_total{operation=\"add\",outcome=\"ok\"} 1",
            "hachi_cni_operation_seconds_count{operation=\"add\"} 1",
            "hachi_packets_total{reason=\"policy_ingress\",verdict=\"dropped\"} 3",
            "hachi_drops_total{reason=\"policy_ingress\"} 3",
            "hachi_programs_attached{hook=\"from_pod\"} 2",
            "hachi_watch_lists_total{kind=\"Service\"} 1",
            "hachi_watch_lists_total{kind=\"Pod\"} 0",
            "hachi_flows{protocol=\"udp\"} 4",
            "hachi_map_entries{map=\"POLICY\"} 5",
            "hachi_map_capacity{map=\"POLICY\"} 100",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
    }

    #[test]
    fn the_documented_list_is_what_is_exported() {
        let document = include_str!("../../../../docs/OPERATIONS.md");
        let (_, section) = document.split_once("\n## Metrics\n").expect("a section");
        let section = section.split("\n## ").next().unwrap_or_default();
        let documented: Vec<&str> = (section.lines())
            .filter_map(|line| line.strip_prefix("| `")?.split(['`', '{']).next())
            .collect();
        let exported: Vec<&str> = FAMILIES.iter().map(|family| family.name).collect();
        assert_eq!(documented, exported);
    }

    #[test]
    fn the_dashboard_asks_for_what_there_is() {
        let dashboard = include_str!("../../../../manifests/overlays/metrics/hachi.json");
        let dashboard: serde_json::Value = serde_json::from_str(dashboard).expect("JSON");
        let mut asked = 0;
        for panel in dashboard["panels"].as_array().expect("panels") {
            for target in panel["targets"].as_array().expect("targets") {
                let expression = target["expr"].as_str().expect("an expression");
                let names = expression
                    .split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))
                    .filter(|word| word.starts_with("hachi_") || word.starts_with("process_"));
                for name in names {
                    let known = FAMILIES.iter().any(|family| match family.kind {
                        "histogram" => name == format!("{}_bucket", family.name),
                        _ => name == family.name,
                    });
                    assert!(known, "{name} in {expression}");
                    asked += 1;
                }
            }
        }
        assert!(asked > 20, "{asked} names are too few");
    }
}
