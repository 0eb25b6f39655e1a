//! Packets that the lab's Pods and networks send, and what has to become of them.

use hachi_abi::{ConfigFlags, Reason, Tunnel};
use hachi_datapath::{Express, Frame as Link, Outcome, Refusal};

use super::{Lab, NODE, Net, OVERLAY, ROUTE, TCP, UPLINK, host_mac, mac, poison};
use crate::wire::{self, Frame, View};

impl<const N: usize, F: Net<N>> Lab<N, F> {
    /// A frame of a Pod.
    pub(crate) fn frame(&self, pod: u8, ip: &[u8]) -> Frame {
        Frame::new(mac(pod), u32::from(pod) + 10, F::ETHERTYPE, ip)
    }

    /// A packet of a Pod.
    pub(crate) fn from(&self, pod: u8, to: u8, proto: u8, body: &[u8]) -> Frame {
        self.frame(pod, &wire::ip(F::addr(pod), F::addr(to), proto, body))
    }

    /// A packet that the host's stack sends to a Pod.
    pub(crate) fn to(&self, from: u8, pod: u8, proto: u8, body: &[u8]) -> Frame {
        let ip = wire::ip(F::addr(from), F::addr(pod), proto, body);
        Frame::new(host_mac(pod), u32::from(pod) + 10, F::ETHERTYPE, &ip)
    }

    /// A TCP segment of a Pod.
    pub(crate) fn tcp(&self, pod: u8, to: u8, ports: (u16, u16), flags: u8) -> Frame {
        self.from(pod, to, TCP, &wire::tcp(ports, flags, b"data"))
    }

    /// Runs the program of what Pods send.
    pub(crate) fn send(&mut self, frame: &Frame) -> (Outcome, Frame) {
        let mut frame = frame.clone();
        let mut source = [0xa5; 6];
        let outcome = match hachi_datapath::frame(&frame, &mut source) {
            Link::Decided(outcome) => outcome,
            Link::V4 | Link::V6 => hachi_datapath::from_pod::<N, F, _, _>(
                &mut frame,
                &self.tables,
                &mut self.scratch,
                &source,
            ),
        };
        self.after(outcome, frame)
    }

    /// Runs the program of what Pods receive from the stack.
    pub(crate) fn receive(&mut self, frame: &Frame) -> (Outcome, Frame) {
        let mut frame = frame.clone();
        let mut source = [0xa5; 6];
        let outcome = match hachi_datapath::frame(&frame, &mut source) {
            Link::Decided(outcome) => outcome,
            Link::V4 | Link::V6 => {
                hachi_datapath::to_pod::<N, F, _, _>(&mut frame, &self.tables, &mut self.scratch)
            }
        };
        self.after(outcome, frame)
    }

    /// A packet on the uplink.
    pub(crate) fn wire(&self, from: u8, to: u8, proto: u8, body: &[u8]) -> Frame {
        let ip = wire::ip(F::addr(from), F::addr(to), proto, body);
        Frame::new([2, 0, 0, 0, 3, from], UPLINK, F::ETHERTYPE, &ip)
    }

    /// A packet that the node's own stack has made, on its way out.
    pub(crate) fn own(&self, to: u8, proto: u8, body: &[u8]) -> Frame {
        let mut frame = self.wire(NODE, to, proto, body);
        frame.own = true;
        frame
    }

    /// Runs the program of what an uplink receives.
    pub(crate) fn arrive(&mut self, frame: &Frame) -> (Outcome, Frame) {
        let mut frame = frame.clone();
        let outcome = match hachi_datapath::network_frame(&frame, Reason::PassedToStack) {
            Link::Decided(outcome) => outcome,
            Link::V4 | Link::V6 => {
                hachi_datapath::from_net::<N, F, _, _>(&mut frame, &self.tables, &mut self.scratch)
            }
        };
        self.after(outcome, frame)
    }

    /// Runs the XDP program of what an uplink receives, where routes lead back to it.
    pub(crate) fn early(&mut self, frame: &Frame) -> (Express, Frame) {
        let mut frame = frame.clone();
        let decided =
            hachi_datapath::express::<N, F, _, _>(&frame, &self.tables, &mut self.scratch);
        if decided == Express::Send {
            let done = hachi_datapath::depart::<N, F, _>(&mut frame, &self.scratch, &ROUTE);
            assert!(done, "a rewrite failed");
        }
        self.scratch = poison();
        (decided, frame)
    }

    /// The XDP program must leave the packet to the long way.
    #[track_caller]
    pub(crate) fn left_early(&mut self, frame: &Frame) {
        let (decided, after) = self.early(frame);
        assert_eq!(decided, Express::Leave);
        assert_eq!(after.bytes, frame.bytes);
    }

    /// Runs the program of what leaves by an uplink.
    pub(crate) fn leave(&mut self, frame: &Frame) -> (Outcome, Frame) {
        let mut frame = frame.clone();
        frame.ifindex = UPLINK;
        let outcome = match hachi_datapath::network_frame(&frame, Reason::PassedToNetwork) {
            Link::Decided(outcome) => outcome,
            Link::V4 | Link::V6 => {
                hachi_datapath::to_net::<N, F, _, _>(&mut frame, &self.tables, &mut self.scratch)
            }
        };
        self.after(outcome, frame)
    }

    /// Has what finds no port on its way out by an uplink refused, as its program does.
    #[track_caller]
    pub(crate) fn refusal(&mut self, frame: &Frame) -> (Refusal, Frame) {
        let mut frame = frame.clone();
        frame.ifindex = UPLINK;
        let outcome =
            hachi_datapath::to_net::<N, F, _, _>(&mut frame, &self.tables, &mut self.scratch);
        assert_eq!(outcome, Outcome::Drop(Reason::NatExhausted));
        let refusal =
            hachi_datapath::refuse::<N, F, _, _>(&mut frame, &self.tables, &mut self.scratch);
        self.scratch = poison();
        (refusal, frame)
    }

