//! `hachi policy`: why a flow is judged as it is, and what selects a Pod.

use std::{fmt::Write as _, process::ExitCode};

use anyhow::{Context as _, Result, bail};
use clap::Subcommand;
use hachi_api::{PolicyTrace, Request};

/// `hachi policy ...`.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Say which policies and rules let a flow pass or drop it, and what the kernel's maps say.
    /// Exits 1 if it is denied, and 3 if the maps disagree with the policies (drift).
    Trace {
        /// Who opens the flow: NAMESPACE/POD or an address.
        #[arg(long)]
        from: String,
        /// Who is to answer: NAMESPACE/POD or an address, also a Service's.
        #[arg(long)]
        to: String,
        /// Destination port and protocol: 80/tcp, 53/udp, 9/sctp, or icmp.
        #[arg(long, value_parser = port)]
        port: (u8, u16),
    },
    /// Print the policies that select a Pod, and how large its part of the maps is.
    Get {
        /// NAMESPACE/POD
        pod: String,
    },
}

impl Command {
    pub(crate) fn request(&self) -> Result<Request> {
        Ok(match self {
            Self::Trace { from, to, port } => Request::TracePolicy {
                from: from.clone(),
                to: to.clone(),
                protocol: port.0,
                port: port.1,
            },
            Self::Get { pod } => {
                let (namespace, name) = pod
                    .split_once('/')
                    .with_context(|| format!("{pod:?} is not NAMESPACE/POD"))?;
                if namespace.is_empty() || name.is_empty() {
                    bail!("{pod:?} is not NAMESPACE/POD");
                }
                Request::PodPolicies {
                    namespace: namespace.to_owned(),
                    name: name.to_owned(),
                }
            }
        })
    }
}

/// Reads `80/tcp`; TCP if no protocol is named.
fn port(text: &str) -> Result<(u8, u16), String> {
    match text {
        "icmp" => return Ok((1, 0)),
        "icmpv6" => return Ok((58, 0)),
        _ => {}
    }
    let (port, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let protocol = match protocol.to_ascii_lowercase().as_str() {
        "tcp" => 6,
        "udp" => 17,
        "sctp" => 132,
        _ => return Err(format!("{protocol:?} is no protocol: use tcp, udp or sctp")),
    };
    match port.parse() {
        Ok(port @ 1..) => Ok((protocol, port)),
        _ => Err(format!("{port:?} is not a port from 1 to 65535")),
    }
}

pub(crate) fn text(trace: &PolicyTrace) -> String {
    let word = |allowed| if allowed { "ALLOWED" } else { "DENIED" };
    let mut out = String::new();
    for flow in &trace.flows {
        let through = flow
            .service
            .map(|service| format!(" through Service {service}"))
            .unwrap_or_default();
        let _ = writeln!(
            out,
            "{} ({}) -> {} ({}){through}: {}",
            trace.from,
            flow.source,
            trace.to,
            flow.destination,
            word(flow.allowed)
        );
        if flow.sides.is_empty() {
            let _ = writeln!(out, "  the Service has no backend");
        }
        for side in &flow.sides {
            let _ = writeln!(out, "  {}: {}", side.direction, word(side.allowed));
            for reason in &side.reasons {
                let _ = writeln!(out, "    {reason}");
            }
            let drift = if side.drift {
                "  <-- DRIFT: this is not what the policies say"
            } else {
                ""
            };
            let _ = writeln!(out, "    kernel: {}{drift}", side.live);
        }
    }
    out
}

pub(crate) fn exit_code(trace: &PolicyTrace) -> ExitCode {
    if trace.flows.iter().any(|flow| flow.drift) {
        ExitCode::from(3)
    } else if trace.flows.iter().all(|flow| flow.allowed) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_a_number_and_a_protocol() {
        assert_eq!(port("80/tcp"), Ok((6, 80)));
        assert_eq!(port("80"), Ok((6, 80)));
        assert_eq!(port("53/UDP"), Ok((17, 53)));
        assert_eq!(port("icmp"), Ok((1, 0)));
        for bad in ["0/tcp", "80/http", "x", "65536/udp", ""] {
            assert!(port(bad).is_err(), "{bad:?} was taken");
        }
    }
}
