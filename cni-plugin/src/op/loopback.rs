//! The plugin of type `loopback`, which containerd 1.x calls for every Pod before the network's own:
//! it brings up `lo`. `hachi install` puts a link of that name beside `hachi-cni` on nodes that lack it.

use serde_json::{Value, json};

use super::Pod;
use crate::{
    env::{Command, Env},
    error::{Error, code},
    fields::Fields,
    version::Version,
};

/// The plugin's type, by which a configuration asks for it.
pub(crate) const TYPE: &str = "loopback";

const IFNAME: &str = "lo";

/// Carries out any operation but VERSION. DEL, GC and STATUS have nothing to do: the interface goes
/// with its namespace, and bringing it up takes nothing.
pub(crate) fn loopback(
    env: &Env,
    version: Version,
    fields: &mut Fields,
    write: impl FnOnce(&Value) -> Result<(), Error>,
) -> Result<(), Error> {
    match env.command {
        Command::Add => {
            let mut pod = Pod::open(env)?;
            let link = pod.netlink.link(IFNAME)?.ok_or_else(missing)?;
            pod.netlink.set_up(link.index, IFNAME)?;
            // A plugin that comes after another one hands on what that one said.
            let earlier = fields.raw("prevResult");
            write(&earlier.unwrap_or_else(|| result(env, version)))
        }
        Command::Check => match Pod::open(env)?.netlink.link(IFNAME)? {
            Some(link) if link.up => Ok(()),
            Some(_) => Err(Error::new(code::NOT_AS_MADE, "lo is down")),
            None => Err(missing()),
        },
        Command::Del | Command::Gc | Command::Status | Command::Version => Ok(()),
    }
}

fn missing() -> Error {
    Error::new(code::INVALID_NETNS, "the network namespace has no lo")
}

fn result(env: &Env, version: Version) -> Value {
    let ip = |address: &str, family: &str| {
        let mut ip = json!({"address": address, "interface": 0});
        if version < Version::V1_0_0 {
            ip["version"] = family.into();
        }
        ip
    };
    json!({
        "cniVersion": version.as_str(),
        "interfaces": [{"name": IFNAME, "mac": "00:00:00:00:00:00", "sandbox": env.netns}],
        "ips": [ip("127.0.0.1/8", "4"), ip("::1/128", "6")],
        "dns": {},
    })
}
