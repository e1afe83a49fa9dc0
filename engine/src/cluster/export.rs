//! A pipeline as jobs that need no leader, for sites that forbid one: a script that submits a chain
//! to Slurm, or Kubernetes Jobs. Each job runs one step by `pipe run --only`, so it plans for
//! itself, and nothing is decided in between: what is cached costs a job that ends at once. Pure.

use serde_json::{Value, json};

use super::Settings;
use super::batch::Shape;
use super::slurm::script::{quoted, steps};
use crate::lookup;
use crate::plan::Plan;

/// A step as a job.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// The step, as a shell takes it: `align@2`.
    pub step: String,
    /// Places in the list of the jobs that it needs.
    pub after: Vec<usize>,
    /// What it takes.
    pub shape: Shape,
    /// How many jobs are before it at least.
    pub wave: usize,
}

/// The jobs of `steps` of a plan, in the plan's order; `shape` tells what a step takes.
pub fn jobs(plan: &Plan, steps: &[usize], shape: impl Fn(usize) -> Shape) -> Vec<Job> {
    let mut jobs: Vec<Job> = Vec::with_capacity(steps.len());
    for &step in steps {
        let mut after: Vec<usize> = lookup::upstream(plan, step)
            .into_iter()
            .filter_map(|earlier| steps.binary_search(&earlier).ok())
            .collect();
        after.sort_unstable();
        after.dedup();
        let wave = after.iter().map(|&at| jobs[at].wave + 1).max().unwrap_or(0);
        let name = plan.steps[step].name.replace('[', "@").replace(']', "");
        jobs.push(Job { step: name, after, shape: shape(step), wave });
    }
    jobs
}

/// A shell script that submits all jobs to Slurm, each after those it needs. `run` is the command
/// without `--only`.
pub fn script(jobs: &[Job], settings: &Settings, name: &str, run: &[String]) -> String {
    let mut text = String::from(
        "#!/bin/bash\n# Submits every step as a job of its own, after the steps it needs. No leader looks after them:\n# a job that fails cancels what needs it; submit again, and what is done is not done again.\nset -euo pipefail\n",
    );
    for (at, job) in jobs.iter().enumerate() {
        let mut args = steps(settings, &format!("{name}-{}", job.step), &job.shape);
        if !job.after.is_empty() {
            args.push("--kill-on-invalid-dep=yes".into());
        }
        let mut words: Vec<String> = args.iter().map(|arg| quoted(arg)).collect();
        if !job.after.is_empty() {
            let ids: Vec<String> = job.after.iter().map(|at| format!("$job{at}")).collect();
            words.push(format!("\"--dependency=afterok:{}\"", ids.join(":")));
        }
        let line: Vec<String> = run.iter().map(|word| quoted(word)).collect();
        let line = format!("{} --only {}", line.join(" "), quoted(&job.step));
        let setup: String = settings.setup.iter().map(|line| format!("{line}\n")).collect();
        text += &format!("\n# {}\njob{at}=$(sbatch {} <<'STEP'\n", job.step, words.join(" "));
        text += &format!("#!/bin/bash\n{setup}exec {line}\nSTEP\n)\njob{at}=${{job{at}%%;*}}\n");
    }
    text += &format!("\necho \"{} jobs were submitted\"\n", jobs.len());
    text
}

/// Where Kubernetes finds what jobs need.
#[derive(Clone, Debug)]
pub struct Pods {
    /// An image with `pipe` in it.
    pub image: String,
    /// A claim of a volume that all pods share, for the store and the pipeline's files.
    pub claim: Option<String>,
    /// Where it is mounted.
    pub mount: String,
}

