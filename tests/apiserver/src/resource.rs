//! The table of served resources: what each is called, and what is particular about it.
//!
//! A further kind is one more entry here; storage, verbs, discovery and watches follow from it.

/// One served resource.
#[derive(Debug, PartialEq, Eq)]
pub struct Resource {
    /// API group; empty for the core group.
    pub group: &'static str,
    /// Version within the group.
    pub version: &'static str,
    /// Plural name as in paths.
    pub plural: &'static str,
    /// Singular name as kubectl takes it.
    pub singular: &'static str,
    /// Kind as in objects.
    pub kind: &'static str,
    /// Short names as kubectl takes them.
    pub short: &'static [&'static str],
    /// kubectl's categories, such as `all`.
    pub categories: &'static [&'static str],
    /// Whether objects live in namespaces.
    pub namespaced: bool,
    /// Whether status is a subresource, which writes of the object itself leave alone.
    pub status: bool,
    /// Whether `metadata.generation` counts the changes of the object's intent.
    pub generation: bool,
    /// Selectable fields besides `metadata.name` and `metadata.namespace`.
    pub fields: &'static [&'static str],
    /// Whether it is a custom resource: served while its definition is stored.
    pub custom: bool,
    /// The resource's place in [`RESOURCES`].
    pub(crate) index: usize,
}

impl Resource {
    /// `apiVersion` of the resource's objects.
    #[must_use]
    pub fn api_version(&self) -> String {
        if self.group.is_empty() {
            self.version.to_owned()
        } else {
            format!("{}/{}", self.group, self.version)
        }
    }

    /// The name used in messages: `pods`, `networkpolicies.networking.k8s.io`.
    #[must_use]
    pub fn qualified(&self) -> String {
        if self.group.is_empty() {
            self.plural.to_owned()
        } else {
            format!("{}.{}", self.plural, self.group)
        }
    }

    /// The kind as messages of invalid objects name it: `NetworkPolicy.networking.k8s.io`.
    #[must_use]
    pub fn qualified_kind(&self) -> String {
        if self.group.is_empty() {
            self.kind.to_owned()
        } else {
            format!("{}.{}", self.kind, self.group)
        }
    }
}

/// Finds a resource by the group, version and plural name of a path.
#[must_use]
pub fn find(group: &str, version: &str, plural: &str) -> Option<&'static Resource> {
    RESOURCES
        .iter()
        .find(|r| r.group == group && r.version == version && r.plural == plural)
}

/// A core resource without peculiarities, to fill in the rest of an entry.
const CORE: Resource = Resource {
    group: "",
    version: "v1",
    plural: "",
    singular: "",
    kind: "",
    short: &[],
    categories: &[],
    namespaced: true,
    status: false,
    generation: false,
    fields: &[],
    custom: false,
    index: 0,
};

