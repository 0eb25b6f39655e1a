//! Every version that the project depends on outside Cargo.lock, in one place.
//!
//! Distribution packages move on by themselves, so what is pinned there is what the build depends
//! on: the major version of LLVM (the linker must understand the compiler's bitcode), the least
//! Rust, and the series of the kernels that the tests boot.

/// bpf-linker, built from its crate against the LLVM below.
pub(crate) const BPF_LINKER: &str = "0.13.0";

/// The LLVM that bpf-linker is linked with. It reads bitcode of this and earlier majors, so the
/// compiler of the eBPF programs may not be newer.
pub(crate) const LLVM_MAJOR: u32 = 22;

/// The least Rust that compiles the eBPF programs, as (major, minor).
pub(crate) const RUST_MIN: (u32, u32) = (1, 95);

/// The least kernel that Hachi supports, as (major, minor): `bpf_redirect_peer` and friends were
/// there before, but nothing older is tested.
pub(crate) const KERNEL_MIN: (u32, u32) = (5, 15);

/// Debian's packages with a Rust new enough for the eBPF programs (its `rustc` is not).
pub(crate) const RUST_PACKAGES: [&str; 3] = ["rustc-web", "cargo-web", "rust-web-src"];

/// Debian's packages that bpf-linker is built with.
pub(crate) const LLVM_PACKAGES: [&str; 4] = ["llvm-22-dev", "g++", "zlib1g-dev", "libzstd-dev"];

/// The kernel series that `cargo xtask test vm` boots when it is not told which.
pub(crate) const VM_KERNELS: [&str; 2] = ["6.1", "6.12"];
