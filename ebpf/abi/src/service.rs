//! Services: `(address, port, protocol, scope) -> service`, then `(service, slot) -> backend`.

/// Key of the `SERVICES` maps.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceKey<const N: usize> {
    /// The frontend's address.
    pub addr: [u8; N],
    /// The frontend's port, network order.
    pub port: [u8; 2],
    /// IANA protocol number.
    pub proto: u8,
    /// Where the packet comes from, see [`Scope`].
    pub scope: u8,
}

/// Values of [`ServiceKey::scope`].
pub struct Scope;

impl Scope {
    /// Sent by a Pod of this node, or by the node itself.
    pub const INTERNAL: u8 = 0;
    /// Arrived on an uplink.
    pub const EXTERNAL: u8 = 1;
}

/// Value of the `SERVICES` maps.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Service {
    /// The first half of the backends' keys.
    pub id: u32,
    /// Number of backends: slots 0 to `count - 1` are valid.
    pub count: u32,
    /// Bits of [`ServiceFlags`].
    pub flags: u32,
    /// Session affinity by client address, in seconds; 0 for none.
    pub affinity: u32,
}

/// Bits of [`Service::flags`].
pub struct ServiceFlags;

impl ServiceFlags {
    /// With no backend the packet is dropped in silence (a traffic policy of Local with endpoints
    /// on other nodes alone), not rejected.
    pub const DROP_WHEN_EMPTY: u32 = 1 << 0;
}

/// Key of the `BACKENDS` maps.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BackendKey {
    /// [`Service::id`].
    pub service: u32,
    /// 0 to [`Service::count`] - 1.
    pub slot: u32,
}

/// Value of the `BACKENDS` maps.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Backend<const N: usize> {
    /// The backend's address.
    pub addr: [u8; N],
    /// The backend's port, network order.
    pub port: [u8; 2],
    /// Zero.
    pub pad: [u8; 2],
}

const _: () = assert!(size_of::<ServiceKey<4>>() == 8);
const _: () = assert!(size_of::<ServiceKey<16>>() == 20);
const _: () = assert!(size_of::<Service>() == 16);
const _: () = assert!(size_of::<BackendKey>() == 8);
const _: () = assert!(size_of::<Backend<4>>() == 8);
const _: () = assert!(size_of::<Backend<16>>() == 20);
