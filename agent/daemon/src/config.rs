//! The configuration file: the options of the command line, written as TOML.
//!
//! ```text
//! flags  >  environment  >  file  >  defaults
//! ```
//! A key is the long name of a flag, so there is one list of options with one documentation, and
//! what clap refuses on the command line is refused in the file as well.

use std::{
    ffi::{OsStr, OsString},
    fmt::Write as _,
    fs,
    path::PathBuf,
};

use anyhow::{Context as _, Result, bail};
use clap::{Arg, ArgAction, Command, CommandFactory as _};
use toml::{Table, Value};

use crate::options::Options;

/// Flags that make no sense in the file.
const COMMAND_LINE_ONLY: [&str; 5] = ["config", "check-config", "print-config", "help", "version"];
/// Of how many letters one may be wrong for an unknown key to be taken for a misspelt option.
const LETTERS_PER_SLIP: usize = 3;

/// The command line with what the configuration file adds, to be parsed by [`Options`].
///
/// # Errors
/// A file that cannot be read, is no TOML, or has a key or a value that is no option's.
pub(crate) fn arguments(given: Vec<OsString>) -> Result<Vec<OsString>> {
    let Some(path) = named(&given) else {
        return Ok(given);
    };
    let text = fs::read_to_string(&path)
        .with_context(|| format!("cannot read the configuration {}", path.display()))?;
    let added = parse(&text, |name| std::env::var_os(name).is_some())
        .with_context(|| format!("in the configuration {}", path.display()))?;
    let mut all = given;
    // Before the given ones, which win over them.
    all.splice(1..1, added);
    Ok(all)
}

/// The file that `--config` names, else that of `HACHI_CONFIG`.
fn named(given: &[OsString]) -> Option<PathBuf> {
    let mut rest = given.iter().skip(1);
    let mut found = std::env::var_os("HACHI_CONFIG");
    while let Some(argument) = rest.next() {
        if argument == "--" {
            break;
        }
        if argument == "--config" {
            found = rest.next().cloned().or(found);
        } else if let Some(path) = argument
            .to_str()
            .and_then(|text| text.strip_prefix("--config="))
        {
            found = Some(path.into());
        }
    }
    found.map(Into::into)
}

/// The file's keys as flags. `is_set`: whether an environment variable is set, which then wins.
fn parse(text: &str, is_set: impl Fn(&OsStr) -> bool) -> Result<Vec<OsString>> {
    let table: Table = text.parse().map_err(|error: toml::de::Error| {
        // The message has the line and a pointer to the place.
        anyhow::anyhow!("it is no TOML\n{error}")
    })?;
    let command = Options::command();
    let mut flags = Vec::new();
    for (key, value) in &table {
        let Some(option) = options(&command).find(|option| option.get_long() == Some(key)) else {
            bail!("unknown key {key:?}{}", hint(&command, key));
        };
        let these = flag(option, key, value)?;
        check(&these).with_context(|| format!("key {key:?}"))?;
        if !option.get_env().is_some_and(&is_set) {
            flags.extend(these);
        }
    }
    Ok(flags)
}

/// The options that may stand in the file.
fn options(command: &Command) -> impl Iterator<Item = &Arg> {
    command.get_arguments().filter(|option| {
        option
            .get_long()
            .is_some_and(|name| !COMMAND_LINE_ONLY.contains(&name))
    })
}

fn hint(command: &Command, key: &str) -> String {
    let wanted = key.replace('_', "-").to_lowercase();
    options(command)
        .filter_map(Arg::get_long)
        .map(|name| (strsim::damerau_levenshtein(name, &wanted), name))
        .filter(|(slips, name)| slips * LETTERS_PER_SLIP <= name.len())
        .min()
        .map_or_else(
            || "; `hachi-agent --print-config` lists all keys".to_owned(),
            |(_, name)| format!("; did you mean {name:?}?"),
        )
}

/// One key as it would be written on the command line.
fn flag(option: &Arg, key: &str, value: &Value) -> Result<Vec<OsString>> {
    let with = |text: &str| OsString::from(format!("--{key}={text}"));
    if matches!(option.get_action(), ArgAction::SetTrue) {
        return match value {
            Value::Boolean(true) => Ok(vec![format!("--{key}").into()]),
            Value::Boolean(false) => Ok(Vec::new()),
            _ => bail!("key {key:?} must be true or false"),
        };
    }
    match value {
        Value::String(text) => Ok(vec![with(text)]),
        Value::Integer(number) => Ok(vec![with(&number.to_string())]),
        Value::Boolean(truth) => Ok(vec![with(&truth.to_string())]),
        Value::Array(values) if matches!(option.get_action(), ArgAction::Append) => values
            .iter()
            .map(|value| match value {
                Value::String(text) => Ok(with(text)),
                Value::Integer(number) => Ok(with(&number.to_string())),
                _ => bail!("key {key:?}: the elements must be strings or numbers"),
            })
            .collect(),
        _ => bail!("key {key:?} must be a string or a number"),
    }
}

