//! A large cluster as its API server tells of it, for measurements.
//!
//! One hundred nodes, so that every hundredth Pod is of this node; namespaces of two hundred Pods of
//! twenty applications, ten Pods alike each; three endpoints a Service.

use hachi_index::{Endpoint, EndpointKey, Index, Object, PodName};
use serde_json::{Value, json};

/// Nodes; this one is the first.
pub(crate) const NODES: usize = 100;
/// Pods of a namespace.
pub(crate) const NAMESPACE_SIZE: usize = 200;
/// Applications of a namespace.
pub(crate) const APPS: usize = 20;

/// How large the cluster is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Size {
    /// Pods of all nodes.
    pub(crate) pods: usize,
    /// `NetworkPolicy` objects.
    pub(crate) policies: usize,
    /// Services.
    pub(crate) services: usize,
}

impl Size {
    /// How many namespaces the Pods fill.
    pub(crate) fn namespaces(self) -> usize {
        self.pods.div_ceil(NAMESPACE_SIZE)
    }

    /// Everything in it, as the API's JSON; nothing is held but what is asked for next.
    pub(crate) fn objects(self) -> impl Iterator<Item = Value> {
        let namespaces = (0..self.namespaces()).map(namespace);
        let pods = (0..self.pods).map(|n| pod(n, app_of(n)));
        let policies = (0..self.policies).map(move |n| policy(n, self.namespaces(), 80));
        let services = (0..self.services).flat_map(move |n| service(n, self.pods, true));
        namespaces.chain(pods).chain(policies).chain(services)
    }

    /// An index that was told all of it, and of this node's interfaces.
    pub(crate) fn index(self) -> Index {
        let mut index = Index::new("n0");
        for value in self.objects() {
            index.apply(object(value));
        }
        self.endpoints().for_each(|it| index.add_endpoint(it));
        index
    }

    /// The interfaces of this node's Pods.
    pub(crate) fn endpoints(self) -> impl Iterator<Item = Endpoint> {
        (0..self.pods).step_by(NODES).map(endpoint)
    }
}

/// What the agent's watch makes of the API's JSON.
pub(crate) fn object(value: Value) -> Object {
    let kind = value["kind"].as_str().unwrap_or_default().to_owned();
    let parsed = match kind.as_str() {
        "Pod" => serde_json::from_value(value).map(Object::Pod),
        "Namespace" => serde_json::from_value(value).map(Object::Namespace),
        "Service" => serde_json::from_value(value).map(Object::Service),
        "EndpointSlice" => serde_json::from_value(value).map(Object::EndpointSlice),
        _ => serde_json::from_value(value).map(Object::NetworkPolicy),
    };
    parsed.expect("a valid object")
}

/// The address of a Pod.
pub(crate) fn address(pod: usize) -> String {
    format!("10.{}.{}.{}", 1 + pod / 65536, pod / 256 % 256, pod % 256)
}

/// The application of a Pod: of neighbours on one node, different ones.
pub(crate) fn app_of(pod: usize) -> usize {
    (pod + pod / NODES) % APPS
}

/// A namespace.
pub(crate) fn namespace(n: usize) -> Value {
    json!({"kind": "Namespace",
        "metadata": {"name": format!("ns{n}"), "labels": {"team": format!("t{}", n % 7)}}})
}

/// A Pod of an application.
pub(crate) fn pod(n: usize, app: usize) -> Value {
    let namespace = n / NAMESPACE_SIZE;
    json!({"kind": "Pod",
        "metadata": {"namespace": format!("ns{namespace}"), "name": format!("pod{n}"),
                     "uid": format!("00000000-0000-0000-0000-{n:012}"),
                     "labels": {"app": format!("app{app}"), "pod-template-hash": format!("h{app}"),
                                "tier": if app.is_multiple_of(2) { "front" } else { "back" }}},
        "spec": {"nodeName": format!("n{}", n % NODES), "containers": [
            {"name": "c", "ports": [{"name": "http", "containerPort": 8080}]}]},
        "status": {"phase": "Running", "podIPs": [{"ip": address(n)}]}})
}

/// A policy for an application of a namespace: by labels, ports, blocks.
pub(crate) fn policy(n: usize, namespaces: usize, port: usize) -> Value {
    let app = n / namespaces % APPS;
    json!({"kind": "NetworkPolicy",
    "metadata": {"namespace": format!("ns{}", n % namespaces), "name": format!("policy{n}")},
    "spec": {
        "podSelector": {"matchLabels": {"app": format!("app{app}")}},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [
            {"from": [{"podSelector": {"matchLabels": {"app": format!("app{}", (app + 1) % APPS)}}}],
             "ports": [{"port": port}]},
            {"from": [{"namespaceSelector": {"matchLabels": {"team": format!("t{}", n % 7)}},
                       "podSelector": {"matchLabels": {"tier": "front"}}}]}],
        "egress": [
            {"to": [{"ipBlock": {"cidr": format!("172.{}.{}.0/24", 16 + n % 16, n % 256)}}]},
            {"to": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": [format!("10.1.{}.0/24", n % 8)]}}]},
            {"to": [{"podSelector": {}}], "ports": [{"port": "http"}, {"protocol": "UDP", "port": 53}]},
        ]}})
}

/// A Service and its slice; the first endpoint is ready or not.
pub(crate) fn service(n: usize, pods: usize, ready: bool) -> [Value; 2] {
    let endpoints: Vec<Value> = (0..3)
        .map(|k| json!({"addresses": [address((3 * n + k) % pods)], "conditions": {"ready": ready || k > 0}}))
        .collect();
    [
        json!({"kind": "Service",
            "metadata": {"namespace": "default", "name": format!("svc{n}")},
            "spec": {"clusterIP": format!("10.{}.{}.{}", 96 + n / 65_536, n / 256 % 256, n % 256),
                     "ports": [{"name": "http", "port": 80}]}}),
        json!({"kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"namespace": "default", "name": format!("svc{n}-x"),
                         "labels": {"kubernetes.io/service-name": format!("svc{n}")}},
            "ports": [{"name": "http", "port": 8080}], "endpoints": endpoints}),
    ]
}

/// The interface of a Pod, as the plugin made it.
pub(crate) fn endpoint(n: usize) -> Endpoint {
    Endpoint {
        key: EndpointKey {
            container_id: format!("c{n}"),
            ifname: "eth0".into(),
        },
        pod: Some(PodName {
            namespace: format!("ns{}", n / NAMESPACE_SIZE),
            name: format!("pod{n}"),
            uid: Some(format!("00000000-0000-0000-0000-{n:012}")),
        }),
        ifindex: 10_000 + n as u32,
        mac: [2; 6],
        host_mac: [2; 6],
        addresses: vec![address(n).parse().expect("an address")],
        host_ports: Vec::new(),
    }
}
