//! What can be fed to the index, and how complaints about it are told.

use std::fmt;

use hachi_policy::PolicyKind;
use k8s_openapi::api::{
    core::v1::{Namespace, Node, Pod, Service},
    discovery::v1::EndpointSlice,
};
use serde_json::Value;

/// An object as the API serves it.
#[derive(Clone, Debug)]
pub enum Object {
    /// Pod.
    Pod(Box<Pod>),
    /// Namespace.
    Namespace(Box<Namespace>),
    /// Node.
    Node(Box<Node>),
    /// Service.
    Service(Box<Service>),
    /// `EndpointSlice`.
    EndpointSlice(Box<EndpointSlice>),
    /// `NetworkPolicy`, as it came: a typed object would not tell of fields that it does not know.
    NetworkPolicy(Box<Value>),
    /// `ClusterNetworkPolicy`, as it came.
    ClusterNetworkPolicy(Box<Value>),
    /// `AdminNetworkPolicy`, as it came.
    AdminNetworkPolicy(Box<Value>),
    /// `BaselineAdminNetworkPolicy`, as it came.
    BaselineAdminNetworkPolicy(Box<Value>),
}

/// Kinds of [`Object`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// Pod.
    Pod,
    /// Namespace.
    Namespace,
    /// Node.
    Node,
    /// Service.
    Service,
    /// `EndpointSlice`.
    EndpointSlice,
    /// `NetworkPolicy`.
    NetworkPolicy,
    /// `ClusterNetworkPolicy`.
    ClusterNetworkPolicy,
    /// `AdminNetworkPolicy`.
    AdminNetworkPolicy,
    /// `BaselineAdminNetworkPolicy`.
    BaselineAdminNetworkPolicy,
}

impl Kind {
    /// The kind of policy that it is, if it is one.
    #[must_use]
    pub const fn policy(self) -> Option<PolicyKind> {
        match self {
            Self::NetworkPolicy => Some(PolicyKind::NetworkPolicy),
            Self::ClusterNetworkPolicy => Some(PolicyKind::ClusterNetworkPolicy),
            Self::AdminNetworkPolicy => Some(PolicyKind::AdminNetworkPolicy),
            Self::BaselineAdminNetworkPolicy => Some(PolicyKind::BaselineAdminNetworkPolicy),
            Self::Pod | Self::Namespace | Self::Node | Self::Service | Self::EndpointSlice => None,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pod => "Pod",
            Self::Namespace => "Namespace",
            Self::Node => "Node",
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::NetworkPolicy => "NetworkPolicy",
            Self::ClusterNetworkPolicy => "ClusterNetworkPolicy",
            Self::AdminNetworkPolicy => "AdminNetworkPolicy",
            Self::BaselineAdminNetworkPolicy => "BaselineAdminNetworkPolicy",
        })
    }
}

impl Object {
    /// Its kind.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        match self {
            Self::Pod(_) => Kind::Pod,
            Self::Namespace(_) => Kind::Namespace,
            Self::Node(_) => Kind::Node,
            Self::Service(_) => Kind::Service,
            Self::EndpointSlice(_) => Kind::EndpointSlice,
            Self::NetworkPolicy(_) => Kind::NetworkPolicy,
            Self::ClusterNetworkPolicy(_) => Kind::ClusterNetworkPolicy,
            Self::AdminNetworkPolicy(_) => Kind::AdminNetworkPolicy,
            Self::BaselineAdminNetworkPolicy(_) => Kind::BaselineAdminNetworkPolicy,
        }
    }

    /// Its namespace (empty for what has none) and name.
    #[must_use]
    pub fn name(&self) -> (&str, &str) {
        let metadata = self.metadata();
        (metadata.namespace, metadata.name)
    }

    /// Its UID; empty if it does not say.
    #[must_use]
    pub fn uid(&self) -> &str {
        self.metadata().uid
    }

    fn metadata(&self) -> Metadata<'_> {
        let typed = match self {
            Self::Pod(o) => &o.metadata,
            Self::Namespace(o) => &o.metadata,
            Self::Node(o) => &o.metadata,
            Self::Service(o) => &o.metadata,
            Self::EndpointSlice(o) => &o.metadata,
            Self::NetworkPolicy(o)
            | Self::ClusterNetworkPolicy(o)
            | Self::AdminNetworkPolicy(o)
            | Self::BaselineAdminNetworkPolicy(o) => {
                let field = |key: &str| o["metadata"][key].as_str().unwrap_or_default();
                return Metadata {
                    namespace: field("namespace"),
                    name: field("name"),
                    uid: field("uid"),
                };
            }
        };
        Metadata {
            namespace: typed.namespace.as_deref().unwrap_or_default(),
            name: typed.name.as_deref().unwrap_or_default(),
            uid: typed.uid.as_deref().unwrap_or_default(),
        }
    }
}

/// What identifies an object; empty where it does not say.
struct Metadata<'a> {
    namespace: &'a str,
    name: &'a str,
    uid: &'a str,
}

/// Something about an object that could not be honoured.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// The object's kind.
    pub kind: Kind,
    /// Its namespace, empty for what has none.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its UID; empty if it did not say.
    pub uid: String,
    /// What is wrong, what was done instead, and what to do.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            kind,
            namespace,
            name,
            uid: _,
            message,
        } = self;
        if namespace.is_empty() {
            write!(f, "{kind} {name}: {message}")
        } else {
            write!(f, "{kind} {namespace}/{name}: {message}")
        }
    }
}
