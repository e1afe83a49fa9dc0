//! What this machine has: memory, within the limits of its control groups, and room on a disk.

use std::fs;
use std::path::{Path, PathBuf};

/// Bytes of memory that processes of this one can have, without swap: the machine's, or what the
/// narrowest of the control groups around this process allows.
pub fn memory() -> u64 {
    let limits = groups().into_iter().flat_map(|group| limits(&group, ["memory.max", V1]));
    limits.fold(whole().0, u64::min)
}

/// The same with swap: with less nothing runs, however slowly.
pub fn memory_and_swap() -> u64 {
    let (memory, swap) = whole();
    let whole = memory + swap;
    let both = |group: &PathBuf| {
        let memory = limits(group, ["memory.max"]).next()?;
        Some(memory.saturating_add(limits(group, ["memory.swap.max"]).next().unwrap_or(whole)))
    };
    let groups = groups();
    let unified = groups.iter().filter_map(both);
    let old = groups.iter().flat_map(|group| limits(group, ["memory.memsw.limit_in_bytes"]));
    unified.chain(old).fold(whole, u64::min)
}

/// The limit of a control group of the first version.
const V1: &str = "memory.limit_in_bytes";

/// Bytes of the machine's memory, and of its swap.
fn whole() -> (u64, u64) {
    let told = rustix::system::sysinfo();
    let unit = u64::from(told.mem_unit.max(1));
    (told.totalram * unit, told.totalswap * unit)
}

/// Directories of the control groups around this process, from its own to the root of each kind.
fn groups() -> Vec<PathBuf> {
    let text = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    groups_of(&text).into_iter().filter(|group| group.is_dir()).collect()
}

fn groups_of(text: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for line in text.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(kinds), Some(path)) = (parts.next(), parts.next()) else { continue };
        let root = match kinds {
            "" => Path::new("/sys/fs/cgroup"),
            kinds if kinds.split(',').any(|kind| kind == "memory") => {
                Path::new("/sys/fs/cgroup/memory")
            }
            _ => continue,
        };
        let below = Path::new(path.trim_start_matches('/'));
        found.extend(below.ancestors().map(|path| root.join(path)));
    }
    found
}

/// What the files `names` of a group say, where that is a limit.
fn limits<const N: usize>(group: &Path, names: [&str; N]) -> impl Iterator<Item = u64> + use<N> {
    let read = |name: &str| fs::read_to_string(group.join(name)).ok()?.trim().parse::<u64>().ok();
    names.map(read).into_iter().flatten()
}

/// Bytes of room for one more step on the disk of the cache at `root`: what is free, and what
/// attempts that were broken off take, which may be theirs to use. `None` where files take less than
/// their length, since the file system compresses them.
pub fn room(root: &Path) -> Option<u64> {
    const COMPRESSING: [u64; 3] = [0x9123_683e, 0x2fc1_2fc1, 0xca45_1a4e]; // btrfs, zfs, bcachefs
    let kind = rustix::fs::statfs(root).ok()?.f_type as u64 & 0xffff_ffff;
    if COMPRESSING.contains(&kind) {
        return None;
    }
    let told = rustix::fs::statvfs(root).ok()?;
    let free = told.f_bavail.saturating_mul(told.f_frsize);
    Some(free.saturating_add(size(&root.join("attempts"))))
}

/// Bytes of all files below `dir`.
fn size(dir: &Path) -> u64 {
    let Ok(items) = fs::read_dir(dir) else { return 0 };
    let one = |item: fs::DirEntry| match item.metadata() {
        Ok(meta) if meta.is_dir() => size(&item.path()),
        Ok(meta) => meta.len(),
        Err(_) => 0,
    };
    items.flatten().map(one).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_of_both_versions_are_followed_to_their_root() {
        let names = |text: &str| -> Vec<String> {
            groups_of(text).iter().map(|path| path.display().to_string()).collect()
        };
        assert_eq!(
            names("0::/user/job\n"),
            ["/sys/fs/cgroup/user/job", "/sys/fs/cgroup/user", "/sys/fs/cgroup/"]
        );
        assert_eq!(
            names("12:cpu,memory:/a\n3:cpuset:/b\n"),
            ["/sys/fs/cgroup/memory/a", "/sys/fs/cgroup/memory/"]
        );
        assert_eq!(names("nonsense"), Vec::<String>::new());
    }

    #[test]
    fn limits_are_numbers_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("memory.max"), "max\n").unwrap();
        assert_eq!(limits(dir.path(), ["memory.max", V1]).next(), None);
        fs::write(dir.path().join("memory.max"), "1048576\n").unwrap();
        assert_eq!(limits(dir.path(), ["memory.max", V1]).next(), Some(1 << 20));
    }

    #[test]
    fn a_machine_has_memory_and_broken_off_attempts_are_room() {
        assert!(memory() > 1 << 20 && memory_and_swap() >= memory());
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("attempts/a/b")).unwrap();
        fs::write(dir.path().join("attempts/a/b/x"), [0; 1000]).unwrap();
        assert_eq!(size(dir.path()), 1000);
        assert!(room(dir.path()).is_none_or(|room| room >= 1000));
    }
}
