//! The index itself: it routes objects to the parts that keep them, and remembers what has to be
//! looked at again.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use hachi_policy::{Labels, PodIdentity, Policy, PolicyId, PolicyKind};

use crate::{
    addresses::Addresses,
    endpoints, host_ports,
    model::{Desired, Endpoint, EndpointKey, Name, PodName},
    object::{Kind, Object, Problem},
    parse::{self, Complaints},
    services::Services,
};

/// From so many changed policies on, every endpoint is looked at afresh.
const MANY: usize = 64;

/// What is known of the cluster and of this node's interfaces.
#[derive(Debug)]
pub struct Index {
    namespaces: BTreeMap<Arc<str>, Arc<Labels>>,
    policies: BTreeMap<PolicyId, Arc<Policy>>,
    addresses: Addresses,
    services: Services,
    interface_addresses: BTreeSet<IpAddr>,
    /// With the object's UID.
    complaints: BTreeMap<(Kind, Name), (String, Complaints)>,
    /// What the lists under way have named so far.
    relists: BTreeMap<Kind, BTreeSet<Name>>,
    endpoints_dirty: bool,
    changed_policies: BTreeSet<PolicyId>,
    /// Pods of this node.
    changed_pods: BTreeSet<Name>,
    desired: Desired,
}

impl Index {
    /// An index that knows nothing yet, for the node of this name.
    pub fn new(node_name: impl Into<String>) -> Self {
        Self {
            namespaces: BTreeMap::new(),
            policies: BTreeMap::new(),
            addresses: Addresses::default(),
            services: Services::default(),
            interface_addresses: BTreeSet::new(),
            complaints: BTreeMap::new(),
            relists: BTreeMap::new(),
            endpoints_dirty: false,
            changed_policies: BTreeSet::new(),
            changed_pods: BTreeSet::new(),
            desired: Desired {
                node_name: node_name.into(),
                ..Desired::default()
            },
        }
    }

    /// Takes a new or changed object in; false if it says nothing that matters here and was not known:
    /// most of what the API sends is about an object's status, as a node's every few minutes.
    pub fn apply(&mut self, object: Object) -> bool {
        let kind = object.kind();
        let uid = object.uid().to_owned();
        let (namespace, name) = object.name();
        let key = Name::new(namespace, name);
        let mut complaints = Complaints::new();
        let changed = match object {
            Object::Pod(pod) => {
                let record = parse::pod(&pod, &mut complaints);
                let labels = self.namespaces.get(&key.namespace);
                let changed = self.addresses.set_pod(key.clone(), record, labels);
                if changed {
                    self.pod_changed(&key);
                }
                changed
            }
            Object::Namespace(namespace) => {
                self.set_namespace(&key.name, Some(parse::labels(&namespace.metadata)))
            }
            Object::Node(node) => {
                let node = parse::node(&node, &mut complaints);
                if *key.name == *self.desired.node_name {
                    self.services.set_zone(node.zone.clone());
                }
                let known = self.desired.nodes.get(&key.name);
                let changed = known.is_none_or(|old| **old != node);
                if changed {
                    self.desired.nodes.insert(key.name.clone(), Arc::new(node));
                }
                changed
            }
            Object::Service(service) => {
                let record = parse::service(&service, &mut complaints);
                self.services.set_service(key.clone(), record)
            }
            Object::EndpointSlice(slice) => {
                let record = parse::slice(&slice, &self.desired.node_name, &mut complaints);
                self.services.set_slice(key.clone(), record)
            }
            Object::NetworkPolicy(policy) => {
                self.set_policy(parse::policy(&policy, &mut complaints))
            }
            Object::ClusterNetworkPolicy(policy)
            | Object::AdminNetworkPolicy(policy)
            | Object::BaselineAdminNetworkPolicy(policy) => kind.policy().is_some_and(|kind| {
                self.set_policy(parse::cluster_policy(kind, &policy, &mut complaints))
            }),
        };
        if let Some(listed) = self.relists.get_mut(&kind) {
            listed.insert(key.clone());
        }
        if complaints.is_empty() {
            self.complaints.remove(&(kind, key)).is_some() || changed
        } else if self
            .complaints
            .get(&(kind, key.clone()))
            .is_none_or(|known| *known != (uid.clone(), complaints.clone()))
        {
            for complaint in &complaints {
                tracing::warn!(%kind, object = %key, "{complaint}");
            }
            self.complaints.insert((kind, key), (uid, complaints));
            true
        } else {
            changed
        }
    }

