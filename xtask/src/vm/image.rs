//! The guest's file system: static tests and binaries, modules, a few tools of the host, the plan.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::build::{BINARIES, static_target};
use crate::cargo::{self, Executable, Metadata, executables};
use crate::repo::Repo;
use crate::shell::Shell;
use crate::test::{Level, level_of, targets, wanted};

use super::cpio::Archive;
use super::module::Module;
use super::protocol::{ENV, GATE, HANG, MODULE, TEST};

/// Where the guest finds the binaries that a node has.
const DIST: &str = "/dist";
/// Tools that tests call, taken from the host with their libraries.
const TOOLS: [&str; 4] = ["/usr/sbin/ip", "/sbin/ip", "/usr/sbin/tc", "/sbin/tc"];

/// Directories that every machine has.
const DIRECTORIES: [&str; 10] = [
    "/dev", "/etc", "/opt", "/proc", "/root", "/run", "/sys", "/tmp", "/usr", "/var",
];

/// The test that loads the programs and reports what the verifier made of them.
const FIRST: &str = "packet_verified";
/// Those of its tests that only do that.
const FIRST_FILTER: &str = "the_verifier_";

/// The one cluster suite that was made for guests.
const CLUSTER: &str = "cluster_kernel";

/// Namespace tests that guests do not run: other plugins, beside which the first runs ours, are Debian's
/// packages with their libraries and netfilter's modules; the others are about crowds, kills and leftovers
/// of the plugin, with time limits that a translated machine does not keep.
const OUTSIDE: [&str; 5] = [
    "netns_chain",
    "netns_kill",
    "netns_operations",
    "netns_runtimes",
    "netns_upkeep",
];

/// Static programs, built once for all kernels.
pub(crate) struct Programs {
    init: PathBuf,
    tests: Vec<Executable>,
    binaries: Vec<Executable>,
    scope: Scope,
}

/// How much of it all a run is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    /// Every test.
    Everything,
    /// The tests that were named.
    Named,
    /// What the verifier makes of the programs: neither modules nor tools are needed.
    Verifier,
}

impl Scope {
    fn new(only: &[String], tests: &[String]) -> Self {
        match (only, tests) {
            ([], _) => Self::Everything,
            (_, [test]) if test == FIRST => Self::Verifier,
            _ => Self::Named,
        }
    }
}

/// A fault to put into the machine, to see that it is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Plant {
    /// A program that the verifier refuses
    Verifier,
    /// A guest that stops doing anything
    Hang,
    /// A guest whose first process dies
    Panic,
}

/// Builds init, the tests that are wanted (all of them, if `only` is empty), and the binaries.
pub(crate) fn build(repo: &Repo, shell: &Shell, only: &[String]) -> Result<Programs> {
    let metadata = Metadata::workspace(repo)?;
    let names = wanted(guest_tests(&metadata), only)?;
    let scope = Scope::new(only, &names);
    let tests = compile(repo, shell, "vm tests: build", "test", &|command| {
        command.arg("--no-run");
        command.args(names.iter().flat_map(|name| ["--test", name]));
    })?;
    let (mut tests, mut binaries): (Vec<_>, Vec<_>) =
        tests.into_iter().partition(|built| built.test);
    // Cargo names them as it finishes them; the same order in every run is easier to read.
    tests.sort_by_key(|built| (rank(&built.name), built.name.clone()));
    let nodes = compile(repo, shell, "vm binaries: build", "build", &|command| {
        command.args(["--bin", "vm-init"]);
        if scope != Scope::Verifier {
            command.args(BINARIES.iter().flat_map(|binary| ["--bin", binary]));
        }
    })?;
    binaries.extend(nodes);
    let init = binaries
        .iter()
        .find(|built| built.name == "vm-init")
        .context("no vm-init")?;
    Ok(Programs {
        init: init.path.clone(),
        tests,
        binaries,
        scope,
    })
}

