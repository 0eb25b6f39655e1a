//! Attachments on real interfaces, by tcx and by clsact: they guard at once, outlive the agent,
//! get a new program without a gap, and go without a trace.

mod netkit;
#[path = "../support/mod.rs"]
mod support;
mod xdp;

use std::{net::UdpSocket, path::PathBuf, process::Command};

use aya::programs::{
    ProgramError, SchedClassifier, TcAttachType,
    links::{FdLink, PinnedLink},
};
use hachi_abi::ABI_VERSION;
use hachi_kernel::{AttachKind, AttachMode, Datapath, KernelError, LoadOptions, Role};
use support::{World, ip, isolated, require_datapath};

fn load(world: &World, attach: AttachMode) -> Datapath {
    Datapath::load(&LoadOptions {
        attach,
        ..world.options()
    })
    .expect("the datapath loads")
}

fn link_pin(world: &World, version: u32, name: &str) -> PathBuf {
    world.pin_root.join(format!("v{version}/links/{name}"))
}

fn pinned(world: &World, name: &str) -> FdLink {
    let pin = PinnedLink::from_pin(link_pin(world, ABI_VERSION, name)).expect("a pinned link");
    FdLink::from(pin)
}

/// The ids of a pinned link and of its program.
fn link(world: &World, name: &str) -> (u32, u32) {
    let info = pinned(world, name).info().expect("a link");
    (info.id(), info.program_id())
}

/// Whether this kernel has tcx (6.6). That those do which should is checked by the table in
/// docs/KERNELS.md, so a kernel without it only has less to test.
fn has_tcx() -> bool {
    query("lo", TcAttachType::Ingress).is_ok()
}

/// The number of tcx programs on both hooks.
fn tcx_programs(ifname: &str) -> usize {
    if !has_tcx() {
        return 0;
    }
    [TcAttachType::Ingress, TcAttachType::Egress]
        .into_iter()
        .map(|hook| query(ifname, hook).expect("a query"))
        .sum()
}

fn query(ifname: &str, hook: TcAttachType) -> Result<usize, ProgramError> {
    SchedClassifier::query_tcx(ifname, hook).map(|(_, programs)| programs.len())
}

/// The number of our filters on both hooks.
fn filters(ifname: &str) -> usize {
    ["ingress", "egress"]
        .iter()
        .map(|hook| tc(&["filter", "show", "dev", ifname, hook]))
        .sum()
}

fn tc(arguments: &[&str]) -> usize {
    let output = Command::new("tc")
        .args(arguments)
        .output()
        .expect("iproute2 is installed");
    String::from_utf8_lossy(&output.stdout)
        .matches("hachi_")
        .count()
}

fn has_clsact(ifname: &str) -> bool {
    let output = Command::new("tc")
        .args(["qdisc", "show", "dev", ifname])
        .output()
        .expect("iproute2 is installed");
    String::from_utf8_lossy(&output.stdout).contains("clsact")
}

fn packets(datapath: &Datapath) -> u64 {
    datapath
        .counters()
        .expect("counters")
        .iter()
        .map(|(_, counter)| counter.packets)
        .sum()
}

/// Has the far end of a veth pair send something (an ARP request), which passes `from_pod`.
fn send_from_peer(ifname: &str) {
    let peer = format!("{ifname}p");
    ip(&["link", "set", ifname, "up"]);
    ip(&["link", "set", &peer, "up"]);
    ip(&["addr", "replace", "192.0.2.1/24", "dev", &peer]);
    let socket = UdpSocket::bind("192.0.2.1:0").expect("a socket");
    socket.send_to(b"hello", "192.0.2.2:9").expect("sent");
}

fn both_modes(test: impl Fn(&World, AttachMode, AttachKind) + Sync) {
    for (mode, kind) in [
        (AttachMode::Tcx, AttachKind::Tcx),
        (AttachMode::Clsact, AttachKind::Clsact),
    ] {
        isolated(|world| {
            if kind == AttachKind::Clsact || has_tcx() {
                test(world, mode, kind);
            }
        });
    }
}

