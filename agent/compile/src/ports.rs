//! Port ranges as prefixes: at most 30 of them for a range of 16-bit numbers.

/// The fewest `(first port, prefix length)` that cover `first..=last` and nothing else.
pub(crate) fn prefixes(first: u16, last: u16) -> Vec<(u16, u8)> {
    let (mut at, end) = (u32::from(first), u32::from(last));
    let mut all = Vec::new();
    while at <= end {
        // The widest block that starts here and does not reach beyond the end.
        let aligned = if at == 0 {
            16
        } else {
            at.trailing_zeros().min(16)
        };
        let fitting = (end - at + 1).ilog2();
        let bits = aligned.min(fitting);
        all.push((at as u16, 16 - bits as u8));
        at += 1 << bits;
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn single_ports_and_everything() {
        assert_eq!(prefixes(80, 80), [(80, 16)]);
        assert_eq!(prefixes(0, 65535), [(0, 0)]);
        assert_eq!(prefixes(65535, 65535), [(65535, 16)]);
        assert_eq!(prefixes(80, 90), [(80, 13), (88, 15), (90, 16)]);
        assert_eq!(prefixes(1, 65534).len(), 30);
        assert_eq!(prefixes(2, 1), []);
    }

    proptest::proptest! {
        #[test]
        fn prefixes_cover_the_range_and_nothing_else(a: u16, b: u16, probe: u16) {
            let (first, last) = (a.min(b), a.max(b));
            let all = prefixes(first, last);
            let covers = |p: u16| {
                all.iter()
                    .filter(|(start, plen)| u32::from(p ^ start) >> (16 - plen) == 0)
                    .count()
            };
            for p in [first, last, probe, first.wrapping_sub(1), last.wrapping_add(1)] {
                let expected = usize::from((first..=last).contains(&p));
                proptest::prop_assert_eq!(covers(p), expected);
            }
        }
    }
}
