//! On what file system a cache lies: on a network's, locks are leases and the index is elsewhere.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::access::Access;
use crate::digest::Digest;
use crate::error::{At, Result};

/// What says that all who open this cache use leases, wherever they are: two kinds of locks on one
/// cache would be none.
const MARK: &str = "leases-only";

/// Which locks a cache gets.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Locks {
    /// Leases on a network's file system, the kernel's locks elsewhere.
    #[default]
    Auto,
    /// The kernel's, also where they work between machines by the site's word.
    Kernel,
    /// Leases.
    Leases,
}

static LOCKS: OnceLock<Locks> = OnceLock::new();
static HOME: OnceLock<PathBuf> = OnceLock::new();

/// Says once, before a cache is opened, which locks are wanted. A cache that has leases keeps them.
pub fn set_locks(locks: Locks) {
    let _ = LOCKS.set(locks);
}

/// Says once, before a cache is opened, where indexes of caches on a network's file system lie: a
/// directory on a disk of this machine. Without it they have none, which only makes them slower.
pub fn set_index_home(dir: PathBuf) {
    let _ = HOME.set(dir);
}

/// Whether locks of the cache at `root` are leases; if so, this is noted in it.
pub(crate) fn leases(root: &Path, access: &Access) -> Result<bool> {
    let mark = root.join(MARK);
    if mark.exists() {
        return Ok(true);
    }
    let wanted = match LOCKS.get().copied().unwrap_or_default() {
        Locks::Auto => is_network(root),
        Locks::Kernel => false,
        Locks::Leases => true,
    };
    if wanted {
        match File::create_new(&mark).and_then(|file| access.admit(&file)) {
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
            result => result.at("create", &mark)?,
        }
    }
    Ok(wanted)
}

/// Where the index of the cache at `root` lies, whose own place is `inside`; `None` where there is
/// no place for it.
pub(crate) fn index(root: &Path, inside: PathBuf, leases: bool) -> Option<PathBuf> {
    if !leases && !is_network(&inside) {
        return Some(inside);
    }
    let name = Digest::of(root.as_os_str().as_encoded_bytes()).to_string();
    let dir = HOME.get()?.join(&name[..16]);
    fs::create_dir_all(&dir).ok()?;
    (!is_network(&dir)).then_some(dir)
}

/// File systems that several machines may share.
fn is_network(dir: &Path) -> bool {
    const NETWORK: [i64; 14] = [
        0x6969,      // NFS
        0xfe53_4d42, // SMB2
        0xff53_4d42, // CIFS
        0x517b,      // SMB
        0x0bd0_0bd0, // Lustre
        0x4750_4653, // GPFS
        0x1983_0326, // BeeGFS
        0x00c3_6400, // Ceph
        0x0102_1997, // 9p
        0xaad7_aaea, // Panasas
        0x2003_0528, // PVFS2
        0x0747_6c75, // Gluster, by its own number
        0x5346_414f, // AFS
        0x7461_636f, // OCFS2
    ];
    rustix::fs::statfs(dir).is_ok_and(|s| {
        #[allow(clippy::unnecessary_cast)] // its width differs between targets
        let kind = s.f_type as i64 & 0xffff_ffff;
        NETWORK.contains(&kind)
    })
}
