//! What this kernel can do, found by trying it, never by its version.
//!
//! ```text
//! Try (the kernel, or a table in tests) ── Feature ──> Finding ──> Features ── require() ──> start, or one line
//!                                                                     └─ missing() ──> log, `hachi status`
//! ```
//! Features of the base set are those without which no Pod can be guarded: [`Features::require`] refuses
//! a kernel that lacks one. What the others give is in [`Feature::without`].

mod attempt;
mod kernel;
mod sandbox;

use std::{collections::BTreeMap, fmt, path::Path};

use crate::KernelError;

/// Something that a kernel may lack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Feature {
    /// The system call bpf(2).
    Bpf,
    /// Permission to make maps and load programs for the network.
    Permission,
    /// A BPF file system to pin to.
    BpfFs,
    /// Every type of map that the programs use.
    Maps,
    /// Programs of tc, with `bpf_redirect_peer`.
    Classifier,
    /// Network namespaces.
    Namespaces,
    /// veth pairs.
    Veth,
    /// The tcx hooks.
    Tcx,
    /// BPF filters of the clsact qdisc.
    Clsact,
    /// IPv6.
    Ipv6,
    /// Reading and writing many map entries in one call.
    Batch,
    /// Counts of the instructions that the verifier walked through.
    InstructionCount,
    /// The kernel's own type information.
    Btf,
    /// A mounted cgroup2 hierarchy.
    Cgroup2,
    /// Programs at connect(2), sendmsg(2), recvmsg(2) and getpeername(2) of a cgroup.
    SockAddr,
    /// `bpf_set_retval`, with which such a program chooses the error of a refused call.
    SetRetval,
    /// XDP in a driver.
    XdpNative,
    /// XDP after the driver.
    XdpGeneric,
    /// VXLAN devices that take the tunnel's key from a program.
    Vxlan,
    /// netkit pairs.
    Netkit,
    /// SCTP sockets.
    Sctp,
}

/// What trying a feature said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// It works.
    Present,
    /// It does not, and how the kernel put it.
    Absent(String),
    /// It could not be tried, and why.
    Unknown(String),
}

/// Tries features.
pub trait Try {
    /// Tries one.
    fn attempt(&mut self, feature: Feature) -> Finding;
}

/// Findings that were made earlier; what is not among them works.
impl Try for BTreeMap<Feature, Finding> {
    fn attempt(&mut self, feature: Feature) -> Finding {
        self.get(&feature).cloned().unwrap_or(Finding::Present)
    }
}

/// What a kernel can do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Features(BTreeMap<Feature, Finding>);

impl Feature {
    /// All of them, those of the base set first.
    pub const ALL: [Self; 21] = [
        Self::Bpf,
        Self::Permission,
        Self::BpfFs,
        Self::Maps,
        Self::Classifier,
        Self::Namespaces,
        Self::Veth,
        Self::Tcx,
        Self::Clsact,
        Self::Ipv6,
        Self::Batch,
        Self::InstructionCount,
        Self::Btf,
        Self::Cgroup2,
        Self::SockAddr,
        Self::SetRetval,
        Self::XdpNative,
        Self::XdpGeneric,
        Self::Vxlan,
        Self::Netkit,
        Self::Sctp,
    ];

