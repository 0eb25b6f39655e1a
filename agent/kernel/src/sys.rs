//! The bpf(2) calls that aya does not offer: batches of map entries, and tcx links by interface
//! index (aya asks for a name) and their ids.
//!
//! The attribute structures have the layout of `union bpf_attr`'s members (include/uapi/linux/bpf.h),
//! padding written out; the kernel takes any size up to its own and reads the rest as zero.

use std::{
    ffi::CString,
    io,
    mem::size_of,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
    ptr,
};

/// Commands of bpf(2).
mod command {
    pub(super) const MAP_CREATE: i32 = 0;
    pub(super) const MAP_LOOKUP: i32 = 1;
    pub(super) const MAP_UPDATE: i32 = 2;
    pub(super) const MAP_DELETE: i32 = 3;
    pub(super) const MAP_NEXT_KEY: i32 = 4;
    pub(super) const PROG_LOAD: i32 = 5;
    pub(super) const PIN: i32 = 6;
    pub(super) const GET: i32 = 7;
    pub(super) const INFO: i32 = 15;
    pub(super) const QUERY: i32 = 16;
    pub(super) const LOOKUP_BATCH: i32 = 24;
    pub(super) const UPDATE_BATCH: i32 = 26;
    pub(super) const DELETE_BATCH: i32 = 27;
    pub(super) const LINK_CREATE: i32 = 28;
    pub(super) const LINK_UPDATE: i32 = 29;
    pub(super) const LINK_DETACH: i32 = 34;
}

/// `enum bpf_attach_type`.
pub(crate) const TCX_INGRESS: u32 = 46;
/// `enum bpf_attach_type`.
pub(crate) const TCX_EGRESS: u32 = 47;
/// `enum bpf_attach_type`.
pub(crate) const XDP: u32 = 37;
/// `XDP_FLAGS_SKB_MODE` (include/uapi/linux/if_link.h).
pub(crate) const XDP_GENERIC: u32 = 1 << 1;
/// `XDP_FLAGS_DRV_MODE`.
pub(crate) const XDP_DRIVER: u32 = 1 << 2;
/// `enum bpf_link_type`.
const LINK_TYPE_XDP: u32 = 6;
/// `enum bpf_link_type`.
const LINK_TYPE_CGROUP: u32 = 3;
/// `enum bpf_link_type`.
const LINK_TYPE_TCX: u32 = 11;
/// Before all other programs of the hook.
const F_BEFORE: u32 = 1 << 3;
/// `errno` of the kernel's internal ENOTSUPP, which leaks out where a map lacks batches.
pub(crate) const ENOTSUPP: i32 = 524;

