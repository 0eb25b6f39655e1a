//! What a policy costs in the kernel: from an event of the API to the first packet that is judged
//! anew, the maps, and nanoseconds a packet by the number of rules.
//!
//! ```text
//! JSON of the watch ─> Object ─> Index ─> Desired ─> Image ─> diff ─> maps ─> BPF_PROG_TEST_RUN
//! └──────────────────────────── one event ──────────────────────────────────────────────────┘
//! ```
//! The same calls as in the agent, on the thread that measures; without the API server's own time. The
//! packet belongs to an established connection, so that it is the one that a new policy has to stop.
//!
//! Prints one JSON object a line: `what`, and numbers by name.
//! Usage, as root: `policy_bench events PODS POLICIES ROUNDS | start PODS POLICIES SERVICES | packets`

#[path = "../tests/support/mod.rs"]
#[expect(
    dead_code,
    unused_macros,
    unused_imports,
    reason = "shared with the packet tests"
)]
mod support;

#[path = "../tests/packet/wire.rs"]
#[expect(dead_code, reason = "shared with the packet tests")]
mod wire;

#[path = "../../compile/examples/cluster/mod.rs"]
#[expect(dead_code, reason = "shared with the compiler's measurements")]
mod cluster;

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use hachi_abi::{Endpoint, Peer, PolicyEntry, PolicyKey, map};
use hachi_compile::{Compiler, Image, Limits, Op, diff};
use hachi_index::{Index, Object};
use hachi_kernel::{Capacities, Datapath, Hook, LoadOptions};
use serde_json::{Value, json};

use cluster::{APPS, NODES, Size, app_of};
use support::{World, isolated};
use wire::{ACK, Body, Packet, SYN};

/// The Pod that policies protect, and the one that wants to reach it; both of this node and of one
/// namespace.
const SERVER: usize = 0;
const CLIENT: usize = NODES;
/// A Pod of another node in that namespace.
const FAR: usize = 1;
/// A port that no other policy allows.
const PORT: u16 = 9_999;

/// Runs in one call.
const REPEAT: u32 = 200_000;
/// Calls for one row of single runs.
const SINGLES: u16 = 20_000;
/// Repetitions of which the median counts.
const TURNS: usize = 7;

fn main() {
    if !hachi_testutil::is_root() || !hachi_kernel::built_with_object() {
        eprintln!("needs root and the eBPF object (cargo xtask build)");
        std::process::exit(1);
    }
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize| args.get(at).and_then(|text| text.parse().ok()).unwrap_or(0);
    isolated(|world| match args.first().map(String::as_str) {
        Some("events") => events(world, number(1), number(2), number(3)),
        Some("start") => start(world, number(1), number(2), number(3)),
        _ => packets(world),
    });
}

fn print(what: &str, numbers: &[(&str, f64)]) {
    let mut line = json!({"what": what});
    for (name, value) in numbers {
        line[*name] = json!(value);
    }
    println!("{line}");
}

/// A node with its maps.
struct Node {
    index: Index,
    compiler: Compiler,
    image: Image,
    datapath: Datapath,
    /// The host's side of the interfaces of both Pods.
    interfaces: [u32; 2],
}

impl Node {
    fn new(world: &World) -> Self {
        let options = LoadOptions {
            capacities: Capacities::default(),
            ..world.options()
        };
        Self {
            index: Index::new("n0"),
            compiler: Compiler::default(),
            image: Image::default(),
            datapath: Datapath::load(&options).expect("the datapath loads"),
            interfaces: ["server", "client"].map(|name| world.veth(name)),
        }
    }

    /// Takes in an event as the watch does.
    fn event(&mut self, bytes: &[u8]) {
        let value: Value = serde_json::from_slice(bytes).expect("JSON");
        let object = match value["kind"].as_str() {
            Some("Pod") => Object::Pod(serde_json::from_slice(bytes).expect("a Pod")),
            _ => cluster::object(value),
        };
        self.index.apply(object);
    }

    /// Takes in this node's interfaces.
    fn attach(&mut self, size: Size) {
        for (at, mut endpoint) in size.endpoints().enumerate() {
            if let Some(ifindex) = self.interfaces.get(at) {
                endpoint.ifindex = *ifindex;
            }
            self.index.add_endpoint(endpoint);
        }
    }

    /// Brings the kernel's maps up to date, as the agent does; returns the writes.
    fn sync(&mut self) -> usize {
        let half = |name| self.datapath.capacity(name).expect("a map") as usize / 2;
        let limits = Limits {
            policy: half(map::POLICY),
            peers: half(map::PEERS[0]),
            cidrs: half(map::CIDRS[0]),
        };
        let compiled = self.compiler.compile_within(self.index.desired(), &limits);
        assert!(compiled.problems.is_empty(), "{:?}", compiled.problems);
        let mut ops = diff(&self.image, &compiled.image);
        if self.datapath.revision().expect("a revision") == 0 {
            ops.push(Op::RaiseRevision);
        }
        self.datapath.apply(&ops).expect("the writes");
        self.image = compiled.image;
        ops.len()
    }

