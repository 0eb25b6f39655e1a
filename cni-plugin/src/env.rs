//! The variables that a runtime sets.

use std::{env, ffi::OsString, path::PathBuf};

use hachi_api::AttachmentId;

use crate::{
    args::Args,
    error::{Error, code},
    version::Version,
};

/// `CNI_COMMAND`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    Add,
    Del,
    Check,
    Gc,
    Status,
    Version,
}

impl Command {
    const ALL: [Self; 6] = [
        Self::Add,
        Self::Del,
        Self::Check,
        Self::Gc,
        Self::Status,
        Self::Version,
    ];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Del => "DEL",
            Self::Check => "CHECK",
            Self::Gc => "GC",
            Self::Status => "STATUS",
            Self::Version => "VERSION",
        }
    }

    /// The version of the specification that introduced it.
    pub(crate) const fn since(self) -> Version {
        match self {
            Self::Add | Self::Del | Self::Version => Version::V0_3_0,
            Self::Check => Version::V0_4_0,
            Self::Gc | Self::Status => Version::V1_1_0,
        }
    }

    fn required(self) -> &'static [&'static str] {
        match self {
            Self::Add | Self::Check => &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"],
            Self::Del => &["CNI_CONTAINERID", "CNI_IFNAME", "CNI_PATH"],
            Self::Gc => &["CNI_PATH"],
            // The specification makes CNI_PATH optional to STATUS; we look for no other plugin.
            Self::Status | Self::Version => &[],
        }
    }
}

/// The variables, validated. Those that an operation has no use for are empty.
#[derive(Debug)]
pub(crate) struct Env {
    pub(crate) command: Command,
    pub(crate) id: AttachmentId,
    /// Absent if empty, which DEL may be called with.
    pub(crate) netns: Option<PathBuf>,
    /// Whether the plugin's own namespace is meant in earnest.
    pub(crate) netns_override: bool,
    pub(crate) args: Args,
}

impl Env {
    /// Reads the environment; `None` if nobody calls us as a plugin.
    pub(crate) fn read() -> Option<Result<Self, Error>> {
        Self::parse(|name| env::var_os(name))
    }

    fn parse(variable: impl Fn(&str) -> Option<OsString>) -> Option<Result<Self, Error>> {
        let get = |name: &str| variable(name).filter(|value| !value.is_empty());
        let command = get("CNI_COMMAND")?;
        Some(Self::parse_for(&command, get))
    }

    fn parse_for(
        command: &OsString,
        get: impl Fn(&str) -> Option<OsString>,
    ) -> Result<Self, Error> {
        let known = Command::ALL
            .into_iter()
            .find(|known| *command == known.name());
        let command =
            known.ok_or_else(|| invalid("CNI_COMMAND", &format!("{command:?} is unknown")))?;
        let missing: Vec<_> = command
            .required()
            .iter()
            .filter(|name| get(name).is_none())
            .copied()
            .collect();
        if !missing.is_empty() {
            let why = format!("required variables are missing: {}", missing.join(", "));
            return Err(Error::new(code::INVALID_ENVIRONMENT, why));
        }
        let text = |name: &str| match get(name).map(OsString::into_string) {
            None => Ok(String::new()),
            Some(Ok(text)) => Ok(text),
            Some(Err(_)) => Err(invalid(name, "is not UTF-8")),
        };
        let mut env = Self {
            command,
            id: AttachmentId {
                container_id: String::new(),
                ifname: String::new(),
            },
            netns: None,
            netns_override: false,
            args: Args::default(),
        };
        if matches!(command, Command::Add | Command::Del | Command::Check) {
            env.id.container_id = text("CNI_CONTAINERID")?;
            check_container_id(&env.id.container_id)?;
            env.id.ifname = text("CNI_IFNAME")?;
            check_ifname(&env.id.ifname)?;
            env.netns = get("CNI_NETNS").map(PathBuf::from);
            let value = text("CNI_NETNS_OVERRIDE")?;
            env.netns_override = value == "1" || value.eq_ignore_ascii_case("true");
            env.args = Args::parse(&text("CNI_ARGS")?)?;
        }
        Ok(env)
    }
}

fn invalid(name: &str, why: &str) -> Error {
    Error::new(code::INVALID_ENVIRONMENT, format!("{name} {why}"))
}

/// As the specification has it; a name that fits into a file name beside an interface's.
fn check_container_id(id: &str) -> Result<(), Error> {
    const LONGEST: usize = 200;
    if id.len() > LONGEST {
        return Err(invalid(
            "CNI_CONTAINERID",
            &format!("is longer than {LONGEST} bytes"),
        ));
    }
    if is_name(id) {
        Ok(())
    } else {
        let why = "must begin with a letter or digit and go on with letters, digits, _ . or -";
        Err(invalid("CNI_CONTAINERID", why))
    }
}

/// What the specification asks of container ids and network names.
pub(crate) fn is_name(text: &str) -> bool {
    text.starts_with(|first: char| first.is_ascii_alphanumeric())
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte))
}

/// What the kernel asks of interface names.
fn check_ifname(name: &str) -> Result<(), Error> {
    let why = if name.len() > 15 {
        "is longer than 15 bytes"
    } else if name == "." || name == ".." {
        "may not be . or .."
    } else if name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control()) {
        "may not contain /, : or white space"
    } else {
        return Ok(());
    };
    Err(invalid("CNI_IFNAME", why))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interface_names() {
        for name in ["eth0", "net1.5", "ünï", "123456789012345", "a-b_c@d"] {
            check_ifname(name).unwrap();
        }
        for name in [
            "1234567890123456",
            ".",
            "..",
            "a/b",
            "a:b",
            "a b",
            "a\tb",
            "a\u{7f}",
        ] {
            check_ifname(name).unwrap_err();
        }
    }

    #[test]
    fn names() {
        for name in ["a", "0", "a_b.c-d", "K8s"] {
            assert!(is_name(name), "{name}");
        }
        for name in ["", "-a", ".a", "a/b", "a b", "ä", "a\0"] {
            assert!(!is_name(name), "{name}");
        }
    }

    #[test]
    fn no_command_is_no_call() {
        assert!(Env::parse(|_| None).is_none());
        assert!(Env::parse(|_| Some(OsString::new())).is_none());
    }
}
