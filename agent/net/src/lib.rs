//! Links, addresses, routes, neighbours, network namespaces, masquerade, and the address store.
//!
//! ```text
//! hachi-cni ──> Store::allocate ──> wire() ──> Store::record ──> connect()      (ADD)
//! hachi-agent ──> Store::attachments, routes, local_addresses     (start, every few seconds)
//! ```
//! Everything is blocking: a netlink request is answered by the kernel within the system call that
//! sends it, so there is nothing to wait for, and the plugin needs no runtime.
#![forbid(unsafe_code)]

mod changes;
mod error;
mod exclusive;
mod host;
mod link;
mod mac;
mod masquerade;
mod monitor;
mod names;
mod netlink;
mod netns;
mod reaper;
mod route;
mod sockets;
mod store;
mod sysctl;
mod uplinks;
mod vxlan;
mod wire;

pub use changes::{Changes, Restored};
pub use error::NetError;
pub use exclusive::Exclusive;
pub use host::{HOST_IFNAME, HostPair, SERVICES_IFNAME};
pub use link::{Link, local_addresses};
pub use mac::Mac;
pub use masquerade::Masquerade;
pub use monitor::Monitor;
pub use names::{host_ifname, is_host_ifname, macs};
pub use netlink::Netlink;
pub use netns::NetNs;
pub use reaper::{Reaper, is_retired_ifname};
pub use route::{NextHop, ROUTE_PROTOCOL, Route, RouteChanges, ensure_routes, uplink};
pub use sockets::{Connected, close_udp};
pub use store::{Claim, Owner, Range, RangeError, RangeSet, Store, StoreError, boot_id};
pub use sysctl::{Family, enable_forwarding, enable_ipv6, forwards};
pub use uplinks::{Uplink, local_ports};
pub use vxlan::VXLAN_IFNAME;
pub use wire::{
    GATEWAY_V4, GATEWAY_V6, HostLink, PodRoute, Wired, Wiring, connect, gateway_of, wire,
};
