//! Which Pod has which address.
//!
//! Several objects may claim one address for a while: a Pod that is on its way out and the one that
//! got its address. Who has it, first hit wins:
//! 1. the Pod of the newest interface of this node with that address, if there is one: what the
//!    plugin made is what exists. Unless that Pod is known, nobody has the address;
//! 2. of the Pods that claim it in the API, one that is not being deleted;
//! 3. of these the one that was created last;
//! 4. of these the one with the greatest UID, so that the answer never depends on the order of events.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    net::IpAddr,
    sync::Arc,
};

use hachi_policy::{Labels, PodIdentity};

use crate::{
    model::{Endpoint, EndpointKey, Name, PodName},
    parse::PodRecord,
};

/// A Pod and how policies see it.
#[derive(Debug)]
pub(crate) struct Pod {
    pub(crate) record: PodRecord,
    /// `None` for what is no Pod to policies.
    pub(crate) identity: Option<Arc<PodIdentity>>,
}

impl Pod {
    /// Whether an interface that was made for `pod` is this Pod's.
    pub(crate) fn is(&self, pod: &PodName) -> bool {
        match (&pod.uid, &self.record.uid) {
            (Some(wanted), Some(uid)) => **wanted == **uid,
            _ => true,
        }
    }
}

/// Pods, the interfaces of this node, and who has which address.
#[derive(Debug, Default)]
pub(crate) struct Addresses {
    pods: BTreeMap<Name, Pod>,
    /// Sorted; hardly ever more than one.
    claims: BTreeMap<IpAddr, Vec<Name>>,
    endpoints: BTreeMap<EndpointKey, Endpoint>,
    owners: BTreeMap<IpAddr, BTreeSet<(u32, EndpointKey)>>,
    identities: HashSet<Arc<PodIdentity>>,
    dirty: BTreeSet<IpAddr>,
}

impl Addresses {
    /// The Pod that an interface was made for, if it is known.
    pub(crate) fn pod_of(&self, pod: &PodName) -> Option<&Pod> {
        self.pods
            .get(&Name::new(&pod.namespace, &pod.name))
            .filter(|known| known.is(pod))
    }

    /// The addresses of a Pod that is one to policies.
    pub(crate) fn find(&self, name: &Name) -> Option<(Vec<IpAddr>, Arc<PodIdentity>)> {
        let pod = self.pods.get(name)?;
        let identity = pod.identity.clone()?;
        let mut addresses = pod.record.addresses.clone();
        for endpoint in self.endpoints.values() {
            let of = endpoint.pod.as_ref();
            if of.is_some_and(|p| {
                *p.namespace == *name.namespace && *p.name == *name.name && pod.is(p)
            }) {
                addresses.extend(&endpoint.addresses);
            }
        }
        addresses.sort_unstable();
        addresses.dedup();
        Some((addresses, identity))
    }

    pub(crate) fn pod_names(&self) -> impl Iterator<Item = &Name> {
        self.pods.keys()
    }

    pub(crate) fn endpoints(&self) -> impl Iterator<Item = &Endpoint> {
        self.endpoints.values()
    }

    /// Whether an interface of this node was made for a Pod of this name.
    pub(crate) fn is_local(&self, name: &Name) -> bool {
        self.endpoints.values().any(|e| {
            e.pod
                .as_ref()
                .is_some_and(|p| *p.namespace == *name.namespace && *p.name == *name.name)
        })
    }

    /// Takes a Pod in; false if nothing changed.
    pub(crate) fn set_pod(
        &mut self,
        name: Name,
        mut record: PodRecord,
        namespace_labels: Option<&Arc<Labels>>,
    ) -> bool {
        if self.pods.get(&name).is_some_and(|pod| pod.record == record) {
            return false;
        }
        self.remove_pod(&name);
        let identity = record
            .is_peer()
            .then(|| self.identify(&name.namespace, &record, namespace_labels));
        if let Some(identity) = &identity {
            // Pods alike keep their labels once.
            record.labels = identity.labels.clone();
            record.ports = identity.ports.clone();
            for address in &record.addresses {
                let claims = self.claims.entry(*address).or_default();
                claims.push(name.clone());
                claims.sort_unstable();
            }
        }
        self.touch(&name, &record.addresses);
        self.pods.insert(name, Pod { record, identity });
        true
    }

    /// Forgets a Pod; false if it was not known.
    pub(crate) fn remove_pod(&mut self, name: &Name) -> bool {
        let Some(pod) = self.pods.remove(name) else {
            return false;
        };
        for address in &pod.record.addresses {
            if let Some(claims) = self.claims.get_mut(address) {
                claims.retain(|claimer| claimer != name);
                if claims.is_empty() {
                    self.claims.remove(address);
                }
            }
        }
        self.touch(name, &pod.record.addresses);
        drop(pod);
        self.sweep();
        true
    }

