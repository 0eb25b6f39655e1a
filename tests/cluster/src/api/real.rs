//! The real etcd and kube-apiserver, in the namespace of the bridge, and a proxy to them from the
//! machine's loopback.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    process::Child,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::sched::{CloneFlags, setns};
use tokio::sync::watch;

use super::{Api, Backend, PORT};
use crate::{
    cluster,
    names::ClusterId,
    netns::Netns,
    options::Options,
    run,
    spawn::{Launch, Place},
};

/// Where the assets are without `KUBEBUILDER_ASSETS`.
const DEFAULT_ASSETS: &str = "/usr/local/kubebuilder/bin";

/// How long they may take to be ready.
const LIMIT: Duration = Duration::from_secs(90);

/// The administrator's token. It is good for this cluster alone, which nobody reaches from outside
/// this machine, but whoever may read the kubeconfig.
fn token() -> Result<String> {
    let uuid = fs::read_to_string("/proc/sys/kernel/random/uuid").context("make a token")?;
    Ok(uuid.trim().to_owned())
}

/// The directory of etcd and kube-apiserver, if the machine has them.
pub(super) fn assets() -> Option<PathBuf> {
    let dir = std::env::var_os("KUBEBUILDER_ASSETS")
        .map_or_else(|| PathBuf::from(DEFAULT_ASSETS), PathBuf::from);
    let both = ["etcd", "kube-apiserver"]
        .iter()
        .all(|name| dir.join(name).is_file());
    both.then_some(dir)
}

/// The two processes and the proxy.
#[derive(Debug)]
pub(super) struct Real {
    processes: Vec<Child>,
    stop: Option<watch::Sender<()>>,
    proxy: Option<JoinHandle<()>>,
}

impl Real {
    /// Waits until the API answers; fails at once if one of the processes has ended.
    fn wait_ready(&mut self, kubeconfig: &str, logs: &Path) -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("start a runtime")?;
        let client = runtime.block_on(cluster::client(kubeconfig))?;
        let deadline = Instant::now() + LIMIT;
        let see = || format!("see etcd.log and kube-apiserver.log in {}", logs.display());
        loop {
            let asked = runtime.block_on(client.request_text(http_get("/readyz")?));
            let Err(error) = asked else { return Ok(()) };
            for process in &mut self.processes {
                if let Some(status) = process.try_wait().context("look after the API")? {
                    bail!("etcd or kube-apiserver ended ({status}); {}", see());
                }
            }
            if Instant::now() > deadline {
                return Err(error).with_context(|| format!("the API is not ready; {}", see()));
            }
            thread::sleep(Duration::from_millis(100));
        }
    }
}

impl Drop for Real {
    fn drop(&mut self) {
        for process in self.processes.iter_mut().rev() {
            // One that has ended by itself is as good.
            let _ = process.kill();
            let _ = process.wait();
        }
        self.stop = None;
        if let Some(proxy) = self.proxy.take()
            && proxy.join().is_err()
        {
            tracing::warn!("the API's proxy panicked");
        }
    }
}

pub(super) fn start(
    assets: &Path,
    id: &ClusterId,
    options: &Options,
    fabric: &Netns,
) -> Result<Api> {
    let dir = options.dir.join("api");
    fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    let token = token()?;
    write_credentials(&dir, &token)?;
    let address = *options
        .family
        .fabric()
        .first()
        .context("no address family")?;
    let inside = SocketAddr::new(address, PORT);
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("listen on the loopback")?;
    let server = listener
        .local_addr()
        .context("ask for the listener's port")?;
    let (stop, stopped) = watch::channel(());
    let proxy = proxy(listener, inside, fabric, stopped)?;
    let mut real = Real {
        processes: Vec::new(),
        stop: Some(stop),
        proxy: Some(proxy),
    };

    let place = Place {
        netns: fabric.path(),
        ..Place::default()
    };
    let parent = std::process::id().to_string();
    let mut launch = |name: &str, arguments: Vec<String>| -> Result<()> {
        let flags = ["--die-with", parent.as_str()];
        let mut launch = Launch::new(&place, id, &flags, assets.join(name))?;
        launch.command().args(arguments);
        launch.log_to(&options.dir.join(format!("{name}.log")))?;
        real.processes.push(launch.start()?);
        Ok(())
    };
    launch("etcd", etcd(&dir))?;
    launch("kube-apiserver", apiserver(&dir, options, inside))?;
    let kubeconfig_here = kubeconfig(server, &token);
    real.wait_ready(&kubeconfig_here, &options.dir)?;
    Ok(Api {
        server,
        kubeconfig: kubeconfig_here,
        node_kubeconfig: kubeconfig(inside, &token),
        backend: Backend::Real { _running: real },
    })
}

