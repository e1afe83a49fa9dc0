//! Named places where a test may kill the process, as a power switch would (`loss.rs`: what that
//! takes along). Compiled out of release builds.

/// Ends the process by SIGKILL here when `PIPE_CRASH_AT` is this name, or `name@n` at the n-th
/// time this place is reached.
#[macro_export]
macro_rules! crash_point {
    ($name:literal) => {
        #[cfg(debug_assertions)]
        {
            static REACHED: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
            $crate::crash::reached($name, &REACHED);
        }
    };
}

#[cfg(debug_assertions)]
#[doc(hidden)]
pub fn reached(name: &str, times: &std::sync::atomic::AtomicU64) {
    static WANTED: std::sync::LazyLock<Option<(String, u64)>> = std::sync::LazyLock::new(|| {
        let text = std::env::var("PIPE_CRASH_AT").ok()?;
        Some(match text.rsplit_once('@') {
            Some((name, n)) => (name.to_string(), n.parse().ok()?),
            None => (text, 1),
        })
    });
    let Some((wanted, n)) = &*WANTED else { return };
    if wanted == name && times.fetch_add(1, std::sync::atomic::Ordering::SeqCst) + 1 == *n {
        crate::loss::lose();
        let _ =
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        std::process::abort();
    }
}

#[cfg(test)]
mod tests {
    /// The lists of points that tests come by are compared with the sources; this one is in none.
    #[test]
    fn another_name_does_nothing() {
        crate::crash_point!("never");
    }
}
