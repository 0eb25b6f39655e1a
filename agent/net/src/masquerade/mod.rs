//! Masquerade where the plugin works alone: an nftables table of its own for each network.
//!
//! ```text
//! table inet hachi-<network> {
//!     set pods4 { type ipv4_addr; }              the Pods, one element each
//!     set pods6 { type ipv6_addr; }
//!     chain postrouting {
//!         type nat hook postrouting priority srcnat;
//!         ip daddr 10.1.0.0/16 return            the network itself, multicast, link-local
//!         ip saddr @pods4 masquerade
//!     }                                          and the same for IPv6
//! }
//! ```
//! Every change is one transaction. ADD writes the whole table anew but for the sets' other elements,
//! so that a pool that has changed is in force with the next Pod; the last one to leave takes the
//! table along. Processes need no lock: the kernel does one transaction at a time, and the removal of
//! an empty table names the generation of the ruleset in which it was seen to be empty.

mod message;
mod socket;

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use nix::errno::Errno;

use self::{
    message::{Message, families},
    socket::NfTables,
};
use crate::NetError;

/// How often the removal of an empty table is tried while others change the ruleset.
const ATTEMPTS: usize = 20;

/// The masquerade of one network.
#[derive(Clone, Debug)]
pub struct Masquerade {
    table: String,
}

impl Masquerade {
    /// Of the network of that name.
    #[must_use]
    pub fn of(network: &str) -> Self {
        Self {
            table: format!("hachi-{network}"),
        }
    }

    /// Masquerades what these Pods send to anywhere but `inside`, from now on.
    pub fn add(&self, inside: &[IpNet], pods: &[IpAddr]) -> Result<(), NetError> {
        let mut messages = vec![Message::new_table(&self.table)];
        for family in families() {
            messages.push(Message::new_set(&self.table, family));
        }
        messages.push(Message::new_chain(&self.table));
        messages.push(Message::flush_chain(&self.table));
        for family in families() {
            let suits = |block: &&IpNet| family.has(block.addr());
            for block in never().iter().chain(inside).filter(suits) {
                messages.push(Message::exempt(&self.table, family, *block));
            }
            messages.push(Message::masquerade(&self.table, family));
        }
        for address in pods {
            messages.push(Message::new_element(&self.table, *address));
        }
        NfTables::open()
            .and_then(|mut nftables| {
                nftables.transaction("masquerade for the Pod", &messages, None)
            })
            .map_err(explain)
    }

    /// Ends the masquerade of these Pods; of the whole network with its last one. What is gone
    /// already, and a kernel that cannot masquerade, is success.
    pub fn remove(&self, pods: &[IpAddr]) -> Result<(), NetError> {
        let Some(mut nftables) = self.existing()? else {
            return Ok(());
        };
        self.remove_elements(&mut nftables, pods)?;
        self.remove_if_empty(&mut nftables)
    }

    /// Ends the masquerade of every address that is not to be kept.
    pub fn retain(&self, keep: &BTreeSet<IpAddr>) -> Result<(), NetError> {
        let Some(mut nftables) = self.existing()? else {
            return Ok(());
        };
        let stale: Vec<_> = self
            .elements(&mut nftables)?
            .difference(keep)
            .copied()
            .collect();
        self.remove_elements(&mut nftables, &stale)?;
        self.remove_if_empty(&mut nftables)
    }

    /// The Pods that are masqueraded.
    pub fn pods(&self) -> Result<BTreeSet<IpAddr>, NetError> {
        match self.existing()? {
            Some(mut nftables) => self.elements(&mut nftables),
            None => Ok(BTreeSet::new()),
        }
    }

    /// A socket, if the kernel has nf_tables and the table is there.
    fn existing(&self) -> Result<Option<NfTables>, NetError> {
        let mut nftables = match NfTables::open() {
            Ok(nftables) => nftables,
            Err(error) if unsupported(&error) => return Ok(None),
            Err(error) => return Err(error),
        };
        match nftables.ask("look for the table", &Message::get_table(&self.table)) {
            Ok(_) => Ok(Some(nftables)),
            // A kernel without nf_tables says EINVAL to every one of its messages.
            Err(error) if unsupported(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn elements(&self, nftables: &mut NfTables) -> Result<BTreeSet<IpAddr>, NetError> {
        let mut found = BTreeSet::new();
        for family in families() {
            match nftables.dump("list the Pods", &Message::get_elements(&self.table, family)) {
                Ok(messages) => found.extend(messages.iter().flat_map(|m| message::elements(m))),
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    }

    fn remove_elements(&self, nftables: &mut NfTables, pods: &[IpAddr]) -> Result<(), NetError> {
        for address in pods {
            // One by one: one that is absent would undo the removal of the others.
            let message = Message::delete_element(&self.table, *address);
            match nftables.transaction("end the masquerade", &[message], None) {
                Err(error) if !error.is_not_found() => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    fn remove_if_empty(&self, nftables: &mut NfTables) -> Result<(), NetError> {
        for _ in 0..ATTEMPTS {
            let generation = nftables.generation()?;
            if !self.elements(nftables)?.is_empty() {
                return Ok(());
            }
            let message = Message::delete_table(&self.table);
            let what = "remove the table of a network without Pods";
            match nftables.transaction(what, &[message], Some(generation)) {
                // Somebody has changed the ruleset since: perhaps with a new Pod.
                Err(error) if error.is(Errno::ERESTART) => {}
                Err(error) if !error.is_not_found() => return Err(error),
                _ => return Ok(()),
            }
        }
        // An empty table masquerades nothing; the next one to leave, or GC, tries again.
        Ok(())
    }
}

/// What is never masqueraded: it does not leave the link, or has no single receiver.
fn never() -> [IpNet; 4] {
    [
        IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(224, 0, 0, 0), 4)),
        IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::BROADCAST, 32)),
        IpNet::V6(Ipv6Net::new_assert(
            Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0),
            8,
        )),
        IpNet::V6(Ipv6Net::new_assert(
            Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0),
            10,
        )),
    ]
}

/// Whether it is the kernel that lacks something, or the table that is absent.
fn unsupported(error: &NetError) -> bool {
    const ERRORS: [Errno; 5] = [
        Errno::ENOENT,
        Errno::EINVAL,
        Errno::EOPNOTSUPP,
        Errno::EPROTONOSUPPORT,
        Errno::EAFNOSUPPORT,
    ];
    ERRORS.iter().any(|errno| error.is(*errno))
}

/// Says what is missing when the kernel does not know what it was asked for.
fn explain(error: NetError) -> NetError {
    let missing = unsupported(&error);
    match error {
        NetError::Request { what, source, hint } if missing => NetError::Request {
            what,
            source,
            hint: if hint.is_empty() {
                "ipMasq needs a kernel with nf_tables and NAT: CONFIG_NF_TABLES_INET, \
                 CONFIG_NFT_NAT, CONFIG_NFT_MASQ (modules nf_tables, nft_chain_nat, nft_masq)"
                    .into()
            } else {
                hint
            },
        },
        other => other,
    }
}
