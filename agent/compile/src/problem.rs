//! What could not be honoured, and what to do about it.

use std::net::IpAddr;

use hachi_index::Name;
use hachi_policy::{PolicyId, Protocol};

use crate::Claimant;

/// What could not be honoured.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Problem {
    /// Two claim one address and port.
    #[error(
        "{loser} does not get port {port}/{} on {}, which is that of {holder}: give one of them another",
        protocol(*proto),
        list(addresses)
    )]
    PortTaken {
        /// The addresses, sorted.
        addresses: Vec<IpAddr>,
        /// The port.
        port: u16,
        /// IANA protocol number.
        proto: u8,
        /// Who does not get it.
        loser: Claimant,
        /// Who has it.
        holder: Claimant,
    },
    /// Policies that need more entries than a map has.
    #[error(
        "{map} has room for {limit} entries, {needed} are needed: Pods {} are denied everything, because \
         what {} say of them is the largest part; make it simpler or the map larger",
        list(pods),
        list(policies)
    )]
    TooLarge {
        /// The policies.
        policies: Vec<PolicyId>,
        /// Whose Pods are quarantined.
        pods: Vec<Name>,
        /// The map.
        map: &'static str,
        /// How many entries it would have to hold.
        needed: usize,
        /// How many it may.
        limit: usize,
    },
}

fn protocol(number: u8) -> String {
    let known = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
    let found = known.into_iter().find(|it| it.number() == number);
    found.map_or_else(|| number.to_string(), |it| it.to_string())
}

fn list(names: &[impl ToString]) -> String {
    let mut all: Vec<String> = names.iter().take(5).map(ToString::to_string).collect();
    if names.len() > all.len() {
        all.push(format!("{} more", names.len() - all.len()));
    }
    all.join(", ")
}
