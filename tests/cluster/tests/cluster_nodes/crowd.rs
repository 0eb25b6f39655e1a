//! Ten thousand connections of fifty Pods to one address and port outside, at once, by one address of
//! their node: each answer finds its Pod, and ports are had again once connections are over.

use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead as _, BufReader, Lines, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream},
    process::{Child, ChildStdout, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use hachi_cluster::{Netns, Running, bed::Spec};

use crate::{changes::run, world::World};

const PODS: usize = 50;
/// Connections of each Pod.
const EACH: usize = 200;

/// The node's ports: for the connections of one round, but not for those of two.
const PORTS: &str = "32768 43999";

/// The other end's port, the same in both rounds: only towards one address and port are there no more
/// ports than the node has.
const PORT: u16 = 7100;

/// How long one step may take.
const WAIT: Duration = Duration::from_secs(20);

/// How long a connection that both ends have closed keeps its port, and somewhat more.
const CLOSED: Duration = Duration::from_secs(12);

/// One end of a connection, with its number.
type Client = (u32, TcpStream);

/// Opens a Pod's connections; each says which one it is.
fn open(netns: &Netns, pod: usize, to: SocketAddr) -> Result<Vec<Client>> {
    netns.enter(|| {
        (0..EACH)
            .map(|i| {
                let number = u32::try_from(pod * EACH + i)?;
                let mut stream = TcpStream::connect_timeout(&to, WAIT)
                    .with_context(|| format!("connection {number}"))?;
                stream.write_all(&number.to_be_bytes())?;
                Ok((number, stream))
            })
            .collect()
    })?
}

/// The other end: a process of its own, since all ends are more than one may have open.
struct Server {
    process: Child,
    says: Lines<BufReader<ChildStdout>>,
}

impl Server {
    fn start(world: &World, at: IpAddr) -> Result<Self> {
        let program = hachi_testutil::dist_dir().join("hachi-pod");
        let count = (PODS * EACH).to_string();
        let mut process = world.cluster().fabric().enter(|| {
            Command::new(&program)
                .args([
                    "hold",
                    &SocketAddr::new(at, PORT).to_string(),
                    "--count",
                    &count,
                ])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
        })??;
        let output = process.stdout.take().context("its output")?;
        Ok(Self {
            process,
            says: BufReader::new(output).lines(),
        })
    }

    fn line(&mut self) -> Result<String> {
        Ok(self.says.next().context("the other end has ended")??)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It ends by itself when its input does; a test that has failed does not wait.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// All of them at once; returns the ports that they left the node by.
fn round(world: &World, pods: &[Running], at: IpAddr) -> Result<BTreeSet<u16>> {
    let mut server = Server::start(world, at)?;
    let to: SocketAddr = server.line()?.parse()?;
    let mut clients = Vec::new();
    for (number, pod) in pods.iter().enumerate() {
        clients.extend(open(&pod.netns, number, to)?);
    }
    let node = world.node_address(0, at.is_ipv4())?;
    let mut ports = BTreeSet::new();
    for peer in server.line()?.split_whitespace() {
        let peer: SocketAddr = peer.parse()?;
        ensure!(peer.ip() == node, "{peer} is not the node");
        ensure!(ports.insert(peer.port()), "two connections are of {peer}");
    }
    ensure!(ports.len() == PODS * EACH, "{} connections", ports.len());
    for (number, stream) in &mut clients {
        stream.set_read_timeout(Some(WAIT))?;
        let mut answer = [0; 4];
        stream.read_exact(&mut answer)?;
        ensure!(
            answer == number.to_be_bytes(),
            "{number} was given the answer of {}",
            u32::from_be_bytes(answer)
        );
    }
    // The Pods close first, and keep what has to be kept of that.
    drop(clients);
    drop(server);
    Ok(ports)
}

/// Two rounds, which need more ports than there are.
pub(crate) fn come_and_go(world: &World) -> Result<()> {
    // Of this process, and of the one with the other ends.
    let own = std::process::id();
    run("prlimit", &format!("--pid {own} --nofile=16384:"))?;
    let node = &world.cluster().nodes()[0].netns;
    node.enter(|| fs::write("/proc/sys/net/ipv4/ip_local_port_range", PORTS))??;
    // Read when an agent starts.
    world.cluster().kill_agent("node1")?;
    world.cluster().start_agent("node1")?;
    world.cluster().wait_agent("node1")?;
    let names: Vec<String> = (0..PODS).map(|i| format!("crowd{i}")).collect();
    let spec = |name| Spec {
        name,
        node: "node1",
        ..Spec::default()
    };
    let specs: Vec<_> = names.iter().map(|name| spec(name.as_str())).collect();
    world.bed.pods(&specs)?;
    let pods = names
        .iter()
        .map(|name| world.cluster().pod(&world.bed.full(&format!("a/{name}"))));
    let pods = pods.collect::<Result<Vec<_>>>()?;
    for at in world.cluster().options().family.fabric() {
        let begin = Instant::now();
        let first = round(world, &pods, at).context("at first")?;
        let took = begin.elapsed();
        thread::sleep(CLOSED);
        let second = round(world, &pods, at).context("with ports used before")?;
        let again = first.intersection(&second).count();
        println!(
            "{at}: {} connections in {took:?}; {again} ports again",
            first.len()
        );
        ensure!(again > 0, "more ports than the node has");
    }
    Ok(())
}
