//! Services, joined with their endpoints.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use hachi_policy::Protocol;
use ipnet::IpNet;

/// A Service with its backends, as this node serves it; or the `hostPort`s of a Pod of this node,
/// which are nothing else: a node port with one backend.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Service {
    /// When it was created, in seconds; the older of two that claim one address has it.
    pub created: i64,
    /// Its own addresses.
    pub cluster_ips: Vec<IpAddr>,
    /// `externalIPs`, sorted.
    pub external_ips: Vec<IpAddr>,
    /// The addresses of its load balancer that packets arrive with, sorted.
    pub load_balancer_ips: Vec<IpAddr>,
    /// Who may use `load_balancer_ips`: `None` for everybody.
    pub source_ranges: Option<Vec<IpNet>>,
    /// Whether `cluster_ips` lead to backends of this node alone (`internalTrafficPolicy: Local`).
    pub internal_local: bool,
    /// Whether what arrives from outside the cluster is led to backends of this node alone
    /// (`externalTrafficPolicy: Local`).
    pub external_local: bool,
    /// Session affinity by client address, in seconds.
    pub affinity: Option<u32>,
    /// Where load balancers ask whether this node has backends.
    pub health_check: Option<HealthCheck>,
    /// Ports.
    pub ports: Vec<ServicePort>,
}

/// Whether a load balancer should send traffic of a Service to this node
/// (`healthCheckNodePort`, for `externalTrafficPolicy: Local`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    /// The port of this node that is asked.
    pub port: u16,
    /// Addresses of this node that have a ready endpoint of the Service.
    pub local_endpoints: u32,
}

/// A port of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// Name; empty if it has none.
    pub name: Arc<str>,
    /// Protocol.
    pub protocol: Protocol,
    /// Port.
    pub port: u16,
    /// Port on the node's own addresses.
    pub node_port: Option<u16>,
    /// The address that `node_port` is bound to: a `hostIP`. `None` for all of the node's.
    pub host_ip: Option<IpAddr>,
    /// Usable backends in the whole cluster, of both families, sorted. Those that topology prefers,
    /// where it does.
    pub backends: Vec<SocketAddr>,
    /// Usable backends on this node, of both families, sorted.
    pub local_backends: Vec<SocketAddr>,
    /// Endpoints that still serve while they terminate, used or not: flows that have them keep them.
    pub draining: Vec<SocketAddr>,
}
