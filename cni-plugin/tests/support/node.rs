//! A node and its Pods: network namespaces that end with the test, whatever happens to it. They
//! have no names and are mounted nowhere; a path leads to them as long as this process has them open.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{Read as _, Write as _},
    mem::ManuallyDrop,
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsRawFd as _, OwnedFd},
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use hachi_api::{ApiError, Reply, Request, Status, serve};
use nix::{
    fcntl::OFlag,
    sched::{CloneFlags, setns, unshare},
};
use serde_json::{Value, json};

use super::{Answer, Call, alone, files, patched};

const TIMEOUT: Duration = Duration::from_secs(5);
/// How long the kernel may take for what it does in its own time; in a guest that is translated it has
/// little of it.
const PATIENCE: Duration = Duration::from_secs(30);

/// Runs a test as a node: in a thread with a network namespace of its own, so that neither the
/// machine nor another test is touched.
pub fn on_a_node(test: impl FnOnce(Node) + Send) {
    thread::scope(|scope| {
        let node = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            run("ip", &["link", "set", "lo", "up"]);
            test(Node::new());
        });
        if let Err(panic) = node.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

/// Runs a program of the machine here.
pub fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{program} {args:?}: {output:?}");
    text
}

/// The node that the calling thread is in.
pub struct Node {
    dir: tempfile::TempDir,
}

impl Node {
    fn new() -> Self {
        // In memory where possible: the store syncs every file.
        let memory = Path::new("/dev/shm");
        let dir = if memory.is_dir() {
            tempfile::tempdir_in(memory)
        } else {
            tempfile::tempdir()
        };
        Self { dir: dir.unwrap() }
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn store(&self) -> PathBuf {
        self.dir().join("store")
    }

    pub fn socket(&self) -> PathBuf {
        self.dir().join("agent.sock")
    }

    /// A configuration that works with no agent, changed by a patch.
    pub fn conf(&self, patch: &Value) -> Value {
        patched(&alone(self.dir(), "1.1.0"), patch)
    }

    /// Everything that an attachment leaves on a node, as text.
    pub fn traces(&self) -> String {
        let mut text = String::new();
        // Without flags and state, which settle in their own time.
        for link in run("ip", &["-o", "link"]).lines() {
            let name = link.split('<').next().unwrap_or_default();
            let mac = link.split("link/").nth(1).unwrap_or_default();
            text += &format!("{name}{mac}\n");
        }
        for args in [
            &["-4", "route", "show", "table", "all"] as &[_],
            &["-6", "route", "show", "table", "all"],
            &["neigh", "show", "nud", "permanent"],
        ] {
            for line in run("ip", args).lines() {
                // The kernel's own, which comes with an interface's carrier, up to a second later.
                if !line.starts_with("multicast ff00::/8 ") {
                    text += &format!("{line}\n");
                }
            }
        }
        for directory in ["claims", "addresses", "attachments"] {
            for path in files(&self.store().join(directory)).keys() {
                text += &format!("{}\n", path.strip_prefix(self.dir()).unwrap().display());
            }
        }
        text
    }

    /// Host sides of Pods.
    pub fn host_links(&self) -> BTreeSet<String> {
        let links = hachi_net::Netlink::open().unwrap().links().unwrap();
        links
            .into_iter()
            .filter(|link| link.veth)
            .map(|link| link.name)
            .collect()
    }

    /// Addresses in use.
    pub fn used(&self) -> BTreeSet<String> {
        let names = files(&self.store().join("addresses")).into_keys();
        names
            .map(|path| path.file_name().unwrap().to_string_lossy().into_owned())
            .collect()
    }

    /// Waits for what the kernel does in its own time.
    pub fn wait_for(&self, what: &str, mut holds: impl FnMut() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !holds() {
            assert!(
                Instant::now() < deadline,
                "{what} did not come true; there is:\n{}",
                self.traces()
            );
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// A Pod's namespace. Its path leads to no other one when this value is gone, so that a plugin that
/// has the path still, of whichever test in this process, does nothing to another's Pod.
pub struct Pod {
    /// Never closed: the next Pod would have its number.
    file: ManuallyDrop<OwnedFd>,
    path: String,
}

impl Drop for Pod {
    fn drop(&mut self) {
        let nothing = File::open("/dev/null").unwrap();
        nix::unistd::dup3(nothing, &mut self.file, OFlag::O_CLOEXEC).unwrap();
    }
}

impl Pod {
    pub fn new() -> Self {
        let file = thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            run("ip", &["link", "set", "lo", "up"]);
            File::open("/proc/thread-self/ns/net").unwrap()
        });
        let file = file.join().unwrap();
        let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
        let file = ManuallyDrop::new(file.into());
        Self { file, path }
    }

    /// `CNI_NETNS`.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Runs something inside.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                setns(&*self.file, CloneFlags::CLONE_NEWNET).unwrap();
                work()
            });
            inside
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    pub fn ip(&self, args: &[&str]) -> String {
        self.run(|| run("ip", args))
    }

    pub fn add(&self, id: &str, conf: &Value) -> Call {
        Call::new("ADD", conf).container(id, self.path())
    }

    pub fn del(&self, id: &str, conf: &Value) -> Call {
        Call::new("DEL", conf).container(id, self.path())
    }