/// The tests that say something of a kernel.
fn guest_tests(metadata: &Metadata) -> Vec<String> {
    let mut names: Vec<String> = [Level::Packet, Level::Netns, Level::Cluster]
        .into_iter()
        .flat_map(|level| targets(metadata, level))
        .filter(|name| match level_of(name) {
            Level::Cluster => name == CLUSTER,
            _ => !OUTSIDE.contains(&name.as_str()),
        })
        .collect();
    names.sort_by_key(|name| (rank(name), name.clone()));
    names
}

/// The order in which tests run.
fn rank(test: &str) -> u8 {
    match level_of(test) {
        _ if test == FIRST => 0,
        Level::Packet => 1,
        Level::Cluster => 3,
        _ => 2,
    }
}

fn compile(
    repo: &Repo,
    shell: &Shell,
    name: &str,
    task: &str,
    arguments: &dyn Fn(&mut Command),
) -> Result<Vec<Executable>> {
    let mut command = cargo::cargo(repo);
    command
        .args([task, "--message-format=json-render-diagnostics"])
        // Small: all of it is loaded into the guest's memory.
        .env("CARGO_PROFILE_DEV_DEBUG", "0")
        .env("CARGO_PROFILE_DEV_STRIP", "symbols")
        .env("CARGO_TARGET_DIR", repo.target("vm/build"));
    static_target(&mut command)?;
    arguments(&mut command);
    executables(&shell.output(name, &mut command)?)
}

/// Writes the file system.
pub(crate) fn write(
    path: &Path,
    object: &[u8],
    programs: &Programs,
    modules: &[Module],
    plant: Option<Plant>,
    limit: u64,
) -> Result<()> {
    let mut archive = Archive::new(BufWriter::new(File::create(path)?));
    let mut plan = String::new();
    for directory in DIRECTORIES {
        archive.directory(Path::new(directory))?;
    }
    if plant != Some(Plant::Panic) {
        archive.file(Path::new("/init"), &fs::read(&programs.init)?)?;
    } else {
        // A first process that cannot be: the kernel panics.
        archive.file(Path::new("/init"), b"\x7fELF")?;
    }
    for module in modules {
        let file = format!("/modules/{}.ko", module.name);
        archive.file(Path::new(&file), &module.bytes)?;
        writeln!(plan, "{MODULE} {file}")?;
    }
    if programs.scope != Scope::Verifier {
        tools(&mut archive)?;
    }
    for assignment in environment() {
        writeln!(plan, "{ENV} {assignment}")?;
    }
    for built in &programs.binaries {
        // Tests know a binary of their own package by the path at which it was built.
        archive.link(&built.path, &Path::new(DIST).join(&built.name))?;
        archive.file(&Path::new(DIST).join(&built.name), &fs::read(&built.path)?)?;
    }
    if plant == Some(Plant::Hang) {
        writeln!(plan, "{HANG}")?;
    }
    for built in &programs.tests {
        let file = format!("/tests/{}", built.name);
        let mut bytes = fs::read(&built.path)?;
        if plant == Some(Plant::Verifier) {
            break_object(&mut bytes, object);
        }
        archive.file(Path::new(&file), &bytes)?;
        archive.directory(&built.directory)?;
        let directory = built.directory.display();
        // Where the programs do not load, nothing else can pass, and each test would wait for the
        // verifier to say so.
        let kind = if built.name == FIRST { GATE } else { TEST };
        let filter = if programs.scope == Scope::Verifier {
            FIRST_FILTER
        } else {
            ""
        };
        let name = &built.name;
        writeln!(plan, "{kind} {name} {limit} {directory} {file} {filter}")?;
    }
    archive.file(Path::new(super::protocol::PLAN), plan.as_bytes())?;
    archive.finish()?;
    Ok(())
}

fn environment() -> Vec<String> {
    let mut variables = vec![
        "PATH=/usr/sbin:/usr/bin:/sbin:/bin".to_owned(),
        "HOME=/root".to_owned(),
        format!("HACHI_DIST={DIST}"),
        // Named, so that tests can tell; their rules for skips are the host's.
        "HACHI_VM=1".to_owned(),
    ];
    if let Ok(value) = std::env::var("CI") {
        variables.push(format!("CI={value}"));
    }
    variables
}

