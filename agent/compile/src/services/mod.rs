//! Services: every address and port that one answers on, with the backends behind it.
//!
//! ```text
//! Service ─ plan ─┬─ keys (sets of backends) ─ ids ──> slots, tables, members, ranges
//!                 └─ claims on frontends ─ the oldest wins ──> frontends
//! ```
//! Only Services that have changed are planned again, with what they share with others: a frontend
//! that two claim, and an id that a collision of hashes moves.

mod arrange;
mod conflicts;
mod draining;
mod ids;
mod maglev;
mod plan;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use hachi_abi::{Service as Value, proto};
use hachi_index::{Desired, Name, Service, Shards};

pub use self::conflicts::{Claimant, Claimed};
use self::{
    arrange::arrange,
    draining::Counted,
    ids::Ids,
    plan::{Key, Plan, Rank, Set, Use, Wish},
};
use crate::{Draining, Frontend, Slots, SlotsId, problem::Problem, retired::is_moved};

/// Of every health check port, whose it is, and the Service's ready endpoints on this node.
pub type HealthChecks = BTreeMap<u16, (Name, u32)>;

/// A Service's wish for a frontend; the least has it.
type Claim = (Rank, Name);

/// What was compiled last.
#[derive(Debug, Default)]
pub(crate) struct State {
    seen: Shards<Name, Arc<Service>>,
    /// The node's own, on which node ports are.
    addresses: Vec<IpAddr>,
    /// Services with node ports.
    on_nodes: BTreeSet<Name>,
    /// Services with health checks.
    checked: BTreeSet<Name>,
    draining: Counted,
    /// Frontends of UDP and SCTP that the last compilation has looked at again.
    touched: BTreeSet<Frontend>,
    ids: Ids,
    claims: Shards<Frontend, Vec<Claim>>,
    /// Frontends that more than one Service claims.
    contested: BTreeSet<Frontend>,
    frontends: Shards<Frontend, Value>,
    slots: Shards<SlotsId, Arc<Slots>>,
    /// What an agent before this one left: backends keep their slots.
    found: Shards<SlotsId, Arc<Slots>>,
}

/// The maps of all Services.
pub(crate) struct Compiled {
    pub(crate) frontends: Shards<Frontend, Value>,
    pub(crate) slots: Shards<SlotsId, Arc<Slots>>,
    pub(crate) problems: Vec<Problem>,
    pub(crate) draining: Draining,
    pub(crate) health_checks: HealthChecks,
}

impl State {
    /// Begins anew, with backends where these slots have them.
    pub(crate) fn adopt(found: Shards<SlotsId, Arc<Slots>>) -> Self {
        Self {
            found,
            ..Self::default()
        }
    }

    pub(crate) fn compile(&mut self, desired: &Desired) -> Compiled {
        // A copy shares its parts with the index, which is what makes the next comparison cheap.
        let seen = std::mem::replace(&mut self.seen, desired.services.clone());
        let mut changed: BTreeSet<Name> = self
            .seen
            .changes(&seen)
            .map(|(name, ..)| name.clone())
            .collect();
        let addresses = node_addresses(desired);
        let before = std::mem::replace(&mut self.addresses, addresses);
        if before != self.addresses {
            changed.extend(self.on_nodes.iter().cloned());
        }
        self.touched.clear();
        // Names to be looked at once more: they share something with a Service that has changed.
        let mut again = BTreeSet::new();
        for name in &changed {
            let old = seen.get(name);
            let new = desired.services.get(name);
            let old_plan = old.map(|s| Plan::new(name, s, &before));
            let new_plan = new.map(|s| Plan::new(name, s, &self.addresses));
            self.replace(name, old_plan.as_ref(), new_plan.as_ref(), &mut again);
            old_plan.iter().for_each(|plan| self.touch(plan));
            self.draining.change(old.map(|s| &**s), new.map(|s| &**s));
            let checked = new.is_some_and(|s| s.health_check.is_some());
            let on_nodes = new.is_some_and(|s| s.ports.iter().any(|p| p.node_port.is_some()));
            list(&mut self.checked, name, checked);
            list(&mut self.on_nodes, name, on_nodes || checked);
        }
        for name in again {
            if let Some(service) = self.seen.get(&name).cloned() {
                self.emit(&name, &Plan::new(&name, &service, &self.addresses));
            }
        }
        // Slots that moved with their ids were left behind under the old ones.
        self.found = Shards::default();
        Compiled {
            frontends: self.frontends.clone(),
            slots: self.slots.clone(),
            problems: self.problems(),
            draining: self.draining.all(),
            health_checks: self.health_checks(),
        }
    }

    /// The frontends of UDP and SCTP whose backends the last compilation may have changed.
    pub(crate) fn touched(&self) -> impl Iterator<Item = &Frontend> {
        self.touched.iter()
    }

    fn touch(&mut self, plan: &Plan) {
        let moved = plan.frontends.keys().filter(|f| is_moved(f.proto));
        self.touched.extend(moved);
    }

