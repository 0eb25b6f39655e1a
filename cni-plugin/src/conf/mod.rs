//! The network configuration on stdin.
//!
//! | field | meaning |
//! |---|---|
//! | `mtu` | of the Pod's interface; the agent's, or that of the node's uplink, if absent |
//! | `agent` | `required` (default): no ADD without the agent; `optional`: works alone without it |
//! | `agentSocket` | its socket |
//! | `ipam` | `ranges`, `routes`, `dataDir` as host-local has them, and `exclude` |
//! | `dns` | handed on in the result |
//! | `ipMasq` | masquerade what leaves the network; only where the agent, which does that, is optional |
//! | `hairpinMode`, `isDefaultGateway`, `forceAddress` | accepted where they ask for what Hachi does |
//!
//! `ipMasq` and those after it may also stand in a `delegate` object, as flannel's configuration has it.

mod ipam;
mod runtime;

use std::path::PathBuf;

use hachi_api::{AttachmentId, DEFAULT_SOCKET};
use hachi_net::RangeSet;
use serde::Deserialize;
use serde_json::{Map, Value};

pub(crate) use self::{ipam::Ipam, runtime::Runtime};
use crate::{
    env::is_name,
    error::{Error, code},
    fields::Fields,
    prev::PrevResult,
    version::Version,
};

/// Smallest MTU of IPv4 (RFC 791), largest of the kernel's Ethernet devices.
pub(crate) const MTU: std::ops::RangeInclusive<u32> = 68..=65_535;

/// Smallest MTU of IPv6 (RFC 8200).
pub(crate) const MTU_V6: u32 = 1280;

/// The configuration, validated.
#[derive(Debug)]
pub(crate) struct Conf {
    pub(crate) version: Version,
    pub(crate) name: String,
    pub(crate) mtu: Option<u32>,
    pub(crate) agent: AgentMode,
    pub(crate) socket: PathBuf,
    pub(crate) ipam: Ipam,
    /// Masquerade by the plugin itself.
    pub(crate) masquerade: bool,
    pub(crate) dns: Option<Value>,
    pub(crate) runtime: Runtime,
    pub(crate) prev: Option<PrevResult>,
    /// GC: the attachments to keep; absent if the runtime did not say.
    pub(crate) valid: Option<Vec<AttachmentId>>,
}

/// Whether an ADD needs the agent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum AgentMode {
    #[default]
    Required,
    Optional,
}

/// Decodes the text as far as its version, which decides about everything else.
pub(crate) fn decode(text: &[u8]) -> Result<(Version, Fields), Error> {
    let value: Value = serde_json::from_slice(text).map_err(|error| {
        Error::new(code::DECODING, "the configuration is not JSON").details(error)
    })?;
    let mut fields = Fields::new("", value).map_err(|error| error.code(code::DECODING))?;
    let version = match fields.raw("cniVersion") {
        Some(Value::String(version)) => version,
        // What the specification says of configurations from before it had versions.
        None => "0.1.0".to_owned(),
        Some(_) => return Err(Error::new(code::DECODING, "cniVersion is not a string")),
    };
    match Version::parse(&version) {
        Some(version) => Ok((version, fields)),
        None => {
            let why = format!("cniVersion {version} is not supported");
            let known = Version::ALL.map(Version::as_str).join(", ");
            Err(Error::new(code::INCOMPATIBLE_VERSION, why).details(format!("supported: {known}")))
        }
    }
}

impl Conf {
    pub(crate) fn parse(version: Version, mut fields: Fields) -> Result<Self, Error> {
        let name: String = required(&mut fields, "name")?;
        if !is_name(&name) {
            let why = "must begin with a letter or digit and go on with letters, digits, _ . or -";
            return Err(Error::field("name", why));
        }
        let _type: String = required(&mut fields, "type")?;
        let mtu = parse_mtu(&mut fields)?;
        let agent = fields.take("agent")?.unwrap_or_default();
        let socket = absolute_path(&mut fields, "agentSocket")?
            .unwrap_or_else(|| PathBuf::from(DEFAULT_SOCKET));
        let mut masquerade = carried_over(&mut fields, agent)?;
        if let Some(mut delegate) = fields.object("delegate")? {
            let delegated = carried_over(&mut delegate, agent)?;
            if masquerade.is_some() && delegated.is_some() && masquerade != delegated {
                let why = "not what ipMasq beside it says";
                return Err(Error::field("delegate.ipMasq", why));
            }
            masquerade = masquerade.or(delegated);
            delegate.finish()?;
        }
        // For the runtime; what it grants comes as runtimeConfig.
        let _capabilities: Option<Map<String, Value>> = fields.take("capabilities")?;
        let mut runtime = Runtime::parse(&mut fields, agent)?;
        let ipam = Ipam::parse(&mut fields, std::mem::take(&mut runtime.ranges))?;
        if agent == AgentMode::Optional && ipam.sets.is_empty() {
            let why = "required with `\"agent\": \"optional\"`: there is nobody to ask for a pool";
            return Err(Error::field("ipam.ranges", why));
        }
        let ipv6 = |set: &RangeSet| {
            set.ranges
                .iter()
                .any(|range| range.subnet().addr().is_ipv6())
        };
        if mtu.is_some_and(|mtu| mtu < MTU_V6) && ipam.sets.iter().any(ipv6) {
            return Err(Error::field(
                "mtu",
                format_args!("IPv6 needs {MTU_V6} or more"),
            ));
        }
        let dns = dns(&mut fields)?;
        let conf = Self {
            version,
            name,
            mtu,
            agent,
            socket,
            ipam,
            masquerade: masquerade.unwrap_or(false),
            dns: runtime.dns.take().or(dns),
            runtime,
            prev: PrevResult::parse(&mut fields)?,
            valid: valid_attachments(&mut fields)?,
        };
        fields.finish()?;
        Ok(conf)
    }
}

