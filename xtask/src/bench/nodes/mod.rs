//! `bench nodes`: Pods of two nodes, on one link (routes) and with a router between (VXLAN), beside the
//! same namespaces and links without Hachi.
//!
//! Client and server run on one core. Their Pods are selected by a policy in both directions, so that every
//! packet is judged and tracked.

mod bare;
mod traffic;

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Args;

use self::bare::Bare;
use self::traffic::{Kind, Pair, measure};
use super::{Bed, Common, Report, Rng, Samples, Target, paired_ratio};
use crate::repo::Repo;
use crate::shell::Shell;

/// How to measure the ways between nodes.
#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    pub(crate) common: Common,
}

const NETNS: &str = "/run/netns";

/// The Pods, and a policy that lets them speak to each other.
const OBJECTS: &str = "---
apiVersion: v1
kind: Namespace
metadata: {name: bench}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: each-other, namespace: bench}
spec:
  podSelector: {}
  policyTypes: [Ingress, Egress]
  ingress: [{from: [{podSelector: {}}]}]
  egress: [{to: [{podSelector: {}}]}]
";

/// What is measured between.
struct Way {
    name: &'static str,
    ours: Pair,
    bare: Pair,
}

/// Measures.
pub(crate) fn run(repo: &Repo, shell: &Shell, options: &Options) -> Result<Report> {
    let up = ["--nodes", "3", "--family", "v4", "--network", "routed"];
    let bed = Bed::start(repo, shell, &up)?;
    let mut objects = OBJECTS.to_owned();
    for number in 1..=3 {
        objects += &format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: pod{number}, namespace: bench}}\n\
             spec: {{nodeName: node{number}, containers: [{{name: main, image: server}}]}}\n"
        );
    }
    bed.kubectl(&["create", "-f", "-"], &objects)?;
    let wait = [
        "wait",
        "pod",
        "--all",
        "-n",
        "bench",
        "--for=condition=Ready",
        "--timeout=60s",
    ];
    bed.kubectl(&wait, "")?;
    let bare = Bare::new()?;
    let (client, _) = pod(&bed, 1)?;
    let ways = [(2, "direct"), (3, "VXLAN")].map(|(number, name)| -> Result<Way> {
        let (server, address) = pod(&bed, number)?;
        Ok(Way {
            name,
            ours: Pair {
                client: client.clone(),
                server,
                address,
            },
            bare: Pair {
                client: Path::new(NETNS).join(bare.name("pod1")),
                server: Path::new(NETNS).join(bare.name(&format!("pod{number}"))),
                address: Bare::address(number).parse()?,
            },
        })
    });
    let ways = ways.into_iter().collect::<Result<Vec<_>>>()?;
    let mut measured = vec![[Samples::default(), Samples::default()]; ways.len() * Kind::ALL.len()];
    let mut rng = Rng::new(options.common.seed);
    // Once unmeasured: neighbours are known, and nobody fails.
    for round in 0..=options.common.repetitions {
        let mut order: Vec<usize> = (0..measured.len() * 2).collect();
        rng.shuffle(&mut order);
        for cell in order {
            let (index, side) = (cell / 2, cell % 2);
            let way = &ways[index / Kind::ALL.len()];
            let kind = Kind::ALL[index % Kind::ALL.len()];
            let pair = if side == 0 { &way.ours } else { &way.bare };
            let value = measure(pair, kind)
                .with_context(|| format!("{} {}, side {side}", way.name, kind.name()))?;
            if round > 0 {
                measured[index][side].add(vec![value]);
            }
        }
    }
    Ok(report(&ways, &measured))
}

fn report(ways: &[Way], measured: &[[Samples; 2]]) -> Report {
    let mut report = Report::new("nodes", &["p50", "p90", "without Hachi", "ratio"]);
    report.setting("nodes", 3);
    for (index, [ours, bare]) in measured.iter().enumerate() {
        let way = &ways[index / Kind::ALL.len()];
        let kind = Kind::ALL[index % Kind::ALL.len()];
        let ratio = paired_ratio(ours, bare, 50.0);
        let values = vec![
            ours.percentile(50.0),
            ours.percentile(90.0),
            bare.percentile(50.0),
            ratio,
        ];
        let what = format!("{} {}", way.name, kind.name());
        report.row(what, values, ratio, Target::None);
    }
    report
}

/// The namespace and the address of a Pod.
fn pod(bed: &Bed, number: u8) -> Result<(PathBuf, IpAddr)> {
    let name = format!("pod{number}");
    let path = "jsonpath={.status.podIP}";
    let ip = bed.kubectl(&["get", "pod", &name, "-n", "bench", "-o", path], "")?;
    for entry in fs::read_dir(NETNS).context("no namespaces")? {
        let netns = entry?.file_name().to_string_lossy().into_owned();
        let shown = Command::new("ip")
            .args(["-n", &netns, "-4", "-o", "address"])
            .output()?;
        let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
        if netns.contains("-p-") && shown.contains(&format!(" {ip}/32 ")) {
            return Ok((Path::new(NETNS).join(netns), ip.parse()?));
        }
    }
    bail!("no namespace has the address {ip} of {name}")
}
