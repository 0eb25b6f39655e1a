//! Times a whole compilation and single events: `cargo run --release -p hachi-compile --example
//! compile_bench -- [PODS [POLICIES [SERVICES]]]`.
//!
//! One hundred nodes, so that every hundredth Pod is of this node; namespaces of two hundred Pods and
//! twenty labels; three endpoints a Service.

use std::time::{Duration, Instant};

use hachi_compile::{Compiler, Image, diff};
use hachi_index::{Endpoint, EndpointKey, Index, Object, PodName};
use serde_json::{Value, json};

const NODES: usize = 100;
const NAMESPACE_SIZE: usize = 200;
const APPS: usize = 20;
const ROUNDS: usize = 101;

fn object(value: Value) -> Object {
    let kind = value["kind"].as_str().unwrap_or_default().to_owned();
    let parsed = match kind.as_str() {
        "Pod" => serde_json::from_value(value).map(Object::Pod),
        "Namespace" => serde_json::from_value(value).map(Object::Namespace),
        "Service" => serde_json::from_value(value).map(Object::Service),
        "EndpointSlice" => serde_json::from_value(value).map(Object::EndpointSlice),
        _ => serde_json::from_value(value).map(Object::NetworkPolicy),
    };
    parsed.expect("a valid object")
}

fn address(pod: usize) -> String {
    format!("10.{}.{}.{}", 1 + pod / 65536, pod / 256 % 256, pod % 256)
}

fn pod(n: usize, app: usize) -> Object {
    let namespace = n / NAMESPACE_SIZE;
    object(json!({"kind": "Pod",
        "metadata": {"namespace": format!("ns{namespace}"), "name": format!("pod{n}"),
                     "uid": format!("uid{n}"),
                     "labels": {"app": format!("app{app}"), "pod-template-hash": format!("h{app}"),
                                "tier": if app.is_multiple_of(2) { "front" } else { "back" }}},
        "spec": {"nodeName": format!("n{}", n % NODES), "containers": [
            {"name": "c", "ports": [{"name": "http", "containerPort": 8080}]}]},
        "status": {"phase": "Running", "podIPs": [{"ip": address(n)}]}}))
}

fn policy(n: usize, namespaces: usize, port: usize) -> Object {
    let app = n / namespaces % APPS;
    object(json!({"kind": "NetworkPolicy",
    "metadata": {"namespace": format!("ns{}", n % namespaces), "name": format!("policy{n}")},
    "spec": {
        "podSelector": {"matchLabels": {"app": format!("app{app}")}},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [
            {"from": [{"podSelector": {"matchLabels": {"app": format!("app{}", (app + 1) % APPS)}}}],
             "ports": [{"port": port}]},
            {"from": [{"namespaceSelector": {"matchLabels": {"team": format!("t{}", n % 7)}},
                       "podSelector": {"matchLabels": {"tier": "front"}}}]}],
        "egress": [
            {"to": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": [format!("10.1.{}.0/24", n % 256)]}}]},
            {"to": [{"podSelector": {}}], "ports": [{"port": "http"}, {"protocol": "UDP", "port": 53}]},
        ]}}))
}

fn service(n: usize, pods: usize, ready: bool) -> [Object; 2] {
    let endpoints: Vec<Value> = (0..3)
        .map(|k| json!({"addresses": [address((3 * n + k) % pods)], "conditions": {"ready": ready || k > 0}}))
        .collect();
    [
        object(json!({"kind": "Service",
            "metadata": {"namespace": "default", "name": format!("svc{n}")},
            "spec": {"clusterIP": format!("10.{}.{}.{}", 96 + n / 65_536, n / 256 % 256, n % 256),
                     "ports": [{"name": "http", "port": 80}]}})),
        object(json!({"kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"namespace": "default", "name": format!("svc{n}-x"),
                         "labels": {"kubernetes.io/service-name": format!("svc{n}")}},
            "ports": [{"name": "http", "port": 8080}], "endpoints": endpoints})),
    ]
}

/// Brings the image up to date, and says how long each step took and how many writes came out.
fn update(index: &mut Index, compiler: &mut Compiler, image: &mut Image) -> ([Duration; 3], usize) {
    let start = Instant::now();
    let desired = index.desired();
    let indexed = start.elapsed();
    let compiled = compiler.compile(desired);
    let compiled_at = start.elapsed();
    let ops = diff(image, &compiled.image);
    let all = start.elapsed();
    *image = compiled.image;
    (
        [indexed, compiled_at - indexed, all - compiled_at],
        ops.len(),
    )
}

