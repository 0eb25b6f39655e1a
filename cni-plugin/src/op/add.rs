//! ADD: validate, allocate, wire, record, tell the agent, connect, answer. A failure undoes what was
//! done.
//!
//! The interface is made with its host side down. It comes up when the agent's programs guard it,
//! or where there is no agent that could.

use std::path::Path;

use hachi_api::Attachment;
use hachi_net::{
    Changes, Family, HostLink, Masquerade, Netlink, Owner, PodRoute, Store, Wiring, connect,
    enable_forwarding, host_ifname, macs, wire,
};
use ipnet::IpNet;
use serde_json::Value;

use super::{Pod, warn};
use crate::{
    agent::Agent,
    conf::Conf,
    env::Env,
    error::{Error, code},
    pool::Pool,
    result,
};

/// `answer` writes the result: an attachment that the runtime never hears of is undone too.
pub(crate) fn add(
    env: &Env,
    conf: &Conf,
    answer: impl FnOnce(&Value) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut pod = Pod::open(env)?;
    if pod.netlink.link(&env.id.ifname)?.is_some() {
        let why = format!("the Pod has an interface {} already", env.id.ifname);
        return Err(Error::new(code::INTERFACE_EXISTS, why));
    }
    let mut agent = Agent::connect(conf)?;
    let pool = Pool::find(conf, agent.as_mut())?;
    let mut host = Netlink::open()?;
    let mtu = pool.mtu(&mut host)?;
    let store = Store::open(&conf.ipam.data_dir)?;

    let owner = Owner {
        network: conf.name.clone(),
        id: env.id.clone(),
        pod: env.args.pod.clone(),
    };
    let requested = requested(env, conf, agent.as_mut())?;
    let addresses = store.allocate(&owner, &pool.sets, &requested)?;

    let host_ifname = host_ifname(&env.id);
    let (pod_mac, host_mac) = macs(&env.id);
    let pod_mac = conf.runtime.mac.or(env.args.mac).unwrap_or(pod_mac);
    let routes = routes(conf, &addresses);
    let wiring = Wiring {
        host_ifname: &host_ifname,
        host_mac,
        pod_ifname: &env.id.ifname,
        pod_mac,
        mtu,
        addresses: &addresses,
        routes: &routes,
    };
    let made = forwarding(agent.is_some(), &addresses, &conf.ipam.data_dir)
        .and_then(|()| Ok(wire(&mut host, &mut pod.netlink, &pod.namespace, &wiring)?));
    let wired = match made {
        Ok(wired) => wired,
        Err(error) => {
            give_back(&store, env);
            return Err(error);
        }
    };
    let attachment = Attachment {
        id: env.id.clone(),
        netns: pod.namespace.path().to_owned(),
        pod: owner.pod,
        host_ifname: host_ifname.clone(),
        host_ifindex: wired.host_ifindex,
        mac: pod_mac.to_string(),
        host_mac: host_mac.to_string(),
        addresses: addresses.clone(),
        port_mappings: conf.runtime.ports.clone(),
        masquerade: conf.masquerade,
    };
    let link = HostLink {
        index: wired.host_ifindex,
        name: &host_ifname,
        pod_mac,
        addresses: &addresses,
    };
    let told = |agent: &mut Agent| agent.add(attachment.clone());
    let finish = || {
        store.record(&attachment)?;
        if conf.masquerade {
            Masquerade::of(&conf.name).add(&conf.ipam.subnets(), &addresses)?;
        }
        agent.as_mut().map_or(Ok(()), told)?;
        connect(&mut host, &link)?;
        answer(&result::added(conf, &attachment, wired.mtu, &routes))
    };
    finish().inspect_err(|_| undo(env, conf, &store, &mut host, &attachment))
}

/// The addresses that somebody asks for: the runtime, by capability or `CNI_ARGS`; without a word
/// from it the Pod itself, by an annotation that the agent knows.
fn requested(
    env: &Env,
    conf: &Conf,
    agent: Option<&mut Agent>,
) -> Result<Vec<std::net::IpAddr>, Error> {
    let mut requested = conf.runtime.ips.clone();
    if let Some(address) = env.args.ip
        && !requested.contains(&address)
    {
        requested.push(address);
    }
    match (agent, &env.args.pod) {
        (Some(agent), Some(pod)) if requested.is_empty() => agent.wanted_addresses(pod),
        _ => Ok(requested),
    }
}

/// A Pod that no agent cares for needs a host that forwards.
fn forwarding(agent: bool, addresses: &[std::net::IpAddr], data_dir: &Path) -> Result<(), Error> {
    if !agent {
        let changes = Changes::of(data_dir)?;
        for address in addresses {
            enable_forwarding(Family::of(*address), &changes)?;
        }
    }
    Ok(())
}

/// The configuration's routes, or a default route for each family.
fn routes(conf: &Conf, addresses: &[std::net::IpAddr]) -> Vec<PodRoute> {
    if !conf.ipam.routes.is_empty() {
        return conf.ipam.routes.clone();
    }
    let everywhere = |address: &std::net::IpAddr| IpNet::new_assert(*address, 0).trunc();
    addresses
        .iter()
        .map(|address| PodRoute::to(everywhere(address)))
        .collect()
}

fn undo(env: &Env, conf: &Conf, store: &Store, host: &mut Netlink, attachment: &Attachment) {
    // The interface first: without it nothing needs the programs that the agent takes off.
    if let Err(error) = host.delete_link(&attachment.host_ifname) {
        warn("undoing ADD", error);
    }
    // On a new connection: the old one may be what failed.
    if let Some(mut agent) = Agent::find(conf)
        && let Err(error) = agent.delete(&env.id).and_then(|()| agent.deleted())
    {
        warn("the agent does not forget the endpoint", error);
    }
    if attachment.masquerade
        && let Err(error) = Masquerade::of(&conf.name).remove(&attachment.addresses)
    {
        warn("undoing ADD", error);
    }
    if let Err(error) = store.forget(&env.id) {
        warn("undoing ADD", error);
    }
    give_back(store, env);
}

fn give_back(store: &Store, env: &Env) {
    if let Err(error) = store.release(&env.id) {
        warn("undoing ADD", error);
    }
}
