//! A client and a server in namespaces of their own, and what joins them.
//!
//! ```text
//!  bare      client ───────────────── server
//!  routed    client ── veth ── node ── veth ── server      no rules, iptables, nftables, or Hachi
//! ```

use std::{
    fs::File,
    net::{Ipv4Addr, SocketAddr},
    os::fd::{AsFd as _, AsRawFd as _},
    process::Command,
    thread,
};

use nix::sched::{CloneFlags, setns, unshare};

use crate::{
    node::{CLIENT_IP, Node, PORT, SERVER_IP, SERVICE, TARGET},
    rules,
    support::World,
};

/// A network namespace, gone with this value.
pub(crate) struct Space(File);

impl Space {
    fn new() -> Self {
        let made = thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace");
            File::open("/proc/thread-self/ns/net").expect("the new namespace")
        });
        let space = Self(made.join().expect("a namespace"));
        space.ip(&["link", "set", "lo", "up"]);
        space
    }

    /// The calling thread's own.
    fn current() -> Self {
        Self(File::open("/proc/thread-self/ns/net").expect("the own namespace"))
    }

    /// Runs something there, on a thread of its own.
    pub(crate) fn enter<R: Send>(&self, run: impl FnOnce() -> R + Send) -> R {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                setns(self.0.as_fd(), CloneFlags::CLONE_NEWNET).expect("the namespace");
                run()
            });
            inside.join().expect("what ran there")
        })
    }

    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }

    fn ip(&self, arguments: &[&str]) {
        self.enter(|| {
            let output = Command::new("ip").args(arguments).output().expect("ip");
            let why = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(output.status.success(), "ip {arguments:?}: {why}");
        });
    }
}

/// One way from the client to the server.
pub(crate) struct Lane {
    pub(crate) name: String,
    pub(crate) client: Space,
    pub(crate) server: Space,
    /// Whom the client asks.
    pub(crate) to: SocketAddr,
    /// What must stay while it is used.
    _node: Option<Space>,
    _hachi: Option<Node>,
}

/// What stands between client and server.
#[derive(Clone, Copy)]
pub(crate) enum Between {
    Nothing,
    Routes,
    Iptables(usize),
    Nftables(usize),
}

fn service() -> SocketAddr {
    (SERVICE, TARGET).into()
}

fn direct() -> SocketAddr {
    (SERVER_IP, PORT).into()
}

/// One pair of devices from here to there.
fn veth(from: &Space, name: &str, to: &Space, peer: &str) {
    let there = to.path();
    from.ip(&[
        "link", "add", name, "type", "veth", "peer", "name", peer, "netns", &there,
    ]);
    from.ip(&["link", "set", name, "up"]);
    to.ip(&["link", "set", peer, "up"]);
}

const GATEWAY: &str = "169.254.1.1";
const MAC: &str = "02:02:02:02:02:02";

/// Address, gateway and permanent neighbours of a Pod, as the plugin makes them.
fn wire_pod(node: &Space, host: &str, pod: &Space, ip: Ipv4Addr) {
    node.ip(&["link", "set", host, "address", MAC, "up"]);
    pod.ip(&["link", "set", "eth0", "address", MAC, "up"]);
    let ip = ip.to_string();
    pod.ip(&["address", "add", &format!("{ip}/32"), "dev", "eth0"]);
    pod.ip(&["route", "add", GATEWAY, "dev", "eth0", "scope", "link"]);
    pod.ip(&["route", "add", "default", "via", GATEWAY, "dev", "eth0"]);
    pod.ip(&[
        "neigh",
        "add",
        GATEWAY,
        "lladdr",
        MAC,
        "dev",
        "eth0",
        "nud",
        "permanent",
    ]);
    node.ip(&["route", "add", &format!("{ip}/32"), "dev", host]);
    node.ip(&[
        "neigh",
        "add",
        &ip,
        "lladdr",
        MAC,
        "dev",
        host,
        "nud",
        "permanent",
    ]);
}

fn forward(node: &Space) {
    node.enter(|| std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").expect("forwarding"));
}

impl Lane {
    /// Without Hachi.
    pub(crate) fn other(name: String, between: Between) -> Self {
        let (client, server) = (Space::new(), Space::new());
        if let Between::Nothing = between {
            veth(&client, "eth0", &server, "eth0");
            for (space, ip) in [(&client, CLIENT_IP), (&server, SERVER_IP)] {
                space.ip(&["address", "add", &format!("{ip}/16"), "dev", "eth0"]);
            }
            return Self {
                name,
                client,
                server,
                to: direct(),
                _node: None,
                _hachi: None,
            };
        }
        let node = Space::new();
        forward(&node);
        for (host, pod, ip) in [
            ("client", &client, CLIENT_IP),
            ("server", &server, SERVER_IP),
        ] {
            veth(&node, host, pod, "eth0");
            wire_pod(&node, host, pod, ip);
        }
        let to = match between {
            Between::Nothing | Between::Routes => direct(),
            Between::Iptables(services) => {
                node.enter(|| rules::iptables(services));
                service()
            }
            Between::Nftables(services) => {
                node.enter(|| rules::nftables(services));
                service()
            }
        };
        Self {
            name,
            client,
            server,
            to,
            _node: Some(node),
            _hachi: None,
        }
    }

    /// With Hachi's programs on the Pods' interfaces, among so many Services; of `None` the Pod itself
    /// is asked, not its Service. The calling thread is in the node's namespaces.
    pub(crate) fn hachi(name: String, world: &World, services: Option<usize>) -> Self {
        let node = Space::current();
        let mut hachi = Node::new(world);
        hachi.fill(services.unwrap_or(10));
        hachi.sync();
        forward(&node);
        let (client, server) = (Space::new(), Space::new());
        for (host, pod, ip, index) in [
            ("client", &client, CLIENT_IP, hachi.interfaces[1]),
            ("server", &server, SERVER_IP, hachi.interfaces[0]),
        ] {
            let peer = format!("{host}p");
            node.ip(&["link", "set", &peer, "netns", &pod.path(), "name", "eth0"]);
            wire_pod(&node, host, pod, ip);
            let attached = hachi.datapath.attach(hachi_kernel::Role::Pod, index, host);
            attached.expect("programs on the interface");
        }
        Self {
            name,
            client,
            server,
            to: services.map_or(direct(), |_| service()),
            _node: Some(node),
            _hachi: Some(hachi),
        }
    }
}
