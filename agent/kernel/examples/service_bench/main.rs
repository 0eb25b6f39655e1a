//! What Services cost: to load, to change, to look up, and to the connections that go through them.
//!
//! ```text
//! JSON of the watch ─> Object ─> Index ─> Desired ─> Image ─> diff ─> maps      load, events
//!                                          BPF_PROG_TEST_RUN on those maps      lookups
//! client in a namespace ── veth ── node ── veth ── server in a namespace        traffic
//! ```
//! The same calls as in the agent, on the thread that measures; without the API server's own time.
//!
//! Prints one JSON object a line: `what`, and numbers by name.
//! Usage, as root: `service_bench load SERVICES | events SERVICES ROUNDS | lookups SERVICES |
//! traffic REPETITIONS SEED SERVICES...`

#[path = "../../tests/support/mod.rs"]
#[expect(
    dead_code,
    unused_macros,
    unused_imports,
    reason = "shared with the packet tests"
)]
mod support;

#[path = "../../tests/packet/wire.rs"]
#[expect(dead_code, reason = "shared with the packet tests")]
mod wire;

#[path = "../../../compile/examples/cluster/mod.rs"]
#[expect(dead_code, reason = "shared with the compiler's measurements")]
mod cluster;

mod lanes;
mod node;
mod rules;
mod traffic;

use std::time::{Duration, Instant};

use hachi_kernel::Hook;
use serde_json::{Value, json};

use node::{Node, SERVICE, TARGET};
use support::{World, isolated};
use wire::{Body, Packet, SYN};

/// Calls for one number of lookups.
const SINGLES: u16 = 20_000;

fn main() {
    if !hachi_testutil::is_root() || !hachi_kernel::built_with_object() {
        eprintln!("needs root and the eBPF object (cargo xtask build)");
        std::process::exit(1);
    }
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize| args.get(at).and_then(|text| text.parse().ok()).unwrap_or(0);
    match args.first().map(String::as_str) {
        Some("load") => isolated(|world| load(world, number(1))),
        Some("events") => isolated(|world| events(world, number(1), number(2))),
        Some("lookups") => lookups(number(1)),
        Some("traffic") => {
            let services: Vec<usize> = (3..args.len()).map(number).collect();
            traffic::run(number(1), number(2) as u64, &services);
        }
        _ => {
            eprintln!("say load, events, lookups or traffic");
            std::process::exit(2);
        }
    }
}

fn print(what: &str, numbers: &[(&str, f64)]) {
    let mut line = json!({"what": what});
    for (name, value) in numbers {
        line[*name] = json!(value);
    }
    println!("{line}");
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn percentile(times: &mut [Duration], percent: usize) -> f64 {
    times.sort_unstable();
    milliseconds(times[(times.len() * percent).div_ceil(100) - 1])
}

/// From lists that have arrived to maps that are written; and what stays in memory.
fn load(world: &World, services: usize) {
    let mut node = Node::new(world);
    let before = resident();
    let took = node.fill(services);
    let start = Instant::now();
    let writes = node.sync();
    let synced = start.elapsed();
    print(
        "load",
        &[
            ("services", services as f64),
            ("index", milliseconds(took)),
            ("kernel", milliseconds(synced)),
            ("writes", writes as f64),
            ("kB", resident() - before),
            ("maps kB", maps_kilobytes()),
        ],
    );
}

/// Endpoints and Services that come and go, one at a time: from the event's JSON to the last write.
fn events(world: &World, services: usize, rounds: usize) {
    let mut node = Node::new(world);
    node.fill(services);
    node.sync();
    let slice = move |round: usize, ready| {
        let [_, slice] = cluster::service(round * 7 % services, node::PODS, ready);
        slice
    };
    type Event<'a> = (&'a str, Box<dyn Fn(usize) -> Value + 'a>);
    let all: [Event<'_>; 3] = [
        (
            "an endpoint goes",
            Box::new(move |round| slice(round, false)),
        ),
        (
            "an endpoint comes",
            Box::new(move |round| slice(round, true)),
        ),
        (
            "a Service changes its port",
            Box::new(move |round| {
                let [mut service, _] = cluster::service(round * 7 % services, node::PODS, true);
                service["spec"]["ports"][0]["port"] = json!(1_000 + round);
                service
            }),
        ),
    ];
    for (what, event) in all {
        let (mut times, mut writes) = (Vec::new(), 0);
        for round in 0..rounds {
            let bytes = event(round).to_string().into_bytes();
            let start = Instant::now();
            node.event(&bytes);
            writes += node.sync();
            times.push(start.elapsed());
        }
        print(
            what,
            &[
                ("services", services as f64),
                ("p50", percentile(&mut times, 50)),
                ("p99", percentile(&mut times, 99)),
                ("writes", writes as f64 / rounds as f64),
            ],
        );
    }
}

/// Nanoseconds for the first packet of a connection through a Service, among ten and among many: in
/// turns, so that what else the machine does counts for both.
fn lookups(services: usize) {
    isolated(|few| {
        isolated_too(few, services);
    });
}

fn isolated_too(few: &World, services: usize) {
    let mut ten = Node::new(few);
    ten.fill(10);
    ten.sync();
    // A second datapath in the same namespaces, with pins of its own.
    let other = World {
        pin_root: few.pin_root.with_file_name("many"),
        ..few.clone()
    };
    let mut many = Node::named(&other, ["server2", "client2"]);
    many.fill(services);
    many.sync();
    let mut times = [Vec::new(), Vec::new()];
    for turn in 0..SINGLES {
        for (node, times) in [&ten, &many].into_iter().zip(&mut times) {
            let packet = opener(1_024 + turn);
            let run = node
                .datapath
                .test_run(Hook::FromPod, node.interfaces[1], &packet, 1);
            times.push(run.expect("the program runs").duration.as_nanos() as f64);
        }
    }
    let [ten, many] = times.map(|mut values| {
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    });
    print(
        "lookups",
        &[
            ("services", services as f64),
            ("ten", ten),
            ("many", many),
            ("ratio", many / ten),
        ],
    );
}

fn opener(port: u16) -> Vec<u8> {
    Packet {
        source_mac: [2; 6],
        destination_mac: [2; 6],
        source: node::CLIENT_IP.into(),
        destination: SERVICE.into(),
        body: Body::Tcp {
            ports: (port, TARGET),
            flags: SYN,
            data: Vec::new(),
        },
    }
    .bytes()
}

/// The memory of the maps that this process holds, in kilobytes, as the kernel accounts for them.
fn maps_kilobytes() -> f64 {
    let mut maps = std::collections::BTreeMap::new();
    for entry in std::fs::read_dir("/proc/self/fdinfo")
        .expect("fdinfo")
        .flatten()
    {
        let text = std::fs::read_to_string(entry.path()).unwrap_or_default();
        let field = |name: &str| -> Option<u64> {
            let line = text.lines().find_map(|line| line.strip_prefix(name))?;
            line.trim().parse().ok()
        };
        if let (Some(id), Some(bytes)) = (field("map_id:"), field("memlock:")) {
            maps.insert(id, bytes);
        }
    }
    maps.values().sum::<u64>() as f64 / 1024.0
}

/// The memory of this process in kilobytes.
fn resident() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let kilobytes = line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok());
    kilobytes.unwrap_or(f64::NAN)
}
