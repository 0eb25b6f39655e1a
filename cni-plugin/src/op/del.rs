//! DEL: removes all that ADD made, whatever it finds of it. The address is freed last, so that
//! nobody gets it while anything still points to the old Pod.

use hachi_api::AttachmentId;
use hachi_net::{Link, Masquerade, Netlink, Store, host_ifname, macs};

use super::{Pod, warn};
use crate::{
    agent::Agent,
    conf::Conf,
    env::Env,
    error::{Error, code},
};

pub(crate) fn del(env: &Env, conf: &Conf) -> Result<(), Error> {
    // Gone, or never there: then there is nothing to remove in it.
    let mut pod = match Pod::open(env) {
        Ok(pod) => Some(pod),
        Err(error) if error.is(code::INVALID_NETNS) && !own_namespace(env) => None,
        Err(error) if error.is(code::INVALID_ENVIRONMENT) => None,
        Err(error) => return Err(error),
    };
    let store = Store::open(&conf.ipam.data_dir)?;
    let mut host = Netlink::open()?;
    remove(
        conf,
        &store,
        &mut host,
        pod.as_mut().map(|pod| &mut pod.netlink),
        &env.id,
    )
}

/// Whether `CNI_NETNS` is the plugin's own namespace, which is a mistake and not an absence.
fn own_namespace(env: &Env) -> bool {
    let Some(path) = &env.netns else {
        return false;
    };
    hachi_net::NetNs::open(path).is_ok_and(|found| found.is_current().unwrap_or(false))
}

/// Removes one attachment. Goes on past errors; the first one is returned.
pub(super) fn remove(
    conf: &Conf,
    store: &Store,
    host: &mut Netlink,
    pod: Option<&mut Netlink>,
    id: &AttachmentId,
) -> Result<(), Error> {
    let record = store.attachment(id).unwrap_or_else(|error| {
        warn("the attachment's record", error);
        None
    });
    let mac = record.as_ref().map(|record| record.mac.clone());
    // The interface is out of use before the agent takes its programs off. One that is down learns
    // of it from the missing record.
    let mut agent = Agent::find(conf);
    let removed = if store.reaper_runs() {
        retire(host, pod, id, mac.as_deref())
    } else {
        unwire(host, pod, id, mac.as_deref())
    };
    let asked = agent.as_mut().map(|agent| agent.delete(id));
    if let Some(Err(error)) = asked {
        warn("the agent", error);
    } else if let Some(Err(error)) = agent.as_mut().map(Agent::deleted) {
        // It keeps trying by itself, and nothing is left for it to guard.
        warn("the agent", error);
    }
    removed?;
    if record
        .as_ref()
        .map_or(conf.masquerade, |record| record.masquerade)
    {
        // An ADD that was killed has a claim, but perhaps no record yet.
        let claim = store.claim(id).ok().flatten();
        let addresses = record
            .map(|record| record.addresses)
            .or(claim.map(|claim| claim.addresses))
            .unwrap_or_default();
        Masquerade::of(&conf.name).remove(&addresses)?;
    }
    store.forget(id)?;
    store.release(id)?;
    Ok(())
}

/// Takes the interface out of use, both names with it; the agent deletes it.
fn retire(
    host: &mut Netlink,
    pod: Option<&mut Netlink>,
    id: &AttachmentId,
    mac: Option<&str>,
) -> Result<(), Error> {
    let Some(link) = host.link(&host_ifname(id))? else {
        return unwire(host, pod, id, mac);
    };
    // The Pod's side first: once the host's has its new name, the pair is being deleted.
    if let Some(pod) = pod
        && let Some(link) = pod.link(&id.ifname)?.filter(|link| is_ours(link, id, mac))
    {
        pod.retire_link(&link)?;
    }
    Ok(host.retire_link(&link)?)
}

/// Deletes the interface.
fn unwire(
    host: &mut Netlink,
    pod: Option<&mut Netlink>,
    id: &AttachmentId,
    mac: Option<&str>,
) -> Result<(), Error> {
    if host.delete_link(&host_ifname(id))? {
        return Ok(());
    }
    // Somebody may have renamed or moved the host side; the Pod's side is deleted if it is ours.
    let Some(pod) = pod else {
        return Ok(());
    };
    if pod
        .link(&id.ifname)?
        .is_some_and(|link| is_ours(&link, id, mac))
    {
        pod.delete_link(&id.ifname)?;
    }
    Ok(())
}

/// Whether this is the Pod's side of a pair that we made; `mac` is that of the record.
fn is_ours(link: &Link, id: &AttachmentId, mac: Option<&str>) -> bool {
    let made = macs(id).0.to_string();
    let found = link.mac.map(|mac| mac.to_string());
    link.veth && found.is_some_and(|found| found == made || Some(found.as_str()) == mac)
}
