//! Times a whole compilation and single events: `cargo run --release -p hachi-compile --example
//! compile_bench -- [PODS [POLICIES [SERVICES]]]`.
//!
//! With `HACHI_COUNT=policy` (or `label`, `nothing`) it goes through `HACHI_EVENTS` such events and
//! prints nothing: under callgrind, two runs with different numbers tell the instructions of one.

mod cluster;

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

use hachi_compile::{Compiler, Image, diff};
use hachi_index::{Index, Object};

use cluster::{APPS, Size, object};

const ROUNDS: usize = 101;

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
            for object in objects {
                index.apply(object);
            }
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

/// Goes through some events of a kind.
fn count(kind: &str, events: usize, size: Size) {
    let mut index = size.index();
    let (mut compiler, mut image) = (Compiler::default(), Image::default());
    update(&mut index, &mut compiler, &mut image);
    for round in 0..events {
        let event = match kind {
            "policy" => Some(cluster::policy(0, size.namespaces(), 81 + round)),
            "label" => Some(cluster::pod(0, (1 + round) % APPS)),
            _ => None,
        };
        if let Some(it) = event.map(object) {
            index.apply(it);
        }
        black_box(update(&mut index, &mut compiler, &mut image));
    }
}

fn main() {
    let mut args = std::env::args()
        .skip(1)
        .map(|a| a.parse::<usize>().expect("a number"));
    let size = Size {
        pods: args.next().unwrap_or(10_000),
        policies: args.next().unwrap_or(1_000),
        services: args.next().unwrap_or(10_000),
    };
    if let Ok(kind) = std::env::var("HACHI_COUNT") {
        let events = std::env::var("HACHI_EVENTS").ok();
        let events = events.and_then(|text| text.parse().ok());
        return count(&kind, events.unwrap_or(10), size);
    }
    let Size {
        pods,
        policies,
        services,
    } = size;
    let namespaces = size.namespaces();
    let before = resident();
    let mut index = Index::new("n0");
    let mut took = Duration::ZERO;
    for value in size.objects() {
        let object = object(value);
        let start = Instant::now();
        index.apply(object);
        took += start.elapsed();
    }
    size.endpoints().for_each(|it| index.add_endpoint(it));
    println!("{pods} Pods, {policies} policies, {services} Services: taken in in {took:.2?}");
    if let (Some(before), Some(after)) = (before, resident()) {
        println!("{} kB resident at first, {after} kB with the index", before);
    }

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
        println!("{kilobytes} kB resident with the image");
    }

    event(
        "nothing",
        (&mut index, &mut compiler, &mut image),
        |_| vec![],
    );
    event(
        "a Pod elsewhere",
        (&mut index, &mut compiler, &mut image),
        |round| vec![object(cluster::pod(1, round % APPS))],
    );
    event(
        "a Pod of this node",
        (&mut index, &mut compiler, &mut image),
        |round| vec![object(cluster::pod(0, round % APPS))],
    );
    event(
        "a policy",
        (&mut index, &mut compiler, &mut image),
        |round| vec![object(cluster::policy(0, namespaces, 81 + round))],
    );
    event(
        "an EndpointSlice",
        (&mut index, &mut compiler, &mut image),
        |round| {
            let [_, slice] = cluster::service(0, pods, !round.is_multiple_of(2));
            vec![object(slice)]
        },
    );
}
