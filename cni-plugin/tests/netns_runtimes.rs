//! Real runtimes run a container on our network and take all of it back: podman with its CNI
//! backend and `portmap` chained, and containerd.

mod support;

use std::{
    io::{BufRead as _, BufReader, Read as _},
    net::TcpStream,
    os::unix::fs::symlink,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use serde_json::{Value, json};
use support::node::{Node, on_a_node};

/// Says what it has as a network, and that it serves once port 80 is open.
const SERVER: &str = "ip -o address show dev eth0; ip route show; \
    exec perl -MIO::Socket::INET -e '\
    $s = IO::Socket::INET->new(LocalPort => 80, Listen => 5, ReuseAddr => 1) or die; \
    $| = 1; print qq(SERVES\n); \
    while ($c = $s->accept) { print $c \"hello\"; close $c }'";

/// In mounts of its own: podman leaves nothing there, and no cgroup v2 beside v1 confuses crun.
const SESSION: &str = r#"
umount -l /sys/fs/cgroup/unified 2>/dev/null
podman="podman --root $DIR/storage --runroot $DIR/run --runtime crun --storage-driver vfs"
limits="--ulimit nofile=1024:1024 --ulimit nproc=1024:1024 --security-opt seccomp=unconfined"
$podman run --detach --name web --network hachi --publish 18080:80 --init=false $limits \
    --volume /usr:/usr:ro --rootfs "$DIR/root" /usr/bin/sh -c "$SERVER" >&2 || exit 1
for i in $(seq 600); do
    $podman logs web 2>&1 | grep -q SERVES && break
    sleep 0.1
done
$podman logs web
echo UP
read wait
$podman rm --force --time 0 web >&2
"#;

fn runs(program: &str) -> bool {
    let output = Command::new(program).arg("--version").output();
    output.is_ok_and(|output| output.status.success())
}

/// The files that a container sees beside the machine's `/usr`.
fn rootfs(root: &Path) {
    for name in ["proc", "sys", "dev", "etc", "run", "tmp", "usr"] {
        std::fs::create_dir_all(root.join(name)).unwrap();
    }
    for name in ["bin", "sbin", "lib", "lib64"] {
        symlink(format!("usr/{name}"), root.join(name)).unwrap();
    }
}

fn conflist(dir: &Path, store: &Path, chained: &[Value]) {
    let ranges = json!([[{"subnet": "10.89.0.0/24"}], [{"subnet": "fd89::/64"}]]);
    let mut plugins = vec![
        json!({"type": "hachi-cni", "agent": "optional", "ipMasq": true,
        "ipam": {"dataDir": store, "ranges": ranges}}),
    ];
    plugins.extend_from_slice(chained);
    let list = json!({"cniVersion": "1.0.0", "name": "hachi", "plugins": plugins});
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join("87-hachi.conflist"), list.to_string()).unwrap();
}

fn plugin() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_hachi-cni"))
}

fn podman_conf(dir: &Path) {
    let plugins = [
        plugin().parent().unwrap(),
        Path::new("/usr/lib/cni"),
        Path::new("/opt/cni/bin"),
    ];
    let conf = format!(
        "[network]\nnetwork_backend = \"cni\"\ncni_plugin_dirs = {plugins:?}\n\
         network_config_dir = {:?}\n[engine]\ncgroup_manager = \"cgroupfs\"\n\
         events_logger = \"file\"\n[containers]\ncgroups = \"disabled\"\nlog_driver = \"k8s-file\"\n",
        dir.join("net.d")
    );
    std::fs::write(dir.join("containers.conf"), conf).unwrap();
}

fn nothing_is_left(node: &Node) {
    node.wait_for("nothing of the container", || {
        node.used().is_empty() && node.host_links().is_empty()
    });
}

