//! The Pods of this node and the policies that select them.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use hachi_policy::{PodIdentity, Policy, PolicyId, PolicyKind};

use crate::{
    addresses::Addresses,
    model::{DesiredEndpoint, Endpoint, EndpointKey, Enforcement, Name},
};

/// Every endpoint of this node with what applies to it.
pub(crate) fn desired(
    addresses: &Addresses,
    policies: &BTreeMap<PolicyId, Arc<Policy>>,
) -> BTreeMap<EndpointKey, DesiredEndpoint> {
    let mut selected = Selected::default();
    let all = addresses.endpoints().map(|endpoint| {
        let own = |e: &Endpoint| e.key == endpoint.key;
        let known_by = endpoint.addresses.iter().copied();
        let desired = DesiredEndpoint {
            endpoint: endpoint.clone(),
            addresses: known_by
                .filter(|a| addresses.owner(*a).is_some_and(own))
                .collect(),
            enforcement: enforcement(endpoint, addresses, policies, &mut selected),
        };
        (endpoint.key.clone(), desired)
    });
    all.collect()
}

/// Brings the endpoints up to date after some Pods changed, but for their interfaces.
pub(crate) fn change_pods(
    endpoints: &mut BTreeMap<EndpointKey, DesiredEndpoint>,
    addresses: &Addresses,
    policies: &BTreeMap<PolicyId, Arc<Policy>>,
    changed: &BTreeSet<Name>,
) {
    let mut selected = Selected::default();
    for endpoint in endpoints.values_mut() {
        let pod = endpoint.endpoint.pod.as_ref();
        if pod.is_some_and(|pod| changed.contains(&Name::new(&pod.namespace, &pod.name))) {
            endpoint.enforcement =
                enforcement(&endpoint.endpoint, addresses, policies, &mut selected);
        }
    }
}

/// What selects Pods that are alike.
type Selected = HashMap<*const PodIdentity, Vec<Arc<Policy>>>;

fn enforcement(
    endpoint: &Endpoint,
    addresses: &Addresses,
    policies: &BTreeMap<PolicyId, Arc<Policy>>,
    selected: &mut Selected,
) -> Enforcement {
    let Some(pod) = &endpoint.pod else {
        return Enforcement::Unmanaged;
    };
    let Some(identity) = addresses.pod_of(pod).and_then(|pod| pod.identity.clone()) else {
        return Enforcement::Quarantined;
    };
    let cluster_wide = of_cluster(policies).next().is_some();
    if cluster_wide && identity.namespace_labels.is_none() {
        // Nobody can tell which policies of the cluster select it.
        return Enforcement::Quarantined;
    }
    let policies = selected
        .entry(Arc::as_ptr(&identity))
        .or_insert_with(|| selecting(policies, &identity))
        .clone();
    Enforcement::Pod { identity, policies }
}

/// Brings the endpoints up to date after some policies changed.
pub(crate) fn change_policies(
    endpoints: &mut BTreeMap<EndpointKey, DesiredEndpoint>,
    all: &BTreeMap<PolicyId, Arc<Policy>>,
    changed: &BTreeSet<PolicyId>,
) {
    for endpoint in endpoints.values_mut() {
        let Enforcement::Pod { identity, policies } = &mut endpoint.enforcement else {
            continue;
        };
        for id in changed {
            policies.retain(|policy| policy.id != *id);
            policies.extend(
                all.get(id)
                    .filter(|policy| policy.subject.selects(identity))
                    .cloned(),
            );
        }
        policies.sort_by(|a, b| order(a, b));
    }
}

fn order(a: &Policy, b: &Policy) -> Ordering {
    (a.rank, &a.id).cmp(&(b.rank, &b.id))
}

fn selecting(policies: &BTreeMap<PolicyId, Arc<Policy>>, pod: &PodIdentity) -> Vec<Arc<Policy>> {
    let first = PolicyId::network(&pod.namespace, "");
    let of_namespace = policies.range(first..).take_while(|(id, _)| {
        id.kind == PolicyKind::NetworkPolicy && id.namespace == pod.namespace
    });
    let mut selecting: Vec<Arc<Policy>> = of_namespace
        .chain(of_cluster(policies))
        .filter(|(_, policy)| policy.subject.selects(pod))
        .map(|(_, policy)| policy.clone())
        .collect();
    selecting.sort_by(|a, b| order(a, b));
    selecting
}

fn of_cluster(
    policies: &BTreeMap<PolicyId, Arc<Policy>>,
) -> impl Iterator<Item = (&PolicyId, &Arc<Policy>)> {
    let first = PolicyId {
        kind: PolicyKind::ClusterNetworkPolicy,
        namespace: "".into(),
        name: "".into(),
    };
    policies.range(first..)
}
