//! Hostile Pods: one on the victim's node and one on another send everything that a policy might
//! be got past with, straight onto their interfaces, while a sniffer below the victim's stack notes
//! what comes. A host outside forges the node's own address.
//!
//! ```text
//!  near ──┐                             each frame has a mark: which run, which case
//!         ├─> node1 ──> victim  <── sniffer
//!  far ───┘      ^
//!     node2 ─────┴──── outside
//! ```

mod cases;
mod forge;
mod headers;
mod neighbours;
mod senders;
mod transports;

use std::{collections::BTreeMap, fs, net::IpAddr, thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use hachi_cluster::{
    Protocol::{Tcp, Udp},
    Target,
    bed::{Bed, LIMIT, Spec},
    both_families, eventually,
    workload::wire::{Sniffer, Wire},
};

use crate::{
    cases::{Case, Cases, Open, Scene, marked},
    forge::{Mac, SYN, TCP, UDP, ethernet, icmp, icmp_of, ip, kind_of, tcp, udp, udp_from},
};

const SENDERS: [&str; 2] = ["b/near", "b/far"];

/// How long frames may take from the last one sent to the sniffer.
const SETTLE: Duration = Duration::from_millis(150);

const SERVICE: &str = "---
apiVersion: v1
kind: Service
metadata: {name: victim, namespace: $a}
spec:
  selector: {role: victim}
  ports:
  - {name: t80, port: 80}
  - {name: t81, port: 81}
  - {name: u80, port: 80, protocol: UDP}
  - {name: u81, port: 81, protocol: UDP}
";

fn policy(namespace: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n\
         metadata: {{name: guard, namespace: ${namespace}}}\nspec: {spec}\n"
    )
}

fn start(bed: &Bed) -> Result<()> {
    bed.apply(SERVICE)?;
    let pod = |namespace, name, node, labels| Spec {
        namespace,
        name,
        node,
        labels,
        ports: "{containerPort: 80}, {containerPort: 81}",
    };
    bed.pods(&[
        pod("a", "victim", "node1", "role: victim"),
        pod("a", "friend", "node1", ""),
        pod("b", "near", "node1", ""),
        pod("b", "far", "node2", ""),
    ])?;
    let service = Target::new(Tcp, bed.service("a", "victim")?, 80);
    for from in SENDERS {
        bed.reaches(from, service)?;
    }
    Ok(())
}

/// What is behind a word in the output of `ip`, as a MAC address.
fn mac_after(bed: &Bed, place: &str, arguments: &[&str], word: &str) -> Result<Mac> {
    let text = bed.cluster.exec(place, "ip", arguments)?;
    let mut words = text.split_whitespace().skip_while(|found| *found != word);
    let mac = words
        .nth(1)
        .with_context(|| format!("no {word} in {text:?}"))?;
    let bytes = mac.split(':').map(|byte| u8::from_str_radix(byte, 16));
    let bytes = bytes
        .collect::<Result<Vec<_>, _>>()
        .context(mac.to_owned())?;
    bytes.try_into().ok().context("a MAC address has six bytes")
}

fn mac_of(bed: &Bed, place: &str) -> Result<Mac> {
    mac_after(bed, place, &["-o", "link", "show", "eth0"], "link/ether")
}

fn outside(bed: &Bed, v4: bool) -> Result<IpAddr> {
    let family = bed.cluster.options().family;
    let mut found = family.fabric().into_iter();
    found.find(|ip| ip.is_ipv4() == v4).context("no address")
}

fn scene(bed: &Bed, sender: &str, run: u8) -> Result<Scene> {
    let ip = |pod: &str| bed.cluster.pod_ip(&bed.full(pod));
    let own = ip(sender)?;
    let place = bed.full(sender);
    Ok(Scene {
        run,
        mac: mac_of(bed, &place)?,
        own,
        gateway: mac_after(bed, &place, &["neigh", "show", "dev", "eth0"], "lladdr")?,
        victim_mac: mac_of(bed, &bed.full("a/victim"))?,
        victim: ip("a/victim")?,
        friend: ip("a/friend")?,
        nodes: vec![bed.cluster.node_ip("node1")?, bed.cluster.node_ip("node2")?],
        outside: outside(bed, own.is_ipv4())?,
        service: bed.service("a", "victim")?,
    })
}

