//! The store against a model, in pieces, and killed at every step.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Instant,
};

use proptest::prelude::*;

use super::*;

/// Lets a number of steps succeed, and none after that: the process has been killed.
#[derive(Clone, Debug)]
pub(super) struct Steps(Arc<AtomicI64>);

impl Default for Steps {
    fn default() -> Self {
        Self(Arc::new(AtomicI64::new(i64::MAX)))
    }
}

impl Store {
    pub(super) fn step(&self) -> Result<(), StoreError> {
        if self.steps.0.fetch_sub(1, Ordering::Relaxed) > 0 {
            return Ok(());
        }
        self.steps.0.store(0, Ordering::Relaxed);
        Err(StoreError::io("survive in", &self.dir)(
            std::io::Error::other("killed"),
        ))
    }

    fn die_after(&self, steps: i64) {
        self.steps.0.store(steps, Ordering::Relaxed);
    }
}

const BOOT: &str = "boot-1";

/// In memory where possible: every step is followed by fsync.
fn scratch() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() {
        tempfile::tempdir_in(memory)
    } else {
        tempfile::tempdir()
    }
    .unwrap()
}

fn open(dir: &Path) -> Store {
    Store::open_in_boot(dir, BOOT.into()).unwrap()
}

fn id(number: usize) -> AttachmentId {
    AttachmentId {
        container_id: format!("c{number}"),
        ifname: "eth0".into(),
    }
}

fn owner(number: usize) -> Owner {
    Owner {
        network: "net".into(),
        id: id(number),
        pod: None,
    }
}

