//! Which endpoints topology prefers (KEP-2433, KEP-3015, KEP-4444).
//!
//! Whoever writes the slices decides who is meant for whom, and says so in hints. They count only where
//! every ready endpoint has them and one is meant for us; of hints for nodes and for zones, those for
//! nodes come first.

use std::sync::Arc;

use crate::parse::Hints;

/// What the hints of a Service's ready endpoints come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Preference {
    None,
    Node,
    Zone,
}

/// Whether an endpoint is meant for our zone.
fn in_zone(hints: &Hints, zone: Option<&Arc<str>>) -> bool {
    zone.is_some_and(|zone| hints.zones.contains(zone))
}

impl Preference {
    /// Of the hints of all ready endpoints.
    pub(crate) fn of<'a>(
        ready: impl Iterator<Item = &'a Hints> + Clone,
        zone: Option<&Arc<str>>,
    ) -> Self {
        let all = |has: fn(&Hints) -> bool| ready.clone().all(has);
        if all(|h| h.node.is_some()) && ready.clone().any(|h| h.node == Some(true)) {
            Self::Node
        } else if all(|h| !h.zones.is_empty()) && ready.clone().any(|h| in_zone(h, zone)) {
            Self::Zone
        } else {
            Self::None
        }
    }

    /// Whether an endpoint is among the preferred.
    pub(crate) fn takes(self, hints: &Hints, zone: Option<&Arc<str>>) -> bool {
        match self {
            Self::None => true,
            Self::Node => hints.node == Some(true),
            Self::Zone => in_zone(hints, zone),
        }
    }
}
