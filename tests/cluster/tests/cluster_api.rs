//! kubectl against the local cluster: what it shows, and that what it changes takes effect.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, ensure};
use hachi_cluster::{
    Cluster, Family, PHASE_ANNOTATION, Protocol, Target,
    bed::{self, Bed, LIMIT, Spec},
    both_families, eventually,
};
use ipnet::IpNet;

fn get(cluster: &Cluster, arguments: &str) -> Result<String> {
    cluster.kubectl(&arguments.split_whitespace().collect::<Vec<_>>())
}

fn nodes_are_ready_and_have_blocks(bed: &Bed) -> Result<()> {
    let nodes = get(bed.cluster, "get nodes --no-headers")?;
    ensure!(nodes.lines().count() == 2, "{nodes}");
    ensure!(
        nodes.lines().all(|line| line.contains(" Ready ")),
        "{nodes}"
    );
    let cidrs = get(
        bed.cluster,
        "get nodes -o jsonpath={.items[*].spec.podCIDRs[*]}",
    )?;
    let cidrs: BTreeSet<_> = cidrs.split(' ').collect();
    ensure!(cidrs.len() == 2, "two nodes, two blocks: {cidrs:?}");
    Ok(())
}

fn pods_are_spread_and_get_addresses_of_their_node(bed: &Bed) -> Result<()> {
    let names = ["one", "two", "three", "four"];
    bed.pods(&names.map(|name| Spec {
        name,
        ..Spec::default()
    }))?;
    let mut nodes = BTreeSet::new();
    for name in names {
        let field = |path: &str| bed.kubectl(&format!("get pod {name} -n $a -o jsonpath={path}"));
        let node = field("{.spec.nodeName}")?;
        let ip: std::net::IpAddr = field("{.status.podIP}")?.parse().context("the podIP")?;
        let cidr = get(
            bed.cluster,
            &format!("get node {node} -o jsonpath={{.spec.podCIDR}}"),
        )?;
        let cidr: IpNet = cidr.parse().context("the podCIDR")?;
        ensure!(
            cidr.contains(&ip),
            "{name} on {node} has {ip}, which is not in {cidr}"
        );
        let host = field("{.status.hostIP}")?;
        let own = bed
            .cluster
            .nodes()
            .iter()
            .find(|other| other.name == node)
            .context("node")?;
        ensure!(
            own.addresses.iter().any(|ip| ip.to_string() == host),
            "hostIP {host}"
        );
        nodes.insert(node);
    }
    ensure!(nodes.len() == 2, "all Pods are on {nodes:?}");
    Ok(())
}

fn many_pods_start_and_end_at_once(bed: &Bed) -> Result<()> {
    let names: Vec<_> = (0..24).map(|number| format!("pod-{number}")).collect();
    let specs: Vec<_> = names
        .iter()
        .map(|name| Spec {
            name,
            ..Spec::default()
        })
        .collect();
    bed.pods(&specs)?;
    let mut addresses = BTreeSet::new();
    for name in &names {
        let ip = bed.cluster.pod_ip(&bed.full(&format!("a/{name}")))?;
        ensure!(addresses.insert(ip), "{ip} was given twice");
    }
    for name in ["a/pod-1", "a/pod-23"] {
        bed.reaches("a/pod-0", bed.target(Protocol::Tcp, name, 80)?)?;
    }
    bed.kubectl("delete pod --all -n $a")?;
    eventually(LIMIT, || {
        for node in bed.cluster.nodes() {
            let target = format!("node/{}", node.name);
            let left = bed
                .cluster
                .exec(&target, "find", &["/run/netns", "-name", "hachi-*"])?;
            let running =
                bed.cluster
                    .exec(&target, "find", &["/var/lib/cni/hachi", "-type", "f"])?;
            let taken = addresses.iter().filter(|ip| {
                running
                    .lines()
                    .any(|path| path.ends_with(&format!("/{ip}")))
            });
            let taken: Vec<_> = taken.collect();
            ensure!(
                taken.is_empty(),
                "{target} keeps {taken:?}; namespaces: {left}"
            );
        }
        Ok(())
    })
}

fn a_deleted_pod_is_gone_and_so_is_its_address(bed: &Bed) -> Result<()> {
    bed.pods(&[
        Spec {
            name: "stays",
            node: "node1",
            ..Spec::default()
        },
        Spec {
            name: "goes",
            node: "node2",
            ..Spec::default()
        },
    ])?;
    let to = bed.target(Protocol::Tcp, "a/goes", 80)?;
    bed.reaches("a/stays", to)?;
    let netns = bed
        .cluster
        .pod(&bed.full("a/goes"))?
        .netns
        .name()
        .to_owned();
    let link = std::path::Path::new(hachi_cluster::netns::NETNS_DIR).join(netns);
    ensure!(link.is_symlink(), "{} is to be there", link.display());
    bed.kubectl("delete pod goes -n $a")?;
    bed.loses("a/stays", to)?;
    eventually(LIMIT, || {
        ensure!(!link.is_symlink(), "{} is still there", link.display());
        let attachments = bed.cluster.exec(
            "node/node2",
            "find",
            &["/var/lib/cni/hachi", "-name", &to.address.ip().to_string()],
        )?;
        ensure!(
            attachments.is_empty(),
            "the address is still taken: {attachments}"
        );
        Ok(())
    })
}