    /// The labels of a namespace changed.
    pub(crate) fn relabel(&mut self, namespace: &Arc<str>, labels: Option<&Arc<Labels>>) {
        let names: Vec<Name> = self
            .pods
            .range(
                Name {
                    namespace: namespace.clone(),
                    name: "".into(),
                }..,
            )
            .map(|(name, _)| name)
            .take_while(|name| name.namespace == *namespace)
            .cloned()
            .collect();
        for name in names {
            let Some(pod) = self.pods.remove(&name) else {
                continue;
            };
            let Pod { record, identity } = pod;
            let identity = identity.map(|_| self.identify(namespace, &record, labels));
            self.touch(&name, &record.addresses);
            self.pods.insert(name, Pod { record, identity });
        }
        self.sweep();
    }

    pub(crate) fn add_endpoint(&mut self, endpoint: Endpoint) {
        self.remove_endpoint(&endpoint.key);
        for address in &endpoint.addresses {
            let owner = (endpoint.ifindex, endpoint.key.clone());
            self.owners.entry(*address).or_default().insert(owner);
            self.dirty.insert(*address);
        }
        self.endpoints.insert(endpoint.key.clone(), endpoint);
    }

    pub(crate) fn remove_endpoint(&mut self, key: &EndpointKey) -> Option<Endpoint> {
        let endpoint = self.endpoints.remove(key)?;
        for address in &endpoint.addresses {
            if let Some(owners) = self.owners.get_mut(address) {
                owners.retain(|(_, owner)| owner != key);
                if owners.is_empty() {
                    self.owners.remove(address);
                }
            }
            self.dirty.insert(*address);
        }
        Some(endpoint)
    }

    /// The interface of this node that has the address: of several the one with the greatest index,
    /// which the kernel made last.
    pub(crate) fn owner(&self, address: IpAddr) -> Option<&Endpoint> {
        let (_, key) = self.owners.get(&address)?.last()?;
        self.endpoints.get(key)
    }

    /// Writes down who has the addresses that something happened to since the last time.
    pub(crate) fn update(&mut self, peers: &mut BTreeMap<IpAddr, Arc<PodIdentity>>) {
        for address in std::mem::take(&mut self.dirty) {
            match self.holder(address) {
                Some(identity) => {
                    if peers
                        .get(&address)
                        .is_none_or(|old| !Arc::ptr_eq(old, &identity))
                    {
                        peers.insert(address, identity);
                    }
                }
                None => {
                    peers.remove(&address);
                }
            }
        }
    }

    fn holder(&self, address: IpAddr) -> Option<Arc<PodIdentity>> {
        if let Some(owner) = self.owner(address) {
            return self.pod_of(owner.pod.as_ref()?)?.identity.clone();
        }
        let claims = self
            .claims
            .get(&address)?
            .iter()
            .filter_map(|name| self.pods.get(name));
        let pod = claims.max_by_key(|pod| {
            let PodRecord {
                terminating,
                created,
                uid,
                ..
            } = &pod.record;
            (!*terminating, *created, uid)
        })?;
        pod.identity.clone()
    }

    fn touch(&mut self, name: &Name, addresses: &[IpAddr]) {
        self.dirty.extend(addresses);
        for endpoint in self.endpoints.values() {
            if let Some(pod) = &endpoint.pod
                && *pod.namespace == *name.namespace
                && *pod.name == *name.name
            {
                self.dirty.extend(&endpoint.addresses);
            }
        }
    }

    /// Equal Pods share one identity, so that whoever compiles looks at each kind of Pod once.
    fn identify(
        &mut self,
        namespace: &Arc<str>,
        record: &PodRecord,
        namespace_labels: Option<&Arc<Labels>>,
    ) -> Arc<PodIdentity> {
        let identity = PodIdentity {
            namespace: namespace.clone(),
            namespace_labels: namespace_labels.cloned(),
            labels: record.labels.clone(),
            ports: record.ports.clone(),
        };
        if let Some(known) = self.identities.get(&identity) {
            return known.clone();
        }
        let identity = Arc::new(identity);
        self.identities.insert(identity.clone());
        identity
    }

    /// Forgets identities that no Pod has any more, once they are more than there are Pods.
    fn sweep(&mut self) {
        if self.identities.len() > self.pods.len() + 64 {
            self.identities
                .retain(|identity| Arc::strong_count(identity) > 1);
        }
    }
}
