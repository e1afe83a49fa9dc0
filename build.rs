//! Links the program to a fixed address: else the loader writes some 54,000 addresses into it at every
//! start, which is a third of the time of `pipe --version`, and of the start of every worker.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let of = |name: &str| std::env::var(name).unwrap_or_default();
    let system = (of("CARGO_CFG_TARGET_OS"), of("CARGO_CFG_TARGET_ENV"));
    let without_loader = of("CARGO_CFG_TARGET_FEATURE").split(',').any(|name| name == "crt-static");
    if system == ("linux".into(), "gnu".into()) && !without_loader {
        println!("cargo::rustc-link-arg-bins=-no-pie");
    }
}
