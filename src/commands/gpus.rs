//! The GPUs that runs of this binary may use.

use std::sync::{Arc, OnceLock};

use engine::gpu::{Gpu, Gpus};

/// For tests of this program: GPUs that nobody has, `UUID` or `UUID:GIB` or `UUID:GIB:FREE_GIB` each,
/// separated by commas.
const FAKE: &str = "PIPE_FAKE_GPUS";

/// What the driver offers; asked once.
pub fn gpus() -> &'static Gpus {
    static FOUND: OnceLock<Gpus> = OnceLock::new();
    FOUND.get_or_init(|| {
        let variable = |name| std::env::var_os(name).map(|v| v.to_string_lossy().into_owned());
        match variable(FAKE) {
            None => ::stages::gpu::offered(),
            Some(text) => Gpus { list: fake(&text), ..Gpus::none(format!("{FAKE} names none")) }
                .visible(variable("CUDA_VISIBLE_DEVICES").as_deref()),
        }
    })
}

fn fake(text: &str) -> Vec<Gpu> {
    let gpu = |(index, text): (u32, &str)| {
        let mut parts = text.split(':');
        let uuid = parts.next().unwrap_or_default().to_string();
        let mut gib = || Some(parts.next()?.parse::<u64>().ok()? << 30);
        let memory = gib().unwrap_or(80 << 30);
        let free = gib().unwrap_or(memory);
        let (name, free) = ("Fake".to_string(), Arc::new(move || Some(free)));
        Gpu { uuid, index, name, capability: (9, 0), memory, free }
    };
    (0..).zip(text.split(',').filter(|text| !text.is_empty())).map(gpu).collect()
}
