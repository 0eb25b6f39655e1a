//! Finds and removes what a cluster leaves: processes, links to namespaces, cgroups, files.
//!
//! Namespaces, mounts, bridges, maps and programs need nothing: they live by descriptors of the
//! supervisor and by its processes. The rest is removed by a *reaper*, a process that waits for the
//! end of the supervisor's pipe, so that it also runs after a SIGKILL.

use std::{
    collections::BTreeSet,
    fs,
    io::Read as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, setsid},
};

use crate::{
    cgroup,
    names::{ClusterId, ID_VARIABLE},
    netns::NETNS_DIR,
    options::Options,
    run, state,
};

/// How long processes that were killed may take to be gone: nothing of the product, and on a busy
/// machine those of a whole cluster take their time.
pub(crate) const END_LIMIT: Duration = Duration::from_secs(20);

/// What a cluster has made on this machine.
#[must_use]
pub fn remains(id: &ClusterId) -> Vec<String> {
    let mut remains: Vec<_> = processes(id)
        .iter()
        .map(|pid| format!("process {pid}: {}", command_line(*pid)))
        .collect();
    remains.extend(
        links(id)
            .iter()
            .map(|path| format!("link {}", path.display())),
    );
    if cgroup::ids().contains(id) {
        remains.push(format!("cgroup {}", id.stem()));
    }
    remains
}

/// Removes all of it; goes on past errors and returns the first.
pub fn clean(id: &ClusterId) -> Result<()> {
    // A process may start another while the list is read.
    let deadline = Instant::now() + END_LIMIT;
    loop {
        let pids = processes(id);
        if pids.is_empty() || Instant::now() >= deadline {
            break;
        }
        for pid in pids {
            if let Ok(pid) = i32::try_from(pid) {
                // Gone already is as good.
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    for link in links(id) {
        let _ = fs::remove_file(link);
    }
    cgroup::destroy(id).with_context(|| format!("remove the cgroup {}", id.stem()))?;
    match remains(id) {
        left if left.is_empty() => Ok(()),
        left => bail!("still there: {}", left.join(", ")),
    }
}

/// Removes what clusters have left whose supervisor and reaper were both killed.
pub fn clean_dead() -> Result<()> {
    let linked = fs::read_dir(NETNS_DIR).into_iter().flatten().flatten();
    let mut ids: BTreeSet<_> = linked
        .filter_map(|entry| ClusterId::of_name(entry.file_name().to_str()?))
        .chain(cgroup::ids())
        .map(|id| id.as_str().to_owned())
        .collect();
    ids.retain(|id| {
        ClusterId::parse(id).is_some_and(|id| !links(&id).iter().any(|link| live(link)))
    });
    for id in ids.iter().filter_map(|id| ClusterId::parse(id)) {
        tracing::info!(
            id = id.as_str(),
            "cleaning up after a cluster that was killed"
        );
        clean(&id)?;
    }
    Ok(())
}

/// Removes the files that have a meaning only while the cluster runs; logs stay.
pub(crate) fn clean_files(dir: &Path) {
    for name in ["kubeconfig", state::FILE, "kubectl-cache", "api"] {
        remove(&dir.join(name));
    }
    for node in children(&dir.join("nodes")) {
        for name in ["run", "netns", "net.d", "bin", "cni"] {
            remove(&node.join(name));
        }
    }
    for file in children(&dir.join("pods"))
        .iter()
        .flat_map(|namespace| children(namespace))
    {
        if file
            .extension()
            .is_some_and(|kind| kind == "json" || kind == "ready")
        {
            remove(&file);
        }
    }
}

fn children(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .collect()
}

fn remove(path: &Path) {
    // What is not there needs no removal; what cannot be removed is only a file.
    let _ = if path.is_dir() {
        fs::remove_dir_all(path)
    } else {
        fs::remove_file(path)
    };
}

fn links(id: &ClusterId) -> Vec<PathBuf> {
    let mut links = children(Path::new(NETNS_DIR));
    links.retain(|path| {
        let name = path.file_name().and_then(|name| name.to_str());
        path.is_symlink() && name.and_then(ClusterId::of_name).as_ref() == Some(id)
    });
    links
}

/// Whether a link still leads to a namespace.
fn live(link: &Path) -> bool {
    let target = fs::read_link(link).and_then(fs::read_link);
    target.is_ok_and(|target| target.to_string_lossy().starts_with("net:["))
}

fn processes(id: &ClusterId) -> Vec<u32> {
    let mark = format!("{ID_VARIABLE}={}", id.as_str());
    children(Path::new("/proc"))
        .iter()
        .filter_map(|path| path.file_name()?.to_str()?.parse().ok())
        .filter(|pid| {
            let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environment
                .split(|byte| *byte == 0)
                .any(|variable| variable == mark.as_bytes())
        })
        .collect()
}

fn command_line(pid: u32) -> String {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&line)
        .replace('\0', " ")
        .trim()
        .to_owned()
}

/// The process that cleans up after this one, however it ends.
#[derive(Debug)]
pub(crate) struct Reaper {
    child: Child,
}

impl Reaper {
    /// Starts it. `made_dir` says that [`NETNS_DIR`] was not there before.
    pub(crate) fn start(id: &ClusterId, options: &Options, made_dir: bool) -> Result<Self> {
        let dir = &options.dir;
        let mut command = Command::new(run::own_binary("hachi-cluster")?);
        command
            .arg("reap")
            .args(["--id", id.as_str()])
            .arg("--dir")
            .arg(dir);
        if made_dir {
            command.arg("--made-netns-dir");
        }
        if options.remove_dir {
            command.arg("--remove-dir");
        }
        let child = command
            .env_remove(ID_VARIABLE)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .context("start the cluster's reaper")?;
        Ok(Self { child })
    }

    /// Has it do its work, and waits.
    pub(crate) fn finish(mut self) -> Result<()> {
        drop(self.child.stdin.take());
        let status = self.child.wait().context("wait for the cluster's reaper")?;
        if !status.success() {
            bail!("the cluster's reaper failed ({status})");
        }
        Ok(())
    }
}

/// What a reaper is told.
#[derive(Debug, clap::Args)]
pub struct Reap {
    /// The cluster's id.
    #[arg(long)]
    id: String,
    /// The directory of links was not there before.
    #[arg(long)]
    made_netns_dir: bool,
    /// Remove the cluster's directory with all that is in it.
    #[arg(long)]
    remove_dir: bool,
}

impl Reap {
    /// Waits for the end of standard input, then cleans.
    pub fn run(&self, dir: &Path) -> Result<()> {
        let id = ClusterId::parse(&self.id).with_context(|| format!("not an id: {}", self.id))?;
        // Ctrl-C goes to every process of the terminal's session; this one has work to do then.
        setsid().context("leave the session")?;
        let mut rest = Vec::new();
        std::io::stdin()
            .read_to_end(&mut rest)
            .context("wait for the cluster's end")?;
        let cleaned = clean(&id);
        if self.remove_dir {
            remove(dir);
        } else {
            clean_files(dir);
        }
        if self.made_netns_dir {
            // Fails while others use it, as it should.
            let _ = fs::remove_dir(NETNS_DIR);
        }
        cleaned
    }
}
