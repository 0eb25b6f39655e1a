//! One heap for all threads, alone in a program because others' threads would have heaps already.

use std::{fs, sync::Barrier, thread};

/// How many heaps threads have got of their own: each reserves 64 MiB, most of it without access.
fn heaps() -> usize {
    let maps = fs::read_to_string("/proc/self/maps").expect("a process has mappings");
    let reserved = maps.lines().filter(|line| {
        let mut fields = line.split_whitespace();
        let range = fields.next().and_then(|range| range.split_once('-'));
        let number = |text| u64::from_str_radix(text, 16).unwrap_or_default();
        let size = range.map_or(0, |(from, to)| number(to) - number(from));
        fields.next() == Some("---p") && (48 << 20..=64 << 20).contains(&size)
    });
    reserved.count()
}

#[test]
fn threads_get_no_heaps_of_their_own() {
    hachi_kernel::share_one_heap();
    let before = heaps();
    let (allocated, counted) = (Barrier::new(9), Barrier::new(9));
    let after = thread::scope(|scope| {
        for size in 1..=8 {
            let (allocated, counted) = (&allocated, &counted);
            scope.spawn(move || {
                let kept = vec![1_u8; size * 1000];
                allocated.wait();
                counted.wait();
                drop(kept);
            });
        }
        allocated.wait();
        let after = heaps();
        counted.wait();
        after
    });
    assert_eq!(after, before);
}