/// What clap says of these flags alone.
fn check(flags: &[OsString]) -> Result<()> {
    let lenient = Options::command().mut_args(|option| option.required(false).env(None::<&str>));
    let line = [OsString::from("hachi-agent")]
        .into_iter()
        .chain(flags.iter().cloned());
    match lenient.try_get_matches_from(line) {
        Ok(_) => Ok(()),
        Err(error) => {
            let text = error.to_string();
            let first = text.lines().next().unwrap_or_default();
            bail!("{}", first.strip_prefix("error: ").unwrap_or(first))
        }
    }
}

/// A file with every key, its meaning and its default, all commented out.
#[must_use]
pub(crate) fn documented() -> String {
    let command = Options::command();
    let mut out = String::from(
        "# The configuration of hachi-agent (--config FILE, or HACHI_CONFIG). Every key is the long name of a\n\
         # flag; a flag wins over the environment, which wins over this file. Keys that are not known are\n\
         # refused. Shown are the defaults.\n",
    );
    for option in options(&command) {
        let name = option.get_long().unwrap_or_default();
        let help = option
            .get_help()
            .map(ToString::to_string)
            .unwrap_or_default();
        let _ = write!(out, "\n{}", wrapped(&help));
        let values: Vec<String> = option
            .get_possible_values()
            .iter()
            .filter(|value| !value.is_hide_set())
            .map(|value| value.get_name().to_owned())
            .collect();
        if !values.is_empty() && !matches!(option.get_action(), ArgAction::SetTrue) {
            let _ = writeln!(out, "# One of: {}.", values.join(", "));
        }
        if let Some(variable) = option.get_env() {
            let _ = writeln!(out, "# Environment: {}.", variable.to_string_lossy());
        }
        let default = option
            .get_default_values()
            .iter()
            .map(|value| value.to_string_lossy().into_owned())
            .collect::<Vec<_>>();
        let shown = match option.get_action() {
            ArgAction::SetTrue => "false".to_owned(),
            ArgAction::Append => Value::from(default).to_string(),
            _ => match default.first() {
                Some(text) if text.parse::<i64>().is_ok() || text.parse::<bool>().is_ok() => {
                    text.clone()
                }
                Some(text) => Value::from(text.clone()).to_string(),
                None => String::new(),
            },
        };
        let _ = writeln!(out, "# {name} = {shown}");
    }
    out.replace(" = \n", " =\n")
}

