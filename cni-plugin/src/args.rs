//! `CNI_ARGS`: `NAME=value;NAME=value`.

use std::net::IpAddr;

use hachi_api::PodRef;
use hachi_net::Mac;

use crate::error::{Error, code};

/// What we understand of `CNI_ARGS`.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Args {
    /// The Pod, if a Kubernetes runtime calls.
    pub(crate) pod: Option<PodRef>,
    /// `IP`: the address to use.
    pub(crate) ip: Option<IpAddr>,
    /// `MAC`: the MAC address to use.
    pub(crate) mac: Option<Mac>,
}

impl Args {
    pub(crate) fn parse(text: &str) -> Result<Self, Error> {
        let mut args = Self::default();
        let (mut namespace, mut name, mut uid) = (None, None, None);
        let mut unknown = None;
        let mut ignore_unknown = false;
        for pair in text.split(';').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair
                .split_once('=')
                .ok_or_else(|| invalid(pair, "is not of the form NAME=value"))?;
            match key {
                "K8S_POD_NAMESPACE" => namespace = Some(value.to_owned()),
                "K8S_POD_NAME" => name = Some(value.to_owned()),
                "K8S_POD_UID" => uid = Some(value.to_owned()).filter(|uid| !uid.is_empty()),
                // The container id, again.
                "K8S_POD_INFRA_CONTAINER_ID" => {}
                "IgnoreUnknown" => {
                    ignore_unknown = match value {
                        "1" => true,
                        "0" => false,
                        _ => value
                            .to_ascii_lowercase()
                            .parse()
                            .map_err(|_| invalid(pair, "is neither true nor false"))?,
                    }
                }
                "IP" => {
                    let address = value.split('/').next().unwrap_or(value);
                    let address = address
                        .parse()
                        .map_err(|e| invalid(pair, &format!("{e}")))?;
                    args.ip = Some(address);
                }
                "MAC" => {
                    let mac: Mac = value.parse().map_err(|e| invalid(pair, &format!("{e}")))?;
                    if !mac.is_usable() {
                        return Err(invalid(
                            pair,
                            "is not an address that an interface may have",
                        ));
                    }
                    args.mac = Some(mac);
                }
                _ => unknown = unknown.or(Some(key)),
            }
        }
        if let Some(key) = unknown
            && !ignore_unknown
        {
            return Err(invalid(key, "is unknown; IgnoreUnknown=1 would allow it"));
        }
        args.pod = match (namespace, name) {
            (Some(namespace), Some(name)) if !namespace.is_empty() && !name.is_empty() => {
                Some(PodRef {
                    namespace,
                    name,
                    uid,
                })
            }
            _ => None,
        };
        Ok(args)
    }
}

fn invalid(what: &str, why: &str) -> Error {
    Error::new(code::INVALID_ENVIRONMENT, format!("CNI_ARGS: {what} {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_containerd_passes() {
        let args = Args::parse(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0;\
             K8S_POD_INFRA_CONTAINER_ID=abc;K8S_POD_UID=u-1;SOMETHING=else",
        )
        .unwrap();
        let pod = PodRef {
            namespace: "default".into(),
            name: "web-0".into(),
            uid: Some("u-1".into()),
        };
        assert_eq!(
            args,
            Args {
                pod: Some(pod),
                ip: None,
                mac: None
            }
        );
    }

    #[test]
    fn addresses() {
        let args = Args::parse("IP=10.1.2.3;MAC=02:00:00:00:00:01;").unwrap();
        assert_eq!(args.ip, Some([10, 1, 2, 3].into()));
        assert_eq!(args.mac, Some(Mac([2, 0, 0, 0, 0, 1])));
        assert_eq!(
            Args::parse("IP=fd00::3/64").unwrap().ip,
            Some("fd00::3".parse().unwrap())
        );
    }

    #[test]
    fn what_is_refused() {
        for text in [
            "x",
            "X=1",
            "IP=a",
            "MAC=1",
            "MAC=01:00:00:00:00:00",
            "IgnoreUnknown=maybe",
        ] {
            Args::parse(text).unwrap_err();
        }
        Args::parse("X=1;IgnoreUnknown=true").unwrap();
        Args::parse("X=1;IgnoreUnknown=0").unwrap_err();
    }
}
