//! Puts the same questions to one model or two, and keeps the answers, so that an evaluation that
//! was killed goes on with the next question. Knows no text.

use anyhow::{Result, ensure};
use engine::stage::Context;
use serde::{Deserialize, Serialize};

use super::likelihood::{Item, Likelihood};
use super::runner::{Runner, Who};
use crate::train::checkpoint::{self, Saved};

/// The models, and what they answered so far.
pub struct Bench<'a> {
    runner: &'a Runner<'a>,
    budget: usize,
    done: Vec<(Job, Vec<Likelihood>)>,
}

/// One model's answers to one set of questions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Job {
    name: String,
    items: usize,
}

/// What both models say, in the order of the items.
pub struct Answers {
    /// The model evaluated.
    pub student: Vec<Likelihood>,
    /// The model it is compared with.
    pub teacher: Option<Vec<Likelihood>>,
}

impl<'a> Bench<'a> {
    /// With the answers that an earlier attempt left. `budget` is the tokens of one pass.
    pub fn new(runner: &'a Runner<'a>, budget: usize, ctx: &Context) -> Result<Bench<'a>> {
        let mut done = Vec::new();
        if let Some(latest) = ctx.checkpoint_latest() {
            let saved = Saved::open(&latest.dir)?;
            for job in saved.facts::<Vec<Job>>()? {
                let answers = read(&saved, &job)?;
                done.push((job, answers));
            }
        }
        Ok(Bench { runner, budget, done })
    }

    /// Both models' answers to `items`. `name` is unique among the sets of questions.
    pub fn ask(&mut self, name: &str, items: &[Item], ctx: &mut Context) -> Result<Answers> {
        let student = self.side(format!("{name} (student)"), Who::Student, items, ctx)?;
        let teacher = match self.runner.teacher {
            Some(_) => Some(self.side(format!("{name} (teacher)"), Who::Teacher, items, ctx)?),
            None => None,
        };
        Ok(Answers { student, teacher })
    }

    fn side(
        &mut self,
        name: String,
        who: Who,
        items: &[Item],
        ctx: &mut Context,
    ) -> Result<Vec<Likelihood>> {
        let job = Job { name, items: items.len() };
        if let Some((found, answers)) = self.done.iter().find(|(found, _)| found.name == job.name) {
            let (had, has) = (found.items, job.items);
            ensure!(had == has, "the checkpoint has {had} answers of `{}`, not {has}", job.name);
            return Ok(answers.clone());
        }
        let answers = self.runner.likelihoods(who, items, self.budget, ctx, &job.name)?;
        self.done.push((job, answers.clone()));
        self.save(ctx)?;
        Ok(answers)
    }

    fn save(&self, ctx: &mut Context) -> Result<()> {
        let columns: Vec<(String, Vec<f32>)> =
            self.done.iter().flat_map(|(job, answers)| columns(job, answers)).collect();
        let buffers: Vec<(String, &[f32])> =
            columns.iter().map(|(name, values)| (name.clone(), &values[..])).collect();
        let jobs: Vec<&Job> = self.done.iter().map(|(job, _)| job).collect();
        ctx.checkpoint_save(jobs.len() as u64, |dir| checkpoint::write(dir, &buffers, &jobs))
    }
}

fn columns(job: &Job, answers: &[Likelihood]) -> [(String, Vec<f32>); 2] {
    let nats = answers.iter().map(|answer| answer.nats).collect();
    let greedy = answers.iter().map(|answer| f32::from(u8::from(answer.greedy))).collect();
    [(format!("{}.nats", job.name), nats), (format!("{}.greedy", job.name), greedy)]
}

fn read(saved: &Saved, job: &Job) -> Result<Vec<Likelihood>> {
    let nats = saved.all(&format!("{}.nats", job.name), job.items)?;
    let greedy = saved.all(&format!("{}.greedy", job.name), job.items)?;
    let pair = |(nats, greedy): (f32, f32)| Likelihood { nats, greedy: greedy != 0.0 };
    Ok(nats.into_iter().zip(greedy).map(pair).collect())
}
