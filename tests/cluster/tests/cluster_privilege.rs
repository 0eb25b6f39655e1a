//! Each capability that the manifests give an agent is needed, and an agent that lacks one says so: every
//! other suite runs agents with exactly these.

use anyhow::{Context as _, Result, ensure};
use hachi_cluster::{Cluster, Family, Options, bed::LIMIT, capabilities, eventually};

#[test]
fn an_agent_that_lacks_a_capability_says_which() {
    hachi_testutil::require_root!();
    hachi_testutil::require_binaries!("hachi-cni", "hachi-agent");
    let dir = tempfile::tempdir().expect("a directory");
    if let Err(error) = one_by_one(&dir.path().join("cluster")) {
        panic!("{error:?}");
    }
}

fn one_by_one(dir: &std::path::Path) -> Result<()> {
    let cluster = Cluster::start(Options {
        nodes: 1,
        remove_dir: true,
        ..Options::new(dir, hachi_testutil::dist_dir(), Family::V4)
    })?;
    let log = cluster.nodes()[0].agent_log();
    for capability in capabilities()? {
        cluster.kill_agent("node1")?;
        std::fs::write(&log, "")?;
        cluster.start_agent_without("node1", Some(&capability))?;
        eventually(LIMIT, || {
            ensure!(cluster.agent_pid("node1")?.is_none(), "it runs");
            Ok(())
        })
        .with_context(|| format!("without {capability}"))?;
        let said = std::fs::read_to_string(&log)?;
        ensure!(said.contains(&format!("lacks CAP_{capability})")), "{said}");
    }
    cluster.start_agent_without("node1", None)?;
    cluster.wait_agent("node1").map(drop)
}