    /// CHECK of what ADD answered.
    pub fn check(&self, id: &str, conf: &Value, result: &Value) -> Call {
        let conf = patched(conf, &json!({ "prevResult": result }));
        Call::new("CHECK", &conf).container(id, self.path())
    }

    /// Whether TCP and UDP both get from here to an address and back.
    pub fn reaches(&self, server: &Self, address: IpAddr) -> bool {
        let (tcp, udp) = server.run(|| {
            (
                TcpListener::bind((address, 0)).unwrap(),
                UdpSocket::bind((address, 0)).unwrap(),
            )
        });
        let (tcp_at, udp_at) = (tcp.local_addr().unwrap(), udp.local_addr().unwrap());
        thread::scope(|scope| {
            scope.spawn(move || {
                tcp.set_nonblocking(true).unwrap();
                let deadline = Instant::now() + TIMEOUT;
                while Instant::now() < deadline {
                    if let Ok((mut stream, from)) = tcp.accept() {
                        let _ = stream.write_all(from.ip().to_string().as_bytes());
                        return;
                    }
                    thread::sleep(Duration::from_millis(2));
                }
            });
            scope.spawn(move || {
                udp.set_read_timeout(Some(TIMEOUT)).unwrap();
                if let Ok((_, from)) = udp.recv_from(&mut [0; 16]) {
                    let _ = udp.send_to(b"pong", from);
                }
            });
            self.run(|| ask_tcp(tcp_at).is_some() && ask_udp(udp_at))
        })
    }
}

fn ask_tcp(server: SocketAddr) -> Option<String> {
    let mut stream = TcpStream::connect_timeout(&server, TIMEOUT / 2).ok()?;
    stream.set_read_timeout(Some(TIMEOUT)).ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    Some(text)
}

fn ask_udp(server: SocketAddr) -> bool {
    let any = if server.is_ipv4() {
        "0.0.0.0:0"
    } else {
        "[::]:0"
    };
    let socket = UdpSocket::bind(any).unwrap();
    socket.set_read_timeout(Some(TIMEOUT / 2)).unwrap();
    socket.send_to(b"ping", server).is_ok() && socket.recv(&mut [0; 16]).is_ok_and(|n| n == 4)
}

/// The addresses of a result.
pub fn addresses(result: &Value) -> Vec<IpAddr> {
    let ips = result["ips"].as_array().cloned().unwrap_or_default();
    let address = |ip: &Value| ip["address"].as_str()?.split('/').next()?.parse().ok();
    ips.iter().filter_map(address).collect()
}

/// What the fake agent is to say.
type Behaviour = Arc<dyn Fn(&Request) -> Reply + Send + Sync>;

/// An agent that answers as it is told and remembers what it was asked.
pub struct FakeAgent {
    requests: Arc<Mutex<Vec<Request>>>,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl FakeAgent {
    /// One to whom everything is fine.
    pub fn content(node: &Node) -> Self {
        Self::start(node, |request| match request {
            Request::Status => {
                let status = Status {
                    ready: true,
                    ..Status::default()
                };
                Reply::Status {
                    status: Box::new(status),
                }
            }
            Request::Pool => Reply::Pool {
                cidrs: vec!["10.8.0.0/29".parse().unwrap(), "fd08::/64".parse().unwrap()],
                mtu: 1420,
            },
            Request::Pod { .. } => Reply::Pod {
                addresses: Vec::new(),
            },
            _ => Reply::Done,
        })
    }

    pub fn start(
        node: &Node,
        behaviour: impl Fn(&Request) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let (path, log) = (node.socket(), Arc::clone(&requests));
        let behaviour: Behaviour = Arc::new(behaviour);
        let thread = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            let handler = move |request: Request| {
                let (log, behaviour) = (Arc::clone(&log), Arc::clone(&behaviour));
                async move {
                    let reply = behaviour(&request);
                    log.lock().unwrap().push(request);
                    reply
                }
            };
            runtime
                .block_on(serve(&path, handler, async move { drop(stopped.await) }))
                .unwrap();
        });
        node.wait_for("the fake agent's socket", || {
            hachi_api::Client::connect(&node.socket()).is_ok()
        });
        Self {
            requests,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    /// One that refuses to take up endpoints.
    pub fn refusing(node: &Node, code: u32, message: &str) -> Self {
        let message = message.to_owned();
        Self::start(node, move |request| match request {
            Request::AddEndpoint { .. } => Reply::Error {
                error: ApiError {
                    code,
                    message: message.clone(),
                    details: "because".into(),
                },
            },
            _ => Reply::Done,
        })
    }

    /// What was asked since the last time.
    pub fn asked(&self) -> Vec<Request> {
        std::mem::take(&mut self.requests.lock().unwrap())
    }
}

impl Drop for FakeAgent {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Runs many calls at once; the answers are in their order.
pub fn at_once(calls: &[Call]) -> Vec<Answer> {
    let children: Vec<_> = calls.iter().map(Call::start).collect();
    let finish = |child: std::process::Child| {
        let output = child.wait_with_output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        Answer {
            success: output.status.success(),
            stdout: text(output.stdout),
            stderr: text(output.stderr),
        }
    };
    children.into_iter().map(finish).collect()
}

/// Counts how often each value occurs.
pub fn histogram<T: Ord>(values: impl IntoIterator<Item = T>) -> BTreeMap<T, usize> {
    let mut counts = BTreeMap::new();
    for value in values {
        *counts.entry(value).or_insert(0) += 1;
    }
    counts
}
