//! Ends every process below this one. With the subreaper flag set, a grandchild whose parent died
//! comes to us, so nothing can slip away by forking twice.

use std::collections::HashMap;
use std::time::Duration;

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, WaitOptions};

/// Makes orphaned descendants children of this process.
pub fn adopt() {
    let _ = rustix::process::set_child_subreaper(Some(rustix::process::getpid()));
}

/// Kills all descendants of this process but the `spared` children and theirs, until none is left.
pub fn kill_all(spared: &[u32]) {
    if spared.is_empty() && childless() {
        return;
    }
    let me = std::process::id();
    for _ in 0..200 {
        let below = below(me, spared);
        for &pid in &below {
            if let Some(pid) = Pid::from_raw(pid as i32) {
                let _ = rustix::process::kill_process(pid, Signal::KILL);
                let _ = rustix::process::waitpid(Some(pid), WaitOptions::NOHANG);
            }
        }
        if below.is_empty() {
            return;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The common case, told by one system call.
fn childless() -> bool {
    let any = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    matches!(rustix::process::waitid(WaitId::All, any), Err(rustix::io::Errno::CHILD))
}

/// Living processes below `root`, without the `spared` subtrees.
fn below(root: u32, spared: &[u32]) -> Vec<u32> {
    let mut children: HashMap<u32, Vec<u32>> = HashMap::new();
    let Ok(items) = std::fs::read_dir("/proc") else { return Vec::new() };
    for item in items.flatten() {
        let Some(pid) = item.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        if let Some(parent) = parent_of(pid) {
            children.entry(parent).or_default().push(pid);
        }
    }
    let mut found = Vec::new();
    let mut stack = vec![root];
    while let Some(pid) = stack.pop() {
        for &child in children.get(&pid).into_iter().flatten() {
            if !spared.contains(&child) {
                found.push(child);
                stack.push(child);
            }
        }
    }
    found
}

/// Fields after the last `)` of `/proc/PID/stat`: state, parent, …
fn parent_of(pid: u32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}