    /// Whether the server gets this packet.
    fn passes(&self, packet: &Packet, hook: Hook) -> bool {
        const SHOT: i32 = 2;
        let interface = match hook {
            Hook::ToPod => self.interfaces[0],
            _ => self.interfaces[1],
        };
        let run = self.datapath.test_run(hook, interface, &packet.bytes(), 1);
        run.expect("the program runs").verdict != SHOT
    }
}

fn ip(pod: usize) -> IpAddr {
    cluster::address(pod).parse().expect("an address")
}

fn packet(from: usize, port: u16, flags: u8) -> Packet {
    Packet {
        source_mac: [2; 6],
        destination_mac: [2; 6],
        source: ip(from),
        destination: ip(SERVER),
        body: Body::Tcp {
            ports: (port, PORT),
            flags,
            data: Vec::new(),
        },
    }
}

/// A policy on the server that lets an application in on its port.
fn gate(name: &str, app: &str) -> Value {
    json!({"kind": "NetworkPolicy", "metadata": {"namespace": "ns0", "name": name},
        "spec": {"podSelector": {"matchLabels": {"app": format!("app{}", app_of(SERVER))}},
                 "policyTypes": ["Ingress"],
                 "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": app}}}],
                              "ports": [{"port": PORT}]}]}})
}

/// A policy that lets Pods out.
fn open(name: &str, app: &str) -> Value {
    json!({"kind": "NetworkPolicy", "metadata": {"namespace": "ns0", "name": name},
        "spec": {"podSelector": {"matchLabels": {"app": app}}, "policyTypes": ["Egress"],
                 "egress": [{}]}})
}

/// A Pod whose application no policy of the cluster names, unless asked.
fn pod(n: usize, app: &str) -> Value {
    let mut pod = cluster::pod(n, 1);
    pod["metadata"]["labels"]["app"] = json!(app);
    pod["metadata"]["labels"]["tier"] = json!("middle");
    pod
}

fn push(list: &mut Value, item: Value) {
    list.as_array_mut().expect("a list").push(item);
}

/// Events of each kind that open and close the way to the server in turn.
fn events(world: &World, pods: usize, policies: usize, rounds: usize) {
    let size = Size {
        pods: pods.max(4 * NODES),
        policies,
        services: 0,
    };
    let mut node = Node::new(world);
    for value in size.objects() {
        node.index.apply(cluster::object(value));
    }
    node.attach(size);
    for value in [
        pod(CLIENT, "friend"),
        pod(FAR, "friend"),
        gate("gate", "friend"),
        open("open", "friend"),
        open("open-too", "stranger"),
    ] {
        node.index.apply(cluster::object(value));
    }
    node.sync();
    let opener = |from, hook| (packet(from, 40_000, SYN), packet(from, 40_000, ACK), hook);
    let near = opener(CLIENT, Hook::FromPod);
    let far = opener(FAR, Hook::ToPod);
    for (syn, ack, hook) in [&near, &far] {
        assert!(node.passes(syn, *hook), "{hook}: the way is open at first");
        assert!(node.passes(ack, *hook), "{hook}: and the flow established");
    }

    let app = |open: bool| if open { "friend" } else { "stranger" };
    measure(
        &mut node,
        "a policy changes",
        rounds,
        &near,
        |round, open| {
            // What it says otherwise is new each time.
            let mut policy = gate("gate", app(open));
            let more = json!({"from": [{"podSelector": {}}], "ports": [{"port": 10_000 + round}]});
            push(&mut policy["spec"]["ingress"], more);
            policy
        },
    );
    measure(
        &mut node,
        "a label of a Pod here changes",
        rounds,
        &near,
        |_, open| pod(CLIENT, app(open)),
    );
    measure(
        &mut node,
        "a label of a Pod elsewhere changes",
        rounds,
        &far,
        |_, open| pod(FAR, app(open)),
    );
    measure(
        &mut node,
        "a policy asks for other labels",
        rounds,
        &near,
        |round, open| {
            let mut policy = gate("gate", app(open));
            let peer =
                json!({"podSelector": {"matchLabels": {"app": format!("app{}", round % APPS)}}});
            push(&mut policy["spec"]["ingress"][0]["from"], peer);
            policy
        },
    );

    let use_of = node.datapath.map_use().expect("the maps' use");
    let entries = |names: &[&str]| -> f64 {
        let all = names.iter().filter_map(|name| use_of.get(*name));
        all.map(|(entries, _)| f64::from(*entries)).sum()
    };
    let address = size_of::<u32>();
    for (name, entries, bytes) in [
        (
            "POLICY",
            entries(&[map::POLICY]),
            size_of::<(PolicyKey, PolicyEntry)>(),
        ),
        ("PEERS", entries(&map::PEERS), address + size_of::<Peer>()),
        (
            "CIDRS",
            entries(&map::CIDRS),
            2 * address + size_of::<Peer>(),
        ),
        (
            "ENDPOINTS",
            entries(&map::ENDPOINTS),
            address + size_of::<Endpoint>(),
        ),
    ] {
        let bytes = entries * bytes as f64;
        print(name, &[("entries", entries), ("bytes", bytes)]);
    }
}