#[test]
fn an_attached_program_sees_the_packets() {
    require_datapath!();
    both_modes(|world, mode, kind| {
        let mut datapath = load(world, mode);
        let ifindex = world.veth("pod");
        let absent = datapath
            .check(Role::Pod, ifindex, "pod")
            .expect_err("not attached yet");
        assert!(
            matches!(absent, KernelError::NotAttached { .. }),
            "{absent}"
        );

        for _ in 0..2 {
            assert_eq!(
                datapath
                    .attach(Role::Pod, ifindex, "pod")
                    .expect("attached"),
                kind
            );
            datapath.check(Role::Pod, ifindex, "pod").expect("attached");
            assert_eq!(
                datapath.attached(Role::Pod).expect("a list"),
                ["pod".to_owned()].into()
            );
        }
        let expected = if kind == AttachKind::Tcx {
            (2, 0)
        } else {
            (0, 2)
        };
        assert_eq!((tcx_programs("pod"), filters("pod")), expected);
        let before = packets(&datapath);
        send_from_peer("pod");
        assert!(
            packets(&datapath) > before,
            "{mode:?}: no packet was counted"
        );
    });
}

#[test]
fn a_detached_interface_is_as_it_was() {
    require_datapath!();
    both_modes(|world, mode, kind| {
        let mut datapath = load(world, mode);
        let ifindex = world.veth("pod");
        datapath
            .attach(Role::Pod, ifindex, "pod")
            .expect("attached");
        // Whoever else holds a link, such as a tool that looks at it, or the kernel until it gets to
        // what is gone, does not keep it where it was.
        let held = (kind == AttachKind::Tcx).then(|| pinned(world, "pod-ingress"));
        for _ in 0..2 {
            datapath.detach(Role::Pod, "pod").expect("detached");
            assert_eq!((tcx_programs("pod"), filters("pod")), (0, 0));
            assert!(!has_clsact("pod"));
            assert!(datapath.attached(Role::Pod).expect("a list").is_empty());
        }
        datapath
            .check(Role::Pod, ifindex, "pod")
            .expect_err("no longer attached");
        datapath
            .detach(Role::Pod, "never-was")
            .expect("nothing to detach");
        drop(held);
    });
}

#[test]
fn filters_of_others_stay() {
    require_datapath!();
    isolated(|world| {
        let mut datapath = load(world, AttachMode::Clsact);
        let ifindex = world.veth("pod");
        // Any program will do as another's: one of ours, under another priority and name.
        let aux = world.veth("aux");
        datapath.attach(Role::Pod, aux, "aux").expect("attached");
        let pin = link_pin(world, ABI_VERSION, "aux-ingress");
        let add = [
            "filter", "add", "dev", "pod", "ingress", "prio", "7", "bpf", "da",
        ];
        let status = [&["qdisc", "add", "dev", "pod", "clsact"][..], &add[..]].map(|arguments| {
            let mut tc = Command::new("tc");
            tc.args(arguments);
            if arguments.len() == add.len() {
                tc.arg("object-pinned").arg(&pin);
            }
            tc.status().expect("iproute2 is installed").success()
        });
        assert_eq!(status, [true, true]);
        datapath
            .attach(Role::Pod, ifindex, "pod")
            .expect("attached");
        datapath.check(Role::Pod, ifindex, "pod").expect("attached");
        datapath.detach(Role::Pod, "pod").expect("detached");
        assert!(has_clsact("pod"), "the qdisc is still in use");
        let output = Command::new("tc")
            .args(["filter", "show", "dev", "pod", "ingress"])
            .output();
        let shown = output.expect("iproute2 is installed").stdout;
        assert!(
            String::from_utf8_lossy(&shown).contains("pref 7"),
            "another's filter"
        );
    });
}

