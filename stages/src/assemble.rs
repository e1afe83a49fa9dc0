//! Weight transfer: aligned blocks and the teacher's embedding, final norm and head become a student.
//!
//! A layer that no block replaces must be named in `keep_attention`; gaps and duplicates are
//! errors. Without blocks, `init` gives every other layer a fresh mixer (phase 3 alone).

use anyhow::{Context as _, Result, bail, ensure};
use engine::stage::{Context, In, Out, Ports, Stage};
use engine::tensors::Tensors;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::models::start::Start;
use crate::models::transfer::{Sizes, copy_shared, student_config};
use crate::models::{Config, Mixer, Model, Part, file};
use crate::train::layer::describe;

/// Layers that keep attention.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Kept {
    /// By number, from 0.
    Layers(Vec<usize>),
    /// A word.
    Word(KeptWord),
}

/// The word for layers without a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum KeptWord {
    /// All that no block replaces.
    Rest,
}

/// Parameters of `assemble`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Which layers keep the teacher's attention (a hybrid): their numbers, or `rest` for all that
    /// no block replaces.
    pub keep_attention: Kept,
    /// Without `blocks`: where the mixers begin (not `attention`).
    pub init: Option<Start>,
    /// Without `blocks`: state size N of a student's head.
    pub d_state: usize,
    /// Without `blocks`: taps of the convolution.
    pub d_conv: usize,
    /// Without `blocks`: chunk length of the scan.
    pub chunk: usize,
    /// Without `blocks`: decides random weights.
    pub seed: u64,
}

impl Default for Params {
    fn default() -> Params {
        Params {
            keep_attention: Kept::Layers(Vec::new()),
            init: None,
            d_state: 32,
            d_conv: 4,
            chunk: 32,
            seed: 17,
        }
    }
}

/// The stage.
pub struct Assemble;

impl Stage for Assemble {
    const NAME: &'static str = "assemble";
    const VERSION: u32 = 2;
    const DOC: &'static str = "Puts blocks and the teacher's other weights together to a student.";
    type Params = Params;

    fn ports() -> Ports {
        const INPUTS: &[In] = &[
            In::one("teacher", "the transformer whose other weights the student takes").tensors(),
            In::many("blocks", "aligned blocks; fresh mixers without them").tensors().optional(),
        ];
        const OUTPUTS: &[Out] = &[Out::one("model", "model.safetensors", "the student")];
        Ports { inputs: INPUTS, outputs: OUTPUTS }
    }

    fn check(params: &Params) -> Vec<(String, String)> {
        let mut found = Vec::new();
        if params.init == Some(Start::Attention) {
            let what = "`attention` is a start of `orient`; here it may be any other";
            found.push(("init".into(), what.into()));
        }
        found
    }

    fn run(params: &Params, ctx: &mut Context) -> Result<()> {
        let (teacher, weights) =
            Model::load(&ctx.tensors("teacher")?).context("input `teacher`")?;
        let layers = teacher.config.layers.len();
        let blocks = blocks(ctx, &teacher.config)?;
        let kept = kept(params, &blocks, layers);
        covered(params, &kept, &blocks, layers)?;
        let sizes = match blocks.first() {
            Some(block) => Sizes {
                state: block.config.d_state,
                taps: block.config.d_conv,
                chunk: block.config.chunk,
            },
            None => Sizes { state: params.d_state, taps: params.d_conv, chunk: params.chunk },
        };
        let student = Model::new(student_config(&teacher.config, sizes, &kept))?;
        let mut values = student.init(params.seed);
        for (number, block) in student.blocks.iter().enumerate() {
            if let (Mixer::Ssm(ssm), Some(init)) = (&block.mixer, params.init) {
                init.apply(ssm, &mut values.flat, (params.seed, number));
            }
        }
        let (from, to) = ((&teacher.config, &weights), (&student.config, &*student.layout));
        copy_shared(from, to, &mut values.flat, |_| true)?;
        for block in &blocks {
            let own = |part: Part| part.layer() == Some(block.layer);
            file::load(&mut values, &block.tensors, |file| own(file.part))
                .with_context(|| format!("block of layer {}", block.layer))?;
        }
        student.save(&ctx.output("model")?, &values)
    }
}

struct Found {
    layer: usize,
    config: Config,
    tensors: Tensors,
}

/// The blocks at the port, which must be of students of this teacher.
fn blocks(ctx: &Context, teacher: &Config) -> Result<Vec<Found>> {
    let mut found: Vec<Found> = Vec::new();
    for (_, tensors) in ctx.tensors_list("blocks")? {
        let (config, layer) = describe(&tensors).context("input `blocks`")?;
        let sizes = Sizes { state: config.d_state, taps: config.d_conv, chunk: config.chunk };
        ensure!(
            config == student_config(teacher, sizes, &[]),
            "the block of layer {layer} is of a student of another teacher"
        );
        if let Some(first) = found.first() {
            ensure!(config == first.config, "the blocks are of students of different sizes");
        }
        ensure!(
            found.iter().all(|f| f.layer != layer),
            "layer {layer} is there twice; connect one block for each layer"
        );
        found.push(Found { layer, config, tensors });
    }
    Ok(found)
}

/// The numbers of the layers that keep attention.
fn kept(params: &Params, blocks: &[Found], layers: usize) -> Vec<usize> {
    match &params.keep_attention {
        Kept::Layers(numbers) => numbers.clone(),
        Kept::Word(KeptWord::Rest) => {
            (0..layers).filter(|layer| blocks.iter().all(|block| block.layer != *layer)).collect()
        }
    }
}

/// Refuses layers that are neither replaced nor kept, and those that are both.
fn covered(params: &Params, kept: &[usize], blocks: &[Found], layers: usize) -> Result<()> {
    if let Some(outside) = kept.iter().find(|layer| **layer >= layers) {
        bail!("`keep_attention` names layer {outside}, but the teacher has {layers}, from 0 on");
    }
    let kept = |layer: &usize| kept.contains(layer);
    if let Some(both) = blocks.iter().find(|block| kept(&block.layer)) {
        bail!("layer {} is in `keep_attention`, but a block of `blocks` replaces it", both.layer);
    }
    if blocks.is_empty() {
        ensure!(
            params.init.is_some(),
            "nothing is connected to `blocks`; connect them, or give `init: default` for a student \
             with fresh mixers"
        );
        return Ok(());
    }
    ensure!(
        params.init.is_none(),
        "`init` is for students without `blocks`; leave one of them out"
    );
    let missing: Vec<String> = (0..layers)
        .filter(|layer| !kept(layer) && blocks.iter().all(|block| block.layer != *layer))
        .map(|layer| layer.to_string())
        .collect();
    ensure!(
        missing.is_empty(),
        "no block replaces layer {}; connect it to `blocks`, or name it in `keep_attention` to \
         keep the teacher's attention there",
        missing.join(", ")
    );
    Ok(())
}
