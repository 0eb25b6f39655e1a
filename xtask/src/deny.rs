//! Licences, sources and duplicates of all dependencies, against `deny.toml`.
//!
//! The file is cargo-deny's, and cargo-deny is asked too where it is installed. Building it takes
//! longer than everything else here, and its advisories come from a git host that a build machine may
//! not reach: so the three checks that need nothing but the lock file are done here, always.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::cargo::{self, Metadata};
use crate::repo::Repo;
use crate::shell::Shell;

#[derive(Deserialize)]
struct Rules {
    licenses: Licenses,
    bans: Bans,
}

#[derive(Deserialize)]
struct Licenses {
    allow: BTreeSet<String>,
}

#[derive(Deserialize)]
struct Bans {
    #[serde(default)]
    skip: Vec<Skip>,
}

#[derive(Deserialize)]
struct Skip {
    #[serde(rename = "crate")]
    name: String,
}

/// How the name of the one registry ends that packages may come from, in cargo's package ids.
const REGISTRY: &str = "/crates.io-index";

/// Checks; every finding is in the error.
pub(crate) fn check(repo: &Repo, shell: &Shell) -> Result<()> {
    let text = std::fs::read_to_string(repo.root().join("deny.toml")).context("deny.toml")?;
    let rules: Rules = toml::from_str(&text).context("deny.toml")?;
    let metadata = Metadata::with_dependencies(repo)?;
    let findings = findings(&rules, &metadata);
    if !findings.is_empty() {
        bail!("dependencies break deny.toml:\n  {}", findings.join("\n  "));
    }
    shell.say(&format!(
        "  {} packages have allowed licences and sources",
        metadata.packages.len()
    ));
    let mut deny = cargo::cargo(repo);
    deny.args(["deny", "check", "licenses", "bans", "sources"]);
    let mut probe = cargo::cargo(repo);
    if probe
        .args(["deny", "--version"])
        .output()
        .is_ok_and(|output| output.status.success())
    {
        shell.step("cargo-deny", &mut deny)?;
    }
    Ok(())
}

fn findings(rules: &Rules, metadata: &Metadata) -> Vec<String> {
    let mut found = Vec::new();
    let mut versions: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for package in &metadata.packages {
        let (name, version) = (package.name.as_str(), package.version.as_str());
        match &package.license {
            None => found.push(format!("{name} {version} names no licence")),
            Some(text) => match allowed(text, &rules.licenses.allow) {
                Ok(true) => {}
                Ok(false) => {
                    found.push(format!("{name} {version}: licence {text:?} is not allowed"))
                }
                Err(why) => found.push(format!("{name} {version}: licence {text:?}: {why}")),
            },
        }
        let Some(source) = &package.source else {
            continue;
        };
        let registry = source
            .strip_prefix("registry+")
            .or(source.strip_prefix("sparse+"));
        if !registry.is_some_and(|registry| registry.ends_with(REGISTRY)) {
            found.push(format!("{name} {version} comes from {source}"));
        }
        versions.entry(name).or_default().insert(version);
    }
    for (name, versions) in versions {
        let skipped = rules
            .bans
            .skip
            .iter()
            .any(|skip| skip.name.split('@').next() == Some(name));
        if versions.len() > 1 && !skipped {
            let versions: Vec<&str> = versions.into_iter().collect();
            found.push(format!(
                "{name} is there more than once: {}",
                versions.join(", ")
            ));
        }
    }
    found
}

/// Whether an SPDX expression can be met with allowed licences: `AND` binds tighter than `OR`, the
/// old `/` means `OR`, `WITH` makes one licence of two.
fn allowed(expression: &str, allow: &BTreeSet<String>) -> Result<bool> {
    let spaced = expression
        .replace('(', " ( ")
        .replace(')', " ) ")
        .replace('/', " OR ");
    let tokens: Vec<&str> = spaced.split_whitespace().collect();
    let mut rest = tokens.as_slice();
    let value = any_of(&mut rest, allow)?;
    if rest.is_empty() {
        Ok(value)
    } else {
        bail!("{:?} was not expected", rest[0])
    }
}

