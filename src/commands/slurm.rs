//! `--on slurm`: settings of pipeline and user, what the site has, which steps pilots run.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use ::cache::Cache;
use ::cache::remote::Remote;
use anyhow::{Context as _, Result, anyhow, bail};
use engine::cluster::slurm::{Site, Slurm, leader_arguments};
use engine::cluster::{Mode, Settings, Setup, Store, journal};
use engine::executor::OnCluster;
use engine::gpu::Gpus;
use engine::pool::Crew;
use engine::price::{self, Past};
use engine::run::Record;
use engine::spec::Loaded;

use super::Wrong;
use crate::cli::Run;
use crate::out;

/// Up to so many seconds a step is short.
const SHORT: f64 = 300.0;
/// From so many short steps on pilots take them.
const MANY: usize = 8;
/// From so many steps of one kind on, of which nothing is known, pilots take them.
const MANY_UNKNOWN: usize = 32;
/// Of a step that takes all cpus there are, at most.
const CPUS: u32 = 16;

/// A site that answered.
pub struct Slurmed {
    slurm: Slurm,
    site: Site,
}

/// Slurm, if the run is to be on it.
///
/// # Errors
/// What is missing, in one line.
pub fn prepare(args: &Run) -> Result<Option<Slurmed>> {
    if args.on != crate::cli::Place::Slurm {
        return Ok(None);
    }
    let slurm = slurm(args)?;
    let site = slurm.site().map_err(|why| {
        anyhow!(Wrong(format!("`--on slurm` needs a Slurm that answers, and {why}")))
    })?;
    Ok(Some(Slurmed { slurm, site }))
}

fn slurm(args: &Run) -> Result<Slurm> {
    Ok(Slurm::new(settings(args.file.as_deref(), &args.settings)?, hidden()))
}

/// What user and pipeline say of Slurm.
pub fn settings(file: Option<&Path>, of: &crate::cli::Settings) -> Result<Settings> {
    let options = super::spec_options(of, Gpus::default())?;
    let said = match file {
        Some(file) => engine::spec::executor(file, None, &options),
        None => {
            let (name, text) = super::EMBEDDED;
            engine::spec::executor(Path::new(name), Some(text), &options)
        }
    };
    let config = super::remote::config()?;
    let own = config.executor.get("slurm").cloned().unwrap_or_default();
    let settings = Settings::layered(&own, &said["slurm"]);
    settings.map_err(|why| anyhow!(Wrong(format!("`executor: slurm:` {why}"))))
}

/// Slurm for commands about jobs that are there.
pub fn of_jobs() -> Slurm {
    Slurm::new(Settings::default(), hidden())
}

/// What this process has of a job it is in, or of a GPU, is not for the jobs it submits.
fn hidden() -> Vec<String> {
    let names = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
    let hide = |name: &String| {
        // Also defaults of Slurm's commands: one for `squeue` would hide jobs that go on.
        let of = ["SLURM_", "SBATCH_", "SQUEUE_", "SACCT_", "SCANCEL_", "SINFO_", "SCONTROL_"];
        let slurm = of.iter().any(|of| name.starts_with(of));
        let needed = ["SLURM_CONF", "SLURM_CLUSTERS", "SBATCH_ACCOUNT", "SBATCH_QOS"];
        let needed = needed.contains(&name.as_str());
        let device = ["CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL"];
        (slurm && !needed) || device.contains(&name.as_str())
    };
    names.filter(hide).collect()
}

impl Slurmed {
    /// GPUs of the site's nodes.
    pub fn gpus(&self) -> Gpus {
        let blind = (!cfg!(feature = "cuda")).then(|| "this build has no CUDA".to_string());
        Gpus::elsewhere(self.site.gpus, "the partition's nodes have none", blind)
    }

    /// How steps become jobs.
    pub fn options(&self, args: &Run, loaded: &Loaded, cache: &Cache) -> OnCluster {
        let settings = &self.slurm.settings;
        let cpus = settings.cpus.or(args.jobs).unwrap_or(CPUS);
        let mut on = OnCluster {
            jobs: settings.max_jobs,
            cpus: cpus.min(self.site.cpus).max(1),
            memory: settings.memory.map_or(0, |memory| memory.0),
            time_s: settings.time.map(|time| time.0.ceil() as u64),
            pilots: BTreeSet::new(),
            remote: settings.store == Store::Remote,
        };
        on.pilots = match settings.mode {
            // A queue of pilots is a directory.
            _ if on.remote => BTreeSet::new(),
            Mode::Submit => BTreeSet::new(),
            Mode::Pilot => (0..loaded.plan.steps.len()).collect(),
            Mode::Auto => short_ones(loaded, cache),
        };
        on
    }

    /// Says what is missing where results are shared by a remote.
    ///
    /// # Errors
    /// There is none.
    pub fn check(&self, remote: Option<&Remote>) -> Result<()> {
        if self.slurm.settings.store == Store::Remote && remote.is_none() {
            bail!(Wrong("`store: remote` of `executor: slurm:` needs a remote that nodes reach too, and none is named; hint: give `--remote s3://bucket/prefix`, set PIPE_REMOTE, or write `remote:` into the configuration".into()));
        }
        Ok(())
    }

