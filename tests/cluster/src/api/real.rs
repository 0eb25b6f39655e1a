//! The real etcd and kube-apiserver, in the namespace of the bridge, and a proxy to them from the
//! machine's loopback.

use std::{
    fmt::Write as _,
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use hachi_apiserver::Grant;
use nix::sched::{CloneFlags, setns};
use tokio::sync::watch;

use super::{Api, Backend, PORT, processes::Processes, rbac};
use crate::{
    cluster,
    names::ClusterId,
    netns::Netns,
    options::{Kubelets, Options},
    run,
    spawn::Place,
};

/// Where the assets are without `KUBEBUILDER_ASSETS`.
const DEFAULT_ASSETS: &str = "/usr/local/kubebuilder/bin";

const SERVERS: [&str; 2] = ["etcd", "kube-apiserver"];
const CONTROLLERS: [&str; 2] = ["kube-controller-manager", "kube-scheduler"];
pub(crate) const KUBELET: &str = "kubelet";

/// How long they may take to be ready.
const LIMIT: Duration = Duration::from_secs(90);

/// The administrator's token. It is good for this cluster alone, which nobody reaches from outside
/// this machine, but whoever may read the kubeconfig.
fn token() -> Result<String> {
    let uuid = fs::read_to_string("/proc/sys/kernel/random/uuid").context("make a token")?;
    Ok(uuid.trim().to_owned())
}

/// The directory of the assets, if all of these are there.
fn assets_with(names: &[&str]) -> Result<PathBuf> {
    let dir = std::env::var_os("KUBEBUILDER_ASSETS")
        .map_or_else(|| PathBuf::from(DEFAULT_ASSETS), PathBuf::from);
    let missing: Vec<_> = names
        .iter()
        .filter(|name| !dir.join(name).is_file())
        .copied()
        .collect();
    if !missing.is_empty() {
        bail!("no {} in {}", missing.join(", "), dir.display());
    }
    Ok(dir)
}

/// The directory of etcd and kube-apiserver, if the machine has them.
pub(super) fn assets() -> Option<PathBuf> {
    assets_with(&SERVERS).ok()
}

/// The directory of these, the controllers and a kubelet.
pub(crate) fn full_assets() -> Result<PathBuf> {
    assets_with(&[&SERVERS[..], &CONTROLLERS, &[KUBELET]].concat())
}

/// The processes and the proxy.
#[derive(Debug)]
pub(super) struct Real {
    processes: Processes,
    /// The administrator's, for this machine.
    kubeconfig: String,
    stop: Option<watch::Sender<()>>,
    proxy: Option<JoinHandle<()>>,
}

impl Real {
    /// Starts kube-apiserver anew. It has no history of what was before: whoever watches lists again.
    pub(super) fn restart(&self) -> Result<()> {
        self.processes.restart(SERVERS[1])?;
        self.wait_ready()
    }

    /// Waits until the API answers; fails at once if one of the processes has ended.
    fn wait_ready(&self) -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("start a runtime")?;
        let client = runtime.block_on(cluster::client(&self.kubeconfig))?;
        let deadline = Instant::now() + LIMIT;
        loop {
            let asked = runtime.block_on(client.request_text(http_get("/readyz")?));
            let Err(error) = asked else { return Ok(()) };
            self.processes.check()?;
            if Instant::now() > deadline {
                return Err(error).context("the API is not ready; see kube-apiserver.log");
            }
            thread::sleep(Duration::from_millis(100));
        }
    }
}