fn any_of(rest: &mut &[&str], allow: &BTreeSet<String>) -> Result<bool> {
    let mut value = all_of(rest, allow)?;
    while take(rest, "OR") {
        value |= all_of(rest, allow)?;
    }
    Ok(value)
}

fn all_of(rest: &mut &[&str], allow: &BTreeSet<String>) -> Result<bool> {
    let mut value = one(rest, allow)?;
    while take(rest, "AND") {
        value &= one(rest, allow)?;
    }
    Ok(value)
}

fn one(rest: &mut &[&str], allow: &BTreeSet<String>) -> Result<bool> {
    if take(rest, "(") {
        let value = any_of(rest, allow)?;
        if !take(rest, ")") {
            bail!("a parenthesis is not closed");
        }
        return Ok(value);
    }
    let [name, tail @ ..] = *rest else {
        bail!("it ends too early")
    };
    *rest = tail;
    let mut name = (*name).to_owned();
    if take(rest, "WITH") {
        let [exception, tail @ ..] = *rest else {
            bail!("WITH names nothing")
        };
        *rest = tail;
        name = format!("{name} WITH {exception}");
    }
    Ok(allow.contains(&name))
}

fn take(rest: &mut &[&str], token: &str) -> bool {
    match rest {
        [first, tail @ ..] if *first == token => {
            *rest = tail;
            true
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cargo::Package;

    fn allow() -> BTreeSet<String> {
        ["MIT", "Apache-2.0", "Apache-2.0 WITH LLVM-exception"]
            .map(str::to_owned)
            .into()
    }

    #[test]
    fn expressions_are_met_or_not() -> Result<()> {
        for (expression, expected) in [
            ("MIT", true),
            ("MIT/Apache-2.0", true),
            ("GPL-3.0 OR MIT", true),
            ("GPL-3.0 AND MIT", false),
            ("(MIT OR GPL-3.0) AND Apache-2.0", true),
            ("GPL-3.0 AND MIT OR Apache-2.0", true),
            ("Apache-2.0 WITH LLVM-exception", true),
            ("MIT WITH LLVM-exception", false),
        ] {
            assert_eq!(allowed(expression, &allow())?, expected, "{expression}");
        }
        assert!(allowed("(MIT", &allow()).is_err());
        assert!(allowed("MIT MIT", &allow()).is_err());
        assert!(allowed("", &allow()).is_err());
        Ok(())
    }

    #[test]
    fn licences_sources_and_duplicates_are_found() {
        let package = |name: &str, version: &str, license: &str, source: &str| Package {
            id: format!("{name}{version}"),
            name: name.to_owned(),
            version: version.to_owned(),
            manifest_path: "Cargo.toml".into(),
            license: (!license.is_empty()).then(|| license.to_owned()),
            source: Some(source.to_owned()),
            targets: Vec::new(),
        };
        let good = "registry+https://host.example/crates.io-index";
        let rules = Rules {
            licenses: Licenses { allow: allow() },
            bans: Bans {
                skip: vec![Skip {
                    name: "known@1.0.0".to_owned(),
                }],
            },
        };
        let metadata = Metadata {
            packages: vec![
                package("a", "1.0.0", "MIT", good),
                package("a", "2.0.0", "MIT", good),
                package("known", "1.0.0", "MIT", good),
                package("known", "2.0.0", "MIT", good),
                package("b", "1.0.0", "GPL-3.0", good),
                package("c", "1.0.0", "", good),
                package("d", "1.0.0", "MIT", "git+https://host.example/d"),
            ],
            workspace_default_members: Vec::new(),
        };
        assert_eq!(
            findings(&rules, &metadata),
            [
                "b 1.0.0: licence \"GPL-3.0\" is not allowed",
                "c 1.0.0 names no licence",
                "d 1.0.0 comes from git+https://host.example/d",
                "a is there more than once: 1.0.0, 2.0.0",
            ]
        );
    }
}
