//! TCP_RR and TCP_CRR: a byte there and a byte back, on one connection or on a new one each time.
//!
//! Client and server are threads pinned to one core, so that a rate is a cost: what other cores do, and
//! how they wake each other, has no part in it. Every lane runs in every repetition, in random order. A
//! connection of CRR is closed by a reset, so that no port waits.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use nix::{
    sched::{CpuSet, sched_setaffinity},
    sys::socket::{setsockopt, sockopt::Linger},
    unistd::Pid,
};
use serde_json::json;

use crate::{
    lanes::{Between, Lane},
    node::PORT,
    support::World,
};

/// How long one run is.
const RUN: Duration = Duration::from_millis(400);
/// Where both threads run.
const CORE: usize = 0;

/// Measures all lanes; prints a line for each run.
pub(crate) fn run(repetitions: usize, seed: u64, services: &[usize]) {
    let mut lanes = vec![
        Lane::other("bare veth".into(), Between::Nothing),
        Lane::other("routed".into(), Between::Routes),
        hachi("hachi, Pod".into(), None),
    ];
    for &count in services {
        lanes.push(hachi(format!("hachi, {count}"), Some(count)));
        lanes.push(Lane::other(
            format!("iptables, {count}"),
            Between::Iptables(count),
        ));
        lanes.push(Lane::other(
            format!("nftables, {count}"),
            Between::Nftables(count),
        ));
    }
    let mut state = seed;
    // Once unmeasured: caches are warm, and whatever does not work is found out.
    for repetition in 0..=repetitions {
        let mut cells: Vec<(usize, bool)> = (0..lanes.len())
            .flat_map(|lane| [(lane, false), (lane, true)])
            .collect();
        shuffle(&mut cells, &mut state);
        for (lane, anew) in cells {
            let lane = &lanes[lane];
            let length = if repetition == 0 { RUN / 4 } else { RUN };
            let micros = measure(lane, anew, length);
            if repetition > 0 {
                let kind = if anew { "TCP_CRR" } else { "TCP_RR" };
                println!(
                    "{}",
                    json!({"what": kind, "lane": lane.name, "repetition": repetition, "us": micros})
                );
            }
        }
    }
}

/// A lane whose node is a world of its own. It is made on a thread that ends; the programs stay, as
/// the lane holds them.
fn hachi(name: String, services: Option<usize>) -> Lane {
    let directory = tempfile::tempdir().expect("a directory for the BPF file system");
    let path = directory.path();
    std::thread::scope(|scope| {
        let made = scope.spawn(move || Lane::hachi(name, &World::at(path), services));
        made.join().expect("a node of Hachi")
    })
}

/// SplitMix64, and the shuffle of Fisher and Yates.
fn shuffle<T>(items: &mut [T], state: &mut u64) {
    for last in (1..items.len()).rev() {
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = *state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let below = (mixed ^ (mixed >> 31)) % (last as u64 + 1);
        items.swap(last, below as usize);
    }
}

fn pin() {
    let mut core = CpuSet::new();
    core.set(CORE).expect("a core");
    sched_setaffinity(Pid::from_raw(0), &core).expect("pinned");
}

/// The microseconds of a transaction.
fn measure(lane: &Lane, anew: bool, length: Duration) -> f64 {
    let done = AtomicBool::new(false);
    let listener = lane
        .server
        .enter(|| TcpListener::bind(SocketAddr::from(([0, 0, 0, 0], PORT))).expect("a listener"));
    std::thread::scope(|scope| {
        let server = scope.spawn(|| {
            pin();
            serve(&listener, &done);
        });
        let micros = lane.client.enter(|| {
            pin();
            let micros = if anew {
                connections(lane.to, length)
            } else {
                exchanges(lane.to, length)
            };
            done.store(true, Ordering::SeqCst);
            micros
        });
        // The server waits for one that does not come otherwise.
        lane.server.enter(|| {
            let own = SocketAddr::from(([127, 0, 0, 1], PORT));
            drop(TcpStream::connect(own));
        });
        server.join().expect("the server");
        micros
    })
}

fn serve(listener: &TcpListener, done: &AtomicBool) {
    let mut byte = [0];
    while let Ok((mut stream, _)) = listener.accept() {
        if done.load(Ordering::SeqCst) {
            return;
        }
        stream.set_nodelay(true).expect("no delay");
        // Until the client resets.
        while matches!(stream.read(&mut byte), Ok(1)) {
            if stream.write_all(&byte).is_err() {
                break;
            }
        }
    }
}

fn exchange(stream: &mut TcpStream) {
    stream.write_all(b"?").expect("sent");
    stream.read_exact(&mut [0]).expect("answered");
}

fn open(to: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect_timeout(&to, Duration::from_secs(5)).expect("connected");
    stream.set_nodelay(true).expect("no delay");
    let reset = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    setsockopt(&stream, Linger, &reset).expect("closed by a reset");
    stream
}

fn exchanges(to: SocketAddr, length: Duration) -> f64 {
    let mut stream = open(to);
    exchange(&mut stream);
    timed(length, || exchange(&mut stream))
}

fn connections(to: SocketAddr, length: Duration) -> f64 {
    timed(length, || exchange(&mut open(to)))
}

/// The median of batches, as microseconds of one: a batch that something else interrupts does not count.
fn timed(length: Duration, mut once: impl FnMut()) -> f64 {
    const BATCH: u32 = 16;
    let mut batches = Vec::new();
    let start = Instant::now();
    let mut last = start;
    while last.duration_since(start) < length {
        for _ in 0..BATCH {
            once();
        }
        let now = Instant::now();
        batches.push(now.duration_since(last));
        last = now;
    }
    batches.sort_unstable();
    let median = batches[batches.len() / 2];
    median.as_secs_f64() * 1e6 / f64::from(BATCH)
}
