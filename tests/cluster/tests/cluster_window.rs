//! No window: Pods start under a policy that denies everything, while everybody sends as fast as
//! they can and the agents are killed. Not one packet may pass, in either direction.
//!
//! ```text
//!  in the Pod's namespace, from its first moment    outside, once an address is known
//!    UDP and raw frames to every sink                 UDP to that address, from a Pod of its node,
//!    a socket that counts what comes                  a Pod of the other node and the other node
//! ```
//! (The Pod's own node is left out: it may always reach its Pods.)

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::Write as _,
    net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket},
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    path::Path,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::{self, Scope},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, ensure};
use hachi_cluster::{
    Family, Netns,
    bed::{self, Bed, Spec},
    eventually,
    workload::wire::Wire,
};
use nix::{
    ifaddrs::getifaddrs,
    net::if_::{InterfaceFlags, if_nametoindex},
    sched::{CloneFlags, setns},
};

const STARTS: usize = 200;
const BATCH: usize = 20;
/// How long a sender goes on as fast as it can, and after its interface is up.
const AFTER: Duration = Duration::from_millis(25);
/// Where senders send to, and receivers listen.
const PORT: u16 = 4444;
const NAMESPACES: &str = "/run/netns";
/// No sender goes on for longer, whatever happens.
const LIMIT: Duration = Duration::from_secs(240);

const DENY: &str = "---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: deny, namespace: $a}
spec: {podSelector: {}, policyTypes: [Ingress, Egress]}
";

/// What all threads share.
#[derive(Default)]
struct Watch {
    done: AtomicBool,
    /// Namespaces that a thread has entered.
    namespaces: AtomicU64,
    /// Interfaces that came up under a sender's eyes.
    came_up: AtomicU64,
    sent_out: AtomicU64,
    sent_in: AtomicU64,
    /// What passed; it says from where to where.
    passed: Mutex<Vec<String>>,
    /// Addresses that Pods have, as their namespaces show them.
    coming: Mutex<BTreeSet<IpAddr>>,
}

impl Watch {
    fn goes_on(&self, start: Instant) -> bool {
        !self.done.load(Relaxed) && start.elapsed() < LIMIT
    }

    fn passed(&self, what: String) {
        self.passed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(what);
    }

    fn announce(&self, own: &BTreeSet<IpAddr>) {
        let mut coming = self.coming.lock().unwrap_or_else(PoisonError::into_inner);
        coming.extend(own);
    }

    fn withdraw(&self, own: &BTreeSet<IpAddr>) {
        let mut coming = self.coming.lock().unwrap_or_else(PoisonError::into_inner);
        coming.retain(|ip| !own.contains(ip));
    }

    fn coming(&self) -> BTreeSet<IpAddr> {
        self.coming
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

fn socket(port: u16) -> Result<UdpSocket> {
    let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port)).context("open a socket")?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// An address as a socket of both families takes it.
fn mapped(ip: IpAddr) -> SocketAddr {
    let ip = match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    };
    (ip, PORT).into()
}

/// Notes everything that has come to a socket from one of the senders at the other side.
fn receive(socket: &UdpSocket, here: &str, other: &str, watch: &Watch) {
    let mut buffer = [0; 256];
    while let Ok((length, from)) = socket.recv_from(&mut buffer) {
        let text = String::from_utf8_lossy(&buffer[..length]);
        if text.starts_with(other) {
            watch.passed(format!("{text} from {from} to {here}"));
        }
    }
}

/// What a Pod's namespace has of its interface.
#[derive(Default)]
struct Interface {
    /// Both sides are up.
    running: bool,
    addresses: BTreeSet<IpAddr>,
}

impl Interface {
    fn look() -> Result<Self> {
        let mut found = Self::default();
        for entry in getifaddrs().context("list addresses")? {
            if entry.interface_name != "eth0" {
                continue;
            }
            found.running |= entry.flags.contains(InterfaceFlags::IFF_RUNNING);
            let Some(address) = entry.address else {
                continue;
            };
            match (address.as_sockaddr_in(), address.as_sockaddr_in6()) {
                (Some(v4), _) => found.addresses.insert(v4.ip().into()),
                (_, Some(v6)) if !v6.ip().is_unicast_link_local() => {
                    found.addresses.insert(v6.ip().into())
                }
                _ => false,
            };
        }
        Ok(found)
    }
}

