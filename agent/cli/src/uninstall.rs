//! `hachi uninstall`: takes everything of Hachi off a node, when its agent has ended.
//!
//! Pods that still run keep their interfaces, addresses and routes, and with these plain
//! connectivity; what is needed to delete them (the plugin, the address store) stays with them. The
//! command ends with another exit code then, or waits for them (`--wait`), or cuts them off
//! (`--force`).
//!
//! ```text
//! CNI configuration ─> programs, maps, pins ─┬─ Pods run ─> say what stays and why: exit code 3
//!                                            └─ none ─> devices, routes, settings, plugin, files
//! ```
//! Every step looks for what is there, so doing it again, or after a crash half-way, is right.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
    process::ExitCode,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use hachi_api::Attachment;
use hachi_net::{
    Changes, Exclusive, HOST_IFNAME, Masquerade, Netlink, Store, VXLAN_IFNAME, ensure_routes,
    is_host_ifname, is_retired_ifname,
};
use nix::mount::umount;
use serde_json::Value;

use crate::install::{PLUGIN, unlink_loopback};

/// The exit code if something has to stay for the sake of Pods.
const PODS_REMAIN: u8 = 3;
/// How often `--wait` looks.
const PERIOD: Duration = Duration::from_secs(2);
/// What the agent appends to the names of configurations that it puts aside.
const ASIDE: &str = "hachi-aside";

/// Options of the command.
#[derive(Args)]
pub(crate) struct Options {
    /// The runtime's plugin directory, as it is seen from here.
    #[arg(long, default_value = "/opt/cni/bin")]
    cni_bin_dir: PathBuf,

    /// The runtime's configuration directory, as it is seen from here.
    #[arg(long, default_value = "/etc/cni/net.d")]
    cni_conf_dir: PathBuf,

    /// Directory that hachi-cni keeps addresses and attachments in.
    #[arg(long, default_value = "/var/lib/cni/hachi")]
    data_dir: PathBuf,

    /// Directory of the agent's socket.
    #[arg(long, default_value = "/run/hachi")]
    run_dir: PathBuf,

    /// Directory on a bpffs that programs and maps are pinned in.
    #[arg(long, default_value = hachi_kernel::DEFAULT_PIN_ROOT)]
    bpf_root: PathBuf,

    /// Wait for Pods that still run to be deleted, and finish then.
    #[arg(long, conflicts_with = "force")]
    wait: bool,

    /// Cut off Pods that still run: their interfaces are deleted.
    #[arg(long)]
    force: bool,
}

/// Does it, and says what was done.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let mut told = BTreeSet::new();
    loop {
        let pods = Node::open(options)?.remove()?;
        if pods.is_empty() {
            break;
        }
        let names: BTreeSet<_> = pods.iter().map(name).collect();
        if told != names {
            println!("{}", what_stays(&names));
            told = names;
        }
        if !options.wait {
            return Ok(ExitCode::from(PODS_REMAIN));
        }
        thread::sleep(PERIOD);
    }
    println!("nothing of Hachi is left on this node");
    Ok(ExitCode::SUCCESS)
}

fn name(attachment: &Attachment) -> String {
    match &attachment.pod {
        Some(pod) => format!("{}/{}", pod.namespace, pod.name),
        None => format!("container {}", attachment.id.container_id),
    }
}

fn what_stays(pods: &BTreeSet<String>) -> String {
    let mut text = format!(
        "{} Pods with addresses of Hachi still run on this node:\n",
        pods.len()
    );
    for pod in pods {
        text += &format!("  {pod}\n");
    }
    text + "They reach each other, this node, and other nodes' Pods where plain routes lead there. Nothing \
           judges or translates\ntheir packets any more: no NetworkPolicy, no Service, no masquerade, no \
           tunnel. Their interfaces and routes, the plugin and\nthe address store stay until they are \
           deleted, and so does the CNI configuration if it is the only\none (a runtime without any deletes no \
           Pods; new ones wait): delete them and run this again (or use --wait), or cut them off with --force."
}

/// What is about to be taken off.
struct Node<'a> {
    options: &'a Options,
    /// No agent may start meanwhile.
    _lock: Option<Exclusive>,
    /// The same, on the BPF file system, which cannot be unmounted while this is open.
    bpf_lock: Option<Exclusive>,
}

