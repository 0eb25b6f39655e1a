//! Socket load balancing with real sockets: this process moves to a cgroup of its own that the
//! programs are attached to, and speaks to Services whose backends are on the loopback device.
//!
//! One test, because a process is in one cgroup.

mod support;

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use aya::programs::links::PinnedLink;
use hachi_abi::{ABI_VERSION, Service, ServiceFlags, proto};
use hachi_compile::{Frontend, Image, Slots, SlotsId, diff};
use hachi_kernel::{
    Datapath, KernelError, LoadOptions, SocketHook, SocketLb, cgroup_root, remove_all,
};
use support::{World, ip, isolated, require_datapath};

const V4: [&str; 3] = ["10.96.0.10", "127.0.0.2", "127.0.0.3"];
const V6: [&str; 3] = ["fd96::10", "fd00::2", "fd00::3"];

/// A cgroup that this process is in until it is dropped.
struct Cgroup {
    path: PathBuf,
    before: PathBuf,
}

impl Cgroup {
    fn enter() -> Option<Self> {
        let root = cgroup_root()?;
        let own = fs::read_to_string("/proc/self/cgroup").expect("the own cgroup");
        let own = own
            .lines()
            .find_map(|line| line.strip_prefix("0::/"))
            .expect("a cgroup of version 2");
        let path = root.join(format!("hachi-sockets-{}", std::process::id()));
        fs::create_dir(&path).expect("a cgroup");
        let cgroup = Self {
            path,
            before: root.join(own),
        };
        fs::write(cgroup.path.join("cgroup.procs"), "0").expect("moved");
        Some(cgroup)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::write(self.before.join("cgroup.procs"), "0");
        let _ = fs::remove_dir(&self.path);
    }
}

fn address(text: &str, port: u16) -> SocketAddr {
    SocketAddr::new(text.parse().expect("an address"), port)
}

/// The image of Services at one address: by protocol and port, its backends.
fn image(services: &[(&str, u8, u16, u32, &[SocketAddr])]) -> Image {
    let mut image = Image::default();
    for (id, (addr, proto, port, flags, backends)) in services.iter().enumerate() {
        let frontend = Frontend {
            addr: addr.parse().expect("an address"),
            port: *port,
            proto: *proto,
            scope: 0,
        };
        let service = Service {
            id: u32::try_from(id).expect("few Services") + 1,
            count: u32::try_from(backends.len()).expect("few backends"),
            flags: *flags,
            ..Service::default()
        };
        let slots = Slots {
            backends: backends.to_vec(),
            members: backends.to_vec(),
            ..Slots::default()
        };
        if !slots.is_empty() {
            let id = SlotsId::of(&frontend, &service);
            image.slots.insert(id, Arc::new(slots));
        }
        image.services.insert(frontend, service);
    }
    image
}

/// Answers every datagram with its own address.
fn serve_udp(at: SocketAddr) {
    let socket = UdpSocket::bind(at).expect("a server");
    std::thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Ok((_, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(at.to_string().as_bytes(), from);
        }
    });
}

/// Accepts connections in the kernel, which is enough to connect.
fn serve_tcp(at: SocketAddr) -> TcpListener {
    TcpListener::bind(at).expect("a server")
}

fn client(of: SocketAddr) -> UdpSocket {
    let any: IpAddr = if of.is_ipv4() {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    };
    let socket = UdpSocket::bind((any, 0)).expect("a client");
    socket
        .set_read_timeout(Some(Duration::from_secs(10)))
        .expect("a timeout");
    socket
}

/// Sends without connecting; returns who answered, as the answer says and as the socket is shown.
fn ask(socket: &UdpSocket, to: SocketAddr) -> io::Result<(String, SocketAddr)> {
    socket.send_to(b"?", to)?;
    let mut buffer = [0; 64];
    let (length, from) = socket.recv_from(&mut buffer)?;
    Ok((
        String::from_utf8_lossy(&buffer[..length]).into_owned(),
        from,
    ))
}

fn apply(datapath: &mut Datapath, old: &mut Image, new: Image) {
    datapath.apply(&diff(old, &new)).expect("applied");
    *old = new;
}

fn load(world: &World, sockets: SocketLb) -> Datapath {
    Datapath::load(&LoadOptions {
        sockets,
        ..world.options()
    })
    .expect("the datapath loads")
}