    /// The crew of the run that `record` keeps.
    pub fn crew(self, record: &Record, cache: &Cache, remote: Option<&Remote>) -> Result<Crew> {
        // Every step that waits or runs holds two locks.
        let limit = rustix::process::Resource::Nofile;
        let mut files = rustix::process::getrlimit(limit);
        files.current = files.maximum;
        let _ = rustix::process::setrlimit(limit, files);
        let program = match &self.slurm.settings.program {
            Some(program) => program.clone(),
            None => std::env::current_exe().context("cannot tell where this program is")?,
        };
        let earlier: Vec<PathBuf> = engine::run::all(cache)
            .into_iter()
            .filter(|dir| *dir != record.dir && journal::is_open(dir))
            .collect();
        Ok(Crew::Cluster(Box::new(Setup {
            settings: self.slurm.settings.clone(),
            run: record.dir.clone(),
            id: record.info.id.clone(),
            program,
            max_array: self.site.max_array,
            nodes: self.site.nodes as usize,
            default_s: self.site.default_s,
            earlier,
            remote: remote.filter(|_| self.slurm.settings.store == Store::Remote).cloned(),
            batch: Box::new(self.slurm),
        })))
    }
}

/// Steps that pilots had better run: many that are known to be short, or many of one kind.
fn short_ones(loaded: &Loaded, cache: &Cache) -> BTreeSet<usize> {
    let mut groups: BTreeMap<(&str, &str), Vec<usize>> = BTreeMap::new();
    for (at, step) in loaded.plan.steps.iter().enumerate() {
        groups.entry((&step.stage, &step.group)).or_default().push(at);
    }
    let (mut short, mut pilots) = (Vec::new(), BTreeSet::new());
    for ((stage, _), steps) in groups {
        let first = &loaded.plan.steps[steps[0]];
        let like = cache.recent(stage, &first.name, 8).into_iter().filter_map(Past::of);
        match price::price(first, &like.collect::<Vec<_>>(), &|_| None) {
            Some(price) if price.seconds <= SHORT => short.extend(steps),
            Some(_) => {}
            None if steps.len() >= MANY_UNKNOWN => pilots.extend(steps),
            None => {}
        }
    }
    if short.len() >= MANY {
        pilots.extend(short);
    }
    pilots
}

/// What Ctrl-C does to a run on a cluster: on a terminal it asks, elsewhere jobs go on.
pub fn interrupted(run: &str, interrupts: &'static AtomicU32, leave: &'static AtomicBool) {
    static ASKING: AtomicBool = AtomicBool::new(false);
    let asking = ASKING.swap(true, Ordering::Relaxed);
    let terminal = std::io::stdin().is_terminal() && std::io::stderr().is_terminal();
    if asking || !terminal {
        out::message(format!(
            "stopping; jobs of this run go on: `pipe run` goes on with them, `pipe cancel {run}` ends them"
        ));
        leave.store(true, Ordering::Relaxed);
        interrupts.fetch_add(1, Ordering::Relaxed);
        return;
    }
    let run = run.to_string();
    std::thread::spawn(move || {
        let mut err = std::io::stderr();
        let _ = write!(
            err,
            "\nleave the jobs of this run to go on [l], cancel them [c], or go on here [any other key]? "
        );
        let _ = err.flush();
        let mut line = String::new();
        let _ = BufReader::new(std::io::stdin()).read_line(&mut line);
        match line.trim() {
            "l" | "leave" => {
                ASKING.store(true, Ordering::Relaxed);
                interrupted(&run, interrupts, leave);
            }
            "c" | "cancel" => drop(interrupts.fetch_add(1, Ordering::Relaxed)),
            _ => ASKING.store(false, Ordering::Relaxed),
        }
    });
}

/// `pipe run --detach`: the leader itself becomes a job.
pub fn detach(args: &Run) -> Result<ExitCode> {
    let slurm = slurm(args)?;
    let program = std::env::current_exe().context("cannot tell where this program is")?;
    let cwd = std::env::current_dir()?;
    let words = std::env::args().skip(1).filter(|word| word != "--detach");
    let mut command = vec![program.display().to_string()];
    command.extend(words);
    let cd = format!("cd {} || exit 1", engine::cluster::shell_word(&cwd.display().to_string()));
    let mut setup = slurm.settings.setup.clone();
    setup.push(cd);
    let text = engine::cluster::job_script(&setup, &command, "");
    let script = std::env::temp_dir().join(format!("pipe-leader-{}.sh", std::process::id()));
    std::fs::write(&script, text).with_context(|| format!("cannot write {}", script.display()))?;
    let arguments = leader_arguments(&slurm.settings, "pipe-leader", &cwd, &script);
    let submitted = slurm.submit_script(&arguments);
    let _ = std::fs::remove_file(&script);
    match submitted {
        Ok(id) => {
            out::line(format!(
                "job {id} leads the run; it writes to pipe-leader-{id}.log, `pipe status` tells how far it is"
            ));
            Ok(ExitCode::SUCCESS)
        }
        Err(why) => bail!(Wrong(format!("the leader's job was not submitted: {why}"))),
    }
}
