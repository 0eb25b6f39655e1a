//! The node around the Pods: its addresses, the ways to other nodes' Pods, forwarding, the MTU.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use hachi_abi::{HostDevice, TunnelDevice};
use hachi_api::Attachment;
use hachi_index::Desired;
use hachi_net::{
    Changes, Family, HostLink, HostPair, Link, NetNs, Netlink, Uplink, VXLAN_IFNAME, connect,
    enable_forwarding, ensure_routes, uplink,
};
use tracing::{info, warn};

use crate::{options::Options, routing::Plan};

/// What a link has that tells nothing of itself (RFC 894).
const ETHERNET_MTU: u32 = 1500;

/// How long an uplink keeps its programs while it is down, or no route leads out by it.
const IDLE: Duration = Duration::from_secs(60);

/// The node's own network, as far as the agent sets it up.
pub(crate) struct Node {
    netlink: Netlink,
    changes: Changes,
    mtu: u32,
    /// The devices that lead out of the node, by index.
    uplinks: BTreeMap<u32, Uplink>,
    /// Since when uplinks have been idle, by index.
    idle: BTreeMap<u32, Instant>,
    /// How other nodes are reached.
    plan: Plan,
    /// The VXLAN device, where one is needed.
    device: Option<Link>,
    /// The node's own way to Services.
    pair: Option<HostPair>,
    /// The programs of that way could not be put in place.
    pair_failed: bool,
    /// What could not be found out or made ready.
    problems: Vec<String>,
    /// What could not be written at last.
    failures: Vec<String>,
}

impl Node {
    /// Finds the uplink's MTU.
    pub(crate) fn start(options: &Options) -> Result<Self> {
        let mut netlink = Netlink::open().context("cannot open a netlink socket")?;
        let mtu = match options.mtu {
            Some(mtu) => mtu,
            None => uplink(&mut netlink)
                .context("cannot find the uplink (say --mtu)")?
                .map_or(ETHERNET_MTU, |link| link.mtu),
        };
        info!(mtu, "the MTU of Pods, before tunnels");
        Ok(Self {
            netlink,
            changes: Changes::of(&options.data_dir)?,
            mtu,
            uplinks: BTreeMap::new(),
            idle: BTreeMap::new(),
            plan: Plan::default(),
            device: None,
            pair: None,
            pair_failed: false,
            problems: Vec::new(),
            failures: Vec::new(),
        })
    }

    /// The MTU of Pods, bytes.
    pub(crate) fn mtu(&self) -> u32 {
        self.mtu
    }

    /// The devices that lead out of the node, by index.
    pub(crate) fn uplinks(&self) -> &BTreeMap<u32, Uplink> {
        &self.uplinks
    }

    /// How other nodes are reached.
    pub(crate) fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The VXLAN device.
    pub(crate) fn device(&self) -> Option<&Link> {
        self.device.as_ref()
    }

    /// The node's end of its tunnels, for the datapath.
    pub(crate) fn tunnel(&self, options: &Options) -> TunnelDevice {
        TunnelDevice {
            ifindex: self.device.as_ref().map_or(0, |link| link.index),
            vni: options.vxlan_vni,
            mtu: self.mtu,
            port: options.vxlan_port.to_be_bytes(),
            pad: [0; 2],
        }
    }

    /// The node's own way to Services.
    pub(crate) fn pair(&self) -> Option<&HostPair> {
        self.pair.as_ref()
    }

    /// Notes whether that way's programs are in place. Tells whether that is news.
    pub(crate) fn pair_is_guarded(&mut self, guarded: bool) -> bool {
        std::mem::replace(&mut self.pair_failed, !guarded) == guarded
    }

    /// The way, for the datapath. It is taken for whole until its programs are known to be missing: those
    /// of an earlier agent work on.
    pub(crate) fn host(&self) -> HostDevice {
        let known = self
            .pair
            .as_ref()
            .filter(|_| !self.pair_failed)
            .and_then(|HostPair { near, far }| Some((near.index, far.index, near.mac?)));
        known.map_or_else(HostDevice::default, |(near, far, mac)| HostDevice {
            near,
            far,
            mac: mac.0,
            pad: [0; 2],
        })
    }