/// Sends frames from an interface; those that its kernel refuses are nobody's danger.
fn send<'f>(
    bed: &Bed,
    place: &str,
    ifname: &str,
    frames: impl IntoIterator<Item = &'f Vec<u8>>,
) -> Result<()> {
    let netns = bed.cluster.netns(place)?;
    let wire = netns.get().enter(|| Wire::open(ifname))??;
    let (mut sent, mut refused) = (0, 0);
    for frame in frames {
        match wire.send(frame) {
            Ok(()) => sent += 1,
            Err(_) => refused += 1,
        }
    }
    ensure!(
        sent > 50 * refused,
        "{refused} of {sent} frames could not be sent"
    );
    Ok(())
}

/// How often each case of a run came to the victim.
type Seen = BTreeMap<(u8, usize), usize>;

fn listen(bed: &Bed, place: &str, ifname: &str) -> Result<Sniffer> {
    let netns = bed.cluster.netns(place)?;
    Sniffer::start(netns.get(), ifname, |frame| marked(frame).is_some())
}

/// Ends a sniffer at the victim, once a frame of its own node, which always may, has shown that it
/// listened to the end.
fn end(bed: &Bed, sniffer: Sniffer) -> Result<Seen> {
    const CANARY: [u8; 8] = [0xc5, 0xff, 0xff, 0xff, 0x5c, 0xa3, 0, 0];
    thread::sleep(SETTLE);
    let to = bed.target(Udp, "a/victim", 80)?.address;
    let node = bed.cluster.netns("node/node1")?;
    let socket = node.get().enter(|| {
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        std::net::UdpSocket::bind(any)
    })??;
    eventually(LIMIT, || {
        socket.send_to(&CANARY, to)?;
        thread::sleep(Duration::from_millis(5));
        let seen = sniffer.frames();
        let came = seen
            .iter()
            .any(|frame| marked(frame) == Some((0xff, 0xffff)));
        ensure!(came, "the sniffer hears nothing");
        Ok(())
    })?;
    let mut seen = Seen::new();
    for frame in sniffer.stop()? {
        if let Some(mark) = marked(&frame).filter(|mark| mark.0 != 0xff) {
            *seen.entry(mark).or_default() += 1;
        }
    }
    Ok(seen)
}

/// Everything from both senders; `wrong` says what is not as it should be for a case that came so
/// often.
fn barrage(
    bed: &Bed,
    round: u8,
    wrong: impl Fn(&Case, usize) -> Option<&'static str>,
) -> Result<()> {
    let sniffer = listen(bed, &bed.full("a/victim"), "eth0")?;
    let mut all = Vec::new();
    for (number, sender) in (0..).zip(SENDERS) {
        let run = round * 2 + number;
        let cases = Cases::all(&scene(bed, sender, run)?);
        let frames = cases.iter().flat_map(|case| &case.frames);
        send(bed, &bed.full(sender), "eth0", frames)?;
        all.push((run, sender, cases));
    }
    let seen = end(bed, sniffer)?;
    let mut report = Vec::new();
    for (run, sender, cases) in &all {
        ensure!(cases.len() > 300, "{} cases", cases.len());
        for (number, case) in cases.iter().enumerate() {
            let times = seen.get(&(*run, number)).copied().unwrap_or(0);
            if let Some(what) = wrong(case, times) {
                report.push(format!("{sender}, {}: {what} ({times} times)", case.name));
            }
        }
    }
    ensure!(
        report.is_empty(),
        "{} cases:\n{}",
        report.len(),
        report.join("\n")
    );
    Ok(())
}

fn nothing(_: &Case, times: usize) -> Option<&'static str> {
    (times > 0).then_some("got past the policy")
}

