//! SIGKILL at random moments of ADD, DEL and GC. Afterwards GC leaves exactly what the runtime
//! knows, and everything works as if nothing had happened.

mod support;

use std::{
    collections::BTreeMap,
    io::Read as _,
    os::unix::process::ExitStatusExt as _,
    time::{Duration, Instant},
};

use hachi_api::AttachmentId;
use hachi_net::host_ifname;
use serde_json::{Value, json};
use support::{
    Call,
    node::{Node, Pod, addresses, on_a_node},
    patched,
};

const PODS: usize = 8;
const KILLS: usize = 320;

/// Random enough for moments: a linear congruential generator with a fixed start.
struct Moments(u64);

impl Moments {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

/// Runs a call and kills it after a while; the result if it was faster, `None` if it died.
fn kill(call: &Call, after: Duration) -> Option<Value> {
    let mut child = call.start();
    let begin = Instant::now();
    while begin.elapsed() < after {
        std::hint::spin_loop();
    }
    let _ = child.kill();
    let status = child.wait().unwrap();
    if status.signal().is_some() {
        return None;
    }
    let mut text = String::new();
    child
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
    assert!(status.success(), "{text}");
    Some(serde_json::from_str(&text).unwrap_or_default())
}

fn id(number: usize) -> AttachmentId {
    AttachmentId {
        container_id: format!("c{number}"),
        ifname: "eth0".into(),
    }
}

fn gc_of(conf: &Value, alive: &BTreeMap<usize, Value>) -> Call {
    let list = alive
        .keys()
        .map(|n| json!({"containerID": format!("c{n}"), "ifname": "eth0"}));
    let list: Vec<_> = list.collect();
    Call::new(
        "GC",
        &patched(conf, &json!({"cni.dev/valid-attachments": list})),
    )
}

/// The node has what the runtime knows of, and nothing else.
fn agrees(node: &Node, alive: &BTreeMap<usize, Value>) {
    let links = alive
        .keys()
        .map(|number| host_ifname(&id(*number)))
        .collect();
    let used = alive
        .values()
        .flat_map(addresses)
        .map(|address| address.to_string())
        .collect();
    // A link whose deleter was killed goes in its own time.
    node.wait_for("exactly the links of living Pods", || {
        node.host_links() == links
    });
    assert_eq!(node.used(), used);
    let traces = node.traces();
    let routes = traces
        .lines()
        .filter(|line| line.contains("proto 72"))
        .count();
    let neighbours = traces
        .lines()
        .filter(|line| line.contains("PERMANENT"))
        .count();
    assert_eq!(
        (routes, neighbours),
        (alive.len() * 2, alive.len() * 2),
        "{traces}"
    );
    let (records, unreadable) = hachi_net::Store::open(&node.store())
        .unwrap()
        .attachments()
        .unwrap();
    assert!(unreadable.is_empty(), "{unreadable:?}");
    let records: Vec<_> = records.into_iter().map(|record| record.id).collect();
    assert_eq!(
        records,
        alive.keys().map(|number| id(*number)).collect::<Vec<_>>()
    );
}

#[test]
fn killed_at_any_moment() {
    hachi_testutil::require_root!();
    on_a_node(|node| {
        let ranges = json!([[{"subnet": "10.9.0.0/28"}], [{"subnet": "fd09::/124"}]]);
        let conf = node.conf(&json!({"ipam": {"ranges": ranges}}));
        let mut pods: Vec<_> = (0..PODS).map(|_| Pod::new()).collect();
        let mut alive: BTreeMap<usize, Value> = BTreeMap::new();
        let mut moments = Moments(7);

        // How long the operations take here, so that the moments are spread over them: the shortest
        // of a few, for the first one may have waited for the disk.
        let took = |call: Call| {
            let begin = Instant::now();
            call.run().ok();
            begin.elapsed().as_micros() as u64
        };
        let (mut add_time, mut del_time) = (u64::MAX, u64::MAX);
        for _ in 0..5 {
            add_time = add_time.min(took(pods[0].add("c0", &conf)));
            del_time = del_time.min(took(pods[0].del("c0", &conf)));
        }

        let (mut kills, mut rounds) = (0, 0);
        while kills < KILLS {
            rounds += 1;
            assert!(
                rounds < KILLS * 10,
                "the moments are too late: {kills} kills"
            );
            let number = usize::try_from(moments.below(PODS as u64)).unwrap();
            let name = format!("c{number}");
            let died = match moments.below(8) {
                0 => {
                    let after = Duration::from_micros(moments.below(add_time));
                    kill(&gc_of(&conf, &alive), after).is_none()
                }
                _ if alive.contains_key(&number) => {
                    alive.remove(&number);
                    let after = Duration::from_micros(moments.below(del_time));
                    kill(&pods[number].del(&name, &conf), after).is_none()
                }
                _ => {
                    let after = Duration::from_micros(moments.below(add_time * 5 / 4));
                    // What an earlier death has left in the namespace goes with it.
                    pods[number] = Pod::new();
                    match kill(&pods[number].add(&name, &conf), after) {
                        Some(result) => drop(alive.insert(number, result)),
                        None => kills += 1,
                    }
                    false
                }
            };
            kills += usize::from(died);
            if rounds % 16 == 0 {
                gc_of(&conf, &alive).run().ok();
                agrees(&node, &alive);
            }
        }
        gc_of(&conf, &alive).run().ok();
        agrees(&node, &alive);
        for (number, result) in &alive {
            pods[*number]
                .check(&format!("c{number}"), &conf, result)
                .run()
                .ok();
        }
        // Every address of the pool can still be had: 16 less network, gateway and broadcast.
        gc_of(&conf, &BTreeMap::new()).run().ok();
        let fresh: Vec<_> = (0..13).map(|_| Pod::new()).collect();
        for (number, pod) in fresh.iter().enumerate() {
            pod.add(&format!("n{number}"), &conf).run().ok();
        }
        assert_eq!(node.used().len(), 26);
    });
}