    /// Forgets an object; not knowing it is fine.
    pub fn delete(&mut self, kind: Kind, namespace: &str, name: &str) {
        let key = Name::new(namespace, name);
        match kind {
            Kind::Pod => {
                if self.addresses.remove_pod(&key) {
                    self.pod_changed(&key);
                }
            }
            Kind::Namespace => {
                self.set_namespace(&key.name, None);
            }
            Kind::Node => {
                if name == self.desired.node_name {
                    self.services.set_zone(None);
                }
                self.desired.nodes.remove(name);
            }
            Kind::Service => {
                self.services.set_service(key.clone(), None);
            }
            Kind::EndpointSlice => {
                self.services.set_slice(key.clone(), None);
            }
            Kind::NetworkPolicy
            | Kind::ClusterNetworkPolicy
            | Kind::AdminNetworkPolicy
            | Kind::BaselineAdminNetworkPolicy => {
                if let Some(kind) = kind.policy() {
                    let id = PolicyId {
                        kind,
                        namespace: key.namespace.clone(),
                        name: key.name.clone(),
                    };
                    if self.policies.remove(&id).is_some() {
                        self.policy_changed(id);
                    }
                }
            }
        }
        self.complaints.remove(&(kind, key));
    }

    fn pod_changed(&mut self, name: &Name) {
        if self.addresses.is_local(name) {
            self.changed_pods.insert(name.clone());
        }
    }

    fn set_policy(&mut self, policy: Policy) -> bool {
        let known = self.policies.get(&policy.id);
        let changed = known.is_none_or(|old| **old != policy);
        if changed {
            let id = policy.id.clone();
            self.policies.insert(id.clone(), Arc::new(policy));
            self.policy_changed(id);
        }
        changed
    }

    fn policy_changed(&mut self, id: PolicyId) {
        // Whether there are policies of the cluster at all counts for Pods of unknown namespaces.
        self.endpoints_dirty |= id.kind != PolicyKind::NetworkPolicy;
        self.changed_policies.insert(id);
    }

    /// A fresh list of a kind begins: what it lacks is forgotten when it ends. What is applied
    /// meanwhile counts as listed.
    pub fn begin_list(&mut self, kind: Kind) {
        self.relists.insert(kind, BTreeSet::new());
    }

    /// The list that [`Self::begin_list`] announced is complete.
    pub fn end_list(&mut self, kind: Kind) {
        let Some(listed) = self.relists.remove(&kind) else {
            return;
        };
        for known in self.names(kind) {
            if !listed.contains(&known) {
                self.delete(kind, &known.namespace, &known.name);
            }
        }
    }

    /// Replaces everything of a kind by what a fresh list says. Objects of other kinds in the list
    /// are taken in like any other.
    pub fn reset(&mut self, kind: Kind, objects: Vec<Object>) {
        self.begin_list(kind);
        for object in objects {
            self.apply(object);
        }
        self.end_list(kind);
    }

    /// Sets the addresses of the node's own interfaces, whose traffic to Pods is always let in.
    /// Loopback and unspecified addresses are left out.
    pub fn set_local_addresses(&mut self, addresses: BTreeSet<IpAddr>) {
        self.interface_addresses = addresses;
        self.interface_addresses
            .retain(|a| !a.is_loopback() && !a.is_unspecified());
    }

    /// Takes in an interface of a Pod of this node, in place of an earlier one of the same name.
    pub fn add_endpoint(&mut self, endpoint: Endpoint) {
        self.remove_endpoint(&endpoint.key);
        let owner = host_port_owner(&endpoint);
        self.addresses.add_endpoint(endpoint);
        self.update_host_ports(&owner);
        self.endpoints_dirty = true;
    }

    /// Forgets an interface; false if it was not known.
    pub fn remove_endpoint(&mut self, key: &EndpointKey) -> bool {
        let Some(endpoint) = self.addresses.remove_endpoint(key) else {
            return false;
        };
        self.update_host_ports(&host_port_owner(&endpoint));
        self.endpoints_dirty = true;
        true
    }

    /// The ports of a Pod are those of its newest interface: its sandbox may have been replaced.
    fn update_host_ports(&mut self, owner: &Name) {
        let newest = self
            .addresses
            .endpoints()
            .filter(|e| !e.host_ports.is_empty() && host_port_owner(e) == *owner)
            .max_by_key(|endpoint| endpoint.ifindex);
        let service = newest.and_then(host_ports::service);
        self.services.set_host_ports(owner, service);
    }

    /// Whether the API has told of the Pod, so that its policies are known.
    #[must_use]
    pub fn knows_pod(&self, namespace: &str, name: &str, uid: Option<&str>) -> bool {
        let pod = PodName {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            uid: uid.map(str::to_owned),
        };
        self.addresses.pod_of(&pod).is_some()
    }

