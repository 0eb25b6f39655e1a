//! Rules as kube-proxy writes them, so far as a connection to a ClusterIP meets them: a Service that is
//! asked in the middle of others with three endpoints each.
//!
//! - iptables: `KUBE-SERVICES` with a rule a Service, a chain a Service and a chain an endpoint.
//! - nftables: one map from address, protocol and port to a chain a Service. An endpoint's chain has
//!   only the Service that is asked: nothing else is ever walked through, and tens of thousands of
//!   chains take minutes to load.

use std::{fmt::Write as _, io::Write as _, process::Command};

use crate::node::{PORT, SERVER_IP, SERVICE, TARGET};

/// Addresses of a Service's number, and of its endpoints.
fn addresses(n: usize) -> (String, [String; 3]) {
    let service = format!("10.{}.{}.{}", 96 + n / 65_536, n / 256 % 256, n % 256);
    let endpoint = |k: usize| {
        let at = 3 * n + k;
        format!("10.{}.{}.{}", 128 + at / 65_536, at / 256 % 256, at % 256)
    };
    (service, [0, 1, 2].map(endpoint))
}

fn feed(program: &str, arguments: &[&str], input: &str) {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(std::process::Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    let mut pipe = child.stdin.take().expect("a pipe");
    pipe.write_all(input.as_bytes()).expect("the rules");
    drop(pipe);
    assert!(child.wait().expect("its end").success(), "{program}");
}

pub(crate) fn iptables(services: usize) {
    let mut chains = String::new();
    let mut rules = String::new();
    let mut one = |n: usize, service: &str, port: u16, endpoints: &[String]| {
        let _ = writeln!(chains, ":KUBE-SVC-{n} - [0:0]");
        let _ = writeln!(
            rules,
            "-A KUBE-SERVICES -d {service}/32 -p tcp -m comment --comment \"default/svc{n}:http cluster \
             IP\" -m tcp --dport {port} -j KUBE-SVC-{n}"
        );
        let _ = writeln!(
            rules,
            "-A KUBE-SVC-{n} ! -s 10.0.0.0/8 -d {service}/32 -p tcp -m tcp --dport {port} -j \
             KUBE-MARK-MASQ"
        );
        for (k, endpoint) in endpoints.iter().enumerate() {
            let _ = writeln!(chains, ":KUBE-SEP-{n}-{k} - [0:0]");
            let left = endpoints.len() - k;
            let chance = if left == 1 {
                String::new()
            } else {
                format!(
                    "-m statistic --mode random --probability {:.10} ",
                    1.0 / left as f64
                )
            };
            let _ = writeln!(rules, "-A KUBE-SVC-{n} {chance}-j KUBE-SEP-{n}-{k}");
            let _ = writeln!(
                rules,
                "-A KUBE-SEP-{n}-{k} -s {endpoint}/32 -j KUBE-MARK-MASQ"
            );
            let _ = writeln!(
                rules,
                "-A KUBE-SEP-{n}-{k} -p tcp -m tcp -j DNAT --to-destination {endpoint}:{PORT}"
            );
        }
    };
    for n in 0..services {
        if n == services / 2 {
            one(n, &SERVICE.to_string(), TARGET, &[SERVER_IP.to_string()]);
        } else {
            let (service, endpoints) = addresses(n);
            one(n, &service, 80, &endpoints);
        }
    }
    let text = format!(
        "*nat
:KUBE-SERVICES - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-POSTROUTING - [0:0]
{chains}-A PREROUTING -j KUBE-SERVICES
-A OUTPUT -j KUBE-SERVICES
-A POSTROUTING -j KUBE-POSTROUTING
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
{rules}COMMIT
*filter
:KUBE-FORWARD - [0:0]
-A FORWARD -j KUBE-FORWARD
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
"
    );
    feed("iptables-legacy-restore", &[], &text);
}

pub(crate) fn nftables(services: usize) {
    let mut chains = String::new();
    let mut elements = String::new();
    for n in 0..services {
        let asked = n == services / 2;
        let (service, port) = if asked {
            (SERVICE.to_string(), TARGET)
        } else {
            (addresses(n).0, 80)
        };
        let target = if asked {
            "endpoint-asked"
        } else {
            "endpoint-other"
        };
        let _ = writeln!(
            chains,
            "  chain service-{n} {{\n    ip daddr {service} tcp dport {port} ip saddr != 10.0.0.0/8 jump \
             mark-for-masquerade\n    goto {target}\n  }}"
        );
        let _ = writeln!(
            elements,
            "      {service} . tcp . {port} : goto service-{n},"
        );
    }
    let text = format!(
        "table ip kube-proxy {{
  chain mark-for-masquerade {{
    meta mark set meta mark or 0x4000
  }}
  chain endpoint-asked {{
    ip saddr {SERVER_IP} jump mark-for-masquerade
    meta l4proto tcp dnat to {SERVER_IP}:{PORT}
  }}
  chain endpoint-other {{
    drop
  }}
{chains}  map service-ips {{
    type ipv4_addr . inet_proto . inet_service : verdict
    elements = {{
{elements}    }}
  }}
  chain services {{
    ip daddr . meta l4proto . th dport vmap @service-ips
  }}
  chain nat-prerouting {{
    type nat hook prerouting priority dstnat; policy accept;
    jump services
  }}
  chain nat-output {{
    type nat hook output priority -100; policy accept;
    jump services
  }}
  chain masquerading {{
    meta mark and 0x4000 == 0 return
    meta mark set meta mark xor 0x4000
    masquerade fully-random
  }}
  chain nat-postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
    jump masquerading
  }}
  chain filter-forward {{
    type filter hook forward priority -110; policy accept;
    ct state new ip daddr 10.95.255.255 reject
  }}
}}
"
    );
    feed("nft", &["-f", "-"], &text);
}
