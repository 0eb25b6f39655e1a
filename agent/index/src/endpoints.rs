//! The Pods of this node and the policies that select them.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use hachi_policy::{PodIdentity, Policy, PolicyId};

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
    let mut all = BTreeMap::new();
    for endpoint in addresses.endpoints() {
        let enforcement = match &endpoint.pod {
            None => Enforcement::Unmanaged,
            Some(pod) => match addresses.pod_of(pod).and_then(|pod| pod.identity.clone()) {
                None => Enforcement::Quarantined,
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

fn selecting(policies: &BTreeMap<PolicyId, Arc<Policy>>, pod: &PodIdentity) -> Vec<Arc<Policy>> {
    let first = PolicyId {
        namespace: pod.namespace.clone(),
        name: "".into(),
    };
    policies
        .range(first..)
        .take_while(|(id, _)| id.namespace == pod.namespace)
        .filter(|(_, policy)| policy.subject.selects(pod))
        .map(|(_, policy)| policy.clone())
        .collect()
}