fn a_finished_pod_answers_no_more(bed: &Bed) -> Result<()> {
    bed.pods(&[
        Spec {
            name: "client",
            node: "node1",
            ..Spec::default()
        },
        Spec {
            name: "job",
            node: "node1",
            ..Spec::default()
        },
    ])?;
    let to = bed.target(Protocol::Udp, "a/job", 80)?;
    bed.reaches("a/client", to)?;
    bed.kubectl(&format!(
        "annotate pod job -n $a {PHASE_ANNOTATION}=Succeeded"
    ))?;
    bed.loses("a/client", to)?;
    eventually(LIMIT, || {
        let phase = bed.kubectl("get pod job -n $a -o jsonpath={.status.phase}")?;
        ensure!(phase == "Succeeded", "the phase is {phase}");
        Ok(())
    })?;
    bed.kubectl("delete pod job -n $a").map(drop)
}

fn a_pod_of_the_hosts_network_has_the_nodes_addresses(bed: &Bed) -> Result<()> {
    bed.apply(
        "---
apiVersion: v1
kind: Pod
metadata: {name: host, namespace: $a}
spec:
  nodeName: node1
  hostNetwork: true
  containers: [{name: main, image: server, ports: [{containerPort: 8088}]}]
",
    )?;
    bed.pods(&[Spec {
        name: "client",
        node: "node2",
        ..Spec::default()
    }])?;
    let node = bed.cluster.nodes().first().context("no node")?;
    ensure!(bed.cluster.pod(&bed.full("a/host"))?.addresses == node.addresses);
    bed.reaches("a/client", bed.target(Protocol::Tcp, "a/host", 8088)?)
}

fn programs_run_inside(bed: &Bed) -> Result<()> {
    bed.pods(&[
        Spec {
            name: "client",
            ..Spec::default()
        },
        Spec {
            name: "web",
            ..Spec::default()
        },
    ])?;
    let address = bed.target(Protocol::Http, "a/web", 80)?.address.to_string();
    // It fails where no answer comes in its one second, which a busy machine may take.
    let answer = eventually(LIMIT, || {
        let arguments = ["probe", "http", &address];
        bed.cluster
            .exec(&bed.full("a/client"), "hachi-pod", &arguments)
    })?;
    ensure!(answer.trim() == bed.full("a/web"), "{answer}");
    let own = bed
        .cluster
        .exec(&bed.full("a/web"), "ip", &["-o", "address", "show", "eth0"])?;
    let ip = bed.cluster.pod_ip(&bed.full("a/web"))?.to_string();
    ensure!(own.contains(&ip), "{ip} is not among {own}");
    let links = bed.cluster.exec("node/node1", "ls", &["/sys/class/net"])?;
    ensure!(links.contains("eth0") && links.contains("lo"), "{links}");
    Ok(())
}

both_families!(
    nodes_are_ready_and_have_blocks,
    pods_are_spread_and_get_addresses_of_their_node,
    many_pods_start_and_end_at_once,
    a_deleted_pod_is_gone_and_so_is_its_address,
    a_finished_pod_answers_no_more,
    a_pod_of_the_hosts_network_has_the_nodes_addresses,
    programs_run_inside,
);

#[test]
fn with_both_families_pods_and_services_have_two_addresses() {
    hachi_testutil::require_root!();
    hachi_testutil::require_binaries!("hachi-cni", "hachi-agent");
    bed::run("dual", Family::Dual, |bed| {
        bed.apply(
            "---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: $a}
spec: {ipFamilyPolicy: RequireDualStack, selector: {app: web}, ports: [{port: 80}]}
",
        )?;
        bed.pods(&[
            Spec {
                name: "web",
                labels: "app: web",
                node: "node2",
                ..Spec::default()
            },
            Spec {
                name: "client",
                node: "node1",
                ..Spec::default()
            },
        ])?;
        let pod = bed.cluster.pod(&bed.full("a/web"))?;
        ensure!(pod.addresses.len() == 2, "{:?}", pod.addresses);
        let ips = bed.kubectl("get service web -n $a -o jsonpath={.spec.clusterIPs[*]}")?;
        let ips = ips
            .split(' ')
            .map(str::parse)
            .collect::<Result<Vec<_>, _>>()?;
        ensure!(ips.len() == 2, "{ips:?}");
        for ip in pod.addresses {
            bed.reaches("a/client", Target::new(Protocol::Tcp, ip, 80))?;
            bed.reaches("a/client", Target::new(Protocol::Udp, ip, 80))?;
        }
        for ip in ips {
            bed.reaches("a/client", Target::new(Protocol::Tcp, ip, 80))?;
            // The Service has no such port.
            bed.loses("a/client", Target::new(Protocol::Udp, ip, 80))?;
        }
        Ok(())
    });
}
