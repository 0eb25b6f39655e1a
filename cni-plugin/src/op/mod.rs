//! The operations.

mod add;
mod check;
mod del;
mod gc;
mod loopback;
mod status;

pub(crate) use self::loopback::TYPE as LOOPBACK;
pub(crate) use self::{
    add::add, check::check, del::del, gc::gc, loopback::loopback, status::status,
};

use hachi_net::{NetNs, Netlink};

use crate::{
    env::Env,
    error::{Error, code},
};

/// The Pod's namespace and a socket in it.
struct Pod {
    namespace: NetNs,
    netlink: Netlink,
}

impl Pod {
    /// Opens `CNI_NETNS`, which has to be a network namespace other than the plugin's.
    fn open(env: &Env) -> Result<Self, Error> {
        let Some(path) = &env.netns else {
            return Err(Error::new(
                code::INVALID_ENVIRONMENT,
                "CNI_NETNS is missing",
            ));
        };
        let namespace = NetNs::open(path)?;
        // Proves that it is one.
        let netlink = Netlink::open_in(&namespace)?;
        if namespace.is_current()? && !env.netns_override {
            let why = format!("{} is the plugin's own network namespace", path.display());
            return Err(Error::new(code::INVALID_NETNS, why));
        }
        Ok(Self { namespace, netlink })
    }
}

/// For what goes wrong while an operation goes on; the runtime keeps it with its logs.
fn warn(what: &str, error: impl std::fmt::Display) {
    eprintln!("hachi-cni: {what}: {error}");
}