impl<'a> Node<'a> {
    fn open(options: &'a Options) -> Result<Self> {
        let lock = |directory: &Path| {
            let locked = directory.exists().then(|| Exclusive::directory(directory));
            locked
                .transpose()
                .context("the agent of this node has to end first (kubectl delete -f install.yaml)")
        };
        Ok(Self {
            options,
            _lock: lock(&options.data_dir)?,
            bpf_lock: lock(&options.bpf_root)?,
        })
    }

    /// Removes what can be removed; returns the attachments that keep the rest.
    fn remove(mut self) -> Result<Vec<Attachment>> {
        let pods = self.attachments()?;
        let stays = !pods.is_empty() && !self.options.force;
        self.configuration(stays)?;
        if let Err(errors) = hachi_kernel::remove_all(&self.options.bpf_root) {
            bail!("programs or maps are still there: {}", list(&errors));
        }
        if stays {
            return Ok(pods);
        }
        self.network()?;
        // Its directory is gone with the pins.
        drop(self.bpf_lock.take());
        self.settings()?;
        self.files()?;
        Ok(Vec::new())
    }

    /// The configurations that were put aside have their turn again, and ours goes: no Pod is started
    /// with Hachi from here on. A runtime without any configuration does not even delete Pods, so while
    /// some of ours run (`pods`) ours stays if there is no other. Without the agent it lets no new Pod start.
    fn configuration(&self, pods: bool) -> Result<()> {
        for aside in files(&self.options.cni_conf_dir)? {
            if aside.extension() != Some(OsStr::new(ASIDE)) {
                continue;
            }
            let path = aside.with_extension("");
            if path.exists() {
                println!(
                    "{} is there already, {} stays",
                    path.display(),
                    aside.display()
                );
                continue;
            }
            fs::rename(&aside, &path)
                .with_context(|| format!("cannot rename {}", aside.display()))?;
            println!("{} is back", path.display());
        }
        let files = files(&self.options.cni_conf_dir)?;
        let (ours, others): (Vec<_>, Vec<_>) = files.iter().partition(|path| is_ours(path));
        if pods && !others.iter().any(|path| is_configuration(path)) {
            return Ok(());
        }
        ours.into_iter().try_for_each(|path| remove_file(path))
    }

    /// The attachments whose interfaces are still there. Others are nobody's any more.
    fn attachments(&self) -> Result<Vec<Attachment>> {
        if !self.options.data_dir.exists() {
            return Ok(Vec::new());
        }
        let (mut found, unreadable) = Store::open(&self.options.data_dir)?.attachments()?;
        for error in unreadable {
            println!("{error}");
        }
        let links: BTreeSet<_> = Netlink::open()?
            .links()?
            .into_iter()
            .map(|link| link.name)
            .collect();
        found.retain(|attachment| links.contains(&attachment.host_ifname));
        Ok(found)
    }

    /// Interfaces, with the routes through them, the routes to other nodes, and the plugin's own
    /// masquerade.
    fn network(&self) -> Result<()> {
        let mut netlink = Netlink::open()?;
        for link in netlink.links()? {
            let pods = is_host_ifname(&link.name) || is_retired_ifname(&link.name);
            let ours = pods || [VXLAN_IFNAME, HOST_IFNAME].contains(&link.name.as_str());
            if ours && netlink.delete_link(&link.name)? {
                println!("interface {} removed", link.name);
            }
        }
        let routes = ensure_routes(&mut netlink, &BTreeMap::new())?;
        if !routes.errors.is_empty() {
            bail!("routes are still there: {}", list(&routes.errors));
        }
        if routes.deleted > 0 {
            println!("{} routes to other nodes removed", routes.deleted);
        }
        for network in self.networks()? {
            Masquerade::of(&network).retain(&BTreeSet::new())?;
        }
        Ok(())
    }

    /// The names of the networks that have or had Pods here.
    fn networks(&self) -> Result<BTreeSet<String>> {
        if !self.options.data_dir.exists() {
            return Ok(BTreeSet::new());
        }
        let (claims, _) = Store::open(&self.options.data_dir)?.claims()?;
        Ok(claims.into_iter().map(|claim| claim.network).collect())
    }