#[test]
fn podman_runs_a_container() {
    hachi_testutil::require_root!();
    for program in ["podman", "crun"] {
        if !runs(program) {
            hachi_testutil::skip!("needs {program}: cargo xtask setup installs it");
        }
    }
    on_a_node(|node| {
        // Not in memory, where a container's files may not be run.
        let dir = tempfile::tempdir().unwrap();
        rootfs(&dir.path().join("root"));
        let portmap = json!({"type": "portmap", "capabilities": {"portMappings": true}});
        conflist(&dir.path().join("net.d"), &node.store(), &[portmap]);
        podman_conf(dir.path());
        support::node::run("ip", &["address", "add", "192.0.2.1/32", "dev", "lo"]);
        let log = dir.path().join("log");
        let mut session = Command::new("unshare")
            .args(["--mount", "sh", "-c", SESSION])
            .env("DIR", dir.path())
            .env("SERVER", SERVER)
            .env("CONTAINERS_CONF", dir.path().join("containers.conf"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(&log).unwrap())
            .spawn()
            .unwrap();
        let mut shown = String::new();
        for line in BufReader::new(session.stdout.take().unwrap()).lines() {
            let line = line.unwrap();
            if line == "UP" {
                break;
            }
            shown += &(line + "\n");
        }
        let said = || std::fs::read_to_string(&log).unwrap_or_default();
        for part in [
            "10.89.0.2/32",
            "fd89::2/128",
            "default via 169.254.1.1",
            "SERVES",
        ] {
            assert!(shown.contains(part), "no {part}: {shown}\n{}", said());
        }
        assert_eq!(node.used().len(), 2);
        assert_eq!(node.host_links().len(), 1);

        let at = "192.0.2.1:18080".parse().unwrap();
        let mut client = TcpStream::connect_timeout(&at, Duration::from_secs(5)).unwrap();
        client
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "hello", "over the mapped port");

        drop(session.stdin.take());
        assert!(session.wait().unwrap().success(), "{}", said());
        nothing_is_left(&node);
    });
}

/// containerd looks for configurations and plugins in fixed places.
const CONTAINERD: &str = r#"
umount -l /sys/fs/cgroup/unified 2>/dev/null
for place in etc opt; do
    mkdir -p $DIR/$place
    mount --rbind /$place $DIR/$place || exit 1
    mount -t tmpfs none /$place || exit 1
    for entry in $DIR/$place/*; do ln -s $entry /$place/; done
    rm -f /$place/cni
done
mkdir -p /etc/cni /opt/cni
ln -s $DIR/net.d /etc/cni/net.d
ln -s $(dirname $PLUGIN) /opt/cni/bin
containerd --root $DIR/lib --state $DIR/run --address $DIR/sock >&2 &
daemon=$!
for i in $(seq 600); do [ -S $DIR/sock ] && break; sleep 0.1; done
timeout 60 ctr --address $DIR/sock run --rm --cni \
    --mount type=bind,src=/usr,dst=/usr,options=rbind:ro --rootfs $DIR/root web \
    /usr/bin/sh -c 'ip -o address show dev eth0; ip route show' || { kill $daemon; exit 1; }
kill $daemon
wait $daemon
"#;

#[test]
fn containerd_runs_a_container() {
    hachi_testutil::require_root!();
    for program in ["containerd", "ctr", "runc"] {
        if !runs(program) {
            hachi_testutil::skip!("needs {program}: cargo xtask setup installs it");
        }
    }
    on_a_node(|node| {
        let dir = tempfile::tempdir().unwrap();
        rootfs(&dir.path().join("root"));
        conflist(&dir.path().join("net.d"), &node.store(), &[]);
        let output = Command::new("unshare")
            .args(["--mount", "sh", "-c", CONTAINERD])
            .env("DIR", dir.path())
            .env("PLUGIN", plugin())
            .output()
            .unwrap();
        let shown = String::from_utf8_lossy(&output.stdout);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{shown}\n{said}");
        for part in ["10.89.0.2/32", "fd89::2/128", "default via 169.254.1.1"] {
            assert!(shown.contains(part), "no {part}: {shown}\n{said}");
        }
        nothing_is_left(&node);
    });
}