    /// A name for tables, in one word.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bpf => "bpf",
            Self::Permission => "permission",
            Self::BpfFs => "bpffs",
            Self::Maps => "maps",
            Self::Classifier => "classifier",
            Self::Namespaces => "netns",
            Self::Veth => "veth",
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
            Self::Ipv6 => "IPv6",
            Self::Batch => "batch",
            Self::InstructionCount => "instruction-count",
            Self::Btf => "BTF",
            Self::Cgroup2 => "cgroup2",
            Self::SockAddr => "sock_addr",
            Self::SetRetval => "set_retval",
            Self::XdpNative => "xdp-native",
            Self::XdpGeneric => "xdp-generic",
            Self::Vxlan => "vxlan",
            Self::Netkit => "netkit",
            Self::Sctp => "SCTP",
        }
    }

    /// What follows for the user where it is missing; none for the base set, without which there is
    /// no Hachi.
    #[must_use]
    pub const fn without(self) -> Option<&'static str> {
        Some(match self {
            Self::Bpf
            | Self::Permission
            | Self::BpfFs
            | Self::Maps
            | Self::Classifier
            | Self::Namespaces
            | Self::Veth => return None,
            Self::Tcx => {
                "clsact filters take its place: the same programs at the same hooks, where other \
                 tools' filters can be put before them"
            }
            Self::Clsact => "the agent has to be started with `--attach tcx`, where there is tcx",
            Self::Ipv6 => "Pods have IPv4 addresses alone",
            Self::Batch => {
                "map entries are written one by one: a start with many Services takes longer"
            }
            Self::InstructionCount => "nothing but statistics of the programs",
            Self::Btf => "nothing: the programs do not depend on the kernel's types",
            Self::Cgroup2 | Self::SockAddr => {
                "no socket load balancing: Services are translated packet by packet"
            }
            Self::SetRetval => {
                "sockets that connect to a Service without a backend wait for their time limit, \
                 where they would be refused at once"
            }
            Self::XdpNative => "XDP programs run after the driver, and save less",
            Self::XdpGeneric => "no XDP programs at interfaces whose driver has no XDP",
            Self::Vxlan => {
                "no tunnels: nodes must share a link, or something else must route their podCIDRs"
            }
            Self::Netkit => "nothing: Pods have veth pairs",
            Self::Sctp => "Pods of this node cannot open SCTP sockets",
        })
    }

    /// What to give the kernel, for one of the base set.
    const fn remedy(self) -> &'static str {
        match self {
            Self::Bpf | Self::Maps => "a kernel of 5.15 or later with CONFIG_BPF_SYSCALL",
            Self::Permission => {
                "CAP_NET_ADMIN and CAP_SYS_ADMIN (or root) outside of any user namespace"
            }
            Self::BpfFs => "`mount -t bpf bpf /sys/fs/bpf`",
            Self::Classifier => "a kernel of 5.15 or later with CONFIG_NET_CLS_ACT",
            Self::Namespaces => "CONFIG_NET_NS",
            Self::Veth => "CONFIG_VETH (the module veth)",
            Self::Tcx | Self::Clsact => {
                "a kernel of 6.6 or later, or CONFIG_NET_SCH_INGRESS and CONFIG_NET_CLS_BPF (the \
                 modules sch_ingress and cls_bpf)"
            }
            _ => "nothing",
        }
    }
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bpf => "bpf(2)",
            Self::Permission => "permission to load BPF programs",
            Self::BpfFs => "a BPF file system",
            Self::Maps => "BPF maps of every type that the programs use",
            Self::Classifier => "tc programs with bpf_redirect_peer",
            Self::Namespaces => "network namespaces",
            Self::Veth => "veth pairs",
            Self::Tcx => "tcx hooks",
            Self::Clsact => "clsact filters",
            Self::Ipv6 => "IPv6",
            Self::Batch => "batches of map entries",
            Self::InstructionCount => "counts of verified instructions",
            Self::Btf => "the kernel's type information (BTF)",
            Self::Cgroup2 => "a cgroup2 hierarchy",
            Self::SockAddr => "programs at the sockets of a cgroup",
            Self::SetRetval => "bpf_set_retval",
            Self::XdpNative => "XDP in veth's driver",
            Self::XdpGeneric => "generic XDP",
            Self::Vxlan => "VXLAN devices",
            Self::Netkit => "netkit pairs",
            Self::Sctp => "SCTP sockets",
        })
    }
}

impl Features {
    /// Tries everything on this kernel, with pins to be made below `pin_root`. Changes nothing that
    /// lasts; interfaces are tried in a network namespace of their own.
    #[must_use]
    pub fn probe(pin_root: &Path) -> Self {
        kernel::probe(pin_root)
    }

    /// What `try` says of every feature.
    pub fn found_by(attempt: &mut impl Try) -> Self {
        Self(
            Feature::ALL
                .into_iter()
                .map(|feature| (feature, attempt.attempt(feature)))
                .collect(),
        )
    }

    /// What trying a feature said.
    #[must_use]
    pub fn finding(&self, feature: Feature) -> &Finding {
        // Every constructor has tried all of them.
        self.0.get(&feature).unwrap_or(&Finding::Present)
    }

    /// Features with their findings, those of the base set first.
    pub fn iter(&self) -> impl Iterator<Item = (Feature, &Finding)> {
        self.0.iter().map(|(feature, finding)| (*feature, finding))
    }

    /// Whether the feature works, as far as could be tried.
    #[must_use]
    pub fn has(&self, feature: Feature) -> bool {
        matches!(self.finding(feature), Finding::Present)
    }

    /// What does not work or could not be tried, apart from the base set: the feature, why, and what
    /// follows.
    pub fn missing(&self) -> impl Iterator<Item = (Feature, &Finding, &'static str)> {
        self.iter()
            .filter(|(_, finding)| **finding != Finding::Present)
            .filter_map(|(feature, finding)| Some((feature, finding, feature.without()?)))
    }

