//! How a run uses Slurm: `executor: { slurm: … }` of a pipeline or of the user's configuration.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// One job a step, or a few jobs that take many steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Pilots for many short steps, else one job a step.
    #[default]
    Auto,
    /// One job a step; like steps as one array.
    Submit,
    /// A few jobs in which a worker takes step after step.
    Pilot,
}

/// By what leader and nodes share results.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Store {
    /// All see the leader's cache under the same path.
    #[default]
    Shared,
    /// All reach the run's remote; each node has a cache of its own.
    Remote,
}

/// What a site and a pipeline want.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Partition of the jobs.
    pub partition: Option<String>,
    /// Account they are charged to.
    pub account: Option<String>,
    /// Quality of service.
    pub qos: Option<String>,
    /// Wall time of jobs whose step says none: `30m`, `4h`.
    pub time: Option<Duration>,
    /// Memory of jobs whose step says none: `8GiB`.
    pub memory: Option<Bytes>,
    /// Cpus of steps that take all there are.
    pub cpus: Option<u32>,
    /// More arguments of every `sbatch`.
    pub extra: Vec<String>,
    /// One job a step, or pilots.
    pub mode: Mode,
    /// Steps that are queued or running at a time.
    pub max_jobs: u32,
    /// Pilots of one shape at a time.
    pub pilots: u32,
    /// After so long without a step a pilot ends.
    pub idle: Duration,
    /// So long before the end of its time a step saves a checkpoint and stops.
    pub margin: Duration,
    /// The longest pause between two questions to Slurm.
    pub poll: Duration,
    /// The `pipe` that nodes run, if it is not the leader's own.
    pub program: Option<PathBuf>,
    /// Lines of the job's script before it: `module load cuda`.
    pub setup: Vec<String>,
    /// By what leader and nodes share results.
    pub store: Store,
    /// Where a node keeps its cache, if that is its own; `$NAME` is a variable of the job.
    pub node_cache: Option<String>,
    /// Wall time of the leader's own job (`--detach`).
    pub leader_time: Option<Duration>,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            partition: None,
            account: None,
            qos: None,
            time: None,
            memory: None,
            cpus: None,
            extra: Vec::new(),
            mode: Mode::Auto,
            max_jobs: 500,
            pilots: 8,
            idle: Duration(30.0),
            margin: Duration(120.0),
            poll: Duration(60.0),
            program: None,
            setup: Vec::new(),
            store: Store::Shared,
            node_cache: None,
            leader_time: None,
        }
    }
}

/// Seconds; written as `90`, `10m`, `2h`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "serde_json::Value")]
pub struct Duration(pub f64);

/// Bytes; written as `8GiB` or a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "serde_json::Value")]
pub struct Bytes(pub u64);

fn text(value: &serde_json::Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_string)
}

impl TryFrom<serde_json::Value> for Duration {
    type Error = String;
    fn try_from(value: serde_json::Value) -> Result<Duration, String> {
        let text = text(&value);
        let seconds = crate::spec::parse_duration(&text);
        seconds.map(Duration).ok_or(format!("`{text}` is no duration: write `90`, `10m` or `2h`"))
    }
}

impl TryFrom<serde_json::Value> for Bytes {
    type Error = String;
    fn try_from(value: serde_json::Value) -> Result<Bytes, String> {
        let text = text(&value);
        let bytes = crate::spec::parse_bytes(&text);
        bytes.map(Bytes).ok_or(format!("`{text}` is no size: write `8GiB` or bytes"))
    }
}

impl Settings {
    /// Reads the block that stands under `slurm:`.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn parse(block: &serde_json::Value) -> Result<Settings, String> {
        if block.is_null() {
            return Ok(Settings::default());
        }
        let settings: Settings =
            serde_json::from_value(block.clone()).map_err(|error| error.to_string())?;
        if settings.max_jobs == 0 || settings.pilots == 0 {
            return Err("`max_jobs` and `pilots` are above 0".into());
        }
        if (settings.store, settings.mode) == (Store::Remote, Mode::Pilot) {
            return Err("`mode: pilot` needs a directory that leader and nodes share, and `store: remote` has none\nhint: leave `mode` out, or write `mode: submit`".into());
        }
        Ok(settings)
    }

    /// What `over` says, and what this says where it says nothing.
    ///
    /// # Errors
    /// As [`Settings::parse`].
    pub fn layered(
        under: &serde_json::Value,
        over: &serde_json::Value,
    ) -> Result<Settings, String> {
        let mut both = match under {
            serde_json::Value::Object(map) => map.clone(),
            _ => Default::default(),
        };
        if let serde_json::Value::Object(map) = over {
            both.extend(map.clone());
        }
        Settings::parse(&serde_json::Value::Object(both))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_block_is_read_and_laid_over_another() {
        let site = json!({ "partition": "gpu", "time": "2h", "memory": "8GiB" });
        let mine = json!({ "time": 90, "mode": "pilot", "extra": ["--nice"] });
        let settings = Settings::layered(&site, &mine).unwrap();
        assert_eq!(settings.partition.as_deref(), Some("gpu"));
        assert_eq!((settings.time, settings.memory), (Some(Duration(90.0)), Some(Bytes(8 << 30))));
        assert_eq!((settings.mode, settings.max_jobs), (Mode::Pilot, 500));
        assert_eq!(Settings::parse(&json!(null)), Ok(Settings::default()));
    }

    #[test]
    fn mistakes_are_told() {
        let error = |block| Settings::parse(&block).unwrap_err();
        assert!(error(json!({ "partitoin": "x" })).contains("partitoin"));
        assert!(error(json!({ "time": "soon" })).contains("no duration"));
        assert!(error(json!({ "mode": "both" })).contains("both"));
        assert!(error(json!({ "pilots": 0 })).contains("above 0"));
        assert!(error(json!({ "store": "remote", "mode": "pilot" })).contains("mode: submit"));
    }
}
