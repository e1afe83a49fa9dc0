//! The arguments of `pipe cache …`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};

use super::Settings;

#[derive(Subcommand)]
pub enum Cache {
    /// List results: what, for which step, its size, what it took and saved, when it was last used
    Ls(Ls),
    /// Remove what no pin, recent run or running process needs
    Gc(Gc),
    /// Keep the result of a step whatever is collected
    Pin(Pin),
    /// Take a pin away
    Unpin(Unpin),
    /// Tell what takes how much
    Du(Du),
    /// Read every byte and name what is damaged
    Verify(Verify),
    /// Make the index anew from the entries
    Rebuild(Rebuild),
    /// Make a key to sign what is pushed to a remote
    Keygen(super::Keygen),
}

/// Which cache.
#[derive(Args)]
pub struct Place {
    /// Where artifacts are kept [default: $PIPE_CACHE, else the user's cache directory]
    #[arg(long, value_name = "DIR")]
    pub cache: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Sort {
    /// The largest first
    Size,
    /// What took longest first
    Seconds,
    /// The last used first
    Used,
}

#[derive(Args)]
#[command(
    after_help = "`shared` is what other results need too: evicting one of them does not win it. What is evicted
has an entry and no bytes: it is a hit, and is made again when a step that runs needs its bytes.

Examples:
  pipe cache ls
  pipe cache ls distill --sort used
  pipe cache ls --json | jq 'map(select(.kept_by == []))'"
)]
pub struct Ls {
    /// Only results of this step (`align` means all of `align[…]`)
    pub step: Option<String>,
    /// What comes first
    #[arg(long, value_enum, value_name = "WHAT", default_value = "size")]
    pub sort: Sort,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub place: Place,
}

#[derive(Args)]
#[command(
    after_help = "Pins, results of the newest runs of each pipeline file and what running processes use stay
whatever is asked. Of the rest goes what was not used for `--older-than`; then, while there is more
than `--max-size`, what costs the fewest seconds for each byte won. Entries stay: what is evicted
is a hit still, and is made again only when a step that runs needs its bytes. It is safe beside
running work.

Examples:
  pipe cache gc --max-size 200GB --dry-run
  pipe cache gc --max-size 200GB --keep-runs 3 --older-than 30d"
)]
pub struct Gc {
    /// Evict until the cache has at most this size (`200GB`, `1.5TiB`)
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub max_size: Option<u64>,
    /// Runs of each pipeline file whose results stay
    #[arg(long, value_name = "N", default_value_t = KEEP_RUNS)]
    pub keep_runs: usize,
    /// Evict what was not used for so long (`30d`, `12h`), and remove records of runs and checkpoints
    /// of attempts that old [default for checkpoints: 14d]
    #[arg(long, value_name = "TIME", value_parser = age)]
    pub older_than: Option<Duration>,
    /// Remove the entries, too, of what `--older-than` evicts
    #[arg(long, requires = "older_than")]
    pub forget: bool,
    /// Remove also what nothing names and is younger than an hour
    #[arg(long)]
    pub no_grace: bool,
    /// Tell what would go, and remove nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub place: Place,
}

/// How many runs of each pipeline keep their results by default.
pub const KEEP_RUNS: usize = 5;

#[derive(Args)]
#[command(after_help = "Examples:
  pipe cache pin distill --reason 'the numbers of the paper'
  pipe cache pin align -f pipelines/mohawk.yaml     every `align[…]`
  pipe cache pin 3f9a01c2                           a key, or its beginning")]
pub struct Pin {
    /// Steps of the newest run in this directory (`distill`, `align[2]`), or keys
    #[arg(required = true, value_name = "STEP")]
    pub steps: Vec<String>,
    /// Why, for those who come later
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,
    #[command(flatten)]
    pub of: OfPins,
}

#[derive(Args)]
#[command(after_help = "Example:
  pipe cache unpin distill")]
pub struct Unpin {
    /// Steps of the newest run in this directory (`distill`, `align[2]`), or keys
    #[arg(required = true, value_name = "STEP")]
    pub steps: Vec<String>,
    #[command(flatten)]
    pub of: OfPins,
}

/// Where steps are looked for.
#[derive(Args)]
pub struct OfPins {
    /// Pipeline file [default: that of the newest run in this directory, with its settings]
    #[arg(short, long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    #[command(flatten)]
    pub settings: Settings,
}

#[derive(Args)]
#[command(after_help = "Example:
  pipe cache du")]
pub struct Du {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub place: Place,
}

#[derive(Args)]
#[command(
    after_help = "The exit code is 1 when something is damaged and was not moved away. What was moved away is made
again when a step needs it.

Examples:
  pipe cache verify
  pipe cache verify --repair"
)]
pub struct Verify {
    /// Move away what is damaged, so that its steps run again
    #[arg(long)]
    pub repair: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub place: Place,
}

#[derive(Args)]
#[command(
    after_help = "The index is a copy of what the entries say, and when each was last used. It may be deleted
whenever nothing runs; this makes a good one at once.

Example:
  pipe cache rebuild"
)]
pub struct Rebuild {
    #[command(flatten)]
    pub place: Place,
}

/// `200GB`, `1.5TiB`, `4096`.
fn size(text: &str) -> Result<u64, String> {
    engine::spec::parse_bytes(text).ok_or_else(|| "a size is like 200GB, 1.5TiB or 4096".into())
}

/// `30d`, `12h`.
fn age(text: &str) -> Result<Duration, String> {
    let bare = text.trim().ends_with(|c: char| c.is_ascii_digit());
    let seconds = engine::spec::parse_duration(text).filter(|_| !bare);
    seconds.map(Duration::from_secs_f64).ok_or_else(|| "a time is like 30d, 12h or 45min".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_ages() {
        assert_eq!(size("200GB"), Ok(200_000_000_000));
        assert_eq!(size("1.5 GiB"), Ok(3 << 29));
        assert_eq!(size("0"), Ok(0));
        assert_eq!(age("30d"), Ok(Duration::from_secs(30 * 86_400)));
        assert_eq!(age("12h"), Ok(Duration::from_secs(43_200)));
        for bad in ["", "GB", "200 gigs", "-1GB", "1e400GB"] {
            assert!(size(bad).unwrap_err().contains("200GB"), "{bad}");
        }
        for bad in ["30", "d", "-1d", "0d", "1y", "infd"] {
            assert!(age(bad).unwrap_err().contains("30d"), "{bad}");
        }
    }
}
