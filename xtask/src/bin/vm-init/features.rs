//! What this kernel can do, found by trying, in lines that xtask collects into a table.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::protocol::FEATURE;

/// Kinds of interface that Hachi uses or may use.
const LINKS: [&str; 4] = ["veth", "vxlan", "netkit", "dummy"];

/// Writes one line a feature.
pub(crate) fn report(out: &mut impl Write) -> std::io::Result<()> {
    for kind in LINKS {
        writeln!(out, "{FEATURE}{kind} {}", yes(link(kind)))?;
    }
    // A protocol is listed once it can be used: its module was loaded, or it is built in.
    let protocols = fs::read_to_string("/proc/net/protocols").unwrap_or_default();
    for (name, protocol) in [("IPv6", "TCPv6"), ("SCTP", "SCTP")] {
        let there = protocols
            .lines()
            .any(|line| line.split_whitespace().next() == Some(protocol));
        writeln!(out, "{FEATURE}{name} {}", yes(there))?;
    }
    writeln!(
        out,
        "{FEATURE}BTF {}",
        yes(Path::new("/sys/kernel/btf/vmlinux").exists())
    )
}

fn yes(there: bool) -> &'static str {
    if there { "yes" } else { "no" }
}

/// Makes an interface of a kind and removes it.
fn link(kind: &str) -> bool {
    let ip = |arguments: &[&str]| {
        let mut command = Command::new("/usr/sbin/ip");
        command
            .args(arguments)
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    };
    let more: &[&str] = if kind == "vxlan" {
        &["external", "dstport", "4789"]
    } else {
        &[]
    };
    let made = ip(&[&["link", "add", "probe0", "type", kind], more].concat());
    made && ip(&["link", "delete", "probe0"])
}
