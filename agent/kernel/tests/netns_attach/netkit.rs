//! netkit pairs (Linux 6.7) in place of veth pairs: the same programs at the same hooks guard them, and
//! packets pass from Pod to Pod.

use std::{
    fs::{self, File},
    io,
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    os::fd::AsRawFd,
    process::Command,
    thread,
    time::Duration,
};

use hachi_abi::{
    CLASS_WORLD, ConfigFlags, Endpoint, PolicyEntry, PolicyKey, SET_ALLOW_ALL, SHAPE_ANY_PROTO,
    Verdict, proto,
};
use hachi_compile::Op;
use hachi_kernel::{Datapath, Role};
use nix::{
    net::if_::if_nametoindex,
    sched::{CloneFlags, setns, unshare},
};

use crate::support::{ip, isolated, require_datapath};

const PORT: u16 = 8080;
/// A policy set.
const SET: u32 = 11;
/// How long a connection has to stay without an answer.
const TIMEOUT: Duration = Duration::from_secs(1);
/// How long one may take that comes about: a segment that is lost costs a second.
const PATIENCE: Duration = Duration::from_secs(10);

/// A Pod behind a netkit pair.
struct Pod {
    /// The host's side.
    ifindex: u32,
    addresses: [IpAddr; 2],
    netns: File,
}

impl Pod {
    /// Makes the pair, gives the Pod its side, and routes to it.
    fn new(name: &str, last: u8) -> Self {
        let netns = thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("a namespace");
            File::open("/proc/thread-self/ns/net").expect("a namespace")
        });
        let netns = netns.join().expect("a namespace");
        ip(&["link", "add", name, "type", "netkit"]);
        let ifindex = if_nametoindex(name).expect("the interface just made");
        let peer = peer_of(name);
        let path = format!("/proc/{}/fd/{}", std::process::id(), netns.as_raw_fd());
        ip(&["link", "set", &peer, "netns", &path]);
        let addresses = [
            format!("10.0.0.{last}").parse().expect("an address"),
            format!("fd00::{last}").parse().expect("an address"),
        ];
        ip(&["link", "set", name, "up"]);
        let pod = Self {
            ifindex,
            addresses,
            netns,
        };
        pod.within(|| {
            ip(&["link", "set", "lo", "up"]);
            ip(&["link", "set", &peer, "up"]);
            for address in pod.addresses {
                let nodad: &[_] = if address.is_ipv6() { &["nodad"] } else { &[] };
                ip(&[&["addr", "add", &address.to_string(), "dev", &peer], nodad].concat());
            }
            ip(&["route", "add", "default", "dev", &peer]);
            ip(&["-6", "route", "add", "default", "dev", &peer]);
        });
        for address in addresses {
            ip(&["route", "add", &address.to_string(), "dev", name]);
        }
        pod
    }

    /// Runs something in the Pod's namespace.
    fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                setns(&self.netns, CloneFlags::CLONE_NEWNET).expect("the Pod's namespace");
                work()
            });
            inside.join().expect("no panic in the Pod")
        })
    }

    /// The writes that make it an endpoint, isolated by `ingress`.
    fn endpoint(&self, ingress: u32) -> Vec<Op> {
        let shapes = (1 << (SHAPE_ANY_PROTO + 1)) - 1;
        // In its usual mode (L3) a pair has no MAC addresses: frames carry zeros.
        let endpoint = Endpoint {
            ifindex: self.ifindex,
            ingress_set: ingress,
            egress_set: SET_ALLOW_ALL,
            ingress_shapes: shapes,
            egress_shapes: shapes,
            mac: [0; 6],
            host_mac: [0; 6],
        };
        let put = |address| Op::PutEndpoint(address, endpoint);
        self.addresses.into_iter().map(put).collect()
    }

    fn connect(&self, to: SocketAddr, within: Duration) -> io::Result<()> {
        self.within(|| TcpStream::connect_timeout(&to, within).map(drop))
    }
}

/// The name of the other side of a pair whose both sides are here: `name@peer`.
fn peer_of(name: &str) -> String {
    let output = Command::new("ip")
        .args(["-o", "link", "show", name])
        .output()
        .expect("iproute2 is installed");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let word = text.split_whitespace().nth(1).expect("a name");
    let (_, peer) = word.trim_end_matches(':').split_once('@').expect("a pair");
    peer.to_owned()
}

fn apply(datapath: &mut Datapath, mut ops: Vec<Op>) {
    ops.push(Op::RaiseRevision);
    datapath.apply(&ops).expect("applied");
}

#[test]
fn programs_guard_a_netkit_pair_as_they_do_veth() {
    require_datapath!();
    isolated(|world| {
        let probe = Command::new("ip")
            .args(["link", "add", "probe", "type", "netkit"])
            .output()
            .expect("iproute2 is installed");
        if !probe.status.success() {
            let why = String::from_utf8_lossy(&probe.stderr).into_owned();
            hachi_testutil::absent!("netkit: {}", why.trim());
        }
        ip(&["link", "delete", "probe"]);
        let mut datapath = world.load();
        let (client, server) = (Pod::new("client", 1), Pod::new("server", 2));
        for family in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
            fs::write(format!("/proc/sys/net/{family}"), "1").expect("forwarding");
        }
        let listeners: Vec<TcpListener> = server.within(|| {
            let listen = |address: &IpAddr| TcpListener::bind((*address, PORT)).expect("listening");
            server.addresses.iter().map(listen).collect()
        });
        let targets = server
            .addresses
            .map(|address| SocketAddr::new(address, PORT));
        for (pod, name) in [(&client, "client"), (&server, "server")] {
            datapath
                .attach(Role::Pod, pod.ifindex, name)
                .expect("attached");
            datapath
                .check(Role::Pod, pod.ifindex, name)
                .expect("attached");
        }

        // Through the host's stack first, then from namespace to namespace.
        for flags in [0, ConfigFlags::REDIRECT_PEER] {
            let mut ops = vec![Op::SetFlags(flags)];
            ops.extend(client.endpoint(SET_ALLOW_ALL));
            ops.extend(server.endpoint(SET_ALLOW_ALL));
            apply(&mut datapath, ops);
            for to in targets {
                client
                    .connect(to, PATIENCE)
                    .unwrap_or_else(|error| panic!("flags {flags}, {to}: {error}"));
            }
            apply(&mut datapath, server.endpoint(SET));
            for to in targets {
                let error = client.connect(to, TIMEOUT).expect_err("nothing is allowed");
                assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{to}: {error}");
            }
            let key = PolicyKey {
                set: SET,
                class: CLASS_WORLD,
                port: PORT.to_be_bytes(),
                plen: 16,
                proto: proto::TCP,
            };
            let allow = PolicyEntry {
                verdict: Verdict::Allow as u32,
                rule: SET,
            };
            apply(&mut datapath, vec![Op::PutPolicy(key, allow)]);
            for to in targets {
                client
                    .connect(to, PATIENCE)
                    .unwrap_or_else(|error| panic!("flags {flags}, {to}, allowed: {error}"));
            }
            apply(&mut datapath, vec![Op::DeletePolicy(key)]);
        }
        drop(listeners);
    });
}