    /// Refuses a kernel on which no Pod could be guarded.
    ///
    /// # Errors
    /// [`KernelError::Unsupported`], whose one line names all that is missing and what to do.
    pub fn require(&self) -> Result<(), KernelError> {
        let mut missing = self.base_missing();
        // These explain all that follow.
        for first in [Feature::Bpf, Feature::Permission] {
            if missing.iter().any(|(feature, _)| *feature == first) {
                missing.retain(|(feature, _)| *feature == first);
            }
        }
        if missing.is_empty() {
            return Ok(());
        }
        let what: Vec<String> = missing
            .iter()
            .map(|(feature, why)| format!("{feature} ({why})"))
            .collect();
        let mut remedies: Vec<&str> = missing.iter().map(|(it, _)| it.remedy()).collect();
        remedies.dedup();
        Err(KernelError::Unsupported {
            missing: what.join(", "),
            remedy: remedies.join(", "),
        })
    }

    fn base_missing(&self) -> Vec<(Feature, &str)> {
        let mut missing: Vec<(Feature, &str)> = self
            .iter()
            .filter(|(feature, _)| feature.without().is_none())
            .filter_map(|(feature, finding)| match finding {
                Finding::Absent(why) => Some((feature, why.as_str())),
                // Whoever cannot try it will hear of it when it is used.
                Finding::Present | Finding::Unknown(_) => None,
            })
            .collect();
        if let (Finding::Absent(why), Finding::Absent(_)) =
            (self.finding(Feature::Clsact), self.finding(Feature::Tcx))
        {
            missing.push((Feature::Clsact, why));
        }
        missing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kernel(absent: &[Feature]) -> Features {
        let mut table: BTreeMap<Feature, Finding> = absent
            .iter()
            .map(|feature| (*feature, Finding::Absent("Invalid argument".into())))
            .collect();
        Features::found_by(&mut table)
    }

    fn refusal(absent: &[Feature]) -> String {
        kernel(absent).require().expect_err("refused").to_string()
    }

    #[test]
    fn what_the_base_set_lacks_is_refused_in_one_line() {
        for feature in Feature::ALL {
            match feature.without() {
                Some(follows) => {
                    let features = kernel(&[feature]);
                    assert!(features.require().is_ok(), "{feature}");
                    let missing: Vec<_> = features.missing().collect();
                    assert_eq!(missing.len(), 1, "{feature}");
                    assert_eq!(missing[0].2, follows);
                }
                None => {
                    let text = refusal(&[feature]);
                    assert!(text.contains(&feature.to_string()), "{text}");
                    assert!(text.contains(feature.remedy()), "{text}");
                    assert!(!text.contains('\n'), "{text}");
                }
            }
        }
    }

    #[test]
    fn all_that_is_missing_is_named_at_once() {
        let text = refusal(&[Feature::Maps, Feature::Veth, Feature::Sctp]);
        assert!(text.contains("BPF maps") && text.contains("veth"), "{text}");
        assert!(!text.contains("SCTP"), "{text}");
    }

    #[test]
    fn the_cause_hides_what_it_causes() {
        let text = refusal(&[Feature::Bpf, Feature::Maps, Feature::Classifier]);
        assert!(text.contains("bpf(2)") && !text.contains("maps"), "{text}");
        let text = refusal(&[Feature::Permission, Feature::Maps]);
        assert!(
            text.contains("CAP_NET_ADMIN") && !text.contains("maps"),
            "{text}"
        );
    }

    #[test]
    fn one_way_to_attach_is_enough() {
        assert!(kernel(&[Feature::Tcx]).require().is_ok());
        assert!(kernel(&[Feature::Clsact]).require().is_ok());
        let text = refusal(&[Feature::Tcx, Feature::Clsact]);
        assert!(text.contains("clsact") && text.contains("6.6"), "{text}");
    }

    #[test]
    fn what_could_not_be_tried_is_reported_and_not_refused() {
        let unknown = Finding::Unknown("no namespace".into());
        let mut table = BTreeMap::from([
            (Feature::Veth, unknown.clone()),
            (Feature::Vxlan, unknown.clone()),
        ]);
        let features = Features::found_by(&mut table);
        assert!(features.require().is_ok());
        let missing: Vec<_> = features.missing().map(|(it, ..)| it).collect();
        assert_eq!(missing, [Feature::Vxlan]);
    }

    #[test]
    fn the_page_says_what_the_agent_says() {
        let page = include_str!("../../../../docs/KERNELS.md");
        for feature in Feature::ALL {
            if let Some(without) = feature.without() {
                assert!(page.contains(without), "{feature}: {without}");
            }
        }
    }

    #[test]
    fn names_are_single_words_and_no_two_are_the_same() {
        let names: std::collections::BTreeSet<_> =
            Feature::ALL.into_iter().map(Feature::name).collect();
        assert_eq!(names.len(), Feature::ALL.len());
        assert!(names.iter().all(|name| !name.contains(' ')));
    }
}
