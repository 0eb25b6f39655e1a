//! Which tests belong to which level: by the name of the test target alone, so that a new file
//! `tests/netns_something.rs` in any crate is found without being listed.

use anyhow::{Result, bail};

use crate::cargo::Metadata;

/// Which tests of the levels are run; all of them, if nothing is named.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct Filter {
    /// Only the tests of these packages
    #[arg(short, long = "package")]
    pub(crate) packages: Vec<String>,
    /// Only these test programs, by name (netns_attach or attach); of vm, `verified` alone is the quick
    /// mode: every eBPF program is shown to the verifier, and nothing else is done
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    pub(crate) only: Vec<String>,
}

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

/// Whether a test is meant by a name: in full, or without its level (`attach` for `netns_attach`).
fn matches(test: &str, name: &str) -> bool {
    test == name || test.split_once('_').is_some_and(|(_, rest)| rest == name)
}

fn is_wanted(test: &str, only: &[String]) -> bool {
    only.is_empty() || only.iter().any(|name| matches(test, name))
}

/// Those of `tests` that are named, all of them if nothing is; an error if a name is none of theirs.
pub(crate) fn wanted(mut tests: Vec<String>, only: &[String]) -> Result<Vec<String>> {
    for name in only {
        if !tests.iter().any(|test| matches(test, name)) {
            bail!("no test is called {name}, there are: {}", tests.join(", "));
        }
    }
    tests.retain(|test| is_wanted(test, only));
    Ok(tests)
}

/// The levels that have what is asked for; an error if a package or test is unknown, or none has it. Names
/// of tests are left to virtual machines where these are asked too.
pub(crate) fn with_tests(
    metadata: &Metadata,
    levels: impl Iterator<Item = Level>,
    filter: &Filter,
    on_machines: bool,
) -> Result<Vec<Level>> {
    let mut levels: Vec<Level> = levels.collect();
    let known: Vec<&str> = metadata
        .default_members()
        .into_iter()
        .map(|package| package.name.as_str())
        .collect();
    for name in &filter.packages {
        if !known.contains(&name.as_str()) {
            bail!(
                "no package is called {name}, there are: {}",
                known.join(", ")
            );
        }
    }
    if !on_machines {
        let of = |level: &Level| targets(metadata, *level);
        wanted(levels.iter().flat_map(of).collect(), &filter.only)?;
    }
    levels.retain(|level| selection(metadata, *level, filter).is_some());
    if levels.is_empty() && !on_machines {
        bail!("these packages have no such tests: name others by -p, or other levels");
    }
    Ok(levels)
}

/// Cargo's arguments that select a level's tests, or nothing where there are none.
pub(crate) fn selection(metadata: &Metadata, level: Level, filter: &Filter) -> Option<Vec<String>> {
    let Filter { packages, only } = filter;
    let mut arguments = Vec::new();
    // Cargo refuses --lib and --bins where no package at all has one.
    let (mut libraries, mut binaries) = (false, false);
    for package in metadata.default_members() {
        if !packages.is_empty() && !packages.contains(&package.name) {
            continue;
        }
        let tests: Vec<&str> = package
            .targets
            .iter()
            .filter(|target| target.kind == ["test"] && level_of(&target.name) == level)
            .map(|target| target.name.as_str())
            .filter(|test| is_wanted(test, only))
            .collect();
        // These have no names of their own.
        let inside = level == Level::Unit && only.is_empty();
        if inside {
            libraries |= package.targets.iter().any(|target| target.kind == ["lib"]);
            binaries |= package.targets.iter().any(|target| target.kind == ["bin"]);
        }
        // Without -p the features are those of all packages together, as for the binaries: with it
        // each level would compile the dependencies anew.
        if !packages.is_empty() && (inside || !tests.is_empty()) {
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

    fn metadata() -> Metadata {
        Metadata {
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
        }
    }

    fn filter(packages: &[&str], only: &[&str]) -> Filter {
        let [packages, only] =
            [packages, only].map(|names| names.iter().map(|name| (*name).to_owned()).collect());
        Filter { packages, only }
    }

    #[test]
    fn a_test_is_found_by_its_name() {
        let metadata = metadata();
        let joined = |level, filter| selection(&metadata, level, &filter).map(|all| all.join(" "));
        let selected = |level| joined(level, Filter::default());
        assert_eq!(
            selected(Level::Unit).as_deref(),
            Some("--test layout --lib --bins")
        );
        assert_eq!(selected(Level::Packet).as_deref(), Some("--test packet_v4"));
        assert_eq!(selected(Level::Netns).as_deref(), Some("--test netns_b"));
        assert_eq!(selected(Level::Cluster), None);
        assert_eq!(joined(Level::Netns, filter(&["a"], &[])), None);
        let one = joined(Level::Packet, filter(&["b"], &[]));
        assert_eq!(one.as_deref(), Some("-p b --test packet_v4"));
        assert_eq!(targets(&metadata, Level::Netns), ["netns_b"]);
        assert_eq!(level_of("pins"), Level::Packet);
        assert_eq!(level_of("netnsless"), Level::Unit);
    }

    #[test]
    fn a_named_test_is_run_alone() -> Result<()> {
        let metadata = metadata();
        let all = [Level::Unit, Level::Packet, Level::Netns];
        let among = |packages: &[&str], only: &[&str], on_machines| -> Result<String> {
            let filter = filter(packages, only);
            let levels = with_tests(&metadata, all.into_iter(), &filter, on_machines)?;
            let arguments = levels
                .into_iter()
                .filter_map(|level| selection(&metadata, level, &filter))
                .map(|arguments| arguments.join(" "));
            Ok(arguments.collect::<Vec<_>>().join(", "))
        };
        let chosen = |only: &[&str], on_machines| among(&[], only, on_machines);
        let everything = "--test layout --lib --bins, --test packet_v4, --test netns_b";
        assert_eq!(chosen(&[], false)?, everything);
        assert_eq!(chosen(&["b"], false)?, "--test netns_b");
        let both = "--test layout, --test packet_v4";
        assert_eq!(chosen(&["layout", "packet_v4"], false)?, both);
        let error = chosen(&["b", "c"], false).unwrap_err().to_string();
        assert!(
            error.contains("called c,") && error.contains("netns_b"),
            "{error}"
        );
        assert_eq!(chosen(&["verified"], true)?, "");
        // Levels for which a package has nothing are left out.
        assert_eq!(among(&["a"], &[], false)?, "-p a --test layout --lib");
        assert_eq!(among(&["b"], &["netns_b"], false)?, "-p b --test netns_b");
        let error = among(&["a"], &["b"], false).unwrap_err().to_string();
        assert!(error.contains("no such tests"), "{error}");
        let error = among(&["c"], &[], false).unwrap_err().to_string();
        assert!(error.contains("called c, there are: a, b"), "{error}");
        Ok(())
    }
}