/// In the namespace of a Pod that starts: sends to every sink, and counts what comes.
fn inside(name: &str, number: u64, sinks: &[IpAddr], watch: &Watch) -> Result<()> {
    let place = Path::new(NAMESPACES).join(name);
    let is_gone = || place.metadata().ok().is_none_or(|now| now.ino() != number);
    let socket = socket(PORT)?;
    let start = Instant::now();
    let (mut seen, mut up) = (None::<Instant>, None::<Instant>);
    let mut own = BTreeSet::new();
    let mut wire = None;
    let payload = format!("in {name}");
    while watch.goes_on(start) && up.is_none_or(|up| up.elapsed() < AFTER) {
        // Unlike a list of addresses, this waits for nobody's changes and keeps nobody from them.
        if if_nametoindex("eth0").is_err() {
            if seen.is_some() || is_gone() {
                // An ADD that was undone, or failed before it.
                break;
            }
            // It is down for longer than this when it comes; and agents that start need the time.
            thread::sleep(Duration::from_millis(2));
            continue;
        }
        let interface = Interface::look()?;
        let seen = *seen.get_or_insert_with(Instant::now);
        if interface.running {
            up.get_or_insert_with(Instant::now);
        }
        if interface.addresses != own {
            own = interface.addresses;
            watch.announce(&own);
        }
        if wire.is_none() {
            wire = Wire::open("eth0").ok();
        }
        for sink in sinks {
            // Whatever it says: there may be no route yet, or none any more.
            let sent = socket.send_to(payload.as_bytes(), mapped(*sink));
            watch.sent_out.fetch_add(u64::from(sent.is_ok()), Relaxed);
            let Some(wire) = &wire else { continue };
            if let Some(frame) = frame(wire.mac(), &own, *sink, &payload) {
                let sent = wire.send(&frame);
                watch.sent_out.fetch_add(u64::from(sent.is_ok()), Relaxed);
            }
        }
        receive(&socket, name, "out", watch);
        if seen.elapsed() > AFTER {
            // Others start too: this one waits for an agent that is away.
            thread::sleep(Duration::from_millis(3));
        }
    }
    if up.is_some() {
        watch.came_up.fetch_add(1, Relaxed);
    }
    watch.withdraw(&own);
    Ok(())
}

/// An IPv4 datagram to all on the link: nothing has to be configured to send it.
fn frame(mac: [u8; 6], own: &BTreeSet<IpAddr>, sink: IpAddr, payload: &str) -> Option<Vec<u8>> {
    let (IpAddr::V4(source), IpAddr::V4(sink)) = (own.first()?, sink) else {
        return None;
    };
    let length = u16::try_from(28 + payload.len()).ok()?.to_be_bytes();
    let udp = u16::try_from(8 + payload.len()).ok()?.to_be_bytes();
    let mut header = vec![0x45, 0, length[0], length[1], 0, 1, 0, 0, 64, 17, 0, 0];
    header.extend(source.octets());
    header.extend(sink.octets());
    let sum: u32 = header
        .chunks(2)
        .map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])))
        .sum();
    let sum = !u16::try_from((sum & 0xffff) + (sum >> 16)).ok()?;
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    let mut frame = vec![0xff; 6];
    frame.extend(mac);
    frame.extend([8, 0]);
    frame.extend(header);
    frame.extend(PORT.to_be_bytes());
    frame.extend(PORT.to_be_bytes());
    frame.extend([udp[0], udp[1], 0, 0]);
    frame.extend(payload.bytes());
    Some(frame)
}