/// The host's tools with the libraries that they are linked with.
fn tools<W: std::io::Write>(archive: &mut Archive<W>) -> Result<()> {
    let mut done = BTreeSet::new();
    for tool in TOOLS {
        let path = Path::new(tool);
        let Ok(real) = path.canonicalize() else {
            continue;
        };
        let name = path.file_name().context("a tool has a name")?.to_owned();
        if !done.insert(PathBuf::from(&name)) {
            continue;
        }
        archive.file(&Path::new("/usr/sbin").join(&name), &fs::read(&real)?)?;
        let output = Command::new("ldd")
            .arg(&real)
            .output()
            .context("cannot run ldd")?;
        for word in String::from_utf8_lossy(&output.stdout).split_whitespace() {
            if word.starts_with('/') && done.insert(PathBuf::from(word)) {
                let bytes = fs::read(word).with_context(|| format!("cannot read {word}"))?;
                archive.file(Path::new(word), &bytes)?;
            }
        }
    }
    Ok(())
}

/// Puts an instruction that reads a register before it is written at the start of every program
/// in the object that a test carries.
fn break_object(test: &mut [u8], object: &[u8]) {
    // r0 = r9
    const BAD: [u8; 8] = [0xbf, 0x90, 0, 0, 0, 0, 0, 0];
    let Some(at) = find(test, object) else { return };
    for (start, _) in crate::elf::programs(object).unwrap_or_default().values() {
        test[at + start..at + start + BAD.len()].copy_from_slice(&BAD);
    }
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    const STEP: usize = 8;
    let first = needle.get(..STEP)?;
    // `include_bytes_aligned` aligns to 32 bytes in memory, and so in the file.
    (0..haystack.len().saturating_sub(needle.len()))
        .step_by(STEP)
        .find(|at| &haystack[*at..at + STEP] == first && haystack[*at..].starts_with(needle))
}

impl Programs {
    /// What the run is about.
    pub(crate) fn scope(&self) -> Scope {
        self.scope
    }
}

/// Makes sure that a plant will be found: a test carries the object as it is now.
pub(crate) fn carries(programs: &Programs, object: &[u8]) -> Result<()> {
    for built in &programs.tests {
        if find(&fs::read(&built.path)?, object).is_some() {
            return Ok(());
        }
    }
    bail!("no test carries the eBPF object")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_are_wanted_by_name() -> Result<()> {
        let all = || ["packet_verified", "packet", "netns_attach", "pins"].map(str::to_owned);
        let chosen = |only: &[&str]| -> Result<(String, Scope)> {
            let only: Vec<String> = only.iter().map(|name| (*name).to_owned()).collect();
            let names = wanted(all().to_vec(), &only)?;
            Ok((names.join(" "), Scope::new(&only, &names)))
        };
        let everything = (all().join(" "), Scope::Everything);
        assert_eq!(chosen(&[])?, everything);
        let verifier = ("packet_verified".to_owned(), Scope::Verifier);
        assert_eq!(chosen(&["verified"])?, verifier);
        let named = ("packet netns_attach".to_owned(), Scope::Named);
        assert_eq!(chosen(&["netns_attach", "packet"])?, named);
        let error = chosen(&["pods"]).unwrap_err().to_string();
        assert!(error.contains("pods") && error.contains("pins"), "{error}");
        Ok(())
    }

    #[test]
    fn the_object_is_found_inside_a_program() {
        let object = b"\x7fELF-object-";
        let mut program = b"\x7fELF-of-the-program-----".to_vec();
        program.extend_from_slice(object);
        program.extend_from_slice(b"tail");
        assert_eq!(find(&program, object), Some(24));
        assert_eq!(find(&program, b"\x7fELF-another-"), None);
    }
}
