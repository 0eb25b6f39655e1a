//! CHECK: compares what is with what `prevResult` says that ADD made. Silent on success; on failure
//! it names every difference.

use std::net::IpAddr;

use hachi_net::{Masquerade, Netlink, Store, gateway_of, host_ifname};

use super::Pod;
use crate::{
    agent::Agent,
    conf::Conf,
    env::Env,
    error::{Error, code},
    prev::PrevResult,
};

pub(crate) fn check(env: &Env, conf: &Conf) -> Result<(), Error> {
    let prev = conf
        .prev
        .as_ref()
        .ok_or_else(|| Error::field("prevResult", "missing"))?;
    let mut pod = Pod::open(env)?;
    let host_name = host_ifname(&env.id);
    let addresses = own_addresses(prev, env)?;

    let mut differences = Vec::new();
    check_pod(&mut pod.netlink, env, prev, &addresses, &mut differences)?;
    check_host(
        &mut Netlink::open()?,
        &host_name,
        &addresses,
        &mut differences,
    )?;
    check_store(
        &Store::open(&conf.ipam.data_dir)?,
        env,
        &addresses,
        &mut differences,
    )?;
    if conf.masquerade {
        let masqueraded = Masquerade::of(&conf.name).pods()?;
        for address in addresses.iter().filter(|a| !masqueraded.contains(a)) {
            differences.push(format!("{address} is not masqueraded"));
        }
    }
    if !differences.is_empty() {
        return Err(
            Error::new(code::NOT_AS_MADE, "the attachment is not as ADD made it")
                .details(differences.join("; ")),
        );
    }
    match Agent::connect(conf)? {
        Some(mut agent) => agent.check(&env.id),
        None => Ok(()),
    }
}

/// The addresses that `prevResult` gives to our interface.
fn own_addresses(prev: &PrevResult, env: &Env) -> Result<Vec<IpAddr>, Error> {
    let ours = |index: usize| {
        prev.interfaces.get(index).is_some_and(|interface| {
            interface.name == env.id.ifname
                && interface
                    .sandbox
                    .as_ref()
                    .is_some_and(|sandbox| !sandbox.is_empty())
        })
    };
    let ips = prev.ips.iter().filter(|ip| ip.interface.is_some_and(ours));
    let addresses: Vec<_> = ips.map(|ip| ip.address.addr()).collect();
    if addresses.is_empty() {
        let why = format!("no address of {} in it", env.id.ifname);
        return Err(Error::field("prevResult", why));
    }
    Ok(addresses)
}

fn check_pod(
    pod: &mut Netlink,
    env: &Env,
    prev: &PrevResult,
    addresses: &[IpAddr],
    differences: &mut Vec<String>,
) -> Result<(), Error> {
    let name = &env.id.ifname;
    let Some(link) = pod.link(name)? else {
        differences.push(format!("the Pod has no interface {name}"));
        return Ok(());
    };
    if !link.up {
        differences.push(format!("{name} is down"));
    }
    let made = prev
        .interfaces
        .iter()
        .find(|i| i.name == *name && i.sandbox.is_some());
    if let Some(mac) = made.and_then(|interface| interface.mac.as_ref())
        && link
            .mac
            .is_none_or(|found| found.to_string() != mac.to_ascii_lowercase())
    {
        differences.push(format!("{name} has another MAC address than {mac}"));
    }
    let present = pod.addresses()?;
    for address in addresses {
        if !present.contains(&(link.index, *address)) {
            differences.push(format!("{name} has no address {address}"));
        }
    }
    let routes = pod.routes()?;
    // Routes through other gateways are those of plugins after us.
    for route in prev
        .routes
        .iter()
        .filter(|r| r.gw == Some(gateway_of(r.dst.addr())))
    {
        if !routes.iter().any(|found| found.dst == route.dst.trunc()) {
            differences.push(format!("the Pod has no route to {}", route.dst));
        }
    }
    Ok(())
}

fn check_host(
    host: &mut Netlink,
    name: &str,
    addresses: &[IpAddr],
    differences: &mut Vec<String>,
) -> Result<(), Error> {
    let Some(link) = host.link(name)? else {
        differences.push(format!("the node has no interface {name}"));
        return Ok(());
    };
    if !link.up {
        differences.push(format!("{name} is down"));
    }
    let routes = host.routes()?;
    for address in addresses {
        let leads = routes.iter().any(|route| {
            route.dst == ipnet::IpNet::from(*address) && route.oif == Some(link.index)
        });
        if !leads {
            differences.push(format!("the node has no route to {address} through {name}"));
        }
    }
    Ok(())
}

fn check_store(
    store: &Store,
    env: &Env,
    addresses: &[IpAddr],
    differences: &mut Vec<String>,
) -> Result<(), Error> {
    let reserved = store
        .claim(&env.id)?
        .map(|claim| claim.addresses)
        .unwrap_or_default();
    for address in addresses {
        if !reserved.contains(address) {
            differences.push(format!("{address} is not reserved for the Pod"));
        }
    }
    if store.attachment(&env.id)?.is_none() {
        differences.push("the attachment has no record".into());
    }
    Ok(())
}
