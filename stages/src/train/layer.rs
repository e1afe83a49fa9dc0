//! One block of the student while it is trained apart from the others, and its files.
//!
//! A block has a layout of its own, so that a step over one layer of a large model holds that
//! layer only. Knows no loss.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail, ensure};
use engine::tensors::Tensors;

use crate::models::params::Entry;
use crate::models::ssm::Ssm;
use crate::models::transfer::copy_shared;
use crate::models::{Block, Builder, Config, Layout, Mixer, MixerKind, Model, Params, Part, file};
use crate::train::adamw::Group;
use crate::train::learner::Learner;

/// One block of the student.
pub struct Layer {
    /// Its number in the model.
    pub number: usize,
    /// Where its parameters lie.
    pub block: Block,
    /// Their names.
    pub layout: Arc<Layout>,
    /// Their values and how they are trained.
    pub learner: Learner,
}

/// What is trained, and how hard.
#[derive(Clone, Copy, Debug)]
pub struct Training {
    /// Weight decay of matrices.
    pub decay: f64,
    /// Largest norm of a gradient.
    pub clip: f64,
}

/// Groups of an optimiser for the selected entries of `layout`.
pub fn groups(layout: &Layout, decay: f64, select: impl Fn(&Entry) -> bool) -> Vec<Group> {
    let group = |span: crate::models::Span| Group {
        range: span.range,
        decay: if span.decay { decay as f32 } else { 0.0 },
        scale: 1.0,
    };
    layout.spans(select).into_iter().map(group).collect()
}

/// The layers to train: those `given`, else all but those of `kept`.
pub fn numbers(given: &[usize], kept: &[usize], layers: usize) -> Result<Vec<usize>> {
    if let Some(outside) = kept.iter().find(|layer| **layer >= layers) {
        bail!("`keep_attention` names layer {outside}, but the teacher has {layers}, from 0 on");
    }
    if let Some(both) = given.iter().find(|layer| kept.contains(layer)) {
        bail!("layer {both} is in `layers` and in `keep_attention`");
    }
    if !given.is_empty() {
        return Ok(given.to_vec());
    }
    let all: Vec<usize> = (0..layers).filter(|layer| !kept.contains(layer)).collect();
    ensure!(!all.is_empty(), "`keep_attention` keeps all {layers} layers: there is nothing to do");
    Ok(all)
}

/// A block of `config` with fresh values and the teacher's norms and MLP.
pub fn start(
    config: &Config,
    number: usize,
    seed: u64,
    (teacher, weights): (&Model, &Params),
) -> Result<(Block, Params)> {
    let layers = config.layers.len();
    ensure!(number < layers, "there is no layer {number}: the teacher has {layers}, from 0 on");
    ensure!(
        teacher.config.layers[number] == MixerKind::Attention,
        "layer {number} of the teacher is no attention, there is nothing to replace"
    );
    let mut builder = Builder::default();
    let prefix = format!("{}{number}.", config.names().layers);
    let block = Block::declare(config, number, &prefix, &mut builder);
    let mut params = Params::random(&builder.finish(), seed);
    let layout = params.layout().clone();
    copy_shared((&teacher.config, weights), (config, &layout), &mut params.flat, |_| true)?;
    Ok((block, params))
}

impl Layer {
    /// Makes a block trainable in the entries that `select` picks.
    pub fn new(
        number: usize,
        block: Block,
        params: Params,
        training: Training,
        select: impl Fn(&Entry) -> bool,
    ) -> Layer {
        let layout = params.layout().clone();
        let groups = groups(&layout, training.decay, select);
        let name = format!("layer {number}");
        Layer {
            number,
            block,
            layout,
            learner: Learner::new(name, params.flat, groups, training.clip),
        }
    }

    /// Its mixer.
    pub fn ssm(&self) -> &Ssm {
        ssm(&self.block)
    }

    /// Writes the selected parts, with the student's configuration and the layer's number.
    pub fn save(&self, path: &Path, config: &Config, select: impl Fn(Part) -> bool) -> Result<()> {
        let metadata = BTreeMap::from([
            ("config".to_string(), serde_json::to_string(config)?),
            ("layer".to_string(), self.number.to_string()),
        ]);
        let mut params = Params::zeros(&self.layout);
        params.flat.copy_from_slice(&self.learner.params);
        file::save(path, &params, &metadata, |file| select(file.part))
    }
}

/// The mixer of a block that has no attention.
pub fn ssm(block: &Block) -> &Ssm {
    match &block.mixer {
        Mixer::Ssm(ssm) => ssm,
        Mixer::Attention(_) => unreachable!("a student's block in training has an `ssm` mixer"),
    }
}

/// The configuration and the layer's number in a file that [`Layer::save`] wrote.
pub fn describe(tensors: &Tensors) -> Result<(Config, usize)> {
    let text = |name: &str| {
        tensors.metadata(name).with_context(|| {
            format!(
                "the file has no `{name}` in its metadata; is it an output of `orient` or `align`?"
            )
        })
    };
    let config: Config = serde_json::from_str(text("config")?).context("in the file's `config`")?;
    config.check()?;
    let layer: usize = text("layer")?.parse().context("in the file's `layer`")?;
    ensure!(layer < config.layers.len(), "the file is of layer {layer}, which its `config` lacks");
    ensure!(config.layers[layer] == MixerKind::Ssm, "layer {layer} of the file is no `ssm` layer");
    Ok((config, layer))
}