    /// What could not be set up.
    pub(crate) fn problems(&self) -> impl Iterator<Item = &String> {
        let planned = self.plan.problems.iter();
        self.problems.iter().chain(planned).chain(&self.failures)
    }

    /// Addresses of the node's own interfaces, loopback's apart.
    pub(crate) fn local_addresses() -> Result<BTreeSet<IpAddr>> {
        hachi_net::local_addresses().context("cannot list the node's addresses")
    }

    /// Interfaces: index by name.
    pub(crate) fn interfaces(&mut self) -> Result<BTreeMap<String, u32>> {
        let links = self.netlink.links().context("cannot list interfaces")?;
        Ok(links
            .into_iter()
            .map(|link| (link.name, link.index))
            .collect())
    }

    /// Sets an interface down: nothing passes it in either direction.
    pub(crate) fn set_down(&mut self, ifindex: u32, ifname: &str) -> Result<()> {
        Ok(self.netlink.set_down(ifindex, ifname)?)
    }

    /// Brings a Pod's interface up, with the routes and neighbours that it lost when it went down.
    pub(crate) fn connect(&mut self, attachment: &Attachment) -> Result<()> {
        let pod_mac = attachment.mac.parse().context("its record's MAC address")?;
        let link = HostLink {
            index: attachment.host_ifindex,
            name: &attachment.host_ifname,
            pod_mac,
            addresses: &attachment.addresses,
        };
        Ok(connect(&mut self.netlink, &link)?)
    }

    /// Looks at the node's network and decides how other nodes are reached; makes the VXLAN device, down,
    /// if one is needed. `pods`: the interfaces that lead to this node's Pods.
    ///
    /// What cannot be found out stays as it was last known.
    pub(crate) fn look(&mut self, options: &Options, desired: &Desired, pods: &BTreeSet<u32>) {
        self.problems.clear();
        let nodes: BTreeSet<IpAddr> = desired
            .other_nodes()
            .flat_map(|(_, node)| node.internal_ips.iter().copied())
            .collect();
        let before = self.remembered();
        match self.netlink.uplinks(&options.uplink, &nodes, pods, &before) {
            Ok(uplinks) => self.uplinks = uplinks,
            Err(error) => self.problem(format!("the last known uplinks stay in force: {error}")),
        }
        match self.netlink.on_link(&nodes) {
            Ok(near) => self.plan = Plan::of(options.routing, desired, &near),
            Err(error) => self.problem(format!("the last known ways stay in force: {error}")),
        }
        let used = self.uplinks.values().filter(|uplink| !uplink.idle);
        let uplink = used.map(|uplink| uplink.mtu).min();
        if let Some(problem) = uplink.and_then(|mtu| self.plan.too_short(mtu)) {
            self.problem(problem);
        }
        let mtu = match (options.mtu, uplink) {
            (Some(mtu), _) => mtu,
            (None, Some(mtu)) => self.plan.mtu(mtu),
            (None, None) => self.mtu,
        };
        if mtu != self.mtu {
            info!(mtu, "the MTU of Pods");
            self.mtu = mtu;
        }
        match self.netlink.ensure_host_pair() {
            Ok(pair) => self.pair = Some(pair),
            Err(error) => {
                self.pair = None;
                self.problem(format!(
                    "no way for the node's own packets to Services, but for its sockets: {error}"
                ));
            }
        }
        if self.plan.needs_device {
            match self.netlink.ensure_vxlan(options.vxlan_port, mtu) {
                Ok(link) => self.device = Some(link),
                Err(error) => {
                    self.device = None;
                    self.problem(format!(
                        "no tunnels: {error} (is another network's VXLAN on port {}? see --vxlan-port)",
                        options.vxlan_port
                    ));
                }
            }
        } else if self.device.is_none() {
            // One that an earlier agent needed.
            self.device = self.netlink.link(VXLAN_IFNAME).ok().flatten();
        }
    }