/// Sends to every address that comes, and counts what Pods that start send here.
fn outside(name: &str, own: &[IpAddr], node: &str, watch: &Watch) -> Result<()> {
    let socket = socket(PORT)?;
    let start = Instant::now();
    let payload = format!("out {name}");
    while watch.goes_on(start) {
        for ip in watch.coming() {
            if own.contains(&ip) || !node.is_empty() && on_node(node, ip) {
                continue;
            }
            let sent = socket.send_to(payload.as_bytes(), mapped(ip));
            watch.sent_in.fetch_add(u64::from(sent.is_ok()), Relaxed);
        }
        receive(&socket, name, "in", watch);
        thread::sleep(Duration::from_micros(500));
    }
    Ok(())
}

/// Whether an address is of a node's Pods, by the blocks of the local cluster.
fn on_node(node: &str, ip: IpAddr) -> bool {
    let index = if node == "node1" { 0 } else { 1 };
    match ip {
        IpAddr::V4(ip) => ip.octets()[2] == index,
        IpAddr::V6(ip) => ip.segments()[3] == u16::from(index),
    }
}

/// Enters every namespace of a Pod of the cluster as soon as it exists.
fn follow<'scope>(
    scope: &'scope Scope<'scope, '_>,
    prefix: &str,
    known: BTreeSet<(String, u64)>,
    sinks: &'scope [IpAddr],
    watch: &'scope Watch,
) -> Result<()> {
    let start = Instant::now();
    let mut known = known;
    while watch.goes_on(start) {
        for (name, file) in namespaces(prefix)? {
            // A number alone may be that of a namespace which is gone.
            let number = file.metadata()?.ino();
            if !known.insert((name.clone(), number)) {
                continue;
            }
            scope.spawn(move || {
                let entered = setns(file.as_fd(), CloneFlags::CLONE_NEWNET);
                watch.namespaces.fetch_add(1, Relaxed);
                if let Err(error) = entered
                    .context("enter a namespace")
                    .and_then(|()| inside(&name, number, sinks, watch))
                {
                    watch.passed(format!("the sender of {name} failed: {error:#}"));
                }
            });
        }
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn namespaces(prefix: &str) -> Result<Vec<(String, File)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(NAMESPACES).context("list namespaces")? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(prefix)
            // It may be gone already.
            && let Ok(file) = File::open(entry.path())
        {
            found.push((name, file));
        }
    }
    Ok(found)
}

/// Kills and starts agents at random.
fn chaos(bed: &Bed, mut seed: u64, watch: &Watch) -> Result<u32> {
    let mut random = |below: u64| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed % below
    };
    let mut kills = 0;
    let start = Instant::now();
    while watch.goes_on(start) {
        // In the midst of some ADD; but on a slow machine too, most of them have to succeed.
        let next = watch.came_up.load(Relaxed) + 6 + random(20);
        while watch.came_up.load(Relaxed) < next && watch.goes_on(start) {
            thread::sleep(Duration::from_millis(2));
        }
        thread::sleep(Duration::from_millis(random(30)));
        let node = ["node1", "node2"][usize::from(random(2) == 1)];
        bed.cluster.kill_agent(node)?;
        kills += 1;
        thread::sleep(Duration::from_millis(random(50)));
        bed.cluster.start_agent(node)?;
    }
    for node in ["node1", "node2"] {
        bed.cluster.wait_agent(node)?;
    }
    Ok(kills)
}