/// An IPv4 address as IPv6 sockets have it.
fn mapped(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(ip) => SocketAddr::new(ip.to_ipv6_mapped().into(), address.port()),
        IpAddr::V6(_) => address,
    }
}

#[test]
fn sockets_speak_to_services() {
    require_datapath!();
    let Some(cgroup) = Cgroup::enter() else {
        hachi_testutil::skip!("needs a cgroup2 mount");
    };
    isolated(|world| {
        ip(&["link", "set", "lo", "up"]);
        world.veth("any");
        for address in &V6[1..] {
            ip(&[
                "address",
                "add",
                &format!("{address}/128"),
                "dev",
                "any",
                "nodad",
            ]);
        }
        ip(&["link", "set", "any", "up"]);
        ip(&["link", "set", "anyp", "up"]);
        let mut datapath = world.load();
        assert!(!datapath.sockets_attached());
        let error = datapath
            .attach_sockets(Path::new("/proc"))
            .expect_err("no cgroup");
        assert!(matches!(error, KernelError::NoCgroup { .. }), "{error}");
        datapath.attach_sockets(&cgroup.path).expect("attached");
        datapath
            .attach_sockets(&cgroup.path)
            .expect("attached again");
        assert!(datapath.sockets_attached());

        let mut now = Image::default();
        for texts in [V4, V6] {
            let backends = [address(texts[1], 5353), address(texts[2], 5353)];
            let services = address(texts[0], 53);
            tcp(&mut datapath, &mut now, services, backends);
            udp(&mut datapath, &mut now, services, backends);
        }

        // With the next agent sockets are served on; one that serves the node alone is told so.
        let service = address(V4[0], 53);
        let services: &[(&str, u8, u16, u32, &[SocketAddr])] =
            &[(V4[0], proto::UDP, 53, 0, &[address(V4[1], 5353)])];
        apply(&mut datapath, &mut now, image(services));
        drop(datapath);
        ask(&client(service), service).expect("served without an agent");
        let mut datapath = load(world, SocketLb::Node);
        datapath.attach_sockets(&cgroup.path).expect("taken over");
        ask(&client(service), service).expect("of this namespace");
        datapath.detach_sockets().expect("detached");
        datapath.detach_sockets().expect("detached twice");
        assert!(!datapath.sockets_attached());
        ask(&client(service), service).expect_err("no Service any more");
        // What the sockets had is known until it is taken from them.
        let all = datapath.flows().expect("tables").take_sockets(|_| true);
        assert!(!all.expect("taken").is_empty());
        let none = datapath.flows().expect("tables").take_sockets(|_| true);
        assert!(none.expect("taken").is_empty());

        // An uninstall too ends what is attached at once, whoever else holds its links.
        datapath.attach_sockets(&cgroup.path).expect("attached");
        ask(&client(service), service).expect("served");
        let pins = world.pin_root.join(format!("v{ABI_VERSION}/sockets"));
        let held = fs::read_dir(pins).expect("pins").map(|pin| {
            let pin = pin.expect("a pin").path();
            PinnedLink::from_pin(pin).expect("a link")
        });
        let held = held.collect::<Vec<_>>();
        assert_eq!(held.len(), SocketHook::ALL.len());
        drop(datapath);
        remove_all(&world.pin_root).expect("removed");
        ask(&client(service), service).expect_err("no Service any more");
        drop(held);
    });
}

