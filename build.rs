//! Links the program to a fixed address: else the loader writes some 54,000 addresses into it at every
//! start, which is a third of the time of `pipe --version`, and of the start of every worker. And
//! with what it needs of `libgcc_s` in it, which else asks the processor for its features at every
//! start; in a virtual machine each question goes to the host.

use std::path::PathBuf;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let of = |name: &str| std::env::var(name).unwrap_or_default();
    let system = (of("CARGO_CFG_TARGET_OS"), of("CARGO_CFG_TARGET_ENV"));
    let without_loader = of("CARGO_CFG_TARGET_FEATURE").split(',').any(|name| name == "crt-static");
    if system != ("linux".into(), "gnu".into()) || without_loader {
        return;
    }
    println!("cargo::rustc-link-arg-bins=-no-pie");
    if has_archive() {
        // The standard library asks for the shared one by name: this file comes first under it.
        let dir = PathBuf::from(of("OUT_DIR"));
        std::fs::write(dir.join("libgcc_s.so"), "INPUT ( -lgcc_eh -lgcc )\n").expect("it is there");
        println!("cargo::rustc-link-arg-bins=-L{}", dir.display());
    }
}

/// Whether the linker knows the part of that library that may go into a program.
fn has_archive() -> bool {
    println!("cargo::rerun-if-env-changed=RUSTC_LINKER");
    let linker = std::env::var("RUSTC_LINKER").unwrap_or_else(|_| "cc".into());
    let asked = Command::new(linker).arg("-print-file-name=libgcc_eh.a").output();
    asked.is_ok_and(|told| told.stdout.starts_with(b"/"))
}