/// Every served resource.
pub static RESOURCES: &[Resource] = &[
    Resource {
        plural: "namespaces",
        singular: "namespace",
        kind: "Namespace",
        short: &["ns"],
        namespaced: false,
        status: true,
        fields: &["status.phase"],
        ..CORE
    },
    Resource {
        plural: "nodes",
        singular: "node",
        kind: "Node",
        short: &["no"],
        namespaced: false,
        status: true,
        fields: &["spec.unschedulable"],
        index: 1,
        ..CORE
    },
    Resource {
        plural: "pods",
        singular: "pod",
        kind: "Pod",
        short: &["po"],
        categories: &["all"],
        status: true,
        generation: true,
        fields: &[
            "spec.nodeName",
            "spec.restartPolicy",
            "spec.schedulerName",
            "spec.serviceAccountName",
            "spec.hostNetwork",
            "status.phase",
            "status.podIP",
            "status.nominatedNodeName",
        ],
        index: 2,
        ..CORE
    },
    Resource {
        plural: "services",
        singular: "service",
        kind: "Service",
        short: &["svc"],
        categories: &["all"],
        status: true,
        fields: &["spec.clusterIP", "spec.type"],
        index: 3,
        ..CORE
    },
    Resource {
        group: "discovery.k8s.io",
        plural: "endpointslices",
        singular: "endpointslice",
        kind: "EndpointSlice",
        generation: true,
        index: 4,
        ..CORE
    },
    Resource {
        group: "networking.k8s.io",
        plural: "networkpolicies",
        singular: "networkpolicy",
        kind: "NetworkPolicy",
        short: &["netpol"],
        generation: true,
        index: 5,
        ..CORE
    },
    Resource {
        plural: "configmaps",
        singular: "configmap",
        kind: "ConfigMap",
        short: &["cm"],
        index: 6,
        ..CORE
    },
    Resource {
        plural: "serviceaccounts",
        singular: "serviceaccount",
        kind: "ServiceAccount",
        short: &["sa"],
        index: 7,
        ..CORE
    },
    Resource {
        plural: "events",
        singular: "event",
        kind: "Event",
        short: &["ev"],
        fields: &[
            "involvedObject.apiVersion",
            "involvedObject.fieldPath",
            "involvedObject.kind",
            "involvedObject.name",
            "involvedObject.namespace",
            "involvedObject.resourceVersion",
            "involvedObject.uid",
            "reason",
            "reportingComponent",
            "source",
            "type",
        ],
        index: 8,
        ..CORE
    },
    Resource {
        plural: "endpoints",
        singular: "endpoints",
        kind: "Endpoints",
        short: &["ep"],
        index: 9,
        ..CORE
    },
    Resource {
        group: "coordination.k8s.io",
        plural: "leases",
        singular: "lease",
        kind: "Lease",
        index: 10,
        ..CORE
    },
    Resource {
        group: "apiextensions.k8s.io",
        plural: "customresourcedefinitions",
        singular: "customresourcedefinition",
        kind: "CustomResourceDefinition",
        short: &["crd", "crds"],
        namespaced: false,
        status: true,
        generation: true,
        index: 11,
        ..CORE
    },
    Resource {
        group: "policy.networking.k8s.io",
        version: "v1alpha2",
        plural: "clusternetworkpolicies",
        singular: "clusternetworkpolicy",
        kind: "ClusterNetworkPolicy",
        short: &["cnp"],
        namespaced: false,
        status: true,
        generation: true,
        custom: true,
        index: 12,
        ..CORE
    },
];

/// Namespaces.
pub static NAMESPACES: &Resource = &RESOURCES[0];
/// Nodes.
pub static NODES: &Resource = &RESOURCES[1];
/// Pods.
pub static PODS: &Resource = &RESOURCES[2];
/// Services.
pub static SERVICES: &Resource = &RESOURCES[3];
/// EndpointSlices.
pub static ENDPOINT_SLICES: &Resource = &RESOURCES[4];
/// NetworkPolicies.
pub static NETWORK_POLICIES: &Resource = &RESOURCES[5];
/// Events.
pub static EVENTS: &Resource = &RESOURCES[8];
/// CustomResourceDefinitions.
pub static DEFINITIONS: &Resource = &RESOURCES[11];
/// ServiceAccounts.
pub static SERVICE_ACCOUNTS: &Resource = &RESOURCES[7];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_entry_knows_its_place() {
        for (place, resource) in RESOURCES.iter().enumerate() {
            assert_eq!(resource.index, place, "{}", resource.plural);
            assert_eq!(
                find(resource.group, resource.version, resource.plural),
                Some(resource)
            );
        }
        assert_eq!(find("", "v1", "deployments"), None);
    }

    #[test]
    fn the_named_entries_are_what_their_names_say() {
        for (resource, kind) in [
            (NAMESPACES, "Namespace"),
            (NODES, "Node"),
            (PODS, "Pod"),
            (SERVICES, "Service"),
            (ENDPOINT_SLICES, "EndpointSlice"),
            (NETWORK_POLICIES, "NetworkPolicy"),
            (SERVICE_ACCOUNTS, "ServiceAccount"),
            (DEFINITIONS, "CustomResourceDefinition"),
            (EVENTS, "Event"),
        ] {
            assert_eq!(resource.kind, kind);
        }
        assert_eq!(NETWORK_POLICIES.api_version(), "networking.k8s.io/v1");
        assert_eq!(
            NETWORK_POLICIES.qualified(),
            "networkpolicies.networking.k8s.io"
        );
        assert_eq!(PODS.qualified_kind(), "Pod");
    }
}
