//! Linker flags of the object.

fn main() {
    // Copies of tuples and entries become a few wide loads and stores. By default bpf-linker has
    // LLVM keep the order of memcpy's, and then every memset and memmove is a loop over bytes.
    println!("cargo::rustc-link-arg-bins=--disable-expand-memcpy-in-order");
    println!("cargo::rerun-if-changed=build.rs");
}
