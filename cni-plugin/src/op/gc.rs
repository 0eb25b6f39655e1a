//! GC: frees what belongs to no attachment that the runtime lists. Goes on past errors and reports
//! them all.

use std::collections::BTreeSet;

use hachi_api::AttachmentId;
use hachi_net::{Link, Masquerade, Netlink, Store, host_ifname, is_host_ifname, is_retired_ifname};

use crate::{
    agent::Agent,
    conf::{AgentMode, Conf},
    error::{Error, code},
};

pub(crate) fn gc(conf: &Conf) -> Result<(), Error> {
    // Without a list nothing is known to be stale.
    let Some(valid) = &conf.valid else {
        return Ok(());
    };
    let store = Store::open(&conf.ipam.data_dir)?;
    let mut errors: Vec<String> = Vec::new();

    let (claims, unreadable) = store.claims()?;
    errors.extend(unreadable.iter().map(ToString::to_string));
    let (records, unreadable) = store.attachments()?;
    errors.extend(unreadable.iter().map(ToString::to_string));

    // The list is of this network; attachments of others are none of our business.
    let mut keep: BTreeSet<AttachmentId> = valid.iter().cloned().collect();
    keep.extend(
        claims
            .iter()
            .filter(|c| c.network != conf.name)
            .map(|claim| claim.id.clone()),
    );

    // Links before addresses: an address is free only once nothing leads to its last owner.
    remove_links(&keep, &mut errors);
    for record in records.iter().filter(|record| !keep.contains(&record.id)) {
        note(&mut errors, store.forget(&record.id));
    }
    if let Some(mut agent) = Agent::find(conf) {
        note(&mut errors, agent.gc(keep.iter().cloned().collect()));
    }
    let kept = claims
        .iter()
        .filter(|claim| claim.network == conf.name && keep.contains(&claim.id))
        .flat_map(|claim| claim.addresses.iter().copied())
        .collect();
    // Where neither is so there is no table, and the kernel need not load nf_tables to say it.
    if conf.agent == AgentMode::Optional || records.iter().any(|record| record.masquerade) {
        note(&mut errors, Masquerade::of(&conf.name).retain(&kept));
    }
    for claim in claims.iter().filter(|claim| !keep.contains(&claim.id)) {
        note(&mut errors, store.release_claim(claim));
    }
    if errors.is_empty() {
        return Ok(());
    }
    let why = format!("{} of the stale things could not be removed", errors.len());
    Err(Error::new(code::NOT_REMOVED, why).details(errors.join("; ")))
}

fn remove_links(keep: &BTreeSet<AttachmentId>, errors: &mut Vec<String>) {
    let names: BTreeSet<_> = keep.iter().map(host_ifname).collect();
    let stale = |link: &Link| {
        let unlisted = is_host_ifname(&link.name) && !names.contains(&link.name);
        link.veth && (unlisted || is_retired_ifname(&link.name))
    };
    let removed = Netlink::open().and_then(|mut host| {
        for link in host.links()? {
            if stale(&link) {
                note(errors, host.delete_link(&link.name));
            }
        }
        Ok(())
    });
    note(errors, removed);
}

fn note<T>(errors: &mut Vec<String>, outcome: Result<T, impl std::fmt::Display>) {
    if let Err(error) = outcome {
        errors.push(error.to_string());
    }
}