    /// Runs the program of what comes out of the tunnel from the node of an address.
    pub(crate) fn emerge(&mut self, frame: &Frame, outer: Option<&Tunnel>) -> (Outcome, Frame) {
        let mut frame = frame.clone();
        frame.ifindex = OVERLAY;
        let outcome = match hachi_datapath::overlay_frame(&frame) {
            Link::Decided(outcome) => outcome,
            Link::V4 | Link::V6 => hachi_datapath::from_overlay::<N, F, _, _>(
                &mut frame,
                &self.tables,
                &mut self.scratch,
                outer,
            ),
        };
        self.after(outcome, frame)
    }

    /// Runs the program of what goes into the tunnel; also tells where to.
    pub(crate) fn submerge(&mut self, frame: &Frame) -> (Outcome, Frame, Tunnel) {
        let mut frame = frame.clone();
        let mut tunnel = Tunnel::default();
        frame.ifindex = OVERLAY;
        let outcome = match hachi_datapath::overlay_frame(&frame) {
            Link::Decided(outcome) => outcome,
            Link::V4 | Link::V6 => hachi_datapath::to_overlay::<N, F, _, _>(
                &mut frame,
                &self.tables,
                &mut self.scratch,
                &mut tunnel,
            ),
        };
        let (outcome, frame) = self.after(outcome, frame);
        (outcome, frame, tunnel)
    }

    /// The packet must leave translated; returns it.
    #[track_caller]
    pub(crate) fn translated(&mut self, frame: &Frame) -> View {
        let (outcome, after) = self.leave(frame);
        assert_eq!(outcome, Outcome::Pass(Reason::Translated));
        after.check()
    }

    /// The packet must leave as it is.
    #[track_caller]
    pub(crate) fn left(&mut self, frame: &Frame) -> View {
        let (outcome, after) = self.leave(frame);
        assert_eq!(outcome, Outcome::Pass(Reason::PassedToNetwork));
        assert_eq!(after.bytes[14..], frame.bytes[14..], "it is changed");
        after.check()
    }

    /// The packet from the uplink must go to a Pod; returns it.
    #[track_caller]
    pub(crate) fn arrived(&mut self, frame: &Frame, pod: u8) -> View {
        let (outcome, after) = self.arrive(frame);
        let ifindex = u32::from(pod) + 10;
        assert_eq!(outcome, Outcome::RedirectPeer { ifindex });
        after.check()
    }

    /// The packet from the uplink must be forwarded; returns it.
    #[track_caller]
    pub(crate) fn forwarded(&mut self, frame: &Frame) -> (View, Frame) {
        let (outcome, after) = self.arrive(frame);
        assert_eq!(outcome, Outcome::Forward);
        (after.check(), after)
    }

    /// The packet from the uplink must go to the stack.
    #[track_caller]
    pub(crate) fn taken_in(&mut self, frame: &Frame) -> View {
        let (outcome, after) = self.arrive(frame);
        assert_eq!(outcome, Outcome::Pass(Reason::PassedToStack));
        after.check()
    }

    fn after(&mut self, outcome: Outcome, frame: Frame) -> (Outcome, Frame) {
        self.scratch = poison();
        let drop = matches!(outcome, Outcome::Drop(_));
        assert_eq!(drop, outcome.reason().is_drop(), "{outcome:?}");
        (outcome, frame)
    }

    /// The packet must go straight to the Pod; returns it, all its checksums right.
    #[track_caller]
    pub(crate) fn delivered(&mut self, frame: &Frame, pod: u8) -> View {
        let (outcome, after) = self.send(frame);
        assert_eq!(
            outcome,
            Outcome::RedirectPeer {
                ifindex: u32::from(pod) + 10
            }
        );
        let view = after.check();
        assert_eq!(view.macs, [mac(pod), host_mac(pod)].concat()[..]);
        view
    }

    /// The packet must go where the node's routes lead, past the stack where that may be.
    #[track_caller]
    pub(crate) fn passed(&mut self, frame: &Frame) -> View {
        let (outcome, after) = self.send(frame);
        let expected = if self.tables.flags & ConfigFlags::REDIRECT_NEIGH == 0 {
            Outcome::Pass(Reason::PassedToStack)
        } else {
            Outcome::Forward
        };
        assert_eq!(outcome, expected);
        after.check()
    }

    /// The packet must go to the stack in any case.
    #[track_caller]
    pub(crate) fn kept(&mut self, frame: &Frame) -> View {
        let (outcome, after) = self.send(frame);
        assert_eq!(outcome, Outcome::Pass(Reason::PassedToStack));
        after.check()
    }

    /// The packet must reach the Pod from the stack.
    #[track_caller]
    pub(crate) fn received(&mut self, frame: &Frame) -> View {
        let (outcome, after) = self.receive(frame);
        assert_eq!(outcome, Outcome::Pass(Reason::DeliveredFromStack));
        after.check()
    }

    /// What a Pod sends must be dropped.
    #[track_caller]
    pub(crate) fn refused(&mut self, frame: &Frame, reason: Reason) {
        assert_eq!(self.send(frame).0, Outcome::Drop(reason));
    }

    /// What the stack sends must be dropped.
    #[track_caller]
    pub(crate) fn kept_out(&mut self, frame: &Frame, reason: Reason) {
        assert_eq!(self.receive(frame).0, Outcome::Drop(reason));
    }
}