fn nothing_forged_gets_past_a_policy(bed: &Bed) -> Result<()> {
    start(bed)?;
    // The worst that an administrator may have set.
    for node in bed.cluster.nodes() {
        for file in ["ipv4/conf/all", "ipv4/conf/eth0", "ipv6/conf/all"] {
            let path = format!("/proc/sys/net/{file}/accept_source_route");
            node.netns
                .enter(|| fs::write(&path, "1"))?
                .context(path.clone())?;
        }
    }
    let victim = bed.target(Tcp, "a/victim", 80)?;
    barrage(bed, 0, |case, times| match case.open {
        Open::Arrives if times < case.frames.len() => Some("did not come"),
        Open::Never if times > 0 => Some("came, and nobody may send it"),
        Open::Arrives | Open::Never | Open::Maybe => None,
    })
    .context("without policies")?;

    bed.apply(&policy(
        "a",
        "{podSelector: {matchLabels: {role: victim}}, policyTypes: [Ingress]}",
    ))?;
    for from in SENDERS {
        bed.loses(from, victim)?;
    }
    barrage(bed, 1, nothing).context("the victim lets nobody in")?;

    bed.apply(&policy(
        "a",
        "{podSelector: {matchLabels: {role: victim}}, policyTypes: [Ingress],
          ingress: [{ports: [{protocol: TCP, port: 80}]}]}",
    ))?;
    for from in SENDERS {
        bed.reaches(from, victim)?;
    }
    barrage(bed, 2, |case, times| match (case.eighty, case.open) {
        (true, Open::Arrives) if times < case.frames.len() => Some("is allowed, and did not come"),
        (false, _) if times > 0 => Some("got past the policy"),
        _ => None,
    })
    .context("the victim lets TCP to 80 in")?;

    // The other side: nobody isolates the victim, and the senders may send nothing. What leaves a
    // node at all is seen on the bridge.
    bed.kubectl("delete networkpolicy guard -n $a")?;
    bed.apply(&policy("b", "{podSelector: {}, policyTypes: [Egress]}"))?;
    for from in SENDERS {
        bed.loses(from, victim)?;
    }
    let bridge = [
        listen(bed, "outside", "node1")?,
        listen(bed, "outside", "node2")?,
    ];
    barrage(bed, 3, nothing).context("the senders may send nothing")?;
    for sniffer in bridge {
        let left: Vec<_> = sniffer.stop()?.iter().filter_map(|f| marked(f)).collect();
        ensure!(left.is_empty(), "left a node: {left:?}");
    }

    // Nobody is the worse for it.
    bed.kubectl("delete networkpolicy guard -n $b")?;
    for from in ["b/near", "b/far", "a/friend", "node/node1"] {
        for to in ["a/victim", "a/friend"] {
            for protocol in [Tcp, Udp] {
                bed.reaches(from, bed.target(protocol, to, 80)?)?;
            }
        }
    }
    Ok(())
}

/// The victim talks to its friend, and to the senders: what is no answer of theirs does not come
/// in with the answers.
fn answers_are_no_way_in(bed: &Bed) -> Result<()> {
    const OWN: u16 = 30_303;
    start(bed)?;
    bed.apply(&policy(
        "a",
        "{podSelector: {matchLabels: {role: victim}}, policyTypes: [Ingress]}",
    ))?;
    for from in SENDERS {
        bed.loses(from, bed.target(Udp, "a/victim", 80)?)?;
    }
    let netns = bed.cluster.netns(&bed.full("a/victim"))?;
    let v4 = bed.target(Udp, "a/victim", 80)?.address.is_ipv4();
    let any = if v4 { "0.0.0.0" } else { "[::]" };
    let socket = netns
        .get()
        .enter(|| std::net::UdpSocket::bind(format!("{any}:{OWN}")))??;
    socket.set_read_timeout(Some(LIMIT))?;
    for to in ["a/friend", "b/near", "b/far"] {
        socket.send_to(b"hello", bed.target(Udp, to, 80)?.address)?;
        socket
            .recv_from(&mut [0; 64])
            .with_context(|| format!("an answer of {to}"))?;
    }
    let sniffer = listen(bed, &bed.full("a/victim"), "eth0")?;
    let mut names = Vec::new();
    for (run, sender) in (0..).zip(SENDERS) {
        let scene = scene(bed, sender, run)?;
        let mut cases = Cases {
            scene: scene.clone(),
            list: Vec::new(),
        };
        let ends = cases.ends();
        let back = |cases: &Cases, from: u16, to: u16| {
            ip(ends, UDP, &udp_from(ends, (from, to), &cases.payload()))
        };
        // The one thing that must come: an answer.
        let packet = back(&cases, 80, OWN);
        cases.packets("an answer", Open::Arrives, vec![packet]);
        for (from, to) in [(81, OWN), (80, OWN + 1), (OWN, OWN), (OWN, 80), (0, OWN)] {
            let packet = back(&cases, from, to);
            cases.packets(format!("udp {from} to {to}"), Open::Never, vec![packet]);
        }
        for (from, to) in [(80, OWN), (OWN, 80)] {
            let segment = forge::tcp_from(ends, (from, to), SYN, &cases.payload());
            cases.body(format!("tcp {from} to {to}"), Open::Never, TCP, &segment);
        }
        let as_friend = (scene.friend, scene.victim);
        let packet = ip(
            as_friend,
            UDP,
            &udp_from(as_friend, (80, OWN), &cases.payload()),
        );
        cases.packets("as the friend", Open::Never, vec![packet]);
        // Errors about what the victim did send, by one whom that does not concern.
        let kinds: [u8; 4] = if v4 { [3, 4, 11, 12] } else { [1, 2, 3, 4] };
        for kind in kinds {
            let about = (scene.victim, scene.friend);
            let inside = ip(about, UDP, &udp_from(about, (OWN, 80), &cases.payload()));
            let error = icmp(ends, kind, 1, [0, 0, 2, 0], &inside);
            cases.body(
                format!("error {kind} about the friend"),
                Open::Never,
                icmp_of(ends),
                &error,
            );
            // By the one whom it does, it is what errors are for.
            let about = (scene.victim, scene.own);
            let inside = ip(about, UDP, &udp_from(about, (OWN, 80), &cases.payload()));
            let error = icmp(ends, kind, 1, [0, 0, 5, 0x14], &inside);
            cases.body(
                format!("error {kind} about itself"),
                Open::Arrives,
                icmp_of(ends),
                &error,
            );
            let about = (scene.victim, scene.own);
            let inside = ip(
                about,
                UDP,
                &udp_from(about, (OWN + 7, 80), &cases.payload()),
            );
            let error = icmp(ends, kind, 1, [0, 0, 5, 0x14], &inside);
            cases.body(
                format!("error {kind} about nothing"),
                Open::Never,
                icmp_of(ends),
                &error,
            );
        }
        send(
            bed,
            &bed.full(sender),
            "eth0",
            cases.list.iter().flat_map(|case| &case.frames),
        )?;
        names.push((run, sender, cases.list));
    }
    let seen = end(bed, sniffer)?;
    for (run, sender, list) in names {
        for (number, case) in list.iter().enumerate() {
            let came = seen.contains_key(&(run, number));
            ensure!(
                came == (case.open == Open::Arrives),
                "{sender}, {}: came: {came}",
                case.name
            );
        }
    }
    Ok(())
}

