//! What a server is started with.

use std::{
    net::{SocketAddr, TcpListener},
    time::Duration,
};

use ipnet::IpNet;

/// The settings of a server; `Config::default()` is a dual-stack cluster without listeners.
#[derive(Debug)]
pub struct Config {
    /// Where to serve HTTPS. They are bound already, so that one can be inside another network
    /// namespace than the server.
    pub listeners: Vec<TcpListener>,
    /// Further names and addresses of the certificate; those of the listeners, of `advertise`, of
    /// localhost and of the `kubernetes` Service are in it anyway.
    pub names: Vec<String>,
    /// Where nodes and Pods reach the server: the endpoints of the `kubernetes` Service.
    pub advertise: Vec<SocketAddr>,
    /// The ranges that nodes' podCIDRs (/24, /64) are cut from; at most one a family, the first
    /// is the primary family.
    pub cluster_cidrs: Vec<IpNet>,
    /// The ranges of ClusterIPs; at most one a family, the first is the primary family.
    pub service_cidrs: Vec<IpNet>,
    /// Whether kubelets run: a bound Pod that is deleted waits for its node's kubelet to delete it
    /// again with no grace, instead of vanishing at once.
    pub kubelets: bool,
    /// Tokens besides the administrator's, with what they may do.
    pub grants: Vec<Grant>,
    /// How many events of each kind are kept for watches to resume from.
    pub history: usize,
    /// How often a watch that allows bookmarks gets one.
    pub bookmarks: Duration,
}

impl Default for Config {
    fn default() -> Self {
        let nets = |list: [&str; 2]| list.iter().filter_map(|net| net.parse().ok()).collect();
        Self {
            listeners: Vec::new(),
            names: Vec::new(),
            advertise: Vec::new(),
            cluster_cidrs: nets(["10.244.0.0/16", "fd00:10:244::/48"]),
            service_cidrs: nets(["10.96.0.0/16", "fd00:10:96::/112"]),
            kubelets: false,
            grants: Vec::new(),
            history: 20_000,
            bookmarks: Duration::from_secs(5),
        }
    }
}

/// A bearer token and what its bearer may do.
#[derive(Debug, Clone)]
pub struct Grant {
    /// The bearer token.
    pub token: String,
    /// The user's name in messages.
    pub user: String,
    /// What it may do; any one rule suffices.
    pub rules: Vec<Rule>,
}

/// What a [`Grant`] allows, as a rule of an RBAC ClusterRole says it; `*` stands for any.
#[derive(Debug, Clone)]
pub struct Rule {
    /// API groups; empty for the core group.
    pub groups: Vec<String>,
    /// Plural names; a subresource is `pods/status`.
    pub resources: Vec<String>,
    /// `get`, `list`, `watch`, `create`, `update`, `patch`, `delete`, `deletecollection`.
    pub verbs: Vec<String>,
}

/// Why a server did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The settings contradict themselves.
    #[error("the settings of the API server are not usable: {0}")]
    Config(String),
    /// The certificates could not be made.
    #[error("cannot make the API server's certificates: {0}")]
    Certificate(#[from] rcgen::Error),
    /// TLS could not be set up.
    #[error("cannot set up the API server's TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// A listener or the thread could not be set up.
    #[error("cannot set up the API server's sockets: {0}")]
    Io(#[from] std::io::Error),
}
