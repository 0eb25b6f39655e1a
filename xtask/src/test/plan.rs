//! Which tests belong to which level: by the name of the test target alone, so that a new file
//! `tests/netns_something.rs` in any crate is found without being listed.

use crate::cargo::Metadata;

/// A level of tests, from the cheapest on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Level {
    /// Pure functions; needs no privilege and no eBPF toolchain
    Unit,
    /// The eBPF programs on made packets (BPF_PROG_TEST_RUN), and the pins
    Packet,
    /// One crate with real interfaces, in network namespaces of its own
    Netns,
    /// The whole, on the local cluster
    Cluster,
    /// The packet suite and namespace tests on other kernels, in virtual machines
    Vm,
    /// All of the above but vm
    All,
}

impl Level {
    /// The name, as in the closing line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Unit => "unit",
            Self::Packet => "packet",
            Self::Netns => "netns",
            Self::Cluster => "cluster",
            Self::Vm => "vm",
            Self::All => "all",
        }
    }
}

/// The level of an integration test.
pub(crate) fn level_of(test: &str) -> Level {
    const PREFIXES: [(&str, Level); 4] = [
        ("packet", Level::Packet),
        ("pins", Level::Packet),
        ("netns_", Level::Netns),
        ("cluster_", Level::Cluster),
    ];
    PREFIXES
        .iter()
        .find(|(prefix, _)| test.starts_with(prefix))
        .map_or(Level::Unit, |(_, level)| *level)
}

/// The names of all integration tests of a level.
pub(crate) fn targets(metadata: &Metadata, level: Level) -> Vec<String> {
    metadata
        .default_members()
        .into_iter()
        .flat_map(|package| &package.targets)
        .filter(|target| target.kind == ["test"] && level_of(&target.name) == level)
        .map(|target| target.name.clone())
        .collect()
}

/// Cargo's arguments that select a level's tests, or nothing where there are none; `only` names the
/// packages to look at, all of them if it is empty.
pub(crate) fn selection(metadata: &Metadata, level: Level, only: &[String]) -> Option<Vec<String>> {
    let mut arguments = Vec::new();
    // Cargo refuses --lib and --bins where no package at all has one.
    let (mut libraries, mut binaries) = (false, false);
    for package in metadata.default_members() {
        if !only.is_empty() && !only.contains(&package.name) {
            continue;
        }
        let tests: Vec<&str> = package
            .targets
            .iter()
            .filter(|target| target.kind == ["test"] && level_of(&target.name) == level)
            .map(|target| target.name.as_str())
            .collect();
        if level == Level::Unit {
            libraries |= package.targets.iter().any(|target| target.kind == ["lib"]);
            binaries |= package.targets.iter().any(|target| target.kind == ["bin"]);
        }
        // Without -p the features are those of all packages together, as for the binaries: with it
        // each level would compile the dependencies anew.
        if !only.is_empty() && (level == Level::Unit || !tests.is_empty()) {
            arguments.extend(["-p".to_owned(), package.name.clone()]);
        }
        for test in tests {
            arguments.extend(["--test".to_owned(), test.to_owned()]);
        }
    }
    if libraries {
        arguments.push("--lib".to_owned());
    }
    if binaries {
        arguments.push("--bins".to_owned());
    }
    (!arguments.is_empty()).then_some(arguments)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cargo::{Package, Target};

    fn target(kind: &str, name: &str) -> Target {
        Target {
            kind: vec![kind.to_owned()],
            name: name.to_owned(),
        }
    }

    fn package(name: &str, targets: Vec<Target>) -> Package {
        Package {
            id: name.to_owned(),
            name: name.to_owned(),
            version: "0.1.0".to_owned(),
            manifest_path: "Cargo.toml".into(),
            license: None,
            source: None,
            targets,
        }
    }

    #[test]
    fn a_test_is_found_by_its_name() {
        let metadata = Metadata {
            packages: vec![
                package("a", vec![target("lib", "a"), target("test", "layout")]),
                package(
                    "b",
                    vec![
                        target("bin", "b"),
                        target("test", "packet_v4"),
                        target("test", "netns_b"),
                    ],
                ),
                package("c", vec![target("test", "netns_c")]),
            ],
            workspace_default_members: vec!["a".into(), "b".into()],
        };
        let selected =
            |level| selection(&metadata, level, &[]).map(|arguments| arguments.join(" "));
        assert_eq!(
            selected(Level::Unit).as_deref(),
            Some("--test layout --lib --bins")
        );
        assert_eq!(selected(Level::Packet).as_deref(), Some("--test packet_v4"));
        assert_eq!(selected(Level::Netns).as_deref(), Some("--test netns_b"));
        assert_eq!(selected(Level::Cluster), None);
        assert_eq!(selection(&metadata, Level::Netns, &["a".to_owned()]), None);
        let one = selection(&metadata, Level::Packet, &["b".to_owned()]);
        assert_eq!(
            one.map(|arguments| arguments.join(" ")).as_deref(),
            Some("-p b --test packet_v4")
        );
        assert_eq!(targets(&metadata, Level::Netns), ["netns_b"]);
        assert_eq!(level_of("pins"), Level::Packet);
        assert_eq!(level_of("netnsless"), Level::Unit);
    }
}