    /// Kernel settings and mounts, as they were before.
    fn settings(&self) -> Result<()> {
        if !self.options.data_dir.exists() {
            return Ok(());
        }
        let changes = Changes::of(&self.options.data_dir)?;
        let restored = changes.restore()?;
        for (file, value) in restored.settings {
            println!("{} is {value} again", file.display());
        }
        for file in restored.foreign {
            println!("{} was changed by others and is left alone", file.display());
        }
        if !restored.errors.is_empty() {
            bail!(
                "kernel settings are not as before: {}",
                list(&restored.errors)
            );
        }
        for path in changes.mounts()? {
            // Others may have come to use it.
            if unused(&path) && umount(&path).is_ok() {
                println!("{} unmounted", path.display());
            } else {
                println!("{} stays mounted: it is in use", path.display());
            }
        }
        Ok(())
    }

    /// The plugin, and what Hachi remembers.
    fn files(&self) -> Result<()> {
        unlink_loopback(&self.options.cni_bin_dir).context("cannot remove the link loopback")?;
        remove_file(&self.options.cni_bin_dir.join(PLUGIN))?;
        for directory in [&self.options.data_dir, &self.options.run_dir] {
            match empty(directory) {
                Ok(true) => println!("{} removed", directory.display()),
                Ok(false) => {}
                Err(error) => {
                    return Err(error)
                        .with_context(|| format!("cannot remove {}", directory.display()));
                }
            }
        }
        Ok(())
    }
}

/// Removes a directory with all that is in it; `false` if there is nothing. One that is a mount point
/// (a volume of the container that this runs in) is emptied.
fn empty(directory: &Path) -> std::io::Result<bool> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    let mut any = false;
    for entry in entries {
        let entry = entry?;
        any = true;
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    match fs::remove_dir(directory) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::ResourceBusy => Ok(any),
        Err(error) => Err(error),
    }
}

fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Ok(()) => println!("{} removed", path.display()),
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => {
            return Err(error).with_context(|| format!("cannot remove {}", path.display()));
        }
    }
    Ok(())
}

/// The files of a directory, which may be absent.
fn files(directory: &Path) -> Result<Vec<PathBuf>> {
    let listed = || format!("cannot read {}", directory.display());
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(listed),
    };
    let mut found = Vec::new();
    for entry in entries {
        found.push(entry.with_context(listed)?.path());
    }
    found.sort();
    Ok(found)
}

/// Whether a BPF file system holds nothing but what the kernel itself puts into a new one, where it has
/// `CONFIG_BPF_PRELOAD` (`kernel/bpf/inode.c`).
fn unused(bpffs: &Path) -> bool {
    const PRELOADED: [&str; 2] = ["maps.debug", "progs.debug"];
    fs::read_dir(bpffs).is_ok_and(|mut entries| {
        entries.all(|entry| {
            entry.is_ok_and(|entry| PRELOADED.iter().any(|name| entry.file_name() == *name))
        })
    })
}

/// Whether runtimes read a file as a configuration.
fn is_configuration(path: &Path) -> bool {
    let extensions = ["conflist", "conf", "json"].map(OsStr::new);
    path.extension()
        .is_some_and(|extension| extensions.contains(&extension))
}

/// Whether a file is a configuration whose first plugin is Hachi's, or the rest of one.
fn is_ours(path: &Path) -> bool {
    let is = |end: &str| path.extension() == Some(OsStr::new(end));
    if is("tmp") {
        return path.with_extension("").extension() == Some(OsStr::new("conflist"))
            && reads_as_ours(path);
    }
    is("conflist") && reads_as_ours(path)
}

fn reads_as_ours(path: &Path) -> bool {
    let text = fs::read(path).unwrap_or_default();
    serde_json::from_slice::<Value>(&text).is_ok_and(|value| value["plugins"][0]["type"] == PLUGIN)
}

