//! The Pods' interfaces: every one that exists has this agent's programs, or is down.
//!
//! ```text
//! start: records + pins + interfaces ──> attach ──ok──> index
//!                                          └─fails──> link down, status, again every second ──> up
//! ```
//! Without programs nothing would judge a Pod's packets, so an interface that cannot be attached to
//! is set down; the others are served meanwhile. An interface of ours without a readable record has
//! programs but no endpoint, which drops everything.

use std::{
    collections::{BTreeMap, BTreeSet},
    mem,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use hachi_api::Attachment;
use hachi_kernel::{AttachKind, KernelError, Role};
use hachi_net::is_host_ifname;
use tracing::{error, info, warn};

use crate::{agent::Agent, convert, sockets};

/// How often an interface that is closed is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// Interfaces that programs could not be attached to.
#[derive(Debug, Default)]
pub(crate) struct Closed {
    interfaces: BTreeMap<String, Reason>,
    retry: Option<Instant>,
    /// Records that cannot be used, for the status.
    records: Vec<String>,
}

#[derive(Debug)]
struct Reason {
    ifindex: u32,
    why: String,
    /// The interface could not be set down either.
    open: Option<String>,
}

impl Closed {
    /// When to try again.
    pub(crate) fn retry(&self) -> Option<Instant> {
        self.retry
    }

    pub(crate) fn problems(&self) -> impl Iterator<Item = String> {
        let closed = self.interfaces().map(|(_, problem)| problem);
        closed.chain(self.records.iter().cloned())
    }

    /// The names of the interfaces, and what is wrong with each.
    pub(crate) fn interfaces(&self) -> impl Iterator<Item = (&str, String)> {
        self.interfaces.iter().map(|(ifname, reason)| {
            let state = match &reason.open {
                None => "is down".to_owned(),
                Some(error) => format!("cannot be set down either ({error}): END ITS POD"),
            };
            let problem = format!(
                "no programs can be attached to {ifname}: {}; it {state}, and is tried again",
                reason.why
            );
            (ifname.as_str(), problem)
        })
    }

    /// The interface has been taken over or is gone.
    pub(crate) fn forget(&mut self, ifname: &str) {
        self.interfaces.remove(ifname);
    }
}

impl Agent {
    /// Reads the attachments on disk: those whose interface exists become endpoints again, and
    /// their links are switched to the programs of this agent. Pins of interfaces that are gone are
    /// dropped.
    pub(crate) fn take_up_attachments(&mut self) -> Result<()> {
        let (attachments, unreadable) = self.store.attachments()?;
        for problem in unreadable {
            warn!(%problem, "an attachment record is not readable: its Pod stays cut off");
            self.closed.records.push(problem.to_string());
        }
        let interfaces = self.node.interfaces()?;
        for attachment in attachments {
            if interfaces.get(&attachment.host_ifname) != Some(&attachment.host_ifindex) {
                info!(
                    container = attachment.id.container_id,
                    interface = attachment.host_ifname,
                    "the interface of this attachment is gone"
                );
                continue;
            }
            match convert::endpoint(&attachment) {
                Ok(endpoint) => {
                    self.index.add_endpoint(endpoint);
                    self.attachments.insert(attachment.id.clone(), attachment);
                }
                Err(error) => {
                    warn!(%error, container = attachment.id.container_id, "its Pod stays cut off");
                    self.closed.records.push(format!(
                        "the record of {}/{} cannot be used: {error}",
                        attachment.id.container_id, attachment.id.ifname
                    ));
                }
            }
        }
        if self.datapath.waits_to_take_over()? {
            info!("another version's programs go on until this one knows what to do");
            self.takes_over = true;
        } else {
            self.guard_all(&interfaces)?;
        }
        info!(endpoints = self.attachments.len(), "attachments taken up");
        Ok(())
    }

    /// Attaches to every interface that is ours.
    fn guard_all(&mut self, interfaces: &BTreeMap<String, u32>) -> Result<()> {
        let pinned = self.drop_pins_without_interface(interfaces)?;
        for (ifname, ifindex) in interfaces {
            if is_host_ifname(ifname) || pinned.contains(ifname) {
                self.guard(ifname, *ifindex);
            }
        }
        self.socket_lb = sockets::balance(&mut self.datapath, &self.options)?;
        Ok(())
    }

    /// Everything is attached to, uplinks too: whatever another version has left goes.
    pub(crate) fn end_takeover(&mut self) {
        if self.closed.interfaces.is_empty() {
            self.remove_other_versions();
        }
    }

    /// Changes the programs of another version to this one's, whose maps are complete now.
    pub(crate) fn take_over(&mut self) -> Result<()> {
        let interfaces = self.node.interfaces()?;
        self.guard_all(&interfaces)?;
        self.takes_over = false;
        info!("the programs are this version's now");
        Ok(())
    }

    /// Removes the pins of interfaces that are gone: of attachments whose ADD was killed there may
    /// be nothing else. Returns the interfaces that had pins.
    pub(crate) fn drop_pins_without_interface(
        &mut self,
        interfaces: &BTreeMap<String, u32>,
    ) -> Result<BTreeSet<String>> {
        let pinned = self
            .datapath
            .attached(Role::Pod)
            .context("cannot list the pins")?;
        for ifname in &pinned {
            if !interfaces.contains_key(ifname) {
                self.settling.forget(ifname);
                self.closed.forget(ifname);
                if let Err(error) = self.datapath.detach(Role::Pod, ifname) {
                    warn!(%error, ifname, "the pins of an interface that is gone are left");
                }
            }
        }
        Ok(pinned)
    }

    /// Every interface has programs of this version now.
    fn remove_other_versions(&self) {
        if let Err(errors) = self.datapath.remove_other_versions() {
            for error in errors {
                warn!(%error, "what another version pinned is still there");
            }
        }
    }

    pub(crate) fn attach(&mut self, attachment: &Attachment) -> Result<(), KernelError> {
        let kind =
            self.datapath
                .attach(Role::Pod, attachment.host_ifindex, &attachment.host_ifname)?;
        self.attached(kind, &attachment.host_ifname, attachment.host_ifindex);
        self.closed.forget(&attachment.host_ifname);
        Ok(())
    }

    fn attached(&mut self, kind: AttachKind, ifname: &str, ifindex: u32) {
        self.attach_kind = Some(kind);
        if kind == AttachKind::Clsact {
            self.settling.add(ifname, ifindex);
        }
    }

    /// Attaches to an interface, or closes it.
    fn guard(&mut self, ifname: &str, ifindex: u32) {
        let why = match self.datapath.attach(Role::Pod, ifindex, ifname) {
            Ok(kind) => {
                self.attached(kind, ifname, ifindex);
                return;
            }
            Err(error) => error.to_string(),
        };
        let open = self
            .node
            .set_down(ifindex, ifname)
            .err()
            .map(|error| format!("{error:#}"));
        error!(
            ifname,
            why, open, "no programs can be attached; the interface is closed"
        );
        self.closed
            .interfaces
            .insert(ifname.to_owned(), Reason { ifindex, why, open });
        self.closed.retry = Some(Instant::now() + RETRY);
    }

    /// Tries the closed interfaces again, if it is time to.
    pub(crate) fn retry_closed(&mut self) {
        if self.closed.retry.is_none_or(|at| at > Instant::now()) {
            return;
        }
        self.closed.retry = None;
        let interfaces = match self.node.interfaces() {
            Ok(interfaces) => interfaces,
            Err(error) => {
                warn!(
                    error = format!("{error:#}"),
                    "closed interfaces stay closed"
                );
                self.closed.retry = Some(Instant::now() + RETRY);
                return;
            }
        };
        for (ifname, reason) in mem::take(&mut self.closed.interfaces) {
            if interfaces.get(&ifname) != Some(&reason.ifindex) {
                continue;
            }
            self.guard(&ifname, reason.ifindex);
            if !self.closed.interfaces.contains_key(&ifname) {
                self.open(&ifname);
            }
        }
        if self.closed.interfaces.is_empty() {
            // With the next look at the uplinks.
            self.superseded = true;
        }
    }

    /// Brings an interface up again that has its programs now.
    fn open(&mut self, ifname: &str) {
        let attachment = self.attachments.values().find(|a| a.host_ifname == ifname);
        // One without a usable record is nobody's.
        let Some(attachment) = attachment else { return };
        match self.node.connect(attachment) {
            Ok(()) => info!(
                ifname,
                "programs are attached now; the interface is up again"
            ),
            Err(error) => {
                let why = format!("{error:#}");
                error!(ifname, why, "cannot bring the interface up again");
                let ifindex = attachment.host_ifindex;
                self.closed.interfaces.insert(
                    ifname.to_owned(),
                    Reason {
                        ifindex,
                        why,
                        open: None,
                    },
                );
                self.closed.retry = Some(Instant::now() + RETRY);
            }
        }
    }
}
