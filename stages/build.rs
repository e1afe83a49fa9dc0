//! Compiles the kernels of `kernels/*.cu`: by nvcc for feature `cuda`, by the C++ compiler on top
//! of `kernels/emulate.h` for feature `emulate`. The default build has neither and does nothing.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=kernels");
    let sources = sources(Path::new("kernels"));
    if env::var_os("CARGO_FEATURE_CUDA").is_some() {
        cuda(&sources);
    }
    #[cfg(feature = "emulate")]
    emulate(&sources);
}

fn sources(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).expect("the folder of kernels is there");
    let mut found: Vec<PathBuf> = entries.map(|entry| entry.expect("readable").path()).collect();
    found.retain(|path| path.extension().is_some_and(|e| e == "cu"));
    found.sort();
    found
}

/// One fat binary a file: machine code for Hopper, and PTX that the driver compiles for others.
fn cuda(sources: &[PathBuf]) {
    println!("cargo::rerun-if-env-changed=CUDA_HOME");
    println!("cargo::rerun-if-env-changed=PIPE_CUDA_CODE");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("set by cargo"));
    let nvcc = match env::var_os("CUDA_HOME") {
        Some(home) => Path::new(&home).join("bin/nvcc"),
        None => PathBuf::from("nvcc"),
    };
    let mut list = String::from("&[\n");
    let mut running = Vec::new();
    let limit = std::thread::available_parallelism().map_or(1, usize::from);
    for source in sources {
        let name = source.file_stem().expect("has a name").to_string_lossy().into_owned();
        let to = out.join(format!("{name}.fatbin"));
        if newer(&to, source) {
            list += &format!("    ({name:?}, include_bytes!({:?})),\n", to.display().to_string());
            continue;
        }
        list += &format!("    ({name:?}, include_bytes!({:?})),\n", to.display().to_string());
        if running.len() >= limit {
            finish(running.remove(0));
        }
        let mut command = Command::new(&nvcc);
        command.args(["-std=c++17", "-O3", "-fatbin", "-I", "kernels", "-o"]).arg(&to).arg(source);
        command.arg("-gencode=arch=compute_90a,code=sm_90a");
        // `PIPE_CUDA_CODE=sm_90a` leaves the PTX out: faster to build while working on kernels.
        if code() != "sm_90a" {
            command.arg("-gencode=arch=compute_80,code=compute_80");
        }
        if let Some(compiler) = env::var_os("NVCC_CCBIN") {
            command.arg("-ccbin").arg(compiler);
        }
        let child = command.spawn().unwrap_or_else(|error| {
            panic!(
                "feature `cuda` needs NVIDIA's compiler, but `{}` could not be started ({error}): \
                 install the CUDA toolkit (13) and put nvcc on the PATH, or set \
                 CUDA_HOME",
                nvcc.display()
            )
        });
        fs::write(to.with_extension("code"), code()).expect("cargo's folder can be written");
        running.push((name, child));
    }
    running.into_iter().for_each(finish);
    list += "]\n";
    fs::write(out.join("kernels.rs"), list).expect("cargo's folder can be written");
}

/// Whether `made` is newer than its source and every header, so that one changed kernel does not
/// cost minutes.
fn newer(made: &Path, source: &Path) -> bool {
    let time = |path: &Path| fs::metadata(path).and_then(|meta| meta.modified()).ok();
    let headers = fs::read_dir("kernels").into_iter().flatten().flatten().map(|entry| entry.path());
    let headers = headers.filter(|path| path.extension().is_some_and(|e| e == "cuh"));
    let newest = headers.chain([source.to_path_buf()]).filter_map(|path| time(&path)).max();
    let same = fs::read_to_string(made.with_extension("code")).unwrap_or_default() == code();
    same && time(made).zip(newest).is_some_and(|(made, newest)| made > newest)
}

/// Which machine code is asked for.
fn code() -> String {
    env::var("PIPE_CUDA_CODE").unwrap_or_default()
}

fn finish((name, mut child): (String, std::process::Child)) {
    let status = child.wait().expect("nvcc was started");
    assert!(status.success(), "nvcc failed on kernels/{name}.cu, see above");
}

#[cfg(feature = "emulate")]
fn emulate(sources: &[PathBuf]) {
    let mut build = cc::Build::new();
    build.cpp(true).std("c++20").opt_level(2).warnings(false).cargo_metadata(false);
    build.define("PIPE_EMULATE", None).include("kernels").flag("-xc++").flag("-w");
    build.files(sources).file("kernels/emulate.cpp");
    build.compile("kernels_emulated");
    // Kernels register themselves before `main`: nothing refers to them by name.
    let out = env::var("OUT_DIR").expect("set by cargo");
    println!("cargo::rustc-link-search=native={out}");
    println!("cargo::rustc-link-lib=static:+whole-archive=kernels_emulated");
    println!("cargo::rustc-link-lib=stdc++");
}
