//! Whatever ends a cluster, nothing of it is left on the machine.

use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, ChildStdout, Command, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use hachi_cluster::{
    Cluster, ClusterId, Family, Options, State, cleanup, eventually,
    netns::NETNS_DIR,
    workload::probe::{Protocol, Target},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// How long the end may take.
const LIMIT: Duration = Duration::from_secs(20);

const POD: &str = "
apiVersion: v1
kind: Pod
metadata: {name: pod}
spec: {containers: [{name: main, image: server}]}
";

/// What a cluster could leave behind, of the machine and not of this test's directory.
#[derive(Debug, PartialEq, Eq)]
struct Machine {
    mounts: BTreeSet<String>,
    links: BTreeSet<String>,
    routes: String,
    forwarding: Vec<Option<String>>,
    netns_dir: bool,
}

impl Machine {
    fn now() -> Result<Self> {
        let lines = |text: &str| text.lines().map(str::to_owned).collect();
        let mounts = fs::read_to_string("/proc/self/mountinfo").context("list the mounts")?;
        let links = fs::read_dir("/sys/class/net").context("list the links")?;
        let routes = Command::new("ip")
            .args(["route", "show", "table", "all"])
            .output()?;
        Ok(Self {
            mounts: lines(&mounts),
            links: links
                .flatten()
                .map(|link| link.file_name().to_string_lossy().into_owned())
                .collect(),
            routes: String::from_utf8_lossy(&routes.stdout).into_owned(),
            forwarding: ["ipv4/ip_forward", "ipv6/conf/all/forwarding"]
                .map(|name| fs::read_to_string(Path::new("/proc/sys/net").join(name)).ok())
                .into(),
            netns_dir: Path::new(NETNS_DIR).exists(),
        })
    }

    /// Waits until the machine is as it was and nothing carries the cluster's id.
    fn is_back(&self, id: &ClusterId) -> Result<()> {
        eventually(LIMIT, || {
            let left = cleanup::remains(id);
            ensure!(left.is_empty(), "left behind: {}", left.join("\n"));
            Ok(())
        })?;
        self.is_back_itself()
    }

    fn is_back_itself(&self) -> Result<()> {
        eventually(LIMIT, || {
            let now = Self::now()?;
            ensure!(now == *self, "the machine was {self:#?}\nand is {now:#?}");
            Ok(())
        })
    }
}

fn options(dir: &Path) -> Options {
    Options::new(dir, hachi_testutil::dist_dir(), Family::Dual)
}

/// A cluster with a Pod that answers, so that there is something to leave behind.
fn busy(options: Options) -> Result<Cluster> {
    let cluster = Cluster::start(options)?;
    cluster.apply(POD)?;
    cluster.wait_ready("default")?;
    let node = format!("node/{}", cluster.pod("default/pod")?.node);
    let to = Target::new(Protocol::Tcp, cluster.pod_ip("default/pod")?, 80);
    let outcome = cluster.probe(&node, to, Duration::from_secs(5))?;
    ensure!(
        outcome.answered(),
        "the Pod's node does not reach it: {outcome}"
    );
    // The check below would see nothing if it looked in the wrong places.
    let kinds = ["process", "link"];
    let there = cleanup::remains(cluster.id());
    for kind in kinds {
        ensure!(
            there.iter().any(|what| what.starts_with(kind)),
            "no {kind} in {there:?}"
        );
    }
    Ok(cluster)
}

/// `hachi-cluster up` as a person runs it, in the foreground or not.
fn command(dir: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hachi-cluster"));
    command
        .arg("--dir")
        .arg(dir)
        .arg("--dist")
        .arg(hachi_testutil::dist_dir())
        .args(arguments);
    command
}

fn up(dir: &Path) -> Result<State> {
    let output = command(dir, &["up"]).output().context("run up")?;
    ensure!(
        output.status.success(),
        "up: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    State::running(dir)
}

fn signal(pid: u32, signal: Signal) -> Result<()> {
    kill(Pid::from_raw(i32::try_from(pid)?), signal).context("send a signal")
}

fn id(state: &State) -> Result<ClusterId> {
    ClusterId::parse(&state.id).context("not an id")
}

/// Each test looks at the whole machine, so no two may run at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

macro_rules! require_cluster {
    () => {
        hachi_testutil::require_root!();
        hachi_testutil::require_binaries!("hachi-cni", "hachi-agent");
        let _alone = alone();
    };
}

#[test]
fn an_orderly_end_leaves_nothing() {
    require_cluster!();
    let dir = tempfile::tempdir().unwrap();
    let before = Machine::now().unwrap();
    let cluster = busy(options(dir.path())).unwrap();
    let id = cluster.id().clone();
    cluster.stop().unwrap();
    before.is_back(&id).unwrap();
    assert!(!dir.path().join("kubeconfig").exists());
    assert!(State::read(dir.path()).unwrap().is_none());
}

#[test]
fn a_panic_leaves_nothing() {
    require_cluster!();
    let dir = tempfile::tempdir().unwrap();
    let before = Machine::now().unwrap();
    let path = dir.path().to_owned();
    let thread = std::thread::spawn(move || {
        let cluster = busy(options(&path)).unwrap();
        std::panic::panic_any(cluster.id().clone());
    });
    let panic = thread.join().unwrap_err();
    let id = panic
        .downcast::<ClusterId>()
        .expect("the cluster did not even start");
    before.is_back(&id).unwrap();
}

#[test]
fn a_start_that_fails_leaves_nothing() {
    require_cluster!();
    let dir = tempfile::tempdir().unwrap();
    let before = Machine::now().unwrap();
    // An agent that ends at once.
    let dist = dir.path().join("dist");
    fs::create_dir(&dist).unwrap();
    std::os::unix::fs::symlink("/bin/false", dist.join("hachi-agent")).unwrap();
    let options = Options {
        dist,
        ..options(&dir.path().join("cluster"))
    };
    let error = Cluster::start(options).unwrap_err();
    assert!(format!("{error:#}").contains("is not ready"), "{error:#}");
    before.is_back_itself().unwrap();
}

#[test]
fn exec_runs_a_program_there_and_passes_its_exit_code_on() {
    require_cluster!();
    let dir = tempfile::tempdir().unwrap();
    let before = Machine::now().unwrap();
    let state = up(dir.path()).unwrap();
    let exec = |target: &str, program: &[&str]| {
        let arguments = [&["exec", target, "--"], program].concat();
        command(dir.path(), &arguments).output().unwrap()
    };
    let address = exec("node/node1", &["ip", "-4", "-o", "address", "show", "eth0"]);
    let address = String::from_utf8_lossy(&address.stdout).into_owned();
    assert!(address.contains("172.30.0.11/24"), "{address}");
    let own = fs::read_link("/proc/self/ns/mnt").unwrap();
    let mounts = exec("node/node1", &["readlink", "/proc/self/ns/mnt"]);
    assert_ne!(
        String::from_utf8_lossy(&mounts.stdout).trim(),
        own.to_string_lossy()
    );
    assert_eq!(
        exec("node/node2", &["sh", "-c", "exit 7"]).status.code(),
        Some(7)
    );
    let nowhere = exec("default/nobody", &["true"]);
    assert_eq!(nowhere.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&nowhere.stderr).contains("no Pod default/nobody"));
    // What still runs inside ends with the cluster.
    let mut forever = command(dir.path(), &["exec", "node/node1", "--", "sleep", "600"])
        .spawn()
        .unwrap();
    signal(state.pid, Signal::SIGTERM).unwrap();
    before.is_back(&id(&state).unwrap()).unwrap();
    assert!(!forever.wait().unwrap().success());
}

#[test]
fn up_and_down_leave_nothing() {
    require_cluster!();
    let dir = tempfile::tempdir().unwrap();
    let before = Machine::now().unwrap();
    let state = up(dir.path()).unwrap();
    let second = command(dir.path(), &["up"]).output().unwrap();
    assert!(
        !second.status.success(),
        "a second cluster started in the same directory"
    );
    let down = command(dir.path(), &["down"]).output().unwrap();
    assert!(
        down.status.success(),
        "{}",
        String::from_utf8_lossy(&down.stderr)
    );
    before.is_back(&id(&state).unwrap()).unwrap();
    let again = command(dir.path(), &["down"]).output().unwrap();
    assert!(
        again.status.success(),
        "{}",
        String::from_utf8_lossy(&again.stderr)
    );
}

#[test]
fn a_killed_supervisor_leaves_nothing() {
    require_cluster!();
    let dir = tempfile::tempdir().unwrap();
    let before = Machine::now().unwrap();
    let state = up(dir.path()).unwrap();
    signal(state.pid, Signal::SIGKILL).unwrap();
    before.is_back(&id(&state).unwrap()).unwrap();
}

#[test]
fn down_cleans_up_after_a_supervisor_and_a_reaper_that_were_killed() {
    require_cluster!();
    let dir = tempfile::tempdir().unwrap();
    let before = Machine::now().unwrap();
    let state = up(dir.path()).unwrap();
    let id = id(&state).unwrap();
    signal(reaper_of(&state).unwrap(), Signal::SIGKILL).unwrap();
    signal(state.pid, Signal::SIGKILL).unwrap();
    eventually(LIMIT, || {
        ensure!(!state.alive(), "the supervisor lives");
        Ok(())
    })
    .unwrap();
    let left = cleanup::remains(&id);
    assert!(
        !left.is_empty(),
        "with nobody to clean up, there is something to clean"
    );
    let down = command(dir.path(), &["down"]).output().unwrap();
    assert!(
        down.status.success(),
        "{}",
        String::from_utf8_lossy(&down.stderr)
    );
    // Nobody was left to remove the directory of links, which this cluster may have made.
    if !before.netns_dir {
        let _ = fs::remove_dir(NETNS_DIR);
    }
    before.is_back(&id).unwrap();
}

#[test]
fn ctrl_c_leaves_nothing() {
    require_cluster!();
    let dir = tempfile::tempdir().unwrap();
    let before = Machine::now().unwrap();
    let mut up = command(dir.path(), &["up", "--foreground"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let _output = wait_for(&mut up, "Ctrl-C ends it.").unwrap();
    let state = State::running(dir.path()).unwrap();
    signal(up.id(), Signal::SIGINT).unwrap();
    assert!(up.wait().unwrap().success());
    before.is_back(&id(&state).unwrap()).unwrap();
}

#[test]
fn ctrl_c_in_the_middle_of_the_start_leaves_nothing() {
    require_cluster!();
    let dir = tempfile::tempdir().unwrap();
    let before = Machine::now().unwrap();
    for (nodes, step) in [
        ("3", "making the bridge"),
        ("3", "registering"),
        ("2", "agents"),
    ] {
        let mut up = command(dir.path(), &["up", "--nodes", nodes])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let _output = wait_for(&mut up, step).unwrap();
        signal(up.id(), Signal::SIGINT).unwrap();
        let status = up.wait().unwrap();
        // The last step may be over before the signal comes.
        let running = State::running(dir.path()).is_ok();
        assert!(status.success() == running, "{status}, running: {running}");
        command(dir.path(), &["down"]).output().unwrap();
        // A reaper's last acts would take files, and the directory of links, from the next round.
        eventually(LIMIT, || {
            let left = reapers(&dir.path().canonicalize()?.to_string_lossy())?;
            ensure!(left.is_empty(), "after {step} there are reapers: {left:?}");
            Ok(())
        })
        .unwrap();
        before
            .is_back_itself()
            .with_context(|| format!("after {step}"))
            .unwrap();
    }
}

/// Reads up to a line with that text; returns the rest, for a pipe that breaks is an end too.
fn wait_for(child: &mut Child, text: &str) -> Result<BufReader<ChildStdout>> {
    let mut output = BufReader::new(child.stdout.take().context("no output to read")?);
    let mut line = String::new();
    while output.read_line(&mut line)? > 0 {
        if line.contains(text) {
            return Ok(output);
        }
        line.clear();
    }
    bail!("it ended without saying {text:?}")
}

fn reaper_of(state: &State) -> Result<u32> {
    let found = reapers(&state.id)?;
    found.first().copied().context("the cluster has no reaper")
}

/// The reapers that were told this: an id or a directory.
fn reapers(told: &str) -> Result<Vec<u32>> {
    let processes = fs::read_dir("/proc")?.flatten().filter_map(|entry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).ok()?;
        let words: Vec<_> = line.split('\0').collect();
        let reaps = words.contains(&"reap") && words.contains(&told);
        reaps.then_some(pid)
    });
    Ok(processes.collect())
}
