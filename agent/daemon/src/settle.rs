//! Interfaces that were attached to the quick way get their lasting attachment once no Pod comes or
//! goes: that takes tens of milliseconds for each, and holds up every change of an interface.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use tracing::{debug, warn};

use crate::agent::Agent;

/// How long no Pod has to have come or gone.
const QUIET: Duration = Duration::from_secs(2);
/// Between two interfaces, so that others get their turn.
const PAUSE: Duration = Duration::from_millis(100);

/// What is still to be settled.
#[derive(Debug, Default)]
pub(crate) struct Settling {
    /// Indices by name.
    interfaces: BTreeMap<String, u32>,
    at: Option<Instant>,
}

impl Settling {
    /// An interface is to be settled.
    pub(crate) fn add(&mut self, ifname: &str, ifindex: u32) {
        self.interfaces.insert(ifname.to_owned(), ifindex);
        self.busy();
    }

    /// An interface goes.
    pub(crate) fn forget(&mut self, ifname: &str) {
        self.interfaces.remove(ifname);
        self.busy();
    }

    /// A Pod comes or goes.
    fn busy(&mut self) {
        self.at = Some(Instant::now() + QUIET);
    }

    /// When the next one is due.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.at.filter(|_| !self.interfaces.is_empty())
    }

    fn next(&mut self, now: Instant) -> Option<(String, u32)> {
        self.due().filter(|at| *at <= now)?;
        self.at = Some(now + PAUSE);
        self.interfaces.pop_first()
    }
}

impl Agent {
    /// Settles an interface if one is due.
    pub(crate) fn settle(&mut self) {
        let Some((ifname, ifindex)) = self.settling.next(Instant::now()) else {
            return;
        };
        match self.datapath.settle(ifindex, &ifname) {
            Ok(true) => {
                debug!(ifname, "attachment settled");
                self.attach_kind = Some(hachi_kernel::AttachKind::Tcx);
            }
            // What there is will do, here and at the others.
            Ok(false) => self.settling.interfaces.clear(),
            Err(error) => warn!(%error, ifname, "the quick attachment stays"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_after_the_other_once_it_is_quiet() {
        let mut settling = Settling::default();
        assert_eq!(settling.due(), None);
        settling.add("a", 1);
        settling.add("b", 2);
        settling.add("c", 3);
        settling.forget("b");
        let now = Instant::now();
        assert_eq!(settling.next(now), None, "not quiet yet");
        let later = now + QUIET;
        assert_eq!(settling.next(later), Some(("a".into(), 1)));
        assert_eq!(settling.next(later), None, "others get their turn");
        assert_eq!(settling.next(later + PAUSE), Some(("c".into(), 3)));
        assert_eq!(settling.due(), None, "nothing is left");
    }
}
