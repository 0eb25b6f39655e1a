//! `prevResult`: what plugins before us, or our own ADD, have said.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::{
    error::{Error, code},
    fields::Fields,
    version::Version,
};

/// An earlier result.
#[derive(Debug, Default)]
pub(crate) struct PrevResult {
    pub(crate) interfaces: Vec<Interface>,
    pub(crate) ips: Vec<Ip>,
    pub(crate) routes: Vec<Route>,
    /// As it came, to hand it on.
    pub(crate) raw: Map<String, Value>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Interface {
    pub(crate) name: String,
    #[serde(default)]
    pub(crate) mac: Option<String>,
    #[serde(default)]
    pub(crate) sandbox: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Ip {
    pub(crate) address: IpNet,
    #[serde(default)]
    pub(crate) interface: Option<usize>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Route {
    pub(crate) dst: IpNet,
    #[serde(default)]
    pub(crate) gw: Option<IpAddr>,
}

impl PrevResult {
    pub(crate) fn parse(fields: &mut Fields) -> Result<Option<Self>, Error> {
        let Some(value) = fields.raw("prevResult") else {
            return Ok(None);
        };
        let mut fields = Fields::new("prevResult", value.clone())?;
        // The formats since 0.3.0 differ in what we do not read.
        if let Some(version) = fields.take::<String>("cniVersion")?
            && Version::parse(&version).is_none()
        {
            let why = format!("prevResult has cniVersion {version}, which is not supported");
            return Err(Error::new(code::INCOMPATIBLE_VERSION, why));
        }
        let prev = Self {
            interfaces: fields.take("interfaces")?.unwrap_or_default(),
            ips: fields.take("ips")?.unwrap_or_default(),
            routes: fields.take("routes")?.unwrap_or_default(),
            raw: match value {
                Value::Object(raw) => raw,
                _ => Map::new(),
            },
        };
        for (index, ip) in prev.ips.iter().enumerate() {
            if ip
                .interface
                .is_some_and(|interface| interface >= prev.interfaces.len())
            {
                let field = format!("prevResult.ips[{index}].interface");
                return Err(Error::field(&field, "there is no such interface"));
            }
        }
        Ok(Some(prev))
    }
}