fn tcp(datapath: &mut Datapath, now: &mut Image, service: SocketAddr, backends: [SocketAddr; 2]) {
    let addr = &service.ip().to_string();
    let listeners = backends.map(serve_tcp);
    let with = |flags: u32, backends: &[SocketAddr]| {
        let rejected: &[SocketAddr] = &[];
        // The port 0 stands for all that the address does not have.
        image(&[
            (addr, proto::TCP, service.port(), flags, backends),
            (addr, 0, 0, 0, rejected),
        ])
    };
    apply(datapath, now, with(0, &backends));
    for listener in &listeners {
        listener.set_nonblocking(true).expect("set");
    }
    let accept = |chosen: &mut [i32; 2]| {
        for (listener, count) in listeners.iter().zip(chosen) {
            while listener.accept().is_ok() {
                *count += 1;
            }
        }
    };
    for to in [service, mapped(service)] {
        let mut chosen = [0; 2];
        for _ in 0..40 {
            let stream = TcpStream::connect(to).expect("a connection");
            // getpeername.
            assert_eq!(stream.peer_addr().expect("a peer"), to);
            accept(&mut chosen);
        }
        // A connection is its client's before it is its server's.
        let deadline = Instant::now() + Duration::from_secs(10);
        while chosen.iter().sum::<i32>() < 40 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
            accept(&mut chosen);
        }
        assert_eq!(chosen.iter().sum::<i32>(), 40);
        // 40 coins on one side: once in 5e11 runs.
        assert!(chosen.iter().all(|count| *count > 0), "{chosen:?}");
    }
    // What is no Service's is left alone.
    let direct = TcpStream::connect(backends[0]).expect("a connection");
    assert_eq!(direct.peer_addr().expect("a peer"), backends[0]);
    // A port that the Service has not, and one without backends.
    let refused = |to: SocketAddr| TcpStream::connect(to).expect_err("no backend").kind();
    let other = SocketAddr::new(service.ip(), 9);
    assert!(is_refusal(refused(other)));
    apply(datapath, now, with(0, &[]));
    assert!(is_refusal(refused(service)));
    assert!(is_refusal(refused(mapped(service))));
    apply(datapath, now, with(ServiceFlags::DROP_WHEN_EMPTY, &[]));
    let kind = refused(service);
    assert!(
        matches!(
            kind,
            io::ErrorKind::HostUnreachable | io::ErrorKind::PermissionDenied
        ),
        "{kind:?}"
    );
}

/// Before Linux 6.1 programs cannot choose the error.
fn is_refusal(kind: io::ErrorKind) -> bool {
    let choice = aya::sys::is_helper_supported(
        aya::programs::ProgramType::CgroupSockAddr,
        aya::sys::BpfHelper::BPF_FUNC_set_retval,
    );
    if choice.expect("a probe") {
        kind == io::ErrorKind::ConnectionRefused
    } else {
        kind == io::ErrorKind::PermissionDenied
    }
}

fn udp(datapath: &mut Datapath, now: &mut Image, service: SocketAddr, backends: [SocketAddr; 2]) {
    let addr = &service.ip().to_string();
    let with = |backends: &[SocketAddr]| image(&[(addr, proto::UDP, service.port(), 0, backends)]);
    backends.into_iter().for_each(serve_udp);
    apply(datapath, now, with(&backends));
    let mut names = Vec::new();
    for _ in 0..40 {
        // Connected: shown the Service by getpeername and recvfrom.
        let socket = client(service);
        socket.connect(service).expect("connected");
        assert_eq!(socket.peer_addr().expect("a peer"), service);
        socket.send(b"?").expect("sent");
        let mut buffer = [0; 64];
        let (length, from) = socket.recv_from(&mut buffer).expect("an answer");
        assert_eq!(from, service);
        names.push(String::from_utf8_lossy(&buffer[..length]).into_owned());
    }
    names.sort_unstable();
    names.dedup();
    assert_eq!(names, backends.map(|backend| backend.to_string()));

    // Unconnected, on sockets of both families: the same backend every time, also when another one
    // comes and the slots are in another order.
    let sockets = [
        (client(service), service),
        (client(mapped(service)), mapped(service)),
    ];
    for (socket, to) in &sockets {
        apply(datapath, now, with(&backends));
        let (first, from) = ask(socket, *to).expect("an answer");
        assert_eq!(from, *to);
        for _ in 0..5 {
            assert_eq!(ask(socket, *to).expect("an answer"), (first.clone(), *to));
        }
        let kept: SocketAddr = first.parse().expect("an address");
        let gone = backends.into_iter().find(|b| *b != kept).expect("another");
        apply(datapath, now, with(&[kept]));
        assert_eq!(ask(socket, *to).expect("an answer"), (first.clone(), *to));
        apply(datapath, now, with(&[gone, kept]));
        assert_eq!(ask(socket, *to).expect("an answer"), (first.clone(), *to));
        // With the backend gone, the next datagram goes to another.
        apply(datapath, now, with(&[gone]));
        assert_eq!(
            ask(socket, *to).expect("an answer"),
            (gone.to_string(), *to)
        );
    }
    apply(datapath, now, with(&[]));
    let error = sockets[0].0.send_to(b"?", service).expect_err("no backend");
    assert!(is_refusal(error.kind()), "{error}");
    // The socket is still good for others.
    ask(&sockets[0].0, backends[0]).expect("an answer");
}
