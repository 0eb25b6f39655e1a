//! The first process of the virtual machines that `cargo xtask test vm` boots: mounts what tests need,
//! loads modules, runs the plan's tests, powers off.
//!
//! Static, and alone in its file system: there is no shell, no libc and no modprobe beside it.
#![forbid(unsafe_code)]

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};

#[path = "../../vm/protocol.rs"]
mod protocol;

use protocol::{BEGIN, DONE, END, ENV, GATE, HANG, MODULE, PLAN, TEST, UP};

/// The terminal for the tests' output; the kernel's console is another, so that neither garbles the
/// other.
const TERMINAL: &str = "/dev/ttyS1";

fn main() {
    if !nix::unistd::getpid().as_raw().eq(&1) {
        eprintln!("the first process of a test machine: cargo xtask test vm runs it");
        std::process::exit(2);
    }
    if let Err(error) = run() {
        // To the kernel's console, which xtask shows when something is missing at the end.
        eprintln!("vm-init: {error:#}");
    }
    // Whether this powers off or resets, QEMU ends (-no-reboot).
    let _ = reboot(RebootMode::RB_AUTOBOOT);
}

fn run() -> Result<()> {
    mounts()?;
    let mut terminal = terminal()?;
    writeln!(terminal, "{UP}")?;
    if let Err(error) = loopback() {
        writeln!(terminal, "vm-init: no loopback: {error:#}")?;
    }
    let plan = fs::read_to_string(PLAN).context("no plan")?;
    let mut variables = Vec::new();
    for line in plan.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            [MODULE, path] => {
                if let Err(error) = load(path) {
                    writeln!(terminal, "vm-init: cannot load {path}: {error:#}")?;
                }
            }
            [ENV, assignment] => variables.extend(assignment.split_once('=')),
            [
                kind @ (TEST | GATE),
                name,
                limit,
                directory,
                program,
                arguments @ ..,
            ] => {
                writeln!(terminal, "{BEGIN}{name}")?;
                let started = Instant::now();
                let mut command = Command::new(program);
                command
                    .args(arguments)
                    .current_dir(directory)
                    .envs(variables.iter().copied());
                let limit = Duration::from_secs(limit.parse().context("a test's limit")?);
                let status = test(&mut command, &terminal, limit);
                let status =
                    status.unwrap_or_else(|error| format!("error:{error}").replace(' ', "_"));
                // libtest does not always end its last line.
                writeln!(
                    terminal,
                    "\n{END}{name} {status} {}",
                    started.elapsed().as_millis()
                )?;
                if *kind == GATE && status != "0" {
                    writeln!(
                        terminal,
                        "vm-init: {name} failed, so the rest was not tried"
                    )?;
                    break;
                }
            }
            [HANG] => loop {
                std::thread::sleep(Duration::from_secs(3600));
            },
            _ => writeln!(
                terminal,
                "vm-init: the plan says {line:?}, which means nothing"
            )?,
        }
    }
    writeln!(terminal, "{DONE}")?;
    nix::unistd::sync();
    // What is still in the serial port's buffer would be lost with the machine.
    nix::sys::termios::tcdrain(&terminal).context("cannot drain the terminal")
}

fn mounts() -> Result<()> {
    const MOUNTS: [(&str, &str, &str); 5] = [
        ("proc", "/proc", "proc"),
        ("sysfs", "/sys", "sysfs"),
        ("devtmpfs", "/dev", "devtmpfs"),
        ("cgroup2", "/sys/fs/cgroup", "cgroup2"),
        ("bpf", "/sys/fs/bpf", "bpf"),
    ];
    for (source, target, kind) in MOUNTS {
        fs::create_dir_all(target).with_context(|| format!("cannot create {target}"))?;
        match mount(
            Some(source),
            target,
            Some(kind),
            MsFlags::empty(),
            None::<&str>,
        ) {
            // Some kernels mount /dev themselves.
            Ok(()) | Err(nix::Error::EBUSY) => {}
            Err(error) => return Err(error).with_context(|| format!("cannot mount {target}")),
        }
    }
    fs::create_dir_all("/run/netns").context("cannot create /run/netns")?;
    std::os::unix::fs::symlink("/run", "/var/run").context("cannot link /var/run")
}

/// Brings the loopback interface up, as every machine has it. The quick mode has no tool for it, and
/// no use.
fn loopback() -> Result<()> {
    const IP: &str = "/usr/sbin/ip";
    if !std::path::Path::new(IP).exists() {
        return Ok(());
    }
    let status = Command::new(IP)
        .args(["link", "set", "lo", "up"])
        .status()
        .context(IP)?;
    anyhow::ensure!(status.success(), "ip: {status}");
    Ok(())
}

/// The tests' terminal, without the line discipline's changes of what passes.
fn terminal() -> Result<File> {
    use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};
    let terminal = OpenOptions::new()
        .read(true)
        .write(true)
        .open(TERMINAL)
        .context(TERMINAL)?;
    let mut settings = tcgetattr(&terminal).context(TERMINAL)?;
    cfmakeraw(&mut settings);
    tcsetattr(&terminal, SetArg::TCSANOW, &settings).context(TERMINAL)?;
    Ok(terminal)
}

fn load(path: &str) -> Result<()> {
    let file = File::open(path)?;
    match finit_module(&file, c"", ModuleInitFlags::empty()) {
        Ok(()) | Err(nix::Error::EEXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Runs a test to its end or its limit.
fn test(command: &mut Command, terminal: &File, limit: Duration) -> Result<String> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(terminal.try_clone()?)
        .stderr(terminal.try_clone()?)
        .spawn()?;
    let started = Instant::now();
    while started.elapsed() < limit {
        if let Some(status) = child.try_wait()? {
            return Ok(describe(status));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    kill(&mut child)?;
    Ok("time-limit".to_owned())
}

fn kill(child: &mut Child) -> Result<()> {
    child.kill()?;
    child.wait()?;
    Ok(())
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => code.to_string(),
        (None, Some(signal)) => format!("signal-{signal}"),
        (None, None) => "unknown".to_owned(),
    }
}
