//! Names that carry the cluster's id, so that several clusters share a machine and whatever one
//! leaves behind can be told from everything else.

use std::fs;

use anyhow::{Context as _, Result};

/// In the environment of every process of a cluster: its id.
pub const ID_VARIABLE: &str = "HACHI_CLUSTER_ID";

/// The prefix of every name.
pub(crate) const PREFIX: &str = "hachi-";

/// A cluster's id: six hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterId(String);

impl ClusterId {
    /// A fresh one.
    pub fn random() -> Result<Self> {
        let uuid = fs::read_to_string("/proc/sys/kernel/random/uuid")
            .context("read /proc/sys/kernel/random/uuid")?;
        Ok(Self(uuid.chars().take(6).collect()))
    }

    /// Reads one back.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let valid = text.len() == 6 && text.bytes().all(|b| b.is_ascii_hexdigit());
        valid.then(|| Self(text.to_owned()))
    }

    /// The digits.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The cgroup's name and the stem of all others.
    #[must_use]
    pub fn stem(&self) -> String {
        format!("{PREFIX}{}", self.0)
    }

    /// The name of the namespace that holds the bridge.
    #[must_use]
    pub fn fabric(&self) -> String {
        format!("{}-fabric", self.stem())
    }

    /// The name of a node's network namespace.
    #[must_use]
    pub fn node(&self, name: &str) -> String {
        format!("{}-{name}", self.stem())
    }

    /// The name of a Pod's network namespace.
    #[must_use]
    pub fn pod(&self, uid: &str) -> String {
        let short: String = uid
            .chars()
            .filter(char::is_ascii_alphanumeric)
            .take(8)
            .collect();
        format!("{}-p-{short}", self.stem())
    }

    /// The id in a name under `/run/netns` or in the cgroup tree.
    #[must_use]
    pub fn of_name(name: &str) -> Option<Self> {
        let rest = name.strip_prefix(PREFIX)?;
        let id = rest.get(..6)?;
        let ends = rest.len() == 6 || rest.as_bytes().get(6) == Some(&b'-');
        if ends { Self::parse(id) } else { None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_back_to_their_id() {
        let id = ClusterId::parse("0a1b2c").unwrap();
        for name in [
            id.fabric(),
            id.node("node1"),
            id.pod("12345678-90ab"),
            id.stem(),
        ] {
            assert_eq!(ClusterId::of_name(&name), Some(id.clone()), "{name}");
        }
        assert_eq!(id.pod("1234-5678-90ab"), "hachi-0a1b2c-p-12345678");
    }

    #[test]
    fn foreign_names_have_none() {
        for name in [
            "hachi-",
            "hachi-0a1b2",
            "hachi-0a1b2c3",
            "cni-0a1b2c",
            "hachi-zzzzzz-fabric",
        ] {
            assert_eq!(ClusterId::of_name(name), None, "{name}");
        }
    }
}