#[repr(C)]
struct Element {
    map: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
struct Batch {
    from: u64,
    to: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    element_flags: u64,
    flags: u64,
}

#[repr(C)]
struct MapCreate {
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
}

#[repr(C)]
struct ProgLoad {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    ifindex: u32,
    expected_attach_type: u32,
}

#[repr(C)]
struct Object {
    path: u64,
    fd: u32,
    flags: u32,
}

#[repr(C)]
struct Info {
    fd: u32,
    len: u32,
    info: u64,
}

#[repr(C)]
struct Query {
    ifindex: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    programs: u64,
    count: u32,
    pad: u32,
    program_flags: u64,
    links: u64,
    link_flags: u64,
    revision: u64,
}

#[repr(C)]
struct LinkCreate {
    program: u32,
    ifindex: u32,
    attach_type: u32,
    flags: u32,
    relative: u32,
    pad: u32,
    revision: u64,
}

#[repr(C)]
struct LinkUpdate {
    link: u32,
    program: u32,
    flags: u32,
    old: u32,
}

#[repr(C)]
struct LinkDetach {
    link: u32,
}

/// One call of bpf(2).
///
/// # Safety
/// Every pointer in `attr` must be valid for what the command reads or writes there.
unsafe fn bpf<T>(command: i32, attr: &mut T) -> io::Result<i32> {
    // SAFETY: `attr` is a live, exclusively borrowed structure of the length given; the pointers
    // inside are the caller's promise.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, ptr::from_mut(attr), size_of::<T>()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    i32::try_from(result).map_err(io::Error::other)
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

fn address(bytes: &[u8]) -> u64 {
    bytes.as_ptr().addr() as u64
}

/// Takes ownership of a descriptor that the kernel just returned.
fn owned(fd: i32) -> OwnedFd {
    // SAFETY: the kernel made the descriptor for this call alone, nobody else owns it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn path_string(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

/// Writes one entry.
pub(crate) fn update(map: BorrowedFd<'_>, key: &[u8], value: &[u8]) -> io::Result<()> {
    let mut attr = Element {
        map: raw(map),
        pad: 0,
        key: address(key),
        value: address(value),
        flags: 0,
    };
    // SAFETY: the caller (`Table`) passes a key and a value of the map's sizes, alive here.
    unsafe { bpf(command::MAP_UPDATE, &mut attr) }.map(drop)
}

/// Removes one entry.
pub(crate) fn delete(map: BorrowedFd<'_>, key: &[u8]) -> io::Result<()> {
    let mut attr = Element {
        map: raw(map),
        pad: 0,
        key: address(key),
        value: 0,
        flags: 0,
    };
    // SAFETY: as in `update`.
    unsafe { bpf(command::MAP_DELETE, &mut attr) }.map(drop)
}

/// Reads one entry; false if there is none.
pub(crate) fn lookup(map: BorrowedFd<'_>, key: &[u8], value: &mut [u8]) -> io::Result<bool> {
    let mut attr = Element {
        map: raw(map),
        pad: 0,
        key: address(key),
        value: value.as_mut_ptr().expose_provenance() as u64,
        flags: 0,
    };
    // SAFETY: as in `update`; the kernel writes one value into the exclusive slice.
    found(unsafe { bpf(command::MAP_LOOKUP, &mut attr) })
}

/// The key after `key`, or the first; false after the last.
pub(crate) fn next_key(
    map: BorrowedFd<'_>,
    key: Option<&[u8]>,
    next: &mut [u8],
) -> io::Result<bool> {
    let mut attr = Element {
        map: raw(map),
        pad: 0,
        key: key.map_or(0, address),
        value: next.as_mut_ptr().expose_provenance() as u64,
        flags: 0,
    };
    // SAFETY: as in `lookup`; the second buffer has the key's size.
    found(unsafe { bpf(command::MAP_NEXT_KEY, &mut attr) })
}

fn found(result: io::Result<i32>) -> io::Result<bool> {
    match result {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Writes `count` entries; returns how many were, and the error that stopped it.
pub(crate) fn update_batch(
    map: BorrowedFd<'_>,
    keys: &[u8],
    values: &[u8],
    count: u32,
) -> (u32, io::Result<()>) {
    batch(command::UPDATE_BATCH, map, keys, values, count)
}

/// Removes `count` entries; returns how many were, and the error that stopped it.
pub(crate) fn delete_batch(map: BorrowedFd<'_>, keys: &[u8], count: u32) -> (u32, io::Result<()>) {
    batch(command::DELETE_BATCH, map, keys, &[], count)
}

fn batch(
    command: i32,
    map: BorrowedFd<'_>,
    keys: &[u8],
    values: &[u8],
    count: u32,
) -> (u32, io::Result<()>) {
    let mut attr = Batch {
        from: 0,
        to: 0,
        keys: address(keys),
        values: if values.is_empty() {
            0
        } else {
            address(values)
        },
        count,
        map: raw(map),
        element_flags: 0,
        flags: 0,
    };
    // SAFETY: the caller (`Table`) passes `count` whole keys and values, alive here.
    let result = unsafe { bpf(command, &mut attr) }.map(drop);
    // A kernel that does not know the command leaves the count as it was.
    let done = match &result {
        Err(error) if unsupported(error) => 0,
        _ => attr.count,
    };
    (done, result)
}

/// Whether the kernel or the map's type lacks the call.
pub(crate) fn unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINVAL | libc::EOPNOTSUPP | ENOTSUPP)
    )
}

/// Reads as many entries as fit, from where `cursor` says; returns their number and whether it
/// was the end.
pub(crate) fn lookup_batch(
    map: BorrowedFd<'_>,
    cursor: &mut [u8],
    first: bool,
    keys: &mut [u8],
    values: &mut [u8],
    count: u32,
) -> io::Result<(u32, bool)> {
    let cursor = cursor.as_mut_ptr().expose_provenance() as u64;
    let mut attr = Batch {
        from: if first { 0 } else { cursor },
        to: cursor,
        keys: keys.as_mut_ptr().expose_provenance() as u64,
        values: values.as_mut_ptr().expose_provenance() as u64,
        count,
        map: raw(map),
        element_flags: 0,
        flags: 0,
    };
    // SAFETY: the caller (`Table`) passes room for `count` keys and values, and a cursor as long
    // as the longer of a key and a u32, which is what the kernel stores there.
    match unsafe { bpf(command::LOOKUP_BATCH, &mut attr) } {
        Ok(_) => Ok((attr.count, false)),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok((attr.count, true)),
        Err(error) => Err(error),
    }
}

/// Opens a pin.
pub(crate) fn get(path: &Path) -> io::Result<OwnedFd> {
    let path = path_string(path)?;
    let mut attr = Object {
        path: path.as_ptr().expose_provenance() as u64,
        fd: 0,
        flags: 0,
    };
    // SAFETY: the path is a live C string.
    unsafe { bpf(command::GET, &mut attr) }.map(owned)
}

/// Pins an object.
pub(crate) fn pin(fd: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = path_string(path)?;
    let mut attr = Object {
        path: path.as_ptr().expose_provenance() as u64,
        fd: raw(fd),
        flags: 0,
    };
    // SAFETY: the path is a live C string.
    unsafe { bpf(command::PIN, &mut attr) }.map(drop)
}

/// The first words of what the kernel tells of an object (`BPF_OBJ_GET_INFO_BY_FD`): a program, a link.
fn info<const N: usize>(fd: BorrowedFd<'_>) -> io::Result<[u32; N]> {
    let mut info = [0_u32; N];
    let mut attr = Info {
        fd: raw(fd),
        len: u32::try_from(size_of_val(&info)).map_err(io::Error::other)?,
        info: ptr::from_mut(&mut info).expose_provenance() as u64,
    };
    // SAFETY: `info` is exclusive, and its length is given.
    unsafe { bpf(command::INFO, &mut attr) }?;
    Ok(info)
}

/// The id of a tcx link; none for a descriptor of something else.
///
/// The kernel answers for a program too, with its own structure, which also begins with a type:
/// never that of a tcx link for the classifiers that Hachi pins.
pub(crate) fn tcx_link_id(fd: BorrowedFd<'_>) -> io::Result<Option<u32>> {
    // Type and id, the start of `struct bpf_link_info`.
    let [kind, id] = info(fd)?;
    Ok((kind == LINK_TYPE_TCX).then_some(id))
}

/// The (program id, link id) pairs on a tcx hook, in the order in which they run.
pub(crate) fn query(ifindex: u32, attach_type: u32) -> io::Result<Vec<(u32, u32)>> {
    let mut programs = [0_u32; 64];
    let mut links = [0_u32; 64];
    let mut attr = Query {
        ifindex,
        attach_type,
        query_flags: 0,
        attach_flags: 0,
        programs: programs.as_mut_ptr().expose_provenance() as u64,
        count: 64,
        pad: 0,
        program_flags: 0,
        links: links.as_mut_ptr().expose_provenance() as u64,
        link_flags: 0,
        revision: 0,
    };
    // SAFETY: both arrays are exclusive and have the room that `count` says.
    unsafe { bpf(command::QUERY, &mut attr) }?;
    let count = attr.count as usize;
    Ok(programs.into_iter().zip(links).take(count).collect())
}

/// Makes a map.
pub(crate) fn map_create(
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
) -> io::Result<OwnedFd> {
    let mut attr = MapCreate {
        kind,
        key_size,
        value_size,
        max_entries,
        flags,
    };
    // SAFETY: the structure holds no pointer.
    unsafe { bpf(command::MAP_CREATE, &mut attr) }.map(owned)
}

/// Loads a program of a few instructions (`struct bpf_insn`, 8 bytes each).
pub(crate) fn prog_load(
    kind: u32,
    expected_attach_type: u32,
    instructions: &[u64],
) -> io::Result<OwnedFd> {
    let mut attr = ProgLoad {
        kind,
        count: u32::try_from(instructions.len()).map_err(io::Error::other)?,
        instructions: instructions.as_ptr().addr() as u64,
        license: c"GPL".as_ptr().addr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
        name: *b"hachi_probe\0\0\0\0\0",
        ifindex: 0,
        expected_attach_type,
    };
    // SAFETY: the instructions and the licence, a C string, are alive, and the count is theirs.
    unsafe { bpf(command::PROG_LOAD, &mut attr) }.map(owned)
}

/// The instructions that the verifier walked through; 0 where the kernel does not tell (before 5.16).
pub(crate) fn verified_instructions(program: BorrowedFd<'_>) -> io::Result<u32> {
    // `verified_insns` in `struct bpf_prog_info`, which is aligned to 8.
    const AT: usize = 216 / 4;
    let info: [u32; AT + 2] = info(program)?;
    Ok(info[AT])
}

/// Attaches a program to an interface or a cgroup by a link that lasts as long as its descriptor.
pub(crate) fn attach(
    program: BorrowedFd<'_>,
    target: u32,
    attach_type: u32,
    flags: u32,
) -> io::Result<OwnedFd> {
    let mut attr = LinkCreate {
        program: raw(program),
        ifindex: target,
        attach_type,
        flags,
        relative: 0,
        pad: 0,
        revision: 0,
    };
    // SAFETY: the structure holds no pointer.
    unsafe { bpf(command::LINK_CREATE, &mut attr) }.map(owned)
}

/// Attaches a program to a tcx hook, before all others.
pub(crate) fn link_create(
    program: BorrowedFd<'_>,
    ifindex: u32,
    attach_type: u32,
) -> io::Result<OwnedFd> {
    let mut attr = LinkCreate {
        program: raw(program),
        ifindex,
        attach_type,
        flags: F_BEFORE,
        relative: 0,
        pad: 0,
        revision: 0,
    };
    // SAFETY: the structure holds no pointer.
    unsafe { bpf(command::LINK_CREATE, &mut attr) }.map(owned)
}

/// Attaches a program to a cgroup and all below, after those that are there.
pub(crate) fn link_create_cgroup(
    program: BorrowedFd<'_>,
    cgroup: BorrowedFd<'_>,
    attach_type: u32,
) -> io::Result<OwnedFd> {
    let mut attr = LinkCreate {
        program: raw(program),
        ifindex: raw(cgroup),
        attach_type,
        // A cgroup's links take no flags: they are many by nature.
        flags: 0,
        relative: 0,
        pad: 0,
        revision: 0,
    };
    // SAFETY: the structure holds no pointer.
    unsafe { bpf(command::LINK_CREATE, &mut attr) }.map(owned)
}

/// The cgroup (its inode number) and attach type of a cgroup's link; none for another object. The
/// number is 0 once the cgroup is gone.
pub(crate) fn cgroup_link(fd: BorrowedFd<'_>) -> io::Result<Option<(u64, u32)>> {
    // The start of `struct bpf_link_info`: type, id, program, padding, then of a cgroup's link its
    // number in two halves and the attach type.
    let [kind, _, _, _, low, high, attach_type, _] = info(fd)?;
    let cgroup = u64::from(low) | u64::from(high) << 32;
    Ok((kind == LINK_TYPE_CGROUP).then_some((cgroup, attach_type)))
}

/// The id, program id and interface index (0 once it is gone) of an XDP link; none for another object.
pub(crate) fn xdp_link(fd: BorrowedFd<'_>) -> io::Result<Option<(u32, u32, u32)>> {
    // The start of `struct bpf_link_info`: type, id, program, padding, then the interface.
    let [kind, id, program, _, ifindex, _, _, _] = info(fd)?;
    Ok((kind == LINK_TYPE_XDP).then_some((id, program, ifindex)))
}

/// The kernel's number of a program.
pub(crate) fn program_id(fd: BorrowedFd<'_>) -> io::Result<u32> {
    // The start of `struct bpf_prog_info`: type, id.
    let [_, id] = info(fd)?;
    Ok(id)
}

/// The number of the calling thread's network namespace, as programs see it (Linux 5.14).
pub(crate) fn netns_cookie() -> io::Result<u64> {
    /// Of `socket(7)`, include/uapi/asm-generic/socket.h.
    const SO_NETNS_COOKIE: i32 = 71;
    let socket = std::net::UdpSocket::bind((std::net::Ipv4Addr::LOCALHOST, 0))
        .or_else(|_| std::net::UdpSocket::bind((std::net::Ipv6Addr::LOCALHOST, 0)))?;
    let mut cookie = 0_u64;
    let mut length = libc::socklen_t::try_from(size_of_val(&cookie)).map_err(io::Error::other)?;
    // SAFETY: both pointers are to live, exclusive values, and the length is the first one's.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            ptr::from_mut(&mut cookie).cast(),
            &raw mut length,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(cookie)
}

/// Replaces the program of a link, atomically.
pub(crate) fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = LinkUpdate {
        link: raw(link),
        program: raw(program),
        flags: 0,
        old: 0,
    };
    // SAFETY: the structure holds no pointer.
    unsafe { bpf(command::LINK_UPDATE, &mut attr) }.map(drop)
}

/// Detaches a link at once, whoever still refers to it (Linux 5.9). Its end, by the last reference,
/// is left to a worker of the kernel, and may come later.
pub(crate) fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = LinkDetach { link: raw(link) };
    // SAFETY: the structure holds no pointer.
    unsafe { bpf(command::LINK_DETACH, &mut attr) }.map(drop)
}