#[test]
fn a_new_agent_changes_the_program_of_the_same_attachment() {
    require_datapath!();
    both_modes(|world, mode, kind| {
        let mut first = load(world, mode);
        let ifindex = world.veth("pod");
        first.attach(Role::Pod, ifindex, "pod").expect("attached");
        let before = (kind == AttachKind::Tcx).then(|| link(world, "pod-ingress"));
        drop(first);
        assert_eq!(
            tcx_programs("pod") + filters("pod"),
            2,
            "attached with no agent"
        );

        let mut second = load(world, mode);
        assert_eq!(
            second.attached(Role::Pod).expect("a list"),
            ["pod".to_owned()].into()
        );
        second
            .check(Role::Pod, ifindex, "pod")
            .expect_err("still the first agent's program");
        second.attach(Role::Pod, ifindex, "pod").expect("attached");
        second
            .check(Role::Pod, ifindex, "pod")
            .expect("the second agent's program");
        assert_eq!(tcx_programs("pod") + filters("pod"), 2, "not doubled");
        if let Some((id, program)) = before {
            let (new_id, new_program) = link(world, "pod-ingress");
            assert_eq!(id, new_id, "the same link");
            assert_ne!(program, new_program, "another program");
        }
        let counted = packets(&second);
        send_from_peer("pod");
        assert!(packets(&second) > counted);
    });
}

#[test]
fn an_interface_made_anew_under_an_old_name_is_attached_to() {
    require_datapath!();
    both_modes(|world, mode, _| {
        let mut datapath = load(world, mode);
        let old = world.veth("pod");
        datapath.attach(Role::Pod, old, "pod").expect("attached");
        ip(&["link", "del", "pod"]);
        let new = world.veth("pod");
        assert_ne!(old, new);
        datapath
            .check(Role::Pod, new, "pod")
            .expect_err("a bare interface");
        datapath.attach(Role::Pod, new, "pod").expect("attached");
        datapath.check(Role::Pod, new, "pod").expect("attached");
        ip(&["link", "del", "pod"]);
        datapath.detach(Role::Pod, "pod").expect("gone is success");
        assert!(datapath.attached(Role::Pod).expect("a list").is_empty());
    });
}

#[test]
fn an_interface_that_does_not_exist_is_named() {
    require_datapath!();
    for mode in [AttachMode::Auto, AttachMode::Tcx, AttachMode::Clsact] {
        isolated(|world| {
            if mode == AttachMode::Tcx && !has_tcx() {
                return;
            }
            let mut datapath = load(world, mode);
            let error = datapath
                .attach(Role::Pod, 4711, "ghost")
                .expect_err("no such interface");
            let text = error.to_string();
            assert!(
                matches!(error, KernelError::NoInterface { .. }),
                "{mode:?}: {text}"
            );
            assert!(text.contains("ghost"), "{text}");
            assert!(datapath.attached(Role::Pod).expect("a list").is_empty());
        });
    }
}

#[test]
fn a_change_of_mode_leaves_one_attachment() {
    require_datapath!();
    isolated(|world| {
        let ifindex = world.veth("pod");
        for (mode, expected) in [
            (AttachMode::Clsact, (0, 2)),
            (AttachMode::Auto, (0, 2)),
            (AttachMode::Clsact, (0, 2)),
            (AttachMode::Tcx, (2, 0)),
        ] {
            let expected = match mode {
                AttachMode::Tcx if !has_tcx() => continue,
                _ => expected,
            };
            let mut datapath = load(world, mode);
            datapath
                .attach(Role::Pod, ifindex, "pod")
                .expect("attached");
            datapath.check(Role::Pod, ifindex, "pod").expect("attached");
            assert_eq!((tcx_programs("pod"), filters("pod")), expected, "{mode:?}");
            assert_eq!(has_clsact("pod"), expected.1 > 0, "{mode:?}");
        }
    });
}