fn list(errors: &[impl ToString]) -> String {
    let texts: Vec<_> = errors.iter().map(ToString::to_string).collect();
    texts.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: &str = r#"{"cniVersion":"1.0.0","name":"hachi","plugins":[{"type":"hachi-cni"}]}"#;

    fn options(root: &Path) -> Options {
        Options {
            cni_bin_dir: root.join("bin"),
            cni_conf_dir: root.join("net.d"),
            data_dir: root.join("state"),
            run_dir: root.join("run"),
            bpf_root: root.join("bpf"),
            wait: false,
            force: false,
        }
    }

    fn names(directory: &Path) -> Vec<String> {
        let found = files(directory).unwrap();
        let name = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().to_owned();
        found.iter().map(name).collect()
    }

    #[test]
    fn a_node_that_never_had_it_is_left_as_it_is() {
        let root = tempfile::tempdir().unwrap();
        let options = options(root.path());
        let node = Node::open(&options).unwrap();
        node.configuration(false).unwrap();
        node.settings().unwrap();
        node.files().unwrap();
        assert_eq!(names(root.path()), [""; 0]);
    }

    #[test]
    fn configurations_that_were_put_aside_have_their_turn_again() {
        let root = tempfile::tempdir().unwrap();
        let options = options(root.path());
        let net = &options.cni_conf_dir;
        fs::create_dir(net).unwrap();
        for (name, text) in [
            ("10-hachi.conflist", OURS),
            ("10-hachi.conflist.tmp", OURS),
            ("05-old.conflist.hachi-aside", "{}"),
            ("06-two.conf.hachi-aside", "{}"),
            ("06-two.conf", "{}"),
            ("87-podman.conflist", r#"{"plugins":[{"type":"bridge"}]}"#),
            ("readme.txt", "hachi-cni"),
        ] {
            fs::write(net.join(name), text).unwrap();
        }
        for _ in 0..2 {
            Node::open(&options).unwrap().configuration(true).unwrap();
            let expected = [
                "05-old.conflist",
                "06-two.conf",
                "06-two.conf.hachi-aside",
                "87-podman.conflist",
                "readme.txt",
            ];
            assert_eq!(names(net), expected);
        }
    }

    #[test]
    fn the_only_configuration_stays_while_pods_have_to_be_deleted() {
        let root = tempfile::tempdir().unwrap();
        let options = options(root.path());
        let net = &options.cni_conf_dir;
        fs::create_dir(net).unwrap();
        for (name, text) in [("10-hachi.conflist", OURS), ("readme.txt", "")] {
            fs::write(net.join(name), text).unwrap();
        }
        let node = Node::open(&options).unwrap();
        node.configuration(true).unwrap();
        assert_eq!(names(net), ["10-hachi.conflist", "readme.txt"]);
        node.configuration(false).unwrap();
        assert_eq!(names(net), ["readme.txt"]);
    }

    #[test]
    fn a_bpffs_is_unused_with_what_the_kernel_puts_there_alone() {
        let root = tempfile::tempdir().unwrap();
        assert!(unused(root.path()));
        for name in ["maps.debug", "progs.debug"] {
            fs::write(root.path().join(name), "").unwrap();
        }
        assert!(unused(root.path()));
        fs::create_dir(root.path().join("another")).unwrap();
        assert!(!unused(root.path()));
        assert!(!unused(&root.path().join("absent")));
    }

    #[test]
    fn its_files_go_and_others_stay() {
        let root = tempfile::tempdir().unwrap();
        let options = options(root.path());
        for directory in ["bin", "state/addresses", "run"] {
            fs::create_dir_all(root.path().join(directory)).unwrap();
        }
        for file in [
            "bin/hachi-cni",
            "bin/portmap",
            "state/addresses/10.0.0.2",
            "run/agent.sock",
        ] {
            fs::write(root.path().join(file), "").unwrap();
        }
        Node::open(&options).unwrap().files().unwrap();
        assert_eq!(names(root.path()), ["bin"]);
        assert_eq!(names(&options.cni_bin_dir), ["portmap"]);
    }

    #[test]
    fn a_running_agent_is_not_pulled_away_from_under_its_pods() {
        let root = tempfile::tempdir().unwrap();
        let options = options(root.path());
        fs::create_dir(&options.data_dir).unwrap();
        let _agent = Exclusive::directory(&options.data_dir).unwrap();
        let error = format!("{:#}", Node::open(&options).err().unwrap());
        assert!(error.contains("has to end first"), "{error}");
    }
}