    /// Puts a Service's new plan in place of its old one. `again` gets whoever else is affected.
    fn replace(
        &mut self,
        name: &Name,
        old: Option<&Plan>,
        new: Option<&Plan>,
        again: &mut BTreeSet<Name>,
    ) {
        let keeps = |key: &Key| new.is_some_and(|plan| plan.sets.contains_key(key));
        for key in old.into_iter().flat_map(|plan| plan.sets.keys()) {
            if !keeps(key) {
                let id = self.ids.get(key);
                self.slots.remove(&SlotsId { v6: key.v6, id });
                let moved = self.ids.remove(key);
                self.moved(moved, again);
            }
        }
        for key in new.into_iter().flat_map(|plan| plan.sets.keys()) {
            let moved = self.ids.insert(key);
            self.moved(moved, again);
        }
        for frontend in old.into_iter().flat_map(|plan| plan.frontends.keys()) {
            if new.is_none_or(|plan| !plan.frontends.contains_key(frontend)) {
                self.release(name, frontend, again);
            }
        }
        if let Some(plan) = new {
            for (frontend, wish) in &plan.frontends {
                self.claim(name, frontend, (wish.rank, name.clone()), again);
            }
            self.emit(name, plan);
        }
    }

    /// Ids that have changed hands: their slots are written anew under the new ones.
    fn moved(&mut self, moved: Vec<(Key, u32)>, again: &mut BTreeSet<Name>) {
        for (key, old) in moved {
            self.slots.remove(&SlotsId {
                v6: key.v6,
                id: old,
            });
            again.insert(key.service);
        }
    }

    fn claim(
        &mut self,
        name: &Name,
        frontend: &Frontend,
        claim: Claim,
        again: &mut BTreeSet<Name>,
    ) {
        let mut claims = self.claims.get(frontend).cloned().unwrap_or_default();
        if claims.contains(&claim) {
            return;
        }
        claims.retain(|(_, other)| other != name);
        again.extend(claims.iter().map(|(_, other)| other.clone()));
        claims.push(claim);
        claims.sort();
        self.set_claims(frontend, claims);
    }

    fn release(&mut self, name: &Name, frontend: &Frontend, again: &mut BTreeSet<Name>) {
        let mut claims = self.claims.get(frontend).cloned().unwrap_or_default();
        claims.retain(|(_, other)| other != name);
        again.extend(claims.iter().map(|(_, other)| other.clone()));
        if claims.is_empty() {
            self.frontends.remove(frontend);
        }
        self.set_claims(frontend, claims);
    }

    fn set_claims(&mut self, frontend: &Frontend, claims: Vec<Claim>) {
        if claims.len() > 1 {
            self.contested.insert(*frontend);
        } else {
            self.contested.remove(frontend);
        }
        if claims.is_empty() {
            self.claims.remove(frontend);
        } else {
            self.claims.insert(*frontend, claims);
        }
    }

    /// Writes the frontends that a Service has been given, and the slots that they lead to.
    fn emit(&mut self, name: &Name, plan: &Plan) {
        self.touch(plan);
        let owned: Vec<(&Frontend, &Wish)> = plan
            .frontends
            .iter()
            .filter(|(frontend, _)| {
                let claims = self.claims.get(frontend).map_or(&[][..], |claims| claims);
                claims.first().is_some_and(|(_, owner)| owner == name)
            })
            .collect();
        for (key, set) in &plan.sets {
            let users = || owned.iter().filter(|(_, wish)| wish.key() == Some(key));
            let id = SlotsId {
                v6: key.v6,
                id: self.ids.get(key),
            };
            let slots = if users().next().is_some() {
                let consistent = users().any(|(_, wish)| wish.consistent);
                // Unconnected sockets ask whether their backend is there still.
                let asked = set.affinity != 0 || key.proto == proto::UDP;
                self.slots_of(id, set, consistent, asked)
            } else {
                Slots::default()
            };
            if slots.is_empty() {
                self.slots.remove(&id);
            } else if self.slots.get(&id).is_none_or(|old| **old != slots) {
                self.slots.insert(id, Arc::new(slots));
            }
        }
        for (frontend, wish) in owned {
            if wish.purpose == Use::HealthCheck {
                // Who came later may have had it until now.
                self.frontends.remove(frontend);
                continue;
            }
            let value = self.value(wish, plan);
            if self.frontends.get(frontend) != Some(&value) {
                self.frontends.insert(*frontend, value);
            }
        }
    }

    fn slots_of(&self, id: SlotsId, set: &Set, consistent: bool, asked: bool) -> Slots {
        let before = self.slots.get(&id).or_else(|| self.found.get(&id));
        let before = before.map_or(&[][..], |slots| &slots.backends);
        let backends = arrange(before, &set.backends);
        Slots {
            members: if asked {
                set.backends.clone()
            } else {
                Vec::new()
            },
            ranges: set.ranges.clone(),
            table: if consistent {
                maglev::table(&backends)
            } else {
                Vec::new()
            },
            backends,
        }
    }

    fn value(&self, wish: &Wish, plan: &Plan) -> Value {
        let Some((key, set)) = wish.key().and_then(|key| plan.sets.get_key_value(key)) else {
            return Value::default();
        };
        let id = self.ids.get(key);
        let slots = self.slots.get(&SlotsId { v6: key.v6, id });
        let table = slots.map_or(0, |slots| slots.table.len());
        Value {
            id,
            count: set.backends.len() as u32,
            flags: wish.flags,
            affinity: set.affinity,
            table: if wish.consistent { table as u32 } else { 0 },
        }
    }
}

fn list(names: &mut BTreeSet<Name>, name: &Name, is_one: bool) {
    if is_one {
        names.insert(name.clone());
    } else {
        names.remove(name);
    }
}

/// The addresses that node ports are on: the node's own, but those of its links alone, which mean
/// another node on every link.
fn node_addresses(desired: &Desired) -> Vec<IpAddr> {
    let links = |address: &IpAddr| match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    };
    let own = desired.local_addresses.iter().copied();
    own.filter(|address| !links(address)).collect()
}