/// Applies events that close and open the way in turn, and times each until its packet has the new
/// verdict.
fn measure(
    node: &mut Node,
    what: &str,
    rounds: usize,
    (syn, ack, hook): &(Packet, Packet, Hook),
    event: impl Fn(usize, bool) -> Value,
) {
    let mut times = Vec::new();
    let mut writes = 0;
    for round in 0..rounds {
        let open = !round.is_multiple_of(2);
        let bytes = event(round, open).to_string().into_bytes();
        let start = Instant::now();
        node.event(&bytes);
        writes += node.sync();
        let passed = node.passes(ack, *hook);
        times.push(start.elapsed());
        assert_eq!(passed, open, "{what}, round {round}");
        if open {
            // What was cut is opened again, as its client would.
            assert!(node.passes(syn, *hook), "{what}, round {round}");
            assert!(node.passes(ack, *hook), "{what}, round {round}");
        }
    }
    // The way is left open.
    node.event(&event(1, true).to_string().into_bytes());
    node.sync();
    assert!(node.passes(syn, *hook) && node.passes(ack, *hook), "{what}");
    times.sort_unstable();
    let percentile =
        |percent: usize| milliseconds(times[(times.len() * percent).div_ceil(100) - 1]);
    print(
        what,
        &[
            ("p50", percentile(50)),
            ("p99", percentile(99)),
            ("writes", writes as f64 / rounds as f64),
        ],
    );
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// From lists that have arrived to maps that are written; and what stays in memory.
fn start(world: &World, pods: usize, policies: usize, services: usize) {
    let size = Size {
        pods,
        policies,
        services,
    };
    let mut node = Node::new(world);
    let before = resident();
    let mut took = Duration::ZERO;
    for value in size.objects() {
        let object = cluster::object(value);
        let start = Instant::now();
        node.index.apply(object);
        took += start.elapsed();
    }
    node.attach(size);
    let start = Instant::now();
    let writes = node.sync();
    let synced = start.elapsed();
    print(
        "start",
        &[
            ("index", milliseconds(took)),
            ("kernel", milliseconds(synced)),
            ("writes", writes as f64),
            ("kB", resident() - before),
        ],
    );
}

/// The memory of this process in kilobytes.
fn resident() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let kilobytes = line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok());
    kilobytes.unwrap_or(f64::NAN)
}

/// Nanoseconds a packet to a Pod whose policy has so many rules, of which the last one matches.
fn packets(world: &World) {
    let size = Size {
        pods: 4 * NODES,
        policies: 0,
        services: 0,
    };
    let mut node = Node::new(world);
    for value in size.objects() {
        node.index.apply(cluster::object(value));
    }
    node.attach(size);
    node.event(&pod(CLIENT, "friend").to_string().into_bytes());
    for rules in [0, 10, 1_000] {
        if rules > 0 {
            let mut policy = gate("gate", "friend");
            let last = policy["spec"]["ingress"][0].take();
            let others = (1..rules).map(|n| {
                let block = format!("172.16.{}.{}/32", n / 256, n % 256);
                json!({"from": [{"ipBlock": {"cidr": block}}], "ports": [{"port": 1_000 + n}]})
            });
            policy["spec"]["ingress"] = others.chain([last]).collect();
            node.event(&policy.to_string().into_bytes());
        }
        node.sync();
        let run = |packet: &[u8], repeat| {
            let run = node
                .datapath
                .test_run(Hook::FromPod, node.interfaces[1], packet, repeat);
            run.expect("the program runs").duration.as_nanos() as f64
        };
        let syn = |port| packet(CLIENT, port, SYN);
        assert!(node.passes(&syn(40_000), Hook::FromPod), "{rules} rules");
        let there = packet(CLIENT, 40_000, ACK).bytes();
        let established = median((0..TURNS).map(|_| run(&there, REPEAT)).collect());
        let new = (0..SINGLES).map(|n| run(&syn(1_024 + n).bytes(), 1));
        // What a call alone measures of a packet that is let go at once.
        let mut arp = there.clone();
        arp[12..14].copy_from_slice(&[0x08, 0x06]);
        let floor = median((0..SINGLES).map(|_| run(&arp, 1)).collect());
        print(
            "packets",
            &[
                ("rules", f64::from(rules)),
                ("established", established),
                ("new", median(new.collect())),
                ("floor", floor),
            ],
        );
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
