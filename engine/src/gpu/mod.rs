//! GPUs as plain data. Whoever fills it knows a driver; nobody here does.
//!
//! `lock` says whose a GPU is on this machine, `desk` hands GPUs out to the steps of a run.

pub(crate) mod desk;
pub mod lock;

use std::fmt;
use std::sync::Arc;

/// Asks the driver for the bytes of a GPU that are free now; `None` when it does not tell.
pub type Free = Arc<dyn Fn() -> Option<u64> + Send + Sync>;

/// One GPU of this machine.
#[derive(Clone)]
pub struct Gpu {
    /// As the driver names it: `GPU-…`. What a worker gets as CUDA_VISIBLE_DEVICES.
    pub uuid: String,
    /// Its number, for people.
    pub index: u32,
    /// `NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// Compute capability, `(9, 0)`.
    pub capability: (u32, u32),
    /// Bytes in all.
    pub memory: u64,
    /// Bytes that are free now. Asked in the leader, before a step that wants some is launched.
    pub free: Free,
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self} {}", self.uuid)
    }
}

impl fmt::Display for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GPU {} ({})", self.index, self.name)
    }
}

/// The GPUs that a run may use, and why there are no more.
#[derive(Clone, Debug)]
pub struct Gpus {
    /// In the order in which they are handed out.
    pub list: Vec<Gpu>,
    /// Why it is empty, as half a sentence: `this build has no CUDA`.
    pub without: String,
    /// Why stages cannot compute on them though they are there: programs may.
    pub blind: Option<String>,
}

impl Default for Gpus {
    fn default() -> Gpus {
        Gpus::none("nobody looked for one")
    }
}

impl Gpus {
    /// None, and why.
    pub fn none(why: impl Into<String>) -> Gpus {
        Gpus { list: Vec::new(), without: why.into(), blind: None }
    }

    /// Those of `found` with at least this compute capability.
    pub fn able(found: Vec<Gpu>, least: (u32, u32)) -> Gpus {
        let Some(first) = found.first() else {
            return Gpus::none("this machine has no NVIDIA GPU");
        };
        let ((major, minor), (a, b)) = (first.capability, least);
        let without = format!("{first} has compute capability {major}.{minor}, below {a}.{b}");
        let list = found.into_iter().filter(|gpu| gpu.capability >= least).collect();
        Gpus { list, without, blind: None }
    }

    /// `count` GPUs of a cluster's nodes, of which nothing else is known.
    pub fn elsewhere(count: u32, without: &str, blind: Option<String>) -> Gpus {
        let gpu = |index| Gpu {
            uuid: format!("cluster-{index}"),
            index,
            name: "of a cluster".into(),
            capability: (0, 0),
            memory: u64::MAX,
            free: Arc::new(|| None),
        };
        Gpus { list: (0..count).map(gpu).collect(), without: without.into(), blind }
    }

    /// What CUDA_VISIBLE_DEVICES leaves of them: indices and UUIDs (or their beginnings), the first
    /// wrong one ends the list, as CUDA reads it. Without the variable all.
    pub fn visible(self, variable: Option<&str>) -> Gpus {
        let Some(text) = variable.filter(|_| !self.list.is_empty()) else { return self };
        let mut list: Vec<Gpu> = Vec::new();
        for word in text.split(',').map(str::trim) {
            let named = |gpu: &&Gpu| match word.parse::<u32>() {
                Ok(index) => gpu.index == index,
                Err(_) => !word.is_empty() && gpu.uuid.starts_with(word),
            };
            let mut found = self.list.iter().filter(named);
            let (Some(gpu), None) = (found.next(), found.next()) else { break };
            if list.iter().all(|other| other.uuid != gpu.uuid) {
                list.push(gpu.clone());
            }
        }
        let without = match text.trim().is_empty() {
            true => "CUDA_VISIBLE_DEVICES is empty".to_string(),
            false => {
                format!("CUDA_VISIBLE_DEVICES={text} names none of this machine's usable GPUs")
            }
        };
        Gpus { list, without, blind: self.blind }
    }
}

/// `79.6 GiB`, `512 MiB`.
pub(crate) fn size(bytes: u64) -> String {
    const MIB: f64 = (1 << 20) as f64;
    match bytes as f64 / MIB {
        mib if mib >= 1024.0 => format!("{:.1} GiB", mib / 1024.0),
        mib => format!("{mib:.0} MiB"),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A GPU that nobody has.
    pub(crate) fn fake(index: u32, memory: u64, free: u64) -> Gpu {
        let (name, uuid) = ("Fake".to_string(), format!("GPU-fake-{index}"));
        let free: Free = Arc::new(move || Some(free));
        Gpu { uuid, index, name, capability: (9, 0), memory, free }
    }

    #[test]
    fn cuda_visible_devices_is_read_as_cuda_reads_it() {
        let cases = [
            (None, "0 1 2 10"),
            (Some(""), ""),
            (Some("-1"), ""),
            (Some("1"), "1"),
            (Some("2,0"), "2 0"),
            (Some(" 1 , GPU-fake-2"), "1 2"),
            (Some("GPU-fake-2,2"), "2"),
            (Some("0,7,1"), "0"),
            (Some("GPU-fake"), ""),
            (Some("GPU-fake-1"), ""), // also the beginning of GPU-fake-10
            (Some("GPU-fake-10"), "10"),
            (Some("0,,1"), "0"),
            (Some("NoDevFiles"), ""),
        ];
        for (variable, wanted) in cases {
            let list = [0, 1, 2, 10].map(|index| fake(index, 1, 1)).to_vec();
            let gpus = Gpus { list, ..Gpus::none("") }.visible(variable);
            let left: Vec<String> = gpus.list.iter().map(|gpu| gpu.index.to_string()).collect();
            assert_eq!(left.join(" "), wanted, "{variable:?}");
        }
    }

    #[test]
    fn why_there_is_none_is_told() {
        let old = |index| Gpu { capability: (7, 5), ..fake(index, 1, 1) };
        let without = |gpus: Gpus| {
            assert!(gpus.list.is_empty());
            gpus.without
        };
        let least = (8, 0);
        assert_eq!(without(Gpus::able(vec![], least)), "this machine has no NVIDIA GPU");
        let text = "GPU 3 (Fake) has compute capability 7.5, below 8.0";
        assert_eq!(without(Gpus::able(vec![old(3), old(4)], least)), text);
        assert_eq!(without(Gpus::able(vec![old(3)], least).visible(Some(""))), text);
        let gpus = Gpus::able(vec![old(0), fake(1, 1, 1)], least);
        assert_eq!(gpus.list.len(), 1);
        assert_eq!(without(gpus.clone().visible(Some(" "))), "CUDA_VISIBLE_DEVICES is empty");
        let text = "CUDA_VISIBLE_DEVICES=0 names none of this machine's usable GPUs";
        assert_eq!(without(gpus.visible(Some("0"))), text);
    }

    #[test]
    fn sizes_are_short() {
        let told = [0, 5 << 20, 1 << 30, (80 << 30) - (400 << 20)].map(size);
        assert_eq!(told, ["0 MiB", "5 MiB", "1.0 GiB", "79.6 GiB"]);
    }
}