    /// The uplinks without those that have been idle for long.
    fn remembered(&mut self) -> BTreeMap<u32, Uplink> {
        let now = Instant::now();
        let uplinks = &self.uplinks;
        self.idle
            .retain(|index, _| uplinks.get(index).is_some_and(|uplink| uplink.idle));
        for uplink in uplinks.values().filter(|uplink| uplink.idle) {
            self.idle.entry(uplink.index).or_insert(now);
        }
        let gone = |index: u32| {
            let since = self.idle.get(&index);
            since.is_some_and(|since| now.duration_since(*since) > IDLE)
        };
        let mut remembered = self.uplinks.clone();
        remembered.retain(|index, _| !gone(*index));
        remembered
    }

    /// Brings forwarding, the VXLAN device and routes to what was decided, once maps and programs are in
    /// place. `guarded`: those of the device are. Problems are kept for the status and tried again at
    /// the next call.
    pub(crate) fn finish(&mut self, desired: &Desired, guarded: bool) {
        self.failures.clear();
        let families: BTreeSet<bool> = desired
            .pod_cidrs()
            .iter()
            .map(|cidr| cidr.addr().is_ipv4())
            .collect();
        for v4 in families {
            let family = if v4 { Family::V4 } else { Family::V6 };
            match enable_forwarding(family, &self.changes) {
                Ok(false) => {}
                Ok(true) => info!(v4, "the node forwards packets now"),
                Err(error) => self.failure(format!("cannot enable forwarding: {error}")),
            }
        }
        let device = self
            .device
            .as_ref()
            .filter(|_| guarded && self.plan.needs_device)
            .map(|link| link.index);
        if let Some(index) = device
            && let Err(error) = self.netlink.set_up(index, VXLAN_IFNAME)
        {
            self.failure(error.to_string());
        }
        let own = desired.own_node().map(|node| node.internal_ips.as_slice());
        let wanted = self.plan.routes(device, own.unwrap_or_default());
        match ensure_routes(&mut self.netlink, &wanted) {
            Ok(changes) => {
                if changes.written + changes.deleted > 0 {
                    info!(
                        written = changes.written,
                        deleted = changes.deleted,
                        "routes changed"
                    );
                }
                for error in changes.errors {
                    self.failure(error.to_string());
                }
            }
            Err(error) => self.failure(format!("cannot write routes: {error}")),
        }
        if !self.plan.needs_device && self.device.is_some() {
            match self.netlink.delete_link(VXLAN_IFNAME) {
                Ok(_) => self.device = None,
                Err(error) => self.failure(error.to_string()),
            }
        }
    }

    /// Gives the Pods that have the MTU `before` the one that holds now. One that its configuration gave
    /// another keeps that.
    pub(crate) fn follow_mtu<'a>(
        &mut self,
        before: u32,
        attachments: impl Iterator<Item = &'a Attachment>,
    ) {
        let mtu = self.mtu;
        for attachment in attachments {
            if let Err(error) = set_mtu(&mut self.netlink, attachment, before, mtu) {
                let name = &attachment.host_ifname;
                warn!(%error, name, mtu, "a Pod keeps its MTU");
            }
        }
    }

    fn problem(&mut self, problem: String) {
        warn!(problem, "the node's network is not complete");
        self.problems.push(problem);
    }

    fn failure(&mut self, failure: String) {
        warn!(failure, "the node's network is not complete");
        self.failures.push(failure);
    }
}

/// Changes both sides of a Pod's interface.
fn set_mtu(netlink: &mut Netlink, attachment: &Attachment, before: u32, mtu: u32) -> Result<()> {
    let Attachment {
        id,
        netns,
        host_ifname,
        ..
    } = attachment;
    let Some(host) = netlink.link(host_ifname)? else {
        return Ok(());
    };
    if host.mtu != before && host.mtu != mtu {
        return Ok(());
    }
    netlink.set_mtu(host.index, host_ifname, mtu)?;
    let mut pod = Netlink::open_in(&NetNs::open(netns)?)?;
    if let Some(link) = pod.link(&id.ifname)?
        && link.mtu == before
    {
        pod.set_mtu(link.index, &id.ifname, mtu)?;
    }
    Ok(())
}
