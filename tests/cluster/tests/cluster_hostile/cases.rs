//! What a hostile Pod sends at a victim, and what may come of it where no policy forbids.

use std::net::IpAddr;

use crate::forge::{Ends, Mac, ethernet, ip, kind_of};

/// Whether a frame comes to the victim while no policy is in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Open {
    /// It does.
    Arrives,
    /// It never does: nobody may send such a thing.
    Never,
    /// Nothing depends on it.
    Maybe,
}
#[derive(Debug)]
pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) open: Open,
    /// Whether a policy that allows TCP to port 80 allows it.
    pub(crate) eighty: bool,
    pub(crate) frames: Vec<Vec<u8>>,
}

/// Who is where.
#[derive(Clone, Debug)]
pub(crate) struct Scene {
    /// A number of this run, in every frame of it.
    pub(crate) run: u8,
    /// The sender.
    pub(crate) mac: Mac,
    pub(crate) own: IpAddr,
    /// The host side of its interface.
    pub(crate) gateway: Mac,
    pub(crate) victim_mac: Mac,
    pub(crate) victim: IpAddr,
    /// A Pod that the victim talks to.
    pub(crate) friend: IpAddr,
    pub(crate) nodes: Vec<IpAddr>,
    /// A host outside.
    pub(crate) outside: IpAddr,
    /// A Service with the victim behind it: 80 goes to 80, 81 to 81.
    pub(crate) service: IpAddr,
}

/// The mark of a case, wherever in a frame: eight bytes, repeated, so that every fragment has it.
fn mark(run: u8, case: usize) -> [u8; 8] {
    let [high, low] = u16::try_from(case).unwrap_or(u16::MAX).to_be_bytes();
    [0xc5, run, high, low, 0x5c, 0xa3, !high, !low]
}

/// Which run and case a frame is of.
pub(crate) fn marked(frame: &[u8]) -> Option<(u8, usize)> {
    let found = frame
        .windows(8)
        .find(|w| w[0] == 0xc5 && w[4..6] == [0x5c, 0xa3] && w[6] == !w[2] && w[7] == !w[3])?;
    Some((
        found[1],
        usize::from(u16::from_be_bytes([found[2], found[3]])),
    ))
}

/// The cases, as they are collected.
#[derive(Debug)]
pub(crate) struct Cases {
    pub(crate) scene: Scene,
    pub(crate) list: Vec<Case>,
}

impl Cases {
    /// All that is sent from one place.
    pub(crate) fn all(scene: &Scene) -> Vec<Case> {
        let mut cases = Self {
            scene: scene.clone(),
            list: Vec::new(),
        };
        cases.plain();
        cases.spoofed();
        cases.links();
        cases.cut_short();
        cases.fragments();
        cases.errors();
        cases.groups();
        cases.tunnels();
        if scene.own.is_ipv4() {
            cases.headers_v4();
        } else {
            cases.headers_v6();
        }
        cases.neighbours();
        cases.list
    }

    pub(crate) fn ends(&self) -> Ends {
        (self.scene.own, self.scene.victim)
    }

    /// The payload of the case that is added next.
    pub(crate) fn payload(&self) -> Vec<u8> {
        mark(self.scene.run, self.list.len()).repeat(8)
    }

    /// Frames as they are.
    pub(crate) fn frames(&mut self, name: impl Into<String>, open: Open, frames: Vec<Vec<u8>>) {
        self.list.push(Case {
            name: name.into(),
            open,
            eighty: false,
            frames,
        });
    }

    /// Packets in proper frames.
    pub(crate) fn packets(&mut self, name: impl Into<String>, open: Open, packets: Vec<Vec<u8>>) {
        let Scene {
            mac, gateway, own, ..
        } = self.scene;
        let frames = packets.iter();
        let frames = frames.map(|packet| ethernet(gateway, mac, kind_of(own), packet));
        let frames = frames.collect();
        self.frames(name, open, frames);
    }

    /// One packet to the victim in a proper frame.
    pub(crate) fn body(&mut self, name: impl Into<String>, open: Open, proto: u8, body: &[u8]) {
        let packet = ip(self.ends(), proto, body);
        self.packets(name, open, vec![packet]);
    }

    /// The case that was added last is TCP to port 80, however dressed.
    pub(crate) fn is_eighty(&mut self) {
        if let Some(case) = self.list.last_mut() {
            case.eighty = true;
        }
    }
}