/// A comment of lines that are not too long.
fn wrapped(text: &str) -> String {
    const WIDTH: usize = 100;
    let mut out = String::new();
    let mut line = String::from("#");
    for word in text.split_whitespace() {
        if line.len() + 1 + word.len() > WIDTH {
            let _ = writeln!(out, "{line}");
            line = String::from("#");
        }
        let _ = write!(line, " {word}");
    }
    let _ = writeln!(out, "{line}");
    out
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    /// Where [`documented`] is kept for people, and for the manifests.
    const DOCUMENT: &str = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../manifests/base/agent.toml"
    );

    fn flags(text: &str) -> Result<Vec<String>> {
        Ok(parse(text, |_| false)?
            .into_iter()
            .map(|flag| flag.to_string_lossy().into_owned())
            .collect())
    }

    fn refused(text: &str) -> String {
        match flags(text) {
            Ok(flags) => panic!("{text:?} was taken: {flags:?}"),
            Err(error) => format!("{error:#}"),
        }
    }

    /// The flags in the manifests: of the base and of every overlay.
    #[test]
    fn the_agent_knows_every_flag_of_the_manifests() {
        let manifests = concat!(env!("CARGO_MANIFEST_DIR"), "/../../manifests");
        let mut files = vec![format!("{manifests}/base/daemonset.yaml")];
        for overlay in fs::read_dir(format!("{manifests}/overlays")).unwrap() {
            let path = overlay.unwrap().path().join("kustomization.yaml");
            files.push(path.to_string_lossy().into_owned());
        }
        assert!(files.len() > 4, "{files:?}");
        for file in files {
            let text = fs::read_to_string(&file).unwrap();
            // The base's init container has flags of its own.
            let text = text.split("name: agent").last().unwrap();
            let flags: Vec<_> = text
                .lines()
                .filter_map(|line| {
                    let line = line.trim_start().trim_start_matches("- ");
                    let flag = line.strip_prefix("value: ").unwrap_or(line);
                    flag.starts_with("--").then_some(flag)
                })
                .collect();
            let given = ["hachi-agent", "--node-name=n"].into_iter();
            let parsed = Options::try_parse_from(given.chain(flags.iter().copied()));
            assert!(parsed.is_ok(), "{file}: {flags:?}: {}", parsed.unwrap_err());
        }
    }

    #[test]
    fn keys_become_flags() {
        let text = "mtu = 1400\nattach = \"clsact\"\nno-redirect-peer = true\npod-wait = \"5s\"\n";
        let mut found = flags(text).unwrap();
        found.sort();
        let expected = [
            "--attach=clsact",
            "--mtu=1400",
            "--no-redirect-peer",
            "--pod-wait=5s",
        ];
        assert_eq!(found, expected);
        assert_eq!(flags("no-redirect-peer = false").unwrap(), [""; 0]);
    }

    #[test]
    fn what_is_no_option_is_refused_with_a_hint() {
        assert!(refused("pod_wait = \"3s\"").contains("did you mean \"pod-wait\"?"));
        assert!(refused("mut = 1500").contains("did you mean \"mtu\"?"));
        assert!(refused("colour = 1").contains("--print-config"));
        for flag in COMMAND_LINE_ONLY {
            assert!(
                refused(&format!("{flag} = \"x\"")).contains("unknown key"),
                "{flag}"
            );
        }
    }

    #[test]
    fn a_value_is_checked_as_on_the_command_line() {
        assert!(refused("mtu = \"big\"").contains("invalid value 'big'"));
        assert!(refused("attach = \"tc\"").contains("invalid value 'tc'"));
        assert!(refused("pod-wait = \"3\"").contains("write 500ms, 3s, 1m or 24h"));
        assert!(refused("no-redirect-peer = 1").contains("must be true or false"));
        assert!(refused("mtu = [1, 2]").contains("must be a string or a number"));
        assert!(refused("mtu = ").contains("it is no TOML"));
    }

    #[test]
    fn the_environment_wins_over_the_file() {
        let set = parse("node-name = \"a\"\nmtu = 1400", |name| name == "NODE_NAME").unwrap();
        assert_eq!(set, ["--mtu=1400"]);
    }

    #[test]
    fn the_command_line_wins_over_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent.toml");
        fs::write(&path, "node-name = \"a\"\nmtu = 1400\nattach = \"tcx\"\n").unwrap();
        for config in [
            vec![OsString::from("--config"), path.clone().into()],
            vec![OsString::from(format!("--config={}", path.display()))],
        ] {
            let mut given = vec![OsString::from("hachi-agent"), "--mtu".into(), "9000".into()];
            given.extend(config);
            let options = Options::try_parse_from(arguments(given).unwrap()).unwrap();
            assert_eq!(options.mtu, Some(9000));
            assert_eq!(options.node_name, "a");
            assert_eq!(options.attach, crate::options::Attach::Tcx);
        }
    }

    #[test]
    fn a_missing_file_is_named() {
        let given = ["hachi-agent", "--config", "/nowhere/agent.toml"].map(OsString::from);
        let error = arguments(given.to_vec()).unwrap_err();
        assert!(
            format!("{error:#}").contains("/nowhere/agent.toml"),
            "{error:#}"
        );
    }

    /// `HACHI_WRITE_CONFIG=1` writes the file anew.
    #[test]
    fn the_documented_file_is_current_and_valid() {
        let text = documented();
        if std::env::var_os("HACHI_WRITE_CONFIG").is_some() {
            fs::write(DOCUMENT, &text).unwrap();
        }
        assert_eq!(
            fs::read_to_string(DOCUMENT).unwrap_or_default(),
            text,
            "an option has changed: run this test with HACHI_WRITE_CONFIG=1"
        );
        // Every line with a default is taken when it is no comment any more.
        let taken: String = text
            .lines()
            .filter_map(|line| line.strip_prefix("# "))
            .filter(|line| {
                let key = line.split(" = ").next().unwrap_or_default();
                line.contains(" = ") && !key.contains(' ')
            })
            .map(|line| format!("{line}\n"))
            .collect();
        assert!(taken.lines().count() >= 5, "{taken}");
        flags(&taken).unwrap();
    }
}