fn etcd(dir: &Path) -> Vec<String> {
    // The namespace is the cluster's own: its loopback's ports are free.
    let client = "http://127.0.0.1:2379";
    vec![
        format!("--data-dir={}", dir.join("etcd").display()),
        format!("--listen-client-urls={client}"),
        format!("--advertise-client-urls={client}"),
        "--listen-peer-urls=http://127.0.0.1:2380".into(),
        // Nothing of it outlives the cluster.
        "--unsafe-no-fsync=true".into(),
    ]
}

fn apiserver(dir: &Path, options: &Options, inside: SocketAddr) -> Vec<String> {
    let path = |name: &str| dir.join(name).display().to_string();
    let services: Vec<_> = options
        .family
        .service_cidrs()
        .iter()
        .map(ToString::to_string)
        .collect();
    let any = if inside.is_ipv4() { "0.0.0.0" } else { "::" };
    vec![
        "--etcd-servers=http://127.0.0.1:2379".into(),
        format!("--advertise-address={}", inside.ip()),
        format!("--bind-address={any}"),
        format!("--secure-port={PORT}"),
        format!("--cert-dir={}", path("certificates")),
        format!("--service-cluster-ip-range={}", services.join(",")),
        format!("--token-auth-file={}", path("tokens.csv")),
        "--authorization-mode=RBAC".into(),
        "--allow-privileged=true".into(),
        "--service-account-issuer=https://kubernetes.default.svc".into(),
        format!(
            "--service-account-signing-key-file={}",
            path("accounts.key")
        ),
        format!("--service-account-key-file={}", path("accounts.pub")),
        // There is no controller that makes accounts.
        "--disable-admission-plugins=ServiceAccount".into(),
    ]
}

fn write_credentials(dir: &Path, token: &str) -> Result<()> {
    cluster::write_private(
        &dir.join("tokens.csv"),
        &format!("{token},admin,admin,\"system:masters\"\n"),
    )?;
    let key = dir.join("accounts.key").display().to_string();
    let public = dir.join("accounts.pub").display().to_string();
    openssl(&["genrsa", "-out", &key, "2048"])?;
    openssl(&["rsa", "-in", &key, "-pubout", "-out", &public])
}

fn openssl(arguments: &[&str]) -> Result<()> {
    let mut command = std::process::Command::new("openssl");
    let output = run::with_input(command.args(arguments), b"")
        .context("run openssl, which makes the key of service accounts (install it)")?;
    if !output.status.success() {
        bail!(
            "openssl: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}

/// The server signs its certificate itself, so clients are told not to ask who it is.
fn kubeconfig(server: SocketAddr, token: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: local\n\
         clusters: [{{name: local, cluster: {{server: \"https://{server}\", \
         insecure-skip-tls-verify: true}}}}]\n\
         contexts: [{{name: local, context: {{cluster: local, user: admin}}}}]\n\
         users: [{{name: admin, user: {{token: \"{token}\"}}}}]\n"
    )
}

fn http_get(path: &str) -> Result<http::Request<Vec<u8>>> {
    http::Request::get(path)
        .body(Vec::new())
        .context("build a request")
}

/// Hands connections on from a thread inside the namespace, so that its sockets are made there.
fn proxy(
    listener: TcpListener,
    to: SocketAddr,
    fabric: &Netns,
    mut stopped: watch::Receiver<()>,
) -> Result<JoinHandle<()>> {
    let netns = fabric.file().try_clone().context("share the namespace")?;
    listener
        .set_nonblocking(true)
        .context("prepare the listener")?;
    let body = move || {
        if let Err(error) = setns(netns.as_fd(), CloneFlags::CLONE_NEWNET) {
            tracing::error!(%error, "the API's proxy cannot enter its namespace");
            return;
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        let Ok(runtime) = runtime else { return };
        runtime.block_on(async {
            let Ok(listener) = tokio::net::TcpListener::from_std(listener) else {
                return;
            };
            loop {
                tokio::select! {
                    accepted = listener.accept() => {
                        if let Ok((stream, _)) = accepted {
                            tokio::spawn(hand_on(stream, to));
                        }
                    }
                    // The sender is gone: the end.
                    _ = stopped.changed() => return,
                }
            }
        });
    };
    thread::Builder::new()
        .name("proxy".into())
        .spawn(body)
        .context("start the API's proxy")
}

async fn hand_on(mut from: tokio::net::TcpStream, to: SocketAddr) {
    // Until the server listens, clients see connections that end, and try again.
    if let Ok(mut stream) = tokio::net::TcpStream::connect(to).await {
        let _ = tokio::io::copy_bidirectional(&mut from, &mut stream).await;
    }
}