/// From outside the nodes' addresses can be forged as well: the victim's own node is trusted, and
/// so nobody else may pass for it.
fn the_own_node_cannot_be_forged_from_outside(bed: &Bed) -> Result<()> {
    start(bed)?;
    let victim = bed.cluster.pod_ip(&bed.full("a/victim"))?;
    let near = bed.cluster.pod_ip(&bed.full("b/near"))?;
    let there = outside(bed, victim.is_ipv4())?;
    let node = mac_of(bed, "node/node1")?;
    let from = mac_after(
        bed,
        "node/node1",
        &["neigh", "get", &there.to_string(), "dev", "eth0"],
        "lladdr",
    );
    let from = from.unwrap_or([2, 0, 0, 0, 9, 9]);
    let own = bed.cluster.node_ip("node1")?;
    let sources = [there, own, victim, near];
    let shower = |round: u8| -> Result<Seen> {
        let sniffer = listen(bed, &bed.full("a/victim"), "eth0")?;
        let mut frames = Vec::new();
        for (number, source) in (0..).zip(sources) {
            let ends = (source, victim);
            let mark = [0xc5, round, 0, number, 0x5c, 0xa3, 0xff, !number].repeat(8);
            let kind = if victim.is_ipv4() { 8 } else { 128 };
            for packet in [
                ip(ends, UDP, &udp(ends, 80, &mark)),
                ip(ends, TCP, &tcp(ends, 80, SYN, &mark)),
                ip(ends, icmp_of(ends), &icmp(ends, kind, 0, [9; 4], &mark)),
            ] {
                frames.push(ethernet(node, from, kind_of(victim), &packet));
            }
        }
        send(bed, "outside", "br0", &frames)?;
        end(bed, sniffer)
    };
    let seen = shower(1)?;
    ensure!(
        seen.get(&(1, 0)) == Some(&3),
        "the host outside itself: {seen:?}"
    );
    ensure!(
        seen.len() == 1,
        "forged without policies: {seen:?}, of {sources:?}"
    );
    bed.apply(&policy(
        "a",
        "{podSelector: {matchLabels: {role: victim}}, policyTypes: [Ingress]}",
    ))?;
    for from in SENDERS {
        bed.loses(from, bed.target(Udp, "a/victim", 80)?)?;
    }
    let seen = shower(2)?;
    ensure!(
        seen.is_empty(),
        "got past the policy: {seen:?}, of {sources:?}"
    );
    Ok(())
}

both_families!(
    nothing_forged_gets_past_a_policy,
    answers_are_no_way_in,
    the_own_node_cannot_be_forged_from_outside,
);
