//! The cluster as its API tells of it, and what the index and the compiler make of that.

use hachi_compile::{Compiled, compile};
use hachi_index::{Endpoint, EndpointKey, Index, Kind, Object, PodName};
use serde_json::{Value, json};

use super::{LOCAL, NAMESPACES, PORT_NAMES, Pod, World, addresses, policies::policy_json};
use crate::rng::Rng;

impl World {
    /// The objects of the API, in random order, through the index and the compiler.
    pub(crate) fn compile(&self, rng: &mut Rng) -> Compiled {
        compile(self.index(rng).desired())
    }

    fn index(&self, rng: &mut Rng) -> Index {
        let mut index = Index::new("n1");
        let mut objects = self.objects();
        rng.shuffle(&mut objects);
        let endpoints_at = rng.below(objects.len() + 1);
        let feed_endpoints = |index: &mut Index| {
            for (host, pod) in self.pods.iter().filter(|(_, pod)| pod.has_endpoint()) {
                index.add_endpoint(endpoint(*host, pod));
            }
            index.set_local_addresses(LOCAL.iter().map(|a| a.parse().unwrap()).collect());
        };
        for (at, object) in objects.into_iter().enumerate() {
            if at == endpoints_at {
                feed_endpoints(&mut index);
            }
            if rng.one_in(4) {
                // Looking in between must not change what comes out in the end.
                index.desired();
            }
            index.apply(object);
        }
        feed_endpoints(&mut index);
        assert_eq!(index.problems(), []);
        index
    }

    /// Brings an index that knew another world up to date, as after relists.
    pub(crate) fn update(&self, index: &mut Index, before: &Self, rng: &mut Rng) {
        let mut kinds = [
            Kind::Namespace,
            Kind::Pod,
            Kind::NetworkPolicy,
            Kind::ClusterNetworkPolicy,
            Kind::Service,
            Kind::EndpointSlice,
        ];
        rng.shuffle(&mut kinds);
        for kind in kinds {
            let of_kind = self
                .objects()
                .into_iter()
                .filter(|object| object.kind() == kind);
            index.reset(kind, of_kind.collect());
        }
        let endpoints = |world: &Self| -> Vec<Endpoint> {
            let with = world.pods.iter().filter(|(_, pod)| pod.has_endpoint());
            with.map(|(host, pod)| endpoint(*host, pod)).collect()
        };
        for gone in endpoints(before) {
            index.remove_endpoint(&gone.key);
        }
        for endpoint in endpoints(self) {
            index.add_endpoint(endpoint);
        }
        index.set_local_addresses(LOCAL.iter().map(|a| a.parse().unwrap()).collect());
    }

    pub(crate) fn objects(&self) -> Vec<Object> {
        let namespaces = NAMESPACES
            .iter()
            .zip(&self.namespaces)
            .filter_map(|(name, labels)| {
                let labels = labels.as_ref()?;
                Some(json!({"kind": "Namespace", "metadata": {"name": name, "labels": labels}}))
            });
        let pods = self
            .pods
            .iter()
            .filter(|(_, pod)| pod.known)
            .map(|(host, pod)| pod_json(*host, pod));
        let policies = self.policies.values().map(policy_json);
        let services = self.services.values().flatten().cloned();
        let values: Vec<Value> = namespaces
            .chain(pods)
            .chain(policies)
            .chain(services)
            .collect();
        values.into_iter().map(object).collect()
    }
}

fn object(value: Value) -> Object {
    let text = value.to_string();
    let object = match value["kind"].as_str() {
        Some("Namespace") => serde_json::from_value(value).map(|o| Object::Namespace(Box::new(o))),
        Some("Pod") => serde_json::from_value(value).map(|o| Object::Pod(Box::new(o))),
        Some("Service") => serde_json::from_value(value).map(|o| Object::Service(Box::new(o))),
        Some("EndpointSlice") => {
            serde_json::from_value(value).map(|o| Object::EndpointSlice(Box::new(o)))
        }
        Some("ClusterNetworkPolicy") => Ok(Object::ClusterNetworkPolicy(Box::new(value))),
        _ => Ok(Object::NetworkPolicy(Box::new(value))),
    };
    object.unwrap_or_else(|error| panic!("{error}: {text}"))
}

fn uid(pod: &Pod) -> String {
    format!("uid-{}", pod.generation)
}

fn endpoint(host: u8, pod: &Pod) -> Endpoint {
    Endpoint {
        key: EndpointKey {
            container_id: format!("c{host}"),
            ifname: "eth0".into(),
        },
        pod: Some(PodName {
            namespace: NAMESPACES[pod.namespace].to_owned(),
            name: format!("pod{host}"),
            uid: Some(uid(pod)),
        }),
        ifindex: pod.generation,
        mac: [2, 0, 0, 0, 0, host],
        host_mac: [2, 0, 0, 0, 1, host],
        addresses: addresses(host).to_vec(),
        host_ports: Vec::new(),
    }
}

fn pod_json(host: u8, pod: &Pod) -> Value {
    let ports: Vec<Value> = pod
        .ports
        .iter()
        .map(|(name, protocol, port)| {
            json!({"name": PORT_NAMES[*name], "protocol": protocol.to_string(), "containerPort": port})
        })
        .collect();
    let phase = if pod.finished { "Failed" } else { "Running" };
    let ips: Vec<Value> = addresses(host).iter().map(|ip| json!({"ip": ip})).collect();
    json!({"kind": "Pod",
        "metadata": {"namespace": NAMESPACES[pod.namespace], "name": format!("pod{host}"),
                     "uid": uid(pod), "labels": pod.labels},
        "spec": {"nodeName": if pod.local { "n1" } else { "n2" }, "hostNetwork": pod.host_network,
                 "containers": [{"name": "c", "ports": ports}]},
        "status": {"phase": phase, "podIPs": ips}})
}