/// Kubernetes Jobs, a list in JSON, which is YAML too. They know no order: each has its wave as a
/// label, `pipe/wave`.
pub fn kubernetes(jobs: &[Job], pods: &Pods, name: &str, run: &[String]) -> String {
    let items: Vec<Value> = jobs
        .iter()
        .enumerate()
        .map(|(at, job)| {
            let command: Vec<String> =
                run.iter().cloned().chain(["--only".into(), job.step.clone()]).collect();
            let mut limits = json!({ "cpu": job.shape.cpus.max(1).to_string() });
            if job.shape.gpus > 0 {
                limits["nvidia.com/gpu"] = json!(job.shape.gpus.to_string());
            }
            if job.shape.memory > 0 {
                limits["memory"] = json!(job.shape.memory.to_string());
            }
            let mut container = json!({
                "name": "step",
                "image": pods.image,
                "command": command,
                "workingDir": pods.mount,
                "resources": { "limits": limits, "requests": limits },
            });
            let mut pod = json!({ "restartPolicy": "Never" });
            if let Some(kind) = &job.shape.gpu_type {
                pod["nodeSelector"] = json!({ "nvidia.com/gpu.product": kind });
            }
            if let Some(claim) = &pods.claim {
                container["volumeMounts"] = json!([{ "name": "shared", "mountPath": pods.mount }]);
                let claim = json!({ "claimName": claim });
                pod["volumes"] = json!([{ "name": "shared", "persistentVolumeClaim": claim }]);
            }
            pod["containers"] = json!([container]);
            let labels = json!({ "pipe/pipeline": label(name), "pipe/wave": job.wave.to_string() });
            let mut spec = json!({
                // Lost pods and evictions are no failures of the step.
                "backoffLimit": 3,
                "template": { "metadata": { "labels": labels }, "spec": pod },
            });
            if let Some(seconds) = job.shape.time_s {
                spec["activeDeadlineSeconds"] = json!(seconds);
            }
            let name = format!("{}-{at}-{}", label(name), label(&job.step));
            let name: String = name.chars().take(63).collect();
            let annotations = json!({ "pipe/step": job.step });
            json!({
                "apiVersion": "batch/v1",
                "kind": "Job",
                "metadata": {
                    "name": name.trim_end_matches('-'), "labels": labels, "annotations": annotations
                },
                "spec": spec,
            })
        })
        .collect();
    let list = json!({ "apiVersion": "v1", "kind": "List", "items": items });
    format!("{}\n", serde_json::to_string_pretty(&list).expect("texts and numbers"))
}

/// A word as Kubernetes takes it for a name.
fn label(text: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
    let text: String = text.chars().map(plain).take(40).collect();
    text.trim_matches('-').to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{Port, Source, Step};

    fn plan() -> Plan {
        let from = |step| Port {
            name: "i".into(),
            named: false,
            list: true,
            place: Default::default(),
            sources: vec![Source::Step { step, port: "o".into(), index: None }],
        };
        let step =
            |name: &str, inputs: Vec<Port>| Step { name: name.into(), inputs, ..Step::default() };
        let steps = vec![
            step("a", vec![]),
            step("b[1]", vec![from(0)]),
            step("b[x=1,y=2]", vec![from(0)]),
            step("c", vec![from(1), from(2), from(0)]),
        ];
        Plan { name: "p".into(), steps, ..Plan::default() }
    }

    fn made() -> Vec<Job> {
        jobs(&plan(), &[0, 1, 2, 3], |step| Shape {
            cpus: 2,
            gpus: u32::from(step == 3),
            ..Shape::default()
        })
    }

    #[test]
    fn waves_and_needs_follow_the_plan() {
        let jobs = made();
        let told: Vec<_> = jobs.iter().map(|j| (&j.step[..], j.wave, &j.after[..])).collect();
        assert_eq!(
            told,
            [("a", 0, &[][..]), ("b@1", 1, &[0]), ("b@x=1,y=2", 1, &[0]), ("c", 2, &[0, 1, 2])]
        );
        let part = super::jobs(&plan(), &[1, 3], |_| Shape::default());
        assert_eq!((part[0].wave, &part[1].after[..]), (0, &[0][..]), "others are there already");
    }

    #[test]
    fn a_script_names_what_each_job_waits_for() {
        let run = ["pipe", "run", "my p.yaml"].map(String::from);
        let text = script(&made(), &Settings::default(), "p", &run);
        assert!(text.contains("\"--dependency=afterok:$job0:$job1:$job2\""), "{text}");
        assert!(text.contains("exec pipe run 'my p.yaml' --only b@x=1,y=2\n"), "{text}");
        assert_eq!(text.matches("$(sbatch ").count(), 4);
        assert!(text.contains("--gres=gpu:1"), "{text}");
    }

    #[test]
    fn kubernetes_gets_a_list_of_jobs() {
        let pods =
            Pods { image: "lab/pipe".into(), claim: Some("store".into()), mount: "/work".into() };
        let text = kubernetes(&made(), &pods, "My P", &["pipe".into(), "run".into()]);
        let list: Value = serde_json::from_str(&text).unwrap();
        let last = &list["items"][3];
        assert_eq!(last["metadata"]["labels"]["pipe/wave"], "2");
        let pod = &last["spec"]["template"]["spec"];
        assert_eq!(pod["containers"][0]["command"], json!(["pipe", "run", "--only", "c"]));
        assert_eq!(pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"], "1");
        assert_eq!(pod["volumes"][0]["persistentVolumeClaim"]["claimName"], "store");
        assert_eq!(list["items"][2]["metadata"]["name"], "my-p-2-b-x-1-y-2");
    }
}
