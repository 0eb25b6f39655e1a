//! Socket load balancing: what a socket was given in place of a Service's address.

/// Key of the `SOCKETS` maps.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SocketKey<const N: usize> {
    /// The kernel's number of the socket, unique while the machine runs; native order.
    pub cookie: [u8; 8],
    /// Address: the backend's or the Service's, as `way` says.
    pub addr: [u8; N],
    /// The port that belongs to `addr`, network order.
    pub port: [u8; 2],
    /// IANA protocol number.
    pub proto: u8,
    /// [`SocketWay`].
    pub way: u8,
}

/// Values of [`SocketKey::way`].
pub struct SocketWay;

impl SocketWay {
    /// The key has the backend, the value the Service's address that the socket knows it by.
    pub const BACK: u8 = 0;
    /// The key has the Service's address, the value the backend that datagrams of the (unconnected)
    /// socket go to.
    pub const FORTH: u8 = 1;
}

/// Value of the `SOCKETS` maps.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SocketEntry<const N: usize> {
    /// The kernel's number of the socket's network namespace; native order.
    pub netns: [u8; 8],
    /// Address: the Service's or the backend's, as [`SocketKey::way`] says.
    pub addr: [u8; N],
    /// The port that belongs to `addr`, network order.
    pub port: [u8; 2],
    /// Zero.
    pub pad: [u8; 2],
    /// [`SocketWay::FORTH`]: the backend's [`crate::BackendKey::service`].
    pub service: u32,
}

const _: () = assert!(size_of::<SocketKey<4>>() == 16);
const _: () = assert!(size_of::<SocketKey<16>>() == 28);
const _: () = assert!(size_of::<SocketEntry<4>>() == 20);
const _: () = assert!(size_of::<SocketEntry<16>>() == 32);