pub(crate) fn required<T: serde::de::DeserializeOwned>(
    fields: &mut Fields,
    key: &str,
) -> Result<T, Error> {
    fields
        .take(key)?
        .ok_or_else(|| Error::field(&fields.name(key), "missing"))
}

fn parse_mtu(fields: &mut Fields) -> Result<Option<u32>, Error> {
    match fields.take::<u32>("mtu")? {
        // As the reference plugins have it.
        None | Some(0) => Ok(None),
        Some(mtu) if MTU.contains(&mtu) => Ok(Some(mtu)),
        Some(mtu) => {
            let why = format!("{mtu} is not within {} and {}", MTU.start(), MTU.end());
            Err(Error::field("mtu", why))
        }
    }
}

fn absolute_path(fields: &mut Fields, key: &str) -> Result<Option<PathBuf>, Error> {
    let Some(path) = fields.take::<String>(key)? else {
        return Ok(None);
    };
    if path.starts_with('/') && !path.contains('\0') {
        Ok(Some(path.into()))
    } else {
        Err(Error::field(
            &fields.name(key),
            format_args!("{path:?} is not an absolute path"),
        ))
    }
}

/// Options of the bridge plugin that stand in the configurations of others. Returns `ipMasq`.
fn carried_over(fields: &mut Fields, agent: AgentMode) -> Result<Option<bool>, Error> {
    for (key, why) in [
        (
            "hairpinMode",
            "false is not possible: a Pod always reaches itself",
        ),
        (
            "isDefaultGateway",
            "false is not possible; name the routes in ipam.routes",
        ),
    ] {
        if fields.take::<bool>(key)? == Some(false) {
            return Err(Error::field(&fields.name(key), why));
        }
    }
    // There is no bridge whose address could be kept or replaced.
    let _force: Option<bool> = fields.take("forceAddress")?;
    let masquerade = fields.take("ipMasq")?;
    if masquerade == Some(true) && agent == AgentMode::Required {
        let why = "true is not possible with `\"agent\": \"required\"`: masquerading is the agent's \
                   task there; see its options";
        return Err(Error::field(&fields.name("ipMasq"), why));
    }
    Ok(masquerade)
}

/// Checks the `dns` object, which is handed on as it is.
fn dns(fields: &mut Fields) -> Result<Option<Value>, Error> {
    let Some(value) = fields.raw("dns") else {
        return Ok(None);
    };
    let mut dns = Fields::new("dns", value.clone())?;
    for list in ["nameservers", "search", "options"] {
        let _strings: Option<Vec<String>> = dns.take(list)?;
    }
    let _domain: Option<String> = dns.take("domain")?;
    dns.finish()?;
    Ok(Some(value))
}

fn valid_attachments(fields: &mut Fields) -> Result<Option<Vec<AttachmentId>>, Error> {
    /// As the specification spells it.
    #[derive(Deserialize)]
    struct Listed {
        #[serde(rename = "containerID")]
        container_id: String,
        ifname: String,
    }
    // The name of the field in the first drafts of 1.1.0, which libcni still writes.
    let earlier: Option<Vec<Listed>> = fields.take("cni.dev/attachments")?;
    let listed: Option<Vec<Listed>> = fields.take("cni.dev/valid-attachments")?;
    Ok(listed.or(earlier).map(|listed| {
        let id = |Listed {
                      container_id,
                      ifname,
                  }| AttachmentId {
            container_id,
            ifname,
        };
        listed.into_iter().map(id).collect()
    }))
}
