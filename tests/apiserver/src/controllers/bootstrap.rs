//! What a cluster has from the start: its namespaces and the `kubernetes` Service.

use std::{collections::BTreeMap, net::SocketAddr};

use serde_json::json;
use tracing::warn;

use crate::{
    Config, Store,
    alloc::Family,
    resource::{ENDPOINT_SLICES, NAMESPACES, SERVICES},
};

/// Makes them.
pub(crate) fn bootstrap(store: &Store, config: &Config) {
    for name in ["default", "kube-system", "kube-public", "kube-node-lease"] {
        let namespace = json!({"metadata": {"name": name}});
        report(name, store.create(NAMESPACES, namespace));
    }
    let first = store.read(|state| state.ranges.first_ips());
    let Some(first) = first.first() else { return };
    let mut families: BTreeMap<Family, Vec<SocketAddr>> = BTreeMap::new();
    for address in &config.advertise {
        families
            .entry(Family::of(address.ip()))
            .or_default()
            .push(*address);
    }
    let port = config.advertise.first().map_or(443, SocketAddr::port);
    let labels = json!({"component": "apiserver", "provider": "kubernetes"});
    let service = json!({
        "metadata": {"name": "kubernetes", "namespace": "default", "labels": labels},
        "spec": {
            "clusterIP": first.to_string(),
            "ports": [{"name": "https", "port": 443, "targetPort": port}],
        },
    });
    report("kubernetes", store.create(SERVICES, service));
    for (family, addresses) in families {
        // A family's addresses that differ in their port would need slices of their own.
        let port = addresses[0].port();
        let same = addresses.iter().filter(|address| address.port() == port);
        let endpoints: Vec<_> = same
            .map(|address| {
                json!({"addresses": [address.ip().to_string()], "conditions": {"ready": true}})
            })
            .collect();
        let name = match family {
            Family::V4 => "kubernetes",
            Family::V6 => "kubernetes-ipv6",
        };
        let slice = json!({
            "metadata": {
                "name": name,
                "namespace": "default",
                "labels": {"kubernetes.io/service-name": "kubernetes"},
            },
            "addressType": family.name(),
            "endpoints": endpoints,
            "ports": [{"name": "https", "port": port, "protocol": "TCP"}],
        });
        report(name, store.create(ENDPOINT_SLICES, slice));
    }
}

fn report<T>(name: &str, made: Result<T, crate::Failure>) {
    if let Err(error) = made {
        warn!(name, %error, "cannot make an object that every cluster has");
    }
}