fn event(
    name: &str,
    (index, compiler, image): (&mut Index, &mut Compiler, &mut Image),
    mut happen: impl FnMut(usize) -> Vec<Object>,
) {
    let mut rounds: Vec<_> = (0..ROUNDS)
        .map(|round| {
            let objects = happen(round);
            let start = Instant::now();
            objects.into_iter().for_each(|object| index.apply(object));
            let (steps, ops) = update(index, compiler, image);
            (start.elapsed(), steps, ops)
        })
        .collect();
    rounds.sort();
    let (whole, [indexed, compiled, diffed], ops) = rounds[ROUNDS / 2];
    let worst = rounds[ROUNDS - 1].0;
    println!(
        "{name:24} {whole:>10.2?} at the median, {worst:.2?} at most (index {indexed:.2?}, compile {compiled:.2?}, diff {diffed:.2?}; {ops} writes)"
    );
}

/// The memory of this process in kilobytes.
fn resident() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

fn main() {
    let mut args = std::env::args()
        .skip(1)
        .map(|a| a.parse::<usize>().expect("a number"));
    let pods = args.next().unwrap_or(10_000);
    let policies = args.next().unwrap_or(1_000);
    let services = args.next().unwrap_or(10_000);
    let namespaces = pods.div_ceil(NAMESPACE_SIZE);

    let mut objects: Vec<Object> = (0..pods).map(|n| pod(n, n % APPS)).collect();
    objects.extend((0..namespaces).map(|n| {
        let team = format!("t{}", n % 7);
        object(json!({"kind": "Namespace", "metadata": {"name": format!("ns{n}"), "labels": {"team": team}}}))
    }));
    objects.extend((0..policies).map(|n| policy(n, namespaces, 80)));
    objects.extend((0..services).flat_map(|n| service(n, pods, true)));

    let mut index = Index::new("n0");
    let start = Instant::now();
    objects.into_iter().for_each(|object| index.apply(object));
    for n in (0..pods).step_by(NODES) {
        let ifindex = 10 + n as u32;
        index.add_endpoint(Endpoint {
            key: EndpointKey {
                container_id: format!("c{n}"),
                ifname: "eth0".into(),
            },
            pod: Some(PodName {
                namespace: format!("ns{}", n / NAMESPACE_SIZE),
                name: format!("pod{n}"),
                uid: Some(format!("uid{n}")),
            }),
            ifindex,
            mac: [2; 6],
            host_mac: [2; 6],
            addresses: vec![address(n).parse().expect("an address")],
            host_ports: Vec::new(),
        });
    }
    println!(
        "{pods} Pods, {policies} policies, {services} Services: taken in in {:.2?}",
        start.elapsed()
    );

    let (mut compiler, mut image) = (Compiler::default(), Image::default());
    let start = Instant::now();
    let ([indexed, compiled, diffed], ops) = update(&mut index, &mut compiler, &mut image);
    println!(
        "first image              {:>10.2?} (index {indexed:.2?}, compile {compiled:.2?}, diff {diffed:.2?}; {ops} writes)",
        start.elapsed()
    );
    println!(
        "{} endpoints, {} peers, {} blocks, {} policy entries, {} frontends",
        image.endpoints.len(),
        image.peers.len(),
        image.cidrs.len(),
        image.policy.len(),
        image.services.len()
    );

    if let Some(kilobytes) = resident() {
        println!("{} MiB resident", kilobytes / 1024);
    }

    event(
        "nothing",
        (&mut index, &mut compiler, &mut image),
        |_| vec![],
    );
    event(
        "a Pod elsewhere",
        (&mut index, &mut compiler, &mut image),
        |round| vec![pod(1, round % APPS)],
    );
    event(
        "a Pod of this node",
        (&mut index, &mut compiler, &mut image),
        |round| vec![pod(0, round % APPS)],
    );
    event(
        "a policy",
        (&mut index, &mut compiler, &mut image),
        |round| vec![policy(0, namespaces, 81 + round)],
    );
    event(
        "an EndpointSlice",
        (&mut index, &mut compiler, &mut image),
        |round| {
            service(0, pods, !round.is_multiple_of(2))
                .into_iter()
                .skip(1)
                .collect()
        },
    );
}
