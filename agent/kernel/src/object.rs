//! The eBPF object that this build carries.

use crate::KernelError;

/// Aligned, because the ELF parser reads it in place.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/hachi-ebpf.o"));

/// Whether the eBPF object existed when this crate was built. Without it nothing can be loaded.
#[must_use]
pub fn built_with_object() -> bool {
    !OBJECT.is_empty()
}

/// The object's bytes.
pub(crate) fn object() -> Result<&'static [u8], KernelError> {
    if built_with_object() {
        Ok(OBJECT)
    } else {
        Err(KernelError::NoObject)
    }
}
