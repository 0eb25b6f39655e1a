//! The Pods of this node and the policies that select them.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use hachi_policy::{PodIdentity, Policy, PolicyId, PolicyKind};

use crate::{
    addresses::Addresses,
    model::{DesiredEndpoint, Endpoint, EndpointKey, Enforcement},
};

/// Every endpoint of this node with what applies to it.
pub(crate) fn desired(
    addresses: &Addresses,
    policies: &BTreeMap<PolicyId, Arc<Policy>>,
) -> BTreeMap<EndpointKey, DesiredEndpoint> {
    let mut selected: HashMap<*const PodIdentity, Vec<Arc<Policy>>> = HashMap::new();
    let cluster_wide = of_cluster(policies).next().is_some();
    let mut all = BTreeMap::new();
    for endpoint in addresses.endpoints() {
        let enforcement = match &endpoint.pod {
            None => Enforcement::Unmanaged,
            Some(pod) => match addresses.pod_of(pod).and_then(|pod| pod.identity.clone()) {
                None => Enforcement::Quarantined,
                // Nobody can tell which policies of the cluster select it.
                Some(identity) if cluster_wide && identity.namespace_labels.is_none() => {
                    Enforcement::Quarantined
                }
                Some(identity) => {
                    let policies = selected
                        .entry(Arc::as_ptr(&identity))
                        .or_insert_with(|| selecting(policies, &identity))
                        .clone();
                    Enforcement::Pod { identity, policies }
                }
            },
        };
        let own = |e: &Endpoint| e.key == endpoint.key;
        let known_by = endpoint.addresses.iter().copied();
        let endpoint = DesiredEndpoint {
            endpoint: endpoint.clone(),
            addresses: known_by
                .filter(|a| addresses.owner(*a).is_some_and(own))
                .collect(),
            enforcement,
        };
        all.insert(endpoint.endpoint.key.clone(), endpoint);
    }
    all
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
