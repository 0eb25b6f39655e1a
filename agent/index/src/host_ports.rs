//! Ports of this node that lead to a Pod (`hostPort`), as a Service of node ports with one backend.
//!
//! They come with the Pod's interface and not from the API: they work as soon as the interface does,
//! and a node where another plugin of the chain maps ports does not do it twice.

use std::net::{IpAddr, SocketAddr};

use crate::model::{Endpoint, Name, Service, ServicePort};

/// No Service has such a name.
const PREFIX: &str = "pod/";

/// The Service of an interface's ports; none if it has no ports.
pub(crate) fn service(endpoint: &Endpoint) -> Option<Service> {
    let ports = endpoint.host_ports.iter().map(|port| {
        let mut backends: Vec<_> = endpoint
            .addresses
            .iter()
            .filter(|address| suits(port.address, **address))
            .map(|address| SocketAddr::new(*address, port.target))
            .collect();
        backends.sort_unstable();
        ServicePort {
            name: "".into(),
            protocol: port.protocol,
            port: port.port,
            node_port: Some(port.port),
            host_ip: port.address.filter(|address| !address.is_unspecified()),
            local_backends: backends.clone(),
            backends,
            draining: Vec::new(),
        }
    });
    let ports: Vec<_> = ports.collect();
    (!ports.is_empty()).then(|| Service {
        // A Service that has the node's port keeps it; the loss shows among the problems.
        created: i64::MAX,
        // The client's own address is kept: the Pod is here.
        external_local: true,
        ports,
        ..Service::default()
    })
}

/// What the ports of a Pod go by.
pub(crate) fn name(pod: &Name) -> Name {
    Name::new(&pod.namespace, &format!("{PREFIX}{}", pod.name))
}

/// The Pod whose ports go by this name; none if it is a Service's.
#[must_use]
pub fn pod_of_host_ports(name: &Name) -> Option<Name> {
    let pod = name.name.strip_prefix(PREFIX)?;
    Some(Name::new(&name.namespace, pod))
}

/// Whether the Pod's address serves what arrives at the node's; `0.0.0.0` is every one of IPv4.
fn suits(node: Option<IpAddr>, pod: IpAddr) -> bool {
    node.is_none_or(|node| node.is_ipv4() == pod.is_ipv4())
}
