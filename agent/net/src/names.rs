//! Names and MAC addresses that follow from the attachment alone, so that DEL, GC and a plugin of
//! a later version find what ADD made even when every record is lost.

use hachi_api::AttachmentId;

use crate::Mac;

const PREFIX: &str = "hachi";
/// 40 bits in hexadecimal: with the prefix exactly the 15 bytes that a name may have.
const DIGITS: usize = 10;

/// The name of the veth's host side.
#[must_use]
pub fn host_ifname(id: &AttachmentId) -> String {
    format!("{PREFIX}{:010x}", hash(id, b'n') >> 24)
}

/// Whether an interface of this name is the host side of an attachment.
#[must_use]
pub fn is_host_ifname(name: &str) -> bool {
    name.strip_prefix(PREFIX).is_some_and(|digits| {
        digits.len() == DIGITS
            && digits
                .bytes()
                .all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'))
    })
}

/// The MAC addresses of the Pod's interface and of the host side.
#[must_use]
pub fn macs(id: &AttachmentId) -> (Mac, Mac) {
    (mac(hash(id, b'p')), mac(hash(id, b'h')))
}

fn mac(hash: u64) -> Mac {
    let [a, b, c, d, e, f, ..] = hash.to_be_bytes();
    // Locally administered, not a group address.
    Mac([a & 0xfc | 0x02, b, c, d, e, f])
}

/// FNV-1a, then the finalizer of MurmurHash3. It may never change: running Pods are found by it.
fn hash(id: &AttachmentId, use_of: u8) -> u64 {
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    let bytes = [use_of]
        .into_iter()
        .chain(id.container_id.bytes())
        .chain([0]);
    for byte in bytes.chain(id.ifname.bytes()) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^ (hash >> 33)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn id(container: &str, ifname: &str) -> AttachmentId {
        AttachmentId {
            container_id: container.into(),
            ifname: ifname.into(),
        }
    }

    #[test]
    fn names_never_change() {
        assert_eq!(host_ifname(&id("cafe", "eth0")), "hachiaa3f015f79");
        let (pod, host) = macs(&id("cafe", "eth0"));
        assert!(
            pod.is_usable() && host.is_usable() && pod != host,
            "{pod} {host}"
        );
        assert_eq!(pod.0[0] & 2, 2, "locally administered");
    }

    #[test]
    fn names_fit_and_differ() {
        let ids = (0..2000).map(|n| id(&format!("{n:064x}"), "eth0"));
        let names: BTreeSet<_> = ids.map(|id| host_ifname(&id)).collect();
        assert_eq!(names.len(), 2000);
        assert!(
            names
                .iter()
                .all(|name| name.len() == 15 && is_host_ifname(name))
        );
        assert_ne!(host_ifname(&id("a", "b")), host_ifname(&id("ab", "")));
    }

    #[test]
    fn other_names_are_not_ours() {
        for name in [
            "hachi",
            "hachi0",
            "hachi012345678",
            "hachi012345678G",
            "eth0",
            "hachi01234567890",
        ] {
            assert!(!is_host_ifname(name), "{name}");
        }
    }
}