#[test]
fn a_new_interface_is_attached_to_quickly_and_settled_later() {
    require_datapath!();
    isolated(|world| {
        let ifindex = world.veth("pod");
        let mut datapath = load(world, AttachMode::Auto);
        let kind = datapath
            .attach(Role::Pod, ifindex, "pod")
            .expect("attached");
        assert_eq!(kind, AttachKind::Clsact);
        assert_eq!((tcx_programs("pod"), filters("pod")), (0, 2));
        let settled = if has_tcx() { (2, 0) } else { (0, 2) };
        for _ in 0..2 {
            let by_tcx = datapath.settle(ifindex, "pod").expect("settled");
            assert_eq!(by_tcx, has_tcx());
            let flags = datapath.snapshot().expect("the maps").flags;
            assert_eq!(flags & hachi_abi::ConfigFlags::ONCE, 0);
            assert_eq!((tcx_programs("pod"), filters("pod")), settled);
            assert_eq!(has_clsact("pod"), !has_tcx());
            datapath.check(Role::Pod, ifindex, "pod").expect("attached");
        }
        // An agent that starts again keeps what is there.
        let mut second = load(world, AttachMode::Auto);
        second.attach(Role::Pod, ifindex, "pod").expect("attached");
        assert_eq!((tcx_programs("pod"), filters("pod")), settled);
        second
            .check(Role::Pod, ifindex, "pod")
            .expect("its own programs");
        // The other modes have nothing to settle.
        for mode in [AttachMode::Tcx, AttachMode::Clsact] {
            if mode == AttachMode::Clsact || has_tcx() {
                let mut datapath = load(world, mode);
                datapath
                    .attach(Role::Pod, ifindex, "pod")
                    .expect("attached");
                assert!(!datapath.settle(ifindex, "pod").expect("nothing to do"));
            }
        }
    });
}

#[test]
fn an_interface_that_goes_is_let_go_without_waiting() {
    require_datapath!();
    both_modes(|world, mode, _| {
        let mut datapath = load(world, mode);
        let ifindex = world.veth("pod");
        datapath
            .attach(Role::Pod, ifindex, "pod")
            .expect("attached");
        datapath.let_go(ifindex, "pod").expect("let go");
        assert!(
            datapath.attached(Role::Pod).expect("a list").is_empty(),
            "no pin"
        );
        datapath.let_go(ifindex, "pod").expect("twice is success");
        ip(&["link", "del", "pod"]);
        // One that stays is detached from all the same.
        let ifindex = world.veth("stays");
        datapath
            .attach(Role::Pod, ifindex, "stays")
            .expect("attached");
        datapath.let_go(ifindex, "stays").expect("let go");
        let until = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while (tcx_programs("stays"), filters("stays")) != (0, 0) {
            assert!(std::time::Instant::now() < until, "still attached");
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    });
}

#[test]
fn the_links_of_another_abi_version_are_taken_over() {
    require_datapath!();
    isolated(|world| {
        let ifindex = world.veth("pod");
        let mut old = world.load();
        old.attach(Role::Pod, ifindex, "pod").expect("attached");
        old.settle(ifindex, "pod").expect("settled");
        drop(old);
        let before = has_tcx().then(|| link(world, "pod-egress"));
        let version = |number: u32| world.pin_root.join(format!("v{number}"));
        std::fs::rename(version(ABI_VERSION), version(ABI_VERSION + 7)).expect("renamed");

        let mut new = world.load();
        assert!(new.attached(Role::Pod).expect("a list").is_empty());
        new.attach(Role::Pod, ifindex, "pod").expect("attached");
        if let Some((id, program)) = before {
            let (new_id, new_program) = link(world, "pod-egress");
            assert_eq!(id, new_id, "the same link, so no packet was unguarded");
            assert_ne!(program, new_program);
        }
        assert_eq!(tcx_programs("pod") + filters("pod"), 2);
        assert!(!link_pin(world, ABI_VERSION + 7, "pod-egress").exists());

        new.remove_other_versions().expect("removed");
        assert!(!version(ABI_VERSION + 7).exists());
        new.check(Role::Pod, ifindex, "pod")
            .expect("still attached");
        assert_eq!(
            new.attached(Role::Pod).expect("a list"),
            ["pod".to_owned()].into()
        );
    });
}