fn set(subnet: &str) -> RangeSet {
    let range = Range::new(subnet.parse().unwrap(), None, None, None).unwrap();
    RangeSet {
        ranges: vec![range],
        exclude: Vec::new(),
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn take(store: &Store, number: usize, sets: &[RangeSet]) -> String {
    let addresses = store.allocate(&owner(number), sets, &[]).unwrap();
    addresses
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(" ")
}

fn used(dir: &Path) -> Vec<String> {
    list(&dir.join("addresses"))
        .unwrap()
        .into_iter()
        .map(|(name, _)| name)
        .collect()
}

#[test]
fn unused_addresses_come_first_and_freed_ones_in_the_order_of_their_freeing() {
    let dir = scratch();
    let sets = [set("10.0.0.0/29")];
    let store = open(dir.path());
    assert_eq!(take(&store, 1, &sets), "10.0.0.2");
    assert_eq!(take(&store, 2, &sets), "10.0.0.3");
    store.release(&id(2)).unwrap();
    store.release(&id(1)).unwrap();
    let store = open(dir.path());
    assert_eq!(take(&store, 3, &sets), "10.0.0.4");
    assert_eq!(take(&store, 4, &sets), "10.0.0.5");
    assert_eq!(take(&store, 5, &sets), "10.0.0.6");
    assert_eq!(take(&store, 6, &sets), "10.0.0.3", "freed first");
    assert_eq!(take(&store, 7, &sets), "10.0.0.2");
    let error = store.allocate(&owner(8), &sets, &[]).unwrap_err();
    assert!(matches!(error, StoreError::Exhausted(_)), "{error}");
    assert!(store.has_room(&sets).is_err());
    store.release(&id(5)).unwrap();
    store.has_room(&sets).unwrap();
    assert_eq!(take(&store, 8, &sets), "10.0.0.6");
}

#[test]
fn both_families_or_neither() {
    let dir = scratch();
    let store = open(dir.path());
    let sets = [set("10.0.0.0/30"), set("fd00::/64")];
    assert_eq!(take(&store, 1, &sets), "10.0.0.2 fd00::2");
    store.allocate(&owner(2), &sets, &[]).unwrap_err();
    assert_eq!(used(dir.path()), ["10.0.0.2", "fd00::2"]);
    assert_eq!(store.claim(&id(2)).unwrap(), None);
    store.release(&id(1)).unwrap();
    assert_eq!(take(&store, 2, &sets), "10.0.0.2 fd00::3");
}

#[test]
fn several_ranges_and_excluded_blocks() {
    let dir = scratch();
    let store = open(dir.path());
    let mut one = set("10.0.0.0/30");
    one.ranges.extend(set("10.0.1.0/29").ranges);
    one.exclude = vec!["10.0.1.2/31".parse().unwrap()];
    let sets = [one];
    let taken: Vec<_> = (0..4).map(|number| take(&store, number, &sets)).collect();
    assert_eq!(taken, ["10.0.0.2", "10.0.1.4", "10.0.1.5", "10.0.1.6"]);
    store.allocate(&owner(9), &sets, &[]).unwrap_err();
}

#[test]
fn a_large_excluded_block_is_stepped_over() {
    let dir = scratch();
    let store = open(dir.path());
    let mut large = set("fd00::/64");
    large.exclude = vec!["fd00::/65".parse().unwrap()];
    assert_eq!(take(&store, 1, &[large]), "fd00::8000:0:0:0");
}

#[test]
fn requested_addresses() {
    let dir = scratch();
    let store = open(dir.path());
    let sets = [set("10.0.0.0/29"), set("fd00::/64")];
    let asked = [ip("fd00::99"), ip("10.0.0.3")];
    let got = store.allocate(&owner(1), &sets, &asked).unwrap();
    assert_eq!(got, [ip("10.0.0.3"), ip("fd00::99")]);
    let error = store.allocate(&owner(2), &sets, &asked[..1]).unwrap_err();
    assert!(
        matches!(&error, StoreError::Taken { owner, .. } if owner == "c1:eth0"),
        "{error}"
    );
    for reserved in ["10.0.0.0", "10.0.0.1", "10.0.0.7", "10.0.0.8", "fe80::1"] {
        let error = store
            .allocate(&owner(2), &sets, &[ip(reserved)])
            .unwrap_err();
        assert!(
            matches!(error, StoreError::NotInRange(_)),
            "{reserved}: {error}"
        );
    }
    // What was requested is passed over later, and comes back in its turn.
    assert_eq!(take(&store, 2, &sets[..1]), "10.0.0.2");
    assert_eq!(take(&store, 3, &sets[..1]), "10.0.0.4");
    store.release(&id(1)).unwrap();
    assert_eq!(take(&store, 4, &sets[..1]), "10.0.0.5");
    assert_eq!(take(&store, 5, &sets[..1]), "10.0.0.6");
    assert_eq!(take(&store, 6, &sets[..1]), "10.0.0.3");
}

#[test]
fn the_same_attachment_again_gives_back_what_it_had() {
    let dir = scratch();
    let store = open(dir.path());
    let sets = [set("10.0.0.0/29")];
    take(&store, 1, &sets);
    assert_eq!(take(&store, 1, &sets), "10.0.0.3");
    assert_eq!(used(dir.path()), ["10.0.0.3"]);
}

#[test]
fn nothing_outlives_a_reboot() {
    let dir = scratch();
    let sets = [set("10.0.0.0/29")];
    let store = open(dir.path());
    take(&store, 1, &sets);
    store.record(&attachment(1)).unwrap();
    // Written by halves when the power went.
    fs::write(dir.path().join("claims/c2:eth0"), "").unwrap();
    fs::write(dir.path().join("attachments/c3:eth0"), "{").unwrap();
    let store = Store::open_in_boot(dir.path(), "boot-2".into()).unwrap();
    assert!(used(dir.path()).is_empty());
    let (claims, unreadable) = store.claims().unwrap();
    assert!(claims.is_empty() && unreadable.is_empty());
    let (attachments, unreadable) = store.attachments().unwrap();
    assert!(attachments.is_empty() && unreadable.is_empty());
    assert_eq!(take(&store, 4, &sets), "10.0.0.2");
}

#[test]
fn a_lost_boot_file_frees_nothing_of_this_boot() {
    let dir = scratch();
    let sets = [set("10.0.0.0/29")];
    let store = open(dir.path());
    take(&store, 1, &sets);
    store.record(&attachment(1)).unwrap();
    fs::remove_file(dir.path().join("boot")).unwrap();
    let store = open(dir.path());
    assert_eq!(store.attachments().unwrap().0, [attachment(1)]);
    assert_eq!(take(&store, 2, &sets), "10.0.0.3");
}

#[test]
fn a_changed_pool_keeps_what_is_in_use_and_forgets_nothing() {
    let dir = scratch();
    let store = open(dir.path());
    let whole = [set("10.0.0.0/29")];
    let subnet = "10.0.0.0/29".parse().unwrap();
    let part = Range::new(subnet, Some(ip("10.0.0.2")), Some(ip("10.0.0.3")), None).unwrap();
    let part = [RangeSet {
        ranges: vec![part],
        exclude: Vec::new(),
    }];
    assert_eq!(take(&store, 1, &whole), "10.0.0.2");
    assert_eq!(take(&store, 2, &part), "10.0.0.3");
    store.allocate(&owner(3), &part, &[]).unwrap_err();
    store.release(&id(1)).unwrap();
    assert_eq!(
        take(&store, 3, &part),
        "10.0.0.2",
        "freed under another pool"
    );
}

#[test]
fn addresses_that_the_queue_lost_are_found() {
    let dir = scratch();
    let store = open(dir.path());
    let sets = [set("10.0.0.0/29")];
    for number in 0..5 {
        take(&store, number, &sets);
    }
    // As an administrator may do.
    fs::remove_file(dir.path().join("addresses/10.0.0.4")).unwrap();
    store.has_room(&sets).unwrap();
    assert_eq!(take(&store, 9, &sets), "10.0.0.4");
    store.has_room(&sets).unwrap_err();
}

#[test]
fn claims_that_somebody_deleted_or_damaged_are_found() {
    let dir = scratch();
    let store = open(dir.path());
    let sets = [set("10.0.0.0/29"), set("fd00::/64")];
    take(&store, 1, &sets);
    take(&store, 2, &sets);
    fs::remove_file(dir.path().join("claims/c1:eth0")).unwrap();
    fs::write(dir.path().join("claims/c2:eth0"), "{").unwrap();
    let (claims, unreadable) = store.claims().unwrap();
    assert_eq!(
        claims
            .iter()
            .map(|claim| claim.id.clone())
            .collect::<Vec<_>>(),
        [id(1)]
    );
    assert!(!unreadable.is_empty());
    store.release_claim(&claims[0]).unwrap();
    assert_eq!(
        store.release(&id(2)).unwrap(),
        [ip("10.0.0.3"), ip("fd00::3")]
    );
    assert!(used(dir.path()).is_empty());
}

#[test]
fn a_lock_that_is_held_is_not_waited_for_for_ever() {
    let dir = scratch();
    let store = open(dir.path()).with_patience(Duration::from_millis(50));
    let lock = store.lock().unwrap();
    let begin = Instant::now();
    let error = store
        .allocate(&owner(1), &[set("10.0.0.0/29")], &[])
        .unwrap_err();
    assert!(matches!(error, StoreError::Locked { .. }), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(2));
    drop(lock);
    take(&store, 1, &[set("10.0.0.0/29")]);
}

#[test]
fn names_that_are_no_file_names() {
    let dir = scratch();
    let store = open(dir.path());
    for (container, ifname) in [
        ("..", "x"),
        ("a/b", "x"),
        ("a", "x:y"),
        ("a\0", "x"),
        (".", ""),
    ] {
        let id = AttachmentId {
            container_id: container.into(),
            ifname: ifname.into(),
        };
        assert!(
            matches!(store.release(&id), Err(StoreError::BadName(_))),
            "{id:?}"
        );
    }
    let id = AttachmentId {
        container_id: "x".repeat(300),
        ifname: "eth0".into(),
    };
    assert!(matches!(store.release(&id), Err(StoreError::BadName(_))));
}

#[test]
fn a_large_pool_costs_no_more_than_a_small_one() {
    let dir = scratch();
    let store = open(dir.path());
    let sets = [set("10.0.0.0/16"), set("fd00::/64")];
    for number in 0..300 {
        take(&store, number, &sets);
    }
    // Opening or listing the pool would show in the size of its state.
    for path in list(&dir.path().join("ranges")).unwrap() {
        assert_eq!(fs::metadata(path.1).unwrap().len(), 64);
    }
    for number in 0..300 {
        store.release(&id(number)).unwrap();
    }
    assert_eq!(take(&store, 0, &sets), "10.0.1.46 fd00::12e");
}

fn attachment(number: u8) -> Attachment {
    Attachment {
        id: id(number.into()),
        netns: "/run/netns/x".into(),
        pod: None,
        host_ifname: "hachi0123456789".into(),
        host_ifindex: number.into(),
        mac: "02:00:00:00:00:01".into(),
        host_mac: "02:00:00:00:00:02".into(),
        addresses: vec![[10, 0, 0, number].into()],
        port_mappings: Vec::new(),
        masquerade: false,
    }
}

#[test]
fn records() {
    let dir = scratch();
    let store = open(dir.path());
    store.record(&attachment(2)).unwrap();
    store.record(&attachment(1)).unwrap();
    store.record(&attachment(1)).unwrap();
    fs::write(dir.path().join("attachments/c3:eth0"), "{").unwrap();
    let (found, unreadable) = store.attachments().unwrap();
    assert_eq!(found, [attachment(1), attachment(2)]);
    assert_eq!(unreadable.len(), 1);
    assert!(
        unreadable[0].to_string().contains("c3:eth0"),
        "{}",
        unreadable[0]
    );
    assert_eq!(store.attachment(&id(1)).unwrap(), Some(attachment(1)));
    assert!(store.forget(&id(1)).unwrap());
    assert!(!store.forget(&id(1)).unwrap());
    assert_eq!(store.attachment(&id(1)).unwrap(), None);
}

#[derive(Clone, Debug)]
enum Step {
    Allocate(usize),
    Request(usize, u8),
    Release(usize),
    /// A process that is killed after so many steps, and then DEL.
    DieAllocating(usize, i64),
    DieReleasing(usize, i64),
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    let who = 0..9usize;
    prop_oneof![
        5 => who.clone().prop_map(Step::Allocate),
        2 => (who.clone(), 0..16u8).prop_map(|(who, last)| Step::Request(who, last)),
        4 => who.clone().prop_map(Step::Release),
        2 => (who.clone(), 0..9i64).prop_map(|(who, steps)| Step::DieAllocating(who, steps)),
        2 => (who, 0..7i64).prop_map(|(who, steps)| Step::DieReleasing(who, steps)),
        1 => Just(Step::Reopen),
    ]
}

/// What should be in use: ten addresses, 10.0.0.2 to 10.0.0.14 without 4, 5 and 9.
#[derive(Default)]
struct Model {
    held: BTreeMap<usize, IpAddr>,
    /// Free addresses, longest first; those that were never used before all others.
    free: VecDeque<IpAddr>,
    /// After a process was killed, or an address ahead was asked for, the order is no promise.
    ordered: bool,
}

impl Model {
    fn new() -> Self {
        let suits = |last: &u8| !matches!(last, 4 | 5 | 9);
        let free = (2..=14)
            .filter(suits)
            .map(|last| [10, 0, 0, last].into())
            .collect();
        Self {
            held: BTreeMap::new(),
            free,
            ordered: true,
        }
    }

    fn release(&mut self, who: usize) {
        self.free.extend(self.held.remove(&who));
    }

    fn take(&mut self, who: usize, address: IpAddr) -> Result<(), TestCaseError> {
        let place = self.free.iter().position(|free| *free == address);
        let place = place.ok_or_else(|| TestCaseError::fail(format!("{address} is not free")))?;
        self.free.remove(place);
        self.held.insert(who, address);
        Ok(())
    }
}

fn agree(store: &Store, model: &Model) -> Result<(), TestCaseError> {
    let mut expected: Vec<_> = model.held.values().map(ToString::to_string).collect();
    expected.sort();
    prop_assert_eq!(used(&store.dir), expected);
    let (claims, unreadable) = store.claims().unwrap();
    prop_assert!(unreadable.is_empty(), "{:?}", unreadable);
    let claims: BTreeMap<_, _> = claims
        .into_iter()
        .map(|claim| (claim.id.container_id, claim.addresses))
        .collect();
    let held = model
        .held
        .iter()
        .map(|(who, address)| (format!("c{who}"), vec![*address]));
    prop_assert_eq!(claims, held.collect::<BTreeMap<_, _>>());
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn whatever_happens_no_address_is_lost_or_given_twice(
        steps in proptest::collection::vec(step(), 1..60)
    ) {
        let dir = scratch();
        let mut range = set("10.0.0.0/28");
        range.exclude = vec!["10.0.0.4/31".parse().unwrap(), "10.0.0.9/32".parse().unwrap()];
        let sets = [range];
        let mut store = open(dir.path());
        let mut model = Model::new();
        for step in steps {
            match step {
                Step::Allocate(who) => {
                    model.release(who);
                    match store.allocate(&owner(who), &sets, &[]) {
                        Ok(got) => {
                            if model.ordered {
                                prop_assert_eq!(Some(&got[0]), model.free.front());
                            }
                            model.take(who, got[0])?;
                        }
                        Err(StoreError::Exhausted(_)) => prop_assert!(model.free.is_empty()),
                        Err(error) => return Err(TestCaseError::fail(error.to_string())),
                    }
                }
                Step::Request(who, last) => {
                    model.ordered = false;
                    model.release(who);
                    let address = [10, 0, 0, last].into();
                    match store.allocate(&owner(who), &sets, &[address]) {
                        Ok(got) => model.take(who, got[0])?,
                        Err(StoreError::Taken { .. }) => {
                            prop_assert!(model.held.values().any(|held| *held == address));
                        }
                        Err(StoreError::NotInRange(_)) => {
                            prop_assert!(matches!(last, 0 | 1 | 4 | 5 | 9 | 15));
                        }
                        Err(error) => return Err(TestCaseError::fail(error.to_string())),
                    }
                }
                Step::Release(who) => {
                    store.release(&id(who)).unwrap();
                    model.release(who);
                }
                Step::DieAllocating(who, steps) => {
                    model.ordered = false;
                    store.die_after(steps);
                    let _ = store.allocate(&owner(who), &sets, &[]);
                    store = open(dir.path());
                    // Whoever else takes an address now gets none that is in use.
                    let got = store.allocate(&owner(99), &sets, &[]);
                    if let Ok(got) = got {
                        let others = model.held.iter().filter(|(other, _)| **other != who);
                        prop_assert!(others.into_iter().all(|(_, held)| *held != got[0]));
                    }
                    store.release(&id(99)).unwrap();
                    store.release(&id(who)).unwrap();
                    model.release(who);
                }
                Step::DieReleasing(who, steps) => {
                    model.ordered = false;
                    store.die_after(steps);
                    let _ = store.release(&id(who));
                    store = open(dir.path());
                    store.release(&id(who)).unwrap();
                    model.release(who);
                }
                Step::Reopen => store = open(dir.path()),
            }
            agree(&store, &model)?;
        }
        // Every address can still be had.
        for who in 0..9 {
            store.release(&id(who)).unwrap();
        }
        for who in 0..10 {
            store.allocate(&owner(who), &sets, &[]).unwrap();
        }
        prop_assert!(matches!(store.allocate(&owner(10), &sets, &[]), Err(StoreError::Exhausted(_))));
    }
}