fn not_one_packet_passes(bed: &Bed) -> Result<()> {
    bed.apply(DENY)?;
    let peer = |name, node| Spec {
        namespace: "b",
        name,
        node,
        ..Spec::default()
    };
    bed.pods(&[peer("one", "node1"), peer("two", "node2")])?;
    let places = [
        (bed.full("b/one"), ""),
        (bed.full("b/two"), ""),
        ("node/node1".to_owned(), "node1"),
        ("node/node2".to_owned(), "node2"),
    ];
    let mut own = Vec::new();
    for (place, node) in &places {
        own.push(if node.is_empty() {
            bed.cluster.pod(place)?.addresses
        } else {
            let nodes = bed.cluster.nodes();
            let found = nodes.iter().find(|other| other.name == *node);
            found.context("no such node")?.addresses.clone()
        });
    }
    let sinks: Vec<IpAddr> = own.concat();
    let prefix = format!("{}-p-", bed.cluster.id().stem());
    let known = namespaces(&prefix)?
        .into_iter()
        .map(|(name, file)| Ok((name, file.metadata()?.ino())))
        .collect::<Result<_>>()?;
    let seed = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos() as u64 | 1;
    writeln!(std::io::stderr(), "seed {seed:#x}")?;

    let watch = Watch::default();
    let start = Instant::now();
    let kills = thread::scope(|scope| -> Result<u32> {
        let watch = &watch;
        let mut senders = Vec::new();
        for ((place, node), own) in places.iter().zip(&own) {
            let netns = bed.cluster.netns(place)?;
            senders.push(scope.spawn(move || {
                let netns: &Netns = netns.get();
                netns.enter(|| outside(place, own, node, watch))?
            }));
        }
        let prefix = prefix.as_str();
        let sinks = sinks.as_slice();
        senders.push(scope.spawn(move || follow(scope, prefix, known, sinks, watch)));
        let chaos = scope.spawn(move || chaos(bed, seed, watch));
        let started = start_pods(bed);
        watch.done.store(true, Relaxed);
        let join = |result: thread::Result<Result<()>>| {
            result.ok().context("a thread panicked").and_then(|r| r)
        };
        started?;
        senders
            .into_iter()
            .try_for_each(|sender| join(sender.join()))?;
        chaos.join().ok().context("a thread panicked")?
    })?;
    let (out, into) = (watch.sent_out.load(Relaxed), watch.sent_in.load(Relaxed));
    let (namespaces, came_up) = (watch.namespaces.load(Relaxed), watch.came_up.load(Relaxed));
    eprintln!(
        "{namespaces} namespaces, {came_up} interfaces up, {kills} kills, {out} packets out, {into} in"
    );
    let passed = watch.passed.lock().unwrap_or_else(PoisonError::into_inner);
    ensure!(
        passed.is_empty(),
        "{} packets passed, seed {seed:#x}:\n{}",
        passed.len(),
        passed[..passed.len().min(20)].join("\n")
    );
    // Else it would have shown nothing.
    ensure!(
        namespaces >= STARTS as u64,
        "{namespaces} namespaces were watched"
    );
    ensure!(
        start.elapsed() < LIMIT,
        "the senders ended before the last Pod had started"
    );
    ensure!(
        came_up >= STARTS as u64 / 2,
        "{came_up} interfaces came up under a sender's eyes"
    );
    ensure!(kills >= 5, "agents were killed {kills} times");
    ensure!(
        out > 10_000 && into > 10_000,
        "{out} packets out, {into} in"
    );
    Ok(())
}

fn start_pods(bed: &Bed) -> Result<()> {
    let mut made = 0;
    while made < STARTS {
        let names: Vec<_> = (made..made + BATCH).map(|n| format!("p{n}")).collect();
        let manifest: String = names
            .iter()
            .enumerate()
            .map(|(n, name)| {
                bed.manifest(&Spec {
                    name,
                    node: ["node1", "node2"][n % 2],
                    ..Spec::default()
                })
            })
            .collect();
        bed.cluster.apply(&manifest)?;
        // Those before are on their way out still, which kubectl would not wait for.
        eventually(LIMIT / 2, || {
            for name in &names {
                bed.cluster.pod(&bed.full(&format!("a/{name}")))?;
            }
            Ok(())
        })?;
        bed.kubectl(&format!(
            "delete pod -n $a --wait=false {}",
            names.join(" ")
        ))?;
        made += BATCH;
    }
    Ok(())
}

#[test]
fn not_one_packet_passes_while_pods_start_and_agents_die() {
    hachi_testutil::require_root!();
    hachi_testutil::require_binaries!("hachi-cni", "hachi-agent");
    bed::run("window", Family::Dual, not_one_packet_passes);
}