    /// The addresses that a Pod asks for in [`ADDRESSES_ANNOTATION`](crate::ADDRESSES_ANNOTATION),
    /// mostly none, or what is wrong with the annotation. `None` if the API has not told of the Pod.
    #[must_use]
    pub fn wanted_addresses(&self, pod: &PodName) -> Option<Result<Vec<IpAddr>, String>> {
        let pod = self.addresses.pod_of(pod)?;
        let wanted = pod.record.wanted.as_deref();
        Some(wanted.map_or_else(|| Ok(Vec::new()), parse::wanted_addresses))
    }

    /// Every policy, in the order of their ids.
    pub fn policies(&self) -> impl Iterator<Item = &Policy> + Clone {
        self.policies.values().map(|policy| &**policy)
    }

    /// The addresses of a Pod that policies see, and the Pod as they see it.
    #[must_use]
    pub fn pod(&self, namespace: &str, name: &str) -> Option<(Vec<IpAddr>, Arc<PodIdentity>)> {
        self.addresses.find(&Name::new(namespace, name))
    }

    /// The desired state, brought up to date.
    pub fn desired(&mut self) -> &Desired {
        self.addresses.update(&mut self.desired.peers);
        self.services.update(&mut self.desired.services);
        let changed = std::mem::take(&mut self.changed_policies);
        let pods = std::mem::take(&mut self.changed_pods);
        if std::mem::take(&mut self.endpoints_dirty) || changed.len() > MANY {
            self.desired.endpoints = endpoints::desired(&self.addresses, &self.policies);
        } else {
            let endpoints = &mut self.desired.endpoints;
            if !changed.is_empty() {
                endpoints::change_policies(endpoints, &self.policies, &changed);
            }
            if !pods.is_empty() {
                endpoints::change_pods(endpoints, &self.addresses, &self.policies, &pods);
            }
        }
        let addresses = &self.addresses;
        self.desired.local_addresses = self
            .interface_addresses
            .iter()
            .copied()
            .filter(|a| addresses.owner(*a).is_none() && !self.desired.peers.contains_key(a))
            .collect();
        &self.desired
    }

    /// What could not be honoured, and what was done instead.
    #[must_use]
    pub fn problems(&self) -> Vec<Problem> {
        let all = self
            .complaints
            .iter()
            .flat_map(|((kind, name), (uid, complaints))| {
                complaints.iter().map(|message| Problem {
                    kind: *kind,
                    namespace: name.namespace.to_string(),
                    name: name.name.to_string(),
                    uid: uid.clone(),
                    message: message.clone(),
                })
            });
        all.collect()
    }

    fn set_namespace(&mut self, name: &Arc<str>, labels: Option<Labels>) -> bool {
        if self.namespaces.get(name).map(|l| &**l) == labels.as_ref() {
            return false;
        }
        let labels = labels.map(Arc::new);
        match &labels {
            Some(labels) => self.namespaces.insert(name.clone(), labels.clone()),
            None => self.namespaces.remove(name),
        };
        self.addresses.relabel(name, labels.as_ref());
        self.endpoints_dirty = true;
        true
    }

    fn names(&self, kind: Kind) -> Vec<Name> {
        let cluster = |name: &Arc<str>| Name {
            namespace: "".into(),
            name: name.clone(),
        };
        let mut names: BTreeSet<Name> = match kind {
            Kind::Pod => self.addresses.pod_names().cloned().collect(),
            Kind::Namespace => self.namespaces.keys().map(cluster).collect(),
            Kind::Node => self.desired.nodes.keys().map(cluster).collect(),
            Kind::Service => self.services.service_names().cloned().collect(),
            Kind::EndpointSlice => self.services.slice_names().cloned().collect(),
            Kind::NetworkPolicy
            | Kind::ClusterNetworkPolicy
            | Kind::AdminNetworkPolicy
            | Kind::BaselineAdminNetworkPolicy => self
                .policies
                .keys()
                .filter(|id| Some(id.kind) == kind.policy())
                .map(|id| Name {
                    namespace: id.namespace.clone(),
                    name: id.name.clone(),
                })
                .collect(),
        };
        let complained_of = self.complaints.keys().filter(|(k, _)| *k == kind);
        names.extend(complained_of.map(|(_, name)| name.clone()));
        names.into_iter().collect()
    }
}

/// Whose host ports an interface's are: its Pod's, or its own without one.
fn host_port_owner(endpoint: &Endpoint) -> Name {
    match &endpoint.pod {
        Some(pod) => Name::new(&pod.namespace, &pod.name),
        None => Name::new("", &endpoint.key.container_id),
    }
}
