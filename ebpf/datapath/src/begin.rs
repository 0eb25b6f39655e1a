//! What every program does first.

use hachi_abi::Reason;

use crate::{
    family::Family,
    parse::parse,
    scratch::{Event, Scratch},
    traits::{Maps, Packet},
};

/// Reads a packet where nothing may be decided before an agent has said what is allowed.
///
/// # Errors
/// [`Reason::NotConfigured`], and what [`read`] fails with.
#[inline(always)]
pub(crate) fn begin<const N: usize, F: Family<N>, P: Packet, M: Maps<N>>(
    packet: &mut P,
    maps: &M,
    scratch: &mut Scratch<N>,
) -> Result<(), Reason> {
    if maps.revision() == 0 {
        scratch.event = Event::Unknown;
        return Err(Reason::NotConfigured);
    }
    read::<N, F, P, M>(packet, maps, scratch)
}

/// Reads a packet into [`Scratch::parsed`]; [`Scratch::event`] tells the log how far it came.
///
/// # Errors
/// Why it cannot be read.
#[inline(always)]
pub(crate) fn read<const N: usize, F: Family<N>, P: Packet, M: Maps<N>>(
    packet: &mut P,
    maps: &M,
    scratch: &mut Scratch<N>,
) -> Result<(), Reason> {
    scratch.event = Event::Unknown;
    parse::<N, F, P, M>(packet, maps, &mut scratch.parsed)?;
    scratch.event = Event::Parsed;
    Ok(())
}
