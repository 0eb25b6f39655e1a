//! The XDP program at uplinks: attached, kept, handed over, taken off again.

use std::process::Command;

use hachi_kernel::{KernelError, LoadOptions, XdpMode, remove_all};

use crate::support::{World, isolated, require_datapath};

/// What `ip link` says of an interface's XDP: `xdp` for the driver's, `xdpgeneric`, or nothing.
fn shown(ifname: &str) -> Option<String> {
    let output = Command::new("ip")
        .args(["link", "show", "dev", ifname])
        .output()
        .expect("iproute2 is installed");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let words = text.split_whitespace();
    words
        .map(|word| word.split('/').next().unwrap_or(word))
        .find(|word| ["xdp", "xdpgeneric"].contains(word))
        .map(str::to_owned)
}

fn at_uplink(test: impl FnOnce(&World, u32) + Send) {
    isolated(|world| {
        let index = world.veth("eth0.1");
        test(world, index);
    });
}

#[test]
fn it_is_attached_in_either_mode_and_handed_over() {
    require_datapath!();
    at_uplink(|world, index| {
        let mut datapath = world.load();
        assert!(datapath.attached_xdp().expect("pins").is_empty());
        for (mode, name) in [
            (XdpMode::Generic, "xdpgeneric"),
            (XdpMode::Native, "xdp"),
            (XdpMode::Generic, "xdpgeneric"),
        ] {
            datapath
                .attach_xdp(index, "eth0.1", mode)
                .expect("attached");
            datapath
                .attach_xdp(index, "eth0.1", mode)
                .expect("once more");
            assert_eq!(shown("eth0.1").as_deref(), Some(name));
            assert!(datapath.has_xdp(index, "eth0.1", mode));
            let attached = datapath.attached_xdp().expect("pins");
            assert_eq!(
                attached.into_iter().collect::<Vec<_>>(),
                [("eth0.1".to_owned(), mode)]
            );
        }
        // It stays without an agent, and the next one puts its own program there.
        drop(datapath);
        assert!(shown("eth0.1").is_some());
        let mut next = world.load();
        assert!(!next.has_xdp(index, "eth0.1", XdpMode::Generic));
        next.attach_xdp(index, "eth0.1", XdpMode::Generic)
            .expect("taken over");
        assert!(next.has_xdp(index, "eth0.1", XdpMode::Generic));
        next.detach_xdp("eth0.1").expect("detached");
        next.detach_xdp("eth0.1").expect("nothing is there");
        assert_eq!(shown("eth0.1"), None);
    });
}

/// An interface has one XDP program: another's stays, and ours says so.
#[test]
fn anothers_program_stays() {
    require_datapath!();
    at_uplink(|world, index| {
        let options = LoadOptions {
            pin_root: world.pin_root.join("other"),
            ..world.options()
        };
        let mut other = hachi_kernel::Datapath::load(&options).expect("loads");
        other
            .attach_xdp(index, "eth0.1", XdpMode::Native)
            .expect("attached");
        let mut datapath = world.load();
        let error = datapath
            .attach_xdp(index, "eth0.1", XdpMode::Native)
            .expect_err("the place is taken");
        assert!(
            matches!(&error, KernelError::AttachXdp { source, .. } if source.raw_os_error() == Some(libc::EBUSY)),
            "{error}"
        );
        assert!(other.has_xdp(index, "eth0.1", XdpMode::Native));
        assert!(datapath.attached_xdp().expect("pins").is_empty());
    });
}

/// Nothing is left behind by an uninstall, and an interface that is made anew is attached to anew.
#[test]
fn nothing_is_left_behind() {
    require_datapath!();
    at_uplink(|world, index| {
        let mut datapath = world.load();
        datapath
            .attach_xdp(index, "eth0.1", XdpMode::Native)
            .expect("attached");
        crate::support::ip(&["link", "del", "eth0.1"]);
        let index = world.veth("eth0.1");
        assert!(!datapath.has_xdp(index, "eth0.1", XdpMode::Native));
        datapath
            .attach_xdp(index, "eth0.1", XdpMode::Native)
            .expect("attached anew");
        assert_eq!(shown("eth0.1").as_deref(), Some("xdp"));
        drop(datapath);
        remove_all(&world.pin_root).expect("removed");
        assert_eq!(shown("eth0.1"), None);
    });
}