impl Drop for Real {
    fn drop(&mut self) {
        self.processes.end();
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
    let full = options.kubelets == Kubelets::Real;
    let token = token()?;
    let agent = rbac::agent()?;
    write_credentials(&dir, &token, &agent, options)?;
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
    let processes = Processes::new(
        assets,
        id,
        &options.dir,
        Place {
            netns: fabric.path(),
            ..Place::default()
        },
    );
    let real = Real {
        processes,
        kubeconfig: kubeconfig(server, &token),
        stop: Some(stop),
        proxy: Some(proxy),
    };
    let [etcd_name, apiserver_name] = SERVERS;
    real.processes.launch(etcd_name, etcd(&dir))?;
    let arguments = apiserver(&dir, options, inside);
    real.processes.launch(apiserver_name, arguments)?;
    real.wait_ready()?;
    if !full {
        grant(&real.kubeconfig).context("give the agents what the manifest grants")?;
    }
    if full {
        let file = dir.join("controllers.kubeconfig");
        cluster::write_private(&file, &kubeconfig(inside, &token))?;
        for name in CONTROLLERS {
            real.processes
                .launch(name, controller(name, &dir, &file, options))?;
        }
    }
    Ok(Api {
        server,
        kubeconfig: real.kubeconfig.clone(),
        node_kubeconfig: kubeconfig(inside, &agent.token),
        kubelet_kubeconfigs: nodes(options)
            .map(|node| kubeconfig(inside, &node_token(&token, &node)))
            .collect(),
        backend: Backend::Real(real),
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
    let mut arguments = vec![
        "--etcd-servers=http://127.0.0.1:2379".into(),
        format!("--advertise-address={}", inside.ip()),
        format!("--bind-address={any}"),
        format!("--secure-port={PORT}"),
        format!("--cert-dir={}", path("certificates")),
        format!("--service-cluster-ip-range={}", services.join(",")),
        format!("--token-auth-file={}", path("tokens.csv")),
        "--allow-privileged=true".into(),
        "--service-account-issuer=https://kubernetes.default.svc".into(),
        format!(
            "--service-account-signing-key-file={}",
            path("accounts.key")
        ),
        format!("--service-account-key-file={}", path("accounts.pub")),
    ];
    arguments.extend(match options.kubelets {
        Kubelets::Played => vec![
            "--authorization-mode=RBAC".into(),
            // There is no controller that makes accounts.
            "--disable-admission-plugins=ServiceAccount".into(),
        ],
        Kubelets::Real => vec![
            "--authorization-mode=Node,RBAC".into(),
            "--enable-admission-plugins=NodeRestriction".into(),
            "--kubelet-preferred-address-types=InternalIP".into(),
        ],
    });
    arguments
}

/// What the controller manager or the scheduler is told.
fn controller(name: &str, dir: &Path, kubeconfig: &Path, options: &Options) -> Vec<String> {
    let mut arguments = vec![
        format!("--kubeconfig={}", kubeconfig.display()),
        "--leader-elect=false".into(),
    ];
    if name != CONTROLLERS[0] {
        return arguments;
    }
    let blocks = options.family.cluster_cidrs();
    let blocks: Vec<_> = blocks.iter().map(ToString::to_string).collect();
    arguments.extend([
        "--allocate-node-cidrs=true".into(),
        format!("--cluster-cidr={}", blocks.join(",")),
        format!(
            "--service-account-private-key-file={}",
            dir.join("accounts.key").display()
        ),
        // The certificate's file has its authority's too.
        format!(
            "--root-ca-file={}",
            dir.join("certificates/apiserver.crt").display()
        ),
        "--use-service-account-credentials=true".into(),
    ]);
    arguments
}

/// The token of a node's kubelet: as good as the administrator's, it is for this cluster alone.
fn node_token(token: &str, node: &str) -> String {
    format!("{token}-{node}")
}

/// The names of the nodes that have kubelets of their own.
fn nodes(options: &Options) -> impl Iterator<Item = String> {
    let count = match options.kubelets {
        Kubelets::Played => 0,
        Kubelets::Real => options.nodes,
    };
    (1..=count).map(|index| format!("node{index}"))
}

fn write_credentials(dir: &Path, token: &str, agent: &Grant, options: &Options) -> Result<()> {
    let mut tokens = format!(
        "{token},admin,admin,\"system:masters\"\n\
         {},{},agent,\"system:serviceaccounts,system:serviceaccounts:kube-system\"\n",
        agent.token, agent.user
    );
    for node in nodes(options) {
        let token = node_token(token, &node);
        let _ = writeln!(tokens, "{token},system:node:{node},{node},\"system:nodes\"");
    }
    cluster::write_private(&dir.join("tokens.csv"), &tokens)?;
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

/// Makes the ClusterRole of the manifest and its binding.
fn grant(kubeconfig: &str) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start a runtime")?;
    runtime.block_on(async {
        let client = cluster::client(kubeconfig).await?;
        for object in rbac::objects()? {
            let kind = object["kind"].as_str().unwrap_or_default().to_lowercase();
            if !kind.starts_with("clusterrole") {
                continue;
            }
            let path = format!("/apis/rbac.authorization.k8s.io/v1/{kind}s");
            let request = http::Request::post(path)
                .header("content-type", "application/json")
                .body(object.to_string().into_bytes())
                .context("build a request")?;
            let made = client.request::<serde_json::Value>(request).await;
            made.with_context(|| format!("create the {kind} of the manifest"))?;
        }
        Ok(())
    })
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
